// add_scores: a weighted sum over rankers, one after the other.
// in     scores f32 [n]; weight
// out    sums f32 [n]: weight * score where `first`, else that much more
// launch grid (n / 1024, rounded up), 256 threads, no shared memory
// order  of rounding: product, then sum, as `WeightedMean` in src/ranking/ensemble.rs
// twin   add_scores in src/device/cpu/twins.rs
KERNEL(add_scores, 4)
(const float* __restrict__ scores, u32 n, float weight, u32 first, float* __restrict__ sums) {
#pragma unroll
    for (u32 g = 0; g < 4; g++) {
        const u64 at = ((u64)blockIdx.x * 4 + g) * THREADS + threadIdx.x;
        if (at < n) sums[at] = __fadd_rn(first ? 0 : sums[at], __fmul_rn(weight, scores[at]));
    }
}

// finish_slates: the best of each request's candidates, with what is to be known of all of them, one record per request.
// in     header u32 [4]: requests, m (a multiple of 4, at most 2048); rows u32, sources u8, sums f32 [n_requests, width]; counts u32
//        [n_requests]; weight: what sums are divided by; source_scores f32 [n_requests, 4, width]; list_scores f32 [n_requests, width]
//        and lengths u32 [n_requests, 4]: settle_lists's, of which the search's first score is at start_3; search_weight: what the best
//        of the search adds to a score, in spans of the scores; open u32 [n_requests]
// out    records u32 [n_requests, 4 + 2 * m + m / 4]: candidates, length of the first list, scores that are NaN, open; m rows, m scores,
//        m bytes of sources, best first, holes (without sources) behind the last. Requests beyond the header's leave theirs as it was
// launch grid (n_requests), 256 threads, 17 KiB of static shared memory
// order  that of the prelude
// twin   finish_slates in src/device/cpu/twins.rs, by `blend_search` in src/device/cpu/mod.rs
constexpr u32 FINISH_PER = 8; // 2048 candidates of a request

KERNEL(finish_slates, 2)
(const u32* __restrict__ header, const u32* __restrict__ rows, const u8* __restrict__ sources, const float* __restrict__ sums,
 const u32* __restrict__ counts, u32 width, float weight, const float* __restrict__ source_scores,
 const float* __restrict__ list_scores, const u32* __restrict__ lengths, u32 start_3, float search_weight,
 const u32* __restrict__ open, u32* __restrict__ records) {
    SHARED(u64, spill, FINISH_PER * THREADS);
    SHARED(u32, words, THREADS / 32);
    SHARED(float, lows, THREADS / 32);
    SHARED(float, highs, THREADS / 32);
    const u32 t = threadIdx.x, m = header[1];
    const u64 request = blockIdx.x, base = request * width;
    if (request >= header[0]) return;
    const u32 n = at_most(counts[request], width);
    const float infinity = __uint_as_float(0x7f800000u);
    float scores[FINISH_PER], low = infinity, high = -infinity;
#pragma unroll
    for (u32 j = 0; j < FINISH_PER; j++) {
        const u32 at = t * FINISH_PER + j;
        scores[j] = at < n ? __fdiv_rn(sums[base + at], weight) : 0;
        if (at >= n || !(scores[j] > -infinity && scores[j] < infinity)) continue;
        low = scores[j] < low ? scores[j] : low;
        high = scores[j] > high ? scores[j] : high;
    }
    const float best = lengths[4 * request + 3] > 0 ? list_scores[base + start_3] : 0;
    if (best > 0) {
#pragma unroll
        for (u32 step = 16; step > 0; step /= 2) {
            const float other_low = __shfl_xor_sync(ALL_LANES, low, step), other_high = __shfl_xor_sync(ALL_LANES, high, step);
            low = other_low < low ? other_low : low;
            high = other_high > high ? other_high : high;
        }
        if ((t & 31) == 0) lows[t / 32] = low, highs[t / 32] = high;
        __syncthreads();
        for (u32 w = 0; w < THREADS / 32; w++) {
            low = lows[w] < low ? lows[w] : low;
            high = highs[w] > high ? highs[w] : high;
        }
        const float range = __fsub_rn(high, low), unit = __fdiv_rn(__fmul_rn(search_weight, range > 0 ? range : 1), best);
#pragma unroll
        for (u32 j = 0; j < FINISH_PER; j++) {
            const u32 at = t * FINISH_PER + j;
            if (at < n) scores[j] = __fadd_rn(scores[j], __fmul_rn(unit, source_scores[(request * 4 + 3) * width + at]));
        }
    }
    u64 keys[FINISH_PER];
    u32 own = 0, n_nan;
#pragma unroll
    for (u32 j = 0; j < FINISH_PER; j++) {
        const u32 at = t * FINISH_PER + j;
        keys[j] = at < n ? pack(scores[j], rows[base + at]) : NO_KEY;
        own += at < n && key_of(scores[j]) == 0xffffffffu;
    }
    block_scan(own, words, n_nan);
    block_sort(keys, spill, padded(width + (width == 0)));
    u32* record = records + request * (4 + 2 * m + m / 4);
    u8* sets = (u8*)(record + 4 + 2 * m);
#pragma unroll
    for (u32 j = 0; j < FINISH_PER; j++) {
        const u32 at = t * FINISH_PER + j;
        if (at >= m) continue;
        const bool is = at < n;
        record[4 + at] = is ? row_of(keys[j]) : NO_ROW;
        record[4 + m + at] = __float_as_uint(is ? score_of(keys[j]) : __uint_as_float(0x7fc00000u));
        sets[at] = is ? sources[base + place_of(rows + base, n, row_of(keys[j]))] : 0;
    }
    if (t == 0) {
        record[0] = n;
        record[1] = lengths[4 * request];
        record[2] = n_nan;
        record[3] = open[request];
    }
}
