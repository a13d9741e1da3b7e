// One tensor-core operation per kernel, to see what an integer format compiles to on an architecture.
//
//   D[16 x 8] += A[16 x K] * B[K x 8], one warp, operands and result straight from and to memory.
//
//   FORMAT   operands            K     accumulator
//   8        int8 x int8         32    int32: native on every architecture here, the one to compare with
//   4        int4 x int4         64    int32
//   1        1 bit and 1 bit    256    int32: population count of the bitwise and
//
// Nothing is launched: the compiled instructions are counted (trapetum.claims.probes). A format that the tensor cores
// know takes as many as int8, one that they do not know is emulated by many. Needs sm_80 or newer.

#ifndef FORMAT
#define FORMAT 4
#endif

// a: 4 registers of A, b: 2 registers of B, d: 4 accumulators, each [32 lanes].
extern "C" __global__ void one_mma(const unsigned* __restrict__ a, const unsigned* __restrict__ b, int* __restrict__ d) {
  const unsigned lane = threadIdx.x;
  const unsigned a0 = a[lane], a1 = a[lane + 32], a2 = a[lane + 64], a3 = a[lane + 96];
  const unsigned b0 = b[lane], b1 = b[lane + 32];
  int d0 = d[lane], d1 = d[lane + 32], d2 = d[lane + 64], d3 = d[lane + 96];
  asm volatile(
#if FORMAT == 8
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
#elif FORMAT == 4
      "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 "
#elif FORMAT == 1
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
#else
#error FORMAT is 1, 4 or 8
#endif
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d0), "+r"(d1), "+r"(d2), "+r"(d3)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  d[lane] = d0, d[lane + 32] = d1, d[lane + 64] = d2, d[lane + 96] = d3;
}
