// A GPU that only copies, and as late or as early as it may. In: what libtorch, and the code that is tested, ask of one. Out: bytes in
// places. Never here: a wait that nobody asked for; what a real one does by chance, this one does always.
//
// Its memory is the process's. A stream is a list of what is to be done, and nothing on it is done before something on it, or behind
// it, is waited for; but for those streams that `hurry` names, which do at once what they may. Memory that was given back is given
// away again on the stream that it was of, as libtorch's own allocator does, whoever may still have to read it.

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <vector>

namespace {

// --- streams and events ---

struct Stream;

// A point on a stream.
struct Point {
    Stream* of;
    bool come = false;
};

// Memory of the host that the GPU may read and write by itself, and how many of its copies are still to be done.
struct Pinned {
    std::vector<char> bytes;
    int uses = 0;
    bool given_back = false;
};

struct Task {
    // A copy, where it has a place.
    void* to = nullptr;
    const void* from = nullptr;
    size_t size = 0;
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
// Bit 0: the main stream does at once what it may; bit 1: all others do.
int hurried = 0;

void give_back(Pinned* pinned);

// Does what is first on `stream`. False where that waits for another, or nothing is there.
bool step(Stream& stream) {
    if (stream.tasks.empty()) return false;
    Task task = stream.tasks.front();
    if (task.waits && !task.waits->come) return false;
    stream.tasks.pop_front();
    if (task.to) std::memcpy(task.to, task.from, task.size);
    if (task.reaches) task.reaches->come = true;
    if (task.pinned && --task.pinned->uses == 0 && task.pinned->given_back) give_back(task.pinned);
    return true;
}

void reach(Point& point) {
    while (!point.come) {
        if (step(*point.of)) continue;
        TORCH_CHECK(!point.of->tasks.empty(), "a point that no stream leads to");
        reach(*point.of->tasks.front().waits);
    }
}

void drain(Stream& stream) {
    while (!stream.tasks.empty())
        if (!step(stream)) reach(*stream.tasks.front().waits);
}

void told(Stream& stream, Task task) {
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
    std::vector<char> bytes;
};

std::map<std::pair<Stream*, size_t>, std::vector<Block*>> unused;
std::map<size_t, std::vector<Pinned*>> unused_pinned;
std::map<const void*, Pinned*> all_pinned;

struct Memory final : c10::Allocator {
    c10::DataPtr allocate(size_t size) override {
        auto& free = unused[{current, size}];
        if (free.empty()) free.push_back(new Block{current, std::vector<char>(size + 1, char(0xff))});
        Block* block = free.back();
        free.pop_back();
        return {block->bytes.data(), block, &give, c10::Device(c10::kCUDA, 0)};
    }
    static void give(void* context) {
        auto* block = static_cast<Block*>(context);
        unused[{block->of, block->bytes.size() - 1}].push_back(block);
    }
    c10::DeleterFnPtr raw_deleter() const override { return &give; }
    void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
} memory;

void give_back(Pinned* pinned) {
    // Whoever reads it now reads nonsense.
    std::memset(pinned->bytes.data(), 0xee, pinned->bytes.size());
    unused_pinned[pinned->bytes.size() - 1].push_back(pinned);
}

struct PinnedMemory final : c10::Allocator {
    c10::DataPtr allocate(size_t size) override {
        auto& free = unused_pinned[size];
        if (free.empty()) free.push_back(new Pinned{std::vector<char>(size + 1, char(0xee))});
        Pinned* pinned = free.back();
        free.pop_back();
        pinned->given_back = false;
        all_pinned[pinned->bytes.data()] = pinned;
        return {pinned->bytes.data(), pinned, &give, c10::Device(c10::kCPU)};
    }
    static void give(void* context) {
        auto* pinned = static_cast<Pinned*>(context);
        all_pinned.erase(pinned->bytes.data());
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
    bool isPinnedPtr(const void* data) const override { return all_pinned.count(data) != 0; }
    c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
    void deviceSynchronize(c10::DeviceIndex) const override {
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

at::Tensor& copy(at::Tensor& self, const at::Tensor& from, bool non_blocking) {
    TORCH_CHECK(self.scalar_type() == from.scalar_type() && self.numel() == from.numel(), "copies are of one kind and size");
    TORCH_CHECK(self.is_contiguous() && from.is_contiguous() && from.storage_offset() == 0, "copies are of whole tensors");
    const at::Tensor& host = self.is_cpu() ? self : from;
    const auto found = all_pinned.find(host.const_data_ptr());
    Pinned* pinned = host.is_cpu() && found != all_pinned.end() ? found->second : nullptr;
    if (pinned) ++pinned->uses;
    told(*current, {self.mutable_data_ptr(), from.const_data_ptr(), self.nbytes(), pinned});
    if (host.is_cpu() && !(pinned && non_blocking)) drain(*current);
    return self;
}

struct Registered {
    Registered() { c10::SetAllocator(c10::kCUDA, &memory); }
} registered;

}  // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
    library.impl("empty.memory_format", &empty);
    library.impl("empty_strided", &empty_strided);
    library.impl("copy_", &copy);
}

// --- what the code that is tested asks of one ---

extern "C" {

// Which streams do at once what they may.
void hurry(int streams) { hurried = streams; }

int cudaSetDevice(int) { return 0; }

int cudaEventCreateWithFlags(void** event, unsigned) {
    *event = new Event;
    return 0;
}

int cudaEventRecord(void* event, void* stream) {
    auto& point = static_cast<Event*>(event)->point;
    point = std::make_shared<Point>(Point{&of(stream)});
    Task task;
    task.reaches = point;
    told(of(stream), task);
    return 0;
}

int cudaStreamWaitEvent(void* stream, void* event, unsigned) {
    Task task;
    task.waits = static_cast<Event*>(event)->point;
    told(of(stream), task);
    return 0;
}

int cudaEventSynchronize(void* event) {
    reach(*static_cast<Event*>(event)->point);
    return 0;
}

// Not ready, in CUDA's numbers, before somebody has waited for it.
int cudaEventQuery(void* event) { return static_cast<Event*>(event)->point->come ? 0 : 600; }

int torch_set_current_cuda_stream(void* stream, int32_t) {
    current = &of(stream);
    return 0;
}

int torch_get_cuda_stream_from_pool(bool, int32_t, void** stream) {
    others.push_back(std::make_unique<Stream>());
    *stream = others.back().get();
    return 0;
}
}
