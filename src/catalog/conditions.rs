//! Conditions over item columns: how they are written, what they mean for a column, and which rows fulfil them.

use std::sync::Arc;

use quick_cache::sync::{Cache, DefaultLifecycle};
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter};
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use super::generation::{ColumnData, Entities, IdTable};
use crate::context::nearest;

/// A value or several.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany {
    /// This one.
    One(String),
    /// Any of these.
    Many(Vec<String>),
}

impl OneOrMany {
    /// All of them.
    pub fn values(&self) -> &[String] {
        match self {
            OneOrMany::One(one) => std::slice::from_ref(one),
            OneOrMany::Many(many) => many,
        }
    }
}

/// A condition over an item column, as a configuration has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Condition {
    /// Number columns: equal.
    Number(f64),
    /// Category and list columns: has the value, or any of them.
    Values(OneOrMany),
    /// Comparisons, all must hold.
    Compare(Compare),
}

/// Comparisons over a number column; `missing` over any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Compare {
    /// Below.
    pub lt: Option<f64>,
    /// At most.
    pub le: Option<f64>,
    /// Above.
    pub gt: Option<f64>,
    /// At least.
    pub ge: Option<f64>,
    /// Whether the value is missing.
    pub missing: Option<bool>,
}

impl Compare {
    /// Whether it demands nothing.
    pub fn is_empty(&self) -> bool {
        *self == Compare::default()
    }
}

/// As [`Condition`], borrowed from a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Demand<'a> {
    /// Number columns: equal.
    Number(f64),
    /// Category and list columns: has any of them.
    Values(&'a [&'a str]),
    /// Comparisons, all must hold.
    Compare(Compare),
}

/// What becomes of a string that no item has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnknownValue {
    /// It is an error: in a configuration it almost always is a typing error.
    Refuse,
    /// No item has it, and that is the answer.
    Ignore,
}

/// Longest name for which a similar one is looked for, bytes: requests may be wrong at no cost to others.
const MAX_HINTED: usize = 64;

pub(crate) fn hint<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> String {
    let found = if name.len() <= MAX_HINTED { nearest(name, known) } else { None };
    found.map(|n| format!("; did you mean `{n}`?")).unwrap_or_default()
}

/// The position of the item column `name`.
///
/// # Errors
/// There is none; the text has the nearest name.
pub fn column(items: &Entities, name: &str) -> Result<usize, String> {
    let names = || items.columns.iter().map(|c| c.name.as_str());
    items.column_index(name).ok_or_else(|| format!("no item column `{name}`{}", hint(name, names())))
}

/// A condition resolved against one column: equal tests admit the same rows.
#[derive(Clone, Debug, PartialEq)]
pub enum Test {
    /// The number is neither below `low` nor above `high`, and not missing. Neither is NaN or -0.
    Within {
        /// At least.
        low: f32,
        /// At most.
        high: f32,
    },
    /// One of the row's codes is among these, which ascend.
    AnyOf(SmallVec<[u32; 4]>),
    /// Whether the value is missing.
    Missing(bool),
}

impl Eq for Test {}

impl std::hash::Hash for Test {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        std::mem::discriminant(self).hash(state);
        match self {
            Test::Within { low, high } => (low.to_bits(), high.to_bits()).hash(state),
            Test::AnyOf(codes) => codes.hash(state),
            Test::Missing(missing) => missing.hash(state),
        }
    }
}

impl Test {
    /// What `demand` means for the column `data`. Columns hold f32: a bound means the f32 nearest to it, as the value next to it
    /// does. A bound that is not a number holds for nothing.
    ///
    /// # Errors
    /// The demand does not fit the kind of column, or names a value that is refused.
    pub fn resolve(data: &ColumnData, demand: &Demand<'_>, unknown: UnknownValue) -> Result<Test, String> {
        let numbers = matches!(data, ColumnData::Number { .. });
        match demand {
            Demand::Number(want) if numbers => Ok(Self::within(*want as f32, *want as f32)),
            Demand::Number(_) => Err("is a number, but the column holds strings".into()),
            Demand::Values(_) if numbers => {
                Err("is a string, but the column holds numbers; compare by lt, le, gt or ge".into())
            }
            Demand::Values(values) => {
                let vocabulary = data.vocabulary().ok_or("the column has no values")?;
                let mut codes = SmallVec::new();
                for value in *values {
                    match vocabulary.row(value) {
                        Some(code) => codes.push(code),
                        None if unknown == UnknownValue::Refuse => return Err(no_value(value, vocabulary)),
                        None => {}
                    }
                }
                codes.sort_unstable();
                codes.dedup();
                Ok(Test::AnyOf(codes))
            }
            Demand::Compare(compare) => {
                let Compare { lt, le, gt, ge, missing } = *compare;
                match (missing, [lt, le, gt, ge].iter().any(Option::is_some)) {
                    (None, false) => Err("is empty; expected lt, le, gt, ge or missing".into()),
                    (Some(missing), false) => Ok(Test::Missing(missing)),
                    (_, true) if !numbers => Err("compares numbers, but the column holds strings".into()),
                    (Some(true), true) => Ok(Self::NOTHING),
                    (_, true) => {
                        // What is above x is at least the number after x, and nothing is above infinity.
                        let above = |x: f32| if x == f32::INFINITY { f32::NAN } else { x.next_up() };
                        let below = |x: f32| if x == f32::NEG_INFINITY { f32::NAN } else { x.next_down() };
                        let bound = |bound: Option<f64>, none: f32, step: fn(f32) -> f32| {
                            bound.map_or(none, |b| step(b as f32))
                        };
                        let lows = [bound(ge, f32::NEG_INFINITY, |b| b), bound(gt, f32::NEG_INFINITY, above)];
                        let highs = [bound(le, f32::INFINITY, |b| b), bound(lt, f32::INFINITY, below)];
                        if lows.iter().chain(&highs).any(|bound| bound.is_nan()) {
                            return Ok(Self::NOTHING);
                        }
                        Ok(Self::within(lows[0].max(lows[1]), highs[0].min(highs[1])))
                    }
                }
            }
        }
    }

    /// No number fulfils it.
    const NOTHING: Test = Test::Within { low: f32::INFINITY, high: f32::NEG_INFINITY };

    fn within(low: f32, high: f32) -> Self {
        // -0 + 0 is 0.
        if low <= high { Test::Within { low: low + 0.0, high: high + 0.0 } } else { Self::NOTHING }
    }

    /// The rows below `n` of the column `data`, which it was resolved against, that fulfil it.
    pub fn rows(&self, data: &ColumnData, n: usize) -> Bitmap {
        match (self, data) {
            (&Test::Within { low, high }, ColumnData::Number { values, .. }) => {
                let values = &values[..n];
                Bitmap::of(n, |row| low <= values[row] && values[row] <= high)
            }
            (Test::Missing(missing), ColumnData::Number { values, .. }) => {
                let values = &values[..n];
                Bitmap::of(n, |row| values[row].is_nan() == *missing)
            }
            (Test::Missing(missing), _) => Bitmap::of(n, |row| data.codes(row as u32).is_empty() == *missing),
            (Test::AnyOf(wanted), ColumnData::Category { codes, .. }) if wanted.len() == 1 => {
                let (codes, wanted) = (&codes[..n], wanted[0]);
                Bitmap::of(n, |row| codes[row] == wanted)
            }
            (Test::AnyOf(wanted), _) => {
                let mut among = Bitmap::of(data.vocabulary().map_or(0, IdTable::len), |_| false);
                // No item of the bundle has a code that came later.
                for &code in wanted {
                    if let Some(word) = among.0.get_mut(code as usize / 64) {
                        *word |= 1 << (code % 64);
                    }
                }
                match data {
                    // A missing value is beyond every code.
                    ColumnData::Category { codes, .. } => {
                        let codes = &codes[..n];
                        Bitmap::of(n, |row| among.has(codes[row]))
                    }
                    _ => Bitmap::of(n, |row| data.codes(row as u32).iter().any(|&code| among.has(code))),
                }
            }
            (Test::Within { .. }, _) => Bitmap::of(n, |_| false),
        }
    }

    /// Whether an item with this number (NaN: none) or these codes fulfils it.
    pub fn holds(&self, number: f32, codes: &[u32]) -> bool {
        match self {
            Test::Within { low, high } => *low <= number && number <= *high,
            Test::AnyOf(wanted) => codes.iter().any(|code| wanted.binary_search(code).is_ok()),
            Test::Missing(missing) => (number.is_nan() && codes.is_empty()) == *missing,
        }
    }

    fn bytes(&self) -> usize {
        let spilled = match self {
            Test::AnyOf(codes) if codes.spilled() => codes.capacity() * size_of::<u32>(),
            _ => 0,
        };
        size_of::<Self>() + spilled
    }
}

fn no_value(value: &str, vocabulary: &IdTable) -> String {
    let known = (0..vocabulary.len() as u32).map(|code| vocabulary.id(code));
    format!("no item has the value `{value}`{}", hint(value, known))
}

/// One bit per item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap(Vec<u64>);

impl Bitmap {
    /// The rows below `n` for which `holds` is true.
    pub fn of(n: usize, holds: impl Fn(usize) -> bool) -> Self {
        let word = |start: usize| {
            let rows = start..(start + 64).min(n);
            rows.fold(0, |word, row| word | u64::from(holds(row)) << (row - start))
        };
        Bitmap((0..n).step_by(64).map(word).collect())
    }

    /// Whether `row` is in it.
    pub fn has(&self, row: u32) -> bool {
        self.0.get(row as usize / 64).is_some_and(|word| word >> (row % 64) & 1 == 1)
    }

    /// Row `i` is bit `i % 64` of word `i / 64`.
    pub fn words(&self) -> &[u64] {
        &self.0
    }

    /// Leaves what is in `other`, too.
    pub fn intersect(&mut self, other: &Bitmap) {
        intersect(&mut self.0, &other.0);
    }
}

fn intersect(words: &mut [u64], others: &[u64]) {
    words.iter_mut().zip(others).for_each(|(word, other)| *word &= other);
}

/// The rows that fulfil conditions, remembered by column and test: bounded in bytes, what is used stays.
pub struct FilterCache {
    bitmaps: Cache<(u32, Test), Arc<Bitmap>, Bytes>,
}

#[derive(Clone)]
struct Bytes;

/// Bookkeeping of the cache per entry, bytes, about.
const OVERHEAD: usize = 128;

impl Weighter<(u32, Test), Arc<Bitmap>> for Bytes {
    fn weight(&self, (_, test): &(u32, Test), bitmap: &Arc<Bitmap>) -> u64 {
        (size_of_val(bitmap.words()) + test.bytes() + OVERHEAD) as u64
    }
}

impl std::fmt::Debug for FilterCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FilterCache {{ bytes: {}, bitmaps: {} }}", self.bytes(), self.bitmaps.len())
    }
}

/// Buffers of a filter, reused from request to request.
#[derive(Debug, Default)]
pub struct FilterScratch {
    bitmaps: SmallVec<[Arc<Bitmap>; 4]>,
    words: Vec<u64>,
}

impl FilterCache {
    /// An empty cache of at most `capacity_bytes` for bitmaps of `n` rows.
    pub fn new(capacity_bytes: u64, n: usize) -> Self {
        let estimate = (capacity_bytes / (n as u64 / 8 + OVERHEAD as u64)).clamp(16, 4096) as usize;
        let mut options = OptionsBuilder::new();
        // One shard: a bitmap larger than a shard's share would never be kept, and few threads ask.
        options.shards(1).estimated_items_capacity(estimate).weight_capacity(capacity_bytes);
        let bitmaps = match options.build() {
            Ok(options) => {
                Cache::with_options(options, Bytes, DefaultHashBuilder::default(), DefaultLifecycle::default())
            }
            Err(_) => Cache::with_weighter(estimate, capacity_bytes, Bytes),
        };
        FilterCache { bitmaps }
    }

    /// Memory in use, bytes, about.
    pub fn bytes(&self) -> u64 {
        self.bitmaps.weight()
    }

    /// The rows of `items` that pass all of `tests`, each with the position of its column; `None`: no test, all rows. Makes the
    /// bitmaps that are not there, some milliseconds for a million rows: for workers, not for shards.
    pub fn admitted<'a>(
        &self,
        items: &Entities,
        tests: &[(u32, Test)],
        scratch: &'a mut FilterScratch,
    ) -> Option<&'a [u64]> {
        let FilterScratch { bitmaps, words } = scratch;
        bitmaps.clear();
        for key @ (column, test) in tests {
            let make = || Ok(Arc::new(test.rows(&items.columns[*column as usize].data, items.len())));
            let bitmap: Result<_, std::convert::Infallible> = self.bitmaps.get_or_insert_with(key, make);
            match bitmap {
                Ok(bitmap) => bitmaps.push(bitmap),
                Err(never) => match never {},
            }
        }
        match &bitmaps[..] {
            [] => None,
            [only] => Some(only.words()),
            [first, others @ ..] => {
                words.clear();
                words.extend_from_slice(first.words());
                others.iter().for_each(|other| intersect(words, other.words()));
                Some(words)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::generation::{Generation, testing};
    use proptest::prelude::*;

    /// The obvious evaluation of a demand at one row.
    fn holds(data: &ColumnData, demand: &Demand<'_>, row: u32) -> bool {
        let number = match data {
            ColumnData::Number { values, .. } => values[row as usize],
            _ => f32::NAN,
        };
        let missing = number.is_nan() && data.codes(row).is_empty();
        match demand {
            Demand::Number(want) => number == *want as f32,
            Demand::Values(values) => {
                let vocabulary = data.vocabulary().unwrap();
                data.codes(row).iter().any(|&code| values.contains(&vocabulary.id(code)))
            }
            Demand::Compare(Compare { lt, le, gt, ge, missing: want }) => {
                want.is_none_or(|want| want == missing)
                    && lt.is_none_or(|b| number < b as f32)
                    && le.is_none_or(|b| number <= b as f32)
                    && gt.is_none_or(|b| number > b as f32)
                    && ge.is_none_or(|b| number >= b as f32)
            }
        }
    }

    fn generation(categories: &[u32], tags: &[Vec<u32>], numbers: &[f32]) -> Generation {
        let mut generation = testing::plain(categories.len());
        testing::add_category(&mut generation, "category", categories);
        testing::add_tags(&mut generation, "tags", tags);
        testing::add_number(&mut generation, "year", numbers);
        generation
    }

    fn bound() -> impl Strategy<Value = Option<f64>> {
        prop::option::of(prop_oneof![
            4 => (-4i8..5).prop_map(f64::from),
            1 => prop::sample::select(vec![
                f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.0, 0.1, 1e300, -1e300, 2.0 + 1e-12,
            ]),
        ])
    }

    fn number() -> impl Strategy<Value = f32> {
        let special = vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 0.1, 1e-45, f32::MAX, f32::MIN];
        prop_oneof![4 => (-4i8..5).prop_map(f32::from), 1 => prop::sample::select(special)]
    }

    proptest! {
        #[test]
        fn filters_admit_what_the_obvious_evaluation_admits(
            rows in prop::collection::vec((0u32..6, prop::collection::vec(0u32..5, 0..3), number()), 1..300),
            demands in prop::collection::vec((
                0usize..3, prop::collection::vec(0u32..8, 0..4), bound(), bound(), bound(), bound(),
                prop::option::of(any::<bool>()), prop::option::weighted(0.2, bound()),
            ), 0..4),
            capacity in prop::sample::select(vec![1u64, 400, 1 << 20]),
        ) {
            let categories: Vec<u32> = rows.iter().map(|r| if r.0 == 5 { u32::MAX } else { r.0 }).collect();
            let tags: Vec<Vec<u32>> = rows.iter().map(|r| r.1.clone()).collect();
            let numbers: Vec<f32> = rows.iter().map(|r| r.2).collect();
            let generation = generation(&categories, &tags, &numbers);
            let values: Vec<Vec<String>> =
                demands.iter().map(|d| d.1.iter().map(|code| format!("c{code}")).collect()).collect();
            let values: Vec<Vec<&str>> = values.iter().map(|v| v.iter().map(String::as_str).collect()).collect();
            let mut wanted = Vec::new();
            for (at, &(column, _, lt, le, gt, ge, missing, equal)) in demands.iter().enumerate() {
                let demand = match (column, equal) {
                    (2, Some(Some(number))) => Demand::Number(number),
                    (2, _) => Demand::Compare(Compare { lt, le, gt, ge, missing }),
                    (_, None) => Demand::Values(&values[at]),
                    _ => Demand::Compare(Compare { missing, ..Compare::default() }),
                };
                if !matches!(demand, Demand::Compare(compare) if compare.is_empty()) {
                    wanted.push((column, demand));
                }
            }
            let mut tests = Vec::new();
            for (column, demand) in &wanted {
                let data = &generation.items.columns[*column].data;
                tests.push((*column as u32, Test::resolve(data, demand, UnknownValue::Ignore).unwrap()));
            }
            let cache = FilterCache::new(capacity, rows.len());
            let mut scratch = FilterScratch::default();
            let want: Vec<bool> = (0..rows.len() as u32)
                .map(|row| wanted.iter().all(|(c, d)| holds(&generation.items.columns[*c].data, d, row)))
                .collect();
            // The second time from the cache.
            for _ in 0..2 {
                let bits = cache.admitted(&generation.items, &tests, &mut scratch);
                let filter = bits.map_or(crate::index::Filter::ALL, |bits| crate::index::Filter::ALL.within(bits));
                let got: Vec<bool> = (0..rows.len() as u32).map(|row| filter.allows(row)).collect();
                prop_assert_eq!(&got, &want);
                prop_assert!(bits.is_none_or(|bits| bits.iter().map(|w| w.count_ones()).sum::<u32>() as usize
                    == want.iter().filter(|w| **w).count()), "a bit beyond the rows");
                prop_assert!(cache.bytes() <= capacity);
            }
        }
    }

    #[test]
    fn one_meaning_is_one_test() {
        let generation = generation(&[0, 1, 2], &[vec![], vec![0], vec![1, 2]], &[1.0, 2.0, f32::NAN]);
        let test = |column: &str, demand: Demand<'_>| {
            let data = &generation.items.column(column).unwrap().data;
            Test::resolve(data, &demand, UnknownValue::Ignore).unwrap()
        };
        let compare = |lt, le, gt, ge| Demand::Compare(Compare { lt, le, gt, ge, missing: None });
        assert_eq!(
            test("category", Demand::Values(&["c2", "c0", "c2", "?"])),
            test("category", Demand::Values(&["c0", "c2"]))
        );
        assert_eq!(test("year", Demand::Number(-0.0)), test("year", compare(None, Some(0.0), None, Some(-0.0))));
        assert_eq!(test("year", compare(Some(1.0), None, Some(1.0), None)), Test::NOTHING);
        assert_eq!(test("year", Demand::Number(f64::NAN)), Test::NOTHING);
    }

    #[test]
    fn the_cache_is_bounded_and_keeps_what_is_used() {
        let n = 10_000;
        let numbers: Vec<f32> = (0..n).map(|row| row as f32).collect();
        let generation = generation(&vec![0; n], &vec![vec![]; n], &numbers);
        let cache = FilterCache::new(64 << 10, n);
        let mut scratch = FilterScratch::default();
        let test = |at: usize| (2, Test::Within { low: 0.0, high: at as f32 });
        for at in 0..1000 {
            for test in [test(0), test(at)] {
                cache.admitted(&generation.items, &[test], &mut scratch);
                assert!(cache.bytes() <= 64 << 10);
            }
        }
        assert!(cache.bitmaps.contains_key(&test(0)), "what is used all the time was evicted");
    }
}
