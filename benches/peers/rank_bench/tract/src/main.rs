//! tract as a peer of `benches/peers/rank_bench`: asked over stdin a line of JSON at a time, as `benches/rank.rs` is.

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use serde::Deserialize;
use serde_json::{Value, json};
use tract_onnx::prelude::*;

#[derive(Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
enum Command {
    /// Name and width of every input; by request, f32 `[n, width]` of every input, one after another.
    Load { name: String, onnx: PathBuf, inputs: Vec<(String, usize)>, samples: Vec<PathBuf>, n: usize },
    /// CPU time of each of `rounds` calls, by request in turn, and the scores of all requests if they are wanted.
    Run { name: String, batch: usize, rounds: usize, scores: bool },
}

struct Loaded {
    onnx: PathBuf,
    inputs: Vec<(String, usize)>,
    /// For any number of rows.
    any: Arc<TypedRunnableModel>,
    /// The faster of that one and one for this number of rows alone, by number.
    best: HashMap<usize, Arc<TypedRunnableModel>>,
    /// By request and input.
    samples: Vec<Vec<Vec<f32>>>,
}

fn cpu_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// The model for so many rows, or for any number.
fn compile(onnx: &Path, inputs: &[(String, usize)], rows: Option<usize>) -> TractResult<Arc<TypedRunnableModel>> {
    let mut model = tract_onnx::onnx().model_for_path(onnx)?;
    let n = rows.map_or_else(|| model.symbols.sym("n").to_dim(), |rows| rows.to_dim());
    model.set_input_names(inputs.iter().map(|(name, _)| name))?;
    for (at, (_, width)) in inputs.iter().enumerate() {
        model.set_input_fact(at, f32::fact([n.clone(), width.to_dim()]).into())?;
    }
    model.into_optimized()?.into_runnable()
}

fn load(onnx: &Path, inputs: &[(String, usize)], samples: &[PathBuf], n: usize) -> anyhow::Result<Loaded> {
    let widths: Vec<usize> = inputs.iter().map(|(_, width)| *width).collect();
    let read = |path: &PathBuf| -> anyhow::Result<Vec<Vec<f32>>> {
        let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
        let mut values = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes")));
        Ok(widths.iter().map(|width| values.by_ref().take(n * width).collect()).collect())
    };
    let samples = samples.iter().map(read).collect::<anyhow::Result<_>>()?;
    let any = compile(onnx, inputs, None)?;
    Ok(Loaded { onnx: onnx.to_owned(), inputs: inputs.to_vec(), any, best: HashMap::new(), samples })
}

/// CPU time of the fastest of some calls.
fn fastest(model: &Arc<TypedRunnableModel>, request: &TVec<TValue>) -> TractResult<u64> {
    let mut best = u64::MAX;
    for _ in 0..8 {
        let start = cpu_ns();
        model.run(request.clone())?;
        best = best.min(cpu_ns() - start);
    }
    Ok(best)
}

fn run(loaded: &mut Loaded, batch: usize, rounds: usize, wanted: bool) -> anyhow::Result<Value> {
    let tensors = |sample: &Vec<Vec<f32>>| -> anyhow::Result<TVec<TValue>> {
        let tensor = |(values, (_, width)): (&Vec<f32>, &(String, usize))| {
            Ok(Tensor::from_shape(&[batch, *width], &values[..batch * width])?.into_tvalue())
        };
        sample.iter().zip(&loaded.inputs).map(tensor).collect()
    };
    let requests = loaded.samples.iter().map(tensors).collect::<anyhow::Result<Vec<_>>>()?;
    if !loaded.best.contains_key(&batch) {
        let fixed = compile(&loaded.onnx, &loaded.inputs, Some(batch))?;
        let any = loaded.any.clone();
        let is_faster = fastest(&fixed, &requests[0])? < fastest(&any, &requests[0])?;
        loaded.best.insert(batch, if is_faster { fixed } else { any });
    }
    let model = &loaded.best[&batch];
    let mut times = Vec::with_capacity(rounds);
    for round in 0..rounds {
        let request = requests[round % requests.len()].clone();
        let start = cpu_ns();
        std::hint::black_box(model.run(request)?);
        times.push(cpu_ns() - start);
    }
    let mut answer = json!({ "ns": times });
    if wanted {
        let mut all: Vec<Vec<f32>> = Vec::new();
        for request in requests {
            all.push(model.run(request)?[0].to_plain_array_view::<f32>()?.iter().copied().collect());
        }
        answer["scores"] = json!(all);
    }
    Ok(answer)
}

fn main() -> anyhow::Result<()> {
    let mut models: HashMap<String, Loaded> = HashMap::new();
    for line in std::io::stdin().lock().lines() {
        let answer = match serde_json::from_str(&line?)? {
            Command::Load { name, onnx, inputs, samples, n } => load(&onnx, &inputs, &samples, n).map(|loaded| {
                models.insert(name, loaded);
                json!({ "engines": ["tract"] })
            }),
            Command::Run { name, batch, rounds, scores } => match models.get_mut(&name) {
                Some(loaded) => run(loaded, batch, rounds, scores),
                None => Err(anyhow::anyhow!("no model `{name}`")),
            },
        };
        let answer = answer.unwrap_or_else(|error| json!({ "error": format!("{error:#}") }));
        let mut out = std::io::stdout().lock();
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}
