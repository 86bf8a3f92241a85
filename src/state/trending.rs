//! What is popular because of events, on top of what the bundle knows.
//!
//! Weights decay exponentially, counted forward (Cormode et al., ICDE 2009): an event at time t adds w · 2^((t - L) / half-life)
//! for a fixed L, so that nothing has to be decayed and the order never depends on the present.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::candidates::{Packed, Scored, keep_best};
use crate::catalog::generation::{Generation, RankedList};
use crate::catalog::live::LiveItems;

/// Beyond this exponent counts are brought back to a newer L.
const MAX_EXPONENT: f64 = 512.0;
/// Least length that lists are kept at.
const LEAST: usize = 1000;
/// Values of a context key that have lists; those that most was done with.
const MOST_VALUES: usize = 1000;

/// Lists as they stand at one moment.
#[derive(Clone, Debug, Default)]
pub struct LiveTrending {
    /// Over all items.
    pub overall: RankedList,
    /// By code of the category column; the bundle's list holds for a category that is not here.
    pub by_category: HashMap<u32, RankedList>,
    /// By configured context key, by its value: what was popular in such requests, of events alone.
    pub by_context: Vec<(String, HashMap<String, Arc<RankedList>>)>,
}

/// What events with one value of a context key named.
#[derive(Debug, Default)]
struct InContext {
    by_row: HashMap<u32, f64>,
    /// Of the last refresh; the order never changes by itself.
    list: Arc<RankedList>,
    dirty: bool,
}

impl InContext {
    fn total(&self) -> f64 {
        self.by_row.values().sum()
    }

    /// Makes the list anew, and forgets rows that are far from it.
    fn refresh(&mut self, now: f64) {
        if std::mem::take(&mut self.dirty) {
            let scored = |(&row, &count): (&u32, &f64)| Packed::from(Scored { row, score: (count * now) as f32 });
            let mut best: Vec<Packed> = self.by_row.iter().map(scored).collect();
            keep_best(&mut best, LEAST);
            if self.by_row.len() > 4 * LEAST {
                let kept = best.iter().map(|&packed| Scored::from(packed).row);
                self.by_row = kept.filter_map(|row| Some((row, *self.by_row.get(&row)?))).collect();
            }
            self.list = Arc::new(ranked(&best));
        }
    }
}

fn ranked(best: &[Packed]) -> RankedList {
    let best = || best.iter().map(|&packed| Scored::from(packed));
    RankedList {
        rows: best().map(|s| s.row).collect::<Vec<_>>().into(),
        scores: best().map(|s| s.score).collect::<Vec<_>>().into(),
    }
}

/// Decayed weights of items that events named.
#[derive(Debug)]
pub struct Counts {
    half_life_ms: f64,
    /// The first event's time: the bundle's popularity decays from there.
    base_ms: Option<i64>,
    /// L.
    landmark_ms: i64,
    by_row: HashMap<u32, f64>,
    by_context: Vec<(String, HashMap<String, InContext>)>,
    dirty: bool,
}

impl Counts {
    /// None; events are also counted by the values of `context_keys`.
    pub fn new(half_life_hours: f64, context_keys: &[String]) -> Self {
        Counts {
            half_life_ms: half_life_hours * 3_600_000.0,
            base_ms: None,
            landmark_ms: 0,
            by_row: HashMap::new(),
            by_context: context_keys.iter().map(|key| (key.clone(), HashMap::new())).collect(),
            dirty: false,
        }
    }

    /// Half-lives from L to `time_ms`.
    fn exponent(&self, time_ms: i64) -> f64 {
        (time_ms - self.landmark_ms) as f64 / self.half_life_ms
    }

    /// Counts an event that happened in `context`.
    pub fn add(&mut self, row: u32, weight: f32, time_ms: i64, context: &[(&str, &str)]) {
        if self.base_ms.is_none() {
            self.base_ms = Some(time_ms);
            self.landmark_ms = time_ms;
        }
        let mut exponent = self.exponent(time_ms);
        if exponent > MAX_EXPONENT {
            let shift = (-exponent).exp2();
            let in_context = self.by_context.iter_mut().flat_map(|(_, values)| values.values_mut());
            for by_row in in_context.map(|value| &mut value.by_row).chain([&mut self.by_row]) {
                by_row.values_mut().for_each(|count| *count *= shift);
                by_row.retain(|_, count| *count > 0.0);
            }
            self.landmark_ms = time_ms;
            exponent = 0.0;
        }
        let counted = f64::from(weight) * exponent.exp2();
        *self.by_row.entry(row).or_default() += counted;
        for (key, values) in &mut self.by_context {
            // A key that is given twice means its last value, as in requests.
            let Some((_, value)) = context.iter().rev().find(|(given, _)| given == key) else { continue };
            if !values.contains_key(*value) {
                values.insert((*value).to_owned(), InContext::default());
            }
            if let Some(value) = values.get_mut(*value) {
                *value.by_row.entry(row).or_default() += counted;
                value.dirty = true;
            }
        }
        self.dirty = true;
    }

    /// The lists as they stand at `now_ms`, if something was counted since the last call.
    pub fn refresh(&mut self, generation: &Generation, items: Option<&LiveItems>, now_ms: i64) -> Option<LiveTrending> {
        if !std::mem::take(&mut self.dirty) {
            return None;
        }
        let base = self.exponent(self.base_ms?).exp2();
        let now = (-self.exponent(now_ms)).exp2();
        let score = |row: u32| {
            let known = generation.popularity.get(row as usize).copied().unwrap_or_default();
            (f64::from(known) * base + self.by_row.get(&row).copied().unwrap_or_default()) * now
        };
        let list = |rows: &[u32], news: &mut dyn Iterator<Item = u32>| {
            let keep = rows.len().max(LEAST);
            let known: HashSet<u32> = rows.iter().copied().collect();
            let all = rows.iter().copied().chain(news.filter(|row| !known.contains(row)));
            let mut best: Vec<Packed> = all.map(|row| Packed::from(Scored { row, score: score(row) as f32 })).collect();
            keep_best(&mut best, keep);
            ranked(&best)
        };
        let overall = list(&generation.trending.rows, &mut self.by_row.keys().copied());
        let mut touched: HashMap<u32, Vec<u32>> = HashMap::new();
        if let Some(at) = generation.roles.category {
            let column = &generation.items.columns[at].data;
            for &row in self.by_row.keys() {
                let codes = match items.and_then(|items| items.get(row)) {
                    Some(item) => item.codes(at),
                    None if (row as usize) < generation.items.len() => column.codes(row),
                    None => &[],
                };
                codes.iter().for_each(|&code| touched.entry(code).or_default().push(row));
            }
        }
        let by_category = touched.into_iter().map(|(code, news)| {
            let (rows, _) = generation.trending_by_category.of(code);
            (code, list(rows, &mut news.into_iter()))
        });
        let by_category = by_category.collect();
        let mut by_context = Vec::new();
        for (key, values) in &mut self.by_context {
            if values.len() > MOST_VALUES {
                let mut totals: Vec<f64> = values.values().map(InContext::total).collect();
                totals.sort_unstable_by(|a, b| b.total_cmp(a));
                let least = totals[MOST_VALUES - 1];
                // Of those that are like the last that stays, as many as there is room for.
                let mut alike = totals[..MOST_VALUES].iter().filter(|total| **total == least).count();
                values.retain(|_, value| {
                    let total = value.total();
                    let last = total == least && alike > 0;
                    alike -= usize::from(last);
                    total > least || last
                });
            }
            values.values_mut().for_each(|value| value.refresh(now));
            by_context
                .push((key.clone(), values.iter().map(|(name, value)| (name.clone(), value.list.clone())).collect()));
        }
        Some(LiveTrending { overall, by_category, by_context })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::generation::{Lists, testing};

    const HOUR: i64 = 3_600_000;

    fn generation() -> Generation {
        let mut generation = testing::plain(5);
        testing::add_category(&mut generation, "category", &[0, 0, 1, 1, 0]);
        generation.popularity = vec![8.0, 4.0, 2.0, 1.0, 0.0].into();
        generation.trending = RankedList { rows: vec![0, 1, 2, 3].into(), scores: vec![8.0, 4.0, 2.0, 1.0].into() };
        generation.trending_by_category = Lists {
            offsets: vec![0, 2, 4].into(),
            rows: vec![0, 1, 2, 3].into(),
            scores: vec![8.0, 4.0, 2.0, 1.0].into(),
        };
        generation
    }

    #[test]
    fn events_move_items_up_and_old_ones_fade() {
        let generation = generation();
        let mut counts = Counts::new(1.0, &[]);
        assert!(counts.refresh(&generation, None, 0).is_none());
        counts.add(3, 4.0, 0, &[]);
        counts.add(4, 1.0, 0, &[]);
        let lists = counts.refresh(&generation, None, 0).unwrap();
        assert_eq!(&lists.overall.rows[..], [0, 3, 1, 2, 4]);
        assert_eq!(&lists.overall.scores[..], [8.0, 5.0, 4.0, 2.0, 1.0]);
        assert_eq!(&lists.by_category[&1].rows[..], [3, 2]);
        assert_eq!(&lists.by_category[&0].rows[..], [0, 1, 4]);
        assert!(counts.refresh(&generation, None, 1).is_none());
        // Three half-lives later the bundle's 8 weigh 1.
        counts.add(4, 1.0, 3 * HOUR, &[]);
        let lists = counts.refresh(&generation, None, 3 * HOUR).unwrap();
        assert_eq!(&lists.overall.rows[..], [4, 0, 3, 1, 2]);
        assert!((lists.overall.scores[0] - 1.125).abs() < 1e-6 && (lists.overall.scores[1] - 1.0).abs() < 1e-6);
    }

    #[test]
    fn contexts_have_lists_of_their_own_and_the_busiest_stay() {
        let generation = generation();
        let mut counts = Counts::new(1.0, &["country".to_owned(), "device".to_owned()]);
        counts.add(3, 1.0, 0, &[("country", "fr"), ("device", "tv")]);
        counts.add(2, 2.0, 0, &[("country", "de"), ("country", "fr"), ("other", "x")]);
        let lists = counts.refresh(&generation, None, 0).unwrap();
        let of = |lists: &LiveTrending, at: usize, value: &str| {
            lists.by_context[at].1.get(value).map(|list| (list.rows.to_vec(), list.scores.to_vec()))
        };
        assert_eq!(of(&lists, 0, "fr"), Some((vec![2, 3], vec![2.0, 1.0])));
        assert_eq!(of(&lists, 1, "tv"), Some((vec![3], vec![1.0])));
        assert_eq!((of(&lists, 0, "de"), of(&lists, 1, "x")), (None, None));
        // An hour later an event weighs twice what one did then.
        counts.add(3, 0.75, HOUR, &[("country", "fr")]);
        assert_eq!(of(&counts.refresh(&generation, None, HOUR).unwrap(), 0, "fr").unwrap().0, [3, 2]);
        for value in 0..3 * MOST_VALUES {
            counts.add(1, 0.1, HOUR, &[("country", &value.to_string())]);
        }
        let lists = counts.refresh(&generation, None, HOUR).unwrap();
        assert_eq!(lists.by_context[0].1.len(), MOST_VALUES);
        assert!(of(&lists, 0, "fr").is_some());
        for row in 0..5 * LEAST as u32 {
            counts.add(row % 5 * 1000 + row / 5, 1.0, HOUR, &[("device", "tv")]);
        }
        counts.refresh(&generation, None, HOUR).unwrap();
        assert_eq!(counts.by_context[1].1["tv"].by_row.len(), LEAST);
    }

    #[test]
    fn years_do_not_overflow() {
        let generation = generation();
        let mut counts = Counts::new(0.5, &[]);
        for day in 0..2000 {
            counts.add(day as u32 % 5, 1.0, day * 24 * HOUR, &[("c", "v")]);
        }
        let lists = counts.refresh(&generation, None, 2000 * 24 * HOUR).unwrap();
        assert_eq!(lists.overall.rows[0], 4);
        assert!(lists.overall.scores.iter().all(|s| s.is_finite()));
    }
}
