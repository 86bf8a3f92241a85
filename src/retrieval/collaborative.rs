//! Neighbours of the items in the user's history. What is gathered on the way also feeds the ranker's cross features.

use crate::candidates::{Packed, Scored, keep_best};
use crate::catalog::generation::{Interaction, Lists};
use crate::memory::prefetch;

/// What the history says of one item.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Signal {
    /// `Σ weight · similarity` over history items that list the item as a neighbour: the source's score.
    pub sum: f32,
    /// The three largest similarities, 0 where there are fewer.
    pub largest: [f32; 3],
    /// How many history items list it.
    pub count: u32,
}

/// A signal while it is gathered; half a cache line, so that reading one touches one.
#[derive(Clone, Copy, Debug)]
#[repr(align(32))]
struct Tally {
    /// One more than is asked for fills a register.
    largest: [f32; 4],
    sum: f32,
    count: u32,
}

impl Tally {
    /// Puts a similarity in its place among the largest, without a branch: each place becomes the larger of itself and the
    /// smaller of the newcomer and the place before.
    #[inline(always)]
    fn insert(&mut self, similarity: f32) {
        let larger = |a: f32, b: f32| if a > b { a } else { b };
        let smaller = |a: f32, b: f32| if a < b { a } else { b };
        let [a, b, c, d] = self.largest;
        let before = [f32::INFINITY, a, b, c].map(|v| smaller(v, similarity));
        self.largest = [larger(a, before[0]), larger(b, before[1]), larger(c, before[2]), larger(d, before[3])];
    }
}

/// How many tallies ahead of its use one is asked for: together they are larger than the L2 cache leaves room for.
const AHEAD: usize = 16;

/// How many more than are wanted are looked at, beside as many as there are in the history: for some are not allowed.
const SPARE: usize = 64;

const NOTHING: Tally = Tally { largest: [f32::NEG_INFINITY; 4], sum: 0.0, count: 0 };

/// A [`Signal`] for every item, dense, valid for one request.
#[derive(Debug, Default)]
pub struct Signals {
    by_row: Vec<Tally>,
    /// The first `n_touched` are the rows that the history says something of.
    touched: Vec<u32>,
    n_touched: usize,
    n_liked: usize,
    /// Rows that may be among the best.
    above: Vec<u32>,
    best: Vec<Packed>,
}

impl Signals {
    /// Reads the neighbour lists of `history` (entries of weight 0 do not count).
    pub fn gather(&mut self, lists: &Lists, history: &[Interaction], n_items: usize) {
        for &row in &self.touched[..self.n_touched] {
            self.by_row[row as usize] = NOTHING;
        }
        if self.by_row.len() < n_items {
            self.by_row.resize(n_items, NOTHING);
            // One place more: a row is written before it is known whether it counts.
            self.touched.resize(n_items + 1, 0);
        }
        // No branch depends on the data: whether a row is new and where its similarity stands can't be predicted.
        self.n_liked = 0;
        let mut n_touched = 0;
        let mut liked = history.iter().filter(|e| e.weight > 0.0).peekable();
        while let Some(entry) = liked.next() {
            self.n_liked += 1;
            if let Some(next) = liked.peek() {
                lists.prefetch(next.row);
            }
            let (rows, scores) = lists.of(entry.row);
            for (at, (&row, &similarity)) in rows.iter().zip(scores).enumerate() {
                if let Some(&next) = rows.get(at + AHEAD) {
                    prefetch(&self.by_row, next as usize);
                }
                let tally = &mut self.by_row[row as usize];
                self.touched[n_touched] = row;
                n_touched += usize::from(tally.count == 0);
                tally.count += 1;
                tally.sum += entry.weight * similarity;
                tally.insert(similarity);
            }
        }
        self.n_touched = n_touched;
    }

    /// What the history says of `row`.
    pub fn of(&self, row: u32) -> Signal {
        match self.by_row.get(row as usize) {
            Some(tally) => Signal {
                sum: tally.sum,
                largest: [0, 1, 2].map(|at| tally.largest[at]).map(|s| if s == f32::NEG_INFINITY { 0.0 } else { s }),
                count: tally.count,
            },
            None => Signal::default(),
        }
    }

    /// Passes on what the history says of each row.
    pub fn each(&self, rows: &[u32], mut take: impl FnMut(Signal)) {
        for (at, &row) in rows.iter().enumerate() {
            if let Some(&next) = rows.get(at + AHEAD) {
                prefetch(&self.by_row, next as usize);
            }
            take(self.of(row));
        }
    }

    /// Appends the `k` best allowed items by `sum`, best first.
    pub fn retrieve(&mut self, k: usize, allowed: &dyn Fn(u32) -> bool, out: &mut Vec<Scored>) {
        // Few of thousands are wanted, and to ask whether one is allowed costs more than to see that it is not among the best.
        let mut least = self.enough(k + self.n_liked + SPARE);
        loop {
            let Signals { by_row, touched, n_touched, above, best, .. } = &mut *self;
            above.resize(*n_touched + 1, 0);
            let mut n_above = 0;
            for &row in &touched[..*n_touched] {
                above[n_above] = row;
                n_above += usize::from(by_row[row as usize].sum >= least);
            }
            let scored = above[..n_above].iter().map(|&row| Scored { row, score: by_row[row as usize].sum });
            best.clear();
            best.extend(scored.filter(|s| s.score > 0.0 && allowed(s.row)).map(Packed::from));
            if best.len() >= k || least == 0.0 {
                break;
            }
            least = 0.0;
        }
        keep_best(&mut self.best, k);
        out.extend(self.best.iter().map(|&p| Scored::from(p)));
    }

    /// A sum that at least `wanted` items very probably reach, and not many more, as a sample of them says; 0 where there are few.
    fn enough(&self, wanted: usize) -> f32 {
        const SAMPLE: usize = 128;
        let n = self.n_touched;
        // By then two standard deviations, and some.
        let expected = wanted * SAMPLE / n.max(1);
        let at = expected + 2 * expected.isqrt() + 3;
        if n < 8 * SAMPLE || at >= SAMPLE / 2 {
            return 0.0;
        }
        let step = n / SAMPLE;
        let mut sample: [f32; SAMPLE] = std::array::from_fn(|i| self.by_row[self.touched[i * step] as usize].sum);
        sample.select_nth_unstable_by(at, |a, b| b.total_cmp(a)).1.max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::candidates::best_first;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn equals_the_obvious_version(
            lists in prop::collection::vec(prop::collection::btree_map(0u32..10, 1u8..100, 0..6), 10),
            history in prop::collection::vec((0u32..10, 0u8..3), 0..8), k in 0usize..12,
        ) {
            let rows: Vec<Vec<(u32, f32)>> =
                lists.iter().map(|l| l.iter().map(|(&r, &s)| (r, f32::from(s) / 64.0)).collect()).collect();
            let packed = crate::catalog::cooccurrence::from_rows(&rows);
            let history: Vec<Interaction> =
                history.into_iter().map(|(row, weight)| Interaction { row, weight: f32::from(weight) }).collect();
            let mut signals = Signals::default();
            // A first request that must leave no trace.
            signals.gather(&packed, &[Interaction { row: 0, weight: 1.0 }], 10);
            signals.gather(&packed, &history, 10);
            let mut want = Vec::new();
            for row in 0..10u32 {
                let mut found: Vec<(f32, f32)> = history
                    .iter()
                    .filter(|h| h.weight > 0.0)
                    .filter_map(|h| rows[h.row as usize].iter().find(|n| n.0 == row).map(|n| (h.weight, n.1)))
                    .collect();
                let sum: f32 = found.iter().map(|(w, s)| w * s).sum();
                found.sort_by(|a, b| b.1.total_cmp(&a.1));
                let top = |at: usize| found.get(at).map_or(0.0, |f| f.1);
                let signal = signals.of(row);
                prop_assert_eq!(signal.count as usize, found.len());
                prop_assert_eq!(signal.largest, [top(0), top(1), top(2)]);
                prop_assert!((signal.sum - sum).abs() < 1e-4);
                if sum > 0.0 && row != 3 {
                    want.push(Scored { row, score: signal.sum });
                }
            }
            want.sort_by(best_first);
            want.truncate(k);
            let mut got = Vec::new();
            signals.retrieve(k, &|row| row != 3, &mut got);
            prop_assert_eq!(got, want);
        }

        #[test]
        fn the_best_of_thousands(
            scores in prop::collection::vec(1u16..500, 3000), k in 1usize..400, forbidden in prop_oneof![Just(0u32), 1u32..3000],
        ) {
            let list: Vec<(u32, f32)> = scores.iter().zip(0..).map(|(&s, row)| (row, f32::from(s) / 512.0)).collect();
            let lists = crate::catalog::cooccurrence::from_rows(std::slice::from_ref(&list));
            let mut signals = Signals::default();
            signals.gather(&lists, &[Interaction { row: 0, weight: 1.0 }], 3000);
            let allowed = |row: u32| row >= forbidden;
            let mut want: Vec<Scored> =
                list.iter().filter(|l| allowed(l.0)).map(|&(row, score)| Scored { row, score }).collect();
            want.sort_by(best_first);
            want.truncate(k);
            let mut got = Vec::new();
            signals.retrieve(k, &allowed, &mut got);
            prop_assert_eq!(got, want);
        }
    }
}
