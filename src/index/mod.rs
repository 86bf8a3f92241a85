//! Vector search on the CPU.

mod brute_force;
mod coarse;
mod distance;

pub use brute_force::BruteForce;
pub use distance::Kernel;

use crate::candidates::{Packed, Scored};

/// A searchable set of item vectors. Row `i` of the index is item row `i`.
pub trait VectorIndex: Send + Sync + std::fmt::Debug {
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

    /// Appends the metric's score of each of `rows`, which may be any of the index's.
    fn scores(&self, query: &[f32], rows: &[u32], scratch: &mut SearchScratch, out: &mut Vec<f32>);
}

/// Buffers of a search, reused from search to search.
#[derive(Debug, Default)]
pub struct SearchScratch {
    scores: Vec<f32>,
    block: Vec<f32>,
    best: Vec<Packed>,
    coarse: coarse::CoarseQuery,
    lower: Vec<f32>,
    upper: Vec<f32>,
    /// Places of a block that pass the threshold.
    passing: Vec<u32>,
    /// Rows that may be among the best, and the most that the score of each can be.
    maybe: Vec<u32>,
    most: Vec<f32>,
    /// Those of them that must be scored exactly, and the scores.
    rows: Vec<u32>,
    exact: Vec<f32>,
}
