// fill_columns: what a ranker reads of a candidate in a request.
// in     rows u32 [n_requests, width], ascending; sources u8 [n_requests, width]; source_scores f32, source_ranks u16 [n_requests, 4,
//        width]; counts u32 [n_requests]; dots f32 [n_requests, width], of which those of candidates without source 0 are read; columns
//        u32 [n_columns]: what each is, below, and in the second byte which source; of neighbours: offsets u64 [n_keys + 1], list_rows
//        u32, list_scores f32: what lies beside each item, an item once in a list; tail and asked, words 6 and 7: where the liked items
//        begin, rows and then weights, and how many there are; logarithms f32 [n_logarithms]: ln(1 + n)
// out    values f32 [n_requests, width, stride], the first n_columns of each; what lies behind a count is left as it was
// launch grid (n_requests), 256 threads, 24 * width bytes of dynamic shared memory
// order  of sums over the history: that of the liked items, without fused multiply-adds: the CPU's
// twin   fill_columns in src/device/cpu/twins.rs, by src/features/assemble.rs and src/retrieval/collaborative.rs
// COUNTED: fill_counts's, and left as it was
enum { SOURCE_SCORE, SOURCE_RANK, SOURCE_PRESENT, DOT, CO_SUM, CO_MAX, CO_COUNT, CO_MEAN, CO_TOP3, COUNTED };

KERNEL(fill_columns, 2)
(const u32* __restrict__ rows, const u8* __restrict__ sources, const float* __restrict__ source_scores,
 const u16* __restrict__ source_ranks, const u32* __restrict__ counts, u32 width, const float* __restrict__ dots,
 const u32* __restrict__ columns, u32 n_columns, const u64* __restrict__ offsets, u32 n_keys, const u32* __restrict__ list_rows,
 const float* __restrict__ list_scores, const u32* __restrict__ tail, const u32* __restrict__ asked,
 const float* __restrict__ logarithms, u32 n_logarithms, float* __restrict__ values, u32 stride) {
    DYNAMIC_SHARED(u32, words); // rows; bits of sum, of the three largest; how often: `width` each
    const u32 t = threadIdx.x;
    const u64 request = blockIdx.x, base = request * width;
    const u32 n = at_most(counts[request], width), none = 0xff800000u; // minus infinity
    for (u32 at = t; at < n; at += THREADS) {
        words[at] = rows[base + at];
        words[width + at] = 0;
#pragma unroll
        for (u32 l = 2; l < 5; l++) words[l * width + at] = none;
        words[5 * width + at] = 0;
    }
    __syncthreads();
    const u32 start = asked[request * ASKED + 6], n_liked = n_keys > 0 && n > 0 ? asked[request * ASKED + 7] : 0;
    for (u32 liked = 0; liked < n_liked; liked++) {
        const u32 key = tail[start + liked];
        const float weight = __uint_as_float(tail[start + n_liked + liked]);
        if (key < n_keys) {
            for (u64 entry = offsets[key] + t; entry < offsets[key + 1]; entry += THREADS) {
                const u32 at = place_of(words, n, list_rows[entry]);
                if (at == n) continue;
                const float similarity = list_scores[entry];
                words[width + at] = __float_as_uint(__fadd_rn(__uint_as_float(words[width + at]), __fmul_rn(weight, similarity)));
                float newcomer = similarity;
#pragma unroll
                for (u32 l = 2; l < 5; l++) {
                    const float held = __uint_as_float(words[l * width + at]);
                    words[l * width + at] = __float_as_uint(held > newcomer ? held : newcomer);
                    newcomer = held < similarity ? held : similarity;
                }
                words[5 * width + at] += 1;
            }
        }
        // The next list may hold the same items.
        __syncthreads();
    }
    for (u32 at = t; at < n; at += THREADS) {
        const u32 set = sources[base + at], count = words[5 * width + at];
        const float sum = __uint_as_float(words[width + at]);
        float largest[3];
#pragma unroll
        for (u32 l = 0; l < 3; l++) {
            const u32 bits = words[(2 + l) * width + at];
            largest[l] = bits == none ? 0 : __uint_as_float(bits);
        }
        for (u32 column = 0; column < n_columns; column++) {
            const u32 what = columns[column] & 255, source = columns[column] >> 8;
            const u64 from = (request * 4 + source) * width + at;
            if (what == COUNTED) continue;
            float value = 0;
            if (what == SOURCE_SCORE) value = source_scores[from];
            if (what == SOURCE_RANK) value = source_ranks[from] == 0 ? 0 : __fdiv_rn(1, (float)source_ranks[from]);
            if (what == SOURCE_PRESENT) value = (float)(set >> source & 1);
            if (what == DOT) value = set & 1 ? source_scores[request * 4 * width + at] : dots[base + at];
            if (what == CO_SUM) value = sum;
            if (what == CO_MAX) value = largest[0];
            if (what == CO_COUNT) value = logarithms[at_most(count, n_logarithms - 1)];
            if (what == CO_MEAN) value = __fdiv_rn(sum, (float)(count == 0 ? 1 : count));
            if (what == CO_TOP3) value = __fadd_rn(__fadd_rn(largest[0], largest[1]), largest[2]);
            values[(base + at) * stride + column] = value;
        }
    }
}

// fill_counts: a column that says how often the history holds the codes that a candidate has.
// in     rows u32 [n_requests, width]; counts u32 [n_requests]; offsets u32 [n_items + 1], codes u32: those of each item; more_spans u32
//        [n_more, 2], more_codes u32: the same of items beside the table, numbered from n_items on: where theirs begin and end; tail and
//        asked, word 7: the number of liked items; places u32 [n_requests, places_stride], of which words `place` and `place + 1` say where
//        in the tail the history's codes begin, ascending, behind them how often it holds each, and how many they are; by: below;
//        logarithms f32 [n_logarithms]: ln(1 + n)
// out    values f32 [n_requests, width, stride], `column` of each; what lies behind a count is left as it was
// launch grid (n_requests), 256 threads, no shared memory
// order  of rounding: as the CPU has it. The sum is that of how often the history holds each of the codes
// twin   fill_counts in src/device/cpu/twins.rs, by src/features/assemble.rs
enum { LOGARITHM, FIRST, SHARE }; // ln(1 + sum); the first code's over liked items; sum over liked items times codes

KERNEL(fill_counts, 4)
(const u32* __restrict__ rows, const u32* __restrict__ counts, u32 width, const u32* __restrict__ offsets, const u32* __restrict__ codes,
 u32 n_items, const u32* __restrict__ tail, const u32* __restrict__ asked, const u32* __restrict__ places, u32 places_stride, u32 place,
 u32 by, const float* __restrict__ logarithms, u32 n_logarithms, float* __restrict__ values, u32 stride, u32 column,
 const u32* __restrict__ more_spans, const u32* __restrict__ more_codes, u32 n_more) {
    const u64 request = blockIdx.x, base = request * width;
    const u32 n = at_most(counts[request], width), n_liked = asked[request * ASKED + 7];
    const u32 start = places[request * places_stride + place], n_codes = places[request * places_stride + place + 1];
    const u32 *known = tail + start, *times = known + n_codes;
    const float liked = (float)(n_liked == 0 ? 1 : n_liked);
    for (u32 at = threadIdx.x; at < n; at += THREADS) {
        const u32 row = rows[base + at], slot = row - n_items;
        const bool in_table = row < n_items, is_there = in_table || slot < n_more;
        const u32 *spans = in_table ? offsets + row : more_spans + 2 * (u64)slot, *own = in_table ? codes : more_codes;
        const u32 from = is_there ? spans[0] : 0, to = is_there ? spans[1] : 0;
        const u32 last = by == FIRST ? at_most(to, from + 1) : to;
        u32 sum = 0;
        for (u32 code = from; code < last; code++) {
            const u32 found = place_of(known, n_codes, own[code]);
            sum += found < n_codes ? times[found] : 0;
        }
        const u32 length = to == from ? 1 : to - from;
        float value = logarithms[at_most(sum, n_logarithms - 1)];
        if (by == FIRST) value = __fdiv_rn((float)sum, liked);
        if (by == SHARE) value = __fdiv_rn((float)sum, __fmul_rn(liked, (float)length));
        values[(base + at) * stride + column] = value;
    }
}
