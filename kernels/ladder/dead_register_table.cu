// A dead end of the ladder: the table in a register array, chosen from by a tree of selects.
//
//     y[o] = sum_i codebook[o, code[o, i]] * x[i]          4-bit codes, 16 values a channel
//
// Layout: as in rung b, a lane a channel, 32 inputs a lane and load:
//
//     codes[out/32][in/32][32 lanes][16 bytes]             a byte = code 2i + 1 << 4 | code 2i
//
// A lane keeps the 16 values of its channel in eight registers of half2, values[k] = (value 2k, value 2k + 1). Registers
// have no address that a program could compute: values[code] in C++ would move the array to local memory, that is to
// L1. So a weight is chosen by its bits:
//
//     bit 3   8 registers -> 4        bit 2   4 -> 2        bit 1   2 -> 1        bit 0   which half of it
//
// Changed since rung d: no table in shared memory, no lookup.
//
// Why it lost: a weight takes seven selects and the tests of its bits, where the pair table needs half a read. A
// warp shuffle instead of the tree (lane k holds value k) goes through the same crossbar as a read of shared memory, brings one
// weight where the pair table brings two, and lets a warp work on one channel only.
//
// Bytes moved per output: in/2 of codes, 32 of codebook, 2 of y; x once a block, mostly from L2.

#include <cuda_fp16.h>

constexpr int LANES = 32, STEP = 32, CODES = 16, WARPS = 32;

// Weights are read once: keep them out of L1.
__device__ __forceinline__ uint4 load_once(const uint4* address) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
}

// The register that holds the value of the code in the lowest 4 bits; its bit 0 is not looked at.
__device__ __forceinline__ unsigned choose(const unsigned values[8], unsigned code) {
    unsigned four[4], two[2];
#pragma unroll
    for (int k = 0; k < 4; k++) four[k] = code & 8 ? values[k + 4] : values[k];
#pragma unroll
    for (int k = 0; k < 2; k++) two[k] = code & 4 ? four[k + 2] : four[k];
    return code & 2 ? two[1] : two[0];
}

// The two weights of the lowest byte: of each chosen register, the half that bit 0 of the code names.
__device__ __forceinline__ __half2 decode_byte(const unsigned values[8], unsigned byte) {
    const unsigned halves = 0x5410 | (byte & 1) * 0x22 | (byte >> 4 & 1) * 0x2200;
    const unsigned pair = __byte_perm(choose(values, byte), choose(values, byte >> 4), halves);
    return *reinterpret_cast<const __half2*>(&pair);
}

// Eight weights of one word in two chains of four.
__device__ __forceinline__ void multiply_word(unsigned word, const unsigned values[8], uint4 eight_x, float2& sum) {
    const __half2* x = reinterpret_cast<const __half2*>(&eight_x);
    __half2 chain = __hmul2(decode_byte(values, word), x[0]);
#pragma unroll
    for (int k = 1; k < 4; k++) chain = __hfma2(decode_byte(values, word >> (8 * k)), x[k], chain);
    const float2 wide = __half22float2(chain);
    sum.x += wide.x;
    sum.y += wide.y;
}

// codes     [out/32][in/32][32] of 16 bytes, as pictured above
// codebook  fp16 [out_features, 16]
// x         fp16 [in_features]; y fp16 [out_features]
// grid      ceil(out_features / 32) blocks of (32, warps) threads
// shared    2 bytes for each input, padded to 32
extern "C" __global__ void __launch_bounds__(LANES * WARPS)
ladder_dead_register_table(const uint4* __restrict__ codes, const __half* __restrict__ codebook, const __half* __restrict__ x,
                           __half* __restrict__ y, int in_features, int out_features) {
    extern __shared__ __align__(16) __half staged[];
    __shared__ float partial[WARPS][LANES];
    const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
    const int channel = blockIdx.x * LANES + lane, steps = (in_features + STEP - 1) / STEP;
    const __half* entries = codebook + (size_t)min(channel, out_features - 1) * CODES;
    unsigned values[CODES / 2];
#pragma unroll
    for (int k = 0; k < CODES / 2; k++)
        values[k] = __half_as_ushort(entries[2 * k]) | (unsigned)__half_as_ushort(entries[2 * k + 1]) << 16;
    for (int i = warp * LANES + lane; i < steps * STEP; i += warps * LANES) staged[i] = i < in_features ? x[i] : __half(0.f);
    __syncthreads();

    const uint4* column = codes + (size_t)blockIdx.x * steps * LANES + lane;
    float2 sum = {0.f, 0.f};
#pragma unroll 1
    for (int step = warp; step < steps; step += warps) {
        const uint4 code = load_once(column + step * LANES);
        const uint4* at = reinterpret_cast<const uint4*>(staged + step * STEP);
        multiply_word(code.x, values, at[0], sum);
        multiply_word(code.y, values, at[1], sum);
        multiply_word(code.z, values, at[2], sum);
        multiply_word(code.w, values, at[3], sum);
    }
    partial[warp][lane] = sum.x + sum.y;
    __syncthreads();
    if (warp == 0 && channel < out_features) {
        float total = 0.f;
        for (int w = 0; w < warps; w++) total += partial[w][lane];
        y[channel] = __float2half_rn(total);
    }
}
