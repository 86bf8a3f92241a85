//! Items that came or changed, beside the tables and indexes of the bundle.

use std::borrow::Cow;

use super::Gathered;
use super::rankers::LoadedRanker;
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

/// What a ranker's table (the one in position `at`) would have of an item that came or changed, where it has a table. It is computed once
/// and kept with the item.
pub fn line<'a>(
    loaded: &mut LoadedRanker,
    at: usize,
    (generation, items): (&Generation, &'a LiveItems),
    row: u32,
    features: &mut FeatureScratch,
) -> Option<Cow<'a, [f32]>> {
    let (item, columns) = (items.get(row)?, loaded.items.as_ref()?);
    let dense = loaded.ranker.dense().filter(|dense| dense.has_table())?;
    let mut make = || {
        let mut own = Vec::new();
        columns.fill_item(generation, items, row, features, &mut own);
        dense.line(&own)
    };
    // Of another generation it has no place for this ranker's.
    Some(match item.lines.get(at) {
        Some(line) => Cow::Borrowed(&**line.get_or_init(make)),
        None => Cow::Owned(make().into_vec()),
    })
}

/// Scores those of the candidates again that came or changed, for a ranker whose table of items does not know them. `inputs` are the parts
/// that the ranker was given: the request's, the candidates'.
pub fn score_changed(
    loaded: &mut LoadedRanker,
    at: usize,
    gathered: &Gathered<'_>,
    features: &mut FeatureScratch,
    inputs: &[Vec<f32>],
    scores: &mut [f32],
) -> Result<(), RankError> {
    let Some(items) = gathered.job.items.as_deref().filter(|items| items.n_entries() > 0) else { return Ok(()) };
    if loaded.items.is_none() || !loaded.ranker.dense().is_some_and(|dense| dense.has_table()) {
        return Ok(());
    }
    let candidates = gathered.candidates;
    let rows = candidates.rows.iter().enumerate();
    let changed: Vec<usize> = rows.filter(|(_, row)| items.place(**row).is_some()).map(|(place, _)| place).collect();
    if changed.is_empty() {
        return Ok(());
    }
    let width = inputs[1].len() / candidates.len();
    let (mut lines, mut each) = (Vec::new(), Vec::new());
    for &place in &changed {
        lines.extend(line(loaded, at, (gathered.generation, items), candidates.rows[place], features));
        each.extend_from_slice(&inputs[1][place * width..(place + 1) * width]);
    }
    let lines: Vec<&[f32]> = lines.iter().map(|line| &**line).collect();
    let mut again = Vec::new();
    let Some(dense) = loaded.ranker.dense() else { return Ok(()) };
    dense.score_lines(&inputs[0], &lines, &each, &mut again)?;
    changed.iter().zip(again).for_each(|(place, score)| scores[*place] = score);
    Ok(())
}
