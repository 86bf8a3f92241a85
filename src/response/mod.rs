//! The last touches to a slate.

use crate::api::SlateItem;
use crate::device::Ranked;

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
