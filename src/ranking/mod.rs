//! Models that score candidates.

pub mod ensemble;
pub mod manifest;
pub mod onnx;

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
}
