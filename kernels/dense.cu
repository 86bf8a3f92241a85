// dense_rank: scores of candidates by a compiled network. A block takes some candidates of one request through all steps of a program,
// and what lies between the steps stays in its shared memory.
// in     program u32: a Header, then its Steps (kernels/src/dense.rs makes both); params u32: what steps name places in, at a 16-byte
//        boundary; table: u32 [table_rows, row_words], at a 16-byte boundary, or null: rows of f32, of bf16, or of int8 with the f32 scales of
//        their pieces behind them (TableShape in kernels/src/dense.rs); more: [n_more, row_words] likewise: rows beside the table, numbered
//        from table_rows on; rows u32 [n_requests, width], NO_ROW, rows that are in neither where there is a table, and places from
//        counts[request] on being holes; counts u32 [n_requests]; columns f32 [n_requests, width, n_columns]; shared f32 [n_requests,
//        shared_width], at a 16-byte boundary where it is read from
// out    scores f32 [n_requests, width]: weight times the score, added to what is there unless `first`; NaN in holes
// launch grid (width / n, rounded up, n_requests) for n candidates of a block, a multiple of 16, at most 256; 256 threads; 4 * n * units
//        bytes of dynamic shared memory, units being those of a candidate's row in the program's header
// order  of summation: products in f32 by fused multiply-adds over ascending inputs onto what the sum starts with (bias, item's, request's,
//        base), zeros of the padding among them; products in bf16 by tensor cores, 16 inputs at a time; other sums in 32 parts, value i in part
//        i % 32, halves added until one is left. An item's value in int8 is its code times the scale, rounded to f32 before it is added. A
//        row's result does not depend on the rows beside it, nor on n
// nan    stays in its row; holes have their own
// twin   dense_rank in src/device/cpu/twins/dense.rs; products in bf16 equal it in the emulator alone, for a GPU rounds them otherwise
//
// Values lie in the arena row by row: value `at` of a block of n rows begins at word at * n. A row has its columns, one a word or as bf16
// two, then zeros up to `fill`, for products read beyond the width. Strides are 4 more than a multiple of 8, so that 8 rows that are read at
// once, 4 words each, meet 32 banks. Weights are read from L2 once per 32 rows, in tiles of 32 columns, the next ones being on their way
// while some are multiplied.

constexpr u32 NONE = 0xffffffffu;
constexpr u32 WARPS = THREADS / 32;
enum { LAYER, ROUNDED_LAYER, NARROW, EACH, PAIR, TAKE, LOAD, SUM, SOFTMAX, NORM, EMBED, MULTIPLY, SCORE };
enum { RELU = 1, ROUND = 2, TURNED = 4 };
enum { F32_TABLE, BF16_TABLE, INT8_TABLE };
enum { PLAIN, RECTIFIED, LEAKY, SIGMOID, TANH, GELU, SILU, SOFTPLUS, ELU, ERF, EXP, LOG, SQRT, ABS, RECIPROCAL, SQUARE, POWER, CLIP, AFFINE };
enum { ADD, SUB, MUL, DIV, MAX, MIN, POW };

struct Header {
    u32 n_steps, units, table_rows, row_words, numbers, n_columns, shared_width, scales;
};

// What each field is for: kernels/src/dense.rs.
struct Step {
    u32 op, x, x_stride, x_part, y, y_stride, out, out_stride, width, fill, k, m, n, repeat, a, b, item, shared, function, p, q, flags, piece, unused;
};

// Where a block is.
struct Block {
    u32 n; // rows of it
    const u32* params;
    const u32 *table, *more;
    u32 table_rows, row_words, numbers;
    u32 scales; // words of a row of a table in int8 before those
    const float* columns; // of its first row
    u32 n_columns, left;  // rows that there are columns of
    const float* shared;  // of its request
};

DEVICE float low_half(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float high_half(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// N neighbouring values, which lie at a boundary of their own size.
DEVICE void floats_of(float (&to)[4], const float* from) {
    const float4 v = __ldg((const float4*)from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
DEVICE void floats_of(float (&to)[2], const float* from) {
    const float2 v = __ldg((const float2*)from);
    to[0] = v.x, to[1] = v.y;
}
DEVICE void halves_of(float (&to)[4], const u32* from) {
    const uint2 v = __ldg((const uint2*)from);
    to[0] = low_half(v.x), to[1] = high_half(v.x), to[2] = low_half(v.y), to[3] = high_half(v.y);
}
DEVICE void halves_of(float (&to)[2], const u32* from) {
    const u32 v = __ldg(from);
    to[0] = low_half(v), to[1] = high_half(v);
}
// N neighbouring codes, which lie in one word, times their scale.
template <u32 N>
DEVICE void codes_of(float (&to)[N], const u32* row, u32 column, float scale) {
    const u32 codes = __ldg(row + column / 4) >> column % 4 * 8;
#pragma unroll
    for (u32 e = 0; e < N; e++) to[e] = __fmul_rn(scale, (float)(signed char)(codes >> 8 * e));
}
template <class Words>
DEVICE void values_of(float (&to)[4], Words arena, u32 at) {
    const uint4 v = shared_load4(arena, at);
    to[0] = __uint_as_float(v.x), to[1] = __uint_as_float(v.y), to[2] = __uint_as_float(v.z), to[3] = __uint_as_float(v.w);
}
template <class Words>
DEVICE void values_of(float (&to)[2], Words arena, u32 at) {
    to[0] = __uint_as_float(arena[at]), to[1] = __uint_as_float(arena[at + 1]);
}

template <u32 N>
DEVICE void add(float (&to)[N], const float (&values)[N]) {
#pragma unroll
    for (u32 e = 0; e < N; e++) to[e] = __fadd_rn(to[e], values[e]);
}

// The first word of a row, or of a part of one, of a value.
DEVICE u32 place(const Block& in, u32 value, u32 stride, u32 part, u32 repeat, u32 row) {
    return value * in.n + (repeat == 1 ? row * stride : row / repeat * stride + row % repeat * part);
}

// What the sums of N columns of R rows start with. The arena begins with the items' rows. All rows of a table are asked for before the first
// is used.
template <u32 R, u32 N, class Words>
DEVICE void start(float (&sums)[R][N], const Step& s, const Block& in, Words arena, const u32 (&rows)[R], u32 column) {
    float values[R][N] = {};
    if (s.b != NONE) floats_of(values[0], (const float*)in.params + s.b + column);
#pragma unroll
    for (u32 j = 0; j < R; j++) {
#pragma unroll
        for (u32 e = 0; e < N; e++) sums[j][e] = values[0][e];
    }
    if (column >= s.width) return;
    if (s.item != NONE) {
        // Where there is no candidate, the first item: one has been there in this block, and what comes of it is not kept.
#pragma unroll
        for (u32 j = 0; j < R; j++) {
            const u32 item = arena[rows[j]] == NO_ROW ? 0 : arena[rows[j]];
            const bool is_beside = item >= in.table_rows;
            const u32* row = (is_beside ? in.more : in.table) + (u64)(is_beside ? item - in.table_rows : item) * in.row_words;
            const u32 at = s.item + column;
            if (in.numbers == F32_TABLE) floats_of(values[j], (const float*)row + at);
            else if (in.numbers == BF16_TABLE) halves_of(values[j], row + at / 2);
            else codes_of(values[j], row, at, __uint_as_float(__ldg(row + in.scales + s.piece)));
        }
#pragma unroll
        for (u32 j = 0; j < R; j++) add(sums[j], values[j]);
    }
    if (s.shared != NONE) {
        floats_of(values[0], in.shared + s.shared + column);
#pragma unroll
        for (u32 j = 0; j < R; j++) add(sums[j], values[0]);
    }
    if (s.y != NONE) {
#pragma unroll
        for (u32 j = 0; j < R; j++) {
            values_of(values[0], arena, place(in, s.y, s.y_stride, 0, 1, rows[j]) + column);
            add(sums[j], values[0]);
        }
    }
}

DEVICE float rectified(float v) { return v < 0 ? 0 : v; }

// Writes N columns of a row, zeros beyond the width.
template <u32 N, class Words>
DEVICE void finish(float (&sums)[N], const Step& s, const Block& in, Words arena, u32 row, u32 column) {
#pragma unroll
    for (u32 e = 0; e < N; e++) {
        if (s.flags & RELU) sums[e] = rectified(sums[e]);
        if (column + e >= s.width) sums[e] = 0;
    }
    const u32 at = place(in, s.out, s.out_stride, s.width, s.repeat, row);
    if (s.repeat > 1) {
        // Parts lie right behind one another, at any boundary.
#pragma unroll
        for (u32 e = 0; e < N; e++) {
            if (column + e < s.width) arena[at + column + e] = __float_as_uint(sums[e]);
        }
    } else if (column < s.fill) {
        if (s.flags & ROUND) {
            const u32 low = bf16_pair(sums[0], sums[1]);
            if constexpr (N == 4) shared_store2(arena, at + column / 2, make_uint2(low, bf16_pair(sums[2], sums[3])));
            else arena[at + column / 2] = low;
        } else if constexpr (N == 4) {
            shared_store4(arena, at + column, make_uint4(__float_as_uint(sums[0]), __float_as_uint(sums[1]), __float_as_uint(sums[2]), __float_as_uint(sums[3])));
        } else {
            shared_store2(arena, at + column, make_uint2(__float_as_uint(sums[0]), __float_as_uint(sums[1])));
        }
    }
}

DEVICE void multiply_add(float (&sums)[4], u32 x, float4 w) {
    const float v = __uint_as_float(x);
    sums[0] = __fmaf_rn(v, w.x, sums[0]), sums[1] = __fmaf_rn(v, w.y, sums[1]);
    sums[2] = __fmaf_rn(v, w.z, sums[2]), sums[3] = __fmaf_rn(v, w.w, sums[3]);
}

// A product in f32: a warp has 32 rows and 32 columns, a thread 8 rows, every fourth, and 4 columns.
template <class Words>
DEVICE void layer(const Step& s, const Block& in, Words arena) {
    const u32 lane = threadIdx.x & 31, n_rows = in.n * s.repeat, depth = (s.k + 3) / 4;
    const u32 tiles_down = (n_rows + 31) / 32, tiles = tiles_down * ((s.width + 31) / 32);
    for (u32 tile = threadIdx.x / 32; tile < tiles; tile += WARPS) {
        const u32 first = tile % tiles_down * 32 + lane % 4, column = tile / tiles_down * 32 + lane / 4 * 4;
        u32 at[8];
        float sums[8][4];
#pragma unroll
        for (u32 j = 0; j < 8; j++) at[j] = at_most(first + 4 * j, n_rows - 1);
        start(sums, s, in, arena, at, column);
#pragma unroll
        for (u32 j = 0; j < 8; j++) at[j] = place(in, s.x, s.x_stride, s.x_part, s.repeat, at[j]);
        const float4* weights = (const float4*)(in.params + s.a) + (u64)(tile / tiles_down) * depth * 32 + lane / 4;
        float4 next[4] = {};
        if (depth > 0) {
#pragma unroll
            for (u32 e = 0; e < 4; e++) next[e] = __ldg(weights + 8 * e);
        }
        for (u32 k = 0; k < depth; k++) {
            float4 now[4];
#pragma unroll
            for (u32 e = 0; e < 4; e++) now[e] = next[e];
            if (k + 1 < depth) {
#pragma unroll
                for (u32 e = 0; e < 4; e++) next[e] = __ldg(weights + (k + 1) * 32 + 8 * e);
            }
#pragma unroll
            for (u32 j = 0; j < 8; j++) {
                const uint4 x = shared_load4(arena, at[j] + 4 * k);
                multiply_add(sums[j], x.x, now[0]);
                multiply_add(sums[j], x.y, now[1]);
                multiply_add(sums[j], x.z, now[2]);
                multiply_add(sums[j], x.w, now[3]);
            }
        }
#pragma unroll
        for (u32 j = 0; j < 8; j++) {
            if (first + 4 * j < n_rows) finish(sums[j], s, in, arena, first + 4 * j, column);
        }
    }
}

// A product in bf16: a warp has 32 rows and 32 columns, 2 by 4 of mma's.
template <class Words>
DEVICE void rounded_layer(const Step& s, const Block& in, Words arena) {
    const u32 lane = threadIdx.x & 31, group = lane / 4, within = lane % 4, n_rows = in.n * s.repeat, depth = (s.k + 31) / 32;
    const u32 tiles_down = (n_rows + 31) / 32, tiles = tiles_down * ((s.width + 31) / 32);
    for (u32 tile = threadIdx.x / 32; tile < tiles; tile += WARPS) {
        const u32 first = tile % tiles_down * 32 + group, column = tile / tiles_down * 32 + within * 2;
        // Rows `first`, and 8, 16 and 24 further.
        u32 at[4];
        float sums[2][4][4];
#pragma unroll
        for (u32 j = 0; j < 4; j++) at[j] = at_most(first + 8 * j, n_rows - 1);
#pragma unroll
        for (u32 c = 0; c < 4; c++) {
            float two[4][2];
            start(two, s, in, arena, at, column + 8 * c);
#pragma unroll
            for (u32 j = 0; j < 4; j++) sums[j / 2][c][j % 2 * 2] = two[j][0], sums[j / 2][c][j % 2 * 2 + 1] = two[j][1];
        }
#pragma unroll
        for (u32 j = 0; j < 4; j++) at[j] = place(in, s.x, s.x_stride, s.x_part, s.repeat, at[j]) + within;
        const uint4* weights = (const uint4*)(in.params + s.a) + (u64)(tile / tiles_down) * depth * 128 + lane;
        uint4 next[4];
#pragma unroll
        for (u32 c = 0; c < 4; c++) next[c] = __ldg(weights + 32 * c);
        for (u32 k = 0; k < depth; k++) {
            u32 now[4][2][2];
#pragma unroll
            for (u32 c = 0; c < 4; c++) now[c][0][0] = next[c].x, now[c][0][1] = next[c].y, now[c][1][0] = next[c].z, now[c][1][1] = next[c].w;
            if (k + 1 < depth) {
#pragma unroll
                for (u32 c = 0; c < 4; c++) next[c] = __ldg(weights + (k + 1) * 128 + 32 * c);
            }
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                const u32 from = k * 16 + half * 8;
#pragma unroll
                for (u32 m = 0; m < 2; m++) {
                    const u32 x[4] = {arena[at[2 * m] + from], arena[at[2 * m + 1] + from], arena[at[2 * m] + from + 4],
                                      arena[at[2 * m + 1] + from + 4]};
#pragma unroll
                    for (u32 c = 0; c < 4; c++) mma_bf16(sums[m][c], x, now[c][half]);
                }
            }
        }
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
#pragma unroll
            for (u32 c = 0; c < 4; c++) {
                float two[2] = {sums[j / 2][c][j % 2 * 2], sums[j / 2][c][j % 2 * 2 + 1]};
                if (first + 8 * j < n_rows) finish(two, s, in, arena, first + 8 * j, column + 8 * c);
            }
        }
    }
}

// A product of up to 4 columns: 4 threads a sum, every fourth input each.
template <class Words>
DEVICE void narrow_layer(const Step& s, const Block& in, Words arena) {
    const u32 n_sums = in.n * s.repeat * s.width, part = threadIdx.x & 3;
    for (u32 first = 0; first < n_sums; first += THREADS / 4) {
        const u32 sum_at = first + threadIdx.x / 4, row = at_most(sum_at, n_sums - 1) / s.width, column = at_most(sum_at, n_sums - 1) % s.width;
        const u32 at = place(in, s.x, s.x_stride, s.x_part, s.repeat, row);
        const float* weights = (const float*)in.params + s.a + column * s.k;
        float sum = 0;
        for (u32 k = part; k < s.k; k += 4) sum = __fmaf_rn(__uint_as_float(arena[at + k]), __ldg(weights + k), sum);
        sum = __fadd_rn(sum, __shfl_xor_sync(ALL_LANES, sum, 1u));
        sum = __fadd_rn(sum, __shfl_xor_sync(ALL_LANES, sum, 2u));
        if (sum_at >= n_sums) continue;
        const u32 to = place(in, s.out, s.out_stride, s.width, s.repeat, row);
        if (part == 0) {
            float before[1][2];
            const u32 rows[1] = {row};
            start(before, s, in, arena, rows, column & ~1u);
            sum = __fadd_rn(column & 1 ? before[0][1] : before[0][0], sum);
            arena[to + column] = __float_as_uint(s.flags & RELU ? rectified(sum) : sum);
        } else if (s.repeat == 1 && column + 1 == s.width && column + part < s.fill) {
            arena[to + column + part] = 0;
        }
    }
}

// e^v as src/ranking/dense/elementwise.rs has it, every operation rounded.
DEVICE float exponential(float v) {
    const float kept = v < -87.3f ? -87.3f : v > 88.8f ? 88.8f : v;
    const float round = 12582912.0f, shifted = __fadd_rn(__fmul_rn(kept, 1.44269504088896340736f), round), n = __fadd_rn(shifted, -round);
    const float r = __fadd_rn(__fadd_rn(kept, -__fmul_rn(n, 0.6933594f)), __fmul_rn(n, 2.1219444e-4f));
    float tail = __fadd_rn(__fmul_rn(1.9875691e-4f, r), 1.3982e-3f);
    tail = __fadd_rn(__fmul_rn(tail, r), 8.333452e-3f);
    tail = __fadd_rn(__fmul_rn(tail, r), 4.1665796e-2f);
    tail = __fadd_rn(__fmul_rn(tail, r), 0.16666665f);
    tail = __fadd_rn(__fmul_rn(tail, r), 0.5f);
    const float part = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(tail, r), r), r), 1);
    const float half = __uint_as_float((__float_as_uint(shifted) - __float_as_uint(round) + 126) << 23);
    const float result = __fmul_rn(__fmul_rn(part, half), 2);
    return v > 88.72f ? __uint_as_float(0x7f800000u) : v < -87.3f ? 0 : result;
}

DEVICE float sigmoid(float v) { return 1 / __fadd_rn(1, exponential(-v)); }

DEVICE float error_function(float v) {
    const float size = fabsf(v), t = 1 / __fadd_rn(1, __fmul_rn(0.3275911f, size));
    float tail = __fadd_rn(__fmul_rn(1.0614054f, t), -1.453152f);
    tail = __fadd_rn(__fmul_rn(tail, t), 1.4214137f);
    tail = __fadd_rn(__fmul_rn(tail, t), -0.28449674f);
    tail = __fadd_rn(__fmul_rn(tail, t), 0.2548296f);
    tail = __fmul_rn(tail, t);
    const float result = __fadd_rn(1, -__fmul_rn(tail, exponential(__fmul_rn(-size, size))));
    return __uint_as_float((__float_as_uint(result) & 0x7fffffffu) | (__float_as_uint(v) & 0x80000000u));
}

// A function of one value; NaN stays.
DEVICE float value_of(const Step& s, const u32* params, float v, u32 column) {
    const float p = __uint_as_float(s.p), q = __uint_as_float(s.q);
    switch (s.function) {
    case RECTIFIED: return rectified(v);
    case LEAKY: return v < 0 ? __fmul_rn(v, p) : v;
    case SIGMOID: return sigmoid(v);
    case TANH: return __fadd_rn(__fmul_rn(2, sigmoid(__fmul_rn(2, v))), -1);
    case GELU: return __fmul_rn(__fmul_rn(0.5f, v), __fadd_rn(1, error_function(__fmul_rn(v, 0.70710678118654752440f))));
    case SILU: return __fmul_rn(v, sigmoid(v));
    case SOFTPLUS: return v < 0 ? log1pf(expf(v)) : __fadd_rn(v, log1pf(expf(-v)));
    case ELU: return v < 0 ? __fmul_rn(p, __fadd_rn(exponential(v), -1)) : v;
    case ERF: return error_function(v);
    case EXP: return exponential(v);
    case LOG: return logf(v);
    case SQRT: return sqrtf(v);
    case ABS: return fabsf(v);
    case RECIPROCAL: return 1 / v;
    case SQUARE: return __fmul_rn(v, v);
    case POWER: return powf(v, p);
    case CLIP: return v < p ? p : v > q ? q : v;
    case AFFINE: return __fadd_rn(__fmul_rn(v, __uint_as_float(params[s.a + column])), __uint_as_float(params[s.b + column]));
    default: return v;
    }
}

// A function of every value, in place or not, rounded or not.
template <class Words>
DEVICE void each(const Step& s, const Block& in, Words arena) {
    for (u32 row = threadIdx.x / 32; row < in.n; row += WARPS) {
        const u32 x = place(in, s.x, s.x_stride, 0, 1, row), to = place(in, s.out, s.out_stride, 0, 1, row);
        for (u32 column = (threadIdx.x & 31) * 2; column < s.fill; column += 64) {
            const float low = column < s.width ? value_of(s, in.params, __uint_as_float(arena[x + column]), column) : 0;
            const float high = column + 1 < s.width ? value_of(s, in.params, __uint_as_float(arena[x + column + 1]), column + 1) : 0;
            if (s.flags & ROUND) arena[to + column / 2] = bf16_pair(low, high);
            else arena[to + column] = __float_as_uint(low), arena[to + column + 1] = __float_as_uint(high);
        }
    }
}

DEVICE float value_of_two(u32 function, float a, float b) {
    switch (function) {
    case ADD: return __fadd_rn(a, b);
    case SUB: return __fadd_rn(a, -b);
    case MUL: return __fmul_rn(a, b);
    case DIV: return a / b;
    case MAX: return a > b || a != a ? a : b;
    case MIN: return a < b || a != a ? a : b;
    default: return powf(a, b);
    }
}

// A function of two values; the second may have one column (n = 1).
template <class Words>
DEVICE void pair(const Step& s, const Block& in, Words arena) {
    for (u32 row = threadIdx.x / 32; row < in.n; row += WARPS) {
        const u32 x = place(in, s.x, s.x_stride, 0, 1, row), y = place(in, s.y, s.y_stride, 0, 1, row);
        const u32 to = place(in, s.out, s.out_stride, 0, 1, row);
        for (u32 column = threadIdx.x & 31; column < s.fill; column += 32) {
            float v = 0;
            if (column < s.width) {
                const float a = __uint_as_float(arena[x + column]), b = __uint_as_float(arena[y + (s.n == 1 ? 0 : column)]);
                v = value_of_two(s.function, a, b);
            }
            arena[to + column] = __float_as_uint(v);
        }
    }
}

// Columns k on of the result: x's, in the order of the list at `a` if there is one, where NONE stands for 0.
template <class Words>
DEVICE void take(const Step& s, const Block& in, Words arena) {
    for (u32 row = threadIdx.x / 32; row < in.n; row += WARPS) {
        const u32 x = place(in, s.x, s.x_stride, 0, 1, row), to = place(in, s.out, s.out_stride, 0, 1, row) + s.k;
        for (u32 column = threadIdx.x & 31; column < s.fill; column += 32) {
            const u32 from = column >= s.width ? NONE : s.a == NONE ? column : in.params[s.a + column];
            u32 v = 0;
            if (from != NONE) v = arena[x + from];
            arena[to + column] = v;
        }
    }
}

// Columns k on of the candidates'; 0 in holes.
template <class Words>
DEVICE void load(const Step& s, const Block& in, Words arena) {
    for (u32 row = threadIdx.x / 32; row < in.n; row += WARPS) {
        const u32 to = place(in, s.out, s.out_stride, 0, 1, row);
        const bool is_there = row < in.left && arena[row] != NO_ROW;
        for (u32 column = threadIdx.x & 31; column < s.fill; column += 32) {
            arena[to + column] = is_there && column < s.width ? __float_as_uint(in.columns[(u64)row * in.n_columns + s.k + column]) : 0;
        }
    }
}

DEVICE float warp_sum(float sum) {
#pragma unroll
    for (u32 lanes = 16; lanes > 0; lanes /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(ALL_LANES, sum, lanes));
    return sum;
}

// Zeros from the width to the fill, by a warp.
template <class Words>
DEVICE void pad(const Step& s, Words arena, u32 to) {
    for (u32 column = s.width + (threadIdx.x & 31); column < s.fill; column += 32) arena[to + column] = 0;
}

// Sums over the middle of [.., m, n], times p; a warp has a row.
template <class Words>
DEVICE void sum(const Step& s, const Block& in, Words arena) {
    const u32 lane = threadIdx.x & 31;
    const float scale = __uint_as_float(s.p);
    for (u32 row = threadIdx.x / 32; row < in.n; row += WARPS) {
        const u32 x = place(in, s.x, s.x_stride, 0, 1, row), to = place(in, s.out, s.out_stride, 0, 1, row);
        if (s.n == 1) {
            for (u32 column = 0; column < s.width; column++) {
                float part = 0;
                for (u32 i = lane; i < s.m; i += 32) part = __fadd_rn(part, __uint_as_float(arena[x + column * s.m + i]));
                part = warp_sum(part);
                if (lane == 0) arena[to + column] = __float_as_uint(__fmul_rn(part, scale));
            }
        } else {
            for (u32 column = lane; column < s.width; column += 32) {
                const u32 from = x + column / s.n * s.m * s.n + column % s.n;
                float whole = 0;
                for (u32 i = 0; i < s.m; i++) whole = __fadd_rn(whole, __uint_as_float(arena[from + i * s.n]));
                arena[to + column] = __float_as_uint(__fmul_rn(whole, scale));
            }
        }
        pad(s, arena, to);
    }
}

// e^v over the sum of them, in groups of m; a warp has a row, and a lane reads what it wrote itself.
template <class Words>
DEVICE void softmax(const Step& s, const Block& in, Words arena) {
    const u32 lane = threadIdx.x & 31;
    for (u32 row = threadIdx.x / 32; row < in.n; row += WARPS) {
        const u32 x = place(in, s.x, s.x_stride, 0, 1, row), to = place(in, s.out, s.out_stride, 0, 1, row);
        for (u32 group = 0; group < s.width; group += s.m) {
            float most = __uint_as_float(0xff800000u), part = 0;
            for (u32 i = lane; i < s.m; i += 32) {
                const float v = __uint_as_float(arena[x + group + i]);
                most = v > most ? v : most;
            }
#pragma unroll
            for (u32 lanes = 16; lanes > 0; lanes /= 2) {
                const float other = __shfl_xor_sync(ALL_LANES, most, lanes);
                most = other > most ? other : most;
            }
            for (u32 i = lane; i < s.m; i += 32) {
                const float v = exponential(__fadd_rn(__uint_as_float(arena[x + group + i]), -most));
                part = __fadd_rn(part, v);
                arena[to + group + i] = __float_as_uint(v);
            }
            part = warp_sum(part);
            for (u32 i = lane; i < s.m; i += 32) arena[to + group + i] = __float_as_uint(__uint_as_float(arena[to + group + i]) / part);
        }
        pad(s, arena, to);
    }
}

// Normalised in groups of m: gains at `a`, what is added at `b`, epsilon p.
template <class Words>
DEVICE void norm(const Step& s, const Block& in, Words arena) {
    const u32 lane = threadIdx.x & 31;
    for (u32 row = threadIdx.x / 32; row < in.n; row += WARPS) {
        const u32 x = place(in, s.x, s.x_stride, 0, 1, row), to = place(in, s.out, s.out_stride, 0, 1, row);
        for (u32 group = 0; group < s.width; group += s.m) {
            float part = 0, squares = 0;
            for (u32 i = lane; i < s.m; i += 32) part = __fadd_rn(part, __uint_as_float(arena[x + group + i]));
            const float mean = warp_sum(part) / (float)s.m;
            for (u32 i = lane; i < s.m; i += 32) {
                const float off = __fadd_rn(__uint_as_float(arena[x + group + i]), -mean);
                squares = __fadd_rn(squares, __fmul_rn(off, off));
            }
            const float scale = 1 / sqrtf(__fadd_rn(warp_sum(squares) / (float)s.m, __uint_as_float(s.p)));
            for (u32 i = lane; i < s.m; i += 32) {
                const float off = __fadd_rn(__uint_as_float(arena[x + group + i]), -mean);
                const float gain = __uint_as_float(in.params[s.a + i]), add = __uint_as_float(in.params[s.b + i]);
                arena[to + group + i] = __float_as_uint(__fadd_rn(__fmul_rn(__fmul_rn(off, scale), gain), add));
            }
        }
        pad(s, arena, to);
    }
}

// Rows, m wide, of the table of k rows at `a`: by number, from the end if that is negative, NaN if there is none.
template <class Words>
DEVICE void embed(const Step& s, const Block& in, Words arena) {
    for (u32 row = threadIdx.x / 32; row < in.n; row += WARPS) {
        const u32 x = place(in, s.x, s.x_stride, 0, 1, row), to = place(in, s.out, s.out_stride, 0, 1, row);
        for (u32 column = threadIdx.x & 31; column < s.fill; column += 32) {
            u32 v = 0;
            if (column < s.width) {
                const float n = (float)s.k, number = truncf(__uint_as_float(arena[x + column / s.m])), id = number < 0 ? __fadd_rn(number, n) : number;
                v = id >= 0 && id < n ? in.params[s.a + (u64)(u32)id * s.m + column % s.m] : 0x7fc00000u;
            }
            arena[to + column] = v;
        }
    }
}

// [.., m, k] by [.., k, n], or by [.., n, k] if TURNED.
template <class Words>
DEVICE void multiply(const Step& s, const Block& in, Words arena) {
    for (u32 row = threadIdx.x / 32; row < in.n; row += WARPS) {
        const u32 to = place(in, s.out, s.out_stride, 0, 1, row);
        for (u32 column = threadIdx.x & 31; column < s.fill; column += 32) {
            float v = 0;
            if (column < s.width) {
                const u32 batch = column / (s.m * s.n), i = column / s.n % s.m, j = column % s.n;
                const u32 a = place(in, s.x, s.x_stride, 0, 1, row) + (batch * s.m + i) * s.k;
                const u32 b = place(in, s.y, s.y_stride, 0, 1, row) + batch * s.k * s.n + (s.flags & TURNED ? j * s.k : j);
                const u32 step = s.flags & TURNED ? 1 : s.n;
                for (u32 e = 0; e < s.k; e++) v = __fmaf_rn(__uint_as_float(arena[a + e]), __uint_as_float(arena[b + e * step]), v);
            }
            arena[to + column] = __float_as_uint(v);
        }
    }
}

KERNEL(dense_rank, 2)
(const u32* __restrict__ program, const u32* __restrict__ params, const u32* __restrict__ table, const u32* __restrict__ rows,
 const u32* __restrict__ counts, const float* __restrict__ columns, const float* __restrict__ shared, u32 width, u32 n, float weight, u32 first,
 float* __restrict__ scores, const u32* __restrict__ more, u32 n_more) {
    DYNAMIC_SHARED(u32, arena);
    const Header& header = *(const Header*)program;
    const Step* steps = (const Step*)(program + sizeof(Header) / 4);
    const u32 t = threadIdx.x, begin = blockIdx.x * n, left = at_most(width - begin, n);
    const u64 slot = (u64)blockIdx.y * width + begin;
    // What there is no candidate for has no item, and nothing is read for it.
    u32 item = NO_ROW;
    if (t < left && begin + t < counts[blockIdx.y]) item = rows[slot + t];
    if (item != NO_ROW && table && item >= header.table_rows + n_more) item = NO_ROW;
    if (t < n) arena[t] = item;
    if (!__syncthreads_or(item != NO_ROW)) {
        if (t < left) scores[slot + t] = __uint_as_float(0x7fc00000u);
        return;
    }
    const Block in = {n, params, table, more, header.table_rows, header.row_words, header.numbers, header.scales, columns + slot * header.n_columns, header.n_columns, left,
                      shared + (u64)blockIdx.y * header.shared_width};
    for (u32 at = 0; at < header.n_steps; at++) {
        const Step& s = steps[at];
        switch (s.op) {
        case LAYER: layer(s, in, arena); break;
        case ROUNDED_LAYER: rounded_layer(s, in, arena); break;
        case NARROW: narrow_layer(s, in, arena); break;
        case EACH: each(s, in, arena); break;
        case PAIR: pair(s, in, arena); break;
        case TAKE: take(s, in, arena); break;
        case LOAD: load(s, in, arena); break;
        case SUM: sum(s, in, arena); break;
        case SOFTMAX: softmax(s, in, arena); break;
        case NORM: norm(s, in, arena); break;
        case EMBED: embed(s, in, arena); break;
        case MULTIPLY: multiply(s, in, arena); break;
        }
        if (s.op == SCORE && t < in.left) {
            const float score = __fmul_rn(weight, __uint_as_float(arena[place(in, s.x, s.x_stride, 0, 1, t)]));
            const float all = first ? score : __fadd_rn(scores[slot + t], score);
            scores[slot + t] = arena[t] == NO_ROW ? __uint_as_float(0x7fc00000u) : all;
        }
        __syncthreads();
    }
}
