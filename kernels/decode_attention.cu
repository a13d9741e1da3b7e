// Attention of a decode step over the live length of the cache, for 1 to 16 queries of a key head:
//
//     out[r, h] = sum_p softmax_p(scale * q[r, h] . k[p]) v[p],   p <= position + r
//
// It takes the row that the q+k+v product left, turns queries and keys by their rope angles, writes the new keys and values to
// the cache, and attends. Compiled once for each set of macros:
//     XTYPE     0 fp16, 1 bf16: dtype of qkv, rope tables, 16-bit cache and out
//     KV        16, 8 or 4: bits of a cached value
//     HEAD_DIM  32, 64 or 128
//     GROUP     query heads that share a key head
//     ROWS      tokens of this step, at positions position .. position + ROWS - 1; GROUP * ROWS <= 16
//     WARPS     warps a block
//     STAGES    units (see below) that a warp has on their way
//
// Work. A block is (split, key head). The positions of a key head are cut into units, and unit u goes to warp u mod (splits *
// WARPS) of the head, so all stop within one unit of each other at any length. Blocks without a unit leave at once. A warp has STAGES
// units on their way into shared memory of its own, so its lanes wait for each other and for nobody else. Warps meet in shared memory; the
// blocks of a head meet in `partial`, where the last to arrive (a counter, which it sets back to 0) adds in the order of the splits:
// bit-identical from run to run.
//
// Tensor cores. In mma.m16n8k16 (lane = 4 g + t) the rows of A are 16 positions and the columns of B 8 queries. A wants in lane
// (g, t) four inner indices of each of two positions; as the sum does not mind their order, these are consecutive dimensions, and a
// 16-byte load is two steps' worth. D holds the scores of two positions for queries 2 t and 2 t + 1; `movmatrix` turns the weights
// made of them into the B of the second product, where the rows of A are dimensions, which want consecutive positions. So:
//
//     keys    [kv_head][tile of 16 positions][n][vector][lane][16 bytes]
//             lane (g, t): of position 4 (g / 2) + g % 2 + 2 n, for 32 dimensions j after another, dimensions 32 j + 8 t .. + 7
//     values  [kv_head][tile of 16 positions][vector][lane][16 bytes]
//             lane (g, t): for 16 dimensions i after another, positions 4 t .. + 3 of dimensions 16 i + 2 g and + 1
//
// so a warp copies what it needs as it lies, and each lane finds what is its own.
//
// KV 8 and 4. Keys are quantized by channel over groups of 64 positions, values by token, as in KIVI (Liu et al. 2024): keys
// have outlying channels, values do not. A value is code * scale + zero. The scales of the keys go into the queries and those of the
// values into the softmax weights, so a code is only made an fp16 number (exact, plus 1024, which comes off the sum) on its way to the
// tensor core. The latest positions, up to 64 + 2 ROWS, stay 16-bit in a ring of 128 (`keys`, `values`, laid out as above), and an extra
// block of each head quantizes a group as soon as all of it is certain.
//
//     key codes, value codes   as above with 8 or 4 bits for an element, and the vectors so many times longer (where HEAD_DIM has
//                              not so many for a lane, they are shorter). 4 bits: element e of 8 dimensions is in nibble e / 2 + 4 (e % 2)
//                              of a word; position e of dimension b of a pair is in nibble 2 b + e / 2 + 4 (e % 2)
//     key params    fp16 [kv_head][position / 64][scale, zero][dimension]
//     value params  fp16 [kv_head][position / 4][scale, zero][4 positions]
//
// Bytes moved per position and key head: HEAD_DIM * KV / 4, and for KV < 16 4 of value params and HEAD_DIM / 16 of key params.

#include <cuda_fp16.h>
#include <cuda_bf16.h>

#ifndef XTYPE
#define XTYPE 0
#endif
#ifndef KV
#define KV 16
#endif
#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef GROUP
#define GROUP 1
#endif
#ifndef ROWS
#define ROWS 1
#endif
#ifndef WARPS
#define WARPS 4
#endif
#ifndef STAGES
#define STAGES 2
#endif

#if XTYPE == 0
typedef __half xtype;
typedef __half2 xpair;
#else
typedef __nv_bfloat16 xtype;
typedef __nv_bfloat162 xpair;
#endif

constexpr int SLOTS = GROUP * ROWS;             // queries of a key head: slot h * ROWS + r
constexpr bool BOTH = SLOTS > 8;                // whether a second B of 8 queries is in use
constexpr int HALVES = BOTH ? 2 : 1;
constexpr int CHUNKS = HEAD_DIM / 32;           // j
constexpr int PAIRS = HEAD_DIM / 16;            // i
constexpr int TILE = 16;                        // positions
constexpr int QUANTUM = 64;                     // positions that share a key channel's scale
constexpr int RING = 128;                       // positions that stay 16-bit where KV < 16
constexpr int THREADS = 32 * WARPS;
constexpr int STATS = 2;                        // of a slot beside its sums: maximum, sum of weights
constexpr float WEIGHT_SCALE = 512;             // on weight * scale of a value, for small ones to stay normal in fp16
constexpr float HUGE_VALUE = 3e38f, NOTHING = -HUGE_VALUE;
static_assert(HEAD_DIM == 32 || HEAD_DIM == 64 || HEAD_DIM == 128, "HEAD_DIM is 32, 64 or 128");
static_assert(SLOTS <= 16, "there are two Bs of 8 queries");

__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ void from_float(float v, __half* out) { *out = __float2half_rn(v); }
__device__ __forceinline__ void from_float(float v, __nv_bfloat16* out) { *out = __float2bfloat16_rn(v); }

__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Eight 16-bit values, as words: taken apart they would fill a register each.
struct Eight {
    unsigned word[4];
    __device__ __forceinline__ void operator=(uint4 v) { word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w; }
};
__device__ __forceinline__ float2 pair_of(unsigned word) {
    const xpair pair = *reinterpret_cast<const xpair*>(&word);
    return make_float2(to_float(pair.x), to_float(pair.y));
}
__device__ __forceinline__ unsigned to_pair(float a, float b) {
#if XTYPE == 0
    const xpair pair = __floats2half2_rn(a, b);
#else
    const xpair pair = __floats2bfloat162_rn(a, b);
#endif
    return *reinterpret_cast<const unsigned*>(&pair);
}

__device__ __forceinline__ float exp2_of(float v) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v));
    return power;
}

// sums += A B; a0, a2 are row g of A, a1, a3 row g + 8.
template <bool IS_HALF>
__device__ __forceinline__ void multiply_add(float sums[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
    if (IS_HALF)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else  // fp16 only: the binding refuses bf16 here
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(a0), "r"(a1), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(a2), "r"(a3), "r"(b1));
#endif
}

// A relaxed load, because the assembler moves a plain one below `wait_for_previous_kernel`.
__device__ __forceinline__ uint4 load_early(const void* from) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

__device__ __forceinline__ void copy_ahead(char* to, const char* from) {  // 16 bytes
#if __CUDA_ARCH__ >= 800
    const unsigned at = (unsigned)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
#else
#pragma unroll
    for (int i = 0; i < 16; i += 4) *reinterpret_cast<unsigned*>(to + i) = *reinterpret_cast<const volatile unsigned*>(from + i);
#endif
}
__device__ __forceinline__ void end_of_unit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_unit() {  // the oldest of STAGES
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
#endif
    __syncwarp();
}

// What a warp reads at once: 16 * TILES positions, the same number of bytes at every width. In shared memory vector v of lane l is at
// (32 v + l) vectors from the start, first those of the keys [tile][n][.], then those of the values [tile][.].
template <int BITS>
struct Unit {
    static constexpr int TILES = 16 / BITS;
    static constexpr int POSITIONS = TILE * TILES;
    static constexpr int KEY_SHARE = HEAD_DIM * BITS / 32, VALUE_SHARE = 2 * KEY_SHARE;        // bytes of a lane: of a position, of four
    static constexpr int KEY_VECTOR = KEY_SHARE < 16 ? KEY_SHARE : 16, VALUE_VECTOR = VALUE_SHARE < 16 ? VALUE_SHARE : 16;
    static constexpr int KEY_VECTORS = KEY_SHARE / KEY_VECTOR, VALUE_VECTORS = VALUE_SHARE / VALUE_VECTOR;
    char* at;  // of this lane: the warp's slot
    int lane;

    __device__ __forceinline__ char* key(int tile, int n, int v) const { return at + (((tile * 2 + n) * KEY_VECTORS + v) * 32 + lane) * KEY_VECTOR; }
    __device__ __forceinline__ char* value(int tile, int v) const {
        return at + TILES * 2 * KEY_SHARE * 32 + ((tile * VALUE_VECTORS + v) * 32 + lane) * VALUE_VECTOR;
    }
    // `keys`, `values` of this key head; `first` is the unit's first place in them.
    __device__ __forceinline__ void load(const char* keys, const char* values, int first) const {
        constexpr int SIDE = 32 * HEAD_DIM;  // bytes of the keys, and of the values
        const size_t from = (size_t)first * HEAD_DIM * BITS / 8 + 16 * lane;
#pragma unroll
        for (int i = 0; i < SIDE; i += 16 * 32) copy_ahead(at + i + 16 * lane, keys + from + i);
#pragma unroll
        for (int i = 0; i < SIDE; i += 16 * 32) copy_ahead(at + SIDE + i + 16 * lane, values + from + i);
    }
};
constexpr int UNIT_BYTES = 64 * HEAD_DIM;
constexpr int PARAM_BYTES = KV == 16 ? 0 : 4 * HEAD_DIM + 64 * (16 / KV);  // of keys [scale, zero][dimension], of values [tile][t][scale, zero][4]
constexpr int SLOT_BYTES = UNIT_BYTES + PARAM_BYTES;

template <int BYTES>
__device__ __forceinline__ void read_words(const char* from, unsigned* to) {
    if (BYTES == 16) {
        const uint4 v = *reinterpret_cast<const uint4*>(from);
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else {
#pragma unroll
        for (int i = 0; i < BYTES / 4; i++) to[i] = reinterpret_cast<const unsigned*>(from)[i];
    }
}

// Two codes as fp16 plus 1024, which is 0x6400 | code. Nibbles of odd pairs stay where they are in the word: 1024 + 16 code.
constexpr float CODE_OFFSET = 1024;
__device__ __forceinline__ unsigned two_bytes(unsigned word, int pair) { return __byte_perm(word, 0x64646464, pair ? 0x4342 : 0x4140); }
__device__ __forceinline__ unsigned two_nibbles(unsigned word, int pair) {
    return ((pair / 2 ? word >> 8 : word) & (pair % 2 ? 0x00f000f0 : 0x000f000f)) | 0x64006400;
}
template <int BITS>
__device__ __forceinline__ constexpr float code_factor(int pair) { return BITS == 4 && pair % 2 ? 1.f / 16 : 1.f; }  // undoes the 16

// Of step s (16 dimensions) of chunk j, one position's part of A.
template <int BITS>
__device__ __forceinline__ void key_pairs(const unsigned* words, int j, int s, unsigned& b0, unsigned& b1) {
    if (BITS == 16) b0 = words[4 * j + 2 * s], b1 = words[4 * j + 2 * s + 1];
    else if (BITS == 8) b0 = two_bytes(words[2 * j + s], 0), b1 = two_bytes(words[2 * j + s], 1);
    else b0 = two_nibbles(words[j], 2 * s), b1 = two_nibbles(words[j], 2 * s + 1);
}

// Dimension 16 i + 2 g + b at positions 0, 1 and 2, 3 of this lane's four.
template <int BITS>
__device__ __forceinline__ void value_pairs(const unsigned* words, int i, int b, unsigned& a0, unsigned& a1) {
    if (BITS == 16) a0 = words[4 * i + 2 * b], a1 = words[4 * i + 2 * b + 1];
    else if (BITS == 8) a0 = two_bytes(words[2 * i + b], 0), a1 = two_bytes(words[2 * i + b], 1);
    else a0 = two_nibbles(words[i], 2 * b), a1 = two_nibbles(words[i], 2 * b + 1);
}

// Cosines and sines of this lane's dimensions at one position; the sine is negative in the first half.
struct Angles {
    Eight cos[CHUNKS], sin[CHUNKS];
    __device__ __forceinline__ void load(const xtype* cosines, const xtype* sines, int position, int t) {
        const size_t at = (size_t)position * HEAD_DIM + 8 * t;
#pragma unroll
        for (int j = 0; j < CHUNKS; j++) cos[j] = load_early(cosines + at + 32 * j), sin[j] = load_early(sines + at + 32 * j);
    }
};

struct Queries {
    unsigned word[HALVES][4 * CHUNKS];  // B: of slots g and g + 8, 8 dimensions of each chunk
};

// The running softmax of a warp, of slots 8 h + 2 t + c.
struct Running {
    float sums[HALVES][PAIRS][4] = {};  // [h][i][2 b + c]: dimension 16 i + 2 g + b
    float largest[HALVES][2];           // of the scores, times scale * log2 e
    float weights[HALVES][2] = {};      // this lane's part of the sum of weights
    float zeros[HALVES][2] = {};        // and of the sum of weight * zero of the values
    __device__ __forceinline__ Running() {
#pragma unroll
        for (int h = 0; h < HALVES; h++) largest[h][0] = largest[h][1] = NOTHING;
    }
};

// Scales and zeros of a unit of codes, behind it in its slot; lanes read what others have copied.
struct Params {
    const char* at;
    __device__ __forceinline__ static void load(char* to, const __half* key_params, const __half* value_params, int first, int lane) {
        const char* const of_keys = reinterpret_cast<const char*>(key_params + (size_t)(first / QUANTUM) * 2 * HEAD_DIM);
        if (16 * lane < 4 * HEAD_DIM) copy_ahead(to + 16 * lane, of_keys + 16 * lane);
        if (16 * lane < PARAM_BYTES - 4 * HEAD_DIM)
            copy_ahead(to + 4 * HEAD_DIM + 16 * lane, reinterpret_cast<const char*>(value_params + (size_t)first * 2) + 16 * lane);
    }
    // Scales (what 0) or zeros (1) of this lane's 8 dimensions of chunk j; of position `inside` a tile.
    __device__ __forceinline__ uint4 key(int what, int j, int t) const { return *reinterpret_cast<const uint4*>(at + 2 * (what * HEAD_DIM + 32 * j + 8 * t)); }
    __device__ __forceinline__ float value(int what, int tile, int inside) const {
        return __half2float(*reinterpret_cast<const __half*>(at + 4 * HEAD_DIM + 16 * (4 * tile + inside / 4) + 8 * what + 2 * (inside % 4)));
    }
};

__device__ __forceinline__ float2 half_pair_of(unsigned word) { return __half22float2(*reinterpret_cast<__half2*>(&word)); }
__device__ __forceinline__ unsigned to_half_pair(float a, float b) {
    const __half2 pair = __floats2half2_rn(a, b);
    return *reinterpret_cast<const unsigned*>(&pair);
}
// Over the lanes of all g.
__device__ __forceinline__ float sum_of_column(float v) {
    v += __shfl_xor_sync(~0u, v, 4);
    v += __shfl_xor_sync(~0u, v, 8);
    return v + __shfl_xor_sync(~0u, v, 16);
}
__device__ __forceinline__ float largest_of_column(float v) {
    v = fmaxf(v, __shfl_xor_sync(~0u, v, 4));
    v = fmaxf(v, __shfl_xor_sync(~0u, v, 8));
    return fmaxf(v, __shfl_xor_sync(~0u, v, 16));
}
// An 8 by 8 matrix, of whose row g lane (g, t) has columns 2 t and 2 t + 1, turned over.
__device__ __forceinline__ unsigned transposed(unsigned pair) {
    unsigned turned;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(pair));
    return turned;
}

// Scores of two tiles, or of one where a unit has no more.
template <int BITS>
struct Scores {
    static constexpr int TILES = Unit<BITS>::TILES < 2 ? 1 : 2;
    float of[TILES][HALVES][4] = {};  // [tile][h][2 n + c]: position 4 (g / 2) + g % 2 + 2 n, slot 8 h + 2 t + c
};
__device__ constexpr bool as_half(int bits) { return bits < 16 || XTYPE == 0; }

// Queries times the scales of the keys, and what is then to be added to their scores: query . zeros, less what the 1024 of each code makes.
struct Scaled {
    Queries queries;
    float offset[HALVES][4] = {};  // [h][c]: of slot 8 h + 2 t + c
};

__device__ __forceinline__ unsigned times(unsigned a, unsigned b) {
    const __half2 product = __hmul2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
    return *reinterpret_cast<const unsigned*>(&product);
}

// `queries` are fp16 here.
template <int BITS>
__device__ __forceinline__ void scale_queries(Scaled& scaled, const Queries& queries, const Params& params, int t) {
    const unsigned all_codes = to_half_pair(-CODE_OFFSET, -CODE_OFFSET), sixteenth = to_half_pair(1.f / 16, 1.f / 16);
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) {
        Eight scale, zero;
        scale = params.key(0, j, t), zero = params.key(1, j, t);
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            const unsigned* const plain = queries.word[h] + 4 * j;
            unsigned* const made = scaled.queries.word[h] + 4 * j;
#pragma unroll
            for (int w = 0; w < 4; w++) {
                made[w] = times(plain[w], scale.word[w]);
                if (code_factor<BITS>(w) != 1.f) made[w] = times(made[w], sixteenth);
            }
#pragma unroll
            for (int s = 0; s < 4; s += 2) {
                multiply_add<true>(scaled.offset[h], zero.word[s], zero.word[s], zero.word[s + 1], zero.word[s + 1], plain[s], plain[s + 1]);
                multiply_add<true>(scaled.offset[h], all_codes, all_codes, all_codes, all_codes, made[s], made[s + 1]);
            }
        }
    }
}

// Scores of the tiles from `from` on.
template <int BITS>
__device__ __forceinline__ void score(Scores<BITS>& scores, const Queries& queries, const Unit<BITS>& unit, int from) {
    typedef Unit<BITS> U;
    constexpr int CHUNKS_A_VECTOR = CHUNKS / U::KEY_VECTORS;
#pragma unroll
    for (int v = 0; v < U::KEY_VECTORS; v++)
#pragma unroll
        for (int tile = 0; tile < Scores<BITS>::TILES; tile++) {
            unsigned words[2][U::KEY_VECTOR / 4];
#pragma unroll
            for (int n = 0; n < 2; n++) read_words<U::KEY_VECTOR>(unit.key(from + tile, n, v), words[n]);
#pragma unroll
            for (int j = 0; j < CHUNKS_A_VECTOR; j++)
#pragma unroll
                for (int s = 0; s < 2; s++) {
                    unsigned a[2][2];
#pragma unroll
                    for (int n = 0; n < 2; n++) key_pairs<BITS>(words[n], j, s, a[n][0], a[n][1]);
                    const int w = 4 * (v * CHUNKS_A_VECTOR + j) + 2 * s;
#pragma unroll
                    for (int h = 0; h < HALVES; h++)
                        multiply_add<as_half(BITS)>(scores.of[tile][h], a[0][0], a[1][0], a[0][1], a[1][1], queries.word[h][w], queries.word[h][w + 1]);
                }
        }
}

// Turn scores into logarithms of weights: scaled, masked, and the running softmax brought to their maximum. `seen`: how many positions
// from the first tile on row 0 of the step may see (row r sees r more).
template <int BITS>
__device__ __forceinline__ void weigh(Running& run, Scores<BITS>& scores, const float offset[HALVES][4], int seen, float scale, int g, int t) {
    float reached[HALVES][2];
    bool more = false;
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            float& top = reached[h][c] = run.largest[h][c];
            const int sees = seen + (8 * h + 2 * t + c) % ROWS;
#pragma unroll
            for (int tile = 0; tile < Scores<BITS>::TILES; tile++)
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    float& one = scores.of[tile][h][2 * n + c];
                    one = (one + (BITS == 16 ? 0.f : offset[h][c])) * scale;
                    if (BITS == 16 && tile * TILE + 4 * (g / 2) + g % 2 + 2 * n >= sees) one = NOTHING;
                    top = fmaxf(top, one);
                }
            top = largest_of_column(top);
            more |= top > run.largest[h][c];
        }
    if (!__any_sync(~0u, more)) return;
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const float shrink = reached[h][c] == NOTHING ? 1.f : exp2_of(run.largest[h][c] - reached[h][c]);
            run.largest[h][c] = reached[h][c];
            run.weights[h][c] *= shrink;
            run.zeros[h][c] *= shrink;
#pragma unroll
            for (int i = 0; i < PAIRS; i++) run.sums[h][i][c] *= shrink, run.sums[h][i][2 + c] *= shrink;
        }
}

template <int BITS>
__device__ __forceinline__ void gather(Running& run, const Scores<BITS>& scores, const Unit<BITS>& unit, const Params& params, int from, int g) {
    typedef Unit<BITS> U;
#pragma unroll
    for (int tile = 0; tile < Scores<BITS>::TILES; tile++) {
        unsigned weight[2][HALVES];  // B: [positions 4 t + 2 n and + 1][slots of half h]
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int inside = 4 * (g / 2) + g % 2 + 2 * n;
            const float scale = BITS == 16 ? (KV == 16 ? 1.f : WEIGHT_SCALE) : params.value(0, from + tile, inside) * (WEIGHT_SCALE * code_factor<BITS>(n));
            const float zero = BITS == 16 ? 0.f : params.value(1, from + tile, inside);
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                float w[2];
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    w[c] = exp2_of(scores.of[tile][h][2 * n + c] - (run.largest[h][c] == NOTHING ? 0.f : run.largest[h][c]));
                    run.weights[h][c] += w[c];
                }
                if (BITS == 16) {
                    weight[n][h] = transposed(to_pair(w[0] * scale, w[1] * scale));
                } else {
                    const unsigned both = to_half_pair(w[0] * scale, w[1] * scale);
                    const float2 rounded = half_pair_of(both);
                    run.zeros[h][0] += w[0] * zero - CODE_OFFSET / WEIGHT_SCALE * rounded.x;
                    run.zeros[h][1] += w[1] * zero - CODE_OFFSET / WEIGHT_SCALE * rounded.y;
                    weight[n][h] = transposed(both);
                }
            }
        }
        constexpr int PAIRS_A_VECTOR = PAIRS / U::VALUE_VECTORS;
#pragma unroll
        for (int v = 0; v < U::VALUE_VECTORS; v++) {
            unsigned words[U::VALUE_VECTOR / 4];
            read_words<U::VALUE_VECTOR>(unit.value(from + tile, v), words);
#pragma unroll
            for (int k = 0; k < PAIRS_A_VECTOR; k++) {
                unsigned a[2][2];  // [dimension b][positions 2 n and + 1]
#pragma unroll
                for (int b = 0; b < 2; b++) value_pairs<BITS>(words, k, b, a[b][0], a[b][1]);
#pragma unroll
                for (int h = 0; h < HALVES; h++)
                    multiply_add<as_half(BITS)>(run.sums[h][v * PAIRS_A_VECTOR + k], a[0][0], a[1][0], a[0][1], a[1][1], weight[0][h], weight[1][h]);
            }
        }
    }
}

// Where an element of a tile stands in it, in elements of BITS; `inside` is the position's place in the tile.
template <int BITS>
__device__ __forceinline__ int key_place(int inside, int d) {
    constexpr int SHARE = HEAD_DIM / 4, VECTOR = SHARE < 128 / BITS ? SHARE : 128 / BITS;  // of a lane; of one of its vectors
    const int g = 2 * (inside / 4) + inside % 2, n = inside / 2 % 2, j = d / 32, t = d % 32 / 8, e = d % 8;
    const int mine = 8 * j + (BITS == 4 ? e / 2 + 4 * (e % 2) : e);
    return ((n * (SHARE / VECTOR) + mine / VECTOR) * 32 + 4 * g + t) * VECTOR + mine % VECTOR;
}
template <int BITS>
__device__ __forceinline__ int value_place(int inside, int d) {
    constexpr int SHARE = HEAD_DIM / 2, VECTOR = SHARE < 128 / BITS ? SHARE : 128 / BITS;
    const int t = inside / 4, e = inside % 4, i = d / 16, g = d % 16 / 2, b = d % 2;
    const int mine = 8 * i + (BITS == 4 ? 2 * b + e / 2 + 4 * (e % 2) : 4 * b + e);
    return (mine / VECTOR * 32 + 4 * g + t) * VECTOR + mine % VECTOR;
}

// The cache of a key head that is 16-bit: all of it (KV 16), or the ring.
struct Cache {
    xtype* keys;
    xtype* values;
    __device__ __forceinline__ static int place(int position) { return KV == 16 ? position : position % RING; }
    __device__ __forceinline__ xtype* key(int p, int d) const { return keys + (size_t)(place(p) / TILE) * TILE * HEAD_DIM + key_place<16>(p % TILE, d); }
    __device__ __forceinline__ xtype* value(int p, int d) const { return values + (size_t)(place(p) / TILE) * TILE * HEAD_DIM + value_place<16>(p % TILE, d); }
};

// A head of this step before rope: this lane's dimensions and those that turn with them.
struct Raw {
    Eight own[CHUNKS], partner[CHUNKS];
    __device__ __forceinline__ void load(const xtype* head, int t) {
#pragma unroll
        for (int j = 0; j < CHUNKS; j++) {
            const int first = 32 * j + 8 * t;
            own[j] = __ldcg(reinterpret_cast<const uint4*>(head + first));
            partner[j] = __ldcg(reinterpret_cast<const uint4*>(head + (first < HEAD_DIM / 2 ? first + HEAD_DIM / 2 : first - HEAD_DIM / 2)));
        }
    }
    // After rope, rounded where transformers rounds.
    __device__ __forceinline__ void turn(const Angles& angles, unsigned words[4 * CHUNKS]) const {
#pragma unroll
        for (int j = 0; j < CHUNKS; j++)
#pragma unroll
            for (int w = 0; w < 4; w++) {
                const float2 o = pair_of(own[j].word[w]), c = pair_of(angles.cos[j].word[w]);
                const float2 p = pair_of(partner[j].word[w]), s = pair_of(angles.sin[j].word[w]);
                const float2 straight = pair_of(to_pair(o.x * c.x, o.y * c.y)), across = pair_of(to_pair(p.x * s.x, p.y * s.y));
                words[4 * j + w] = to_pair(straight.x + across.x, straight.y + across.y);
            }
    }
};

// A new position's key and value on their way into the tile that was loaded around them, and into the cache.
struct Fresh {
    Raw key;
    unsigned value[PAIRS];

    __device__ __forceinline__ void load(const xtype* key_head, const xtype* value_head, int g, int t) {
        key.load(key_head, t);
#pragma unroll
        for (int i = 0; i < PAIRS; i++) value[i] = __ldcg(reinterpret_cast<const unsigned*>(value_head + 16 * i + 2 * g));
    }
    // `p`: the position; `inside`: its place in the tile.
    __device__ __forceinline__ void place(const Unit<16>& unit, const Cache& cache, const Angles& angles, int p, int inside, int g, int t) const {
        const int n = inside / 2 % 2, row = 2 * (inside / 4) + inside % 2, quad = inside / 4, e = inside % 4;
        if (g == row) {
            unsigned turned[4 * CHUNKS];
            key.turn(angles, turned);
#pragma unroll
            for (int j = 0; j < CHUNKS; j++) {
                const uint4 eight = make_uint4(turned[4 * j], turned[4 * j + 1], turned[4 * j + 2], turned[4 * j + 3]);
                *reinterpret_cast<uint4*>(unit.key(0, n, j)) = eight;
                *reinterpret_cast<uint4*>(cache.key(p, 32 * j + 8 * t)) = eight;
            }
        }
        if (t == quad) {
#pragma unroll
            for (int i = 0; i < PAIRS; i++)
#pragma unroll
                for (int b = 0; b < 2; b++) {
                    const unsigned short one = b ? value[i] >> 16 : value[i] & 0xffff;
                    reinterpret_cast<unsigned short*>(unit.value(0, i))[4 * b + e] = one;
                    *reinterpret_cast<unsigned short*>(cache.value(p, 16 * i + 2 * g + b)) = one;
                }
        }
    }
};

// --- quantizing a group ---------------------------------------------------------------------------------------------------

constexpr float LEVELS = (1 << (KV == 16 ? 8 : KV)) - 1;

__device__ __forceinline__ int code_of(float v, float zero, float scale) {
    return scale > 0.f ? (int)fminf(fmaxf(rintf((v - zero) / scale), 0.f), LEVELS) : 0;
}

// Scale and zero for values between `low` and `high`, as they will be read back.
__device__ __forceinline__ void params_of(float low, float high, __half* scale, __half* zero) {
    *zero = __float2half_rn(low);
    *scale = __float2half_rn((high - low) / LEVELS);
}

// Bytes of a row of codes are gathered in shared memory: nibbles of one byte come from different threads.
constexpr int CODE_ROW = HEAD_DIM * (KV == 16 ? 8 : KV) / 8;  // bytes of a position's codes
struct Gathered {
    unsigned char codes[QUANTUM * HEAD_DIM];
    float low[QUANTUM], step[QUANTUM];
};

// Write `count` gathered codes as bytes, for 4 bits two in one.
__device__ __forceinline__ void write_codes(const unsigned char* codes, char* to, int count, int thread) {
    if (KV == 8)
        for (int i = thread; i < count; i += THREADS) to[i] = codes[i];
    else
        for (int i = thread; i < count / 2; i += THREADS) to[i] = codes[2 * i] | codes[2 * i + 1] << 4;
}

__device__ void quantize_group(Gathered& gathered, const Cache& cache, char* key_codes, char* value_codes, __half* key_params, __half* value_params,
                               int group, int thread) {
    const int first = group * QUANTUM;
    for (int d = thread; d < HEAD_DIM; d += THREADS) {
        float low = HUGE_VALUE, high = NOTHING;
#pragma unroll 4
        for (int p = 0; p < QUANTUM; p++) {
            const float v = to_float(*cache.key(first + p, d));
            low = fminf(low, v), high = fmaxf(high, v);
        }
        __half* const params = key_params + (size_t)group * 2 * HEAD_DIM + d;
        params_of(low, high, params, params + HEAD_DIM);
        const float scale = __half2float(params[0]), zero = __half2float(params[HEAD_DIM]);
#pragma unroll 4
        for (int p = 0; p < QUANTUM; p++)
            gathered.codes[p / TILE * TILE * HEAD_DIM + key_place<KV>(p % TILE, d)] = code_of(to_float(*cache.key(first + p, d)), zero, scale);
    }
    __syncthreads();
    write_codes(gathered.codes, key_codes + (size_t)first * CODE_ROW, QUANTUM * HEAD_DIM, thread);
    const auto value = [&](int p, int d) { return to_float(*cache.value(first + p, d)); };
    for (int p = thread / 32; p < QUANTUM; p += WARPS) {  // a warp takes a token
        float low = HUGE_VALUE, high = NOTHING;
        for (int d = thread % 32; d < HEAD_DIM; d += 32) low = fminf(low, value(p, d)), high = fmaxf(high, value(p, d));
#pragma unroll
        for (int step = 16; step; step /= 2) low = fminf(low, __shfl_xor_sync(~0u, low, step)), high = fmaxf(high, __shfl_xor_sync(~0u, high, step));
        if (thread % 32) continue;
        __half* const params = value_params + (size_t)(first + p) / 4 * 8 + p % 4;
        params_of(low, high, params, params + 4);
        gathered.step[p] = __half2float(params[0]), gathered.low[p] = __half2float(params[4]);
    }
    __syncthreads();
#pragma unroll 2
    for (int at = thread; at < QUANTUM * HEAD_DIM; at += THREADS) {
        const int p = at % QUANTUM, d = at / QUANTUM;
        gathered.codes[p / TILE * TILE * HEAD_DIM + value_place<KV>(p % TILE, d)] = code_of(value(p, d), gathered.low[p], gathered.step[p]);
    }
    __syncthreads();
    write_codes(gathered.codes, value_codes + (size_t)first * CODE_ROW, QUANTUM * HEAD_DIM, thread);
}

// --- meeting --------------------------------------------------------------------------------------------------------------

// Sums [slot][dimension] and statistics [slot][maximum, weights] of one warp or block.
struct Part {
    float sums[SLOTS][HEAD_DIM];
    float stats[SLOTS][STATS];
};

__device__ __forceinline__ void leave(Part& part, Running& run, int g, int t) {
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const int slot = 8 * h + 2 * t + c;
            const float weights = sum_of_column(run.weights[h][c]), zeros = sum_of_column(run.zeros[h][c]);
            if (slot >= SLOTS) continue;
            if (g == 0) part.stats[slot][0] = run.largest[h][c], part.stats[slot][1] = weights;
#pragma unroll
            for (int i = 0; i < PAIRS; i++)
                *reinterpret_cast<float2*>(&part.sums[slot][16 * i + 2 * g]) = make_float2(run.sums[h][i][c] + zeros, run.sums[h][i][2 + c] + zeros);
        }
}

// Sum `count` parts. `sums(k)`, `stats(k)` are part k's of this slot.
template <class Sums, class Stats>
__device__ __forceinline__ float2 together(int count, Sums sums, Stats stats, float* largest) {
    *largest = NOTHING;
    for (int k = 0; k < count; k++) *largest = fmaxf(*largest, stats(k, 0));
    float2 total = make_float2(0.f, 0.f);  // sum, weights
    for (int k = 0; k < count; k++) {
        const float share = stats(k, 0) == NOTHING ? 0.f : exp2_of(stats(k, 0) - *largest);
        total.x += share * sums(k), total.y += share * stats(k, 1);
    }
    return total;
}

// qkv           [ROWS, (heads + 2 kv_heads) * HEAD_DIM]
// cos, sin      [places, HEAD_DIM]
// position      cache slot of row 0
// keys, values  16-bit cache or ring as pictured above, `capacity` places of a key head (RING where KV < 16)
// *_codes, *_params  KV < 16, for `context` places; else null
// out           [ROWS, heads * HEAD_DIM]
// partial       float [kv_heads][splits][SLOTS * (HEAD_DIM + STATS)]; arrived: int [kv_heads], zero
// scale         of the scores, times log2 e
// grid          (splits, and one more where KV < 16; kv_heads) blocks of (32, WARPS) threads
// shared        WARPS * STAGES * SLOT_BYTES
extern "C" __global__ void __launch_bounds__(THREADS, (BOTH ? 8 : 12) / WARPS)
decode_attention(const xtype* __restrict__ qkv, const xtype* __restrict__ cos, const xtype* __restrict__ sin, const long long* __restrict__ position_at,
                 xtype* keys, xtype* values, char* key_codes, char* value_codes, __half* key_params, __half* value_params,
                 xtype* __restrict__ out, float* partial, int* arrived, int heads, int kv_heads, int capacity, int context, int splits, float scale) {
    const int lane = threadIdx.x, warp = threadIdx.y, thread = warp * 32 + lane, g = lane / 4, t = lane % 4;
    const int split = blockIdx.x, kv_head = blockIdx.y;
    const int position = (int)*reinterpret_cast<const volatile long long*>(position_at);  // of the step before the last: see LATE in codebook_gemv.cu
    const Cache cache{keys + (size_t)kv_head * capacity * HEAD_DIM, values + (size_t)kv_head * capacity * HEAD_DIM};
    constexpr int BITS = KV;
    typedef Unit<BITS> Coded;
    key_codes += (size_t)kv_head * context * CODE_ROW, value_codes += (size_t)kv_head * context * CODE_ROW;
    key_params += (size_t)kv_head * (context / QUANTUM) * 2 * HEAD_DIM, value_params += (size_t)kv_head * context * 2;

    // A group is read from its codes once every row of a step has left it behind, and quantized in the steps just before.
    const int coded = KV == 16 ? 0 : max(0, position - ROWS) / QUANTUM * QUANTUM;  // positions
    extern __shared__ __align__(16) char ring[];
    char* const own_ring = ring + warp * STAGES * SLOT_BYTES;
    static_assert(sizeof(Part) <= STAGES * SLOT_BYTES && sizeof(Gathered) <= WARPS * STAGES * SLOT_BYTES, "what is left in the ring after use fits");
    if (KV != 16 && split == splits) {
        wait_for_previous_kernel();
        allow_next_kernel();
        if (position >= QUANTUM && position % QUANTUM < ROWS)
            quantize_group(*reinterpret_cast<Gathered*>(ring), cache, key_codes, value_codes, key_params, value_params, position / QUANTUM - 1, thread);
        return;
    }
    const int units_coded = coded / Coded::POSITIONS;
    const int units = units_coded + (position + ROWS - coded + TILE - 1) / TILE;
    const int active = min(splits, (units + WARPS - 1) / WARPS);
    if (split >= active) {
        wait_for_previous_kernel();
        allow_next_kernel();
        return;
    }
    const int first = split * WARPS + warp, all = active * WARPS;
    const auto place_of = [&](int u) { return Cache::place(coded + (u - units_coded) * TILE); };
    const auto fetch = [&](int u, int stage) {
        char* const slot = own_ring + stage * SLOT_BYTES;
        if (KV != 16 && u < units_coded) {
            Coded{slot, lane}.load(key_codes, value_codes, u * Coded::POSITIONS);
            if (KV != 16) Params::load(slot + UNIT_BYTES, key_params, value_params, u * Coded::POSITIONS, lane);
        } else if (u < units) {
            Unit<16>{slot, lane}.load(reinterpret_cast<const char*>(cache.keys), reinterpret_cast<const char*>(cache.values), place_of(u));
        }
        end_of_unit();
    };
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) fetch(first + stage * all, stage);
    Angles angles;
    angles.load(cos, sin, min(position + g % ROWS, context - 1), t);
    wait_for_previous_kernel();
    allow_next_kernel();

    const int stride = (heads + 2 * kv_heads) * HEAD_DIM;
    const xtype* const key = qkv + (heads + kv_head) * HEAD_DIM;
    const xtype* const value = key + kv_heads * HEAD_DIM;
    const auto has_fresh = [&](int u) { return u >= units_coded && coded + (u - units_coded + 1) * TILE > position; };
    constexpr bool EARLY = ROWS == 1;  // the new position may lie in the first unit: load it with the queries, not after them
    Fresh early;
    const bool first_is_fresh = EARLY && first < units && has_fresh(first);
    if (first_is_fresh) early.load(key, value, g, t);
    Queries queries;
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        const int slot = g + 8 * h, r = slot % ROWS;  // of slots that are none any query will do
        if (h && ROWS > 1 && 8 % ROWS) angles.load(cos, sin, min(position + r, context - 1), t);
        Raw raw;
        raw.load(qkv + (size_t)r * stride + (kv_head * GROUP + min(slot / ROWS, GROUP - 1)) * HEAD_DIM, t);
        raw.turn(angles, queries.word[h]);
    }
    wait_for_unit();
    if (first_is_fresh && position < context) early.place(Unit<16>{own_ring, lane}, cache, angles, position, position % TILE, g, t);
    const auto place_fresh = [&](const Unit<16>& plain, int u) {
        const int from = coded + (u - units_coded) * TILE;
#pragma unroll 1
        for (int r = 0; r < ROWS; r++) {
            const int p = position + r;
            if (p < from || p >= from + TILE || p >= context) continue;
            Fresh fresh;
            Angles turned;
            fresh.load(key + (size_t)r * stride, value + (size_t)r * stride, g, t);
            turned.load(cos, sin, p, t);
            fresh.place(plain, cache, turned, p, p - from, g, t);
        }
    };
    Queries halves = queries;  // as fp16, for codes
    if (KV != 16 && XTYPE != 0)
#pragma unroll
        for (int h = 0; h < HALVES; h++)
#pragma unroll
            for (int w = 0; w < 4 * CHUNKS; w++) {
                const float2 q = pair_of(queries.word[h][w]);
                halves.word[h][w] = to_half_pair(q.x, q.y);
            }
    Running run;
    int stage = 0;
    for (int u = first; u < units; u += all) {
        if (u != first) wait_for_unit();
        char* const slot = own_ring + stage * SLOT_BYTES;
        if (KV != 16 && u < units_coded) {
            const Coded unit{slot, lane};
            const Params params{slot + UNIT_BYTES};
            Scaled scaled;
            scale_queries<BITS>(scaled, halves, params, t);
#pragma unroll 1
            for (int from = 0; from < Coded::TILES; from += Scores<BITS>::TILES) {
                Scores<BITS> scores;
                score<BITS>(scores, scaled.queries, unit, from);
                weigh<BITS>(run, scores, scaled.offset, Coded::POSITIONS, scale, g, t);
                gather<BITS>(run, scores, unit, params, from, g);
            }
        } else {
            const Unit<16> unit{slot, lane};
            if (has_fresh(u) && !(EARLY && u == first)) place_fresh(unit, u);
            Scores<16> scores;
            const float no_offset[HALVES][4] = {};
            score<16>(scores, queries, unit, 0);
            weigh<16>(run, scores, no_offset, position + 1 - coded - (u - units_coded) * TILE, scale, g, t);
            gather<16>(run, scores, unit, Params{}, 0, g);
        }
        __syncwarp();
        fetch(u + STAGES * all, stage);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    if (KV != 16) {
#pragma unroll
        for (int h = 0; h < HALVES; h++)
#pragma unroll
            for (int i = 0; i < PAIRS; i++)
#pragma unroll
                for (int c = 0; c < 4; c++) run.sums[h][i][c] *= 1.f / WEIGHT_SCALE;
    }
    const auto part = [&](int w) { return reinterpret_cast<Part*>(ring + w * STAGES * SLOT_BYTES); };  // of a warp, in what was its own ring
    leave(*part(warp), run, g, t);
    __syncthreads();

    Part* const parts = reinterpret_cast<Part*>(partial) + (size_t)kv_head * splits;
    const auto finish = [&](int slot, int d, float2 total) {
        const int r = slot % ROWS, h = slot / ROWS;
        from_float(total.x / total.y, out + ((size_t)r * heads + kv_head * GROUP + h) * HEAD_DIM + d);
    };
    for (int at = thread; at < SLOTS * HEAD_DIM; at += THREADS) {
        const int slot = at / HEAD_DIM, d = at % HEAD_DIM;
        float largest;
        const float2 total = together(WARPS, [&](int k) { return part(k)->sums[slot][d]; }, [&](int k, int s) { return part(k)->stats[slot][s]; }, &largest);
        if (active == 1) {
            finish(slot, d, total);
        } else {
            __stcg(&parts[split].sums[slot][d], total.x);
            if (d == 0) __stcg(&parts[split].stats[slot][0], largest), __stcg(&parts[split].stats[slot][1], total.y);
        }
    }
    if (active == 1) return;
    __threadfence();
    __shared__ bool last;
    __syncthreads();
    if (thread == 0) last = atomicAdd(arrived + kv_head, 1) == active - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int at = thread; at < SLOTS * HEAD_DIM; at += THREADS) {
        const int slot = at / HEAD_DIM, d = at % HEAD_DIM;
        float largest;
        finish(slot, d, together(active, [&](int k) { return __ldcg(&parts[k].sums[slot][d]); }, [&](int k, int s) { return __ldcg(&parts[k].stats[slot][s]); }, &largest));
    }
    if (thread == 0) arrived[kv_head] = 0;
}
