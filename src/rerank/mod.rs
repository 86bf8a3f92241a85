//! From ranked items to a slate: seen filter, diversity, business rules. Works on slates, not on single items.

pub mod diversity;
pub mod rules;

use serde::{Deserialize, Serialize};

use crate::api::SlateItem;
use crate::catalog::generation::Generation;
use crate::device::{Context, RankedItem};
use diversity::{Diversity, DiversityScratch};
pub use rules::{HardFilter, RuleConfig, RuleError};
use rules::{Rules, RulesScratch};

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
    /// Best first, unique rows.
    pub items: &'a [RankedItem],
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

    /// The exclude and require rules that are active in `context`, for retrieval and backfill.
    pub fn hard_filter(&self, context: &Context) -> HardFilter {
        self.rules.hard_filter(context)
    }

    /// Fills `out` with at most `n_items` items in order: those not seen, diversified to `2 * n_items`, after rules.
    pub fn rerank(&self, input: RerankInput<'_>, scratch: &mut RerankScratch, out: &mut Vec<SlateItem>) {
        let RerankScratch { fresh, diverse, diversity, rules } = scratch;
        fresh.clear();
        fresh.extend(input.items.iter().filter(|item| input.seen.binary_search(&item.row).is_err()));
        diverse.clear();
        self.diversity.pick(input.generation, fresh, 2 * input.n_items, diversity, diverse);
        self.rules.apply(&input, diverse, rules, out);
    }
}
