//! Caps: at most so many items of one attribute value in a slate.

use crate::catalog::generation::ColumnData;
use crate::catalog::live::LiveItems;

/// One cap.
#[derive(Clone, Copy)]
pub struct Cap<'a> {
    /// Whose values are counted.
    pub column: &'a ColumnData,
    /// Its position.
    pub at: usize,
    /// Items that came or changed.
    pub items: Option<&'a LiveItems>,
    /// Items per value.
    pub max: u32,
    /// Of several values only the first counts: an item's category is one.
    pub first_only: bool,
}

/// How often each code is there.
pub type Counts = Vec<(u32, u32)>;

impl Cap<'_> {
    fn codes(&self, row: u32) -> &[u32] {
        let codes = match self.items.and_then(|items| items.get(row)) {
            Some(item) => item.codes(self.at),
            None => self.column.codes(row),
        };
        if self.first_only { codes.get(..1).unwrap_or_default() } else { codes }
    }

    /// Whether one more item like `row` is within the cap; an item without a value always is.
    pub fn admits(&self, row: u32, counts: &Counts) -> bool {
        let count_of = |code| counts.iter().find(|(c, _)| *c == code).map_or(0, |c| c.1);
        self.codes(row).iter().all(|&code| count_of(code) < self.max)
    }

    /// Counts `row`.
    pub fn count(&self, row: u32, counts: &mut Counts) {
        for &code in self.codes(row) {
            match counts.iter_mut().find(|(c, _)| *c == code) {
                Some((_, count)) => *count += 1,
                None => counts.push((code, 1)),
            }
        }
    }
}
