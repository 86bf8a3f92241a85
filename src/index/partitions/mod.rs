//! An index in partitions: items are placed by a hash of their ids, every partition has an index of its own over its items, and a
//! search asks all of them and merges what they find to the best of all.
//!
//! With a uniform hash a partition holds about its share of the best `k`. It is asked for that and a margin, and asked again for `k`
//! where the last that it found is among the best of all, so that nothing is lost: for exact kinds the answers are those of one
//! index over everything, to the bit. Search parameters (`n_probes`, `ef_search`) are each partition's own. Partitions do not tell
//! each other how good their best are: a search would then depend on which of them was first.
//!
//! A partition whose search panics, or that is late, is left out of the answer, which says so ([`Coverage`]); it is not asked again
//! before some time has passed. With [`Searchers`] the caller waits until [`SearchScratch::until`] and no longer. Without, it
//! searches one partition after another itself: those that it does not come to in time are left out, but nothing saves it from one
//! that does not return.

mod health;
mod searchers;
#[cfg(test)]
mod tests;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use xxhash_rust::xxh3::xxh3_64;

pub use health::State;
use health::{Health, Trouble};
pub use searchers::Searchers;
use searchers::{Answered, Flight, Question};

use super::exact::Exact;
use super::ivf::EXACT_BELOW;
use super::{Filter, IndexKind, IndexOptions, Kernel, SearchParams, SearchScratch, Stored, VectorIndex, build_over};
use crate::candidates::{Packed, Scored, keep_best};
use crate::catalog::generation::{Matrix, Metric};

/// Most partitions of an index.
pub const MAX_PARTITIONS: u32 = 256;
/// Names what [`partition_of`] computes, in bundles.
pub const PLACEMENT: &str = "xxh3_64";
/// Up to one row in so many is scored by itself, whatever the kind of index.
const FEW: usize = 1024;

/// The partition of an item: the XXH3 hash of its id, 64 bits, as a fraction of `2^64`, times the number of partitions, rounded down.
/// It depends on nothing else.
pub fn partition_of(id: &str, n_partitions: u32) -> u32 {
    ((u128::from(xxh3_64(id.as_bytes())) * u128::from(n_partitions)) >> 64) as u32
}

/// How many lists' worth each of `to` partitions has to scan to find as large a share of the best as `n_probes` lists of each of `from`
/// do. Divided, the best lie among more vectors that are not: together, partitions scan more by the sixth root of their number
/// (measured: benches/record/ann.md). Unless all have as many lists as one would, they have fewer by the square root.
pub fn n_probes_for(n_probes: u32, [from, to]: [u32; 2], with_as_many_lists: bool) -> u32 {
    let more = f64::from(to.max(1)) / f64::from(from.max(1));
    let exponent = if with_as_many_lists { 1.0 / 6.0 } else { 1.0 / 6.0 - 0.5 };
    ((f64::from(n_probes) * more.powf(exponent)).ceil() as u32).max(1)
}

/// The rows of each partition, ascending, from the ids of all rows in order.
///
/// # Errors
/// A number of partitions out of range.
pub fn place<'a>(ids: impl Iterator<Item = &'a str>, n_partitions: u32) -> Result<Vec<Arc<[u32]>>, String> {
    if !(1..=MAX_PARTITIONS).contains(&n_partitions) {
        return Err(format!("partitions = {n_partitions}: must be 1 to {MAX_PARTITIONS}"));
    }
    let mut places = vec![Vec::new(); n_partitions as usize];
    ids.enumerate().for_each(|(row, id)| places[partition_of(id, n_partitions) as usize].push(row as u32));
    Ok(places.into_iter().map(Arc::from).collect())
}

/// What partitions a search did without.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Coverage {
    /// Share of the items that was not searched, 0 to 1.
    pub missing: f32,
    /// A partition failed, or is left out since it did.
    pub failed: bool,
    /// A partition was late, or is left out since it was.
    pub late: bool,
    n_missing: usize,
}

impl Coverage {
    /// Of `n` rows, those of `piece` were not searched.
    fn without(&mut self, piece: &Piece, n: usize, trouble: Trouble) {
        self.n_missing += piece.rows.len();
        self.missing = (self.n_missing as f64 / n as f64) as f32;
        match trouble {
            Trouble::Failed => self.failed = true,
            Trouble::Late => self.late = true,
        }
    }
}

/// A partition.
#[derive(Debug)]
pub struct Piece {
    index: Arc<dyn VectorIndex>,
    /// Item row of each row of the index, ascending.
    rows: Arc<[u32]>,
    health: Health,
}

impl Piece {
    /// Answers every query of `question` into `found`, by item rows. The filter is over the piece's own.
    fn search(
        &self,
        question: &Question,
        filter: Filter<'_>,
        scratch: &mut SearchScratch,
        found: &mut Vec<Vec<Scored>>,
    ) {
        let Question { queries, n_queries, k, params, .. } = question;
        found.resize_with(found.len().max(*n_queries), Vec::new);
        let found = &mut found[..*n_queries];
        found.iter_mut().for_each(Vec::clear);
        match &mut *found {
            [found] => self.index.search(queries, *k, filter, params, scratch, found),
            all => self.index.search_batch(queries, *k, filter, params, scratch, all),
        }
        found.iter_mut().flatten().for_each(|found| found.row = self.rows[found.row as usize]);
    }

    /// The item rows.
    pub fn rows(&self) -> &Arc<[u32]> {
        &self.rows
    }

    /// The index over them.
    pub fn index(&self) -> &Arc<dyn VectorIndex> {
        &self.index
    }

    /// Whether it is asked, and what went wrong with it.
    pub fn state(&self) -> State {
        self.health.state()
    }
}

/// Indexes over the partitions of a matrix.
#[derive(Debug)]
pub struct Partitioned {
    kind: IndexKind,
    whole: Exact,
    pieces: Arc<[Piece]>,
    searchers: OnceLock<Arc<Searchers>>,
}

/// Buffers of a search.
#[derive(Debug, Default)]
pub struct PartitionScratch {
    /// More than one only where a partition was late and still holds its own.
    flights: Vec<Arc<Flight>>,
    question: Question,
    /// Partitions to ask.
    asked: Vec<u32>,
    /// `[partition][query]`: what each found.
    answers: Vec<Vec<Vec<Scored>>>,
    /// `[partition]`: how many each was asked for; 0 where it did not answer.
    answered: Vec<usize>,
    rows: Vec<u32>,
}

impl Partitioned {
    /// Makes an index of the given kind for each of `places`, which hold the matrix's rows as [`place`] gives them; `defaults` are
    /// what a search does that does not say.
    ///
    /// # Errors
    /// As [`super::build`].
    pub fn build(
        options: &IndexOptions,
        matrix: &Matrix,
        metric: Metric,
        places: Vec<Arc<[u32]>>,
        defaults: SearchParams,
        progress: &(dyn Fn(&str, u64, u64) + Sync),
    ) -> Result<Self, String> {
        let n_places = places.len();
        let made = |(at, rows): (usize, Arc<[u32]>)| {
            let exact = Exact::of_chosen(matrix.clone(), rows.clone(), metric, Kernel::detect());
            let told =
                |step: &str, done, of| progress(&format!("{step}, partition {} of {n_places}", at + 1), done, of);
            Ok((build_over(&options.clone().at_most(rows.len()), exact, defaults, &told)?, rows))
        };
        let pieces: Result<Vec<_>, String> = places.into_iter().enumerate().map(made).collect();
        Ok(Self::new(options.kind(), matrix, metric, pieces?))
    }

    /// Of indexes that are there already, each with the item rows of its rows, ascending; together they hold every row once.
    pub fn new(
        kind: IndexKind,
        matrix: &Matrix,
        metric: Metric,
        pieces: impl IntoIterator<Item = (Arc<dyn VectorIndex>, Arc<[u32]>)>,
    ) -> Self {
        let piece = |(index, rows)| Piece { index, rows, health: Health::default() };
        Partitioned {
            kind,
            whole: Exact::new(matrix.clone(), metric, Kernel::detect()),
            pieces: pieces.into_iter().map(piece).collect(),
            searchers: OnceLock::new(),
        }
    }

    /// Lets `searchers` search from now on; the first that are given stay.
    pub fn give(&self, searchers: Arc<Searchers>) {
        if searchers.n_threads() > 0 {
            let _ = self.searchers.set(searchers);
        }
    }

    /// The partitions.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    fn n_rows(&self) -> usize {
        self.whole.rows().n_rows()
    }

    /// How many a partition is asked for, of `n` that are asked: its share of `k` and more than four standard deviations. Where one
    /// index would not score exactly in the end, partitions are not made to by being asked for few.
    fn share_of(k: usize, n: usize) -> usize {
        let mean = k as f64 / n.max(1) as f64;
        ((mean + 4.0 * mean.sqrt()).ceil() as usize + 8).max(EXACT_BELOW + 1).min(k)
    }

    fn run(
        &self,
        queries: &[f32],
        k: usize,
        filter: Filter<'_>,
        params: &SearchParams,
        scratch: &mut SearchScratch,
        out: &mut [Vec<Scored>],
    ) {
        scratch.coverage = Coverage::default();
        let (n, dim) = (self.n_rows(), self.dim());
        if k == 0 || n == 0 || out.is_empty() || queries.len() != dim * out.len() {
            return;
        }
        let mut own = std::mem::take(&mut scratch.partitions);
        let share = filter.share(n);
        let admitted = (share * n as f64) as usize;
        if !filter.is_all() && admitted <= k.max(n / FEW) {
            // Each partition would have to look for its few.
            own.rows.clear();
            filter.each(n, |row| own.rows.push(row));
            let SearchScratch { best, exact, block, .. } = scratch;
            for (query, out) in queries.chunks_exact(dim.max(1)).zip(out) {
                self.whole.rescore(query, &own.rows, block, exact, best);
                keep_best(best, k);
                out.extend(best.iter().map(|&p| Scored::from(p)));
            }
        } else {
            let Question { queries: asked, n_queries, params: with, share: admitted, .. } = &mut own.question;
            asked.clear();
            asked.extend_from_slice(queries);
            (*n_queries, *with, *admitted) = (out.len(), *params, share);
            self.ask_all(k, filter, scratch, &mut own, out);
        }
        scratch.partitions = own;
    }

    /// Answers `own.question`, for the best `k` of each query.
    fn ask_all(
        &self,
        k: usize,
        filter: Filter<'_>,
        scratch: &mut SearchScratch,
        own: &mut PartitionScratch,
        out: &mut [Vec<Scored>],
    ) {
        let PartitionScratch { asked, answers, answered, .. } = own;
        answers.resize_with(answers.len().max(self.pieces.len()), Vec::new);
        answered.clear();
        answered.resize(self.pieces.len(), 0);
        asked.clear();
        for (at, piece) in self.pieces.iter().enumerate().filter(|(_, piece)| !piece.rows.is_empty()) {
            match piece.health.admits() {
                Ok(()) => asked.push(at as u32),
                Err(trouble) => scratch.coverage.without(piece, self.n_rows(), trouble),
            }
        }
        own.question.k = Self::share_of(k, own.asked.len());
        self.ask(filter, scratch, own);
        let all_told = own.question.k == k;
        for (query, out) in out.iter_mut().enumerate() {
            self.merge(query, k, own, &mut scratch.best);
            if !all_told && self.ask_again(query, k, filter, scratch, own) {
                self.merge(query, k, own, &mut scratch.best);
            }
            out.extend(scratch.best.iter().map(|&p| Scored::from(p)));
        }
    }

    /// Asks partitions for `k` that may have more of the best of a query than they were asked for: all that they gave is among
    /// `scratch.best`. Says whether there are any.
    fn ask_again(
        &self,
        query: usize,
        k: usize,
        filter: Filter<'_>,
        scratch: &mut SearchScratch,
        own: &mut PartitionScratch,
    ) -> bool {
        let PartitionScratch { question, asked, answers, answered, .. } = own;
        let worst = scratch.best.get(k - 1);
        let may_have_more = |found: &[Scored], asked: usize| {
            let last = found.last().map(|&last| Packed::from(last));
            asked < k && found.len() == asked && worst.is_none_or(|worst| last.as_ref() <= Some(worst))
        };
        asked.clear();
        for (at, (found, &n)) in answers.iter().zip(&*answered).enumerate() {
            if n > 0 && may_have_more(&found[query], n) {
                asked.push(at as u32);
            }
        }
        if asked.is_empty() {
            return false;
        }
        question.k = k;
        self.ask(filter, scratch, own);
        true
    }

    /// The best `k` of what was found for a query, best first.
    fn merge(&self, query: usize, k: usize, own: &PartitionScratch, best: &mut Vec<Packed>) {
        best.clear();
        for (found, _) in own.answers.iter().zip(&own.answered).filter(|(_, asked)| **asked > 0) {
            best.extend(found[query].iter().map(|&s| Packed::from(s)));
        }
        keep_best(best, k);
    }

    /// Puts `own.question` to the partitions `own.asked`.
    fn ask(&self, filter: Filter<'_>, scratch: &mut SearchScratch, own: &mut PartitionScratch) {
        let PartitionScratch { flights, question, asked, answers, answered, .. } = own;
        let (began, until) = (Instant::now(), scratch.until);
        let budget = until.map(|until| until.saturating_duration_since(began));
        let k = question.k;
        let mut take = |at: u32, outcome: Answered, coverage: &mut Coverage| {
            let piece = &self.pieces[at as usize];
            // Whoever had to wait for others is not to blame, and neither who was given no time.
            let is_slow = |spent| budget.is_some_and(|budget| !budget.is_zero() && spent >= budget / 2);
            let trouble = match outcome {
                Answered::Found { late_by: None } => {
                    piece.health.answered(at);
                    answered[at as usize] = k;
                    return;
                }
                Answered::Found { late_by: Some(spent) } => {
                    // It is there, so that it may be used; but the next one shall not wait for it.
                    answered[at as usize] = k;
                    if is_slow(spent) {
                        piece.health.report(at, Trouble::Late);
                    }
                    return;
                }
                Answered::Panicked => {
                    // What it found before may be half overwritten.
                    answered[at as usize] = 0;
                    piece.health.report(at, Trouble::Failed);
                    Trouble::Failed
                }
                Answered::Late(spent) => {
                    if spent.is_some_and(is_slow) {
                        piece.health.report(at, Trouble::Late);
                    }
                    Trouble::Late
                }
            };
            coverage.without(piece, self.n_rows(), trouble);
        };
        if let Some(searchers) = self.searchers.get() {
            let flight = Flight::ready(flights, &self.pieces, question, asked, &filter);
            let mut coverage = scratch.coverage;
            searchers.search(&flight, &filter, until, scratch, |at, outcome, found| {
                if let Some(found) = found {
                    std::mem::swap(&mut answers[at as usize], found);
                }
                take(at, outcome, &mut coverage);
            });
            (scratch.until, scratch.coverage) = (until, coverage);
            return;
        }
        for &at in &*asked {
            let clock = Instant::now();
            if until.is_some_and(|until| clock >= until) {
                take(at, Answered::Late(None), &mut scratch.coverage);
                continue;
            }
            let (piece, found) = (&self.pieces[at as usize], &mut answers[at as usize]);
            let filter = filter.in_piece(&piece.rows, question.share);
            let done = catch_unwind(AssertUnwindSafe(|| piece.search(question, filter, scratch, found)));
            let outcome = match done {
                Ok(()) => {
                    let now = Instant::now();
                    Answered::Found { late_by: until.is_some_and(|until| now > until).then(|| now - clock) }
                }
                Err(_) => {
                    let coverage = scratch.coverage;
                    *scratch = SearchScratch { until, coverage, ..SearchScratch::default() };
                    Answered::Panicked
                }
            };
            take(at, outcome, &mut scratch.coverage);
        }
    }
}

impl VectorIndex for Partitioned {
    fn kind(&self) -> IndexKind {
        self.kind
    }

    fn dim(&self) -> usize {
        self.whole.rows().dim()
    }

    /// The most of any partition.
    fn n_lists(&self) -> u32 {
        self.pieces.iter().map(|piece| piece.index.n_lists()).max().unwrap_or(0)
    }

    fn bytes(&self) -> usize {
        let of_pieces: usize = self.pieces.iter().map(|piece| piece.index.bytes() + size_of_val(&piece.rows[..])).sum();
        of_pieces + size_of_val(self.whole.norms())
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
        self.run(query, k, filter, params, scratch, std::slice::from_mut(out));
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
        self.run(queries, k, filter, params, scratch, out);
    }

    fn stored(&self) -> Stored<'_> {
        Stored::Partitions(self)
    }

    fn scores(&self, query: &[f32], rows: &[u32], scratch: &mut SearchScratch, out: &mut Vec<f32>) {
        self.whole.scores(query, rows, &mut scratch.block, out);
    }
}
