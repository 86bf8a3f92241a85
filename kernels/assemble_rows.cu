// assemble_rows: whole rows of a model's input, put together of what requests, items and candidates give.
// in     rows u32 [n_requests, width]; counts u32 [n_requests]; shared f32 [n_requests, n_shared]; table f32 [n_items, n_item]: of
//        items; more f32 [n_more, n_item]: of items beside the table, numbered from n_items on; columns f32 [n_requests, width, n_columns]: of candidates; places u32 [n_values]: for each value of a row which of the
//        three it is of (0, 1, 2), in the two highest bits, and which value there; kind: 0 f32, 1 i32, 2 i64
// out    values [n_requests, width, n_values] of that kind. Places behind a request's count and those of rows from n_items + n_more on, NO_ROW
//        among them, are holes: all zeros
// launch grid (n_requests * width * n_values / 256, rounded up), 256 threads, no shared memory: both sides are read and written by neighbours
// order  as given. f32 is passed on bit by bit; of whole numbers the fraction is cut off, NaN is 0, what is too large the largest
// twin   assemble_rows in src/device/cpu/twins.rs

// Whether a place has no candidate.
DEVICE bool is_hole(u32 row, u32 n_items, u32 place, u32 count) { return place >= count || row >= n_items; }

KERNEL(assemble_rows, 6)
(const u32* __restrict__ rows, const u32* __restrict__ counts, u32 n_requests, u32 width, const float* __restrict__ shared,
 u32 n_shared, const float* __restrict__ table, u32 n_items, u32 n_item, const float* __restrict__ columns, u32 n_columns,
 const u32* __restrict__ places, u32 n_values, u32 kind, u32* __restrict__ values, const float* __restrict__ more, u32 n_more) {
    const u64 at = (u64)blockIdx.x * THREADS + threadIdx.x;
    if (at >= (u64)n_requests * width * n_values) return;
    const u32 slot = (u32)(at / n_values), request = slot / width, row = rows[slot];
    const u32 place = places[at % n_values], which = place & 0x3fffffffu;
    float value = 0;
    if (!is_hole(row, n_items + n_more, slot % width, counts[request])) {
        if (place >> 30 == 0) value = shared[(u64)request * n_shared + which];
        if (place >> 30 == 1) value = row < n_items ? table[(u64)row * n_item + which] : more[(u64)(row - n_items) * n_item + which];
        if (place >> 30 == 2) value = columns[(u64)slot * n_columns + which];
    }
    if (kind == 0) {
        values[at] = __float_as_uint(value);
    } else if (kind == 1) {
        const u32 largest = value > 0 ? 0x7fffffffu : 0x80000000u, inside = value > -2147483648.0f && value < 2147483648.0f;
        values[at] = value != value ? 0 : inside ? (u32)(int)value : largest;
    } else {
        const u64 largest = value > 0 ? 0x7fffffffffffffffull : 0x8000000000000000ull;
        const bool inside = value > -9223372036854775808.0f && value < 9223372036854775808.0f;
        const u64 whole = value != value ? 0 : inside ? (u64)(long long)value : largest;
        values[2 * at] = (u32)whole;
        values[2 * at + 1] = (u32)(whole >> 32);
    }
}

// void_holes: NaN for places without a candidate.
// in     rows u32 [n_requests, width]; counts u32 [n_requests]
// out    scores f32 [n_requests, width], of which the holes are written: as in assemble_rows
// launch grid (n_requests * width / 256, rounded up), 256 threads, no shared memory
// order  as given
// twin   void_holes in src/device/cpu/twins.rs
KERNEL(void_holes, 6)
(const u32* __restrict__ rows, const u32* __restrict__ counts, u32 n_requests, u32 width, u32 n_items, float* __restrict__ scores) {
    const u64 at = (u64)blockIdx.x * THREADS + threadIdx.x;
    if (at >= (u64)n_requests * width) return;
    const u32 slot = (u32)at;
    if (is_hole(rows[slot], n_items, slot % width, counts[slot / width])) scores[slot] = __uint_as_float(0x7fc00000u);
}
