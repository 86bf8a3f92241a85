//! A slate as bytes, for caches outside of the process.
//!
//! Magic with a format number, xxh3 of what follows, then: flags, merged candidates, number of items; per item row, score, sources. Rows are
//! the bundle's: the key that a value lies under names the bundle. What does not check out is no value.

use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

use crate::api::{Slate, SlateItem};
use crate::candidates::SourceSet;
use crate::catalog::generation::Generation;
use crate::context::StageTimings;

/// The last byte is the format.
const MAGIC: [u8; 4] = *b"TSL\x01";
const HEAD: usize = 4 + 8 + 1 + 4 + 4;
const ITEM: usize = 4 + 4 + 1;

/// Encodes a slate without degradations and explanations.
pub fn encode(slate: &Slate) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEAD + slate.items.len() * ITEM);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&[0; 8]);
    out.push(u8::from(slate.known_user));
    out.extend_from_slice(&slate.n_candidates.to_le_bytes());
    out.extend_from_slice(&(slate.items.len() as u32).to_le_bytes());
    for item in &slate.items {
        out.extend_from_slice(&item.row.to_le_bytes());
        out.extend_from_slice(&item.score.to_le_bytes());
        out.push(item.sources.0);
    }
    let sum = xxh3_64(&out[12..]);
    out[4..12].copy_from_slice(&sum.to_le_bytes());
    out
}

/// The slate of `generation` that the bytes are; `None` for anything else, also for another format.
pub fn decode(bytes: &[u8], generation: &Arc<Generation>) -> Option<Slate> {
    let (magic, rest) = bytes.split_first_chunk::<4>()?;
    let (sum, rest) = rest.split_first_chunk::<8>()?;
    if *magic != MAGIC || u64::from_le_bytes(*sum) != xxh3_64(rest) {
        return None;
    }
    let (&[known], rest) = rest.split_first_chunk::<1>()?;
    let (n_candidates, rest) = rest.split_first_chunk::<4>()?;
    let (n_items, rest) = rest.split_first_chunk::<4>()?;
    let (items, []) = rest.as_chunks::<ITEM>() else { return None };
    if items.len() != u32::from_le_bytes(*n_items) as usize {
        return None;
    }
    let four = |item: &[u8; ITEM], at: usize| [item[at], item[at + 1], item[at + 2], item[at + 3]];
    let items: Vec<SlateItem> = items
        .iter()
        .map(|item| SlateItem {
            row: u32::from_le_bytes(four(item, 0)),
            score: f32::from_le_bytes(four(item, 4)),
            sources: SourceSet(item[8]),
            explanation: None,
        })
        .collect();
    if items.iter().any(|item| item.row as usize >= generation.items.len()) {
        return None;
    }
    Some(Slate {
        generation: generation.clone(),
        items,
        degraded: Vec::new(),
        timings: StageTimings::default(),
        coverage: 1.0,
        known_user: known != 0,
        n_candidates: u32::from_le_bytes(*n_candidates),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::generation::testing;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_goes_in_comes_out_and_damage_does_not(
            items in prop::collection::vec((0u32..9, -9f32..9.0, 0u8..16), 0..20), known in any::<bool>(),
            n_candidates in any::<u32>(), at in any::<prop::sample::Index>(), bit in 0u8..8,
        ) {
            let generation = Arc::new(testing::plain(9));
            let item = |&(row, score, sources): &(u32, f32, u8)| SlateItem {
                row, score, sources: SourceSet(sources), explanation: None,
            };
            let slate = Slate {
                generation: generation.clone(), items: items.iter().map(item).collect(), degraded: Vec::new(),
                timings: StageTimings::default(), coverage: 1.0, known_user: known, n_candidates,
            };
            let mut bytes = encode(&slate);
            let back = decode(&bytes, &generation).unwrap();
            prop_assert_eq!((back.known_user, back.n_candidates), (known, n_candidates));
            let parts = |slate: &Slate| slate.items.iter().map(|i| (i.row, i.score, i.sources.0)).collect::<Vec<_>>();
            prop_assert_eq!(parts(&back), items);
            // A smaller catalogue does not have the rows.
            if slate.items.iter().any(|item| item.row == 8) {
                prop_assert!(decode(&bytes, &Arc::new(testing::plain(8))).is_none());
            }
            prop_assert!(decode(&bytes[..at.index(bytes.len())], &generation).is_none());
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(decode(&bytes, &generation).is_none());
        }
    }
}
