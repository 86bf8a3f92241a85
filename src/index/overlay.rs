//! An index of the bundle with the vectors that came later laid over it.

use super::{Filter, IndexKind, SearchParams, SearchScratch, VectorIndex};
use crate::candidates::{Packed, Scored, keep_best};
use crate::catalog::live::LiveItems;

/// Both as one index over all rows: what is gone or has another vector by now is left out of the bundle's.
#[derive(Clone, Copy, Debug)]
pub struct Overlay<'a> {
    base: &'a dyn VectorIndex,
    /// Rows of the base.
    n_base: usize,
    items: &'a LiveItems,
}

impl<'a> Overlay<'a> {
    /// Over `base`, which has the first `n_base` rows.
    pub fn new(base: &'a dyn VectorIndex, n_base: usize, items: &'a LiveItems) -> Self {
        Overlay { base, n_base, items }
    }

    /// Adds to the best of the base what of the others is better; `found` begins at `start` of `out`.
    fn add(
        &self,
        query: &[f32],
        k: usize,
        filter: Filter<'_>,
        scratch: &mut SearchScratch,
        start: usize,
        out: &mut Vec<Scored>,
    ) {
        let Some(view) = self.items.vectors().filter(|view| !view.is_empty()) else { return };
        let admits = |row: u32| !self.items.is_gone(row) && filter.allows(row);
        // The base alone knows of partitions that did not answer.
        let coverage = scratch.coverage;
        let middle = out.len();
        view.search(query, k, Filter::predicate(&admits), &SearchParams::default(), scratch, out);
        scratch.coverage = coverage;
        if out.len() > middle {
            let mut best: Vec<Packed> = out.drain(start..).map(Packed::from).collect();
            keep_best(&mut best, k);
            out.extend(best.into_iter().map(Scored::from));
        }
    }

    fn with_base<R>(&self, filter: Filter<'_>, search: impl FnOnce(Filter<'_>) -> R) -> R {
        let admits = |row: u32| !self.items.hides_vector(row) && filter.predicate.is_none_or(|admits| admits(row));
        search(Filter { predicate: Some(&admits), ..filter })
    }
}

impl VectorIndex for Overlay<'_> {
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
        self.base.bytes() + self.items.vectors().map_or(0, |view| view.bytes())
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
        let start = out.len();
        self.with_base(filter, |filter| self.base.search(query, k, filter, params, scratch, out));
        self.add(query, k, filter, scratch, start, out);
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
        let starts: Vec<usize> = out.iter().map(Vec::len).collect();
        self.with_base(filter, |filter| self.base.search_batch(queries, k, filter, params, scratch, out));
        for ((query, start), out) in queries.chunks_exact(self.dim().max(1)).zip(starts).zip(out) {
            self.add(query, k, filter, scratch, start, out);
        }
    }

    /// A row without a vector scores 0.
    fn scores(&self, query: &[f32], rows: &[u32], scratch: &mut SearchScratch, out: &mut Vec<f32>) {
        let is_base = |row: u32| (row as usize) < self.n_base;
        if rows.iter().all(|&row| is_base(row) && self.items.get(row).is_none_or(|item| item.vector.is_none())) {
            return self.base.scores(query, rows, scratch, out);
        }
        let start = out.len();
        match self.n_base {
            0 => out.resize(start + rows.len(), 0.0),
            _ => {
                let stand_ins: Vec<u32> = rows.iter().map(|&row| if is_base(row) { row } else { 0 }).collect();
                self.base.scores(query, &stand_ins, scratch, out);
            }
        }
        let changed = |row: u32| self.items.get(row).is_some_and(|item| item.vector.is_some());
        for (at, &row) in rows.iter().enumerate().filter(|(_, row)| changed(**row) || !is_base(**row)) {
            let mut score = Vec::new();
            if let (true, Some(view)) = (changed(row), self.items.vectors()) {
                view.scores(query, &[row], scratch, &mut score);
            }
            out[start + at] = score.first().copied().filter(|score| !score.is_nan()).unwrap_or(0.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::live::{Change, LiveIndex, Policy};
    use super::super::{BruteForce, IndexOptions, Kernel, build};
    use super::*;
    use crate::catalog::generation::{Matrix, MatrixData, Metric};
    use crate::catalog::live::LiveItem;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn finds_what_an_index_over_the_newest_vectors_finds(
            values in prop::collection::vec(-9i8..9, 40..120), changes in prop::collection::vec((0u32..50, prop::collection::vec(-9i8..9, 4)), 0..30),
            gone in prop::collection::btree_set(0u32..50, 0..10), query in prop::collection::vec(-9i8..9, 8), k in 1usize..60,
            metric in prop::sample::select(vec![Metric::InnerProduct, Metric::Cosine, Metric::L2]), odd in any::<bool>(), wide in any::<bool>(),
        ) {
            let floats = |values: &[i8]| values.iter().map(|&v| f32::from(v)).collect::<Vec<f32>>();
            let n_base = values.len() / 4;
            let matrix = |values: Vec<f32>| Matrix { dim: 4, data: MatrixData::F32(values.into()) };
            let base = build(&IndexOptions::BruteForce {}, &matrix(floats(&values[..n_base * 4])), metric, &|_, _, _| {}).unwrap();
            let none = Arc::new(BruteForce::new(matrix(Vec::new()), metric, Kernel::detect()));
            let live = LiveIndex::new(none, matrix(Vec::new()), metric, IndexOptions::BruteForce {}, SearchParams::default(), Policy::of(0));
            let mut items = LiveItems::new(n_base);
            let mut newest: Vec<Option<Vec<f32>>> = floats(&values[..n_base * 4]).chunks(4).map(|v| Some(v.to_vec())).collect();
            for (row, vector) in changes {
                // A new row is the next one.
                let row = row.min(items.n_rows());
                let vector = floats(&vector);
                newest.resize(newest.len().max(row as usize + 1), None);
                newest[row as usize] = Some(vector.clone());
                items.put(row, Arc::new(LiveItem { vector: Some(vector.clone().into()), ..LiveItem::default() }));
                live.apply(&[Change::Upsert { row, vector }]).unwrap();
            }
            items.set_vectors(live.view());
            let gone: Vec<u32> = gone.into_iter().filter(|row| *row < items.n_rows()).collect();
            gone.iter().for_each(|&row| assert!(items.set_gone(row, true)));
            let whole: Vec<f32> = newest.iter().flat_map(|v| v.clone().unwrap()).collect();
            let want = build(&IndexOptions::BruteForce {}, &matrix(whole), metric, &|_, _, _| {}).unwrap();
            let overlay = Overlay::new(&*base, n_base, &items);
            let is_odd = |row: u32| !odd || row % 2 == 1;
            let left = |row: u32| is_odd(row) && !gone.contains(&row);
            let words = vec![if wide { u64::MAX } else { 0x0f0f_0f0f_0f0f_0f0f }; 1];
            let mut scratch = SearchScratch::default();
            let query = floats(&query);
            let mut found = [vec![], vec![]];
            overlay.search_batch(&query, k, Filter::predicate(&is_odd).within(&words), &SearchParams::default(), &mut scratch, &mut found);
            for (query, batched) in query.chunks(4).zip(found) {
                let (mut got, mut wanted) = (Vec::new(), Vec::new());
                overlay.search(query, k, Filter::predicate(&is_odd).within(&words), &SearchParams::default(), &mut scratch, &mut got);
                want.search(query, k, Filter::predicate(&left).within(&words), &SearchParams::default(), &mut scratch, &mut wanted);
                prop_assert_eq!(&batched, &got);
                // Not the rows: what is rounded otherwise breaks ties otherwise.
                prop_assert_eq!(got.len(), wanted.len());
                prop_assert!(got.iter().zip(&wanted).all(|(a, b)| (a.score - b.score).abs() <= 1e-4 * b.score.abs().max(1.0)));
                prop_assert!(got.iter().all(|s| left(s.row)));
                let rows: Vec<u32> = (0..items.n_rows()).collect();
                let (mut got, mut wanted) = (Vec::new(), Vec::new());
                overlay.scores(query, &rows, &mut scratch, &mut got);
                want.scores(query, &rows, &mut scratch, &mut wanted);
                prop_assert!(got.iter().zip(&wanted).all(|(a, b)| (a - b).abs() <= 1e-4 * b.abs().max(1.0)));
            }
        }
    }
}
