// Attention of few rows over the latent cache on an NVIDIA GPU of compute capability 8.0 or later, in the absorbed form (DeepSeek-V2,
// arXiv 2405.04434, section 2.1): every head sees the same keys [C | R], and their first C values are its values too.
//
// `remember` ends what the projections began: it norms latents, turns what carries positions, and puts keys into the cache.
// `attend` takes a row, 16 heads and a span of the cache: it reads each block of 64 tokens once, in place, whatever the order of
// the row's table, and keeps the softmax running (FlashAttention, arXiv 2205.14135, section 3.1). `combine` adds up the spans of
// long contexts. Sums are f32. A row's spans begin where its own context says, so its bits depend on no other row.

// Of a block of the cache, and of a block of threads.
constexpr int TOKENS = 64;
constexpr int HEADS = 16;
// Blocks of the cache that one block of threads goes through.
constexpr int SPAN = 8;
// Values between lines in shared memory, so that eight lines lie in different banks.
constexpr int GAP = 8;
// Tiles of 8 latents that one warp sums up, at most: 512 latents.
constexpr int MOST_TILES = 8;

__device__ inline float widened(bf16 value) { return __uint_as_float((u32)value << 16); }

// Turns the pair `nth` of `from` [rope] by (cosine, sine); the result goes to the same places of `to`.
__device__ inline void turn(const bf16 *from, bf16 *to, int nth, float2 by, int rope, int interleaved) {
    const int first = interleaved ? 2 * nth : nth, second = interleaved ? first + 1 : nth + rope / 2;
    const float a = widened(from[first]), b = widened(from[second]);
    to[first] = rounded(a * by.x - b * by.y);
    to[second] = rounded(a * by.y + b * by.x);
}

// A block of threads a row. q [T, heads, nope + rope] is turned in place; kv [T, latent + rope] becomes row `slots[t]` of
// `cache` [., latent + rope]. `turns` is [T, rope / 2].
extern "C" __global__ void __launch_bounds__(THREADS)
    remember(bf16 *q, const bf16 *kv, const bf16 *weight, const float2 *turns, const i64 *slots, bf16 *cache, float eps, int heads,
             int nope, int rope, int latent, int interleaved) {
    const i64 row = blockIdx.x;
    const int width = latent + rope;
    const bf16 *from = kv + row * width;
    bf16 *to = cache + slots[row] * width;
    float squares = 0.0f;
    for (int n = threadIdx.x; n < latent; n += THREADS) squares += widened(from[n]) * widened(from[n]);
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) squares += __shfl_xor_sync(~0u, squares, lane);
    __shared__ float parts[WARPS];
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = squares;
    __syncthreads();
    float whole = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) whole += parts[warp];
    const float scale = rsqrtf(whole / latent + eps);
    for (int n = threadIdx.x; n < latent; n += THREADS) to[n] = rounded(widened(from[n]) * scale * widened(weight[n]));
    const int half = rope / 2;
    // The key is one head more.
    for (int n = threadIdx.x; n < (heads + 1) * half; n += THREADS) {
        const int head = n / half, pair = n % half;
        bf16 *own = q + (row * heads + head) * (nope + rope) + nope;
        const bool key = head == heads;
        turn(key ? from + latent : own, key ? to + latent : own, pair, turns[row * half + pair], rope, interleaved);
    }
}

// What one row needs: where its table begins in `lookup`, how many keys it sees, which row of q it is, and which part is its first,
// if it has more than one span.
struct Row {
    i64 table, seen, row, part;
};

// Blocks of threads by rows, heads and spans. `queries` [heads, rows, latent] are those of latents, q as above. Into `out`
// [heads, rows, latent], or for each span of rows of more than one into `parts` [., heads, latent] and `stats` [., heads]: sums not
// divided yet, greatest score and sum of weights.
extern "C" __global__ void __launch_bounds__(THREADS)
    attend(const bf16 *queries, const bf16 *q, const bf16 *cache, const i64 *lookup, bf16 *out, float *parts, float2 *stats,
           float scale, int heads, int nope, int rope, int latent) {
    const int rows = gridDim.x, nth = blockIdx.x, first_head = blockIdx.y * HEADS, span = blockIdx.z;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quarter = lane % 4;
    const Row row = ((const Row *)lookup)[nth];
    const i64 *table = lookup + row.table;
    const int blocks = (int)((row.seen + TOKENS - 1) / TOKENS);
    const int begin = span * SPAN, end = min(begin + SPAN, blocks);
    if (begin >= end) return;

    const int width = latent + rope, line = width + GAP;
    extern __shared__ uint4 memory[];
    bf16 *keys = (bf16 *)memory;                            // [TOKENS, line]
    bf16 *own = keys + TOKENS * line;                       // [HEADS, line]
    bf16 *weights = own + HEADS * line;                     // [HEADS, TOKENS + GAP]
    float *scores = (float *)(weights + HEADS * (TOKENS + GAP)); // [HEADS, TOKENS]
    float *largest = scores + HEADS * TOKENS, *total = largest + HEADS, *correction = total + HEADS;

    for (int n = threadIdx.x; n < HEADS * (width / 8); n += THREADS) {
        const int head = n / (width / 8), at = n % (width / 8) * 8;
        const i64 h = first_head + head;
        const bf16 *from = at < latent ? queries + (h * rows + nth) * latent + at
                                       : q + (row.row * heads + h) * (nope + rope) + nope + at - latent;
        const uint4 nothing = {0, 0, 0, 0};
        *(uint4 *)(own + head * line + at) = h < heads ? *(const uint4 *)from : nothing;
    }
    if (threadIdx.x < HEADS) {
        largest[threadIdx.x] = __int_as_float(0xff800000);
        total[threadIdx.x] = 0.0f;
    }

    const int tiles = latent / (8 * WARPS);
    float sums[MOST_TILES][4] = {};
    for (int block = begin; block < end; block++) {
        // All are through with the last block.
        __syncthreads();
        const bf16 *from = cache + table[block] * TOKENS * width;
        for (int n = threadIdx.x; n < TOKENS * (width / 8); n += THREADS)
            copy_16(keys + n / (width / 8) * line + n % (width / 8) * 8, from + (i64)n * 8);
        copies_are_there();
        __syncthreads();

        // Each warp takes 8 keys.
        float score[4] = {};
        for (int at = 0; at < width; at += 32) {
            u32 a[4], b[4];
            load_4(b, keys + (warp * 8 + lane % 8) * line + min(at + lane / 8 * 8, width - 8));
            load_4(a, own + lane % 16 * line + at + lane / 16 * 8);
            multiply(score, a, b[0], b[1]);
            if (at + 16 < width) {
                load_4(a, own + lane % 16 * line + at + 16 + lane / 16 * 8);
                multiply(score, a, b[2], b[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const int key = warp * 8 + 2 * quarter + n % 2;
            const bool sees = (i64)block * TOKENS + key < row.seen;
            scores[(group + n / 2 * 8) * TOKENS + key] = sees ? score[n] * scale : __int_as_float(0xff800000);
        }
        __syncthreads();

        // Each warp takes 2 heads.
#pragma unroll
        for (int n = 0; n < HEADS / WARPS; n++) {
            const int head = warp * (HEADS / WARPS) + n;
            const float one = scores[head * TOKENS + lane], other = scores[head * TOKENS + 32 + lane];
            float most = fmaxf(one, other);
#pragma unroll
            for (int far = 16; far > 0; far /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, far));
            const float before = largest[head];
            most = fmaxf(most, before);
            const float p = expf(one - most), r = expf(other - most);
            weights[head * (TOKENS + GAP) + lane] = rounded(p);
            weights[head * (TOKENS + GAP) + 32 + lane] = rounded(r);
            float sum = p + r;
#pragma unroll
            for (int far = 16; far > 0; far /= 2) sum += __shfl_xor_sync(~0u, sum, far);
            __syncwarp();
            if (lane == 0) {
                const float by = expf(before - most);
                correction[head] = by;
                total[head] = total[head] * by + sum;
                largest[head] = most;
            }
        }
        __syncthreads();

        // Each warp takes an eighth of the latents.
        const float low = correction[group], high = correction[group + 8];
#pragma unroll
        for (int tile = 0; tile < MOST_TILES; tile++) {
            sums[tile][0] *= low, sums[tile][1] *= low;
            sums[tile][2] *= high, sums[tile][3] *= high;
        }
        for (int key = 0; key < TOKENS; key += 16) {
            u32 a[4];
            load_4(a, weights + lane % 16 * (TOKENS + GAP) + key + lane / 16 * 8);
#pragma unroll
            for (int tile = 0; tile < MOST_TILES; tile += 2) {
                if (tile >= tiles) break;
                // Two tiles at a time; of an odd number the last one is taken with the one before it.
                const int second = tile + 1 < tiles ? 8 : 0;
                u32 b[4];
                load_4_turned(b, keys + (key + lane % 16) * line + (warp * tiles + tile) * 8 + lane / 16 * second);
                multiply(sums[tile], a, b[0], b[1]);
                if (second) multiply(sums[tile + 1], a, b[2], b[3]);
            }
        }
    }

    const bool whole = blocks <= SPAN;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int head = group + 8 * half;
        const i64 h = first_head + head;
        if (h >= heads) continue;
        const i64 place = (row.part + span) * heads + h;
        if (!whole && warp == 0 && quarter == 0) stats[place] = make_float2(largest[head], total[head]);
#pragma unroll
        for (int tile = 0; tile < MOST_TILES; tile++) {
            if (tile >= tiles) break;
            const int at = (warp * tiles + tile) * 8 + 2 * quarter;
            const float one = sums[tile][2 * half], other = sums[tile][2 * half + 1];
            if (whole) {
                bf16 *to = out + (h * rows + nth) * latent + at;
                to[0] = rounded(one / total[head]);
                to[1] = rounded(other / total[head]);
            } else {
                parts[place * latent + at] = one;
                parts[place * latent + at + 1] = other;
            }
        }
    }
}

// Rows of more than one span: a block of threads a row and head.
extern "C" __global__ void __launch_bounds__(THREADS)
    combine(const i64 *lookup, const float *parts, const float2 *stats, bf16 *out, int latent) {
    const int rows = gridDim.x, nth = blockIdx.x, heads = gridDim.y, h = blockIdx.y;
    const Row row = ((const Row *)lookup)[nth];
    const int blocks = (int)((row.seen + TOKENS - 1) / TOKENS), spans = (blocks + SPAN - 1) / SPAN;
    if (spans < 2) return;
    float most = __int_as_float(0xff800000), total = 0.0f;
    for (int span = 0; span < spans; span++) most = fmaxf(most, stats[(row.part + span) * heads + h].x);
    for (int span = 0; span < spans; span++) {
        const float2 of = stats[(row.part + span) * heads + h];
        total += expf(of.x - most) * of.y;
    }
    for (int n = threadIdx.x; n < latent; n += THREADS) {
        float sum = 0.0f;
        for (int span = 0; span < spans; span++) {
            const i64 place = (row.part + span) * heads + h;
            sum += expf(stats[place].x - most) * parts[place * latent + n];
        }
        out[((i64)h * rows + nth) * latent + n] = rounded(sum / total);
    }
}
