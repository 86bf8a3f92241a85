//! What columns need to know of the user's history, gathered once per request.

use crate::catalog::generation::{ColumnData, Generation, Interaction};
use crate::catalog::live::LiveItems;

/// How many entries ahead of its use a column's value is asked for.
pub(super) const AHEAD: usize = 8;

/// A column of items, as it is of the bundle and of those that came or changed.
pub(super) struct ItemColumn<'a> {
    data: &'a ColumnData,
    at: usize,
    items: Option<&'a LiveItems>,
}

impl<'a> ItemColumn<'a> {
    /// The one at position `at`.
    pub(super) fn new(generation: &'a Generation, items: Option<&'a LiveItems>, at: usize) -> Self {
        ItemColumn { data: &generation.items.columns[at].data, at, items: items.filter(|items| items.n_entries() > 0) }
    }

    fn n_codes(&self) -> usize {
        self.data.vocabulary().map_or(0, |vocabulary| match self.items {
            Some(_) => vocabulary.len_with_more(),
            None => vocabulary.len(),
        })
    }

    #[inline(always)]
    fn codes(&self, row: u32) -> &'a [u32] {
        match self.items.and_then(|items| items.get(row)) {
            Some(item) => item.codes(self.at),
            None => self.data.codes(row),
        }
    }

    /// NaN where it is missing.
    #[inline(always)]
    fn number(&self, row: u32) -> f32 {
        match (self.items.and_then(|items| items.get(row)), self.data) {
            (Some(item), _) => item.number(self.at),
            (None, ColumnData::Number { values, .. }) => values[row as usize],
            _ => f32::NAN,
        }
    }

    fn prefetch_ahead(&self, soon: Option<u32>, later: Option<u32>) {
        // The bundle's columns do not reach to every row then.
        if self.items.is_none() {
            self.data.prefetch_ahead(soon, later);
        }
    }
}

/// Occurrences of codes in the history.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) by_code: Vec<u32>,
    touched: Vec<u32>,
}

impl Counts {
    /// Counts up to `most` codes of every liked entry.
    pub(super) fn gather(&mut self, column: &ItemColumn<'_>, history: &[Interaction], most: usize) {
        for code in self.touched.drain(..) {
            self.by_code[code as usize] = 0;
        }
        // Never less than a `u16` can index; memory that is not touched costs nothing.
        let n = column.n_codes().max(1 << 16);
        if self.by_code.len() < n {
            self.by_code.resize(n, 0);
        }
        for (at, entry) in history.iter().enumerate() {
            column.prefetch_ahead(history.get(at + AHEAD).map(|e| e.row), history.get(at + 2 * AHEAD).map(|e| e.row));
            let codes = column.codes(entry.row);
            for &code in codes.iter().take(if entry.weight > 0.0 { most } else { 0 }) {
                if self.by_code[code as usize] == 0 {
                    self.touched.push(code);
                }
                self.by_code[code as usize] += 1;
            }
        }
    }
}

/// What the history holds of series.
#[derive(Debug, Default)]
pub(crate) struct Series {
    /// By code: the entry's place plus one, 0 where there is none.
    places: Vec<u32>,
    entries: Vec<SeriesEntry>,
}

/// What it holds of one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SeriesEntry {
    /// The series.
    pub(crate) code: u32,
    /// The furthest in the history; NaN where none is known.
    pub(crate) position: f32,
    /// Liked entries.
    pub(crate) n_liked: u32,
}

impl Series {
    /// Of this history, in the place of what was there.
    pub(crate) fn gather(&mut self, columns: &SeriesColumns<'_>, history: &[Interaction]) {
        for entry in self.entries.drain(..) {
            self.places[entry.code as usize] = 0;
        }
        let n = columns.series.n_codes();
        if self.places.len() < n {
            self.places.resize(n, 0);
        }
        for liked in history {
            let Some(code) = columns.code(liked.row) else { continue };
            let place = &mut self.places[code as usize];
            if *place == 0 {
                self.entries.push(SeriesEntry { code, position: f32::NAN, n_liked: 0 });
                *place = self.entries.len() as u32;
            }
            let entry = &mut self.entries[*place as usize - 1];
            entry.position = entry.position.max(columns.position(liked.row));
            entry.n_liked += u32::from(liked.weight > 0.0);
        }
    }

    /// All series, in the order in which the history has them.
    pub(crate) fn entries(&self) -> &[SeriesEntry] {
        &self.entries
    }

    /// What the history holds of the series.
    #[inline(always)]
    pub(super) fn of(&self, code: u32) -> Option<SeriesEntry> {
        self.entries.get((self.places[code as usize] as usize).wrapping_sub(1)).copied()
    }
}

/// The columns that speak of series.
pub(crate) struct SeriesColumns<'a> {
    series: ItemColumn<'a>,
    positions: Option<ItemColumn<'a>>,
}

impl<'a> SeriesColumns<'a> {
    /// The generation's, where it has such.
    pub(crate) fn of(generation: &'a Generation, items: Option<&'a LiveItems>) -> Option<Self> {
        let data = |at: usize| ItemColumn::new(generation, items, at);
        Some(SeriesColumns {
            series: generation.roles.series.map(data)?,
            positions: generation.roles.series_position.map(data),
        })
    }

    /// The series of an item.
    pub(crate) fn code(&self, row: u32) -> Option<u32> {
        self.series.codes(row).first().copied()
    }

    /// Where in it the item stands; NaN where that is not known.
    pub(crate) fn position(&self, row: u32) -> f32 {
        self.positions.as_ref().map_or(f32::NAN, |positions| positions.number(row))
    }
}
