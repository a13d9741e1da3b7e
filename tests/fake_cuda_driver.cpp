// A CUDA driver that runs three kernels on the host, so that kernels/standalone/decode.cpp can be tested without a GPU.
//
// It poisons memory, refuses what the real driver refuses (too much shared memory, a capture of a capture, copies in a
// capture), and writes to the file $FAKE_CUDA_LOG what was launched and what was never given back. $FAKE_CUDA_FAIL names a function
// that fails; $FAKE_CUDA_CAPABILITY is like 90.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "standalone/cuda_driver.h"

using cuda::Address;
using cuda::Result;

namespace {

constexpr Result INVALID = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, IN_CAPTURE = 900;

struct Node {
    int kernel;
    std::vector<std::uint64_t> values;
};

struct Totals {
    long live = 0, launches = 0, overlapping = 0, graph_launches = 0;
    ~Totals() {
        const char* path = std::getenv("FAKE_CUDA_LOG");
        if (std::FILE* file = path ? std::fopen(path, "w") : nullptr) {
            std::fprintf(file, "live %ld\nlaunches %ld\noverlapping %ld\ngraph_launches %ld\n", live, launches, overlapping, graph_launches);
            std::fclose(file);
        }
    }
} totals;

std::vector<Node>* capturing = nullptr;

struct Description {
    const char* name;
    std::vector<std::size_t> sizes;
    unsigned shared_bytes;
};
Description descriptions[] = {
    {"embed", {8, 8, 8, 4}, 48 * 1024},
    {"mix", {8, 8, 8, 4, 8, 8, 8}, 48 * 1024},
    {"choose", {8, 8, 8, 8, 8, 8, 4}, 48 * 1024},
};

template <class T>
T* at(std::uint64_t address) {
    return reinterpret_cast<T*>(address);
}

void embed(const std::vector<std::uint64_t>& v) { *at<long long>(v[2]) = at<long long>(v[1])[*at<long long>(v[0])]; }

void mix(const std::vector<std::uint64_t>& v) {
    float scale;
    std::memcpy(&scale, &v[3], 4);
    if (v[2]) std::abort();  // the null pointer must stay one
    long long& x = *at<long long>(v[0]);
    x = (x * at<long long>(v[1])[1] + static_cast<long long>(scale * 4) + static_cast<long long>(v[4]) + static_cast<long long>(v[5]));
    *at<long long>(v[6]) += x;
}

void choose(const std::vector<std::uint64_t>& v) {
    long long &x = *at<long long>(v[0]), &token = *at<long long>(v[2]), &position = *at<long long>(v[3]);
    int* const history = at<int>(v[4]);
    int* const cache = at<int>(v[5]);
    const long long vocabulary = static_cast<int>(v[6]);
    cache[position] = static_cast<int>(token) + 1;
    const long long mixed = x + 7 * position + cache[position / 2] + cache[position + 1];  // the last is still unwritten
    token = (mixed % vocabulary + vocabulary) % vocabulary;
    history[position + 1] = static_cast<int>(token);
    position++;
    x = at<long long>(v[1])[token];
}

void execute(const Node& node) {
    void (*const kernels[])(const std::vector<std::uint64_t>&) = {embed, mix, choose};
    kernels[node.kernel](node.values);
}

Result fails(const char* name) {
    const char* chosen = std::getenv("FAKE_CUDA_FAIL");
    return chosen && std::strcmp(chosen, name) == 0 ? OUT_OF_MEMORY : 0;
}

int capability() {
    const char* chosen = std::getenv("FAKE_CUDA_CAPABILITY");
    return chosen ? std::atoi(chosen) : 90;
}

template <class Handle>
Result make(Handle* handle) {
    totals.live++;
    *handle = reinterpret_cast<Handle>(std::malloc(1));
    return 0;
}

Result drop(void* handle) {
    totals.live--;
    std::free(handle);
    return 0;
}

}  // namespace

#define FAILING(name) \
    if (const Result failed = fails(name)) return failed

extern "C" {
Result cuInit(unsigned) { FAILING("cuInit"); return 0; }
Result cuGetErrorName(Result result, const char** name) {
    static const std::map<int, const char*> names = {{INVALID, "CUDA_ERROR_INVALID_VALUE"},
                                                     {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
                                                     {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
                                                     {IN_CAPTURE, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}};
    const auto found = names.find(result);
    *name = found == names.end() ? nullptr : found->second;
    return found == names.end() ? INVALID : 0;
}
Result cuGetErrorString(Result, const char** words) { *words = "as the fake driver says"; return 0; }
Result cuDeviceGetCount(int* count) { *count = 1; return 0; }
Result cuDeviceGet(cuda::Device* device, int index) { *device = index; return 0; }
Result cuDeviceGetName(char* name, int size, cuda::Device) { std::snprintf(name, size, "Fake GPU"); return 0; }
Result cuDeviceGetAttribute(int* value, int which, cuda::Device) {
    *value = which == cuda::CAPABILITY_MAJOR ? capability() / 10 : which == cuda::CAPABILITY_MINOR ? capability() % 10 : 232448;
    return 0;
}
Result cuDevicePrimaryCtxRetain(cuda::Context* context, cuda::Device) {
    totals.live++;
    *context = reinterpret_cast<cuda::Context>(&totals);
    return 0;
}
Result cuDevicePrimaryCtxRelease_v2(cuda::Device) { totals.live--; return 0; }
Result cuCtxSetCurrent(cuda::Context) { FAILING("cuCtxSetCurrent"); return 0; }
Result cuStreamCreate(cuda::Stream* stream, unsigned) { return make(stream); }
Result cuStreamDestroy_v2(cuda::Stream stream) { return drop(stream); }
Result cuStreamSynchronize(cuda::Stream) { FAILING("cuStreamSynchronize"); return capturing ? IN_CAPTURE : 0; }
Result cuStreamBeginCapture_v2(cuda::Stream, int) {
    if (capturing) return IN_CAPTURE;
    capturing = new std::vector<Node>;
    totals.live++;
    return 0;
}
Result cuStreamEndCapture(cuda::Stream, cuda::Graph* graph) {
    *graph = reinterpret_cast<cuda::Graph>(std::exchange(capturing, nullptr));
    return 0;
}
Result cuGraphInstantiateWithFlags(cuda::GraphExec* made, cuda::Graph graph, unsigned long long) {
    FAILING("cuGraphInstantiateWithFlags");
    totals.live++;
    *made = reinterpret_cast<cuda::GraphExec>(new std::vector<Node>(*reinterpret_cast<std::vector<Node>*>(graph)));
    return 0;
}
static Result drop_nodes(void* nodes) {
    totals.live--;
    delete static_cast<std::vector<Node>*>(nodes);
    return 0;
}
Result cuGraphDestroy(cuda::Graph graph) { return drop_nodes(graph); }
Result cuGraphExecDestroy(cuda::GraphExec graph) { return drop_nodes(graph); }
Result cuGraphUpload(cuda::GraphExec, cuda::Stream) { return 0; }
Result cuGraphLaunch(cuda::GraphExec graph, cuda::Stream) {
    FAILING("cuGraphLaunch");
    totals.graph_launches++;
    for (const Node& node : *reinterpret_cast<std::vector<Node>*>(graph)) execute(node);
    return 0;
}
Result cuEventCreate(cuda::Event* event, unsigned) { return make(event); }
Result cuEventDestroy_v2(cuda::Event event) { return drop(event); }
Result cuEventRecord(cuda::Event, cuda::Stream) { return 0; }
Result cuEventSynchronize(cuda::Event) { return 0; }
Result cuMemAlloc_v2(Address* address, std::size_t bytes) {
    FAILING("cuMemAlloc_v2");
    totals.live++;
    void* memory = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
    std::memset(memory, 0xa5, bytes);
    *address = reinterpret_cast<Address>(memory);
    return 0;
}
Result cuMemFree_v2(Address address) { return drop(reinterpret_cast<void*>(address)); }
Result cuMemAllocHost_v2(void** memory, std::size_t bytes) {
    totals.live++;
    *memory = std::malloc(bytes);
    return 0;
}
Result cuMemFreeHost(void* memory) { return drop(memory); }
Result cuMemGetInfo_v2(std::size_t* free, std::size_t* total) { *free = *total = 80000000000; return 0; }
Result cuMemsetD8Async(Address to, unsigned char value, std::size_t bytes, cuda::Stream) {
    std::memset(at<void>(to), value, bytes);
    return capturing ? IN_CAPTURE : 0;
}
Result cuMemcpyHtoDAsync_v2(Address to, const void* from, std::size_t bytes, cuda::Stream) {
    std::memcpy(at<void>(to), from, bytes);
    return capturing ? IN_CAPTURE : 0;
}
Result cuMemcpyDtoHAsync_v2(void* to, Address from, std::size_t bytes, cuda::Stream) {
    std::memcpy(to, at<void>(from), bytes);
    return capturing ? IN_CAPTURE : 0;
}
Result cuModuleLoadData(cuda::Module* module, const void*) { FAILING("cuModuleLoadData"); return make(module); }
Result cuModuleUnload(cuda::Module module) { return drop(module); }
Result cuModuleGetFunction(cuda::Function* function, cuda::Module, const char* name) {
    for (Description& known : descriptions) {
        if (std::strcmp(known.name, name) == 0) return *function = reinterpret_cast<cuda::Function>(&known), 0;
    }
    return NOT_FOUND;
}
Result cuFuncSetAttribute(cuda::Function function, int which, int value) {
    if (which != cuda::MAX_DYNAMIC_SHARED_BYTES || value > 232448) return INVALID;
    reinterpret_cast<Description*>(function)->shared_bytes = static_cast<unsigned>(value);
    return 0;
}
Result cuFuncGetParamInfo(cuda::Function function, std::size_t i, std::size_t* offset, std::size_t* bytes) {
    const auto& sizes = reinterpret_cast<Description*>(function)->sizes;
    if (i >= sizes.size()) return INVALID;
    *offset = 8 * i;
    *bytes = sizes[i];
    return 0;
}
Result cuLaunchKernelEx(const cuda::LaunchConfig* config, cuda::Function function, void** parameters, void**) {
    FAILING("cuLaunchKernelEx");
    const auto* kernel = reinterpret_cast<Description*>(function);
    if (config->shared_bytes > kernel->shared_bytes || !config->grid[0] || !config->block[2]) return INVALID;
    for (unsigned i = 0; i < config->attribute_count; i++) {
        const cuda::LaunchAttribute& attribute = config->attributes[i];
        if (attribute.id != cuda::PROGRAMMATIC_STREAM_SERIALIZATION || attribute.value.programmatic_stream_serialization_allowed != 1) {
            return INVALID;
        }
        totals.overlapping++;
    }
    Node node{static_cast<int>(kernel - descriptions), {}};
    for (std::size_t i = 0; i < kernel->sizes.size(); i++) {
        std::uint64_t value = 0;
        std::memcpy(&value, parameters[i], kernel->sizes[i]);
        node.values.push_back(value);
    }
    totals.launches++;
    if (capturing) capturing->push_back(node);
    else execute(node);
    return 0;
}
}
