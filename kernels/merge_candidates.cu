// merge_candidates: one candidate per item of a request's lists, with every source that proposed it.
// in     rows u32, scores f32 [n_requests, width]: the lists of the four sources, one behind the other, source s from start_s on
//        (start_0 = 0) to the next source's start, the last to `width` <= 2048; lengths u32 [n_requests, 4] of the lists
// out    rows u32 [n_requests, width], sources u8 [n_requests, width] (bit s: source s), source_scores f32 and source_ranks u16
//        [n_requests, 4, width] (0 where the source did not propose the item; else the source's own score, and 1 for its first),
//        counts u32 [n_requests]. What lies behind the count is left as it was.
// launch grid (n_requests), 256 threads, 17 KiB of static shared memory
// order  ascending rows. Scores are passed on bit by bit: NaN and -0 are what they were. Of an item that a list holds twice, the later
//        place counts. Rows NO_ROW, at the ends of lists, are skipped.
// twin   merge_candidates in src/device/cpu/twins.rs, by src/retrieval/merge.rs

constexpr u32 MERGE_PER = 8; // 2048 entries of a request

KERNEL(merge_candidates, 2)
(const u32* __restrict__ rows, const float* __restrict__ scores, const u32* __restrict__ lengths, u32 width, u32 start_1, u32 start_2,
 u32 start_3, u32* __restrict__ out_rows, u8* __restrict__ sources, float* __restrict__ source_scores,
 u16* __restrict__ source_ranks, u32* __restrict__ counts) {
    SHARED(u64, entries, MERGE_PER * THREADS);
    SHARED(u32, sums, THREADS / 32);
    const u32 t = threadIdx.x;
    const u64 request = blockIdx.x, base = request * width;
    const u32 starts[4] = {0, start_1, start_2, start_3};

    // An entry: row, source, place in the list.
    u64 keys[MERGE_PER];
#pragma unroll
    for (u32 j = 0; j < MERGE_PER; j++) {
        const u32 at = t * MERGE_PER + j;
        u32 source = 0, start = 0;
#pragma unroll
        for (u32 s = 1; s < 4; s++) {
            if (at >= starts[s]) source = s, start = starts[s];
        }
        const u32 place = at - start, row = at < width && place < lengths[4 * request + source] ? rows[base + at] : NO_ROW;
        keys[j] = row == NO_ROW ? NO_KEY : (u64)row << 32 | source << 16 | place;
    }
    block_sort(keys, entries, padded(width + (width == 0)));

#pragma unroll
    for (u32 j = 0; j < MERGE_PER; j++) entries[t * MERGE_PER + j] = keys[j];
    __syncthreads();
    u32 first = 0;
#pragma unroll
    for (u32 j = 0; j < MERGE_PER; j++) {
        const u32 at = t * MERGE_PER + j;
        const bool same = at > 0 && row_of((u64)entries[at - (at > 0)] >> 32) == row_of(keys[j] >> 32);
        first |= (u32)(keys[j] != NO_KEY && !same) << j;
    }
    u32 count;
    u32 place = block_scan(__popc(first), sums, count);
#pragma unroll
    for (u32 j = 0; j < MERGE_PER; j++) {
        if (!(first >> j & 1)) continue;
        const u32 row = row_of(keys[j] >> 32);
        u32 set = 0, ranks[4] = {0, 0, 0, 0};
        float own[4] = {0, 0, 0, 0};
        for (u32 at = t * MERGE_PER + j; at < MERGE_PER * THREADS; at++) {
            const u64 entry = entries[at];
            if (row_of(entry >> 32) != row) break;
            const u32 source = (u32)entry >> 16, in_list = (u32)entry & 0xffff;
#pragma unroll
            for (u32 s = 0; s < 4; s++) {
                if (s != source) continue;
                set |= 1u << s;
                ranks[s] = in_list + 1;
                own[s] = scores[base + starts[s] + in_list];
            }
        }
        out_rows[base + place] = row;
        sources[base + place] = (u8)set;
#pragma unroll
        for (u32 s = 0; s < 4; s++) {
            source_scores[(request * 4 + s) * width + place] = own[s];
            source_ranks[(request * 4 + s) * width + place] = (u16)ranks[s];
        }
        place++;
    }
    if (t == 0) counts[request] = count;
}
