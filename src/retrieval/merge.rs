//! One candidate per item, with every source that proposed it.

use crate::candidates::{Candidates, Scored, Source, SourceSet};

/// Sets of rows and their places, reused from request to request.
#[derive(Debug, Default)]
pub struct MergeScratch {
    /// A bit per item row: whether it is a candidate. What orders candidates; sorting them would cost several times as much.
    bits: Vec<u64>,
    /// A bit per word of `bits`: whether any of its bits is set.
    words: Vec<u64>,
    /// Per item row that is a candidate, its place; a leftover elsewhere.
    places: Vec<u32>,
}

/// Empties `words` and hands over the places of the bits that were set, ascending.
#[inline(always)]
fn drain(words: &mut [u64], mut each: impl FnMut(usize)) {
    for (at, word) in words.iter_mut().enumerate() {
        let mut left = std::mem::take(word);
        while left != 0 {
            each(at * 64 + left.trailing_zeros() as usize);
            left &= left - 1;
        }
    }
}

/// Replaces `out` by the union of `lists` (`[source]`, each best first with unique rows), rows ascending.
pub fn merge(lists: &[Vec<Scored>; Source::COUNT], n_items: usize, scratch: &mut MergeScratch, out: &mut Candidates) {
    out.clear();
    let MergeScratch { bits, words, places } = scratch;
    if places.len() < n_items {
        places.resize(n_items, 0);
        bits.resize(n_items.div_ceil(64), 0);
        words.resize(bits.len().div_ceil(64), 0);
    }
    for scored in lists.iter().flatten() {
        let row = scored.row as usize;
        bits[row / 64] |= 1 << (row % 64);
        words[row / 4096] |= 1 << (row / 64 % 64);
    }
    drain(words, |word| {
        drain(&mut bits[word..=word], |bit| {
            let row = word * 64 + bit;
            places[row] = out.rows.len() as u32;
            out.rows.push(row as u32);
        });
    });
    let n = out.rows.len();
    out.sources.resize(n, SourceSet::default());
    for source in Source::ALL {
        let (scores, ranks) = (&mut out.source_scores[source as usize], &mut out.source_ranks[source as usize]);
        scores.resize(n, 0.0);
        ranks.resize(n, 0);
        for (rank, scored) in lists[source as usize].iter().enumerate() {
            let at = places[scored.row as usize] as usize;
            out.sources[at].insert(source);
            scores[at] = scored.score;
            ranks[at] = u16::try_from(rank + 1).unwrap_or(u16::MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// Some often, others far apart.
    fn rows() -> impl Strategy<Value = u32> {
        prop_oneof![0u32..30, 4_000u32..4_200, 0u32..9_000]
    }

    proptest! {
        #[test]
        fn equals_a_map(lists in prop::array::uniform4(prop::collection::btree_map(rows(), -50i8..50, 0..20))) {
            let lists: [Vec<Scored>; 4] = lists.map(|list| {
                let mut list: Vec<Scored> =
                    list.into_iter().map(|(row, score)| Scored { row, score: f32::from(score) }).collect();
                list.sort_by(crate::candidates::best_first);
                list
            });
            let mut want: BTreeMap<u32, [Option<(f32, u16)>; 4]> = BTreeMap::new();
            for (source, list) in lists.iter().enumerate() {
                for (rank, s) in list.iter().enumerate() {
                    want.entry(s.row).or_default()[source] = Some((s.score, rank as u16 + 1));
                }
            }
            let (mut scratch, mut got) = (MergeScratch::default(), Candidates::default());
            // Twice, so that the second sees the scratch that the first left.
            merge(&lists, 9_000, &mut scratch, &mut got);
            merge(&lists, 9_000, &mut scratch, &mut got);
            prop_assert_eq!(&got.rows, &want.keys().copied().collect::<Vec<_>>());
            for (at, by_source) in want.values().enumerate() {
                for source in Source::ALL {
                    let entry = by_source[source as usize];
                    prop_assert_eq!(got.sources[at].contains(source), entry.is_some());
                    prop_assert_eq!(got.source_scores[source as usize][at], entry.map_or(0.0, |e| e.0));
                    prop_assert_eq!(got.source_ranks[source as usize][at], entry.map_or(0, |e| e.1));
                }
            }
        }
    }
}
