//! Every kernel against its CPU twin over random shapes, and its time against the time of copying what it reads.

use anyhow::{Context as _, Result, ensure};
use half::bf16;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use tastemaker::candidates::{Packed, Scored};
use tastemaker::device::cpu::twins::{self, Lists};
use tastemaker_kernels as kernels;

use crate::dense;
use crate::machine::{Machine, Memory, get, put};
use crate::report::KernelTime;

const NO_ROW: u32 = u32::MAX;

/// The kernels that are checked.
pub const KERNELS: [&str; 11] = [
    "topk_select",
    "partition_merge",
    "merge_candidates",
    "filter_candidates",
    "gather_rows",
    "gather_bf16_as_f32",
    "scores_f32",
    "scores_bf16",
    "mask_scores",
    "take_neighbors",
    "dense_rank",
];

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, got: &[T], want: &[T]) -> Result<()> {
    ensure!(got.len() == want.len(), "{what}: {} of {}", got.len(), want.len());
    match got.iter().zip(want).position(|(got, want)| got != want) {
        Some(at) => anyhow::bail!("{what}[{at}] is {:?}, expected {:?}", got[at], want[at]),
        None => Ok(()),
    }
}

/// Scores of all kinds: all over, few values, or any bits.
fn scores(n: usize, random: &mut SmallRng) -> Vec<f32> {
    const ODD: [f32; 8] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1e-40, -1e-40, f32::MAX];
    let kind = random.random_range(0..3);
    let of = |_| match kind {
        0 => random.random_range(-1.0..1.0),
        1 => [0.0, -0.0, -1.0, -2.0][random.random_range(0..4)],
        _ if random.random() => ODD[random.random_range(0..ODD.len())],
        _ => f32::from_bits(random.random()),
    };
    (0..n).map(of).collect()
}

/// Distinct ids.
fn ids(n: usize, random: &mut SmallRng) -> Vec<u32> {
    let (start, step) = (random.random_range(0..1u32 << 20), [1u32, 3, 7919][random.random_range(0..3)]);
    let mut ids: Vec<u32> = (0..n as u32).map(|at| start + at * step).collect();
    (1..n).for_each(|at| ids.swap(at, random.random_range(0..=at)));
    ids
}

/// Sorted lists with holes at their ends.
fn lists(n_lists: usize, width: usize, random: &mut SmallRng) -> Lists {
    let mut all = Lists::default();
    for _ in 0..n_lists {
        let n = if random.random() { width } else { random.random_range(0..=width) };
        let entries = ids(width, random).into_iter().zip(scores(width, random)).take(n);
        let mut packed: Vec<Packed> = entries.map(|(row, score)| Scored { row, score }.into()).collect();
        packed.sort();
        let list: Vec<Scored> = packed.into_iter().map(Scored::from).collect();
        let hole = Scored { row: NO_ROW, score: f32::NAN };
        for entry in list.into_iter().chain(std::iter::repeat(hole)).take(width) {
            all.rows.push(entry.row);
            all.scores.push(entry.score);
        }
    }
    all
}

fn same_lists(machine: &mut dyn Machine, rows: Memory, values: Memory, want: &Lists) -> Result<()> {
    same("rows", &get::<u32>(machine, rows, want.rows.len())?, &want.rows)?;
    same("scores", &get::<u32>(machine, values, want.scores.len())?, &bits(&want.scores))
}

/// One random shape of `kernel`; `size` bounds it.
///
/// # Errors
/// Where it differs from its twin, or what the machine says.
pub fn check(machine: &mut dyn Machine, kernel: &str, size: usize, seed: u64) -> Result<()> {
    let random = &mut SmallRng::seed_from_u64(seed);
    let done = match kernel {
        "topk_select" => topk(machine, size, random),
        "partition_merge" => partitions(machine, size, random),
        "merge_candidates" => merge(machine, random),
        "filter_candidates" => filter(machine, size, random),
        "gather_rows" => gather(machine, size, random, false),
        "gather_bf16_as_f32" => gather(machine, size, random, true),
        "scores_f32" => score(machine, size, random, false, false),
        "scores_bf16" => score(machine, size, random, true, false),
        "mask_scores" => score(machine, size, random, false, true),
        "take_neighbors" => neighbors(machine, random),
        "dense_rank" => dense::check(machine, size, random),
        _ => anyhow::bail!("there is no {kernel}"),
    };
    machine.clear()?;
    done.with_context(|| format!("{kernel}, --seed {seed}"))
}

/// Scores of a table of f32, or of bf16 if `narrow`; then without those of random pairs if `masked`.
fn score(machine: &mut dyn Machine, size: usize, random: &mut SmallRng, narrow: bool, masked: bool) -> Result<()> {
    use kernels::ScoreBy::{InnerProduct, Times, TwiceLess};
    let (n_queries, n_rows) = (random.random_range(1..70usize), random.random_range(1..=size.min(5000)));
    let (width, by) =
        (4 * random.random_range(1..40usize), [InnerProduct, Times, TwiceLess][random.random_range(0..3)]);
    let mut values = |n: usize| -> Vec<f32> { (0..n).map(|_| random.random_range(-1.0f32..1.0)).collect() };
    let (queries, table, terms) = (values(n_queries * width), values(n_rows * width), values(n_rows));
    let rounded: Vec<u16> = table.iter().map(|&value| bf16::from_f32(value).to_bits()).collect();
    let widen = |&bits: &u16| bf16::from_bits(bits).to_f32();
    let read: Vec<f32> = if narrow { rounded.iter().map(widen).collect() } else { table.clone() };
    let words: Vec<u32> = (0..n_rows.div_ceil(32)).map(|_| random.random()).collect();
    let words = random.random::<bool>().then_some(&words[..]);
    let mut want = twins::scores(&queries, &read, width, (by, &terms), words);
    let out = machine.reserve(4 * n_queries * n_rows)?;
    let shape = kernels::Scores {
        queries: put(machine, &queries)?.address,
        n_queries: n_queries as u32,
        table: if narrow { put(machine, &rounded)?.address } else { put(machine, &table)?.address },
        n_rows: n_rows as u32,
        width: width as u32,
        terms: put(machine, &terms)?.address,
        by,
        available: words.map(|words| put(machine, words)).transpose()?.map(|memory| memory.address),
        scores: out.address,
        stride: n_rows as u32,
    };
    let launch = if narrow { kernels::ScoresBf16(shape).launch()? } else { kernels::ScoresF32(shape).launch()? };
    machine.launch(&launch)?;
    if masked {
        let pair = |_| [random.random_range(0..n_queries as u32 + 2), random.random_range(0..n_rows as u32 + 2)];
        let pairs: Vec<[u32; 2]> = (0..300).map(pair).collect();
        twins::mask_scores(&mut want, &pairs, [n_queries, n_rows, n_rows]);
        let launch = kernels::MaskScores {
            pairs: put(machine, pairs.as_flattened())?.address,
            n: pairs.len() as u32,
            scores: out.address,
            n_queries: n_queries as u32,
            n_rows: n_rows as u32,
            stride: n_rows as u32,
        };
        machine.launch(&launch.launch()?)?;
    }
    same("scores", &get::<u32>(machine, out, want.len())?, &bits(&want))
}

fn any_k(random: &mut SmallRng) -> usize {
    [1, 10, 100, 500, 1024, random.random_range(1..=1024)][random.random_range(0..6)]
}

fn topk(machine: &mut dyn Machine, size: usize, random: &mut SmallRng) -> Result<()> {
    let (n_rows, n_cols) = (random.random_range(1..6), random.random_range(1..=size));
    let (stride, n_parts, k) = (n_cols + random.random_range(0..9usize), random.random_range(1..5), any_k(random));
    let values = scores(n_rows * stride, random);
    let named: Vec<u32> = (0..n_rows).flat_map(|_| ids(stride, random)).collect();
    let long: Vec<u32> = (0..n_rows).map(|_| random.random_range(0..n_cols as u32 + 3)).collect();
    let (named, long) = (random.random::<bool>().then_some(&named[..]), random.random::<bool>().then_some(&long[..]));
    let want = twins::topk_select(&values, named, long, [stride, n_cols, n_parts, k]);
    let values = put(machine, &values)?;
    let named = named.map(|ids| put(machine, ids)).transpose()?;
    let long = long.map(|long| put(machine, long)).transpose()?;
    let [out_rows, out_scores] = [machine.reserve(want.rows.len() * 4)?, machine.reserve(want.rows.len() * 4)?];
    let launch = kernels::TopkSelect {
        scores: values.address,
        ids: named.map(|memory| memory.address),
        lengths: long.map(|memory| memory.address),
        n_rows: n_rows as u32,
        n_cols: n_cols as u32,
        stride: stride as u32,
        n_parts: n_parts as u32,
        k: k as u32,
        out_rows: out_rows.address,
        out_scores: out_scores.address,
    };
    machine.launch(&launch.launch()?)?;
    same_lists(machine, out_rows, out_scores, &want)
}

fn partitions(machine: &mut dyn Machine, size: usize, random: &mut SmallRng) -> Result<()> {
    let (n_queries, n_parts, k) = (random.random_range(1..6), random.random_range(1..9), any_k(random));
    let width = random.random_range(1..=size.min(1500));
    let all = lists(n_queries * n_parts, width, random);
    let offsets: Vec<u32> = (0..n_parts as u32).map(|part| part * 40_000_000).collect();
    let offsets = random.random::<bool>().then_some(&offsets[..]);
    let want = twins::partition_merge(&all, offsets, [n_parts, width, k]);
    let (rows, values) = (put(machine, &all.rows)?, put(machine, &all.scores)?);
    let offsets = offsets.map(|offsets| put(machine, offsets)).transpose()?;
    let [out_rows, out_scores] = [machine.reserve(want.rows.len() * 4)?, machine.reserve(want.rows.len() * 4)?];
    let launch = kernels::PartitionMerge {
        rows: rows.address,
        scores: values.address,
        offsets: offsets.map(|memory| memory.address),
        n_queries: n_queries as u32,
        n_parts: n_parts as u32,
        width: width as u32,
        k: k as u32,
        out_rows: out_rows.address,
        out_scores: out_scores.address,
    };
    machine.launch(&launch.launch()?)?;
    same_lists(machine, out_rows, out_scores, &want)
}

fn neighbors(machine: &mut dyn Machine, random: &mut SmallRng) -> Result<()> {
    let (n_lists, width, k) = (random.random_range(1..6usize), any_k(random), any_k(random));
    let (n_rows, factor) = (random.random_range(1..5000u32), [1.0, -1.0][random.random_range(0..2)]);
    // Some of them again, some that are none.
    let row = |_| match random.random_range(0..20) {
        0 => [-1, i64::MAX, 1 << 32][random.random_range(0..3)],
        _ => i64::from(random.random_range(0..n_rows + n_rows / 8 + 1)),
    };
    let found: Vec<i64> = (0..n_lists * width).map(row).collect();
    let distances = scores(n_lists * width, random);
    let words: Vec<u32> = (0..n_rows.div_ceil(32)).map(|_| random.random()).collect();
    let words = random.random::<bool>().then_some(&words[..]);
    let want = twins::take_neighbors(&found, &distances, [factor, 0.5], [width, k], n_rows, words);
    let [out_rows, out_scores] = [machine.reserve(want.rows.len() * 4)?, machine.reserve(want.rows.len() * 4)?];
    let launch = kernels::TakeNeighbors {
        neighbors: put(machine, &found)?.address,
        distances: put(machine, &distances)?.address,
        factor,
        offset: 0.5,
        n_lists: n_lists as u32,
        width: width as u32,
        n_rows,
        available: words.map(|words| put(machine, words)).transpose()?.map(|memory| memory.address),
        k: k as u32,
        out_rows: out_rows.address,
        out_scores: out_scores.address,
    };
    machine.launch(&launch.launch()?)?;
    same_lists(machine, out_rows, out_scores, &want)
}

/// What merging fills.
struct Merged {
    out_rows: Memory,
    sources: Memory,
    source_scores: Memory,
    source_ranks: Memory,
    counts: Memory,
}

/// Merging of `[rows, scores, lengths]`, and memory for what comes of it.
fn merging(
    machine: &mut dyn Machine,
    [rows, scores, lengths]: [Memory; 3],
    n_requests: usize,
    widths: [usize; 4],
) -> Result<(kernels::Launch, Merged)> {
    let n = n_requests * widths.iter().sum::<usize>();
    let mut reserve = |bytes: usize| machine.reserve(bytes.max(16));
    let merged = Merged {
        out_rows: reserve(4 * n)?,
        sources: reserve(n)?,
        source_scores: reserve(16 * n)?,
        source_ranks: reserve(8 * n)?,
        counts: reserve(4 * n_requests)?,
    };
    let launch = kernels::MergeCandidates {
        rows: rows.address,
        scores: scores.address,
        lengths: lengths.address,
        n_requests: n_requests as u32,
        widths: widths.map(|width| width as u32),
        out_rows: merged.out_rows.address,
        sources: merged.sources.address,
        source_scores: merged.source_scores.address,
        source_ranks: merged.source_ranks.address,
        counts: merged.counts.address,
    };
    Ok((launch.launch()?, merged))
}

fn merge(machine: &mut dyn Machine, random: &mut SmallRng) -> Result<()> {
    let (n_requests, n_items) = (random.random_range(1..6), random.random_range(1..3000usize));
    let widths: [usize; 4] =
        if random.random() { [500, 300, 100, 200] } else { std::array::from_fn(|_| random.random_range(0..=512)) };
    let width: usize = widths.iter().sum();
    let rows: Vec<u32> = (0..n_requests * width).map(|_| random.random_range(0..n_items as u32)).collect();
    let all = Lists { rows, scores: scores(n_requests * width, random) };
    let long = |wide: usize, random: &mut SmallRng| {
        if random.random() { wide as u32 } else { random.random_range(0..wide as u32 + 3) }
    };
    let lengths: Vec<u32> = (0..n_requests * 4).map(|at| long(widths[at % 4], random)).collect();
    let want = twins::merge_candidates(&all, &lengths, widths, n_items);
    let (rows, values, lengths) = (put(machine, &all.rows)?, put(machine, &all.scores)?, put(machine, &lengths)?);
    let n = n_requests * width;
    let (launch, merged) = merging(machine, [rows, values, lengths], n_requests, widths)?;
    machine.launch(&launch)?;
    let Merged { out_rows, sources, source_scores, source_ranks, counts } = merged;
    let out_rows = get::<u32>(machine, out_rows, n)?;
    let sources = get::<u8>(machine, sources, n)?;
    let source_scores = get::<u32>(machine, source_scores, 4 * n)?;
    let source_ranks = get::<u16>(machine, source_ranks, 4 * n)?;
    let counts = get::<u32>(machine, counts, n_requests)?;
    for (at, want) in want.iter().enumerate() {
        let (count, start) = (want.len(), at * width);
        same("counts", &counts[at..=at], &[count as u32])?;
        same("rows", &out_rows[start..start + count], &want.rows)?;
        let sets: Vec<u8> = want.sources.iter().map(|set| set.0).collect();
        same("sources", &sources[start..start + count], &sets)?;
        for source in 0..4 {
            let start = (at * 4 + source) * width;
            same("source_scores", &source_scores[start..start + count], &bits(&want.source_scores[source]))?;
            same("source_ranks", &source_ranks[start..start + count], &want.source_ranks[source])?;
        }
    }
    Ok(())
}

fn filter(machine: &mut dyn Machine, size: usize, random: &mut SmallRng) -> Result<()> {
    let (n_seen, lists_per_seen) = (random.random_range(1..4usize), random.random_range(1..4usize));
    let (width, n_items) = (random.random_range(1..=size.min(4000)), random.random_range(1..5000u32));
    let n_lists = n_seen * lists_per_seen;
    let row = |_| if random.random_ratio(1, 30) { NO_ROW } else { random.random_range(0..n_items + n_items / 8 + 1) };
    let rows: Vec<u32> = (0..n_lists * width).map(row).collect();
    let all = Lists { rows, scores: scores(n_lists * width, random) };
    let words = n_items.div_ceil(32) as usize;
    let available: Vec<u32> = (0..words).map(|_| random.random()).collect();
    let seen: Vec<u32> = (0..words * n_seen).map(|_| random.random()).collect();
    let by_request = Some((&seen[..], lists_per_seen));
    let (want, left) = twins::filter_candidates(&all, None, width, Some(&available), by_request, n_items);
    let (rows, values) = (put(machine, &all.rows)?, put(machine, &all.scores)?);
    let (available, seen) = (put(machine, &available)?, put(machine, &seen)?);
    let n = n_lists * width;
    let [out_rows, out_scores, counts] =
        [machine.reserve(4 * n)?, machine.reserve(4 * n)?, machine.reserve(4 * n_lists)?];
    let launch = kernels::FilterCandidates {
        rows: rows.address,
        scores: values.address,
        lengths: None,
        n_lists: n_lists as u32,
        width: width as u32,
        available: Some(available.address),
        seen: Some(seen.address),
        seen_words: words as u32,
        lists_per_seen: lists_per_seen as u32,
        n_items,
        out_rows: out_rows.address,
        out_scores: out_scores.address,
        counts: counts.address,
    };
    machine.launch(&launch.launch()?)?;
    same("counts", &get::<u32>(machine, counts, n_lists)?, &left)?;
    same_lists(machine, out_rows, out_scores, &want)
}

fn gather(machine: &mut dyn Machine, size: usize, random: &mut SmallRng, widen: bool) -> Result<()> {
    let (n, n_rows, chunks) =
        (random.random_range(1..=size), random.random_range(1..500usize), random.random_range(1..40usize));
    let most = (n_rows + n_rows / 8 + 1) as u32;
    let rows: Vec<u32> = (0..n).map(|_| random.random_range(0..most)).collect();
    let stride = 4 * (chunks + random.random_range(0..3usize));
    let table: Vec<u32> = (0..n_rows * stride).map(|_| random.random()).collect();
    let halves: Vec<u16> = table.iter().map(|&word| word as u16).collect();
    let at = put(machine, &rows)?;
    let held = if widen { put(machine, &halves)? } else { put(machine, &table)? };
    let out = machine.reserve(n * chunks * 16)?;
    let gather = kernels::Gather {
        rows: at.address,
        n: n as u32,
        table: held.address,
        n_rows: n_rows as u32,
        table_stride: stride as u32 / 4,
        chunks: chunks as u32,
        out: out.address,
        out_stride: chunks as u32,
    };
    let width = 4 * chunks;
    let (launch, want) = if widen {
        let table: Vec<bf16> = halves.iter().map(|&half| bf16::from_bits(half)).collect();
        (kernels::Bf16GatherAsF32(gather).launch()?, bits(&twins::gather_bf16_as_f32(&rows, &table, stride, width)))
    } else {
        (kernels::GatherRows(gather).launch()?, twins::gather_rows(&rows, &table, stride, width))
    };
    machine.launch(&launch)?;
    same("values", &get::<u32>(machine, out, want.len())?, &want)
}

/// Median seconds of `repeats` runs, each of as many launches as take a millisecond or more.
///
/// # Errors
/// What the machine says.
pub fn median(
    machine: &mut dyn Machine,
    repeats: usize,
    work: &mut dyn FnMut(&mut dyn Machine) -> Result<()>,
) -> Result<f64> {
    let once = machine.seconds(work)?;
    let n = ((1e-3 / once.max(1e-7)).ceil() as usize).clamp(1, 1000);
    let mut all = Vec::new();
    for _ in 0..repeats {
        all.push(machine.seconds(&mut |machine| (0..n).try_for_each(|_| work(machine)))? / n as f64);
    }
    all.sort_by(f64::total_cmp);
    Ok(all[all.len() / 2])
}

/// Bytes a second that a copy within the machine's memory reads (and writes as many): what a kernel that reads memory once is held to.
///
/// # Errors
/// What the machine says.
pub fn copy_bandwidth(machine: &mut dyn Machine, bytes: usize) -> Result<f64> {
    let (from, to) = (machine.reserve(bytes)?, machine.reserve(bytes)?);
    let seconds = median(machine, 9, &mut |machine| machine.copy(from, to))?;
    machine.clear()?;
    Ok(bytes as f64 / seconds)
}

/// Times of the kernels at the shapes of serving: `n_rows` queries over `n_cols` scores, lists of `batch` requests.
///
/// `copied` is [`copy_bandwidth`]; traffic is what is read and written at least, and the floor the time in which a copy moves as much.
///
/// # Errors
/// What the machine says.
pub fn bench(machine: &mut dyn Machine, copied: f64, [n_rows, n_cols, batch]: [usize; 3]) -> Result<Vec<KernelTime>> {
    let (random, mut all) = (&mut SmallRng::seed_from_u64(1), Vec::new());
    let mut note = |kernel: &str, shape: String, seconds: f64, bytes: usize| {
        let floor = bytes as f64 / (2.0 * copied);
        all.push(KernelTime {
            kernel: kernel.into(),
            shape,
            seconds,
            bytes: bytes as u64,
            of_copy: floor / seconds,
            flops: 0,
        });
    };
    let row: Vec<f32> = (0..n_cols).map(|_| random.random()).collect();
    let values = machine.reserve(n_rows * n_cols * 4)?;
    let one = put(machine, &row)?;
    for at in 0..n_rows {
        machine.copy(one, Memory { address: values.address + (at * n_cols * 4) as u64, bytes: n_cols * 4 })?;
    }
    for k in [10u32, 100, 500, 1024] {
        let [out_rows, out_scores] =
            [machine.reserve(n_rows * k as usize * 4)?, machine.reserve(n_rows * k as usize * 4)?];
        let launch = kernels::TopkSelect {
            scores: values.address,
            ids: None,
            lengths: None,
            n_rows: n_rows as u32,
            n_cols: n_cols as u32,
            stride: n_cols as u32,
            n_parts: 1,
            k,
            out_rows: out_rows.address,
            out_scores: out_scores.address,
        };
        let launch = launch.launch()?;
        let seconds = median(machine, 9, &mut |machine| machine.launch(&launch))?;
        note(
            "topk_select",
            format!("{n_rows} x {n_cols}, k {k}"),
            seconds,
            n_rows * n_cols * 4 + n_rows * k as usize * 8,
        );
    }
    machine.clear()?;

    let (n_parts, width, k) = (8usize, 500usize, 500usize);
    let few = lists(n_parts, width, random);
    let (rows, held): (Vec<u32>, Vec<f32>) = (few.rows.repeat(batch), few.scores.repeat(batch));
    let (rows, held) = (put(machine, &rows)?, put(machine, &held)?);
    let [out_rows, out_scores] = [machine.reserve(batch * k * 4)?, machine.reserve(batch * k * 4)?];
    let launch = kernels::PartitionMerge {
        rows: rows.address,
        scores: held.address,
        offsets: None,
        n_queries: batch as u32,
        n_parts: n_parts as u32,
        width: width as u32,
        k: k as u32,
        out_rows: out_rows.address,
        out_scores: out_scores.address,
    };
    let launch = launch.launch()?;
    let seconds = median(machine, 9, &mut |machine| machine.launch(&launch))?;
    note("partition_merge", format!("{batch} x 8 lists of 500, k 500"), seconds, batch * 8 * (n_parts * width + k));
    machine.clear()?;

    let widths = [500usize, 300, 100, 200];
    let width: usize = widths.iter().sum();
    let rows: Vec<u32> = (0..batch * width).map(|_| random.random_range(0..1_000_000)).collect();
    let held: Vec<f32> = (0..batch * width).map(|_| random.random()).collect();
    let lengths: Vec<u32> = (0..batch * 4).map(|at| widths[at % 4] as u32).collect();
    let (rows, held, lengths) = (put(machine, &rows)?, put(machine, &held)?, put(machine, &lengths)?);
    let n = batch * width;
    let (launch, _) = merging(machine, [rows, held, lengths], batch, widths)?;
    let seconds = median(machine, 9, &mut |machine| machine.launch(&launch))?;
    note("merge_candidates", format!("{batch} x 1100"), seconds, n * (8 + 4 + 1 + 16 + 8));

    let words = 1_000_000usize.div_ceil(32);
    let (available, seen) = (put(machine, &vec![!0u32; words])?, put(machine, &vec![0u32; words * batch])?);
    let [left, left_scores, counts] = [machine.reserve(4 * n)?, machine.reserve(4 * n)?, machine.reserve(4 * batch)?];
    let launch = kernels::FilterCandidates {
        rows: rows.address,
        scores: held.address,
        lengths: None,
        n_lists: batch as u32,
        width: width as u32,
        available: Some(available.address),
        seen: Some(seen.address),
        seen_words: words as u32,
        lists_per_seen: 1,
        n_items: 1_000_000,
        out_rows: left.address,
        out_scores: left_scores.address,
        counts: counts.address,
    };
    let launch = launch.launch()?;
    let seconds = median(machine, 9, &mut |machine| machine.launch(&launch))?;
    // Words of the bitsets come in sectors of 32 bytes.
    note("filter_candidates", format!("{batch} x 1100 of 1 M items"), seconds, n * (16 + 64));

    let (dim, table_rows) = (128usize, 1_000_000usize.min(n_cols));
    let table = machine.reserve(table_rows * dim * 4)?;
    let out = machine.reserve(n * dim * 4)?;
    let gather = kernels::Gather {
        rows: rows.address,
        n: n as u32,
        table: table.address,
        n_rows: table_rows as u32,
        table_stride: dim as u32 / 4,
        chunks: dim as u32 / 4,
        out: out.address,
        out_stride: dim as u32 / 4,
    };
    let launch = kernels::GatherRows(gather).launch()?;
    let seconds = median(machine, 9, &mut |machine| machine.launch(&launch))?;
    note("gather_rows", format!("{n} rows of 512 bytes"), seconds, n * (4 + 2 * dim * 4));
    machine.clear()?;
    all.extend(dense::bench(machine, copied, [n_cols, batch])?);
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::emulated::Emulated;

    #[test]
    fn kernels_in_the_emulator_equal_their_twins() {
        for seed in 0..12 {
            let mut machine = Emulated::default();
            machine.seed = seed;
            for kernel in KERNELS {
                check(&mut machine, kernel, 700, seed).unwrap();
            }
        }
        let said = check(&mut Emulated::default(), "sort", 10, 1).unwrap_err().to_string();
        assert_eq!(said, "there is no sort");
    }

    #[test]
    fn times_are_taken_of_every_shape() {
        let machine = &mut Emulated::default();
        let copied = copy_bandwidth(machine, 1 << 16).unwrap();
        let times = bench(machine, copied, [2, 3000, 2]).unwrap();
        let kernels: Vec<&str> = times.iter().map(|time| time.kernel.as_str()).collect();
        assert_eq!(
            kernels[3..8],
            ["topk_select", "partition_merge", "merge_candidates", "filter_candidates", "gather_rows"]
        );
        assert_eq!(kernels[8..], ["dense_rank"; 7]);
        assert!(times[10].shape.ends_with("bf16, int8 table") && times[10].bytes < times[9].bytes, "{times:?}");
        assert!(times[8..].iter().all(|time| time.flops > 0), "{times:?}");
        assert!(times.iter().all(|time| time.seconds > 0.0 && time.of_copy > 0.0 && time.bytes > 0), "{times:?}");
    }
}
