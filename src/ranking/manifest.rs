//! `rankers/NAME.toml`: how feature columns become a model's inputs.

use serde::{Deserialize, Serialize};

/// How feature columns become a model's inputs, and what its output means.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RankerManifest {
    /// Inputs by name.
    #[serde(default)]
    pub inputs: Vec<RankerInput>,
    /// The output that is the score.
    pub output: RankerOutput,
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

/// The ONNX output that is the score.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RankerOutput {
    /// Name in the graph; `[n]` or `[n, 1]`.
    pub name: String,
}
