//! What flows between the stages: rows of items with the sources that proposed them.

/// Where a candidate came from. The discriminant is its bit in a [`SourceSet`] and its index in per-source arrays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Source {
    /// Nearest items to the user's embedding.
    Ann = 0,
    /// Neighbours of the items in the user's history.
    Collaborative = 1,
    /// Popular now, overall or in a category of the context.
    Trending = 2,
    /// Text search for the request's query.
    Search = 3,
}

impl Source {
    /// Number of sources.
    pub const COUNT: usize = 4;
    /// All sources in the order of their discriminants.
    pub const ALL: [Source; Self::COUNT] = [Source::Ann, Source::Collaborative, Source::Trending, Source::Search];

    /// The name used on the wire, in metrics and in feature columns.
    pub fn name(self) -> &'static str {
        match self {
            Source::Ann => "ann",
            Source::Collaborative => "collaborative",
            Source::Trending => "trending",
            Source::Search => "search",
        }
    }
}

/// What a feature column depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dependence {
    /// The same for all candidates of a request: user, context.
    Request,
    /// The same in every request: what is known of the item.
    Item,
    /// Both: what sources say of the candidate, or of the history and the item together.
    Candidate,
}

impl Dependence {
    /// All, in the order of their numbers.
    pub const ALL: [Dependence; 3] = [Dependence::Request, Dependence::Item, Dependence::Candidate];
}

/// A set of [`Source`]s, one bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SourceSet(pub u8);

impl SourceSet {
    /// The set with one member.
    pub fn only(source: Source) -> Self {
        SourceSet(1 << source as u8)
    }

    /// Adds a member.
    pub fn insert(&mut self, source: Source) {
        self.0 |= 1 << source as u8;
    }

    /// Whether `source` is a member.
    pub fn contains(self, source: Source) -> bool {
        self.0 & (1 << source as u8) != 0
    }

    /// Members in the order of [`Source::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Source> {
        Source::ALL.into_iter().filter(move |&s| self.contains(s))
    }
}

/// A scored item row, as one retriever or ranker returns it. Higher is better.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// Row of the item in the generation's catalogue.
    pub row: u32,
    /// Comparable only with scores of the same list.
    pub score: f32,
}

/// Best first: higher score, then lower row; NaN last.
pub fn best_first(a: &Scored, b: &Scored) -> std::cmp::Ordering {
    match (a.score.is_nan(), b.score.is_nan()) {
        (false, false) => b.score.total_cmp(&a.score).then(a.row.cmp(&b.row)),
        (an, bn) => an.cmp(&bn).then(a.row.cmp(&b.row)),
    }
}

/// Merged candidates of one request, column by column; every vector has the same length.
///
/// Owned by a job and reused from request to request, so that steady state allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct Candidates {
    /// Item rows, unique, ascending.
    pub rows: Vec<u32>,
    /// Every source that proposed the row.
    pub sources: Vec<SourceSet>,
    /// `[source][candidate]`: the source's own score, 0 where it did not propose the row.
    pub source_scores: [Vec<f32>; Source::COUNT],
    /// `[source][candidate]`: 1 for the source's best; 0 where it did not propose the row.
    pub source_ranks: [Vec<u16>; Source::COUNT],
}

impl Candidates {
    /// Number of candidates.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Empties every column and keeps its memory.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.sources.clear();
        self.source_scores.iter_mut().for_each(Vec::clear);
        self.source_ranks.iter_mut().for_each(Vec::clear);
    }
}

/// A [`Scored`] packed so that integers compare as [`best_first`] does: selecting and sorting cost a fraction of what a
/// comparison of floats costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Packed(pub(crate) u64);

impl From<Scored> for Packed {
    #[inline]
    fn from(s: Scored) -> Self {
        // Floats as ordered integers: negative ones have all bits flipped, others the sign; then complemented, so that
        // higher scores are smaller. NaN is largest of all; -0 counts as 0.
        let bits = (s.score + 0.0).to_bits();
        let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
        let key = if s.score.is_nan() { u32::MAX } else { !ordered };
        Packed(u64::from(key) << 32 | u64::from(s.row))
    }
}

impl From<Packed> for Scored {
    #[inline]
    fn from(p: Packed) -> Self {
        let key = (p.0 >> 32) as u32;
        let ordered = !key;
        let bits = if ordered >> 31 == 1 { ordered & !(1 << 31) } else { !ordered };
        Scored { row: p.0 as u32, score: if key == u32::MAX { f32::NAN } else { f32::from_bits(bits) } }
    }
}

/// Keeps the `k` best of `list`, best first.
pub fn keep_best(list: &mut Vec<Packed>, k: usize) {
    if list.len() > k {
        if k > 0 {
            list.select_nth_unstable(k - 1);
        }
        list.truncate(k);
    }
    list.sort_unstable();
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn packed_order_is_best_first(
            list in prop::collection::vec((any::<f32>(), 0u32..50), 0..50), k in 0usize..60,
        ) {
            let list: Vec<Scored> = list.into_iter().map(|(score, row)| Scored { row, score: score + 0.0 }).collect();
            let mut want = list.clone();
            want.sort_by(best_first);
            want.truncate(k);
            let mut packed: Vec<Packed> = list.into_iter().map(Packed::from).collect();
            keep_best(&mut packed, k);
            let got: Vec<Scored> = packed.into_iter().map(Scored::from).collect();
            prop_assert_eq!(got.len(), want.len());
            for (got, want) in got.iter().zip(&want) {
                prop_assert_eq!(got.row, want.row);
                prop_assert!(got.score == want.score || got.score.is_nan() && want.score.is_nan());
            }
        }
    }
}
