// One sweep over a block of columns: each weight in turn takes the code nearest to its target, and the step that it took
// moves the targets of the columns behind it.
//
//     code[j]   = nearest(target[j])            the lower one on a tie
//     change[j] = value(code[j]) - from[j]      from: the value it had, or its target
//     target[i] += change[j] * feedback[j][i]   for i > j
//
// Coordinate descent on (w' - w)^T H (w' - w) and error feedback (GPTQ) differ only in target, feedback and from: see
// trapetum.descent. Rows do not meet, so threads share them out and the result does not depend on their number.
// The same in CUDA: coordinate_descent.cu.

#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define WIDTH 128
#define MAX_CODES 256
#define COUNTED 32  // up to so many codes, comparing with all middles is faster than halving

// How many middles lie below the target, which is its code.
static int nearest(const float *middle, int count, float target) {
    if (count < COUNTED) {
        int code = 0;
        for (int c = 0; c < count; c++) code += target > middle[c];
        return code;
    }
    int low = 0;
    while (count > 0) {
        const int half = count / 2;
        if (target > middle[low + half]) {
            low += half + 1;
            count -= half + 1;
        } else {
            count = half;
        }
    }
    return low;
}

static void sweep(const float *targets, const float *feedback, const float *book, const float *from, int width, int k,
                  uint8_t *code, float *change) {
    float target[WIDTH], middle[MAX_CODES];
    memcpy(target, targets, sizeof(float) * width);
    for (int c = 0; c + 1 < k; c++) middle[c] = 0.5f * (book[c] + book[c + 1]);
    for (int j = 0; j < width; j++) {
        const int c = nearest(middle, k - 1, target[j]);
        const float d = book[c] - (from ? from[j] : target[j]);
        code[j] = (uint8_t)c;
        change[j] = d;
        if (d == 0) continue;
        for (int i = j + 1; i < width; i++) target[i] += d * feedback[(int64_t)j * width + i];
    }
}

// target    float [rows][width]    where each weight would like to be; width 1 to 128
// feedback  float [width][width]   only above the diagonal is read
// book      float [rows][k]        rising; k 1 to 256
// from      float [rows][width]    the values before the sweep, or null for the targets
// code      uint8 [rows][stride]   the first `width` of each row are written
// change    float [rows][width]    written
void trapetum_descent(const float *target, const float *feedback, const float *book, const float *from, int64_t rows,
                      int width, int k, int64_t stride, int threads, uint8_t *code, float *change) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++)
        sweep(target + r * width, feedback, book + r * k, from ? from + r * width : NULL, width, k, code + r * stride,
              change + r * width);
}
