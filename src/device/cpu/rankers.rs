//! A generation's rankers made ready: models once for all workers, buffers for each.

use std::ops::Range;
use std::sync::Arc;

use rten::ThreadPool;

use super::Scratch;
use super::{Asked, Loaded};
use crate::candidates::{Candidates, Dependence};
use crate::catalog::generation::{Generation, Interaction, RankerModel};
use crate::device::{DeviceError, Job, Task};
use crate::features::assemble::{FeatureScratch, Layout};
use crate::index::{Kernel, VectorIndex};
use crate::pipeline::PipelineConfig;
use crate::ranking::dense::{DenseRanker, Items, Model, Sample, Setting};
use crate::ranking::manifest::{Calibration, Engine};
use crate::ranking::onnx::OnnxRanker;
use crate::ranking::onnxruntime::OnnxRuntimeRanker;
use crate::ranking::precision::{Report, Wanted};
use crate::ranking::tree_model::{self, TreeRanker};
use crate::ranking::{self, Ranker};
use crate::retrieval::merge::merge;

/// Users whose requests a model is measured on.
const SAMPLE_USERS: usize = 64;
/// Feature values of all of them together, at most.
const SAMPLE_VALUES: usize = 32 << 20;
/// Requests that a worker answers to nobody before the first.
const WARM_UPS: usize = 8;

/// A ranker of one worker.
pub struct LoadedRanker {
    /// By input.
    pub layouts: Vec<Layout>,
    pub ranker: Box<dyn Ranker>,
    /// The columns of a request and of candidates where the model is computed in parts.
    pub parts: Option<[Layout; 2]>,
    /// The columns of items where the model has a table of them.
    pub items: Option<Layout>,
    /// Share in the mean of a recommendation; 0: only by name, through Rank.
    pub weight: f32,
}

/// What computes a ranker, and what of it all workers share.
#[derive(Clone)]
enum Prepared {
    /// The engine for dense networks.
    Dense(Arc<Model>),
    /// The evaluator of tree ensembles.
    Trees,
    /// The embedded general runtime, and what keeps the model from a faster engine.
    General(Option<String>),
    /// ONNX Runtime, and what keeps the model from others.
    OnnxRuntime(Option<String>),
}

/// By ranker.
type Shared = Result<Vec<Prepared>, String>;

/// Makes a generation's rankers ready for a worker. With `requests`, models are shared through the generation, measured on what
/// they give and split; without, nothing is kept.
pub fn load(
    config: &PipelineConfig,
    generation: &Generation,
    pool: &Arc<ThreadPool>,
    requests: Option<&dyn Fn() -> Vec<Request>>,
) -> Result<Vec<LoadedRanker>, DeviceError> {
    let wrong = |reason: String| DeviceError::Load { version: generation.version.clone(), reason };
    let unknown = |name: &&String| generation.rankers.iter().all(|r| r.name != **name);
    let keys = [("rankers", config.rankers.keys().find(unknown)), ("engines", config.engines.keys().find(unknown))];
    if let Some((key, Some(name))) = keys.iter().find(|(_, name)| name.is_some()) {
        return Err(wrong(format!("pipeline.{key} names `{name}`, which the bundle does not have")));
    }
    let shared = match requests {
        Some(requests) => {
            let make = || Box::new(prepare(config, generation, pool, Some(requests))) as Box<_>;
            let shared = generation.shared_rankers.get_or_init(make).downcast_ref::<Shared>();
            shared.cloned().ok_or_else(|| wrong("another kind of device holds its rankers".to_owned()))?
        }
        None => prepare(config, generation, pool, None),
    };
    let mut rankers = Vec::new();
    for ((at, model), prepared) in generation.rankers.iter().enumerate().zip(shared.map_err(wrong)?) {
        let layouts = layouts(model, generation).map_err(wrong)?;
        let (mut parts, mut items) = (None, None);
        let ranker: Box<dyn Ranker> = match prepared {
            Prepared::Dense(dense) => {
                parts = dense.columns().map(|columns| {
                    let has_table = columns.iter().flatten().any(|c| *c == Dependence::Item);
                    items = has_table.then(|| Layout::part(&layouts, |d| d == Dependence::Item));
                    let request = Layout::part(&layouts, |d| d == Dependence::Request);
                    let is_candidate = |d| d == Dependence::Candidate || (d == Dependence::Item && !has_table);
                    [request, Layout::part(&layouts, is_candidate)]
                });
                Box::new(DenseRanker::new(dense))
            }
            Prepared::Trees => {
                let trees = trees(model, &layouts).map_err(wrong)?;
                Box::new(trees.ok_or_else(|| wrong(format!("ranker `{}`: its trees are gone", model.name)))?)
            }
            Prepared::General(reason) => Box::new(general(model, &layouts, pool).map_err(wrong)?.because(reason)),
            Prepared::OnnxRuntime(reason) => {
                Box::new(onnxruntime(config, model, &layouts).map_err(wrong)?.because(reason))
            }
        };
        let weight = match config.rankers.get(&model.name) {
            Some(weight) => *weight,
            None if config.rankers.is_empty() && at == 0 => 1.0,
            None => 0.0,
        };
        rankers.push(LoadedRanker { layouts, ranker, parts, items, weight });
    }
    if requests.is_some() {
        generation.ranker_reports.get_or_init(|| rankers.iter().map(|r| r.ranker.report()).collect());
    }
    Ok(rankers)
}

fn layouts(model: &RankerModel, generation: &Generation) -> Result<Vec<Layout>, String> {
    let layout = |input: &ranking::manifest::RankerInput| {
        let layout = Layout::compile(&input.columns, generation);
        layout.map_err(|e| format!("ranker `{}`: input `{}`: {e}", model.name, input.name))
    };
    model.manifest.inputs.iter().map(layout).collect()
}

fn trees(model: &RankerModel, layouts: &[Layout]) -> Result<Option<TreeRanker>, String> {
    let widths: Vec<usize> = layouts.iter().map(Layout::width).collect();
    tree_model::load(&model.name, &model.onnx, &model.manifest, &widths).map_err(|e| e.to_string())
}

fn general(model: &RankerModel, layouts: &[Layout], pool: &Arc<ThreadPool>) -> Result<OnnxRanker, String> {
    let widths: Vec<usize> = layouts.iter().map(Layout::width).collect();
    OnnxRanker::load(&model.name, &model.onnx, &model.manifest, &widths, pool.clone()).map_err(|e| e.to_string())
}

fn onnxruntime(config: &PipelineConfig, model: &RankerModel, layouts: &[Layout]) -> Result<OnnxRuntimeRanker, String> {
    let widths: Vec<usize> = layouts.iter().map(Layout::width).collect();
    let loaded = OnnxRuntimeRanker::load(&model.name, &model.onnx, &model.manifest, &widths, &config.onnxruntime);
    loaded.map_err(|e| e.to_string())
}

/// Finds out what computes each ranker, and compiles what the engine for dense networks can.
fn prepare(
    config: &PipelineConfig,
    generation: &Generation,
    pool: &Arc<ThreadPool>,
    requests: Option<&dyn Fn() -> Vec<Request>>,
) -> Shared {
    let mut made: Option<Vec<Request>> = None;
    let mut models = Vec::new();
    for model in &generation.rankers {
        let layouts = layouts(model, generation)?;
        let engine = match config.engine(&model.name, &model.manifest) {
            // The GPU's; here it is what a GPU that fails leaves to the CPU.
            Engine::TensorRt => Engine::Auto,
            engine => engine,
        };
        let refused =
            |engine: &str, reason: &str| format!("ranker `{}`: not on engine `{engine}`: {reason}", model.name);
        // Tree ensembles are each worker's own, and not of the general runtime.
        if matches!(engine, Engine::Auto | Engine::Trees) && trees(model, &layouts)?.is_some() {
            models.push(Prepared::Trees);
            continue;
        }
        if engine == Engine::Trees {
            return Err(refused("trees", "it is no ensemble of trees"));
        }
        ranking::check_ids(&model.onnx).map_err(|reason| format!("ranker `{}`: {reason}", model.name))?;
        if engine == Engine::OnnxRuntime {
            onnxruntime(config, model, &layouts)?;
            models.push(Prepared::OnnxRuntime(None));
            continue;
        }
        let mut general = match general(model, &layouts, pool) {
            Ok(general) => general,
            Err(reason) if engine == Engine::Auto && !config.onnxruntime.is_empty() => {
                onnxruntime(config, model, &layouts).map_err(|also| format!("{reason}; {also}"))?;
                tracing::info!(ranker = model.name, reason, "runs on ONNX Runtime");
                models.push(Prepared::OnnxRuntime(Some(reason)));
                continue;
            }
            Err(reason) => return Err(reason),
        };
        if engine == Engine::Rten {
            models.push(Prepared::General(None));
            continue;
        }
        let graph = match ranking::recognise(&mut general, &model.onnx, &model.manifest) {
            Ok(graph) => graph,
            Err(reason) if engine == Engine::Dense => return Err(refused("dense", &reason)),
            Err(reason) => {
                tracing::info!(ranker = model.name, reason, "runs on the general ONNX runtime");
                models.push(Prepared::General(Some(reason)));
                continue;
            }
        };
        let kernel = Kernel::detect();
        let Some(requests) = requests else {
            models.push(Prepared::Dense(Arc::new(Model::plain(&model.name, &graph, kernel))));
            continue;
        };
        let Calibration { precision, .. } = model.manifest.calibration;
        let items = ItemColumns { layout: Layout::part(&layouts, |d| d == Dependence::Item), generation };
        let width: usize = layouts.iter().map(Layout::width).sum();
        let made = made.get_or_insert_with(requests);
        let mut scratch = FeatureScratch::default();
        let mut left = SAMPLE_VALUES;
        let mut samples = Vec::new();
        for request in made.iter() {
            let values = request.candidates.len() * width;
            if values > left {
                break;
            }
            left -= values;
            samples.push(request.sample(generation, &layouts, &mut scratch));
        }
        if precision != Wanted::F32 && samples.is_empty() {
            tracing::warn!(ranker = model.name, "no requests to measure precisions on; f32 it is");
        }
        let setting = Setting {
            columns: layouts.iter().map(Layout::dependences).collect(),
            items: (items.layout.width() > 0).then_some(&items as &dyn Items),
            table_bytes: usize::try_from(config.item_table_bytes).unwrap_or(usize::MAX),
            samples,
        };
        let dense = Model::new(&model.name, &graph, &model.manifest.calibration, &setting, kernel);
        tracing::info!(ranker = model.name, "{}", dense.report());
        models.push(Prepared::Dense(Arc::new(dense)));
    }
    Ok(models)
}

/// The columns of items, from the generation.
struct ItemColumns<'a> {
    layout: Layout,
    generation: &'a Generation,
}

impl Items for ItemColumns<'_> {
    fn len(&self) -> usize {
        self.generation.items.len()
    }

    fn fill(&self, rows: Range<u32>, out: &mut Vec<f32>) {
        self.layout.fill_items(self.generation, rows, &mut FeatureScratch::default(), out);
    }
}

/// A request with the candidates that the sources gave it.
pub struct Request {
    job: Box<Job>,
    candidates: Candidates,
    signals: crate::retrieval::collaborative::Signals,
    index: Option<Arc<dyn VectorIndex>>,
}

impl Request {
    fn sample(&self, generation: &Generation, layouts: &[Layout], scratch: &mut FeatureScratch) -> Sample {
        let Request { job, candidates, signals, index } = self;
        let fill = |layout: &Layout| {
            let mut out = Vec::new();
            let inputs = super::Gathered { generation, index: index.as_deref(), job, signals, candidates };
            inputs.fill(layout, candidates.len(), scratch, &mut out);
            out
        };
        Sample { inputs: layouts.iter().map(fill).collect(), rows: candidates.rows.clone() }
    }
}

/// Requests of users spread over the bundle's, or, where it knows none, of nobody who likes some items; always the same.
pub fn requests(config: &PipelineConfig, loaded: &mut Loaded) -> Vec<Request> {
    let generation = loaded.generation.clone();
    jobs(config, &generation, SAMPLE_USERS)
        .map(|mut job| {
            let mut scratch = Scratch::default();
            scratch.seen.begin(generation.items.len());
            for &row in &job.user.seen {
                scratch.seen.insert(row);
            }
            loaded.retrieve(config, &mut scratch, &mut job, Asked::NONE);
            let mut candidates = Candidates::default();
            merge(&scratch.lists, generation.items.len(), &mut scratch.merge, &mut candidates);
            Request { job, candidates, signals: scratch.signals, index: loaded.index.clone() }
        })
        .filter(|request| request.candidates.len() > 1)
        .collect()
}

/// Jobs of up to `n` users.
fn jobs<'a>(
    config: &'a PipelineConfig,
    generation: &'a Arc<Generation>,
    n: usize,
) -> impl Iterator<Item = Box<Job>> + use<'a> {
    let (n_users, n_items) = (generation.users.len(), generation.items.len());
    let known = n_users > 0 && !generation.histories.offsets.is_empty();
    let n = if known {
        n.min(n_users)
    } else if n_items > 0 {
        n
    } else {
        0
    };
    (0..n).map(move |at| {
        let mut job = Box::new(Job::new(generation.clone()));
        job.deadline = crate::context::Deadline::after(std::time::Duration::from_secs(3600));
        job.task = Task::Recommend { top_m: config.top_m(config.default_n_items), explain: false };
        job.context.assign(&[]);
        let user = &mut job.user;
        if known {
            let row = (at * n_users / n) as u32;
            user.row = Some(row);
            let history = generation.histories.of(row);
            let skip = history.len().saturating_sub(config.history_length as usize);
            user.seen.extend(generation.histories.of(row).map(|entry| entry.row));
            user.history.extend(history.skip(skip));
            if let (Some(vectors), Some(_)) = (&generation.user_embeddings, &generation.item_embeddings) {
                vectors.extend_row(row, &mut user.vector);
            }
        } else {
            // A stride that is no divisor of usual sizes walks all over the catalogue.
            let rows = (0..20).map(|entry| ((at * 20 + entry) * 7_919 % n_items) as u32);
            user.history.extend(rows.map(|row| Interaction { row, weight: 1.0 }));
            user.seen.extend(user.history.iter().map(|entry| entry.row));
            if let (Some(vectors), Some(liked)) = (&generation.item_embeddings, user.history.first()) {
                vectors.extend_row(liked.row, &mut user.vector);
            }
        }
        user.seen.sort_unstable();
        job
    })
}

/// Answers some requests to nobody, so that the first to somebody finds memory and code where it wants them.
pub fn warm_up(config: &PipelineConfig, loaded: &mut Loaded, scratch: &mut Scratch) {
    let generation = loaded.generation.clone();
    for mut job in jobs(config, &generation, WARM_UPS) {
        loaded.execute(config, scratch, &mut job, Asked::NONE);
    }
}

/// How each ranker of a generation is computed.
///
/// # Errors
/// What can't be loaded.
pub fn reports(config: PipelineConfig, generation: &Arc<Generation>) -> Result<Vec<(String, Report)>, DeviceError> {
    let mut result = Ok(Vec::new());
    super::with_device(Arc::new(config), |device| {
        result = crate::device::Device::load(device, generation).map(|()| {
            let loaded = device.loaded.front().into_iter().flat_map(|loaded| &loaded.rankers);
            loaded.map(|r| (r.ranker.name().to_owned(), r.ranker.report())).collect()
        });
    });
    result
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::CpuDevice;
    use super::*;
    use crate::catalog::generation::testing;
    use crate::device::Device;

    /// 300 items with vectors and popularity, and the demo's ranker, `precision` as asked for.
    fn generation(precision: Wanted) -> Arc<Generation> {
        let mut next = crate::testing::noise(3);
        let mut generation = testing::with_embeddings((0..300 * 8).map(|_| next()).collect(), 8);
        generation.popularity = (0..300).map(|_| next() + 0.5).collect::<Vec<f32>>().into();
        generation.trending.rows = (0..300).collect::<Vec<u32>>().into();
        generation.trending.scores = (0..300).map(|at| 300.0 - at as f32).collect::<Vec<f32>>().into();
        let engines = Path::new(env!("CARGO_MANIFEST_DIR")).join("engines");
        let manifest = std::fs::read_to_string(engines.join("demo.toml")).unwrap();
        let mut manifest: ranking::manifest::RankerManifest = toml::from_str(&manifest).unwrap();
        manifest.calibration.precision = precision;
        generation.rankers = vec![RankerModel { name: "main".into(), manifest, onnx: engines.join("demo.onnx") }];
        Arc::new(generation)
    }

    #[test]
    fn a_ranker_in_parts_scores_as_the_whole() {
        for bytes in [1 << 20, 0] {
            let generation = generation(Wanted::Auto);
            let config = Arc::new(PipelineConfig { item_table_bytes: bytes, ..PipelineConfig::default() });
            let mut device = CpuDevice::new(config.clone(), Arc::new(ThreadPool::with_num_threads(1)));
            device.load(&generation).unwrap();
            let model = &generation.rankers[0];
            let report = device.loaded[0].rankers[0].ranker.report();
            assert!(report.split && (report.table_bytes > 0) == (bytes > 0), "{report}");
            let mut batch: Vec<Box<Job>> = jobs(&config, &generation, 5).collect();
            device.execute(&mut batch).unwrap();
            for job in batch {
                // The candidates of the last job are the device's; each is run again to become the last.
                let mut again = vec![job];
                device.execute(&mut again).unwrap();
                let job = &again[0];
                assert!(job.degraded.is_empty() && job.ranked.n_candidates > 100);
                let columns = &model.manifest.inputs[0].columns;
                let (features, width) = device.features(job, columns).unwrap();
                let layouts = layouts(model, &generation).unwrap();
                let mut whole = general(model, &layouts, &device.pool).unwrap();
                let mut scores = Vec::new();
                whole.score(std::slice::from_ref(&features), features.len() / width, &mut scores).unwrap();
                let rows = &device.scratch.candidates.rows;
                for item in &job.ranked.items {
                    let want = scores[rows.binary_search(&item.row).unwrap()];
                    assert!((item.score - want).abs() <= 1e-3 * want.abs().max(1.0), "{} {want}", item.score);
                }
            }
        }
    }

    #[test]
    fn a_table_that_features_cannot_number_is_refused_by_every_engine() {
        use ranking::manifest::Engine;
        use rten_onnx::onnx::{GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto};

        let folder = tempfile::tempdir().unwrap();
        let onnx = folder.path().join("ids.onnx");
        let node = NodeProto {
            op_type: Some("Gather".into()),
            input: vec!["worth".into(), "features".into()],
            output: vec!["score".into()],
            ..NodeProto::default()
        };
        let input = ValueInfoProto { name: Some("features".into()), ..ValueInfoProto::default() };
        let table = TensorProto { name: Some("worth".into()), dims: vec![20_000_000, 1], ..TensorProto::default() };
        let (node, input, initializer) = (vec![node], vec![input], vec![table]);
        let graph = Some(GraphProto { node, input, initializer, ..GraphProto::default() });
        ModelProto { graph, ..ModelProto::default() }.write_file(std::fs::File::create(&onnx).unwrap()).unwrap();
        for engine in [Engine::Auto, Engine::Dense, Engine::Rten, Engine::OnnxRuntime] {
            let mut generation = Arc::into_inner(generation(Wanted::F32)).unwrap();
            generation.rankers[0].onnx = onnx.clone();
            generation.rankers[0].manifest.engine = engine;
            let config = Arc::new(PipelineConfig::default());
            let mut device = CpuDevice::new(config, Arc::new(ThreadPool::with_num_threads(1)));
            let error = device.load(&Arc::new(generation)).unwrap_err().to_string();
            let parts = ["`main`", "the Gather node of `score`", "20000000 rows", "`features`", "16777216"];
            assert!(parts.iter().all(|part| error.contains(part)), "{engine:?}: {error}");
        }
    }

    #[test]
    fn items_that_came_or_changed_score_as_in_a_bundle_of_them() {
        for bytes in [1 << 20, 0] {
            let made = |n: usize, before: bool| {
                let mut made = Arc::into_inner(generation(Wanted::F32)).unwrap();
                let matrix = made.item_embeddings.take().unwrap();
                let mut vectors = Vec::new();
                (0..n as u32).for_each(|row| matrix.extend_row(row, &mut vectors));
                // The bundle had another vector of every seventh.
                vectors.chunks_mut(8).step_by(7).filter(|_| before).for_each(|vector| vector.reverse());
                let mut popularity = made.popularity[..n].to_vec();
                popularity.iter_mut().skip(290).for_each(|popularity| *popularity = 0.0);
                let mut other = testing::with_embeddings(vectors, 8);
                other.trending = crate::catalog::generation::RankedList {
                    rows: (0..n as u32).collect::<Vec<_>>().into(),
                    scores: vec![1.0; n].into(),
                };
                (other.rankers, other.popularity) = (made.rankers, popularity.into());
                Arc::new(other)
            };
            let (old, new) = (made(290, true), made(300, false));
            let items = Arc::new(testing::changes(&old, &new));
            assert_eq!(items.n_entries(), 42 + 10);
            let config = Arc::new(PipelineConfig { item_table_bytes: bytes, ..PipelineConfig::default() });
            let scores = |generation: &Arc<Generation>, items: Option<&Arc<crate::catalog::live::LiveItems>>| {
                let mut device = CpuDevice::new(config.clone(), Arc::new(ThreadPool::with_num_threads(1)));
                device.load(generation).unwrap();
                let report = device.loaded[0].rankers[0].ranker.report();
                assert!(report.split && (report.table_bytes > 0) == (bytes > 0), "{report}");
                let mut job = Box::new(Job::new(generation.clone()));
                job.deadline = crate::context::Deadline::after(std::time::Duration::from_secs(60));
                job.items = items.cloned();
                job.user.vector = (0..8).map(|at| at as f32 / 4.0 - 1.0).collect();
                job.user.history = [3, 7, 295].map(|row| Interaction { row, weight: 1.0 }).into();
                job.task = Task::Rank { rows: (0..300).collect(), ranker: 0 };
                // Twice: the second time lines are there.
                let mut twice = [(); 2].map(|()| {
                    job.ranked.clear();
                    device.execute(std::slice::from_mut(&mut job)).unwrap();
                    assert!(job.failure.is_none() && job.degraded.is_empty());
                    job.ranked.items.iter().map(|item| item.score).collect::<Vec<f32>>()
                });
                assert_eq!(twice[0], twice[1]);
                std::mem::take(&mut twice[0])
            };
            let (got, want) = (scores(&old, Some(&items)), scores(&new, None));
            for (row, (got, want)) in got.iter().zip(&want).enumerate() {
                assert!((got - want).abs() <= 1e-5 * want.abs().max(1.0), "{bytes} {row}: {got} {want}");
            }
            let lines = items.entries().filter(|(_, item)| item.lines[0].get().is_some()).count();
            assert_eq!(lines, if bytes > 0 { 52 } else { 0 });
        }
    }

    #[test]
    fn the_engine_is_what_was_asked_for() {
        let load = |manifest: Engine, config: PipelineConfig| {
            let mut generation = Arc::into_inner(generation(Wanted::F32)).unwrap();
            generation.rankers[0].manifest.engine = manifest;
            reports(config, &Arc::new(generation)).map(|reports| reports[0].1.engine).map_err(|e| e.to_string())
        };
        let asked = |engine: Engine| PipelineConfig {
            engines: [("main".to_owned(), engine)].into(),
            ..PipelineConfig::default()
        };
        assert_eq!(load(Engine::Auto, PipelineConfig::default()), Ok("dense"));
        assert_eq!(load(Engine::Dense, PipelineConfig::default()), Ok("dense"));
        assert_eq!(load(Engine::TensorRt, PipelineConfig::default()), Ok("dense"));
        assert_eq!(load(Engine::Rten, PipelineConfig::default()), Ok("rten"));
        assert_eq!(load(Engine::Trees, asked(Engine::Rten)), Ok("rten"));
        let error = load(Engine::Trees, PipelineConfig::default()).unwrap_err();
        assert!(error.contains("ranker `main`: not on engine `trees`: it is no ensemble of trees"), "{error}");
        let other = PipelineConfig { engines: [("other".to_owned(), Engine::Rten)].into(), ..asked(Engine::Rten) };
        let error = load(Engine::Auto, other).unwrap_err();
        assert!(error.contains("pipeline.engines names `other`"), "{error}");
        let Some(library) = crate::ranking::onnxruntime::library_for_tests() else { return };
        let config = PipelineConfig { onnxruntime: library, ..PipelineConfig::default() };
        assert_eq!(load(Engine::OnnxRuntime, config.clone()), Ok("onnxruntime"));
        // A model that the embedded runtime runs stays there, whatever is installed.
        assert_eq!(load(Engine::Auto, config), Ok("dense"));
    }

    #[test]
    fn precision_is_measured_on_requests_that_nobody_made() {
        let generation = generation(Wanted::Bf16);
        let [(name, report)] = &reports(PipelineConfig::default(), &generation).unwrap()[..] else {
            panic!("one ranker")
        };
        assert_eq!((name.as_str(), report.engine, report.samples.0), ("main", "dense", SAMPLE_USERS));
        let native = crate::ranking::precision::Precision::Bf16.is_native();
        assert!(!native || report.tried.len() == 1, "{report}");
        // Once for all workers.
        let shared = generation.shared_rankers.get().unwrap().downcast_ref::<Shared>().unwrap();
        let Prepared::Dense(model) = &shared.as_ref().unwrap()[0] else { panic!("a dense network") };
        assert_eq!(Arc::strong_count(model), 1);
    }
}
