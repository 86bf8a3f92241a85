// exact_scores: the scores of chosen rows of a table, in the CPU's order of summation: the same to the bit.
// in     queries f32 [n_requests, width], table f32 [n_rows, width], of which the first `dim` columns count; norms f32 [n_rows], or null
//        where the metric has none; bounds f32 [n_requests, 4], of which the last is the query's length; rows u32 [n_requests, places];
//        counts u32 [n_requests]: how many of them there are, or null: all; sources u8 [n_requests, places]: those with bit 0 are left
//        out, or null: none is; more f32 [n_more, width], more_norms f32 [n_more], or null: rows beside the table, numbered from n_rows on,
//        and more_there: bits of those that have a vector
// out    scores f32 [n_requests, places]: the inner product (metric 0), times norm by length (1: cosine, by 1/|x|; 0 of a query without
//        length), twice it less the norm and the length's square (2: L2, by |x|^2); 0 without a vector; NaN for rows from n_rows +
//        n_more on, NO_ROW among them. What is left out, or lies behind the count, is left as it was
// launch grid (places / 32, rounded up, n_requests), 256 threads, no shared memory: a warp for each row
// order  of summation: that of `Kernel` in src/index/distance.rs, which `lanes` names: 64 sums by fused multiply-adds (AVX-512), 32, and
//        the last columns one by one without fusing (AVX2), or 8 without fusing (elsewhere), added up as there. Terms that are zero
//        there because columns end are left out here
// twin   exact_scores in src/device/cpu/twins.rs, by src/index/exact.rs

constexpr u32 EXACT_ROWS = 32; // of a block

// The sum over the rest of a row, one by one; all lanes have it.
DEVICE float exact_rest(const float* query, const float* row, u32 from, u32 dim) {
    float sum = 0;
    for (u32 at = from; at < dim; at++) {
        const float term = __fmul_rn(query[at], row[at]);
        sum = at == from ? term : __fadd_rn(sum, term);
    }
    return sum;
}

DEVICE float exact_dot(const float* query, const float* row, u32 dim, u32 lanes) {
    const u32 lane = threadIdx.x & 31;
    if (lanes == 8) {
        const u32 whole = dim / 8 * 8;
        float sum = 0;
        for (u32 at = lane; lane < 8 && at < whole; at += 8) sum = __fadd_rn(sum, __fmul_rn(query[at], row[at]));
        float total = __shfl_sync(ALL_LANES, sum, 0);
        for (u32 other = 1; other < 8; other++) total = __fadd_rn(total, __shfl_sync(ALL_LANES, sum, other));
        return __fadd_rn(total, exact_rest(query, row, whole, dim));
    }
    const u32 whole = lanes == 64 ? dim : dim / 32 * 32;
    float low = 0, high = 0;
    for (u32 at = lane; at < whole; at += lanes) {
        low = __fmaf_rn(query[at], row[at], low);
        if (lanes == 64 && at + 32 < whole) high = __fmaf_rn(query[at + 32], row[at + 32], high);
    }
    // Both lanes of a pair add the same two numbers, and have the same sum.
    if (lanes == 64) {
        low = __fadd_rn(low, __shfl_xor_sync(ALL_LANES, low, 16));
        high = __fadd_rn(high, __shfl_xor_sync(ALL_LANES, high, 16));
        low = __fadd_rn(low, high);
        low = __fadd_rn(low, __shfl_xor_sync(ALL_LANES, low, 8));
    } else {
        low = __fadd_rn(low, __shfl_xor_sync(ALL_LANES, low, 8));
        low = __fadd_rn(low, __shfl_xor_sync(ALL_LANES, low, 16));
    }
    low = __fadd_rn(low, __shfl_xor_sync(ALL_LANES, low, 4));
    low = __fadd_rn(low, __shfl_xor_sync(ALL_LANES, low, 2));
    low = __fadd_rn(low, __shfl_xor_sync(ALL_LANES, low, 1));
    return lanes == 64 ? low : __fadd_rn(low, exact_rest(query, row, whole, dim));
}

KERNEL(exact_scores, 4)
(const float* __restrict__ queries, const float* __restrict__ table, u32 n_rows, u32 width, u32 dim, const float* __restrict__ norms,
 u32 metric, u32 lanes, const float4* __restrict__ bounds, const u32* __restrict__ rows, const u32* __restrict__ counts,
 const u8* __restrict__ sources, float* __restrict__ scores, u32 places, const float* __restrict__ more,
 const float* __restrict__ more_norms, const u32* __restrict__ more_there, u32 n_more) {
    const u64 request = blockIdx.y;
    const u32 n = counts ? at_most(counts[request], places) : places, first = blockIdx.x * EXACT_ROWS + threadIdx.x / 32 * 4;
    for (u32 place = first; place < first + 4; place++) {
        // The same for all lanes of a warp.
        if (place >= n || (sources && sources[request * places + place] & 1)) continue;
        const u32 row = rows[request * places + place], slot = row - n_rows;
        const bool in_table = row < n_rows, is_beside = !in_table && slot < n_more;
        float score = is_beside ? 0 : __uint_as_float(0x7fc00000u);
        if (in_table || (is_beside && more_there[slot / 32] >> slot % 32 & 1)) {
            score = exact_dot(queries + request * width, in_table ? table + (u64)row * width : more + (u64)slot * width, dim, lanes);
            const float norm = !norms ? 0 : in_table ? norms[row] : more_norms[slot], length = bounds[request].w;
            if (metric == 1) score = length > 0 ? __fdiv_rn(__fmul_rn(score, norm), length) : 0;
            if (metric == 2) score = __fsub_rn(__fsub_rn(__fmul_rn(2, score), norm), __fmul_rn(length, length));
        }
        if ((threadIdx.x & 31) == 0) scores[request * places + place] = score;
    }
}
