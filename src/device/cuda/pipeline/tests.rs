//! Slates of the whole pipeline on the emulated driver, beside the CPU engine's.

use std::time::Duration;

use proptest::prelude::*;
use rten::ThreadPool;
use tastemaker_kernels::{MAX_K, RowKind};

use super::super::emulated::Emulated;
use super::super::engine::{Cuda, CudaDevice, testing as engine};
use super::super::ranker::{DeviceRanker, RankerOptions, StreamRanker};
use super::super::stream::{Part, PartMut};
use super::super::tensorrt::assembled::{Assembled, OnStream, RowScorer};
use super::*;
use crate::catalog::cooccurrence;
use crate::catalog::generation::{Generation, Interaction, NO_CODE, RankedList, RankerModel, testing};
use crate::catalog::text::TextIndex;
use crate::context::Deadline;
use crate::device::cpu::apart_testing;
use crate::device::{Device, Storage, TableStorage};
use crate::ranking::dense::Model;
use crate::ranking::manifest::{Engine, RankerManifest};
use crate::ranking::onnx::OnnxRanker;
use crate::ranking::precision::{Fidelity, Report, Wanted};
use crate::ranking::{RankError, Ranker as CpuRanker, recognise};
use crate::rerank::{RerankConfig, Reranker};
use crate::state::change::{Change, Value};
use crate::state::items::Catalogue;

/// Columns of each ranker, and the request's: what a candidate scores is the product of both, summed up as the device's kernel does it.
const COLUMNS: [[&str; 8]; 3] = [
    [
        "cross.dot",
        "cross.cooccurrence_sum",
        "candidate.ann.rank",
        "cross.cooccurrence_max",
        "cross.cooccurrence_count",
        "cross.cooccurrence_mean",
        "cross.cooccurrence_top3",
        "candidate.trending.present",
    ],
    [
        "candidate.search.score",
        "cross.overlap.tags",
        "candidate.trending.score",
        "cross.same_creator",
        "candidate.collaborative.rank",
        "candidate.ann.score",
        "cross.same_category",
        "cross.overlap.genre",
    ],
    [
        "cross.series_gap",
        "item.price",
        "cross.dot",
        "cross.next_in_series",
        "candidate.ann.rank",
        "cross.same_series",
        "item.popularity",
        "cross.same_creator",
    ],
];
const REQUEST: [&str; 8] =
    ["context.a", "context.b", "context.c", "context.d", "context.e", "context.f", "context.g", "context.h"];

/// On the CPU.
struct Product;

impl CpuRanker for Product {
    fn name(&self) -> &str {
        "product"
    }

    fn report(&self) -> Report {
        Report::other("product", None)
    }

    fn score(&mut self, inputs: &[Vec<f32>], n: usize, scores: &mut Vec<f32>) -> Result<(), RankError> {
        scores.clear();
        let line = |line: &[f32]| inputs[0].iter().zip(line).fold(0f32, |sum, (q, x)| q.mul_add(*x, sum));
        scores.extend(inputs[1].chunks_exact(8).take(n).map(line));
        Ok(())
    }
}

/// The same on the device: the kernel that scores all rows of a table for queries, a request's own columns being the table.
struct OnDevice;

impl ResidentRanker for OnDevice {
    fn shared_width(&self) -> usize {
        8
    }

    fn columns_width(&self) -> usize {
        8
    }

    fn bytes(&self, _: usize) -> [u64; 2] {
        [0, 0]
    }

    fn on(self: Arc<Self>, _: &Stream, _: usize) -> Result<Box<dyn WorkerRanker>, DeviceError> {
        Ok(Box::new(OnDevice))
    }
}

impl WorkerRanker for OnDevice {
    fn enqueue(&mut self, stream: &Stream, batch: RankBatch<'_>, scores: PartMut<'_, f32>) -> Result<(), DeviceError> {
        let mut rest = scores;
        for request in 0..batch.n_requests {
            let (own, behind) = rest.split_at(batch.width);
            rest = behind;
            let lines = request * batch.width * 8..(request + 1) * batch.width * 8;
            let scoring = Scoring {
                queries: batch.shared.part(request * 8..(request + 1) * 8),
                n_queries: 1,
                vectors: Vectors::F32(batch.columns.part(lines)),
                n_rows: batch.width,
                width: 8,
                by: ScoreBy::InnerProduct,
                terms: None,
                available: None,
            };
            stream.scores(scoring, own)?;
        }
        Ok(())
    }
}

/// What a catalogue and its requests look like.
#[derive(Clone, Copy, Debug)]
struct Case {
    n: usize,
    dim: usize,
    metric: Metric,
    /// Vectors of few values, with many ties, whose sums are exact; else any.
    coarse: bool,
    n_rankers: usize,
    seed: u64,
}

impl Case {
    fn any() -> impl Strategy<Value = Case> {
        let metric = prop::sample::select(vec![Metric::InnerProduct, Metric::Cosine, Metric::L2]);
        (2usize..700, 1usize..40, metric, any::<bool>(), 1usize..4, any::<u64>())
            .prop_map(|(n, dim, metric, coarse, n_rankers, seed)| Case { n, dim, metric, coarse, n_rankers, seed })
    }

    fn value(&self, noise: &mut impl FnMut() -> f32) -> f32 {
        if self.coarse { (noise() * 8.0).round() / 4.0 } else { noise() }
    }

    fn generation(&self) -> Arc<Generation> {
        Arc::new(self.bare())
    }

    /// With the demo's ranker.
    fn with_demo(&self) -> Arc<Generation> {
        let engines = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("engines");
        let manifest = std::fs::read_to_string(engines.join("demo.toml")).unwrap();
        let mut manifest: RankerManifest = toml::from_str(&manifest).unwrap();
        manifest.calibration.precision = Wanted::F32;
        let (mut generation, mut noise) = (self.bare(), crate::testing::noise(self.seed + 1));
        generation.popularity = (0..self.n).map(|_| noise() + 0.5).collect::<Vec<f32>>().into();
        generation.rankers = vec![RankerModel { name: "main".into(), manifest, onnx: engines.join("demo.onnx") }];
        Arc::new(generation)
    }

    fn bare(&self) -> Generation {
        let mut noise = crate::testing::noise(self.seed);
        let vectors = (0..self.n * self.dim).map(|_| self.value(&mut noise)).collect();
        let mut generation = testing::with_embeddings(vectors, self.dim);
        generation.metric = self.metric;
        // Some items without codes, and some with one twice.
        let tags: Vec<Vec<u32>> =
            (0..self.n).map(|at| (0..at % 5).map(|tag| (at * 3 + tag / 2) as u32 % 20).collect()).collect();
        testing::add_tags(&mut generation, "tags", &tags);
        let genres: Vec<u32> = (0..self.n as u32).map(|at| if at % 6 == 5 { NO_CODE } else { at % 4 }).collect();
        testing::add_category(&mut generation, "genre", &genres);
        let series: Vec<u32> = (0..self.n as u32).map(|at| if at % 4 == 3 { NO_CODE } else { at / 5 % 40 }).collect();
        testing::add_category(&mut generation, "series", &series);
        let number = |at: usize, every: usize| if at % every == 2 { f32::NAN } else { (at % every) as f32 / 2.0 };
        testing::add_number(&mut generation, "part", &(0..self.n).map(|at| number(at, 9)).collect::<Vec<_>>());
        testing::add_number(&mut generation, "price", &(0..self.n).map(|at| number(at, 50)).collect::<Vec<_>>());
        generation.popularity = (0..self.n).map(|at| (at % 17) as f32).collect::<Vec<f32>>().into();
        (generation.roles.creator, generation.roles.category) = (Some(0), Some(1));
        (generation.roles.series, generation.roles.series_position) = (Some(2), Some(3));
        let lists: Vec<Vec<(u32, f32)>> = (0..self.n)
            .map(|_| {
                let step = 1 + ((noise() + 0.5) * 6.0) as usize;
                let rows = (0..self.n).step_by(step).skip(3).take(40);
                rows.map(|row| (row as u32, self.value(&mut noise) + 2.0)).collect()
            })
            .collect();
        generation.collaborative = cooccurrence::from_rows(&lists);
        let rows: Vec<u32> = (0..self.n as u32).rev().collect();
        let scores: Vec<f32> = (0..self.n).map(|at| (self.n - at) as f32 / 8.0).collect();
        generation.trending = RankedList { rows: rows.into(), scores: scores.into() };
        let words = ["red", "blue", "old shoe", "tall tree"];
        let titles = (0..self.n).map(|at| format!("{} {}", words[at % 4], words[at / 4 % 4])).collect();
        let folder = tempfile::tempdir().unwrap();
        TextIndex::build(folder.path(), &[("title".into(), titles)], self.n).unwrap();
        generation.text = Some(TextIndex::open(folder.path()).unwrap());
        generation
    }

    fn rankers(&self) -> Vec<apart_testing::Made> {
        let names = |columns: &[&str]| columns.iter().map(|column| (*column).to_owned()).collect::<Vec<_>>();
        let of = |(at, columns): (usize, &[&str; 8])| {
            let weight = if self.n_rankers == 1 { 1.0 } else { 0.3 + at as f32 };
            (Box::new(Product) as Box<dyn CpuRanker>, [names(&REQUEST), names(columns)], weight)
        };
        COLUMNS.iter().enumerate().take(self.n_rankers).map(of).collect()
    }

    /// Jobs of which most can stay on the device.
    fn jobs(&self, generation: &Arc<Generation>, n: usize, round: u64) -> Vec<Box<Job>> {
        let mut noise = crate::testing::noise(self.seed ^ round);
        let n_items = self.n as u32;
        (0..n)
            .map(|at| {
                let mut job = Box::new(Job::new(generation.clone()));
                job.deadline = Deadline::after(Duration::from_secs(600));
                job.user.vector = (0..self.dim).map(|_| self.value(&mut noise)).collect();
                job.user.vector[0] += 0.25;
                let every = [1000, 7, 2, 3][at % 4];
                job.user.seen = (0..n_items).filter(|row| row % every == 1).collect();
                let mut row = || ((noise() + 0.5) * n_items as f32) as u32;
                job.user.history = (0..at % 9)
                    .map(|liked| Interaction { row: row().min(n_items - 1), weight: (liked % 3) as f32 })
                    .collect();
                let values: Vec<String> = (0..8).map(|_| format!("{}", self.value(&mut noise))).collect();
                let pairs: Vec<(&str, &str)> = REQUEST
                    .iter()
                    .zip(&values)
                    .map(|(key, value)| (&key["context.".len()..], value.as_str()))
                    .collect();
                job.context.assign(&pairs);
                if at % 3 == 1 {
                    job.query = ["red", "old tree", "nothing"][at / 3 % 3].to_owned();
                }
                job.task = match at % 10 {
                    7 => Task::Search { k: 10, n_queries: None },
                    8 => Task::Rank { rows: vec![0, 1], ranker: 0 },
                    9 => Task::Recommend { top_m: 20, explain: true },
                    _ => Task::Recommend { top_m: [40, 128, 3, 5000][at % 4], explain: false },
                };
                match at % 17 {
                    13 => job.user.vector.clear(),
                    14 => job.user.vector.fill(0.0),
                    15 => job.user.vector[0] = f32::NAN,
                    _ => {}
                }
                job
            })
            .collect()
    }
}

/// Items that come, change and go.
struct Churn {
    case: Case,
    generation: Arc<Generation>,
    catalogue: Catalogue,
    ids: Vec<String>,
    rules: Reranker,
    noise: Box<dyn FnMut() -> f32>,
}

impl Churn {
    fn new(case: Case, generation: &Arc<Generation>, seed: u64) -> Self {
        let ids = (0..case.n as u32).map(|row| generation.items.ids.id(row).to_owned()).collect();
        let (generation, noise) = (generation.clone(), Box::new(crate::testing::noise(seed)));
        let rules = Reranker::compile(&RerankConfig::default(), &generation).unwrap();
        Churn { case, catalogue: Catalogue::new(&generation), generation, ids, rules, noise }
    }

    fn below(&mut self, n: usize) -> usize {
        (((self.noise)() + 0.5) * n as f32) as usize % n
    }

    /// As it is after `n` more changes.
    fn next(&mut self, n: usize) -> Arc<LiveItems> {
        for _ in 0..n {
            let what = self.below(8);
            let at = match what {
                0 => {
                    self.ids.push(format!("new-{}", self.ids.len()));
                    self.ids.len() - 1
                }
                _ => self.below(self.ids.len()),
            };
            let id = self.ids[at].clone();
            if what == 1 {
                self.catalogue.delete(&self.generation, &Change::of(&id));
                continue;
            }
            let tags: Vec<String> = (0..self.below(6)).map(|_| format!("{}", self.below(30))).collect();
            let columns = [
                ("tags", Value::List(tags.iter().map(String::as_str).collect())),
                ("genre", if what == 3 { Value::Missing } else { Value::Text("1") }),
                ("series", if what == 6 { Value::Missing } else { Value::Text("c3") }),
                ("part", Value::Number(self.below(9) as f64 / 2.0)),
                ("price", if what == 7 { Value::Missing } else { Value::Number(self.below(99) as f64) }),
            ];
            let columns = &columns[..[0, 0, 1, 2, 0, 5, 3, 5][what]];
            let vector: Vec<f32> = (0..self.case.dim).map(|_| self.case.value(&mut self.noise)).collect();
            let vector = (what == 4 || what == 7 || what == 0 && self.below(3) > 0).then_some(&vector[..]);
            let available = (what == 5 && self.below(2) == 0).then_some(false);
            // Which takes away a vector that it had.
            let whole = what == 6 && self.below(2) == 0;
            self.catalogue.upsert(&self.generation, &Change { id: &id, available, whole, columns, vector });
        }
        Arc::new(self.catalogue.take_changed().unwrap_or_else(|| LiveItems::new(self.case.n)))
    }

    /// Jobs planned with these items, which users have seen and liked, too.
    fn jobs(&self, n: usize, round: u64, items: &Arc<LiveItems>) -> Vec<Box<Job>> {
        let mut all = self.case.jobs(&self.generation, n, round);
        for (at, job) in all.iter_mut().enumerate() {
            job.items = Some(items.clone());
            job.filter = self.rules.hard_filter(&job.context, Some(items));
            let changed = || items.entries().map(|(row, _)| row).filter(|row| row % 3 == at as u32 % 3);
            job.user.seen.extend(changed().filter(|row| row % 2 == 0));
            job.user.seen.sort_unstable();
            job.user.seen.dedup();
            let room = 40 - job.user.history.len();
            job.user.history.extend(changed().take(room).map(|row| Interaction { row, weight: (row % 2) as f32 }));
        }
        all
    }
}

/// Both engines, with the same rankers.
struct Both {
    cuda: Arc<Cuda>,
    device: CudaDevice,
    other: CpuDevice,
    generation: Arc<Generation>,
}

impl Both {
    fn new(case: &Case, config: PipelineConfig, device: &DeviceConfig) -> Self {
        let config = Arc::new(config);
        let cpu = || CpuDevice::new(config.clone(), Arc::new(ThreadPool::with_num_threads(1)));
        let (generation, cuda) = (case.generation(), engine::cuda(device, 1));
        let (mut rest, mut other) = (cpu(), cpu());
        apart_testing::load(&mut rest, &generation, case.rankers());
        apart_testing::load(&mut other, &generation, case.rankers());
        let mut device = cuda.device(rest, &config).unwrap();
        device.make = Arc::new(|_, _, _| Ok(Ok(Arc::new(OnDevice) as Arc<dyn ResidentRanker>)));
        device.load(&generation).unwrap();
        Both { cuda, device, other, generation }
    }

    /// Both compute the same jobs, and answer the same.
    fn compare(&mut self, make: impl Fn() -> Vec<Box<Job>>) {
        assert_eq!(self.difference(make), None);
    }

    /// What differs first of what both answer.
    fn difference(&mut self, make: impl Fn() -> Vec<Box<Job>>) -> Option<String> {
        let (mut batch, mut own) = (make(), make());
        self.device.execute(&mut batch).unwrap();
        self.other.execute(&mut own).unwrap();
        for (at, (got, want)) in batch.iter().zip(&own).enumerate() {
            let of = |job: &Job| {
                let ranked = &job.ranked;
                let items: Vec<(u32, u32, u8)> =
                    ranked.items.iter().map(|item| (item.row, item.score.to_bits(), item.sources.0)).collect();
                let counts = (ranked.n_candidates, ranked.n_by_source, ranked.n_nan, ranked.uncovered.to_bits());
                (
                    items,
                    counts,
                    ranked.backfill.clone(),
                    ranked.candidates.rows.clone(),
                    job.degraded.to_vec(),
                    job.failure.is_some(),
                )
            };
            if of(got) != of(want) {
                return Some(format!("job {at}, {:?}: {:?} instead of {:?}", want.task, of(got), of(want)));
            }
        }
        None
    }

    fn counted(&self) -> [u64; 3] {
        let slates = &self.cuda.counters.slates;
        [&slates.whole, &slates.refused, &slates.open].map(|count| count.load(Relaxed))
    }
}

fn config(k: u32) -> PipelineConfig {
    PipelineConfig { ann_k: k, collaborative_k: 30, trending_k: 10, search_k: 20, ..PipelineConfig::default() }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    /// To the bit: the ranker sums up here as there, and so does all that it reads.
    #[test]
    fn slates_are_the_cpu_s(
        case in Case::any(), k in prop_oneof![1u32..60, 1u32..600], n_jobs in 1usize..24, room in 1usize..24, most in 1u32..12,
        gone in 0usize..3, graphs in any::<bool>(),
    ) {
        let (script, delay_us) = (if graphs { "" } else { ",nograph@1+1" }, if case.seed % 4 == 0 { 50 } else { 0 });
        let Some(_emulated) = Emulated::open(&format!("seed={},delay_us={delay_us}{script}", case.seed)) else { return Ok(()) };
        let live_items = [0, 32, 100][case.n % 3];
        let device = DeviceConfig { max_batch_size: most, workspace_bytes: (room * case.n * 4) as u64, live_items, ..DeviceConfig::default() };
        let mut both = Both::new(&case, config(k), &device);
        let items = (gone > 0).then(|| {
            let mut items = LiveItems::new(case.n);
            let every = [0, 50, 3][gone];
            (0..case.n as u32).filter(|row| row % every == 0).for_each(|row| assert!(items.set_gone(row, true)));
            Arc::new(items)
        });
        let generation = both.generation.clone();
        for round in 0..2 {
            both.compare(|| {
                let mut all = case.jobs(&generation, n_jobs, round);
                all.iter_mut().for_each(|job| job.items.clone_from(&items));
                all
            });
        }
        let [whole, refused, open] = both.counted();
        let asked = both.generation.item_embeddings.is_some() as u64;
        prop_assert!(asked == 0 || whole > 0 || open > 0 || refused > 0);
        prop_assert!(whole + open > 0, "{whole} {refused} {open}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    /// To the bit, as above, whatever came, changed or went, and whichever snapshot a job was planned with.
    #[test]
    fn slates_follow_items_that_come_change_and_go(
        case in Case::any(), k in prop_oneof![1u32..60, 1u32..600], n_jobs in 1usize..12, n_changes in 1usize..40, most in 1u32..12,
        graphs in any::<bool>(),
    ) {
        let (script, delay_us) = (if graphs { "" } else { ",nograph@1+1" }, if case.seed % 4 == 0 { 50 } else { 0 });
        let Some(_emulated) = Emulated::open(&format!("seed={},delay_us={delay_us}{script}", case.seed)) else { return Ok(()) };
        let device = DeviceConfig { max_batch_size: most, live_items: 320, ..DeviceConfig::default() };
        let mut both = Both::new(&case, config(k), &device);
        let mut churn = Churn::new(case, &both.generation, case.seed ^ 5);
        let mut before = churn.next(0);
        for round in 0..5 {
            let items = churn.next(n_changes);
            // Until all was sent, jobs are the CPU's.
            let whole = |both: &Both| both.counted()[0] + both.counted()[2];
            let mut before_all = whole(&both);
            for batch in 0..40 {
                both.compare(|| {
                    let mut all = churn.jobs(n_jobs, round, &items);
                    // Some were planned before.
                    let older = churn.jobs(n_jobs, round + 100, &before);
                    all.extend(older.into_iter().take(if batch % 3 == 2 { n_jobs } else { 0 }));
                    all
                });
                if batch % 3 == 2 {
                    before_all = whole(&both);
                } else if whole(&both) > before_all {
                    break;
                }
                prop_assert!(batch < 39, "never sent: {items:?}");
            }
            before = items;
        }
        prop_assert!(both.cuda.counters.slates.sent.load(Relaxed) > 0);
    }
}

#[test]
fn a_row_that_was_not_brought_up_to_date_is_noticed() {
    let Some(_emulated) = Emulated::open("seed=9,delay_us=0") else { return };
    let case = Case { n: 200, dim: 8, metric: Metric::Cosine, coarse: false, n_rankers: 2, seed: 9 };
    let mut both = Both::new(&case, config(50), &DeviceConfig { live_items: 64, ..DeviceConfig::default() });
    let mut churn = Churn::new(case, &both.generation, 3);
    let one = churn.next(30);
    for _ in 0..9 {
        both.compare(|| churn.jobs(8, 1, &one));
    }
    let [whole, ..] = both.counted();
    assert!(whole > 7, "{whole}");
    let (mut noticed, n) = (0, 12);
    for round in 0..n {
        let items = churn.next(6);
        both.device.pipeline.as_mut().unwrap().live.pretend(&items);
        noticed += usize::from(both.difference(|| churn.jobs(8, round, &items)).is_some());
        // Told as it is, it is right again.
        both.device.pipeline.as_mut().unwrap().live.forget();
        (0..9).for_each(|_| both.compare(|| churn.jobs(8, round, &items)));
    }
    assert!(noticed * 2 > n as usize, "{noticed} of {n}");
}

#[test]
fn a_change_is_one_small_copy_and_one_kernel() {
    let Some(emulated) = Emulated::open("seed=5,delay_us=0") else { return };
    let case = Case { n: 3000, dim: 8, metric: Metric::L2, coarse: false, n_rankers: 2, seed: 5 };
    let mut both = Both::new(&case, config(60), &DeviceConfig { live_items: 64, ..DeviceConfig::default() });
    let mut churn = Churn::new(case, &both.generation, 3);
    let jobs = |churn: &Churn, items: &Arc<LiveItems>| {
        let mut all = churn.jobs(60, 1, items);
        let is_whole = |job: &Job| matches!(job.task, Task::Recommend { explain: false, .. });
        all.retain(|job| is_whole(job) && job.user.vector.iter().map(|v| v * v).sum::<f32>() > 0.0);
        all.truncate(5);
        all
    };
    let counted = |emulated: &Emulated| {
        ["uploads", "downloads", "graph_launches", "single_launches"].map(|what| emulated.count(what))
    };
    for (round, sent) in [(0, 1), (1, 2), (2, 3)] {
        let items = churn.next(1);
        for again in [false, true] {
            emulated.script("seed=6,delay_us=0");
            both.compare(|| jobs(&churn, &items));
            let changes = u64::from(!again);
            assert_eq!(counted(&emulated), [1 + changes, 1, 1, changes], "{round} {again}");
        }
        assert!(both.cuda.counters.slates.sent.load(Relaxed) <= sent);
    }
    assert_eq!(both.counted(), [30, 0, 0]);
}

#[test]
fn what_has_no_room_beside_the_tables_is_the_cpu_s() {
    let Some(_emulated) = Emulated::open("seed=7,delay_us=0") else { return };
    let case = Case { n: 300, dim: 4, metric: Metric::InnerProduct, coarse: false, n_rankers: 2, seed: 3 };
    let run = |live_items: u32, change: &mut dyn FnMut(&mut Churn) -> Arc<LiveItems>| {
        let mut both = Both::new(&case, config(20), &DeviceConfig { live_items, ..DeviceConfig::default() });
        let mut churn = Churn::new(case, &both.generation, 3);
        let items = change(&mut churn);
        (0..20).for_each(|_| both.compare(|| churn.jobs(4, 1, &items)));
        (both, churn)
    };
    // More items than there is room for; none at all.
    for live_items in [32, 0] {
        let (both, _) = run(live_items, &mut |churn| churn.next(200));
        assert_eq!(both.counted()[0], 0, "{live_items}");
    }
    // What only went needs no room.
    let (both, _) = run(0, &mut |churn| {
        let id = churn.ids[3].clone();
        churn.catalogue.delete(&churn.generation, &Change::of(&id));
        churn.next(0)
    });
    assert!(both.counted()[0] > 40, "{:?}", both.counted());
    // More codes than there is room for, though there is when the item has fewer again.
    let tags = |churn: &mut Churn, n: usize| {
        let (id, tags) = (churn.ids[3].clone(), (0..n).map(|tag| format!("{tag}")).collect::<Vec<_>>());
        let columns = [("tags", Value::List(tags.iter().map(String::as_str).collect()))];
        churn.catalogue.upsert(&churn.generation, &Change { id: &id, columns: &columns, ..Change::default() });
        churn.next(0)
    };
    let (mut both, mut churn) = run(64, &mut |churn| tags(churn, 2000));
    assert_eq!(both.counted()[0], 0);
    let items = tags(&mut churn, 20);
    (0..20).for_each(|_| both.compare(|| churn.jobs(4, 1, &items)));
    let [whole, ..] = both.counted();
    assert!(whole > 40, "{whole}");
    // What grows again and again is put together anew.
    for n in 21..60 {
        let items = tags(&mut churn, n);
        (0..2).for_each(|_| both.compare(|| churn.jobs(4, 1, &items)));
    }
    assert!(both.counted()[0] > whole + 100, "{:?}", both.counted());
}

/// Whether both are slates of the same scores, but for these being rounded: each item has the score that it has there, or one that is
/// nearly the last there, and none is missing that is clearly better than the last.
fn same_but_for_rounding(got: &[RankedItem], want: &[RankedItem]) -> Result<(), String> {
    let size = want.iter().map(|item| item.score.abs()).fold(1e-6, f32::max);
    let (tolerance, last) = (1e-5 * size, want.last().map_or(0.0, |item| item.score));
    if got.len() != want.len() {
        return Err(format!("{} items of {}", got.len(), want.len()));
    }
    for (place, (got, there)) in got.iter().zip(want).enumerate() {
        let known = want.iter().find(|item| item.row == got.row);
        let expected = known.map_or(last, |item| item.score);
        if (got.score - expected).abs() > tolerance || known.is_some_and(|item| item.sources != got.sources) {
            return Err(format!("{place}: {got:?}, expected {known:?}"));
        }
        if (got.score - there.score).abs() > tolerance {
            return Err(format!("{place}: {got:?} in the place of {there:?}"));
        }
    }
    Ok(())
}

/// Scores whole rows by the dense engine, in the place of TensorRT.
struct RowsOfDense {
    ranker: StreamRanker,
    rows: Table<u32>,
    counts: Table<u32>,
}

impl RowScorer for RowsOfDense {
    fn enqueue(
        &mut self,
        stream: &Stream,
        n_rows: usize,
        inputs: &[Part<'_, u32>],
        scores: PartMut<'_, f32>,
    ) -> Result<(), DeviceError> {
        let (rows, counts) = (self.rows.part(0..n_rows), self.counts.part(0..n_rows));
        let shared = self.rows.part(0..0).as_type();
        let batch =
            RankBatch { rows, more: None, counts, n_requests: n_rows, width: 1, shared, columns: inputs[0].as_type() };
        self.ranker.enqueue(stream, batch, scores)
    }
}

/// The ranker that wants whole rows, with the dense engine behind it.
fn of_whole_rows(stream: &Stream, weighted: &Weighted) -> super::ranker::Made {
    let whole = weighted.whole.as_ref().expect("an engine for whole rows was asked for");
    assert_eq!((&whole.names[..], whole.widths()), (&["features".to_owned()][..], [1, 1, 11]));
    assert_eq!(whole.output.as_deref(), Ok("score"));
    let manifest = &whole.generation.rankers[weighted.at].manifest;
    let pool = Arc::new(ThreadPool::with_num_threads(1));
    let mut general = OnnxRanker::load("whole", &whole.onnx, manifest, &[13], pool).unwrap();
    let graph = recognise(&mut general, &whole.onnx, manifest).unwrap();
    let model = Model::plain("whole", &graph, Kernel::detect());
    let dense = Arc::new(DeviceRanker::new(stream, &model, RankerOptions::default())?.unwrap());
    let scorer: Box<OnStream> = Box::new(move |stream, n_slots| {
        let all = |value| Table::new(stream, n_slots, |_, out: &mut [u32]| out.fill(value));
        let (rows, counts) = (all(0)?, all(1)?);
        Ok(Box::new(RowsOfDense { ranker: StreamRanker::new(dense.clone(), n_slots), rows, counts }) as _)
    });
    let made = Assembled::new(stream, &whole.generation, whole, &[RowKind::F32], 0, scorer)?;
    Ok(Ok(Arc::new(made) as Arc<dyn ResidentRanker>))
}

#[test]
fn slates_of_a_bundle_s_ranker_are_the_cpu_s_but_for_rounding() {
    like_the_cpu_s(Engine::Auto, None);
}

#[test]
fn slates_of_a_ranker_of_whole_rows_are_the_cpu_s_but_for_rounding() {
    like_the_cpu_s(Engine::TensorRt, Some(Arc::new(|stream, weighted, _| of_whole_rows(stream, weighted))));
}

fn like_the_cpu_s(asked: Engine, maker: Option<Arc<super::ranker::Maker>>) {
    let Some(emulated) = Emulated::open("seed=11,delay_us=0") else { return };
    let (mut items, mut elsewhere) = (0, 0);
    // Without room for a table of items, its columns are copied.
    for (metric, bytes) in [(Metric::InnerProduct, 1 << 20), (Metric::Cosine, 1 << 20), (Metric::L2, 0)] {
        let case = Case { n: 700, dim: 12, metric, coarse: false, n_rankers: 1, seed: 21 };
        let generation = case.with_demo();
        let engines = [(generation.rankers[0].name.clone(), asked)].into();
        let config = Arc::new(PipelineConfig { item_table_bytes: bytes, engines, ..config(100) });
        let cpu = || CpuDevice::new(config.clone(), Arc::new(ThreadPool::with_num_threads(1)));
        let cuda = engine::cuda(&DeviceConfig::default(), 1);
        let (mut device, mut other) = (cuda.device(cpu(), &config).unwrap(), cpu());
        if let Some(maker) = &maker {
            device.make = maker.clone();
        }
        device.load(&generation).unwrap();
        other.load(&generation).unwrap();
        emulated.script("seed=12,delay_us=0");
        let make = || {
            let mut all = case.jobs(&generation, 24, 1);
            all.retain(|job| matches!(job.task, Task::Recommend { explain: false, .. }));
            all
        };
        let (mut batch, mut own) = (make(), make());
        device.execute(&mut batch).unwrap();
        other.execute(&mut own).unwrap();
        for (at, (got, want)) in batch.iter().zip(&own).enumerate() {
            let of = |job: &Job| (job.ranked.n_candidates, job.ranked.n_by_source, job.degraded.to_vec());
            assert_eq!(of(got), of(want), "job {at}");
            let same = same_but_for_rounding(&got.ranked.items, &want.ranked.items);
            assert_eq!(same, Ok(()), "job {at}");
            items += want.ranked.items.len();
            // The ranker's share of what the device took.
            let time = got.ranked.inference[0];
            let told = got.timings.get(Stage::Rank);
            assert!(got.ranked.n_candidates == 0 || !time.is_zero() && told >= time, "{time:?} of {told:?}");
            let pairs = got.ranked.items.iter().zip(&want.ranked.items);
            elsewhere += pairs.filter(|(got, want)| got.row != want.row).count();
        }
        let slates = &cuda.counters.slates;
        let whole = || [&slates.whole, &slates.open].map(|count| count.load(Relaxed));
        assert!(whole()[0] > 10 && whole()[1] == 0, "{:?}", whole());
        assert_eq!(emulated.count("graph_launches"), 1);
        // The same when items came and changed, also such as have no vector.
        let mut churn = Churn::new(case, &generation, 7);
        for round in 0..4 {
            let (live, before) = (churn.next(30), whole()[0]);
            let make = || {
                let mut all = churn.jobs(24, round, &live);
                all.retain(|job| matches!(job.task, Task::Recommend { explain: false, .. }));
                all
            };
            while whole()[0] == before {
                let (mut batch, mut own) = (make(), make());
                device.execute(&mut batch).unwrap();
                other.execute(&mut own).unwrap();
                for (at, (got, want)) in batch.iter().zip(&own).enumerate() {
                    let of = |job: &Job| (job.ranked.n_candidates, job.ranked.n_by_source, job.degraded.to_vec());
                    assert_eq!(of(got), of(want), "round {round}, job {at}");
                    let same = same_but_for_rounding(&got.ranked.items, &want.ranked.items);
                    assert_eq!(same, Ok(()), "round {round}, job {at}");
                }
            }
        }
    }
    // What swaps is nearly as good.
    assert!(elsewhere * 50 < items, "{elsewhere} of {items}");
}

#[test]
fn narrow_tables_take_less_and_keep_the_order() {
    let Some(_emulated) = Emulated::open("seed=13,delay_us=0") else { return };
    let case = Case { n: 700, dim: 12, metric: Metric::InnerProduct, coarse: false, n_rankers: 1, seed: 21 };
    let generation = case.with_demo();
    let config = Arc::new(config(100));
    let cpu = || CpuDevice::new(config.clone(), Arc::new(ThreadPool::with_num_threads(1)));
    let mut other = cpu();
    other.load(&generation).unwrap();
    let mut memory = Vec::new();
    for tables in [TableStorage::F32, TableStorage::Bf16, TableStorage::Int8] {
        let cuda = engine::cuda(&DeviceConfig { tables, live_items: 0, ..DeviceConfig::default() }, 1);
        cuda.device(cpu(), &config).unwrap().load(&generation).unwrap();
        memory.push(cuda.counters.memory_bytes.load(Relaxed));
    }
    let table = table_bytes(&mut other, &generation) as u64;
    assert_eq!(memory[0] - memory[1], table / 2, "{memory:?}");
    // A scale for each item.
    assert_eq!(memory[0] - memory[2], table * 3 / 4 - 4 * case.n as u64, "{memory:?}");
    // What came later lies beside them in the same numbers.
    let beside = |tables| {
        let cuda = engine::cuda(&DeviceConfig { tables, live_items: 64, ..DeviceConfig::default() }, 1);
        cuda.device(cpu(), &config).unwrap().load(&generation).unwrap();
        cuda.counters.memory_bytes.load(Relaxed)
    };
    let more = [TableStorage::F32, TableStorage::Int8].map(|tables| beside(tables) as i64);
    let of_item = table as i64 / case.n as i64;
    let saved = more[0] - more[1] - (memory[0] - memory[2]) as i64;
    assert!(saved > 64 * (of_item * 3 / 4 - 4) / 2, "{saved} of {of_item} an item");
    for tables in [TableStorage::Bf16, TableStorage::Int8] {
        keep_the_order(&case, &generation, &config, tables);
    }
}

/// Items that came and changed among them.
fn keep_the_order(case: &Case, generation: &Arc<Generation>, config: &Arc<PipelineConfig>, tables: TableStorage) {
    let cpu = || CpuDevice::new(config.clone(), Arc::new(ThreadPool::with_num_threads(1)));
    let mut other = cpu();
    other.load(generation).unwrap();
    let mut churn = Churn::new(*case, generation, 7);
    let items = churn.next(20);
    let cuda = engine::cuda(&DeviceConfig { tables, live_items: 64, ..DeviceConfig::default() }, 1);
    let mut device = cuda.device(cpu(), config).unwrap();
    device.load(generation).unwrap();
    let (mut want, mut got) = (Vec::new(), Vec::new());
    for round in 0..9 {
        let make = || {
            let mut all = churn.jobs(24, round, &items);
            all.retain(|job| matches!(job.task, Task::Recommend { explain: false, .. }));
            // All candidates.
            all.iter_mut().for_each(|job| job.task = Task::Recommend { top_m: 5000, explain: false });
            all
        };
        let (mut batch, mut own) = (make(), make());
        let before = cuda.counters.slates.whole.load(Relaxed);
        device.execute(&mut batch).unwrap();
        other.execute(&mut own).unwrap();
        if cuda.counters.slates.whole.load(Relaxed) == before {
            continue;
        }
        let scores = |job: &Job| {
            let mut items: Vec<(u32, f32)> = job.ranked.items.iter().map(|item| (item.row, item.score)).collect();
            items.sort_unstable_by_key(|item| item.0);
            items.into_iter().map(|item| item.1).collect::<Vec<f32>>()
        };
        want.extend(own.iter().map(|job| scores(job)));
        got.extend(batch.iter().map(|job| scores(job)));
    }
    let fidelity = Fidelity::of(&want, &got);
    println!("{tables:?}: {} {fidelity:?}", want.len());
    assert!(
        want.len() > 50 && fidelity.ndcg >= 0.999 && fidelity.error > 0.0,
        "{tables:?}: {} {fidelity:?}",
        want.len()
    );
}

#[test]
fn every_batch_on_its_way_has_its_ranker_s_time() {
    let Some(_emulated) = Emulated::open("seed=3,delay_us=200") else { return };
    let case = Case { n: 300, dim: 8, metric: Metric::InnerProduct, coarse: false, n_rankers: 1, seed: 9 };
    let (generation, config) = (case.with_demo(), Arc::new(config(50)));
    let cpu = CpuDevice::new(config.clone(), Arc::new(ThreadPool::with_num_threads(1)));
    // Six batches of one size, of which the first are answered while the last are computed.
    let cuda = engine::cuda(&DeviceConfig { max_batch_size: 4, ..DeviceConfig::default() }, 1);
    let mut device = cuda.device(cpu, &config).unwrap();
    device.load(&generation).unwrap();
    let mut batch = case.jobs(&generation, 40, 1);
    batch.retain(|job| matches!(job.task, Task::Recommend { explain: false, .. }));
    batch.iter_mut().for_each(|job| job.user.vector.fill(0.5));
    batch.truncate(24);
    batch.iter_mut().for_each(|job| job.user.vector.resize(8, 0.5));
    device.execute(&mut batch).unwrap();
    assert!(batch.len() == 24 && cuda.counters.slates.whole.load(Relaxed) >= 20);
    for job in &batch {
        assert!(!job.ranked.inference[0].is_zero(), "{:?}", job.ranked.inference);
        assert!(!job.timings.get(Stage::Rank).is_zero() && !job.timings.get(Stage::Ann).is_zero());
    }
}

/// Bytes of the table of the generation's only ranker, f32.
fn table_bytes(device: &mut CpuDevice, generation: &Arc<Generation>) -> usize {
    let weighted = device.weighted(generation).unwrap();
    let table = weighted[0].model.as_ref().and_then(|model| model.table()).unwrap();
    4 * table.n_rows() * table.width()
}

#[test]
fn a_batch_is_one_copy_in_one_graph_and_one_copy_out() {
    let Some(emulated) = Emulated::open("seed=5,delay_us=0") else { return };
    let case = Case { n: 9000, dim: 8, metric: Metric::Cosine, coarse: false, n_rankers: 2, seed: 5 };
    let mut both = Both::new(&case, config(60), &DeviceConfig::default());
    let generation = both.generation.clone();
    let make = |n| {
        let generation = generation.clone();
        move || {
            let mut all = case.jobs(&generation, 60, 1);
            let is_whole = |job: &Job| matches!(job.task, Task::Recommend { explain: false, .. });
            all.retain(|job| is_whole(job) && job.user.vector.iter().map(|v| v * v).sum::<f32>() > 0.0);
            all.truncate(n);
            all
        }
    };
    for n in [1, 3, 8, 11] {
        emulated.script("seed=6,delay_us=0");
        both.compare(make(n));
        let counted = ["uploads", "downloads", "graph_launches", "single_launches"].map(|what| emulated.count(what));
        assert_eq!(counted, [1, 1, 1, 0], "{n} jobs");
    }
    assert_eq!(both.counted(), [1 + 3 + 8 + 11, 0, 0]);
}

#[test]
fn what_rounding_leaves_open_is_computed_again() {
    let Some(_emulated) = Emulated::open("seed=7,delay_us=0") else { return };
    // More rows of the best score than are fetched.
    let case = Case { n: 3000, dim: 4, metric: Metric::InnerProduct, coarse: true, n_rankers: 1, seed: 3 };
    let mut both = Both::new(&case, config(20), &DeviceConfig::default());
    let generation = both.generation.clone();
    both.compare(|| {
        let mut all = case.jobs(&generation, 6, 1);
        all.iter_mut().for_each(|job| job.user.vector = vec![0.0, 0.0, 0.0, 1.0]);
        all
    });
    let [whole, _, open] = both.counted();
    assert!(open > 0, "{whole} {open}");
}

#[test]
fn what_the_device_does_not_know_is_the_cpu_s() {
    let Some(_emulated) = Emulated::open("seed=8,delay_us=0") else { return };
    let case = Case { n: 300, dim: 8, metric: Metric::L2, coarse: false, n_rankers: 1, seed: 9 };
    let mut both = Both::new(&case, config(50), &DeviceConfig::default());
    let generation = both.generation.clone();
    // One that changed, and snapshots that differ within a batch and between batches.
    let changed = {
        let other = Case { seed: 10, ..case }.generation();
        Arc::new(testing::changes(&generation, &other))
    };
    let snapshot = |row: u32| {
        let mut items = LiveItems::new(case.n);
        assert!(items.set_gone(row, true));
        Arc::new(items)
    };
    let (one, two) = (snapshot(1), snapshot(2));
    let jobs = |of: [&Arc<LiveItems>; 2]| {
        let mut all = case.jobs(&generation, 4, 1);
        all.iter_mut().enumerate().for_each(|(at, job)| job.items = Some(of[at % 2].clone()));
        all
    };
    both.compare(|| jobs([&one, &two]));
    both.compare(|| jobs([&two, &two]));
    both.compare(|| jobs([&one, &one]));
    assert_eq!(both.counted(), [12, 0, 0]);
    // More than one copy takes.
    both.compare(|| jobs([&changed, &changed]));
    assert_eq!(both.counted(), [12, 4, 0]);
}

#[test]
fn what_keeps_recommendations_from_the_device_is_said() {
    let Some(_emulated) = Emulated::open("delay_us=0") else { return };
    let case = Case { n: 300, dim: 8, metric: Metric::L2, coarse: false, n_rankers: 1, seed: 9 };
    let generation = case.generation();
    let reason = |storage: Storage, config: PipelineConfig, column: Option<&str>, left: u64, make: &Make<'_>| {
        let device = DeviceConfig { vectors: storage, live_items: 0, ..DeviceConfig::default() };
        let mut rest = CpuDevice::new(Arc::new(config.clone()), Arc::new(ThreadPool::with_num_threads(1)));
        let mut rankers = case.rankers();
        if let Some(column) = column {
            rankers[0].1[1][3] = column.to_owned();
        }
        apart_testing::load(&mut rest, &generation, rankers);
        engine::with_resident(&device, &generation, |stream, resident| {
            let setting = Setting { config: &config, device: &device, n_workers: 3, left, make };
            Tables::new(stream, resident, &mut rest, &setting).unwrap().map(drop).unwrap_err()
        })
    };
    let (f32, all) = (Storage::F32, u64::MAX);
    let make: &Make<'_> = &|_, _, _| Ok(Ok(Arc::new(OnDevice) as Arc<dyn ResidentRanker>));
    let none: &Make<'_> = &|_, _, _| Ok(Err("no engine for it".into()));
    assert_eq!(
        reason(Storage::Bf16, config(5), None, all, make),
        "its vectors are in bf16, and its neighbours would not be the CPU's"
    );
    assert_eq!(
        reason(f32, config(5), Some("user.history_length"), all, make),
        "ranker `product`: column `user.history_length` is the CPU's"
    );
    assert_eq!(reason(f32, config(5), None, all, none), "ranker `product`: no engine for it");
    assert_eq!(reason(f32, config(MAX_K), None, all, make), "pipeline.ann_k is 1024, which is not 1 to 992");
    let many = PipelineConfig { trending_k: 1000, search_k: 1000, ..config(500) };
    assert_eq!(reason(f32, many, None, all, make), "the sources give 2530 candidates, which is more than 2048");
    assert_eq!(
        reason(f32, config(5), None, 100_000, make),
        "it takes 0.8 MiB of GPU memory, 0.1 MiB for tables and 0.2 MiB for each of 3 workers, and 0.1 MiB are left"
    );
}

#[test]
fn lists_that_a_kernel_may_read() {
    let lists = |offsets: &[u64], rows: &[u32]| generation::Lists {
        offsets: offsets.to_vec().into(),
        rows: rows.to_vec().into(),
        scores: vec![1.0; rows.len()].into(),
    };
    assert!(lists_are_sound(&lists(&[0, 2, 2, 4], &[1, 0, 1, 2]), 3));
    assert!(lists_are_sound(&lists(&[], &[]), 3));
    assert!(!lists_are_sound(&lists(&[0, 3], &[1, 0, 1]), 3), "twice in a list");
    assert!(!lists_are_sound(&lists(&[0, 2], &[1, 3]), 3), "no such item");
    assert!(!lists_are_sound(&lists(&[0, 3], &[1, 0]), 3), "beyond the end");
    assert!(!lists_are_sound(&lists(&[2, 0], &[1, 0]), 3), "backwards");
}
