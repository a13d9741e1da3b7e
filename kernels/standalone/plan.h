// Reads and checks an exported decode step. Nothing in the folder is trusted: whatever a plan says is refused in one sentence
// unless it can be launched without leaving a buffer, a file or the vocabulary. No GPU is needed.
//
// plan.txt is one fact a line, words parted by single spaces, in this order:
//
//     trapetum-plan 1                                     the format's version
//     arch sm_90                                          what the cubins are compiled for
//     model <words>                                       for people
//     shape <name> <number> ...                           for people
//     vocabulary <tokens>
//     context <tokens>                                    places of the cache
//     eos <token> ...                                     none or more
//     token_bytes <weights> <each cached token>           read for one token; 0 0 where unknown
//     tokens_a_graph <number>
//     weights <bytes>                                     the size of weights.safetensors
//     cubin <sha256>                                      kernels/<sha256>.cubin; lines count from 0
//     kernel <cubin> <function> <words>                   the words (source and definitions) are for people
//     buffer <name> <bytes> file <offset> <use>           starts with bytes of weights.safetensors; lines count from 0
//     buffer <name> <bytes> fill <byte> <use>             starts with this byte everywhere; <use> is constant or variable
//     token <buffer> <offset>                             int64: the token that is fed next
//     position <buffer> <offset>                          int64: its place in the cache
//     history <buffer> <offset> <ahead>                   int32 [context + ahead]: the token made from place p is at p + ahead
//     launch embed|advance <kernel> <grid x y z> <block x y z> <shared bytes> <pdl> <argument> ...
//     end
//
// An argument is ptr:<buffer>:<offset>, null, or i32: u32: i64: u64: f32: f64: and the value's bits as an unsigned number.

#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace plan {

// Input that cannot be used; what() is one sentence.
struct Refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

using Count = std::uint64_t;

// A whole file, mapped read-only.
class MappedFile {
   public:
    explicit MappedFile(const std::string& path) : path_(path) {
        const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
        if (file < 0) throw Refused(path + " cannot be opened: " + std::strerror(errno) + ".");
        struct stat about {};
        const bool regular = fstat(file, &about) == 0 && S_ISREG(about.st_mode);
        size_ = regular ? static_cast<std::size_t>(about.st_size) : 0;
        void* at = size_ ? mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED;
        const int why = errno;
        close(file);
        if (!regular) throw Refused(path + " is not a regular file.");
        if (!size_) throw Refused(path + " is empty.");
        if (at == MAP_FAILED) throw Refused(path + " cannot be mapped: " + std::strerror(why) + ".");
        data_ = static_cast<const char*>(at);
    }
    MappedFile(MappedFile&& other) noexcept
        : path_(std::move(other.path_)), data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;
    ~MappedFile() {
        if (data_) munmap(const_cast<char*>(data_), size_);
    }
    const std::string& path() const { return path_; }
    const char* data() const { return data_; }
    std::size_t size() const { return size_; }
    std::string_view text() const { return {data_, size_}; }

   private:
    std::string path_;
    const char* data_ = nullptr;
    std::size_t size_ = 0;
};

struct Buffer {
    std::string name;
    Count bytes = 0;
    bool from_file = false;
    Count offset = 0;        // in weights.safetensors
    unsigned char fill = 0;  // where not from the file
    bool constant = false;
};

struct Place {  // somewhere in a buffer
    Count buffer = 0, offset = 0;
};

struct Argument {
    bool pointer = false;
    Place place;          // where it is a pointer
    Count bits = 0;       // where it is not; 0 is also the null pointer
    unsigned bytes = 8;
};

struct Launch {
    Count kernel = 0;
    std::array<unsigned, 3> grid{}, block{};
    unsigned shared_bytes = 0;
    bool pdl = false;
    std::vector<Argument> arguments;
};

struct Kernel {
    Count cubin = 0;
    std::string function;
};

struct Plan {
    unsigned major = 0, minor = 0;  // compute capability
    std::string model;
    Count vocabulary = 0, context = 0, tokens_a_graph = 0, weight_file_bytes = 0;
    Count token_bytes = 0, cached_token_bytes = 0;
    std::vector<std::int64_t> eos;
    std::vector<std::string> cubins;
    std::vector<Kernel> kernels;
    std::vector<Buffer> buffers;
    Place token, position, history;
    Count history_ahead = 0;
    std::vector<Launch> embed, advance;
};

constexpr Count MOST_BYTES = Count{1} << 48;  // a buffer and a file; two of them cannot overflow a sum
constexpr Count MOST_LINES = 1u << 20, MOST_ARGUMENTS = 512, MOST_TOKENS = INT_MAX, MOST_TOKENS_A_GRAPH = 64;

// What a message quotes of a file: its beginning, in characters that a terminal can show.
inline std::string shown(std::string_view text) {
    std::string found(text.substr(0, 40));
    for (char& c : found) c = c >= 0x20 && c < 0x7f ? c : '?';
    return found;
}

// The words of one line.
class Line {
   public:
    Line(std::string_view text, std::size_t number) : rest_(text), number_(number) {
        for (const char c : text) {
            if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) refuse("has a control character");
        }
    }
    [[noreturn]] void refuse(const std::string& what) const {
        throw Refused("plan.txt, line " + std::to_string(number_) + ": " + what + ".");
    }
    bool empty() const { return rest_.empty(); }
    std::string_view remainder() { return std::exchange(rest_, {}); }
    std::string_view word(const char* meaning) {
        const std::size_t end = rest_.find(' ');
        const std::string_view found = rest_.substr(0, end);
        if (found.empty()) refuse(std::string("the ") + meaning + " is missing");
        rest_ = end == std::string_view::npos ? std::string_view{} : rest_.substr(end + 1);
        if (end != std::string_view::npos && rest_.empty()) refuse("it ends in a space");
        return found;
    }
    Count number(const char* meaning, Count most) { return parse(word(meaning), meaning, most); }
    // Decimal digits only, at most `most`.
    Count parse(std::string_view digits, const char* meaning, Count most) const {
        Count value = 0;
        bool good = !digits.empty();
        for (const char c : digits) {
            const Count digit = static_cast<Count>(c) - '0';
            good = good && digit <= 9 && value <= (UINT64_MAX - digit) / 10;
            value = good ? value * 10 + digit : 0;
        }
        if (!good) refuse(std::string("the ") + meaning + " '" + shown(digits) + "' is no number");
        if (value > most) refuse(std::string("the ") + meaning + " is " + std::to_string(value) + ", and at most " +
                                 std::to_string(most) + " is possible");
        return value;
    }
    void finish() const {
        if (!rest_.empty()) refuse("has '" + shown(rest_) + "' at its end");
    }

   private:
    std::string_view rest_;
    std::size_t number_;
};

// Turns the text of plan.txt into a Plan; every index is checked against what stands before it.
class Reader {
   public:
    explicit Reader(std::string_view text) : text_(text) {}

    Plan read() {
        header();
        while (is("cubin")) cubin();
        while (is("kernel")) kernel();
        while (is("buffer")) buffer();
        roles();
        while (is("launch")) launch();
        take("end").finish();
        if (at_ != text_.size()) throw Refused("plan.txt goes on behind its end.");
        if (plan_.embed.empty() || plan_.advance.empty()) {
            throw Refused("plan.txt has no launches to embed a token or none to advance by one.");
        }
        return std::move(plan_);
    }

   private:
    // The first word of the next line is `word`.
    bool is(std::string_view word) const {
        return text_.substr(at_, word.size()) == word && text_.substr(at_ + word.size(), 1) == " ";
    }
    Line take(const char* keyword) {
        if (++number_ > MOST_LINES) throw Refused("plan.txt has more than " + std::to_string(MOST_LINES) + " lines.");
        const std::size_t end = text_.find('\n', at_);
        if (end == std::string_view::npos) {
            throw Refused("plan.txt ends in line " + std::to_string(number_) + " where '" + keyword + "' should stand; it is cut off.");
        }
        Line line(text_.substr(at_, end - at_), number_);
        at_ = end + 1;
        if (line.empty() || line.word("keyword") != keyword) line.refuse(std::string("'") + keyword + "' should stand here");
        return line;
    }
    Count single(const char* keyword, Count least, Count most) {
        Line line = take(keyword);
        const Count value = line.number(keyword, most);
        line.finish();
        if (value < least) line.refuse(std::string("the ") + keyword + " is " + std::to_string(value));
        return value;
    }
    void header() {
        if (!is("trapetum-plan")) throw Refused("plan.txt does not begin with 'trapetum-plan'; `trapetum export` writes such a file.");
        Line version = take("trapetum-plan");
        if (version.word("version") != "1") version.refuse("this program reads version 1; export the model again");
        version.finish();
        arch();
        plan_.model = take("model").remainder();
        take("shape");
        plan_.vocabulary = single("vocabulary", 1, MOST_TOKENS);
        plan_.context = single("context", 1, MOST_TOKENS);
        eos();
        Line bytes = take("token_bytes");
        plan_.token_bytes = bytes.number("bytes of the weights", MOST_BYTES);
        plan_.cached_token_bytes = bytes.number("bytes of a cached token", MOST_BYTES);
        bytes.finish();
        plan_.tokens_a_graph = single("tokens_a_graph", 1, MOST_TOKENS_A_GRAPH);
        plan_.weight_file_bytes = single("weights", 8, MOST_BYTES);
    }
    void arch() {
        Line line = take("arch");
        const std::string_view name = line.word("architecture");
        if (name.substr(0, 3) != "sm_" || name.size() < 5) line.refuse("the architecture must be like sm_90");
        const Count number = line.parse(name.substr(3), "architecture", 999);
        line.finish();
        plan_.major = static_cast<unsigned>(number / 10);
        plan_.minor = static_cast<unsigned>(number % 10);
    }
    void eos() {
        Line line = take("eos");
        while (!line.empty()) plan_.eos.push_back(static_cast<std::int64_t>(line.number("token", plan_.vocabulary - 1)));
    }
    void cubin() {
        Line line = take("cubin");
        const std::string name(line.word("SHA-256"));
        line.finish();
        const bool hex = name.find_first_not_of("0123456789abcdef") == std::string::npos;
        if (name.size() != 64 || !hex) line.refuse("a cubin is named by 64 hex digits");
        plan_.cubins.push_back(name);
    }
    template <class Items>
    static Count index(Line& line, const char* meaning, const Items& items) {
        if (items.empty()) line.refuse(std::string("there is no ") + meaning);
        return line.number(meaning, items.size() - 1);
    }
    void kernel() {
        Line line = take("kernel");
        Kernel kernel;
        kernel.cubin = index(line, "cubin", plan_.cubins);
        kernel.function = line.word("function");
        line.remainder();
        plan_.kernels.push_back(std::move(kernel));
    }
    void buffer() {
        Line line = take("buffer");
        Buffer buffer;
        buffer.name = line.word("name");
        buffer.bytes = line.number("size", MOST_BYTES);
        if (!buffer.bytes) line.refuse("the buffer " + buffer.name + " has no bytes");
        start(line, buffer);
        const std::string_view use = line.word("use");
        if (use != "constant" && use != "variable") line.refuse("a buffer is constant or variable");
        buffer.constant = use == "constant";
        line.finish();
        total_ += buffer.bytes;
        if (total_ > MOST_BYTES) line.refuse("the buffers together are larger than any GPU");
        plan_.buffers.push_back(std::move(buffer));
    }
    void start(Line& line, Buffer& buffer) const {
        const std::string_view from = line.word("origin");
        if (from == "fill") {
            buffer.fill = static_cast<unsigned char>(line.number("byte", 255));
            return;
        }
        if (from != "file") line.refuse("a buffer starts from the file or with a fill");
        buffer.from_file = true;
        buffer.offset = line.number("offset", MOST_BYTES);
        if (buffer.offset + buffer.bytes > plan_.weight_file_bytes) {
            line.refuse("the buffer " + buffer.name + " ends behind the " + std::to_string(plan_.weight_file_bytes) +
                        " bytes of weights.safetensors");
        }
    }
    // `bytes` from the place on must lie in a buffer that the step writes.
    Place state(Line& line, Count unit, Count bytes) const {
        Place place;
        place.buffer = index(line, "buffer", plan_.buffers);
        const Buffer& buffer = plan_.buffers[place.buffer];
        place.offset = line.number("offset", MOST_BYTES);
        if (buffer.constant) line.refuse("the buffer " + buffer.name + " is constant");
        if (place.offset % unit) line.refuse("the offset must be a multiple of " + std::to_string(unit));
        if (place.offset + bytes > buffer.bytes) {
            line.refuse(std::to_string(bytes) + " bytes from offset " + std::to_string(place.offset) + " do not fit the " +
                        std::to_string(buffer.bytes) + " of " + buffer.name);
        }
        return place;
    }
    void roles() {
        Line token = take("token");
        plan_.token = state(token, 8, 8);
        token.finish();
        Line position = take("position");
        plan_.position = state(position, 8, 8);
        position.finish();
        Line history = take("history");
        Line again = history;  // the size that is checked depends on the last word
        again.word("buffer"), again.word("offset");
        plan_.history_ahead = again.number("lead", 1);
        again.finish();
        plan_.history = state(history, 4, 4 * (plan_.context + plan_.history_ahead));
    }
    unsigned size(Line& line, const char* meaning, Count least, Count most) const {
        const Count value = line.number(meaning, most);
        if (value < least) line.refuse(std::string("the ") + meaning + " is 0");
        return static_cast<unsigned>(value);
    }
    void launch() {
        Line line = take("launch");
        const std::string_view list = line.word("list");
        if (list != "embed" && list != "advance") line.refuse("a launch belongs to embed or advance");
        Launch launch;
        launch.kernel = index(line, "kernel", plan_.kernels);
        launch.grid = {size(line, "grid", 1, INT_MAX), size(line, "grid", 1, 65535), size(line, "grid", 1, 65535)};
        launch.block = {size(line, "block", 1, 1024), size(line, "block", 1, 1024), size(line, "block", 1, 64)};
        if (Count{1} * launch.block[0] * launch.block[1] * launch.block[2] > 1024) line.refuse("a block has at most 1024 threads");
        launch.shared_bytes = size(line, "shared memory", 0, 1 << 20);
        launch.pdl = line.number("pdl", 1) == 1;
        while (!line.empty()) launch.arguments.push_back(argument(line));
        if (launch.arguments.size() > MOST_ARGUMENTS) line.refuse("a kernel takes at most " + std::to_string(MOST_ARGUMENTS) + " arguments");
        (list == "embed" ? plan_.embed : plan_.advance).push_back(std::move(launch));
    }
    Argument argument(Line& line) const {
        const std::string_view word = line.word("argument");
        if (word == "null") return {};
        const std::size_t colon = word.find(':');
        if (colon == std::string_view::npos) line.refuse("the argument '" + shown(word) + "' has no value");
        const std::string_view type = word.substr(0, colon), value = word.substr(colon + 1);
        Argument found;
        if (type == "ptr") {
            found.pointer = true;
            found.place = pointer(line, value);
            return found;
        }
        const bool narrow = type == "i32" || type == "u32" || type == "f32";
        if (!narrow && type != "i64" && type != "u64" && type != "f64") {
            line.refuse("the argument's type '" + shown(type) + "' is unknown");
        }
        found.bytes = narrow ? 4 : 8;
        found.bits = line.parse(value, "argument", narrow ? UINT32_MAX : UINT64_MAX);
        return found;
    }
    Place pointer(Line& line, std::string_view value) const {
        const std::size_t colon = value.find(':');
        if (colon == std::string_view::npos) line.refuse("a pointer needs a buffer and an offset");
        if (plan_.buffers.empty()) line.refuse("there is no buffer");
        Place place;
        place.buffer = line.parse(value.substr(0, colon), "buffer", plan_.buffers.size() - 1);
        place.offset = line.parse(value.substr(colon + 1), "offset", plan_.buffers[place.buffer].bytes - 1);
        return place;
    }

    std::string_view text_;
    std::size_t at_ = 0, number_ = 0;
    Count total_ = 0;
    Plan plan_;
};

// An exported folder: the plan, and the files that it names, of the sizes that it says.
struct Folder {
    Plan plan;
    MappedFile weights;
    std::vector<MappedFile> cubins;
};

inline void require_weights(const Plan& plan, const MappedFile& weights) {
    if (weights.size() != plan.weight_file_bytes) {
        throw Refused(weights.path() + " has " + std::to_string(weights.size()) + " bytes and the plan says " +
                      std::to_string(plan.weight_file_bytes) + "; copy the whole folder again.");
    }
}

inline std::vector<MappedFile> open_cubins(const std::string& folder, const Plan& plan) {
    std::vector<MappedFile> found;
    for (const std::string& name : plan.cubins) {
        found.emplace_back(folder + "/kernels/" + name + ".cubin");
        const std::string_view start = found.back().text().substr(0, 4);
        if (found.back().size() < 64 || start != std::string_view("\x7f" "ELF")) {
            throw Refused(found.back().path() + " is no cubin.");
        }
    }
    return found;
}

inline Folder open_folder(const std::string& path) {
    Plan plan = Reader(MappedFile(path + "/plan.txt").text()).read();
    MappedFile weights(path + "/weights.safetensors");
    require_weights(plan, weights);
    std::vector<MappedFile> cubins = open_cubins(path, plan);
    return {std::move(plan), std::move(weights), std::move(cubins)};
}

}  // namespace plan
