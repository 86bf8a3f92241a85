//! What changed of items since the bundle was built, as it stands at one moment.
//!
//! A snapshot never changes; a new one shares with the one before all that no change touched. A call takes one when it is planned and
//! keeps it to its answer.

use super::generation::IdTable;
use crate::index::live::States;

/// Marks the state of an item that must not be shown.
const GONE: u32 = 1 << 31;

/// One state of all items; see the module.
#[derive(Clone, Debug, Default)]
pub struct LiveItems {
    /// By row: 0 where it is as in the bundle.
    states: States,
    n_gone: usize,
}

impl LiveItems {
    /// Whether `row` must not be shown.
    #[inline]
    pub fn is_gone(&self, row: u32) -> bool {
        self.states.get(row) & GONE > 0
    }

    /// Items that must not be shown.
    pub fn n_gone(&self) -> usize {
        self.n_gone
    }

    /// Sets whether `row` may be shown; says whether that changed.
    pub fn set_gone(&mut self, row: u32, gone: bool) -> bool {
        let changes = self.is_gone(row) != gone;
        if changes {
            self.states.set(row, self.states.get(row) ^ GONE);
            self.n_gone = if gone { self.n_gone + 1 } else { self.n_gone - 1 };
        }
        changes
    }
}

/// Whether any of `rows` must not be shown.
pub fn any_gone(items: Option<&LiveItems>, rows: impl IntoIterator<Item = u32>) -> bool {
    items.is_some_and(|items| items.n_gone > 0 && rows.into_iter().any(|row| items.is_gone(row)))
}

/// The row of an item that may be shown.
pub fn row_of(ids: &IdTable, items: Option<&LiveItems>, id: &str) -> Option<u32> {
    ids.row(id).filter(|&row| items.is_none_or(|items| !items.is_gone(row)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_stays_as_it_was() {
        let mut items = LiveItems::default();
        assert!(items.set_gone(5000, true) && !items.set_gone(5000, true));
        let before = items.clone();
        assert!(items.set_gone(5000, false) && items.set_gone(3, true));
        assert_eq!((before.is_gone(5000), before.is_gone(3), before.n_gone()), (true, false, 1));
        assert_eq!((items.is_gone(5000), items.is_gone(3), items.n_gone()), (false, true, 1));
        assert!(!items.is_gone(u32::MAX));
        assert!(any_gone(Some(&before), [1, 5000]) && !any_gone(Some(&items), [1, 5000]) && !any_gone(None, [1]));
    }
}
