/* Sum 64-bit words: what reading costs when nothing else is done. Each thread reads one contiguous run, as a GEMV does. */

static uint64_t sum_portable(const uint64_t *data, int64_t n) {
    uint64_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    for (; n >= 4; n -= 4, data += 4) {
        s0 += data[0];
        s1 += data[1];
        s2 += data[2];
        s3 += data[3];
    }
    for (; n > 0; n--) s0 += *data++;
    return s0 + s1 + s2 + s3;
}

#if X86

AVX2 static uint64_t sum_avx2(const uint64_t *data, int64_t n) {
    __m256i sum[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
    uint64_t lanes[4];
    for (; n >= 16; n -= 16, data += 16)
        for (int s = 0; s < 4; s++)
            sum[s] = _mm256_add_epi64(sum[s], _mm256_loadu_si256((const __m256i *)data + s));
    sum[0] = _mm256_add_epi64(_mm256_add_epi64(sum[0], sum[1]), _mm256_add_epi64(sum[2], sum[3]));
    _mm256_storeu_si256((__m256i *)lanes, sum[0]);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3] + sum_portable(data, n);
}

AVX512 static uint64_t sum_avx512(const uint64_t *data, int64_t n) {
    __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (; n >= 32; n -= 32, data += 32)
        for (int s = 0; s < 4; s++) sum[s] = _mm512_add_epi64(sum[s], _mm512_loadu_si512(data + 8 * s));
    sum[0] = _mm512_add_epi64(_mm512_add_epi64(sum[0], sum[1]), _mm512_add_epi64(sum[2], sum[3]));
    return (uint64_t)_mm512_reduce_add_epi64(sum[0]) + sum_portable(data, n);
}

#endif /* X86 */

/* The compiler vectorizes the portable sum for NEON by itself. */
uint64_t trapetum_read(const uint64_t *data, int64_t n, int path, int threads) {
    uint64_t (*sum)(const uint64_t *, int64_t) =
        CHOOSE(path, sum_portable, sum_avx2, sum_avx512, sum_avx512, sum_portable);
#ifdef _OPENMP
    if (threads > 1) {
        uint64_t total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
        {
            int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
            total += sum(data + n * me / all, n * (me + 1) / all - n * me / all);
        }
        return total;
    }
#endif
    (void)threads;
    return sum(data, n);
}
