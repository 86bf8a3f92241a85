// The part of the CUDA driver that this project calls, on the CPU: a libcuda.so for tests. Streams are threads, kernels run by the
// emulator, memory is the host's behind guard pages.
//
// It is an unkind driver: what is not ordered by a stream, an event or a wait happens in an order that a seed decides, and late; memory
// holds rubbish when it is new, and so does the host's memory between a copy to it and the wait for that copy. So a wait that is missing
// shows as a wrong answer. Noticed and reported as misuse: handles and memory that are not there or not any more, copies beyond a buffer,
// writing around one, freeing host memory that a copy still needs, waiting or giving memory out or back inside a capture, anything left over when
// a context goes.
//
// EMU_CUDA, or emu_cuda_script at run time, holds settings between commas: seed=N, delay_us=N (the longest that work waits, 0: none),
// memory=BYTES (of each device), devices=N (at most 8); and faults, each at the n-th of its kind and, where `+every` follows, again and
// again: oom@N (an allocation), fail@N[=CODE] (a launch; the context is lost, 719 by default), ecc@N (the same with 214), hang@N[=MS] (a
// launch takes so long, 2000 by default), wrong@N (a launch does nothing), nograph@N (a capture can't be made executable). `/D` behind the kind
// (fail/1@3) is of what device D does alone. EMU_CUDA_REPORT names a file for misuse, and for counts when the process ends.
//
// A library that works on the device's memory by itself, as stand-ins for tests do, gives its work to a stream by cuLaunchHostFunc, and may
// ask emu_cuda_holds whether memory is there.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "emulator.h"

struct emu_variant {
    const char* name;
    const emu::Kernel* kernels;
    size_t n;
};
extern const emu_variant emu_variants[];
extern const size_t emu_n_variants;
extern "C" int emu_launch(const char* variant, const char* kernel, const unsigned* grid, unsigned block, size_t shared_bytes,
                          void* const* arguments, unsigned n_arguments, uint64_t seed, char* message, size_t room);
extern "C" void* emu_allocate(size_t bytes, size_t align);
extern "C" int emu_intact(const void* data);
extern "C" void emu_free(void* data);
extern "C" void emu_retire(void* data);

namespace {

using Lock = std::unique_lock<std::mutex>;
using Clock = std::chrono::steady_clock;

// As in cuda.h.
enum Result : int {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201, ECC_UNCORRECTABLE = 214, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, ILLEGAL_ADDRESS = 700,
    LAUNCH_FAILED = 719, NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901,
};
constexpr size_t KEPT_DEAD = 512; // freed allocations whose pages still fault
constexpr unsigned char RUBBISH = 0xa5;
constexpr char IMAGE[] = "EMULATED CUBIN 1";
constexpr int MOST_DEVICES = 8;

enum Count { ALLOCATIONS, LAUNCHES, GIVEN, UPLOADS, DOWNLOADS, GRAPHS, INSTANTIATED, MISUSES, COUNTS };
constexpr const char* COUNT_NAMES[COUNTS] = {"allocations", "launches", "single_launches", "uploads", "downloads",
                                             "graph_launches", "graphs", "misuses"};
// Of all devices, and of each.
std::atomic<uint64_t> counts[COUNTS];
std::atomic<uint64_t> counts_of[MOST_DEVICES][COUNTS];

uint64_t count(Count which, int device) {
    counts_of[device][which]++;
    return ++counts[which];
}

struct Fault {
    std::string kind;
    int device; // -1: any
    uint64_t first, every, value;
};

struct Settings {
    uint64_t seed = 1, delay_us = 100, memory = 8ull << 30, devices = 1;
    std::vector<Fault> faults;
};

// Never destroyed: threads of streams may outlive main.
struct State {
    std::mutex lock;
    Settings settings;
    uint64_t noise = 1, used[MOST_DEVICES] = {};
    std::string first_misuse;
    uint64_t random() { // splitmix64
        uint64_t z = noise += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }
};
State& state() {
    static State* all = new State;
    return *all;
}

void report(const char* text) {
    if (const char* path = getenv("EMU_CUDA_REPORT")) {
        if (FILE* file = fopen(path, "a")) {
            fprintf(file, "%s\n", text);
            fclose(file);
        }
    }
}

void misuse(const char* format, ...) __attribute__((format(printf, 1, 2)));
void misuse(const char* format, ...) {
    char text[512] = "misuse: ";
    va_list list;
    va_start(list, format);
    vsnprintf(text + 8, sizeof text - 8, format, list);
    va_end(list);
    counts[MISUSES]++;
    {
        Lock held(state().lock);
        if (state().first_misuse.empty()) state().first_misuse = text + 8;
    }
    fprintf(stderr, "emulated driver: %s\n", text);
    report(text);
}

void apply(const char* script) {
    Settings next;
    std::string all = script ? script : "";
    for (size_t at = 0; at < all.size();) {
        const size_t end = std::min(all.find(',', at), all.size());
        const std::string one = all.substr(at, end - at);
        at = end + 1;
        unsigned long long first = 0, every = 0, value = 0;
        char kind[16] = "";
        int device = -1;
        if (sscanf(one.c_str(), "%15[a-z]@%llu", kind, &first) == 2 || sscanf(one.c_str(), "%15[a-z]/%d@%llu", kind, &device, &first) == 3) {
            const size_t plus = one.find('+'), equals = one.find('=');
            if (plus != std::string::npos) every = strtoull(one.c_str() + plus + 1, nullptr, 10);
            if (equals != std::string::npos) value = strtoull(one.c_str() + equals + 1, nullptr, 10);
            next.faults.push_back({kind, device, first, every, value});
        } else if (sscanf(one.c_str(), "%15[a-z_]=%llu", kind, &value) == 2) {
            const std::string name = kind;
            (name == "seed" ? next.seed : name == "delay_us" ? next.delay_us : name == "memory" ? next.memory : next.devices) = value;
        } else if (!one.empty()) {
            misuse("EMU_CUDA: `%s` is no setting", one.c_str());
        }
    }
    Lock held(state().lock);
    state().settings = next;
    state().noise = next.seed;
    state().first_misuse.clear();
    state().settings.devices = std::min<uint64_t>(next.devices, MOST_DEVICES);
    for (auto& count : counts) count = 0;
    for (auto& of : counts_of) {
        for (auto& count : of) count = 0;
    }
}

// The fault of that kind that is due at the `all`-th, which is the `own`-th of the device, if there is one.
bool due(const char* kind, uint64_t all, int device, uint64_t own, uint64_t& value) {
    Lock held(state().lock);
    for (const Fault& fault : state().settings.faults) {
        if (fault.device >= 0 && fault.device != device) continue;
        const uint64_t n = fault.device < 0 ? all : own;
        if (fault.kind != kind || n < fault.first) continue;
        if (n != fault.first && (fault.every == 0 || (n - fault.first) % fault.every != 0)) continue;
        value = fault.value;
        return true;
    }
    return false;
}

void dawdle() {
    uint64_t us = 0;
    {
        Lock held(state().lock);
        const uint64_t most = state().settings.delay_us;
        if (most > 0) us = state().random() % (most + 1);
    }
    if (us > 0) std::this_thread::sleep_for(std::chrono::microseconds(us));
}

// Memory of a device or of the host, made in a device's context.
struct Memory {
    size_t bytes;
    bool host;
    int device;
};
std::mutex& memory_lock() {
    static auto* lock = new std::mutex;
    return *lock;
}
std::map<uintptr_t, Memory>& memories() {
    static auto* all = new std::map<uintptr_t, Memory>;
    return *all;
}
// Host memory that copies still need.
std::multimap<uintptr_t, size_t>& needed() {
    static auto* all = new std::multimap<uintptr_t, size_t>;
    return *all;
}
std::deque<void*>& dead() {
    static auto* all = new std::deque<void*>;
    return *all;
}

// Whether all of it lies in one allocation of the kind, on that device where it is not -1.
bool lies_in(uintptr_t at, size_t bytes, bool host, int device = -1) {
    Lock held(memory_lock());
    auto next = memories().upper_bound(at);
    if (next == memories().begin()) return false;
    const auto& [start, memory] = *std::prev(next);
    const bool is_its = host || device < 0 || memory.device == device;
    return memory.host == host && is_its && at - start <= memory.bytes && bytes <= memory.bytes - (at - start);
}

void* allocate(size_t bytes, bool host, int device) {
    uint64_t ignored;
    if (!host) {
        const uint64_t n = count(ALLOCATIONS, device);
        if (due("oom", n, device, counts_of[device][ALLOCATIONS], ignored)) return nullptr;
        Lock held(state().lock);
        uint64_t& used = state().used[device];
        if (bytes > state().settings.memory || used > state().settings.memory - bytes) return nullptr;
        used += bytes;
    }
    void* got = emu_allocate(bytes, 16);
    if (got) {
        Lock held(memory_lock());
        memories()[(uintptr_t)got] = {bytes, host, device};
    }
    return got;
}

bool is_lost(int device);

// Frees; what is no allocation of the kind is misuse.
bool release(uintptr_t at, bool host) {
    size_t bytes;
    int device;
    bool used = false;
    {
        Lock held(memory_lock());
        const auto found = memories().find(at);
        if (found == memories().end() || found->second.host != host) {
            held.unlock();
            misuse("%p is freed, and is no %s memory or was freed before", (void*)at, host ? "pinned" : "device");
            return false;
        }
        bytes = found->second.bytes, device = found->second.device;
        const bool lost = is_lost(device);
        for (auto one = needed().begin(); host && one != needed().end();) {
            const bool is_its = one->first < at + bytes && at < one->first + one->second;
            used |= is_its && !lost;
            // The copies of a context that is lost are never done.
            one = is_its && lost ? needed().erase(one) : std::next(one);
        }
        memories().erase(at);
    }
    if (used) {
        // And stays, so that the copy can go on.
        misuse("pinned memory is freed while a copy still needs it");
        return true;
    }
    if (!emu_intact((void*)at)) misuse("something was written around %zu bytes at %p", bytes, (void*)at);
    if (!host) {
        Lock held(state().lock);
        state().used[device] -= bytes;
    }
    emu_retire((void*)at);
    Lock held(memory_lock());
    dead().push_back((void*)at);
    if (dead().size() > KEPT_DEAD) {
        emu_free(dead().front());
        dead().pop_front();
    }
    return true;
}

// Work of a stream. `begin` happens when it is given to the stream, `run` when it is its turn, `after` when it counts as done.
struct Work {
    std::function<void()> begin;
    std::function<int()> run;
    std::function<void()> after;
};
struct Context;
struct Graph : std::vector<Work> {
    Context* context = nullptr;
};

struct Context {
    std::atomic<int> lost{0};
    int ordinal;
};
struct Stream;
std::mutex& handle_lock() {
    static auto* lock = new std::mutex;
    return *lock;
}
template <class T>
std::set<T*>& live() {
    static auto* all = new std::set<T*>;
    return *all;
}
template <class T>
bool is_live(T* handle, const char* what) {
    {
        Lock held(handle_lock());
        if (live<T>().count(handle)) return true;
    }
    misuse("a %s that is not there, or not any more", what);
    return false;
}
template <class T>
T* add(T* handle) {
    Lock held(handle_lock());
    live<T>().insert(handle);
    return handle;
}

struct Device {
    std::mutex lock;
    unsigned retained = 0;
    std::unique_ptr<Context> context;
};
Device& device(int ordinal) {
    static auto* all = new Device[MOST_DEVICES];
    return all[ordinal];
}
thread_local Context* current = nullptr;

struct Stream {
    std::mutex lock;
    std::condition_variable changed;
    std::deque<Work> waiting;
    uint64_t given = 0, done = 0;
    bool ends = false, spoilt = false;
    Context* context = nullptr;
    std::unique_ptr<Graph> capture;

    void work() {
        for (;;) {
            Work next;
            {
                Lock held(lock);
                changed.wait(held, [&] { return ends || !waiting.empty(); });
                if (waiting.empty()) return;
                next = std::move(waiting.front());
                waiting.pop_front();
            }
            const bool runs = !context->lost;
            if (runs) {
                dawdle();
                const int outcome = next.run();
                if (outcome != SUCCESS) context->lost = outcome;
            }
            {
                Lock held(lock);
                done++;
                changed.notify_all();
            }
            if (runs && next.after) next.after();
        }
    }
    void give(Work one) {
        if (one.begin) one.begin();
        Lock held(lock);
        waiting.push_back(std::move(one));
        given++;
        changed.notify_all();
    }
    int take(Work one) {
        if (context->lost) return context->lost;
        if (capture) {
            capture->push_back(std::move(one));
            return SUCCESS;
        }
        give(std::move(one));
        return SUCCESS;
    }
    void wait() {
        Lock held(lock);
        const uint64_t until = given;
        changed.wait(held, [&] { return done >= until; });
    }
};

// CUDA lets the work of a stream go on when it is destroyed; what is waited for here is at most what a test hangs.
void end(Stream* stream) {
    stream->wait();
    Lock held(stream->lock);
    stream->ends = true;
    stream->changed.notify_all();
}

struct Event {
    Context* context = nullptr;
    std::mutex lock;
    std::condition_variable changed;
    uint64_t recorded = 0, reached = 0;
    Clock::time_point at{};
    bool is_reached(uint64_t n) {
        Lock held(lock);
        return reached >= n;
    }
};
// Of a module.
struct Function {
    const emu::Kernel* kernel;
    unsigned most_shared = 48 << 10; // without asking for more
};
struct Module {
    Context* context;
    std::vector<std::unique_ptr<Function>> functions;
};
struct Executable {
    Context* context;
    Graph graph;
};

// Then copies that were given are not done any more.
bool is_lost(int ordinal) { return !device(ordinal).context || device(ordinal).context->lost; }
bool known(Context* context) {
    for (int at = 0; at < MOST_DEVICES; at++) {
        if (context && context == device(at).context.get()) return true;
    }
    return false;
}
int ready() {
    if (!known(current)) {
        if (current) misuse("a call in a context that is gone");
        return INVALID_CONTEXT;
    }
    return current->lost;
}
// What this thread captures.
thread_local Stream* capturing = nullptr;
// Waiting, and giving memory out and back, are not for a thread that captures.
int outside_captures(const char* what) {
    if (!capturing) return SUCCESS;
    misuse("%s inside a capture", what);
    capturing->spoilt = true;
    return CAPTURE_UNSUPPORTED;
}

int copy(Stream* stream, uintptr_t to, uintptr_t from, size_t bytes, bool up) {
    const uintptr_t host = up ? from : to, there = up ? to : from;
    const int ordinal = stream->context->ordinal;
    if (!lies_in(there, bytes, false, ordinal)) {
        misuse("a copy of %zu bytes %s %p: not in one buffer of the device", bytes, up ? "to" : "from", (void*)there);
        return INVALID_VALUE;
    }
    count(up ? UPLOADS : DOWNLOADS, ordinal);
    const bool pinned = lies_in(host, bytes, true);
    if (!pinned && stream->capture) {
        misuse("a copy of memory that is not pinned inside a capture");
        return CAPTURE_UNSUPPORTED;
    }
    // As CUDA does it: what is not pinned is staged before the call returns, or waited for.
    auto staged = std::make_shared<std::vector<char>>();
    if (!pinned && up) staged->assign((char*)host, (char*)host + bytes);
    Work one;
    one.begin = [=] {
        if (!pinned) return;
        if (!up) memset((void*)host, RUBBISH, bytes);
        Lock held(memory_lock());
        needed().emplace(host, bytes);
    };
    one.run = [=]() -> int {
        const auto found = lies_in(there, bytes, false);
        if (found && up) memcpy((void*)to, pinned ? (void*)from : staged->data(), bytes);
        if (found && !up) memcpy((void*)to, (void*)from, bytes);
        if (pinned) {
            Lock held(memory_lock());
            const auto range = needed().equal_range(host);
            const auto own = std::find_if(range.first, range.second, [&](const auto& each) { return each.second == bytes; });
            if (own != range.second) needed().erase(own);
        }
        if (!found) {
            misuse("a copy of %zu bytes %s %p, which was freed meanwhile", bytes, up ? "to" : "from", (void*)there);
            return ILLEGAL_ADDRESS;
        }
        return SUCCESS;
    };
    const int taken = stream->take(std::move(one));
    if (taken == SUCCESS && !pinned && !up) stream->wait();
    return taken;
}

int launch(const emu::Kernel* kernel, const unsigned (&grid)[3], unsigned block, size_t shared,
           const std::vector<std::vector<char>>& values, int device) {
    uint64_t value = 0;
    const uint64_t n = count(LAUNCHES, device), own = counts_of[device][LAUNCHES];
    const auto is_due = [&](const char* kind) { return due(kind, n, device, own, value); };
    if (is_due("fail")) return value ? (int)value : LAUNCH_FAILED;
    if (is_due("ecc")) return ECC_UNCORRECTABLE;
    if (is_due("wrong")) return SUCCESS;
    if (is_due("hang")) std::this_thread::sleep_for(std::chrono::milliseconds(value ? value : 2000));
    std::vector<void*> arguments;
    for (const auto& one : values) arguments.push_back((void*)one.data());
    uint64_t seed;
    {
        Lock held(state().lock);
        seed = state().random();
    }
    char message[512] = "";
    if (emu_launch("plain", kernel->name, grid, block, shared, arguments.data(), (unsigned)arguments.size(), seed, message, sizeof message)) {
        misuse("%s: %s", kernel->name, message);
        return ILLEGAL_ADDRESS;
    }
    return SUCCESS;
}

void at_exit() {
    std::string line = "counts:";
    for (int at = 0; at < COUNTS; at++) line += std::string(" ") + COUNT_NAMES[at] + "=" + std::to_string(counts[at]);
    report(line.c_str());
}

} // namespace

#define API extern "C" __attribute__((visibility("default")))

// For tests.
API void emu_cuda_script(const char* script) { apply(script); }
API uint64_t emu_cuda_count(const char* name) { // `launches/1`: of device 1 alone
    const char* slash = strchr(name, '/');
    const size_t length = slash ? (size_t)(slash - name) : strlen(name);
    const int device = slash ? atoi(slash + 1) % MOST_DEVICES : -1;
    for (int at = 0; at < COUNTS; at++) {
        if (strlen(COUNT_NAMES[at]) != length || strncmp(name, COUNT_NAMES[at], length) != 0) continue;
        return device < 0 ? counts[at] : counts_of[device][at];
    }
    if (strcmp(name, "used_bytes") != 0) return UINT64_MAX;
    Lock held(state().lock);
    uint64_t used = 0;
    for (const uint64_t of : state().used) used += of;
    return used;
}
// Whether all of it lies in one buffer of that device.
API int emu_cuda_holds(uintptr_t at, size_t bytes, int device) { return lies_in(at, bytes, false, device); }
// Reports a misuse that somebody else noticed.
API void emu_cuda_report(const char* text) { misuse("%s", text); }
// The first misuse since the last script; 0: there was none.
API int emu_cuda_misuse(char* text, size_t room) {
    Lock held(state().lock);
    snprintf(text, room, "%s", state().first_misuse.c_str());
    return !state().first_misuse.empty();
}

API int cuInit(unsigned flags) {
    static std::once_flag once;
    std::call_once(once, [] {
        if (const char* script = getenv("EMU_CUDA")) apply(script);
        atexit(at_exit);
    });
    return flags == 0 ? SUCCESS : INVALID_VALUE;
}
API int cuDriverGetVersion(int* version) {
    *version = 13000;
    return SUCCESS;
}
API int cuDeviceGetCount(int* n) {
    *n = (int)state().settings.devices;
    return SUCCESS;
}
API int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return ordinal >= 0 && (uint64_t)ordinal < state().settings.devices ? SUCCESS : INVALID_DEVICE;
}
API int cuDeviceGetName(char* name, int room, int) {
    snprintf(name, (size_t)room, "Emulated GPU");
    return SUCCESS;
}
API int cuDeviceGetAttribute(int* value, int which, int) {
    switch (which) {
    case 75: *value = 9; break;   // compute capability, major
    case 76: *value = 0; break;   // minor
    case 16: *value = 132; break; // multiprocessors
    case 115: *value = 1; break;  // memory pools
    case 97: *value = 227 << 10; break; // the most shared memory of a block
    default: *value = 0;
    }
    return SUCCESS;
}
API int cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = state().settings.memory;
    return SUCCESS;
}
API int cuGetErrorName(int code, const char** name) {
    (void)code;
    *name = "an emulated error";
    return SUCCESS;
}
API int cuGetErrorString(int code, const char** text) { return cuGetErrorName(code, text); }

API int cuDevicePrimaryCtxRetain(Context** context, int ordinal) {
    if (ordinal < 0 || (uint64_t)ordinal >= state().settings.devices) return INVALID_DEVICE;
    Device& own = device(ordinal);
    Lock held(own.lock);
    if (own.retained++ == 0) {
        own.context = std::make_unique<Context>();
        own.context->ordinal = ordinal;
    }
    *context = own.context.get();
    return SUCCESS;
}
// Those of a context, which are none any more.
template <class T>
std::vector<T*> take(Context* context) {
    std::vector<T*> taken;
    Lock held(handle_lock());
    for (T* handle : live<T>()) {
        if (handle->context == context) taken.push_back(handle);
    }
    for (T* handle : taken) live<T>().erase(handle);
    return taken;
}
API int cuDevicePrimaryCtxRelease_v2(int ordinal) {
    if (ordinal < 0 || ordinal >= MOST_DEVICES) return INVALID_DEVICE;
    Device& own = device(ordinal);
    Lock held(own.lock);
    if (own.retained == 0) {
        misuse("a context is released more often than retained");
        return INVALID_CONTEXT;
    }
    if (--own.retained > 0) return SUCCESS;
    Context* context = own.context.get();
    const std::vector<Stream*> streams = take<Stream>(context);
    const size_t events = take<Event>(context).size(), modules = take<Module>(context).size();
    const size_t graphs = take<Graph>(context).size() + take<Executable>(context).size();
    if (streams.size() + events + modules + graphs > 0) {
        misuse("left over: %zu streams, %zu events, %zu modules, %zu graphs", streams.size(), events, modules, graphs);
    }
    for (Stream* stream : streams) end(stream);
    std::vector<std::pair<uintptr_t, bool>> left;
    {
        Lock memory(memory_lock());
        for (const auto& [at, one] : memories()) {
            if (one.device == ordinal) left.emplace_back(at, one.host);
        }
    }
    if (!left.empty()) misuse("left over: %zu allocations", left.size());
    for (const auto& [at, host] : left) release(at, host);
    own.context.reset();
    return SUCCESS;
}
API int cuCtxSetCurrent(Context* context) {
    if (context && !known(context)) {
        misuse("a context that is gone becomes current");
        return INVALID_CONTEXT;
    }
    current = context;
    return SUCCESS;
}
API int cuCtxGetCurrent(Context** context) {
    *context = current;
    return SUCCESS;
}
API int cuCtxSynchronize() {
    if (const int not_ready = ready()) return not_ready;
    if (const int refused = outside_captures("a wait")) return refused;
    std::vector<Stream*> all;
    {
        Lock held(handle_lock());
        for (Stream* stream : live<Stream>()) {
            if (stream->context == current) all.push_back(stream);
        }
    }
    for (Stream* stream : all) stream->wait();
    return ready();
}

API int cuMemGetInfo_v2(size_t* left, size_t* total) {
    if (const int not_ready = ready()) return not_ready;
    Lock held(state().lock);
    *total = state().settings.memory;
    *left = state().settings.memory - state().used[current->ordinal];
    return SUCCESS;
}
API int cuMemAlloc_v2(uintptr_t* at, size_t bytes) {
    if (const int not_ready = ready()) return not_ready;
    if (const int refused = outside_captures("an allocation")) return refused;
    if (bytes == 0) return INVALID_VALUE;
    *at = (uintptr_t)allocate(bytes, false, current->ordinal);
    return *at ? SUCCESS : OUT_OF_MEMORY;
}
API int cuMemFree_v2(uintptr_t at) {
    if (const int refused = outside_captures("memory given back")) return refused;
    const int before = cuCtxSynchronize();
    release(at, false);
    return before;
}
API int cuMemAllocAsync(uintptr_t* at, size_t bytes, Stream* stream) {
    if (const int not_ready = ready()) return not_ready;
    if (const int refused = outside_captures("an allocation")) return refused;
    if (!is_live(stream, "stream")) return INVALID_HANDLE;
    if (bytes == 0) return INVALID_VALUE;
    *at = (uintptr_t)allocate(bytes, false, current->ordinal);
    return *at ? SUCCESS : OUT_OF_MEMORY;
}
API int cuMemFreeAsync(uintptr_t at, Stream* stream) {
    if (const int refused = outside_captures("memory given back")) return refused;
    if (!is_live(stream, "stream")) return INVALID_HANDLE;
    // Of a context that is lost, too: its memory comes back when it is gone, here at once.
    if (const int not_ready = ready()) {
        stream->wait();
        release(at, false);
        return not_ready;
    }
    if (!lies_in(at, 0, false)) {
        release(at, false);
        return INVALID_VALUE;
    }
    return stream->take({nullptr, [=] { return release(at, false) ? SUCCESS : ILLEGAL_ADDRESS; }});
}
API int cuMemHostAlloc(void** at, size_t bytes, unsigned) {
    if (const int not_ready = ready()) return not_ready;
    if (const int refused = outside_captures("an allocation")) return refused;
    *at = allocate(bytes, true, current->ordinal);
    return *at ? SUCCESS : OUT_OF_MEMORY;
}
API int cuMemFreeHost(void* at) {
    if (const int refused = outside_captures("memory given back")) return refused;
    return release((uintptr_t)at, true) ? SUCCESS : INVALID_VALUE;
}
API int cuDeviceGetDefaultMemPool(void** pool, int ordinal) {
    *pool = &device(ordinal);
    return SUCCESS;
}
API int cuMemPoolSetAttribute(void*, int, void*) { return SUCCESS; }

API int cuMemcpyHtoDAsync_v2(uintptr_t to, const void* from, size_t bytes, Stream* stream) {
    if (const int not_ready = ready()) return not_ready;
    return is_live(stream, "stream") ? copy(stream, to, (uintptr_t)from, bytes, true) : INVALID_HANDLE;
}
API int cuMemcpyDtoHAsync_v2(void* to, uintptr_t from, size_t bytes, Stream* stream) {
    if (const int not_ready = ready()) return not_ready;
    return is_live(stream, "stream") ? copy(stream, (uintptr_t)to, from, bytes, false) : INVALID_HANDLE;
}
API int cuMemcpyDtoDAsync_v2(uintptr_t to, uintptr_t from, size_t bytes, Stream* stream) {
    if (const int not_ready = ready()) return not_ready;
    if (!is_live(stream, "stream")) return INVALID_HANDLE;
    return stream->take({nullptr, [=]() -> int {
        if (!lies_in(to, bytes, false) || !lies_in(from, bytes, false)) {
            misuse("a copy of %zu bytes on the device: not in one buffer", bytes);
            return ILLEGAL_ADDRESS;
        }
        memmove((void*)to, (void*)from, bytes);
        return SUCCESS;
    }});
}
API int cuMemsetD8Async(uintptr_t at, unsigned char value, size_t bytes, Stream* stream) {
    if (const int not_ready = ready()) return not_ready;
    if (!is_live(stream, "stream")) return INVALID_HANDLE;
    return stream->take({nullptr, [=]() -> int {
        if (!lies_in(at, bytes, false)) {
            misuse("%zu bytes at %p are set: not in one buffer", bytes, (void*)at);
            return ILLEGAL_ADDRESS;
        }
        memset((void*)at, value, bytes);
        return SUCCESS;
    }});
}

API int cuStreamCreate(Stream** out, unsigned) {
    if (const int not_ready = ready()) return not_ready;
    Stream* stream = new Stream;
    stream->context = current;
    std::thread([stream] { stream->work(); }).detach();
    *out = add(stream);
    return SUCCESS;
}
API int cuStreamDestroy_v2(Stream* stream) {
    if (!is_live(stream, "stream")) return INVALID_HANDLE;
    if (capturing == stream) capturing = nullptr;
    {
        Lock held(handle_lock());
        live<Stream>().erase(stream);
    }
    end(stream);
    return SUCCESS;
}
API int cuStreamSynchronize(Stream* stream) {
    if (const int not_ready = ready()) return not_ready;
    if (!is_live(stream, "stream")) return INVALID_HANDLE;
    if (const int refused = outside_captures("a wait")) return refused;
    stream->wait();
    return ready();
}
API int cuStreamQuery(Stream* stream) {
    if (const int not_ready = ready()) return not_ready;
    if (!is_live(stream, "stream")) return INVALID_HANDLE;
    Lock held(stream->lock);
    return stream->done >= stream->given ? SUCCESS : NOT_READY;
}
API int cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
    if (const int not_ready = ready()) return not_ready;
    if (!is_live(stream, "stream") || !is_live(event, "event")) return INVALID_HANDLE;
    const uint64_t until = event->recorded;
    Context* context = current;
    return stream->take({nullptr, [=] {
        while (!event->is_reached(until) && !context->lost) std::this_thread::sleep_for(std::chrono::microseconds(20));
        return SUCCESS;
    }});
}

API int cuEventCreate(Event** out, unsigned) {
    if (const int not_ready = ready()) return not_ready;
    Event* event = new Event;
    event->context = current;
    *out = add(event);
    return SUCCESS;
}
API int cuEventDestroy_v2(Event* event) {
    if (!is_live(event, "event")) return INVALID_HANDLE;
    // The memory stays: a stream may still be to reach it.
    Lock held(handle_lock());
    live<Event>().erase(event);
    return SUCCESS;
}
API int cuEventRecord(Event* event, Stream* stream) {
    if (const int not_ready = ready()) return not_ready;
    if (!is_live(stream, "stream") || !is_live(event, "event")) return INVALID_HANDLE;
    const uint64_t n = ++event->recorded;
    // Whoever waited for it finds that the stream is there.
    return stream->take({nullptr, [] { return SUCCESS; }, [=] {
        Lock held(event->lock);
        event->reached = std::max(event->reached, n);
        event->at = Clock::now();
        event->changed.notify_all();
    }});
}
API int cuEventRecordWithFlags(Event* event, Stream* stream, unsigned flags) {
    if (const int not_ready = ready()) return not_ready;
    if (!is_live(stream, "stream") || !is_live(event, "event")) return INVALID_HANDLE;
    if (stream->capture && flags != 1) {
        misuse("an event that is to tell a time only orders work inside a capture");
        return INVALID_VALUE;
    }
    // Each time that its turn comes.
    return stream->take({[=] {
        Lock held(event->lock);
        event->recorded++;
    }, [] { return SUCCESS; }, [=] {
        Lock held(event->lock);
        event->reached++;
        event->at = Clock::now();
        event->changed.notify_all();
    }});
}
API int cuEventQuery(Event* event) {
    if (const int not_ready = ready()) return not_ready;
    if (const int refused = outside_captures("a look at an event")) return refused;
    if (!is_live(event, "event")) return INVALID_HANDLE;
    return event->is_reached(event->recorded) ? SUCCESS : NOT_READY;
}
API int cuEventSynchronize(Event* event) {
    if (const int not_ready = ready()) return not_ready;
    if (const int refused = outside_captures("a wait")) return refused;
    if (!is_live(event, "event")) return INVALID_HANDLE;
    const uint64_t until = event->recorded;
    Context* context = current;
    Lock held(event->lock);
    while (event->reached < until && !context->lost) event->changed.wait_for(held, std::chrono::milliseconds(1));
    return context->lost;
}
API int cuEventElapsedTime_v2(float* ms, Event* start, Event* end) {
    if (!is_live(start, "event") || !is_live(end, "event")) return INVALID_HANDLE;
    for (Event* event : {start, end}) {
        Lock held(event->lock);
        if (event->recorded == 0) return INVALID_HANDLE;
        if (event->reached < event->recorded) return NOT_READY;
    }
    *ms = std::chrono::duration<float, std::milli>(end->at - start->at).count();
    return SUCCESS;
}

API int cuModuleLoadData(Module** out, const void* image) {
    if (const int not_ready = ready()) return not_ready;
    const unsigned char fatbin[4] = {0x50, 0xed, 0x55, 0xba};
    if (memcmp(image, IMAGE, sizeof IMAGE) != 0 && memcmp(image, fatbin, sizeof fatbin) != 0) return INVALID_IMAGE;
    *out = add(new Module{current, {}});
    return SUCCESS;
}
API int cuModuleUnload(Module* module) {
    if (!is_live(module, "module")) return INVALID_HANDLE;
    Lock held(handle_lock());
    live<Module>().erase(module);
    return SUCCESS;
}
API int cuModuleGetFunction(Function** out, Module* module, const char* name) {
    if (const int not_ready = ready()) return not_ready;
    if (!is_live(module, "module")) return INVALID_HANDLE;
    for (size_t at = 0; at < emu_variants[0].n; at++) {
        if (strcmp(emu_variants[0].kernels[at].name, name) != 0) continue;
        module->functions.push_back(std::make_unique<Function>(Function{&emu_variants[0].kernels[at], 48 << 10}));
        *out = module->functions.back().get();
        return SUCCESS;
    }
    return NOT_FOUND;
}
API int cuLaunchKernel(Function* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                       unsigned block_z, unsigned shared, Stream* stream, void** parameters, void** extra) {
    if (const int not_ready = ready()) return not_ready;
    if (!is_live(stream, "stream")) return INVALID_HANDLE;
    if (extra || block_y != 1 || block_z != 1 || shared > function->most_shared) return INVALID_VALUE;
    if (stream->context != current) {
        misuse("%s is launched on a stream of another context", function->kernel->name);
        return INVALID_HANDLE;
    }
    std::vector<std::vector<char>> values;
    for (unsigned at = 0; at < function->kernel->n_arguments; at++) {
        const char* from = (const char*)parameters[at];
        values.emplace_back(from, from + function->kernel->sizes[at]);
    }
    const emu::Kernel* kernel = function->kernel;
    if (!stream->capture) count(GIVEN, current->ordinal);
    return stream->take({nullptr, [=] {
        const unsigned grid[3] = {grid_x, grid_y, grid_z};
        return launch(kernel, grid, block_x, shared, values, stream->context->ordinal);
    }});
}
API int cuLaunchHostFunc(Stream* stream, void (*function)(void*), void* data) {
    if (const int not_ready = ready()) return not_ready;
    if (!is_live(stream, "stream")) return INVALID_HANDLE;
    return stream->take({nullptr, [=] {
        function(data);
        return SUCCESS;
    }});
}

API int cuStreamBeginCapture_v2(Stream* stream, int) {
    if (const int not_ready = ready()) return not_ready;
    if (!is_live(stream, "stream")) return INVALID_HANDLE;
    if (stream->capture || capturing) return INVALID_VALUE;
    stream->capture = std::make_unique<Graph>();
    stream->capture->context = stream->context;
    stream->spoilt = false;
    capturing = stream;
    return SUCCESS;
}
API int cuStreamEndCapture(Stream* stream, Graph** graph) {
    if (!is_live(stream, "stream")) return INVALID_HANDLE;
    if (!stream->capture) return INVALID_VALUE;
    *graph = nullptr;
    std::unique_ptr<Graph> captured = std::move(stream->capture);
    capturing = nullptr;
    if (stream->spoilt) return CAPTURE_INVALIDATED;
    *graph = add(captured.release());
    return SUCCESS;
}
API int cuGraphInstantiateWithFlags(Executable** out, Graph* graph, unsigned long long) {
    if (const int not_ready = ready()) return not_ready;
    if (!is_live(graph, "graph")) return INVALID_HANDLE;
    uint64_t value;
    const uint64_t n = count(INSTANTIATED, current->ordinal);
    if (due("nograph", n, current->ordinal, counts_of[current->ordinal][INSTANTIATED], value)) return NOT_SUPPORTED;
    *out = add(new Executable{current, *graph});
    return SUCCESS;
}
API int cuGraphDestroy(Graph* graph) {
    if (!is_live(graph, "graph")) return INVALID_HANDLE;
    {
        Lock held(handle_lock());
        live<Graph>().erase(graph);
    }
    delete graph;
    return SUCCESS;
}
API int cuGraphExecDestroy(Executable* executable) {
    if (!is_live(executable, "graph")) return INVALID_HANDLE;
    Lock held(handle_lock());
    live<Executable>().erase(executable);
    return SUCCESS;
}
API int cuGraphLaunch(Executable* executable, Stream* stream) {
    if (const int not_ready = ready()) return not_ready;
    if (!is_live(executable, "graph") || !is_live(stream, "stream")) return INVALID_HANDLE;
    count(GRAPHS, executable->context->ordinal);
    for (const Work& one : executable->graph) {
        if (const int refused = stream->take(one)) return refused;
    }
    return SUCCESS;
}

API int cuFuncSetAttribute(Function* function, int which, int value) {
    if (const int not_ready = ready()) return not_ready;
    if (which != 8 || value < 0 || value > 227 << 10) return INVALID_VALUE; // the most dynamic shared memory
    function->most_shared = (unsigned)value;
    return SUCCESS;
}
