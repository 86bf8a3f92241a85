//! Candidate sources and their merge.

pub mod ann;
pub mod collaborative;
pub mod merge;
pub mod trending;

/// Rows marked for one request: a bit each, so that asking about many rows stays in the nearest cache.
#[derive(Debug, Default)]
pub struct Marks {
    words: Vec<u64>,
    /// What is marked, to be forgotten.
    marked: Vec<u32>,
}

impl Marks {
    /// Forgets all marks; makes room for rows below `n`.
    pub fn begin(&mut self, n: usize) {
        for row in self.marked.drain(..) {
            self.words[row as usize / 64] = 0;
        }
        if self.words.len() * 64 < n {
            self.words.resize(n.div_ceil(64), 0);
        }
    }

    /// Marks a row; says whether it was unmarked. Rows out of range count as marked.
    pub fn insert(&mut self, row: u32) -> bool {
        let fresh = !self.contains(row);
        if fresh {
            self.words[row as usize / 64] |= 1 << (row % 64);
            self.marked.push(row);
        }
        fresh
    }

    /// Whether a row is marked.
    #[inline]
    pub fn contains(&self, row: u32) -> bool {
        self.words.get(row as usize / 64).is_none_or(|word| word >> (row % 64) & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn marks_are_a_set(requests in prop::collection::vec(prop::collection::vec(0u32..200, 0..40), 1..4)) {
            let mut marks = Marks::default();
            for rows in &requests {
                marks.begin(200);
                let mut set = BTreeSet::new();
                for &row in rows {
                    prop_assert_eq!(marks.insert(row), set.insert(row));
                }
                prop_assert!((0..200).all(|row| marks.contains(row) == set.contains(&row)));
            }
            prop_assert!(marks.contains(100_000) && !marks.insert(100_000));
        }
    }
}
