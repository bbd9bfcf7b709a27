// What all kernels here share; it is put before each of their files.
//
// Compiled when a program starts, for the GPU that is there: no header is at hand.

typedef unsigned int u32;
typedef unsigned short bf16;
typedef long long i64;

// Of a block of threads.
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;

__device__ inline bf16 rounded(float value) {
    bf16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(value));
    return r;
}

// Adds the product of a fragment of 16 x 16 and one of 16 x 8 to `sum` (PTX ISA, section 9.7.14).
__device__ inline void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

