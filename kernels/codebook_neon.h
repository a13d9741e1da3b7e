/* 4-, 3- and 2-bit codes on aarch64: vqtbl1q looks up one byte of 16 entries. Exact arithmetic and dequantizing take
 * the portable loops. */

#if NEON

/* The t-th codes of 16 byte columns, one a byte; c[k] is the same quarter of register k. */
INLINE uint8x16_t column_neon(int bits, const uint8x16_t *c, int t) {
    uint8x16_t codes = vshlq_u8(c[CODE_REGISTER(bits, t)], vdupq_n_s8((int8_t)-CODE_SHIFT(bits, t)));
    return vandq_u8(codes, vdupq_n_u8((uint8_t)((1 << bits) - 1)));
}

/* A quarter of a block in registers. */
INLINE void load_quarter_neon(int bits, const uint8_t *block, int quarter, uint8x16_t *c) {
    for (int k = 0; k < REGISTERS(bits); k++) c[k] = vld1q_u8(block + 64 * k + 16 * quarter);
    if (bits == 3) c[3] = vsriq_n_u8(c[0], vsriq_n_u8(c[1], c[2], 2), 2);
}

/* Where q[e] of a block comes from: quarter, pair u of codes, which of the two, byte column p of the quarter. Columns
 * 4 w + i of both codes fall into one int32 sum and share scale 4 (quarter * STEPS + u) + i. */
INLINE int neon_input(int bits, int e) {
    int quarter = e / (32 * STEPS(bits)), u = e / 32 % STEPS(bits), a = e / 16 % 2, p = e % 16;
    return INPUT_OF(bits, p % 4, 2 * u + a) + 4 * quarter + p / 4;
}

static void prepare16_neon(int bits, const float *x, X16 *steps, int64_t blocks) {
    const int inputs = BLOCK_INPUTS(bits);
    uint16_t order[BLOCK_INPUTS(3)];
    for (int e = 0; e < inputs; e++) order[e] = (uint16_t)neon_input(bits, e);
    for (int64_t b = 0; b < blocks; b++, x += inputs)
        for (int e = 0; e < inputs; e += 32) {
            X16 *step = steps + (b * inputs + e) / STEP;
            for (int i = 0; i < 4; i++) {
                float peak = TINY, not_finite = 0.0f;
                for (int k = 0; k < 8; k++) {
                    float value = x[order[e + 4 * k + i]];
                    peak = fabsf(value) > peak ? fabsf(value) : peak;
                    not_finite += value * 0.0f;
                }
                step->scale[e % STEP / 8 + i] = peak / (float)UNIT16 + not_finite;
                for (int k = 0; k < 8; k++)
                    step->q[e % STEP + 4 * k + i] = (int16_t)fixed_point(x[order[e + 4 * k + i]], (float)UNIT16 / peak);
            }
        }
}

/* 16 words of fixed point, split into low and high bytes. */
INLINE float row_bytes_neon(const Job *job, int bits, int64_t row, uint8x16_t *low, uint8x16_t *high) {
    int16_t table[16];
    uint8_t bytes[2][16];
    float scale = row_table_fixed(job, row, bits, UNIT16, table);
    for (int i = 0; i < 16; i++) {
        bytes[0][i] = (uint8_t)(table[i] & 255);
        bytes[1][i] = (uint8_t)(table[i] >> 8 & 255);
    }
    *low = vld1q_u8(bytes[0]);
    *high = vld1q_u8(bytes[1]);
    return scale;
}

/* Add 16 products to the four int32 sums. */
INLINE int32x4_t multiply_neon(int32x4_t dot, uint8x16_t code, const int16_t *q, uint8x16_t low, uint8x16_t high) {
    uint8x16_t l = vqtbl1q_u8(low, code), h = vqtbl1q_u8(high, code);
    int16x8_t first = vreinterpretq_s16_u8(vzip1q_u8(l, h)), second = vreinterpretq_s16_u8(vzip2q_u8(l, h));
    int16x8_t q0 = vld1q_s16(q), q1 = vld1q_s16(q + 8);
    dot = vmlal_s16(dot, vget_low_s16(first), vget_low_s16(q0));
    dot = vmlal_high_s16(dot, first, q0);
    dot = vmlal_s16(dot, vget_low_s16(second), vget_low_s16(q1));
    return vmlal_high_s16(dot, second, q1);
}

#define INT16_NEON(BITS)                                                                                             \
    static void int16_neon_##BITS(const Job *job, int64_t begin, int64_t end) {                                     \
        FOR_TILES(BITS) {                                                                                           \
            const uint8_t *codes = tile_codes(job, BITS, first, n, tile);                                           \
            const X16 *x = job->x16 + first * STEPS(BITS);                                                          \
            uint8x16_t low[ROWS], high[ROWS], c[4];                                                                 \
            float32x4_t sum[ROWS];                                                                                  \
            float sums[ROWS];                                                                                       \
            for (int r = 0; r < ROWS; r++) {                                                                        \
                sums[r] = row_bytes_neon(job, BITS, tile * ROWS + r, &low[r], &high[r]);                            \
                sum[r] = vdupq_n_f32(0.0f);                                                                         \
            }                                                                                                       \
            for (int64_t b = 0; b < n; b++, x += STEPS(BITS))                                                       \
                UNROLL                                                                                              \
                for (int r = 0; r < ROWS; r++, codes += BLOCK_BYTES(BITS)) {                                        \
                    for (int k = 0; k < REGISTERS(BITS); k++) fetch_ahead(codes + 64 * k);                          \
                    UNROLL                                                                                          \
                    for (int e = 0; e < BLOCK_INPUTS(BITS); e += 32) {                                              \
                        const int u = e / 32 % STEPS(BITS);                                                         \
                        const X16 *step = x + e / STEP;                                                             \
                        const int16_t *q = step->q + e % STEP;                                                      \
                        if (u == 0) load_quarter_neon(BITS, codes, e / (32 * STEPS(BITS)), c);                      \
                        int32x4_t dot = vdupq_n_s32(0);                                                             \
                        dot = multiply_neon(dot, column_neon(BITS, c, 2 * u), q, low[r], high[r]);                  \
                        dot = multiply_neon(dot, column_neon(BITS, c, 2 * u + 1), q + 16, low[r], high[r]);         \
                        sum[r] = vfmaq_f32(sum[r], vcvtq_f32_s32(dot), vld1q_f32(step->scale + e % STEP / 8));      \
                    }                                                                                               \
                }                                                                                                   \
            for (int r = 0; r < ROWS; r++) sums[r] *= vaddvq_f32(sum[r]);                                           \
            store_tile(job, tile, first, sums);                                                                     \
        }                                                                                                           \
    }
INT16_NEON(4)
INT16_NEON(3)
INT16_NEON(2)

/* int8: two products of at most 127^2 fit an int16. */
INLINE int32x4_t dot8_neon(int8x16_t w0, int8x16_t q0, int8x16_t w1, int8x16_t q1) {
    int16x8_t low = vmlal_s8(vmull_s8(vget_low_s8(w0), vget_low_s8(q0)), vget_low_s8(w1), vget_low_s8(q1));
    int16x8_t high = vmlal_high_s8(vmull_high_s8(w0, q0), w1, q1);
    return vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
}

#define INT8_NEON(BITS)                                                                                              \
    static void int8_neon_##BITS(const Job *job, int64_t begin, int64_t end) {                                      \
        FOR_TILES(BITS) {                                                                                           \
            const uint8_t *codes = tile_codes(job, BITS, first, n, tile);                                           \
            const X8 *x = job->x8 + first * STEPS(BITS);                                                            \
            uint8x16_t c[4];                                                                                        \
            int8x16_t table[ROWS], w[2], q[2];                                                                      \
            float32x4_t sum[ROWS];                                                                                  \
            float sums[ROWS];                                                                                       \
            for (int r = 0; r < ROWS; r++) {                                                                        \
                int16_t fixed[16];                                                                                  \
                sums[r] = row_table_fixed(job, tile * ROWS + r, BITS, UNIT8, fixed);                                \
                table[r] = vcombine_s8(vmovn_s16(vld1q_s16(fixed)), vmovn_s16(vld1q_s16(fixed + 8)));               \
                sum[r] = vdupq_n_f32(0.0f);                                                                         \
            }                                                                                                       \
            for (int64_t b = 0; b < n; b++, x += STEPS(BITS))                                                       \
                UNROLL                                                                                              \
                for (int r = 0; r < ROWS; r++, codes += BLOCK_BYTES(BITS)) {                                        \
                    for (int k = 0; k < REGISTERS(BITS); k++) fetch_ahead(codes + 64 * k);                          \
                    UNROLL                                                                                          \
                    for (int e = 0; e < 4 * STEPS(BITS); e++) {                                                     \
                        const int quarter = e / STEPS(BITS), u = e % STEPS(BITS);                                   \
                        if (u == 0) load_quarter_neon(BITS, codes, quarter, c);                                     \
                        for (int a = 0; a < 2; a++) {                                                               \
                            w[a] = vqtbl1q_s8(table[r], column_neon(BITS, c, 2 * u + a));                           \
                            q[a] = vld1q_s8(x[u].q + 64 * a + 16 * quarter);                                        \
                        }                                                                                           \
                        float32x4_t dot = vcvtq_f32_s32(dot8_neon(w[0], q[0], w[1], q[1]));                         \
                        sum[r] = vfmaq_f32(sum[r], dot, vld1q_f32(x[u].scale + 4 * quarter));                       \
                    }                                                                                               \
                }                                                                                                   \
            for (int r = 0; r < ROWS; r++) sums[r] *= vaddvq_f32(sum[r]);                                           \
            store_tile(job, tile, first, sums);                                                                     \
        }                                                                                                           \
    }
INT8_NEON(4)
INT8_NEON(3)
INT8_NEON(2)

#endif /* NEON */
