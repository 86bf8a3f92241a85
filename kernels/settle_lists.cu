// mask_seen: takes what users have seen out of the scores of all rows.
// in     tail u32 [n_tail]; asked u32 [n_requests, 8], of which words 4 and 5 say where in the tail a request's seen rows begin and how
//        many there are
// out    scores f32 [n_requests, n_rows]: NaN in each place that was seen, else as they were; rows from n_rows on are skipped
// launch grid (n_requests), 256 threads, no shared memory
// twin   mask_seen in src/device/cpu/twins.rs
KERNEL(mask_seen, 4)
(const u32* __restrict__ tail, const u32* __restrict__ asked, float* __restrict__ scores, u32 n_rows) {
    const u64 request = blockIdx.x;
    const u32* seen = tail + asked[request * ASKED + 4];
    const u32 n = asked[request * ASKED + 5];
    for (u32 at = threadIdx.x; at < n; at += THREADS) {
        if (seen[at] < n_rows) scores[request * n_rows + seen[at]] = __uint_as_float(0x7fc00000u);
    }
}

// settle_lists: the k nearest in their final order, and beside them the lists that came with the request.
// in     header u32 [4], of which the first says how many requests there are; rows u32, scores f32 [n_requests, fetched]: the best by
//        scores that are rounded otherwise, in order, holes and NaN last; exact f32 [n_requests, fetched]: the scores that count; bounds
//        f32 [n_requests, 4]: shift, scale, error; tail and asked as above, words 0 to 3: where the lists of the sources 1 to 3 begin,
//        each its rows and then its scores, and how long each is
// out    out_rows u32, out_scores f32 [n_requests, width]: the lists of the four sources, source s from start_s on, as merge_candidates
//        takes them; lengths u32 [n_requests, 4]; open u32 [n_requests]: 1 where a row that was not fetched might be among the k best:
//        where rows are left, and (last score + shift) / scale + error is not below the k-th exact score
// launch grid (n_requests), 256 threads, 9 KiB of static shared memory; fetched <= 1024, k = start_1
// order  that of the prelude, by exact scores. Rows whose score of either kind is NaN are none
// twin   settle_lists in src/device/cpu/twins.rs
KERNEL(settle_lists, 4)
(const u32* __restrict__ header, const u32* __restrict__ rows, const float* __restrict__ scores, const float* __restrict__ exact,
 u32 fetched, const float4* __restrict__ bounds, const u32* __restrict__ tail, const u32* __restrict__ asked, u32 start_1, u32 start_2,
 u32 start_3, u32 width, u32* __restrict__ out_rows, float* __restrict__ out_scores, u32* __restrict__ lengths, u32* __restrict__ open) {
    SHARED(u64, spill, 4 * THREADS);
    SHARED(u32, sums, THREADS / 32);
    SHARED(u64, worst, 1);
    const u32 t = threadIdx.x, k = start_1;
    const u64 request = blockIdx.x, base = request * width, list = request * fetched;
    if (request >= header[0]) {
        if (t < 4) lengths[4 * request + t] = 0;
        if (t == 0) open[request] = 0;
        return;
    }
    u64 keys[4];
    u32 own = 0;
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        const u32 at = 4 * t + j;
        keys[j] = NO_KEY;
        if (at < fetched && key_of(scores[list + at]) != 0xffffffffu && key_of(exact[list + at]) != 0xffffffffu) {
            keys[j] = pack(exact[list + at], rows[list + at]);
        }
        own += keys[j] != NO_KEY;
    }
    u32 found;
    block_scan(own, sums, found);
    const u32 n = at_most(found, k);
    block_sort(keys, spill, padded(fetched));
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        const u32 at = 4 * t + j;
        if (k > 0 && at == k - 1) worst[0] = keys[j];
        if (at >= n) continue;
        out_rows[base + at] = row_of(keys[j]);
        out_scores[base + at] = score_of(keys[j]);
    }
    __syncthreads();
    const u32 starts[4] = {0, start_1, start_2, start_3};
    u32 from = asked[request * ASKED];
#pragma unroll
    for (u32 s = 1; s < 4; s++) {
        const u32 given = asked[request * ASKED + s], room = (s < 3 ? starts[s + 1] : width) - starts[s], some = at_most(given, room);
        for (u32 at = t; at < some; at += THREADS) {
            out_rows[base + starts[s] + at] = tail[from + at];
            out_scores[base + starts[s] + at] = __uint_as_float(tail[from + given + at]);
        }
        if (t == 0) lengths[4 * request + s] = some;
        from += 2 * given;
    }
    if (t == 0) {
        const float4 bound = bounds[request];
        const float last = scores[list + fetched - 1];
        const bool all = rows[list + fetched - 1] == NO_ROW || key_of(last) == 0xffffffffu;
        const bool settled = n == k && (k == 0 || __fadd_rn(__fdiv_rn(__fadd_rn(last, bound.x), bound.y), bound.z) < score_of(worst[0]));
        lengths[4 * request] = n;
        open[request] = !all && !settled;
    }
}
