/* 4-, 3- and 2-bit codes with AVX2: pshufb looks up one byte of 32 entries, vpermps 8 fp32 entries. */

#if X86

/* The t-th codes of 32 byte columns, one a byte; c[k] is the same half of register k. */
AVX2 INLINE __m256i column_avx2(int bits, const __m256i *c, int t) {
    __m256i codes = _mm256_srli_epi16(c[CODE_REGISTER(bits, t)], CODE_SHIFT(bits, t));
    return _mm256_and_si256(codes, _mm256_set1_epi8((1 << bits) - 1));
}

/* Half a block in registers. */
AVX2 INLINE void load_half_avx2(int bits, const uint8_t *block, int half, __m256i *c) {
    for (int k = 0; k < REGISTERS(bits); k++) c[k] = _mm256_loadu_si256((const __m256i *)(block + 64 * k + 32 * half));
    if (bits != 3) return;
    const __m256i top = _mm256_set1_epi8((char)192);
    __m256i b = _mm256_srli_epi16(_mm256_and_si256(c[1], top), 2), d = _mm256_srli_epi16(_mm256_and_si256(c[2], top), 4);
    c[3] = _mm256_or_si256(_mm256_and_si256(c[0], top), _mm256_or_si256(b, d));
}

/* Where q[e] of a block comes from, e < BLOCK_INPUTS. Unpacking bytes inside 128-bit halves visits them in this order:
 * half h of the block, pair u of codes, vector v (0, 1: code 2 u of lanes 0-1 and 2-3 of each quarter; 2, 3: code
 * 2 u + 1), word w. Words 2 p and 2 p + 1 of the four vectors fall into one int32 sum and share a scale. */
INLINE int avx2_input(int bits, int e) {
    int h = e / (64 * STEPS(bits)), u = e / 64 % STEPS(bits), v = e / 16 % 4, w = e % 16;
    int lane = 8 * h + 4 * (w / 8) + 2 * (v % 2) + w % 8 / 4;
    return INPUT_OF(bits, w % 4, 2 * u + v / 2) + lane;
}

/* 64 inputs in fixed point, with 8 scales. */
AVX2 INLINE void prepare_half_avx2(const float *permuted, int16_t *q, float *scales) {
    const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)), unit = _mm256_set1_ps(UNIT16);
    __m256 scale[2], inverse[2];
    for (int s = 0; s < 2; s++) {
        __m256 peak = _mm256_set1_ps(TINY), not_finite = _mm256_setzero_ps();
        for (int v = 0; v < 4; v++) {
            __m256 values = _mm256_loadu_ps(permuted + 16 * v + 8 * s);
            peak = _mm256_max_ps(peak, _mm256_and_ps(values, no_sign));
            not_finite = _mm256_fmadd_ps(values, _mm256_setzero_ps(), not_finite);
        }
        peak = _mm256_max_ps(peak, _mm256_permute_ps(peak, 0xb1));
        not_finite = _mm256_add_ps(not_finite, _mm256_permute_ps(not_finite, 0xb1));
        scale[s] = _mm256_add_ps(_mm256_div_ps(peak, unit), not_finite);
        inverse[s] = _mm256_div_ps(unit, peak);
    }
    for (int v = 0; v < 4; v++) {
        __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(permuted + 16 * v), inverse[0]));
        __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(permuted + 16 * v + 8), inverse[1]));
        __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
        _mm256_storeu_si256((__m256i *)(q + 16 * v), words);
    }
    __m256 evens = _mm256_shuffle_ps(scale[0], scale[1], 0x88);
    _mm256_storeu_ps(scales, _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(evens), 0xd8)));
}

AVX2 static void prepare16_avx2(int bits, const float *x, X16 *steps, int64_t blocks) {
    const int inputs = BLOCK_INPUTS(bits);
    uint16_t order[BLOCK_INPUTS(3)];
    for (int e = 0; e < inputs; e++) order[e] = (uint16_t)avx2_input(bits, e);
    for (int64_t b = 0; b < blocks; b++, x += inputs)
        for (int e = 0; e < inputs; e += 64) {
            float permuted[64];
            for (int i = 0; i < 64; i++) permuted[i] = x[order[e + i]];
            X16 *step = steps + (b * inputs + e) / STEP;
            prepare_half_avx2(permuted, step->q + e % STEP, step->scale + e % STEP / 8);
        }
}

AVX2 static void prepare8_avx2(int bits, const float *x, X8 *steps, int64_t blocks) {
    bits == 4 ? prepare8(4, x, steps, blocks) : bits == 3 ? prepare8(3, x, steps, blocks) : prepare8(2, x, steps, blocks);
}

/* Sixteen fp16 codes of a row as fp32, zeros beyond n_codes; below 4 bits the 2^bits entries over and over. */
AVX2 INLINE void row_table_avx2(const Job *job, int bits, int64_t row, __m256 table[2]) {
    uint16_t padded[16] = {0};
    const uint16_t *codebook = row_codebook(job, row);
    const int entries = 1 << bits;
    if (job->n_codes < 16) {
        memcpy(padded, codebook, (size_t)job->n_codes * 2);
        for (int i = entries; i < 16; i++) padded[i] = padded[i - entries];
        codebook = padded;
    }
    table[0] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)codebook));
    table[1] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(codebook + 8)));
}

/* A row's codebook in fixed point as 16 words; returns the scale. */
AVX2 INLINE float row_words_avx2(const Job *job, int bits, int64_t row, float unit, __m128i words[2]) {
    const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 table[2], peaks;
    row_table_avx2(job, bits, row, table);
    peaks = _mm256_max_ps(_mm256_and_ps(table[0], no_sign), _mm256_and_ps(table[1], no_sign));
    __m128 p = _mm_max_ps(_mm256_castps256_ps128(peaks), _mm256_extractf128_ps(peaks, 1));
    p = _mm_max_ps(p, _mm_movehl_ps(p, p));
    float peak = _mm_cvtss_f32(_mm_max_ss(_mm_max_ss(p, _mm_movehdup_ps(p)), _mm_set_ss(TINY)));
    __m256 inverse = _mm256_set1_ps(unit / peak);
    __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(table[0], inverse));
    __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(table[1], inverse));
    __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    words[0] = _mm256_castsi256_si128(both);
    words[1] = _mm256_extracti128_si256(both, 1);
    return peak / unit;
}

/* The same split into low and high bytes for pshufb. */
AVX2 INLINE float row_bytes_avx2(const Job *job, int bits, int64_t row, __m256i *low, __m256i *high) {
    const __m128i even_bytes = _mm_set1_epi16(0x00ff);
    __m128i w[2];
    float scale = row_words_avx2(job, bits, row, UNIT16, w);
    *low = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(w[0], even_bytes), _mm_and_si128(w[1], even_bytes)));
    *high = _mm256_broadcastsi128_si256(_mm_packs_epi16(_mm_srai_epi16(w[0], 8), _mm_srai_epi16(w[1], 8)));
    return scale;
}

/* Sums of 8 products of 64 inputs in int32: the codes of two byte columns' worth of 32. */
AVX2 INLINE __m256i dot64_avx2(__m256i even, __m256i odd, const __m256i *q, __m256i low, __m256i high) {
    __m256i el = _mm256_shuffle_epi8(low, even), eh = _mm256_shuffle_epi8(high, even);
    __m256i ol = _mm256_shuffle_epi8(low, odd), oh = _mm256_shuffle_epi8(high, odd);
    __m256i s0 = _mm256_madd_epi16(_mm256_unpacklo_epi8(el, eh), _mm256_loadu_si256(q));
    __m256i s1 = _mm256_madd_epi16(_mm256_unpackhi_epi8(el, eh), _mm256_loadu_si256(q + 1));
    __m256i s2 = _mm256_madd_epi16(_mm256_unpacklo_epi8(ol, oh), _mm256_loadu_si256(q + 2));
    __m256i s3 = _mm256_madd_epi16(_mm256_unpackhi_epi8(ol, oh), _mm256_loadu_si256(q + 3));
    return _mm256_add_epi32(_mm256_add_epi32(s0, s1), _mm256_add_epi32(s2, s3));
}

#define INT16_AVX2(BITS)                                                                                             \
    AVX2 static void int16_avx2_##BITS(const Job *job, int64_t begin, int64_t end) {                                \
        FOR_TILES(BITS) {                                                                                           \
            const uint8_t *codes = tile_codes(job, BITS, first, n, tile);                                           \
            const X16 *x = job->x16 + first * STEPS(BITS);                                                          \
            __m256i low[ROWS], high[ROWS], c[4];                                                                    \
            __m256 sum[ROWS];                                                                                       \
            float sums[ROWS];                                                                                       \
            for (int r = 0; r < ROWS; r++) {                                                                        \
                sums[r] = row_bytes_avx2(job, BITS, tile * ROWS + r, &low[r], &high[r]);                            \
                sum[r] = _mm256_setzero_ps();                                                                       \
            }                                                                                                       \
            for (int64_t b = 0; b < n; b++, x += STEPS(BITS))                                                       \
                UNROLL                                                                                              \
                for (int r = 0; r < ROWS; r++, codes += BLOCK_BYTES(BITS)) {                                        \
                    for (int k = 0; k < REGISTERS(BITS); k++) fetch_ahead(codes + 64 * k);                          \
                    UNROLL                                                                                          \
                    for (int e = 0; e < BLOCK_INPUTS(BITS); e += 64) {                                              \
                        const int u = e / 64 % STEPS(BITS);                                                         \
                        if (u == 0) load_half_avx2(BITS, codes, e / (64 * STEPS(BITS)), c);                         \
                        __m256i even = column_avx2(BITS, c, 2 * u), odd = column_avx2(BITS, c, 2 * u + 1);          \
                        const X16 *step = x + e / STEP;                                                             \
                        const __m256i *q = (const __m256i *)(step->q + e % STEP);                                   \
                        __m256 dot = _mm256_cvtepi32_ps(dot64_avx2(even, odd, q, low[r], high[r]));                 \
                        sum[r] = _mm256_fmadd_ps(dot, _mm256_loadu_ps(step->scale + e % STEP / 8), sum[r]);         \
                    }                                                                                               \
                }                                                                                                   \
            for (int r = 0; r < ROWS; r++) sums[r] *= sum_lanes_avx2(sum[r]);                                       \
            store_tile(job, tile, first, sums);                                                                     \
        }                                                                                                           \
    }
INT16_AVX2(4)
INT16_AVX2(3)
INT16_AVX2(2)

/* int8: |x| times w with the sign of x; two products of at most 127^2 fit the int16 that maddubs sums them in. */
#define INT8_AVX2(BITS)                                                                                              \
    AVX2 static void int8_avx2_##BITS(const Job *job, int64_t begin, int64_t end) {                                 \
        const __m256i ones = _mm256_set1_epi16(1);                                                                  \
        FOR_TILES(BITS) {                                                                                           \
            const uint8_t *codes = tile_codes(job, BITS, first, n, tile);                                           \
            const X8 *x = job->x8 + first * STEPS(BITS);                                                            \
            __m256i table[ROWS], c[4];                                                                              \
            __m256 sum[ROWS];                                                                                       \
            float sums[ROWS];                                                                                       \
            for (int r = 0; r < ROWS; r++) {                                                                        \
                __m128i words[2];                                                                                   \
                sums[r] = row_words_avx2(job, BITS, tile * ROWS + r, UNIT8, words);                                 \
                table[r] = _mm256_broadcastsi128_si256(_mm_packs_epi16(words[0], words[1]));                        \
                sum[r] = _mm256_setzero_ps();                                                                       \
            }                                                                                                       \
            for (int64_t b = 0; b < n; b++, x += STEPS(BITS))                                                       \
                UNROLL                                                                                              \
                for (int r = 0; r < ROWS; r++, codes += BLOCK_BYTES(BITS)) {                                        \
                    for (int k = 0; k < REGISTERS(BITS); k++) fetch_ahead(codes + 64 * k);                          \
                    UNROLL                                                                                          \
                    for (int half = 0; half < 2; half++) {                                                          \
                        load_half_avx2(BITS, codes, half, c);                                                       \
                        UNROLL                                                                                      \
                        for (int u = 0; u < STEPS(BITS); u++) {                                                     \
                            __m256i dot = _mm256_setzero_si256();                                                   \
                            for (int a = 0; a < 2; a++) {                                                           \
                                __m256i q = _mm256_loadu_si256((const __m256i *)(x[u].q + 64 * a + 32 * half));     \
                                __m256i w = _mm256_shuffle_epi8(table[r], column_avx2(BITS, c, 2 * u + a));         \
                                w = _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(w, q));               \
                                dot = _mm256_add_epi32(dot, _mm256_madd_epi16(w, ones));                            \
                            }                                                                                       \
                            __m256 scale = _mm256_loadu_ps(x[u].scale + 8 * half);                                  \
                            sum[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scale, sum[r]);                       \
                        }                                                                                           \
                    }                                                                                               \
                }                                                                                                   \
            for (int r = 0; r < ROWS; r++) sums[r] *= sum_lanes_avx2(sum[r]);                                       \
            store_tile(job, tile, first, sums);                                                                     \
        }                                                                                                           \
    }
INT8_AVX2(4)
INT8_AVX2(3)
INT8_AVX2(2)

/* Entry `index & 15` of a row's table, 8 at a time; the bits above are ignored, and bit 3 below 4 bits. */
AVX2 INLINE __m256 lookup_avx2(int bits, const __m256 table[2], __m256i index) {
    __m256 lower = _mm256_permutevar8x32_ps(table[0], index);
    if (bits < 4) return lower;
    __m256 upper = _mm256_permutevar8x32_ps(table[1], index);
    return _mm256_blendv_ps(lower, upper, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

/* The t-th code of byte i of 8 lanes, in the low bits of each; what lies above it stays. */
AVX2 INLINE __m256i lane_code_avx2(int bits, const __m256i *c, int i, int t) {
    return _mm256_srli_epi32(c[CODE_REGISTER(bits, t)], 8 * i + CODE_SHIFT(bits, t));
}

#define EXACT_AVX2(BITS)                                                                                             \
    AVX2 static void exact_avx2_##BITS(const Job *job, int64_t begin, int64_t end) {                                \
        FOR_TILES(BITS) {                                                                                           \
            const uint8_t *codes = tile_codes(job, BITS, first, n, tile);                                           \
            const float *x = job->x + first * BLOCK_INPUTS(BITS);                                                   \
            __m256 table[ROWS][2], sum[ROWS];                                                                       \
            __m256i c[4];                                                                                           \
            float sums[ROWS];                                                                                       \
            for (int r = 0; r < ROWS; r++) {                                                                        \
                row_table_avx2(job, BITS, tile * ROWS + r, table[r]);                                               \
                sum[r] = _mm256_setzero_ps();                                                                       \
            }                                                                                                       \
            for (int64_t b = 0; b < n; b++, x += BLOCK_INPUTS(BITS))                                                \
                UNROLL                                                                                              \
                for (int r = 0; r < ROWS; r++, codes += BLOCK_BYTES(BITS)) {                                        \
                    for (int k = 0; k < REGISTERS(BITS); k++) fetch_ahead(codes + 64 * k);                          \
                    UNROLL                                                                                          \
                    for (int half = 0; half < 2; half++) {                                                          \
                        load_half_avx2(BITS, codes, half, c);                                                       \
                        UNROLL                                                                                      \
                        for (int e = 0; e < 4 * COLUMN(BITS); e++) {                                                \
                            const int i = e / COLUMN(BITS), t = e % COLUMN(BITS);                                   \
                            __m256 w = lookup_avx2(BITS, table[r], lane_code_avx2(BITS, c, i, t));                  \
                            const float *from = x + INPUT_OF(BITS, i, t) + 8 * half;                                \
                            sum[r] = _mm256_fmadd_ps(w, _mm256_loadu_ps(from), sum[r]);                             \
                        }                                                                                           \
                    }                                                                                               \
                }                                                                                                   \
            for (int r = 0; r < ROWS; r++) sums[r] = sum_lanes_avx2(sum[r]);                                        \
            store_tile(job, tile, first, sums);                                                                     \
        }                                                                                                           \
    }
EXACT_AVX2(4)
EXACT_AVX2(3)
EXACT_AVX2(2)

#endif /* X86 */
