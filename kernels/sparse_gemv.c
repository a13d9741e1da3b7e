/* The sparse part of a dense-and-sparse product on a CPU, added to what the dense part left:
 *
 *     y[o] += sum over k in [starts[o], starts[o + 1]) of values[k] * x[columns[k]]        (fp32 in, fp32 sums, fp32 out)
 *
 * Compressed rows, one entry after the other:
 *
 *     starts    int32 [out_features + 1], rising from 0
 *     columns   uint16 or int32 [entries], rising within a row
 *     values    fp16 [entries]
 *
 *     row o     | columns[starts[o]] columns[starts[o] + 1] ... |      | values[starts[o]] values[starts[o] + 1] ... |
 *
 * Bytes moved per entry: 4 (6 with int32 columns), and 4 of starts and 8 of y per row; x stays in the cache. Rows are short (in
 * the dozens), so vector paths mask their tail instead of finishing it one by one. Gathers of x are what it costs.
 * A row's sum is formed by one thread in one fixed order, so results do not depend on the number of threads.
 * Source of the split: Kim et al., "SqueezeLLM: Dense-and-Sparse Quantization", arXiv:2306.07629 (2023).
 */

#include "cpu_targets.h"

struct Job {
    const uint16_t *values;
    const void *columns;
    const int32_t *starts;
    const float *x;
    float *y;
};

INLINE int32_t column_of(const void *columns, int wide, int64_t k) {
    return wide ? ((const int32_t *)columns)[k] : ((const uint16_t *)columns)[k];
}

/* A row's entries are two short runs that the hardware prefetcher starts late on: ask for those of later rows. Addresses past
 * the end do no harm. */
INLINE void fetch_later_rows(const Job *job, int wide, int64_t row) {
    const int64_t k = job->starts[row];
    __builtin_prefetch((const char *)(job->values + k) + 1024, 0, 3);
    __builtin_prefetch((const char *)job->columns + (wide ? 4 : 2) * k + 1024, 0, 3);
}

INLINE void rows_portable(const Job *job, int wide, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
        float sum = 0;
        fetch_later_rows(job, wide, row);
        for (int64_t k = job->starts[row]; k < job->starts[row + 1]; k++)
            sum += half_to_float(job->values[k]) * job->x[column_of(job->columns, wide, k)];
        job->y[row] += sum;
    }
}

static void narrow_portable(const Job *job, int64_t begin, int64_t end) { rows_portable(job, 0, begin, end); }
static void wide_portable(const Job *job, int64_t begin, int64_t end) { rows_portable(job, 1, begin, end); }

#if X86

/* A vector that would reach past its row begins with what is left of it; loads stay inside the row. */

AVX2 INLINE __m256i columns_avx2(const void *columns, int wide, int64_t k) {
    if (wide) return _mm256_loadu_si256((const __m256i *)((const int32_t *)columns + k));
    return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)((const uint16_t *)columns + k)));
}

AVX2 INLINE void rows_avx2(const Job *job, int wide, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
        int64_t k = job->starts[row], last = job->starts[row + 1];
        __m256 sums = _mm256_setzero_ps();
        fetch_later_rows(job, wide, row);
        for (; k + 8 <= last; k += 8) {
            __m256 value = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(job->values + k)));
            sums = _mm256_fmadd_ps(value, _mm256_i32gather_ps(job->x, columns_avx2(job->columns, wide, k), 4), sums);
        }
        float sum = sum_lanes_avx2(sums);
        for (; k < last; k++) sum += _cvtsh_ss(job->values[k]) * job->x[column_of(job->columns, wide, k)];
        job->y[row] += sum;
    }
}

AVX512 INLINE __m512i columns_avx512(const void *columns, int wide, int64_t k, __mmask16 mask) {
    if (wide) return _mm512_maskz_loadu_epi32(mask, (const int32_t *)columns + k);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)columns + k));
}

AVX512 INLINE void rows_avx512(const Job *job, int wide, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
        int64_t last = job->starts[row + 1];
        __m512 sums = _mm512_setzero_ps();
        fetch_later_rows(job, wide, row);
        for (int64_t k = job->starts[row]; k < last; k += 16) {
            __mmask16 mask = (__mmask16)(last - k >= 16 ? 0xffff : (1 << (last - k)) - 1);
            __m512 value = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, job->values + k));
            __m512i column = columns_avx512(job->columns, wide, k, mask);
            __m512 taken = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, column, job->x, 4);
            sums = _mm512_fmadd_ps(value, taken, sums);
        }
        job->y[row] += _mm512_reduce_add_ps(sums);
    }
}

AVX2 static void narrow_avx2(const Job *job, int64_t begin, int64_t end) { rows_avx2(job, 0, begin, end); }
AVX2 static void wide_avx2(const Job *job, int64_t begin, int64_t end) { rows_avx2(job, 1, begin, end); }
AVX512 static void narrow_avx512(const Job *job, int64_t begin, int64_t end) { rows_avx512(job, 0, begin, end); }
AVX512 static void wide_avx512(const Job *job, int64_t begin, int64_t end) { rows_avx512(job, 1, begin, end); }

#endif

/* y[o] += S x for every row; `path` is one that trapetum_runs().
 *
 *     values    fp16 [entries]
 *     columns   uint16 [entries], or int32 where `wide`; each below the length of x
 *     starts    int32 [out_features + 1]
 *     x         fp32 [in_features]
 *     y         fp32 [out_features], read and written
 */
void trapetum_sparse_add(const uint16_t *values, const void *columns, const int32_t *starts, const float *x, float *y,
                         int64_t out_features, int wide, int path, int threads) {
    const Job job = {values, columns, starts, x, y};
    Work narrow = CHOOSE(path, narrow_portable, narrow_avx2, narrow_avx512, narrow_avx512, narrow_portable);
    Work wider = CHOOSE(path, wide_portable, wide_avx2, wide_avx512, wide_avx512, wide_portable);
    in_parallel(&job, wide ? wider : narrow, out_features, threads);
}
