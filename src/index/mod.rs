//! Vector search on the CPU.

mod brute_force;
mod distance;

pub use brute_force::BruteForce;
pub use distance::Kernel;

use crate::candidates::{Packed, Scored};

/// A searchable set of item vectors. Row `i` of the index is item row `i`.
pub trait VectorIndex: Send + Sync {
    /// Dimension.
    fn dim(&self) -> usize;

    /// Appends the `k` best rows for `query` (f32 `[dim]`) that `allowed` admits: best first, ties by lower row.
    fn search(
        &self,
        query: &[f32],
        k: usize,
        allowed: &dyn Fn(u32) -> bool,
        scratch: &mut SearchScratch,
        out: &mut Vec<Scored>,
    );

    /// The metric's score of one row.
    fn score(&self, query: &[f32], row: u32) -> f32;
}

/// Buffers of a search, reused from search to search.
#[derive(Debug, Default)]
pub struct SearchScratch {
    scores: Vec<f32>,
    block: Vec<f32>,
    best: Vec<Packed>,
}
