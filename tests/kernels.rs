//! Every GPU kernel, on the CPU by the emulator, against its twin: the same source that nvcc and NVRTC compile. And that the emulator
//! and these comparisons notice bugs: each planted one is found. What only a GPU can show is not shown here.

#[path = "kernels/assemble.rs"]
mod assemble;
#[path = "kernels/columns.rs"]
mod columns;
#[path = "kernels/dense.rs"]
mod dense;
#[path = "kernels/live.rs"]
mod live;
#[path = "kernels/slates.rs"]
mod slates;

use assemble::{Assemble, Holes};
use dense::Dense;
use half::bf16;
use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tastemaker::candidates::{Packed, Scored};
use tastemaker::catalog::generation::NO_ROW;
use tastemaker::device::cpu::twins::{self, Lists};
use tastemaker_emulator::{Buffer, PLANTED};
use tastemaker_kernels as kernels;
use tastemaker_kernels::{Launch, ShapeError};

/// A number that no kernel writes.
const LEFT: f32 = 0.12345;
/// Marks what a kernel must not touch.
const UNTOUCHED: u32 = 0xdead_beef;

/// What scores look like.
#[derive(Clone, Copy, Debug)]
enum Scores {
    /// All over, so that hardly any two are alike.
    Many,
    /// A few values, zeros of both signs the best: ties everywhere.
    Few,
    /// Ascending: every one is better than all before.
    Ascending,
    /// Any bits: NaN of all kinds, infinities, zeros of both signs, subnormal ones.
    Bits,
}

impl Scores {
    fn take(self, n: usize, random: &mut SmallRng) -> Vec<f32> {
        const ODD: [f32; 9] =
            [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1e-40, -1e-40, f32::MAX];
        let mut of = |at: usize| match self {
            Scores::Many => random.random_range(-1.0f32..1.0),
            Scores::Few => [0.0, -0.0, -1.0, -2.0][random.random_range(0..4)],
            Scores::Ascending => at as f32,
            Scores::Bits if random.random() => ODD[random.random_range(0..ODD.len())],
            Scores::Bits => f32::from_bits(random.random()),
        };
        (0..n).map(&mut of).collect()
    }

    fn any() -> impl Strategy<Value = Scores> {
        prop::sample::select(vec![Scores::Many, Scores::Few, Scores::Ascending, Scores::Bits])
    }
}

/// Unique ids in a random order; not all of those that there are.
fn ids(n: usize, random: &mut SmallRng) -> Vec<u32> {
    let mut all: Vec<u32> = (0..2 * n as u32).collect();
    for at in 0..n {
        all.swap(at, random.random_range(at..2 * n));
    }
    all.truncate(n);
    all
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn run(variant: &str, launch: Result<Launch, ShapeError>, seed: u64) -> Result<(), String> {
    let launch = launch.map_err(|error| error.to_string())?;
    // SAFETY: the tests below give buffers of the shapes that the kernels want, or are there to show what happens otherwise.
    unsafe { tastemaker_emulator::launch(variant, &launch, seed) }.map_err(|finding| finding.0)
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, got: &[T], want: &[T]) -> Result<(), String> {
    let differ = got.iter().zip(want).position(|(got, want)| got != want);
    match differ {
        _ if got.len() != want.len() => Err(format!("answer: {what}: {} of {}", got.len(), want.len())),
        Some(at) => Err(format!("answer: {what}[{at}] is {:?}, expected {:?}", got[at], want[at])),
        None => Ok(()),
    }
}

fn intact<T: tastemaker_emulator::Plain>(what: &str, buffer: &Buffer<T>) -> Result<(), String> {
    if buffer.intact() { Ok(()) } else { Err(format!("written around {what}")) }
}

fn same_lists(rows: &Buffer<u32>, scores: &Buffer<f32>, want: &Lists) -> Result<(), String> {
    same("rows", rows, &want.rows)?;
    same("scores", &bits(scores), &bits(&want.scores))?;
    intact("rows", rows)?;
    intact("scores", scores)
}

#[derive(Clone, Copy, Debug)]
struct Topk {
    n_rows: usize,
    n_cols: usize,
    spare: usize,
    n_parts: usize,
    k: usize,
    scores: Scores,
    with_ids: bool,
    with_lengths: bool,
}

impl Topk {
    fn any() -> impl Strategy<Value = Topk> {
        let n_cols = prop_oneof![0usize..20, 0usize..1500, 0usize..14_000];
        let k = prop_oneof![1usize..12, 1usize..=1024, Just(1024usize)];
        (1usize..4, n_cols, 0usize..9, 1usize..4, k, Scores::any(), any::<bool>(), any::<bool>()).prop_map(
            |(n_rows, n_cols, spare, n_parts, k, scores, with_ids, with_lengths)| Topk {
                n_rows,
                n_cols,
                spare,
                n_parts,
                k,
                scores,
                with_ids,
                with_lengths,
            },
        )
    }

    fn check(&self, variant: &str, seed: u64) -> Result<(), String> {
        let &Topk { n_rows, n_cols, spare, n_parts, k, .. } = self;
        let (random, stride) = (&mut SmallRng::seed_from_u64(seed), n_cols + spare);
        let scores: Vec<f32> = (0..n_rows).flat_map(|_| self.scores.take(stride, random)).collect();
        let mut named: Vec<u32> = (0..n_rows).flat_map(|_| ids(stride, random)).collect();
        named.iter_mut().for_each(|id| *id = if random.random_ratio(1, 50) { NO_ROW } else { *id });
        let long_as: Vec<u32> = (0..n_rows).map(|_| random.random_range(0..n_cols as u32 + 3)).collect();
        let (named, long_as) = (self.with_ids.then_some(&named[..]), self.with_lengths.then_some(&long_as[..]));
        let want = twins::topk_select(&scores, named, long_as, [stride, n_cols, n_parts, k]);

        let (scores, named, long_as) = (Buffer::new(&scores), named.map(Buffer::new), long_as.map(Buffer::new));
        let rows = Buffer::new(&vec![UNTOUCHED; n_rows * n_parts * k]);
        let best = Buffer::new(&vec![0.5f32; n_rows * n_parts * k]);
        let launch = kernels::TopkSelect {
            scores: scores.address(),
            ids: named.as_ref().map(Buffer::address),
            lengths: long_as.as_ref().map(Buffer::address),
            n_rows: n_rows as u32,
            n_cols: n_cols as u32,
            stride: stride as u32,
            n_parts: n_parts as u32,
            k: k as u32,
            out_rows: rows.address(),
            out_scores: best.address(),
        };
        run(variant, launch.launch(), seed)?;
        if stride == 0 {
            // The twin can't tell how many rows of nothing there are.
            return same("rows", &rows, &vec![NO_ROW; n_rows * n_parts * k]);
        }
        same_lists(&rows, &best, &want)
    }
}

/// A row in parts, and the parts' best merged: as the row's best, with what one kernel writes read by the other as it is.
fn in_parts(n_cols: usize, n_parts: usize, k: usize, scores: Scores, seed: u64) -> Result<(), String> {
    let (n_rows, random) = (2, &mut SmallRng::seed_from_u64(seed));
    let values: Vec<f32> = (0..n_rows).flat_map(|_| scores.take(n_cols, random)).collect();
    let want = twins::topk_select(&values, None, None, [n_cols, n_cols, 1, k]);
    let values = Buffer::new(&values);
    let [rows, merged_rows] = [n_parts, 1].map(|n| Buffer::new(&vec![UNTOUCHED; n_rows * n * k]));
    let [best, merged_best] = [n_parts, 1].map(|n| Buffer::new(&vec![0.5f32; n_rows * n * k]));
    let select = kernels::TopkSelect {
        scores: values.address(),
        ids: None,
        lengths: None,
        n_rows: n_rows as u32,
        n_cols: n_cols as u32,
        stride: n_cols as u32,
        n_parts: n_parts as u32,
        k: k as u32,
        out_rows: rows.address(),
        out_scores: best.address(),
    };
    run("plain", select.launch(), seed)?;
    let merge = kernels::PartitionMerge {
        rows: rows.address(),
        scores: best.address(),
        offsets: None,
        n_queries: n_rows as u32,
        n_parts: n_parts as u32,
        width: k as u32,
        k: k as u32,
        out_rows: merged_rows.address(),
        out_scores: merged_best.address(),
    };
    run("plain", merge.launch(), seed)?;
    same_lists(&merged_rows, &merged_best, &want)
}

/// Sorted lists with rows of their own, and holes at the ends.
fn sorted_lists(n_lists: usize, width: usize, scores: Scores, random: &mut SmallRng) -> Lists {
    let mut lists = Lists::default();
    for _ in 0..n_lists {
        let n = if random.random() { width } else { random.random_range(0..=width) };
        let rows = ids(width, random);
        let entries = rows.into_iter().zip(scores.take(width, random)).take(n);
        let mut packed: Vec<Packed> = entries.map(|(row, score)| Scored { row, score }.into()).collect();
        packed.sort();
        let list: Vec<Scored> = packed.into_iter().map(Scored::from).collect();
        lists.rows.extend(list.iter().map(|s| s.row).chain(std::iter::repeat(NO_ROW)).take(width));
        lists.scores.extend(list.iter().map(|s| s.score).chain(std::iter::repeat(f32::NAN)).take(width));
    }
    lists
}

#[derive(Clone, Copy, Debug)]
struct Partitions {
    n_queries: usize,
    n_parts: usize,
    width: usize,
    k: usize,
    scores: Scores,
    with_offsets: bool,
}

impl Partitions {
    fn any() -> impl Strategy<Value = Partitions> {
        let width = prop_oneof![0usize..6, 0usize..100, 0usize..1500];
        let k = prop_oneof![1usize..12, 1usize..=1024, Just(1024usize)];
        (1usize..4, 0usize..9, width, k, Scores::any(), any::<bool>()).prop_map(
            |(n_queries, n_parts, width, k, scores, with_offsets)| Partitions {
                n_queries,
                n_parts,
                width,
                k,
                scores,
                with_offsets,
            },
        )
    }

    fn check(&self, variant: &str, seed: u64) -> Result<(), String> {
        let &Partitions { n_queries, n_parts, width, k, .. } = self;
        let random = &mut SmallRng::seed_from_u64(seed);
        let lists = sorted_lists(n_queries * n_parts, width, self.scores, random);
        let offsets: Vec<u32> = (0..n_parts).map(|_| random.random_range(0..1 << 31)).collect();
        let offsets = self.with_offsets.then_some(&offsets[..]);
        let mut want = twins::partition_merge(&lists, offsets, [n_parts, width, k]);
        if n_parts * width == 0 {
            want = Lists { rows: vec![NO_ROW; n_queries * k], scores: vec![f32::NAN; n_queries * k] };
        }
        let (rows, scores) = (Buffer::new(&lists.rows), Buffer::new(&lists.scores));
        let offsets = offsets.map(Buffer::new);
        let out_rows = Buffer::new(&vec![UNTOUCHED; n_queries * k]);
        let out_scores = Buffer::new(&vec![0.5f32; n_queries * k]);
        let launch = kernels::PartitionMerge {
            rows: rows.address(),
            scores: scores.address(),
            offsets: offsets.as_ref().map(Buffer::address),
            n_queries: n_queries as u32,
            n_parts: n_parts as u32,
            width: width as u32,
            k: k as u32,
            out_rows: out_rows.address(),
            out_scores: out_scores.address(),
        };
        run(variant, launch.launch(), seed)?;
        same_lists(&out_rows, &out_scores, &want)
    }
}

#[derive(Clone, Copy, Debug)]
struct Merge {
    n_requests: usize,
    widths: [usize; 4],
    n_items: usize,
    scores: Scores,
}

impl Merge {
    fn any() -> impl Strategy<Value = Merge> {
        let served = Just([500, 300, 100, 200]);
        let small = prop::array::uniform4(prop_oneof![Just(0usize), 0usize..9, 0usize..513]);
        let n_items = prop_oneof![1usize..40, 1usize..3000];
        (1usize..4, prop_oneof![served, small], n_items, Scores::any())
            .prop_map(|(n_requests, widths, n_items, scores)| Merge { n_requests, widths, n_items, scores })
    }

    fn check(&self, variant: &str, seed: u64) -> Result<(), String> {
        let &Merge { n_requests, widths, n_items, .. } = self;
        let (random, width) = (&mut SmallRng::seed_from_u64(seed), widths.iter().sum::<usize>());
        // Rows may occur twice in a list, in spite of what sources promise.
        let row = |_| if random.random_ratio(1, 100) { NO_ROW } else { random.random_range(0..n_items as u32) };
        let mut rows: Vec<u32> = (0..n_requests * width).map(row).collect();
        let mut lengths = Vec::new();
        for request in 0..n_requests {
            let mut start = request * width;
            for wide in widths {
                let list = &mut rows[start..start + wide];
                if let Some(end) = list.iter().position(|&row| row == NO_ROW) {
                    list[end..].fill(NO_ROW);
                }
                lengths.push(if random.random() { wide as u32 } else { random.random_range(0..wide as u32 + 3) });
                start += wide;
            }
        }
        let lists = Lists { rows, scores: self.scores.take(n_requests * width, random) };
        let want = twins::merge_candidates(&lists, &lengths, widths, n_items);

        let (rows, scores, lengths) = (Buffer::new(&lists.rows), Buffer::new(&lists.scores), Buffer::new(&lengths));
        let out_rows = Buffer::new(&vec![UNTOUCHED; n_requests * width]);
        let sources = Buffer::new(&vec![0xeeu8; n_requests * width]);
        let source_scores = Buffer::new(&vec![f32::from_bits(UNTOUCHED); n_requests * 4 * width]);
        let source_ranks = Buffer::new(&vec![0xeeeeu16; n_requests * 4 * width]);
        let counts = Buffer::new(&vec![UNTOUCHED; n_requests]);
        let launch = kernels::MergeCandidates {
            rows: rows.address(),
            scores: scores.address(),
            lengths: lengths.address(),
            n_requests: n_requests as u32,
            widths: widths.map(|width| width as u32),
            out_rows: out_rows.address(),
            sources: sources.address(),
            source_scores: source_scores.address(),
            source_ranks: source_ranks.address(),
            counts: counts.address(),
        };
        run(variant, launch.launch(), seed)?;
        for (at, want) in want.iter().enumerate() {
            let n = want.len();
            same("counts", &[counts[at]], &[n as u32])?;
            // What lies behind the count is as it was.
            let padded = |list: &[u32], unit: u32| -> Vec<u32> {
                list.iter().copied().chain(std::iter::repeat_n(unit, width - n)).collect()
            };
            let request = at * width..(at + 1) * width;
            same("rows", &out_rows[request.clone()], &padded(&want.rows, UNTOUCHED))?;
            let sets: Vec<u32> = want.sources.iter().map(|set| set.0.into()).collect();
            let got: Vec<u32> = sources[request].iter().map(|&set| set.into()).collect();
            same("sources", &got, &padded(&sets, 0xee))?;
            for source in 0..4 {
                let place = (at * 4 + source) * width..(at * 4 + source + 1) * width;
                let want_scores = bits(&want.source_scores[source]);
                same("source_scores", &bits(&source_scores[place.clone()]), &padded(&want_scores, UNTOUCHED))?;
                let want_ranks: Vec<u32> = want.source_ranks[source].iter().map(|&rank| rank.into()).collect();
                let got: Vec<u32> = source_ranks[place].iter().map(|&rank| rank.into()).collect();
                same("source_ranks", &got, &padded(&want_ranks, 0xeeee))?;
            }
        }
        intact("rows", &out_rows)?;
        intact("sources", &sources)?;
        intact("source_scores", &source_scores)?;
        intact("source_ranks", &source_ranks)?;
        intact("counts", &counts)
    }
}

#[derive(Clone, Copy, Debug)]
struct Filter {
    n_seen: usize,
    lists_per_seen: usize,
    width: usize,
    n_items: u32,
    scores: Scores,
    with_lengths: bool,
    with_available: bool,
    with_seen: bool,
    in_place: bool,
}

impl Filter {
    const PLAIN: Filter = Filter {
        n_seen: 1,
        lists_per_seen: 1,
        width: 1,
        n_items: 1,
        scores: Scores::Many,
        with_lengths: false,
        with_available: true,
        with_seen: true,
        in_place: false,
    };

    fn any() -> impl Strategy<Value = Filter> {
        let width = prop_oneof![1usize..9, 1usize..600, 1usize..3500];
        let with = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
        let n_items = prop_oneof![0u32..40, 0u32..5000];
        (1usize..3, 1usize..4, width, n_items, Scores::any(), with).prop_map(
            |(n_seen, lists_per_seen, width, n_items, scores, with)| Filter {
                n_seen,
                lists_per_seen,
                width,
                n_items,
                scores,
                with_lengths: with.0,
                with_available: with.1,
                with_seen: with.2,
                in_place: with.3,
            },
        )
    }

    fn check(&self, variant: &str, seed: u64) -> Result<(), String> {
        let &Filter { n_seen, lists_per_seen, width, n_items, .. } = self;
        let (random, n_lists) = (&mut SmallRng::seed_from_u64(seed), n_seen * lists_per_seen);
        let most = n_items + n_items / 8 + 1;
        let row = |_| if random.random_ratio(1, 30) { NO_ROW } else { random.random_range(0..most) };
        let rows = (0..n_lists * width).map(row).collect();
        let lists = Lists { rows, scores: self.scores.take(n_lists * width, random) };
        let words = n_items.div_ceil(32) as usize;
        let mut flags = |n: usize| -> Vec<u32> { (0..n).map(|_| random.random()).collect() };
        let (available, seen) = (flags(words), flags(words * n_seen));
        let available = self.with_available.then_some(&available[..]);
        let seen = self.with_seen.then_some(&seen[..]);
        let long_as: Vec<u32> = (0..n_lists).map(|_| random.random_range(0..width as u32 + 3)).collect();
        let long_as = self.with_lengths.then_some(&long_as[..]);
        let by_request = seen.map(|seen| (seen, lists_per_seen));
        let (want, left) = twins::filter_candidates(&lists, long_as, width, available, by_request, n_items);

        let (rows, scores) = (Buffer::new(&lists.rows), Buffer::new(&lists.scores));
        let (available, seen) = (available.map(Buffer::new), seen.map(Buffer::new));
        let long_as = long_as.map(Buffer::new);
        let out_rows = Buffer::new(&vec![UNTOUCHED; n_lists * width]);
        let out_scores = Buffer::new(&vec![0.5f32; n_lists * width]);
        let counts = Buffer::new(&vec![UNTOUCHED; n_lists]);
        let (to_rows, to_scores) = if self.in_place { (&rows, &scores) } else { (&out_rows, &out_scores) };
        let launch = kernels::FilterCandidates {
            rows: rows.address(),
            scores: scores.address(),
            lengths: long_as.as_ref().map(Buffer::address),
            n_lists: n_lists as u32,
            width: width as u32,
            available: available.as_ref().map(Buffer::address),
            seen: seen.as_ref().map(Buffer::address),
            seen_words: words as u32,
            lists_per_seen: lists_per_seen as u32,
            n_items,
            out_rows: to_rows.address(),
            out_scores: to_scores.address(),
            counts: counts.address(),
        };
        run(variant, launch.launch(), seed)?;
        same("counts", &counts, &left)?;
        intact("counts", &counts)?;
        same_lists(to_rows, to_scores, &want)
    }
}

#[derive(Clone, Copy, Debug)]
struct Gather {
    n: usize,
    n_rows: usize,
    chunks: usize,
    table_spare: usize,
    out_spare: usize,
    widen: bool,
}

impl Gather {
    fn any() -> impl Strategy<Value = Gather> {
        (1usize..300, 0usize..200, 1usize..40, 0usize..3, 0usize..3, any::<bool>()).prop_map(
            |(n, n_rows, chunks, table_spare, out_spare, widen)| Gather {
                n,
                n_rows,
                chunks,
                table_spare,
                out_spare,
                widen,
            },
        )
    }

    fn check(&self, variant: &str, seed: u64) -> Result<(), String> {
        let &Gather { n, n_rows, chunks, .. } = self;
        let random = &mut SmallRng::seed_from_u64(seed);
        let most = (n_rows + n_rows / 8 + 1) as u32;
        let row = |_| if random.random_ratio(1, 20) { NO_ROW } else { random.random_range(0..most) };
        let rows: Vec<u32> = (0..n).map(row).collect();
        let (table_stride, out_stride) = (chunks + self.table_spare, chunks + self.out_spare);
        // Units are 4 values, of either type; the table is kept as u32 and read as what it is.
        let table_u32: Vec<u32> = (0..n_rows * table_stride * 4).map(|_| random.random()).collect();
        let (rows_at, out) = (Buffer::new(&rows), Buffer::new_16(&vec![UNTOUCHED; n * out_stride * 4]));
        let halves: Vec<u16> = table_u32.iter().map(|&word| word as u16).collect();
        let (wide, narrow) = (Buffer::new_16(&table_u32), Buffer::new_16(&halves));
        let gather = kernels::Gather {
            rows: rows_at.address(),
            n: n as u32,
            table: if self.widen { narrow.address() } else { wide.address() },
            n_rows: n_rows as u32,
            table_stride: table_stride as u32,
            chunks: chunks as u32,
            out: out.address(),
            out_stride: out_stride as u32,
        };
        let (stride, width) = (table_stride * 4, chunks * 4);
        let want = if self.widen {
            run(variant, kernels::Bf16GatherAsF32(gather).launch(), seed)?;
            let table: Vec<bf16> = halves.iter().map(|&half| bf16::from_bits(half)).collect();
            bits(&twins::gather_bf16_as_f32(&rows, &table, stride, width))
        } else {
            run(variant, kernels::GatherRows(gather).launch(), seed)?;
            twins::gather_rows(&rows, &table_u32, stride, width)
        };
        let mut padded = vec![UNTOUCHED; n * out_stride * 4];
        for (to, from) in padded.chunks_exact_mut(out_stride * 4).zip(want.chunks_exact(width)) {
            to[..width].copy_from_slice(from);
        }
        same("values", &out, &padded)?;
        intact("values", &out)
    }
}

#[derive(Clone, Copy, Debug)]
struct Scoring {
    n_queries: usize,
    n_rows: usize,
    units: usize,
    spare: usize,
    by: kernels::ScoreBy,
    narrow: bool,
    with_available: bool,
    n_masked: usize,
}

impl Scoring {
    fn any() -> impl Strategy<Value = Scoring> {
        use kernels::ScoreBy::{InnerProduct, Times, TwiceLess};
        let by = prop::sample::select(vec![InnerProduct, Times, TwiceLess]);
        (1usize..70, 1usize..400, 0usize..20, 0usize..9, by, any::<bool>(), any::<bool>(), 0usize..300).prop_map(
            |(n_queries, n_rows, units, spare, by, narrow, with_available, n_masked)| Scoring {
                n_queries,
                n_rows,
                units,
                spare,
                by,
                narrow,
                with_available,
                n_masked,
            },
        )
    }

    fn check(&self, variant: &str, seed: u64) -> Result<(), String> {
        let &Scoring { n_queries, n_rows, spare, by, .. } = self;
        let (random, width, stride) = (&mut SmallRng::seed_from_u64(seed), 4 * self.units, n_rows + spare);
        let mut values = |n: usize| -> Vec<f32> { (0..n).map(|_| random.random_range(-1.0f32..1.0)).collect() };
        let (queries, mut table, terms) = (values(n_queries * width), values(n_rows * width), values(n_rows));
        let narrow: Vec<u16> = table.iter().map(|&value| bf16::from_f32(value).to_bits()).collect();
        if self.narrow {
            table = narrow.iter().map(|&bits| bf16::from_bits(bits).to_f32()).collect();
        }
        let words: Vec<u32> = (0..n_rows.div_ceil(32)).map(|_| random.random()).collect();
        let words = self.with_available.then_some(&words[..]);
        let mut pair = |_| [random.random_range(0..n_queries as u32 + 2), random.random_range(0..stride as u32 + 2)];
        let pairs: Vec<[u32; 2]> = (0..self.n_masked).map(&mut pair).collect();
        let want = match width {
            // Rows of nothing.
            0 => twins::scores(&vec![0.0; n_queries], &vec![0.0; n_rows], 1, (by, &terms), words),
            _ => twins::scores(&queries, &table, width, (by, &terms), words),
        };
        let mut padded = vec![f32::from_bits(UNTOUCHED); n_queries * stride];
        for (to, from) in padded.chunks_exact_mut(stride).zip(want.chunks_exact(n_rows)) {
            to[..n_rows].copy_from_slice(from);
        }
        twins::mask_scores(&mut padded, &pairs, [n_queries, n_rows, stride]);

        let (queries, terms) = (Buffer::new_16(&queries), Buffer::new(&terms));
        let (wide, narrow, words) = (Buffer::new_16(&table), Buffer::new_16(&narrow), words.map(Buffer::new));
        let scores = Buffer::new(&vec![f32::from_bits(UNTOUCHED); n_queries * stride]);
        let shape = kernels::Scores {
            queries: queries.address(),
            n_queries: n_queries as u32,
            table: if self.narrow { narrow.address() } else { wide.address() },
            n_rows: n_rows as u32,
            width: width as u32,
            terms: terms.address(),
            by,
            available: words.as_ref().map(Buffer::address),
            scores: scores.address(),
            stride: stride as u32,
        };
        match self.narrow {
            true => run(variant, kernels::ScoresBf16(shape).launch(), seed)?,
            false => run(variant, kernels::ScoresF32(shape).launch(), seed)?,
        }
        if !pairs.is_empty() {
            let flat = Buffer::new_16(&pairs.concat());
            let mask = kernels::MaskScores {
                pairs: flat.address(),
                n: pairs.len() as u32,
                scores: scores.address(),
                n_queries: n_queries as u32,
                n_rows: n_rows as u32,
                stride: stride as u32,
            };
            run(variant, mask.launch(), seed)?;
        }
        // Every NaN of ours is the same one; -0 is what it is.
        same("scores", &bits(&scores), &bits(&padded))?;
        intact("scores", &scores)
    }
}

#[derive(Clone, Copy, Debug)]
struct Neighbors {
    n_lists: usize,
    width: usize,
    k: usize,
    n_rows: u32,
    scores: Scores,
    factor: f32,
    with_available: bool,
}

impl Neighbors {
    fn any() -> impl Strategy<Value = Neighbors> {
        let width = prop_oneof![1usize..12, 1usize..=1024, Just(1024usize)];
        let k = prop_oneof![1usize..12, 1usize..=1024, Just(1024usize)];
        let n_rows = prop_oneof![0u32..40, 0u32..5000, Just(u32::MAX - 1)];
        let factor = prop::sample::select(vec![1.0f32, -1.0]);
        (1usize..4, width, k, n_rows, Scores::any(), factor, any::<bool>()).prop_map(
            |(n_lists, width, k, n_rows, scores, factor, available)| Neighbors {
                n_lists,
                width,
                k,
                n_rows,
                scores,
                factor,
                // Bits of 2^32 rows are more than a test needs.
                with_available: available && n_rows < 1 << 20,
            },
        )
    }

    fn check(&self, variant: &str, seed: u64) -> Result<(), String> {
        let &Neighbors { n_lists, width, k, n_rows, factor, .. } = self;
        let (random, offset) = (&mut SmallRng::seed_from_u64(seed), 0.25);
        // Of few rows, so that some occur again; some that are none, also by their high half alone.
        const NONE: [i64; 5] = [-1, i64::MAX, i64::MIN, 1 << 32, u32::MAX as i64];
        let most = (n_rows / 8 + 2).min(n_rows).max(1);
        let row = |_| match random.random_range(0..24) {
            0 => NONE[random.random_range(0..NONE.len())],
            1 => i64::from(n_rows),
            2 => i64::from(n_rows) - 1,
            _ => i64::from(random.random_range(0..most)),
        };
        let neighbors: Vec<i64> = (0..n_lists * width).map(row).collect();
        let distances = self.scores.take(n_lists * width, random);
        let words: Vec<u32> = (0..(n_rows as usize).min(1 << 20).div_ceil(32)).map(|_| random.random()).collect();
        let words = self.with_available.then_some(&words[..]);
        let want = twins::take_neighbors(&neighbors, &distances, [factor, offset], [width, k], n_rows, words);
        let (neighbors, distances) = (Buffer::new(&neighbors), Buffer::new(&distances));
        let words = words.map(Buffer::new);
        let rows = Buffer::new(&vec![UNTOUCHED; n_lists * k]);
        let best = Buffer::new(&vec![0.5f32; n_lists * k]);
        let launch = kernels::TakeNeighbors {
            neighbors: neighbors.address(),
            distances: distances.address(),
            factor,
            offset,
            n_lists: n_lists as u32,
            width: width as u32,
            n_rows,
            available: words.as_ref().map(Buffer::address),
            k: k as u32,
            out_rows: rows.address(),
            out_scores: best.address(),
        };
        run(variant, launch.launch(), seed)?;
        same_lists(&rows, &best, &want)
    }
}

fn held(result: Result<(), String>) -> Result<(), TestCaseError> {
    result.map_err(TestCaseError::fail)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn topk_select_equals_its_twin(shape in Topk::any(), seed in any::<u64>()) {
        held(shape.check("plain", seed))?;
    }

    #[test]
    fn partition_merge_equals_its_twin(shape in Partitions::any(), seed in any::<u64>()) {
        held(shape.check("plain", seed))?;
    }

    #[test]
    fn parts_merged_equal_the_whole(
        n_cols in 1usize..9000, n_parts in 1usize..20, k in prop_oneof![1usize..12, 1usize..=1024], scores in Scores::any(),
        seed in any::<u64>(),
    ) {
        held(in_parts(n_cols, n_parts, k, scores, seed))?;
    }

    #[test]
    fn merge_candidates_equals_its_twin(shape in Merge::any(), seed in any::<u64>()) {
        held(shape.check("plain", seed))?;
    }

    #[test]
    fn filter_candidates_equals_its_twin(shape in Filter::any(), seed in any::<u64>()) {
        held(shape.check("plain", seed))?;
    }

    #[test]
    fn take_neighbors_equals_its_twin(shape in Neighbors::any(), seed in any::<u64>()) {
        held(shape.check("plain", seed))?;
    }

    #[test]
    fn gather_equals_its_twin(shape in Gather::any(), seed in any::<u64>()) {
        held(shape.check("plain", seed))?;
    }

    #[test]
    fn scores_equal_their_twin(shape in Scoring::any(), seed in any::<u64>()) {
        held(shape.check("plain", seed))?;
    }

    #[test]
    fn assemble_rows_equals_its_twin(shape in Assemble::any(), holes in Holes::any(), seed in any::<u64>()) {
        held(shape.check("plain", seed))?;
        held(holes.check("plain", seed))?;
    }

    #[test]
    fn dense_rank_equals_its_twin(shape in Dense::any(), seed in any::<u64>()) {
        held(shape.check("plain", seed))?;
    }
}

/// Shapes that reach every part of a kernel.
fn check(kernel: &str, variant: &str, seed: u64) -> Result<(), String> {
    let every = [Scores::Many, Scores::Few, Scores::Ascending, Scores::Bits];
    let (scores, odd) = (every[seed as usize / 4 % 4], seed % 2 == 1);
    match kernel {
        "topk_select" => {
            let k = [1024, 100, 7, 300][seed as usize % 4];
            let (spare, with_ids, with_lengths) = (seed as usize / 2 % 2, !odd, seed % 8 == 6);
            Topk { n_rows: 2, n_cols: 9001, spare, n_parts: 1, k, scores, with_ids, with_lengths }.check(variant, seed)
        }
        "partition_merge" => {
            let k = [10, 100, 1000, 64][seed as usize % 4];
            Partitions { n_queries: 2, n_parts: 5, width: 300, k, scores, with_offsets: odd }.check(variant, seed)
        }
        "merge_candidates" => {
            let widths = if odd { [500, 300, 100, 200] } else { [512; 4] };
            Merge { n_requests: 2, widths, n_items: 700, scores }.check(variant, seed)
        }
        "filter_candidates" => {
            let shape = Filter { n_seen: 3, lists_per_seen: 2, width: 1501, n_items: 3000, scores, ..Filter::PLAIN };
            Filter { with_lengths: odd, ..shape }.check(variant, seed)
        }
        "gather_rows" => {
            Gather { n: 200, n_rows: 100, chunks: 5, table_spare: 0, out_spare: 1, widen: odd }.check(variant, seed)
        }
        "scores_f32" | "mask_scores" => {
            let by = [kernels::ScoreBy::InnerProduct, kernels::ScoreBy::Times, kernels::ScoreBy::TwiceLess];
            // A planted bug has the kernel's own piece alone, and both kernels are of one.
            let by = by[seed as usize % 3];
            Scoring {
                n_queries: 37,
                n_rows: 261,
                units: 9,
                spare: 3,
                by,
                narrow: odd,
                with_available: true,
                n_masked: 300,
            }
            .check(variant, seed)
        }
        "assemble_rows" => Assemble::every(seed).check(variant, seed),
        "void_holes" => Holes { n_requests: 3, width: 45, n_items: 50 }.check(variant, seed),
        "dense_rank" => Dense::every(seed).check(variant, seed),
        "take_neighbors" => {
            let (width, k) = ([1024, 700, 40, 9][seed as usize % 4], [1024, 300, 64, 9][seed as usize / 2 % 4]);
            Neighbors { n_lists: 2, width, k, n_rows: 3000, scores, factor: -1.0, with_available: odd }
                .check(variant, seed)
        }
        "apply_changes" | "name_places" | "find_places" => live::check(kernel, variant, seed),
        "copy_columns" | "fill_series" => columns::check(kernel, variant, seed),
        _ => slates::check(kernel, variant, seed),
    }
}

#[test]
fn planted_bugs_are_noticed() {
    let old = [
        "topk_select",
        "partition_merge",
        "merge_candidates",
        "filter_candidates",
        "gather_rows",
        "scores_f32",
        "dense_rank",
        "take_neighbors",
        "assemble_rows",
        "void_holes",
    ];
    let slates = ["exact_scores", "mask_seen", "settle_lists", "fill_columns", "fill_counts", "finish_slates"];
    let live = ["apply_changes", "name_places", "find_places", "copy_columns", "fill_series"];
    for kernel in old.into_iter().chain(slates).chain(live) {
        for seed in 0..16 {
            assert_eq!(check(kernel, "plain", seed), Ok(()), "{kernel}: seed {seed}: without a bug");
        }
    }
    let mut unnoticed = Vec::new();
    for bug in PLANTED {
        let findings: Vec<String> = (0..16).filter_map(|seed| check(bug.kernel, bug.name, seed).err()).collect();
        let wanted = if bug.noticed.is_empty() { "answer: " } else { bug.noticed };
        let noticed = findings.iter().find(|finding| wanted.split('|').any(|words| finding.contains(words)));
        println!("{}: {} of 16 runs: {}", bug.name, findings.len(), noticed.or(findings.first()).map_or("", |f| f));
        unnoticed.extend(noticed.is_none().then_some(bug.name));
    }
    assert!(unnoticed.is_empty(), "not noticed: {unnoticed:?}");
}

#[test]
fn impossible_shapes_are_refused() {
    let gather =
        kernels::Gather { rows: 0, n: 10, table: 16, n_rows: 5, table_stride: 2, chunks: 2, out: 32, out_stride: 2 };
    assert!(kernels::GatherRows(gather).launch().is_ok());
    let refused = |gather: kernels::Gather| kernels::GatherRows(gather).launch().unwrap_err().to_string();
    let refused_all = [
        (kernels::Gather { chunks: 3, ..gather }, "gather_rows: chunks is 3, expected 1 to 2"),
        (kernels::Gather { n: 0, ..gather }, "gather_rows: n * chunks is 0, expected 1 to 4294967295"),
        (kernels::Gather { n: u32::MAX, ..gather }, "gather_rows: n * chunks is 8589934590, expected 1 to 4294967295"),
        (kernels::Gather { table: 8, ..gather }, "gather_rows: the table's address modulo 16 is 8, expected 0 to 0"),
    ];
    for (gather, message) in refused_all {
        assert_eq!(refused(gather), message);
    }
    let topk = |n_cols, stride, k| kernels::TopkSelect {
        scores: 0,
        ids: None,
        lengths: None,
        n_rows: 1,
        n_cols,
        stride,
        n_parts: 1,
        k,
        out_rows: 0,
        out_scores: 0,
    };
    let refused = |n_cols, stride, k| topk(n_cols, stride, k).launch().unwrap_err().to_string();
    assert_eq!(refused(10, 10, 1025), "topk_select: k is 1025, expected 1 to 1024");
    assert_eq!(refused(10, 10, 0), "topk_select: k is 0, expected 1 to 1024");
    assert_eq!(refused(11, 10, 1), "topk_select: n_cols is 11, expected 0 to 10");
    assert_eq!(refused(0, u32::MAX, 1), "topk_select: stride is 4294967295, expected 0 to 2147483647");
    let dense = kernels::dense::DenseRank {
        program: 16,
        params: 16,
        table: None,
        more: kernels::More::default(),
        rows: 16,
        counts: 16,
        columns: 16,
        shared: 16,
        n_requests: 3,
        width: 100,
        block_rows: 64,
        units: 900,
        weight: 1.0,
        first: true,
        scores: 16,
    };
    let launch = dense.launch().unwrap();
    assert_eq!((launch.grid, launch.shared_bytes), ([2, 3, 1], 64 * 900 * 4));
    assert!(kernels::dense::DenseRank { units: 908, ..dense }.launch().is_ok());
    let refused = |dense: kernels::dense::DenseRank| dense.launch().unwrap_err().to_string();
    let refused_all = [
        (kernels::dense::DenseRank { n_requests: 1 << 16, ..dense }, "n_requests is 65536, expected 1 to 65535"),
        (kernels::dense::DenseRank { width: 0, ..dense }, "width is 0, expected 1 to 2147483647"),
        (kernels::dense::DenseRank { block_rows: 72, ..dense }, "block_rows modulo 16 is 8, expected 0 to 0"),
        (kernels::dense::DenseRank { units: 909, ..dense }, "shared memory is 232704, expected 256 to 232448"),
        (kernels::dense::DenseRank { params: 24, ..dense }, "the parameters' address modulo 16 is 8, expected 0 to 0"),
    ];
    for (dense, message) in refused_all {
        assert_eq!(refused(dense), format!("dense_rank: {message}"));
    }
}
