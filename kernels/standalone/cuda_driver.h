// The part of the CUDA driver API that decode.cpp uses: declared here and found in libcuda.so.1 at run time, because a
// machine with the driver need not have cuda.h. Names and layouts are those of the CUDA 12 and 13 headers, 64-bit Linux.

#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace cuda {

using Result = int;  // CUresult: 0 is success
using Device = int;
using Address = unsigned long long;  // CUdeviceptr
struct ContextObject;
struct StreamObject;
struct EventObject;
struct ModuleObject;
struct FunctionObject;
struct GraphObject;
struct GraphExecObject;
using Context = ContextObject*;
using Stream = StreamObject*;
using Event = EventObject*;
using Module = ModuleObject*;
using Function = FunctionObject*;
using Graph = GraphObject*;
using GraphExec = GraphExecObject*;

struct LaunchAttribute {  // CUlaunchAttribute; its value is a union of 64 bytes
    int id;
    char padding[4];
    union alignas(8) {
        char bytes[64];
        int programmatic_stream_serialization_allowed;
    } value;
};

struct LaunchConfig {  // CUlaunchConfig
    unsigned grid[3], block[3], shared_bytes;
    Stream stream;
    LaunchAttribute* attributes;
    unsigned attribute_count;
};

constexpr int PROGRAMMATIC_STREAM_SERIALIZATION = 6;  // CUlaunchAttributeID
constexpr int CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76, SHARED_BYTES_OPTIN = 97;  // CUdevice_attribute
constexpr int MAX_DYNAMIC_SHARED_BYTES = 8;            // CUfunction_attribute
constexpr unsigned STREAM_NON_BLOCKING = 1, EVENT_DISABLE_TIMING = 2;
constexpr int CAPTURE_THREAD_LOCAL = 1;                // CUstreamCaptureMode

// name here, name in the library, parameters
#define TRAPETUM_DRIVER_FUNCTIONS(X)                                                                       \
    X(init, "cuInit", (unsigned))                                                                          \
    X(error_name, "cuGetErrorName", (Result, const char**))                                                \
    X(error_string, "cuGetErrorString", (Result, const char**))                                            \
    X(device_count, "cuDeviceGetCount", (int*))                                                            \
    X(device_get, "cuDeviceGet", (Device*, int))                                                           \
    X(device_name, "cuDeviceGetName", (char*, int, Device))                                                \
    X(device_attribute, "cuDeviceGetAttribute", (int*, int, Device))                                       \
    X(context_retain, "cuDevicePrimaryCtxRetain", (Context*, Device))                                      \
    X(context_release, "cuDevicePrimaryCtxRelease_v2", (Device))                                           \
    X(context_set, "cuCtxSetCurrent", (Context))                                                           \
    X(stream_create, "cuStreamCreate", (Stream*, unsigned))                                                \
    X(stream_destroy, "cuStreamDestroy_v2", (Stream))                                                      \
    X(stream_synchronize, "cuStreamSynchronize", (Stream))                                                 \
    X(stream_begin_capture, "cuStreamBeginCapture_v2", (Stream, int))                                      \
    X(stream_end_capture, "cuStreamEndCapture", (Stream, Graph*))                                          \
    X(event_create, "cuEventCreate", (Event*, unsigned))                                                   \
    X(event_destroy, "cuEventDestroy_v2", (Event))                                                         \
    X(event_record, "cuEventRecord", (Event, Stream))                                                      \
    X(event_synchronize, "cuEventSynchronize", (Event))                                                    \
    X(memory_allocate, "cuMemAlloc_v2", (Address*, std::size_t))                                           \
    X(memory_free, "cuMemFree_v2", (Address))                                                              \
    X(memory_fill, "cuMemsetD8Async", (Address, unsigned char, std::size_t, Stream))                       \
    X(memory_info, "cuMemGetInfo_v2", (std::size_t*, std::size_t*))                                        \
    X(host_allocate, "cuMemAllocHost_v2", (void**, std::size_t))                                           \
    X(host_free, "cuMemFreeHost", (void*))                                                                 \
    X(copy_to_device, "cuMemcpyHtoDAsync_v2", (Address, const void*, std::size_t, Stream))                 \
    X(copy_to_host, "cuMemcpyDtoHAsync_v2", (void*, Address, std::size_t, Stream))                         \
    X(module_load, "cuModuleLoadData", (Module*, const void*))                                             \
    X(module_unload, "cuModuleUnload", (Module))                                                           \
    X(module_function, "cuModuleGetFunction", (Function*, Module, const char*))                            \
    X(function_set, "cuFuncSetAttribute", (Function, int, int))                                            \
    X(launch, "cuLaunchKernelEx", (const LaunchConfig*, Function, void**, void**))                         \
    X(graph_instantiate, "cuGraphInstantiateWithFlags", (GraphExec*, Graph, unsigned long long))           \
    X(graph_destroy, "cuGraphDestroy", (Graph))                                                            \
    X(graph_exec_destroy, "cuGraphExecDestroy", (GraphExec))                                               \
    X(graph_upload, "cuGraphUpload", (GraphExec, Stream))                                                  \
    X(graph_launch, "cuGraphLaunch", (GraphExec, Stream))

// The driver is missing, or refused something; what() is one sentence.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The library and its functions; `driver()` has the only one.
struct Driver {
#define TRAPETUM_DECLARE(member, symbol, parameters) Result(*member) parameters = nullptr;
    TRAPETUM_DRIVER_FUNCTIONS(TRAPETUM_DECLARE)
#undef TRAPETUM_DECLARE
    Result (*parameter_info)(Function, std::size_t, std::size_t*, std::size_t*) = nullptr;  // CUDA 12.4 and later

    Driver() {
        void* library = dlopen("libcuda.so.1", RTLD_NOW);  // stays open: the driver has threads of its own
        if (!library) throw Error(std::string("the NVIDIA driver was not found (") + dlerror() + ").");
#define TRAPETUM_LOAD(member, symbol, parameters) member = reinterpret_cast<decltype(member)>(find(library, symbol));
        TRAPETUM_DRIVER_FUNCTIONS(TRAPETUM_LOAD)
#undef TRAPETUM_LOAD
        parameter_info = reinterpret_cast<decltype(parameter_info)>(dlsym(library, "cuFuncGetParamInfo"));
    }

   private:
    static void* find(void* library, const char* symbol) {
        if (void* found = dlsym(library, symbol)) return found;
        throw Error(std::string("the NVIDIA driver has no ") + symbol + "; a driver for CUDA 12 or newer is needed.");
    }
};

inline const Driver& driver() {
    static const Driver loaded;
    return loaded;
}

inline std::string name_of(Result result) {
    const char* name = nullptr;
    return driver().error_name(result, &name) == 0 && name ? name : "error " + std::to_string(result);
}

// Throws one sentence with the driver's name of the error. `doing` reads as "<doing> failed".
inline void check(Result result, const std::string& doing) {
    if (result == 0) return;
    const char* words = nullptr;
    const bool known = driver().error_string(result, &words) == 0 && words;
    throw Error(doing + " failed: " + name_of(result) + (known ? std::string(", ") + words : "") + ".");
}

// Owns one handle of the driver and gives it back.
template <class Handle, Result (*Driver::*give_back)(Handle)>
class Owned {
   public:
    Owned() = default;
    explicit Owned(Handle handle) : handle_(handle) {}
    Owned(Owned&& other) noexcept : handle_(std::exchange(other.handle_, Handle{})) {}
    Owned& operator=(Owned&& other) noexcept {
        std::swap(handle_, other.handle_);
        return *this;
    }
    ~Owned() {
        if (handle_) (driver().*give_back)(handle_);  // an error here has been thrown by a call before
    }
    Handle get() const { return handle_; }
    Handle* slot() { return &handle_; }  // for a function that fills an empty one

   private:
    Handle handle_{};
};

using OwnedStream = Owned<Stream, &Driver::stream_destroy>;
using OwnedEvent = Owned<Event, &Driver::event_destroy>;
using OwnedModule = Owned<Module, &Driver::module_unload>;
using OwnedGraph = Owned<Graph, &Driver::graph_destroy>;
using OwnedGraphExec = Owned<GraphExec, &Driver::graph_exec_destroy>;
using OwnedMemory = Owned<Address, &Driver::memory_free>;
using OwnedHostMemory = Owned<void*, &Driver::host_free>;

// The device's primary context, current on this thread.
class PrimaryContext {
   public:
    explicit PrimaryContext(Device device) : device_(device) {
        Context context = nullptr;
        check(driver().context_retain(&context, device), "opening the GPU");
        const Result made_current = driver().context_set(context);
        if (made_current) driver().context_release(device);
        check(made_current, "using the GPU");
    }
    PrimaryContext(const PrimaryContext&) = delete;
    PrimaryContext& operator=(const PrimaryContext&) = delete;
    ~PrimaryContext() { driver().context_release(device_); }

   private:
    Device device_;
};

}  // namespace cuda
