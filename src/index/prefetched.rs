//! An index that was asked before, by a device that computes scores with other roundings and knows fewer filters.
//!
//! What comes out is what the index itself would find, were it exact: whatever the device's errors leave open is scored here, and where its
//! lists do not settle the answer the index is searched after all. Lists of an index of the device's own, which misses some rows, settle it
//! where they hold enough: they are as good as what the index would find, and not the same.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::{Filter, IndexKind, SearchParams, SearchScratch, VectorIndex};
use crate::candidates::{Packed, Scored, keep_best};

/// The rows nearest to one query, as a device found them.
#[derive(Clone, Copy, Debug)]
pub struct Found<'a> {
    /// Unique; best first by the device's scores. Filters that the device does not know must leave out of it what they forbid; what the
    /// device itself left out must be forbidden.
    pub rows: &'a [u32],
    /// Of each row: the device's score plus [`Self::shift`] is the metric's score times [`Self::scale`], but for rounding.
    pub scores: &'a [f32],
    /// See [`Self::scores`].
    pub shift: f32,
    /// See [`Self::scores`]; above 0.
    pub scale: f32,
    /// How far the metric's score, rounded as it may be here, lies from the device's at most. In the metric's units.
    pub error: f32,
    /// Whether no other rows are left.
    pub all: bool,
    /// Whether `k` admitted rows of it will do: an index found them that misses some, as the one that is asked otherwise does.
    pub enough: bool,
}

impl Found<'_> {
    /// The most that the row at `place`, or any further one, scores.
    fn most(&self, place: usize) -> f32 {
        (self.scores[place] + self.shift) / self.scale + self.error
    }
}

/// How often a device's lists settled the answer.
#[derive(Debug, Default)]
pub struct Settled {
    /// They did.
    pub yes: AtomicU64,
    /// The index was searched.
    pub no: AtomicU64,
}

/// See the module. With a list per query of the next call; another number of queries is the index's own.
#[derive(Clone, Copy, Debug)]
pub struct Prefetched<'a> {
    base: &'a dyn VectorIndex,
    lists: &'a [Found<'a>],
    settled: &'a Settled,
}

impl<'a> Prefetched<'a> {
    /// Of `base`.
    pub fn new(base: &'a dyn VectorIndex, lists: &'a [Found<'a>], settled: &'a Settled) -> Self {
        Prefetched { base, lists, settled }
    }

    /// Appends the `k` best if the list settles them.
    fn settle(
        &self,
        list: &Found<'_>,
        query: &[f32],
        k: usize,
        filter: Filter<'_>,
        scratch: &mut SearchScratch,
        out: &mut Vec<Scored>,
    ) -> bool {
        if query.len() != self.base.dim() || k == 0 {
            return false;
        }
        let (mut rows, mut best) = (std::mem::take(&mut scratch.rows), std::mem::take(&mut scratch.best));
        let mut scores = std::mem::take(&mut scratch.exact);
        best.clear();
        // What k rows reach; nothing is known of it at first.
        let (mut place, mut reached) = (0, f32::NEG_INFINITY);
        while place < list.rows.len() && (best.len() < k || list.most(place) >= reached) {
            rows.clear();
            let wanted = if best.len() < k { k - best.len() } else { AT_ONCE };
            while rows.len() < wanted && place < list.rows.len() {
                if best.len() >= k && list.most(place) < reached {
                    break;
                }
                if filter.allows(list.rows[place]) {
                    rows.push(list.rows[place]);
                }
                place += 1;
            }
            scores.clear();
            self.base.scores(query, &rows, scratch, &mut scores);
            let scored = rows.iter().zip(&scores).filter(|(_, score)| !score.is_nan());
            best.extend(scored.map(|(&row, &score)| Packed::from(Scored { row, score })));
            if best.len() >= k {
                reached = Scored::from(*best.select_nth_unstable(k - 1).1).score;
            }
        }
        let last = list.rows.len().checked_sub(1);
        // What is not in the list may score as the last of it does, and of equal scores the lower row comes first.
        let reaches = |last| list.enough || list.most(last) < reached;
        let settled = list.all || best.len() >= k && last.is_some_and(reaches);
        if settled {
            keep_best(&mut best, k);
            out.extend(best.iter().map(|&packed| Scored::from(packed)));
        }
        (scratch.rows, scratch.best, scratch.exact) = (rows, best, scores);
        if settled { &self.settled.yes } else { &self.settled.no }.fetch_add(1, Relaxed);
        settled
    }
}

/// Rows scored together beyond the first k: few ever are.
const AT_ONCE: usize = 16;

impl VectorIndex for Prefetched<'_> {
    fn kind(&self) -> IndexKind {
        self.base.kind()
    }

    fn dim(&self) -> usize {
        self.base.dim()
    }

    fn n_lists(&self) -> u32 {
        self.base.n_lists()
    }

    fn bytes(&self) -> usize {
        self.base.bytes()
    }

    fn search(
        &self,
        query: &[f32],
        k: usize,
        filter: Filter<'_>,
        params: &SearchParams,
        scratch: &mut SearchScratch,
        out: &mut Vec<Scored>,
    ) {
        self.search_batch(query, k, filter, params, scratch, std::slice::from_mut(out));
    }

    fn search_batch(
        &self,
        queries: &[f32],
        k: usize,
        filter: Filter<'_>,
        params: &SearchParams,
        scratch: &mut SearchScratch,
        out: &mut [Vec<Scored>],
    ) {
        if out.len() != self.lists.len() {
            return self.base.search_batch(queries, k, filter, params, scratch, out);
        }
        for ((query, list), out) in queries.chunks_exact(self.dim().max(1)).zip(self.lists).zip(out) {
            if !self.settle(list, query, k, filter, scratch, out) {
                self.base.search(query, k, filter, params, scratch, out);
            }
        }
    }

    fn scores(&self, query: &[f32], rows: &[u32], scratch: &mut SearchScratch, out: &mut Vec<f32>) {
        self.base.scores(query, rows, scratch, out);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{BruteForce, Kernel};
    use super::*;
    use crate::candidates::best_first;
    use crate::catalog::generation::{Matrix, MatrixData, Metric};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_a_device_rounds_otherwise_changes_nothing(
            rows in prop::collection::vec(prop::collection::vec(-4i8..5, 3), 1..300), query in prop::collection::vec(-4i8..5, 3),
            k in 1usize..30, fetched in 1usize..90, every in 2u32..5, masked in any::<bool>(), seed in any::<u64>(),
            metric in prop::sample::select(vec![Metric::InnerProduct, Metric::Cosine, Metric::L2]),
            error in prop::sample::select(vec![0.0f32, 0.4, 3.0]),
        ) {
            // Small integers: many ties, which only the settled order may decide.
            let values: Vec<f32> = rows.iter().flatten().map(|&v| f32::from(v)).collect();
            let query: Vec<f32> = query.iter().map(|&v| f32::from(v)).collect();
            let index = BruteForce::new(Matrix { dim: 3, data: MatrixData::F32(values.into()) }, metric, Kernel::detect());
            let (n, mut scratch, mut exact) = (rows.len() as u32, SearchScratch::default(), Vec::new());
            index.scores(&query, &(0..n).collect::<Vec<_>>(), &mut scratch, &mut exact);
            let mut noise = crate::testing::noise(seed);
            let (shift, scale) = (-1.0, 2.0);
            let allows = |row: u32| !row.is_multiple_of(every);
            // As a device has it: off by less than the error, and without what it was told to leave out.
            let mut list: Vec<Scored> = (0..n)
                .filter(|&row| !masked || allows(row))
                .map(|row| Scored { row, score: (exact[row as usize] + noise() * 0.49 * error) * scale - shift })
                .collect();
            list.sort_by(best_first);
            let all = list.len() <= fetched;
            list.truncate(fetched);
            let (found, scores): (Vec<u32>, Vec<f32>) = list.iter().map(|s| (s.row, s.score)).unzip();
            let list = [Found { rows: &found, scores: &scores, shift, scale, error: error + 1e-4, all, enough: false }];
            let settled = Settled::default();
            let prefetched = Prefetched::new(&index, &list, &settled);
            let (mut want, mut got) = (Vec::new(), Vec::new());
            let filter = Filter::predicate(&allows);
            index.search(&query, k, filter, &SearchParams::default(), &mut scratch, &mut want);
            prefetched.search(&query, k, filter, &SearchParams::default(), &mut scratch, &mut got);
            prop_assert_eq!(got, want);
            let counted = [&settled.yes, &settled.no].map(|count| count.load(Relaxed));
            prop_assert_eq!(counted[0] + counted[1], 1);
            prop_assert!(!all || counted[0] == 1, "the whole list settles everything");
        }
    }

    #[test]
    fn another_number_of_queries_is_the_index_s_own() {
        let matrix = Matrix { dim: 2, data: MatrixData::F32(vec![1.0, 0.0, 0.0, 1.0].into()) };
        let index = BruteForce::new(matrix, Metric::InnerProduct, Kernel::detect());
        let settled = Settled::default();
        // A list that is wrong, to tell whose answer it is.
        let wrong = Found { rows: &[1], scores: &[5.0], shift: 0.0, scale: 1.0, error: 0.0, all: true, enough: false };
        let lists = [wrong; 3];
        for n in 0..3 {
            let prefetched = Prefetched::new(&index, &lists[..n], &settled);
            let mut out = vec![Vec::new(); 2];
            let (queries, params) = ([1.0, 0.0, 1.0, 0.0], SearchParams::default());
            prefetched.search_batch(&queries, 1, Filter::ALL, &params, &mut SearchScratch::default(), &mut out);
            let rows: Vec<u32> = out.iter().map(|list| list[0].row).collect();
            assert_eq!(rows, [u32::from(n == 2); 2]);
        }
    }

    #[test]
    fn of_an_index_s_list_enough_rows_will_do() {
        let matrix = Matrix { dim: 1, data: MatrixData::F32(vec![4.0, 3.0, 2.0, 1.0, 0.0].into()) };
        let index = BruteForce::new(matrix, Metric::InnerProduct, Kernel::detect());
        let (settled, mut scratch, params) = (Settled::default(), SearchScratch::default(), SearchParams::default());
        // Without the best row, which an index may miss; scores that say nothing, so that all is scored here.
        let list = Found {
            rows: &[3, 2, 1],
            scores: &[9.0, 8.0, 7.0],
            shift: 0.0,
            scale: 1.0,
            error: f32::INFINITY,
            all: false,
            enough: true,
        };
        let mut ask = |enough: bool, k: usize, filter: Filter<'_>| {
            let lists = [Found { enough, ..list }];
            let mut out = Vec::new();
            Prefetched::new(&index, &lists, &settled).search(&[1.0], k, filter, &params, &mut scratch, &mut out);
            out.iter().map(|found| (found.row, found.score)).collect::<Vec<_>>()
        };
        assert_eq!(ask(true, 2, Filter::ALL), [(1, 3.0), (2, 2.0)]);
        assert_eq!(ask(false, 2, Filter::ALL), [(0, 4.0), (1, 3.0)]);
        // Too few are left, and the index is asked.
        let odd = |row: u32| row % 2 == 1;
        assert_eq!(ask(true, 2, Filter::predicate(&odd)), [(1, 3.0), (3, 1.0)]);
        let even = |row: u32| row.is_multiple_of(2);
        assert_eq!(ask(true, 2, Filter::predicate(&even)), [(0, 4.0), (2, 2.0)]);
        assert_eq!((settled.yes.load(Relaxed), settled.no.load(Relaxed)), (2, 2));
    }
}
