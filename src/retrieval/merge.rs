//! One candidate per item, with every source that proposed it.

use crate::candidates::{Candidates, Scored, Source, SourceSet};

/// Dense places of rows, reused from request to request.
#[derive(Debug, Default)]
pub struct MergeScratch {
    /// Per item row, its place in the candidates plus one; 0 where it has none.
    places: Vec<u32>,
}

/// Replaces `out` by the union of `lists` (`[source]`, each best first with unique rows), rows ascending.
pub fn merge(lists: &[Vec<Scored>; Source::COUNT], n_items: usize, scratch: &mut MergeScratch, out: &mut Candidates) {
    out.clear();
    let places = &mut scratch.places;
    if places.len() < n_items {
        places.resize(n_items, 0);
    }
    for scored in lists.iter().flatten() {
        let place = &mut places[scored.row as usize];
        if *place == 0 {
            *place = 1;
            out.rows.push(scored.row);
        }
    }
    out.rows.sort_unstable();
    for (at, &row) in out.rows.iter().enumerate() {
        places[row as usize] = at as u32 + 1;
    }
    let n = out.rows.len();
    out.sources.resize(n, SourceSet::default());
    for source in Source::ALL {
        let (scores, ranks) = (&mut out.source_scores[source as usize], &mut out.source_ranks[source as usize]);
        scores.resize(n, 0.0);
        ranks.resize(n, 0);
        for (rank, scored) in lists[source as usize].iter().enumerate() {
            let at = places[scored.row as usize] as usize - 1;
            out.sources[at].insert(source);
            scores[at] = scored.score;
            ranks[at] = u16::try_from(rank + 1).unwrap_or(u16::MAX);
        }
    }
    for &row in &out.rows {
        places[row as usize] = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn equals_a_map(lists in prop::array::uniform4(prop::collection::btree_map(0u32..30, -50i8..50, 0..20))) {
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
            merge(&lists, 30, &mut scratch, &mut got);
            merge(&lists, 30, &mut scratch, &mut got);
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
