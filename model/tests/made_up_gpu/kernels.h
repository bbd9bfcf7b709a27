// What a GPU knows of one of our kernels.

#pragma once

#include <array>
#include <functional>

struct Kernel {
    const char *name;
    // What it does with such arguments, as cuLaunchKernel takes them; they are read now, what they point to when it is done.
    std::function<void()> (*with)(void **arguments, std::array<int, 3> grid, size_t shared);
};

// Null where there is none of that name.
const Kernel *kernel(const char *name);
