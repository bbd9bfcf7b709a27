// The kernels of attention, without a GPU, beside the formula in f64; and rows that attend among others beside the same rows alone.

#include "emulated.h"

#include "attention.cu"

namespace {

struct Sizes {
    int heads, nope, rope, latent;
    int width() const { return latent + rope; }
    int each() const { return nope + rope; }
};

// A row of q, and how many keys of which table it sees.
struct Query {
    int table, seen, row;
};

// Tables of 17 blocks and of two, neither in order.
const std::vector<std::vector<int>> TABLES = {{16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0}, {18, 17}};
constexpr int BLOCKS = 19;
// Of one span, of two and of three, of whole blocks and not, of one key.
const std::vector<Query> QUERIES = {{1, 30, 0}, {0, 1030, 1}, {0, 512, 2}, {0, 1031, 3}, {0, 513, 5}, {1, 1, 4}};
constexpr int ROWS = 6;

struct Layer {
    Sizes sizes;
    std::vector<bf16> cache, q, absorbed;
    float scale;

    explicit Layer(Sizes sizes)
        : sizes(sizes), cache(drawn_values((size_t)BLOCKS * TOKENS * sizes.width(), 1.0f)),
          q(drawn_values((size_t)ROWS * sizes.heads * sizes.each(), 1.0f)),
          absorbed(drawn_values(QUERIES.size() * sizes.heads * sizes.latent, 0.3f)), scale(0.2f) {}

    const bf16 *key(const Query &query, int token) const {
        return &cache[((size_t)TABLES[query.table][token / TOKENS] * TOKENS + token % TOKENS) * sizes.width()];
    }

    // `[heads, latent]` of query `nth`.
    const bf16 *of_latents(int nth, int head) const { return &absorbed[((size_t)nth * sizes.heads + head) * sizes.latent]; }

    // Of these queries, `[heads, n, latent]`, as model/src/gpu/attention.rs asks for it.
    std::vector<bf16> by_kernels(const std::vector<int> &which) const {
        const int heads = sizes.heads, latent = sizes.latent, rows = (int)which.size();
        std::vector<i64> lookup, tables, begins;
        for (const auto &table : TABLES) {
            begins.push_back(4 * rows + (i64)tables.size());
            tables.insert(tables.end(), table.begin(), table.end());
        }
        int spans = 0;
        i64 apart = 0;
        for (int nth : which) {
            const Query &query = QUERIES[nth];
            const int own = ((query.seen + TOKENS - 1) / TOKENS + SPAN - 1) / SPAN;
            lookup.insert(lookup.end(), {begins[query.table], query.seen, query.row, apart});
            spans = max(spans, own);
            apart += own > 1 ? own : 0;
        }
        lookup.insert(lookup.end(), tables.begin(), tables.end());
        const bf16 none = rounded(NAN);
        std::vector<bf16> queries((size_t)heads * rows * latent), out(queries.size(), none);
        for (int head = 0; head < heads; head++)
            for (int n = 0; n < rows; n++)
                std::copy_n(of_latents(which[n], head), latent, &queries[((size_t)head * rows + n) * latent]);
        std::vector<float> parts((size_t)(apart + 1) * heads * latent, NAN);
        std::vector<float2> stats((size_t)(apart + 1) * heads, {NAN, NAN});
        // As the host counts it: keys, queries, weights, scores and three numbers a head.
        const int line = sizes.width() + GAP;
        const size_t shared = 2 * (TOKENS + HEADS) * line + 2 * HEADS * (TOKENS + GAP) + 4 * HEADS * (TOKENS + 3);
        launch({rows, (heads + HEADS - 1) / HEADS, spans}, shared, [&] {
            attend(queries.data(), q.data(), cache.data(), lookup.data(), out.data(), parts.data(), stats.data(), scale, heads,
                   sizes.nope, sizes.rope, latent);
        });
        if (spans > 1)
            launch({rows, heads, 1}, 0, [&] { combine(lookup.data(), parts.data(), stats.data(), out.data(), latent); });
        return out;
    }

    // Of query `nth` and one head, `[latent]`.
    std::vector<double> plainly(int nth, int head) const {
        const Query &query = QUERIES[nth];
        const bf16 *of_latent = of_latents(nth, head);
        const bf16 *of_position = &q[((size_t)query.row * sizes.heads + head) * sizes.each() + sizes.nope];
        std::vector<double> scores(query.seen), sums(sizes.latent, 0.0);
        for (int token = 0; token < query.seen; token++) {
            double score = 0;
            for (int at = 0; at < sizes.width(); at++)
                score += (double)f32(at < sizes.latent ? of_latent[at] : of_position[at - sizes.latent]) * f32(key(query, token)[at]);
            scores[token] = score * scale;
        }
        const double most = *std::max_element(scores.begin(), scores.end());
        double total = 0;
        for (int token = 0; token < query.seen; token++) {
            const double weight = std::exp(scores[token] - most);
            total += weight;
            for (int at = 0; at < sizes.latent; at++) sums[at] += weight * f32(key(query, token)[at]);
        }
        for (double &sum : sums) sum /= total;
        return sums;
    }
};

void attends(Sizes sizes) {
    const Layer layer(sizes);
    const int rows = (int)QUERIES.size();
    const auto together = layer.by_kernels({0, 1, 2, 3, 4, 5});
    const auto of = [&](const std::vector<bf16> &out, int all, int nth, int head) {
        return &out[((size_t)head * all + nth) * sizes.latent];
    };
    double worst = 0;
    for (int nth = 0; nth < rows; nth++) {
        const auto alone = layer.by_kernels({nth});
        // Of each by itself: the more keys a row sees, the smaller are its sums.
        Off off;
        for (int head = 0; head < sizes.heads; head++) {
            const auto right = layer.plainly(nth, head);
            const bf16 *ours = of(together, rows, nth, head);
            for (int at = 0; at < sizes.latent; at++) off.see(f32(ours[at]), right[at]);
            expect(std::equal(ours, ours + sizes.latent, of(alone, 1, 0, head)), "a row's bits are its own");
        }
        expect(off.share() < 5e-3, "attend and combine are the formula");
        worst = max(worst, off.share());
    }
    std::printf("attend, %d heads of %d + %d, %d latents: off by %.1e at most\n", sizes.heads, sizes.nope, sizes.rope, sizes.latent, worst);
}

void remembers(Sizes sizes, bool interleaved) {
    const int heads = sizes.heads, nope = sizes.nope, rope = sizes.rope, latent = sizes.latent;
    const std::vector<i64> slots = {70, 3, 200};
    const int rows = (int)slots.size(), width = sizes.width(), each = sizes.each();
    const auto kv = drawn_values((size_t)rows * width, 1.0f), weight = drawn_values(latent, 1.0f);
    const auto before = drawn_values((size_t)4 * TOKENS * width, 1.0f), q = drawn_values((size_t)rows * heads * each, 1.0f);
    std::vector<float2> turns((size_t)rows * rope / 2);
    for (float2 &turn : turns) {
        const float angle = drawn() * 3;
        turn = {std::cos(angle), std::sin(angle)};
    }
    auto cache = before, turned = q;
    const float eps = 0.1f;
    launch({rows, 1, 1}, 0, [&] {
        remember(turned.data(), kv.data(), weight.data(), turns.data(), slots.data(), cache.data(), eps, heads, nope, rope, latent,
                 interleaved);
    });

    auto right_cache = before, right_q = q;
    const auto turn = [&](int row, const bf16 *from, bf16 *to) {
        for (int pair = 0; pair < rope / 2; pair++) {
            const int first = interleaved ? 2 * pair : pair, second = interleaved ? first + 1 : pair + rope / 2;
            const auto [cosine, sine] = turns[(size_t)row * rope / 2 + pair];
            const double a = f32(from[first]), b = f32(from[second]);
            to[first] = rounded((float)(a * cosine - b * sine));
            to[second] = rounded((float)(a * sine + b * cosine));
        }
    };
    for (int row = 0; row < rows; row++) {
        const bf16 *from = &kv[(size_t)row * width];
        bf16 *to = &right_cache[slots[row] * width];
        double squares = 0;
        for (int at = 0; at < latent; at++) squares += (double)f32(from[at]) * f32(from[at]);
        for (int at = 0; at < latent; at++)
            to[at] = rounded((float)(f32(from[at]) / std::sqrt(squares / latent + eps) * f32(weight[at])));
        turn(row, from + latent, to + latent);
        for (int head = 0; head < heads; head++) {
            const size_t own = ((size_t)row * heads + head) * each + nope;
            turn(row, &q[own], &right_q[own]);
        }
    }
    Off off;
    for (size_t at = 0; at < cache.size(); at++) {
        const bool written = std::count(slots.begin(), slots.end(), (i64)(at / width)) > 0;
        if (written) off.see(f32(cache[at]), f32(right_cache[at]));
        else expect(cache[at] == before[at], "the rest of the cache is left alone");
    }
    for (size_t at = 0; at < q.size(); at++) {
        if ((int)(at % each) >= nope) off.see(f32(turned[at]), f32(right_q[at]));
        else expect(turned[at] == q[at], "what carries no position is left alone");
    }
    expect(off.share() < 1e-3, "remember norms latents and turns keys");
}

}  // namespace

int main() {
    // Fewer heads than a block of threads takes, more, and as many; latents of one tile a warp, of three, and of eight, the most
    // there are.
    for (const Sizes sizes : {Sizes{5, 16, 16, 64}, Sizes{20, 8, 32, 192}, Sizes{16, 16, 64, 512}}) {
        attends(sizes);
        for (const bool interleaved : {false, true}) remembers(sizes, interleaved);
    }
}
