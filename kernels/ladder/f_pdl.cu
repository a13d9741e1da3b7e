// Rung f of the ladder: loads that do not wait, for their use, for the table, or for the kernel before.
//
//     y[o] = sum_i codebook[o, code[o, i]] * x[i]          4-bit codes, 16 values a channel
//
// Layout: as in rung b, a lane a channel, 32 inputs a lane and load:
//
//     codes[out/32][in/32][32 lanes][16 bytes]             a byte = code 2i + 1 << 4 | code 2i
//     table[256 bytes][32 lanes] of half2                  (value[b & 15], value[b >> 4]) of the lane's channel
//
// Changed since rung d (one channel a lane again: blocks for every multiprocessor at 4096 outputs):
//
// - AHEAD loads of codes are in flight: a register holds the codes of the step after next while those of this one are used.
// - The table lies at a multiple of its own size, so that the lane's address and a byte times 128 have no bit in common:
//   a lookup is a shift, one LOP3 (mask and OR) and the read.
// - Programmatic dependent launch, when the launch asks for it (sm_90 on; a no-op before): the kernel after this one may start
//   at once, and this one loads codes and builds its table before it waits for the kernel before. Only x waits.
//
//     without   |launch| codes, table, x | multiply |launch| codes, table, x | multiply |
//     with      |launch| codes, table, x | multiply |
//                      |launch| codes, table ......| x | multiply |
//
// Bytes moved per output: in/2 of codes, 32 of codebook, 2 of y; x once a block, mostly from L2.

#include <cuda_fp16.h>

constexpr int LANES = 32, STEP = 32, CODES = 16, WARPS = 32, AHEAD = 2;
constexpr unsigned TABLE_BYTES = CODES * CODES * LANES * 4;

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

// Byte k of `word` names the pair; `lane_table` is the address of the lane's column.
__device__ __forceinline__ __half2 look_up(unsigned word, int k, unsigned lane_table) {
    const unsigned row = (k == 0 ? word << 7 : word >> (8 * k - 7)) & 0x7f80;
    unsigned pair;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(pair) : "r"(row | lane_table));
    return *reinterpret_cast<__half2*>(&pair);
}

// Sixteen weights of two words, all lookups before the first use: chains of four in fp16, then fp32.
__device__ __forceinline__ void multiply_words(unsigned low, unsigned high, unsigned lane_table, const uint4* x, float2& sum) {
    __half2 w[8];
#pragma unroll
    for (int k = 0; k < 8; k++) w[k] = look_up(k < 4 ? low : high, k % 4, lane_table);
    const uint4 sixteen_x[2] = {x[0], x[1]};
    const __half2* pairs = reinterpret_cast<const __half2*>(sixteen_x);
    __half2 first = __hmul2(w[0], pairs[0]), second = __hmul2(w[4], pairs[4]);
#pragma unroll
    for (int k = 1; k < 4; k++) {
        first = __hfma2(w[k], pairs[k], first);
        second = __hfma2(w[4 + k], pairs[4 + k], second);
    }
    const float2 a = __half22float2(first), b = __half22float2(second);
    sum.x += a.x + b.x;
    sum.y += a.y + b.y;
}

// codes     [out/32][in/32][32] of 16 bytes, as pictured above
// codebook  fp16 [out_features, 16]; written by no kernel that may still run, for it is read before the wait
// x         fp16 [in_features]; y fp16 [out_features]
// grid      ceil(out_features / 32) blocks of (32, warps) threads
// shared    64 KiB, the first half of it to align the table in, and 2 bytes for each input, padded to 32
extern "C" __global__ void __launch_bounds__(LANES * WARPS, 1)
ladder_f_pdl(const uint4* __restrict__ codes, const __half* __restrict__ codebook, const __half* __restrict__ x,
             __half* __restrict__ y, int in_features, int out_features) {
    extern __shared__ __align__(16) char shared[];
    __shared__ float partial[WARPS][LANES];
    const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
    const int channel = blockIdx.x * LANES + lane, steps = (in_features + STEP - 1) / STEP;
    const unsigned base = (unsigned)__cvta_generic_to_shared(shared);
    const unsigned table_at = (base + TABLE_BYTES - 1) / TABLE_BYTES * TABLE_BYTES, lane_table = table_at + 4 * lane;
    __half2* table = reinterpret_cast<__half2*>(shared + (table_at - base));
    __half* staged = reinterpret_cast<__half*>(shared + 2 * TABLE_BYTES);
    allow_next_kernel();

    const uint4* column = codes + (size_t)blockIdx.x * steps * LANES + lane;
    uint4 ahead[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
        if (warp + k * warps < steps) ahead[k] = load_once(column + (warp + k * warps) * LANES);
    const __half* entries = codebook + (size_t)min(channel, out_features - 1) * CODES;
    for (int high = warp; high < CODES; high += warps)
        for (int low = 0; low < CODES; low++)
            table[(high * CODES + low) * LANES + lane] = __halves2half2(entries[low], entries[high]);
    wait_for_previous_kernel();
    for (int i = warp * LANES + lane; i < steps * STEP; i += warps * LANES) staged[i] = i < in_features ? x[i] : __half(0.f);
    __syncthreads();

    float2 sum = {0.f, 0.f};
#pragma unroll 1
    for (int first = warp; first < steps; first += AHEAD * warps) {
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            const int step = first + k * warps, next = step + AHEAD * warps;
            if (step >= steps) break;
            const uint4* at = reinterpret_cast<const uint4*>(staged + step * STEP);
            multiply_words(ahead[k].x, ahead[k].y, lane_table, at, sum);
            multiply_words(ahead[k].z, ahead[k].w, lane_table, at + 2, sum);
            if (next < steps) ahead[k] = load_once(column + next * LANES);
        }
    }
    partial[warp][lane] = sum.x + sum.y;
    __syncthreads();
    if (warp == 0 && channel < out_features) {
        float total = 0.f;
        for (int w = 0; w < warps; w++) total += partial[w][lane];
        y[channel] = __float2half_rn(total);
    }
}
