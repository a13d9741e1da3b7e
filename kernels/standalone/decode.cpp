// Decodes from a folder that `trapetum export` wrote: the CUDA driver, cubins, weights, and no Python.
//
//     decode FOLDER [options] [TOKEN ...]      the prompt as token ids, from standard input where none is given
//
// The prompt goes through the step token by token. Then `advance`, the launches of one token, is captured several times into a
// CUDA graph, and the graph is replayed; the next replay is queued before the tokens of the last are read, so that the GPU does
// not wait for the host. Results are lines of standard output, a word and its values.
//
// Exit codes: 0 done, 1 the driver is missing or refused something, 2 the input cannot be used.

#include <chrono>
#include <cstdio>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include "standalone/cuda_driver.h"
#include "standalone/plan.h"

namespace {

using cuda::check;
using cuda::driver;
using plan::Count;
using plan::Refused;
using Clock = std::chrono::steady_clock;

const char* const USAGE =
    "usage: decode FOLDER [-n TOKENS] [--runs R] [--tokens-a-graph K] [--device D] [--ignore-eos] [--check] [TOKEN ...]";

double seconds(Clock::time_point from, Clock::time_point to) { return std::chrono::duration<double>(to - from).count(); }

struct Options {
    std::string folder;
    Count new_tokens = 64, runs = 1, tokens_a_graph = 0, device = 0;  // 0 tokens a graph: as the plan says
    bool check = false, ignore_eos = false;
    std::vector<std::int64_t> prompt;
};

Count number(const std::string& text, const std::string& meaning, Count least, Count most) {
    const bool digits = !text.empty() && text.size() < 12 && text.find_first_not_of("0123456789") == std::string::npos;
    const Count value = digits ? std::stoull(text) : 0;
    if (!digits || value < least || value > most) {
        throw Refused(meaning + " is '" + text.substr(0, 40) + "'; it must be a whole number from " + std::to_string(least) +
                      " to " + std::to_string(most) + ".");
    }
    return value;
}

Options parse(std::vector<std::string> words) {
    Options options;
    for (std::size_t i = 0; i < words.size(); i++) {
        const std::string word = words[i];
        const auto value = [&](Count least, Count most) {
            if (i + 1 == words.size()) throw Refused(word + " needs a number.");
            return number(words[++i], word, least, most);
        };
        if (word == "--check") options.check = true;
        else if (word == "--ignore-eos") options.ignore_eos = true;
        else if (word == "-n") options.new_tokens = value(1, INT_MAX);
        else if (word == "--runs") options.runs = value(1, 1000);
        else if (word == "--tokens-a-graph") options.tokens_a_graph = value(1, plan::MOST_TOKENS_A_GRAPH);
        else if (word == "--device") options.device = value(0, 1023);
        else if (word.size() > 1 && word[0] == '-') throw Refused(word + " is no option; " + USAGE + ".");
        else if (options.folder.empty()) options.folder = word;
        else options.prompt.push_back(static_cast<std::int64_t>(number(word, "a prompt token", 0, INT_MAX)));
    }
    if (options.folder.empty()) throw Refused(std::string("no folder is named; ") + USAGE + ".");
    return options;
}

std::vector<std::int64_t> tokens_from(std::istream& input) {
    std::vector<std::int64_t> found;
    for (std::istream_iterator<std::string> word(input), end; word != end; ++word) {
        found.push_back(static_cast<std::int64_t>(number(*word, "a prompt token", 0, INT_MAX)));
    }
    return found;
}

void require_fits(const Options& options, const plan::Plan& plan) {
    if (options.prompt.empty()) throw Refused("the prompt is empty; give at least one token.");
    for (const std::int64_t token : options.prompt) {
        if (static_cast<Count>(token) >= plan.vocabulary) {
            throw Refused("token " + std::to_string(token) + " is not in the vocabulary of " + std::to_string(plan.vocabulary) + ".");
        }
    }
    const Count need = options.prompt.size() + options.new_tokens;
    if (need > plan.context) {
        throw Refused("a prompt of " + std::to_string(options.prompt.size()) + " tokens and " + std::to_string(options.new_tokens) +
                      " new ones need a context of " + std::to_string(need) + ", and the export has " +
                      std::to_string(plan.context) + "; ask for fewer tokens, or export with a longer context.");
    }
}

// --- the GPU -----------------------------------------------------------------------------------------------------------

struct Gpu {
    cuda::Device device = 0;
    unsigned major = 0, minor = 0, most_shared_bytes = 0;
    std::string name;
};

unsigned attribute(cuda::Device device, int which) {
    int value = 0;
    check(driver().device_attribute(&value, which, device), "asking for an attribute of the GPU");
    return static_cast<unsigned>(value);
}

Gpu find_gpu(Count index) {
    check(driver().init(0), "starting the CUDA driver");
    int count = 0;
    check(driver().device_count(&count), "counting the GPUs");
    if (index >= static_cast<Count>(count)) {
        throw Refused("there is no GPU " + std::to_string(index) + "; " + std::to_string(count) + " are visible.");
    }
    Gpu gpu;
    check(driver().device_get(&gpu.device, static_cast<int>(index)), "choosing the GPU");
    char name[256] = "";
    check(driver().device_name(name, sizeof name, gpu.device), "asking for the GPU's name");
    gpu.name = name;
    gpu.major = attribute(gpu.device, cuda::CAPABILITY_MAJOR);
    gpu.minor = attribute(gpu.device, cuda::CAPABILITY_MINOR);
    gpu.most_shared_bytes = attribute(gpu.device, cuda::SHARED_BYTES_OPTIN);
    return gpu;
}

void require_same_architecture(const Gpu& gpu, const plan::Plan& plan) {
    if (gpu.major == plan.major && gpu.minor >= plan.minor) return;  // a cubin runs on later minor versions only
    throw Refused("the cubins are for sm_" + std::to_string(plan.major) + std::to_string(plan.minor) + " and " + gpu.name +
                  " is sm_" + std::to_string(gpu.major) + std::to_string(gpu.minor) + "; export the model on such a GPU.");
}

cuda::OwnedStream new_stream() {
    cuda::OwnedStream stream;
    check(driver().stream_create(stream.slot(), cuda::STREAM_NON_BLOCKING), "making a stream");
    return stream;
}

cuda::OwnedEvent new_event() {
    cuda::OwnedEvent event;
    check(driver().event_create(event.slot(), cuda::EVENT_DISABLE_TIMING), "making an event");
    return event;
}

// --- buffers -----------------------------------------------------------------------------------------------------------

// All buffers of a plan in one allocation.
class Memory {
   public:
    Memory(const plan::Plan& plan, const plan::MappedFile& weights, cuda::Stream stream) : plan_(plan), weights_(weights) {
        Count total = 0;
        for (const plan::Buffer& buffer : plan.buffers) {
            starts_.push_back(total);
            total += (buffer.bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        }
        std::size_t free = 0, whole = 0;
        check(driver().memory_info(&free, &whole), "asking for the free memory");
        check(driver().memory_allocate(memory_.slot(), total + ALIGNMENT),
              "reserving " + std::to_string(total / 1000000) + " MB on the GPU, which has " + std::to_string(free / 1000000) + " MB free,");
        bytes_ = total;
        for (std::size_t i = 0; i < starts_.size(); i++) start(i, stream);
    }
    // The state as it was at the export.
    void restart(cuda::Stream stream) const {
        for (std::size_t i = 0; i < starts_.size(); i++) {
            if (!plan_.buffers[i].constant) start(i, stream);
        }
    }
    cuda::Address address(const plan::Place& place) const { return memory_.get() + starts_[place.buffer] + place.offset; }
    Count bytes() const { return bytes_; }

   private:
    static constexpr Count ALIGNMENT = 512;  // what PyTorch's allocator gives, so that loads are as wide

    void start(std::size_t i, cuda::Stream stream) const {
        const plan::Buffer& buffer = plan_.buffers[i];
        const cuda::Address to = memory_.get() + starts_[i];
        if (buffer.from_file) {
            check(driver().copy_to_device(to, weights_.data() + buffer.offset, buffer.bytes, stream), "copying " + buffer.name);
        } else {
            check(driver().memory_fill(to, buffer.fill, buffer.bytes, stream), "filling " + buffer.name);
        }
    }

    const plan::Plan& plan_;
    const plan::MappedFile& weights_;
    std::vector<Count> starts_;
    cuda::OwnedMemory memory_;
    Count bytes_ = 0;
};

// An array that the GPU copies to and from without waiting for the host.
template <class Value>
class PinnedArray {
   public:
    explicit PinnedArray(std::size_t count) {
        check(driver().host_allocate(memory_.slot(), count * sizeof(Value)), "reserving memory of the host");
    }
    Value* at(std::size_t i) { return static_cast<Value*>(memory_.get()) + i; }
    Value& operator[](std::size_t i) { return *at(i); }

   private:
    cuda::OwnedHostMemory memory_;
};

// --- kernels -----------------------------------------------------------------------------------------------------------

// A launch with its addresses filled in, ready to be made many times.
class Prepared {
   public:
    Prepared(const plan::Launch& launch, cuda::Function function, const Memory& memory, bool can_overlap) : function_(function) {
        values_.reserve(launch.arguments.size());  // pointers to them must stay
        for (const plan::Argument& argument : launch.arguments) {
            values_.push_back(argument.pointer ? memory.address(argument.place) : argument.bits);
            parameters_.push_back(&values_.back());
        }
        std::copy(launch.grid.begin(), launch.grid.end(), config_.grid);
        std::copy(launch.block.begin(), launch.block.end(), config_.block);
        config_.shared_bytes = launch.shared_bytes;
        overlaps_ = launch.pdl && can_overlap;
    }
    void operator()(cuda::Stream stream) {
        static cuda::LaunchAttribute overlap = may_overlap();
        config_.stream = stream;
        config_.attributes = overlaps_ ? &overlap : nullptr;
        config_.attribute_count = overlaps_ ? 1 : 0;
        check(driver().launch(&config_, function_, parameters_.data(), nullptr), "a launch");
    }

   private:
    static cuda::LaunchAttribute may_overlap() {
        cuda::LaunchAttribute attribute{};
        attribute.id = cuda::PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmatic_stream_serialization_allowed = 1;
        return attribute;
    }

    cuda::Function function_;
    cuda::LaunchConfig config_{};
    std::vector<std::uint64_t> values_;  // a 4-byte value is the low half: the hosts of CUDA are little-endian
    std::vector<void*> parameters_;
    bool overlaps_ = false;
};

// A launch must give each parameter of the function its size, or the driver would read past the arguments.
void require_parameters(cuda::Function function, const plan::Launch& launch, const std::string& name) {
    if (!driver().parameter_info) return;  // a driver before CUDA 12.4 cannot say
    std::size_t offset = 0, bytes = 0;
    for (std::size_t i = 0; i < launch.arguments.size(); i++) {
        const bool there = driver().parameter_info(function, i, &offset, &bytes) == 0;
        if (!there || bytes != launch.arguments[i].bytes) {
            throw Refused("argument " + std::to_string(i) + " of a launch of " + name + " has " +
                          std::to_string(launch.arguments[i].bytes) + " bytes and the kernel takes " +
                          std::to_string(there ? bytes : 0) + "; export the model again.");
        }
    }
    if (driver().parameter_info(function, launch.arguments.size(), &offset, &bytes) == 0) {
        throw Refused("a launch of " + name + " has " + std::to_string(launch.arguments.size()) +
                      " arguments and the kernel takes more; export the model again.");
    }
}

// The loaded cubins and the launches of a plan.
class Kernels {
   public:
    Kernels(const plan::Folder& folder, const Memory& memory, const Gpu& gpu) {
        for (const plan::MappedFile& cubin : folder.cubins) {
            modules_.emplace_back();
            check(driver().module_load(modules_.back().slot(), cubin.data()), "loading " + cubin.path());
        }
        for (const plan::Kernel& kernel : folder.plan.kernels) {
            cuda::Function function = nullptr;
            check(driver().module_function(&function, modules_[kernel.cubin].get(), kernel.function.c_str()),
                  "finding " + kernel.function + " in its cubin");
            functions_.push_back(function);
        }
        allow_shared_memory(folder.plan, gpu);
        embed_ = prepare(folder.plan, folder.plan.embed, memory, gpu);
        advance_ = prepare(folder.plan, folder.plan.advance, memory, gpu);
    }
    void embed(cuda::Stream stream) { make(embed_, stream); }
    void advance(cuda::Stream stream) { make(advance_, stream); }

   private:
    static constexpr unsigned SHARED_BYTES_WITHOUT_ASKING = 48 * 1024;

    static void make(std::vector<Prepared>& launches, cuda::Stream stream) {
        for (Prepared& launch : launches) launch(stream);
    }
    void allow_shared_memory(const plan::Plan& plan, const Gpu& gpu) {
        std::vector<unsigned> need(functions_.size(), 0);
        for (const auto* list : {&plan.embed, &plan.advance}) {
            for (const plan::Launch& launch : *list) need[launch.kernel] = std::max(need[launch.kernel], launch.shared_bytes);
        }
        for (std::size_t i = 0; i < need.size(); i++) {
            if (need[i] <= SHARED_BYTES_WITHOUT_ASKING) continue;
            check(driver().function_set(functions_[i], cuda::MAX_DYNAMIC_SHARED_BYTES, static_cast<int>(need[i])),
                  "giving " + plan.kernels[i].function + " " + std::to_string(need[i]) + " bytes of shared memory on " + gpu.name +
                      ", where a block has at most " + std::to_string(gpu.most_shared_bytes) + ",");
        }
    }
    std::vector<Prepared> prepare(const plan::Plan& plan, const std::vector<plan::Launch>& launches, const Memory& memory, const Gpu& gpu) const {
        std::vector<Prepared> prepared;
        for (const plan::Launch& launch : launches) {
            const cuda::Function function = functions_[launch.kernel];
            require_parameters(function, launch, plan.kernels[launch.kernel].function);
            prepared.emplace_back(launch, function, memory, gpu.major >= 9);
        }
        return prepared;
    }

    std::vector<cuda::OwnedModule> modules_;
    std::vector<cuda::Function> functions_;
    std::vector<Prepared> embed_, advance_;
};

// --- decoding ----------------------------------------------------------------------------------------------------------

// `count` tokens as one graph.
cuda::OwnedGraphExec capture(Kernels& kernels, Count count, cuda::Stream stream) {
    check(driver().stream_begin_capture(stream, cuda::CAPTURE_THREAD_LOCAL), "beginning to capture a graph");
    for (Count i = 0; i < count; i++) kernels.advance(stream);
    cuda::OwnedGraph graph;
    check(driver().stream_end_capture(stream, graph.slot()), "capturing a graph");
    cuda::OwnedGraphExec executable;
    check(driver().graph_instantiate(executable.slot(), graph.get(), 0), "building the graph");
    check(driver().graph_upload(executable.get(), stream), "uploading the graph");
    return executable;
}

struct Generation {
    std::vector<std::int64_t> tokens;
    double first_s = 0, rest_s = 0;  // from the start to the first token, and from there to the last

    double tokens_per_s() const { return rest_s > 0 ? static_cast<double>(tokens.size() - 1) / rest_s : 0; }
};

// A model on a GPU.
class Decoder {
   public:
    Decoder(const plan::Folder& folder, const Gpu& gpu, const Options& options)
        : plan_(folder.plan),
          options_(options),
          a_graph_(options.tokens_a_graph ? options.tokens_a_graph : plan_.tokens_a_graph),
          context_(gpu.device),
          stream_(new_stream()),
          memory_(plan_, folder.weights, stream_.get()),
          kernels_(folder, memory_, gpu),
          prompt_(options.prompt.size()),
          history_(options.new_tokens) {
        std::copy(options.prompt.begin(), options.prompt.end(), prompt_.at(0));
        feed_prompt();  // loads every function, which a capture must not do
        synchronize();
        several_ = capture(kernels_, a_graph_, stream_.get());
        one_ = capture(kernels_, 1, stream_.get());
        synchronize();
    }

    Generation generate() {
        memory_.restart(stream_.get());
        synchronize();
        Generation made;
        const Clock::time_point begin = Clock::now();
        feed_prompt();
        cuda::OwnedEvent ready = fetch(0, 1);
        collect(made, ready, 0, 1);
        const Clock::time_point first = Clock::now();
        decode_rest(made);
        made.first_s = seconds(begin, first);
        made.rest_s = seconds(first, Clock::now());
        return made;
    }
    Count bytes() const { return memory_.bytes(); }
    Count tokens_a_graph() const { return a_graph_; }

   private:
    void synchronize() { check(driver().stream_synchronize(stream_.get()), "decoding"); }

    void feed_prompt() {
        const cuda::Stream stream = stream_.get();
        const cuda::Address token = memory_.address(plan_.token);
        check(driver().memory_fill(memory_.address(plan_.position), 0, sizeof(std::int64_t), stream), "setting the position");
        for (std::size_t i = 0; i < options_.prompt.size(); i++) {
            check(driver().copy_to_device(token, prompt_.at(i), sizeof(std::int64_t), stream), "setting the token");
            kernels_.embed(stream);
            kernels_.advance(stream);
        }
    }
    // Copy new tokens `from` to `from + count` to the host; the event says when they are there.
    cuda::OwnedEvent fetch(Count from, Count count) {
        const Count place = options_.prompt.size() - 1 + from + plan_.history_ahead;
        const cuda::Address at = memory_.address(plan_.history) + place * sizeof(std::int32_t);
        check(driver().copy_to_host(history_.at(from), at, count * sizeof(std::int32_t), stream_.get()), "fetching tokens");
        cuda::OwnedEvent ready = new_event();
        check(driver().event_record(ready.get(), stream_.get()), "recording an event");
        return ready;
    }
    bool stops(std::int64_t token) const {
        return !options_.ignore_eos && std::find(plan_.eos.begin(), plan_.eos.end(), token) != plan_.eos.end();
    }
    // Take fetched tokens; false where one of them ends the text.
    bool collect(Generation& made, const cuda::OwnedEvent& ready, Count from, Count count) {
        check(driver().event_synchronize(ready.get()), "decoding");
        for (Count i = from; i < from + count; i++) {
            made.tokens.push_back(history_[i]);
            if (stops(history_[i])) return false;
        }
        return true;
    }
    // Queue the graph for as many tokens as may still be made, at most a graph's.
    Count queue(Count made) {
        const Count left = options_.new_tokens - made;
        const bool whole = left >= a_graph_;
        if (left) check(driver().graph_launch((whole ? several_ : one_).get(), stream_.get()), "launching the graph");
        return left ? (whole ? a_graph_ : 1) : 0;
    }
    // One graph ahead of the host.
    void decode_rest(Generation& made) {
        bool going = !stops(made.tokens.back());
        Count from = 1, count = going ? queue(from) : 0;
        cuda::OwnedEvent ready = count ? fetch(from, count) : cuda::OwnedEvent();
        while (going && count) {
            const Count next = queue(from + count);
            cuda::OwnedEvent next_ready = next ? fetch(from + count, next) : cuda::OwnedEvent();
            going = collect(made, ready, from, count);
            from += count;
            count = next;
            ready = std::move(next_ready);
        }
    }

    const plan::Plan& plan_;
    const Options& options_;
    Count a_graph_;
    cuda::PrimaryContext context_;  // before everything that lives in it
    cuda::OwnedStream stream_;
    Memory memory_;
    Kernels kernels_;
    PinnedArray<std::int64_t> prompt_;
    PinnedArray<std::int32_t> history_;
    cuda::OwnedGraphExec several_, one_;
};

// --- what is printed -----------------------------------------------------------------------------------------------------

void describe(const plan::Folder& folder) {
    const plan::Plan& plan = folder.plan;
    std::printf("model %s\n", plan.model.c_str());
    std::printf("launches_a_token %zu\n", plan.advance.size());
    std::printf("kernels %zu\n", plan.kernels.size());
    std::printf("buffers %zu\n", plan.buffers.size());
    std::printf("weights_gb %.3f\n", static_cast<double>(folder.weights.size()) / 1e9);
}

void report(const Generation& made, const plan::Plan& plan, std::size_t prompt) {
    std::printf("tokens");
    for (const std::int64_t token : made.tokens) std::printf(" %lld", static_cast<long long>(token));
    std::printf("\nfirst_token_s %.6f\n", made.first_s);
    if (made.tokens.size() < 2) return;
    const double context = static_cast<double>(prompt) + static_cast<double>(made.tokens.size()) / 2;  // mean of the run
    const double bytes = static_cast<double>(plan.token_bytes) + context * static_cast<double>(plan.cached_token_bytes);
    std::printf("tokens_per_s %.3f\n", made.tokens_per_s());
    if (plan.token_bytes) std::printf("gb_per_s %.1f\n", bytes * made.tokens_per_s() / 1e9);
}

void run(const Options& options, const plan::Folder& folder) {
    const Gpu gpu = find_gpu(options.device);
    require_same_architecture(gpu, folder.plan);
    Decoder decoder(folder, gpu, options);
    std::printf("device %s\n", gpu.name.c_str());
    std::printf("memory_gb %.3f\n", static_cast<double>(decoder.bytes()) / 1e9);
    std::printf("tokens_a_graph %llu\n", static_cast<unsigned long long>(decoder.tokens_a_graph()));
    std::vector<std::int64_t> first;
    for (Count i = 0; i < options.runs; i++) {
        const Generation made = decoder.generate();
        report(made, folder.plan, options.prompt.size());
        if (i && made.tokens != first) throw cuda::Error("two runs gave different tokens.");
        first = made.tokens;
    }
}

void execute(std::vector<std::string> words) {
    Options options = parse(std::move(words));
    const plan::Folder folder = plan::open_folder(options.folder);
    if (options.check) return describe(folder);
    if (options.prompt.empty()) options.prompt = tokens_from(std::cin);
    require_fits(options, folder.plan);
    run(options, folder);
}

}  // namespace

int main(int count, char** words) {
    try {
        execute({words + 1, words + count});
        return 0;
    } catch (const Refused& error) {
        std::fprintf(stderr, "decode: %s\n", error.what());
        return 2;
    } catch (const std::exception& error) {  // the driver's, or no memory on the host
        std::fprintf(stderr, "decode: %s\n", error.what());
        return 1;
    }
}
