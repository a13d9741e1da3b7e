// A dead end of the ladder: inputs split over the grid, and sums that meet in global memory.
//
//     y[o] = sum_i codebook[o, code[o, i]] * x[i]          4-bit codes, 16 values a channel
//
// Layout and pair table: as in rung c, a lane a channel, 32 inputs a lane and load:
//
//     codes[out/32][in/32][32 lanes][16 bytes]             a byte = code 2i + 1 << 4 | code 2i
//     table[256 bytes][32 lanes] of half2                  (value[b & 15], value[b >> 4]) of the lane's channel
//
//     grid    | block (tile 0, part 0): its steps | (tile 0, part 1) | (tile 0, part 2) | (tile 0, part 3) |
//             | block (tile 1, part 0)            | ...
//
// Changed since rung d: four small blocks share a tile, each with a quarter of the inputs, in place of one large block. Every
// warp adds its sums to y with atomicAdd: no meeting in shared memory, and blocks for every multiprocessor even where
// there are few tiles.
//
// Why it lost: y must be zero before, which is a launch of its own; it is fp32, so that somebody has to make it fp16
// again; each part builds the whole table for itself; and additions in floating point, in an order that nobody fixes,
// give different bits from run to run.
//
// Bytes moved per output: in/2 of codes, 32 of codebook for each part (the later ones from L2), and as many
// additions of 4 bytes to y as there are warps in the parts.

#include <cuda_fp16.h>

constexpr int LANES = 32, STEP = 32, CODES = 16, WARPS = 8;

// Weights are read once: keep them out of L1.
__device__ __forceinline__ uint4 load_once(const uint4* address) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
}

// The pair that byte k of `word` names; `table` is the shared address of this lane's column, an entry every 128 bytes.
__device__ __forceinline__ __half2 look_up(unsigned word, int k, unsigned table) {
    const unsigned row = (k == 0 ? word << 7 : word >> (8 * k - 7)) & 0x7f80;
    unsigned pair;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(pair) : "r"(table + row));
    return *reinterpret_cast<__half2*>(&pair);
}

// Eight weights of one word in two chains of four.
__device__ __forceinline__ void multiply_word(unsigned word, unsigned table, uint4 eight_x, float2& sum) {
    const __half2* x = reinterpret_cast<const __half2*>(&eight_x);
    __half2 chain = __hmul2(look_up(word, 0, table), x[0]);
#pragma unroll
    for (int k = 1; k < 4; k++) chain = __hfma2(look_up(word, k, table), x[k], chain);
    const float2 wide = __half22float2(chain);
    sum.x += wide.x;
    sum.y += wide.y;
}

// codes     [out/32][in/32][32] of 16 bytes, as pictured above
// codebook  fp16 [out_features, 16]
// x         fp16 [in_features]; y fp32 [out_features], zero before
// grid      (ceil(out_features / 32), parts) blocks of (32, warps) threads
// shared    32 KiB of table, and 2 bytes for each input of a part, padded to 32
extern "C" __global__ void __launch_bounds__(LANES * WARPS)
ladder_dead_atomics(const uint4* __restrict__ codes, const __half* __restrict__ codebook, const __half* __restrict__ x,
                    float* __restrict__ y, int in_features, int out_features) {
    extern __shared__ __align__(16) char shared[];
    __half2* table = reinterpret_cast<__half2*>(shared);  // [pair][lane]
    __half* staged = reinterpret_cast<__half*>(table + CODES * CODES * LANES);
    const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
    const int channel = blockIdx.x * LANES + lane, steps = (in_features + STEP - 1) / STEP;
    const int share = (steps + gridDim.y - 1) / gridDim.y;
    const int begin = min((int)blockIdx.y * share, steps), end = min(begin + share, steps);
    const __half* entries = codebook + (size_t)min(channel, out_features - 1) * CODES;
    for (int high = warp; high < CODES; high += warps)
        for (int low = 0; low < CODES; low++)
            table[(high * CODES + low) * LANES + lane] = __halves2half2(entries[low], entries[high]);
    for (int i = warp * LANES + lane; i < (end - begin) * STEP; i += warps * LANES)
        staged[i] = begin * STEP + i < in_features ? x[begin * STEP + i] : __half(0.f);
    __syncthreads();

    const unsigned own_table = (unsigned)__cvta_generic_to_shared(shared) + 4 * lane;
    const uint4* column = codes + (size_t)blockIdx.x * steps * LANES + lane;
    float2 sum = {0.f, 0.f};
#pragma unroll 1
    for (int step = begin + warp; step < end; step += warps) {
        const uint4 code = load_once(column + step * LANES);
        const uint4* at = reinterpret_cast<const uint4*>(staged + (step - begin) * STEP);
        multiply_word(code.x, own_table, at[0], sum);
        multiply_word(code.y, own_table, at[1], sum);
        multiply_word(code.z, own_table, at[2], sum);
        multiply_word(code.w, own_table, at[3], sum);
    }
    if (channel < out_features) atomicAdd(y + channel, sum.x + sum.y);
}
