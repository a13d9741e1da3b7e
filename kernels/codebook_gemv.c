/* Batch-1 product of a codebook-quantized matrix with a vector on a CPU:
 *
 *     y[o] = bias[o] + sum_i codebook[o][code[o][i]] * x[i]        (fp32 in, fp32 out)
 *
 * Packed layout of codes below 8 bits (made by trapetum/cpu_layout.py). A block holds one row's codes of some inputs:
 *
 *     bits   bytes                     inputs   codes in one of the 64 byte columns, from the low bits
 *     4      64                        128      c0 c1
 *     2      64                        256      c0 c1 c2 c3
 *     3      192 (A, B, C of 64)       512      A: c0 c1 and 2 bits;  B: c2 c3 and 2 bits;  C: c4 c5 and 2 bits; the
 *                                               6 bits, C's lowest and A's highest, are c6 c7
 *
 * Byte column 4 l + i is byte i of 32-bit lane l (0..15). With m codes a column, its code t is number j = m (i % 2) + t
 * of a 16-bit word and is input 128 (j / 4) + 16 (j % 4 + 4 (i / 2)) + l, so that one shift of the whole block lines up
 * the codes of 16 consecutive inputs in 32-bit lanes, of 32 inputs in 16-bit words and of 64 in bytes. At 4 bits:
 *
 *     lane          l = 0                     l = 1               ...   l = 15
 *     byte          0      1      2      3    4      5      ...         63
 *     input     0,16   32,48  64,80 96,112    1,17  33,49   ...         111,127      (low nibble, high nibble)
 *
 *     group    4 rows x one block:   | row 0 block | row 1 block | row 2 block | row 3 block |
 *     tile     4 rows x one panel:   | group 0 | group 1 | ... | group n-1 |      <= 4096 inputs
 *     panel    every tile of the matrix; the matrix is its panels one after the other
 *
 * A thread owns a run of tiles and reads one sequential stream in each panel; a panel's share of x stays in the first
 * level cache. Rows are padded to 4, inputs to whole blocks. 3 bits: five codes in a 15-bit word would leave every 16th
 * bit unused, a 2-bit plane beside a 1-bit plane needs two shifts and a merge for every lookup; here every
 * lookup costs what it does at 4 bits after four instructions a block, codes stay inside bytes (pshufb and vqtbl look up
 * bytes) and no bit is unused. 8-bit codes are row-major bytes without padding.
 * Bytes moved per output row: in_features * bits / 8 + 2 n_codes.
 *
 * Arithmetic below 8 bits, three kinds (8-bit codes are always exact):
 *   int16  codebook (scale per row) and x (scale per 8 inputs) in 15-bit fixed point; 8 products are summed exactly in
 *          int32 (8 * 16383^2 < 2^31), sums of 8 in fp32. A non-finite x gives NaN.
 *   int8   the same with 7 bits and a sign: half the instructions of int16 and about a hundred times its error.
 *   exact  fp32 throughout.
 * A row's sum is formed by one thread in one fixed order, so results do not depend on the number of threads.
 */

#include "cpu_targets.h"
#include "cpu_read.h"
#include "codebook_layout.h"
#include "codebook_x.h"
#include "codebook_portable.h"
#include "codebook_avx2.h"
#include "codebook_avx512.h"
#include "codebook_neon.h"
#include "codebook_bytes.h"
#include "codebook_dequantize.h"

typedef void (*Prepare16)(int bits, const float *x, X16 *steps, int64_t blocks);
typedef void (*Prepare8)(int bits, const float *x, X8 *steps, int64_t blocks);

#define BY_BITS(bits, name) ((bits) == 4 ? name##_4 : (bits) == 3 ? name##_3 : name##_2)

static Work work_of(int bits, int arithmetic, int path) {
    if (arithmetic == EXACT)
        return CHOOSE(path, BY_BITS(bits, exact_portable), BY_BITS(bits, exact_avx2), BY_BITS(bits, exact_avx512),
                      BY_BITS(bits, exact_avx512), BY_BITS(bits, exact_portable));
#if X86
    if (arithmetic == INT8 && path == PATH_AVX512VNNI && has_vbmi()) return BY_BITS(bits, int8_vbmi);
#endif
    if (arithmetic == INT8)
        return CHOOSE(path, BY_BITS(bits, int8_portable), BY_BITS(bits, int8_avx2), BY_BITS(bits, int8_avx2),
                      BY_BITS(bits, int8_avx2), BY_BITS(bits, int8_neon));
    return CHOOSE(path, BY_BITS(bits, int16_portable), BY_BITS(bits, int16_avx2), BY_BITS(bits, int16_avx512bw),
                  BY_BITS(bits, int16_avx512vnni), BY_BITS(bits, int16_neon));
}

/* Fixed-point x into job; returns the memory to free, NULL where there is none. */
static void *prepare(Job *job, int bits, int arithmetic, int path) {
    int64_t blocks = count_blocks(job, bits), steps = blocks * STEPS(bits);
    void *memory = aligned(steps * (int64_t)(arithmetic == INT8 ? sizeof(X8) : sizeof(X16)));
    if (!memory) return NULL;
    if (arithmetic == INT8) {
        Prepare8 fill = CHOOSE(path, prepare8_portable, prepare8_avx2, prepare8_avx512, prepare8_avx512,
                               prepare8_portable);
        fill(bits, job->x, memory, blocks);
        job->x8 = memory;
    } else {
        Prepare16 fill = CHOOSE(path, prepare16_portable, prepare16_avx2, prepare16_avx512, prepare16_avx512,
                                prepare16_neon);
        fill(bits, job->x, memory, blocks);
        job->x16 = memory;
    }
    return memory;
}

/* y = W x + bias with 4-, 3- or 2-bit codes in the packed layout.
 *   x           fp32 [in_features]
 *   codes       uint8, packed
 *   codebook    fp16 [out_features][n_codes], n_codes <= 2^bits
 *   bias        fp32 [out_features] or NULL
 *   y           fp32 [out_features], overwritten
 *   path        0 portable, 1 AVX2, 2 AVX-512BW, 3 AVX-512 VNNI, 4 NEON; one that trapetum_runs()
 *   arithmetic  0 int16, 1 exact, 2 int8
 * Returns 0, or 1 when there is no memory for the prepared x. */
int trapetum_gemv_packed(const float *x, const uint8_t *codes, const uint16_t *codebook, int64_t n_codes,
                         const float *bias, float *y, int64_t in_features, int64_t out_features, int bits, int path,
                         int arithmetic, int threads) {
    Job job = {codes, codebook, n_codes, in_features, out_features, bias, x, NULL, NULL, y, TO_FP32};
    float *owned;
    void *fixed = NULL;
    job.x = whole_x(x, in_features, count_blocks(&job, bits) * BLOCK_INPUTS(bits), &owned);
    if (!job.x) return 1;
    if (arithmetic != EXACT && !(fixed = prepare(&job, bits, arithmetic, path))) {
        free(owned);
        return 1;
    }
    in_parallel(&job, work_of(bits, arithmetic, path), count_tiles(&job), threads);
    free(fixed);
    free(owned);
    return 0;
}

/* y = W x + bias with 8-bit codes, row-major [out_features][in_features]; n_codes <= 256, the rest as above. */
int trapetum_gemv_bytes(const float *x, const uint8_t *codes, const uint16_t *codebook, int64_t n_codes,
                        const float *bias, float *y, int64_t in_features, int64_t out_features, int path,
                        int threads) {
    Job job = {codes, codebook, n_codes, in_features, out_features, bias, x, NULL, NULL, y, TO_FP32};
    Work work = CHOOSE(path, bytes_portable, bytes_avx2, bytes_avx512, bytes_avx512, bytes_portable);
#if X86
    if (path == PATH_AVX512VNNI && has_vbmi()) work = bytes_vbmi;
#endif
    in_parallel(&job, work, out_features, threads);
    return 0;
}

/* y = W, row-major [out_features][in_features] in fp32 (format 0), fp16 (1) or bf16 (2), at any bits. */
int trapetum_dequantize(const uint8_t *codes, const uint16_t *codebook, int64_t n_codes, void *y, int format, int bits,
                        int64_t in_features, int64_t out_features, int path, int threads) {
    Job job = {codes, codebook, n_codes, in_features, out_features, NULL, NULL, NULL, NULL, y, format};
    Work packed = CHOOSE(path, BY_BITS(bits, dequantize_portable), BY_BITS(bits, dequantize_avx2),
                         BY_BITS(bits, dequantize_avx512), BY_BITS(bits, dequantize_avx512),
                         BY_BITS(bits, dequantize_portable));
    Work bytes = dequantize_bytes;
#if X86
    if (path == PATH_AVX512VNNI && has_vbmi()) bytes = dequantize_bytes_vbmi;
#endif
    in_parallel(&job, bits == 8 ? bytes : packed, bits == 8 ? out_features : count_tiles(&job), threads);
    return 0;
}
