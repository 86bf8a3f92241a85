// copy_columns: columns of a ranker that depend on the item alone.
// in     rows u32 [n_requests, width]; counts u32 [n_requests]; table f32 [n_items, n]; more f32 [n_more, n]: of items beside the table,
//        numbered from n_items on; columns u32 [n]: which of a candidate's values each becomes
// out    values f32 [n_requests, width, stride], of which those columns; 0 for items that there are not. What lies behind a count is left
//        as it was
// launch grid (width * n / 256, rounded up, n_requests), 256 threads, no shared memory: what is read of an item lies side by side
// order  as given
// twin   copy_columns in src/device/cpu/twins.rs
KERNEL(copy_columns, 6)
(const u32* __restrict__ rows, const u32* __restrict__ counts, u32 width, const float* __restrict__ table, u32 n_items, u32 n,
 const u32* __restrict__ columns, float* __restrict__ values, u32 stride, const float* __restrict__ more, u32 n_more) {
    const u32 at = blockIdx.x * THREADS + threadIdx.x, place = at / n, which = at % n;
    const u64 slot = (u64)blockIdx.y * width + place;
    if (place >= at_most(counts[blockIdx.y], width)) return;
    const u32 row = rows[slot], beside = row - n_items;
    float value = 0;
    if (row < n_items) value = table[(u64)row * n + which];
    else if (beside < n_more) value = more[(u64)beside * n + which];
    values[slot * stride + columns[which]] = value;
}

// fill_series: what the history says of a candidate's series.
// in     rows u32 [n_requests, width]; counts u32 [n_requests]; items u32 [n_items, 2]: the code of each item's series, NO_ROW without one,
//        and the bits of where the item stands in it, NaN where that is not known; more u32 [n_more, 2]: the same of items beside, numbered
//        from n_items on; places u32 [n_requests, places_stride], of which words `place` and `place + 1` say where in the tail the codes of
//        the history's series begin, ascending, behind them the bits of the furthest place in each and how many liked items each has, and
//        how many series they are; logarithms f32 [n_logarithms]: ln(1 + n); same, next, gap: which of a candidate's values each is,
//        NO_ROW where it is none
// out    values f32 [n_requests, width, stride], those three of each: ln(1 + liked items of the series); 1 where the item is the next one,
//        up to 1 further than the furthest, else 0; how much further it is, within 10, 0 where that is not known. What lies behind a count
//        is left as it was
// launch grid (n_requests), 256 threads, no shared memory
// order  of rounding: as the CPU has it
// twin   fill_series in src/device/cpu/twins.rs, by src/features/assemble.rs
KERNEL(fill_series, 4)
(const u32* __restrict__ rows, const u32* __restrict__ counts, u32 width, const u32* __restrict__ items, u32 n_items,
 const u32* __restrict__ tail, const u32* __restrict__ places, u32 places_stride, u32 place, const float* __restrict__ logarithms,
 u32 n_logarithms, float* __restrict__ values, u32 stride, u32 same, u32 next, u32 gap, const u32* __restrict__ more, u32 n_more) {
    const u64 request = blockIdx.x, base = request * width;
    const u32 n = at_most(counts[request], width);
    const u32 start = places[request * places_stride + place], n_series = places[request * places_stride + place + 1];
    const u32 *known = tail + start, *furthest = known + n_series, *liked = furthest + n_series;
    for (u32 at = threadIdx.x; at < n; at += THREADS) {
        const u32 row = rows[base + at], beside = row - n_items;
        const bool in_table = row < n_items, is_there = in_table || beside < n_more;
        const u32* own = in_table ? items + 2 * (u64)row : more + 2 * (u64)beside;
        const u32 code = is_there ? own[0] : NO_ROW, found = code == NO_ROW ? n_series : place_of(known, n_series, code);
        const bool is = found < n_series;
        const float further = is ? __fsub_rn(__uint_as_float(own[1]), __uint_as_float(furthest[found])) : 0;
        float* to = values + (base + at) * stride;
        if (same != NO_ROW) to[same] = is ? logarithms[at_most(liked[found], n_logarithms - 1)] : 0;
        if (next != NO_ROW) to[next] = further > 0 && further <= 1 ? 1 : 0;
        if (gap != NO_ROW) to[gap] = further > 10 ? 10 : further < -10 ? -10 : further == further ? further : 0;
    }
}
