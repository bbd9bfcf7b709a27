// What all kernels here share; it is put before each of their files.
//
// Compiled when a program starts, for the GPU that is there: no header is at hand.

typedef unsigned int u32;
typedef unsigned short bf16;
typedef long long i64;

// Of a block of threads.
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;

