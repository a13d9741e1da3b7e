// Rung e of the ladder: two output channels a lane, which share the reads of x.
//
//     y[o] = sum_i codebook[o, code[o, i]] * x[i]          4-bit codes, 16 values a channel
//
// Layout: as in rung b; a block now owns two tiles of 32 channels, and a lane the same place in both:
//
//     codes[out/32][in/32][32 lanes][16 bytes]             lane l: channels l and 32 + l of the block's 64
//     table[2 tiles][256 bytes][32 lanes] of half2         64 KiB
//
// Changed since rung d: 64 channels a block in place of 32. A lane reads 16 bytes of x for 16 weights, not for 8, and
// two 16-byte loads of codes are in flight, not one. The price is half as many blocks with twice the table each:
// where out/64 is below the number of multiprocessors, some have nothing to do.
//
// Bytes moved per output: in/2 of codes, 32 of codebook, 2 of y; x once for 64 channels, mostly from L2.

#include <cuda_fp16.h>

constexpr int LANES = 32, TILES = 2, STEP = 32, CODES = 16, WARPS = 32;

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
// x         fp16 [in_features]; y fp16 [out_features]
// grid      ceil(out_features / 64) blocks of (32, warps) threads
// shared    64 KiB of tables, and 2 bytes for each input, padded to 32
extern "C" __global__ void __launch_bounds__(LANES * WARPS)
ladder_e_two_columns(const uint4* __restrict__ codes, const __half* __restrict__ codebook, const __half* __restrict__ x,
                     __half* __restrict__ y, int in_features, int out_features) {
    extern __shared__ __align__(16) char shared[];
    __shared__ float partial[WARPS][TILES][LANES];
    __half2* tables = reinterpret_cast<__half2*>(shared);  // [tile][pair][lane]
    __half* staged = reinterpret_cast<__half*>(tables + TILES * CODES * CODES * LANES);
    const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
    const int steps = (in_features + STEP - 1) / STEP, tiles = (out_features + LANES - 1) / LANES;
    for (int row = warp; row < TILES * CODES; row += warps) {
        const int tile = row / CODES, high = row % CODES;
        const int channel = min((blockIdx.x * TILES + tile) * LANES + lane, out_features - 1);
        const __half* entries = codebook + (size_t)channel * CODES;
        for (int low = 0; low < CODES; low++)
            tables[(row * CODES + low) * LANES + lane] = __halves2half2(entries[low], entries[high]);
    }
    for (int i = warp * LANES + lane; i < steps * STEP; i += warps * LANES) staged[i] = i < in_features ? x[i] : __half(0.f);
    __syncthreads();

    // The second tile of the last block may not exist: its lanes then read the first again and write nothing.
    const int first_tile = blockIdx.x * TILES, second_tile = min(first_tile + 1, tiles - 1);
    const uint4* first_column = codes + (size_t)first_tile * steps * LANES + lane;
    const uint4* second_column = codes + (size_t)second_tile * steps * LANES + lane;
    const unsigned first_table = (unsigned)__cvta_generic_to_shared(shared) + 4 * lane;
    const unsigned second_table = first_table + 4 * CODES * CODES * LANES;
    float2 first = {0.f, 0.f}, second = {0.f, 0.f};
#pragma unroll 1
    for (int step = warp; step < steps; step += warps) {
        const uint4 a = load_once(first_column + step * LANES), b = load_once(second_column + step * LANES);
        const unsigned a_words[4] = {a.x, a.y, a.z, a.w}, b_words[4] = {b.x, b.y, b.z, b.w};
        const uint4* at = reinterpret_cast<const uint4*>(staged + step * STEP);
#pragma unroll
        for (int w = 0; w < 4; w++) {
            const uint4 eight_x = at[w];
            multiply_word(a_words[w], first_table, eight_x, first);
            multiply_word(b_words[w], second_table, eight_x, second);
        }
    }
    partial[warp][0][lane] = first.x + first.y;
    partial[warp][1][lane] = second.x + second.y;
    __syncthreads();
    for (int tile = warp; tile < TILES; tile += warps) {
        const int channel = (blockIdx.x * TILES + tile) * LANES + lane;
        float total = 0.f;
        for (int w = 0; w < warps; w++) total += partial[w][tile][lane];
        if (channel < out_features) y[channel] = __float2half_rn(total);
    }
}
