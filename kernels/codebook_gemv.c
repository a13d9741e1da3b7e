/* Batch-1 product of a codebook-quantized matrix with a vector on a CPU:
 *
 *     y[o] = bias[o] + sum_i codebook[o][code[o][i]] * x[i]        (fp32 in, fp32 out)
 *
 * Packed layout of 4-bit codes (made by trapetum/cpu.py). One 64-byte block holds 128 inputs of one row as sixteen
 * 32-bit lanes; nibble k of lane l is input 16 k + l, so that a shift by 4 k lines up sixteen consecutive inputs:
 *
 *     lane          l = 0                     l = 1               ...   l = 15
 *     byte          0      1      2      3    4      5      ...         63
 *     input     0,16   32,48  64,80 96,112    1,17  33,49   ...         111,127      (low nibble, high nibble)
 *
 *     group    4 rows x 128 inputs:  | row 0 block | row 1 block | row 2 block | row 3 block |            256 bytes
 *     tile     4 rows x one panel:   | group 0 | group 1 | ... | group n-1 |      n <= 32, so <= 4096 inputs
 *     panel    every tile of the matrix; the matrix is its panels one after the other
 *
 * A thread owns a run of tiles and reads one sequential stream in each panel; a panel's share of x stays in the first
 * level cache. Rows are padded to 4, inputs to 128. 8-bit codes are row-major bytes without padding.
 * Bytes moved per output row: in_features / 2 + 2 n_codes (4-bit), in_features + 2 n_codes (8-bit).
 *
 * Arithmetic of 4-bit codes, two kinds:
 *   int16  codebook (scale per row) and x (scale per 8 inputs) in 15-bit fixed point; 8 products are summed exactly in
 *          int32 (8 * 16383^2 < 2^31), sums of 8 in fp32. A non-finite x gives NaN.
 *   exact  fp32 throughout.
 * A row's sum is formed by one thread in one fixed order, so results do not depend on the number of threads.
 *
 * Every vector path is compiled by function attributes (no -march flag) and chosen by the caller out of supported().
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define X86 1
#include <cpuid.h>
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))
#define VNNI __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define VBMI __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")))
#else
#define X86 0
#endif

#define INLINE static inline __attribute__((always_inline))

enum { PORTABLE = 0, PATH_AVX2 = 1, PATH_AVX512BW = 2, PATH_AVX512VNNI = 3 };
enum { TO_FP32 = 0, TO_FP16 = 1, TO_BF16 = 2 };
enum { ROWS = 4, BLOCK = 128, BLOCK_BYTES = 64, GROUP_BYTES = ROWS * BLOCK_BYTES, PANEL = 32, UNIT = 16383 };

static const float TINY = 1e-30f; /* stands in for a peak of zero, so that no scale divides by it */

/* 128 inputs in fixed point. The order of q and the inputs that share a scale differ by path:
 * avx512 and portable: q[32 j + 2 l + s] is input 16 (j + 4 s) + l, scale[l]; avx2: see prepare_avx2. */
typedef struct {
    int16_t q[BLOCK];
    float scale[16];
} XBlock;

typedef struct {
    const uint8_t *codes;
    const uint16_t *codebook; /* fp16 [out_features][n_codes] */
    int64_t n_codes, in_features, out_features;
    const float *bias;    /* fp32 [out_features] or NULL */
    const float *x;       /* fp32, padded with zeros to whole blocks for 4-bit codes */
    const XBlock *blocks; /* the same in fixed point, int16 arithmetic only */
    void *y;
    int format; /* of y when dequantizing: TO_FP32, TO_FP16 or TO_BF16 */
} Job;

typedef void (*Work)(const Job *, int64_t begin, int64_t end);

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t count_blocks(const Job *job) { return (job->in_features + BLOCK - 1) / BLOCK; }
INLINE int64_t count_tiles(const Job *job) { return (job->out_features + ROWS - 1) / ROWS; }

/* Codes of one tile in the panel that starts at block `first`. */
INLINE const uint8_t *tile_codes(const Job *job, int64_t first, int64_t in_panel, int64_t tile) {
    return job->codes + (first * count_tiles(job) + tile * in_panel) * GROUP_BYTES;
}

/* The padding rows of the last tile read the last real row's codebook; their sums are dropped. */
INLINE const uint16_t *row_codebook(const Job *job, int64_t row) {
    return job->codebook + smaller(row, job->out_features - 1) * job->n_codes;
}

/* Add one panel's sums of a tile to y; the first panel starts from the bias. */
INLINE void store_tile(const Job *job, int64_t tile, int64_t first, const float *sums) {
    float *y = job->y;
    for (int64_t r = 0; r < ROWS && tile * ROWS + r < job->out_features; r++) {
        int64_t row = tile * ROWS + r;
        float before = first ? y[row] : job->bias ? job->bias[row] : 0.0f;
        y[row] = before + sums[r];
    }
}

/* Split `count` rows or tiles over the threads, one contiguous run each. */
static void in_parallel(const Job *job, Work work, int64_t count, int threads) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
            work(job, count * me / all, count * (me + 1) / all);
        }
        return;
    }
#endif
    (void)threads;
    work(job, 0, count);
}

/* ---------------------------------------------------------------------------------------------- portable C */

/* Without branches, so that loops over it vectorize, and without fp32 denormals, so that flushing them does no harm. */
INLINE float half_to_float(uint16_t half) {
    const float smallest_normal = 0x1p-14f;
    uint32_t exponent = half & 0x7c00, magnitude = (uint32_t)(half & 0x7fff) << 13, bits;
    uint32_t rebias = exponent == 0 ? 113u << 23 : exponent == 0x7c00 ? 224u << 23 : 112u << 23;
    float value;
    magnitude += rebias;
    memcpy(&value, &magnitude, sizeof value);
    value -= exponent == 0 ? smallest_normal : 0.0f;
    memcpy(&bits, &value, sizeof bits);
    bits |= (uint32_t)(half & 0x8000) << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static void row_table(const Job *job, int64_t row, float *table, int64_t size) {
    const uint16_t *codebook = row_codebook(job, row);
    for (int64_t i = 0; i < size; i++) table[i] = i < job->n_codes ? half_to_float(codebook[i]) : 0.0f;
}

/* A row's codebook in fixed point; returns the scale. */
static float row_table_int16(const Job *job, int64_t row, int16_t *table) {
    float values[16], peak = TINY;
    row_table(job, row, values, 16);
    for (int i = 0; i < 16; i++) peak = fmaxf(peak, fabsf(values[i]));
    for (int i = 0; i < 16; i++) table[i] = (int16_t)lrintf(values[i] * ((float)UNIT / peak));
    return peak / (float)UNIT;
}

static void prepare_portable(const float *x, XBlock *blocks, int64_t n) {
    for (int64_t b = 0; b < n; b++, x += BLOCK) {
        float inverse[16];
        for (int l = 0; l < 16; l++) {
            float peak = TINY, not_finite = 0.0f;
            for (int k = 0; k < 8; k++) peak = fmaxf(peak, fabsf(x[16 * k + l]));
            for (int k = 0; k < 8; k++) not_finite += x[16 * k + l] * 0.0f;
            inverse[l] = (float)UNIT / peak;
            blocks[b].scale[l] = peak / (float)UNIT + not_finite;
        }
        for (int k = 0; k < 8; k++)
            for (int l = 0; l < 16; l++) {
                float scaled = x[16 * k + l] * inverse[l];
                blocks[b].q[32 * (k % 4) + 2 * l + k / 4] = scaled == scaled ? (int16_t)lrintf(scaled) : 0;
            }
    }
}

static float row_int16_portable(const uint8_t *codes, const XBlock *x, int64_t n, const int16_t *table) {
    float lanes[16] = {0}, sum = 0.0f;
    for (int64_t b = 0; b < n; b++, codes += GROUP_BYTES)
        for (int l = 0; l < 16; l++) {
            int32_t dot = 0;
            for (int i = 0; i < 4; i++) {
                uint8_t byte = codes[4 * l + i]; /* nibbles k = 2 i and 2 i + 1 */
                const int16_t *q = x[b].q + 64 * (i % 2) + 2 * l + i / 2;
                dot += table[byte & 15] * q[0] + table[byte >> 4] * q[32];
            }
            lanes[l] += (float)dot * x[b].scale[l];
        }
    for (int l = 0; l < 16; l++) sum += lanes[l];
    return sum;
}

static float row_exact_portable(const uint8_t *codes, const float *x, int64_t n, const float *table) {
    float lanes[16] = {0}, sum = 0.0f;
    for (int64_t b = 0; b < n; b++, codes += GROUP_BYTES, x += BLOCK)
        for (int i = 0; i < 4; i++)
            for (int l = 0; l < 16; l++) {
                uint8_t byte = codes[4 * l + i];
                lanes[l] += table[byte & 15] * x[32 * i + l] + table[byte >> 4] * x[32 * i + 16 + l];
            }
    for (int l = 0; l < 16; l++) sum += lanes[l];
    return sum;
}

static void int16_portable(const Job *job, int64_t begin, int64_t end) {
    for (int64_t first = 0, all = count_blocks(job); first < all; first += PANEL) {
        int64_t n = smaller(PANEL, all - first);
        for (int64_t tile = begin; tile < end; tile++) {
            const uint8_t *codes = tile_codes(job, first, n, tile);
            float sums[ROWS];
            for (int r = 0; r < ROWS; r++) {
                int16_t table[16];
                float scale = row_table_int16(job, tile * ROWS + r, table);
                sums[r] = scale * row_int16_portable(codes + r * BLOCK_BYTES, job->blocks + first, n, table);
            }
            store_tile(job, tile, first, sums);
        }
    }
}

static void exact_portable(const Job *job, int64_t begin, int64_t end) {
    for (int64_t first = 0, all = count_blocks(job); first < all; first += PANEL) {
        int64_t n = smaller(PANEL, all - first);
        for (int64_t tile = begin; tile < end; tile++) {
            const uint8_t *codes = tile_codes(job, first, n, tile);
            float sums[ROWS], table[16];
            for (int r = 0; r < ROWS; r++) {
                row_table(job, tile * ROWS + r, table, 16);
                sums[r] = row_exact_portable(codes + r * BLOCK_BYTES, job->x + first * BLOCK, n, table);
            }
            store_tile(job, tile, first, sums);
        }
    }
}

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

/* A row's codebook as the bits to be written: fp32, or fp16 / bf16 (rounded to nearest even) in the low half. */
static void row_bits(const Job *job, int64_t row, uint32_t *table, int64_t size) {
    const uint16_t *codebook = row_codebook(job, row);
    for (int64_t i = 0; i < size; i++) {
        uint16_t half = i < job->n_codes ? codebook[i] : 0;
        float value = half_to_float(half);
        memcpy(&table[i], &value, sizeof value);
        if (job->format == TO_FP16) table[i] = half;
        if (job->format == TO_BF16) table[i] = (table[i] + 0x7fff + (table[i] >> 16 & 1)) >> 16;
    }
}

INLINE void put_bits(void *y, int64_t i, uint32_t bits, int wide) {
    if (wide)
        ((uint32_t *)y)[i] = bits;
    else
        ((uint16_t *)y)[i] = (uint16_t)bits;
}

INLINE void block_portable(const uint8_t *codes, const uint32_t *table, void *y, int wide) {
    for (int i = 0; i < 4; i++)
        for (int l = 0; l < 16; l++) {
            put_bits(y, 32 * i + l, table[codes[4 * l + i] & 15], wide);
            put_bits(y, 32 * i + 16 + l, table[codes[4 * l + i] >> 4], wide);
        }
}

/* Write a tile's rows; `block` is one path's way to write 128 values. The last block of a row may be cut. */
#define DEQUANTIZE(NAME, TARGET, block)                                                                              \
    TARGET static void NAME(const Job *job, int64_t begin, int64_t end) {                                           \
        const int wide = job->format == TO_FP32, size = wide ? 4 : 2;                                               \
        for (int64_t first = 0, all = count_blocks(job); first < all; first += PANEL) {                             \
            int64_t n = smaller(PANEL, all - first);                                                                \
            for (int64_t row = begin * ROWS; row < smaller(end * ROWS, job->out_features); row++) {                 \
                const uint8_t *codes = tile_codes(job, first, n, row / ROWS) + row % ROWS * BLOCK_BYTES;            \
                char *y = (char *)job->y + row * job->in_features * size;                                           \
                uint32_t table[16];                                                                                 \
                row_bits(job, row, table, 16);                                                                      \
                for (int64_t b = first; b < first + n; b++, codes += GROUP_BYTES) {                                 \
                    int64_t left = job->in_features - b * BLOCK;                                                    \
                    uint32_t cut[BLOCK];                                                                            \
                    void *target = left < BLOCK ? (void *)cut : (void *)(y + b * BLOCK * size);                     \
                    if (wide)                                                                                       \
                        block(codes, table, target, 1);                                                             \
                    else                                                                                            \
                        block(codes, table, target, 0);                                                             \
                    if (left < BLOCK) memcpy(y + b * BLOCK * size, cut, (size_t)(left * size));                     \
                }                                                                                                   \
            }                                                                                                       \
        }                                                                                                           \
    }

DEQUANTIZE(dequantize_portable, , block_portable)

static void dequantize_bytes(const Job *job, int64_t begin, int64_t end) {
    uint32_t table[256];
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *codes = job->codes + row * job->in_features;
        row_bits(job, row, table, 256);
        if (job->format == TO_FP32) {
            uint32_t *y = (uint32_t *)job->y + row * job->in_features;
            for (int64_t i = 0; i < job->in_features; i++) y[i] = table[codes[i]];
        } else {
            uint16_t *y = (uint16_t *)job->y + row * job->in_features;
            for (int64_t i = 0; i < job->in_features; i++) y[i] = (uint16_t)table[codes[i]];
        }
    }
}

#if X86

/* ------------------------------------------------------------------------------------------------------ AVX2 */

/* The hardware prefetcher alone leaves a core that computes between its loads waiting for memory: ask for codes early,
 * far ahead into the outer caches and a little ahead into the first. Addresses past the end do no harm. */
INLINE void fetch_ahead(const uint8_t *codes) {
    __builtin_prefetch(codes + 16384, 0, 1);
    __builtin_prefetch(codes + 2048, 0, 3);
}

/* Where q[e] of an AVX2 block comes from. Unpacking bytes inside 128-bit halves visits lanes in this order: half h of
 * the block, vector v (0, 1: even nibbles of lanes 0-1 and 2-3 of each quarter; 2, 3: odd nibbles), word w. Words
 * 2 p and 2 p + 1 of the four vectors fall into one int32 sum, so those 8 inputs share scale[8 h + p]. */
INLINE int avx2_input(int h, int v, int w) {
    int lane = 8 * h + 4 * (w / 8) + 2 * (v % 2) + w % 8 / 4;
    int nibble = 2 * (w % 4) + v / 2;
    return 16 * nibble + lane;
}

AVX2 static void prepare_avx2(const float *x, XBlock *blocks, int64_t n) {
    const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)), unit = _mm256_set1_ps(UNIT);
    uint8_t order[BLOCK];
    for (int e = 0; e < BLOCK; e++) order[e] = (uint8_t)avx2_input(e / 64, e / 16 % 4, e % 16);
    for (int64_t b = 0; b < n; b++, x += BLOCK) {
        float permuted[BLOCK];
        for (int e = 0; e < BLOCK; e++) permuted[e] = x[order[e]];
        for (int h = 0; h < 2; h++) {
            __m256 peak[2], scale[2], inverse[2];
            for (int s = 0; s < 2; s++) {
                __m256 not_finite = _mm256_setzero_ps();
                peak[s] = _mm256_set1_ps(TINY);
                for (int v = 0; v < 4; v++) {
                    __m256 values = _mm256_loadu_ps(permuted + 64 * h + 16 * v + 8 * s);
                    peak[s] = _mm256_max_ps(peak[s], _mm256_and_ps(values, no_sign));
                    not_finite = _mm256_fmadd_ps(values, _mm256_setzero_ps(), not_finite);
                }
                peak[s] = _mm256_max_ps(peak[s], _mm256_permute_ps(peak[s], 0xb1));
                not_finite = _mm256_add_ps(not_finite, _mm256_permute_ps(not_finite, 0xb1));
                scale[s] = _mm256_add_ps(_mm256_div_ps(peak[s], unit), not_finite);
                inverse[s] = _mm256_div_ps(unit, peak[s]);
            }
            for (int v = 0; v < 4; v++) {
                const float *from = permuted + 64 * h + 16 * v;
                __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from), inverse[0]));
                __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + 8), inverse[1]));
                __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
                _mm256_storeu_si256((__m256i *)(blocks[b].q + 64 * h + 16 * v), words);
            }
            __m256 evens = _mm256_shuffle_ps(scale[0], scale[1], 0x88);
            evens = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(evens), 0xd8));
            _mm256_storeu_ps(blocks[b].scale + 8 * h, evens);
        }
    }
}

AVX2 INLINE float sum_lanes_avx2(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* Sixteen fp16 codes of a row as fp32, zeros beyond n_codes. */
AVX2 INLINE void row_table_avx2(const Job *job, int64_t row, __m256 table[2]) {
    uint16_t padded[16] = {0};
    const uint16_t *codebook = row_codebook(job, row);
    if (job->n_codes < 16) {
        memcpy(padded, codebook, (size_t)job->n_codes * 2);
        codebook = padded;
    }
    table[0] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)codebook));
    table[1] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(codebook + 8)));
}

/* A row's codebook in fixed point, split into low and high bytes for pshufb; returns the scale. */
AVX2 INLINE float row_bytes_avx2(const Job *job, int64_t row, __m256i *low, __m256i *high) {
    const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    const __m128i even_bytes = _mm_set1_epi16(0x00ff);
    __m256 table[2], peaks;
    row_table_avx2(job, row, table);
    peaks = _mm256_max_ps(_mm256_and_ps(table[0], no_sign), _mm256_and_ps(table[1], no_sign));
    __m128 p = _mm_max_ps(_mm256_castps256_ps128(peaks), _mm256_extractf128_ps(peaks, 1));
    p = _mm_max_ps(p, _mm_movehl_ps(p, p));
    float peak = _mm_cvtss_f32(_mm_max_ss(_mm_max_ss(p, _mm_movehdup_ps(p)), _mm_set_ss(TINY)));
    __m256 inverse = _mm256_set1_ps((float)UNIT / peak);
    __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(table[0], inverse));
    __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(table[1], inverse));
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    __m128i w0 = _mm256_castsi256_si128(words), w1 = _mm256_extracti128_si256(words, 1);
    __m128i bytes = _mm_packus_epi16(_mm_and_si128(w0, even_bytes), _mm_and_si128(w1, even_bytes));
    *low = _mm256_broadcastsi128_si256(bytes);
    *high = _mm256_broadcastsi128_si256(_mm_packs_epi16(_mm_srai_epi16(w0, 8), _mm_srai_epi16(w1, 8)));
    return peak / (float)UNIT;
}

/* Sums of 8 products of 64 inputs (half a block) in int32. */
AVX2 INLINE __m256i half_block_avx2(__m256i codes, const __m256i *q, __m256i low, __m256i high) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i even = _mm256_and_si256(codes, nibble);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble);
    __m256i el = _mm256_shuffle_epi8(low, even), eh = _mm256_shuffle_epi8(high, even);
    __m256i ol = _mm256_shuffle_epi8(low, odd), oh = _mm256_shuffle_epi8(high, odd);
    __m256i s0 = _mm256_madd_epi16(_mm256_unpacklo_epi8(el, eh), _mm256_loadu_si256(q));
    __m256i s1 = _mm256_madd_epi16(_mm256_unpackhi_epi8(el, eh), _mm256_loadu_si256(q + 1));
    __m256i s2 = _mm256_madd_epi16(_mm256_unpacklo_epi8(ol, oh), _mm256_loadu_si256(q + 2));
    __m256i s3 = _mm256_madd_epi16(_mm256_unpackhi_epi8(ol, oh), _mm256_loadu_si256(q + 3));
    return _mm256_add_epi32(_mm256_add_epi32(s0, s1), _mm256_add_epi32(s2, s3));
}

AVX2 static void int16_avx2(const Job *job, int64_t begin, int64_t end) {
    for (int64_t first = 0, all = count_blocks(job); first < all; first += PANEL) {
        int64_t n = smaller(PANEL, all - first);
        for (int64_t tile = begin; tile < end; tile++) {
            const uint8_t *codes = tile_codes(job, first, n, tile);
            __m256i low[ROWS], high[ROWS];
            __m256 sum[ROWS];
            float sums[ROWS];
            for (int r = 0; r < ROWS; r++) {
                sums[r] = row_bytes_avx2(job, tile * ROWS + r, &low[r], &high[r]);
                sum[r] = _mm256_setzero_ps();
            }
            for (const XBlock *x = job->blocks + first; x < job->blocks + first + n; x++)
                for (int r = 0; r < ROWS; r++, codes += BLOCK_BYTES) {
                    fetch_ahead(codes);
                    for (int h = 0; h < 2; h++) {
                        __m256i c = _mm256_loadu_si256((const __m256i *)codes + h);
                        __m256i dot = half_block_avx2(c, (const __m256i *)(x->q + 64 * h), low[r], high[r]);
                        sum[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_loadu_ps(x->scale + 8 * h), sum[r]);
                    }
                }
            for (int r = 0; r < ROWS; r++) sums[r] *= sum_lanes_avx2(sum[r]);
            store_tile(job, tile, first, sums);
        }
    }
}

/* Entry `index & 15` of a 16-entry table, 8 at a time; bits above 3 are ignored. */
AVX2 INLINE __m256 lookup_avx2(const __m256 table[2], __m256i index) {
    __m256 lower = _mm256_permutevar8x32_ps(table[0], index), upper = _mm256_permutevar8x32_ps(table[1], index);
    return _mm256_blendv_ps(lower, upper, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

AVX2 static void exact_avx2(const Job *job, int64_t begin, int64_t end) {
    for (int64_t first = 0, all = count_blocks(job); first < all; first += PANEL) {
        int64_t n = smaller(PANEL, all - first);
        for (int64_t tile = begin; tile < end; tile++) {
            const uint8_t *codes = tile_codes(job, first, n, tile);
            const float *x = job->x + first * BLOCK;
            __m256 table[ROWS][2], sum[ROWS];
            float sums[ROWS];
            for (int r = 0; r < ROWS; r++) {
                row_table_avx2(job, tile * ROWS + r, table[r]);
                sum[r] = _mm256_setzero_ps();
            }
            for (int64_t b = 0; b < n; b++, x += BLOCK)
                for (int r = 0; r < ROWS; r++, codes += BLOCK_BYTES) {
                    fetch_ahead(codes);
                    for (int h = 0; h < 2; h++) {
                        __m256i c = _mm256_loadu_si256((const __m256i *)codes + h);
                        for (int k = 0; k < 8; k++) {
                            __m256 w = lookup_avx2(table[r], _mm256_srli_epi32(c, 4 * k));
                            sum[r] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + 16 * k + 8 * h), sum[r]);
                        }
                    }
                }
            for (int r = 0; r < ROWS; r++) sums[r] = sum_lanes_avx2(sum[r]);
            store_tile(job, tile, first, sums);
        }
    }
}

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

AVX2 INLINE void block_avx2(const uint8_t *codes, const uint32_t *bits, void *y, int wide) {
    __m256 table[2] = {_mm256_loadu_ps((const float *)bits), _mm256_loadu_ps((const float *)bits + 8)};
    __m256i half[2] = {_mm256_loadu_si256((const __m256i *)codes), _mm256_loadu_si256((const __m256i *)codes + 1)};
    for (int k = 0; k < 8; k++) {
        __m256i a = _mm256_castps_si256(lookup_avx2(table, _mm256_srli_epi32(half[0], 4 * k)));
        __m256i b = _mm256_castps_si256(lookup_avx2(table, _mm256_srli_epi32(half[1], 4 * k)));
        if (wide) {
            _mm256_storeu_si256((__m256i *)y + 2 * k, a);
            _mm256_storeu_si256((__m256i *)y + 2 * k + 1, b);
        } else {
            __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
            _mm256_storeu_si256((__m256i *)y + k, words);
        }
    }
}

DEQUANTIZE(dequantize_avx2, AVX2, block_avx2)

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

/* --------------------------------------------------------------------------------------------------- AVX-512 */

AVX512 static void prepare_avx512(const float *x, XBlock *blocks, int64_t n) {
    const __m512 unit = _mm512_set1_ps(UNIT);
    for (int64_t b = 0; b < n; b++, x += BLOCK) {
        __m512 peak = _mm512_set1_ps(TINY), not_finite = _mm512_setzero_ps();
        for (int k = 0; k < 8; k++) {
            __m512 values = _mm512_loadu_ps(x + 16 * k);
            peak = _mm512_max_ps(peak, _mm512_abs_ps(values));
            not_finite = _mm512_fmadd_ps(values, _mm512_setzero_ps(), not_finite);
        }
        __m512 inverse = _mm512_div_ps(unit, peak);
        _mm512_storeu_ps(blocks[b].scale, _mm512_add_ps(_mm512_div_ps(peak, unit), not_finite));
        for (int j = 0; j < 4; j++) {
            __m512i even = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * j), inverse));
            __m512i odd = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * j + 64), inverse));
            __m512i pairs = _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_slli_epi32(odd, 16));
            _mm512_storeu_si512(blocks[b].q + 32 * j, pairs);
        }
    }
}

/* The sums of four vectors as the four floats of one. */
AVX512 INLINE __m128 sum_rows_avx512(const __m512 v[ROWS]) {
    __m256 h[ROWS];
    for (int r = 0; r < ROWS; r++) h[r] = _mm256_add_ps(_mm512_castps512_ps256(v[r]), _mm512_extractf32x8_ps(v[r], 1));
    __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(h[0], h[1]), _mm256_hadd_ps(h[2], h[3]));
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

AVX512 INLINE __m512 row_table_avx512(const Job *job, int64_t row) {
    __mmask16 valid = (__mmask16)((1u << job->n_codes) - 1);
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(valid, row_codebook(job, row)));
}

/* A row's codebook in fixed point, twice over 32 words, so that vpermw may ignore bit 4; returns the scale. */
AVX512 INLINE float row_words_avx512(const Job *job, int64_t row, __m512i *words) {
    __m512 table = row_table_avx512(job, row);
    float peak = _mm512_reduce_max_ps(_mm512_abs_ps(table));
    peak = peak > TINY ? peak : TINY;
    __m512i fixed = _mm512_cvtps_epi32(_mm512_mul_ps(table, _mm512_set1_ps((float)UNIT / peak)));
    *words = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(fixed));
    return peak / (float)UNIT;
}

#define INT16_AVX512(NAME, TARGET, MULTIPLY_ADD)                                                                     \
    TARGET static void NAME(const Job *job, int64_t begin, int64_t end) {                                           \
        for (int64_t first = 0, all = count_blocks(job); first < all; first += PANEL) {                             \
            int64_t n = smaller(PANEL, all - first);                                                                \
            for (int64_t tile = begin; tile < end; tile++) {                                                        \
                const uint8_t *codes = tile_codes(job, first, n, tile);                                             \
                __m512i table[ROWS];                                                                                \
                __m512 sum[ROWS];                                                                                   \
                float sums[ROWS];                                                                                   \
                for (int r = 0; r < ROWS; r++) {                                                                    \
                    sums[r] = row_words_avx512(job, tile * ROWS + r, &table[r]);                                    \
                    sum[r] = _mm512_setzero_ps();                                                                   \
                }                                                                                                   \
                for (const XBlock *x = job->blocks + first; x < job->blocks + first + n; x++) {                     \
                    __m512 scale = _mm512_loadu_ps(x->scale);                                                       \
                    for (int r = 0; r < ROWS; r++, codes += BLOCK_BYTES) {                                          \
                        fetch_ahead(codes);                                                                         \
                        __m512i c = _mm512_loadu_si512(codes), dot = _mm512_setzero_si512();                        \
                        for (int j = 0; j < 4; j++) {                                                               \
                            __m512i w = _mm512_permutexvar_epi16(_mm512_srli_epi16(c, 4 * j), table[r]);            \
                            dot = MULTIPLY_ADD(dot, w, _mm512_loadu_si512(x->q + 32 * j));                          \
                        }                                                                                           \
                        sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, sum[r]);                           \
                    }                                                                                               \
                }                                                                                                   \
                _mm_storeu_ps(sums, _mm_mul_ps(_mm_loadu_ps(sums), sum_rows_avx512(sum)));                          \
                store_tile(job, tile, first, sums);                                                                 \
            }                                                                                                       \
        }                                                                                                           \
    }

#define MADD_THEN_ADD(sum, a, b) _mm512_add_epi32(sum, _mm512_madd_epi16(a, b))
INT16_AVX512(int16_avx512bw, AVX512, MADD_THEN_ADD)
INT16_AVX512(int16_avx512vnni, VNNI, _mm512_dpwssd_epi32)

AVX512 static void exact_avx512(const Job *job, int64_t begin, int64_t end) {
    for (int64_t first = 0, all = count_blocks(job); first < all; first += PANEL) {
        int64_t n = smaller(PANEL, all - first);
        for (int64_t tile = begin; tile < end; tile++) {
            const uint8_t *codes = tile_codes(job, first, n, tile);
            const float *x = job->x + first * BLOCK;
            __m512 table[ROWS], sum[ROWS];
            float sums[ROWS];
            for (int r = 0; r < ROWS; r++) {
                table[r] = row_table_avx512(job, tile * ROWS + r);
                sum[r] = _mm512_setzero_ps();
            }
            for (int64_t b = 0; b < n; b++, x += BLOCK)
                for (int r = 0; r < ROWS; r++, codes += BLOCK_BYTES) {
                    fetch_ahead(codes);
                    __m512i c = _mm512_loadu_si512(codes);
                    for (int k = 0; k < 8; k++) {
                        __m512 w = _mm512_permutexvar_ps(_mm512_srli_epi32(c, 4 * k), table[r]);
                        sum[r] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x + 16 * k), sum[r]);
                    }
                }
            _mm_storeu_ps(sums, sum_rows_avx512(sum));
            store_tile(job, tile, first, sums);
        }
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

AVX512 INLINE void block_avx512(const uint8_t *codes, const uint32_t *bits, void *y, int wide) {
    __m512i table = _mm512_loadu_si512(bits), c = _mm512_loadu_si512(codes);
    for (int k = 0; k < 8; k++) {
        __m512i w = _mm512_permutexvar_epi32(_mm512_srli_epi32(c, 4 * k), table);
        if (wide)
            _mm512_storeu_si512((char *)y + 64 * k, w);
        else
            _mm256_storeu_si256((__m256i *)y + k, _mm512_cvtepi32_epi16(w));
    }
}

DEQUANTIZE(dequantize_avx512, AVX512, block_avx512)

AVX512 static uint64_t sum_avx512(const uint64_t *data, int64_t n) {
    __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (; n >= 32; n -= 32, data += 32)
        for (int s = 0; s < 4; s++) sum[s] = _mm512_add_epi64(sum[s], _mm512_loadu_si512(data + 8 * s));
    sum[0] = _mm512_add_epi64(_mm512_add_epi64(sum[0], sum[1]), _mm512_add_epi64(sum[2], sum[3]));
    return (uint64_t)_mm512_reduce_add_epi64(sum[0]) + sum_portable(data, n);
}

/* ------------------------------------------------------- 8-bit codes on AVX-512 VBMI (used by the VNNI path) */

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

/* Write 64 values: 16-bit entries as they are, or fp16 entries as fp32. */
VBMI INLINE void store_64(const __m512i entries[2], void *y, int wide) {
    for (int s = 0; s < 2; s++) {
        if (wide) {
            _mm512_storeu_ps((float *)y + 32 * s, _mm512_cvtph_ps(_mm512_castsi512_si256(entries[s])));
            _mm512_storeu_ps((float *)y + 32 * s + 16, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(entries[s], 1)));
        } else {
            _mm512_storeu_si512((uint16_t *)y + 32 * s, entries[s]);
        }
    }
}

VBMI static void dequantize_bytes_vbmi(const Job *job, int64_t begin, int64_t end) {
    const int wide = job->format == TO_FP32, size = wide ? 4 : 2;
    Job halves = *job;
    halves.format = job->format == TO_BF16 ? TO_BF16 : TO_FP16;
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *codes = job->codes + row * job->in_features;
        char *y = (char *)job->y + row * job->in_features * size;
        uint32_t bits[256], cut[64];
        uint16_t table[256];
        row_bits(&halves, row, bits, 256);
        for (int i = 0; i < 256; i++) table[i] = (uint16_t)bits[i];
        ByteTables t = byte_tables(table);
        for (int64_t i = 0; i < job->in_features; i += 64) {
            int64_t left = smaller(64, job->in_features - i);
            __m512i entries[2], c = _mm512_maskz_loadu_epi8(left < 64 ? (1ull << left) - 1 : ~0ull, codes + i);
            lookup_entries(&t, c, 1, entries);
            store_64(entries, left < 64 ? (void *)cut : (void *)(y + i * size), wide);
            if (left < 64) memcpy(y + i * size, cut, (size_t)(left * size));
        }
    }
}

static uint64_t enabled_states(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

/* Whether the processor has VBMI as well; asked once, because the instruction that tells is slow under a hypervisor. */
static int has_vbmi(void) {
    static int known = -1;
    uint32_t a, b, c, d;
    if (known < 0) known = __get_cpuid_count(7, 0, &a, &b, &c, &d) && c & bit_AVX512VBMI;
    return known;
}

#endif /* X86 */

/* ----------------------------------------------------------------------------------------------- entry points */

/* The fastest path this processor and operating system can run: every path up to it works too. */
int trapetum_supported(void) {
#if X86
    const uint32_t needs_avx = bit_FMA | bit_OSXSAVE | bit_AVX | bit_F16C;
    const uint32_t needs_avx512 = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & needs_avx) != needs_avx) return PORTABLE;
    uint64_t states = enabled_states();
    if ((states & 0x06) != 0x06 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) return PORTABLE;
    if ((states & 0xe6) != 0xe6 || (b & needs_avx512) != needs_avx512) return PATH_AVX2;
    return c & bit_AVX512VNNI ? PATH_AVX512VNNI : PATH_AVX512BW;
#else
    return PORTABLE;
#endif
}

/* 1 when the library was built with OpenMP, else it runs on one thread. */
int trapetum_has_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* The entry of `table` for a path; without x86 there is only the portable one. */
#if X86
#define CHOOSE(path, portable, avx2, avx512bw, avx512vnni)                                                           \
    ((path) == PORTABLE        ? (portable)                                                                          \
     : (path) == PATH_AVX2     ? (avx2)                                                                              \
     : (path) == PATH_AVX512BW ? (avx512bw)                                                                          \
                               : (avx512vnni))
#else
#define CHOOSE(path, portable, avx2, avx512bw, avx512vnni) ((void)(path), (portable))
#endif

static void *aligned(size_t bytes) {
    void *memory = NULL;
    return posix_memalign(&memory, 64, bytes) ? NULL : memory;
}

/* y = W x + bias with 4-bit codes in the packed layout.
 *   x         fp32 [in_features]
 *   codes     uint8, packed
 *   codebook  fp16 [out_features][n_codes], n_codes <= 16
 *   bias      fp32 [out_features] or NULL
 *   y         fp32 [out_features], overwritten
 *   path      0 portable, 1 AVX2, 2 AVX-512BW, 3 AVX-512 VNNI; at most trapetum_supported()
 *   exact     0 int16 arithmetic, 1 fp32
 * Returns 0, or 1 when there is no memory for the prepared x. */
int trapetum_gemv4(const float *x, const uint8_t *codes, const uint16_t *codebook, int64_t n_codes, const float *bias,
                   float *y, int64_t in_features, int64_t out_features, int path, int exact, int threads) {
    Job job = {codes, codebook, n_codes, in_features, out_features, bias, x, NULL, y, TO_FP32};
    int64_t blocks = count_blocks(&job), padded = blocks * BLOCK;
    float *whole = NULL;
    XBlock *fixed = NULL;
    if (in_features != padded) {
        if (!(whole = aligned((size_t)padded * sizeof(float)))) return 1;
        memcpy(whole, x, (size_t)in_features * sizeof(float));
        memset(whole + in_features, 0, (size_t)(padded - in_features) * sizeof(float));
        job.x = whole;
    }
    if (!exact) {
        if (!(fixed = aligned((size_t)blocks * sizeof(XBlock)))) {
            free(whole);
            return 1;
        }
        CHOOSE(path, prepare_portable, prepare_avx2, prepare_avx512, prepare_avx512)(job.x, fixed, blocks);
        job.blocks = fixed;
    }
    Work work = exact ? CHOOSE(path, exact_portable, exact_avx2, exact_avx512, exact_avx512)
                      : CHOOSE(path, int16_portable, int16_avx2, int16_avx512bw, int16_avx512vnni);
    in_parallel(&job, work, count_tiles(&job), threads);
    free(fixed);
    free(whole);
    return 0;
}

/* y = W x + bias with 8-bit codes, row-major [out_features][in_features]; n_codes <= 256, the rest as above. */
int trapetum_gemv8(const float *x, const uint8_t *codes, const uint16_t *codebook, int64_t n_codes, const float *bias,
                   float *y, int64_t in_features, int64_t out_features, int path, int threads) {
    Job job = {codes, codebook, n_codes, in_features, out_features, bias, x, NULL, y, TO_FP32};
    Work work = CHOOSE(path, bytes_portable, bytes_avx2, bytes_avx512, bytes_avx512);
#if X86
    if (path == PATH_AVX512VNNI && has_vbmi()) work = bytes_vbmi;
#endif
    in_parallel(&job, work, out_features, threads);
    return 0;
}

/* y = W, row-major [out_features][in_features] in fp32 (format 0), fp16 (1) or bf16 (2); bits is 4 or 8. */
int trapetum_dequantize(const uint8_t *codes, const uint16_t *codebook, int64_t n_codes, void *y, int format, int bits,
                        int64_t in_features, int64_t out_features, int path, int threads) {
    Job job = {codes, codebook, n_codes, in_features, out_features, NULL, NULL, NULL, y, format};
    Work nibbles = CHOOSE(path, dequantize_portable, dequantize_avx2, dequantize_avx512, dequantize_avx512);
    Work bytes = dequantize_bytes;
#if X86
    if (path == PATH_AVX512VNNI && has_vbmi()) bytes = dequantize_bytes_vbmi;
#endif
    in_parallel(&job, bits == 8 ? bytes : nibbles, bits == 8 ? out_features : count_tiles(&job), threads);
    return 0;
}

/* Sum n 64-bit words, each thread one contiguous run: what reading costs when nothing else is done. */
uint64_t trapetum_read(const uint64_t *data, int64_t n, int path, int threads) {
    uint64_t (*sum)(const uint64_t *, int64_t) = CHOOSE(path, sum_portable, sum_avx2, sum_avx512, sum_avx512);
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
