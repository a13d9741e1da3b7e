/* 4-, 3- and 2-bit codes with AVX-512: vpermw looks up 32 words, vpermps 16 floats, vpermb 64 bytes, and none minds
 * what lies above its index, so that one shift makes an index out of packed codes. */

#if X86

AVX512 static void prepare16_avx512(int bits, const float *x, X16 *steps, int64_t blocks) {
    const __m512 unit = _mm512_set1_ps(UNIT16);
    for (int64_t b = 0; b < blocks * STEPS(bits); b++, x += STEP) {
        __m512 peak = _mm512_set1_ps(TINY), not_finite = _mm512_setzero_ps();
        for (int k = 0; k < 8; k++) {
            __m512 values = _mm512_loadu_ps(x + 16 * k);
            peak = _mm512_max_ps(peak, _mm512_abs_ps(values));
            not_finite = _mm512_fmadd_ps(values, _mm512_setzero_ps(), not_finite);
        }
        __m512 inverse = _mm512_div_ps(unit, peak);
        _mm512_storeu_ps(steps[b].scale, _mm512_add_ps(_mm512_div_ps(peak, unit), not_finite));
        for (int j = 0; j < 4; j++) {
            __m512i even = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * j), inverse));
            __m512i odd = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * j + 64), inverse));
            __m512i pairs = _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_slli_epi32(odd, 16));
            _mm512_storeu_si512(steps[b].q + 32 * j, pairs);
        }
    }
}

AVX512 static void prepare8_avx512(int bits, const float *x, X8 *steps, int64_t blocks) {
    bits == 4 ? prepare8(4, x, steps, blocks) : bits == 3 ? prepare8(3, x, steps, blocks) : prepare8(2, x, steps, blocks);
}

/* A row's codebook as fp32, the 2^bits entries over and over; zeros from n_codes on. */
AVX512 INLINE __m512 row_table_avx512(const Job *job, int bits, int64_t row) {
    const __m512i number = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __mmask16 valid = (__mmask16)((1u << job->n_codes) - 1);
    __m512 table = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(valid, row_codebook(job, row)));
    if (bits == 4) return table;
    return _mm512_permutexvar_ps(_mm512_and_si512(number, _mm512_set1_epi32((1 << bits) - 1)), table);
}

/* The same in fixed point as 32-bit integers; returns the scale. */
AVX512 INLINE float row_fixed_avx512(const Job *job, int bits, int64_t row, float unit, __m512i *fixed) {
    __m512 table = row_table_avx512(job, bits, row);
    float peak = _mm512_reduce_max_ps(_mm512_abs_ps(table));
    peak = peak > TINY ? peak : TINY;
    *fixed = _mm512_cvtps_epi32(_mm512_mul_ps(table, _mm512_set1_ps(unit / peak)));
    return peak / unit;
}

/* Words for vpermw: words[0] is indexed by the low bits, words[1] (2-bit codes) by bits 2 and 3. */
AVX512 INLINE float row_words_avx512(const Job *job, int bits, int64_t row, __m512i words[2]) {
    const __m512i fourth = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    __m512i fixed;
    float scale = row_fixed_avx512(job, bits, row, UNIT16, &fixed);
    words[0] = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(fixed));
    if (bits == 2)
        words[1] = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_permutexvar_epi32(fourth, fixed)));
    return scale;
}

/* A block in registers. */
AVX512 INLINE void load_block_avx512(int bits, const uint8_t *block, __m512i *c) {
    for (int k = 0; k < REGISTERS(bits); k++) c[k] = _mm512_loadu_si512(block + 64 * k);
    if (bits != 3) return;
    enum { PICK = 0xca }; /* of three operands: the second where the first has a one, else the third */
    __m512i b = _mm512_srli_epi16(c[1], 2), d = _mm512_srli_epi16(c[2], 4);
    d = _mm512_ternarylogic_epi32(_mm512_set1_epi8(48), b, d, PICK);
    c[3] = _mm512_ternarylogic_epi32(_mm512_set1_epi8((char)192), c[0], d, PICK);
}

/* The table entries of code j of the 32 words of a block. */
AVX512 INLINE __m512i entries_avx512(int bits, const __m512i *c, int j, const __m512i words[2]) {
    const int byte = 8 * (j / COLUMN(bits)), t = j % COLUMN(bits);
    if (bits == 2) return _mm512_permutexvar_epi16(_mm512_srli_epi16(c[0], 4 * (j / 2)), words[j % 2]);
    __m512i index = _mm512_srli_epi16(c[CODE_REGISTER(bits, t)], byte + CODE_SHIFT(bits, t));
    return _mm512_permutexvar_epi16(index, words[0]);
}

#define INT16_AVX512(NAME, BITS, TARGET, MULTIPLY_ADD)                                                              \
    TARGET static void NAME##_##BITS(const Job *job, int64_t begin, int64_t end) {                                  \
        FOR_TILES(BITS) {                                                                                           \
            const uint8_t *codes = tile_codes(job, BITS, first, n, tile);                                           \
            const X16 *x = job->x16 + first * STEPS(BITS);                                                          \
            __m512i words[ROWS][2], c[4];                                                                           \
            __m512 sum[ROWS];                                                                                       \
            float sums[ROWS];                                                                                       \
            for (int r = 0; r < ROWS; r++) {                                                                        \
                sums[r] = row_words_avx512(job, BITS, tile * ROWS + r, words[r]);                                   \
                sum[r] = _mm512_setzero_ps();                                                                       \
            }                                                                                                       \
            for (int64_t b = 0; b < n; b++, x += STEPS(BITS))                                                       \
                UNROLL                                                                                              \
                for (int r = 0; r < ROWS; r++, codes += BLOCK_BYTES(BITS)) {                                        \
                    for (int k = 0; k < REGISTERS(BITS); k++) fetch_ahead(codes + 64 * k);                          \
                    load_block_avx512(BITS, codes, c);                                                              \
                    UNROLL                                                                                          \
                    for (int step = 0; step < STEPS(BITS); step++) {                                                \
                        __m512i dot = _mm512_setzero_si512();                                                       \
                        for (int j = 0; j < 4; j++) {                                                               \
                            __m512i w = entries_avx512(BITS, c, 4 * step + j, words[r]);                            \
                            dot = MULTIPLY_ADD(dot, w, _mm512_loadu_si512(x[step].q + 32 * j));                     \
                        }                                                                                           \
                        __m512 scale = _mm512_loadu_ps(x[step].scale);                                              \
                        sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, sum[r]);                           \
                    }                                                                                               \
                }                                                                                                   \
            _mm_storeu_ps(sums, _mm_mul_ps(_mm_loadu_ps(sums), sum_rows_avx512(sum)));                              \
            store_tile(job, tile, first, sums);                                                                     \
        }                                                                                                           \
    }

#define MADD_THEN_ADD(sum, a, b) _mm512_add_epi32(sum, _mm512_madd_epi16(a, b))
INT16_AVX512(int16_avx512bw, 4, AVX512, MADD_THEN_ADD)
INT16_AVX512(int16_avx512bw, 3, AVX512, MADD_THEN_ADD)
INT16_AVX512(int16_avx512bw, 2, AVX512, MADD_THEN_ADD)
INT16_AVX512(int16_avx512vnni, 4, VNNI, _mm512_dpwssd_epi32)
INT16_AVX512(int16_avx512vnni, 3, VNNI, _mm512_dpwssd_epi32)
INT16_AVX512(int16_avx512vnni, 2, VNNI, _mm512_dpwssd_epi32)

/* int8 needs VBMI beside VNNI: vpermb minds the low six bits of an index, so that a table for each place of a code
 * below bit 6 saves the shift, and there is nothing to mask. Without VBMI the AVX2 kernel does it. */
#define PLACE_SHIFT(BITS, k) ((BITS) == 2 ? 2 * (k) : (k) == 1 ? 3 : (k) == 2 ? 2 : 0)

/* A row's codebook raised by 128 to be unsigned: table[k] is indexed by a code that starts at PLACE_SHIFT(k). */
VNNI_VBMI INLINE float row_places_vbmi(const Job *job, int bits, int64_t row, __m512i table[3]) {
    uint8_t numbers[64];
    __m512i fixed, number, place;
    float scale = row_fixed_avx512(job, bits, row, UNIT8, &fixed);
    table[0] = _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(_mm512_add_epi32(fixed, _mm512_set1_epi32(128))));
    if (bits == 4) return scale;
    for (int i = 0; i < 64; i++) numbers[i] = (uint8_t)i;
    number = _mm512_loadu_si512(numbers);
    for (int k = 1; k < 3; k++) {
        place = _mm512_and_si512(_mm512_srli_epi16(number, PLACE_SHIFT(bits, k)), _mm512_set1_epi8((1 << bits) - 1));
        table[k] = _mm512_permutexvar_epi8(place, table[0]);
    }
    return scale;
}

/* The table entries of the t-th codes of the 64 byte columns. */
VNNI_VBMI INLINE __m512i column_vbmi(int bits, const __m512i *c, int t, const __m512i table[3]) {
    __m512i codes = c[CODE_REGISTER(bits, t)];
    if (bits == 2 && t < 3) return _mm512_permutexvar_epi8(codes, table[t]);
    if (bits == 3 && t < 7) return _mm512_permutexvar_epi8(codes, table[t == 6 ? 2 : t % 2]);
    return _mm512_permutexvar_epi8(_mm512_srli_epi16(codes, CODE_SHIFT(bits, t)), table[0]);
}

#define INT8_VBMI(BITS)                                                                                             \
    VNNI_VBMI static void int8_vbmi_##BITS(const Job *job, int64_t begin, int64_t end) {                            \
        FOR_TILES(BITS) {                                                                                           \
            const uint8_t *codes = tile_codes(job, BITS, first, n, tile);                                           \
            const X8 *x = job->x8 + first * STEPS(BITS);                                                            \
            __m512i table[ROWS][3], c[4];                                                                           \
            __m512 sum[ROWS];                                                                                       \
            float sums[ROWS];                                                                                       \
            for (int r = 0; r < ROWS; r++) {                                                                        \
                sums[r] = row_places_vbmi(job, BITS, tile * ROWS + r, table[r]);                                    \
                sum[r] = _mm512_setzero_ps();                                                                       \
            }                                                                                                       \
            for (int64_t b = 0; b < n; b++, x += STEPS(BITS))                                                       \
                UNROLL                                                                                              \
                for (int r = 0; r < ROWS; r++, codes += BLOCK_BYTES(BITS)) {                                        \
                    for (int k = 0; k < REGISTERS(BITS); k++) fetch_ahead(codes + 64 * k);                          \
                    load_block_avx512(BITS, codes, c);                                                              \
                    UNROLL                                                                                          \
                    for (int u = 0; u < STEPS(BITS); u++) {                                                         \
                        __m512i dot = _mm512_loadu_si512(x[u].start);                                               \
                        for (int a = 0; a < 2; a++) {                                                               \
                            __m512i w = column_vbmi(BITS, c, 2 * u + a, table[r]);                                  \
                            dot = _mm512_dpbusd_epi32(dot, w, _mm512_loadu_si512(x[u].q + 64 * a));                 \
                        }                                                                                           \
                        __m512 scale = _mm512_loadu_ps(x[u].scale);                                                 \
                        sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, sum[r]);                           \
                    }                                                                                               \
                }                                                                                                   \
            _mm_storeu_ps(sums, _mm_mul_ps(_mm_loadu_ps(sums), sum_rows_avx512(sum)));                              \
            store_tile(job, tile, first, sums);                                                                     \
        }                                                                                                           \
    }
INT8_VBMI(4)
INT8_VBMI(3)
INT8_VBMI(2)

/* The t-th code of byte i of the 16 lanes, in the low bits of each; what lies above it stays. */
AVX512 INLINE __m512i lane_code_avx512(int bits, const __m512i *c, int i, int t) {
    return _mm512_srli_epi32(c[CODE_REGISTER(bits, t)], 8 * i + CODE_SHIFT(bits, t));
}

#define EXACT_AVX512(BITS)                                                                                          \
    AVX512 static void exact_avx512_##BITS(const Job *job, int64_t begin, int64_t end) {                            \
        FOR_TILES(BITS) {                                                                                           \
            const uint8_t *codes = tile_codes(job, BITS, first, n, tile);                                           \
            const float *x = job->x + first * BLOCK_INPUTS(BITS);                                                   \
            __m512 table[ROWS], sum[ROWS];                                                                          \
            __m512i c[4];                                                                                           \
            float sums[ROWS];                                                                                       \
            for (int r = 0; r < ROWS; r++) {                                                                        \
                table[r] = row_table_avx512(job, BITS, tile * ROWS + r);                                            \
                sum[r] = _mm512_setzero_ps();                                                                       \
            }                                                                                                       \
            for (int64_t b = 0; b < n; b++, x += BLOCK_INPUTS(BITS))                                                \
                UNROLL                                                                                              \
                for (int r = 0; r < ROWS; r++, codes += BLOCK_BYTES(BITS)) {                                        \
                    for (int k = 0; k < REGISTERS(BITS); k++) fetch_ahead(codes + 64 * k);                          \
                    load_block_avx512(BITS, codes, c);                                                              \
                    UNROLL                                                                                          \
                    for (int e = 0; e < 4 * COLUMN(BITS); e++) {                                                    \
                        const int i = e / COLUMN(BITS), t = e % COLUMN(BITS);                                       \
                        __m512 w = _mm512_permutexvar_ps(lane_code_avx512(BITS, c, i, t), table[r]);                \
                        sum[r] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x + INPUT_OF(BITS, i, t)), sum[r]);             \
                    }                                                                                               \
                }                                                                                                   \
            _mm_storeu_ps(sums, sum_rows_avx512(sum));                                                              \
            store_tile(job, tile, first, sums);                                                                     \
        }                                                                                                           \
    }
EXACT_AVX512(4)
EXACT_AVX512(3)
EXACT_AVX512(2)

#endif /* X86 */
