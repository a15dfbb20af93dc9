// PTX instructions without a CUDA C++ equivalent; compiled in front of the files that use them. Source: the PTX ISA, 8.5.

typedef unsigned short bf16;

__device__ float to_float(bf16 value) { return __uint_as_float(static_cast<unsigned>(value) << 16); }

__device__ bf16 to_bf16(float value) {
    bf16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
    return rounded;
}

// Returns both values in bfloat16, the first in the low bits.
__device__ unsigned round_two(float low, float high) {
    unsigned rounded;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(rounded) : "f"(high), "f"(low));
    return rounded;
}

// Starts an asynchronous copy of 16 bytes to shared memory, zeros unless `is_there`.
__device__ void copy_16_bytes(void* to, const void* from, bool is_there) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(is_there ? 16 : 0) : "memory");
}

__device__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

__device__ void wait_for_copies() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// Adds the product of a (16, 16) and b (16, 8) to sums.
__device__ void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// On Hopper the next kernel may start once all blocks have called this.
__device__ void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the writes of earlier kernels are visible.
__device__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
