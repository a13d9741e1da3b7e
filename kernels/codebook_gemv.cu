// GEMV from codebook weights for 1 to 8 rows of x, decoded inside the multiply and never materialised:
//
//     y[r, o] = sum_i codebook[o, index[o, i]] * x[r, i] + bias[o] + residual[r, o]
//
// and for a decode step, where a kernel of its own for them would cost more than they do:
//     NORM      x is first normalised: x[r, i] * rstd[r] * norm[i], rstd = (mean of the squares of row r + eps)^-1/2
//     SILU      the first half of the channels are gates: y[r, o] = silu(y[r, o]) for them
//     PAIRED    x is stored as [ROWS, 2 * in_features], factors of the input: x[r, i] * x[r, in_features + i]
// SILU where gates and ups are one product and PAIRED in the product after it make silu(gate) * up without a kernel between, and
// without a block that holds a gate and its up. All round where transformers' modules round.
//
// Compiled once for each set of macros:
//     BITS      8, 4, 3 or 2: bits of a stored index
//     XTYPE     0 fp16, 1 bf16, 2 fp32: dtype of x, bias, residual and y
//     ROWS      rows of x, 1 to 8
//     CHANNELS  output channels a block, 32 or 64
//     STRIDE    bytes from one table entry to the next, 256 or (CHANNELS 32 only) 128
//     WARPS     warps a block
//     AHEAD     steps that a warp has in flight
//     BLOCKS    blocks that are to fit a multiprocessor; bounds the registers
//     NORM, SILU, PAIRED  1: as above (fp16 and bf16; NORM and PAIRED: in_features a multiple of 8, x and norm at multiples of 16 bytes)
//     LATE      1: the next kernel may start only once the one before this has finished, so what that one wrote is there from
//               the next one's first instruction on
//
// Packed indices. A tile is 32 output channels (one a lane); a lane's 16-byte load holds consecutive inputs of its
// channel and a warp's load is one contiguous 512 bytes:
//
//     codes[out/32][in/STEP][VECTORS][32 lanes][16 bytes]
//
//     BITS  STEP  VECTORS   inside the 16 bytes, lowest bits first
//      8     16      1      one index a byte
//      4     32      1      a pair of indices a byte
//      3    128      3      twelve 32-bit words; of each three words, byte k holds in its low 6 bits a pair, and the upper
//                           2 bits of the three bytes k make a pair of the fourth, virtual word
//      2     64      1      byte k of a word holds pair k in its low half and pair 4 + k in its high half
//
// So after at most one mask and shift a *word* is four pairs of indices, one a byte, of 8 consecutive inputs. Both `out` and
// `in` are padded (to 32 and to STEP); x is zero in the padding.
//
// Pair table. The block keeps for each of its channels all pairs of weights as half2 in shared memory, entry p of a
// channel at p * STRIDE + 4 * channel. The bank is the lane, so a lookup never conflicts, whatever the indices are, and one
// 4-byte load yields two exact fp16 weights. With STRIDE 256 the address is one byte-permute: the pair becomes byte 1, the
// lane is byte 0. (8 bits: a single weight an entry, two lookups make a pair.)
//
// Multiply-add on tensor cores, with a B that is diagonal. In mma.m16n8k16 a row of A is spread over the four lanes of a
// quad (slots of k), but here each lane of the quad is a channel of its own. So x goes into B only where the column (mod 4)
// is the slot:
//
//     A, row g      lane 4g: k 0 1 8 9 | lane 4g+1: k 2 3 10 11 | lane 4g+2: k 4 5 12 13 | lane 4g+3: k 6 7 14 15
//     B, column n   x[i..i+3] in the k of slot n mod 4, zero elsewhere
//     D[g][n]       the sum of lane 4g + n mod 4 over these 4 inputs
//
// Rows g + 8 of A and columns 4 to 7 are a second stream. CHANNELS 64: rows g + 8 are a second channel of the lane, columns 4
// to 7 a second row of x. CHANNELS 32: both are every second word of the lane's inputs, and only the two blocks of D on the
// diagonal are used. An MMA does the work of 4 HFMA2 and 8 conversions a row, sums in fp32, and serves two rows at the price of one.
//
// bf16 and fp32 activations are scaled by a power of two so that the largest of a row lies in [1, 2) before they become
// fp16, and the scale is undone at the end; fp32 is the sum of two such planes, which are two rows here.
// Warps meet in shared memory in a fixed order, so a result is bit-identical from run to run.
//
// Bytes moved per output channel: in*BITS/8 of indices + 2*n_codes of codebook + ROWS*sizeof(y); x once a block, from L2.

#include <cuda_fp16.h>
#include <cuda_bf16.h>

#ifndef BITS
#define BITS 4
#endif
#ifndef XTYPE
#define XTYPE 0
#endif
#ifndef ROWS
#define ROWS 1
#endif
#ifndef CHANNELS
#define CHANNELS 32
#endif
#ifndef STRIDE
#define STRIDE 256
#endif
#ifndef WARPS
#define WARPS 32
#endif
#ifndef AHEAD
#define AHEAD 2
#endif
#ifndef BLOCKS
#define BLOCKS 1
#endif
#ifndef NORM
#define NORM 0
#endif
#ifndef SILU
#define SILU 0
#endif
#ifndef PAIRED
#define PAIRED 0
#endif
#ifndef LATE
#define LATE 0
#endif

#if XTYPE == 0
typedef __half xtype;
#elif XTYPE == 1
typedef __nv_bfloat16 xtype;
#else
typedef float xtype;
#endif

constexpr int LANES = 32;
constexpr int STEP = BITS == 8 ? 16 : BITS == 4 ? 32 : BITS == 3 ? 128 : 64;  // inputs a step
constexpr int VECTORS = BITS == 3 ? 3 : 1;                                    // 16-byte loads a step and lane
constexpr int TILES = CHANNELS / LANES;
constexpr int WORDS = STEP / 8;                                   // of 8 inputs, in a lane's step
constexpr int STREAM_WORDS = TILES == 2 ? WORDS : WORDS / 2;      // that one of the two streams takes
constexpr int X_STRIDE = TILES == 2 ? 16 : 32;                    // bytes of x from a word of a stream to its next
constexpr int CODES = 1 << BITS;
constexpr int ENTRIES = BITS == 8 ? CODES : CODES * CODES;
constexpr int TABLE_BYTES = ENTRIES * STRIDE;
constexpr int SHARES = (BITS == 8 ? 32 : CODES) * TILES;           // parts of the table, one for a warp at a time
constexpr int OWN_SHARES = (SHARES + WARPS - 1) / WARPS;
constexpr int THREADS = LANES * WARPS;
constexpr int ROUND = WARPS * AHEAD;                              // steps of one turn of all warps
constexpr int PLANES = XTYPE == 2 ? 2 : 1;
constexpr int STAGED = ROWS * PLANES;                             // rows of fp16 in shared memory
constexpr int GROUPS = TILES == 2 ? (STAGED + 1) / 2 : STAGED;    // MMAs for the same A
constexpr int CHAINS = GROUPS == 1 ? 2 : 1;                        // sums an MMA alternates between, for it waits for its own
constexpr unsigned TABLE_AT = 1024;                               // shared address of the table, beyond what the system reserves
constexpr int PITCH_PAD = STAGED > 1 ? 32 : 0;                    // halves between staged rows, so that they start in other banks
constexpr int NORM_AHEAD = WARPS <= 8 ? 2 : 1;                    // vectors of norm that a thread fetches early: of 4096 inputs all
static_assert(!(NORM || SILU || PAIRED) || XTYPE != 2, "what a decode step adds works on 16-bit x");
static_assert(!(NORM && PAIRED), "x is normalised or has two factors");
constexpr unsigned X_AT = TABLE_AT + TABLE_BYTES;
constexpr float LOW_PLANE = 1.f / 2048;                           // the second plane of fp32 holds what the first lost, times 2048

__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ void from_float(float v, __half* out) { *out = __float2half_rn(v); }
__device__ __forceinline__ void from_float(float v, __nv_bfloat16* out) { *out = __float2bfloat16_rn(v); }
__device__ __forceinline__ void from_float(float v, float* out) { *out = v; }

// Programmatic dependent launch: a no-op below sm_90 and in launches without the attribute.
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

// Weights are read once: keep them out of L1. A relaxed load, because the assembler moves a plain one below `wait_for_previous_kernel`.
__device__ __forceinline__ uint4 load_once(const uint4* address) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
}

// The entry that byte k of `word` names; `own` is 4 * channel. The table's address is part of the instruction.
__device__ __forceinline__ unsigned look_up(unsigned word, int k, unsigned own) {
#if STRIDE == 256
    const unsigned at = __byte_perm(word, own, 0x7604 | k << 4);
#else
    const unsigned at = ((k == 0 ? word << 7 : word >> (8 * k - 7)) & 0x7f80) | own;
#endif
    unsigned entry;
    asm volatile("ld.shared.b32 %0, [%1 + %2];" : "=r"(entry) : "r"(at), "n"(TABLE_AT));
    return entry;
}

// Load 8 inputs on the lanes of the diagonal; on the others `v` stays as it is, zero.
__device__ __forceinline__ void load_x(uint4& v, unsigned address, bool reads) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.shared.v4.b32 {%0, %1, %2, %3}, [%4]; }"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "r"(address), "r"((unsigned)reads));
}

// sums += A B; a0, a2 are row g of A, a1, a3 row g + 8.
__device__ __forceinline__ void multiply_add(float sums[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(a0), "r"(a1), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(a2), "r"(a3), "r"(b1));
#endif
}

// Word j of a lane's step as four bytes, each a pair (8 bits: the first half of a word of 8 inputs is `words[2 * j]`).
__device__ __forceinline__ unsigned word_of(const uint4* codes, int j) {
    const unsigned* words = reinterpret_cast<const unsigned*>(codes);
#if BITS == 3
    const unsigned* w = words + 3 * (j / 4);
    if (j % 4 < 3) return w[j % 4] & 0x3f3f3f3f;
    return (w[0] >> 6 & 0x03030303) | (w[1] >> 4 & 0x0c0c0c0c) | (w[2] >> 2 & 0x30303030);
#elif BITS == 2
    return words[j / 2] >> (4 * (j % 2)) & 0x0f0f0f0f;
#else
    return words[j];
#endif
}

// The four pairs of weights of word j.
__device__ __forceinline__ void look_up_word(const uint4* codes, int j, unsigned own, unsigned pairs[4]) {
#if BITS == 8
    unsigned single[8];
#pragma unroll
    for (int k = 0; k < 8; k++) single[k] = look_up(word_of(codes, 2 * j + k / 4), k % 4, own);
#pragma unroll
    for (int k = 0; k < 4; k++) pairs[k] = __byte_perm(single[2 * k], single[2 * k + 1], 0x5410);
#else
    const unsigned word = word_of(codes, j);
#pragma unroll
    for (int k = 0; k < 4; k++) pairs[k] = look_up(word, k, own);
#endif
}

// The entries of one channel that this warp turns into its shares of the table: fetched early, stored later.
struct Entries {
#if BITS == 8
    uint4 eight[OWN_SHARES];
#else
    alignas(16) __half low[CODES];
    __half high[OWN_SHARES];
#endif
};

__device__ __forceinline__ __half entry_or_zero(const __half* own, int e, int n_codes) { return e < n_codes ? own[e] : __half(0.f); }

__device__ __forceinline__ void fetch(Entries& entries, const __half* __restrict__ codebook, int tile, int out_features, int n_codes, int warp,
                                      int lane) {
    const int channel = min((tile * TILES + warp % TILES) * LANES + lane, out_features - 1);
    const __half* own = codebook + (size_t)channel * n_codes;
    const bool wide = n_codes % 8 == 0 && (reinterpret_cast<size_t>(codebook) & 15) == 0;
#if BITS == 8
#pragma unroll
    for (int i = 0; i < OWN_SHARES; i++) {
        const int e = 8 * ((warp + i * WARPS) / TILES);
        if (wide && e < n_codes) {
            entries.eight[i] = *reinterpret_cast<const uint4*>(own + e);
        } else {
            __half* const each = reinterpret_cast<__half*>(&entries.eight[i]);
#pragma unroll
            for (int k = 0; k < 8; k++) each[k] = entry_or_zero(own, e + k, n_codes);
        }
    }
#else
    if (CODES >= 8 && wide && n_codes == CODES) {
#pragma unroll
        for (int k = 0; k < CODES / 8; k++) reinterpret_cast<uint4*>(entries.low)[k] = reinterpret_cast<const uint4*>(own)[k];
    } else {
#pragma unroll
        for (int k = 0; k < CODES; k++) entries.low[k] = entry_or_zero(own, k, n_codes);
    }
#pragma unroll
    for (int i = 0; i < OWN_SHARES; i++) entries.high[i] = entry_or_zero(own, (warp + i * WARPS) / TILES, n_codes);
#endif
}

__device__ __forceinline__ void store(const Entries& entries, char* table, int warp, int lane) {
    char* const column = table + 4 * (warp % TILES * LANES + lane);
#pragma unroll
    for (int i = 0; i < OWN_SHARES; i++) {
        const int share = (warp + i * WARPS) / TILES;
        if (warp + i * WARPS >= SHARES) break;
#if BITS == 8
        const __half* const each = reinterpret_cast<const __half*>(&entries.eight[i]);
#pragma unroll
        for (int k = 0; k < 8; k++) *reinterpret_cast<__half2*>(column + (8 * share + k) * STRIDE) = __half2half2(each[k]);
#else
#pragma unroll
        for (int k = 0; k < CODES; k++)
            *reinterpret_cast<__half2*>(column + (share * CODES + k) * STRIDE) = __halves2half2(entries.low[k], entries.high[i]);
#endif
    }
}

// The power of two that brings the largest of a row into [1, 2). All threads call; `scratch` holds WARPS floats.
__device__ __forceinline__ int exponent_of(const xtype* __restrict__ x, int in_features, float* scratch, int warp, int lane) {
    float largest = 0.f;
    for (int i = warp * LANES + lane; i < in_features; i += THREADS) largest = fmaxf(largest, fabsf(to_float(__ldcg(x + i))));
#pragma unroll
    for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    if (lane == 0) scratch[warp] = largest;
    __syncthreads();
    for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, scratch[w]);
    __syncthreads();
    return largest > 0.f && isfinite(largest) ? ilogbf(largest) : 0;
}

__device__ __forceinline__ void copy_ahead(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from));
#else
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
#endif
}
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

__device__ __forceinline__ float round_to_x(float v) {
    xtype rounded;
    from_float(v, &rounded);
    return to_float(rounded);
}

#if XTYPE == 1
typedef __nv_bfloat162 xpair;
__device__ __forceinline__ float2 to_floats(xpair v) { return __bfloat1622float2(v); }
__device__ __forceinline__ xpair from_floats(float a, float b) { return __floats2bfloat162_rn(a, b); }
// What fp16 cannot hold becomes its largest: without an exponent of its own a row would be infinite for one such value.
__device__ __forceinline__ __half2 to_halves(xpair v) {
    const float2 f = __bfloat1622float2(v);
    return __floats2half2_rn(fminf(fmaxf(f.x, -65504.f), 65504.f), fminf(fmaxf(f.y, -65504.f), 65504.f));
}
#else
typedef __half2 xpair;
__device__ __forceinline__ float2 to_floats(xpair v) { return __half22float2(v); }
__device__ __forceinline__ xpair from_floats(float a, float b) { return __floats2half2_rn(a, b); }
__device__ __forceinline__ __half2 to_halves(xpair v) { return v; }
#endif

// Eight 16-bit values in a vector, as pairs.
union Eight {
    uint4 all;
    xpair x[4];
    __half2 half[4];
    __device__ Eight() {}
};

// Stage inputs [first, first + count) of one row as they are, zero from in_features on. The copies may still be under way.
__device__ __forceinline__ void stage_raw(const xtype* __restrict__ x, int in_features, int first, int count, __half* staged, int thread) {
    for (int i = 8 * thread; i < count; i += 8 * THREADS) {
        if (first + i < in_features) copy_ahead(staged + i, x + first + i);
        else *reinterpret_cast<uint4*>(staged + i) = make_uint4(0, 0, 0, 0);
    }
}

__device__ __forceinline__ float squares(const Eight& eight) {
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const float2 v = to_floats(eight.x[k]);
        sum += v.x * v.x + v.y * v.y;
    }
    return sum;
}

// This thread's part of the sum of squares of a row: of what it staged itself, or from memory where not all of x is staged.
__device__ __forceinline__ float own_squares(const __half* staged, const xtype* __restrict__ x, int in_features, int count, int thread) {
    const bool whole = count >= in_features;
    float sum = 0.f;
    for (int i = 8 * thread; i < in_features; i += 8 * THREADS) {
        Eight eight;
        eight.all = whole ? *reinterpret_cast<const uint4*>(staged + i) : __ldcg(reinterpret_cast<const uint4*>(x + i));
        sum += squares(eight);
    }
    return sum;
}

// rstd [ROWS] from each thread's sums of squares. All threads call; `scratch` holds ROWS * WARPS floats.
__device__ __forceinline__ void reciprocal_roots(float rstd[ROWS], float eps, int in_features, float* scratch, int warp, int lane) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int step = 16; step; step /= 2) rstd[r] += __shfl_xor_sync(~0u, rstd[r], step);
        if (lane == 0) scratch[r * WARPS + warp] = rstd[r];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += scratch[r * WARPS + w];
        rstd[r] = rsqrtf(sum / in_features + eps);
    }
}

__device__ __forceinline__ void normalise_eight(__half* staged, const Eight& weight, float rstd) {
    Eight eight;
    eight.all = *reinterpret_cast<const uint4*>(staged);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const float2 v = to_floats(eight.x[k]);
        eight.half[k] = to_halves(__hmul2(from_floats(v.x * rstd, v.y * rstd), weight.x[k]));
    }
    *reinterpret_cast<uint4*>(staged) = eight.all;
}

// Normalise what this thread staged itself of inputs [first, first + count).
__device__ __forceinline__ void normalise(__half* staged, const xtype* __restrict__ norm, float rstd, int in_features, int first, int count,
                                          int from) {
    for (int i = from; i < count && first + i < in_features; i += 8 * THREADS) {
        Eight weight;
        weight.all = *reinterpret_cast<const uint4*>(norm + first + i);
        normalise_eight(staged + i, weight, rstd);
    }
}

// Stage inputs [first, first + count) of one row of two factors.
__device__ __forceinline__ void stage_product(const xtype* __restrict__ x, int in_features, int first, int count, __half* staged, int thread) {
#pragma unroll 2
    for (int i = 8 * thread; i < count; i += 8 * THREADS) {
        Eight a, b;
        a.all = b.all = make_uint4(0, 0, 0, 0);
        if (first + i < in_features) {
            a.all = __ldcg(reinterpret_cast<const uint4*>(x + first + i));
            b.all = __ldcg(reinterpret_cast<const uint4*>(x + in_features + first + i));
        }
#pragma unroll
        for (int k = 0; k < 4; k++) a.half[k] = to_halves(__hmul2(a.x[k], b.x[k]));
        *reinterpret_cast<uint4*>(staged + i) = a.all;
    }
}

// Stage inputs [first, first + count) of one row as fp16, zero from in_features on; fp32 as two planes `plane` halves apart.
// The copies may still be under way: `wait_for_copies`.
__device__ __forceinline__ void stage_row(const xtype* __restrict__ x, int in_features, int first, int count, __half* staged, int plane,
                                          int exponent, int thread) {
#if XTYPE == 0
    if (in_features % 8 == 0 && (reinterpret_cast<size_t>(x) & 15) == 0) {
        for (int i = 8 * thread; i < count; i += 8 * THREADS) {
            if (first + i < in_features) copy_ahead(staged + i, x + first + i);
            else *reinterpret_cast<uint4*>(staged + i) = make_uint4(0, 0, 0, 0);
        }
    } else {
#pragma unroll 1
        for (int i = thread; i < count; i += THREADS) staged[i] = first + i < in_features ? __ldcg(x + first + i) : __half(0.f);
    }
#else
    for (int i = thread; i < count; i += THREADS) {
        const float value = first + i < in_features ? ldexpf(to_float(__ldcg(x + first + i)), -exponent) : 0.f;
        const __half high = __float2half_rn(value);
        staged[i] = high;
        if (PLANES == 2) staged[plane + i] = __float2half_rn((value - __half2float(high)) / LOW_PLANE);
    }
#endif
}

// Leave a warp's sums in shared memory, their rows' scale undone: partial [WARPS][STAGED][CHANNELS].
__device__ __forceinline__ void leave_sums(const float sums[GROUPS][CHAINS][4], const int exponents[ROWS], float* partial, int warp, int lane) {
    const int first = 4 * (lane >> 2) + 2 * (lane & 1);  // of two neighbouring channels
    const bool second = lane >> 1 & 1;                   // whether this lane's columns of D are 4 to 7
#pragma unroll
    for (int n = 0; n < GROUPS; n++) {
        float own[4];
#pragma unroll
        for (int c = 0; c < 4; c++) own[c] = CHAINS == 2 ? sums[n][0][c] + sums[n][CHAINS - 1][c] : sums[n][0][c];
        if (XTYPE != 0) {
            const int row = TILES == 2 ? 2 * n / PLANES : n / PLANES;
            const int exponent = TILES == 2 && PLANES == 1 && second && row + 1 < ROWS ? exponents[min(row + 1, ROWS - 1)] : exponents[row];
#pragma unroll
            for (int c = 0; c < 4; c++) own[c] = ldexpf(own[c], exponent);
        }
        if (TILES == 2) {
            const int row = 2 * n + second;
            if (row < STAGED)
#pragma unroll
                for (int c = 0; c < 4; c++) partial[(warp * STAGED + row) * CHANNELS + 32 * (c / 2) + first + c % 2] = own[c];
        } else {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float both = second ? own[2 + c] : own[c];
                both += __shfl_xor_sync(~0u, both, 2);
                if (!second) partial[(warp * STAGED + n) * CHANNELS + first + c] = both;
            }
        }
    }
}

// One result of the block from all its warps, the planes of fp32 put together.
__device__ __forceinline__ float sum_of_warps(const float* partial, int row, int channel) {
    float total = 0.f;
#pragma unroll
    for (int plane = PLANES - 1; plane >= 0; plane--) {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += partial[(w * STAGED + row * PLANES + plane) * CHANNELS + channel];
        total += plane ? sum * LOW_PLANE : sum;
    }
    return total;
}

// codes     [out/32][steps][VECTORS][32] of 16 bytes, as pictured above
// codebook  fp16 [out_features, n_codes]
// x         [ROWS, in_features], PAIRED twice as wide; bias [out_features] or null; residual like y or null; y [ROWS, out_features]
// norm      [in_features], and eps: NORM only
// rounds    turns that all warps take through the inputs: ceil(steps / (WARPS * AHEAD)); panel: those whose x is in shared memory at once
// grid      ceil(out_features / CHANNELS) blocks of (32, WARPS) threads
// shared    TABLE_AT + TABLE_BYTES + STAGED * (2 * STEP * ROUND * panel + 2 * PITCH_PAD) + 4 * WARPS * STAGED * CHANNELS
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
codebook_gemv(const uint4* __restrict__ codes, const __half* __restrict__ codebook, const xtype* __restrict__ x,
              const xtype* __restrict__ bias, const xtype* __restrict__ residual, xtype* __restrict__ y, int in_features,
              int out_features, int steps, int n_codes, int rounds, int panel, const xtype* __restrict__ norm, float eps) {
    extern __shared__ __align__(16) char dynamic_shared[];
    const unsigned start = (unsigned)__cvta_generic_to_shared(dynamic_shared);
    if (start > TABLE_AT) __trap();
    char* const table = dynamic_shared + (TABLE_AT - start);
    const int lane = threadIdx.x, warp = threadIdx.y, thread = warp * LANES + lane, tile = blockIdx.x;
    if (!LATE) allow_next_kernel();
    Eight norm_ahead[NORM_AHEAD];  // before the weights, or it would come after them
#pragma unroll
    for (int k = 0; k < NORM_AHEAD; k++)
        if (NORM && 8 * (thread + k * THREADS) < in_features) norm_ahead[k].all = load_once(reinterpret_cast<const uint4*>(norm) + thread + k * THREADS);
    Entries entries;
    fetch(entries, codebook, tile, out_features, n_codes, warp, lane);
    constexpr int STEP_VECTORS = VECTORS * LANES;
    const size_t to_other = TILES == 2 && (2 * tile + 1) * LANES < out_features ? (size_t)steps * STEP_VECTORS : 0;
    const uint4* next = codes + (size_t)tile * TILES * steps * STEP_VECTORS + warp * STEP_VECTORS + lane;
    int left = steps - warp;  // steps from `next` to the end of the tile
    uint4 ahead[AHEAD][TILES][VECTORS];
    const auto load = [&](int k) {
        if (k * WARPS < left)
#pragma unroll
            for (int s = 0; s < TILES; s++)
#pragma unroll
                for (int v = 0; v < VECTORS; v++) ahead[k][s][v] = load_once(next + (s ? to_other : 0) + k * WARPS * STEP_VECTORS + v * LANES);
    };
#pragma unroll
    for (int k = 0; k < AHEAD; k++) load(k);

    __half* const staged = reinterpret_cast<__half*>(table + TABLE_BYTES);
    const int pitch = panel * ROUND * STEP + PITCH_PAD;  // halves from one staged row to the next
    float* const partial = reinterpret_cast<float*>(staged + STAGED * pitch);
    wait_for_previous_kernel();
    if (LATE) allow_next_kernel();
    constexpr bool SCALED = XTYPE != 0 && !NORM && !PAIRED;  // what a step makes on the way here needs no exponent
    int exponents[ROWS] = {};
    if (SCALED)
#pragma unroll
        for (int r = 0; r < ROWS; r++) exponents[r] = exponent_of(x + (size_t)r * in_features, in_features, partial, warp, lane);
    float rstd[ROWS];
    const auto stage_rows = [&](int first, int count) {
#pragma unroll(SCALED ? ROWS : 1)
        for (int r = 0; r < ROWS; r++) {
            const xtype* const row = x + (size_t)r * in_features * (PAIRED ? 2 : 1);
            if (PAIRED) stage_product(row, in_features, first, count, staged + r * pitch, thread);
            else if (NORM) stage_raw(row, in_features, first, count, staged + r * pitch, thread);
            else stage_row(row, in_features, first, count, staged + r * PLANES * pitch, pitch, exponents[r], thread);
        }
    };
    const int whole = min(panel, rounds) * ROUND * STEP;
    stage_rows(0, whole);
    store(entries, table, warp, lane);  // while the copies are under way
    wait_for_copies();
    if (NORM) {  // a thread touches only what it copied itself, so it need not wait for the others
#pragma unroll
        for (int r = 0; r < ROWS; r++) rstd[r] = own_squares(staged + r * pitch, x + (size_t)r * in_features, in_features, whole, thread);
        reciprocal_roots(rstd, eps, in_features, partial, warp, lane);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int k = 0; k < NORM_AHEAD; k++)
                if (8 * (thread + k * THREADS) < min(whole, in_features)) normalise_eight(staged + r * pitch + 8 * (thread + k * THREADS), norm_ahead[k], rstd[r]);
            normalise(staged + r * pitch, norm, rstd[r], in_features, 0, whole, 8 * (thread + NORM_AHEAD * THREADS));
        }
    }
    __syncthreads();

    const int second = lane >> 4;                               // whether this lane's columns of B are 4 to 7
    const bool diagonal = (lane >> 2 & 3) == (lane & 3);
    unsigned x_at[GROUPS];                                      // shared address of this lane's x for the warp's next step
    bool reads[GROUPS];
    const auto to_panel_start = [&] {
#pragma unroll
        for (int n = 0; n < GROUPS; n++) {
            const int row = TILES == 2 ? 2 * n + second : n;
            reads[n] = diagonal && row < STAGED;
            x_at[n] = X_AT + 2 * (row * pitch + warp * STEP + (TILES == 2 ? 0 : 8 * second));
        }
    };
    to_panel_start();
    uint4 inputs[2] = {};                                       // of B, in turns
    float sums[GROUPS][CHAINS][4] = {};
    const auto multiply = [&](int k) {
#pragma unroll
        for (int j = 0; j < STREAM_WORDS; j++) {
            unsigned first[4], other[4];
            look_up_word(ahead[k][0], TILES == 2 ? j : 2 * j, 4 * lane, first);
            look_up_word(ahead[k][TILES - 1], TILES == 2 ? j : 2 * j + 1, 4 * (lane + (TILES - 1) * LANES), other);
#pragma unroll
            for (int n = 0; n < GROUPS; n++) {
                uint4& b = inputs[(j * GROUPS + n) % 2];
                load_x(b, x_at[n] + 2 * STEP * WARPS * k + X_STRIDE * j, reads[n]);
                multiply_add(sums[n][0], first[0], other[0], first[1], other[1], b.x, b.y);
                multiply_add(sums[n][CHAINS - 1], first[2], other[2], first[3], other[3], b.z, b.w);
            }
        }
    };
    for (int round = 0, in_panel = 0; round < rounds; round++, in_panel++) {
        if (in_panel == panel) {
            in_panel = 0;
            __syncthreads();
            const int first = round * ROUND * STEP, count = min(panel, rounds - round) * ROUND * STEP;
            stage_rows(first, count);
            wait_for_copies();
            if (NORM)
#pragma unroll
                for (int r = 0; r < ROWS; r++) normalise(staged + r * pitch, norm, rstd[r], in_features, first, count, 8 * thread);
            __syncthreads();
            to_panel_start();
        }
        const int here = left;
        next += ROUND * STEP_VECTORS;
        left -= ROUND;
        if (here > (AHEAD - 1) * WARPS) {  // a whole round without a branch
#pragma unroll
            for (int k = 0; k < AHEAD; k++) multiply(k), load(k);
        } else {
#pragma unroll
            for (int k = 0; k < AHEAD; k++)
                if (k * WARPS < here) multiply(k);
        }
#pragma unroll
        for (int n = 0; n < GROUPS; n++) x_at[n] += 2 * STEP * ROUND;
    }

    leave_sums(sums, exponents, partial, warp, lane);
    __syncthreads();
    for (int at = thread; at < ROWS * CHANNELS; at += THREADS) {
        const int row = at / CHANNELS, channel = tile * CHANNELS + at % CHANNELS;
        if (channel >= out_features) continue;
        float total = sum_of_warps(partial, row, at % CHANNELS);
        if (bias) total += to_float(bias[channel]);
        if (SILU && channel < out_features / 2) {
            const float gate = round_to_x(total);
            total = gate / (1.f + __expf(-gate));
        }
        const size_t place = (size_t)row * out_features + channel;
        if (residual) total += to_float(__ldcg(residual + place));
        from_float(total, y + place);
    }
}
