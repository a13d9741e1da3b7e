/* What the CPU kernels share: instruction sets by function attributes, the paths of a processor, threads, and memory.
 *
 * Every vector path is compiled by attributes (no -march flag), so that one library serves every x86 processor; the
 * caller chooses among the paths that trapetum_runs(). On aarch64 NEON is part of the base and chosen at compile time.
 * The kernel that includes this file defines `struct Job`. */

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
#define VNNI_VBMI __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")))
#else
#define X86 0
#endif

#if defined(__aarch64__) && defined(__ARM_NEON)
#define NEON 1
#include <arm_neon.h>
#else
#define NEON 0
#endif

/* Loops over a block are unrolled, so that every shift is a constant and codes stay in registers. */
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define UNROLL _Pragma("GCC unroll 64")
#else
#define UNROLL
#endif

#define INLINE static inline __attribute__((always_inline))

enum { PORTABLE = 0, PATH_AVX2 = 1, PATH_AVX512BW = 2, PATH_AVX512VNNI = 3, PATH_NEON = 4 };

typedef struct Job Job;
typedef void (*Work)(const Job *, int64_t begin, int64_t end);

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/* 64-byte aligned memory, or NULL. */
static void *aligned(int64_t bytes) {
    void *memory = NULL;
    return posix_memalign(&memory, 64, (size_t)bytes) ? NULL : memory;
}

/* x with zeros up to `padded` inputs: x itself where nothing is missing, else memory for the caller to free in *owned,
 * or NULL where there is none. */
static const float *whole_x(const float *x, int64_t in_features, int64_t padded, float **owned) {
    *owned = NULL;
    if (in_features == padded) return x;
    if (!(*owned = aligned(padded * (int64_t)sizeof(float)))) return NULL;
    memcpy(*owned, x, (size_t)in_features * sizeof(float));
    memset(*owned + in_features, 0, (size_t)(padded - in_features) * sizeof(float));
    return *owned;
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

/* The hardware prefetcher alone leaves a core that computes between its loads waiting for memory: ask for codes early,
 * far ahead into the outer caches and a little ahead into the first. Addresses past the end do no harm. */
INLINE void fetch_ahead(const void *codes) {
    __builtin_prefetch((const char *)codes + 8192, 0, 1);
    __builtin_prefetch((const char *)codes + 2048, 0, 3);
}

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

#if X86

AVX2 INLINE float sum_lanes_avx2(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* The sums of four vectors as the four floats of one. */
AVX512 INLINE __m128 sum_rows_avx512(const __m512 v[4]) {
    __m256 h[4];
    for (int r = 0; r < 4; r++) h[r] = _mm256_add_ps(_mm512_castps512_ps256(v[r]), _mm512_extractf32x8_ps(v[r], 1));
    __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(h[0], h[1]), _mm256_hadd_ps(h[2], h[3]));
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

static uint64_t enabled_states(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

/* Whether the processor has VBMI as well; asked once, because the instruction that tells is slow under a hypervisor. */
__attribute__((unused)) static int has_vbmi(void) {
    static int known = -1;
    uint32_t a, b, c, d;
    if (known < 0) known = __get_cpuid_count(7, 0, &a, &b, &c, &d) && c & bit_AVX512VBMI;
    return known;
}

/* The widest x86 path that processor and operating system can run; the narrower ones run too. */
static int widest_path(void) {
    const uint32_t needs_avx = bit_FMA | bit_OSXSAVE | bit_AVX | bit_F16C;
    const uint32_t needs_avx512 = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & needs_avx) != needs_avx) return PORTABLE;
    uint64_t states = enabled_states();
    if ((states & 0x06) != 0x06 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) return PORTABLE;
    if ((states & 0xe6) != 0xe6 || (b & needs_avx512) != needs_avx512) return PATH_AVX2;
    return c & bit_AVX512VNNI ? PATH_AVX512VNNI : PATH_AVX512BW;
}

#endif /* X86 */

/* Whether this processor runs a path. */
int trapetum_runs(int path) {
    if (path == PORTABLE) return 1;
#if X86
    return path > PORTABLE && path <= widest_path();
#else
    return NEON && path == PATH_NEON;
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

/* The entry of a list of five for a path; names of paths that this build lacks are never evaluated. */
#if X86
#define CHOOSE(path, portable, avx2, avx512bw, avx512vnni, neon)                                                     \
    ((path) == PORTABLE        ? (portable)                                                                          \
     : (path) == PATH_AVX2     ? (avx2)                                                                              \
     : (path) == PATH_AVX512BW ? (avx512bw)                                                                          \
                               : (avx512vnni))
#elif NEON
#define CHOOSE(path, portable, avx2, avx512bw, avx512vnni, neon) ((path) == PATH_NEON ? (neon) : (portable))
#else
#define CHOOSE(path, portable, avx2, avx512bw, avx512vnni, neon) ((void)(path), (portable))
#endif
