//! The last touches to a slate: fill it up, explain it.

use crate::api::{Explanation, SlateItem};
use crate::candidates::SourceSet;
use crate::device::Ranked;

/// Appends items that are not there yet until the slate has `n_items`: ranked ones that re-ranking left out, then the
/// device's backfill. Only what diversity and caps took away comes back; forbidden and seen items are in neither list.
pub fn backfill(ranked: &Ranked, n_items: usize, explain: bool, items: &mut Vec<SlateItem>) {
    let ranked_rest = ranked.items.iter().map(|i| (i.row, i.score, i.sources));
    let unproposed = ranked.backfill.iter().map(|s| (s.row, s.score, SourceSet::default()));
    for (row, score, sources) in ranked_rest.chain(unproposed) {
        if items.len() >= n_items {
            break;
        }
        if items.iter().all(|item| item.row != row) {
            let explanation = explain.then(|| Box::new(Explanation { backfill: true, ..Explanation::default() }));
            items.push(SlateItem { row, score, sources, explanation });
        }
    }
}

/// Completes the explanations with what sources and ranker said.
pub fn explain(ranked: &Ranked, items: &mut [SlateItem]) {
    for item in items {
        let Some(explanation) = &mut item.explanation else { continue };
        if let Some(at) = ranked.items.iter().position(|r| r.row == item.row) {
            explanation.ranker_rank = at as u32 + 1;
            explanation.ranker_score = ranked.items[at].score;
        }
        crate::pipeline::source_evidence(&ranked.candidates, item.row, explanation);
    }
}
