//! `rankers/NAME.toml`: how feature columns become a model's inputs.

use serde::{Deserialize, Serialize};

use super::expression::Expression;
use super::precision::Wanted;

/// How feature columns become a model's inputs, and what its output means.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RankerManifest {
    /// What computes it; `pipeline.engines` of the configuration goes before.
    #[serde(default)]
    pub engine: Engine,
    /// Inputs by name.
    #[serde(default)]
    pub inputs: Vec<RankerInput>,
    /// The output that is the score.
    pub output: RankerOutput,
    /// In which numbers it may be computed.
    #[serde(default)]
    pub calibration: Calibration,
}

/// What computes a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// The fastest that can.
    #[default]
    Auto,
    /// The engine for dense networks.
    Dense,
    /// The evaluator of tree ensembles.
    Trees,
    /// The embedded general runtime.
    Rten,
    /// ONNX Runtime, which has to be installed.
    OnnxRuntime,
    /// TensorRT, on a GPU; what the CPU computes of it is computed as by `Auto`.
    TensorRt,
}

/// One ONNX input.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RankerInput {
    /// Name in the graph.
    pub name: String,
    /// Feature columns, concatenated in this order.
    pub columns: Vec<String>,
}

/// The ONNX output that is the score, or what makes the score of several; either `name` or `score`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RankerOutput {
    /// Name in the graph; `[n]` or `[n, 1]`.
    pub name: String,
    /// Outputs combined, as in `0.7 * click + 0.3 * purchase`; see [`Expression`].
    #[serde(skip_serializing_if = "String::is_empty")]
    pub score: String,
}

impl RankerOutput {
    /// How the score is made, and the names of the outputs that it is made of, in the order of their numbers.
    ///
    /// # Errors
    /// Neither or both are given, or the expression's mistake and its place.
    pub fn expression(&self) -> Result<(Expression, Vec<String>), String> {
        match (&self.name[..], &self.score[..]) {
            ("", "") => Err("output: needs a `name` or a `score`".to_owned()),
            (name, "") => Ok((Expression::Output(0), vec![name.to_owned()])),
            ("", score) => Expression::parse(score).map_err(|e| format!("output.score `{score}`: {e}")),
            _ => Err("output: has both a `name` and a `score`".to_owned()),
        }
    }
}

/// In which numbers a model may be computed; only the engine for dense networks has a choice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Calibration {
    /// Default `auto`: the narrowest that keeps the order.
    pub precision: Wanted,
    /// What is less faithful is not used: NDCG@10 against the order of f32, on candidates of the bundle's own users. 0 to 1,
    /// default 0.999.
    pub min_ndcg: f32,
}

impl Default for Calibration {
    fn default() -> Self {
        Calibration { precision: Wanted::Auto, min_ndcg: 0.999 }
    }
}
