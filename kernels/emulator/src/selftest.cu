// What the emulator is tested by: each primitive once, and each misuse.

KERNEL(primitives, 1)(u32* out, u32 n) {
    const u32 t = threadIdx.x, lane = t % 32;
    u32* own = out + (u64)(blockIdx.x * blockDim.x + t) * n;
    u32 at = 0;
    own[at++] = __shfl_sync(ALL_LANES, t, lane * 7 % 32);
    own[at++] = __shfl_sync(ALL_LANES, t, 3, 8);
    own[at++] = __shfl_xor_sync(ALL_LANES, t, 5u);
    own[at++] = __shfl_up_sync(ALL_LANES, t, 3u, 16);
    own[at++] = __shfl_down_sync(ALL_LANES, t, 3u, 16);
    own[at++] = (u32)(__shfl_xor_sync(ALL_LANES, (u64)t << 40, 1u) >> 40);
    own[at++] = (u32)__shfl_sync(ALL_LANES, (float)t, 9u);
    own[at++] = __ballot_sync(ALL_LANES, t % 3 == 0);
    own[at++] = (u32)__any_sync(ALL_LANES, t == 40);
    own[at++] = (u32)__all_sync(ALL_LANES, t < 32);
    own[at++] = __reduce_add_sync(ALL_LANES, t);
    own[at++] = __reduce_min_sync(ALL_LANES, t + 5);
    own[at++] = __reduce_max_sync(ALL_LANES, t);
    own[at++] = (u32)__reduce_min_sync(ALL_LANES, 10 - (int)lane);
    own[at++] = (u32)__reduce_max_sync(ALL_LANES, -5 - (int)lane);
    own[at++] = __reduce_and_sync(ALL_LANES, t | 0xff00u);
    own[at++] = __reduce_or_sync(ALL_LANES, 1u << lane);
    own[at++] = __reduce_xor_sync(ALL_LANES, t);
    own[at++] = __match_any_sync(ALL_LANES, t % 5);
    // Both halves of a warp by themselves, in either branch.
    own[at++] = lane < 16 ? __ballot_sync(0xffffu, t % 2) : __ballot_sync(0xffff0000u, t % 2 == 0);
    own[at++] = (u32)__syncthreads_count(t % 4 == 0);
    own[at++] = (u32)__syncthreads_and(t < 63);
    own[at++] = (u32)__syncthreads_or(t == 63);
    own[at++] = (u32)__popc(t) | (u32)__ffs((int)t) << 8 | (u32)__clz((int)t) << 16;
    own[at++] = (u32)__clzll((long long)t << 20) | (u32)__popcll(t) << 8 | (u32)__ffsll(t) << 16;
}

// Shared memory, static and dynamic, and every atomic.
KERNEL(memories, 1)(u32* out, u32* counters) {
    SHARED(u32, small, 64);
    DYNAMIC_SHARED(u64, large);
    const u32 t = threadIdx.x;
    small[t] = t;
    large[63 - t] = t;
    __syncthreads();
    out[t] = small[63 - t] + (u32)large[t] * 100;
    __syncthreads();
    if (t < 10) small[t] = t == 7 ? 0 : t == 6 ? 0xffffffffu : 0;
    __syncthreads();
    atomicAdd(&small[0], t);
    atomicSub(&small[1], 1u);
    atomicMax(&small[2], t);
    atomicMin(&small[3], t);
    atomicOr(&small[4], 1u << t % 32);
    atomicXor(&small[5], t);
    atomicAnd(&small[6], ~(1u << t % 8));
    // A lock, of which one thread after the other is the holder.
    const bool first = atomicCAS(&small[7], 0u, 1u) == 0;
    if (first) atomicExch(&small[8], 77u);
    atomicAdd(counters, t);
    atomicMax(counters + 1, t);
    __syncthreads();
    if (t < 9) out[64 + t] = small[t];
}

// A product of matrices by each warp, of fragments that lie in device memory: 4 words of a, 2 of b and 4 sums a lane; and words of shared
// memory by several at once.
KERNEL(matrices, 1)(const u32* a, const u32* b, float* sums, u32* out) {
    SHARED(u32, words, 256);
    const u32 t = threadIdx.x;
    const u32 left[4] = {a[4 * t], a[4 * t + 1], a[4 * t + 2], a[4 * t + 3]}, right[2] = {b[2 * t], b[2 * t + 1]};
    float own[4] = {sums[4 * t], sums[4 * t + 1], sums[4 * t + 2], sums[4 * t + 3]};
    mma_bf16(own, left, right);
    for (u32 i = 0; i < 4; i++) sums[4 * t + i] = own[i];
    shared_store2(words, 4 * t + 2, make_uint2(t, bf16_pair(own[0], own[1])));
    words[4 * t] = 7, words[4 * t + 1] = bf16_pair(__uint_as_float(0x7f800001u), -0.0f);
    __syncthreads();
    const uint4 four = shared_load4(words, 4 * (63 - t));
    __syncthreads();
    shared_store4(words, 4 * t, make_uint4(four.w, four.z, four.y, four.x));
    for (u32 i = 0; i < 4; i++) out[4 * t + i] = words[4 * t + i];
}

KERNEL(matrices_of_some, 1)(u32 lanes) {
    float sums[4] = {};
    const u32 a[4] = {}, b[2] = {};
    if (threadIdx.x % 32 < lanes) mma_bf16(sums, a, b);
}

KERNEL(misaligned_words, 1)(u32 at) {
    SHARED(u32, words, 256);
    shared_store4(words, 4 * threadIdx.x + at, make_uint4(1, 2, 3, 4));
}

// Lanes hand values on through shared memory, with and without __syncwarp.
KERNEL(handed_on, 1)(u32* out, u32 synced) {
    SHARED(u32, values, 64);
    const u32 t = threadIdx.x;
    values[t] = t;
    if (synced) __syncwarp();
    out[t] = values[t ^ 1];
    // What was read may be written by another lane after the next one only.
    __syncwarp();
    values[t ^ 1] = t;
}

KERNEL(across_warps, 1)(u32* out) {
    SHARED(u32, values, 64);
    const u32 t = threadIdx.x;
    values[t] = t;
    __syncwarp();
    out[t] = values[t ^ 32];
}

KERNEL(different_barriers, 1)(u32 same) {
    if (threadIdx.x < 32 || same) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

KERNEL(barrier_without_some, 1)() {
    if (threadIdx.x == 5) return;
    __syncthreads();
}

KERNEL(unlike_collectives, 1)() {
    if (threadIdx.x % 2) __any_sync(ALL_LANES, 1);
    else __all_sync(ALL_LANES, 1);
}

KERNEL(reads_an_outsider, 1)() {
    if (threadIdx.x % 32 < 8) __shfl_sync(0xffu, 1u, 20u);
}

KERNEL(too_much_shared, 1)() {
    SHARED(u64, much, 6145);
    much[threadIdx.x] = 0;
}

KERNEL(beyond_shared, 1)(u32 at) {
    DYNAMIC_SHARED(u32, words);
    words[at] = 1;
}

KERNEL(touches, 1)(u32* at, u32 index) {
    if (threadIdx.x == 3) at[(long long)(int)index] = 1;
}

KERNEL(shifts_too_far, 1)(u32* out, u32 by) { out[threadIdx.x] = 1u << by; }
