// One sweep over a block of columns: each weight in turn takes the code nearest to its target, and the step that it took
// moves the targets of the columns behind it. A warp does one row.
//
//     with scale      from = value(code) before the sweep,  target = from + slope * scale[j],  moves by step * f * scale[i]
//     without scale   from = target = slope,                                                   moves by step * f
//
//     code[j]    = nearest(target[j])            the lower one on a tie
//     step[j]    = value(code[j]) - from[j]
//     target[i] += what it moves by              f = feedback[j][i], for i > j
//
// With scale[i] = -1 / H_ii, the gradient as slope and H as feedback this is coordinate descent on (w' - w)^T H (w' - w);
// without a scale it is the error feedback of GPTQ. The same for CPUs: coordinate_descent.c.
//
//     column   0 .. 31     32 .. 63    64 .. 95    96 .. 127
//     lane     0 .. 31     0 .. 31     0 .. 31     0 .. 31      four targets a lane, in registers
//     codes    lane l holds entry l of the codebook (and l + 32, ... where ENTRIES > 1) and the middle to the next
//
// A target is broadcast from its lane; the lanes whose middle lies below it vote, and the number of votes is the code.
// Shared memory holds the feedback above the diagonal, row after row: 128 * 127 / 2 floats, 31.75 KiB, which fits the
// static limit of every card. Its rows are read by 32 lanes side by side: no bank conflict.
// Bytes a row and block: 128 slopes and 128 steps of 4, 128 codes twice, the codebook. Needs no host headers.

#ifndef ENTRIES
#define ENTRIES 1  // codebook entries a lane holds: 1 for up to 32 codes, 8 for up to 256
#endif
#define WIDTH 128
#define PARTS (WIDTH / 32)
#ifndef WARPS
#define WARPS 16
#endif
#define ALL 0xffffffffu

// Where row j of the packed feedback would have its column 0.
static __device__ int packed(int j) { return j * (WIDTH - 1) - j * (j - 1) / 2 - (j + 1); }

static __device__ void load_feedback(float* shared, const float* feedback, int stride, const float* scale, int width) {
    for (int j = threadIdx.x >> 5; j < width; j += WARPS)
        for (int i = j + 1 + (int)(threadIdx.x & 31); i < width; i += 32)
            shared[packed(j) + i] = feedback[(long long)j * stride + i] * (scale ? scale[i] : 1.0f);
}

struct Book {
    float entry[ENTRIES], middle[ENTRIES];
};

static __device__ Book load_book(const float* book, int k, int lane) {
    Book b;
#pragma unroll
    for (int e = 0; e < ENTRIES; e++) {
        const int c = 32 * e + lane;
        b.entry[e] = c < k ? book[c] : 0.0f;
        b.middle[e] = c + 1 < k ? 0.5f * (book[c] + book[c + 1]) : __int_as_float(0x7f800000);
    }
    return b;
}

static __device__ int nearest(const Book& b, float target) {
    int code = 0;
#pragma unroll
    for (int e = 0; e < ENTRIES; e++) code += __popc(__ballot_sync(ALL, target > b.middle[e]));
    return code;
}

static __device__ float value(const Book& b, int code) {
    float found = 0.0f;
#pragma unroll
    for (int e = 0; e < ENTRIES; e++) {
        const float here = __shfl_sync(ALL, b.entry[e], code & 31);
        if (code >> 5 == e) found = here;
    }
    return found;
}

// slope     float [rows][slope_stride]      the first `width` of each row, 1 to 128
// feedback  float [width][feedback_stride]  only above the diagonal is read
// book      float [rows][k]                 rising; k 1 to 32 * ENTRIES
// scale     float [width]                   or null
// code      uint8 [rows][code_stride]       below k (read only with a scale), written
// step      float [rows][width]             written
// Grid: ceil(rows / WARPS). Block: 32 * WARPS.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    trapetum_descent(const float* slope, const float* feedback, const float* book, const float* scale, int rows,
                     int width, int k, int slope_stride, int feedback_stride, int code_stride, unsigned char* code,
                     float* step) {
    __shared__ float shared[WIDTH * (WIDTH - 1) / 2];
    load_feedback(shared, feedback, feedback_stride, scale, width);
    __syncthreads();
    const int lane = threadIdx.x & 31;
    const long long row = (long long)blockIdx.x * WARPS + (threadIdx.x >> 5);
    if (row >= rows) return;
    slope += row * slope_stride;
    book += row * k;
    code += row * code_stride;
    step += row * width;
    const Book b = load_book(book, k, lane);
    float target[PARTS], from[PARTS], taken[PARTS];
    int chosen[PARTS];
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
        const int i = 32 * p + lane;
        from[p] = scale && i < width ? book[code[i]] : 0.0f;
        target[p] = i < width ? (scale ? from[p] + slope[i] * scale[i] : slope[i]) : 0.0f;
    }
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
        for (int s = 0; s < 32 && 32 * p + s < width; s++) {
            const int j = 32 * p + s;
            const float wanted = __shfl_sync(ALL, target[p], s);
            const int c = nearest(b, wanted);
            const float d = value(b, c) - (scale ? __shfl_sync(ALL, from[p], s) : wanted);
            if (lane == s) {
                chosen[p] = c;
                taken[p] = d;
            }
            if (d == 0.0f) continue;  // the same for all lanes
            const float* ahead = shared + packed(j);
#pragma unroll
            for (int q = p; q < PARTS; q++) {
                const int i = 32 * q + lane;
                if (i > j && i < width) target[q] += d * ahead[i];
            }
        }
    }
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
        const int i = 32 * p + lane;
        if (i < width) {
            code[i] = (unsigned char)chosen[p];
            step[i] = taken[p];
        }
    }
}
