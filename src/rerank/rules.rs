//! Business rules: what may be shown, what is moved, decided by item attributes and request context.
//!
//! `exclude` and `require` forbid items altogether. The others act on the diversified list, phase by phase and within a
//! phase in the order of the configuration: boost, bury, cap, and, when the list has been filled up, pin. Conditions over
//! items are bitmaps computed once.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use super::RerankInput;
use super::caps::{Cap, Counts};
use crate::api::{Explanation, SlateItem};
use crate::candidates::SourceSet;
use crate::catalog::conditions::{self, Bitmap, Condition, Demand, OneOrMany, Test, UnknownValue};
use crate::catalog::generation::Generation;
use crate::catalog::live::LiveItems;
use crate::device::{Context, RankedItem};

/// One `[[rerank.rules]]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleConfig {
    /// For explanations and errors.
    #[serde(default)]
    pub name: String,
    /// What it does.
    pub action: Action,
    /// Context conditions, all must hold: a value, a list of values, or `"*"` for any value.
    #[serde(default)]
    pub when: BTreeMap<String, OneOrMany>,
    /// Item conditions, all must hold: a value, a list of values, or comparisons as in `{ ge = 4, lt = 5 }`.
    #[serde(default, rename = "where")]
    pub conditions: BTreeMap<String, Condition>,
    /// Boost: added to the score, as a share of the list's range of scores; may be negative.
    pub amount: Option<f32>,
    /// Pin: the items, in order.
    #[serde(default)]
    pub items: Vec<String>,
    /// Pin: rank of the first item, from 1.
    pub rank: Option<u32>,
    /// Cap: the column whose values are counted.
    pub attribute: Option<String>,
    /// Cap: items per value.
    pub max: Option<u32>,
}

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Items that match are never shown.
    Exclude,
    /// Only items that match are shown.
    Require,
    /// Changes the score by `amount` of the list's range.
    Boost,
    /// Moves to the end.
    Bury,
    /// Puts `items` at `rank` and following, also when nobody proposed them, unless seen or forbidden.
    Pin,
    /// At most `max` items per value of `attribute`.
    Cap,
}

/// Why a rule was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rerank.rules[{index}] `{name}`: {field}: {reason}")]
pub struct RuleError {
    /// From 0.
    pub index: usize,
    /// The rule's name.
    pub name: String,
    /// Where in the rule.
    pub field: String,
    /// What is wrong.
    pub reason: String,
}

/// The exclude and require rules that are active for one request, and what is gone.
#[derive(Clone, Debug, Default)]
pub struct HardFilter {
    active: SmallVec<[(Arc<Matches>, bool); 4]>,
    items: Option<Arc<LiveItems>>,
}

impl HardFilter {
    /// Whether the item may be shown.
    #[inline]
    pub fn allows(&self, row: u32) -> bool {
        self.is_empty() || self.permits(row)
    }

    /// Apart: most requests forbid nothing, and whoever asks about thousands of rows shall not save registers for it.
    #[inline(never)]
    fn permits(&self, row: u32) -> bool {
        let items = self.items.as_deref();
        items.is_none_or(|items| !items.is_gone(row))
            && self.active.iter().all(|(matches, wanted)| matches.has(row, items) == *wanted)
    }

    /// Whether it forbids nothing but what is gone of `items`, if that.
    pub fn forbids_only_gone(&self, items: Option<&Arc<LiveItems>>) -> bool {
        let own = self.items.as_ref();
        self.active.is_empty() && own.is_none_or(|own| items.is_some_and(|items| Arc::ptr_eq(own, items)))
    }

    /// Whether it forbids nothing.
    pub fn is_empty(&self) -> bool {
        self.active.is_empty() && self.items.is_none()
    }
}

/// The items that a rule is about.
#[derive(Debug)]
pub struct Matches {
    /// Of the bundle.
    rows: Bitmap,
    /// For those that came or changed.
    tests: Vec<(u32, Test)>,
}

impl Matches {
    /// Whether `row`, as `items` know it, is one.
    #[inline]
    pub fn has(&self, row: u32, items: Option<&LiveItems>) -> bool {
        match items.and_then(|items| items.get(row)) {
            Some(item) => item.passes(&self.tests),
            None => self.rows.has(row),
        }
    }
}

/// What a finished slate may show: what was allowed when it was planned and is not gone by now.
#[derive(Debug)]
pub(super) struct Allowed<'a> {
    pub(super) hard: HardFilter,
    pub(super) live: Option<&'a LiveItems>,
}

impl Allowed<'_> {
    pub(super) fn allows(&self, row: u32) -> bool {
        self.live.is_none_or(|live| !live.is_gone(row)) && self.hard.allows(row)
    }
}

#[derive(Debug)]
struct Rule {
    name: String,
    when: BTreeMap<String, OneOrMany>,
    matches: Arc<Matches>,
    effect: Effect,
}

#[derive(Debug)]
enum Effect {
    Exclude,
    Require,
    Boost(f32),
    Bury,
    Pin { rows: Vec<u32>, rank: usize },
    Cap { column: usize, max: u32 },
}

/// Compiled rules.
#[derive(Debug, Default)]
pub struct Rules {
    rules: Vec<Rule>,
}

/// Buffers, reused from request to request.
#[derive(Debug, Default)]
pub struct RulesScratch {
    /// The list as it grows.
    pub(super) list: Vec<Entry>,
    scores: Vec<f32>,
    counts: Counts,
}

/// An item on its way to the slate.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) item: RankedItem,
    /// Decides the order: the score of the place that diversity gave, plus boosts.
    key: f32,
    /// One bit per rule that acted, for the first 64 rules.
    acted: u64,
    backfill: bool,
}

impl Entry {
    fn new(item: RankedItem) -> Self {
        Entry { item, key: item.score, acted: 0, backfill: false }
    }

    /// An item that fills the list up.
    pub(super) fn backfill(item: RankedItem) -> Self {
        Entry { backfill: true, ..Entry::new(item) }
    }
}

fn mark(rule: usize) -> u64 {
    if rule < 64 { 1 << rule } else { 0 }
}

impl Rule {
    fn cap<'a>(&self, generation: &'a Generation, items: Option<&'a LiveItems>) -> Option<Cap<'a>> {
        let Effect::Cap { column: at, max } = self.effect else { return None };
        Some(Cap { column: &generation.items.columns[at].data, at, items, max, first_only: false })
    }
}

impl Rules {
    /// Compiles rules against a generation.
    ///
    /// # Errors
    /// The first rule that can't be meant as it stands.
    pub fn compile(configs: &[RuleConfig], generation: &Generation) -> Result<Self, RuleError> {
        let rules = configs.iter().enumerate().map(|(index, config)| compile(index, config, generation));
        Ok(Rules { rules: rules.collect::<Result<_, _>>()? })
    }

    fn active<'a>(&'a self, context: &'a Context) -> impl Iterator<Item = (usize, &'a Rule)> {
        let active = move |rule: &Rule| rule.when.iter().all(|(key, wanted)| holds(wanted, context.get(key)));
        self.rules.iter().enumerate().filter(move |(_, rule)| active(rule))
    }

    /// See [`super::Reranker::hard_filter`].
    pub fn hard_filter(&self, context: &Context, items: Option<&Arc<LiveItems>>) -> HardFilter {
        let hard = self.active(context).filter_map(|(_, rule)| match rule.effect {
            Effect::Exclude => Some((rule.matches.clone(), false)),
            Effect::Require => Some((rule.matches.clone(), true)),
            _ => None,
        });
        HardFilter { active: hard.collect(), items: items.cloned() }
    }

    /// The caps that are active in `context`, each with the items that it counts.
    pub fn caps<'a>(
        &'a self,
        context: &'a Context,
        generation: &'a Generation,
        items: Option<&'a LiveItems>,
    ) -> impl Iterator<Item = (Cap<'a>, &'a Matches)> {
        self.active(context).filter_map(move |(_, rule)| Some((rule.cap(generation, items)?, &*rule.matches)))
    }

    /// Lays the diversified list, of allowed items, into the scratch: boosted, buried, capped.
    pub fn arrange(&self, input: &RerankInput<'_>, diverse: &[RankedItem], scratch: &mut RulesScratch) {
        let RulesScratch { list, scores, counts } = scratch;
        let items = input.planned.map(|items| &**items);
        list.clear();
        list.extend(diverse.iter().copied().map(Entry::new));
        // A place keeps its worth when diversity gave it to another item.
        let boosts = || self.active(input.context).filter(|(_, r)| matches!(r.effect, Effect::Boost(_)));
        if boosts().next().is_some() && !list.is_empty() {
            scores.clear();
            scores.extend(list.iter().map(|e| if e.item.score.is_nan() { f32::NEG_INFINITY } else { e.item.score }));
            scores.sort_unstable_by(|a, b| b.total_cmp(a));
            let finite = || scores.iter().filter(|s| s.is_finite());
            let range = finite().copied().reduce(f32::max).zip(finite().copied().reduce(f32::min));
            let range = range.map_or(1.0, |(high, low)| if high > low { high - low } else { 1.0 });
            for (entry, &score) in list.iter_mut().zip(scores.iter()) {
                entry.key = score;
            }
            for (index, rule) in boosts() {
                let Effect::Boost(amount) = rule.effect else { continue };
                for entry in list.iter_mut().filter(|e| rule.matches.has(e.item.row, items)) {
                    entry.key += amount * range;
                    entry.item.score += amount * range;
                    entry.acted |= mark(index);
                }
            }
            list.sort_by(|a, b| b.key.total_cmp(&a.key));
        }
        for (index, rule) in self.active(input.context).filter(|(_, r)| matches!(r.effect, Effect::Bury)) {
            for entry in list.iter_mut().filter(|e| rule.matches.has(e.item.row, items)) {
                entry.acted |= mark(index);
            }
            list.sort_by_key(|e| rule.matches.has(e.item.row, items));
        }
        for (_, rule) in self.active(input.context) {
            let Some(cap) = rule.cap(input.generation, items) else { continue };
            counts.clear();
            list.retain(|entry| {
                let row = entry.item.row;
                let matches = rule.matches.has(row, items);
                let keep = !matches || cap.admits(row, counts);
                if keep && matches {
                    cap.count(row, counts);
                }
                keep
            });
        }
    }

    /// Pins items in the scratch's list and turns its best into at most `n_items` slate items.
    pub(super) fn finish(
        &self,
        input: &RerankInput<'_>,
        hard: &Allowed<'_>,
        RulesScratch { list, .. }: &mut RulesScratch,
        out: &mut Vec<SlateItem>,
    ) {
        for (index, rule) in self.active(input.context) {
            let Effect::Pin { rows, rank } = &rule.effect else { continue };
            let allowed = |row: &&u32| input.seen.binary_search(row).is_err() && hard.allows(**row);
            for (place, &row) in rows.iter().filter(allowed).enumerate() {
                let entry = match list.iter().position(|e| e.item.row == row) {
                    Some(at) => list.remove(at),
                    None => {
                        let known = input.items.iter().find(|i| i.row == row).copied();
                        Entry::new(known.unwrap_or(RankedItem { row, score: 0.0, sources: SourceSet::default() }))
                    }
                };
                let at = (rank - 1 + place).min(list.len());
                list.insert(at, Entry { acted: entry.acted | mark(index), ..entry });
            }
        }
        out.extend(list.iter().take(input.n_items).map(|entry| SlateItem {
            row: entry.item.row,
            score: entry.item.score,
            sources: entry.item.sources,
            explanation: input.explain.then(|| {
                let acted = self.rules.iter().enumerate().filter(|(index, _)| entry.acted & mark(*index) != 0);
                Box::new(Explanation {
                    rules: acted.map(|(_, r)| r.name.clone()).collect(),
                    backfill: entry.backfill,
                    ..Explanation::default()
                })
            }),
        }));
    }
}

fn holds(wanted: &OneOrMany, value: Option<&str>) -> bool {
    value.is_some_and(|value| wanted.values().iter().any(|v| v == "*" || v == value))
}

fn compile(index: usize, config: &RuleConfig, generation: &Generation) -> Result<Rule, RuleError> {
    let wrong =
        |field: &str, reason: String| RuleError { index, name: config.name.clone(), field: field.to_owned(), reason };
    let column =
        |field: &str, name: &str| conditions::column(&generation.items, name).map_err(|reason| wrong(field, reason));
    let n = generation.items.len();
    let (mut matches, mut tests) = (Bitmap::of(n, |_| true), Vec::new());
    for (name, condition) in &config.conditions {
        let field = format!("where.{name}");
        let at = column(&field, name)?;
        let data = &generation.items.columns[at].data;
        let values: Vec<&str>;
        let demand = match condition {
            Condition::Number(number) => Demand::Number(*number),
            Condition::Values(some) => {
                values = some.values().iter().map(String::as_str).collect();
                Demand::Values(&values)
            }
            Condition::Compare(compare) => Demand::Compare(*compare),
        };
        let test = Test::resolve(data, &demand, UnknownValue::Refuse).map_err(|reason| wrong(&field, reason))?;
        matches.intersect(&test.rows(data, n));
        tests.push((at as u32, test));
    }
    let matches = Arc::new(Matches { rows: matches, tests });
    let unused = |field: &str, given: bool, wanted: bool| match (given, wanted) {
        (true, false) => Err(wrong(field, format!("has no meaning with action {:?}", config.action))),
        (false, true) => Err(wrong(field, format!("is missing; action {:?} needs it", config.action))),
        _ => Ok(()),
    };
    use Action::{Boost, Cap, Exclude, Pin, Require};
    let conditional = config.action != Pin;
    if !conditional || matches!(config.action, Exclude | Require) {
        unused("where", !config.conditions.is_empty(), conditional)?;
    }
    unused("amount", config.amount.is_some(), config.action == Boost)?;
    unused("items", !config.items.is_empty(), config.action == Pin)?;
    unused("rank", config.rank.is_some(), config.action == Pin)?;
    unused("attribute", config.attribute.is_some(), config.action == Cap)?;
    unused("max", config.max.is_some(), config.action == Cap)?;
    let effect = match config.action {
        Action::Exclude => Effect::Exclude,
        Action::Require => Effect::Require,
        Action::Bury => Effect::Bury,
        Action::Boost => match config.amount {
            Some(amount) if amount.is_finite() => Effect::Boost(amount),
            other => return Err(wrong("amount", format!("is {other:?}, expected a finite number"))),
        },
        Action::Pin => {
            let rank = match config.rank {
                Some(rank) if rank > 0 => rank,
                _ => return Err(wrong("rank", "is 0; ranks count from 1".into())),
            };
            let row = |id: &String| {
                generation.items.ids.row(id).ok_or_else(|| wrong("items", format!("no item `{id}` in the catalogue")))
            };
            Effect::Pin { rows: config.items.iter().map(row).collect::<Result<_, _>>()?, rank: rank as usize }
        }
        Action::Cap => {
            let name = config.attribute.as_deref().unwrap_or_default();
            let at = column("attribute", name)?;
            if generation.items.columns[at].data.vocabulary().is_none() {
                return Err(wrong("attribute", format!("`{name}` is a number; a cap counts values of categories")));
            }
            match config.max {
                Some(max) if max > 0 => Effect::Cap { column: at, max },
                _ => return Err(wrong("max", "must be 1 or more; exclude forbids items altogether".into())),
            }
        }
    };
    Ok(Rule { name: config.name.clone(), when: config.when.clone(), matches, effect })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::generation::testing;
    use crate::rerank::{RerankConfig, RerankScratch, Reranker};
    use proptest::prelude::*;

    /// Six items: categories a b a b a b, years 2000 to 2005.
    fn generation() -> Generation {
        let mut generation = testing::plain(6);
        testing::add_category(&mut generation, "category", &[0, 1, 0, 1, 0, 1]);
        testing::add_number(&mut generation, "year", &[2000.0, 2001.0, 2002.0, 2003.0, 2004.0, f32::NAN]);
        generation
    }

    fn slate(rules: &str, context: &[(&str, &str)], seen: &[u32], n: usize) -> Vec<u32> {
        #[derive(Deserialize)]
        struct File {
            rules: Vec<RuleConfig>,
        }
        let generation = generation();
        let rules = toml::from_str::<File>(rules).unwrap().rules;
        let config = RerankConfig { mmr_lambda: 1.0, max_per_category: 0, rules };
        let reranker = Reranker::compile(&config, &generation).unwrap();
        let mut request = Context::default();
        request.assign(context);
        let items: Vec<RankedItem> = (0..6)
            .map(|row| RankedItem { row, score: 1.0 - row as f32 / 10.0, sources: SourceSet::default() })
            .collect();
        let input = RerankInput {
            generation: &generation,
            context: &request,
            seen,
            live: None,
            planned: None,
            items: &items,
            unproposed: &[],
            n_items: n,
            explain: false,
        };
        let mut out = Vec::new();
        reranker.rerank(input, &mut RerankScratch::default(), &mut out);
        out.iter().map(|i| i.row).collect()
    }

    fn refused(rule: &str) -> String {
        let config = RuleConfig { name: "r".into(), ..toml::from_str(rule).unwrap() };
        compile(0, &config, &generation()).unwrap_err().to_string()
    }

    #[test]
    fn no_rules_keep_the_order() {
        assert_eq!(slate("rules = []", &[], &[], 4), [0, 1, 2, 3]);
        assert_eq!(slate("rules = []", &[], &[0, 2], 4), [1, 3, 4, 5]);
    }

    #[test]
    fn exclude_and_require() {
        assert_eq!(slate("[[rules]]\naction='exclude'\nwhere={category='c0'}", &[], &[], 6), [1, 3, 5]);
        assert_eq!(slate("[[rules]]\naction='require'\nwhere={year={ge=2001, lt=2004}}", &[], &[], 6), [1, 2, 3]);
        assert_eq!(slate("[[rules]]\naction='require'\nwhere={year={missing=true}}", &[], &[], 6), [5]);
    }

    #[test]
    fn context_decides() {
        let rule = "[[rules]]\naction='exclude'\nwhen={mode=['kids','teens']}\nwhere={category='c1'}";
        assert_eq!(slate(rule, &[], &[], 3), [0, 1, 2]);
        assert_eq!(slate(rule, &[("mode", "kids")], &[], 3), [0, 2, 4]);
        assert_eq!(slate(rule, &[("mode", "all")], &[], 3), [0, 1, 2]);
        assert_eq!(slate(&rule.replace("['kids','teens']", "'*'"), &[("mode", "x")], &[], 3), [0, 2, 4]);
    }

    #[test]
    fn boost_bury_cap_pin() {
        assert_eq!(
            slate("[[rules]]\naction='boost'\namount=2.0\nwhere={category='c1'}", &[], &[], 6),
            [1, 3, 5, 0, 2, 4]
        );
        assert_eq!(slate("[[rules]]\naction='bury'\nwhere={category='c0'}", &[], &[], 6), [1, 3, 5, 0, 2, 4]);
        assert_eq!(slate("[[rules]]\naction='cap'\nattribute='category'\nmax=1", &[], &[], 6), [0, 1]);
        assert_eq!(slate("[[rules]]\naction='pin'\nitems=['5','3']\nrank=2", &[], &[], 4), [0, 5, 3, 1]);
        assert_eq!(slate("[[rules]]\naction='pin'\nitems=['5','3']\nrank=1", &[], &[5], 3), [3, 0, 1]);
    }

    #[test]
    fn a_pinned_item_that_is_excluded_stays_away() {
        let rules = "[[rules]]\naction='exclude'\nwhere={category='c1'}\n[[rules]]\naction='pin'\nitems=['1']\nrank=1";
        assert_eq!(slate(rules, &[], &[], 3), [0, 2, 4]);
    }

    #[test]
    fn a_pin_keeps_its_rank_when_the_list_is_filled_up() {
        let rules = "[[rules]]\naction='exclude'\nwhere={category='c0'}\n[[rules]]\naction='cap'\nattribute='category'\nmax=2\n\
                     [[rules]]\naction='pin'\nitems=['3']\nrank=2";
        assert_eq!(slate(rules, &[], &[1], 2), [5, 3]);
    }

    #[test]
    fn errors_name_the_place() {
        assert_eq!(
            refused("action='exclude'\nwhere={categry='c0'}"),
            "rerank.rules[0] `r`: where.categry: no item column `categry`; did you mean `category`?"
        );
        assert!(refused("action='exclude'\nwhere={category='c9'}").contains("no item has the value `c9`"));
        assert!(refused("action='exclude'\nwhere={category={lt=3}}").contains("compares numbers"));
        assert!(refused("action='exclude'\nwhere={year='x'}").contains("holds numbers"));
        assert!(refused("action='boost'").contains("amount: is missing"));
        assert!(refused("action='bury'\namount=1.0").contains("has no meaning"));
        assert!(refused("action='pin'\nitems=['77']\nrank=1").contains("no item `77`"));
        assert!(refused("action='pin'\nitems=['1']\nrank=0").contains("count from 1"));
        assert!(refused("action='cap'\nattribute='year'\nmax=2").contains("is a number"));
    }

    proptest! {
        /// As a bundle that was built with the changes would have it.
        #[test]
        fn items_that_came_or_changed_match_as_in_a_bundle_of_them(
            before in prop::collection::vec((0u32..3, prop::option::of(0u8..5)), 1..70),
            after in prop::collection::vec((0u32..5, prop::option::of(0u8..5)), 0..9),
            changed in prop::collection::vec(any::<prop::sample::Index>(), 0..5), low in 0u8..5, code in 0u32..2, missing in any::<bool>(),
        ) {
            let mut rows = before.clone();
            for (at, row) in changed.iter().zip(&after) {
                rows[at.index(before.len())] = *row;
            }
            rows.extend(after.iter().skip(changed.len()));
            let made = |rows: &[(u32, Option<u8>)]| {
                let mut generation = testing::plain(rows.len());
                // All values that rules name are there.
                let codes = rows.iter().map(|row| row.0);
                let (data, mut lists) = (codes.clone().collect::<Vec<_>>(), codes.map(|code| vec![code]).collect::<Vec<_>>());
                lists[0].extend([1, 0]);
                testing::add_category(&mut generation, "category", &data);
                testing::add_tags(&mut generation, "tags", &lists);
                testing::add_number(&mut generation, "year", &rows.iter().map(|row| row.1.map_or(f32::NAN, f32::from)).collect::<Vec<_>>());
                generation
            };
            let (old, new) = (made(&before), made(&rows));
            let live = testing::changes(&old, &new);
            let rule = match missing {
                true => "action='exclude'\nwhere={year={missing=true}}".to_owned(),
                false => format!("action='exclude'\nwhere={{tags='c{code}', year={{ge={low}}}}}"),
            };
            let config: RuleConfig = toml::from_str(&rule).unwrap();
            let compiled = |generation: &Generation| compile(0, &config, generation).unwrap().matches;
            let (got, want) = (compiled(&old), compiled(&new));
            for row in 0..rows.len() as u32 {
                prop_assert_eq!(got.has(row, Some(&live)), want.has(row, None), "{}", row);
            }
            // And so it is with the filter of a search.
            let mut words = Vec::new();
            let words = crate::device::cpu::with_changed(got.rows.words(), &got.tests, Some(&live), &mut words);
            prop_assert!((0..rows.len()).all(|row| (words[row / 64] >> (row % 64) & 1 == 1) == want.has(row as u32, None)));
        }
    }

    proptest! {
        #[test]
        fn slates_are_unique_unseen_and_allowed(
            seen in prop::collection::btree_set(0u32..6, 0..4), n in 1usize..8,
            exclude in 0u32..2, pin in 0u32..6, rank in 1u32..7, cap in 1u32..4,
        ) {
            let rules = format!(
                "[[rules]]\naction='exclude'\nwhere={{category='c{exclude}'}}\n\
                 [[rules]]\naction='cap'\nattribute='category'\nmax={cap}\n\
                 [[rules]]\naction='pin'\nitems=['{pin}']\nrank={rank}");
            let seen: Vec<u32> = seen.into_iter().collect();
            let rows = slate(&rules, &[], &seen, n);
            let unique: std::collections::HashSet<_> = rows.iter().collect();
            prop_assert_eq!(unique.len(), rows.len());
            prop_assert!(rows.len() <= n);
            prop_assert!(rows.iter().all(|row| !seen.contains(row) && row % 2 != exclude));
            let pinned_in = pin % 2 != exclude && !seen.contains(&pin);
            if pinned_in && rows.len() >= rank as usize {
                prop_assert_eq!(rows[rank as usize - 1], pin);
            }
            // A pin is on top of the cap: it may add one.
            prop_assert!(rows.len() <= cap as usize + usize::from(pinned_in));
        }
    }
}
