// filter_candidates: lists without what is not available or was seen, in their order.
// in     rows u32, scores f32 [n_lists, width]; lengths u32 [n_lists], or null: all of `width`; available: bits of n_items items, the
//        first in the lowest bit of the first u32, or null: all are; seen: such bits, [n_lists / lists_per_seen, seen_words], or null:
//        none was
// out    rows u32, scores f32 [n_lists, width], closed up, holes behind; counts u32 [n_lists]. Rows and scores may be those that are
//        read.
// launch grid (n_lists), 256 threads, 32 bytes of static shared memory
// order  as given. Scores are passed on bit by bit: NaN and -0 are what they were. Rows from n_items on, NO_ROW among them, are dropped.
// twin   filter_candidates in src/device/cpu/twins.rs

// No `__restrict__`: filtering in place is allowed.
KERNEL(filter_candidates, 4)
(const u32* rows, const float* scores, const u32* __restrict__ lengths, u32 width, const u32* __restrict__ available,
 const u32* __restrict__ seen, u32 seen_words, u32 lists_per_seen, u32 n_items, u32* out_rows, float* out_scores, u32* counts) {
    SHARED(u32, sums, THREADS / 32);
    const u32 t = threadIdx.x, list = blockIdx.x, n = lengths ? at_most(lengths[list], width) : width;
    const u64 base = (u64)list * width;
    const u32* own = seen ? seen + (u64)(list / lists_per_seen) * seen_words : nullptr;
    u32 kept = 0;
    for (u32 tile = 0; tile < n; tile += 4 * THREADS) {
        u32 row[4], score[4];
        u32 stays = load4(row, rows + base, tile + 4 * t, n);
        load4(score, (const u32*)scores + base, tile + 4 * t, n);
#pragma unroll
        for (u32 e = 0; e < 4; e++) {
            const u32 word = row[e] / 32, bit = row[e] % 32;
            if (row[e] >= n_items || (available && !(available[word] >> bit & 1)) || (own && own[word] >> bit & 1)) {
                stays &= ~(1u << e);
            }
        }
        u32 total;
        u32 place = kept + block_scan(__popc(stays), sums, total);
#pragma unroll
        for (u32 e = 0; e < 4; e++) {
            if (!(stays >> e & 1)) continue;
            out_rows[base + place] = row[e];
            out_scores[base + place] = __uint_as_float(score[e]);
            place++;
        }
        kept += total;
    }
    // Another thread may still be to read what lies behind its own places: not without a tile's scan in between.
    for (u32 at = kept + t; at < width; at += THREADS) {
        out_rows[base + at] = NO_ROW;
        out_scores[base + at] = __uint_as_float(0x7fc00000u);
    }
    if (t == 0) counts[list] = kept;
}
