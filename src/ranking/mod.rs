//! Models that score candidates.

pub mod ensemble;
pub mod graph;
pub mod manifest;
pub mod mlp;
pub mod onnx;
pub mod signature;
pub mod tree_model;
mod tree_nodes;
pub mod trees;

use std::path::Path;

use rten_onnx::onnx::ModelProto;

use crate::index::Kernel;
use manifest::RankerManifest;
use mlp::Mlp;
use onnx::OnnxRanker;

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
}

/// The engine for perceptrons where the loaded model is one and scores there as it does in the general runtime, else the general
/// runtime. `onnx` and `manifest` are what `general` was loaded from.
pub fn fastest(mut general: OnnxRanker, onnx: &Path, manifest: &RankerManifest) -> Box<dyn Ranker> {
    match perceptron(&mut general, onnx, manifest) {
        Ok(mlp) => {
            tracing::debug!(ranker = general.name(), "runs on the engine for perceptrons");
            Box::new(mlp)
        }
        Err(reason) => {
            tracing::info!(ranker = general.name(), reason, "runs on the general ONNX runtime");
            Box::new(general)
        }
    }
}

/// The model as a perceptron, held against the general runtime, which also refuses features of another width.
fn perceptron(general: &mut OnnxRanker, onnx: &Path, manifest: &RankerManifest) -> Result<Mlp, String> {
    let [input] = &manifest.inputs[..] else { return Err(format!("{} inputs", manifest.inputs.len())) };
    let file = std::fs::File::open(onnx).map_err(|e| e.to_string())?;
    let model = ModelProto::parse_file(file).map_err(|e| e.to_string())?;
    let layers = graph::chain(&model, &input.name, &manifest.output.name)?;
    let mut mlp = Mlp::new(general.name(), &layers, Kernel::detect());
    let width = mlp.n_inputs();
    // Values of several magnitudes and both signs, the same at every load.
    let n = 64;
    let value = |at: usize| ((at * 7919) % 2001) as f32 / 1000.0 - 1.0;
    let features = [(0..n * width).map(|at| value(at) * 10f32.powi((at / width % 4) as i32 - 1)).collect()];
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    general.score(&features, n, &mut theirs).map_err(|e| e.reason)?;
    mlp.score(&features, n, &mut ours).map_err(|e| e.reason)?;
    let size = theirs.iter().fold(1f32, |most, v| most.max(v.abs()));
    match ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() <= 1e-4 * size) {
        true => Ok(mlp),
        false => Err("the engine for perceptrons scores it otherwise".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rten::ThreadPool;
    use std::sync::Arc;

    #[test]
    fn the_demo_ranker_is_a_perceptron() {
        let engines = Path::new(env!("CARGO_MANIFEST_DIR")).join("engines");
        let manifest: RankerManifest =
            toml::from_str(&std::fs::read_to_string(engines.join("demo.toml")).unwrap()).unwrap();
        let (onnx, widths) = (engines.join("demo.onnx"), [manifest.inputs[0].columns.len()]);
        let pool = Arc::new(ThreadPool::with_num_threads(1));
        let mut general = OnnxRanker::load("demo", &onnx, &manifest, &widths, pool).unwrap();
        assert_eq!(perceptron(&mut general, &onnx, &manifest).unwrap().n_inputs(), widths[0]);
        let mut other = manifest.clone();
        other.output.name = "nowhere".into();
        assert!(perceptron(&mut general, &onnx, &other).is_err());
        assert_eq!(fastest(general, &onnx, &manifest).name(), "demo");
    }
}
