//! The engine that serves on a GPU beside the CPU's: the same jobs over the same made-up catalogue, exactly and by indexes of cuVS.
#![expect(clippy::vec_box, reason = "a device executes boxes")]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use tastemaker::catalog::build::{self, BuildOptions, Silent};
use tastemaker::catalog::bundle;
use tastemaker::catalog::generation::Generation;
use tastemaker::catalog::synthetic::{self, SyntheticOptions};
use tastemaker::context::Deadline;
use tastemaker::device::{self, Accelerator, Choice, Device, DeviceConfig, IndexChoice, Job, Storage, Task, cpu};
use tastemaker::index::{IndexKind, IndexOptions, SearchParams};
use tastemaker::pipeline::PipelineConfig;

use crate::report::{EngineCheck, EngineSpeed};

/// Jobs of a batch.
const BATCH: usize = 16;
/// Neighbours that are searched for.
const K: u32 = 100;

/// A catalogue, and the GPU that is to serve it.
#[derive(Clone, Copy, Debug)]
pub struct Setting<'a> {
    /// Items.
    pub n: usize,
    /// Of their vectors.
    pub dim: usize,
    /// Number of the GPU.
    pub ordinal: u32,
    /// Folder with cuVS.
    pub cuvs: Option<&'a Path>,
    /// Of everything random.
    pub seed: u64,
}

impl Setting<'_> {
    /// A bundle with an index of that kind in `work`, opened.
    fn generation(&self, work: &Path, kind: IndexKind) -> Result<Arc<Generation>> {
        let options = BuildOptions { index: IndexOptions::of(kind), ..BuildOptions::default() };
        self.made(&work.join("data"), &work.join(kind.name()), &options, false)
    }

    /// A graph that the GPU makes, as `--index cagra` does.
    fn by_cagra(&self, work: &Path) -> Result<Arc<Generation>> {
        let graphs = device::graph_maker(Choice::Cuda([self.ordinal].into_iter().collect()), self.cuvs)?;
        let index = IndexOptions::of(IndexKind::Hnsw);
        let options = BuildOptions { index, graphs: Some(graphs), ..BuildOptions::default() };
        self.made(&work.join("data"), &work.join("cagra"), &options, false)
    }

    /// The same with an exact index and the demo's ranker.
    fn ranked(&self, work: &Path) -> Result<Arc<Generation>> {
        self.made(&work.join("ranked-data"), &work.join("ranked"), &BuildOptions::default(), true)
    }

    fn made(&self, data: &Path, out: &Path, options: &BuildOptions, with_ranker: bool) -> Result<Arc<Generation>> {
        if !data.exists() {
            let options = SyntheticOptions { n_items: self.n, n_users: 100, dim: self.dim, seed: self.seed };
            synthetic::generate(data, &options)?;
        }
        if with_ranker {
            let rankers = data.join("rankers");
            std::fs::create_dir_all(&rankers)?;
            std::fs::write(rankers.join("demo.onnx"), include_bytes!("../../../engines/demo.onnx"))?;
            std::fs::write(rankers.join("demo.toml"), include_str!("../../../engines/demo.toml"))?;
        }
        build::build(data, out, options, &Silent)?;
        Ok(Arc::new(bundle::open(out)?))
    }

    fn config(&self, index: IndexChoice, vectors: Storage) -> DeviceConfig {
        let cuvs = self.cuvs.map_or_else(String::new, |folder| folder.display().to_string());
        DeviceConfig { index, vectors, cuvs, ..DeviceConfig::default() }
    }
}

/// Searches by vectors near items', and recommendations to users who are such vectors.
fn jobs(generation: &Arc<Generation>, n: usize, k: u32, params: SearchParams, seed: u64) -> Result<Vec<Box<Job>>> {
    let random = &mut SmallRng::seed_from_u64(seed);
    let matrix = generation.item_embeddings.as_ref().context("the catalogue has no vectors")?;
    let mut one = |at: usize| {
        let mut job = Box::new(Job::new(generation.clone()));
        job.deadline = Deadline::after(Duration::from_secs(3600));
        let mut vector = Vec::new();
        matrix.extend_row(random.random_range(0..matrix.n_rows()) as u32, &mut vector);
        vector.iter_mut().for_each(|value| *value += random.random_range(-0.1..0.1));
        if at.is_multiple_of(2) {
            (job.search.vectors, job.search.params) = (vector, params);
            job.task = Task::Search { k, n_queries: None };
        } else {
            let mut seen: Vec<u32> = (0..20).map(|_| random.random_range(0..matrix.n_rows()) as u32).collect();
            seen.sort_unstable();
            seen.dedup();
            (job.user.vector, job.user.seen) = (vector, seen);
            job.task = Task::Recommend { top_m: 50, explain: false };
        }
        job
    };
    Ok((0..n).map(&mut one).collect())
}

/// Runs `body` with the engines of the GPU and of the CPU, both with the generation loaded, and the GPU's accelerator.
fn with_both<R: Send>(
    generation: &Arc<Generation>,
    ordinal: u32,
    config: &DeviceConfig,
    body: impl FnOnce(&Accelerator, &mut dyn Device, &mut dyn Device) -> Result<R> + Send,
) -> Result<R> {
    let pipeline = Arc::new(PipelineConfig { ann_k: K, ..PipelineConfig::default() });
    let accelerator = Accelerator::open(ordinal, config, 1, generation)?;
    let (make, _tables) = accelerator.make(&pipeline);
    let mut gpu = make()?;
    gpu.load(generation)?;
    let mut result = Err(anyhow::anyhow!("the CPU's engine did not run"));
    cpu::with_device(pipeline, |cpu| {
        result = cpu.load(generation).map_err(anyhow::Error::from).and_then(|()| body(&accelerator, &mut *gpu, cpu));
    });
    result
}

/// What was found for a job: rows with scores.
fn found(job: &Job) -> Vec<(u32, u32)> {
    job.ranked.items.iter().map(|item| (item.row, item.score.to_bits())).collect()
}

/// Share of the rows that were wanted.
fn recall(got: &[(u32, u32)], want: &[(u32, u32)]) -> (usize, usize) {
    let is_found = |row: &&(u32, u32)| got.iter().any(|found| found.0 == row.0);
    (want.iter().filter(is_found).count(), want.len())
}

/// Holds the GPU's engine against the CPU's exact one: exactly, from vectors in f32 and bf16, to the bit; and, with cuVS, by the index of
/// each kind at the highest effort. What fails is among the results, and the others go on.
///
/// # Errors
/// The catalogue can't be made.
pub fn check(setting: &Setting<'_>, n_jobs: usize, with_cuvs: bool, until: Instant) -> Result<Vec<EngineCheck>> {
    let work = tempfile::tempdir()?;
    let exact = setting.generation(work.path(), IndexKind::BruteForce)?;
    let mut all = Vec::new();
    for (what, vectors) in [("exactly, f32", Storage::F32), ("exactly, bf16", Storage::Bf16)] {
        let config = setting.config(IndexChoice::Exact, vectors);
        all.push(judged(what, 1.0, one(setting, (&exact, &exact), &config, n_jobs)));
    }
    let ranked = setting.ranked(work.path()).and_then(|ranked| whole(setting, &ranked, n_jobs));
    all.push(judged("recommendations as a whole", 0.999, ranked));
    let kinds = [(IndexKind::IvfFlat, 0.999), (IndexKind::IvfPq, 0.9), (IndexKind::Hnsw, 0.9)];
    for (kind, floor) in kinds.into_iter().filter(|_| with_cuvs) {
        let what = format!("by the index of {kind}");
        if Instant::now() > until {
            all.push(EngineCheck {
                what,
                floor,
                note: "the time is over".into(),
                is_same: true,
                ..EngineCheck::default()
            });
            continue;
        }
        let config = setting.config(IndexChoice::Bundle, Storage::F32);
        let made = setting.generation(work.path(), kind);
        all.push(judged(&what, floor, made.and_then(|made| one(setting, (&made, &exact), &config, n_jobs))));
    }
    if with_cuvs && Instant::now() <= until {
        let made = setting.by_cagra(work.path()).and_then(|made| walked(setting, (&made, &exact), n_jobs));
        all.push(judged("the CPU's, by a graph of CAGRA's", 0.9, made));
    }
    Ok(all)
}

/// How many searches the CPU answered by the graph of `generation`, and what share of what it finds in `exact` it found.
fn walked(
    setting: &Setting<'_>,
    (generation, exact): (&Arc<Generation>, &Arc<Generation>),
    n_jobs: usize,
) -> Result<(u32, f64)> {
    let effort = SearchParams { ef_search: Some(1024), ..SearchParams::default() };
    let answered = |generation: &Arc<Generation>| -> Result<Vec<Box<Job>>> {
        let mut asked = jobs(generation, n_jobs, K, effort, setting.seed)?;
        asked.retain(|job| matches!(job.task, Task::Search { .. }));
        let mut done = Ok(());
        cpu::with_device(Arc::default(), |cpu| done = cpu.execute(&mut asked));
        done?;
        Ok(asked)
    };
    let (got, want) = (answered(generation)?, answered(exact)?);
    let shares = got.iter().zip(&want).map(|(got, want)| recall(&found(got), &found(want)));
    let (hits, all) = shares.fold((0, 0), |sum, share| (sum.0 + share.0, sum.1 + share.1));
    ensure!(all > 0, "nothing was found");
    Ok((got.len() as u32, hits as f64 / all as f64))
}

fn judged(what: &str, floor: f64, done: Result<(u32, f64)>) -> EngineCheck {
    let what = what.to_owned();
    match done {
        Ok((jobs, recall)) => EngineCheck { what, jobs, recall, floor, is_same: recall >= floor, note: String::new() },
        Err(error) => EngineCheck { what, floor, note: format!("{error:#}"), ..EngineCheck::default() },
    }
}

/// How many jobs, and what share of what the CPU finds in `exact` the GPU finds: of an exact one also the scores' bits.
fn one(
    setting: &Setting<'_>,
    (generation, exact): (&Arc<Generation>, &Arc<Generation>),
    config: &DeviceConfig,
    n_jobs: usize,
) -> Result<(u32, f64)> {
    // All lists, and as many candidates as the CPU's and cuVS's graphs take alike.
    let params = SearchParams { n_probes: Some(65_536), refine_ratio: None, ef_search: Some(1024) };
    let by_index = config.index == IndexChoice::Bundle;
    with_both(generation, setting.ordinal, config, |accelerator, gpu, cpu| {
        let (mut share, mut n) = ((0, 0), 0);
        for from in (0..n_jobs).step_by(BATCH) {
            let make = |generation| jobs(generation, BATCH, K, params, setting.seed.wrapping_add(from as u64));
            let (mut got, mut want) = (make(generation)?, make(exact)?);
            gpu.execute(&mut got)?;
            cpu.execute(&mut want)?;
            for (got, want) in got.iter().zip(&want) {
                // What is recommended also follows from ranks, which are those of the bundle's own index.
                if by_index && matches!(got.task, Task::Recommend { .. }) {
                    continue;
                }
                let (got, want) = (found(got), found(want));
                let (hits, all) = if by_index { recall(&got, &want) } else { (usize::from(got == want), 1) };
                share = (share.0 + hits, share.1 + all);
                n += 1;
            }
        }
        let searched = accelerator.counters().by_index.load(Relaxed);
        ensure!(!by_index || searched > 0, "no search was by cuVS: the log says why");
        ensure!(share.1 > 0, "nothing was found");
        Ok((n, share.0 as f64 / share.1 as f64))
    })
}

/// How many recommendations that a ranker orders the GPU computed from the neighbours to the slate, and what share of the CPU's items they
/// have: rounding may exchange the last ones.
fn whole(setting: &Setting<'_>, generation: &Arc<Generation>, n_jobs: usize) -> Result<(u32, f64)> {
    let config = setting.config(IndexChoice::Exact, Storage::F32);
    with_both(generation, setting.ordinal, &config, |accelerator, gpu, cpu| {
        let mut share = (0, 0);
        for from in (0..n_jobs).step_by(BATCH) {
            let make = || -> Result<Vec<Box<Job>>> {
                let seed = setting.seed.wrapping_add(from as u64);
                let mut all = jobs(generation, BATCH, K, SearchParams::default(), seed)?;
                all.retain(|job| matches!(job.task, Task::Recommend { .. }));
                Ok(all)
            };
            let (mut got, mut want) = (make()?, make()?);
            gpu.execute(&mut got)?;
            cpu.execute(&mut want)?;
            for (got, want) in got.iter().zip(&want) {
                let (hits, all) = recall(&found(got), &found(want));
                share = (share.0 + hits, share.1 + all);
            }
        }
        let n = accelerator.counters().slates.whole.load(Relaxed);
        ensure!(n > 0, "no recommendation was computed on the GPU as a whole: the log says why");
        Ok((n as u32, share.0 as f64 / share.1.max(1) as f64))
    })
}

/// Searches and recommendations a second of both engines, one worker each, in batches.
///
/// # Errors
/// The catalogue can't be made, or an engine fails.
pub fn bench(setting: &Setting<'_>, batches: &[usize], each: Duration, until: Instant) -> Result<Vec<EngineSpeed>> {
    let work = tempfile::tempdir()?;
    let generation = setting.generation(work.path(), IndexKind::BruteForce)?;
    let config = setting.config(IndexChoice::Exact, Storage::F32);
    with_both(&generation, setting.ordinal, &config, |_, gpu, cpu| {
        let mut all = Vec::new();
        for &batch in batches {
            for name in ["gpu", "cpu"] {
                if Instant::now() > until {
                    return Ok(all);
                }
                let (mut times, end) = (Vec::new(), Instant::now() + each);
                while times.len() < 3 || (Instant::now() < end && times.len() < 2000) {
                    let mut asked = jobs(&generation, batch, K, SearchParams::default(), times.len() as u64)?;
                    let begun = Instant::now();
                    if name == "gpu" { gpu.execute(&mut asked) } else { cpu.execute(&mut asked) }?;
                    times.push(begun.elapsed().as_secs_f64());
                }
                times.sort_by(f64::total_cmp);
                let seconds = times[times.len() / 2];
                all.push(EngineSpeed {
                    device: name.into(),
                    dataset: format!("{} x {}", setting.n, setting.dim),
                    batch,
                    seconds,
                    jobs_per_second: batch as f64 / seconds,
                });
            }
        }
        Ok(all)
    })
}
