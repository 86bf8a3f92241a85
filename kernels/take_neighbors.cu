// take_neighbors: what a library found, as lists of ours: rows of 32 bits with scores of which the higher is better, in order, each once.
// in     neighbors i64, distances f32 [n_lists, width], width <= 1024; factor, offset: a score is factor * distance + offset; available:
//        bits of n_rows rows, the first in the lowest bit of the first u32, or null: all are
// out    rows u32, scores f32 [n_lists, k]; 1 <= k <= 1024; holes where there are fewer
// launch grid (n_lists), 256 threads, 8 KiB of static shared memory
// order  that of the prelude: higher first, ties by lower row, NaN last, -0 as 0. The lists that are read may be in any. Neighbors below 0
//        or from n_rows on are holes, as are rows that are not available; of a row that occurs more than once the best score stays.
// twin   take_neighbors in src/device/cpu/twins.rs
//
// Sorted by row first, then by score: what occurs twice then lies side by side, whatever its scores.

KERNEL(take_neighbors, 4)
(const long long* __restrict__ neighbors, const float* __restrict__ distances, float factor, float offset, u32 width, u32 n_rows,
 const u32* __restrict__ available, u32 k, u32* __restrict__ out_rows, float* __restrict__ out_scores) {
    SHARED(u64, spill, 4 * THREADS);
    const u32 t = threadIdx.x, size = padded(width);
    const u64 list = (u64)blockIdx.x * width;
    u64 keys[4];
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        const u32 at = 4 * t + j;
        keys[j] = NO_KEY;
        if (at >= width) continue;
        const u64 row = (u64)neighbors[list + at]; // below 0: beyond every end
        if (row >= n_rows || (available && !(available[row / 32] >> (row % 32) & 1))) continue;
        keys[j] = row << 32 | key_of(__fmaf_rn(factor, distances[list + at], offset));
    }
    block_sort(keys, spill, size);
    spill[t] = keys[3];
    __syncthreads();
    const u64 before = t > 0 ? (u64)spill[t - 1] : NO_KEY;
    __syncthreads();
#pragma unroll
    for (u32 j = 4; j-- > 0;) {
        const u64 last = j > 0 ? keys[j - 1] : before;
        const bool stays = keys[j] != NO_KEY && keys[j] >> 32 != last >> 32;
        keys[j] = stays ? keys[j] << 32 | keys[j] >> 32 : NO_KEY;
    }
    block_sort(keys, spill, size);
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        const u32 at = 4 * t + j;
        if (at >= k) continue;
        out_rows[(u64)blockIdx.x * k + at] = row_of(keys[j]);
        out_scores[(u64)blockIdx.x * k + at] = score_of(keys[j]);
    }
}
