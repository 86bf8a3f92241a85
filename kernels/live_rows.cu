// Rows beside tables: what came or changed since tables were written. A place says where what is known of an item lies: its row in the
// tables, or, from n_rows on, its place among the rows beside them.

// apply_changes: words that changed, each piece to where it belongs.
// in     staged u32 [n_staged]; pieces u32 [n_pieces, 3]: where in `staged` a piece begins, where in `target`, and how long it is. No two
//        go to the same word
// out    target u32 [n_target]; what no piece goes to is left as it was. A piece that is beyond either end is skipped
// launch grid (n_pieces), 256 threads, no shared memory
// order  as given
// twin   apply_changes in src/device/cpu/twins.rs
KERNEL(apply_changes, 6)
(const u32* __restrict__ staged, u32 n_staged, const u32* __restrict__ pieces, u32* __restrict__ target, u32 n_target) {
    const u32 from = pieces[3 * blockIdx.x], to = pieces[3 * blockIdx.x + 1], n = pieces[3 * blockIdx.x + 2];
    if (n > n_staged || from > n_staged - n || n > n_target || to > n_target - n) return;
    for (u32 at = threadIdx.x; at < n; at += THREADS) target[to + at] = staged[from + at];
}

// name_places: the rows of the items at these places.
// in     names u32 [n_more]: the row of each that lies beside the tables
// out    rows u32 [n]: places before; those from n_rows + n_more on, NO_ROW among them, become NO_ROW
// launch grid (n / 256, rounded up), 256 threads, no shared memory
// order  as given
// twin   name_places in src/device/cpu/twins.rs
KERNEL(name_places, 6)
(u32* __restrict__ rows, u32 n, u32 n_rows, const u32* __restrict__ names, u32 n_more) {
    const u32 at = blockIdx.x * THREADS + threadIdx.x;
    if (at >= n || rows[at] < n_rows) return;
    const u32 slot = rows[at] - n_rows;
    rows[at] = slot < n_more ? names[slot] : NO_ROW;
}

// find_places: the places of candidates.
// in     header u32 [4], of which the third says how many rows changed; rows u32 [n_requests, width]; counts u32 [n_requests]; changed u32
//        [2, n_more]: rows that changed, ascending, then the place of each beside the tables
// out    places u32 [n_requests, width]; NO_ROW for rows from n_rows on that are not among the changed ones. What lies behind a count is
//        left as it was
// launch grid (width / 256, rounded up, n_requests), 256 threads, no shared memory
// order  as given
// twin   find_places in src/device/cpu/twins.rs
KERNEL(find_places, 6)
(const u32* __restrict__ header, const u32* __restrict__ rows, const u32* __restrict__ counts, u32 width, u32 n_rows,
 const u32* __restrict__ changed, u32 n_more, u32* __restrict__ places) {
    const u64 base = (u64)blockIdx.y * width;
    const u32 at = blockIdx.x * THREADS + threadIdx.x, n_changed = at_most(header[2], n_more);
    if (at >= at_most(counts[blockIdx.y], width)) return;
    const u32 row = rows[base + at], found = place_of(changed, n_changed, row);
    places[base + at] = found < n_changed ? n_rows + changed[n_more + found] : row < n_rows ? row : NO_ROW;
}
