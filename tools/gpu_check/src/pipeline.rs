//! Recommendations that stay on the GPU from the neighbours to the slate: beside the CPU's, and how many a second, by batch and by stage.
#![expect(clippy::vec_box, reason = "a device executes boxes")]

use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use tastemaker::candidates::Source;
use tastemaker::catalog::generation::Generation;
use tastemaker::context::Deadline;
use tastemaker::device::cuda::engine::{CudaDevice, Launches};
use tastemaker::device::cuda::tensorrt;
use tastemaker::device::{Accelerator, Device as _, DeviceConfig, IndexChoice, Job, TableStorage, Task, cpu};
use tastemaker::pipeline::PipelineConfig;
use tastemaker::ranking::manifest::Engine;
use tastemaker::ranking::precision::Fidelity;

use crate::catalogue::{self, Network};
use crate::report::{PipelineSpeed, SlateCheck, StageShare};
use crate::search::Shape;

/// Batches that are looked at for the times of stages; the median counts.
const TIMED: usize = 7;
/// The least NDCG@10 of slates whose products are f32, and of those that are rounded: less is a defect and not a rounding.
const FLOORS: [f64; 2] = [0.999, 0.97];

/// What is measured, and how large.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Items and dimension.
    pub shape: Shape,
    /// Candidates from the nearest, from the history's neighbours and from what trends.
    pub sources: [u32; 3],
    /// Widths of networks are divided by this.
    pub share: usize,
    /// Sizes of batches, the largest last.
    pub batches: Vec<usize>,
    /// Workers at once, each with a stream; ascending, from one on.
    pub workers: Vec<usize>,
    /// Jobs that are compared with the CPU's.
    pub n_checked: usize,
    /// For each batch size.
    pub each: Duration,
    /// Nothing is begun after this.
    pub until: Instant,
    /// Number of the GPU.
    pub ordinal: u32,
    /// Of everything random.
    pub seed: u64,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    /// Slates beside the CPU's.
    pub checks: Vec<SlateCheck>,
    /// Speeds.
    pub speeds: Vec<PipelineSpeed>,
    /// What was left out or failed.
    pub notes: Vec<String>,
}

/// The networks of the records, the larger one first.
pub fn networks(share: usize) -> [Network; 2] {
    [Network::new(&[256, 512, 256, 128], share), Network::new(&[128, 256, 128], share)]
}

/// A network, and what computes it on the GPU.
#[derive(Clone, Copy, Debug)]
struct Trial<'a> {
    network: &'a Network,
    /// Of the ranker that the GPU is given.
    numbers: &'a str,
    tables: TableStorage,
    /// The folder of TensorRT's libraries where TensorRT is to compute it; empty: where the loader looks.
    tensorrt: Option<&'a Path>,
}

impl Trial<'_> {
    fn config(&self, plan: &Plan) -> PipelineConfig {
        let [ann_k, collaborative_k, trending_k] = plan.sources;
        let mut config =
            PipelineConfig { ann_k, collaborative_k, trending_k, search_k: 0, ..PipelineConfig::default() };
        // A million rows of the first layer's width.
        config.item_table_bytes = 8 << 30;
        if let Some(folder) = self.tensorrt {
            config.engines.insert(self.network.ranker(self.numbers), Engine::TensorRt);
            config.tensorrt = folder.display().to_string();
        }
        config
    }
}

/// Measures the recommendations of a made-up catalogue, ranked by each network in bf16, the larger one in f32 and over a table in
/// int8, too. What fails is in the notes.
///
/// # Errors
/// The catalogue can't be made.
pub fn bench(plan: &Plan, progress: &mut dyn FnMut(String)) -> Result<Found> {
    let networks = networks(plan.share);
    let [large, small] = &networks;
    let trial = |network, numbers| Trial { network, numbers, tables: TableStorage::F32, tensorrt: None };
    let narrow = Trial { tables: TableStorage::Int8, ..trial(large, "bf16") };
    over(plan, &networks, &[trial(large, "bf16"), trial(small, "bf16"), trial(large, "f32"), narrow], progress)
}

/// Whether this program was built with TensorRT, and its libraries are in `folder`, or where the loader looks if that is empty.
///
/// # Errors
/// What is missing.
pub fn tensorrt_is_there(folder: &Path) -> Result<(), tensorrt::Unavailable> {
    tensorrt::available(&PipelineConfig { tensorrt: folder.display().to_string(), ..PipelineConfig::default() })
}

/// The same, ranked by TensorRT's engines for the networks, whose libraries are in `folder`: the time of the stage `tensorrt` is its own.
///
/// # Errors
/// As [`bench`].
pub fn bench_tensorrt(plan: &Plan, folder: &Path, progress: &mut dyn FnMut(String)) -> Result<Found> {
    let networks = networks(plan.share);
    let trials = networks.each_ref().map(|network| Trial {
        network,
        numbers: "f32",
        tables: TableStorage::F32,
        tensorrt: Some(folder),
    });
    over(plan, &networks, &trials, progress)
}

fn over(plan: &Plan, networks: &[Network], trials: &[Trial<'_>], progress: &mut dyn FnMut(String)) -> Result<Found> {
    let work = tempfile::tempdir()?;
    let bundle = work.path().join("bundle");
    let begun = Instant::now();
    catalogue::make(&work.path().join("data"), &bundle, plan.shape, networks, plan.seed).context("the catalogue")?;
    progress(format!("a catalogue of {} x {} in {:.1} s", plan.shape.n, plan.shape.dim, begun.elapsed().as_secs_f64()));
    let mut found = Found::default();
    // The CPU's answers, by ranker.
    let mut references: Vec<(String, Answers)> = Vec::new();
    for trial in trials {
        let what = format!("{}, {}", trial.network.name(), trial.said(trial.numbers));
        if Instant::now() > plan.until {
            found.notes.push(format!("recommendations, {what}: left out, the time is over"));
            continue;
        }
        let ranker = trial.network.ranker("f32");
        if references.iter().all(|(of, _)| *of != ranker) {
            references.push((ranker.clone(), by_cpu(plan, trial, &catalogue::open(&bundle, &ranker)?)?));
        }
        let Some((_, wanted)) = references.iter().find(|(of, _)| *of == ranker) else { continue };
        let measured = catalogue::open(&bundle, &trial.network.ranker(trial.numbers))
            .and_then(|generation| trial.measure(plan, &generation, wanted, &mut found, progress));
        if let Err(error) = measured {
            progress(format!("{what}: {error:#}"));
            found.checks.push(SlateCheck {
                network: trial.network.name(),
                engine: trial.engine().into(),
                note: format!("{error:#}"),
                ..SlateCheck::default()
            });
        }
    }
    Ok(found)
}

/// For each job its candidates by row, with their scores.
type Answers = Vec<Vec<(u32, f32)>>;

fn answers(jobs: &[Box<Job>]) -> Answers {
    let of = |job: &Job| {
        let mut all: Vec<(u32, f32)> = job.ranked.items.iter().map(|item| (item.row, item.score)).collect();
        all.sort_unstable_by_key(|item| item.0);
        all
    };
    jobs.iter().map(|job| of(job)).collect()
}

fn by_cpu(plan: &Plan, trial: &Trial<'_>, generation: &Arc<Generation>) -> Result<Answers> {
    let mut asked = jobs(plan, generation, plan.n_checked, plan.sources.iter().sum())?;
    let mut done = Ok(());
    let config = Trial { tensorrt: None, ..*trial }.config(plan);
    cpu::with_device(Arc::new(config), |cpu| done = cpu.load(generation).and_then(|()| cpu.execute(&mut asked)));
    done?;
    Ok(answers(&asked))
}

/// Recommendations to users of the bundle, each with a vector of its own; the same for the same plan.
fn jobs(plan: &Plan, generation: &Arc<Generation>, n: usize, top_m: u32) -> Result<Vec<Box<Job>>> {
    let random = &mut SmallRng::seed_from_u64(plan.seed);
    let vectors = generation.user_embeddings.as_ref().context("the catalogue has no vectors")?;
    let n_users = vectors.n_rows();
    let one = |at: usize| {
        let (mut job, row) = (Box::new(Job::new(generation.clone())), (at % n_users) as u32);
        job.deadline = Deadline::after(Duration::from_secs(3600));
        job.task = Task::Recommend { top_m, explain: false };
        job.user.row = Some(row);
        vectors.extend_row(row, &mut job.user.vector);
        job.user.vector.iter_mut().for_each(|value| *value += random.random_range(-0.1..0.1));
        job.user.history.extend(generation.histories.of(row));
        job.user.seen.extend(generation.histories.of(row).map(|entry| entry.row));
        job.user.seen.sort_unstable();
        job
    };
    Ok((0..n).map(one).collect())
}

/// Makes jobs ask again what they asked.
fn again(jobs: &mut [Box<Job>]) {
    for job in jobs {
        job.ranked.clear();
        job.degraded.clear();
        (job.failure, job.timings) = (None, Default::default());
    }
}

/// The stage that a kernel or copy is of: [`StageShare::stage`].
fn stage(what: &'static str, is_merged: bool) -> &'static str {
    match what {
        "upload" | "download" => "copies",
        "exact_scores" if is_merged => "features",
        "scores_f32" | "scores_bf16" | "mask_seen" | "topk_select" | "partition_merge" | "exact_scores"
        | "settle_lists" | "name_places" => "retrieve",
        "merge_candidates" => "merge",
        "fill_columns" | "fill_counts" | "copy_columns" | "fill_series" | "find_places" => "features",
        "apply_changes" => "live items",
        "dense_rank" | "add_scores" | "assemble_rows" | "void_holes" => "rank",
        "finish_slates" => "select",
        other => other,
    }
}

/// Seconds of each stage, in the order in which they come.
fn stages(times: &[(&'static str, f64)]) -> Vec<(&'static str, f64)> {
    let (mut all, mut is_merged): (Vec<(&'static str, f64)>, _) = (Vec::new(), false);
    for &(what, seconds) in times {
        let stage = stage(what, is_merged);
        is_merged |= stage == "merge";
        match all.iter_mut().find(|known| known.0 == stage) {
            Some(known) => known.1 += seconds,
            None => all.push((stage, seconds)),
        }
    }
    all
}

/// The value below which that share of all lie.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(at.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    quantile(&all, 0.5)
}

/// What workers did side by side.
struct Crowd {
    /// Seconds of each batch, ascending.
    times: Vec<f64>,
    requests_per_second: f64,
}

/// Has `devices` execute batches of their own jobs side by side for `each`.
fn crowd(devices: &mut [CudaDevice], jobs: &[Vec<Box<Job>>], batch: usize, each: Duration) -> Result<Crowd> {
    /// Of one worker: a warm batch at least.
    const LEAST: usize = 3;
    let start = &Barrier::new(devices.len());
    let work = |device: &mut CudaDevice, jobs: &[Vec<Box<Job>>], nth: usize| {
        let mut own: Vec<Box<Job>> = jobs[nth].iter().take(batch).map(|job| again_of(job)).collect();
        let warm = device.execute(&mut own);
        start.wait();
        warm?;
        let (begun, mut times) = (Instant::now(), Vec::new());
        while times.len() < LEAST || (begun.elapsed() < each && times.len() < 100_000) {
            again(&mut own);
            let clock = Instant::now();
            device.execute(&mut own)?;
            times.push(clock.elapsed().as_secs_f64());
        }
        Ok::<_, anyhow::Error>((times, begun.elapsed().as_secs_f64()))
    };
    let done: Vec<Result<(Vec<f64>, f64)>> = std::thread::scope(|scope| {
        let started: Vec<_> =
            devices.iter_mut().enumerate().map(|(nth, device)| scope.spawn(move || work(device, jobs, nth))).collect();
        let ended = started.into_iter().map(|thread| thread.join());
        ended.map(|done| done.unwrap_or_else(|_| Err(anyhow::anyhow!("a worker panicked")))).collect()
    });
    let (mut times, mut requests_per_second) = (Vec::new(), 0.0);
    for done in done {
        let (own, seconds) = done?;
        requests_per_second += (own.len() * batch) as f64 / seconds;
        times.extend(own);
    }
    times.sort_by(f64::total_cmp);
    Ok(Crowd { times, requests_per_second })
}

impl Trial<'_> {
    fn engine(&self) -> &'static str {
        if self.tensorrt.is_some() { "TensorRT" } else { "dense" }
    }

    /// What it computes in, and the table if that is in others.
    fn said(&self, numbers: &str) -> String {
        let beside = if self.tables == TableStorage::Int8 { ", int8 table" } else { "" };
        format!("{numbers}{beside}")
    }

    /// Compares and measures on a generation that has the trial's ranker alone.
    fn measure(
        &self,
        plan: &Plan,
        generation: &Arc<Generation>,
        wanted: &Answers,
        found: &mut Found,
        progress: &mut dyn FnMut(String),
    ) -> Result<()> {
        let (n, name) = (plan.shape.n, self.network.name());
        let largest = plan.batches.iter().copied().max().unwrap_or(1);
        let n_workers = plan.workers.iter().copied().max().unwrap_or(1);
        let device = DeviceConfig {
            index: IndexChoice::Exact,
            tables: self.tables,
            max_batch_size: largest as u32,
            workspace_bytes: ((4 * n * largest) as u64).max(1 << 20),
            ..DeviceConfig::default()
        };
        let (begun, config) = (Instant::now(), Arc::new(self.config(plan)));
        let accelerator = Accelerator::open(plan.ordinal, &device, n_workers, generation)?;
        let mut devices = Vec::new();
        for _ in 0..n_workers {
            let mut device = accelerator.device(&config)?;
            device.load(generation)?;
            devices.push(device);
        }
        let report = generation.ranker_report(0).context("no model was loaded")?;
        let numbers = report.precision.name();
        progress(format!(
            "{name}, {}, {}: {n_workers} workers loaded in {:.1} s",
            self.engine(),
            self.said(numbers),
            begun.elapsed().as_secs_f64()
        ));
        if numbers != self.numbers {
            found.notes.push(format!("{name}: in {numbers}, for this machine's CPU has no {}", self.numbers));
        }
        let whole = &accelerator.counters().slates.whole;
        found.checks.push(self.compare(plan, generation, &mut devices[0], wanted, numbers)?);
        ensure!(whole.load(Relaxed) > 0, "no recommendation was computed on the GPU as a whole: the log says why");

        let top_m = config.top_m(config.default_n_items).min(plan.sources.iter().sum());
        let asked = jobs(plan, generation, largest * n_workers, top_m)?;
        let mut own: Vec<Vec<Box<Job>>> = Vec::new();
        let mut rest = asked.into_iter();
        for _ in 0..n_workers {
            own.push(rest.by_ref().take(largest).collect());
        }
        for &batch in &plan.batches {
            let seams = self.seams(&mut devices[0], &own[0], batch)?;
            let mut beaten = false;
            for &at_once in &plan.workers {
                // Small batches beside each other tell the same as large ones.
                if beaten || (at_once > 1 && batch != largest && batch * 8 != largest) {
                    continue;
                }
                if Instant::now() > plan.until {
                    found.notes.push(format!("recommendations, {name}, batch {batch}: left out, the time is over"));
                    beaten = true;
                    continue;
                }
                let before = whole.load(Relaxed);
                let done = crowd(&mut devices[..at_once], &own, batch, plan.each)?;
                let n_asked = (done.times.len() + at_once) * batch;
                found.speeds.push(PipelineSpeed {
                    dataset: format!("{n} x {}", plan.shape.dim),
                    network: name.clone(),
                    engine: self.engine().into(),
                    numbers: self.said(numbers),
                    candidates: plan.sources.iter().sum(),
                    batch,
                    workers: at_once,
                    p50_seconds: quantile(&done.times, 0.5),
                    p99_seconds: quantile(&done.times, 0.99),
                    requests_per_second: done.requests_per_second,
                    whole: (whole.load(Relaxed) - before) as f64 / n_asked as f64,
                    copies: seams.copies,
                    device_seconds: seams.device_seconds,
                    stages: seams.stages.clone(),
                });
            }
        }
        Ok(())
    }

    /// Slates of a network beside the CPU's in f32: the same candidates, and nearly the same order.
    fn compare(
        &self,
        plan: &Plan,
        generation: &Arc<Generation>,
        device: &mut CudaDevice,
        wanted: &Answers,
        numbers: &str,
    ) -> Result<SlateCheck> {
        let mut asked = jobs(plan, generation, plan.n_checked, plan.sources.iter().sum())?;
        device.execute(&mut asked)?;
        let got = answers(&asked);
        let rows = |list: &[(u32, f32)]| list.iter().map(|item| item.0).collect::<Vec<_>>();
        let n_same = got.iter().zip(wanted).filter(|(got, want)| rows(got) == rows(want)).count();
        let scores = |all: &Answers| -> Vec<Vec<f32>> {
            all.iter().map(|list| list.iter().map(|item| item.1).collect()).collect()
        };
        // Of other candidates nothing can be said.
        let fidelity = match n_same == wanted.len() {
            true => Fidelity::of(&scores(wanted), &scores(&got)),
            false => Fidelity { ndcg: 0.0, error: f64::INFINITY },
        };
        let is_f32 = numbers == "f32" && self.tables == TableStorage::F32 && self.tensorrt.is_none();
        let floor = FLOORS[usize::from(!is_f32)];
        let n_candidates = wanted.iter().map(Vec::len).sum::<usize>();
        let by_source = asked.iter().map(|job| job.ranked.n_by_source[Source::Ann as usize] as usize).sum::<usize>();
        ensure!(by_source > 0, "no neighbours were found");
        Ok(SlateCheck {
            network: self.network.name(),
            engine: self.engine().into(),
            numbers: self.said(numbers),
            jobs: wanted.len(),
            same_candidates: n_same,
            candidates: n_candidates as f64 / wanted.len().max(1) as f64,
            ndcg: fidelity.ndcg,
            score_error: fidelity.error,
            floor,
            is_same: n_same == wanted.len() && fidelity.ndcg >= floor,
            note: String::new(),
        })
    }

    /// What a batch takes on the GPU: in all, of a recorded graph, and by stage, of kernels that were launched one by one.
    fn seams(&self, device: &mut CudaDevice, jobs: &[Box<Job>], batch: usize) -> Result<Seams> {
        let mut own: Vec<Box<Job>> = jobs.iter().take(batch).map(|job| again_of(job)).collect();
        let (mut runs, mut recorded, mut copies) = (Vec::new(), Vec::new(), 0);
        // The first of each warms up.
        for at in 0..=TIMED {
            for launches in [Launches::OneByOne, Launches::Recorded] {
                again(&mut own);
                let times = device.execute_timed(&mut own, launches)?;
                copies = copies.max(times.iter().filter(|(what, _)| ["upload", "download"].contains(what)).count());
                match launches {
                    _ if at == 0 => {}
                    Launches::OneByOne => runs.push(stages(&times)),
                    Launches::Recorded => recorded.push(times.iter().map(|(_, seconds)| seconds).sum()),
                }
            }
        }
        let names: Vec<&str> = runs.first().map(|run| run.iter().map(|stage| stage.0).collect()).unwrap_or_default();
        let of = |name: &str| {
            let seconds = runs.iter().filter_map(|run| run.iter().find(|stage| stage.0 == name));
            median(seconds.map(|stage| stage.1).collect())
        };
        let stages = names.iter().map(|name| StageShare { stage: (*name).to_owned(), seconds: of(name) }).collect();
        Ok(Seams { copies, device_seconds: median(recorded), stages })
    }
}

/// A job that asks what another one asks.
fn again_of(job: &Job) -> Box<Job> {
    let mut copy = Box::new(Job::new(job.generation.clone()));
    (copy.deadline, copy.task, copy.user) = (job.deadline, job.task.clone(), job.user.clone());
    copy
}

struct Seams {
    copies: usize,
    device_seconds: f64,
    stages: Vec<StageShare>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_of_stages() {
        let times = [
            ("upload", 1.0),
            ("scores_f32", 2.0),
            ("exact_scores", 3.0),
            ("merge_candidates", 4.0),
            ("exact_scores", 5.0),
            ("dense_rank", 6.0),
            ("download", 7.0),
        ];
        let want = [("copies", 8.0), ("retrieve", 5.0), ("merge", 4.0), ("features", 5.0), ("rank", 6.0)];
        assert_eq!(stages(&times), want);
        let sorted: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!([0.5, 0.99, 1.0].map(|share| quantile(&sorted, share)), [100.0, 198.0, 200.0]);
        assert!(quantile(&[], 0.5).is_nan());
    }
}
