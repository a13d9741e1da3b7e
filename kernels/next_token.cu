// The tail of a decode step: logits to token, token to the x of the next step, without the host.
//
//     choice[r] = arg max over i of logits[r, i]                         (the lowest i of equals; a NaN is the largest)
//     accepted  = how many drafts in a row are right: tokens[r + 1] == choice[r] for r = 0, 1, ...
//     history[position + 1 + r] = choice[r]  for r = 0 .. accepted,  position += accepted + 1,  tokens[0] = the last of them
//     tokens[1..] = drafts for the next step,  x[r, :] = embedding[tokens[r], :]
//
// ROWS 1 has no drafts; with a temperature above 0 it samples softmax(logits / temperature) as the arg max of
// logits / temperature + Gumbel noise (Gumbel 1954; Maddison, Tarlow, Minka 2014), with Philox4x32-10 (Salmon et al. 2011)
// as the noise: key = seed, counter = (i / 4, position low, position high, 0), word i % 4. So a token depends on seed and position
// alone. A word has 32 bits: probabilities are right to about 2^-32.
//
// ROWS > 1 verifies drafts greedily (Leviathan, Kalman, Matias 2023: the tokens are those of decoding one by one) and drafts by
// prompt lookup (Saxena 2023): i is the latest place before `end`, the new position, where as many of the last NGRAM tokens
// stand as anywhere; the draft r places on copies history[i + r], and goes on with the copy where that passes `end`, as in LZ77
// (Ziv, Lempel 1977):
//
//     history   ... a b c d e ... a b c |            last 3: a b c; d e ... are the drafts
//                       i             end
//
// Without an occurrence the drafts are tokens[0] again. At `limit` the position stays and the same token is fed again.
//
// Blocks take 8 * THREADS logits of a row each and meet in a 64-bit atomic maximum of (value as an ordered integer, ~index), which
// no order of arrival can change. The block that comes last does the rest and leaves keys and counter at zero for the next launch.
//
// Bytes moved: ROWS * vocab * 2 of logits, ROWS * hidden * 4 of embedding and x, with ROWS > 1 up to 4 * position of history.
//
// Compiled once for each set of macros:
//     XTYPE    0 fp16, 1 bf16: dtype of logits, embedding and x
//     ROWS     tokens fed a step, 1 to 8
//     NGRAM    the longest match that a draft is looked up by, 1 to 7
//     THREADS  a block, a multiple of 32

#include <cuda_fp16.h>
#include <cuda_bf16.h>

#ifndef XTYPE
#define XTYPE 0
#endif
#ifndef ROWS
#define ROWS 1
#endif
#ifndef NGRAM
#define NGRAM 3
#endif
#ifndef THREADS
#define THREADS 256
#endif

#if XTYPE == 0
typedef __half xtype;
#else
typedef __nv_bfloat16 xtype;
#endif

constexpr int WARPS = THREADS / 32;
constexpr int VECTOR = 8;                  // values in 16 bytes
constexpr int SCANNED = 4;                 // 16-byte loads of history that a thread has in flight
constexpr int PLACE_BITS = 28;             // of a match: its place below, its length above
static_assert(THREADS % 32 == 0 && WARPS <= 32 && ROWS <= 32 && NGRAM >= 1 && NGRAM <= 7, "macros out of range");

__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

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

// A float as an unsigned integer of the same order: above 0 for every number, -0 equal to 0, NaN on top.
__device__ __forceinline__ unsigned ordered(float v) {
    const unsigned bits = __float_as_uint(v);
    if (v != v) return ~0u;
    if (v == 0.f) return 0x80000000u;
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Philox4x32-10: four random words from a counter of 128 bits and a key of 64.
__device__ __forceinline__ void philox(unsigned c[4], unsigned key0, unsigned key1) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const unsigned high0 = __umulhi(0xD2511F53u, c[0]), low0 = 0xD2511F53u * c[0];
        const unsigned high1 = __umulhi(0xCD9E8D57u, c[2]), low1 = 0xCD9E8D57u * c[2];
        c[0] = high1 ^ c[1] ^ key0;
        c[1] = low1;
        c[2] = high0 ^ c[3] ^ key1;
        c[3] = low0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

// Gumbel noise, -log of an exponential variate. The large values, which win, come from small uniforms, and those a float holds exactly
// enough; at the other end it must not reach 1.
__device__ __forceinline__ float gumbel(unsigned word) {
    const float uniform = fminf(fmaf((float)word, 0x1p-32f, 0x1p-33f), 1.f - 0x1p-24f);
    return -logf(-log1pf(-uniform));
}

// Turn the logits `first` to `first + 7` into scores to take the arg max of.
__device__ __forceinline__ void perturb(float values[VECTOR], int first, float temperature, unsigned long long seed, long long place) {
    const float scale = 1.f / temperature;
#pragma unroll
    for (int half = 0; half < VECTOR; half += 4) {
        unsigned words[4] = {(unsigned)(first + half) / 4, (unsigned)place, (unsigned)(place >> 32), 0};
        philox(words, (unsigned)seed, (unsigned)(seed >> 32));
#pragma unroll
        for (int k = 0; k < 4; k++) values[half + k] = fmaf(values[half + k], scale, gumbel(words[k]));
    }
}

// Read the logits `first` to `first + 7` of a row, as far as it goes.
__device__ __forceinline__ void load_logits(float values[VECTOR], const xtype* row, int first, int vocab) {
    if ((reinterpret_cast<size_t>(row) & 15) == 0 && first + VECTOR <= vocab) {
        const uint4 loaded = __ldcg(reinterpret_cast<const uint4*>(row + first));
        const xtype* const each = reinterpret_cast<const xtype*>(&loaded);
#pragma unroll
        for (int k = 0; k < VECTOR; k++) values[k] = to_float(each[k]);
    } else {
#pragma unroll
        for (int k = 0; k < VECTOR; k++) values[k] = first + k < vocab ? to_float(__ldcg(row + first + k)) : 0.f;
    }
}

__device__ __forceinline__ unsigned warp_max(unsigned v) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(~0u, v);
#else
#pragma unroll
    for (int step = 16; step; step /= 2) v = max(v, __shfl_xor_sync(~0u, v, step));
    return v;
#endif
}

// The largest value of a warp and its index, in all lanes. Of equals the lowest lane's: a higher lane has a higher index.
__device__ __forceinline__ void warp_best(unsigned& value, int& index) {
    const unsigned largest = warp_max(value);
    index = __shfl_sync(~0u, index, __ffs(__ballot_sync(~0u, value == largest)) - 1);
    value = largest;
}

// The same of the block, in warp 0 alone.
__device__ __forceinline__ void block_best(unsigned& value, int& index, int thread) {
    __shared__ unsigned values[WARPS];
    __shared__ int indices[WARPS];
    const int warp = thread / 32, lane = thread % 32;
    warp_best(value, index);
    if (lane == 0) values[warp] = value, indices[warp] = index;
    __syncthreads();
    if (warp) return;
    value = lane < WARPS ? values[lane] : 0;
    index = lane < WARPS ? indices[lane] : 0;
    warp_best(value, index);
}

// Warp 0 adds what its block found in row `row`. True, in all its lanes, in the last block of the launch; `choice` [ROWS] is then what
// all blocks found, and keys and counter are zero again.
__device__ __forceinline__ bool meet(unsigned value, int index, int row, unsigned long long* keys, unsigned* counter, int* choice, int lane) {
    unsigned last = 0;
    if (lane == 0) {
        atomicMax(keys + row, (unsigned long long)value << 32 | (unsigned)~index);
        __threadfence();
        const unsigned blocks = gridDim.x * gridDim.y;
        last = atomicInc(counter, blocks - 1) == blocks - 1;
        __threadfence();
    }
    last = __shfl_sync(~0u, last, 0);
    if (last && lane < ROWS) choice[lane] = ~(unsigned)atomicExch(keys + lane, 0ull);
    return last;
}

// How many of the last NGRAM tokens, `suffix` from the last back, stand at `place` of history and before it.
__device__ __forceinline__ int match_length(const int* history, const int* suffix, int place) {
    int length = 1;
    while (length < NGRAM && length <= place && __ldcg(history + place - length) == suffix[length]) length++;
    return length;
}

// The latest of the longest matches before `end`: length << PLACE_BITS | place, 0 where there is none, in all threads. From the end
// back, and no farther than the first whole match.
__device__ unsigned find_match(const int* history, const int* suffix, int end, int thread) {
    __shared__ unsigned found[WARPS];
    unsigned best = 0;
    for (int top = (end + 3) / 4; top > 0; top -= SCANNED * THREADS) {
        int4 loaded[SCANNED];
#pragma unroll
        for (int k = 0; k < SCANNED; k++) {
            const int vector = top - 1 - thread - k * THREADS;
            loaded[k] = vector >= 0 ? __ldcg(reinterpret_cast<const int4*>(history) + vector) : make_int4(-1, -1, -1, -1);
        }
#pragma unroll
        for (int k = 0; k < SCANNED; k++) {
            const int first = 4 * (top - 1 - thread - k * THREADS);
            const int four[4] = {loaded[k].x, loaded[k].y, loaded[k].z, loaded[k].w};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int place = first + e;
                if (place >= 0 && place < end && four[e] == suffix[0])
                    best = max(best, (unsigned)match_length(history, suffix, place) << PLACE_BITS | place);
            }
        }
        if (__syncthreads_or(best >> PLACE_BITS == NGRAM)) break;
    }
    best = warp_max(best);
    if (thread % 32 == 0) found[thread / 32] = best;
    __syncthreads();
    return warp_max(thread % 32 < WARPS ? found[thread % 32] : 0);
}

// A token that is none must not read past the embedding.
__device__ __forceinline__ int valid(int token, int vocab) { return (int)min((unsigned)token, (unsigned)(vocab - 1)); }

// Take the accepted tokens over into the state and leave in fed[0] the token to feed next. One thread. Returns the new position.
__device__ __forceinline__ int accept(const int* choice, int* fed, int place, int limit, int vocab, long long* tokens, long long* position,
                                      int* history, long long* made) {
    int accepted = 0;
    while (accepted < ROWS - 1 && fed[accepted + 1] == choice[accepted]) accepted++;
    const int end = min(place + accepted + 1, limit);
    fed[0] = valid(end > place ? choice[end - place - 1] : fed[0], vocab);
    for (int r = 0; r <= accepted && place + r <= limit; r++) history[place + 1 + r] = choice[r];
    tokens[0] = fed[0];
    *position = end;
    atomicAdd(reinterpret_cast<unsigned long long*>(made), (unsigned long long)(accepted + 1));  // unlike +=, nobody waits for it
    return end;
}

// x[r, :] = embedding[fed[r], :]
__device__ __forceinline__ void copy_embedding(const xtype* __restrict__ embedding, xtype* __restrict__ x, const int* fed, int rows, int hidden,
                                               int thread) {
    const bool wide = hidden % VECTOR == 0 && ((reinterpret_cast<size_t>(embedding) | reinterpret_cast<size_t>(x)) & 15) == 0;
    if (wide) {
        const int vectors = hidden / VECTOR;
#pragma unroll 4
        for (int at = thread; at < rows * vectors; at += THREADS) {
            const int row = ROWS == 1 ? 0 : at / vectors, column = at - row * vectors;
            reinterpret_cast<uint4*>(x)[at] = __ldg(reinterpret_cast<const uint4*>(embedding + (size_t)fed[row] * hidden) + column);
        }
    } else {
        for (int at = thread; at < rows * hidden; at += THREADS) x[at] = embedding[(size_t)fed[at / hidden] * hidden + at % hidden];
    }
}

// x = embedding[tokens], once before the first step. One block.
extern "C" __global__ void __launch_bounds__(THREADS) embed(
    const long long* tokens,    // [ROWS]
    const xtype* embedding,     // [vocab, hidden]
    xtype* x,                   // [ROWS, hidden], written
    int vocab, int hidden) {
    __shared__ int fed[ROWS];
    const int thread = threadIdx.x;
    wait_for_previous_kernel();
    allow_next_kernel();
    if (thread < ROWS) fed[thread] = valid((int)__ldcg(tokens + thread), vocab);
    __syncthreads();
    copy_embedding(embedding, x, fed, ROWS, hidden, thread);
}

// Grid: ceil(vocab / (8 * THREADS)) x ROWS blocks.
extern "C" __global__ void __launch_bounds__(THREADS) next_token(
    const xtype* logits,              // [ROWS, vocab]
    const xtype* embedding,           // [vocab or more, hidden]
    xtype* x,                         // [ROWS, hidden], written
    long long* tokens,                // [ROWS], the tokens of this step, then those of the next
    long long* position,              // [1], cache slot of tokens[0]
    int* history,                     // [limit + 2 or more, and 2 more for whole vectors], token by cache slot
    long long* made,                  // [1], tokens made since the prefill
    const float* temperature,         // [1], 0 for the arg max; not read with ROWS > 1
    const unsigned long long* seed,   // [1], not read with ROWS > 1
    unsigned long long* keys,         // [ROWS], zero between launches
    unsigned* counter,                // [1], zero between launches
    int vocab, int hidden,
    int limit) {                      // the last value of position
    __shared__ int choice[ROWS], fed[ROWS], suffix[NGRAM];
    __shared__ int end, is_last;
    const int thread = threadIdx.x, row = blockIdx.y;
    const int first = VECTOR * (blockIdx.x * THREADS + thread);
    wait_for_previous_kernel();
    allow_next_kernel();

    float values[VECTOR];
    load_logits(values, logits + (size_t)row * vocab, first, vocab);
    const int place = (int)min(max(__ldcg(position), 0ll), (long long)limit);
    if (thread < ROWS) fed[thread] = (int)__ldcg(tokens + thread);
    if (ROWS == 1) {
        const float warmth = __ldcg(temperature);
        if (warmth > 0.f) perturb(values, first, warmth, __ldcg(seed), place);
    }
    unsigned value = 0;  // below every number: what the padding counts as
    int index = 0;
#pragma unroll
    for (int k = 0; k < VECTOR; k++) {
        const unsigned here = first + k < vocab ? ordered(values[k]) : 0;
        if (here > value) value = here, index = first + k;
    }
    block_best(value, index, thread);
    if (thread < 32) {
        const bool last = meet(value, index, row, keys, counter, choice, thread);
        __syncwarp();
        if (thread == 0) {
            is_last = last;
            if (last) end = accept(choice, fed, place, limit, vocab, tokens, position, history, made);
        }
    }
    __syncthreads();
    if (!is_last) return;

    // One block from here on.
    if (ROWS > 1) {
        if (thread < NGRAM) suffix[thread] = thread == 0 ? fed[0] : end >= thread ? __ldcg(history + end - thread) : -1;
        __syncthreads();
        const unsigned match = find_match(history, suffix, end, thread);
        const int at = match & ((1u << PLACE_BITS) - 1);
        if (thread >= 1 && thread < ROWS) {
            const int source = match ? at + 1 + (thread - 1) % (end - at) : end;
            fed[thread] = valid(source == end ? fed[0] : __ldcg(history + source), vocab);
            tokens[thread] = fed[thread];
        }
        __syncthreads();
    }
    copy_embedding(embedding, x, fed, ROWS, hidden, thread);
}
