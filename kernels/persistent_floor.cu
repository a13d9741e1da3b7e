// The floor of a decode step, twice: what the reads of one token take in one kernel with grid barriers between its phases, and in a
// chain of kernels, one a phase. A phase is what may start only when the one before it is complete (a product, an attention).
// Nothing is computed: a decoder with these phases cannot be faster than this, however it multiplies.
//
//     persistent_token   phase 0 | barrier | phase 1 | barrier | ... | phase n - 1        one launch a token, all blocks resident
//     read_phase         the same reads of one phase; a launch each, with or without programmatic edges
//
// Bytes of a phase lie one behind the other in `buffer`; the threads of the whole grid read them side by side:
//
//     vector  first + thread + (batch * IN_FLIGHT + k) * stride        thread = block * READERS + threadIdx.x, k < IN_FLIGHT
//
// Two batches are in registers, one on its way while the other is folded, and across the edge of a phase too: the first batch of
// the next phase is asked for before the barrier (before griddepcontrol.wait), since weights do not depend on the phase before.
//
// What the reads leave is the sum of all 32-bit words of a phase (mod 2^32), one part a warp. It is stored before the barrier, as a
// decoder's outputs would be, and lets every byte be accounted for.
//
// Barrier. One warp a block does not read. When the readers of its block have stored, its first lane adds 1 to a counter (release)
// and polls it (acquire) until all blocks of this barrier have: barrier b is open at (b + 1) * blocks. The readers' loads of the next
// phase are never fenced, because the fence is another thread's. The last block to leave sets the counter back to 0. A lane that has
// polled `polls` times says so in state[2], and its block waits no more, so that a grid that is not resident as a whole comes to
// an end, with an error for the host to see.
//
// Compiled once for each set of macros:
//     READERS    reading threads a block, a multiple of 32, at most 992
//     IN_FLIGHT  16-byte loads of a batch
//     BARRIER    0: phases follow each other without waiting     READ  0: barriers and nothing else
//     CHECK      1: after each barrier a block looks at the mark that another block set before it
//
// Bytes moved: the buffer's, and 4 a warp and phase.

#ifndef READERS
#define READERS 480
#endif
#ifndef IN_FLIGHT
#define IN_FLIGHT 8
#endif
#ifndef BARRIER
#define BARRIER 1
#endif
#ifndef READ
#define READ 1
#endif
#ifndef CHECK
#define CHECK 0
#endif

typedef unsigned long long Place;  // of a 16-byte vector in the buffer

constexpr int WARPS = READERS / 32;
constexpr int THREADS = READERS + 32;  // of persistent_token: the last warp keeps the barrier
constexpr int CHAIN_RESIDENT = 2;      // blocks of read_phase on a multiprocessor, so that the next kernel's can start
enum { ARRIVED, LEFT, GAVE_UP, STALE };

// --- what the machine does -------------------------------------------------------------------------------------------------------

// Not ld.global.nc: the assembler moves such loads behind griddepcontrol.wait, and nothing is in flight before it.
__device__ __forceinline__ uint4 load_once(const uint4* at) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}

__device__ __forceinline__ void arrive(unsigned* counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" :: "l"(counter) : "memory");
}

__device__ __forceinline__ unsigned seen(const unsigned* counter) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}

// Two barriers of a block: readers only arrive at `stored`, so that they do not wait for each other twice.
__device__ __forceinline__ void stored_arrive() { asm volatile("bar.arrive 1, %0;" :: "n"(THREADS) : "memory"); }
__device__ __forceinline__ void stored_wait() { asm volatile("bar.sync 1, %0;" :: "n"(THREADS) : "memory"); }
__device__ __forceinline__ void opened_wait() { asm volatile("bar.sync 2, %0;" :: "n"(THREADS) : "memory"); }

__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// --- reading -----------------------------------------------------------------------------------------------------------------------

struct Batch {
    uint4 v[IN_FLIGHT];
    bool closes;  // the last of its phase; the same for all threads of the grid
};

struct Cursor {
    Place base, end;  // next batch's first vector (thread 0's), and where the phase ends
    int phase;
};

// Ask for the next batch, and move on: into the next phase where this one ends.
__device__ __forceinline__ void fill(Batch& batch, Cursor& cursor, const uint4* buffer, const Place* starts, int phases,
                                     Place thread, Place stride) {
#pragma unroll
    for (int k = 0; k < IN_FLIGHT; k++) {
        const Place at = cursor.base + thread + k * stride;
        batch.v[k] = make_uint4(0, 0, 0, 0);
        if (at < cursor.end) batch.v[k] = load_once(buffer + at);
    }
    cursor.base += IN_FLIGHT * stride;
    batch.closes = cursor.base >= cursor.end;
    if (batch.closes) {
        cursor.phase++;
        const bool more = cursor.phase < phases;
        cursor.base = more ? starts[cursor.phase] : cursor.end;
        cursor.end = more ? starts[cursor.phase + 1] : cursor.end;
    }
}

__device__ __forceinline__ unsigned fold(const Batch& batch, unsigned sum) {
#pragma unroll
    for (int k = 0; k < IN_FLIGHT; k++) sum += batch.v[k].x + batch.v[k].y + batch.v[k].z + batch.v[k].w;
    return sum;
}

// The warp's sum to sums[block][warp].
__device__ __forceinline__ void store(unsigned* sums, unsigned sum) {
#pragma unroll
    for (int apart = 16; apart; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
    if (threadIdx.x % 32 == 0) sums[blockIdx.x * WARPS + threadIdx.x / 32] = sum;
}

// --- one kernel a token --------------------------------------------------------------------------------------------------------------

// A reader's side of the barrier after `phase`.
__device__ __forceinline__ void cross(int phase, unsigned* state, unsigned* marks) {
    if (CHECK && threadIdx.x == 0) *(volatile unsigned*)(marks + blockIdx.x) = phase + 1;
    stored_arrive();
    opened_wait();
    if (CHECK && threadIdx.x == 0) {  // the other block is in the phase behind this barrier, or about to leave it
        const unsigned ahead = *(volatile unsigned*)(marks + (blockIdx.x + 1 + phase) % gridDim.x) - (phase + 1);
        if (ahead > 1) atomicAdd(state + STALE, 1u);
    }
}

// All the keeper warp does.
__device__ __forceinline__ void keep_barriers(int barriers, unsigned* state, int polls) {
    bool waits = true;
    for (int b = 0; b < barriers; b++) {
        stored_wait();
        if (threadIdx.x % 32 == 0) {
            arrive(state + ARRIVED);
            const unsigned open = (unsigned)(b + 1) * gridDim.x;
            int left = polls;
            while (waits && seen(state + ARRIVED) < open)
                if (--left <= 0) waits = false;
            if (!waits) *(volatile unsigned*)(state + GAVE_UP) = 1;
        }
        __syncwarp();
        opened_wait();
    }
    if (threadIdx.x % 32) return;
    if (atomicInc(state + LEFT, gridDim.x - 1) == gridDim.x - 1) *(volatile unsigned*)(state + ARRIVED) = 0;
}

// buffer  16-byte vectors, phase after phase
// starts  [phases + 1] first vector of each phase, and the end of the last
// sums    [phases][gridDim.x][WARPS] of 32-bit words
// state   [4] arrived, left, gave up, stale marks; arrived and left are 0 before and after every launch
// marks   [gridDim.x], zero before a launch with CHECK; unused without
// polls   of a barrier, before it gives up
// dynamic shared memory: (phases + 1) * 8 bytes
extern "C" __global__ void __launch_bounds__(THREADS, 1)
persistent_token(const uint4* __restrict__ buffer, const Place* __restrict__ starts, int phases, unsigned* sums,
                 unsigned* state, unsigned* marks, int polls) {
    extern __shared__ Place begin[];
    for (int p = threadIdx.x; p <= phases; p += THREADS) begin[p] = starts[p];
    __syncthreads();
    if (threadIdx.x >= READERS) {
        if (BARRIER) keep_barriers(phases - 1, state, polls);
        return;
    }
    if (!READ) {
        for (int phase = 0; BARRIER && phase + 1 < phases; phase++) cross(phase, state, marks);
        return;
    }
    const Place stride = (Place)gridDim.x * READERS, thread = (Place)blockIdx.x * READERS + threadIdx.x;
    const int phase_sums = gridDim.x * WARPS;
    Cursor cursor = {begin[0], begin[1], 0};
    int phase = 0;
    unsigned sum = 0;
    auto take = [&](const Batch& batch) {
        sum = fold(batch, sum);
        if (!batch.closes) return;
        store(sums + (Place)phase * phase_sums, sum);
        if (BARRIER && phase + 1 < phases) cross(phase, state, marks);
        sum = 0;
        phase++;
    };
    Batch even, odd;
    fill(even, cursor, buffer, begin, phases, thread, stride);
    while (true) {
        fill(odd, cursor, buffer, begin, phases, thread, stride);
        take(even);
        if (phase == phases) return;
        fill(even, cursor, buffer, begin, phases, thread, stride);
        take(odd);
        if (phase == phases) return;
    }
}

// --- a kernel a phase ------------------------------------------------------------------------------------------------------------------

// buffer  the phase's first vector
// vectors of the phase
// sums    [gridDim.x][WARPS]
extern "C" __global__ void __launch_bounds__(READERS, CHAIN_RESIDENT)
read_phase(const uint4* __restrict__ buffer, Place vectors, unsigned* sums) {
    const Place stride = (Place)gridDim.x * READERS, thread = (Place)blockIdx.x * READERS + threadIdx.x;
    Cursor cursor = {0, vectors, 0};
    unsigned sum = 0;
    Batch even, odd;
    fill(even, cursor, buffer, nullptr, 1, thread, stride);
    wait_for_kernel_before();
    let_next_kernel_start();
    while (true) {
        fill(odd, cursor, buffer, nullptr, 1, thread, stride);
        sum = fold(even, sum);
        if (even.closes) break;
        fill(even, cursor, buffer, nullptr, 1, thread, stride);
        sum = fold(odd, sum);
        if (odd.closes) break;
    }
    store(sums, sum);
}
