// A GPU on a processor: enough of CUDA C++ to run the kernels of model/src/gpu where there is none. A block's threads are fibers that
// run one after the other, each until it meets others, its warp or its block; a block that would wait for ever, because its
// threads do not all come, ends the test. What the hardware has instructions for (model/src/gpu/instructions.cu) is said
// plainly here, fragments laid out as the PTX ISA says (sections 9.7.14 and 9.7.15).
//
// Never here: how long anything takes; two threads at once, so no race is found; a rounding within a sum of sixteen products.

#pragma once

// Jumps from stack to stack are no mistake here.
#undef _FORTIFY_SOURCE

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include <setjmp.h>
#include <ucontext.h>

#include "common.cu"

using std::max;
using std::min;

#define __device__
#define __global__
#define __launch_bounds__(threads)
// One block runs at a time, on one thread of the processor.
#define __shared__ thread_local

struct alignas(16) uint4 {
    u32 x, y, z, w;
};
struct float2 {
    float x, y;
};
struct Place {
    int x, y, z;
};

inline float2 make_float2(float x, float y) { return {x, y}; }

// On a fiber's own stack nothing may be cleaned up.
[[noreturn]] inline void fail(const char *why) {
    std::fprintf(stderr, "%s\n", why);
    std::fflush(nullptr);
    std::_Exit(1);
}

// --- who runs ---

inline Place gridDim, blockIdx;
inline struct {
    int x;
} threadIdx;

extern "C" {
inline thread_local uint4 memory[1 << 14];
}

namespace fibers {

enum class State { Runs, AtWarp, AtBlock, Done };

constexpr size_t STACK = 64 << 10;

// A fiber begins by its context; from then on it goes on by a jump, which does not ask the system for signals.
inline ucontext_t contexts[THREADS];
inline jmp_buf caller, places[THREADS];
inline bool begun[THREADS];
inline std::vector<char> stacks(STACK *THREADS);
inline State states[THREADS];
inline std::function<void()> kernel;

inline void give_way(State state) {
    const int me = threadIdx.x;
    states[me] = state;
    if (!_setjmp(places[me])) _longjmp(caller, 1);
}

inline void go_on(int thread) {
    threadIdx.x = thread;
    if (_setjmp(caller)) return;
    if (begun[thread]) _longjmp(places[thread], 1);
    begun[thread] = true;
    setcontext(&contexts[thread]);
}

inline void begin() {
    kernel();
    give_way(State::Done);
}

inline bool all(int first, int count, State state) {
    return std::all_of(states + first, states + first + count, [=](State one) { return one == state; });
}

inline void run_warp(int first) {
    do {
        std::replace(states + first, states + first + 32, State::AtWarp, State::Runs);
        for (int thread = first; thread < first + 32; thread++)
            if (states[thread] == State::Runs) go_on(thread);
    } while (all(first, 32, State::AtWarp));
    if (std::count(states + first, states + first + 32, State::AtWarp)) fail("some threads of a warp wait for others that do not come");
}

inline void run_block() {
    for (int thread = 0; thread < THREADS; thread++) {
        ucontext_t &context = contexts[thread];
        getcontext(&context);
        context.uc_stack.ss_sp = stacks.data() + STACK * thread;
        context.uc_stack.ss_size = STACK;
        context.uc_link = nullptr;
        makecontext(&context, begin, 0);
        states[thread] = State::Runs;
        begun[thread] = false;
    }
    while (true) {
        for (int first = 0; first < THREADS; first += 32) run_warp(first);
        if (all(0, THREADS, State::Done)) return;
        if (!all(0, THREADS, State::AtBlock)) fail("some threads of a block wait for others that do not come");
        std::fill(states, states + THREADS, State::Runs);
    }
}

}  // namespace fibers

// Every block of `grid`, with so many bytes of dynamic shared memory. What a block reads of that before it was written is no number,
// and beyond it nothing may be written.
inline void launch(Place grid, size_t shared, std::function<void()> kernel) {
    const auto *bytes = (const unsigned char *)memory;
    if (shared > sizeof memory) fail("more shared memory than there is");
    gridDim = grid;
    fibers::kernel = std::move(kernel);
    std::memset(memory, 0xff, sizeof memory);
    for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) {
                std::memset(memory, 0xff, shared);
                fibers::run_block();
            }
    if (std::any_of(bytes + shared, bytes + sizeof memory, [](unsigned char byte) { return byte != 0xff; }))
        fail("shared memory was written beyond what was asked for");
}

inline void __syncthreads() { fibers::give_way(fibers::State::AtBlock); }
inline void __syncwarp() { fibers::give_way(fibers::State::AtWarp); }

// --- numbers ---

inline float __uint_as_float(u32 bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float __int_as_float(u32 bits) { return __uint_as_float(bits); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
// Some C libraries have one of that name.
inline float one_by_root(float value) { return 1.0f / std::sqrt(value); }
#define rsqrtf one_by_root

inline u32 __byte_perm(u32 low, u32 high, u32 which) {
    const unsigned long long both = (unsigned long long)high << 32 | low;
    u32 result = 0;
    for (int n = 0; n < 4; n++) result |= (u32)(both >> 8 * (which >> 4 * n & 7) & 0xff) << 8 * n;
    return result;
}

inline float f32(bf16 value) { return __uint_as_float((u32)value << 16); }

inline bf16 rounded(float value) {
    u32 bits;
    std::memcpy(&bits, &value, sizeof bits);
    return value != value ? 0x7fff : (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline u32 times(u32 pair, u32 by) {
    const bf16 low = rounded(f32((bf16)pair) * f32((bf16)by)), high = rounded(f32(pair >> 16) * f32(by >> 16));
    return low | (u32)high << 16;
}

// --- what a warp does together ---

// What each thread brings.
inline struct {
    float value;
    u32 a[4], b[2];
    const bf16 *line;
} brought[THREADS];

inline float __shfl_xor_sync(u32, float value, int by) {
    brought[threadIdx.x].value = value;
    __syncwarp();
    const float theirs = brought[threadIdx.x ^ by].value;
    __syncwarp();
    return theirs;
}

inline void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const int warp = threadIdx.x / 32 * 32, group = threadIdx.x % 32 / 4, quarter = threadIdx.x % 4;
    auto &mine = brought[threadIdx.x];
    std::copy(a, a + 4, mine.a);
    mine.b[0] = b0, mine.b[1] = b1;
    __syncwarp();
    const auto half = [](u32 pair, int nth) { return (double)f32((bf16)(pair >> 16 * nth)); };
    for (int n = 0; n < 4; n++) {
        const int row = group + n / 2 * 8, column = 2 * quarter + n % 2;
        double whole = sum[n];
        for (int k = 0; k < 16; k++) {
            const u32 left = brought[warp + row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
            const u32 right = brought[warp + column * 4 + k % 8 / 2].b[k / 8];
            whole += half(left, k % 2) * half(right, k % 2);
        }
        sum[n] = (float)whole;
    }
    __syncwarp();
}

inline void load(u32 (&r)[4], const void *line, bool turned) {
    const int warp = threadIdx.x / 32 * 32, lane = threadIdx.x % 32;
    if ((size_t)line % 16 != 0) fail("a line of a matrix must lie at a multiple of 16");
    brought[threadIdx.x].line = (const bf16 *)line;
    __syncwarp();
    for (int matrix = 0; matrix < 4; matrix++) {
        const auto at = [=](int nth) {
            const int along = 2 * (lane % 4) + nth, across = lane / 4;
            return (u32)brought[warp + 8 * matrix + (turned ? along : across)].line[turned ? across : along];
        };
        r[matrix] = at(0) | at(1) << 16;
    }
    __syncwarp();
}

inline void load_4(u32 (&r)[4], const void *line) { load(r, line, false); }
inline void load_4_turned(u32 (&r)[4], const void *line) { load(r, line, true); }

// --- memory ---

inline uint4 stream(const void *from) {
    if ((size_t)from % 16 != 0) fail("16 bytes must lie at a multiple of 16");
    uint4 value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline uint4 shared_by_all(const void *from) { return stream(from); }

inline void copy_16(void *to, const void *from) {
    const uint4 value = stream(from);
    if ((size_t)to % 16 != 0) fail("16 bytes must go to a multiple of 16");
    std::memcpy(to, &value, sizeof value);
}

inline void copies_are_there() {}

// --- what tests draw and compare ---

inline float drawn() {
    static std::mt19937 generator(7);
    static std::normal_distribution<float> normal;
    return normal(generator);
}

inline std::vector<bf16> drawn_values(size_t count, float spread) {
    std::vector<bf16> values(count);
    for (bf16 &value : values) value = rounded(drawn() * spread);
    return values;
}

// Root of the squares of what is off, as a share of what is right.
struct Off {
    double off = 0, whole = 0;

    void see(double ours, double right) {
        off += (ours - right) * (ours - right);
        whole += right * right;
    }

    double share() const { return std::sqrt(off / whole); }
};

inline void expect(bool holds, const char *what) {
    if (holds) return;
    std::fprintf(stderr, "not so: ");
    fail(what);
}
