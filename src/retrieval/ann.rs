//! Nearest items to the user's embedding.

use crate::candidates::Scored;
use crate::index::{Filter, SearchParams, SearchScratch, VectorIndex};

/// Appends the `k` nearest allowed items, best first; nothing for a user without a vector.
pub fn retrieve(
    index: Option<&dyn VectorIndex>,
    user: &[f32],
    k: usize,
    filter: Filter<'_>,
    scratch: &mut SearchScratch,
    out: &mut Vec<Scored>,
) {
    if let Some(index) = index
        && !user.is_empty()
    {
        index.search(user, k, filter, &SearchParams::default(), scratch, out);
    }
}
