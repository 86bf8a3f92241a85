//! What is popular now: in the category that the context names first, then overall.

use super::Marks;
use crate::candidates::Scored;
use crate::catalog::generation::Generation;
use crate::catalog::live::{LiveItems, n_rows};
use crate::state::trending::LiveTrending;

/// The context key that names a category.
pub const CATEGORY_KEY: &str = "category";

/// What is not as in the bundle, where anything is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Now<'a> {
    /// Items that came or changed.
    pub items: Option<&'a LiveItems>,
    /// Lists that take the place of the bundle's.
    pub trending: Option<&'a LiveTrending>,
}

/// Appends up to `k` allowed items. A `category` that the catalogue knows fills at most half of them, before the overall
/// list; without one, or with an unknown one, the overall list is all.
pub fn retrieve(
    generation: &Generation,
    now: Now<'_>,
    category: Option<&str>,
    k: usize,
    allowed: &dyn Fn(u32) -> bool,
    taken: &mut Marks,
    out: &mut Vec<Scored>,
) {
    let Now { items, trending: live } = now;
    taken.begin(n_rows(generation, items));
    let start = out.len();
    let mut take = |rows: &[u32], scores: &[f32], until: usize, of: Option<(usize, u32)>| {
        for (&row, &score) in rows.iter().zip(scores) {
            if out.len() - start >= until {
                break;
            }
            // An item may have left the category since the list was made.
            let left = of.is_some_and(|(column, code)| {
                items.and_then(|items| items.get(row)).is_some_and(|item| !item.codes(column).contains(&code))
            });
            if !left && allowed(row) && taken.insert(row) {
                out.push(Scored { row, score });
            }
        }
    };
    let code = category.and_then(|name| {
        let column = &generation.items.columns[generation.roles.category?];
        column.data.vocabulary()?.row(name)
    });
    if let Some(code) = code {
        let (rows, scores) = match live.and_then(|live| live.by_category.get(&code)) {
            Some(list) => (&list.rows[..], &list.scores[..]),
            None => generation.trending_by_category.of(code),
        };
        take(rows, scores, k.div_ceil(2), generation.roles.category.map(|column| (column, code)));
    }
    let overall = live.map_or(&generation.trending, |live| &live.overall);
    take(&overall.rows, &overall.scores, k, None);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::generation::{Lists, RankedList, testing};

    #[test]
    fn category_first_then_overall() {
        let mut generation = testing::plain(6);
        testing::add_category(&mut generation, "category", &[0, 0, 1, 1, 0, 1]);
        generation.trending =
            RankedList { rows: vec![0, 2, 1, 3, 4, 5].into(), scores: vec![6.0, 5.0, 4.0, 3.0, 2.0, 1.0].into() };
        generation.trending_by_category = Lists {
            offsets: vec![0, 3, 6].into(),
            rows: vec![0, 1, 4, 2, 3, 5].into(),
            scores: vec![6.0, 4.0, 2.0, 5.0, 3.0, 1.0].into(),
        };
        let run = |category, k| {
            let mut out = Vec::new();
            retrieve(&generation, Now::default(), category, k, &|row| row != 0, &mut Marks::default(), &mut out);
            out.iter().map(|s| s.row).collect::<Vec<_>>()
        };
        assert_eq!(run(None, 3), [2, 1, 3]);
        assert_eq!(run(Some("c1"), 4), [2, 3, 1, 4]);
        assert_eq!(run(Some("nope"), 2), [2, 1]);
        let list = |rows: Vec<u32>| RankedList { scores: vec![1.0; rows.len()].into(), rows: rows.into() };
        let live = LiveTrending { overall: list(vec![5, 4, 3]), by_category: [(1, list(vec![3]))].into() };
        let run = |category, k| {
            let mut out = Vec::new();
            retrieve(
                &generation,
                Now { items: None, trending: Some(&live) },
                category,
                k,
                &|_| true,
                &mut Marks::default(),
                &mut out,
            );
            out.iter().map(|s| s.row).collect::<Vec<_>>()
        };
        assert_eq!(
            (run(None, 2), run(Some("c1"), 4), run(Some("c0"), 4)),
            (vec![5, 4], vec![3, 5, 4], vec![0, 1, 5, 4])
        );
    }
}
