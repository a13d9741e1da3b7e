// One sweep over a block of columns: each weight in turn takes the code nearest to its target, and the step that it took
// moves the targets of the columns behind it. A warp does one row.
//
//     code[j]   = nearest(target[j])            the lower one on a tie
//     change[j] = value(code[j]) - from[j]      from: the value it had, or its target
//     target[i] += change[j] * feedback[j][i]   for i > j
//
// Coordinate descent and error feedback (GPTQ) differ only in target, feedback and from: see trapetum.descent.
// The same for CPUs: coordinate_descent.c.
//
//     column   0 .. 31     32 .. 63    64 .. 95    96 .. 127
//     lane     0 .. 31     0 .. 31     0 .. 31     0 .. 31      four targets a lane, in registers
//     codes    lane l holds entry l of the codebook (and l + 32, ... where ENTRIES > 1) and the middle to the next
//
// A target is broadcast from its lane; the lanes whose middle lies below it vote, and the number of votes is the code.
// Shared memory holds the feedback above the diagonal, row after row: 128 * 127 / 2 floats, 31.75 KiB, which fits the
// static limit of every card. Its rows are read by 32 lanes side by side: no bank conflict.
// Bytes a row and block: 128 targets, 128 old values, 128 changes, 128 codes, the codebook. Needs no host headers.

#ifndef ENTRIES
#define ENTRIES 1  // codebook entries a lane holds: 1 for up to 32 codes, 8 for up to 256
#endif
#define WIDTH 128
#define PARTS (WIDTH / 32)
#define WARPS 16
#define ALL 0xffffffffu

// Where row j of the packed feedback would have its column 0.
static __device__ int packed(int j) { return j * (WIDTH - 1) - j * (j - 1) / 2 - (j + 1); }

static __device__ void load_feedback(float* shared, const float* feedback, int width) {
    for (int j = threadIdx.x >> 5; j < width; j += WARPS)
        for (int i = j + 1 + (int)(threadIdx.x & 31); i < width; i += 32) shared[packed(j) + i] = feedback[j * width + i];
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

// target    float [rows][width]    where each weight would like to be; width 1 to 128
// feedback  float [width][width]   only above the diagonal is read
// book      float [rows][k]        rising; k 1 to 32 * ENTRIES
// from      float [rows][width]    the values before the sweep, or null for the targets
// code      uint8 [rows][stride]   the first `width` of each row are written
// change    float [rows][width]    written
// Grid: ceil(rows / WARPS). Block: 32 * WARPS.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    trapetum_descent(const float* target, const float* feedback, const float* book, const float* from, int rows,
                     int width, int k, int stride, unsigned char* code, float* change) {
    __shared__ float shared[WIDTH * (WIDTH - 1) / 2];
    load_feedback(shared, feedback, width);
    __syncthreads();
    const int lane = threadIdx.x & 31;
    const long long row = (long long)blockIdx.x * WARPS + (threadIdx.x >> 5);
    if (row >= rows) return;
    const Book b = load_book(book + row * k, k, lane);
    float t[PARTS], old[PARTS], step[PARTS];
    int chosen[PARTS];
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
        const int i = 32 * p + lane;
        t[p] = i < width ? target[row * width + i] : 0.0f;
        old[p] = from && i < width ? from[row * width + i] : 0.0f;
    }
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
        for (int s = 0; s < 32 && 32 * p + s < width; s++) {
            const int j = 32 * p + s;
            const float wanted = __shfl_sync(ALL, t[p], s);
            const int c = nearest(b, wanted);
            const float d = value(b, c) - (from ? __shfl_sync(ALL, old[p], s) : wanted);
            if (lane == s) {
                chosen[p] = c;
                step[p] = d;
            }
            if (d == 0.0f) continue;  // the same for all lanes
            const float* ahead = shared + packed(j);
#pragma unroll
            for (int q = p; q < PARTS; q++) {
                const int i = 32 * q + lane;
                if (i > j && i < width) t[q] += d * ahead[i];
            }
        }
    }
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
        const int i = 32 * p + lane;
        if (i < width) {
            code[row * stride + i] = (unsigned char)chosen[p];
            change[row * width + i] = step[p];
        }
    }
}
