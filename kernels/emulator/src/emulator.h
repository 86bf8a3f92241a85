// The part of CUDA C++ that the kernels use, for a host compiler: every CUDA thread is a fiber, and warp collectives and barriers are
// where fibers wait for each other (scheduler.cpp). Between these a fiber runs alone, so what is found is what an order of the fibers
// can show; the orders are random, by a seed.
//
// Noticed and reported, with the place in the kernel: lanes that do not meet at the same collective, or name lanes that are gone;
// threads that do not meet at the same barrier; deadlock; shared memory out of bounds, read before it was written, or touched by two
// threads (one of them writing) with no barrier between; global memory beyond a buffer (guard pages); undefined behaviour of C++ and
// misaligned access (the compiler's traps).
//
// Not shown: the memory model (fibers see each other's writes at once), races in global memory, speed, what a GPU's compiler does.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#define EMULATED
#define KERNEL(name, blocks) static void name
#define DEVICE static inline
#define SHARED(type, name, n) const emu::Shared<type> name = emu::shared<type>(n, #name)
#define DYNAMIC_SHARED(type, name) const emu::Shared<type> name = emu::dynamic_shared<type>(#name)
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __device__
#define __forceinline__ inline

// Where a call stands: part of its signature, so that it is the kernel's line.
#define EMU_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace emu {

struct Dim {
    unsigned x, y, z;
};

enum class Op : uint8_t {
    Shuffle, Any, All, Ballot, Add, MinUnsigned, MaxUnsigned, MinSigned, MaxSigned, And, Or, Xor, MatchAny, Sync,
    Multiply, Barrier, BarrierAnd, BarrierOr, BarrierCount,
};

// What a lane holds of matrices that its warp multiplies: PTX's fragments.
struct Fragments {
    float sums[4];
    uint32_t a[4], b[2];
};

// What threads of a block know of it.
extern thread_local Dim thread_index, block_index, block_size, grid_size;

// Waits for the lanes of `mask`; the operation's result for this lane. `argument` is a shuffle's source lane.
uint64_t collective(Op op, uint32_t mask, uint64_t value, uint32_t argument, const char* file, int line);
// Waits for all threads of the block.
int barrier(Op op, bool predicate, const char* file, int line);
// Lets others go first, sometimes.
void pause();
// Ends the launch with a report.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Who touched an element of shared memory last, and when: barriers of the block and of the warp that had passed.
struct Touch {
    uint32_t block_epoch, warp_epoch;
    int16_t thread; // SEVERAL_LANES: of one warp; SEVERAL_WARPS
    int16_t warp;
    bool atomic;
};
struct Shadow {
    bool written;
    Touch write, read;
};
enum class Access : uint8_t { Read, Write, Atomic };
void touch(Shadow& shadow, Access access, const char* name, size_t at);

// Memory of the block, by name; `bytes` SIZE_MAX: the launch's dynamic shared memory.
void* shared_memory(const char* name, size_t element, size_t n, Shadow** shadow, size_t* elements);
constexpr size_t DYNAMIC = SIZE_MAX;

template <class T>
struct Shared;

template <class T>
struct Pointer { // to an element of shared memory, for atomics
    const Shared<T>* array;
    size_t at;
};

template <class T>
struct Element {
    const Shared<T>* array;
    size_t at;
    operator T() const {
        touch(array->shadow[at], Access::Read, array->name, at);
        return array->data[at];
    }
    const Element& operator=(T value) const {
        touch(array->shadow[at], Access::Write, array->name, at);
        array->data[at] = value;
        return *this;
    }
    const Element& operator=(const Element& other) const { return *this = (T)other; }
    const Element& operator+=(T value) const { return *this = (T)(*this + value); }
    const Element& operator|=(T value) const { return *this = (T)(*this | value); }
    Pointer<T> operator&() const { return {array, at}; }
};

template <class T>
struct Shared {
    T* data;
    Shadow* shadow;
    size_t n;
    const char* name;
    Element<T> operator[](size_t at) const {
        if (at >= n) fail("%s[%zu] is out of bounds: there are %zu", name, at, n);
        return {this, at};
    }
};

template <class T>
Shared<T> shared(size_t n, const char* name) {
    Shared<T> array{};
    array.name = name;
    array.data = static_cast<T*>(shared_memory(name, sizeof(T), n, &array.shadow, &array.n));
    return array;
}

template <class T>
Shared<T> dynamic_shared(const char* name) {
    return shared<T>(DYNAMIC, name);
}

// Kernels by name, for launching.
struct Kernel {
    const char* name;
    unsigned n_arguments;
    const size_t* sizes; // of the arguments, bytes
    void (*call)(void* const* arguments);
};

template <class... A, size_t... I>
void call(void (*kernel)(A...), void* const* arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_cv_t<A>*>(arguments[I])...);
}

template <auto F>
struct Caller;
template <class... A, void (*F)(A...)>
struct Caller<F> {
    static void run(void* const* arguments) { call(F, arguments, std::index_sequence_for<A...>{}); }
    static constexpr unsigned n = sizeof...(A);
    static constexpr size_t sizes[] = {sizeof(A)...};
};

template <class T>
uint64_t bits_of(T value) {
    static_assert(sizeof(T) <= 8, "collectives take at most 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    return bits;
}

template <class T>
T from_bits(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof(T));
    return value;
}

inline unsigned lane() { return thread_index.x % 32; }

} // namespace emu

#define threadIdx emu::thread_index
#define blockIdx emu::block_index
#define blockDim emu::block_size
#define gridDim emu::grid_size
constexpr int warpSize = 32;

template <class T>
T __shfl_sync(unsigned mask, T value, unsigned source, int width = 32, EMU_PLACE) {
    const unsigned w = (unsigned)width, from = (emu::lane() & ~(w - 1)) | (source & (w - 1));
    return emu::from_bits<T>(emu::collective(emu::Op::Shuffle, mask, emu::bits_of(value), from, file, line));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lanes, int width = 32, EMU_PLACE) {
    const unsigned w = (unsigned)width, lane = emu::lane(), other = lane ^ lanes, end = (lane & ~(w - 1)) + w;
    return emu::from_bits<T>(emu::collective(emu::Op::Shuffle, mask, emu::bits_of(value), other < end ? other : lane, file, line));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32, EMU_PLACE) {
    const unsigned w = (unsigned)width, lane = emu::lane(), first = lane & ~(w - 1), from = lane >= first + lanes ? lane - lanes : lane;
    return emu::from_bits<T>(emu::collective(emu::Op::Shuffle, mask, emu::bits_of(value), from, file, line));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32, EMU_PLACE) {
    const unsigned w = (unsigned)width, lane = emu::lane(), end = (lane & ~(w - 1)) + w, from = lane + lanes < end ? lane + lanes : lane;
    return emu::from_bits<T>(emu::collective(emu::Op::Shuffle, mask, emu::bits_of(value), from, file, line));
}
inline int __any_sync(unsigned mask, int predicate, EMU_PLACE) {
    return (int)emu::collective(emu::Op::Any, mask, predicate != 0, 0, file, line);
}
inline int __all_sync(unsigned mask, int predicate, EMU_PLACE) {
    return (int)emu::collective(emu::Op::All, mask, predicate != 0, 0, file, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMU_PLACE) {
    return (unsigned)emu::collective(emu::Op::Ballot, mask, predicate != 0, 0, file, line);
}
#define EMU_REDUCE(name, type, op)                                                                                                  \
    inline type name(unsigned mask, type value, EMU_PLACE) {                                                                        \
        return emu::from_bits<type>(emu::collective(emu::Op::op, mask, emu::bits_of(value), 0, file, line));                        \
    }
EMU_REDUCE(__reduce_add_sync, unsigned, Add)
EMU_REDUCE(__reduce_min_sync, unsigned, MinUnsigned)
EMU_REDUCE(__reduce_max_sync, unsigned, MaxUnsigned)
EMU_REDUCE(__reduce_min_sync, int, MinSigned)
EMU_REDUCE(__reduce_max_sync, int, MaxSigned)
EMU_REDUCE(__reduce_and_sync, unsigned, And)
EMU_REDUCE(__reduce_or_sync, unsigned, Or)
EMU_REDUCE(__reduce_xor_sync, unsigned, Xor)
#undef EMU_REDUCE
template <class T>
unsigned __match_any_sync(unsigned mask, T value, EMU_PLACE) {
    return (unsigned)emu::collective(emu::Op::MatchAny, mask, emu::bits_of(value), 0, file, line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMU_PLACE) { emu::collective(emu::Op::Sync, mask, 0, 0, file, line); }
inline void __syncthreads(EMU_PLACE) { emu::barrier(emu::Op::Barrier, false, file, line); }
inline int __syncthreads_and(int predicate, EMU_PLACE) { return emu::barrier(emu::Op::BarrierAnd, predicate != 0, file, line); }
inline int __syncthreads_or(int predicate, EMU_PLACE) { return emu::barrier(emu::Op::BarrierOr, predicate != 0, file, line); }
inline int __syncthreads_count(int predicate, EMU_PLACE) { return emu::barrier(emu::Op::BarrierCount, predicate != 0, file, line); }
inline void __threadfence() {}
inline void __threadfence_block() {}

// Atomics return what was there. In shared memory they take part in the search for races, in global memory they do not.
#define EMU_ATOMIC(function, changed)                                                                                               \
    template <class T>                                                                                                              \
    T function(T* at, std::common_type_t<T> value) {                                                                                \
        emu::pause();                                                                                                               \
        const T old = *at;                                                                                                          \
        *at = (T)(changed);                                                                                                         \
        return old;                                                                                                                 \
    }                                                                                                                               \
    template <class T>                                                                                                              \
    T function(emu::Pointer<T> at, std::common_type_t<T> value) {                                                                   \
        emu::pause();                                                                                                               \
        emu::touch(at.array->shadow[at.at], emu::Access::Atomic, at.array->name, at.at);                                            \
        const T old = at.array->data[at.at];                                                                                        \
        at.array->data[at.at] = (T)(changed);                                                                                       \
        return old;                                                                                                                 \
    }
EMU_ATOMIC(atomicAdd, old + value)
EMU_ATOMIC(atomicSub, old - value)
EMU_ATOMIC(atomicMin, value < old ? value : old)
EMU_ATOMIC(atomicMax, value > old ? value : old)
EMU_ATOMIC(atomicAnd, old & value)
EMU_ATOMIC(atomicOr, old | value)
EMU_ATOMIC(atomicXor, old ^ value)
EMU_ATOMIC(atomicExch, value)
#undef EMU_ATOMIC
template <class T>
T atomicCAS(T* at, std::common_type_t<T> expected, std::common_type_t<T> value) {
    emu::pause();
    const T old = *at;
    if (old == expected) *at = value;
    return old;
}
template <class T>
T atomicCAS(emu::Pointer<T> at, std::common_type_t<T> expected, std::common_type_t<T> value) {
    emu::pause();
    emu::touch(at.array->shadow[at.at], emu::Access::Atomic, at.array->name, at.at);
    const T old = at.array->data[at.at];
    if (old == expected) at.array->data[at.at] = value;
    return old;
}

// What one access loads or stores; a 16-byte one must lie at a 16-byte boundary, which the compiler's traps check.
#define EMU_VECTORS(type, scalar)                                                                                                   \
    struct alignas(2 * sizeof(scalar)) type##2 {                                                                                    \
        scalar x, y;                                                                                                                \
    };                                                                                                                              \
    struct alignas(4 * sizeof(scalar)) type##4 {                                                                                    \
        scalar x, y, z, w;                                                                                                          \
    };                                                                                                                              \
    inline type##2 make_##type##2(scalar x, scalar y) { return {x, y}; }                                                            \
    inline type##4 make_##type##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
EMU_VECTORS(uint, unsigned)
EMU_VECTORS(int, int)
EMU_VECTORS(float, float)
#undef EMU_VECTORS

template <class T>
T __ldg(const T* at) {
    return *at;
}
template <class T>
T __ldcs(const T* at) {
    return *at;
}
template <class T>
T __ldcg(const T* at) {
    return *at;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz((unsigned)x); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll((unsigned long long)x); }
inline unsigned __float_as_uint(float x) { return (unsigned)emu::bits_of(x); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __uint_as_float(unsigned x) { return emu::from_bits<float>(x); }

// What one access of shared memory loads or stores: four words at a 16-byte boundary, two at one of 8 bytes.
inline uint4 shared_load4(const emu::Shared<unsigned>& words, unsigned at) {
    if (at % 4) emu::fail("%s[%u] is loaded from as 16 bytes: a misaligned access", words.name, at);
    return {words[at], words[at + 1], words[at + 2], words[at + 3]};
}
inline void shared_store4(const emu::Shared<unsigned>& words, unsigned at, uint4 v) {
    if (at % 4) emu::fail("%s[%u] is stored to as 16 bytes: a misaligned access", words.name, at);
    words[at] = v.x, words[at + 1] = v.y, words[at + 2] = v.z, words[at + 3] = v.w;
}
inline void shared_store2(const emu::Shared<unsigned>& words, unsigned at, uint2 v) {
    if (at % 2) emu::fail("%s[%u] is stored to as 8 bytes: a misaligned access", words.name, at);
    words[at] = v.x, words[at + 1] = v.y;
}

// Two bf16, rounded to the nearest, ties to even, the first in the low half; NaN is 0x7fff (PTX, `cvt.rn.bf16x2.f32`).
inline unsigned bf16_pair(float low, float high) {
    const auto round = [](float v) -> unsigned {
        const unsigned bits = (unsigned)emu::bits_of(v);
        return v != v ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    };
    return round(low) | round(high) << 16;
}

// sums += a * b by a warp: PTX, `mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32`. Products are exact, their sum and the addend are
// rounded once, here; a GPU rounds more often.
inline void mma_bf16(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2], EMU_PLACE) {
    emu::Fragments mine;
    memcpy(mine.sums, sums, sizeof sums), memcpy(mine.a, a, sizeof a), memcpy(mine.b, b, sizeof b);
    emu::collective(emu::Op::Multiply, 0xffffffffu, (uint64_t)&mine, 0, file, line);
    memcpy(sums, mine.sums, sizeof sums);
}
