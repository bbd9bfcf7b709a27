// All kernels of model/src/gpu, for a processor. How: ../gpu_kernels/emulated.h.

#include "../gpu_kernels/emulated.h"

#include "kernels.h"

#include <tuple>

namespace attention {
#include "attention.cu"
}

namespace experts {
#include "experts.cu"
}

namespace {

template <typename... Values, size_t... Nth>
std::tuple<Values...> values(void (*)(Values...), void **arguments, std::index_sequence<Nth...>) {
    return {*static_cast<Values *>(arguments[Nth])...};
}

template <auto function, typename... Values>
std::function<void()> with(void (*)(Values...), void **arguments, std::array<int, 3> grid, size_t shared) {
    const auto given = values(function, arguments, std::index_sequence_for<Values...>());
    return [=] { launch({grid[0], grid[1], grid[2]}, shared, [=] { std::apply(function, given); }); };
}

template <auto function>
std::function<void()> with(void **arguments, std::array<int, 3> grid, size_t shared) {
    return with<function>(function, arguments, grid, shared);
}

#define KERNEL(SPACE, NAME) {#NAME, with<SPACE::NAME>}

const Kernel kernels[] = {
    KERNEL(attention, remember),         KERNEL(attention, attend),           KERNEL(attention, combine),
    KERNEL(experts, gate_and_up_bf16_1), KERNEL(experts, gate_and_up_bf16_2), KERNEL(experts, gate_and_up_bf16_4),
    KERNEL(experts, down_bf16_1),        KERNEL(experts, down_bf16_2),        KERNEL(experts, down_bf16_4),
    KERNEL(experts, gate_and_up_fp8_1),  KERNEL(experts, gate_and_up_fp8_2),  KERNEL(experts, gate_and_up_fp8_4),
    KERNEL(experts, down_fp8_1),         KERNEL(experts, down_fp8_2),         KERNEL(experts, down_fp8_4),
};

}  // namespace

const Kernel *kernel(const char *name) {
    for (const Kernel &one : kernels)
        if (std::strcmp(one.name, name) == 0) return &one;
    return nullptr;
}
