// Rung a of the ladder: one thread an output channel, one weight at a time.
//
//     y[o] = sum_i codebook[o, code[o, i]] * x[i]          4-bit codes, 16 values a channel
//
// Layout: rows of codes as they are stored, two a byte, the even input in the low half:
//
//     codes[out][ceil(in/2)]        thread 0  row 0   | b0 | b1 | b2 | ...      b0 = code 1 << 4 | code 0
//                                   thread 1  row 1   | b0 | b1 | b2 | ...
//
// The threads of a warp read bytes that lie in/2 apart: each byte is a transaction of its own, and 31 of the 32 bytes
// that come with it wait in L1 until the thread asks for them. A thread has the sum of a whole row to itself, so
// a block is one warp and nothing is exchanged.
//
// Changed: the start. The 16 values of a channel lie in shared memory as fp32, table[code][thread]: the bank is the
// thread, whatever the code is. x is read through L1. Sums are fp32.
//
// Bytes moved per output: in/2 of codes, 32 of codebook, 2 of y; x once a block, mostly from L2.

#include <cuda_fp16.h>

constexpr int THREADS = 32, CODES = 16;

// codes     uint8 [out_features, ceil(in_features / 2)]
// codebook  fp16 [out_features, 16]
// x         fp16 [in_features]; y fp16 [out_features]
// grid      ceil(out_features / 32) blocks of 32 threads
extern "C" __global__ void __launch_bounds__(THREADS)
ladder_a_scalar(const unsigned char* __restrict__ codes, const __half* __restrict__ codebook, const __half* __restrict__ x,
                __half* __restrict__ y, int in_features, int out_features) {
    __shared__ float table[CODES][THREADS];
    const int thread = threadIdx.x, channel = blockIdx.x * THREADS + thread;
    if (channel >= out_features) return;  // a thread fills and reads its own column: no barrier below
    for (int k = 0; k < CODES; k++) table[k][thread] = __half2float(codebook[(size_t)channel * CODES + k]);

    const unsigned char* row = codes + (size_t)channel * ((in_features + 1) / 2);
    float sum = 0.f;
    for (int b = 0; b < in_features / 2; b++) {
        const unsigned byte = row[b];
        sum = fmaf(table[byte & 15][thread], __half2float(x[2 * b]), sum);
        sum = fmaf(table[byte >> 4][thread], __half2float(x[2 * b + 1]), sum);
    }
    if (in_features % 2) sum = fmaf(table[row[in_features / 2] & 15][thread], __half2float(x[in_features - 1]), sum);
    y[channel] = __float2half_rn(sum);
}
