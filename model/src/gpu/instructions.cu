// What a GPU has instructions for and C++ has no words, for all kernels here. Of each there is a plain form too, by which tests
// run the kernels without a GPU (model/tests/gpu_kernels/emulated.h).

__device__ inline bf16 rounded(float value) {
    bf16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(value));
    return r;
}

// Of two BF16 values each, rounded once.
__device__ inline u32 times(u32 pair, u32 by) {
    u32 result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(pair), "r"(by), "r"(0x80008000u));
    return result;
}

// Adds the product of a fragment of 16 x 16 and one of 16 x 8 to `sum` (PTX ISA, section 9.7.14).
__device__ inline void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes that are read once.
__device__ inline uint4 stream(const void *from) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

// 16 bytes that others read too.
__device__ inline uint4 shared_by_all(const void *from) {
    uint4 v;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

__device__ inline u32 address(const void *shared) { return (u32)__cvta_generic_to_shared(shared); }

// 16 bytes into shared memory, while the thread goes on.
__device__ inline void copy_16(void *shared, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(shared)), "l"(from) : "memory");
}

// All of this thread's.
__device__ inline void copies_are_there() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8 x 8 matrices; each thread names one line of one.
__device__ inline void load_4(u32 (&r)[4], const void *line) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address(line)) : "memory");
}

// The same, each matrix turned.
__device__ inline void load_4_turned(u32 (&r)[4], const void *line) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address(line)) : "memory");
}

