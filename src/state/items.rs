//! Items as records of the log change them.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, OnceLock};

use xxhash_rust::xxh3::xxh3_64;

use super::change::{Change, Encoder, Kind, OwnedValue, Value};
use crate::catalog::generation::{ColumnData, Generation, Matrix, MatrixData};
use crate::catalog::live::{Cell, LiveItem, LiveItems, extend_vector};
use crate::catalog::live_text::LiveText;
use crate::index::live::{self, LiveIndex, Policy};
use crate::index::{BruteForce, IndexOptions, Kernel, SearchParams};

/// What became of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    /// It is in force.
    Applied,
    /// So it is, and was not known before.
    Created,
    /// Nobody knows the id.
    Unknown,
}

/// What upserts said of an item.
#[derive(Debug, Default)]
struct Given {
    /// By name, also of columns that this bundle does not have.
    columns: BTreeMap<Box<str>, OwnedValue>,
    /// How often it came back after it was deleted: results from before are not those from after.
    returned: u32,
    digest: u64,
    bytes: usize,
}

/// The newest state of all items, for one thread that changes it.
#[derive(Debug)]
pub struct Catalogue {
    now: LiveItems,
    changed: bool,
    /// By row.
    given: HashMap<u32, Given>,
    /// Over the vectors that came, where the bundle has embeddings.
    index: Option<Arc<LiveIndex>>,
    /// What it does not know yet.
    vectors: Vec<live::Change>,
    /// Words that no snapshot knows yet.
    texts: Vec<(u32, Arc<LiveText>)>,
    kernel: Kernel,
}

impl Catalogue {
    /// All as in the bundle.
    pub fn new(generation: &Generation) -> Self {
        let kernel = Kernel::detect();
        let index = generation.item_embeddings.as_ref().map(|items| {
            let empty = Matrix { dim: items.dim, data: MatrixData::F32(Vec::new().into()) };
            let none = Arc::new(BruteForce::new(empty.clone(), generation.metric, kernel));
            let policy = Policy { side_rows: 2048, ..Policy::of(0) };
            // Exact, so that what came is found as surely as an exact scan finds it.
            let options = IndexOptions::BruteForce {};
            Arc::new(LiveIndex::new(none, empty, generation.metric, options, SearchParams::default(), policy))
        });
        Catalogue {
            now: LiveItems::new(generation.items.len()),
            changed: false,
            given: HashMap::new(),
            index,
            vectors: Vec::new(),
            texts: Vec::new(),
            kernel,
        }
    }

    /// The index over the vectors that came: somebody has to compact it.
    pub fn index(&self) -> Option<&Arc<LiveIndex>> {
        self.index.as_ref()
    }

    /// Items that came or changed.
    pub fn len(&self) -> usize {
        self.now.n_entries()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether an upsert of the id takes no further room.
    pub fn has(&self, generation: &Generation, id: &str) -> bool {
        generation.items.ids.row(id).is_some_and(|row| self.now.get(row).is_some())
    }

    /// Whether `row` is an item's, deleted or not.
    pub fn knows(&self, generation: &Generation, row: u32) -> bool {
        (row as usize) < generation.items.len() || self.now.get(row).is_some()
    }

    /// Whether an upsert would change nothing. Of columns of which the bundle keeps no more than the words it can't be told before they were
    /// upserted once.
    pub fn holds(&self, generation: &Generation, change: &Change<'_>) -> bool {
        let row = generation.items.ids.row(change.id).filter(|&row| self.knows(generation, row));
        let Some(row) = row.filter(|&row| self.now.is_deleted(row) == (change.available == Some(false))) else {
            return false;
        };
        let (given, in_bundle) = (self.given.get(&row), (row as usize) < generation.items.len());
        let same = |(name, value): &(&str, Value<'_>)| match given.and_then(|given| given.columns.get(*name)) {
            Some(held) => *held == OwnedValue::of(value),
            None => in_bundle && generation.items.column(name).is_some_and(|column| says(&column.data, row, value)),
        };
        let mut own = Vec::new();
        change.columns.iter().all(same)
            && change
                .vector
                .is_none_or(|vector| extend_vector(generation, Some(&self.now), row, &mut own) && own == vector)
    }

    /// Takes an item away.
    pub fn delete(&mut self, generation: &Generation, change: &Change<'_>) -> Changed {
        let row = generation.items.ids.row(change.id).filter(|&row| self.knows(generation, row));
        let Some(row) = row else { return Changed::Unknown };
        if !self.now.set_gone(row, true) {
            return Changed::Unknown;
        }
        self.changed = true;
        Changed::Applied
    }

    /// Makes an item come or change.
    pub fn upsert(&mut self, generation: &Generation, change: &Change<'_>) -> Changed {
        let Some(row) = generation.items.ids.give(change.id) else { return Changed::Unknown };
        let in_bundle = (row as usize) < generation.items.len();
        let before = self.now.get(row);
        let was_entry = before.is_some();
        let (was_known, was_gone) = (in_bundle || was_entry, self.now.is_deleted(row));
        let given = self.given.entry(row).or_default();
        if change.whole {
            given.columns.clear();
        }
        for (name, value) in change.columns {
            given.columns.insert((*name).into(), OwnedValue::of(value));
        }
        let dim = generation.item_embeddings.as_ref().map(|items| items.dim);
        let fresh = change.vector.filter(|vector| Some(vector.len()) == dim);
        let held = before.and_then(|before| before.vector.clone());
        let had_vector = held.is_some();
        let vector: Option<Box<[f32]>> = fresh.map(Into::into).or(held.filter(|_| !change.whole));
        let says_text =
            change.whole || change.columns.iter().any(|(name, _)| generation.text_columns.iter().any(|c| c == name));
        let held_text = before.and_then(|before| before.text.clone());
        let text = match &generation.text {
            Some(_) if was_entry && !says_text => held_text,
            Some(index)
                if !in_bundle || generation.text_columns.iter().any(|name| given.columns.contains_key(&**name)) =>
            {
                Some(Arc::new(index.analyse(&texts(generation, given, row, in_bundle))))
            }
            _ => None,
        };
        let is_gone = change.available == Some(false);
        given.returned += u32::from(was_gone && !is_gone);
        let bytes = given.columns.iter().map(|(name, value)| 64 + name.len() + value.bytes()).sum::<usize>();
        let bytes = 128
            + bytes
            + generation.items.columns.len() * size_of::<Cell>()
            + vector.as_ref().map_or(0, |v| 12 * v.len())
            + text.as_ref().map_or(0, |text| 3 * text.bytes());
        let total = self.now.bytes() + bytes - std::mem::replace(&mut given.bytes, bytes);
        self.now.set_bytes(total);
        let digest = digest(change.id, given, vector.as_deref());
        let total = self.now.digest().wrapping_sub(std::mem::replace(&mut given.digest, digest)).wrapping_add(digest);
        self.now.set_digest(total);
        // What only comes back is as it was.
        if was_entry || !in_bundle || !given.columns.is_empty() || vector.is_some() {
            let cells = generation.items.columns.iter().map(|column| {
                let given = given.columns.get(&*column.name).and_then(|value| cell(&column.data, value));
                given.unwrap_or_else(|| of_bundle(&column.data, row, in_bundle))
            });
            let norm = vector.as_ref().map_or(0.0, |vector| self.kernel.dot(vector, vector).sqrt());
            let inverse_norm = if norm > 0.0 { 1.0 / norm } else { 0.0 };
            match fresh {
                Some(fresh) => self.vectors.push(live::Change::Upsert { row, vector: fresh.to_vec() }),
                // Else it would still be found by what it had.
                None if had_vector && vector.is_none() => self.vectors.push(live::Change::Delete { row }),
                None => {}
            }
            let lines = generation.rankers.iter().map(|_| OnceLock::new()).collect();
            if let Some(text) = &text {
                self.texts.push((row, text.clone()));
            }
            self.now.put(row, Arc::new(LiveItem { cells: cells.collect(), vector, inverse_norm, lines, text }));
        }
        self.now.set_gone(row, is_gone);
        self.changed = true;
        if was_known && !was_gone { Changed::Applied } else { Changed::Created }
    }

    /// The state, if it changed since the last call.
    pub fn take_changed(&mut self) -> Option<LiveItems> {
        if let Some(index) = &self.index {
            if !self.vectors.is_empty() {
                if let Err(error) = index.apply(&std::mem::take(&mut self.vectors)) {
                    tracing::error!(%error, "vectors of items that were upserted can't be searched");
                }
                self.changed = true;
            }
            let view = index.view();
            // Compaction gives another one, which holds the same.
            if self.now.vectors().map_or(!view.is_empty(), |held| !Arc::ptr_eq(held, &view)) {
                self.now.set_vectors(view);
                self.changed = true;
            }
        }
        if !self.texts.is_empty() {
            self.now.add_texts(std::mem::take(&mut self.texts));
        }
        std::mem::take(&mut self.changed).then(|| self.now.clone())
    }

    /// Hands over records that say all of it anew, of about `bytes` each.
    pub fn carry(&self, generation: &Generation, bytes: usize, mut take: impl FnMut(Vec<u8>)) {
        let mut upserts = Encoder::carrying(Kind::UpsertItems);
        let mut deletions = Encoder::carrying(Kind::DeleteItems);
        let mut pass_on = |encoder: &mut Encoder, kind: Kind, least: usize| {
            if !encoder.is_empty() && encoder.len() >= least {
                take(std::mem::replace(encoder, Encoder::carrying(kind)).record());
            }
        };
        // In the order of rows: it is that of replays, and rows are given again in it.
        for row in 0..self.now.n_rows() {
            let (item, given, gone) = (self.now.get(row), self.given.get(&row), self.now.is_deleted(row));
            let id = || generation.items.ids.id(row);
            // What was within the limits once is so again.
            if item.is_some() || given.is_some() {
                let columns = given.into_iter().flat_map(|given| &given.columns);
                let columns: Vec<_> = columns.map(|(name, value)| (&**name, value.value())).collect();
                let vector = item.and_then(|item| item.vector.as_deref());
                let available = gone.then_some(false);
                let _ = upserts.push(&Change { id: id(), available, whole: true, columns: &columns, vector });
                pass_on(&mut upserts, Kind::UpsertItems, bytes);
            } else if gone {
                let _ = deletions.push(&Change::of(id()));
                pass_on(&mut deletions, Kind::DeleteItems, bytes);
            }
        }
        pass_on(&mut upserts, Kind::UpsertItems, 0);
        pass_on(&mut deletions, Kind::DeleteItems, 0);
    }
}

/// By text column, what was given, or else what the bundle has of it.
fn texts(generation: &Generation, given: &Given, row: u32, in_bundle: bool) -> Vec<String> {
    let of_bundle = |name: &str| {
        let column = &generation.items.column(name)?.data;
        let text = |code: &u32| Some(column.vocabulary()?.id(*code));
        let codes = if in_bundle { column.codes(row) } else { &[] };
        Some(codes.iter().filter_map(text).collect::<Vec<_>>().join(" "))
    };
    let columns = generation.text_columns.iter().map(|name| match given.columns.get(&**name) {
        Some(OwnedValue::Text(text)) => text.to_string(),
        Some(OwnedValue::List(list)) => list.join(" "),
        Some(_) => String::new(),
        None => of_bundle(name).unwrap_or_default(),
    });
    columns.collect()
}

/// Names what was given; never 0.
fn digest(id: &str, given: &Given, vector: Option<&[f32]>) -> u64 {
    let mut encoder = Encoder::carrying(Kind::UpsertItems);
    let columns: Vec<_> = given.columns.iter().map(|(name, value)| (&**name, value.value())).collect();
    let _ = encoder.push(&Change { columns: &columns, vector, ..Change::of(id) });
    let mut record = encoder.record();
    record.extend_from_slice(&given.returned.to_le_bytes());
    xxh3_64(&record).max(1)
}

/// A value as the column has it; `None` where it does not fit, as it may over another bundle.
fn cell(column: &ColumnData, value: &OwnedValue) -> Option<Cell> {
    let code = |vocabulary: &crate::catalog::generation::IdTable, text: &str| vocabulary.give(text);
    Some(match (column, value) {
        (ColumnData::Number { .. }, OwnedValue::Missing) => Cell::Number(f32::NAN),
        (_, OwnedValue::Missing) => Cell::Codes(Default::default()),
        (ColumnData::Number { .. }, OwnedValue::Number(number)) => Cell::Number(*number as f32),
        (ColumnData::Category { vocabulary, .. }, OwnedValue::Text(text)) => {
            Cell::Codes(code(vocabulary, text).into_iter().collect())
        }
        (ColumnData::Tags { vocabulary, .. }, OwnedValue::List(list)) => {
            Cell::Codes(list.iter().filter_map(|text| code(vocabulary, text)).collect())
        }
        _ => return None,
    })
}

/// Whether the bundle's column has that value.
fn says(column: &ColumnData, row: u32, value: &Value<'_>) -> bool {
    let is = |codes: &[u32], texts: &[&str]| {
        let id = |code: &u32| column.vocabulary().map(|vocabulary| vocabulary.id(*code));
        codes.iter().map(id).eq(texts.iter().map(|text| Some(*text)))
    };
    match (column, value) {
        (ColumnData::Number { values, .. }, Value::Number(number)) => values[row as usize] == *number as f32,
        (ColumnData::Number { values, .. }, Value::Missing) => values[row as usize].is_nan(),
        (ColumnData::Category { .. } | ColumnData::Tags { .. }, Value::Missing) => column.codes(row).is_empty(),
        (ColumnData::Category { .. }, Value::Text(text)) => is(column.codes(row), &[text]),
        (ColumnData::Tags { .. }, Value::List(list)) => is(column.codes(row), list),
        _ => false,
    }
}

/// What the bundle's column has; nothing for an item that the bundle does not have.
fn of_bundle(column: &ColumnData, row: u32, in_bundle: bool) -> Cell {
    match column {
        ColumnData::Number { values, .. } => Cell::Number(if in_bundle { values[row as usize] } else { f32::NAN }),
        _ if in_bundle => Cell::Codes(column.codes(row).into()),
        _ => Cell::Codes(Default::default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::candidates::Scored;
    use crate::catalog::generation::testing;
    use crate::index::{Filter, Overlay, SearchScratch, VectorIndex, build};

    #[test]
    fn what_is_replaced_without_a_vector_is_not_found_by_the_one_it_had() {
        let generation = testing::with_embeddings(vec![1.0, 0.0, 0.0, 1.0], 2);
        let embeddings = generation.item_embeddings.as_ref().unwrap();
        let base = build(&IndexOptions::BruteForce {}, embeddings, generation.metric, &|_, _, _| {}).unwrap();
        let mut catalogue = Catalogue::new(&generation);
        let mut after = |changes: &[Change<'_>]| {
            for change in changes {
                assert_ne!(catalogue.upsert(&generation, change), Changed::Unknown);
            }
            let items = catalogue.take_changed().unwrap();
            let (mut found, mut scores, mut scratch) = (Vec::new(), Vec::new(), SearchScratch::default());
            let overlay = Overlay::new(&*base, 2, &items);
            overlay.search(&[2.0, 3.0], 9, Filter::ALL, &SearchParams::default(), &mut scratch, &mut found);
            overlay.scores(&[2.0, 3.0], &[0, 1, 2], &mut scratch, &mut scores);
            (found.iter().map(|Scored { row, score }| (*row, *score)).collect::<Vec<_>>(), scores)
        };
        let with = |id, vector| Change { id, vector: Some(vector), ..Change::default() };
        let without = |id| Change { id, whole: true, ..Change::default() };
        let (first, second) = ([4.0, 0.0], [0.0, 5.0]);
        let both = after(&[with("new", &first), with("0", &second)]);
        assert_eq!(both, (vec![(0, 15.0), (2, 8.0), (1, 3.0)], vec![15.0, 3.0, 8.0]));
        assert_eq!(after(&[Change::of("new"), Change::of("0")]), both, "an upsert that says nothing of it keeps it");
        // The bundle's is in force again for what the bundle has; what came later has none.
        let none = (vec![(1, 3.0), (0, 2.0)], vec![2.0, 3.0, 0.0]);
        assert_eq!(after(&[without("new"), without("0")]), none);
        assert_eq!(after(&[Change::of("new"), without("0")]), none);
        // The last of a batch counts.
        assert_eq!(after(&[without("new"), with("new", &first), with("0", &second), without("0")]).0[0], (2, 8.0));
        assert_eq!(after(&[with("new", &second), without("new")]), none);
    }
}
