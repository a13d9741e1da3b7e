// Batch-1 GEMV from codebook weights, decoded inside the multiply and never materialised:
//
//     y[o] = sum_i codebook[o, index[o, i]] * x[i] + bias[o]
//
// Compiled once for each pair of macros:
//     BITS   8, 4, 3 or 2: bits of a stored index
//     XTYPE  0 fp16, 1 bf16, 2 fp32: dtype of x, bias and y
//     WARPS  warps a block at most, AHEAD steps that a warp has in flight: 32 x 2 where a multiprocessor gets one block,
//            fewer warps and deeper where it gets several
//
// Packed indices. A tile is 32 output channels (one a lane); a lane's 16-byte load holds consecutive inputs of its
// channel and a warp's load is one contiguous 512 bytes:
//
//     codes[out/32][in/STEP][VECTORS][32 lanes][16 bytes]
//
//     BITS  STEP  VECTORS   inside the 16 bytes, lowest bits first
//      8     16      1      one index a byte
//      4     32      1      two indices a byte
//      3    128      3      twelve 32-bit words; of each three words, 5 pairs of 6 bits a word and the
//                           sixteenth pair from the three words' upper two bits
//      2     64      1      four indices a byte
//
// Both `out` and `in` are padded (to 32 and to STEP); x is zero in the padding.
//
// Pair table. For BITS <= 4 a field of 2*BITS bits holds two indices, and the block keeps for each of its channels all
// 4**BITS pairs of weights as half2 in shared memory: table[pair][lane]. The bank is the lane, so a lookup never
// conflicts, whatever the indices are, and one 4-byte load yields two exact fp16 weights. For BITS = 8 the
// table holds one weight as fp32.
//
// Sums. Chains of 4 products in fp16 (two chains to a half2), then fp32; 8-bit sums are fp32 throughout. bf16 and fp32 activations are
// scaled by a power of two so that the largest lies in [1, 2) before they become fp16, and the scale is undone at the end.
// Warps meet in shared memory in a fixed order, so a result is bit-identical from run to run.
//
// Bytes moved per output channel: in*BITS/8 of indices + 2*n_codes of codebook + sizeof(y); x once a block, mostly from L2.

#include <cuda_fp16.h>
#include <cuda_bf16.h>

#ifndef BITS
#define BITS 4
#endif
#ifndef XTYPE
#define XTYPE 0
#endif
#ifndef AHEAD
#define AHEAD 2
#endif
#ifndef WARPS
#define WARPS 32
#endif

#if XTYPE == 0
typedef __half xtype;
#elif XTYPE == 1
typedef __nv_bfloat16 xtype;
#else
typedef float xtype;
#endif

constexpr int LANES = 32;
constexpr int STEP = BITS == 8 ? 16 : BITS == 4 ? 32 : BITS == 3 ? 128 : 64;  // inputs a step
constexpr int VECTORS = BITS == 3 ? 3 : 1;                                    // 16-byte loads a step and lane
constexpr int IN_FLIGHT = AHEAD;                                              // steps loaded ahead of their use
constexpr int CODES = 1 << BITS;
constexpr int TABLE_BYTES = (BITS == 8 ? 256 : CODES * CODES) * 4 * LANES;
constexpr int X_BELOW = TABLE_BYTES - 6144;  // x of at most so many bytes fits in front of the table
constexpr int MAX_THREADS = 32 * WARPS;

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

// Weights are read once: keep them out of L1.
__device__ __forceinline__ uint4 load_once(const uint4* address) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
}

// A lookup costs a shift, one LOP3 and the load: the table lies at a multiple of its own size in the shared address
// space, so `lane_table` (its address plus 4 * lane) and a field times 128 have no bit in common.
__device__ __forceinline__ unsigned look_up(unsigned field, unsigned lane_table) {
    unsigned entry;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(entry) : "r"(field | lane_table));
    return entry;
}

// Eight pairs times sixteen inputs: two chains of four in half2, then fp32. All lookups are issued before the first use.
__device__ __forceinline__ void multiply_eight(const unsigned field[8], unsigned lane_table, const uint4* x, float2& sum) {
    unsigned entry[8];
#pragma unroll
    for (int k = 0; k < 8; k++) entry[k] = look_up(field[k], lane_table);
    const __half2* w = reinterpret_cast<const __half2*>(entry);
    const uint4 xs[2] = {x[0], x[1]};
    const __half2* x2 = reinterpret_cast<const __half2*>(xs);
    __half2 first = __hmul2(w[0], x2[0]), second = __hmul2(w[4], x2[4]);
#pragma unroll
    for (int k = 1; k < 4; k++) {
        first = __hfma2(w[k], x2[k], first);
        second = __hfma2(w[4 + k], x2[4 + k], second);
    }
    const float2 a = __half22float2(first), b = __half22float2(second);
    sum.x += a.x + b.x;
    sum.y += a.y + b.y;
}

// Bits [shift, shift + log2(mask / 128 + 1)) of a word, times 128.
__device__ __forceinline__ unsigned field_of(unsigned word, int shift, unsigned mask) {
    return (shift < 7 ? word << (7 - shift) : word >> (shift - 7)) & mask;
}

#if BITS == 4
__device__ __forceinline__ void multiply_step(const uint4 codes[1], unsigned lane_table, const uint4* x, float2& sum) {
    const unsigned word[4] = {codes[0].x, codes[0].y, codes[0].z, codes[0].w};
#pragma unroll
    for (int w = 0; w < 4; w += 2) {
        unsigned field[8];
#pragma unroll
        for (int k = 0; k < 8; k++) field[k] = field_of(word[w + k / 4], 8 * (k % 4), 0x7f80);
        multiply_eight(field, lane_table, x + w, sum);
    }
}
#elif BITS == 3
__device__ __forceinline__ void multiply_step(const uint4 codes[3], unsigned lane_table, const uint4* x, float2& sum) {
    const unsigned word[12] = {codes[0].x, codes[0].y, codes[0].z, codes[0].w, codes[1].x, codes[1].y,
                               codes[1].z, codes[1].w, codes[2].x, codes[2].y, codes[2].z, codes[2].w};
#pragma unroll
    for (int g = 0; g < 4; g++) {  // 32 inputs from three words
        const unsigned* w = word + 3 * g;
        unsigned field[16];
#pragma unroll
        for (int k = 0; k < 15; k++) field[k] = field_of(w[k / 5], 6 * (k % 5), 0x1f80);
        field[15] = (w[0] >> 30 << 7) | (w[1] >> 30 << 9) | (w[2] >> 30 << 11);
        multiply_eight(field, lane_table, x + 4 * g, sum);
        multiply_eight(field + 8, lane_table, x + 4 * g + 2, sum);
    }
}
#elif BITS == 2
__device__ __forceinline__ void multiply_step(const uint4 codes[1], unsigned lane_table, const uint4* x, float2& sum) {
    const unsigned word[4] = {codes[0].x, codes[0].y, codes[0].z, codes[0].w};
#pragma unroll
    for (int w = 0; w < 4; w++) {
        unsigned field[8];
#pragma unroll
        for (int k = 0; k < 8; k++) field[k] = field_of(word[w], 4 * k, 0x780);
        multiply_eight(field, lane_table, x + 2 * w, sum);
    }
}
#else
__device__ __forceinline__ void multiply_step(const uint4 codes[1], unsigned lane_table, const uint4* x, float2& sum) {
    const unsigned word[4] = {codes[0].x, codes[0].y, codes[0].z, codes[0].w};
    float w[16];
#pragma unroll
    for (int k = 0; k < 16; k++)
        w[k] = __uint_as_float(look_up(field_of(word[k / 4], 8 * (k % 4), 0x7f80), lane_table));
    const uint4 xs[2] = {x[0], x[1]};
    const __half2* x2 = reinterpret_cast<const __half2*>(xs);
#pragma unroll
    for (int k = 0; k < 8; k++) {
        const float2 wide = __half22float2(x2[k]);
        sum.x = fmaf(w[2 * k], wide.x, sum.x);
        sum.y = fmaf(w[2 * k + 1], wide.y, sum.y);
    }
}
#endif

// Fill this lane's column of the table; the warps of the block share the entries.
__device__ __forceinline__ void build_table(const __half* codebook, int n_codes, char* table_of_lane, int warp, int warps) {
#if BITS == 8
    if (n_codes % 8 == 0 && (reinterpret_cast<size_t>(codebook) & 15) == 0) {
        for (int e = 8 * warp; e < n_codes; e += 8 * warps) {
            const uint4 eight = *reinterpret_cast<const uint4*>(codebook + e);
            const __half* entry = reinterpret_cast<const __half*>(&eight);
#pragma unroll
            for (int k = 0; k < 8; k++)
                *reinterpret_cast<float*>(table_of_lane + (e + k) * 128) = __half2float(entry[k]);
        }
    } else {
        for (int e = warp; e < n_codes; e += warps)
            *reinterpret_cast<float*>(table_of_lane + e * 128) = __half2float(codebook[e]);
    }
#else
    alignas(16) __half low[CODES];
    if (n_codes == CODES && (reinterpret_cast<size_t>(codebook) & (CODES >= 8 ? 15 : 7)) == 0) {
        if constexpr (CODES >= 8) {
#pragma unroll
            for (int k = 0; k < CODES / 8; k++)
                reinterpret_cast<uint4*>(low)[k] = reinterpret_cast<const uint4*>(codebook)[k];
        } else {
            *reinterpret_cast<uint2*>(low) = *reinterpret_cast<const uint2*>(codebook);
        }
    } else {
#pragma unroll
        for (int k = 0; k < CODES; k++) low[k] = k < n_codes ? codebook[k] : __half(0.f);
    }
    for (int high = warp; high < CODES; high += warps) {
        const __half second = high < n_codes ? codebook[high] : __half(0.f);
#pragma unroll
        for (int k = 0; k < CODES; k++)
            *reinterpret_cast<__half2*>(table_of_lane + (high * CODES + k) * 128) = __halves2half2(low[k], second);
    }
#endif
}

// Stage x as fp16 with zeros in the padding; returns what a sum must be multiplied by to undo the scale.
__device__ __forceinline__ float stage_x(const xtype* __restrict__ x, int in_features, int padded, __half* staged, float* scratch) {
    const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * LANES + threadIdx.x;
#if XTYPE == 0
    if (in_features % 8 == 0 && (reinterpret_cast<size_t>(x) & 15) == 0) {
        const uint4* wide = reinterpret_cast<const uint4*>(x);
        for (int i = thread; i < padded / 8; i += threads)
            reinterpret_cast<uint4*>(staged)[i] = i < in_features / 8 ? wide[i] : make_uint4(0, 0, 0, 0);
    } else {
        for (int i = thread; i < padded; i += threads) staged[i] = i < in_features ? x[i] : __half(0.f);
    }
    return 1.f;
#else
    float largest = 0.f;
    for (int i = thread; i < in_features; i += threads) largest = fmaxf(largest, fabsf(to_float(x[i])));
#pragma unroll
    for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    if (threadIdx.x == 0) scratch[threadIdx.y] = largest;
    __syncthreads();
    for (int w = 0; w < blockDim.y; w++) largest = fmaxf(largest, scratch[w]);
    int exponent = 0;
    if (largest > 0.f && isfinite(largest)) exponent = ilogbf(largest);
    for (int i = thread; i < padded; i += threads)
        staged[i] = __float2half_rn(i < in_features ? ldexpf(to_float(x[i]), -exponent) : 0.f);
    __syncthreads();  // scratch is used again for the sums
    return ldexpf(1.f, exponent);
#endif
}

// codes     [out/32][steps][VECTORS][32] of 16 bytes, as pictured above
// codebook  fp16 [out_features, n_codes]
// x         [in_features]; bias [out_features] or null; y [out_features]
// grid      ceil(out_features / 32) blocks of (32, warps) threads
// shared    2*TABLE_BYTES, the first for alignment, and 2*steps*STEP bytes more where x does not fit in front of the table
extern "C" __global__ void __launch_bounds__(MAX_THREADS, 1)
codebook_gemv(const uint4* __restrict__ codes, const __half* __restrict__ codebook, const xtype* __restrict__ x,
              const xtype* __restrict__ bias, xtype* __restrict__ y, int in_features, int out_features, int steps, int n_codes) {
    extern __shared__ __align__(16) char shared[];
    __shared__ float partial[MAX_THREADS / LANES][LANES];
    const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
    const int channel = blockIdx.x * LANES + lane;
    const unsigned base = (unsigned)__cvta_generic_to_shared(shared);
    const unsigned table_at = (base + TABLE_BYTES - 1) / TABLE_BYTES * TABLE_BYTES;
    const unsigned lane_table = table_at + 4 * lane;
    char* table = shared + (table_at - base);
    const bool x_below = 2 * steps * STEP <= X_BELOW;
    __half* staged = reinterpret_cast<__half*>(x_below ? shared : table + TABLE_BYTES);
    allow_next_kernel();

    const uint4* column = codes + (size_t)blockIdx.x * steps * VECTORS * LANES + lane;
    uint4 ahead[IN_FLIGHT][VECTORS];
#pragma unroll
    for (int k = 0; k < IN_FLIGHT; k++) {
        const int step = warp + k * warps;
        if (step < steps)
#pragma unroll
            for (int v = 0; v < VECTORS; v++) ahead[k][v] = load_once(column + ((size_t)step * VECTORS + v) * LANES);
    }
    build_table(codebook + (size_t)min(channel, out_features - 1) * n_codes, n_codes, table + 4 * lane, warp, warps);
    wait_for_previous_kernel();
    const float scale = stage_x(x, in_features, steps * STEP, staged, partial[0]);
    __syncthreads();

    float2 sum = {0.f, 0.f};
    for (int first = warp; first < steps; first += IN_FLIGHT * warps) {
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; k++) {
            const int step = first + k * warps, next = step + IN_FLIGHT * warps;
            if (step >= steps) break;
            multiply_step(ahead[k], lane_table, reinterpret_cast<const uint4*>(staged + step * STEP), sum);
            if (next < steps)
#pragma unroll
                for (int v = 0; v < VECTORS; v++) ahead[k][v] = load_once(column + (next * VECTORS + v) * LANES);
        }
    }
    partial[warp][lane] = sum.x + sum.y;
    __syncthreads();
    if (warp == 0 && channel < out_features) {
        float total = 0.f;
        for (int w = 0; w < warps; w++) total += partial[w][lane];
        total *= scale;
        if (bias) total += to_float(bias[channel]);
        from_float(total, y + channel);
    }
}
