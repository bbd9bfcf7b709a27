// A GPU for libtorch where there is none. In: what libtorch, and the code that is tested, ask of one. Out: what a GPU might have made
// of it. Never here: a wait that nobody asked for. What a real one does by chance, this one does always.
//
// Its memory is the process's. A stream is a list of what is to be done, copies and our own kernels, and nothing of it is done before
// somebody waits for something on it or behind it, or asks whether it has come; but for those streams that `hurry` names, which do at once
// what they may. Memory that was given back is given away again on the stream that it was of, as libtorch's own allocator does, whoever may
// still have to read it. What libtorch computes, its processor's half computes, once all is done that the stream was told before. There is
// one such GPU; what is told of another is told of this one.

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <dlfcn.h>

#include "kernels.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace {

// --- streams and events ---

struct Stream;

// A point on a stream.
struct Point {
    Stream* of;
    bool come = false;
};

// Whole lines of the processor's cache.
struct Bytes {
    size_t size;
    char* start;
    Bytes(size_t size, int filled) : size(size), start(static_cast<char*>(std::aligned_alloc(64, size / 64 * 64 + 64))) {
        std::memset(start, filled, size);
    }
};

// Memory of the host that the GPU may read and write by itself, and how many of its copies are still to be done.
struct Pinned {
    Bytes bytes;
    int uses = 0;
    bool given_back = false;
};

struct Task {
    // What is done, where something is, and whose copy it is.
    std::function<void()> work;
    Pinned* pinned = nullptr;
    // Otherwise a point that is reached, or waited for.
    std::shared_ptr<Point> reaches, waits;
};

struct Stream {
    std::deque<Task> tasks;
};

struct Event {
    std::shared_ptr<Point> point;
};

Stream main_stream;
std::vector<std::unique_ptr<Stream>> others;
thread_local Stream* current = &main_stream;
// Threads take turns on all that is here.
std::recursive_mutex everything;
using Turn = std::lock_guard<std::recursive_mutex>;
// Bit 0: the main stream does at once what it may; bit 1: all others do.
int hurried = 0;

void give_back(Pinned* pinned);

// Does what is first on `stream`. False where that waits for another, or nothing is there.
bool step(Stream& stream) {
    if (stream.tasks.empty()) return false;
    if (stream.tasks.front().waits && !stream.tasks.front().waits->come) return false;
    const Task task = std::move(stream.tasks.front());
    stream.tasks.pop_front();
    if (task.work) task.work();
    if (task.reaches) task.reaches->come = true;
    if (task.pinned && --task.pinned->uses == 0 && task.pinned->given_back) give_back(task.pinned);
    return true;
}

void reach(Point& point) {
    const Turn turn(everything);
    while (!point.come) {
        if (step(*point.of)) continue;
        TORCH_CHECK(!point.of->tasks.empty(), "a point that no stream leads to");
        reach(*point.of->tasks.front().waits);
    }
}

void drain(Stream& stream) {
    const Turn turn(everything);
    while (!stream.tasks.empty())
        if (!step(stream)) reach(*stream.tasks.front().waits);
}

void told(Stream& stream, Task task) {
    const Turn turn(everything);
    stream.tasks.push_back(std::move(task));
    for (bool more = true; more;) {
        more = (hurried & 1) && step(main_stream);
        if (hurried & 2)
            for (auto& other : others) more |= step(*other);
    }
}

Stream& of(void* stream) { return stream ? *static_cast<Stream*>(stream) : main_stream; }

// --- memory ---

struct Block {
    Stream* of;
    Bytes bytes;
};

std::map<std::pair<Stream*, size_t>, std::vector<Block*>> unused;
std::map<size_t, std::vector<Pinned*>> unused_pinned;
std::map<const void*, Pinned*> all_pinned;

struct Memory final : c10::Allocator {
    c10::DataPtr allocate(size_t size) override {
        const Turn turn(everything);
        auto& free = unused[{current, size}];
        if (free.empty()) free.push_back(new Block{current, Bytes(size, 0xff)});
        Block* block = free.back();
        free.pop_back();
        return {block->bytes.start, block, &give, c10::Device(c10::kCUDA, 0)};
    }
    static void give(void* context) {
        const Turn turn(everything);
        auto* block = static_cast<Block*>(context);
        unused[{block->of, block->bytes.size}].push_back(block);
    }
    c10::DeleterFnPtr raw_deleter() const override { return &give; }
    void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
} memory;

void give_back(Pinned* pinned) {
    // Whoever reads it now reads nonsense.
    std::memset(pinned->bytes.start, 0xee, pinned->bytes.size);
    unused_pinned[pinned->bytes.size].push_back(pinned);
}

struct PinnedMemory final : c10::Allocator {
    c10::DataPtr allocate(size_t size) override {
        const Turn turn(everything);
        auto& free = unused_pinned[size];
        if (free.empty()) free.push_back(new Pinned{Bytes(size, 0xee)});
        Pinned* pinned = free.back();
        free.pop_back();
        pinned->given_back = false;
        all_pinned[pinned->bytes.start] = pinned;
        return {pinned->bytes.start, pinned, &give, c10::Device(c10::kCPU)};
    }
    static void give(void* context) {
        const Turn turn(everything);
        auto* pinned = static_cast<Pinned*>(context);
        all_pinned.erase(pinned->bytes.start);
        pinned->given_back = true;
        if (pinned->uses == 0) give_back(pinned);
    }
    c10::DeleterFnPtr raw_deleter() const override { return &give; }
    void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
} pinned_memory;

// --- what libtorch asks of a GPU ---

struct Guard final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return c10::kCUDA; }
    c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
    c10::Device getDevice() const override { return {c10::kCUDA, 0}; }
    void setDevice(c10::Device) const override {}
    void uncheckedSetDevice(c10::Device) const noexcept override {}
    c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
    c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
    c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct CUDAHooks final : at::CUDAHooksInterface {
    explicit CUDAHooks(at::CUDAHooksArgs) {}
    void init() const override {}
    bool hasCUDA() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    int getNumGPUs() const override { return 1; }
    c10::DeviceIndex deviceCount() const override { return 1; }
    bool isPinnedPtr(const void* data) const override {
        const Turn turn(everything);
        return all_pinned.count(data) != 0;
    }
    c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
    void deviceSynchronize(c10::DeviceIndex) const override {
        const Turn turn(everything);
        drain(main_stream);
        for (auto& other : others) drain(*other);
    }
};

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> kind, std::optional<at::Layout>, std::optional<at::Device>,
                 std::optional<bool>, std::optional<at::MemoryFormat> format) {
    const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
    return at::detail::empty_generic(sizes, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(kind), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> kind,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
    const auto sizes = C10_AS_INTARRAYREF_SLOW(size), strides = C10_AS_INTARRAYREF_SLOW(stride);
    const c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
    return at::detail::empty_strided_generic(sizes, strides, &memory, keys, c10::dtype_or_default(kind));
}

// The same memory, as the processor's.
at::Tensor as_host(const at::Tensor& tensor) {
    const auto& storage = tensor.storage();
    c10::DataPtr start(storage.mutable_data(), c10::Device(c10::kCPU));
    c10::Storage same(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(start), nullptr, false);
    auto host = at::detail::make_tensor<c10::TensorImpl>(std::move(same), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
    host.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    return host;
}

// libtorch takes a thread's last error for its own.
thread_local int last_error = 0;

at::Tensor& copy(at::Tensor& self, const at::Tensor& from, bool non_blocking) {
    const Turn turn(everything);
    TORCH_CHECK(last_error == 0, "CUDA error ", last_error);
    const bool bytes = self.scalar_type() == from.scalar_type() && self.sizes() == from.sizes();
    if (!bytes || !self.is_contiguous() || !from.is_contiguous()) {
        drain(*current);
        auto to = self.is_cuda() ? as_host(self) : self;
        to.copy_(from.is_cuda() ? as_host(from) : from);
        return self;
    }
    const at::Tensor& host = self.is_cpu() ? self : from;
    const auto found = all_pinned.find(host.const_data_ptr());
    Pinned* pinned = host.is_cpu() && found != all_pinned.end() ? found->second : nullptr;
    if (pinned) ++pinned->uses;
    Task task;
    task.work = [to = self.mutable_data_ptr(), start = from.const_data_ptr(), size = self.nbytes()] { std::memcpy(to, start, size); };
    task.pinned = pinned;
    told(*current, std::move(task));
    if (host.is_cpu() && !(pinned && non_blocking)) drain(*current);
    return self;
}

// --- what libtorch computes ---

// `value` with `one` of each of its tensors.
template <typename One>
c10::IValue each_of(const c10::IValue& value, One one) {
    if (value.isTensor()) return one(value.toTensor());
    if (value.isTensorList()) {
        c10::List<at::Tensor> list;
        for (const at::Tensor& tensor : value.toTensorList()) list.push_back(one(tensor));
        return list;
    }
    // Tensors that may be missing, as indices are.
    if (value.isList() && !value.toListRef().empty()) {
        const auto values = value.toListRef();
        const auto is_one = [](const c10::IValue& each) { return each.isTensor() || each.isNone(); };
        if (!std::all_of(values.begin(), values.end(), is_one)) return value;
        c10::List<std::optional<at::Tensor>> list;
        for (const c10::IValue& each : values) list.push_back(each.isNone() ? std::optional<at::Tensor>() : one(each.toTensor()));
        return list;
    }
    return value;
}

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    const Turn turn(everything);
    TORCH_CHECK(last_error == 0, "CUDA error ", last_error);
    drain(*current);
    const auto& schema = op.schema();
    std::vector<at::Tensor> given;
    for (size_t at = stack->size() - schema.arguments().size(); at < stack->size(); ++at) {
        auto& value = (*stack)[at];
        if (value.isDevice()) value = c10::Device(c10::kCPU);
        value = each_of(value, [&](const at::Tensor& tensor) {
            if (!tensor.defined() || !tensor.is_cuda()) return tensor;
            given.push_back(tensor);
            return as_host(tensor);
        });
    }
    op.callBoxed(stack);
    const auto there = [&](const at::Tensor& made, bool written) -> at::Tensor {
        if (!made.defined() || !made.has_storage()) return made;
        for (const at::Tensor& tensor : given) {
            if (made.storage().data() != tensor.storage().data() || !made.storage().data()) continue;
            const bool same = made.sizes() == tensor.sizes() && made.strides() == tensor.strides();
            if (written && same && made.storage_offset() == tensor.storage_offset()) return tensor;
            if (written) continue;
            const c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
            auto view = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(tensor.storage()), keys, made.dtype());
            view.unsafeGetTensorImpl()->set_sizes_and_strides(made.sizes(), made.strides(), made.storage_offset());
            return view;
        }
        const auto whole = made.is_non_overlapping_and_dense() ? made : made.contiguous();
        const c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
        auto result = at::detail::empty_strided_generic(whole.sizes(), whole.strides(), &memory, keys, whole.scalar_type());
        if (whole.nbytes()) std::memcpy(result.mutable_data_ptr(), whole.const_data_ptr(), whole.nbytes());
        return result;
    };
    const size_t first = stack->size() - schema.returns().size();
    for (size_t at = first; at < stack->size(); ++at) {
        const auto* alias = schema.returns()[at - first].alias_info();
        (*stack)[at] = each_of((*stack)[at], [&](const at::Tensor& made) { return there(made, alias && alias->isWrite()); });
    }
}

struct Registered {
    Registered() { c10::SetAllocator(c10::kCUDA, &memory); }
} registered;

}  // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
    library.impl("empty.memory_format", &empty);
    library.impl("empty_strided", &empty_strided);
    library.impl("copy_", &copy);
}

// --- what the code that is tested asks of one ---

#define ASKED extern "C" __attribute__((visibility("default")))

// The call that fails, counted down.
int until_failure = -1;

int outcome() {
    const Turn turn(everything);
    if (until_failure < 0 || until_failure-- > 0) return 0;
    return last_error = 2;
}

// Call `nth` from now on fails, once.
ASKED void fail(int nth) { until_failure = nth; }

// Which streams do at once what they may.
ASKED void hurry(int streams) { hurried = streams; }

// Whoever wants NVIDIA's libraries, or libtorch's half for them, gets this one.
ASKED void* dlopen(const char* name, int flags) {
    static const auto real = reinterpret_cast<void* (*)(const char*, int)>(dlsym(RTLD_NEXT, "dlopen"));
    const auto is = [&](const char* one) { return name && std::strcmp(name, one) == 0; };
    return real(is("libc10_cuda.so") || is("libtorch_cuda.so") || is("libcaffe2_nvrtc.so") ? nullptr : name, flags);
}

ASKED int cudaSetDevice(int) { return outcome(); }

ASKED int cudaGetLastError() { return std::exchange(last_error, 0); }

ASKED int cudaMemGetInfo(size_t* free, size_t* all) {
    *free = *all = size_t(4) << 30;
    return 0;
}

// Compute capability 9.0.
ASKED int cudaDeviceGetAttribute(int* value, int attribute, int) {
    *value = attribute == 75 ? 9 : 0;
    return 0;
}

ASKED int cudaEventCreateWithFlags(void** event, unsigned) {
    if (const int failed = outcome()) return failed;
    *event = new Event;
    return 0;
}

ASKED int cudaEventRecord(void* event, void* stream) {
    const Turn turn(everything);
    if (const int failed = outcome()) return failed;
    auto& point = static_cast<Event*>(event)->point;
    point = std::make_shared<Point>(Point{&of(stream)});
    Task task;
    task.reaches = point;
    told(of(stream), std::move(task));
    return 0;
}

ASKED int cudaStreamWaitEvent(void* stream, void* event, unsigned) {
    const Turn turn(everything);
    if (const int failed = outcome()) return failed;
    Task task;
    task.waits = static_cast<Event*>(event)->point;
    told(of(stream), std::move(task));
    return 0;
}

ASKED int cudaEventSynchronize(void* event) {
    if (const int failed = outcome()) return failed;
    reach(*static_cast<Event*>(event)->point);
    return 0;
}

// Something is done meanwhile. Not ready is 600.
ASKED int cudaEventQuery(void* event) {
    const Turn turn(everything);
    const auto point = static_cast<Event*>(event)->point;
    for (Stream* stream = point->of; !point->come && !stream->tasks.empty() && !step(*stream);) stream = stream->tasks.front().waits->of;
    return point->come ? 0 : last_error = 600;
}

ASKED int torch_set_current_cuda_stream(void* stream, int32_t) {
    // Back to the main stream it goes always.
    if (stream && outcome()) return 1;
    current = &of(stream);
    return 0;
}

ASKED int torch_get_cuda_stream_from_pool(bool, int32_t, void** stream) {
    const Turn turn(everything);
    others.push_back(std::make_unique<Stream>());
    *stream = others.back().get();
    return 0;
}

// --- kernels of our own, which were compiled before ---

ASKED int nvrtcCreateProgram(void** program, const char*, const char*, int, const char* const*, const char* const*) {
    *program = nullptr;
    return 0;
}

ASKED int nvrtcCompileProgram(void*, int, const char* const*) { return 0; }
ASKED int nvrtcDestroyProgram(void**) { return 0; }

ASKED int nvrtcGetCUBINSize(void*, size_t* size) {
    *size = 1;
    return 0;
}

ASKED int nvrtcGetCUBIN(void*, char* binary) {
    *binary = 0;
    return 0;
}

ASKED int cuModuleLoadData(void** module, const void*) {
    *module = &others;
    return 0;
}

ASKED int cuModuleGetFunction(void** function, void*, const char* name) {
    *function = const_cast<Kernel*>(kernel(name));
    // 500 is that it is not found.
    return *function ? 0 : 500;
}

ASKED int cuFuncSetAttribute(void*, int, int) { return 0; }

ASKED int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned, unsigned, unsigned, unsigned shared, void* stream,
                         void** arguments, void**) {
    const Turn turn(everything);
    Task task;
    task.work = static_cast<const Kernel*>(function)->with(arguments, {int(x), int(y), int(z)}, shared);
    told(of(stream), std::move(task));
    return 0;
}
