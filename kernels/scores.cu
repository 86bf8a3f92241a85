// scores: how near every row of a table is to every query.
// in     queries f32 [n_queries, width], table f32 [n_rows, width], both in units of 16 bytes (4 values) at 16-byte boundaries, columns
//        filled up with zeros; terms f32 [n_rows], or null where the metric has none; available: bits of n_rows rows, the first in the
//        lowest bit of the first u32, or null: all are
// out    scores f32 [n_queries, stride], of which n_rows are written: the inner product (metric 0), times the row's term (1: cosine, by
//        1/|x|), or twice it less the term (2: L2, by |x|^2); NaN for rows that are not available
// launch grid (n_rows / 128, n_queries / 32, each rounded up), 256 threads, 13 KiB of static shared memory
// order  of 128 rows of which none is available nothing is read; of summation: one f32 sum, by fused multiply-adds over ascending columns, so that the result is the same in any batch
// twin   scores in src/device/cpu/twins.rs
//
// A thread has 4 queries and 4 rows, a warp the same queries and 128 rows: what it reads of queries is broadcast, what it writes lies
// side by side. A tile's row of 4 units is followed by one that is empty, so that 8 threads that read 16 bytes each meet 8 groups of
// banks. The next tile is on its way while one is multiplied.

constexpr u32 SCORED_ROWS = 128, SCORED_QUERIES = 32; // of a block
constexpr u32 UNITS = 4;                              // of a tile's row
constexpr u32 PITCH = UNITS + 1;

DEVICE float4 widened(float4 unit) { return unit; }
DEVICE float4 widened(uint2 unit) {
    return make_float4(__uint_as_float(unit.x << 16), __uint_as_float(unit.x & 0xffff0000u), __uint_as_float(unit.y << 16),
                       __uint_as_float(unit.y & 0xffff0000u));
}

// The unit at `at` of a row, zeros beyond the last row or unit.
template <class Unit>
DEVICE float4 unit_of(const Unit* table, u32 row, u32 n_rows, u32 at, u32 width) {
    if (row >= n_rows || at >= width) return make_float4(0, 0, 0, 0);
    return widened(table[(u64)row * width + at]);
}

template <class Unit>
DEVICE void score(const float4* queries, u32 n_queries, const Unit* table, u32 n_rows, u32 width, const float* terms, u32 metric,
                  const u32* available, float* scores, u32 stride) {
    SHARED(float4, of_queries, SCORED_QUERIES * PITCH);
    SHARED(float4, of_rows, SCORED_ROWS * PITCH);
    const u32 t = threadIdx.x, lane = t & 31, group = t / 32 * 4;
    const u32 first_row = blockIdx.x * SCORED_ROWS, first_query = blockIdx.y * SCORED_QUERIES;
    u32 some = !available;
    for (u32 word = first_row / 32; available && word < (first_row + SCORED_ROWS) / 32 && word < (n_rows + 31) / 32; word++) {
        some |= available[word];
    }
    if (some == 0) {
        for (u32 at = t; at < SCORED_ROWS * SCORED_QUERIES; at += THREADS) {
            const u32 to = first_row + at % SCORED_ROWS, query = first_query + at / SCORED_ROWS;
            if (to < n_rows && query < n_queries) scores[(u64)query * stride + to] = __uint_as_float(0x7fc00000u);
        }
        return;
    }
    // Which units of a tile this thread brings: two of rows and, of the first half of the threads, one of queries.
    const u32 row = t / UNITS, unit = t % UNITS;
    const bool brings_query = row < SCORED_QUERIES;
    float4 next_query = brings_query ? unit_of(queries, first_query + row, n_queries, unit, width) : make_float4(0, 0, 0, 0);
    float4 next_rows[2];
#pragma unroll
    for (u32 half = 0; half < 2; half++) next_rows[half] = unit_of(table, first_row + row + half * 64, n_rows, unit, width);
    float sums[4][4] = {};
    for (u32 tile = 0; tile < width; tile += UNITS) {
        if (brings_query) of_queries[row * PITCH + unit] = next_query;
#pragma unroll
        for (u32 half = 0; half < 2; half++) of_rows[(row + half * 64) * PITCH + unit] = next_rows[half];
        __syncthreads();
        const u32 ahead = tile + UNITS + unit;
        if (brings_query) next_query = unit_of(queries, first_query + row, n_queries, ahead, width);
#pragma unroll
        for (u32 half = 0; half < 2; half++) next_rows[half] = unit_of(table, first_row + row + half * 64, n_rows, ahead, width);
#pragma unroll
        for (u32 u = 0; u < UNITS; u++) {
            float4 q[4], x[4];
#pragma unroll
            for (u32 j = 0; j < 4; j++) q[j] = of_queries[(group + j) * PITCH + u];
#pragma unroll
            for (u32 j = 0; j < 4; j++) x[j] = of_rows[(lane + 32 * j) * PITCH + u];
#pragma unroll
            for (u32 a = 0; a < 4; a++) {
#pragma unroll
                for (u32 b = 0; b < 4; b++) {
                    float sum = sums[a][b];
                    sum = __fmaf_rn(q[a].x, x[b].x, sum);
                    sum = __fmaf_rn(q[a].y, x[b].y, sum);
                    sum = __fmaf_rn(q[a].z, x[b].z, sum);
                    sums[a][b] = __fmaf_rn(q[a].w, x[b].w, sum);
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (u32 b = 0; b < 4; b++) {
        const u32 to = first_row + lane + 32 * b;
        if (to >= n_rows) continue;
        const bool is_there = !available || available[to / 32] >> (to % 32) & 1;
        const float term = terms ? terms[to] : 0;
#pragma unroll
        for (u32 a = 0; a < 4; a++) {
            const u32 query = first_query + group + a;
            if (query >= n_queries) continue;
            // Rounded after each step, as the twin does it.
            const float sum = sums[a][b], result = metric == 0 ? sum : metric == 1 ? __fmul_rn(sum, term) : __fmaf_rn(2, sum, -term);
            scores[(u64)query * stride + to] = is_there ? result : __uint_as_float(0x7fc00000u);
        }
    }
}

KERNEL(scores_f32, 2)
(const float4* __restrict__ queries, u32 n_queries, const float4* __restrict__ table, u32 n_rows, u32 width,
 const float* __restrict__ terms, u32 metric, const u32* __restrict__ available, float* __restrict__ scores, u32 stride) {
    score(queries, n_queries, table, n_rows, width, terms, metric, available, scores, stride);
}

// scores_bf16: the same with a table of bf16, in units of 8 bytes (4 values), each made f32 before it is multiplied.
// twin   scores in src/device/cpu/twins.rs
KERNEL(scores_bf16, 2)
(const float4* __restrict__ queries, u32 n_queries, const uint2* __restrict__ table, u32 n_rows, u32 width,
 const float* __restrict__ terms, u32 metric, const u32* __restrict__ available, float* __restrict__ scores, u32 stride) {
    score(queries, n_queries, table, n_rows, width, terms, metric, available, scores, stride);
}

// mask_scores: takes single rows out of single queries' scores: what a user has seen.
// in     pairs u32 [n, 2]: query and row; a pair from n_queries or n_rows on is skipped
// out    scores f32 [n_queries, stride]: NaN in each pair's place, else as they were
// launch grid (n / 256, rounded up), 256 threads, no shared memory
// twin   mask_scores in src/device/cpu/twins.rs
KERNEL(mask_scores, 4)
(const uint2* __restrict__ pairs, u32 n, float* __restrict__ scores, u32 n_queries, u32 n_rows, u32 stride) {
    const u32 at = blockIdx.x * THREADS + threadIdx.x;
    if (at >= n) return;
    const uint2 pair = pairs[at];
    if (pair.x < n_queries && pair.y < n_rows) scores[(u64)pair.x * stride + pair.y] = __uint_as_float(0x7fc00000u);
}
