//! cuVS against the CPU's exact search, and its speed and recall.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use rayon::prelude::*;
use tastemaker::catalog::generation::{Matrix, MatrixData, Metric};
use tastemaker::device::cuda::cuvs::{Index, Kind, Neighbors, Options, Resources, Rows, Scale, Search, Value, Walk};
use tastemaker::index::{BruteForce, Exact, Filter, Hnsw, Kernel, SearchParams, SearchScratch, VectorIndex};

use crate::machine::{Machine, Memory, get, put};
use crate::report::{Agreement, SearchSpeed};

/// What a set of vectors looks like: `n` around `n_centers` random points, as embeddings are.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Vectors.
    pub n: usize,
    /// Dimension.
    pub dim: usize,
    /// Points that they lie around.
    pub n_centers: usize,
}

impl Shape {
    /// f32 `[n, dim]` and, of the same kind, `[n_queries, dim]`.
    pub fn draw(self, n_queries: usize, seed: u64) -> (Vec<f32>, Vec<f32>) {
        let centers: Vec<f32> = {
            let random = &mut SmallRng::seed_from_u64(seed);
            (0..self.n_centers * self.dim).map(|_| random.random_range(-1.0..1.0)).collect()
        };
        let fill = |n: usize, seed: u64| {
            let mut values = vec![0.0f32; n * self.dim];
            values.par_chunks_mut(self.dim).enumerate().for_each(|(at, vector)| {
                let random = &mut SmallRng::seed_from_u64(seed ^ (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
                let center = random.random_range(0..self.n_centers) * self.dim;
                for (value, center) in vector.iter_mut().zip(&centers[center..]) {
                    // Nearly normal: a sum of four.
                    let noise: f32 = (0..4).map(|_| random.random_range(-0.5f32..0.5)).sum();
                    *value = center + noise;
                }
            });
            values
        };
        (fill(self.n, seed.wrapping_add(1)), fill(n_queries, seed.wrapping_add(2)))
    }
}

/// What the CPU finds, exactly: row and score, best first, for each query.
pub fn oracle(matrix: &Matrix, metric: Metric, queries: &[f32], filter: Filter<'_>, k: usize) -> Vec<Vec<(u32, f32)>> {
    let index = BruteForce::over(Exact::new(matrix.clone(), metric, Kernel::detect()));
    let one = |query: &[f32]| {
        let (mut out, mut scratch) = (Vec::new(), SearchScratch::default());
        index.search(query, k, filter, &SearchParams::default(), &mut scratch, &mut out);
        out.into_iter().map(|found| (found.row, found.score)).collect()
    };
    queries.par_chunks(matrix.dim).map(one).collect()
}

/// The share of `want` that was found.
pub fn recall<'a>(got: impl Iterator<Item = &'a [i64]>, want: &[Vec<u32>]) -> f64 {
    let (mut found, mut all) = (0, 0);
    for (got, want) in got.zip(want) {
        let mut got: Vec<i64> = got.to_vec();
        got.sort_unstable();
        found += want.iter().filter(|&&row| got.binary_search(&i64::from(row)).is_ok()).count();
        all += want.len();
    }
    found as f64 / all.max(1) as f64
}

/// A search whose buffers are there.
struct Asked {
    queries: Memory,
    rows: Memory,
    distances: Memory,
    k: u32,
}

impl Asked {
    fn new(machine: &mut dyn Machine, queries: Memory, n_queries: usize, k: u32) -> Result<Asked> {
        let n = n_queries * k as usize;
        Ok(Asked { queries, rows: machine.reserve(n * 8)?, distances: machine.reserve(n * 4)?, k })
    }

    /// Puts the search for the first `n_queries` on the stream.
    fn run(
        &self,
        index: &Index,
        resources: &mut Resources,
        n_queries: usize,
        params: &SearchParams,
        filter: Option<Memory>,
    ) -> Result<()> {
        let search = Search {
            queries: self.queries.address,
            n_queries: n_queries as u32,
            k: self.k,
            params,
            walk: Walk::Auto,
            filter: filter.map(|memory| memory.address),
        };
        let out = Neighbors { rows: self.rows.address, distances: self.distances.address };
        // SAFETY: the buffers were reserved for as many queries and results, and are used on this stream alone.
        Ok(unsafe { index.search(resources, &search, out) }?)
    }
}

fn options(kind: Kind, n: usize, dim: usize) -> Options {
    let n_lists = ((4.0 * (n as f64).sqrt()) as u32).clamp(1, n as u32);
    match kind {
        Kind::BruteForce => Options::BruteForce,
        Kind::IvfFlat => Options::IvfFlat { n_lists, kmeans_n_iters: 10 },
        Kind::IvfPq => {
            let pq_dim = (dim as u32 / 2).next_multiple_of(8);
            Options::IvfPq { n_lists, kmeans_n_iters: 10, pq_dim, pq_bits: 8 }
        }
        Kind::Cagra => Options::Cagra { graph_degree: 64, intermediate_graph_degree: 128 },
    }
}

/// The least recall at the highest effort. Codes are approximate by nature; graphs of inner products miss some.
fn floor(kind: Kind, metric: Metric) -> f64 {
    match (kind, metric) {
        (Kind::BruteForce | Kind::IvfFlat, _) => 0.999,
        (Kind::IvfPq, _) => 0.6,
        (Kind::Cagra, Metric::InnerProduct) => 0.7,
        (Kind::Cagra, _) => 0.95,
    }
}

const KINDS: [Kind; 4] = [Kind::BruteForce, Kind::IvfFlat, Kind::IvfPq, Kind::Cagra];
const METRICS: [Metric; 3] = [Metric::InnerProduct, Metric::Cosine, Metric::L2];

/// Holds every kind and metric against the CPU's exact search on fresh vectors: rows, scores, filters, vectors that came later, and the
/// graph of `cagra` walked on the CPU. What fails is among the results, and the others go on.
pub fn check(machine: &mut dyn Machine, resources: &mut Resources, shape: Shape, seed: u64) -> Vec<Agreement> {
    let mut all = Vec::new();
    for (kind, metric) in KINDS.into_iter().flat_map(|kind| METRICS.map(|metric| (kind, metric))) {
        let one = check_one(machine, resources, shape, (kind, metric), seed, &mut all);
        if let Err(error) = one.and_then(|()| machine.clear()) {
            let index = format!("{}, {metric:?}", kind.name());
            let (what, floor) = (format!("failed, --seed {seed}: {error:#}"), floor(kind, metric));
            all.push(Agreement { index, what, recall: 0.0, floor, score_off: 0.0, is_same: false });
        }
    }
    all
}

/// What is compared, of one kind and metric.
struct Trial<'a> {
    kind: Kind,
    metric: Metric,
    queries: &'a [f32],
    held: Memory,
    effort: SearchParams,
}

impl Trial<'_> {
    /// Recall, and the largest difference of a score.
    fn compare(
        &self,
        (machine, resources): (&mut dyn Machine, &mut Resources),
        index: &Index,
        matrix: &Matrix,
        k: u32,
        words: Option<&[u32]>,
    ) -> Result<(f64, f32)> {
        let n_queries = self.queries.len() / matrix.dim;
        let asked = Asked::new(machine, self.held, n_queries, k)?;
        let filter = words.map(|words| put(machine, words)).transpose()?;
        asked.run(index, resources, n_queries, &self.effort, filter)?;
        resources.synchronize()?;
        let n = n_queries * k as usize;
        let (rows, distances) = (get::<i64>(machine, asked.rows, n)?, get::<f32>(machine, asked.distances, n)?);
        let admits = |row: u32| words.is_none_or(|words| words[row as usize / 32] >> (row % 32) & 1 == 1);
        let filter = if words.is_some() { Filter::predicate(&admits) } else { Filter::ALL };
        let want = oracle(matrix, self.metric, self.queries, filter, k as usize);
        let (scale, exact) = (Scale::of(self.metric), Exact::new(matrix.clone(), self.metric, Kernel::detect()));
        let (mut off, mut converted) = (0.0f32, Vec::new());
        let lists = rows.chunks(k as usize).zip(distances.chunks(k as usize));
        for (query, (rows, distances)) in self.queries.chunks(matrix.dim).zip(lists) {
            // Rows that the index does not have fill lists that are not full.
            let found = rows.iter().zip(distances).filter(|(row, _)| (0..matrix.n_rows() as i64).contains(row));
            let (rows, distances): (Vec<u32>, Vec<f32>) = found.map(|(&row, &d)| (row as u32, d)).unzip();
            let excluded = rows.iter().find(|&&row| !admits(row));
            ensure!(excluded.is_none(), "row {excluded:?} came back, which the filter excludes");
            let mut scores = Vec::new();
            exact.scores(query, &rows, &mut converted, &mut scores);
            for (score, distance) in scores.into_iter().zip(distances) {
                off = off.max((scale.score(distance) - score).abs() / (1.0 + score.abs()));
            }
        }
        Ok((recall(rows.chunks(k as usize), &rows_of(&want)), off))
    }
}

/// Their rows.
pub fn rows_of(lists: &[Vec<(u32, f32)>]) -> Vec<Vec<u32>> {
    lists.iter().map(|list| list.iter().map(|found| found.0).collect()).collect()
}

fn check_one(
    machine: &mut dyn Machine,
    resources: &mut Resources,
    shape: Shape,
    (kind, metric): (Kind, Metric),
    seed: u64,
    all: &mut Vec<Agreement>,
) -> Result<()> {
    let (n_queries, n_first) = (24, shape.n - shape.n / 10);
    let (values, queries) = shape.draw(n_queries, seed);
    let matrix = |values: &[f32]| Matrix { dim: shape.dim, data: MatrixData::F32(values.to_vec().into()) };
    let (first, whole) = (matrix(&values[..n_first * shape.dim]), matrix(&values));
    let (data, held) = (put(machine, &values)?, put(machine, &queries)?);
    let dim = shape.dim as u64;
    // SAFETY: the vectors were just written, and stay until `clear`, before which the index goes.
    let rows = |n: usize| unsafe { Rows::new(data.address, [n as u64, dim], Value::F32, Arc::new(())) };
    let chosen = options(kind, n_first, shape.dim);
    // SAFETY: the machine's context is current on this thread, the only one.
    let mut index = unsafe { Index::build(resources, chosen, metric, rows(n_first)?) }?;
    let effort = SearchParams { n_probes: Some(65_536), ef_search: Some(1024), refine_ratio: None };
    let trial = Trial { kind, metric, queries: &queries, held, effort };
    let mut note = |what: String, (recall, off): (f64, f32)| {
        let floor = floor(trial.kind, metric);
        // Sums of products in another order; codes give no exact scores.
        let is_same = recall >= floor && (off <= 2e-3 || kind == Kind::IvfPq);
        let index = format!("{}, {metric:?}", kind.name());
        all.push(Agreement { index, what, recall, floor, score_off: f64::from(off), is_same });
    };
    for k in [10u32, 100, 500].into_iter().filter(|&k| k as usize <= n_first) {
        note(format!("k {k}"), trial.compare((machine, resources), &index, &first, k, None)?);
        if kind.filters() {
            let random = &mut SmallRng::seed_from_u64(seed);
            let words: Vec<u32> = (0..n_first.div_ceil(32)).map(|_| random.random()).collect();
            let found = trial.compare((machine, resources), &index, &first, k, Some(&words))?;
            note(format!("k {k}, half of the rows"), found);
        }
    }
    let (ids, k) = ((n_first as i64..shape.n as i64).collect::<Vec<_>>(), 100.min(n_first as u32));
    let ids = put(machine, &ids)?;
    // SAFETY: as above; the new rows lie behind the first.
    unsafe { index.extend(resources, rows(shape.n)?, ids.address) }?;
    let found = trial.compare((machine, resources), &index, &whole, k, None)?;
    note(format!("k {k}, a tenth came later"), found);
    if kind == Kind::Cagra {
        let graph = index.graph()?;
        let links = graph.n as usize * graph.degree as usize;
        let held = Memory { address: graph.address, bytes: links * 4 };
        let (degree, links) = (graph.degree, get::<u32>(machine, held, links)?);
        let exact = Exact::new(whole.clone(), metric, Kernel::detect());
        let walked = Hnsw::from_graph(links.clone().into(), degree, exact).map_err(anyhow::Error::msg)?;
        let (mut scratch, mut got) = (SearchScratch::default(), Vec::new());
        for query in queries.chunks(shape.dim) {
            let mut out = Vec::new();
            walked.search(query, k as usize, Filter::ALL, &effort, &mut scratch, &mut out);
            got.push(out.into_iter().map(|found| i64::from(found.row)).collect::<Vec<_>>());
        }
        let want = rows_of(&oracle(&whole, metric, &queries, Filter::ALL, k as usize));
        let share = recall(got.iter().map(Vec::as_slice), &want);
        note(format!("k {k}, its graph walked on the CPU"), (share, 0.0));
        // SAFETY: as above.
        let again = unsafe { Index::of_graph(resources, metric, rows(shape.n)?, &links, degree) }?;
        let found = trial.compare((machine, resources), &again, &whole, k, None)?;
        note(format!("k {k}, its graph given back"), found);
    }
    Ok(())
}

/// What is measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The vectors.
    pub shape: Shape,
    /// Results.
    pub ks: Vec<u32>,
    /// Queries at a time; the largest is the number of queries by which recall is judged.
    pub batches: Vec<usize>,
    /// No search is begun after this.
    pub until: Instant,
    /// For each batch.
    pub each: Duration,
}

/// Efforts of a kind for `k`, least first, with their names in the report.
fn efforts(kind: Kind, k: u32) -> Vec<(String, SearchParams)> {
    let with = |n_probes: Option<u32>, ef_search: Option<u32>| SearchParams { n_probes, ef_search, refine_ratio: None };
    match kind {
        Kind::BruteForce => vec![("exact".into(), with(None, None))],
        Kind::IvfFlat | Kind::IvfPq => [16, 64, 256].map(|n| (format!("n_probes {n}"), with(Some(n), None))).into(),
        Kind::Cagra => {
            let least = k.next_multiple_of(32).max(64);
            let mut sizes = vec![least, (2 * least).min(1024).max(least), 1024.max(least)];
            sizes.dedup();
            sizes.into_iter().map(|n| (format!("itopk_size {n}"), with(None, Some(n)))).collect()
        }
    }
}

/// A set of vectors that is measured.
struct Bench<'a> {
    plan: &'a Plan,
    dataset: String,
    rows: Rows,
    held: Memory,
    n_queries: usize,
    /// The best rows of each query.
    truth: Vec<Vec<u32>>,
    progress: &'a mut dyn FnMut(String),
    all: Vec<SearchSpeed>,
}

/// Speed and recall (against cuVS's own exact search, of which some queries are held against the CPU) for L2. `progress` is told of
/// each index, and of what fails or is left out, in lines that begin with `note: `.
///
/// # Errors
/// What cuVS or the machine says of the exact search, or one that is wrong: without it there is nothing to compare with.
pub fn bench(
    machine: &mut dyn Machine,
    resources: &mut Resources,
    plan: &Plan,
    seed: u64,
    progress: &mut dyn FnMut(String),
) -> Result<Vec<SearchSpeed>> {
    let Shape { n, dim, .. } = plan.shape;
    let n_queries = plan.batches.iter().copied().max().unwrap_or(1);
    let (values, queries) = plan.shape.draw(n_queries, seed);
    let (data, held) = (put(machine, &values)?, put(machine, &queries)?);
    // SAFETY: as in `check_one`.
    let rows = unsafe { Rows::new(data.address, [n as u64, dim as u64], Value::F32, Arc::new(())) }?;
    let few = 4.min(n_queries);
    let most = plan.ks.iter().copied().max().unwrap_or(1) as usize;
    let matrix = Matrix { dim, data: MatrixData::F32(values.into()) };
    let exactly = rows_of(&oracle(&matrix, Metric::L2, &queries[..few * dim], Filter::ALL, most));
    drop(matrix);
    let dataset = format!("{n} x {dim}");
    let mut bench = Bench { plan, dataset, rows, held, n_queries, truth: Vec::new(), progress, all: Vec::new() };
    for kind in KINDS {
        let measured = bench.measure(machine, resources, kind, &exactly);
        match measured {
            Err(error) if kind == Kind::BruteForce => return Err(error),
            Err(error) => (bench.progress)(format!("note: {}: {}: {error:#}", bench.dataset, kind.name())),
            Ok(()) => {}
        }
    }
    let all = bench.all;
    machine.clear()?;
    Ok(all)
}

impl Bench<'_> {
    fn measure(
        &mut self,
        machine: &mut dyn Machine,
        resources: &mut Resources,
        kind: Kind,
        exactly: &[Vec<u32>],
    ) -> Result<()> {
        let Plan { shape: Shape { n, dim, .. }, until, each, .. } = *self.plan;
        let (n_queries, held, dataset) = (self.n_queries, self.held, self.dataset.clone());
        let begun = Instant::now();
        if begun > until {
            // Not made, either: that takes longest.
            (self.progress)(format!("note: {dataset}: {}: the time is over", kind.name()));
            return Ok(());
        }
        // SAFETY: as in `check_one`.
        let index = unsafe { Index::build(resources, options(kind, n, dim), Metric::L2, self.rows.clone()) }?;
        let build_seconds = begun.elapsed().as_secs_f64();
        (self.progress)(format!("{dataset}: {} built in {build_seconds:.1} s", kind.name()));
        if kind == Kind::BruteForce {
            let most = exactly.first().map_or(1, Vec::len);
            let asked = Asked::new(machine, held, n_queries, most as u32)?;
            asked.run(&index, resources, n_queries, &SearchParams::default(), None)?;
            resources.synchronize()?;
            let found = get::<i64>(machine, asked.rows, n_queries * most)?;
            let share = recall(found.chunks(most).take(exactly.len()), exactly);
            ensure!(share >= 0.999, "{dataset}: the exact search finds {share:.4} of what the CPU finds");
            self.truth = found.chunks(most).map(|rows| rows.iter().map(|&row| row as u32).collect()).collect();
        }
        for &k in &self.plan.ks {
            let asked = Asked::new(machine, held, n_queries, k)?;
            let best: Vec<Vec<u32>> = self.truth.iter().map(|list| list[..k as usize].to_vec()).collect();
            for (effort, params) in efforts(kind, k) {
                if Instant::now() > until {
                    (self.progress)(format!("note: {dataset}: {}, k {k}, {effort}: the time is over", kind.name()));
                    continue;
                }
                // Also what cuVS compiles and allocates when it first needs it.
                asked.run(&index, resources, n_queries, &params, None)?;
                resources.synchronize()?;
                let found = get::<i64>(machine, asked.rows, n_queries * k as usize)?;
                let recall = recall(found.chunks(k as usize), &best);
                for &batch in &self.plan.batches {
                    let (mut times, end) = (Vec::new(), Instant::now() + each);
                    while times.len() < 4 || (Instant::now() < end && times.len() < 2000) {
                        let begun = Instant::now();
                        asked.run(&index, resources, batch, &params, None)?;
                        resources.synchronize()?;
                        times.push(begun.elapsed().as_secs_f64());
                    }
                    // The first compiles what is of this batch alone.
                    times.remove(0);
                    times.sort_by(f64::total_cmp);
                    let seconds = times[times.len() / 2];
                    self.all.push(SearchSpeed {
                        dataset: dataset.clone(),
                        kind: kind.name().into(),
                        k,
                        effort: effort.clone(),
                        batch,
                        recall,
                        seconds,
                        queries_per_second: batch as f64 / seconds,
                        build_seconds,
                    });
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use tastemaker::device::cuda::cuvs::Cuvs;

    use super::*;
    use crate::machine::emulated::Emulated;

    /// The stand-in for cuVS over the host's memory; `None`, visibly, where there is no C compiler.
    fn fake() -> Option<&'static Cuvs> {
        let folder = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../src/device/cuda/cuvs/fake.c");
        let cc = std::env::var("CC").unwrap_or_else(|_| "cc".into());
        let ran = Command::new(&cc)
            .args(["-shared", "-fPIC", "-w", "-O2"])
            .arg(source)
            .arg("-o")
            .arg(folder.path().join("libcuvs_c.so"))
            .args(["-lm", "-ldl"])
            .status();
        match ran {
            Ok(status) => assert!(status.success()),
            Err(error) => {
                use std::io::Write as _;
                // Not by `eprintln!`, which the test harness keeps to itself.
                let _ = writeln!(std::io::stderr(), "SKIPPED: {cc}: {error}");
                return None;
            }
        }
        Some(Cuvs::load(Some(folder.path())).unwrap())
    }

    const SMALL: Shape = Shape { n: 700, dim: 8, n_centers: 20 };

    #[test]
    fn an_exact_library_agrees_everywhere() {
        let Some(cuvs) = fake() else { return };
        let machine = &mut Emulated::default();
        // SAFETY: the stand-in has no streams.
        let resources = &mut unsafe { Resources::new(cuvs, machine.stream(), 0) }.unwrap();
        let all = check(machine, resources, SMALL, 5);
        assert!(all.len() > 60, "{}", all.len());
        // The stand-in's graph links nearest neighbours only, and a walk may not come everywhere.
        for agreement in all.iter().filter(|agreement| !agreement.what.contains("walked")) {
            assert!(agreement.is_same && agreement.recall > 0.999 && agreement.score_off < 1e-3, "{agreement:?}");
        }
    }

    #[test]
    fn speed_and_recall_are_reported_of_every_effort() {
        let Some(cuvs) = fake() else { return };
        let machine = &mut Emulated::default();
        // SAFETY: the stand-in has no streams.
        let resources = &mut unsafe { Resources::new(cuvs, machine.stream(), 0) }.unwrap();
        let until = Instant::now() + Duration::from_secs(600);
        let plan = Plan { shape: SMALL, ks: vec![1, 40], batches: vec![1, 3], until, each: Duration::ZERO };
        let mut said = Vec::new();
        let all = bench(machine, resources, &plan, 3, &mut |line| said.push(line)).unwrap();
        let efforts = 2 * (1 + 3 + 3) + [1u32, 40].map(|k| efforts(Kind::Cagra, k).len()).iter().sum::<usize>();
        assert_eq!((all.len(), said.len()), (efforts * 2, 4));
        assert!(all.iter().all(|s| s.recall > 0.999 && s.queries_per_second > 0.0), "{all:?}");
        // Out of time: said, not silently left out.
        let plan = Plan { until: Instant::now() - Duration::from_secs(1), ..plan };
        said.clear();
        assert!(bench(machine, resources, &plan, 3, &mut |line| said.push(line)).unwrap().is_empty());
        assert_eq!(said.iter().filter(|line| line.ends_with(": the time is over")).count(), KINDS.len());
    }

    #[test]
    fn recall_counts_what_was_found() {
        let got = [vec![3, 1, i64::MAX], vec![5, 6, 7]];
        let want = [vec![1, 2, 3], vec![7, 8, 9]];
        assert_eq!(recall(got.iter().map(Vec::as_slice), &want), 0.5);
    }
}
