//! Models that score candidates.

pub mod dense;
pub mod ensemble;
pub mod expression;
pub mod graph;
pub mod manifest;
pub mod onnx;
pub mod onnxruntime;
pub mod precision;
pub mod signature;
pub mod tree_model;
mod tree_nodes;
pub mod trees;
mod wiring;

use std::path::Path;
use std::sync::Arc;

use rten_onnx::onnx::ModelProto;

use crate::index::Kernel;
use dense::ops::Graph;
use dense::{DenseRanker, MOST_INPUTS, Model};
use manifest::RankerManifest;
use onnx::OnnxRanker;
use precision::Report;

/// Why a model can't be used or did not answer.
#[derive(Debug, thiserror::Error)]
#[error("ranker `{ranker}`: {reason}")]
pub struct RankError {
    /// The model's name.
    pub ranker: String,
    /// For the operator, not for clients.
    pub reason: String,
}

/// A model that scores rows of features; owned by one worker.
pub trait Ranker: Send {
    /// For metrics and logs.
    fn name(&self) -> &str;

    /// Scores `n` candidates into `scores` (replaced; `[n]`, higher is better). `inputs[i]` is `[n, width_i]`,
    /// row-major, for the manifest's i-th input.
    ///
    /// # Errors
    /// The model failed; `scores` is then empty.
    fn score(&mut self, inputs: &[Vec<f32>], n: usize, scores: &mut Vec<f32>) -> Result<(), RankError>;

    /// Whether a row's score is the same to the bit whatever rows are beside it, so that requests may share a call.
    fn rows_are_independent(&self) -> bool {
        false
    }

    /// How it is computed.
    fn report(&self) -> Report;

    /// The same as a dense network, which may be scored in parts.
    fn dense(&mut self) -> Option<&mut DenseRanker> {
        None
    }
}

/// Reads an ONNX file as it is written.
fn read_onnx(onnx: &Path) -> Result<ModelProto, String> {
    ModelProto::parse_file(std::fs::File::open(onnx).map_err(|e| e.to_string())?).map_err(|e| e.to_string())
}

/// Whether features can name the rows of the model's tables: [`graph::check_ids`] of a file.
///
/// # Errors
/// The table that they can't, or a file that can't be read.
pub fn check_ids(onnx: &Path) -> Result<(), String> {
    graph::check_ids(&read_onnx(onnx)?)
}

/// The model as a dense network, held against the general runtime.
///
/// # Errors
/// What keeps it from being one, or that it scores otherwise.
pub fn recognise(general: &mut OnnxRanker, onnx: &Path, manifest: &RankerManifest) -> Result<Graph, String> {
    if manifest.inputs.len() > MOST_INPUTS {
        return Err(format!("{} inputs", manifest.inputs.len()));
    }
    let model = read_onnx(onnx)?;
    let inputs: Vec<(&str, usize)> = manifest.inputs.iter().map(|i| i.name.as_str()).zip(general.widths()).collect();
    let (score, names) = manifest.output.expression()?;
    let mut graph = graph::read(&model, &inputs, &names.iter().map(String::as_str).collect::<Vec<_>>())?;
    let outputs = std::mem::take(&mut graph.outputs);
    graph.outputs = vec![score.add_to(&mut graph, &outputs)];
    let graph = graph.simplified();
    let mut dense = DenseRanker::new(Arc::new(Model::plain(general.name(), &graph, Kernel::detect())));
    let n = 64;
    let mut features = trial_rows(&inputs.iter().map(|(_, width)| *width).collect::<Vec<_>>(), n);
    for (values, places) in features.iter_mut().zip(graph.places()) {
        for (at, value) in values.iter_mut().enumerate() {
            // The general runtime refuses what is no row of a table.
            if let Some(place) = (at * 7919).checked_rem(places[at % places.len()]) {
                *value = place as f32;
            }
        }
    }
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    general.score(&features, n, &mut theirs).map_err(|e| e.reason)?;
    dense.score(&features, n, &mut ours).map_err(|e| e.reason)?;
    let size = theirs.iter().filter(|v| v.is_finite()).fold(1f32, |most, v| most.max(v.abs()));
    let same = |a: f32, b: f32| (a - b).abs() <= 1e-4 * size || (!a.is_finite() && !b.is_finite());
    match ours.iter().zip(&theirs).all(|(&a, &b)| same(a, b)) && theirs.iter().any(|v| v.is_finite()) {
        true => Ok(graph),
        false => Err("the engine for dense networks scores it otherwise".to_owned()),
    }
}

/// Values of several magnitudes and both signs, the same at every load: `[n, width]` for each input.
fn trial_rows(widths: &[usize], n: usize) -> Vec<Vec<f32>> {
    let value = |at: usize| ((at * 7919) % 2001) as f32 / 1000.0 - 1.0;
    let input = |width: &usize| (0..n * width).map(|at| value(at) * 10f32.powi((at / width % 4) as i32 - 1)).collect();
    widths.iter().map(input).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rten::ThreadPool;

    #[test]
    fn inputs_of_whole_numbers_pick_rows_of_tables() {
        let onnx = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/ids/ids.onnx");
        let input = |name: &str| manifest::RankerInput { name: name.into(), columns: Vec::new() };
        let manifest = RankerManifest {
            inputs: vec![input("ids"), input("numbers")],
            output: manifest::RankerOutput { name: "score".into(), ..Default::default() },
            ..Default::default()
        };
        let pool = Arc::new(ThreadPool::with_num_threads(1));
        let mut general = OnnxRanker::load("ids", &onnx, &manifest, &[2, 3], pool).unwrap();
        let graph = recognise(&mut general, &onnx, &manifest).unwrap();
        let mut engines: Vec<Box<dyn Ranker>> = vec![
            Box::new(DenseRanker::new(Arc::new(Model::plain("ids", &graph, Kernel::detect())))),
            Box::new(general),
        ];
        if let Some(library) = onnxruntime::library_for_tests() {
            let theirs = onnxruntime::OnnxRuntimeRanker::load("ids", &onnx, &manifest, &[2, 3], &library);
            engines.push(Box::new(theirs.unwrap()));
        }
        let inputs = [vec![6.0, 0.0, -7.0, 3.0], vec![0.5, -1.0, 2.0, 0.0, 0.0, 0.0]];
        let scores = engines.iter_mut().map(|engine| {
            let mut scores = Vec::new();
            engine.score(&inputs, 2, &mut scores).unwrap();
            scores
        });
        let scores: Vec<Vec<f32>> = scores.collect();
        assert!(scores[0][0] != scores[0][1]);
        for other in &scores[1..] {
            assert!(scores[0].iter().zip(other).all(|(a, b)| (a - b).abs() < 1e-5), "{scores:?}");
        }
        // No row 7 in the table: an error here, and NaN on the dense engine.
        let beyond = [vec![7.0, 0.0], vec![0.0; 3]];
        assert!(engines[1..].iter_mut().all(|engine| engine.score(&beyond, 1, &mut Vec::new()).is_err()));
        let mut none = Vec::new();
        engines[0].score(&beyond, 1, &mut none).unwrap();
        assert!(none[0].is_nan());
    }

    #[test]
    fn the_demo_ranker_is_a_dense_network() {
        let engines = Path::new(env!("CARGO_MANIFEST_DIR")).join("engines");
        let manifest: RankerManifest =
            toml::from_str(&std::fs::read_to_string(engines.join("demo.toml")).unwrap()).unwrap();
        let (onnx, widths) = (engines.join("demo.onnx"), [manifest.inputs[0].columns.len()]);
        let pool = Arc::new(ThreadPool::with_num_threads(1));
        let mut general = OnnxRanker::load("demo", &onnx, &manifest, &widths, pool).unwrap();
        assert_eq!(recognise(&mut general, &onnx, &manifest).unwrap().inputs, widths);
        let mut other = manifest.clone();
        other.output.name = "nowhere".into();
        let reason = recognise(&mut general, &onnx, &other).unwrap_err();
        let refused = general.because(Some(reason)).report();
        assert!(refused.engine == "rten" && refused.reason.is_some(), "{refused}");
        let load = |manifest: &RankerManifest| {
            OnnxRanker::load("demo", &onnx, manifest, &widths, Arc::new(ThreadPool::with_num_threads(1)))
        };
        let graph = recognise(&mut load(&manifest).unwrap(), &onnx, &manifest).unwrap();
        assert_eq!(Model::plain("demo", &graph, Kernel::detect()).report().engine, "dense");
        // The score as an expression, in both engines; `recognise` compares them.
        let mut combined = manifest.clone();
        combined.output =
            manifest::RankerOutput { name: String::new(), score: "sigmoid(score) * 2 - score / 3".into() };
        let mut general = load(&combined).unwrap();
        recognise(&mut general, &onnx, &combined).unwrap();
        let (features, mut plain, mut scores) = (trial_rows(&widths, 9), Vec::new(), Vec::new());
        load(&manifest).unwrap().score(&features, 9, &mut plain).unwrap();
        general.score(&features, 9, &mut scores).unwrap();
        let want = |v: f32| 2.0 / (1.0 + (-v).exp()) - v / 3.0;
        assert!(plain.iter().zip(&scores).all(|(&v, got)| (want(v) - got).abs() <= 1e-5 * v.abs().max(1.0)));
        let refused = |output: manifest::RankerOutput| {
            load(&RankerManifest { output, ..manifest.clone() }).err().unwrap().to_string()
        };
        let output = |name: &str, score: &str| manifest::RankerOutput { name: name.into(), score: score.into() };
        assert!(refused(output("", "score + click")).contains("no output `click`; the model has score"));
        assert!(refused(output("", "score +")).contains("output.score `score +`: at character 8"));
        assert!(refused(output("score", "score")).contains("both a `name` and a `score`"));
        assert!(refused(output("", "")).contains("needs a `name` or a `score`"));
    }
}
