//! Items that came or changed, beside the tables and indexes of the bundle.

use std::borrow::Cow;

use super::Gathered;
use super::rankers::LoadedRanker;
use crate::candidates::Candidates;
use crate::catalog::conditions::Test;
use crate::catalog::generation::Generation;
use crate::catalog::live::LiveItems;
use crate::features::assemble::FeatureScratch;
use crate::index::{Overlay, VectorIndex};
use crate::ranking::RankError;

/// The bundle's index with the newest vectors over it, where there are some or items are gone.
pub fn overlay<'a>(
    index: Option<&'a dyn VectorIndex>,
    generation: &Generation,
    items: Option<&'a LiveItems>,
) -> Option<Overlay<'a>> {
    let items = items.filter(|items| items.n_gone() > 0 || items.vectors().is_some())?;
    Some(Overlay::new(index?, generation.items.len(), items))
}

/// What is to be searched.
pub fn index<'a>(index: Option<&'a dyn VectorIndex>, overlay: &'a Option<Overlay<'a>>) -> Option<&'a dyn VectorIndex> {
    overlay.as_ref().map_or(index, |overlay| Some(overlay))
}

/// The rows, with others of the bundle in the place of those that a table of the bundle does not have.
pub fn stand_ins<'a>(generation: &Generation, items: Option<&LiveItems>, rows: &'a [u32]) -> Cow<'a, [u32]> {
    let n = generation.items.len() as u32;
    match items {
        // Rows ascend.
        Some(_) if rows.last().is_some_and(|row| *row >= n) => {
            rows.iter().map(|&row| if row < n { row } else { 0 }).collect()
        }
        _ => Cow::Borrowed(rows),
    }
}

/// The set of rows that pass all of `tests`, of which `bits` are right for the bundle; `words` is where it may be put.
pub fn with_changed<'a>(
    bits: &'a [u64],
    tests: &[(u32, Test)],
    items: Option<&LiveItems>,
    words: &'a mut Vec<u64>,
) -> &'a [u64] {
    let Some(items) = items.filter(|items| items.n_entries() > 0) else { return bits };
    words.clear();
    words.extend_from_slice(bits);
    words.resize((items.n_rows() as usize).div_ceil(64), 0);
    for (row, item) in items.entries() {
        let (word, bit) = (&mut words[row as usize / 64], 1 << (row % 64));
        if item.passes(tests) { *word |= bit } else { *word &= !bit }
    }
    words
}

/// Scores those of the candidates again that came or changed, for a ranker whose table of items does not know them: by the whole
/// model, which is the same up to rounding.
pub fn score_changed(
    loaded: &mut LoadedRanker,
    gathered: &Gathered<'_>,
    features: &mut FeatureScratch,
    inputs: &mut Vec<Vec<f32>>,
    scores: &mut [f32],
) -> Result<(), RankError> {
    let Some(items) = gathered.job.items.as_deref().filter(|items| items.n_entries() > 0) else { return Ok(()) };
    if loaded.parts.is_none() {
        return Ok(());
    }
    let all = gathered.candidates;
    let places: Vec<usize> = (0..all.len()).filter(|&at| items.get(all.rows[at]).is_some()).collect();
    if places.is_empty() {
        return Ok(());
    }
    let changed = Candidates {
        rows: places.iter().map(|&at| all.rows[at]).collect(),
        sources: places.iter().map(|&at| all.sources[at]).collect(),
        source_scores: std::array::from_fn(|source| places.iter().map(|&at| all.source_scores[source][at]).collect()),
        source_ranks: std::array::from_fn(|source| places.iter().map(|&at| all.source_ranks[source][at]).collect()),
    };
    let gathered = Gathered { candidates: &changed, ..*gathered };
    inputs.resize_with(inputs.len().max(loaded.layouts.len()), Vec::new);
    let inputs = &mut inputs[..loaded.layouts.len()];
    for (layout, out) in loaded.layouts.iter().zip(&mut *inputs) {
        gathered.fill(layout, changed.len(), features, out);
    }
    let mut again = Vec::new();
    loaded.ranker.score(inputs, changed.len(), &mut again)?;
    places.into_iter().zip(again).for_each(|(at, score)| scores[at] = score);
    Ok(())
}
