//! What columns need to know of the user's history, gathered once per request.

use crate::catalog::generation::{ColumnData, Generation, Interaction};

/// How many entries ahead of its use a column's value is asked for.
pub(super) const AHEAD: usize = 8;

/// Occurrences of codes in the history.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) by_code: Vec<u32>,
    touched: Vec<u32>,
}

impl Counts {
    /// Counts up to `most` codes of every liked entry.
    pub(super) fn gather(&mut self, column: &ColumnData, history: &[Interaction], most: usize) {
        for code in self.touched.drain(..) {
            self.by_code[code as usize] = 0;
        }
        let n = column.vocabulary().map_or(0, |v| v.len());
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
pub(super) struct Series {
    /// By code: the entry's place plus one, 0 where there is none.
    places: Vec<u32>,
    entries: Vec<SeriesEntry>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct SeriesEntry {
    code: u32,
    /// The furthest in the history; NaN where none is known.
    pub(super) position: f32,
    pub(super) n_liked: u32,
}

impl Series {
    pub(super) fn gather(&mut self, columns: &SeriesColumns<'_>, history: &[Interaction]) {
        for entry in self.entries.drain(..) {
            self.places[entry.code as usize] = 0;
        }
        let n = columns.series.vocabulary().map_or(0, |v| v.len());
        if self.places.len() < n {
            self.places.resize(n, 0);
        }
        for liked in history {
            let Some(&code) = columns.series.codes(liked.row).first() else { continue };
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

    /// What the history holds of the series.
    #[inline(always)]
    pub(super) fn of(&self, code: u32) -> Option<SeriesEntry> {
        self.entries.get((self.places[code as usize] as usize).wrapping_sub(1)).copied()
    }
}

/// The columns that speak of series.
pub(super) struct SeriesColumns<'a> {
    series: &'a ColumnData,
    positions: Option<&'a ColumnData>,
}

impl<'a> SeriesColumns<'a> {
    pub(super) fn of(generation: &'a Generation) -> Option<Self> {
        let data = |at: usize| &generation.items.columns[at].data;
        Some(SeriesColumns {
            series: generation.roles.series.map(data)?,
            positions: generation.roles.series_position.map(data),
        })
    }

    pub(super) fn position(&self, row: u32) -> f32 {
        match self.positions {
            Some(ColumnData::Number { values, .. }) => values[row as usize],
            _ => f32::NAN,
        }
    }
}
