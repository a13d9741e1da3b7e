// One sweep over a block of columns: each weight in turn takes the code nearest to its target, and the step that it took
// moves the targets of the columns behind it.
//
//     with scale      from = value(code) before the sweep,  target = from + slope * scale[j],  moves by step * f * scale[i]
//     without scale   from = target = slope,                                                   moves by step * f
//
//     code[j]    = nearest(target[j])            the lower one on a tie
//     step[j]    = value(code[j]) - from[j]
//     target[i] += what it moves by              f = feedback[j][i], for i > j
//
// With scale[i] = -1 / H_ii, the gradient as slope and H as feedback this is coordinate descent on (w' - w)^T H (w' - w);
// without a scale it is the error feedback of GPTQ. Rows do not meet, so threads share them out and the result does not
// depend on their number. The same in CUDA: coordinate_descent.cu.

#include <stdint.h>
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

static void sweep(const float *slope, const float *feedback, const float *book, const float *scale, int width, int k,
                  uint8_t *code, float *step) {
    float target[WIDTH], middle[MAX_CODES];
    for (int c = 0; c + 1 < k; c++) middle[c] = 0.5f * (book[c] + book[c + 1]);
    for (int j = 0; j < width; j++) target[j] = scale ? book[code[j]] + slope[j] * scale[j] : slope[j];
    for (int j = 0; j < width; j++) {
        const int c = nearest(middle, k - 1, target[j]);
        const float d = book[c] - (scale ? book[code[j]] : target[j]);
        code[j] = (uint8_t)c;
        step[j] = d;
        if (d == 0) continue;
        for (int i = j + 1; i < width; i++) target[i] += d * feedback[j * WIDTH + i];
    }
}

static void copy_feedback(float *packed, const float *feedback, int64_t stride, const float *scale, int width) {
    for (int j = 0; j < width; j++)
        for (int i = j + 1; i < width; i++) packed[j * WIDTH + i] = feedback[j * stride + i] * (scale ? scale[i] : 1.0f);
}

// slope     float [rows][slope_stride]      the first `width` of each row, 1 to 128
// feedback  float [width][feedback_stride]  only above the diagonal is read
// book      float [rows][k]                 rising; k 1 to 256
// scale     float [width]                   or null
// code      uint8 [rows][code_stride]       below k (read only with a scale), written
// step      float [rows][width]             written
void trapetum_descent(const float *slope, const float *feedback, const float *book, const float *scale, int64_t rows,
                      int width, int k, int64_t slope_stride, int64_t feedback_stride, int64_t code_stride, int threads,
                      uint8_t *code, float *step) {
    float packed[WIDTH * WIDTH];
    copy_feedback(packed, feedback, feedback_stride, scale, width);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++)
        sweep(slope + r * slope_stride, packed, book + r * k, scale, width, k, code + r * code_stride, step + r * width);
}
