//! From ranked items to a slate: seen filter, diversity, business rules. Works on slates, not on single items.

pub mod caps;
pub mod diversity;
pub mod rules;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use crate::api::SlateItem;
use crate::candidates::{Scored, SourceSet};
use crate::catalog::generation::Generation;
use crate::catalog::live::LiveItems;
use crate::device::{Context, RankedItem};
use caps::Counts;
use diversity::{Diversity, DiversityScratch};
use rules::{Allowed, Entry, Matches, Rules, RulesScratch};
pub use rules::{HardFilter, RuleConfig, RuleError};

/// `[rerank]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RerankConfig {
    /// Weight of the ranker's score against dissimilarity in maximal marginal relevance; 0 to 1, 1 turns it off.
    /// Default 0.95.
    pub mmr_lambda: f32,
    /// At most this many items of one category in a slate; 0: no cap. Default 0.
    pub max_per_category: u32,
    /// Business rules, applied in this order.
    pub rules: Vec<RuleConfig>,
}

impl Default for RerankConfig {
    fn default() -> Self {
        RerankConfig { mmr_lambda: 0.95, max_per_category: 0, rules: Vec::new() }
    }
}

impl RerankConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// The key, its value and its range.
    pub fn validate(&self) -> Result<(), String> {
        match self.mmr_lambda {
            lambda if (0.0..=1.0).contains(&lambda) => Ok(()),
            lambda => Err(format!("rerank.mmr_lambda is {lambda}, expected 0 to 1")),
        }
    }
}

/// Diversity and rules, compiled against one generation.
#[derive(Debug)]
pub struct Reranker {
    diversity: Diversity,
    rules: Rules,
}

/// What is to be re-ranked.
#[derive(Clone, Copy, Debug)]
pub struct RerankInput<'a> {
    /// The generation that the reranker was compiled against.
    pub generation: &'a Generation,
    /// Decides which rules are active.
    pub context: &'a Context,
    /// Ascending rows that must not be shown.
    pub seen: &'a [u32],
    /// Items as they stood when the call was planned, where any changed.
    pub planned: Option<&'a Arc<LiveItems>>,
    /// The same as they stand now: what went meanwhile is left out.
    pub live: Option<&'a Arc<LiveItems>>,
    /// Best first, unique rows.
    pub items: &'a [RankedItem],
    /// What may fill the slate up when `items` do not, best first.
    pub unproposed: &'a [Scored],
    /// Slate length wanted.
    pub n_items: usize,
    /// Name the rules that acted on each item.
    pub explain: bool,
}

/// Buffers, reused from request to request.
#[derive(Debug, Default)]
pub struct RerankScratch {
    fresh: Vec<RankedItem>,
    diverse: Vec<RankedItem>,
    diversity: DiversityScratch,
    rules: RulesScratch,
    counts: Vec<Counts>,
}

impl Reranker {
    /// Compiles the configuration.
    ///
    /// # Errors
    /// A rule that names an unknown column, value or item, or that contradicts a column's type.
    pub fn compile(config: &RerankConfig, generation: &Generation) -> Result<Self, RuleError> {
        Ok(Reranker {
            diversity: Diversity::new(config.mmr_lambda, config.max_per_category, generation),
            rules: Rules::compile(&config.rules, generation)?,
        })
    }

    /// The exclude and require rules that are active in `context`, and what is gone of `items`, for retrieval and backfill.
    pub fn hard_filter(&self, context: &Context, items: Option<&Arc<LiveItems>>) -> HardFilter {
        self.rules.hard_filter(context, items)
    }

    /// Fills `out` with at most `n_items` items in order: those not seen and not forbidden, diversified to `2 * n_items`,
    /// after rules; then whatever else caps allow, until the slate is full. Items are pinned when the rest stands.
    pub fn rerank(&self, input: RerankInput<'_>, scratch: &mut RerankScratch, out: &mut Vec<SlateItem>) {
        let RerankScratch { fresh, diverse, diversity, rules, counts } = scratch;
        let hard =
            Allowed { hard: self.hard_filter(input.context, input.planned), live: input.live.map(|live| &**live) };
        let allowed = |row| input.seen.binary_search(&row).is_err() && hard.allows(row);
        fresh.clear();
        fresh.extend(input.items.iter().filter(|item| allowed(item.row)));
        diverse.clear();
        self.diversity.pick(
            input.generation,
            input.planned.map(|items| &**items),
            fresh,
            2 * input.n_items,
            diversity,
            diverse,
        );
        self.rules.arrange(&input, diverse, rules);
        if rules.list.len() < input.n_items {
            let unproposed = input.unproposed.iter().filter(|s| allowed(s.row));
            let unproposed =
                unproposed.map(|s| RankedItem { row: s.row, score: s.score, sources: SourceSet::default() });
            self.fill(&input, fresh.iter().copied().chain(unproposed), counts, &mut rules.list);
        }
        self.rules.finish(&input, &hard, rules, out);
    }

    /// Fills the list up, as far as caps allow.
    fn fill(
        &self,
        input: &RerankInput<'_>,
        from: impl Iterator<Item = RankedItem>,
        counts: &mut Vec<Counts>,
        list: &mut Vec<Entry>,
    ) {
        let items = input.planned.map(|items| &**items);
        let by_category = self.diversity.cap(input.generation, items).map(|cap| (cap, None));
        let by_rule = self.rules.caps(input.context, input.generation, items).map(|(cap, of)| (cap, Some(of)));
        let caps: SmallVec<[_; 4]> = by_category.into_iter().chain(by_rule).collect();
        let counted = |of: Option<&Matches>, row| of.is_none_or(|of| of.has(row, items));
        counts.clear();
        counts.resize_with(caps.len(), Counts::new);
        let count = |row: u32, counts: &mut [Counts]| {
            for ((cap, of), counts) in caps.iter().zip(counts) {
                if counted(*of, row) {
                    cap.count(row, counts);
                }
            }
        };
        list.iter().for_each(|entry| count(entry.item.row, counts));
        for item in from {
            if list.len() >= input.n_items {
                break;
            }
            let row = item.row;
            let admitted =
                caps.iter().zip(&*counts).all(|((cap, of), counts)| !counted(*of, row) || cap.admits(row, counts));
            if admitted && list.iter().all(|entry| entry.item.row != row) {
                count(row, counts);
                list.push(Entry::backfill(item));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::generation::testing;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn slates_are_as_full_as_caps_allow(
            categories in prop::collection::vec(0u32..4, 4..40), n_ranked in 0usize..40, n in 1usize..20,
            by_category in 0u32..3, by_rule in 1u32..4, seen in prop::collection::btree_set(0u32..40, 0..6),
        ) {
            let mut generation = testing::plain(categories.len());
            testing::add_category(&mut generation, "category", &categories);
            let rule = RuleConfig {
                name: "cap".into(),
                attribute: Some("category".into()),
                max: Some(by_rule),
                ..toml::from_str("action = 'cap'").unwrap()
            };
            let config = RerankConfig { mmr_lambda: 1.0, max_per_category: by_category, rules: vec![rule] };
            let reranker = Reranker::compile(&config, &generation).unwrap();
            let rows = 0..categories.len() as u32;
            let n_ranked = n_ranked.min(categories.len());
            let item = |row: u32| RankedItem { row, score: -(row as f32), sources: SourceSet(1) };
            let items: Vec<RankedItem> = rows.clone().take(n_ranked).map(item).collect();
            let unproposed: Vec<Scored> = rows.clone().skip(n_ranked).map(|row| Scored { row, score: 0.0 }).collect();
            let seen: Vec<u32> = seen.into_iter().collect();
            let input = RerankInput {
                generation: &generation,
                context: &Context::default(),
                seen: &seen,
                live: None,
                planned: None,
                items: &items,
                unproposed: &unproposed,
                n_items: n,
                explain: false,
            };
            let mut out = Vec::new();
            reranker.rerank(input, &mut RerankScratch::default(), &mut out);
            let cap = if by_category == 0 { by_rule } else { by_category.min(by_rule) };
            let mut possible = 0;
            for category in 0..4 {
                let of = |row: &u32| categories[*row as usize] == category;
                let shown = out.iter().filter(|i| of(&i.row)).count();
                let there = rows.clone().filter(|row| of(row) && !seen.contains(row)).count();
                prop_assert!(shown <= cap as usize);
                possible += there.min(cap as usize);
            }
            prop_assert_eq!(out.len(), n.min(possible));
            let unique: std::collections::HashSet<u32> = out.iter().map(|i| i.row).collect();
            prop_assert_eq!(unique.len(), out.len());
            prop_assert!(out.iter().all(|i| !seen.contains(&i.row)));
        }
    }
}
