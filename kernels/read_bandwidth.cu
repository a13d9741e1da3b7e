// The roof: read every byte of a buffer once and do nothing else with it.
//
// Each thread keeps four 16-byte loads in flight, in a grid-stride loop; the XOR of everything read is written only when it equals a
// value that the compiler cannot rule out, so no load can be left out.
//
// buffer  `vectors` x 16 bytes
// sink    one 32-bit word

constexpr int IN_FLIGHT = 4;

extern "C" __global__ void __launch_bounds__(1024)
read_bytes(const uint4* __restrict__ buffer, unsigned long long vectors, unsigned* sink) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
    const unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
    const unsigned long long thread = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
    unsigned mixed = 0;
    for (unsigned long long first = thread; first < vectors; first += IN_FLIGHT * stride) {
        uint4 v[IN_FLIGHT];
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; k++) {
            const unsigned long long at = first + k * stride;
            v[k] = make_uint4(0, 0, 0, 0);
            if (at < vectors)
                asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                             : "=r"(v[k].x), "=r"(v[k].y), "=r"(v[k].z), "=r"(v[k].w) : "l"(buffer + at));
        }
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; k++) mixed ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    if (mixed == 0x9e3779b9u) *sink = mixed;
}
