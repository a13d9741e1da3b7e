/* 8-bit codes: row-major bytes without padding, fp32 arithmetic, codebooks of up to 256 entries.
 *
 * 64 entries fit four registers, so permutes look them up; 256 need a gather, or with VBMI byte permutes of their low
 * and high halves. NEON has neither: it takes the portable loop. */

/* Products of inputs begin..in_features-1 with 8-bit codes; also the tail of the vector paths. */
INLINE float bytes_dot(const uint8_t *codes, const float *x, int64_t begin, int64_t end, const float *table) {
    float lanes[8] = {0}, sum = 0.0f;
    int64_t i = begin;
    for (; i + 8 <= end; i += 8)
        for (int l = 0; l < 8; l++) lanes[l] += table[codes[i + l]] * x[i + l];
    for (; i < end; i++) sum += table[codes[i]] * x[i];
    for (int l = 0; l < 8; l++) sum += lanes[l];
    return sum;
}

static void bytes_portable(const Job *job, int64_t begin, int64_t end) {
    float *y = job->y, table[256];
    for (int64_t row = begin; row < end; row++) {
        row_table(job, row, table, 256);
        y[row] = (job->bias ? job->bias[row] : 0.0f) +
                 bytes_dot(job->codes + row * job->in_features, job->x, 0, job->in_features, table);
    }
}

#if X86

/* Up to 256 fp16 codes of a row as fp32; entries beyond n_codes keep their value. */
AVX2 INLINE void wide_table_avx2(const Job *job, int64_t row, float *table) {
    const uint16_t *codebook = row_codebook(job, row);
    int64_t i = 0;
    for (; i + 8 <= job->n_codes; i += 8)
        _mm256_storeu_ps(table + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(codebook + i))));
    for (; i < job->n_codes; i++) table[i] = half_to_float(codebook[i]);
}

AVX2 static void bytes_avx2(const Job *job, int64_t begin, int64_t end) {
    float *y = job->y, table[256] = {0};
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *codes = job->codes + row * job->in_features;
        wide_table_avx2(job, row, table);
        __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
        int64_t i = 0;
        for (; i + 32 <= job->in_features; i += 32) {
            fetch_ahead(codes + i);
            for (int s = 0; s < 4; s++) {
                __m128i bytes = _mm_loadl_epi64((const __m128i *)(codes + i + 8 * s));
                __m256 w = _mm256_i32gather_ps(table, _mm256_cvtepu8_epi32(bytes), 4);
                sum[s] = _mm256_fmadd_ps(w, _mm256_loadu_ps(job->x + i + 8 * s), sum[s]);
            }
        }
        __m256 both = _mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3]));
        y[row] = (job->bias ? job->bias[row] : 0.0f) + sum_lanes_avx2(both) +
                 bytes_dot(codes, job->x, i, job->in_features, table);
    }
}

AVX512 INLINE float bytes_row_gather(const uint8_t *codes, const float *x, int64_t n, const float *table, int64_t *i) {
    __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (; *i + 64 <= n; *i += 64) {
        fetch_ahead(codes + *i);
        for (int s = 0; s < 4; s++) {
            __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + *i + 16 * s)));
            __m512 w = _mm512_i32gather_ps(index, table, 4);
            sum[s] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x + *i + 16 * s), sum[s]);
        }
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

/* At most 64 codes: the table is four registers, looked up by two two-register permutes. */
AVX512 INLINE float bytes_row_permute(const uint8_t *codes, const float *x, int64_t n, const float *table, int64_t *i) {
    __m512 t[4], sum[4];
    for (int s = 0; s < 4; s++) {
        t[s] = _mm512_loadu_ps(table + 16 * s);
        sum[s] = _mm512_setzero_ps();
    }
    for (; *i + 64 <= n; *i += 64) {
        fetch_ahead(codes + *i);
        for (int s = 0; s < 4; s++) {
            __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + *i + 16 * s)));
            __m512 w = _mm512_permutex2var_ps(t[0], index, t[1]), upper = _mm512_permutex2var_ps(t[2], index, t[3]);
            w = _mm512_mask_mov_ps(w, _mm512_test_epi32_mask(index, _mm512_set1_epi32(32)), upper);
            sum[s] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x + *i + 16 * s), sum[s]);
        }
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

AVX512 static void bytes_avx512(const Job *job, int64_t begin, int64_t end) {
    float *y = job->y, table[256] = {0};
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *codes = job->codes + row * job->in_features;
        int64_t i = 0;
        wide_table_avx2(job, row, table);
        float sum = job->n_codes <= 64 ? bytes_row_permute(codes, job->x, job->in_features, table, &i)
                                       : bytes_row_gather(codes, job->x, job->in_features, table, &i);
        sum += bytes_dot(codes, job->x, i, job->in_features, table);
        y[row] = (job->bias ? job->bias[row] : 0.0f) + sum;
    }
}

/* ------------------------------------------------------------------------ VBMI, used by the VNNI path */

/* 16-bit table entries, low and high bytes apart, 64 to a register. */
typedef struct {
    __m512i low[4], high[4];
} ByteTables;

VBMI INLINE __m512i low_bytes(__m512i first, __m512i second) {
    __m512i joined = _mm512_castsi256_si512(_mm512_cvtepi16_epi8(first));
    return _mm512_inserti64x4(joined, _mm512_cvtepi16_epi8(second), 1);
}

VBMI INLINE ByteTables byte_tables(const uint16_t *entries) {
    ByteTables t;
    for (int s = 0; s < 4; s++) {
        __m512i a = _mm512_loadu_si512(entries + 64 * s), b = _mm512_loadu_si512(entries + 64 * s + 32);
        t.low[s] = low_bytes(a, b);
        t.high[s] = low_bytes(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
    }
    return t;
}

/* One byte of the entries of 64 codes; `wide` when there are more than 64 entries. */
VBMI INLINE __m512i lookup_byte(const __m512i table[4], __m512i codes, int wide) {
    if (!wide) return _mm512_permutexvar_epi8(codes, table[0]);
    __m512i lower = _mm512_permutex2var_epi8(table[0], codes, table[1]);
    __m512i upper = _mm512_permutex2var_epi8(table[2], codes, table[3]);
    return _mm512_mask_mov_epi8(lower, _mm512_movepi8_mask(codes), upper);
}

/* The 16-bit entries of 64 codes in order. Unpacking works inside 128 bits, so the codes are spread for it first. */
VBMI INLINE void lookup_entries(const ByteTables *t, __m512i codes, int wide, __m512i entries[2]) {
    codes = _mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), codes);
    __m512i low = lookup_byte(t->low, codes, wide), high = lookup_byte(t->high, codes, wide);
    entries[0] = _mm512_unpacklo_epi8(low, high);
    entries[1] = _mm512_unpackhi_epi8(low, high);
}

VBMI INLINE void multiply_64(const ByteTables *t, __m512i codes, int wide, const float *x, __m512 sum[4]) {
    __m512i entries[2];
    lookup_entries(t, codes, wide, entries);
    for (int s = 0; s < 4; s++) {
        __m256i half = s % 2 ? _mm512_extracti64x4_epi64(entries[s / 2], 1) : _mm512_castsi512_si256(entries[s / 2]);
        sum[s] = _mm512_fmadd_ps(_mm512_cvtph_ps(half), _mm512_loadu_ps(x + 16 * s), sum[s]);
    }
}

VBMI INLINE float bytes_row_vbmi(const Job *job, const uint8_t *codes, const ByteTables *t, int wide,
                                 const float *tail) {
    __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t i = 0;
    for (; i + 64 <= job->in_features; i += 64) {
        fetch_ahead(codes + i);
        multiply_64(t, _mm512_loadu_si512(codes + i), wide, job->x + i, sum);
    }
    __mmask64 left = (1ull << (job->in_features - i)) - 1;
    if (left) multiply_64(t, _mm512_maskz_loadu_epi8(left, codes + i), wide, tail, sum);
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

VBMI static void bytes_vbmi(const Job *job, int64_t begin, int64_t end) {
    float *y = job->y, tail[64] = {0}; /* the last inputs, padded with zeros */
    int64_t whole = job->in_features / 64 * 64;
    uint16_t entries[256] = {0};
    memcpy(tail, job->x + whole, (size_t)(job->in_features - whole) * sizeof(float));
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *codes = job->codes + row * job->in_features;
        memcpy(entries, row_codebook(job, row), (size_t)job->n_codes * 2);
        ByteTables t = byte_tables(entries);
        float sum = job->n_codes > 64 ? bytes_row_vbmi(job, codes, &t, 1, tail)
                                      : bytes_row_vbmi(job, codes, &t, 0, tail);
        y[row] = (job->bias ? job->bias[row] : 0.0f) + sum;
    }
}

#endif /* X86 */
