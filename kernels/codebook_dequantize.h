/* W itself from its codes, row-major in fp32, fp16 (both exact) or bf16, for products with many rows of x. */

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

/* Write a tile's rows; `block` is one path's way to write a block's values. The last block of a row may be cut. */
#define DEQUANTIZE(NAME, BITS, TARGET, block)                                                                        \
    TARGET static void NAME##_##BITS(const Job *job, int64_t begin, int64_t end) {                                  \
        const int wide = job->format == TO_FP32, size = wide ? 4 : 2, inputs = BLOCK_INPUTS(BITS);                  \
        FOR_TILES(BITS)                                                                                             \
        for (int64_t row = tile * ROWS; row < smaller(tile * ROWS + ROWS, job->out_features); row++) {              \
            const uint8_t *codes = tile_codes(job, BITS, first, n, tile) + row % ROWS * BLOCK_BYTES(BITS);          \
            char *y = (char *)job->y + row * job->in_features * size;                                               \
            uint32_t table[16];                                                                                     \
            row_bits(job, row, table, 16);                                                                          \
            for (int i = 1 << BITS; i < 16; i++) table[i] = table[i - (1 << BITS)];                                 \
            for (int64_t b = first; b < first + n; b++, codes += ROWS * BLOCK_BYTES(BITS)) {                        \
                int64_t left = job->in_features - b * inputs;                                                       \
                uint32_t cut[BLOCK_INPUTS(BITS)];                                                                   \
                void *target = left < inputs ? (void *)cut : (void *)(y + b * inputs * size);                       \
                if (wide)                                                                                           \
                    block(BITS, codes, table, target, 1);                                                           \
                else                                                                                                \
                    block(BITS, codes, table, target, 0);                                                           \
                if (left < inputs) memcpy(y + b * inputs * size, cut, (size_t)(left * size));                       \
            }                                                                                                       \
        }                                                                                                           \
    }

INLINE void block_portable(int bits, const uint8_t *codes, const uint32_t *table, void *y, int wide) {
    for (int i = 0; i < 4; i++)
        for (int t = 0; t < COLUMN(bits); t++)
            for (int l = 0; l < 16; l++)
                put_bits(y, INPUT_OF(bits, i, t) + l, table[column_code(bits, codes, 4 * l + i, t)], wide);
}

DEQUANTIZE(dequantize_portable, 4, , block_portable)
DEQUANTIZE(dequantize_portable, 3, , block_portable)
DEQUANTIZE(dequantize_portable, 2, , block_portable)

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

AVX2 INLINE void block_avx2(int bits, const uint8_t *codes, const uint32_t *entries, void *y, int wide) {
    __m256 table[2] = {_mm256_loadu_ps((const float *)entries), _mm256_loadu_ps((const float *)entries + 8)};
    __m256i half[2][4];
    for (int h = 0; h < 2; h++) load_half_avx2(bits, codes, h, half[h]);
    for (int e = 0; e < 4 * COLUMN(bits); e++) {
        const int i = e / COLUMN(bits), t = e % COLUMN(bits), to = INPUT_OF(bits, i, t);
        __m256i a = _mm256_castps_si256(lookup_avx2(bits, table, lane_code_avx2(bits, half[0], i, t)));
        __m256i b = _mm256_castps_si256(lookup_avx2(bits, table, lane_code_avx2(bits, half[1], i, t)));
        if (wide) {
            _mm256_storeu_si256((__m256i *)((uint32_t *)y + to), a);
            _mm256_storeu_si256((__m256i *)((uint32_t *)y + to + 8), b);
        } else {
            __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
            _mm256_storeu_si256((__m256i *)((uint16_t *)y + to), words);
        }
    }
}

DEQUANTIZE(dequantize_avx2, 4, AVX2, block_avx2)
DEQUANTIZE(dequantize_avx2, 3, AVX2, block_avx2)
DEQUANTIZE(dequantize_avx2, 2, AVX2, block_avx2)

AVX512 INLINE void block_avx512(int bits, const uint8_t *codes, const uint32_t *entries, void *y, int wide) {
    __m512i table = _mm512_loadu_si512(entries), c[4];
    load_block_avx512(bits, codes, c);
    for (int e = 0; e < 4 * COLUMN(bits); e++) {
        const int i = e / COLUMN(bits), t = e % COLUMN(bits), to = INPUT_OF(bits, i, t);
        __m512i w = _mm512_permutexvar_epi32(lane_code_avx512(bits, c, i, t), table);
        if (wide)
            _mm512_storeu_si512((uint32_t *)y + to, w);
        else
            _mm256_storeu_si256((__m256i *)((uint16_t *)y + to), _mm512_cvtepi32_epi16(w));
    }
}

DEQUANTIZE(dequantize_avx512, 4, AVX512, block_avx512)
DEQUANTIZE(dequantize_avx512, 3, AVX512, block_avx512)
DEQUANTIZE(dequantize_avx512, 2, AVX512, block_avx512)

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

#endif /* X86 */
