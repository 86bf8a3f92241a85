//! What is popular: weighted counts, decaying exponentially with age where interactions have times.

use super::cooccurrence::from_rows;
use super::dataset::RawInteraction;
use super::generation::{ColumnData, Lists, RankedList};

/// Entries kept overall.
const MAX_OVERALL: usize = 1000;
/// Entries kept per category.
const MAX_PER_CATEGORY: usize = 300;

/// Popularity overall and per code of `category`, best first, ties by row. Items nobody touched have score 0 and
/// fill the lists in the order of the catalogue, so that there is always something to show. Last, every item's popularity.
pub fn trending(
    interactions: &[RawInteraction],
    n_items: usize,
    half_life_seconds: f64,
    category: Option<&ColumnData>,
) -> (RankedList, Lists, Vec<f32>) {
    let newest = interactions.iter().map(|i| i.time).fold(f64::NEG_INFINITY, f64::max);
    let mut scores = vec![0f64; n_items];
    for interaction in interactions {
        let age = newest - interaction.time;
        scores[interaction.item as usize] += f64::from(interaction.weight) * (-age / half_life_seconds).exp2();
    }
    let mut order: Vec<u32> = (0..n_items as u32).collect();
    order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
    let score = |row: u32| scores[row as usize] as f32;
    let overall = RankedList {
        rows: order.iter().take(MAX_OVERALL).copied().collect::<Vec<_>>().into(),
        scores: order.iter().take(MAX_OVERALL).map(|&row| score(row)).collect::<Vec<_>>().into(),
    };
    let by_category = category.map_or_else(Lists::default, |column| {
        let mut lists = vec![Vec::new(); column.vocabulary().map_or(0, |v| v.len())];
        for &row in &order {
            for &code in column.codes(row) {
                let list: &mut Vec<(u32, f32)> = &mut lists[code as usize];
                if list.len() < MAX_PER_CATEGORY {
                    list.push((row, score(row)));
                }
            }
        }
        from_rows(&lists)
    });
    (overall, by_category, scores.into_iter().map(|s| s as f32).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(item: u32, weight: f32, time: f64) -> RawInteraction {
        RawInteraction { user: 0, item, weight, time }
    }

    #[test]
    fn newer_beats_more() {
        let day = 86_400.0;
        let old = [at(0, 1.0, 0.0), at(0, 1.0, 0.0), at(0, 1.0, 0.0), at(1, 1.0, 14.0 * day)];
        let (overall, ..) = trending(&old, 3, 7.0 * day, None);
        assert_eq!(&overall.rows[..], [1, 0, 2]);
        assert_eq!(&overall.scores[..], [1.0, 0.75, 0.0]);
    }

    #[test]
    fn categories_have_their_own_order() {
        let column = ColumnData::Category {
            codes: vec![0, 1, 0].into(),
            vocabulary: std::sync::Arc::new(
                super::super::generation::IdTable::build(["a", "b"].iter(), false).unwrap(),
            ),
        };
        let (_, lists, _) = trending(&[at(2, 1.0, 0.0)], 3, 1.0, Some(&column));
        assert_eq!(lists.of(0), (&[2, 0][..], &[1.0, 0.0][..]));
        assert_eq!(lists.of(1).0, [1]);
        assert!(lists.of(7).0.is_empty());
    }
}
