//! Tree ensembles beside another engine, and small inferences together beside one by one.
//!
//! `cargo bench --bench trees`: 64 inferences that wait for one worker, put together and not, by each ranker of a small bundle.
//!
//! `trees MODEL OUTPUT WIDTH ROWS < commands` is for `benches/peers/trees/compare.py`, which compares with ONNX Runtime. ROWS is a file
//! of f32 `[n, WIDTH]`. It prints the scores as JSON, then reads a number of repetitions per line and prints the nanoseconds of CPU that
//! they took.

use std::io::{BufRead, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use tastemaker::catalog::build::{self, BuildOptions, Silent};
use tastemaker::catalog::bundle;
use tastemaker::catalog::synthetic::{self, SyntheticOptions};
use tastemaker::context::Deadline;
use tastemaker::device::batcher::{BatchLimits, Load};
use tastemaker::device::ring::JobQueue;
use tastemaker::device::worker::{self, JobSink};
use tastemaker::device::{Device, Job, Task, cpu};
use tastemaker::pipeline::PipelineConfig;
use tastemaker::pipeline::models::Model;
use tastemaker::ranking::{Ranker, tree_model};

fn cpu_ns() -> u64 {
    tastemaker::index::tune::cpu_time().as_nanos() as u64
}

fn main() -> anyhow::Result<()> {
    // `cargo bench` adds a flag of its own.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let [model, output, width, rows] = &arguments[..] else {
        return together();
    };
    let width: usize = width.parse()?;
    let rows: Vec<f32> = std::fs::read(rows)?.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
    let manifest = format!("[[inputs]]\nname = \"x\"\ncolumns = []\n[output]\nname = \"{output}\"");
    let manifest = toml::from_str(&manifest)?;
    let mut ranker = tree_model::load("trees", Path::new(model), &manifest, &[width])?.context("no trees")?;
    let (inputs, n, mut scores) = ([rows.clone()], rows.len() / width, Vec::new());
    ranker.score(&inputs, n, &mut scores)?;
    println!("{}", serde_json::to_string(&scores)?);
    for line in std::io::stdin().lock().lines() {
        let repetitions: u32 = line?.trim().parse()?;
        let start = cpu_ns();
        for _ in 0..repetitions {
            ranker.score(std::hint::black_box(&inputs), n, &mut scores)?;
        }
        println!("{}", cpu_ns() - start);
        std::io::stdout().flush()?;
    }
    Ok(())
}

/// Sums the scores of what comes back.
#[derive(Default)]
struct Answers(AtomicU64);

impl JobSink for Answers {
    fn deliver(&self, job: Box<Job>) {
        assert!(job.failure.is_none(), "{:?}", job.failure);
        let bits: u64 = job.ranked.scores.iter().map(|score| u64::from(score.to_bits())).sum();
        self.0.fetch_add(bits, Ordering::Relaxed);
    }
}

/// Times 64 waiting inferences, together and one by one, in turns.
fn together() -> anyhow::Result<()> {
    const JOBS: usize = 64;
    let (root, work) = (Path::new(env!("CARGO_MANIFEST_DIR")), tempfile::tempdir()?);
    let (data, out) = (work.path().join("data"), work.path().join("bundle"));
    synthetic::generate(&data, &SyntheticOptions { n_items: 600, n_users: 80, dim: 16, seed: 3 })?;
    std::fs::create_dir_all(data.join("rankers"))?;
    for (from, to) in [("engines/demo.onnx", "demo.onnx"), ("engines/demo.toml", "demo.toml")] {
        std::fs::copy(root.join(from), data.join("rankers").join(to))?;
    }
    std::fs::copy(root.join("tests/golden/trees/ranker.onnx"), data.join("rankers/trees.onnx"))?;
    let columns = ["a", "b", "c", "d", "e", "f"].map(|key| format!("\"context.{key}\"")).join(", ");
    let manifest = format!("[[inputs]]\nname = \"x\"\ncolumns = [{columns}]\n[output]\nname = \"variable\"");
    std::fs::write(data.join("rankers/trees.toml"), manifest)?;
    build::build(&data, &out, &BuildOptions::default(), &Silent)?;
    let generation = Arc::new(bundle::open(&out)?);
    let models = Model::all(&generation).map_err(anyhow::Error::msg)?;
    println!("| ranker | rows each | one by one, µs per inference | together | ratio |\n|---|--:|--:|--:|--:|");
    cpu::with_device(Arc::new(PipelineConfig::default()), |device| {
        device.load(&generation).expect("a bundle that was built");
        for (ranker, model) in models.iter().enumerate() {
            for n in [1, 4, 16] {
                let mut run = |limits: BatchLimits| {
                    let (queue, answers) = (JobQueue::new(JOBS, 1), Arc::new(Answers::default()));
                    for at in 0..JOBS {
                        let mut job = Box::new(Job::new(generation.clone()));
                        job.deadline = Deadline::after(Duration::from_secs(60));
                        let value = |i: usize| ((at * 31 + i * 7919) % 2001) as f32 / 1000.0 - 1.0;
                        let inputs = model.inputs.iter().map(|i| (0..n * i.width).map(value).collect()).collect();
                        job.task = Task::Infer { ranker: ranker as u16, n: n as u32, inputs };
                        assert!(queue.push(job).is_ok());
                    }
                    queue.close();
                    let sink: Arc<dyn JobSink> = answers.clone();
                    let start = cpu_ns();
                    worker::run(device, &queue, 0, limits, &Load::default(), &sink);
                    ((cpu_ns() - start) as f64 / 1000.0 / JOBS as f64, answers.0.load(Ordering::Relaxed))
                };
                let mut times: Vec<[f64; 2]> = Vec::new();
                for _ in 0..201 {
                    let (one, alone) = run(BatchLimits { max_batch_size: 1, ..BatchLimits::CPU });
                    let (all, in_company) = run(BatchLimits::CPU);
                    assert_eq!(alone, in_company, "other scores in company");
                    times.push([one, all]);
                }
                let median = |of: &dyn Fn(&[f64; 2]) -> f64| {
                    let mut values: Vec<f64> = times.iter().map(of).collect();
                    values.sort_by(f64::total_cmp);
                    values[values.len() / 2]
                };
                let (one, all, ratio) = (median(&|t| t[0]), median(&|t| t[1]), median(&|t| t[0] / t[1]));
                println!("| {} | {n} | {one:.2} | {all:.2} | {ratio:.2} |", model.name);
            }
        }
    });
    Ok(())
}
