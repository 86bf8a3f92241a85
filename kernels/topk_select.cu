// topk_select: the k best of every row of scores, or of every part of a row.
// in     scores f32 [n_rows, stride], of which n_cols count; ids u32 of the same shape, or null: columns are their own ids;
//        lengths u32 [n_rows], or null: a row's columns, where fewer than n_cols count
// out    rows u32, scores f32 [n_rows, n_parts, k]; 1 <= k <= 1024; holes where there are fewer columns
// launch grid (n_rows, n_parts), 256 threads, 34 KiB of static shared memory; part p reads columns from p * part_cols on
// order  that of the prelude: higher first, ties by lower id, NaN last, -0 as 0 (and returned as 0). Ids of a row are unique; an id
//        that is not counts as often as it is there. Ids NO_ROW are holes.
// twin   topk_select in src/device/cpu/twins.rs
//
// One pass, bound by reading: keys that are not worse than `limit` go to a buffer; when that is full, radix selection leaves the k
// best in it, and the worst of them is the next limit. Of a random row k * ln(n / k) scores or so ever pass. Rows that ascend let all
// pass: then selecting costs several times the reading.

constexpr u32 CAPACITY = 4096; // keys of the buffer, at least 2 * the largest k
constexpr u32 GROUPS = 4;      // 16-byte accesses of a thread in flight
enum { COUNT, EQUAL, DIFFER_HIGH, DIFFER_LOW, DIGIT, NEEDED, INSIDE, STATES };

// Leaves the k smallest of the buffer's keys, and returns a limit that no other key is below or at, unless it equals one that stays.
// Begins and ends with all threads having seen the same.
template <class Keys, class Words>
DEVICE u64 keep_smallest(Keys keys, Words tally, Words sums, Words state, u32 k) {
    const u32 t = threadIdx.x, n = at_most(state[COUNT], CAPACITY);
    if (n <= k) return NO_KEY;
    // Scores of one row share their first bits; the first digit begins where they differ.
    const u64 some = keys[0];
    u64 differ = 0;
    for (u32 i = t; i < n; i += THREADS) differ |= keys[i] ^ some;
    const u32 high = __reduce_or_sync(ALL_LANES, (u32)(differ >> 32)), low = __reduce_or_sync(ALL_LANES, (u32)differ);
    if ((t & 31) == 0) {
        atomicOr(&state[DIFFER_HIGH], high);
        atomicOr(&state[DIFFER_LOW], low);
    }
    __syncthreads();
    differ = (u64)state[DIFFER_HIGH] << 32 | state[DIFFER_LOW];
    const int top = 63 - __clzll((long long)(differ | 255));
    u32 shift = (u32)top - 7, needed = k, inside;
    u64 above = shift == 56 ? 0 : NO_KEY << (shift + 8), prefix = some & above;
    for (;;) {
        tally[t] = 0;
        __syncthreads();
        for (u32 i = t; i < n; i += THREADS) {
            const u64 key = keys[i];
            if (((key ^ prefix) & above) == 0) atomicAdd(&tally[(u32)(key >> shift) & 255], 1u);
        }
        __syncthreads();
        u32 total;
        const u32 mine = tally[t], before = block_scan(mine, sums, total);
        if (before < needed && needed <= before + mine) {
            state[DIGIT] = t;
            state[NEEDED] = needed - before;
            state[INSIDE] = mine;
        }
        __syncthreads();
        prefix |= (u64)state[DIGIT] << shift;
        above = NO_KEY << shift;
        needed = state[NEEDED];
        inside = state[INSIDE];
        if (needed == inside || shift == 0) break;
        // The last digit may overlap the one before: bits that are known already are the same in all that is counted.
        shift = shift < 8 ? 0 : shift - 8;
    }
    // All that begins as the k-th key does stays, or, of keys that are all alike, as many as are needed.
    const bool whole = needed == inside;
    const u64 limit = whole ? prefix | ~above : prefix;
    if (t == 0) {
        state[COUNT] = 0;
        state[EQUAL] = 0;
        state[DIFFER_HIGH] = 0;
        state[DIFFER_LOW] = 0;
    }
    __syncthreads();
    for (u32 first = 0; first < n; first += THREADS) {
        const u32 i = first + t;
        const u64 key = i < n ? keys[i] : NO_KEY;
        bool stays = i < n && key < limit;
        if (i < n && key == limit) stays = whole || atomicAdd(&state[EQUAL], 1u) < needed;
        // What stays goes to places that have been read.
        __syncthreads();
        const u32 place = reserve(stays, &state[COUNT]);
        if (stays) keys[place] = key;
    }
    __syncthreads();
    return limit;
}

KERNEL(topk_select, 3)
(const float* __restrict__ scores, const u32* __restrict__ ids, const u32* __restrict__ lengths, u32 n_cols, u32 stride,
 u32 part_cols, u32 k, u32* __restrict__ out_rows, float* __restrict__ out_scores) {
    SHARED(u64, keys, CAPACITY);
    SHARED(u32, tally, 256);
    SHARED(u32, sums, THREADS / 32);
    SHARED(u32, state, STATES);
    const u32 t = threadIdx.x;
    const u64 row = blockIdx.x;
    if (t < STATES) state[t] = 0;
    __syncthreads();

    const u32 n = lengths ? at_most(lengths[row], n_cols) : n_cols;
    const u32 begin = at_most(blockIdx.y * part_cols, n), span = at_most(part_cols, n - begin);
    const u32* in = (const u32*)scores + row * stride + begin;
    const u32* names = ids ? ids + row * stride + begin : nullptr;
    // Groups of four columns lie at 16-byte boundaries; the first may begin before the part.
    const u32 skew = (u32)((u64)in / 4 % 4), n_groups = (span + skew + 3) / 4;

    u64 limit = NO_KEY;
    u32 values[GROUPS][4], next[GROUPS][4], exist[GROUPS];
#pragma unroll
    for (u32 g = 0; g < GROUPS; g++) exist[g] = load4(next[g], in, 4 * (g * THREADS + t) - skew, span);
    for (u32 tile = 0; tile < n_groups; tile += GROUPS * THREADS) {
        u32 waiting = 0;
#pragma unroll
        for (u32 g = 0; g < GROUPS; g++) {
            waiting |= exist[g] << (4 * g);
#pragma unroll
            for (u32 e = 0; e < 4; e++) values[g][e] = next[g][e];
            exist[g] = load4(next[g], in, 4 * (tile + (GROUPS + g) * THREADS + t) - skew, span);
        }
        for (;;) {
            // Ids are read only where the score alone does not decide.
#pragma unroll
            for (u32 bit = 0; bit < 4 * GROUPS; bit++) {
                const u32 key = key_of(__uint_as_float(values[bit / 4][bit % 4])), worst = (u32)(limit >> 32);
                if (key > worst) waiting &= ~(1u << bit);
                if (key == worst && waiting >> bit & 1) {
                    const u32 at = 4 * (tile + bit / 4 * THREADS + t) - skew + bit % 4;
                    if ((names ? names[at] : begin + at) > (u32)limit) waiting &= ~(1u << bit);
                }
            }
            if (__any_sync(ALL_LANES, waiting)) {
                u32 place = reserve(__popc(waiting), &state[COUNT]);
#pragma unroll
                for (u32 bit = 0; bit < 4 * GROUPS; bit++) {
                    if (!(waiting >> bit & 1) || place >= CAPACITY) continue;
                    const u32 at = 4 * (tile + bit / 4 * THREADS + t) - skew + bit % 4;
                    keys[place++] = pack(__uint_as_float(values[bit / 4][bit % 4]), names ? names[at] : begin + at);
                    waiting &= ~(1u << bit);
                }
            }
            if (!__syncthreads_or(waiting)) break;
            limit = keep_smallest(keys, tally, sums, state, k);
        }
    }

    keep_smallest(keys, tally, sums, state, k);
    const u32 kept = at_most(state[COUNT], k);
    u64 best[4];
#pragma unroll
    for (u32 j = 0; j < 4; j++) best[j] = 4 * t + j < kept ? (u64)keys[4 * t + j] : NO_KEY;
    __syncthreads();
    block_sort(best, keys, padded(k));
    const u64 out = (row * gridDim.y + blockIdx.y) * k;
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        if (4 * t + j >= k) continue;
        out_rows[out + 4 * t + j] = row_of(best[j]);
        out_scores[out + 4 * t + j] = score_of(best[j]);
    }
}
