//! Finding search parameters that reach a recall in the least time.

use std::collections::HashSet;
use std::time::Duration;

use super::{Filter, IndexKind, SearchParams, SearchScratch, VectorIndex};
use crate::candidates::Scored;

/// Multiples of k that are refined, of which one is chosen.
const REFINE_RATIOS: [f32; 10] = [1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 100.0];
/// Times that every choice is measured; the median counts.
const ROUNDS: usize = 5;
/// The most that `ef_search` is raised to.
const MOST_EF: u32 = 20_000;

/// Queries and what is right for them.
pub struct Task<'a> {
    /// The index.
    pub index: &'a dyn VectorIndex,
    /// The exact scan over the same vectors.
    pub oracle: &'a dyn VectorIndex,
    /// Results asked for.
    pub k: usize,
    /// Share of the exact best k to be found.
    pub recall: f64,
}

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Found {
    /// The parameters.
    pub params: SearchParams,
    /// Recall on the queries that were held out.
    pub recall: f64,
    /// CPU time of a search.
    pub search: Duration,
    /// The same for the exact scan.
    pub exact: Duration,
}

/// CPU time of this thread.
pub fn cpu_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}

struct Queries<'a> {
    values: Vec<&'a [f32]>,
    truth: Vec<HashSet<u32>>,
}

impl Task<'_> {
    /// Chooses by every other query, and measures on the others. `told` hears of steps done and steps in all.
    ///
    /// # Errors
    /// The recall can't be reached; the text says how far it goes. Or there is nothing to choose.
    pub fn run(&self, queries: &[&[f32]], told: &dyn Fn(u64, u64)) -> Result<Found, String> {
        let mut scratch = SearchScratch::default();
        let half = |skip: usize| {
            let values: Vec<&[f32]> = queries.iter().skip(skip).step_by(2).copied().collect();
            let truth = values.iter().map(|query| self.best(self.oracle, query, &SearchParams::default()));
            Queries { truth: truth.map(|best| best.iter().map(|s| s.row).collect()).collect(), values }
        };
        let (chosen_by, held_out) = (half(0), half(1));
        if chosen_by.values.is_empty() || held_out.values.is_empty() {
            return Err("at least two queries are needed".into());
        }
        let candidates: Vec<SearchParams> = match self.index.kind() {
            IndexKind::BruteForce => return Err("brute_force is exact: there is nothing to tune".into()),
            IndexKind::IvfFlat => vec![SearchParams::default()],
            IndexKind::Hnsw => vec![SearchParams::default()],
            IndexKind::IvfPq | IndexKind::IvfRabitq => REFINE_RATIOS
                .iter()
                .map(|&ratio| SearchParams { refine_ratio: Some(ratio), ..Default::default() })
                .collect(),
        };
        let (mut reached, mut furthest) = (Vec::new(), 0f64);
        let n_steps = candidates.len() as u64;
        for (at, &params) in candidates.iter().enumerate() {
            match self.least(&chosen_by, params, &mut scratch) {
                Ok(params) => reached.push(params),
                Err(recall) => furthest = furthest.max(recall),
            }
            told(at as u64 + 1, n_steps);
        }
        let Some(params) = self.fastest(&reached, &held_out, &mut scratch) else {
            return Err(format!("recall {} is out of reach: {furthest:.4} at most", self.recall));
        };
        Ok(Found {
            params,
            recall: self.recall_of(&held_out, &params, &mut scratch).0,
            search: self.time(self.index, &held_out, &params, &mut scratch),
            exact: self.time(self.oracle, &held_out, &params, &mut scratch),
        })
    }

    fn best(&self, index: &dyn VectorIndex, query: &[f32], params: &SearchParams) -> Vec<Scored> {
        let mut out = Vec::new();
        index.search(query, self.k, Filter::ALL, params, &mut SearchScratch::default(), &mut out);
        out
    }

    /// The mean over the queries, and its standard error.
    fn recall_of(&self, queries: &Queries<'_>, params: &SearchParams, scratch: &mut SearchScratch) -> (f64, f64) {
        let (mut sum, mut squares, mut out) = (0.0, 0.0, Vec::new());
        for (query, truth) in queries.values.iter().zip(&queries.truth) {
            out.clear();
            self.index.search(query, self.k, Filter::ALL, params, scratch, &mut out);
            let found = out.iter().filter(|s| truth.contains(&s.row)).count();
            let recall = found as f64 / truth.len().max(1) as f64;
            sum += recall;
            squares += recall * recall;
        }
        let n = queries.values.len() as f64;
        let mean = sum / n;
        (mean, ((squares / n - mean * mean).max(0.0) / n).sqrt())
    }

    /// Whether queries of the same kind, too, would most likely reach the recall.
    fn reaches(&self, queries: &Queries<'_>, params: &SearchParams, scratch: &mut SearchScratch) -> Result<(), f64> {
        let (mean, error) = self.recall_of(queries, params, scratch);
        if mean - error >= self.recall || mean >= 1.0 { Ok(()) } else { Err(mean) }
    }

    /// The least of the parameter that widens the search with which the recall is reached; the error is the recall at the most.
    fn least(
        &self,
        queries: &Queries<'_>,
        params: SearchParams,
        scratch: &mut SearchScratch,
    ) -> Result<SearchParams, f64> {
        let with = |wide: u32| match self.index.kind() {
            IndexKind::Hnsw => SearchParams { ef_search: Some(wide), ..params },
            _ => SearchParams { n_probes: Some(wide), ..params },
        };
        // Doubling finds an end, halving the place.
        let most = if self.index.kind() == IndexKind::Hnsw { MOST_EF.max(self.k as u32) } else { self.index.n_lists() };
        let mut low = if self.index.kind() == IndexKind::Hnsw { self.k as u32 - 1 } else { 0 };
        let mut high = (low + 1).max(8).min(most);
        while let Err(recall) = self.reaches(queries, &with(high), scratch) {
            if high == most {
                return Err(recall);
            }
            (low, high) = (high, high.saturating_mul(2).min(most));
        }
        while high - low > 1 + high / 64 {
            let middle = low + (high - low) / 2;
            match self.reaches(queries, &with(middle), scratch) {
                Ok(()) => high = middle,
                Err(_) => low = middle,
            }
        }
        Ok(with(high))
    }

    fn time(
        &self,
        index: &dyn VectorIndex,
        queries: &Queries<'_>,
        params: &SearchParams,
        scratch: &mut SearchScratch,
    ) -> Duration {
        let mut out = Vec::new();
        let begin = cpu_time();
        for query in &queries.values {
            out.clear();
            index.search(query, self.k, Filter::ALL, params, scratch, &mut out);
        }
        (cpu_time() - begin) / queries.values.len() as u32
    }

    /// By the median of rounds in which all take turns.
    fn fastest(
        &self,
        all: &[SearchParams],
        queries: &Queries<'_>,
        scratch: &mut SearchScratch,
    ) -> Option<SearchParams> {
        let mut times = vec![Vec::new(); all.len()];
        for _ in 0..ROUNDS {
            for (params, times) in all.iter().zip(&mut times) {
                times.push(self.time(self.index, queries, params, scratch));
            }
        }
        let median = |times: &mut Vec<Duration>| {
            times.sort_unstable();
            times[times.len() / 2]
        };
        let best = (0..all.len()).min_by_key(|&at| median(&mut times[at].clone()))?;
        Some(all[best])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::generation::{Matrix, MatrixData, Metric};
    use crate::index::{BruteForce, HnswOptions, IndexOptions, IvfOptions, Kernel, build};

    #[test]
    fn finds_what_reaches_the_recall_and_says_when_nothing_does() {
        let (n, dim) = (900, 16);
        let mut noise = crate::testing::noise(8);
        let values: Vec<f32> = (0..n * dim).map(|_| noise()).collect();
        let queries: Vec<f32> = (0..60 * dim).map(|_| noise()).collect();
        let queries: Vec<&[f32]> = queries.chunks_exact(dim).collect();
        let matrix = Matrix { dim, data: MatrixData::F32(values.into()) };
        let oracle = BruteForce::new(matrix.clone(), Metric::L2, Kernel::detect());
        let ivf = IvfOptions { n_lists: Some(30), kmeans_n_iters: Some(3), ..Default::default() };
        let hnsw = HnswOptions { graph_degree: 8, ef_construction: 20, seed: 0 };
        for options in [IndexOptions::IvfFlat(ivf.clone()), IndexOptions::IvfPq(ivf), IndexOptions::Hnsw(hnsw)] {
            let index = build(&options, &matrix, Metric::L2, &|_, _, _| {}).unwrap();
            let task = |recall| Task { index: &*index, oracle: &oracle, k: 10, recall };
            let found = task(0.8).run(&queries, &|_, _| {}).unwrap();
            assert!(found.recall > 0.75, "{options:?} {found:?}");
            let wide = found.params.n_probes.or(found.params.ef_search);
            assert!(wide.is_some_and(|wide| wide < 900), "{found:?}");
            let refused = task(1.5).run(&queries, &|_, _| {}).map(|found| assert!(found.recall >= 0.99, "{found:?}"));
            assert!(refused.err().is_none_or(|reason| reason.contains("out of reach")));
            assert!(task(0.8).run(&queries[..1], &|_, _| {}).is_err());
        }
        let task = Task { index: &oracle, oracle: &oracle, k: 10, recall: 0.9 };
        assert!(task.run(&queries, &|_, _| {}).unwrap_err().contains("nothing to tune"));
    }
}
