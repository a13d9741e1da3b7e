// A dead end of the ladder: the table in registers, read by byte permutes.
//
//     y[o] = sum_i codebook[o, code[o, i]] * x[i]          4-bit codes, 16 values a channel
//
// Layout: as in rung b, a lane a channel, 32 inputs a lane and load:
//
//     codes[out/32][in/32][32 lanes][16 bytes]             a byte = code 2i + 1 << 4 | code 2i
//
// A lane keeps the 16 values of its channel as two planes of bytes, four registers each:
//
//     low[4]    the low bytes of values 0..3 | 4..7 | 8..11 | 12..15
//     high[4]   the high bytes, likewise
//
// PRMT picks four bytes out of eight by four 3-bit numbers, so four codes of 3 bits would be one PRMT a plane. With 4 bits
// it takes three: from the values below 8, from those above, and between the two by the fourth bit.
//
// Changed since rung d: no table in shared memory, no lookup. Idea: the byte-permute decoding of 4-bit kernels for CPUs
// (pshufb) and GPUs.
//
// Why it lost: four weights take eight PRMT, six for the planes and two to put low and high bytes together. That is two a
// weight, where the pair table needs half a shift, half a mask and half a read, and the reads go through another pipe
// than the arithmetic.
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

// One plane of four values, by the low four nibbles of `below` (a code's lower 3 bits) and of `side` (k, or k + 4 where
// code k is 8 or more).
__device__ __forceinline__ unsigned pick(const unsigned plane[4], unsigned below, unsigned side) {
    return __byte_perm(__byte_perm(plane[0], plane[1], below), __byte_perm(plane[2], plane[3], below), side);
}

// Four weights of the lower 16 bits of the codes, two a register.
__device__ __forceinline__ void decode_four(unsigned below, unsigned side, const unsigned low[4],
                                            const unsigned high[4], __half2 w[2]) {
    const unsigned l = pick(low, below, side), h = pick(high, below, side);
    const unsigned pairs[2] = {__byte_perm(l, h, 0x5140), __byte_perm(l, h, 0x7362)};
    w[0] = reinterpret_cast<const __half2*>(pairs)[0];
    w[1] = reinterpret_cast<const __half2*>(pairs)[1];
}

// Eight weights of one word in two chains of four.
__device__ __forceinline__ void multiply_word(unsigned word, const unsigned low[4], const unsigned high[4],
                                              uint4 eight_x, float2& sum) {
    const __half2* x = reinterpret_cast<const __half2*>(&eight_x);
    const unsigned below = word & 0x77777777, side = (word >> 1 & 0x44444444) | 0x32103210;
    __half2 w[4];
    decode_four(below, side, low, high, w);
    decode_four(below >> 16, side >> 16, low, high, w + 2);
    __half2 chain = __hmul2(w[0], x[0]);
#pragma unroll
    for (int k = 1; k < 4; k++) chain = __hfma2(w[k], x[k], chain);
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
ladder_dead_byte_permute(const uint4* __restrict__ codes, const __half* __restrict__ codebook, const __half* __restrict__ x,
                         __half* __restrict__ y, int in_features, int out_features) {
    extern __shared__ __align__(16) __half staged[];
    __shared__ float partial[WARPS][LANES];
    const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
    const int channel = blockIdx.x * LANES + lane, steps = (in_features + STEP - 1) / STEP;
    const __half* entries = codebook + (size_t)min(channel, out_features - 1) * CODES;
    unsigned low[4] = {}, high[4] = {};
#pragma unroll
    for (int k = 0; k < CODES; k++) {
        const unsigned bits = __half_as_ushort(entries[k]);
        low[k / 4] |= (bits & 255) << (8 * (k % 4));
        high[k / 4] |= (bits >> 8) << (8 * (k % 4));
    }
    for (int i = warp * LANES + lane; i < steps * STEP; i += warps * LANES) staged[i] = i < in_features ? x[i] : __half(0.f);
    __syncthreads();

    const uint4* column = codes + (size_t)blockIdx.x * steps * LANES + lane;
    float2 sum = {0.f, 0.f};
#pragma unroll 1
    for (int step = warp; step < steps; step += warps) {
        const uint4 code = load_once(column + step * LANES);
        const uint4* at = reinterpret_cast<const uint4*>(staged + step * STEP);
        multiply_word(code.x, low, high, at[0], sum);
        multiply_word(code.y, low, high, at[1], sum);
        multiply_word(code.z, low, high, at[2], sum);
        multiply_word(code.w, low, high, at[3], sum);
    }
    partial[warp][lane] = sum.x + sum.y;
    __syncthreads();
    if (warp == 0 && channel < out_features) {
        float total = 0.f;
        for (int w = 0; w < warps; w++) total += partial[w][lane];
        y[channel] = __float2half_rn(total);
    }
}
