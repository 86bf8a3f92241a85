// Runs the threads of a block as fibers on one thread of the host, block after block; see emulator.h for what is noticed.

#include "emulator.h"

#include <algorithm>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#if !defined(__x86_64__)
#define EMU_UCONTEXT
#endif
#ifdef EMU_UCONTEXT
#include <ucontext.h>
#endif

namespace emu {

thread_local Dim thread_index, block_index, block_size, grid_size;

namespace {

constexpr unsigned MOST_THREADS = 1024;
constexpr size_t STACK_BYTES = 64 << 10;
constexpr size_t STATIC_SHARED_BYTES = 48 << 10;  // of every architecture
constexpr size_t DYNAMIC_SHARED_BYTES = 227 << 10; // of sm_90
// A fiber that has met others so often meets nobody new: the largest test stays far below.
constexpr uint64_t MOST_RUNS = 2'000'000'000;

// A context to come back to. By hand where that is short: the system's way costs two system calls a switch.
#ifdef EMU_UCONTEXT
struct Context {
    ucontext_t context;
};
void begin(Context& c, char* stack, size_t bytes, void (*entry)()) {
    getcontext(&c.context);
    c.context.uc_stack.ss_sp = stack;
    c.context.uc_stack.ss_size = bytes;
    c.context.uc_link = nullptr;
    makecontext(&c.context, entry, 0);
}
void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#else
struct Context {
    void* stack_pointer;
};
extern "C" void emu_change(void** from, void* to);
asm(R"(
.text
.globl emu_change
.type emu_change, @function
emu_change:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emu_change, .-emu_change
)");
void begin(Context& c, char* stack, size_t bytes, void (*entry)()) {
    // As if `entry` had been called: six registers, its address, and a return address that nobody takes, at a 16-byte boundary.
    void** top = reinterpret_cast<void**>(stack + bytes) - 2;
    top[0] = reinterpret_cast<void*>(entry);
    top[1] = nullptr;
    std::fill(top - 6, top, nullptr);
    c.stack_pointer = top - 6;
}
void change(Context& from, Context& to) { emu_change(&from.stack_pointer, to.stack_pointer); }
#endif

struct Place {
    const char* file = "";
    int line = 0;
    bool operator==(const Place& other) const { return line == other.line && strcmp(file, other.file) == 0; }
};

enum class State : uint8_t { Ready, Warp, Block, Done };

struct Fiber {
    Context context;
    State state;
    Op op;
    uint32_t mask, argument;
    uint64_t value, result;
    Place place;
};

struct Named {
    std::unique_ptr<char[]> bytes;
    std::vector<Shadow> shadows;
    size_t n;
};

struct Run {
    Context scheduler, abandoned;
    std::vector<Fiber> fibers;
    uint64_t ready[MOST_THREADS / 64];
    unsigned n, n_ready, n_block, n_done, current;
    uint32_t block_epoch;
    std::vector<uint32_t> warp_epochs;
    std::map<std::string, Named> shared;
    size_t static_bytes, dynamic_bytes;
    void (*call)(void* const*);
    void* const* arguments;
    uint64_t noise;
    unsigned policy;
    bool failed, running;
    char* message;
    size_t room;

    uint64_t random() { // splitmix64
        uint64_t z = noise += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }
    void make_ready(unsigned thread) {
        fibers[thread].state = State::Ready;
        ready[thread / 64] |= 1ull << thread % 64;
        n_ready++;
    }
    // The first that is ready from `start` on, around the end.
    unsigned ready_from(unsigned start) const {
        const unsigned words = (n + 63) / 64;
        uint64_t word = ready[start / 64] & ~0ull << start % 64;
        for (unsigned w = start / 64, tries = 0; tries <= words; tries++) {
            if (word) return w * 64 + (unsigned)__builtin_ctzll(word);
            w = (w + 1) % words;
            word = ready[w];
        }
        return 0;
    }
    unsigned last_ready() const {
        for (unsigned w = (n + 63) / 64; w-- > 0;) {
            if (ready[w]) return w * 64 + 63 - (unsigned)__builtin_clzll(ready[w]);
        }
        return 0;
    }
    unsigned choose() {
        switch (policy) {
        case 0: return ready_from(0);
        case 1: return last_ready();
        case 2: return ready_from((unsigned)(random() % n));
        default: // one warp as far as it goes
            const uint32_t warp = (uint32_t)(ready[current / 64] >> (current / 32 % 2 * 32));
            return warp ? current / 32 * 32 + (unsigned)__builtin_ctz(warp) : ready_from((unsigned)(random() % n));
        }
    }
};

thread_local Run* run = nullptr;

struct Stacks {
    char* memory = nullptr;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t each() const { return STACK_BYTES + page; }
    char* of(unsigned thread) {
        if (!memory) {
            void* got = mmap(nullptr, each() * MOST_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (got == MAP_FAILED) abort();
            memory = static_cast<char*>(got);
            for (unsigned t = 0; t < MOST_THREADS; t++) mprotect(memory + each() * t, page, PROT_NONE);
        }
        return memory + each() * thread + page;
    }
    ~Stacks() {
        if (memory) munmap(memory, each() * MOST_THREADS);
    }
};
thread_local Stacks stacks;

// Memory with guard pages, so that faults can be named.
struct Guarded {
    char *mapping, *data;
    size_t mapped, bytes;
    bool retired;
};
std::mutex guarded_lock;
std::vector<Guarded> guarded;
constexpr unsigned char CANARY = 0xc5;

void report(const char* format, va_list list) {
    if (run->failed) return;
    run->failed = true;
    int n = snprintf(run->message, run->room, "block (%u, %u), thread %u: ", block_index.x, block_index.y, thread_index.x);
    if (n > 0 && (size_t)n < run->room) vsnprintf(run->message + n, run->room - (size_t)n, format, list);
}

void note(const char* format, ...) __attribute__((format(printf, 1, 2)));
void note(const char* format, ...) {
    va_list list;
    va_start(list, format);
    report(format, list);
    va_end(list);
}

const char* name_of(Op op) {
    switch (op) {
    case Op::Shuffle: return "a shuffle";
    case Op::Any: return "__any_sync";
    case Op::All: return "__all_sync";
    case Op::Ballot: return "__ballot_sync";
    case Op::MatchAny: return "__match_any_sync";
    case Op::Sync: return "__syncwarp";
    case Op::Multiply: return "mma.sync";
    case Op::Barrier: case Op::BarrierAnd: case Op::BarrierOr: case Op::BarrierCount: return "__syncthreads";
    default: return "a warp reduction";
    }
}

// Back to the scheduler; comes back when the fiber is chosen again.
void wait() {
    Fiber& me = run->fibers[run->current];
    change(me.context, run->scheduler);
}

void entry() {
    run->call(run->arguments);
    run->fibers[run->current].state = State::Done;
    run->n_done++;
    change(run->abandoned, run->scheduler);
}

// The product of the matrices that a warp's lanes, from `first` on, hold fragments of: [16, 16] by [16, 8], onto [16, 8].
void multiply(unsigned first) {
    float a[16][16], b[16][8], sums[16][8];
    const auto half = [](uint32_t word, unsigned upper) {
        const uint32_t bits = upper ? word & 0xffff0000u : word << 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    };
    const auto fragments = [&](unsigned lane) { return reinterpret_cast<Fragments*>(run->fibers[first + lane].value); };
    for (unsigned lane = 0; lane < 32; lane++) {
        const Fragments& of = *fragments(lane);
        const unsigned group = lane / 4, within = lane % 4 * 2;
        for (unsigned i = 0; i < 8; i++) a[group + (i / 2 % 2) * 8][within + i % 2 + (i / 4) * 8] = half(of.a[i / 2], i % 2);
        for (unsigned i = 0; i < 4; i++) b[within + i % 2 + (i / 2) * 8][group] = half(of.b[i / 2], i % 2);
        for (unsigned i = 0; i < 4; i++) sums[group + (i / 2) * 8][within + i % 2] = of.sums[i];
    }
    for (unsigned row = 0; row < 16; row++) {
        for (unsigned column = 0; column < 8; column++) {
            double sum = sums[row][column];
            for (unsigned k = 0; k < 16; k++) sum += (double)a[row][k] * (double)b[k][column];
            sums[row][column] = (float)sum;
        }
    }
    for (unsigned lane = 0; lane < 32; lane++) {
        for (unsigned i = 0; i < 4; i++) fragments(lane)->sums[i] = sums[lane / 4 + (i / 2) * 8][lane % 4 * 2 + i % 2];
    }
}

// Lets a warp's collective happen when all its lanes have come.
void meet(unsigned thread) {
    const unsigned first = thread / 32 * 32;
    Fiber& me = run->fibers[thread];
    for (unsigned lane = 0; lane < 32; lane++) {
        if (!(me.mask >> lane & 1)) continue;
        if (first + lane >= run->n) {
            note("%s at %s:%d names lane %u, which the block does not have", name_of(me.op), me.place.file, me.place.line, lane);
            return;
        }
        const Fiber& other = run->fibers[first + lane];
        if (other.state == State::Done) {
            note("%s at %s:%d names lane %u, which has ended", name_of(me.op), me.place.file, me.place.line, lane);
            return;
        }
        if (other.state != State::Warp || other.op != me.op || other.mask != me.mask || !(other.place == me.place)) return;
    }
    uint64_t all = me.op == Op::And || me.op == Op::All ? ~0ull : 0;
    bool begun = false;
    for (unsigned lane = 0; lane < 32; lane++) {
        if (!(me.mask >> lane & 1)) continue;
        const uint64_t v = run->fibers[first + lane].value;
        const bool before = !begun;
        begun = true;
        switch (me.op) {
        case Op::Any: all |= v; break;
        case Op::All: all &= v; break;
        case Op::Ballot: all |= v << lane; break;
        case Op::Add: all = (uint32_t)(all + v); break;
        case Op::MinUnsigned: all = before ? v : std::min((uint32_t)all, (uint32_t)v); break;
        case Op::MaxUnsigned: all = before ? v : std::max((uint32_t)all, (uint32_t)v); break;
        case Op::MinSigned: all = before ? v : (uint32_t)std::min((int32_t)all, (int32_t)v); break;
        case Op::MaxSigned: all = before ? v : (uint32_t)std::max((int32_t)all, (int32_t)v); break;
        case Op::And: all &= v; break;
        case Op::Or: all |= v; break;
        case Op::Xor: all ^= v; break;
        default: break;
        }
    }
    for (unsigned lane = 0; lane < 32; lane++) {
        if (!(me.mask >> lane & 1)) continue;
        Fiber& other = run->fibers[first + lane];
        other.result = all;
        if (other.op == Op::Shuffle) {
            if (!(me.mask >> other.argument & 1)) {
                note("a shuffle at %s:%d reads lane %u, which takes no part", me.place.file, me.place.line, other.argument);
                return;
            }
            other.result = run->fibers[first + other.argument].value;
        }
        if (other.op == Op::MatchAny) {
            other.result = 0;
            for (unsigned l = 0; l < 32; l++) {
                if (me.mask >> l & 1 && run->fibers[first + l].value == other.value) other.result |= 1u << l;
            }
        }
    }
    if (me.op == Op::Multiply) multiply(first);
    if (me.op == Op::Sync) run->warp_epochs[thread / 32]++;
    for (unsigned lane = 0; lane < 32; lane++) {
        if (me.mask >> lane & 1) run->make_ready(first + lane);
    }
}

// Lets the block's barrier happen when all its threads have come.
void meet_all() {
    const Fiber& one = run->fibers[0];
    uint64_t n = 0;
    for (const Fiber& fiber : run->fibers) {
        if (!(fiber.place == one.place)) {
            note("threads wait at different barriers: %s:%d and %s:%d", one.place.file, one.place.line, fiber.place.file, fiber.place.line);
            return;
        }
        n += fiber.value;
    }
    run->block_epoch++;
    run->n_block = 0;
    for (unsigned thread = 0; thread < run->n; thread++) {
        Fiber& fiber = run->fibers[thread];
        fiber.result = fiber.op == Op::BarrierAnd ? n == run->n : fiber.op == Op::BarrierOr ? n > 0 : n;
        run->make_ready(thread);
    }
}

// Nobody can go on: says where all are.
void stuck() {
    std::map<std::string, unsigned> places;
    for (const Fiber& fiber : run->fibers) {
        if (fiber.state == State::Done) {
            places["have ended"]++;
        } else {
            char text[160];
            snprintf(text, sizeof text, "wait in %s at %s:%d (mask %08x)", name_of(fiber.op), fiber.place.file, fiber.place.line,
                     fiber.state == State::Warp ? fiber.mask : 0xffffffffu);
            places[text]++;
        }
    }
    std::string all;
    for (const auto& [text, n] : places) all += (all.empty() ? "" : "; ") + std::to_string(n) + " " + text;
    note("threads wait for each other: %s", all.c_str());
}

void run_block() {
    run->shared.clear();
    run->static_bytes = 0;
    run->block_epoch = 1;
    run->warp_epochs.assign((run->n + 31) / 32, 1);
    run->n_ready = run->n_block = run->n_done = run->current = 0;
    std::fill(std::begin(run->ready), std::end(run->ready), 0);
    run->fibers.assign(run->n, Fiber{});
    for (unsigned thread = 0; thread < run->n; thread++) {
        begin(run->fibers[thread].context, stacks.of(thread), STACK_BYTES, entry);
        run->make_ready(thread);
    }
    for (uint64_t runs = 0; run->n_done < run->n && !run->failed; runs++) {
        if (run->n_ready == 0) {
            if (run->n_block == run->n) meet_all();
            else stuck();
            continue;
        }
        if (runs == MOST_RUNS) {
            note("does not end");
            continue;
        }
        const unsigned thread = run->current = run->choose();
        run->ready[thread / 64] &= ~(1ull << thread % 64);
        run->n_ready--;
        thread_index = {thread, 0, 0};
        run->running = true;
        change(run->scheduler, run->fibers[thread].context);
        run->running = false;
        if (run->failed) return;
        if (run->fibers[thread].state == State::Warp) meet(thread);
    }
}

// A fault in a fiber is a finding; elsewhere it is whoever's it was before.
struct sigaction earlier[NSIG];
constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};

void on_fault(int signal, siginfo_t* info, void*) {
    if (!run || !run->running) {
        sigaction(signal, &earlier[signal], nullptr);
        return;
    }
    run->running = false;
    const char* at = static_cast<const char*>(info->si_addr);
    if (signal == SIGILL || signal == SIGTRAP || signal == SIGFPE) {
        note("undefined behaviour: overflow, a bad shift, a misaligned access or an index beyond an array");
    } else {
        // The fiber that faults holds no lock of ours.
        std::lock_guard<std::mutex> lock(guarded_lock);
        for (const Guarded& g : guarded) {
            if (at < g.mapping || at >= g.mapping + g.mapped) continue;
            if (g.retired) note("byte %td of a buffer of %zu bytes that was freed", at - g.data, g.bytes);
            else if (at < g.data) note("%td bytes before a buffer of %zu bytes", g.data - at, g.bytes);
            else note("byte %td of a buffer of %zu bytes", at - g.data, g.bytes);
        }
        note("a fault at %p, outside of every buffer (or a misaligned access)", static_cast<const void*>(at));
    }
    change(run->abandoned, run->scheduler);
}

void catch_faults() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        // Not deferred: the handler is left by a change of stacks, and the next fault must come through, too.
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigemptyset(&action.sa_mask);
        for (int signal : SIGNALS) sigaction(signal, &action, &earlier[signal]);
    });
}

} // namespace

void fail(const char* format, ...) {
    va_list list;
    va_start(list, format);
    report(format, list);
    va_end(list);
    change(run->abandoned, run->scheduler);
    abort();
}

uint64_t collective(Op op, uint32_t mask, uint64_t value, uint32_t argument, const char* file, int line) {
    if (!(mask >> lane() & 1)) fail("%s at %s:%d: mask %08x is without the lane itself", name_of(op), file, line, mask);
    Fiber& me = run->fibers[run->current];
    me.op = op, me.mask = mask, me.value = value, me.argument = argument, me.place = {file, line};
    me.state = State::Warp;
    wait();
    return me.result;
}

int barrier(Op op, bool predicate, const char* file, int line) {
    Fiber& me = run->fibers[run->current];
    me.op = op, me.value = predicate, me.place = {file, line};
    me.state = State::Block;
    run->n_block++;
    wait();
    return (int)me.result;
}

void pause() {
    if (run->policy < 2 || run->random() % 4 > 0) return;
    run->make_ready(run->current);
    wait();
}

void* shared_memory(const char* name, size_t element, size_t n, Shadow** shadow, size_t* elements) {
    auto [at, fresh] = run->shared.try_emplace(name);
    Named& named = at->second;
    if (fresh) {
        if (n == DYNAMIC) {
            n = run->dynamic_bytes / element;
        } else {
            run->static_bytes += n * element;
            if (run->static_bytes > STATIC_SHARED_BYTES) fail("%zu bytes of static shared memory", run->static_bytes);
        }
        named.n = n;
        named.bytes.reset(new char[n * element + 1]);
        memset(named.bytes.get(), CANARY, n * element + 1);
        named.shadows.assign(n, Shadow{});
    }
    *shadow = named.shadows.data();
    *elements = named.n;
    return named.bytes.get();
}

namespace {
constexpr int16_t SEVERAL_LANES = -1, SEVERAL_WARPS = -2;
}

void touch(Shadow& shadow, Access access, const char* name, size_t at) {
    const int16_t thread = (int16_t)run->current, warp = (int16_t)(thread / 32);
    Touch now{run->block_epoch, run->warp_epochs[(size_t)warp], thread, warp, access == Access::Atomic};
    // Whether nothing lies between an earlier touch and this one.
    const auto together = [&](const Touch& earlier) {
        if (earlier.block_epoch != now.block_epoch || earlier.thread == thread) return false;
        return earlier.warp != warp || earlier.thread == SEVERAL_WARPS || earlier.warp_epoch == now.warp_epoch;
    };
    const auto several = [&](const Touch& earlier) {
        return earlier.warp == warp && earlier.thread != SEVERAL_WARPS ? SEVERAL_LANES : SEVERAL_WARPS;
    };
    if (access != Access::Write && !shadow.written) fail("%s[%zu] is read before it was written", name, at);
    if (together(shadow.write) && !(access == Access::Atomic && shadow.write.atomic)) {
        fail("%s[%zu] is %s while thread %d writes it (negative: several): no barrier between them", name,
             at, access == Access::Read ? "read" : "written", shadow.write.thread);
    }
    if (access == Access::Read) {
        if (together(shadow.read)) now.thread = several(shadow.read);
        shadow.read = now;
    } else {
        if (together(shadow.read)) fail("%s[%zu] is written while others read it: no barrier between them", name, at);
        if (together(shadow.write)) now.thread = several(shadow.write);
        shadow.write = now;
        shadow.written = true;
    }
}

} // namespace emu

// A variant of the kernels: as they are, or with a planted bug.
struct emu_variant {
    const char* name;
    const emu::Kernel* kernels;
    size_t n;
};
extern const emu_variant emu_variants[];
extern const size_t emu_n_variants;

extern "C" {

// 0: done. 1: a finding, in `message`. 2: there is no such kernel, or the launch is impossible.
int emu_launch(const char* variant, const char* kernel, const unsigned* grid, unsigned block, size_t shared_bytes,
               void* const* arguments, unsigned n_arguments, uint64_t seed, char* message, size_t room) {
    const emu::Kernel* found = nullptr;
    for (size_t v = 0; v < emu_n_variants; v++) {
        if (strcmp(emu_variants[v].name, variant) != 0) continue;
        for (size_t i = 0; i < emu_variants[v].n; i++) {
            if (strcmp(emu_variants[v].kernels[i].name, kernel) == 0) found = &emu_variants[v].kernels[i];
        }
    }
    if (!found || found->n_arguments != n_arguments) {
        snprintf(message, room, "%s of %s: %s", kernel, variant, found ? "another number of arguments" : "no such kernel");
        return 2;
    }
    if (block == 0 || block > emu::MOST_THREADS || shared_bytes > emu::DYNAMIC_SHARED_BYTES || grid[0] == 0 || grid[1] == 0 ||
        grid[1] > 65535 || grid[2] != 1) {
        snprintf(message, room, "grid %u x %u x %u, block %u, %zu bytes of shared memory", grid[0], grid[1], grid[2], block, shared_bytes);
        return 2;
    }
    emu::catch_faults();
    emu::Run one{};
    one.n = block;
    one.dynamic_bytes = shared_bytes;
    one.call = found->call;
    one.arguments = arguments;
    one.noise = seed;
    one.policy = (unsigned)(seed % 4);
    one.message = message;
    one.room = room;
    emu::run = &one;
    emu::grid_size = {grid[0], grid[1], 1};
    emu::block_size = {block, 1, 1};
    // Blocks in any order, too: from a random one on, forwards or backwards.
    const uint64_t n = (uint64_t)grid[0] * grid[1], first = one.policy < 2 ? 0 : one.random() % n;
    for (uint64_t i = 0; i < n && !one.failed; i++) {
        const uint64_t at = (first + (one.policy % 2 ? n - i : i)) % n;
        emu::block_index = {(unsigned)(at % grid[0]), (unsigned)(at / grid[0]), 0};
        emu::run_block();
    }
    emu::run = nullptr;
    return one.failed;
}

// Memory that ends at a guard page (`bytes` rounded up to `align`); null where there is none.
void* emu_allocate(size_t bytes, size_t align) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), room = (bytes + align - 1) / align * align;
    const size_t inner = std::max<size_t>((room + page - 1) / page * page, page), mapped = inner + 2 * page;
    void* got = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (got == MAP_FAILED) return nullptr;
    char* mapping = static_cast<char*>(got);
    if (mprotect(mapping + page, inner, PROT_READ | PROT_WRITE) != 0) {
        munmap(mapping, mapped);
        return nullptr;
    }
    memset(mapping + page, emu::CANARY, inner);
    char* data = mapping + page + inner - room;
    std::lock_guard<std::mutex> lock(emu::guarded_lock);
    emu::guarded.push_back({mapping, data, mapped, bytes, false});
    return data;
}

// Whether what surrounds the memory is as it was.
int emu_intact(const void* data) {
    std::lock_guard<std::mutex> lock(emu::guarded_lock);
    for (const emu::Guarded& g : emu::guarded) {
        if (g.data != data) continue;
        const size_t page = (size_t)sysconf(_SC_PAGESIZE);
        const auto canary = [](char c) { return (unsigned char)c == emu::CANARY; };
        return std::all_of(g.mapping + page, g.data, canary) &&
               std::all_of(g.data + g.bytes, g.mapping + g.mapped - page, canary);
    }
    return 0;
}

// Lets every access to the memory fault from now on, until it is freed.
void emu_retire(void* data) {
    std::lock_guard<std::mutex> lock(emu::guarded_lock);
    for (emu::Guarded& g : emu::guarded) {
        if (g.data != data) continue;
        mprotect(g.mapping, g.mapped, PROT_NONE);
        g.retired = true;
    }
}

void emu_free(void* data) {
    std::lock_guard<std::mutex> lock(emu::guarded_lock);
    const auto at = std::find_if(emu::guarded.begin(), emu::guarded.end(), [&](const emu::Guarded& g) { return g.data == data; });
    if (at == emu::guarded.end()) return;
    munmap(at->mapping, at->mapped);
    emu::guarded.erase(at);
}
}
