/* Batch-1 product of a dense matrix with a vector on a CPU, in three widths of the weight:
 *
 *     y[o] = bias[o] + scale[o] * sum_i weight[o][i] * x[i]        (fp32 in, fp32 out, fp32 sums; scale only with int8)
 *
 * The codebook GEMV's structure with nothing to look up, so that bytes are what differs between the widths:
 *
 *     block    64 bytes of one row: 16 fp32, 32 fp16 or 64 int8 inputs
 *     group    4 rows x one block:   | row 0 block | row 1 block | row 2 block | row 3 block |            256 bytes
 *     tile     4 rows x one panel:   | group 0 | group 1 | ... | group n-1 |      <= 4096 inputs
 *     panel    every tile of the matrix; the matrix is its panels one after the other
 *
 * A thread owns a run of tiles and reads one sequential stream in each panel. Rows are padded to 4, inputs to a block.
 * Bytes moved per output row: in_features * 4, 2 or 1 (+ 4 with int8). Instructions per byte rise as the width falls:
 * 16 weights cost a multiply-add at fp32, a conversion more at fp16, two at int8.
 * A row's sum is formed by one thread in one fixed order, so results do not depend on the number of threads.
 */

#include "cpu_targets.h"

enum { FP32 = 0, FP16 = 1, INT8 = 2 };
enum { ROWS = 4, BLOCK_BYTES = 64, PANEL_INPUTS = 4096 };

struct Job {
    const uint8_t *weight;
    const float *scale; /* fp32 [out_features] or NULL */
    const float *bias;  /* fp32 [out_features] or NULL */
    const float *x;     /* fp32, padded with zeros to whole blocks */
    float *y;
    int64_t in_features, out_features;
};

#define WIDTH(KIND) ((KIND) == FP32 ? 4 : (KIND) == FP16 ? 2 : 1)
#define BLOCK_INPUTS(KIND) (BLOCK_BYTES / WIDTH(KIND))

INLINE int64_t count_tiles(const Job *job) { return (job->out_features + ROWS - 1) / ROWS; }

/* Blocks of the panel that starts at block `first`; 0 behind the last panel. */
INLINE int64_t panel_blocks(const Job *job, int kind, int64_t first) {
    int64_t all = (job->in_features + BLOCK_INPUTS(kind) - 1) / BLOCK_INPUTS(kind);
    return smaller(PANEL_INPUTS / BLOCK_INPUTS(kind), all - first);
}

/* Weights of one tile in the panel of n blocks that starts at block `first`. */
INLINE const uint8_t *tile_weight(const Job *job, int64_t first, int64_t n, int64_t tile) {
    return job->weight + (first * count_tiles(job) + tile * n) * ROWS * BLOCK_BYTES;
}

#define FOR_TILES(KIND)                                                                                              \
    for (int64_t first = 0, n; (n = panel_blocks(job, KIND, first)) > 0; first += n)                                 \
        for (int64_t tile = begin; tile < end; tile++)

/* Add one panel's sums of a tile to y; the first panel starts from the bias. */
INLINE void store_tile(const Job *job, int64_t tile, int64_t first, const float *sums) {
    for (int64_t r = 0; r < ROWS && tile * ROWS + r < job->out_features; r++) {
        int64_t row = tile * ROWS + r;
        float before = first ? job->y[row] : job->bias ? job->bias[row] : 0.0f;
        job->y[row] = before + (job->scale ? job->scale[row] * sums[r] : sums[r]);
    }
}

/* ---------------------------------------------------------------------------------------------- portable C */

INLINE float weight_portable(int kind, const uint8_t *block, int i) {
    float value;
    uint16_t half;
    if (kind == INT8) return (float)(int8_t)block[i];
    if (kind == FP32) {
        memcpy(&value, block + 4 * i, sizeof value);
        return value;
    }
    memcpy(&half, block + 2 * i, sizeof half);
    return half_to_float(half);
}

INLINE void tiles_portable(const Job *job, int kind, int64_t begin, int64_t end) {
    FOR_TILES(kind) {
        const uint8_t *weight = tile_weight(job, first, n, tile);
        float sums[ROWS] = {0};
        for (int r = 0; r < ROWS; r++) {
            const float *x = job->x + first * BLOCK_INPUTS(kind);
            float lanes[16] = {0};
            for (int64_t b = 0; b < n; b++, x += BLOCK_INPUTS(kind))
                for (int i = 0; i < BLOCK_INPUTS(kind); i++)
                    lanes[i % 16] += weight_portable(kind, weight + (b * ROWS + r) * BLOCK_BYTES, i) * x[i];
            for (int l = 0; l < 16; l++) sums[r] += lanes[l];
        }
        store_tile(job, tile, first, sums);
    }
}

static void fp32_portable(const Job *job, int64_t begin, int64_t end) { tiles_portable(job, FP32, begin, end); }
static void fp16_portable(const Job *job, int64_t begin, int64_t end) { tiles_portable(job, FP16, begin, end); }
static void int8_portable(const Job *job, int64_t begin, int64_t end) { tiles_portable(job, INT8, begin, end); }

/* One path: LANES weights at a time are widened to a VECTOR of fp32 and multiplied with as much of x. */
#define TILES(NAME, KIND, TARGET, VECTOR, LANES, ZERO, WIDEN, LOAD, MULTIPLY_ADD, SUM)                               \
    TARGET static void NAME(const Job *job, int64_t begin, int64_t end) {                                           \
        FOR_TILES(KIND) {                                                                                           \
            const uint8_t *weight = tile_weight(job, first, n, tile);                                               \
            const float *x = job->x + first * BLOCK_INPUTS(KIND);                                                   \
            VECTOR sum[ROWS];                                                                                       \
            float sums[ROWS];                                                                                       \
            for (int r = 0; r < ROWS; r++) sum[r] = ZERO;                                                           \
            for (int64_t b = 0; b < n; b++, x += BLOCK_INPUTS(KIND)) {                                              \
                UNROLL                                                                                              \
                for (int r = 0; r < ROWS; r++, weight += BLOCK_BYTES) {                                             \
                    fetch_ahead(weight);                                                                            \
                    UNROLL                                                                                          \
                    for (int i = 0; i < BLOCK_INPUTS(KIND); i += LANES)                                             \
                        sum[r] = MULTIPLY_ADD(WIDEN(KIND, weight + i * WIDTH(KIND)), LOAD(x + i), sum[r]);          \
                }                                                                                                   \
            }                                                                                                       \
            for (int r = 0; r < ROWS; r++) sums[r] = SUM(sum[r]);                                                   \
            store_tile(job, tile, first, sums);                                                                     \
        }                                                                                                           \
    }

#if X86

/* ------------------------------------------------------------------------------------------------------ AVX2 */

AVX2 INLINE __m256 widen_avx2(int kind, const uint8_t *weight) {
    if (kind == FP32) return _mm256_loadu_ps((const float *)weight);
    if (kind == FP16) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)weight));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)weight)));
}

#define TILES_AVX2(NAME, KIND)                                                                                       \
    TILES(NAME, KIND, AVX2, __m256, 8, _mm256_setzero_ps(), widen_avx2, _mm256_loadu_ps, _mm256_fmadd_ps,            \
          sum_lanes_avx2)
TILES_AVX2(fp32_avx2, FP32)
TILES_AVX2(fp16_avx2, FP16)
TILES_AVX2(int8_avx2, INT8)

/* --------------------------------------------------------------------------------------------------- AVX-512 */

AVX512 INLINE __m512 widen_avx512(int kind, const uint8_t *weight) {
    if (kind == FP32) return _mm512_loadu_ps(weight);
    if (kind == FP16) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)weight));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)weight)));
}

#define TILES_AVX512(NAME, KIND)                                                                                     \
    TILES(NAME, KIND, AVX512, __m512, 16, _mm512_setzero_ps(), widen_avx512, _mm512_loadu_ps, _mm512_fmadd_ps,       \
          _mm512_reduce_add_ps)
TILES_AVX512(fp32_avx512, FP32)
TILES_AVX512(fp16_avx512, FP16)
TILES_AVX512(int8_avx512, INT8)

#endif /* X86 */

#if NEON

INLINE float32x4_t widen_neon(int kind, const uint8_t *weight) {
    if (kind == FP32) return vreinterpretq_f32_u8(vld1q_u8(weight));
    if (kind == FP16) return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(weight)));
    int32_t four;
    memcpy(&four, weight, sizeof four);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
}

INLINE float32x4_t multiply_add_neon(float32x4_t a, float32x4_t b, float32x4_t sum) { return vfmaq_f32(sum, a, b); }

#define TILES_NEON(NAME, KIND)                                                                                       \
    TILES(NAME, KIND, , float32x4_t, 4, vdupq_n_f32(0.0f), widen_neon, vld1q_f32, multiply_add_neon, vaddvq_f32)
TILES_NEON(fp32_neon, FP32)
TILES_NEON(fp16_neon, FP16)
TILES_NEON(int8_neon, INT8)

#endif /* NEON */

static Work work_of(int kind, int path) {
    if (kind == FP32) return CHOOSE(path, fp32_portable, fp32_avx2, fp32_avx512, fp32_avx512, fp32_neon);
    if (kind == FP16) return CHOOSE(path, fp16_portable, fp16_avx2, fp16_avx512, fp16_avx512, fp16_neon);
    return CHOOSE(path, int8_portable, int8_avx2, int8_avx512, int8_avx512, int8_neon);
}

/* y = W x + bias.
 *   x       fp32 [in_features]
 *   weight  packed as drawn above: fp32, fp16 or int8
 *   scale   fp32 [out_features], or NULL for 1
 *   bias    fp32 [out_features] or NULL
 *   y       fp32 [out_features], overwritten
 *   kind    0 fp32, 1 fp16, 2 int8
 *   path    0 portable, 1 AVX2, 2 and 3 AVX-512, 4 NEON; one that trapetum_runs()
 * Returns 0, or 1 when there is no memory for the padded x. */
int trapetum_dense_gemv(const float *x, const uint8_t *weight, const float *scale, const float *bias, float *y,
                        int64_t in_features, int64_t out_features, int kind, int path, int threads) {
    Job job = {weight, scale, bias, x, y, in_features, out_features};
    float *owned;
    job.x = whole_x(x, in_features, round_up(in_features, BLOCK_INPUTS(kind)), &owned);
    if (!job.x) return 1;
    in_parallel(&job, work_of(kind, path), count_tiles(&job), threads);
    free(owned);
    return 0;
}
