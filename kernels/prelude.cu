// What the kernels share. It stands in front of them in the one unit that nvcc and NVRTC compile and the emulator runs; no file of
// that unit includes anything, so that NVRTC needs no headers.
//
// order  of scored rows, everywhere: higher score first, then lower row; NaN after every number, -0 as 0. Rows `NO_ROW` are holes:
//        they come after everything, and lists that are too short end in them, with NaN for a score.
// twin   `Packed` in src/candidates.rs

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 THREADS = 256; // of every block
constexpr u32 ALL_LANES = 0xffffffffu;
constexpr u32 NO_ROW = 0xffffffffu;
constexpr u64 NO_KEY = ~0ull;
// Words that say of a request where in the tail lists begin, how long these are, and beginning and number of seen rows and liked items.
constexpr u32 ASKED = 8;

#ifndef EMULATED // the emulator has its own of these
#define KERNEL(name, blocks) extern "C" __global__ void __launch_bounds__(THREADS, blocks) name
#define DEVICE static __device__ __forceinline__
#define SHARED(type, name, n) __shared__ type name[n]
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]

// Words of shared memory by one access: four at a 16-byte boundary, two at one of 8 bytes.
DEVICE uint4 shared_load4(const u32* words, u32 at) { return *(const uint4*)(words + at); }
DEVICE void shared_store4(u32* words, u32 at, uint4 v) { *(uint4*)(words + at) = v; }
DEVICE void shared_store2(u32* words, u32 at, uint2 v) { *(uint2*)(words + at) = v; }

// Two bf16, rounded to the nearest, ties to even, the first in the low half; NaN is 0x7fff.
DEVICE u32 bf16_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// sums += a * b by a warp, [16, 16] bf16 by [16, 8] bf16 onto f32, in PTX's fragments.
DEVICE void mma_bf16(float (&sums)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// A score as an integer: smaller is better. NaN is largest of all.
DEVICE u32 key_of(float score) {
    const u32 bits = __float_as_uint(score);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0xffffffffu;
    if (bits == 0x80000000u) return 0x7fffffffu;
    return bits >> 31 ? bits : bits ^ 0x7fffffffu;
}

// A scored row as an integer whose order is that of the list; a hole is NO_KEY.
DEVICE u64 pack(float score, u32 row) { return row == NO_ROW ? NO_KEY : (u64)key_of(score) << 32 | row; }

DEVICE u32 row_of(u64 key) { return (u32)key; }

DEVICE float score_of(u64 key) {
    const u32 high = (u32)(key >> 32);
    return __uint_as_float(high == 0xffffffffu ? 0x7fc00000u : high >> 31 ? high : high ^ 0x7fffffffu);
}

DEVICE u32 at_most(u32 a, u32 b) { return a < b ? a : b; }

// The least power of two that is not below `n`, for n > 0.
DEVICE u32 padded(u32 n) { return n == 1 ? 1 : 1u << (32 - __clz((int)(n - 1))); }

// Loads values `at` to `at + 4` of the `n` that there are, by one 16-byte access where all four exist and the address allows it.
// `at` may lie before the first: then it has wrapped around. Returns a bit for each value that exists.
DEVICE u32 load4(u32 (&values)[4], const u32* in, u32 at, u32 n) {
    if (at < n && n - at >= 4 && ((u64)(in + at) & 15) == 0) {
        const uint4 four = __ldcs((const uint4*)(in + at));
        values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
        return 15;
    }
    u32 exist = 0;
#pragma unroll
    for (u32 e = 0; e < 4; e++) {
        const bool exists = at + e < n;
        values[e] = exists ? in[at + e] : 0;
        exist |= (u32)exists << e;
    }
    return exist;
}

// The sum of `n` over the lanes up to this one.
DEVICE u32 warp_scan(u32 n) {
    const u32 lane = threadIdx.x & 31;
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        const u32 below = __shfl_up_sync(ALL_LANES, n, step);
        if (lane >= step) n += below;
    }
    return n;
}

// The sum of `n` over the threads before this one, and `total` over all. `sums` [THREADS / 32] may be used again at once.
template <class Words>
DEVICE u32 block_scan(u32 n, Words sums, u32& total) {
    const u32 warp = threadIdx.x / 32, up_to = warp_scan(n);
    if ((threadIdx.x & 31) == 31) sums[warp] = up_to;
    __syncthreads();
    u32 before = 0;
    total = 0;
#pragma unroll
    for (u32 w = 0; w < THREADS / 32; w++) {
        const u32 sum = sums[w];
        before += w < warp ? sum : 0;
        total += sum;
    }
    __syncthreads();
    return before + up_to - n;
}

// Room for `n` values of this thread, in no particular order: counts `counter` up, returns the first place.
template <class Counter>
DEVICE u32 reserve(u32 n, Counter counter) {
    const u32 up_to = warp_scan(n);
    u32 first = 0;
    if ((threadIdx.x & 31) == 31 && up_to > 0) first = atomicAdd(counter, up_to);
    return __shfl_sync(ALL_LANES, first, 31) + up_to - n;
}

// The last steps of a bitonic network over the block's `THREADS * PER` keys, thread t holding those from t * PER on: runs of `size`
// that are bitonic become ascending where `place & size` is 0, else descending. `stride` is half of what is still to be merged.
// Neighbours lie in one thread, further ones in one warp; `spill` [THREADS * PER] is for those between warps, and must not be in use.
template <u32 PER, class Keys>
DEVICE void bitonic_steps(u64 (&keys)[PER], Keys spill, u32 size, u32 stride) {
    const u32 t = threadIdx.x;
    for (; stride >= 32 * PER; stride /= 2) {
#pragma unroll
        for (u32 j = 0; j < PER; j++) spill[j * THREADS + t] = keys[j];
        __syncthreads();
        const bool low = ((t * PER) & stride) == 0, ascending = ((t * PER) & size) == 0;
#pragma unroll
        for (u32 j = 0; j < PER; j++) {
            const u64 other = spill[j * THREADS + (t ^ stride / PER)];
            keys[j] = (other < keys[j]) == (low == ascending) ? other : keys[j];
        }
        __syncthreads();
    }
    for (; stride >= PER; stride /= 2) {
        const bool low = ((t * PER) & stride) == 0, ascending = ((t * PER) & size) == 0;
#pragma unroll
        for (u32 j = 0; j < PER; j++) {
            const u64 other = __shfl_xor_sync(ALL_LANES, keys[j], stride / PER);
            keys[j] = (other < keys[j]) == (low == ascending) ? other : keys[j];
        }
    }
#pragma unroll
    for (u32 s = PER / 2; s > 0; s /= 2) {
        if (s > stride) continue;
#pragma unroll
        for (u32 j = 0; j < PER; j++) {
            if (j & s) continue;
            const bool ascending = ((t * PER + j) & size) == 0, swapped = (keys[j] > keys[j | s]) == ascending;
            const u64 low = swapped ? keys[j | s] : keys[j], high = swapped ? keys[j] : keys[j | s];
            keys[j] = low, keys[j | s] = high;
        }
    }
}

// Sorts the first `n` of the block's keys ascending; `n` is a power of two.
template <u32 PER, class Keys>
DEVICE void block_sort(u64 (&keys)[PER], Keys spill, u32 n) {
    for (u32 size = 2; size <= n; size *= 2) bitonic_steps(keys, spill, size, size / 2);
}

// The place of `row` among the `n` ascending ones, `n` where it is not there.
template <class Rows>
DEVICE u32 place_of(Rows rows, u32 n, u32 row) {
    u32 low = 0, high = n;
    while (low < high) {
        const u32 middle = (low + high) / 2;
        if (rows[middle] < row) low = middle + 1;
        else high = middle;
    }
    return low < n && rows[low] == row ? low : n;
}
