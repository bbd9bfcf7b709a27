// One layer's routed experts on an NVIDIA GPU of compute capability 8.0 or later: down(silu(gate(x)) * up(x)) of each expert's
// rows, in two launches whatever the number of experts. Weights are read once, where and as they are stored: BF16, or E4M3
// codes with an f32 scale per block (DeepSeek-V3's format). Sums are f32.
//
// A block of threads makes 16 outputs of up to 8 * TILES rows of one expert; its warps share the inner dimension. A row's sums
// are taken in one order, whatever else is computed, so its bits depend on no other row.
//
// Tensor cores take fragments of 16 x 16 weights and 16 x 8 rows (mma.m16n8k16, PTX ISA section 9.7.14). Which inner index a
// place in a fragment stands for is free as long as both sides agree, so each thread reads 16 bytes that lie side by side, of
// its weights and of its row alike, and nothing goes through shared memory on the way.

// One expert with rows, as the host lays it out.
struct Group {
    const char *gate, *up, *down;
    const float *gate_scales, *up_scales, *down_scales;
    i64 first, count;
};

constexpr int OUTS = 16;
constexpr int ROWS = 8;
constexpr int FRAGMENT = OUTS * ROWS;

// Two E4M3 codes, each the low byte of a half, to two BF16. Sign, exponent and mantissa move to their places; the exponent is
// then too small by 120, which a product with 2^120 puts right, of subnormal codes too. All of it is exact.
__device__ inline u32 widened(u32 codes) {
    u32 moved = ((codes & 0x00800080u) << 8) | ((codes & 0x007f007fu) << 4);
    return times(moved, 0x7b807b80u);
}

// The BF16 pairs of 16 bytes: 4 as they are, or 8 of codes.
template <bool FP8> struct Pairs;
template <> struct Pairs<false> {
    u32 pair[4];
    __device__ Pairs(uint4 v) : pair{v.x, v.y, v.z, v.w} {}
};
template <> struct Pairs<true> {
    u32 pair[8];
    __device__ Pairs(uint4 v) {
        u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int n = 0; n < 4; n++) {
            pair[2 * n] = widened(__byte_perm(words[n], 0, 0x4140));
            pair[2 * n + 1] = widened(__byte_perm(words[n], 0, 0x4342));
        }
    }
};

// MATRICES weights [outs, inner], from output `out` on, by the rows of this thread's columns. Both of 2 go through the same
// rows: silu(first) * second; 1 is left as it is. Row n of the block's goes to `to[n]`, if there is one.
template <bool FP8, int MATRICES, int TILES, typename From, typename To>
__device__ void products(const char *const (&weights)[MATRICES], const float *const (&scales)[MATRICES], int outs, int inner,
                         int scale_block, From from, To to) {
    // Inner indices that a warp takes at a time, and those of them in one thread's 16 bytes of weights.
    constexpr int EACH = FP8 ? 16 : 8, CHUNK = 4 * EACH, STEPS = EACH / 4;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quarter = lane % 4;
    const int out = blockIdx.x * OUTS;
    const uint4 nothing = {0, 0, 0, 0};

    const bf16 *row[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) row[tile] = from(tile * ROWS + group);
    const char *weight[MATRICES][2];
#pragma unroll
    for (int m = 0; m < MATRICES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const i64 line = out + 8 * half + group;
            weight[m][half] = line < outs ? weights[m] + line * inner * (FP8 ? 1 : 2) : nullptr;
        }

    float sums[MATRICES][TILES][4] = {};
#pragma unroll 2
    for (int start = warp * CHUNK; start < inner; start += WARPS * CHUNK) {
        const int at = start + EACH * quarter;
        const bool here = at < inner;
        uint4 lines[MATRICES][2];
#pragma unroll
        for (int m = 0; m < MATRICES; m++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                lines[m][half] = here && weight[m][half] ? stream(weight[m][half] + at * (FP8 ? 1 : 2)) : nothing;
        u32 x[TILES][2 * STEPS];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int n = 0; n < STEPS / 2; n++) {
                const uint4 v = here && row[tile] ? shared_by_all(row[tile] + at + 8 * n) : nothing;
                x[tile][4 * n] = v.x, x[tile][4 * n + 1] = v.y, x[tile][4 * n + 2] = v.z, x[tile][4 * n + 3] = v.w;
            }
#pragma unroll
        for (int m = 0; m < MATRICES; m++) {
            const Pairs<FP8> low(lines[m][0]), high(lines[m][1]);
            float scale = 1.0f;
            if (FP8) {
                const int across = (inner + scale_block - 1) / scale_block;
                scale = scales[m][(out / scale_block) * across + start / scale_block];
            }
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                float(&sum)[4] = FP8 ? part : sums[m][tile];
#pragma unroll
                for (int step = 0; step < STEPS; step++) {
                    const u32 a[4] = {low.pair[2 * step], high.pair[2 * step], low.pair[2 * step + 1], high.pair[2 * step + 1]};
                    multiply(sum, a, x[tile][2 * step], x[tile][2 * step + 1]);
                }
                if (FP8)
#pragma unroll
                    for (int n = 0; n < 4; n++) sums[m][tile][n] = __fmaf_rn(scale, part[n], sums[m][tile][n]);
            }
        }
    }

    __shared__ float parts[WARPS][MATRICES][TILES][FRAGMENT];
#pragma unroll
    for (int m = 0; m < MATRICES; m++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int n = 0; n < 4; n++)
                parts[warp][m][tile][(2 * quarter + n % 2) * OUTS + 8 * (n / 2) + group] = sums[m][tile][n];
    __syncthreads();
    for (int place = threadIdx.x; place < TILES * FRAGMENT; place += THREADS) {
        const int tile = place / FRAGMENT, within = place % FRAGMENT, o = out + within % OUTS;
        bf16 *line = to(tile * ROWS + within / OUTS);
        if (!line || o >= outs) continue;
        float whole[MATRICES] = {};
#pragma unroll
        for (int m = 0; m < MATRICES; m++)
#pragma unroll
            for (int w = 0; w < WARPS; w++) whole[m] += parts[w][m][tile][within];
        if (MATRICES == 2) whole[0] = whole[0] / (1.0f + expf(-whole[0])) * whole[MATRICES - 1];
        line[o] = rounded(whole[0]);
    }
}

// Rows `order` of `x` [., hidden] to `between` [A, inner].
template <bool FP8, int TILES>
__device__ void gate_and_up(const Group *groups, const bf16 *x, const i64 *order, bf16 *between, int hidden, int inner, int scale_block) {
    const Group g = groups[blockIdx.y];
    const i64 first = (i64)blockIdx.z * TILES * ROWS;
    if (first >= g.count) return;
    const char *const weights[2] = {g.gate, g.up};
    const float *const scales[2] = {g.gate_scales, g.up_scales};
    auto from = [=](int n) { return first + n < g.count ? x + order[g.first + first + n] * hidden : nullptr; };
    auto to = [=](int n) { return first + n < g.count ? between + (g.first + first + n) * inner : nullptr; };
    products<FP8, 2, TILES>(weights, scales, inner, hidden, scale_block, from, to);
}

// Rows of `between` [A, inner] to rows `places` of `y` [A, hidden].
template <bool FP8, int TILES>
__device__ void down(const Group *groups, const bf16 *between, const i64 *places, bf16 *y, int hidden, int inner, int scale_block) {
    const Group g = groups[blockIdx.y];
    const i64 first = (i64)blockIdx.z * TILES * ROWS;
    if (first >= g.count) return;
    const char *const weights[1] = {g.down};
    const float *const scales[1] = {g.down_scales};
    auto from = [=](int n) { return first + n < g.count ? between + (g.first + first + n) * inner : nullptr; };
    auto to = [=](int n) { return first + n < g.count ? y + places[g.first + first + n] * hidden : nullptr; };
    products<FP8, 1, TILES>(weights, scales, hidden, inner, scale_block, from, to);
}

#define KERNELS(FORMAT, FP8, TILES)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) gate_and_up_##FORMAT##_##TILES(                                      \
        const Group *groups, const bf16 *x, const i64 *order, bf16 *between, int hidden, int inner, int scale_block) {         \
        gate_and_up<FP8, TILES>(groups, x, order, between, hidden, inner, scale_block);                                        \
    }                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS) down_##FORMAT##_##TILES(                                             \
        const Group *groups, const bf16 *between, const i64 *places, bf16 *y, int hidden, int inner, int scale_block) {        \
        down<FP8, TILES>(groups, between, places, y, hidden, inner, scale_block);                                              \
    }

KERNELS(bf16, false, 1)
KERNELS(bf16, false, 2)
KERNELS(bf16, false, 4)
KERNELS(fp8, true, 1)
KERNELS(fp8, true, 2)
KERNELS(fp8, true, 4)
