//! An index that changes while it is searched.
//!
//! What is searched is a [`View`]: an index that never changes, the vectors that came later in a side list that is scanned exactly,
//! and for every row that changed, which of the two holds it. A change makes a new view, which shares all but what it touches with
//! the one before; searches keep the view that they began with. So a search that begins after a change has returned sees it, no
//! search sees half of a change, and none waits. Compaction builds the unchanging part anew beside the traffic.

use std::collections::BTreeMap;
use std::sync::Arc;

use half::f16;
use parking_lot::{Condvar, Mutex, RwLock};

use super::{Filter, IndexKind, IndexOptions, Kernel, SearchParams, SearchScratch, Stored, VectorIndex, build, exact};
use crate::candidates::{Packed, Scored, keep_best};
use crate::catalog::generation::{Matrix, MatrixData, Metric, NO_ROW};

/// Vectors of a chunk of the side list: what a change copies at most.
const CHUNK: usize = 64;
/// Rows whose states are copied together.
pub(crate) const PAGE: usize = 1024;
/// A row as it is in the unchanging part.
const UNCHANGED: u32 = 0;
/// A row that is gone.
const DELETED: u32 = u32::MAX;

/// One change. Changes of a batch appear together, later ones over earlier ones.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// Adds a row or replaces its vector.
    Upsert {
        /// Any but [`NO_ROW`]; memory is held for every row up to the largest.
        row: u32,
        /// f32 `[dim]`, finite.
        vector: Vec<f32>,
    },
    /// Removes a row; nothing happens where there is none.
    Delete {
        /// The row.
        row: u32,
    },
}

/// Why changes were refused; none of them was made.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ChangeError {
    /// Another dimension than the index's.
    #[error("row {row}: a vector of {got} dimensions; the index has {want}")]
    Dimension {
        /// The row.
        row: u32,
        /// The vector's.
        got: usize,
        /// The index's.
        want: usize,
    },
    /// NaN or infinite.
    #[error("row {row}: dimension {at} is not a finite number")]
    NotFinite {
        /// The row.
        row: u32,
        /// From 0.
        at: usize,
    },
    /// Not a row.
    #[error("row {row}: beyond the {most} rows that an index takes")]
    Row {
        /// The row.
        row: u32,
        /// Rows allowed.
        most: u32,
    },
}

/// When to compact.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    /// Vectors in the side list; each search scans them all.
    pub side_rows: usize,
    /// Share of the unchanging part's rows that are deleted or replaced: they take time and places from others.
    pub stale_share: f64,
    /// Rows that may be named.
    pub max_rows: u32,
}

impl Policy {
    /// For about `n` vectors.
    pub fn of(n: usize) -> Self {
        Policy { side_rows: (n / 512).max(1024), stale_share: 0.2, max_rows: 1 << 28 }
    }
}

/// States by row: pages are shared between views until one of them changes.
#[derive(Clone, Debug, Default)]
pub(crate) struct States(Vec<Option<Arc<[u32; PAGE]>>>);

impl States {
    /// 0 where none was set.
    #[inline]
    pub(crate) fn get(&self, row: u32) -> u32 {
        match self.0.get(row as usize / PAGE) {
            Some(Some(page)) => page[row as usize % PAGE],
            _ => UNCHANGED,
        }
    }

    /// Numbers of the pages that `other` does not share.
    pub(crate) fn changed_pages<'a>(&'a self, other: &'a States) -> impl Iterator<Item = usize> + use<'a> {
        let page = |of: &States, at: usize| of.0.get(at).and_then(Option::as_ref).map(Arc::as_ptr);
        (0..self.0.len().max(other.0.len())).filter(move |&at| page(self, at) != page(other, at))
    }

    pub(crate) fn set(&mut self, row: u32, state: u32) {
        let at = row as usize / PAGE;
        if self.0.len() <= at {
            self.0.resize(at + 1, None);
        }
        let page = self.0[at].get_or_insert_with(|| Arc::new([UNCHANGED; PAGE]));
        Arc::make_mut(page)[row as usize % PAGE] = state;
    }
}

/// A piece of the side list.
#[derive(Clone, Debug)]
struct Chunk {
    rows: Vec<u32>,
    /// `[rows, dim]`
    exact: Vec<f32>,
    /// The [`exact::norm`] of each.
    norms: Vec<f32>,
}

/// The part that does not change, over the rows `item_of`, or `0..n` where that is absent.
#[derive(Debug)]
struct Base {
    index: Arc<dyn VectorIndex>,
    matrix: Matrix,
    map: Option<RowMap>,
}

#[derive(Debug)]
struct RowMap {
    /// Ascending.
    item_of: Vec<u32>,
    /// By item row; [`NO_ROW`] where there is none.
    base_of: Vec<u32>,
}

impl Base {
    #[inline]
    fn item_of(&self, base: u32) -> u32 {
        self.map.as_ref().map_or(base, |map| map.item_of[base as usize])
    }

    #[inline]
    fn base_of(&self, item: u32) -> Option<u32> {
        let base = match &self.map {
            None => item,
            Some(map) => map.base_of.get(item as usize).copied().unwrap_or(NO_ROW),
        };
        ((base as usize) < self.matrix.n_rows()).then_some(base)
    }
}

/// One state of a live index; searching it always gives the same.
#[derive(Clone, Debug)]
pub struct View {
    base: Arc<Base>,
    states: States,
    side: Vec<Arc<Chunk>>,
    n_side: usize,
    /// Rows of the base that are deleted or replaced.
    n_stale: usize,
    n_live: usize,
    metric: Metric,
    kernel: Kernel,
    search: SearchParams,
}

impl View {
    /// Vectors that can be found.
    pub fn len(&self) -> usize {
        self.n_live
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.n_live == 0
    }

    /// Whether `row` can be found.
    pub fn contains(&self, row: u32) -> bool {
        match self.states.get(row) {
            UNCHANGED => self.base.base_of(row).is_some(),
            state => state != DELETED,
        }
    }

    fn is_changed(&self) -> bool {
        self.n_stale > 0 || self.n_side > 0
    }

    /// The side list's slot of a row's state.
    fn slot(state: u32) -> Option<(usize, usize)> {
        (state != UNCHANGED && state != DELETED).then(|| ((state as usize - 1) / CHUNK, (state as usize - 1) % CHUNK))
    }

    fn upsert(&mut self, row: u32, vector: &[f32]) {
        self.leave(row);
        let at = self.n_side;
        if at.is_multiple_of(CHUNK) {
            self.side.push(Arc::new(Chunk { rows: Vec::new(), exact: Vec::new(), norms: Vec::new() }));
        }
        let chunk = Arc::make_mut(&mut self.side[at / CHUNK]);
        chunk.rows.push(row);
        chunk.exact.extend_from_slice(vector);
        chunk.norms.push(exact::norm(self.metric, self.kernel.dot(vector, vector)));
        self.n_side += 1;
        self.n_live += 1;
        self.states.set(row, at as u32 + 1);
    }

    fn delete(&mut self, row: u32) {
        if self.contains(row) {
            self.leave(row);
            self.states.set(row, DELETED);
        }
    }

    /// Takes a row that may be there out of the counts.
    fn leave(&mut self, row: u32) {
        if self.contains(row) {
            self.n_live -= 1;
            self.n_stale += usize::from(self.states.get(row) == UNCHANGED);
        }
    }

    /// All rows that can be found, ascending, with their vectors.
    fn each(&self, mut take: impl FnMut(u32, &[f32])) {
        let mut changed: BTreeMap<u32, &[f32]> = BTreeMap::new();
        let dim = self.dim();
        for chunk in &self.side {
            for (at, &row) in chunk.rows.iter().enumerate() {
                // Slots in their order: the last of a row is the one that counts.
                changed.insert(row, &chunk.exact[at * dim..(at + 1) * dim]);
            }
        }
        changed.retain(|&row, _| self.states.get(row) != DELETED);
        let mut later = changed.into_iter().peekable();
        let mut vector = Vec::with_capacity(dim);
        for base in 0..self.base.matrix.n_rows() as u32 {
            let row = self.base.item_of(base);
            while let Some((changed, vector)) = later.next_if(|next| next.0 <= row) {
                take(changed, vector);
            }
            if self.states.get(row) == UNCHANGED {
                vector.clear();
                self.base.matrix.extend_row(base, &mut vector);
                take(row, &vector);
            }
        }
        later.for_each(|(row, vector)| take(row, vector));
    }

    /// Everything in an unchanging part of its own.
    fn compacted(&self, options: &IndexOptions, told: &(dyn Fn(&str, u64, u64) + Sync)) -> Result<View, String> {
        let (dim, mut item_of) = (self.dim(), Vec::with_capacity(self.n_live));
        let data = match &self.base.matrix.data {
            MatrixData::F32(_) => {
                let mut values = Vec::with_capacity(self.n_live * dim);
                self.each(|row, vector| {
                    item_of.push(row);
                    values.extend_from_slice(vector);
                });
                MatrixData::F32(values.into())
            }
            MatrixData::F16(_) => {
                let mut values = Vec::with_capacity(self.n_live * dim);
                self.each(|row, vector| {
                    item_of.push(row);
                    values.extend(vector.iter().map(|&v| f16::from_f32(v)));
                });
                MatrixData::F16(values.into())
            }
        };
        let matrix = Matrix { dim, data };
        let n = item_of.len();
        let index = build(&options.clone().at_most(n), &matrix, self.metric, told)?;
        let is_identity = item_of.last().is_none_or(|&last| last as usize + 1 == n);
        let map = (!is_identity).then(|| {
            let mut base_of = vec![NO_ROW; item_of.last().map_or(0, |&last| last as usize + 1)];
            item_of.iter().enumerate().for_each(|(base, &item)| base_of[item as usize] = base as u32);
            RowMap { item_of, base_of }
        });
        Ok(View {
            base: Arc::new(Base { index, matrix, map }),
            states: States::default(),
            side: Vec::new(),
            n_side: 0,
            n_stale: 0,
            n_live: n,
            ..self.clone()
        })
    }
}

impl VectorIndex for View {
    fn kind(&self) -> IndexKind {
        self.base.index.kind()
    }

    fn dim(&self) -> usize {
        self.base.matrix.dim
    }

    fn n_lists(&self) -> u32 {
        self.base.index.n_lists()
    }

    fn bytes(&self) -> usize {
        let pages = self.states.0.iter().flatten().count() * PAGE * 4;
        let map = self.base.map.as_ref().map_or(0, |map| 4 * (map.item_of.len() + map.base_of.len()));
        self.base.index.bytes() + pages + map + self.n_side * (4 * self.dim() + 8)
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
        let params = params.or(&self.search);
        let start = out.len();
        if !self.is_changed() && self.base.map.is_none() {
            return self.base.index.search(query, k, filter, &params, scratch, out);
        }
        let admits = |base: u32| {
            let row = self.base.item_of(base);
            self.states.get(row) == UNCHANGED && filter.allows(row)
        };
        self.base.index.search(query, k, Filter::predicate(&admits), &params, scratch, out);
        out[start..].iter_mut().for_each(|found| found.row = self.base.item_of(found.row));
        if self.n_side == 0 || query.len() != self.dim() || query.iter().any(|v| !v.is_finite()) {
            return;
        }
        let query_norm = self.kernel.dot(query, query).sqrt();
        let SearchScratch { best, scores, .. } = scratch;
        best.clear();
        best.extend(out.drain(start..).map(Packed::from));
        for (at, chunk) in self.side.iter().enumerate() {
            scores.resize(chunk.rows.len(), 0.0);
            self.kernel.dots(query, &chunk.exact, scores);
            for (place, (&row, &dot)) in chunk.rows.iter().zip(&*scores).enumerate() {
                let score = exact::score(self.metric, dot, chunk.norms[place], query_norm);
                if self.states.get(row) == (at * CHUNK + place) as u32 + 1 && filter.allows(row) {
                    best.push(Packed::from(Scored { row, score }));
                }
            }
        }
        keep_best(best, k);
        out.extend(best.iter().map(|&p| Scored::from(p)));
    }

    /// A row that is not there scores NaN.
    fn scores(&self, query: &[f32], rows: &[u32], scratch: &mut SearchScratch, out: &mut Vec<f32>) {
        let start = out.len();
        let mut base = std::mem::take(&mut scratch.maybe);
        base.clear();
        base.extend(rows.iter().map(|&row| self.base.base_of(row).unwrap_or(0)));
        match self.base.matrix.n_rows() {
            0 => out.resize(start + rows.len(), f32::NAN),
            _ => self.base.index.scores(query, &base, scratch, out),
        }
        scratch.maybe = base;
        let (dim, query_norm) = (self.dim(), self.kernel.dot(query, query).sqrt());
        for (&row, out) in rows.iter().zip(&mut out[start..]) {
            let state = self.states.get(row);
            if let Some((chunk, place)) = View::slot(state) {
                let chunk = &self.side[chunk];
                let dot = self.kernel.dot(query, &chunk.exact[place * dim..(place + 1) * dim]);
                *out = exact::score(self.metric, dot, chunk.norms[place], query_norm);
            } else if state == DELETED || self.base.base_of(row).is_none() {
                *out = f32::NAN;
            }
        }
    }

    fn stored(&self) -> Stored<'_> {
        if self.is_changed() || self.base.map.is_some() { Stored::Nothing } else { self.base.index.stored() }
    }
}

/// An index that changes while it is searched; shared by `Arc`.
#[derive(Debug)]
pub struct LiveIndex {
    options: IndexOptions,
    policy: Policy,
    current: RwLock<Arc<View>>,
    writer: Mutex<Writer>,
    /// Wakes the compactor.
    due: Condvar,
}

#[derive(Debug, Default)]
struct Writer {
    /// Changes since the compaction under way began.
    since: Option<Vec<Change>>,
    is_closed: bool,
}

impl LiveIndex {
    /// Over an index that was made with `options` from `matrix`.
    pub fn new(
        index: Arc<dyn VectorIndex>,
        matrix: Matrix,
        metric: Metric,
        options: IndexOptions,
        search: SearchParams,
        policy: Policy,
    ) -> Self {
        let view = View {
            n_live: matrix.n_rows(),
            base: Arc::new(Base { index, matrix, map: None }),
            states: States::default(),
            side: Vec::new(),
            n_side: 0,
            n_stale: 0,
            metric,
            kernel: Kernel::detect(),
            search,
        };
        LiveIndex {
            options,
            policy,
            current: RwLock::new(Arc::new(view)),
            writer: Mutex::default(),
            due: Condvar::new(),
        }
    }

    /// What a search that begins now sees.
    pub fn view(&self) -> Arc<View> {
        self.current.read().clone()
    }

    /// Makes changes; every search that begins after the return sees all of them, and none sees a part of them.
    ///
    /// # Errors
    /// The first change that can't be made; none is then.
    pub fn apply(&self, changes: &[Change]) -> Result<(), ChangeError> {
        let dim = self.view().dim();
        for change in changes {
            self.check(change, dim)?;
        }
        let mut writer = self.writer.lock();
        let mut view = View::clone(&self.view());
        make(&mut view, changes);
        *self.current.write() = Arc::new(view);
        if let Some(since) = &mut writer.since {
            since.extend_from_slice(changes);
        }
        drop(writer);
        if self.is_due() {
            self.due.notify_one();
        }
        Ok(())
    }

    fn check(&self, change: &Change, dim: usize) -> Result<(), ChangeError> {
        let (Change::Upsert { row, .. } | Change::Delete { row }) = change;
        let (row, most) = (*row, self.policy.max_rows);
        if row >= most {
            return Err(ChangeError::Row { row, most });
        }
        let Change::Upsert { vector, .. } = change else { return Ok(()) };
        if vector.len() != dim {
            return Err(ChangeError::Dimension { row, got: vector.len(), want: dim });
        }
        match vector.iter().position(|v| !v.is_finite()) {
            Some(at) => Err(ChangeError::NotFinite { row, at }),
            None => Ok(()),
        }
    }

    /// Whether so much has changed that compaction pays.
    pub fn is_due(&self) -> bool {
        let view = self.view();
        let stale = view.n_stale as f64 / view.base.matrix.n_rows().max(1) as f64;
        view.n_side > self.policy.side_rows || stale > self.policy.stale_share
    }

    /// Builds the unchanging part anew; searches and changes go on meanwhile. Returns whether it did: not while another
    /// compaction is under way.
    ///
    /// # Errors
    /// As [`build`]; the index stays as it was.
    pub fn compact(&self, told: &(dyn Fn(&str, u64, u64) + Sync)) -> Result<bool, String> {
        let before = {
            let mut writer = self.writer.lock();
            if writer.since.is_some() {
                return Ok(false);
            }
            writer.since = Some(Vec::new());
            self.view()
        };
        let built = before.compacted(&self.options, told);
        let mut writer = self.writer.lock();
        let since = writer.since.take().unwrap_or_default();
        let mut view = built?;
        make(&mut view, &since);
        *self.current.write() = Arc::new(view);
        Ok(true)
    }

    /// Compacts whenever it is due, until [`Self::close`]: the body of a thread of its own. `failed` hears of compactions that
    /// did not succeed; the next is tried after more changes.
    pub fn compact_when_due(&self, failed: &dyn Fn(String)) {
        loop {
            {
                let mut writer = self.writer.lock();
                while !writer.is_closed && !self.is_due() {
                    self.due.wait(&mut writer);
                }
                if writer.is_closed {
                    return;
                }
            }
            if let Err(reason) = self.compact(&|_, _, _| {}) {
                failed(reason);
                let mut writer = self.writer.lock();
                if !writer.is_closed {
                    self.due.wait(&mut writer);
                }
            }
        }
    }

    /// Ends [`Self::compact_when_due`].
    pub fn close(&self) {
        self.writer.lock().is_closed = true;
        self.due.notify_all();
    }
}

fn make(view: &mut View, changes: &[Change]) {
    for change in changes {
        match change {
            Change::Upsert { row, vector } => view.upsert(*row, vector),
            Change::Delete { row } => view.delete(*row),
        }
    }
}

impl VectorIndex for LiveIndex {
    fn kind(&self) -> IndexKind {
        self.options.kind()
    }

    fn dim(&self) -> usize {
        self.view().dim()
    }

    fn n_lists(&self) -> u32 {
        self.view().n_lists()
    }

    fn bytes(&self) -> usize {
        self.view().bytes()
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
        self.view().search(query, k, filter, params, scratch, out);
    }

    fn scores(&self, query: &[f32], rows: &[u32], scratch: &mut SearchScratch, out: &mut Vec<f32>) {
        self.view().scores(query, rows, scratch, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::candidates::best_first;
    use crate::index::{BruteForce, IvfOptions};
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    const DIM: usize = 8;

    fn live(rows: usize, options: IndexOptions, policy: Policy, vector: impl Fn(usize) -> [f32; DIM]) -> LiveIndex {
        let values: Vec<f32> = (0..rows).flat_map(vector).collect();
        let matrix = Matrix { dim: DIM, data: MatrixData::F32(values.into()) };
        let metric = Metric::InnerProduct;
        let index = build(&options.clone().at_most(rows), &matrix, metric, &|_, _, _| {}).unwrap();
        LiveIndex::new(index, matrix, metric, options, SearchParams::default(), policy)
    }

    #[derive(Clone, Debug)]
    enum Step {
        Upsert(u32, [i8; 2]),
        Delete(u32),
        Compact,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            5 => (0u32..60, prop::array::uniform2(-9i8..9)).prop_map(|(row, v)| Step::Upsert(row, v)),
            3 => (0u32..60).prop_map(Step::Delete),
            1 => Just(Step::Compact),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn equals_a_map(steps in prop::collection::vec(step(), 0..150), k in 1usize..30, every in 1u32..4) {
            let vector = |at: usize| [at as f32 % 7.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
            let live = live(40, IndexOptions::BruteForce {}, Policy::of(40), vector);
            let mut model: BTreeMap<u32, Vec<f32>> = (0..40).map(|row| (row as u32, vector(row).to_vec())).collect();
            for step in steps {
                match step {
                    Step::Upsert(row, [a, b]) => {
                        let vector = vec![f32::from(a), f32::from(b), 0.0, 0.0, 0.0, 0.0, 0.0, 1.0];
                        live.apply(&[Change::Upsert { row, vector: vector.clone() }]).unwrap();
                        model.insert(row, vector);
                    }
                    Step::Delete(row) => {
                        live.apply(&[Change::Delete { row }]).unwrap();
                        model.remove(&row);
                    }
                    Step::Compact => assert!(live.compact(&|_, _, _| {}).unwrap()),
                }
            }
            let query = [1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5];
            let dot = |v: &[f32]| v.iter().zip(query).map(|(a, b)| a * b).sum::<f32>();
            let allows = |row: u32| row.is_multiple_of(every);
            let mut want: Vec<Scored> = model.iter().map(|(&row, v)| Scored { row, score: dot(v) }).collect();
            let all = want.clone();
            want.retain(|s| allows(s.row));
            want.sort_by(best_first);
            want.truncate(k);
            let (mut got, mut scratch) = (Vec::new(), SearchScratch::default());
            live.search(&query, k, Filter::predicate(&allows), &SearchParams::default(), &mut scratch, &mut got);
            prop_assert_eq!(got, want);
            prop_assert_eq!(live.view().len(), model.len());
            let rows: Vec<u32> = (0..70).collect();
            let mut scores = Vec::new();
            live.scores(&query, &rows, &mut scratch, &mut scores);
            for (row, score) in rows.iter().zip(scores) {
                let want = all.iter().find(|s| s.row == *row).map(|s| s.score);
                prop_assert_eq!(want, (!score.is_nan()).then_some(score));
                prop_assert_eq!(want.is_some(), live.view().contains(*row));
            }
        }
    }

    #[test]
    fn refuses_what_it_cannot_hold() {
        let live = live(3, IndexOptions::BruteForce {}, Policy::of(3), |_| [1.0; DIM]);
        let refused = |row, vector: Vec<f32>| {
            let good = Change::Upsert { row: 0, vector: vec![2.0; DIM] };
            live.apply(&[good, Change::Upsert { row, vector }]).unwrap_err()
        };
        assert_eq!(refused(1, vec![1.0]), ChangeError::Dimension { row: 1, got: 1, want: DIM });
        let mut odd = vec![1.0; DIM];
        odd[3] = f32::NAN;
        assert_eq!(refused(1, odd), ChangeError::NotFinite { row: 1, at: 3 });
        assert!(matches!(refused(u32::MAX, vec![1.0; DIM]), ChangeError::Row { .. }));
        // None of the batch was made.
        let mut scores = Vec::new();
        live.scores(&[1.0; DIM], &[0], &mut SearchScratch::default(), &mut scores);
        assert_eq!(scores, [8.0]);
    }

    /// Searches run beside changes and compactions: what was deleted before a search began is not found, and of every row the
    /// version is at least the one that was there when it began.
    #[test]
    fn searches_see_every_change_that_was_made_before_them() {
        const ROWS: usize = 400;
        // The score of version v for the query is v.
        let vector = |row: usize, version: u32| {
            let mut vector = [0.0; DIM];
            vector[0] = version as f32;
            vector[1 + row % (DIM - 1)] = 1.0;
            vector
        };
        let policy = Policy { side_rows: 150, stale_share: 0.3, max_rows: 1000 };
        let options = IndexOptions::IvfFlat(IvfOptions { n_lists: Some(8), ..Default::default() });
        let live = live(ROWS, options, policy, |row| vector(row, 1));
        // Every change has a number of its own. CHANGING is added while it is made, when either version may be found.
        const CHANGING: u32 = 1 << 31;
        const GONE: u32 = 1 << 30;
        let versions: Vec<AtomicU32> = (0..ROWS).map(|_| AtomicU32::new(1)).collect();
        let done = AtomicBool::new(false);
        let mut query = [0.0; DIM];
        query[0] = 1.0;
        let all = SearchParams { n_probes: Some(u32::MAX), ..Default::default() };
        let (compactions, searches) = std::thread::scope(|scope| {
            let compactor = scope.spawn(|| live.compact_when_due(&|reason| panic!("{reason}")));
            let searchers: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        let (mut searches, mut out, mut scratch) = (0, Vec::new(), SearchScratch::default());
                        while !done.load(Ordering::Relaxed) {
                            let before: Vec<u32> = versions.iter().map(|v| v.load(Ordering::Acquire)).collect();
                            out.clear();
                            live.search(&query, ROWS, Filter::ALL, &all, &mut scratch, &mut out);
                            let mut rows: Vec<u32> = out.iter().map(|s| s.row).collect();
                            rows.sort_unstable();
                            assert!(rows.windows(2).all(|pair| pair[0] < pair[1]), "a row twice");
                            let found: BTreeMap<u32, f32> = out.iter().map(|s| (s.row, s.score)).collect();
                            for (row, &before) in before.iter().enumerate() {
                                let now = versions[row].load(Ordering::Acquire);
                                let settled = now == before && now & CHANGING == 0;
                                let score = found.get(&(row as u32)).map_or(0, |&score| score as u32);
                                let is = if before & GONE == 0 { before } else { 0 };
                                assert!(score == is || !settled, "row {row}: found {score}, is {is}");
                            }
                            searches += 1;
                        }
                        searches
                    })
                })
                .collect();
            let mut noise = crate::testing::noise(11);
            let mut compactions = 0;
            let mut bases = live.view().base.clone();
            let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
            // Versions are exact as f32.
            for change in 2..1 << 24 {
                if change > 3000 && compactions > 2 || std::time::Instant::now() > until {
                    break;
                }
                let row = ((noise() + 0.5) * ROWS as f32) as usize % ROWS;
                let before = versions[row].fetch_or(CHANGING, Ordering::AcqRel);
                assert_eq!(before & CHANGING, 0);
                if change % 3 == 0 {
                    live.apply(&[Change::Delete { row: row as u32 }]).unwrap();
                    versions[row].store(change | GONE, Ordering::Release);
                } else {
                    let vector = vector(row, change).to_vec();
                    live.apply(&[Change::Upsert { row: row as u32, vector }]).unwrap();
                    versions[row].store(change, Ordering::Release);
                }
                let now = live.view().base.clone();
                compactions += u32::from(!Arc::ptr_eq(&now, &bases));
                bases = now;
            }
            done.store(true, Ordering::Relaxed);
            live.close();
            compactor.join().unwrap();
            let searches: u32 = searchers.into_iter().map(|s| s.join().unwrap()).sum();
            (compactions, searches)
        });
        assert!(compactions > 2 && searches > 0, "{compactions} {searches}");
    }

    /// Half of the catalogue replaced, by vectors of another distribution.
    #[test]
    fn recall_survives_churn() {
        let mut noise = crate::testing::noise(5);
        let centres: Vec<f32> = (0..40 * DIM).map(|_| noise()).collect();
        let n = 2000;
        let values: Vec<[f32; DIM]> =
            (0..n).map(|at| std::array::from_fn(|d| centres[at % 20 * DIM + d] + 0.3 * noise())).collect();
        let options = IndexOptions::IvfPq(IvfOptions { n_lists: Some(40), ..Default::default() });
        let policy = Policy { side_rows: 300, ..Policy::of(n) };
        let live = live(n, options.clone(), policy, |row| values[row]);
        let mut now = values.clone();
        for row in (0..n).step_by(2) {
            now[row] = std::array::from_fn(|d| centres[(20 + row % 20) * DIM + d] + 0.3 * noise());
            live.apply(&[Change::Upsert { row: row as u32, vector: now[row].to_vec() }]).unwrap();
            if live.is_due() {
                live.compact(&|_, _, _| {}).unwrap();
            }
        }
        let matrix = Matrix { dim: DIM, data: MatrixData::F32(now.concat().into()) };
        let fresh = build(&options, &matrix, Metric::InnerProduct, &|_, _, _| {}).unwrap();
        let oracle = BruteForce::new(matrix, Metric::InnerProduct, Kernel::detect());
        let (mut scratch, mut recalls) = (SearchScratch::default(), [0.0; 2]);
        for query in now.iter().step_by(37) {
            let mut find = |index: &dyn VectorIndex| {
                let mut out = Vec::new();
                let params = SearchParams { n_probes: Some(10), ..Default::default() };
                index.search(query, 50, Filter::ALL, &params, &mut scratch, &mut out);
                out
            };
            let want = find(&oracle);
            for (index, recall) in [&live as &dyn VectorIndex, &*fresh].into_iter().zip(&mut recalls) {
                let got = find(index);
                *recall += want.iter().filter(|w| got.iter().any(|g| g.row == w.row)).count() as f64;
            }
        }
        let [live, fresh] = recalls.map(|found| found / (50 * n.div_ceil(37).min(55)) as f64);
        assert!(live >= fresh - 0.01 && fresh > 0.8, "{live} {fresh}");
    }
}
