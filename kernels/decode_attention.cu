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
//     UNITS     units (see below) that a warp should have before another block joins in
//
// Work. A block is (split, key head). The positions of a key head are cut into units, and unit u goes to warp u mod (splits *
// WARPS) of the head, so all stop within one unit of each other at any length. Blocks without a unit leave at once. Warps meet in shared
// memory; the blocks of a head meet in `partial`, where the last to arrive (a counter, which it sets back to 0) adds in the
// order of the splits: bit-identical from run to run.
//
// Tensor cores, without moving an element between lanes. In mma.m16n8k16 (lane = 4 g + t) the rows of A are the queries. B, the
// keys of 8 positions, wants in lane (g, t) four inner indices of position g; as the sum does not mind their order, these are consecutive
// dimensions, and a 16-byte load is two steps' worth. D holds in lane (g, t) the scores of query g at two positions, which is
// just where B of the second product wants the weights: there the rows of A are dimensions, whose A wants consecutive positions
// of a dimension, and D holds dimensions by queries. So:
//
//     keys    [kv_head][position][dimension]
//             lane (g, t), 32 dimensions j: dimensions 32 j + 8 t .. + 7 of positions 4 (g / 2) + g % 2 and + 2 of a tile of 16
//     values  [kv_head][position / 4][dimension][4 positions]
//             lane (g, t), 16 dimensions i: dimensions 16 i + 2 g, + 1 of positions 4 t .. 4 t + 3 of the tile
//
// KV 8 and 4. Keys are quantized by channel over groups of 64 positions, values by token, as in KIVI (Liu et al. 2024): keys
// have outlying channels, values do not. A value is code * scale + zero. The scales of the keys go into the queries and those of the values into the
// softmax weights, so a code is only made an fp16 number (exact) on its way to the tensor core. The latest 64 to 64 + ROWS positions stay 16-bit in a
// ring of 128 (`keys`, `values`, laid out as above), and an extra block of each head quantizes a group as soon as all of it is certain.
//
//     key codes     [kv_head][position][.]       a lane's codes of a position together: 16-byte vectors [vector][t], 8 dimensions of
//                                               each j in turn; 4 bits: 8 in a word, code e in nibble e / 2 + 4 (e % 2)
//     value codes   [kv_head][position / 4][.]   likewise [vector][g], two dimensions of each i in turn, 4 positions of each; 4 bits:
//                                               position e of dimension b in nibble 2 b + e / 2 + 4 (e % 2)
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
#ifndef UNITS
#define UNITS 1
#endif

#if XTYPE == 0
typedef __half xtype;
typedef __half2 xpair;
#else
typedef __nv_bfloat16 xtype;
typedef __nv_bfloat162 xpair;
#endif

constexpr int SLOTS = GROUP * ROWS;             // queries of a key head: slot h * ROWS + r
constexpr bool BOTH = SLOTS > 8;                // whether rows 8 to 15 of A are in use
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
static_assert(SLOTS <= 16, "a tensor-core tile has 16 queries");

__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ void from_float(float v, __half* out) { *out = __float2half_rn(v); }
__device__ __forceinline__ void from_float(float v, __nv_bfloat16* out) { *out = __float2bfloat16_rn(v); }
__device__ __forceinline__ float round_to_x(float v) {
    xtype rounded;
    from_float(v, &rounded);
    return to_float(rounded);
}

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

union Eight {
    uint4 all;
    unsigned word[4];
    xtype x[8];
};

// sums += A B with the lower rows of A in a0, a2 and the upper in a1, a3.
template <bool IS_HALF>
__device__ __forceinline__ void multiply_add(float sums[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
    if (IS_HALF)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else  // fp16 only: the binding refuses bf16 here
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(a0), "r"(a1), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(a2), "r"(a3), "r"(b1));
#endif
}

// A relaxed load, because the assembler moves a plain one below `wait_for_previous_kernel`.
template <int WORDS>
__device__ __forceinline__ void load_words(unsigned* to, const void* from) {
    if (WORDS == 4)
        asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
    else if (WORDS == 2)
        asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from));
    else
        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(to[0]) : "l"(from));
}

// WORDS words of lane `mine` of `LANES`, which hold a row together: vectors of 16 bytes (or all, where it is less), [vector][lane].
template <int WORDS, int LANES>
__device__ __forceinline__ void load_share(unsigned* to, const char* row, int mine) {
    constexpr int VECTOR = WORDS < 4 ? WORDS : 4;
#pragma unroll
    for (int v = 0; v < WORDS / VECTOR; v++) load_words<VECTOR>(to + v * VECTOR, row + (v * LANES + mine) * VECTOR * 4);
}

// What a warp reads at once: 16 * TILES positions, the same number of bytes at every width.
template <int BITS>
struct Unit {
    static constexpr int TILES = 16 / BITS;
    static constexpr int POSITIONS = TILE * TILES;
    static constexpr int KEY_WORDS = HEAD_DIM * BITS / 128, VALUE_WORDS = HEAD_DIM * BITS / 64;
    static constexpr int KEY_BYTES = HEAD_DIM * BITS / 8, VALUE_BYTES = 4 * KEY_BYTES;  // of a position; of four
    unsigned key[TILES][2][KEY_WORDS], value[TILES][VALUE_WORDS];

    // `keys`, `values` of this key head; `first` is the unit's first place in them.
    __device__ __forceinline__ void load(const char* keys, const char* values, int first, int g, int t) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const int place = first + tile * TILE;
#pragma unroll
            for (int n = 0; n < 2; n++)
                load_share<KEY_WORDS, 4>(key[tile][n], keys + (size_t)(place + 4 * (g / 2) + g % 2 + 2 * n) * KEY_BYTES, t);
            load_share<VALUE_WORDS, 8>(value[tile], values + (size_t)(place / 4 + t) * VALUE_BYTES, g);
        }
    }
};

// Two codes as fp16: 0x6400 + code is 1024 + code.
__device__ __forceinline__ unsigned minus_1024(unsigned pair) {
    const __half2 value = __hsub2(*reinterpret_cast<__half2*>(&pair), __half2half2(__ushort_as_half(0x6400)));
    return *reinterpret_cast<const unsigned*>(&value);
}
__device__ __forceinline__ unsigned two_bytes(unsigned word, int pair) { return minus_1024(__byte_perm(word, 0x64646464, pair ? 0x4342 : 0x4140)); }
__device__ __forceinline__ unsigned two_nibbles(unsigned word, int pair) { return minus_1024((word >> 4 * pair & 0x000f000f) | 0x64006400); }

// B of step s (16 dimensions) of chunk j.
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
        for (int j = 0; j < CHUNKS; j++) load_words<4>(cos[j].word, cosines + at + 32 * j), load_words<4>(sin[j].word, sines + at + 32 * j);
    }
};

// This lane's dimensions of a head after rope, rounded where transformers rounds.
__device__ __forceinline__ void turn(const xtype* head, const Angles& angles, int t, unsigned words[4 * CHUNKS]) {
    Eight own[CHUNKS], partner[CHUNKS];
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) {
        const int first = 32 * j + 8 * t;
        own[j].all = __ldcg(reinterpret_cast<const uint4*>(head + first));
        partner[j].all = __ldcg(reinterpret_cast<const uint4*>(head + (first < HEAD_DIM / 2 ? first + HEAD_DIM / 2 : first - HEAD_DIM / 2)));
    }
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) {
#pragma unroll
        for (int k = 0; k < 8; k++)
            from_float(round_to_x(to_float(own[j].x[k]) * to_float(angles.cos[j].x[k])) +
                           round_to_x(to_float(partner[j].x[k]) * to_float(angles.sin[j].x[k])), &own[j].x[k]);
#pragma unroll
        for (int w = 0; w < 4; w++) words[4 * j + w] = own[j].word[w];
    }
}

struct Queries {
    unsigned word[HALVES][4 * CHUNKS];  // of slots g and g + 8: 8 dimensions of each chunk
};

// The running softmax of a warp. Sums are of slots 8 h + 2 t + c, all else of slots g + 8 h.
struct Running {
    float sums[HALVES][PAIRS][4] = {};      // [h][i][2 b + c]: dimension 16 i + 2 g + b
    float largest[2] = {NOTHING, NOTHING};  // of the scores, times scale * log2 e
    float weights[2] = {};                  // this lane's part of the sum of weights
    float zeros[2] = {};                    // and of the sum of weight * zero of the values
};

template <int BITS>
struct Scales {
    uint4 key[2][CHUNKS];  // fp16 scales and zeros of this lane's dimensions
    uint4 value[Unit<BITS>::TILES];
    __device__ __forceinline__ void load(const __half* key_params, const __half* value_params, int first, int g, int t) {
        const __half* const of_keys = key_params + (size_t)(first / QUANTUM) * 2 * HEAD_DIM;
#pragma unroll
        for (int j = 0; j < CHUNKS; j++)
#pragma unroll
            for (int what = 0; what < 2; what++) key[what][j] = *reinterpret_cast<const uint4*>(of_keys + what * HEAD_DIM + 32 * j + 8 * t);
#pragma unroll
        for (int tile = 0; tile < Unit<BITS>::TILES; tile++)
            value[tile] = *reinterpret_cast<const uint4*>(value_params + (size_t)(first / 4 + 4 * tile + t) * 8);
    }
};

__device__ __forceinline__ float2 pair_of(unsigned word) {
    xpair pair = *reinterpret_cast<xpair*>(&word);
    return make_float2(to_float(pair.x), to_float(pair.y));
}
__device__ __forceinline__ float2 half_pair_of(unsigned word) { return __half22float2(*reinterpret_cast<__half2*>(&word)); }
__device__ __forceinline__ unsigned to_half_pair(float a, float b) {
    const __half2 pair = __floats2half2_rn(a, b);
    return *reinterpret_cast<const unsigned*>(&pair);
}
__device__ __forceinline__ unsigned to_pair(float a, float b) {
    xpair pair;
    from_float(a, &pair.x);
    from_float(b, &pair.y);
    return *reinterpret_cast<const unsigned*>(&pair);
}
__device__ __forceinline__ float sum_of_quad(float v) {
    v += __shfl_xor_sync(~0u, v, 1);
    return v + __shfl_xor_sync(~0u, v, 2);
}
// What slots 2 t and 2 t + 1 have, of a value that lane (g, .) has of slot g.
__device__ __forceinline__ float2 of_own_slots(float v, int t) {
    return make_float2(__shfl_sync(~0u, v, 8 * t), __shfl_sync(~0u, v, 8 * t + 4));
}
__device__ __forceinline__ float largest_of_quad(float v) {
    v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
    return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
}

// Fold one unit into the running softmax. `seen`: how many positions of the unit row 0 of the step may see (row r sees r more).
template <int BITS>
__device__ __forceinline__ void attend(Running& run, const Queries& queries, const Unit<BITS>& unit, const Scales<BITS>& scales, int seen,
                                       float scale, int g, int t) {
    constexpr int TILES = Unit<BITS>::TILES;
    constexpr bool AS_HALF = BITS < 16 || XTYPE == 0;
    Queries scaled;
    float offset[2] = {};  // query . zeros of the keys
    if (BITS == 16) {
        scaled = queries;
    } else {
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
#pragma unroll
            for (int w = 0; w < 4 * CHUNKS; w++) {
                const float2 q = pair_of(queries.word[h][w]);
                const float2 s = half_pair_of(reinterpret_cast<const unsigned*>(&scales.key[0][w / 4])[w % 4]);
                const float2 z = half_pair_of(reinterpret_cast<const unsigned*>(&scales.key[1][w / 4])[w % 4]);
                scaled.word[h][w] = to_half_pair(q.x * s.x, q.y * s.y);
                offset[h] += q.x * z.x + q.y * z.y;
            }
            offset[h] = sum_of_quad(offset[h]);
        }
    }
    float scores[TILES][2][4] = {};
#pragma unroll
    for (int j = 0; j < CHUNKS; j++)
#pragma unroll
        for (int s = 0; s < 2; s++)
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    unsigned b0, b1;
                    key_pairs<BITS>(unit.key[tile][n], j, s, b0, b1);
                    const int w = 4 * j + 2 * s;
                    multiply_add<AS_HALF>(scores[tile][n], scaled.word[0][w], BOTH ? scaled.word[HALVES - 1][w] : 0, scaled.word[0][w + 1],
                                          BOTH ? scaled.word[HALVES - 1][w + 1] : 0, b0, b1);
                }
    float reached[2] = {run.largest[0], run.largest[1]};
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        const int sees = seen + (g + 8 * h) % ROWS;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    float& score = scores[tile][n][2 * h + c];
                    score = tile * TILE + 4 * t + 2 * n + c < sees ? (score + offset[h]) * scale : NOTHING;
                    reached[h] = fmaxf(reached[h], score);
                }
        reached[h] = largest_of_quad(reached[h]);
    }
    if (__any_sync(~0u, reached[0] > run.largest[0] || (BOTH && reached[1] > run.largest[1]))) {
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            const float shrink = reached[h] == NOTHING ? 1.f : exp2f(run.largest[h] - reached[h]);
            run.largest[h] = reached[h];
            run.weights[h] *= shrink;
            run.zeros[h] *= shrink;
            const float2 of_sums = of_own_slots(shrink, t);
#pragma unroll
            for (int i = 0; i < PAIRS; i++)
#pragma unroll
                for (int b = 0; b < 2; b++) run.sums[h][i][2 * b] *= of_sums.x, run.sums[h][i][2 * b + 1] *= of_sums.y;
        }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        unsigned weight[2][HALVES];  // B: [positions 4 t + 2 n and + 1][slot half]
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            const float base = run.largest[h] == NOTHING ? 0.f : run.largest[h];
#pragma unroll
            for (int n = 0; n < 2; n++) {
                float w[2];
#pragma unroll
                for (int c = 0; c < 2; c++) w[c] = exp2f(scores[tile][n][2 * h + c] - base);
                run.weights[h] += w[0] + w[1];
                if (BITS == 16) {
                    weight[n][h] = to_pair(w[0], w[1]);
                } else {
                    const unsigned* const params = reinterpret_cast<const unsigned*>(&scales.value[tile]);
                    const float2 s = half_pair_of(params[n]), z = half_pair_of(params[2 + n]);
                    run.zeros[h] += w[0] * z.x + w[1] * z.y;
                    weight[n][h] = to_half_pair(w[0] * s.x * WEIGHT_SCALE, w[1] * s.y * WEIGHT_SCALE);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            unsigned a[2][2];  // [dimension b][positions 2 n and + 1]
#pragma unroll
            for (int b = 0; b < 2; b++) value_pairs<BITS>(unit.value[tile], i, b, a[b][0], a[b][1]);
#pragma unroll
            for (int h = 0; h < HALVES; h++)
                multiply_add<AS_HALF>(run.sums[h][i], a[0][0], a[1][0], a[0][1], a[1][1], weight[0][h], weight[1][h]);
        }
    }
}

// The cache of a key head that is 16-bit: all of it (KV 16), or the ring.
struct Cache {
    xtype* keys;
    xtype* values;
    __device__ __forceinline__ static int place(int position) { return KV == 16 ? position : position % RING; }
};

// Put this step's keys and values into the tile that was loaded around them, and into the cache. `from`: the tile's first position.
__device__ __forceinline__ void insert_fresh(Unit<16>& unit, const Cache& cache, const xtype* key, const xtype* value, int stride, const xtype* cos,
                                             const xtype* sin, int from, int position, int capacity, int g, int t) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const int p = from + 4 * (g / 2) + g % 2 + 2 * n, r = p - position;
        if (r < 0 || r >= ROWS || p >= capacity) continue;
        Angles angles;
        angles.load(cos, sin, p, t);
        turn(key + (size_t)r * stride, angles, t, unit.key[0][n]);
#pragma unroll
        for (int j = 0; j < CHUNKS; j++)
            *reinterpret_cast<uint4*>(cache.keys + (size_t)Cache::place(p) * HEAD_DIM + 32 * j + 8 * t) = *reinterpret_cast<const uint4*>(unit.key[0][n] + 4 * j);
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const int p = from + 4 * t + e, r = p - position;
        if (r < 0 || r >= ROWS || p >= capacity) continue;
        unsigned fresh[PAIRS];  // all are loaded before the first is stored, or each would wait for the one before
#pragma unroll
        for (int i = 0; i < PAIRS; i++) fresh[i] = __ldcg(reinterpret_cast<const unsigned*>(value + (size_t)r * stride + 16 * i + 2 * g));
        unsigned short* const row = reinterpret_cast<unsigned short*>(cache.values + (size_t)(Cache::place(p) / 4) * HEAD_DIM * 4 + e);
#pragma unroll
        for (int i = 0; i < PAIRS; i++)
#pragma unroll
            for (int b = 0; b < 2; b++) {
                unsigned& word = unit.value[0][4 * i + 2 * b + e / 2];
                const unsigned one = b ? fresh[i] >> 16 : fresh[i] & 0xffff;
                word = e % 2 ? (word & 0xffff) | one << 16 : (word & 0xffff0000) | one;
                row[4 * (16 * i + 2 * g + b)] = one;
            }
    }
}

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

// Where a key code of dimension d stands in its position's row, and a value code in the row of its four positions: in codes.
__device__ __forceinline__ int key_place(int d) {
    constexpr int SHARE = HEAD_DIM / 4, VECTOR = SHARE < 128 / KV ? SHARE : 128 / KV;  // codes of a lane; of one of its vectors
    const int j = d / 32, t = d % 32 / 8, e = d % 8, mine = 8 * j + (KV == 4 ? e / 2 + 4 * (e % 2) : e);
    return mine / VECTOR * 4 * VECTOR + t * VECTOR + mine % VECTOR;
}
__device__ __forceinline__ int value_place(int d, int e) {
    constexpr int SHARE = HEAD_DIM / 2, VECTOR = SHARE < 128 / KV ? SHARE : 128 / KV;
    const int i = d / 16, g = d % 16 / 2, b = d % 2, mine = 8 * i + (KV == 4 ? 2 * b + e / 2 + 4 * (e % 2) : 4 * b + e);
    return mine / VECTOR * 8 * VECTOR + g * VECTOR + mine % VECTOR;
}

// Write `count` gathered codes as bytes, for 4 bits two in one.
__device__ __forceinline__ void write_codes(const unsigned char* codes, char* to, int count, int thread) {
    if (KV == 8)
        for (int i = thread; i < count; i += THREADS) to[i] = codes[i];
    else
        for (int i = thread; i < count / 2; i += THREADS) to[i] = codes[2 * i] | codes[2 * i + 1] << 4;
}

__device__ void quantize_group(Gathered& gathered, const Cache& cache, char* key_codes, char* value_codes, __half* key_params, __half* value_params,
                               int group, int thread) {
    const int first = group * QUANTUM, ring = first % RING;
    for (int d = thread; d < HEAD_DIM; d += THREADS) {
        float low = HUGE_VALUE, high = NOTHING;
        for (int p = 0; p < QUANTUM; p++) {
            const float v = to_float(cache.keys[(size_t)(ring + p) * HEAD_DIM + d]);
            low = fminf(low, v), high = fmaxf(high, v);
        }
        __half* const params = key_params + (size_t)group * 2 * HEAD_DIM + d;
        params_of(low, high, params, params + HEAD_DIM);
        const float scale = __half2float(params[0]), zero = __half2float(params[HEAD_DIM]);
        for (int p = 0; p < QUANTUM; p++)
            gathered.codes[p * HEAD_DIM + key_place(d)] = code_of(to_float(cache.keys[(size_t)(ring + p) * HEAD_DIM + d]), zero, scale);
    }
    __syncthreads();
    write_codes(gathered.codes, key_codes + (size_t)first * CODE_ROW, QUANTUM * HEAD_DIM, thread);
    const auto value = [&](int p, int d) { return to_float(cache.values[((size_t)(ring + p) / 4 * HEAD_DIM + d) * 4 + p % 4]); };
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
    for (int at = thread; at < QUANTUM * HEAD_DIM; at += THREADS) {
        const int p = at % QUANTUM, d = at / QUANTUM;
        gathered.codes[p / 4 * 4 * HEAD_DIM + value_place(d, p % 4)] = code_of(value(p, d), gathered.low[p], gathered.step[p]);
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
    for (int h = 0; h < HALVES; h++) {
        const float weights = sum_of_quad(run.weights[h]), zeros = sum_of_quad(run.zeros[h]);
        const float2 zero = of_own_slots(zeros, t);
        if (t == 0 && g + 8 * h < SLOTS) part.stats[g + 8 * h][0] = run.largest[h], part.stats[g + 8 * h][1] = weights;
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const int slot = 8 * h + 2 * t + c;
            if (slot >= SLOTS) continue;
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                const float z = c ? zero.y : zero.x;
                *reinterpret_cast<float2*>(&part.sums[slot][16 * i + 2 * g]) = make_float2(run.sums[h][i][c] + z, run.sums[h][i][2 + c] + z);
            }
        }
    }
}

// Sum `count` parts. `sums(k)`, `stats(k)` are part k's of this slot.
template <class Sums, class Stats>
__device__ __forceinline__ float2 together(int count, Sums sums, Stats stats, float* largest) {
    *largest = NOTHING;
    for (int k = 0; k < count; k++) *largest = fmaxf(*largest, stats(k, 0));
    float2 total = make_float2(0.f, 0.f);  // sum, weights
    for (int k = 0; k < count; k++) {
        const float share = stats(k, 0) == NOTHING ? 0.f : exp2f(stats(k, 0) - *largest);
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
extern "C" __global__ void __launch_bounds__(THREADS)
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
    __shared__ union {
        Part part[WARPS];
        Gathered gathered;
    } shared;
    if (KV != 16 && split == splits) {
        wait_for_previous_kernel();
        allow_next_kernel();
        if (position >= QUANTUM && position % QUANTUM < ROWS)
            quantize_group(shared.gathered, cache, key_codes, value_codes, key_params, value_params, position / QUANTUM - 1, thread);
        return;
    }
    const int units_coded = coded / Coded::POSITIONS;
    const int units = units_coded + (position + ROWS - coded + TILE - 1) / TILE;
    const int active = min(splits, (units + WARPS * UNITS - 1) / (WARPS * UNITS));
    if (split >= active) {
        wait_for_previous_kernel();
        allow_next_kernel();
        return;
    }
    const int first = split * WARPS + warp, all = active * WARPS;
    Unit<BITS> unit;
    const auto load_coded = [&](int u) { unit.load(key_codes, value_codes, u * Coded::POSITIONS, g, t); };
    const auto load_plain = [&](Unit<16>& plain, int u) {
        const int place = Cache::place(coded + (u - units_coded) * TILE);
        plain.load(reinterpret_cast<const char*>(cache.keys), reinterpret_cast<const char*>(cache.values), place, g, t);
    };
#if KV == 16
    if (first < units) load_plain(unit, first);
#else
    if (first < units_coded) load_coded(first);
#endif
    Angles angles;
    angles.load(cos, sin, min(position + g % ROWS, context - 1), t);
    wait_for_previous_kernel();
    allow_next_kernel();

    const int stride = (heads + 2 * kv_heads) * HEAD_DIM;
    Queries queries;
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        const int slot = g + 8 * h, r = slot % ROWS;  // of slots that are none any query will do
        if (h && ROWS > 1 && 8 % ROWS) angles.load(cos, sin, min(position + r, context - 1), t);
        turn(qkv + (size_t)r * stride + (kv_head * GROUP + min(slot / ROWS, GROUP - 1)) * HEAD_DIM, angles, t, queries.word[h]);
    }
    const xtype* const key = qkv + (heads + kv_head) * HEAD_DIM;
    const xtype* const value = key + kv_heads * HEAD_DIM;
    Running run;
    int u = first;
    const auto attend_plain = [&](Unit<16>& plain) {
        const int from = coded + (u - units_coded) * TILE;
        if (from + TILE > position)
            insert_fresh(plain, cache, key, value, stride, cos, sin, from, position, KV == 16 ? capacity : context, g, t);
        const Scales<16> none{};
        attend<16>(run, queries, plain, none, position + 1 - from, scale, g, t);
    };
#if KV == 16
    for (; u < units; u += all) {
        if (u != first) load_plain(unit, u);
        attend_plain(unit);
    }
#else
    for (; u < units_coded; u += all) {
        if (u != first) load_coded(u);
        Scales<BITS> scales;
        scales.load(key_params, value_params, u * Coded::POSITIONS, g, t);
        attend<BITS>(run, queries, unit, scales, Coded::POSITIONS, scale, g, t);
    }
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
        for (int i = 0; i < PAIRS; i++)
#pragma unroll
            for (int c = 0; c < 4; c++) run.sums[h][i][c] *= 1.f / WEIGHT_SCALE;
    for (; u < units; u += all) {
        Unit<16> plain;
        load_plain(plain, u);
        attend_plain(plain);
    }
#endif
    leave(shared.part[warp], run, g, t);
    __syncthreads();

    Part* const parts = reinterpret_cast<Part*>(partial) + (size_t)kv_head * splits;
    const auto finish = [&](int slot, int d, float2 total) {
        const int r = slot % ROWS, h = slot / ROWS;
        from_float(total.x / total.y, out + ((size_t)r * heads + kv_head * GROUP + h) * HEAD_DIM + d);
    };
    for (int at = thread; at < SLOTS * HEAD_DIM; at += THREADS) {
        const int slot = at / HEAD_DIM, d = at % HEAD_DIM;
        float largest;
        const float2 total = together(WARPS, [&](int k) { return shared.part[k].sums[slot][d]; }, [&](int k, int s) { return shared.part[k].stats[slot][s]; }, &largest);
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
