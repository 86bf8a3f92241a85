//! Rankers on one core, asked over stdin a line of JSON at a time: `benches/peers/rank_bench` starts this beside its own engines and
//! takes turns. `cargo bench --bench rank -- --json`; without `--json` it measures nothing.
#![allow(unsafe_code)] // A clock, and instructions for the core's ceiling.

use std::collections::HashMap;
use std::hint::black_box;
use std::io::{BufRead, Write};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, anyhow, bail};
use rten::ThreadPool;
use serde::Deserialize;
use serde_json::{Value, json};
use tastemaker::candidates::Dependence;
use tastemaker::index::Kernel;
use tastemaker::ranking::dense::{DenseRanker, Items, Model, Sample, Setting};
use tastemaker::ranking::manifest::{Calibration, RankerInput, RankerManifest, RankerOutput};
use tastemaker::ranking::onnx::OnnxRanker;
use tastemaker::ranking::precision::Wanted;
use tastemaker::ranking::{self, Ranker, tree_model};

#[derive(Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
enum Command {
    /// Makes every engine that can run the model.
    Load {
        name: String,
        onnx: PathBuf,
        /// Name and runs of columns: what they depend on, how many.
        inputs: Vec<(String, Vec<(String, usize)>)>,
        /// f32, `[items, item columns]`.
        items: PathBuf,
        /// By request: f32 `[n, width]` of every input, one after another, then u32 rows `[n]`.
        samples: Vec<PathBuf>,
        n: usize,
    },
    /// CPU time of each of `rounds` calls, by request in turn, and the scores of the first `samples` requests.
    Run { name: String, engine: String, batch: usize, rounds: usize, scores: bool },
    /// Billions of multiplications and additions per second in registers: f32, bf16, int8.
    Peak,
}

struct Catalogue {
    columns: Vec<f32>,
    width: usize,
}

impl Items for Catalogue {
    fn len(&self) -> usize {
        self.columns.len().checked_div(self.width).unwrap_or(0)
    }

    fn fill(&self, rows: Range<u32>, out: &mut Vec<f32>) {
        out.clear();
        out.extend_from_slice(&self.columns[rows.start as usize * self.width..rows.end as usize * self.width]);
    }
}

/// One engine with one model.
enum Engine {
    Whole(Box<dyn Ranker>),
    Parts(DenseRanker),
}

/// A model with its requests.
struct Loaded {
    engines: HashMap<String, Engine>,
    columns: Vec<Vec<Dependence>>,
    samples: Vec<Sample>,
}

/// A request cut to a batch, whole and in parts.
struct Cut {
    inputs: Vec<Vec<f32>>,
    rows: Vec<u32>,
    request: Vec<f32>,
    candidates: Vec<f32>,
}

fn cut(sample: &Sample, columns: &[Vec<Dependence>], n: usize) -> Cut {
    let line = |row: usize, wanted: Dependence| {
        sample.inputs.iter().zip(columns).flat_map(move |(values, columns)| {
            let line = &values[row * columns.len()..(row + 1) * columns.len()];
            line.iter().zip(columns).filter(move |(_, d)| **d == wanted).map(|(v, _)| *v)
        })
    };
    Cut {
        inputs: sample.inputs.iter().zip(columns).map(|(v, c)| v[..n * c.len()].to_vec()).collect(),
        rows: sample.rows[..n].to_vec(),
        request: line(0, Dependence::Request).collect(),
        candidates: (0..n).flat_map(|row| line(row, Dependence::Candidate)).collect(),
    }
}

fn cpu_ns() -> u64 {
    tastemaker::index::tune::cpu_time().as_nanos() as u64
}

fn bytes(path: &PathBuf) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| path.display().to_string())
}

/// Little-endian numbers of four bytes.
fn numbers<T: bytemuck::Pod>(bytes: &[u8]) -> Vec<T> {
    bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect()
}

fn load(command: &Command, pool: &Arc<ThreadPool>) -> anyhow::Result<(Loaded, Value)> {
    let Command::Load { name, onnx, inputs, items, samples, n } = command else { bail!("another command") };
    let dependence = |of: &str| match of {
        "request" => Ok(Dependence::Request),
        "item" => Ok(Dependence::Item),
        "candidate" => Ok(Dependence::Candidate),
        _ => Err(anyhow!("columns of `{of}`")),
    };
    let mut columns = Vec::new();
    for (_, runs) in inputs {
        let mut all = Vec::new();
        for (of, len) in runs {
            all.extend(vec![dependence(of)?; *len]);
        }
        columns.push(all);
    }
    let widths: Vec<usize> = columns.iter().map(Vec::len).collect();
    let of_items = columns.iter().flatten().filter(|d| **d == Dependence::Item).count();
    let catalogue = Catalogue { columns: numbers(&bytes(items)?), width: of_items };
    let mut requests = Vec::new();
    for path in samples {
        let bytes = bytes(path)?;
        let (mut inputs, mut at) = (Vec::new(), 0);
        for width in &widths {
            inputs.push(numbers(&bytes[at..at + n * width * 4]));
            at += n * width * 4;
        }
        requests.push(Sample { inputs, rows: numbers(&bytes[at..]) });
    }
    let manifest = RankerManifest {
        inputs: inputs.iter().map(|(name, _)| RankerInput { name: name.clone(), columns: Vec::new() }).collect(),
        output: RankerOutput { name: "score".to_owned(), ..RankerOutput::default() },
        ..RankerManifest::default()
    };
    if let Some(trees) = tree_model::load(name, onnx, &manifest, &widths)? {
        let engines = HashMap::from([("trees".to_owned(), Engine::Whole(Box::new(trees)))]);
        return Ok((Loaded { engines, columns, samples: requests }, json!({ "engines": ["trees"] })));
    }
    let mut general = OnnxRanker::load(name, onnx, &manifest, &widths, pool.clone())?;
    let mut engines = HashMap::new();
    let mut answer = json!({ "engines": ["rten"] });
    match ranking::recognise(&mut general, onnx, &manifest) {
        Ok(graph) => {
            for wanted in [Wanted::F32, Wanted::Bf16, Wanted::Int8] {
                let calibration = Calibration { precision: wanted, min_ndcg: 0.0 };
                let setting = Setting {
                    columns: columns.clone(),
                    items: (of_items > 0).then_some(&catalogue as &dyn Items),
                    table_bytes: 1 << 30,
                    samples: requests.clone(),
                };
                let model = Arc::new(Model::new(name, &graph, &calibration, &setting, Kernel::detect()));
                let label = model.report().precision.name().to_owned();
                answer["flops"] = json!(model.flops());
                answer[&label] = json!(model.report().to_string());
                if model.report().split {
                    engines.insert(format!("{label} table"), Engine::Parts(DenseRanker::new(model.clone())));
                }
                engines.insert(label, Engine::Whole(Box::new(DenseRanker::new(model))));
            }
        }
        Err(reason) => answer["reason"] = json!(reason),
    }
    engines.insert("rten".to_owned(), Engine::Whole(Box::new(general)));
    let mut names: Vec<&String> = engines.keys().collect();
    names.sort();
    answer["engines"] = json!(names);
    Ok((Loaded { engines, columns, samples: requests }, answer))
}

fn run(loaded: &mut Loaded, engine: &str, batch: usize, rounds: usize, wanted: bool) -> anyhow::Result<Value> {
    let cuts: Vec<Cut> = loaded.samples.iter().map(|sample| cut(sample, &loaded.columns, batch)).collect();
    let engine = loaded.engines.get_mut(engine).ok_or_else(|| anyhow!("no engine `{engine}`"))?;
    let mut scores = Vec::with_capacity(batch);
    let mut score = |cut: &Cut, scores: &mut Vec<f32>| match engine {
        Engine::Whole(ranker) => ranker.score(black_box(&cut.inputs), batch, scores),
        Engine::Parts(ranker) => ranker.score_split(black_box(&cut.request), &cut.rows, &cut.candidates, scores),
    };
    score(&cuts[0], &mut scores)?;
    let mut times = Vec::new();
    for round in 0..rounds {
        let start = cpu_ns();
        score(&cuts[round % cuts.len()], &mut scores)?;
        times.push(cpu_ns() - start);
    }
    let mut answer = json!({ "ns": times });
    if wanted {
        let mut all = Vec::new();
        for cut in &cuts {
            score(cut, &mut scores)?;
            all.push(scores.clone());
        }
        answer["scores"] = json!(all);
    }
    Ok(answer)
}

/// Twenty-four running sums, as in the kernels, and nothing else: the most that the core can do.
#[cfg(target_arch = "x86_64")]
mod peak {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    const SUMS: usize = 24;
    const ROUNDS: usize = 20_000;

    macro_rules! ceiling {
        ($name:ident, $features:literal, $zero:expr, $step:expr, $flops:expr) => {
            #[target_feature(enable = $features)]
            fn $name() -> f64 {
                let mut sums = [$zero; SUMS];
                let (a, b) = (black_box(_mm512_set1_epi32(0x3f80_3f80)), black_box(_mm512_set1_epi32(0x3f80_3f80)));
                let start = super::cpu_ns();
                for _ in 0..ROUNDS {
                    for sum in &mut sums {
                        *sum = $step(*sum, a, b);
                    }
                }
                let spent = super::cpu_ns() - start;
                black_box(sums);
                ($flops * SUMS * ROUNDS) as f64 / spent as f64
            }
        };
    }
    ceiling!(
        f32,
        "avx512f",
        _mm512_setzero_ps(),
        |sum, a, b| _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum),
        32
    );
    ceiling!(
        bf16,
        "avx512f,avx512bf16",
        _mm512_setzero_ps(),
        // SAFETY: the same bits.
        |sum, a: __m512i, b: __m512i| unsafe {
            _mm512_dpbf16_ps(
                sum,
                std::mem::transmute::<__m512i, __m512bh>(a),
                std::mem::transmute::<__m512i, __m512bh>(b),
            )
        },
        64
    );
    ceiling!(int8, "avx512f,avx512vnni", _mm512_setzero_si512(), |sum, a, b| _mm512_dpbusd_epi32(sum, a, b), 128);

    pub fn measure() -> [f64; 3] {
        let best = |of: &dyn Fn() -> f64| (0..40).map(|_| of()).fold(0.0, f64::max);
        // SAFETY: after detection of what each needs.
        unsafe {
            [
                if is_x86_feature_detected!("avx512f") { best(&|| f32()) } else { 0.0 },
                if is_x86_feature_detected!("avx512bf16") { best(&|| bf16()) } else { 0.0 },
                if is_x86_feature_detected!("avx512vnni") { best(&|| int8()) } else { 0.0 },
            ]
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod peak {
    pub fn measure() -> [f64; 3] {
        [0.0; 3]
    }
}

fn main() -> anyhow::Result<()> {
    if !std::env::args().any(|arg| arg == "--json") {
        println!("run by benches/peers/rank_bench/run.py");
        return Ok(());
    }
    let pool = Arc::new(ThreadPool::with_num_threads(1));
    let mut models: HashMap<String, Loaded> = HashMap::new();
    for line in std::io::stdin().lock().lines() {
        let command: Command = serde_json::from_str(&line?)?;
        // Where the server runs rankers: on the pool's own thread.
        let answer = pool.run(|| match &command {
            Command::Load { name, .. } => load(&command, &pool).map(|(loaded, answer)| {
                models.insert(name.clone(), loaded);
                answer
            }),
            Command::Run { name, engine, batch, rounds, scores } => match models.get_mut(name) {
                Some(loaded) => run(loaded, engine, *batch, *rounds, *scores),
                None => Err(anyhow!("no model `{name}`")),
            },
            Command::Peak => Ok(json!(peak::measure())),
        });
        let answer = answer.unwrap_or_else(|error| json!({ "error": format!("{error:#}") }));
        let mut out = std::io::stdout().lock();
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}
