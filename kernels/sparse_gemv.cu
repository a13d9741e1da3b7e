// The sparse part of a dense-and-sparse product, added to what the dense part left:
//
//     y[r, o] += sum over k in [starts[o], starts[o + 1]) of values[k] * x[r, columns[k]]        (fp32 sums)
//
// Compressed rows, one warp each; its lanes take the row's entries by turns:
//
//     starts    int32 [out + 1]      |  0        s1            s2 ...   entries |
//     columns   [entries]            | row 0 ... | row 1 ...   | row 2 ...      |      rising within a row
//     values    fp16 [entries]       | row 0 ... | row 1 ...   | row 2 ...      |
//                                      ^lane 0 1 2 .. 31 0 1 ..
//
// Bytes moved per entry: 4 (6 with int32 columns); per row 4 of starts and ROWS * 2 reads and writes of y. x is small and stays in
// L1 and L2. A row has entries in the dozens, so a warp makes one or two turns and the time is that of three loads that wait for
// each other (starts, columns, x), not of bytes.
// Lanes meet in a butterfly, whose order is fixed, and one lane adds to y: no atomics, so results are the same from run to run.
// Source of the split: Kim et al., "SqueezeLLM: Dense-and-Sparse Quantization", arXiv:2306.07629 (2023).
//
// Compiled once for each set of macros:
//     XTYPE    0 fp16, 1 bf16, 2 fp32: dtype of x and y
//     ROWS     rows of x and y, 1 to 8
//     WIDE     1: columns are int32, else uint16
//     WARPS    a block, that is rows of S

#include <cuda_fp16.h>
#include <cuda_bf16.h>

#ifndef XTYPE
#define XTYPE 0
#endif
#ifndef ROWS
#define ROWS 1
#endif
#ifndef WIDE
#define WIDE 0
#endif
#ifndef WARPS
#define WARPS 8
#endif

#if XTYPE == 0
typedef __half xtype;
#elif XTYPE == 1
typedef __nv_bfloat16 xtype;
#else
typedef float xtype;
#endif
#if WIDE
typedef int column_type;
#else
typedef unsigned short column_type;
#endif

static_assert(ROWS >= 1 && ROWS <= 8 && WARPS >= 1 && WARPS <= 32, "macros out of range");

__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ void set(__half& to, float v) { to = __float2half_rn(v); }
__device__ __forceinline__ void set(__nv_bfloat16& to, float v) { to = __float2bfloat16_rn(v); }
__device__ __forceinline__ void set(float& to, float v) { to = v; }

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

// Entries are read once: keep them out of L1. Asked for as volatile, or the assembler would move the load below the wait.
__device__ __forceinline__ unsigned short load_once(const unsigned short* address) {
    unsigned short v;
    asm volatile("ld.global.cs.u16 %0, [%1];" : "=h"(v) : "l"(address));
    return v;
}
__device__ __forceinline__ int load_once(const int* address) {
    int v;
    asm volatile("ld.global.cs.s32 %0, [%1];" : "=r"(v) : "l"(address));
    return v;
}

struct Entry {
    int column;
    float value;
};

__device__ __forceinline__ Entry entry_at(const column_type* columns, const __half* values, int k, int end) {
    if (k >= end) return {0, 0.0f};  // columns[0] of a row without entries does not exist; x[0] does
    const unsigned short bits = load_once(reinterpret_cast<const unsigned short*>(values) + k);
    return {static_cast<int>(load_once(columns + k)), __half2float(__ushort_as_half(bits))};
}

// values   fp16 [entries]                 weights kept apart, less what their codes stand for
// columns  uint16 or int32 [entries]      each below in_features
// starts   int32 [out_features + 1]       where each row begins
// x        xtype [ROWS, in_features]      contiguous
// y        xtype [ROWS, out_features]     contiguous, read and written
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    sparse_add(const __half* values, const column_type* columns, const int* starts, const xtype* x, xtype* y, int in_features, int out_features) {
    const int lane = threadIdx.x, row = blockIdx.x * WARPS + threadIdx.y;
    const bool mine = row < out_features;
    const int begin = mine ? load_once(starts + row) : 0, end = mine ? load_once(starts + row + 1) : 0;
    Entry entry = entry_at(columns, values, begin + lane, end);
    wait_for_previous_kernel();
    allow_next_kernel();
    if (!mine) return;  // whole warps: a warp is a row
    float sums[ROWS] = {};
    for (int k = begin + lane; k < end; k += 32) {
        const Entry next = entry_at(columns, values, k + 32, end);
#pragma unroll
        for (int r = 0; r < ROWS; r++) sums[r] += entry.value * to_float(x[(size_t)r * in_features + entry.column]);
        entry = next;
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int apart = 16; apart; apart /= 2) sums[r] += __shfl_xor_sync(0xffffffffu, sums[r], apart);
        if (lane == r) {
            xtype& out = y[(size_t)r * out_features + row];
            set(out, to_float(out) + sums[r]);
        }
    }
}
