// partition_merge: the k best of several sorted lists of a query.
// in     rows u32, scores f32 [n_queries, n_parts, width], each list in order, holes at its end; offsets u32 [n_parts] that are added
//        to the rows of a part, or null
// out    rows u32, scores f32 [n_queries, k]; 1 <= k <= 1024; holes where there are fewer
// launch grid (n_queries), 256 threads, 9 KiB of static shared memory
// order  that of the prelude: higher first, ties by lower row (with its offset), NaN last, -0 as 0. Rows that occur in several lists
//        stay as often. A list that is not in order gives a wrong answer, and nothing else.
// twin   partition_merge in src/device/cpu/twins.rs
//
// The best so far lie in registers. The smaller of the i-th of them and the i-th last of the next list is one of the best of both, and
// all of these are bitonic: half a sort orders them. Lists whose first is worse than the last that is kept cost one read.

KERNEL(partition_merge, 4)
(const u32* __restrict__ rows, const float* __restrict__ scores, const u32* __restrict__ offsets, u32 n_parts, u32 width, u32 k,
 u32* __restrict__ out_rows, float* __restrict__ out_scores) {
    SHARED(u64, spill, 4 * THREADS);
    SHARED(u64, last, 1);
    const u32 t = threadIdx.x, size = padded(k), taken = at_most(width, k);
    if (t == 0) last[0] = NO_KEY;
    __syncthreads();
    u64 best[4] = {NO_KEY, NO_KEY, NO_KEY, NO_KEY};
    for (u32 part = 0; part < n_parts && width > 0; part++) {
        const u64 list = ((u64)blockIdx.x * n_parts + part) * width;
        const u32 offset = offsets ? offsets[part] : 0;
        const auto key = [&](u32 at) {
            const u32 row = rows[list + at];
            return row == NO_ROW ? NO_KEY : pack(scores[list + at], row + offset);
        };
        if (key(0) >= last[0]) continue;
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            const u32 at = size - 1 - (4 * t + j); // wraps around beyond `size`, and is then none of the list's
            const u64 other = at < taken ? key(at) : NO_KEY;
            best[j] = other < best[j] ? other : best[j];
        }
        bitonic_steps(best, spill, size, size / 2);
        __syncthreads();
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            if (4 * t + j == k - 1) last[0] = best[j];
        }
        __syncthreads();
    }
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        if (4 * t + j >= k) continue;
        out_rows[(u64)blockIdx.x * k + 4 * t + j] = row_of(best[j]);
        out_scores[(u64)blockIdx.x * k + 4 * t + j] = score_of(best[j]);
    }
}
