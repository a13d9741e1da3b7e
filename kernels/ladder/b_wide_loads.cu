// Rung b of the ladder: 16 bytes a load, and warps that share a row.
//
//     y[o] = sum_i codebook[o, code[o, i]] * x[i]          4-bit codes, 16 values a channel
//
// Layout: packed offline into tiles of 32 channels, a lane a channel. A lane's 16 bytes are 32 inputs in a row of its
// channel, and a warp's load is 512 bytes in a row:
//
//     codes[out/32][in/32][32 lanes][16 bytes]
//
//     step 0   | lane 0: inputs 0..31 of channel 0 | lane 1: inputs 0..31 of channel 1 | ... | lane 31 |   warp 0
//     step 1   | lane 0: inputs 32..63             | ...                                               |   warp 1
//
// Both `out` and `in` are padded to 32 with code 0, and x with zeros.
//
// Changed since rung a: the layout and the loads, nothing else about a weight. The warps of a block take the steps in turn and
// meet in shared memory, in a fixed order: the same bits in every run. x is staged in shared memory, where all
// lanes read the same 16 bytes at once. The table, one lookup a weight and fp32 sums are those of rung a.
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

// The weight that nibble k of `word` names; `table` is the shared address of this lane's column, an entry every 128 bytes.
__device__ __forceinline__ float look_up(unsigned word, int k, unsigned table) {
    const unsigned row = (k < 2 ? word << (7 - 4 * k) : word >> (4 * k - 7)) & 0x780;
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(table + row));
    return value;
}

// Eight weights of one word.
__device__ __forceinline__ void multiply_word(unsigned word, unsigned table, uint4 eight_x, float& sum) {
    const __half2* x = reinterpret_cast<const __half2*>(&eight_x);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const float2 pair = __half22float2(x[k]);
        sum = fmaf(look_up(word, 2 * k, table), pair.x, sum);
        sum = fmaf(look_up(word, 2 * k + 1, table), pair.y, sum);
    }
}

// codes     [out/32][in/32][32] of 16 bytes, as pictured above
// codebook  fp16 [out_features, 16]
// x         fp16 [in_features]; y fp16 [out_features]
// grid      ceil(out_features / 32) blocks of (32, warps) threads
// shared    2 bytes for each input, padded to 32
extern "C" __global__ void __launch_bounds__(LANES * WARPS)
ladder_b_wide_loads(const uint4* __restrict__ codes, const __half* __restrict__ codebook, const __half* __restrict__ x,
                    __half* __restrict__ y, int in_features, int out_features) {
    extern __shared__ __align__(16) __half staged[];
    __shared__ float table[CODES][LANES], partial[WARPS][LANES];
    const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
    const int channel = blockIdx.x * LANES + lane, steps = (in_features + STEP - 1) / STEP;
    const __half* entries = codebook + (size_t)min(channel, out_features - 1) * CODES;
    for (int k = warp; k < CODES; k += warps) table[k][lane] = __half2float(entries[k]);
    for (int i = warp * LANES + lane; i < steps * STEP; i += warps * LANES) staged[i] = i < in_features ? x[i] : __half(0.f);
    __syncthreads();

    const unsigned own_table = (unsigned)__cvta_generic_to_shared(&table[0][lane]);
    const uint4* column = codes + (size_t)blockIdx.x * steps * LANES + lane;
    float sum = 0.f;
#pragma unroll 1
    for (int step = warp; step < steps; step += warps) {
        const uint4 code = load_once(column + step * LANES);
        const uint4* at = reinterpret_cast<const uint4*>(staged + step * STEP);
        multiply_word(code.x, own_table, at[0], sum);
        multiply_word(code.y, own_table, at[1], sum);
        multiply_word(code.z, own_table, at[2], sum);
        multiply_word(code.w, own_table, at[3], sum);
    }
    partial[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && channel < out_features) {
        float total = 0.f;
        for (int w = 0; w < warps; w++) total += partial[w][lane];
        y[channel] = __float2half_rn(total);
    }
}
