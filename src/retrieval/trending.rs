//! What is popular now: in the category that the context names first, then in contexts like it, then overall.

use super::Marks;
use crate::candidates::Scored;
use crate::catalog::generation::Generation;
use crate::catalog::live::{LiveItems, n_rows};
use crate::device::Context;
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

/// Appends up to `k` allowed items: of the category that the context names and the catalogue knows, of each configured context key by
/// its value where events tell something of it, and overall. Each list before the last fills at most half of what is left.
pub fn retrieve(
    generation: &Generation,
    now: Now<'_>,
    context: &Context,
    k: usize,
    allowed: &dyn Fn(u32) -> bool,
    taken: &mut Marks,
    out: &mut Vec<Scored>,
) {
    let Now { items, trending: live } = now;
    taken.begin(n_rows(generation, items));
    let start = out.len();
    let mut take = |out: &mut Vec<Scored>, rows: &[u32], scores: &[f32], until: usize, of: Option<(usize, u32)>| {
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
    let code = context.get(CATEGORY_KEY).and_then(|name| {
        let column = &generation.items.columns[generation.roles.category?];
        column.data.vocabulary()?.row(name)
    });
    if let Some(code) = code {
        let (rows, scores) = match live.and_then(|live| live.by_category.get(&code)) {
            Some(list) => (&list.rows[..], &list.scores[..]),
            None => generation.trending_by_category.of(code),
        };
        take(out, rows, scores, k.div_ceil(2), generation.roles.category.map(|column| (column, code)));
    }
    for (key, lists) in live.iter().flat_map(|live| &live.by_context) {
        if let Some(list) = context.get(key).and_then(|value| lists.get(value)) {
            let until = out.len() - start;
            let until = until + (k - until).div_ceil(2);
            take(out, &list.rows, &list.scores, until, None);
        }
    }
    let overall = live.map_or(&generation.trending, |live| &live.overall);
    take(out, &overall.rows, &overall.scores, k, None);
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;

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
        let run = |live: Option<&LiveTrending>, pairs: &[(&str, &str)], k, without: u32| {
            let (mut context, mut out) = (Context::default(), Vec::new());
            context.assign(pairs);
            let now = Now { items: None, trending: live };
            retrieve(&generation, now, &context, k, &|row| row != without, &mut Marks::default(), &mut out);
            out.iter().map(|s| s.row).collect::<Vec<_>>()
        };
        assert_eq!(run(None, &[], 3, 0), [2, 1, 3]);
        assert_eq!(run(None, &[("category", "c1")], 4, 0), [2, 3, 1, 4]);
        assert_eq!(run(None, &[("category", "nope")], 2, 0), [2, 1]);
        let list = |rows: Vec<u32>| RankedList { scores: vec![1.0; rows.len()].into(), rows: rows.into() };
        let fr = [("fr".to_owned(), Arc::new(list(vec![2, 0, 1])))];
        let live = LiveTrending {
            overall: list(vec![5, 4, 3]),
            by_category: [(1, list(vec![3]))].into(),
            by_context: vec![("country".into(), fr.into()), ("device".into(), HashMap::new())],
        };
        let live = Some(&live);
        assert_eq!(run(live, &[], 2, 9), [5, 4]);
        assert_eq!(run(live, &[("category", "c1")], 4, 9), [3, 5, 4]);
        assert_eq!(run(live, &[("category", "c0")], 4, 9), [0, 1, 5, 4]);
        assert_eq!(run(live, &[("country", "fr"), ("device", "tv")], 4, 9), [2, 0, 5, 4]);
        assert!(run(live, &[("country", "fr")], 0, 9).is_empty());
        // Half for the category, a quarter for the country.
        assert_eq!(run(live, &[("country", "fr"), ("category", "c0")], 4, 9), [0, 1, 2, 5]);
        assert_eq!(run(live, &[("country", "de")], 2, 9), [5, 4]);
    }
}
