//! What is popular because of events, on top of what the bundle knows.
//!
//! Weights decay exponentially, counted forward (Cormode et al., ICDE 2009): an event at time t adds w · 2^((t - L) / half-life)
//! for a fixed L, so that nothing has to be decayed and the order never depends on the present.

use std::collections::{HashMap, HashSet};

use crate::candidates::{Packed, Scored, keep_best};
use crate::catalog::generation::{Generation, RankedList};
use crate::catalog::live::LiveItems;

/// Beyond this exponent counts are brought back to a newer L.
const MAX_EXPONENT: f64 = 512.0;
/// Least length that lists are kept at.
const LEAST: usize = 1000;

/// Lists as they stand at one moment.
#[derive(Clone, Debug, Default)]
pub struct LiveTrending {
    /// Over all items.
    pub overall: RankedList,
    /// By code of the category column; the bundle's list holds for a category that is not here.
    pub by_category: HashMap<u32, RankedList>,
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
    dirty: bool,
}

impl Counts {
    /// None.
    pub fn new(half_life_hours: f64) -> Self {
        let half_life_ms = half_life_hours * 3_600_000.0;
        Counts { half_life_ms, base_ms: None, landmark_ms: 0, by_row: HashMap::new(), dirty: false }
    }

    /// Half-lives from L to `time_ms`.
    fn exponent(&self, time_ms: i64) -> f64 {
        (time_ms - self.landmark_ms) as f64 / self.half_life_ms
    }

    /// Counts an event.
    pub fn add(&mut self, row: u32, weight: f32, time_ms: i64) {
        if self.base_ms.is_none() {
            self.base_ms = Some(time_ms);
            self.landmark_ms = time_ms;
        }
        let mut exponent = self.exponent(time_ms);
        if exponent > MAX_EXPONENT {
            let shift = (-exponent).exp2();
            self.by_row.values_mut().for_each(|count| *count *= shift);
            self.by_row.retain(|_, count| *count > 0.0);
            self.landmark_ms = time_ms;
            exponent = 0.0;
        }
        *self.by_row.entry(row).or_default() += f64::from(weight) * exponent.exp2();
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
            let best = || best.iter().map(|&packed| Scored::from(packed));
            RankedList {
                rows: best().map(|s| s.row).collect::<Vec<_>>().into(),
                scores: best().map(|s| s.score).collect::<Vec<_>>().into(),
            }
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
        Some(LiveTrending { overall, by_category: by_category.collect() })
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
        let mut counts = Counts::new(1.0);
        assert!(counts.refresh(&generation, None, 0).is_none());
        counts.add(3, 4.0, 0);
        counts.add(4, 1.0, 0);
        let lists = counts.refresh(&generation, None, 0).unwrap();
        assert_eq!(&lists.overall.rows[..], [0, 3, 1, 2, 4]);
        assert_eq!(&lists.overall.scores[..], [8.0, 5.0, 4.0, 2.0, 1.0]);
        assert_eq!(&lists.by_category[&1].rows[..], [3, 2]);
        assert_eq!(&lists.by_category[&0].rows[..], [0, 1, 4]);
        assert!(counts.refresh(&generation, None, 1).is_none());
        // Three half-lives later the bundle's 8 weigh 1.
        counts.add(4, 1.0, 3 * HOUR);
        let lists = counts.refresh(&generation, None, 3 * HOUR).unwrap();
        assert_eq!(&lists.overall.rows[..], [4, 0, 3, 1, 2]);
        assert!((lists.overall.scores[0] - 1.125).abs() < 1e-6 && (lists.overall.scores[1] - 1.0).abs() < 1e-6);
    }

    #[test]
    fn years_do_not_overflow() {
        let generation = generation();
        let mut counts = Counts::new(0.5);
        for day in 0..2000 {
            counts.add(day as u32 % 5, 1.0, day * 24 * HOUR);
        }
        let lists = counts.refresh(&generation, None, 2000 * 24 * HOUR).unwrap();
        assert_eq!(lists.overall.rows[0], 4);
        assert!(lists.overall.scores.iter().all(|s| s.is_finite()));
    }
}
