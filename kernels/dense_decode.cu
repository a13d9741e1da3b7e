// Dense GEMV for 1 to 8 rows of x in 16 bits, with what a decode step has around a product:
//
//     y[r, o] = sum_i weight[o, i] * x[r, i] + bias[o] + residual[r, o]
//
//     norm      x is first normalised: x[r, i] * rstd[r] * norm[i], rstd = (mean of the squares of row r + eps)^-1/2
//     GATED     rows of the weight are gates, then as many ups, and y[r, o] = silu(gate[r, o]) * up[r, o], half as many
// Both round where transformers' modules round: x * rstd, times norm; gate, up, silu(gate), the product. Sums are fp32.
//
// Compiled once for each set of macros:
//     XTYPE     0 fp16, 1 bf16: dtype of everything but the sums
//     ROWS      rows of x, 1 to 8
//     OCTETS    rows of the weight that a block works on at once, by eights
//     WARPS     warps a block; they split the inputs
//     AHEAD     steps that a warp has in flight
//     BLOCKS    blocks that are to fit a multiprocessor; bounds the registers
//     GATED     1: gated
//     TENSOR    1: multiply on tensor cores; 0: with fp32 FMA (for bf16 below sm_80, which has no such MMA)
//     ALIGNED   1: in_features is a multiple of 8, and weight, x and norm start at multiples of 16 bytes; 0: loads by element
//
// A tile is 8 * OCTETS rows of the weight, as nn.Linear has them; a step is 64 of their inputs, a whole line of 128 bytes:
//
//     weight row 8n + g    | 16 bytes of slot 0 | slot 1 | slot 2 | slot 3 | 0 | 1 | 2 | 3 |      lane 4g + slot
//                            half 0                                          half 1
//
// That is B of mma.m16n8k16 without a shuffle, since the order of the inputs in a product is free as long as x follows:
// column g of B is row g of the octet, x in A is row g = row of x, and each lane's 16 bytes are the k of its slot in two MMAs.
// Rows 8 to 15 of A are zero and cost nothing that memory does not hide; all rows of x have the price of one.
//
// Blocks stay: each takes tiles blockIdx.x, + gridDim.x, ..., stages x once (in panels where it is too long, then anew for each
// tile), and has the next round of loads in flight, over the end of a tile too. Warps meet in shared memory in a fixed order,
// so a result is bit-identical from run to run.
//
// Bytes moved per weight row: 2 * in_features; x once a block, from L2.

#include <cuda_fp16.h>
#include <cuda_bf16.h>

#ifndef XTYPE
#define XTYPE 0
#endif
#ifndef ROWS
#define ROWS 1
#endif
#ifndef OCTETS
#define OCTETS 1
#endif
#ifndef WARPS
#define WARPS 8
#endif
#ifndef AHEAD
#define AHEAD 4
#endif
#ifndef BLOCKS
#define BLOCKS 2
#endif
#ifndef GATED
#define GATED 0
#endif
#ifndef TENSOR
#define TENSOR 1
#endif
#ifndef ALIGNED
#define ALIGNED 1
#endif
#if TENSOR && XTYPE == 1 && __CUDA_ARCH__ < 800
#error "bf16 on tensor cores begins with sm_80: compile with TENSOR=0"
#endif

#if XTYPE == 0
typedef __half xtype;
typedef __half2 xpair;
#else
typedef __nv_bfloat16 xtype;
typedef __nv_bfloat162 xpair;
#endif

constexpr int LANES = 32;
constexpr int CHUNK = 8;                            // values in 16 bytes
constexpr int HALVES = 2;                           // loads a step, lane and octet
constexpr int STEP = 4 * CHUNK * HALVES;            // inputs a step
constexpr int COLUMNS = 8 * OCTETS;                 // rows of the weight in a tile
constexpr int OUTPUTS = GATED ? COLUMNS / 2 : COLUMNS;  // of a tile and row of x
constexpr int THREADS = LANES * WARPS;
constexpr int ROUND = WARPS * AHEAD;                // steps of one turn of all warps
constexpr int RESULTS = (ROWS * OUTPUTS + THREADS - 1) / THREADS;  // that a thread finishes of a tile
constexpr int PITCH_PAD = 4 * CHUNK;                // so that two neighbouring rows of x fill a line of all banks

__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float2 to_floats(__half2 v) { return __half22float2(v); }
__device__ __forceinline__ float2 to_floats(__nv_bfloat162 v) { return __bfloat1622float2(v); }
__device__ __forceinline__ xtype from_float(float v) {
#if XTYPE == 0
    return __float2half_rn(v);
#else
    return __float2bfloat16_rn(v);
#endif
}
__device__ __forceinline__ float round_to_x(float v) { return to_float(from_float(v)); }

// Sixteen bytes, one by one.
union Chunk {
    uint4 all;
    xpair pairs[CHUNK / 2];
    xtype x[CHUNK];
};

// Programmatic dependent launch: a no-op below sm_90 and in launches without the attribute.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ xtype load_one(const xtype* address) {
    unsigned short bits;
    asm volatile("ld.relaxed.gpu.global.u16 %0, [%1];" : "=h"(bits) : "l"(address));
    return *reinterpret_cast<xtype*>(&bits);
}

// Weights are read once: keep them out of L1. A relaxed load, because the assembler moves a plain one below
// `wait_for_previous_kernel`. Zero from `left` values on.
__device__ __forceinline__ uint4 load_once(const xtype* address, int left) {
    Chunk v = {};
#if ALIGNED
    asm volatile("{ .reg .pred p; setp.gt.s32 p, %5, 0; @p ld.relaxed.gpu.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
                 : "+r"(v.all.x), "+r"(v.all.y), "+r"(v.all.z), "+r"(v.all.w) : "l"(address), "r"(left));
#else
#pragma unroll
    for (int e = 0; e < CHUNK; e++)
        if (e < left) v.x[e] = load_one(address + e);
#endif
    return v.all;
}

// Load a chunk of x; where the lane has no row of x, `v` stays as it is, zero.
__device__ __forceinline__ void load_x(uint4& v, unsigned address, bool reads) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.shared.v4.b32 {%0, %1, %2, %3}, [%4]; }"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "r"(address), "r"((unsigned)reads));
}

#if TENSOR
typedef float Sums[OCTETS][4];  // of rows of x 8 to 15, the last two, nothing but zero
// sums += x weight for the 16 inputs of `x0`, `x1` and `w0`, `w1`.
__device__ __forceinline__ void multiply_add(float sums[4], unsigned x0, unsigned x1, unsigned w0, unsigned w1) {
#if XTYPE == 1
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %6, %5, %6}, {%7, %8}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(x0), "r"(x1), "r"(0), "r"(w0), "r"(w1));
#elif __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %6, %5, %6}, {%7, %8}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(x0), "r"(x1), "r"(0), "r"(w0), "r"(w1));
#else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(x0), "r"(0), "r"(w0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(x1), "r"(0), "r"(w1));
#endif
}

// One half of a step: x of this lane's row is at `x_at`.
__device__ __forceinline__ void multiply_half(Sums& sums, const uint4 weights[OCTETS][HALVES], int half, unsigned x_at, int pitch_bytes, uint4& x,
                                              bool reads) {
    load_x(x, x_at, reads);
#pragma unroll
    for (int n = 0; n < OCTETS; n++) {
        const uint4 w = weights[n][half];
        multiply_add(sums[n], x.x, x.y, w.x, w.y);
        multiply_add(sums[n], x.z, x.w, w.z, w.w);
    }
}

// Leave a warp's sums in shared memory: partial [WARPS][ROWS][COLUMNS].
__device__ __forceinline__ void leave_sums(const Sums& sums, float* partial, int warp, int group, int slot) {
    if (group >= ROWS) return;
#pragma unroll
    for (int n = 0; n < OCTETS; n++)
        *reinterpret_cast<float2*>(partial + (warp * ROWS + group) * COLUMNS + 8 * n + 2 * slot) = make_float2(sums[n][0], sums[n][1]);
}
#else
typedef float Sums[OCTETS][ROWS];  // of this lane's rows of the weight and its slot of the inputs
__device__ __forceinline__ float multiply_chunk(float sum, const uint4& left, const uint4& right) {
    Chunk a, b;
    a.all = left, b.all = right;
#pragma unroll
    for (int k = 0; k < CHUNK / 2; k++) {
        const float2 u = to_floats(a.pairs[k]), v = to_floats(b.pairs[k]);
        sum = fmaf(u.x, v.x, sum);
        sum = fmaf(u.y, v.y, sum);
    }
    return sum;
}

// One half of a step: x of row 0 is at `x_at`.
__device__ __forceinline__ void multiply_half(Sums& sums, const uint4 weights[OCTETS][HALVES], int half, unsigned x_at, int pitch_bytes, uint4& x,
                                              bool) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        load_x(x, x_at + r * pitch_bytes, true);
#pragma unroll
        for (int n = 0; n < OCTETS; n++) sums[n][r] = multiply_chunk(sums[n][r], weights[n][half], x);
    }
}

// Leave a warp's sums in shared memory, its slots added: partial [WARPS][ROWS][COLUMNS].
__device__ __forceinline__ void leave_sums(const Sums& sums, float* partial, int warp, int group, int slot) {
#pragma unroll
    for (int n = 0; n < OCTETS; n++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float sum = sums[n][r];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            if (slot == 0) partial[(warp * ROWS + r) * COLUMNS + 8 * n + group] = sum;
        }
}
#endif

__device__ __forceinline__ void copy_ahead(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from) : "memory");
#else
    *reinterpret_cast<uint4*>(to) = __ldcg(reinterpret_cast<const uint4*>(from));
#endif
}
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Stage inputs [first, first + count) of one row as they are, zero from in_features on. Chunk c of it is thread c % THREADS's,
// here and below, so that a thread may go on with its own before the others are done. The copies may still be under way.
__device__ __forceinline__ void stage_row(const xtype* row, int in_features, int first, int count, xtype* staged, int thread) {
#pragma unroll 1
    for (int i = CHUNK * thread; i < count; i += CHUNK * THREADS) {
        const int left = in_features - first - i;
        if (ALIGNED && left > 0) copy_ahead(staged + i, row + first + i);
        else *reinterpret_cast<uint4*>(staged + i) = ALIGNED ? make_uint4(0, 0, 0, 0) : load_once(row + first + i, left);
    }
}

// The sum of squares of this thread's chunks.
__device__ __forceinline__ float own_squares(const xtype* staged, int count, int thread) {
    float sum = 0.f;
    for (int i = CHUNK * thread; i < count; i += CHUNK * THREADS) {
        Chunk chunk;
        chunk.all = *reinterpret_cast<const uint4*>(staged + i);
#pragma unroll
        for (int k = 0; k < CHUNK; k++) sum = fmaf(to_float(chunk.x[k]), to_float(chunk.x[k]), sum);
    }
    return sum;
}

// rstd [ROWS] in shared memory from each thread's sums of squares. All threads call; `scratch` holds ROWS * WARPS floats.
__device__ __forceinline__ void find_rstd(float squares[ROWS], float eps, int in_features, float* scratch, float* rstd, int warp, int lane) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int step = 16; step; step /= 2) squares[r] += __shfl_xor_sync(~0u, squares[r], step);
        if (lane == 0) scratch[r * WARPS + warp] = squares[r];
    }
    __syncthreads();
    const int row = warp * LANES + lane;
    if (row < ROWS) {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += scratch[row * WARPS + w];
        rstd[row] = rsqrtf(sum / in_features + eps);
    }
    __syncthreads();
}

// Normalise this thread's chunks of one row.
__device__ __forceinline__ void normalise_row(xtype* staged, const xtype* norm, float rstd, int count, int thread) {
    for (int i = CHUNK * thread; i < count; i += CHUNK * THREADS) {
        Chunk chunk, weight;
        chunk.all = *reinterpret_cast<const uint4*>(staged + i);
        weight.all = *reinterpret_cast<const uint4*>(norm + i);
#pragma unroll
        for (int k = 0; k < CHUNK; k++) chunk.x[k] = from_float(round_to_x(to_float(chunk.x[k]) * rstd) * to_float(weight.x[k]));
        *reinterpret_cast<uint4*>(staged + i) = chunk.all;
    }
}

// The row of the weight that is column `column` of a tile; beyond the last output, the last one again.
__device__ __forceinline__ int weight_row(int tile, int column, int out_features) {
    const int output = min(tile * OUTPUTS + column % OUTPUTS, out_features - 1);
    return GATED ? column / OUTPUTS * out_features + output : output;
}

// One column of a tile from all warps.
__device__ __forceinline__ float sum_of_warps(const float* partial, int row, int column) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += partial[(w * ROWS + row) * COLUMNS + column];
    return sum;
}

// weight    [out_features, in_features], GATED [2 * out_features, in_features]; static
// x         [ROWS, in_features]
// norm      [in_features] or null; static
// bias      [rows of the weight] or null; static
// residual  [ROWS, out_features] or null
// y         [ROWS, out_features]
// eps       of the norm
// tiles     ceil(out_features / OUTPUTS)
// rounds    turns that all warps take through the inputs: ceil(in_features / (STEP * ROUND)); panel: those whose x is in shared memory at once
// grid      at most `tiles` blocks of (32, WARPS) threads
// shared    2 * (ROWS + 1 with norm) * (panel * ROUND * STEP + PITCH_PAD) + 8 * WARPS * ROWS * COLUMNS + 4 * ROWS * (WARPS + 1)
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
dense_decode(const xtype* __restrict__ weight, const xtype* x, const xtype* norm, const xtype* bias, const xtype* residual, xtype* y,
             float eps, int in_features, int out_features, int tiles, int rounds, int panel) {
    extern __shared__ __align__(16) char dynamic_shared[];
    const int lane = threadIdx.x, warp = threadIdx.y, thread = warp * LANES + lane;
    const int group = lane >> 2, slot = lane & 3;  // of an MMA's fragments
    const int pitch = panel * ROUND * STEP + PITCH_PAD;
    xtype* const staged = reinterpret_cast<xtype*>(dynamic_shared);  // x, and behind it norm
    xtype* const staged_norm = staged + ROWS * pitch;
    float* const partial = reinterpret_cast<float*>(staged + (ROWS + (norm != nullptr)) * pitch);  // of two tiles in turns
    float* const scratch = partial + 2 * WARPS * ROWS * COLUMNS;
    float* const rstd = scratch + ROWS * WARPS;

    // Weights in flight: the round of tile `loading` whose first chunk of this lane, octet by octet, is at `next`.
    uint4 ahead[AHEAD][OCTETS][HALVES];
    int loading = blockIdx.x, left_of_tile;  // values of a row from `next` to its end
    const xtype* next[OCTETS];
    const auto to_tile = [&] {
#pragma unroll
        for (int n = 0; n < OCTETS; n++)
            next[n] = weight + (size_t)weight_row(loading, 8 * n + group, out_features) * in_features + warp * STEP + CHUNK * slot;
        left_of_tile = loading < tiles ? in_features - warp * STEP - CHUNK * slot : 0;
    };
    const auto load = [&](int k) {
#pragma unroll
        for (int n = 0; n < OCTETS; n++)
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                const int i = k * WARPS * STEP + h * 4 * CHUNK;
                ahead[k][n][h] = load_once(next[n] + i, left_of_tile - i);
            }
    };
    const auto to_next_round = [&](bool last) {
        if (last) {
            loading += gridDim.x;
            to_tile();
            return;
        }
#pragma unroll
        for (int n = 0; n < OCTETS; n++) next[n] += ROUND * STEP;
        left_of_tile -= ROUND * STEP;
    };
    to_tile();
#pragma unroll
    for (int k = 0; k < AHEAD; k++) load(k);

    const auto inputs_from = [&](int round) { return min(panel, rounds - round) * ROUND * STEP; };
    const auto stage_norm = [&](int from) {
        if (norm) stage_row(norm, in_features, from * ROUND * STEP, inputs_from(from), staged_norm, thread);
    };
    const auto stage_x = [&](int from) {
#pragma unroll 1
        for (int r = 0; r < ROWS; r++)
            stage_row(x + (size_t)r * in_features, in_features, from * ROUND * STEP, inputs_from(from), staged + r * pitch, thread);
        wait_for_copies();
    };
    const auto normalise = [&](int from) {
        if (norm)
#pragma unroll 1
            for (int r = 0; r < ROWS; r++) normalise_row(staged + r * pitch, staged_norm, rstd[r], inputs_from(from), thread);
        __syncthreads();
    };
    stage_norm(0);
    wait_for_previous_kernel();
    allow_next_kernel();  // after the wait: when a kernel starts, the one before the one before it has completed
    float squares[ROWS] = {};
    const auto add_squares = [&](int from) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) squares[r] += own_squares(staged + r * pitch, inputs_from(from), thread);
    };
    if (norm)
        for (int from = panel; from < rounds; from += panel) stage_x(from), add_squares(from);
    stage_x(0);
    if (norm) {
        add_squares(0);
        find_rstd(squares, eps, in_features, scratch, rstd, warp, lane);
    }
    normalise(0);

    const unsigned x_start = (unsigned)__cvta_generic_to_shared(staged + (TENSOR ? group * pitch : 0) + warp * STEP + CHUNK * slot);
    const bool reads = group < ROWS;
    uint4 x_chunk = {};
    int from = 0, turn = 0;  // first round of the panel in shared memory; which half of `partial` is next
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, turn ^= 1) {
        xtype added[RESULTS] = {};
        const auto place_of = [&](int j) {  // of this thread's result j in y, or -1
            const int at = thread + j * THREADS, output = tile * OUTPUTS + at % OUTPUTS;
            return at < ROWS * OUTPUTS && output < out_features ? at / OUTPUTS * out_features + output : -1;
        };
        if (residual)
#pragma unroll
            for (int j = 0; j < RESULTS; j++)
                if (place_of(j) >= 0) added[j] = load_one(residual + place_of(j));
        Sums sums = {};
        unsigned x_at = x_start;
        for (int round = 0; round < rounds; round++, x_at += 2 * ROUND * STEP) {
            if (round < from || round >= from + panel) {
                __syncthreads();
                from = round;
                x_at = x_start;
                stage_norm(from);
                stage_x(from);
                normalise(from);
            }
            to_next_round(round + 1 == rounds);
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
#pragma unroll
                for (int h = 0; h < HALVES; h++)
                    multiply_half(sums, ahead[k], h, x_at + 2 * (k * WARPS * STEP + h * 4 * CHUNK), 2 * pitch, x_chunk, reads);
                load(k);
            }
        }
        float* const own = partial + turn * WARPS * ROWS * COLUMNS;
        leave_sums(sums, own, warp, group, slot);
        __syncthreads();  // the next tile's sums go to the other half, and the one after that comes behind another of these
#pragma unroll
        for (int j = 0; j < RESULTS; j++) {
            if (place_of(j) < 0) continue;
            const int at = thread + j * THREADS, row = at / OUTPUTS, column = at % OUTPUTS, output = tile * OUTPUTS + column;
            float total = sum_of_warps(own, row, column) + (bias ? to_float(bias[output]) : 0.f);
            if (GATED) {
                const float gate = round_to_x(total);
                const float up = round_to_x(sum_of_warps(own, row, OUTPUTS + column) + (bias ? to_float(bias[out_features + output]) : 0.f));
                total = round_to_x(gate / (1.f + expf(-gate))) * up;
            }
            if (residual) total += to_float(added[j]);
            y[place_of(j)] = from_float(total);
        }
    }
}
