// Batch-1 GEMV from additive codebooks: 8 weights are a sum of 2 or 4 vectors, looked up and never materialised:
//
//     y[o] = scale[o] * sum_g sum_j sum_c codebook[c, code[o, g, c], j] * x[8g + j] + bias[o]
//
// The format is AQLM's (Egiazarian et al., 2024): 256 vectors of 8 fp16 weights a codebook, shared by the whole matrix.
// Compiled once for each set of macros:
//     CODEBOOKS  2 (2 bits a weight) or 4 (4 bits)
//     XTYPE      0 fp16, 1 bf16, 2 fp32: dtype of x, bias and y
//     CHANNELS   output channels a warp works on at once, 32 or 64
//     COPIES     of each codebook in shared memory, 8, 4 or 2
//     WARPS      warps a block at most
//     AHEAD      steps that a warp has in flight
//     BLOCKS     blocks that a multiprocessor should hold
//
// Packed codes. A tile is 32 output channels (one a lane); a lane's 16-byte load holds consecutive groups of its channel,
// each as CODEBOOKS bytes, and a warp's load is one contiguous 512 bytes:
//
//     codes[out/32][in/STEP][32 lanes][16 bytes]          STEP 64 inputs (2 codebooks) or 32 (4)
//
// `out` is padded to 32 and `in` to STEP, with zeros; x is zero in the padding.
//
// Table. A lookup is one 16-byte shared load, which the hardware serves eight lanes at a time. With 8 copies each of these
// lanes reads its own copy, in its own four banks, and no two lanes conflict, whatever the codes are:
//
//     entry e, ENTRY bytes   codebook 0: copy 0 .. copy COPIES-1 | codebook 1: copy 0 .. | ..       16 bytes each
//
// With ENTRY 256 the address is one byte-permute: the code becomes byte 1, the copy is byte 0, and which codebook is part of the
// instruction. What does not fit in an entry lies in a second table. Fewer copies cost two- or fourfold reads, for cards
// with little shared memory; where they leave ENTRY at 128 the address costs a shift more.
//
// Multiply-add on tensor cores, with a B that is diagonal. In mma.m16n8k16 a row of A is spread over the four lanes of a
// quad (slots of k); here each lane of the quad is a channel of its own, so x stands in B only where the column (mod 4) is
// the slot:
//
//     A, row g       lane 4g + t holds slot t: k 2t 2t+1 2t+8 2t+9 = its weights 0 1 4 5 of the group
//     A, row g + 8   the same lanes, weights 2 3 6 7
//     B, column n    slot n mod 4 holds x[0 1 4 5] of the group (n < 4) or x[2 3 6 7] (n >= 4), the other slots zero
//     D[g][n], n < 4, is channel 4g + n over inputs 0 1 4 5; D[g+8][4 + n] over inputs 2 3 6 7; the rest is not used
//
// (This order of the inputs takes the registers of A as the lookup loads them.)
//
// One B serves all codebooks of a group: the vectors are added by the tensor core, in fp32, and never by themselves.
//
// A block builds the table once and then takes every gridDim.x-th tile; its warps split the inputs and meet in shared memory
// in a fixed order, so a result is bit-identical from run to run. bf16 and fp32 activations are scaled by a power of two so
// that the largest lies in [1, 2) before they become fp16, and the scale is undone at the end.
//
// Bytes moved per output channel: in/8*CODEBOOKS of codes + 2 of scale + sizeof(y); x and 4096*CODEBOOKS of codebook once a
// block, from L2. Bytes of shared memory a weight: 2*CODEBOOKS. At 128 bytes a clock these bind before the codes' bytes do.

#include <cuda_fp16.h>
#include <cuda_bf16.h>

#ifndef CODEBOOKS
#define CODEBOOKS 2
#endif
#ifndef XTYPE
#define XTYPE 0
#endif
#ifndef CHANNELS
#define CHANNELS 32
#endif
#ifndef COPIES
#define COPIES 8
#endif
#ifndef WARPS
#define WARPS 16
#endif
#ifndef AHEAD
#define AHEAD 2
#endif
#ifndef BLOCKS
#define BLOCKS 1
#endif

#if XTYPE == 0
typedef __half xtype;
#elif XTYPE == 1
typedef __nv_bfloat16 xtype;
#else
typedef float xtype;
#endif

constexpr int LANES = 32;
constexpr int GROUP = 8;                                             // weights a vector
constexpr int STEP_GROUPS = 16 / CODEBOOKS;                          // groups in a lane's 16 bytes
constexpr int STEP_BYTES = 2 * GROUP * STEP_GROUPS;                  // of staged x
constexpr int TILES = CHANNELS / LANES;
constexpr int ENTRIES = 256;
constexpr int SPREAD = 16 * COPIES;                                  // bytes of one vector's copies
constexpr int ENTRY = CODEBOOKS * SPREAD < 256 ? CODEBOOKS * SPREAD : 256;
constexpr int PER_ENTRY = ENTRY / SPREAD;                            // codebooks in one entry
constexpr int TABLE_BYTES = CODEBOOKS / PER_ENTRY * ENTRIES * ENTRY;
constexpr unsigned TABLE_AT = 2048;                                  // shared address, beyond what the system reserves
constexpr unsigned ZEROS_AT = TABLE_AT + TABLE_BYTES + 32;           // not the banks that x is read from by the same load
constexpr unsigned X_AT = TABLE_AT + TABLE_BYTES + 256;
static_assert(ENTRY == 256 || ENTRY == 128, "an entry is 128 or 256 bytes");
static_assert(ZEROS_AT + STEP_BYTES <= X_AT, "the zeros end before x");

__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ void from_float(float v, __half* out) { *out = __float2half_rn(v); }
__device__ __forceinline__ void from_float(float v, __nv_bfloat16* out) { *out = __float2bfloat16_rn(v); }
__device__ __forceinline__ void from_float(float v, float* out) { *out = v; }

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

// Codes are read once: keep them out of L1.
__device__ __forceinline__ uint4 load_once(const uint4* address) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
}

// Where codebook c begins in the table.
__host__ __device__ constexpr unsigned codebook_at(int c) { return c / PER_ENTRY * ENTRIES * ENTRY + c % PER_ENTRY * SPREAD; }

// The 8 weights that byte k of `word` names; `own` is the lane's copy, its offset in an entry of 256 bytes.
template <unsigned AT>
__device__ __forceinline__ uint4 look_up(unsigned word, int k, unsigned own) {
    unsigned at = __byte_perm(word, own, 0x7604 | k << 4);
    if (ENTRY == 128) at >>= 1;
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at), "n"(AT));
    return v;
}

__device__ __forceinline__ uint4 load_x(unsigned address) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}

// sums += A B for one vector of 8 weights a lane: w.x and w.z are row g of A, w.y and w.w row g + 8.
__device__ __forceinline__ void multiply_add(float sums[4], uint4 w, unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "r"(b0), "r"(b1));
#else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(w.x), "r"(w.y), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(w.z), "r"(w.w), "r"(b1));
#endif
}

// Both or all four vectors of group j of a step, times its x.
__device__ __forceinline__ void multiply_group(float sums[4], uint4 codes, int j, unsigned own, unsigned b0, unsigned b1) {
    const unsigned words[4] = {codes.x, codes.y, codes.z, codes.w};
    const unsigned word = words[j * CODEBOOKS / 4];
    const int first = j * CODEBOOKS % 4;
    multiply_add(sums, look_up<TABLE_AT + codebook_at(0)>(word, first, own), b0, b1);
    multiply_add(sums, look_up<TABLE_AT + codebook_at(1)>(word, first + 1, own), b0, b1);
    if constexpr (CODEBOOKS == 4) {
        multiply_add(sums, look_up<TABLE_AT + codebook_at(2)>(word, 2, own), b0, b1);
        multiply_add(sums, look_up<TABLE_AT + codebook_at(3)>(word, 3, own), b0, b1);
    }
}

// Write COPIES copies of every vector; neighbouring threads write neighbouring copies.
__device__ __forceinline__ void build_table(const uint4* __restrict__ codebooks, char* table, int thread, int threads) {
    const int copy = thread % COPIES;
#pragma unroll 4
    for (int v = thread / COPIES; v < CODEBOOKS * ENTRIES; v += threads / COPIES) {
        const int c = v / ENTRIES, e = v % ENTRIES;
        *reinterpret_cast<uint4*>(table + codebook_at(c) + e * ENTRY + 16 * copy) = codebooks[v];
    }
}

// The power of two that brings the largest of x into [1, 2). All threads call; `scratch` holds a float for each warp.
__device__ __forceinline__ int exponent_of(const xtype* x, int in_features, float* scratch) {
    const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * LANES + threadIdx.x;
    float largest = 0.f;
    for (int i = thread; i < in_features; i += threads) largest = fmaxf(largest, fabsf(to_float(__ldcg(x + i))));
#pragma unroll
    for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    if (threadIdx.x == 0) scratch[threadIdx.y] = largest;
    __syncthreads();
    for (int w = 0; w < blockDim.y; w++) largest = fmaxf(largest, scratch[w]);
    __syncthreads();  // the sums use scratch again
    return largest > 0.f && isfinite(largest) ? ilogbf(largest) : 0;
}

// 8 inputs as fp16. Read past L1: with PDL the kernel before may have written them while this one was running.
__device__ __forceinline__ uint4 load_inputs(const xtype* x, bool wide, int exponent) {
#if XTYPE == 0
    if (wide) return __ldcg(reinterpret_cast<const uint4*>(x));
#endif
    alignas(16) __half eight[GROUP];
#pragma unroll
    for (int j = 0; j < GROUP; j++) {
#if XTYPE == 0
        eight[j] = __ldcg(x + j);
#else
        eight[j] = __float2half_rn(ldexpf(to_float(__ldcg(x + j)), -exponent));
#endif
    }
    return *reinterpret_cast<const uint4*>(eight);
}

// Stage x in pairs of groups, so that one 16-byte load is a half of B for two groups, zero from in_features on:
//
//     [group pair][inputs 0 1 4 5 of either group, inputs 2 3 6 7 of either group]
__device__ __forceinline__ void stage_x(const xtype* x, int in_features, int groups, char* staged, int exponent) {
    const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * LANES + threadIdx.x;
    const bool wide = (reinterpret_cast<size_t>(x) & 15) == 0;
    for (int g = thread; g < groups; g += threads) {
        const uint4 eight = g < in_features / GROUP ? load_inputs(x + g * GROUP, wide, exponent) : make_uint4(0, 0, 0, 0);
        char* const place = staged + 32 * (g / 2) + 8 * (g % 2);
        *reinterpret_cast<uint2*>(place) = make_uint2(eight.x, eight.z);
        *reinterpret_cast<uint2*>(place + 16) = make_uint2(eight.y, eight.w);
    }
}

// Channel sums of one tile from the fragments of D: lanes 0 and 1 of a quad write two channels each.
__device__ __forceinline__ void store_partial(const float sums[2][4], float* partial) {
    const int quad = threadIdx.x >> 2, slot = threadIdx.x & 3;
#pragma unroll
    for (int c = 0; c < 2; c++) {
        const float low = sums[0][c] + sums[1][c], high = sums[0][2 + c] + sums[1][2 + c];
        float own = slot < 2 ? low : high;  // columns 0 to 3 of row g, columns 4 to 7 of row g + 8
        own += __shfl_xor_sync(~0u, own, 2);
        if (slot < 2) partial[4 * quad + 2 * slot + c] = own;
    }
}

// codes      [out/32][steps][32] of 16 bytes, as pictured above; fewer than 2**31 of them
// codebooks  fp16 [CODEBOOKS, 256, 8], 16-byte aligned
// scales     fp16 [out_features]
// x          [in_features], in_features a multiple of 8; bias [out_features] or null; y [out_features]
// grid       any number of blocks of (32, warps) threads, at most ceil(out_features / CHANNELS) of which have work
// shared     TABLE_AT + TABLE_BYTES + 256 + STEP_BYTES * steps + 2 * 4 * warps * CHANNELS
extern "C" __global__ void __launch_bounds__(LANES * WARPS, BLOCKS)
additive_gemv(const uint4* __restrict__ codes, const uint4* __restrict__ codebooks, const __half* __restrict__ scales, const xtype* x,
              const xtype* __restrict__ bias, xtype* __restrict__ y, int in_features, int out_features, int steps) {
    extern __shared__ __align__(16) char dynamic_shared[];
    const unsigned start = (unsigned)__cvta_generic_to_shared(dynamic_shared);
    if (start > TABLE_AT) __trap();
    char* const shared = dynamic_shared + (TABLE_AT - start);
    char* const staged = shared + (X_AT - TABLE_AT);
    float* const partial = reinterpret_cast<float*>(staged + STEP_BYTES * steps);  // [2][warps][CHANNELS]
    const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y, thread = warp * LANES + lane;
    const int tiles = (out_features + LANES - 1) / LANES, items = (tiles + TILES - 1) / TILES;
    allow_next_kernel();

    const unsigned tile_vectors = steps * LANES;
    unsigned column = blockIdx.x * TILES * tile_vectors + lane;  // where this lane's codes of the item begin, in vectors
    unsigned second = TILES == 2 && blockIdx.x * TILES + 1 < tiles ? tile_vectors : 0;  // an odd last tile is read twice
    uint4 ahead[AHEAD][TILES];
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
        if (warp + k * warps < steps && blockIdx.x < items)
#pragma unroll
            for (int s = 0; s < TILES; s++) ahead[k][s] = load_once(codes + (column + s * second + (warp + k * warps) * LANES));

    build_table(codebooks, shared, thread, warps * LANES);
    if (warp == 0)
        for (int i = lane; i < STEP_BYTES / 4; i += LANES) reinterpret_cast<unsigned*>(shared + (ZEROS_AT - TABLE_AT))[i] = 0;
    wait_for_previous_kernel();
    const int exponent = XTYPE == 0 ? 0 : exponent_of(x, in_features, partial);
    stage_x(x, in_features, STEP_GROUPS * steps, staged, exponent);
    __syncthreads();

    const bool diagonal = (lane >> 2 & 3) == (lane & 3);
    const unsigned own_x = diagonal ? X_AT + 16 * (lane >> 4) : ZEROS_AT;
    const unsigned moves = diagonal ? ~0u : 0u;
    const unsigned own = (lane % COPIES) * 16 * (256 / ENTRY);

    int last[TILES];  // the warp that sums up tile s of an item; they take turns
#pragma unroll
    for (int s = 0; s < TILES; s++) last[s] = min(s, warps - 1);
    bool odd = false;
    for (int item = blockIdx.x; item < items; item += gridDim.x, odd = !odd) {
        const bool more = item + gridDim.x < items;
        const unsigned next_column = column + gridDim.x * TILES * tile_vectors;
        const unsigned next_second = TILES == 2 && (item + gridDim.x) * TILES + 1 < tiles ? tile_vectors : 0;
        float sums[TILES][2][4] = {};  // an MMA waits for the sum before it: two chains, even and odd groups
#pragma unroll 1
        for (int base = 0; base < steps; base += AHEAD * warps) {
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                const int step = base + k * warps + warp, next = step + AHEAD * warps;
                if (step >= steps) break;
                const unsigned from = own_x + (moves & STEP_BYTES * step);
#pragma unroll
                for (int p = 0; p < STEP_GROUPS / 2; p++) {
                    const uint4 b = load_x(from + 32 * p);
#pragma unroll
                    for (int s = 0; s < TILES; s++) {
                        multiply_group(sums[s][0], ahead[k][s], 2 * p, own, b.x, b.y);
                        multiply_group(sums[s][1], ahead[k][s], 2 * p + 1, own, b.z, b.w);
                    }
                }
                const bool here = next < steps;
                const unsigned following = here ? column + next * LANES : next_column + (warp + k * warps) * LANES;
                if (here || more)
#pragma unroll
                    for (int s = 0; s < TILES; s++) ahead[k][s] = load_once(codes + (following + s * (here ? second : next_second)));
            }
        }
        float scale[TILES], added[TILES];  // of the tile that this warp sums up; they arrive while the block meets
#pragma unroll
        for (int s = 0; s < TILES; s++) {
            const int channel = (item * TILES + s) * LANES + lane;
            if (warp == last[s] && channel < out_features) {
                scale[s] = __half2float(scales[channel]);
                added[s] = bias ? to_float(bias[channel]) : 0.f;
            }
        }
        float* const buffer = partial + (odd ? warps * CHANNELS : 0);  // whoever sums up the other one may still read it
#pragma unroll
        for (int s = 0; s < TILES; s++) store_partial(sums[s], buffer + warp * CHANNELS + s * LANES);
        __syncthreads();
#pragma unroll
        for (int s = 0; s < TILES; s++) {
            const int channel = (item * TILES + s) * LANES + lane;
            if (warp == last[s] && channel < out_features) {
                float total = 0.f;
                for (int w = 0; w < warps; w++) total += buffer[w * CHANNELS + s * LANES + lane];
                total *= scale[s];
                from_float((XTYPE == 0 ? total : ldexpf(total, exponent)) + added[s], y + channel);
            }
        }
        column = next_column;
        second = next_second;
#pragma unroll
        for (int s = 0; s < TILES; s++) last[s] = last[s] + TILES < warps ? last[s] + TILES : min(s, warps - 1);
    }
}
