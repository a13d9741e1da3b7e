// Write the dense matrix back from codebook weights: weights[o, i] = codebook[o, index[o, i]], row-major.
//
// Compiled once for each BITS (8, 4, 3, 2) and WTYPE (0 fp16, 1 bf16, 2 fp32). The packed layout is pictured in codebook_gemv.cu.
//
//   naive  one thread an output element: finds its index in the packed tile, fetches the codebook entry from global
//          memory, writes one element. Neighbouring threads read the same 16 bytes and scattered entries.
//   tiled  one warp a tile of 32 channels x STEP inputs: packed 16-byte loads, codebooks in shared memory (lane = bank),
//          a transpose through shared memory so that the writes to a row are contiguous.
//
// Bytes moved per weight: BITS/8 read + sizeof(weight) written.

#include <cuda_fp16.h>
#include <cuda_bf16.h>

#ifndef BITS
#define BITS 4
#endif
#ifndef WTYPE
#define WTYPE 0
#endif

#if WTYPE == 0
typedef __half wtype;
#elif WTYPE == 1
typedef __nv_bfloat16 wtype;
#else
typedef float wtype;
#endif

constexpr int LANES = 32;
constexpr int STEP = BITS == 8 ? 16 : BITS == 4 ? 32 : BITS == 3 ? 128 : 64;
constexpr int VECTORS = BITS == 3 ? 3 : 1;
constexpr int WORDS = 4 * VECTORS;
constexpr int CODES = 1 << BITS;
constexpr int WARPS = 4;

__device__ __forceinline__ wtype convert(__half v) {
#if WTYPE == 0
    return v;
#elif WTYPE == 1
    return __float2bfloat16_rn(__half2float(v));
#else
    return __half2float(v);
#endif
}

// Index of input i (0 <= i < STEP) from the lane's words of one step.
__device__ __forceinline__ int index_of(const unsigned* word, int i) {
#if BITS == 3
    const unsigned* w = word + 3 * (i / 32);
    const int v = i % 32 / 8, byte = 8 * (i % 8 / 2);
    const unsigned pair = v < 3 ? w[v] >> byte : (w[0] >> byte >> 6 & 3) | (w[1] >> byte >> 4 & 12) | (w[2] >> byte >> 2 & 48);
    return (pair >> (3 * (i % 2))) & 7;
#elif BITS == 2
    return (word[i / 16] >> (8 * (i % 8 / 2) + 4 * (i / 8 % 2) + 2 * (i % 2))) & 3;
#else
    constexpr int PER_WORD = 32 / BITS;
    return (word[i / PER_WORD] >> (BITS * (i % PER_WORD))) & (CODES - 1);
#endif
}

// codes as in codebook_gemv; weights [out_features, in_features]; grid: enough threads for every element
extern "C" __global__ void dequantize_naive(const unsigned* __restrict__ codes, const __half* __restrict__ codebook,
                                            wtype* __restrict__ weights, int in_features, int out_features, int steps, int n_codes) {
    const size_t element = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (element >= (size_t)in_features * out_features) return;
    const int channel = element / in_features, i = element % in_features;
    const int lane = channel % LANES;
    const unsigned* tile = codes + ((size_t)(channel / LANES) * steps + i / STEP) * VECTORS * LANES * 4;
    unsigned word[WORDS];
#pragma unroll
    for (int w = 0; w < WORDS; w++) word[w] = tile[((w / 4) * LANES + lane) * 4 + w % 4];
    weights[element] = convert(codebook[(size_t)channel * n_codes + index_of(word, i % STEP)]);
}

// grid (ceil(steps / (WARPS * steps_a_warp)), out/32), block (32, WARPS); shared: CODES*32 halves + WARPS*32*(STEP+2) of wtype
extern "C" __global__ void dequantize_tiled(const uint4* __restrict__ codes, const __half* __restrict__ codebook,
                                            wtype* __restrict__ weights, int in_features, int out_features, int steps, int n_codes,
                                            int steps_a_warp) {
    extern __shared__ __align__(16) char shared[];
    __half* table = reinterpret_cast<__half*>(shared);  // [code][lane]
    const int lane = threadIdx.x, warp = threadIdx.y;
    const int first_channel = blockIdx.y * LANES;
    wtype* tile = reinterpret_cast<wtype*>(shared + CODES * LANES * sizeof(__half)) + warp * LANES * (STEP + 2);
    const __half* own = codebook + (size_t)min(first_channel + lane, out_features - 1) * n_codes;
    for (int e = warp; e < n_codes; e += WARPS) table[e * LANES + lane] = own[e];
    __syncthreads();
    const int first = (blockIdx.x * WARPS + warp) * steps_a_warp;
    for (int step = first; step < min(first + steps_a_warp, steps); step++) {
        const uint4* source = codes + ((size_t)blockIdx.y * steps + step) * VECTORS * LANES + lane;
        unsigned word[WORDS];
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            const uint4 loaded = source[v * LANES];
            word[4 * v] = loaded.x, word[4 * v + 1] = loaded.y, word[4 * v + 2] = loaded.z, word[4 * v + 3] = loaded.w;
        }
#pragma unroll
        for (int i = 0; i < STEP; i++) tile[lane * (STEP + 2) + i] = convert(table[index_of(word, i) * LANES + lane]);
        __syncwarp();
        const int start = step * STEP, columns = min(STEP, in_features - start);
        const int rows = min(LANES, out_features - first_channel);
        for (int k = lane; k < rows * STEP; k += LANES) {
            const int row = k / STEP, i = k % STEP;
            if (i < columns) weights[(size_t)(first_channel + row) * in_features + start + i] = tile[row * (STEP + 2) + i];
        }
        __syncwarp();
    }
}
