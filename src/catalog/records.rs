//! Codes of several item columns, side by side by item: what features read of a candidate lies in one or two cache lines
//! instead of one or two per column.

use crate::catalog::generation::Entities;
use crate::memory::{prefetch, prefetch_range};

/// Part of a record: the codes that a column has for the item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Field {
    /// Position in [`Entities::columns`]; a column that has codes.
    pub column: usize,
    /// Only the first of a list.
    pub first_only: bool,
}

/// A copy of some columns, by item: per field the number of codes, then the codes.
#[derive(Debug)]
pub struct Records {
    fields: Vec<Field>,
    /// `[n_items + 1]` in `values`.
    offsets: Vec<u32>,
    values: Values,
}

/// The numbers of all records, one after another.
#[derive(Debug)]
pub enum Values {
    /// Where all fit.
    Narrow(Vec<u16>),
    /// Elsewhere.
    Wide(Vec<u32>),
}

/// A number of a record.
pub trait Value: Copy + Into<u32> {
    /// Sum of what a table that is indexed by code has for `codes`.
    ///
    /// # Panics
    /// If a code is out of range.
    fn sum(table: &[u32], codes: &[Self]) -> u32;
}

impl Value for u16 {
    #[inline(always)]
    fn sum(table: &[u32], codes: &[Self]) -> u32 {
        // Where no code can be out of range, none is checked.
        match table.first_chunk::<{ 1 << 16 }>() {
            Some(table) => codes.iter().map(|&code| table[usize::from(code)]).sum(),
            None => codes.iter().map(|&code| table[usize::from(code)]).sum(),
        }
    }
}

impl Value for u32 {
    #[inline(always)]
    fn sum(table: &[u32], codes: &[Self]) -> u32 {
        codes.iter().map(|&code| table[code as usize]).sum()
    }
}

impl Records {
    /// Copies `fields`, sorted and each once. Empty where that would be more than 2^32 numbers.
    pub fn new(items: &Entities, mut fields: Vec<Field>) -> Self {
        fields.sort_unstable();
        fields.dedup();
        let codes = |field: &Field, row: u32| {
            let codes = items.columns[field.column].data.codes(row);
            if field.first_only { &codes[..codes.len().min(1)] } else { codes }
        };
        let vocabulary = |field: &Field| items.columns[field.column].data.vocabulary().map_or(0, |v| v.len());
        let mut most = fields.iter().map(vocabulary).max().unwrap_or(0);
        let mut offsets = vec![0];
        let mut end = 0u64;
        for row in 0..if fields.is_empty() { 0 } else { items.len() as u32 } {
            for field in &fields {
                let n = codes(field, row).len();
                most = most.max(n);
                end += 1 + n as u64;
            }
            let Ok(end) = u32::try_from(end) else {
                return Records { fields: Vec::new(), offsets: vec![0], values: Values::Narrow(Vec::new()) };
            };
            offsets.push(end);
        }
        let rows = 0..offsets.len() as u32 - 1;
        let all = rows.flat_map(|row| {
            let of_field = move |field| {
                let codes = codes(field, row);
                std::iter::once(codes.len() as u32).chain(codes.iter().copied())
            };
            fields.iter().flat_map(of_field)
        });
        let values = match u16::try_from(most) {
            Ok(_) => Values::Narrow(all.map(|value| value as u16).collect()),
            Err(_) => Values::Wide(all.collect()),
        };
        Records { fields, offsets, values }
    }

    /// Where in a record the field is, counted in fields.
    pub fn position(&self, field: Field) -> Option<usize> {
        self.fields.iter().position(|f| *f == field)
    }

    /// The numbers, for [`Self::of`].
    pub fn values(&self) -> &Values {
        &self.values
    }

    /// The record of `row`, from [`Self::values`].
    ///
    /// # Panics
    /// If `row` is out of range.
    #[inline(always)]
    pub fn of<'a, V: Value>(&self, values: &'a [V], row: u32) -> Record<'a, V> {
        Record(&values[self.offsets[row as usize] as usize..self.offsets[row as usize + 1] as usize])
    }

    /// Asks the memory for the record `soon`, and for where that of `later` is.
    #[inline(always)]
    pub fn prefetch_ahead<V: Value>(&self, values: &[V], soon: Option<&u32>, later: Option<&u32>) {
        if let Some(&row) = later {
            prefetch(&self.offsets, row as usize);
        }
        if let Some(&row) = soon {
            prefetch_range(values, self.offsets[row as usize] as usize..self.offsets[row as usize + 1] as usize);
        }
    }

    /// Memory, bytes.
    pub fn bytes(&self) -> usize {
        let values = match &self.values {
            Values::Narrow(values) => size_of_val(&values[..]),
            Values::Wide(values) => size_of_val(&values[..]),
        };
        values + size_of_val(&self.offsets[..])
    }
}

/// What is left of a record, from the current field on.
#[derive(Clone, Copy)]
pub struct Record<'a, V>(&'a [V]);

impl<'a, V: Value> Record<'a, V> {
    /// The codes of the current field.
    #[inline(always)]
    pub fn codes(&self) -> &'a [V] {
        &self.0[1..=self.0[0].into() as usize]
    }

    /// Goes on to the next field.
    #[inline(always)]
    pub fn advance(&mut self) {
        self.0 = &self.0[1 + self.0[0].into() as usize..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::generation::{NO_CODE, testing};
    use proptest::prelude::*;

    fn check<V: Value>(items: &Entities, records: &Records, values: &[V]) {
        for row in 0..items.len() as u32 {
            let mut record = records.of(values, row);
            for field in &records.fields {
                let codes = items.columns[field.column].data.codes(row);
                let want = if field.first_only { &codes[..codes.len().min(1)] } else { codes };
                let got: Vec<u32> = record.codes().iter().map(|&code| code.into()).collect();
                assert_eq!(got, want);
                record.advance();
            }
        }
    }

    proptest! {
        #[test]
        fn hold_what_the_columns_hold(
            rows in prop::collection::vec((prop::collection::vec(0u32..40, 0..6), 0u32..9), 1..20), wide in any::<bool>(),
        ) {
            let mut generation = testing::plain(rows.len());
            let code = |code: u32| if code == 8 { NO_CODE } else if wide { code * 10_000 } else { code };
            testing::add_tags(&mut generation, "tags", &rows.iter().map(|r| r.0.clone()).collect::<Vec<_>>());
            testing::add_category(&mut generation, "genre", &rows.iter().map(|r| code(r.1)).collect::<Vec<_>>());
            let field = |column, first_only| Field { column, first_only };
            let fields = vec![field(1, false), field(0, true), field(0, false), field(0, true)];
            let records = Records::new(&generation.items, fields);
            prop_assert_eq!(records.fields.len(), 3);
            prop_assert_eq!(records.position(field(1, true)), None);
            match records.values() {
                Values::Narrow(values) => check(&generation.items, &records, values),
                Values::Wide(values) => check(&generation.items, &records, values),
            }
        }
    }
}
