/* Activations in fixed point: 15 bits for int16 arithmetic, 7 bits and a sign for int8; 8 inputs share a scale.
 *
 * The 8 inputs are the ones whose products meet in one int32 sum, so a scale is applied once per sum and one outlier
 * costs only its 7 companions precision: 8 * 16383^2 < 2^31. A scale is NaN where an input of its 8 is not finite. */

enum { UNIT16 = 16383, UNIT8 = 127 };

/* The nearest integer of |value * inverse| < 2^22, ties to even; 0 for NaN. Adding 1.5 * 2^23 rounds without a call. */
INLINE int fixed_point(float value, float inverse) {
    float scaled = value * inverse, moved = scaled + 0x1.8p23f;
    int32_t bits;
    memcpy(&bits, &moved, sizeof bits);
    return scaled == scaled ? bits - 0x4b400000 : 0;
}

/* Scales of 16 groups of 8: the k-th member of group l is values[k][l]. */
INLINE void scales_of(const float *const values[8], float unit, float *scale, float *inverse) {
    float peak[16], not_finite[16] = {0};
    for (int l = 0; l < 16; l++) peak[l] = TINY;
    for (int k = 0; k < 8; k++)
        for (int l = 0; l < 16; l++) {
            float size = fabsf(values[k][l]);
            peak[l] = size > peak[l] ? size : peak[l];
            not_finite[l] += values[k][l] * 0.0f;
        }
    for (int l = 0; l < 16; l++) inverse[l] = unit / peak[l];
    for (int l = 0; l < 16; l++) scale[l] = peak[l] / unit + not_finite[l];
}

/* int16, word order (portable, AVX-512): q[32 j + 2 l + s] is input 16 (j + 4 s) + l of the step, scale[l]. */
INLINE void prepare16(const float *x, X16 *steps, int64_t n) {
    for (int64_t b = 0; b < n; b++, x += STEP) {
        const float *values[8];
        float inverse[16];
        for (int k = 0; k < 8; k++) values[k] = x + 16 * k;
        scales_of(values, UNIT16, steps[b].scale, inverse);
        for (int j = 0; j < 4; j++)
            for (int l = 0; l < 16; l++) {
                steps[b].q[32 * j + 2 * l] = (int16_t)fixed_point(values[j][l], inverse[l]);
                steps[b].q[32 * j + 2 * l + 1] = (int16_t)fixed_point(values[j + 4][l], inverse[l]);
            }
    }
}

/* int8, the same on every path: with t = 2 u + a, q[64 a + 4 l + i] of step u is input INPUT_OF(i, t) + l, scale[l]. */
INLINE void prepare8(int bits, const float *x, X8 *steps, int64_t blocks) {
    for (int64_t b = 0; b < blocks; b++, x += BLOCK_INPUTS(bits))
        for (int u = 0; u < STEPS(bits); u++, steps++) {
            const float *values[8];
            float inverse[16];
            uint32_t bytes[2][16] = {{0}};
            int32_t sum[16] = {0};
            for (int k = 0; k < 8; k++) values[k] = x + INPUT_OF(bits, k % 4, 2 * u + k / 4);
            scales_of(values, UNIT8, steps->scale, inverse);
            for (int k = 0; k < 8; k++)
                for (int l = 0; l < 16; l++) {
                    int q = fixed_point(values[k][l], inverse[l]);
                    bytes[k / 4][l] |= (uint32_t)(q & 255) << 8 * (k % 4);
                    sum[l] += q;
                }
            for (int l = 0; l < 16; l++) steps->start[l] = -128 * sum[l];
            for (int a = 0; a < 2; a++)
                for (int l = 0; l < 16; l++) /* little-endian by definition, whatever the machine */
                    for (int i = 0; i < 4; i++) steps->q[64 * a + 4 * l + i] = (int8_t)(bytes[a][l] >> 8 * i);
        }
}

static void prepare16_portable(int bits, const float *x, X16 *steps, int64_t blocks) {
    prepare16(x, steps, blocks * STEPS(bits));
}
static void prepare8_portable(int bits, const float *x, X8 *steps, int64_t blocks) {
    bits == 4 ? prepare8(4, x, steps, blocks) : bits == 3 ? prepare8(3, x, steps, blocks) : prepare8(2, x, steps, blocks);
}
