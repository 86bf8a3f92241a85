// gather_rows: rows of a table, one behind the other, whatever their type.
// in     rows u32 [n]; table [n_rows, table_stride] in units of 16 bytes (4 f32, 8 bf16), at a 16-byte boundary
// out    [n, out_stride] in the same units, of which the first `chunks` are written; n * chunks < 2^32. A row from n_rows on, NO_ROW
//        among them, is all zeros: what is not known of an item.
// launch grid (n * chunks / 1024, rounded up), 256 threads, no shared memory
// order  as given. Values are passed on bit by bit: NaN is what it was.
// twin   gather_rows in src/device/cpu/twins.rs

constexpr u32 GATHERED = 4; // 16-byte accesses of a thread in flight

template <class Unit, class Widen>
DEVICE void gather(const u32* rows, u32 n, const Unit* table, u32 n_rows, u32 table_stride, u32 chunks, uint4* out, u32 out_stride,
                   Widen widen) {
    Unit values[GATHERED] = {};
    const u32 total = n * chunks;
    const u64 first = (u64)blockIdx.x * GATHERED * THREADS + threadIdx.x;
#pragma unroll
    for (u32 g = 0; g < GATHERED; g++) {
        const u64 at = first + g * THREADS;
        if (at >= total) continue;
        const u32 row = rows[(u32)at / chunks];
        if (row < n_rows) values[g] = table[(u64)row * table_stride + (u32)at % chunks];
    }
#pragma unroll
    for (u32 g = 0; g < GATHERED; g++) {
        const u64 at = first + g * THREADS;
        if (at < total) out[(u64)((u32)at / chunks) * out_stride + (u32)at % chunks] = widen(values[g]);
    }
}

KERNEL(gather_rows, 4)
(const u32* __restrict__ rows, u32 n, const uint4* __restrict__ table, u32 n_rows, u32 table_stride, u32 chunks,
 uint4* __restrict__ out, u32 out_stride) {
    gather(rows, n, table, n_rows, table_stride, chunks, out, out_stride, [](uint4 unit) { return unit; });
}

// gather_bf16_as_f32: the same from a table of bf16, made f32.
// in     rows u32 [n]; table bf16 [n_rows, table_stride] in units of 8 bytes (4 values), at a 16-byte boundary
// out    f32 [n, out_stride] in units of 16 bytes (4 values), of which the first `chunks` are written; n * chunks < 2^32
// launch grid (n * chunks / 1024, rounded up), 256 threads, no shared memory: each thread reads 8 bytes and writes 16, so that both
//        are coalesced
// order  as given; every bf16 is an f32, NaN included
// twin   gather_bf16_as_f32 in src/device/cpu/twins.rs
KERNEL(gather_bf16_as_f32, 4)
(const u32* __restrict__ rows, u32 n, const uint2* __restrict__ table, u32 n_rows, u32 table_stride, u32 chunks,
 uint4* __restrict__ out, u32 out_stride) {
    gather(rows, n, table, n_rows, table_stride, chunks, out, out_stride, [](uint2 unit) {
        return make_uint4(unit.x << 16, unit.x & 0xffff0000u, unit.y << 16, unit.y & 0xffff0000u);
    });
}
