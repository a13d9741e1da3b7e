/* The packed layout of 4-, 3- and 2-bit codes and how a job walks through it; codebook_gemv.c draws it. */

enum { TO_FP32 = 0, TO_FP16 = 1, TO_BF16 = 2 };
enum { INT16 = 0, EXACT = 1, INT8 = 2 };
enum { ROWS = 4, STEP = 128, PANEL_INPUTS = 4096 };

static const float TINY = 1e-30f; /* stands in for a peak of zero, so that no scale divides by it */

/* 128 inputs in 15-bit fixed point. Which input q[e] is, and which 8 share a scale, differs by path: see codebook_x.h. */
typedef struct {
    int16_t q[STEP];
    float scale[16];
} X16;

/* 128 inputs in int8: q[64 a + 4 l + i], scale[l] and start[l] belong to 32-bit lane l. */
typedef struct {
    int8_t q[STEP];
    int32_t start[16]; /* -128 times the lane's sum of q: takes back the 128 that unsigned codebooks are raised by */
    float scale[16];
} X8;

struct Job {
    const uint8_t *codes;
    const uint16_t *codebook; /* fp16 [out_features][n_codes] */
    int64_t n_codes, in_features, out_features;
    const float *bias; /* fp32 [out_features] or NULL */
    const float *x;    /* fp32, padded with zeros to whole blocks below 8 bits */
    const X16 *x16;    /* the same in fixed point, int16 arithmetic only */
    const X8 *x8;      /* int8 arithmetic only */
    void *y;
    int format; /* of y when dequantizing: TO_FP32, TO_FP16 or TO_BF16 */
};

/* Of one row's block: bytes, inputs, 64-byte registers, steps of 128 inputs, codes that start in one byte column. */
#define BLOCK_INPUTS(BITS) ((BITS) == 4 ? 128 : (BITS) == 2 ? 256 : 512)
#define REGISTERS(BITS) ((BITS) == 3 ? 3 : 1)
#define BLOCK_BYTES(BITS) (64 * REGISTERS(BITS))
#define STEPS(BITS) (BLOCK_INPUTS(BITS) / STEP)
#define COLUMN(BITS) (2 * STEPS(BITS))

/* The t-th code of a byte column: which of the block's registers holds it, the fourth at 3 bits being the joined top
 * bits of the three, and at which bit of the byte. */
#define CODE_REGISTER(BITS, t) ((BITS) == 3 ? (t) / 2 : 0)
#define CODE_SHIFT(BITS, t) ((BITS) != 3 ? (BITS) * (t) : 3 * ((t) % 2) + ((t) < 6 ? 0 : 2))

/* First of the 16 inputs (lanes 0..15) whose code is the t-th of byte i of a lane. */
#define INPUT_OF(BITS, i, t)                                                                                        \
    (128 * ((COLUMN(BITS) * ((i) % 2) + (t)) / 4) + 16 * ((COLUMN(BITS) * ((i) % 2) + (t)) % 4 + 4 * ((i) / 2)))

INLINE int64_t count_blocks(const Job *job, int bits) {
    return (job->in_features + BLOCK_INPUTS(bits) - 1) / BLOCK_INPUTS(bits);
}
INLINE int64_t count_tiles(const Job *job) { return (job->out_features + ROWS - 1) / ROWS; }

/* Blocks of the panel that starts at block `first`; 0 behind the last panel. */
INLINE int64_t panel_blocks(const Job *job, int bits, int64_t first) {
    return smaller(PANEL_INPUTS / BLOCK_INPUTS(bits), count_blocks(job, bits) - first);
}

/* Codes of one tile in the panel of n blocks that starts at block `first`. */
INLINE const uint8_t *tile_codes(const Job *job, int bits, int64_t first, int64_t n, int64_t tile) {
    return job->codes + (first * count_tiles(job) + tile * n) * ROWS * BLOCK_BYTES(bits);
}

/* Every panel of every tile: `first` is the panel's first block, n its blocks. */
#define FOR_TILES(BITS)                                                                                              \
    for (int64_t first = 0, n; (n = panel_blocks(job, BITS, first)) > 0; first += n)                                 \
        for (int64_t tile = begin; tile < end; tile++)

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

/* A row's codebook as fp32, zeros beyond n_codes. */
static void row_table(const Job *job, int64_t row, float *table, int64_t size) {
    const uint16_t *codebook = row_codebook(job, row);
    for (int64_t i = 0; i < size; i++) table[i] = i < job->n_codes ? half_to_float(codebook[i]) : 0.0f;
}

/* A row's codebook in fixed point of the given unit, the same 2^bits entries over and over; returns the scale. */
static float row_table_fixed(const Job *job, int64_t row, int bits, float unit, int16_t table[16]) {
    float values[16], peak = TINY;
    row_table(job, row, values, 16);
    for (int i = 0; i < 16; i++) peak = fmaxf(peak, fabsf(values[i]));
    for (int i = 0; i < 16; i++) table[i] = (int16_t)lrintf(values[i & ((1 << bits) - 1)] * (unit / peak));
    return peak / unit;
}

/* The t-th code of byte column `byte` (0..63) of a block. */
INLINE int column_code(int bits, const uint8_t *block, int byte, int t) {
    int column = block[byte];
    if (bits == 3 && t < 6) column = block[64 * (t / 2) + byte];
    if (bits == 3 && t >= 6) column = (block[byte] & 192) | (block[64 + byte] & 192) >> 2 | (block[128 + byte] & 192) >> 4;
    return column >> CODE_SHIFT(bits, t) & ((1 << bits) - 1);
}
