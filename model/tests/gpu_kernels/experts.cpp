// The kernels of experts, without a GPU, beside the formula in f64; and each row among others beside the same row alone.

#include "emulated.h"

#include "experts.cu"

namespace {

// As the checkpoint's E4M3 is defined (OCP 8-bit floating point specification, section 5.2).
float of_code(unsigned char code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const float value = exponent ? std::ldexp(1.0f + mantissa / 8.0f, exponent - 7) : std::ldexp(mantissa / 8.0f, -6);
    return code & 0x80 ? -value : value;
}

bool is_number(unsigned char code) { return (code & 0x7f) != 0x7f; }

// `[outs, inner]`; in blocks of `block`, or BF16 where that is 0.
struct Weight {
    std::vector<uint4> memory;
    std::vector<float> scales, values;
    int inner;

    Weight(int outs, int inner, int block) : scales(1, 1.0f), values((size_t)outs * inner), inner(inner) {
        const int across = block ? (inner + block - 1) / block : 0;
        memory.resize(values.size() * 2 / sizeof(uint4) + 1);
        if (block) scales.assign((size_t)across * ((outs + block - 1) / block), 0.0f);
        for (float &scale : scales) scale = 1e-4f + 1e-3f * std::fabs(drawn());
        for (size_t at = 0; at < values.size(); at++) {
            if (block) {
                static std::mt19937 generator(11);
                unsigned char code = (unsigned char)generator();
                if (!is_number(code)) code = 0x80;
                ((unsigned char *)memory.data())[at] = code;
                values[at] = of_code(code) * scales[at / inner / block * across + at % inner / block];
            } else {
                const bf16 value = rounded(0.2f * drawn());
                ((bf16 *)memory.data())[at] = value;
                values[at] = f32(value);
            }
        }
    }

    const char *start() const { return (const char *)memory.data(); }

    double product(int out, const std::vector<double> &x) const {
        double sum = 0;
        for (int at = 0; at < inner; at++) sum += values[(size_t)out * inner + at] * x[at];
        return sum;
    }
};

struct Expert {
    Weight gate, up, down;
    Expert(int hidden, int inner, int block) : gate(inner, hidden, block), up(inner, hidden, block), down(hidden, inner, block) {}

    std::vector<double> plainly(const bf16 *row) const {
        std::vector<double> x(gate.inner), between(down.inner), y(gate.inner);
        for (size_t at = 0; at < x.size(); at++) x[at] = f32(row[at]);
        for (size_t at = 0; at < between.size(); at++) {
            const double gated = gate.product((int)at, x);
            between[at] = f32(rounded((float)(gated / (1 + std::exp(-gated)) * up.product((int)at, x))));
        }
        for (size_t at = 0; at < y.size(); at++) y[at] = down.product((int)at, between);
        return y;
    }
};

using Kernel = void (*)(const Group *, const bf16 *, const i64 *, bf16 *, int, int, int);

constexpr int EXPERTS = 4;

// Row n goes to expert 0, and to 1 or 2 by turns; the last expert gets none.
int expert_of(int row, int nth) { return nth ? 1 + row % 2 : 0; }

// Rows `which` of `x`, `[2 * n, hidden]`, as model/src/gpu/experts.rs asks for it.
std::vector<bf16> by_kernels(const std::vector<Expert> &experts, const std::vector<bf16> &x, int hidden, int inner, int block,
                             const std::vector<int> &which) {
    std::vector<Group> groups;
    std::vector<i64> order, places;
    int most = 0;
    for (int expert = 0; expert < EXPERTS; expert++) {
        const auto &[gate, up, down] = experts[expert];
        const i64 first = (i64)order.size();
        for (size_t n = 0; n < which.size(); n++)
            for (int nth = 0; nth < 2; nth++)
                if (expert_of(which[n], nth) == expert) order.push_back(which[n]), places.push_back((i64)(2 * n + nth));
        const i64 count = (i64)order.size() - first;
        groups.push_back(
            {gate.start(), up.start(), down.start(), gate.scales.data(), up.scales.data(), down.scales.data(), first, count});
        most = max(most, (int)count);
    }
    const Kernel kernels[2][2][3] = {
        {{gate_and_up_bf16_1, gate_and_up_bf16_2, gate_and_up_bf16_4}, {down_bf16_1, down_bf16_2, down_bf16_4}},
        {{gate_and_up_fp8_1, gate_and_up_fp8_2, gate_and_up_fp8_4}, {down_fp8_1, down_fp8_2, down_fp8_4}},
    };
    const int nth = most <= ROWS ? 0 : most <= 2 * ROWS ? 1 : 2, at_once = ROWS << nth;
    const auto &both = kernels[block > 0];
    const bf16 none = rounded(NAN);
    std::vector<bf16> between(order.size() * inner + 8, none), y(order.size() * hidden, none);
    const auto grid = [&](int outs) { return Place{(outs + OUTS - 1) / OUTS, EXPERTS, (most + at_once - 1) / at_once}; };
    launch(grid(inner), 0, [&] { both[0][nth](groups.data(), x.data(), order.data(), between.data(), hidden, inner, block); });
    launch(grid(hidden), 0, [&] { both[1][nth](groups.data(), between.data(), places.data(), y.data(), hidden, inner, block); });
    return y;
}

void compute(int hidden, int inner, int block, const std::vector<int> &numbers) {
    std::vector<Expert> experts;
    for (int expert = 0; expert < EXPERTS; expert++) experts.emplace_back(hidden, inner, block);
    for (const int rows : numbers) {
        const auto x = drawn_values((size_t)rows * hidden, 1.0f);
        std::vector<int> all(rows);
        for (int row = 0; row < rows; row++) all[row] = row;
        const auto y = by_kernels(experts, x, hidden, inner, block, all);
        Off off;
        for (int row = 0; row < rows; row++)
            for (int nth = 0; nth < 2; nth++) {
                const auto right = experts[expert_of(row, nth)].plainly(&x[(size_t)row * hidden]);
                for (int at = 0; at < hidden; at++) off.see(f32(y[((size_t)2 * row + nth) * hidden + at]), right[at]);
            }
        expect(off.share() < 5e-3, "experts are down(silu(gate) * up)");
        for (const int row : {0, rows / 2, rows - 1}) {
            const auto alone = by_kernels(experts, x, hidden, inner, block, {row});
            expect(std::equal(alone.begin(), alone.end(), &y[(size_t)2 * row * hidden]), "a row's bits are its own");
        }
        std::printf("%d x %d, blocks of %d, %d rows: off by %.1e\n", hidden, inner, block, rows, off.share());
    }
}

}  // namespace

int main() {
    for (int code = 0; code < 256; code++)
        expect(!is_number(code) || f32((bf16)widened(code)) == of_code(code), "every code of E4M3 is widened exactly");
    for (const auto &[hidden, inner] : {std::pair(16, 16), std::pair(144, 48), std::pair(272, 80)})
        // One tile, two, and more than one block of threads takes of four.
        for (const int block : {0, 64, 128}) compute(hidden, inner, block, {1, 8, 11, 40});
    // So long that every warp comes round a second time.
    for (const int block : {0, 128}) compute(1040, 528, block, {3});
}
