/* 4-, 3- and 2-bit codes in portable C: the reference that the vector paths are compared with. */

INLINE float row_int16_portable(int bits, const uint8_t *codes, const X16 *x, int64_t n, const int16_t *table) {
    float lanes[16] = {0}, sum = 0.0f;
    for (int64_t b = 0; b < n; b++, codes += ROWS * BLOCK_BYTES(bits), x += STEPS(bits))
        for (int l = 0; l < 16; l++) {
            int32_t dot[4] = {0};
            for (int i = 0; i < 4; i++)
                for (int t = 0; t < COLUMN(bits); t++) {
                    const int j = COLUMN(bits) * (i % 2) + t; /* of the word's codes */
                    dot[j / 4] += table[column_code(bits, codes, 4 * l + i, t)] * x[j / 4].q[32 * (j % 4) + 2 * l + i / 2];
                }
            for (int step = 0; step < STEPS(bits); step++) lanes[l] += (float)dot[step] * x[step].scale[l];
        }
    for (int l = 0; l < 16; l++) sum += lanes[l];
    return sum;
}

INLINE float row_int8_portable(int bits, const uint8_t *codes, const X8 *x, int64_t n, const int16_t *table) {
    float lanes[16] = {0}, sum = 0.0f;
    for (int64_t b = 0; b < n; b++, codes += ROWS * BLOCK_BYTES(bits))
        for (int u = 0; u < STEPS(bits); u++, x++)
            for (int l = 0; l < 16; l++) {
                int32_t dot = 0;
                for (int e = 0; e < 8; e++)
                    dot += table[column_code(bits, codes, 4 * l + e % 4, 2 * u + e / 4)] *
                           x->q[64 * (e / 4) + 4 * l + e % 4];
                lanes[l] += (float)dot * x->scale[l];
            }
    for (int l = 0; l < 16; l++) sum += lanes[l];
    return sum;
}

INLINE float row_exact_portable(int bits, const uint8_t *codes, const float *x, int64_t n, const float *table) {
    float lanes[16] = {0}, sum = 0.0f;
    for (int64_t b = 0; b < n; b++, codes += ROWS * BLOCK_BYTES(bits), x += BLOCK_INPUTS(bits))
        for (int i = 0; i < 4; i++)
            for (int t = 0; t < COLUMN(bits); t++)
                for (int l = 0; l < 16; l++)
                    lanes[l] += table[column_code(bits, codes, 4 * l + i, t)] * x[INPUT_OF(bits, i, t) + l];
    for (int l = 0; l < 16; l++) sum += lanes[l];
    return sum;
}

INLINE void tiles_portable(const Job *job, int bits, int arithmetic, int64_t begin, int64_t end) {
    FOR_TILES(bits) {
        const uint8_t *codes = tile_codes(job, bits, first, n, tile);
        float sums[ROWS];
        for (int r = 0; r < ROWS; r++, codes += BLOCK_BYTES(bits)) {
            int64_t row = tile * ROWS + r, step = first * STEPS(bits);
            float exact[16];
            int16_t fixed[16];
            if (arithmetic == EXACT) {
                row_table(job, row, exact, 16);
                sums[r] = row_exact_portable(bits, codes, job->x + step * STEP, n, exact);
            } else if (arithmetic == INT16) {
                sums[r] = row_table_fixed(job, row, bits, UNIT16, fixed);
                sums[r] *= row_int16_portable(bits, codes, job->x16 + step, n, fixed);
            } else {
                sums[r] = row_table_fixed(job, row, bits, UNIT8, fixed);
                sums[r] *= row_int8_portable(bits, codes, job->x8 + step, n, fixed);
            }
        }
        store_tile(job, tile, first, sums);
    }
}

#define TILES_PORTABLE(BITS)                                                                                         \
    static void int16_portable_##BITS(const Job *job, int64_t begin, int64_t end) {                                 \
        tiles_portable(job, BITS, INT16, begin, end);                                                               \
    }                                                                                                               \
    static void int8_portable_##BITS(const Job *job, int64_t begin, int64_t end) {                                  \
        tiles_portable(job, BITS, INT8, begin, end);                                                                \
    }                                                                                                               \
    static void exact_portable_##BITS(const Job *job, int64_t begin, int64_t end) {                                 \
        tiles_portable(job, BITS, EXACT, begin, end);                                                               \
    }
TILES_PORTABLE(4)
TILES_PORTABLE(3)
TILES_PORTABLE(2)
