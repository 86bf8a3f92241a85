//! One loaded bundle: everything immutable that a request reads.

use std::any::Any;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use half::f16;
use xxhash_rust::xxh3::xxh3_64;

use crate::catalog::array::Array;
use crate::catalog::conditions::FilterCache;
use crate::catalog::index::{IndexSpec, SharedIndex};
use crate::catalog::names::Names;
use crate::catalog::records::{Field, Records};
use crate::catalog::text::TextIndex;
use crate::index::{Searchers, VectorIndex};
use crate::memory::{prefetch, prefetch_range};
use crate::ranking::manifest::RankerManifest;
use crate::ranking::precision::Report;
use crate::state::fold_in::{FoldIn, FoldInParams};

/// A row that stands for "none".
pub const NO_ROW: u32 = u32::MAX;
/// A category code that stands for "missing".
pub const NO_CODE: u32 = u32::MAX;

/// One loaded bundle. Shared by `Arc`; rows are only meaningful together with their generation.
#[derive(Debug)]
pub struct Generation {
    /// Names the bundle in responses (`model_version`): the dataset's name and a content hash.
    pub version: String,
    /// The items.
    pub items: Entities,
    /// The users known at training time; may have no rows.
    pub users: Entities,
    /// What each user did, oldest first where times are known.
    pub histories: Histories,
    /// `[n_items, dim]`; absent without embeddings (the ANN source is off).
    pub item_embeddings: Option<Matrix>,
    /// `[n_users, dim]`.
    pub user_embeddings: Option<Matrix>,
    /// How embeddings compare.
    pub metric: Metric,
    /// Item to item, best first, at most 300 per item.
    pub collaborative: Lists,
    /// Decayed popularity over all items, best first.
    pub trending: RankedList,
    /// `[n_items]` decayed popularity of every item.
    pub popularity: Array<f32>,
    /// The same per code of the item category column; empty without one.
    pub trending_by_category: Lists,
    /// Words to items.
    pub text: Option<TextIndex>,
    /// The item columns that it is over, in its order; some may be no columns of [`Self::items`]. Empty where the bundle does not say.
    pub text_columns: Vec<String>,
    /// Rankers by name; the first is the default.
    pub rankers: Vec<RankerModel>,
    /// Which item columns play a part beyond being features.
    pub roles: Roles,
    /// See [`Generation::index`].
    pub(super) shared_index: SharedIndex,
    /// See [`Generation::filters`].
    pub(super) shared_filters: OnceLock<FilterCache>,
    /// See [`Generation::records`].
    pub(super) shared_records: OnceLock<Records>,
    /// See [`Generation::fold_in`].
    pub(super) shared_fold_in: OnceLock<Option<FoldIn>>,
    /// What a kind of device made of the rankers once, for all its workers.
    pub(crate) shared_rankers: OnceLock<Box<dyn Any + Send + Sync>>,
    /// How each ranker is computed, once the first worker has loaded them.
    pub(crate) ranker_reports: OnceLock<Vec<Report>>,
}

impl Generation {
    /// The index over the item embeddings, which all workers share; made by the first that asks, `None` without embeddings.
    pub fn index(&self) -> Option<Arc<dyn VectorIndex>> {
        self.shared_index.get(self.item_embeddings.as_ref(), self.metric)
    }

    /// How [`Self::index`] was made, in the bundle, and what it is searched with.
    pub fn index_spec(&self) -> &IndexSpec {
        self.shared_index.spec()
    }

    /// The same, if somebody has asked for it before: costs nothing.
    pub fn made_index(&self) -> Option<Arc<dyn VectorIndex>> {
        self.shared_index.made()
    }

    /// How often [`Self::index`] was exchanged: who keeps it asks for it anew when this has changed.
    pub fn index_changes(&self) -> u32 {
        self.shared_index.n_changes()
    }

    /// Puts another index over the same items in the place of [`Self::index`]. Searches that run keep the one that they began with.
    pub fn exchange_index(&self, index: Arc<dyn VectorIndex>) {
        self.shared_index.exchange(index);
    }

    /// Divides the index into `n_partitions` (1: none) and exchanges it: builds the new one while the old one serves. `searchers`
    /// search the partitions then.
    ///
    /// # Errors
    /// No embeddings, a number out of range, options that do not fit, or another call that is not done.
    pub fn rebalance(
        &self,
        n_partitions: u32,
        searchers: &Arc<Searchers>,
        progress: &(dyn Fn(&str, u64, u64) + Sync),
    ) -> Result<(), String> {
        let matrix = self.item_embeddings.as_ref().ok_or("the catalogue has no embeddings")?;
        self.shared_index.rebalance(matrix, self.metric, &self.items.ids, n_partitions, searchers, progress)
    }

    /// What computes users' vectors from histories, made by the first that asks and shared by all; `None` without embeddings.
    pub fn fold_in(&self, params: FoldInParams) -> Option<&FoldIn> {
        self.shared_fold_in.get_or_init(|| FoldIn::new(self, params)).as_ref()
    }

    /// The same, if it is there already.
    pub fn ready_fold_in(&self) -> Option<&FoldIn> {
        self.shared_fold_in.get().and_then(Option::as_ref)
    }

    /// The records of all items, which all workers share; the first that asks says what is in them.
    pub fn records(&self, fields: impl FnOnce() -> Vec<Field>) -> &Records {
        self.shared_records.get_or_init(|| Records::new(&self.items, fields()))
    }

    /// The bitmaps of filters, which all workers share; the first that asks says how many bytes they may take.
    pub fn filters(&self, capacity_bytes: u64) -> &FilterCache {
        self.shared_filters.get_or_init(|| FilterCache::new(capacity_bytes, self.items.len()))
    }

    /// How the ranker at `place` of [`Self::rankers`] is computed on the CPU, once a worker has loaded it.
    pub fn ranker_report(&self, place: usize) -> Option<&Report> {
        self.ranker_reports.get()?.get(place)
    }

    /// Memory of those bitmaps, bytes, about.
    pub fn filter_bytes(&self) -> u64 {
        self.shared_filters.get().map_or(0, FilterCache::bytes)
    }
}

/// How embeddings compare; higher scores are better for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// `<q, x>`
    InnerProduct,
    /// `<q, x> / |x||q|`
    Cosine,
    /// `-|q - x|²`
    L2,
}

/// Ids and columns of items or users.
#[derive(Debug, Default)]
pub struct Entities {
    /// Id to row and back.
    pub ids: IdTable,
    /// Columns by position; see [`Entities::column`].
    pub columns: Vec<Column>,
}

impl Entities {
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The column of that name.
    pub fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|c| c.name == name)
    }

    /// The position of the column of that name.
    pub fn column_index(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|c| c.name == name)
    }
}

/// Id strings and an open-addressing hash from id to row.
#[derive(Clone, Debug, Default)]
pub struct IdTable {
    /// `[n + 1]` ends of the ids in `bytes`.
    pub offsets: Array<u64>,
    /// The ids, UTF-8, one after another.
    pub bytes: Array<u8>,
    /// Power-of-two table of rows, [`NO_ROW`] where empty; linear probing from `xxh3_64(id)`.
    pub slots: Array<u32>,
    /// Whether the dataset's ids were integers; JSON answers then carry numbers.
    pub integer: bool,
    /// Ids that came later; their rows follow. They are no part of [`Self::len`].
    pub more: Arc<Names>,
}

impl IdTable {
    /// Builds the table.
    ///
    /// # Errors
    /// The row of the first id that was there before.
    pub fn build(ids: impl ExactSizeIterator<Item: AsRef<str>>, integer: bool) -> Result<Self, usize> {
        let n = ids.len();
        let mut offsets = Vec::with_capacity(n + 1);
        let mut bytes = Vec::new();
        offsets.push(0u64);
        for id in ids {
            bytes.extend_from_slice(id.as_ref().as_bytes());
            offsets.push(bytes.len() as u64);
        }
        let mut slots = vec![NO_ROW; (n * 2).next_power_of_two().max(2)];
        let mask = slots.len() - 1;
        let id_at = |row: usize| &bytes[offsets[row] as usize..offsets[row + 1] as usize];
        for row in 0..n {
            let mut slot = xxh3_64(id_at(row)) as usize & mask;
            while slots[slot] != NO_ROW {
                if id_at(slots[slot] as usize) == id_at(row) {
                    return Err(row);
                }
                slot = (slot + 1) & mask;
            }
            slots[slot] = row as u32;
        }
        Ok(IdTable { offsets: offsets.into(), bytes: bytes.into(), slots: slots.into(), integer, more: Arc::default() })
    }

    /// Number of ids, and of those that came later.
    pub fn len_with_more(&self) -> usize {
        self.len() + self.more.len() as usize
    }

    /// The row of an id, which is given the next one if it has none; `None` where rows end.
    pub fn give(&self, id: &str) -> Option<u32> {
        self.row(id).or_else(|| self.more.give(id)?.checked_add(self.len() as u32))
    }

    /// Number of ids.
    pub fn len(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The id of `row`.
    ///
    /// # Panics
    /// If `row` is out of range.
    pub fn id(&self, row: u32) -> &str {
        if let Some(later) = (row as usize).checked_sub(self.len()) {
            return self.more.get(later as u32).unwrap_or_else(|| panic!("no row {row} of ids"));
        }
        let bytes = &self.bytes[self.offsets[row as usize] as usize..self.offsets[row as usize + 1] as usize];
        std::str::from_utf8(bytes).unwrap_or("\u{fffd}")
    }

    /// The row of `id`.
    pub fn row(&self, id: &str) -> Option<u32> {
        let later = || self.more.number(id)?.checked_add(self.len() as u32);
        let Some(mask) = self.slots.len().checked_sub(1) else { return later() };
        let mut slot = xxh3_64(id.as_bytes()) as usize & mask;
        loop {
            match self.slots[slot] {
                NO_ROW => return later(),
                row if self.id(row) == id => return Some(row),
                _ => slot = (slot + 1) & mask,
            }
        }
    }
}

/// A named column.
#[derive(Clone, Debug)]
pub struct Column {
    /// As in the Parquet file.
    pub name: String,
    /// The values.
    pub data: ColumnData,
}

/// Values of a column, one entry per row.
#[derive(Clone, Debug)]
pub enum ColumnData {
    /// Numbers, booleans (0/1) and times (seconds); NaN where missing.
    Number {
        /// `[n]`
        values: Array<f32>,
        /// Stands in for a missing value and for an unknown user: the column's mean.
        default: f32,
    },
    /// Strings of few distinct values.
    Category {
        /// `[n]`, [`NO_CODE`] where missing.
        codes: Array<u32>,
        /// Code to string.
        vocabulary: Arc<IdTable>,
    },
    /// Lists of strings.
    Tags {
        /// `[n + 1]`
        offsets: Array<u64>,
        /// Codes of all rows, one after another.
        codes: Array<u32>,
        /// Code to string.
        vocabulary: Arc<IdTable>,
    },
}

impl ColumnData {
    /// The number at `row`, the default where it is missing; `None` for other kinds of column.
    pub fn number(&self, row: u32) -> Option<f32> {
        match self {
            ColumnData::Number { values, default } => {
                let value = values[row as usize];
                Some(if value.is_nan() { *default } else { value })
            }
            _ => None,
        }
    }

    /// The codes at `row`: none, one, or a list's.
    #[inline]
    pub fn codes(&self, row: u32) -> &[u32] {
        match self {
            ColumnData::Number { .. } => &[],
            ColumnData::Category { codes, .. } => match codes[row as usize] {
                NO_CODE => &[],
                _ => &codes[row as usize..=row as usize],
            },
            ColumnData::Tags { offsets, codes, .. } => {
                &codes[offsets[row as usize] as usize..offsets[row as usize + 1] as usize]
            }
        }
    }

    /// Asks the memory for what [`Self::codes`] or [`Self::number`] will read of the row `soon`, and for the place where it lies
    /// of the row `later`, which is to be `soon` some calls on.
    #[inline]
    pub fn prefetch_ahead(&self, soon: Option<u32>, later: Option<u32>) {
        let (soon, later) = (soon.map(|row| row as usize), later.map(|row| row as usize));
        match self {
            ColumnData::Number { values, .. } => later.into_iter().for_each(|row| prefetch(values, row)),
            ColumnData::Category { codes, .. } => later.into_iter().for_each(|row| prefetch(codes, row)),
            ColumnData::Tags { offsets, codes, .. } => {
                later.into_iter().for_each(|row| prefetch(offsets, row));
                if let Some(row) = soon {
                    prefetch_range(codes, offsets[row] as usize..offsets[row + 1] as usize);
                }
            }
        }
    }

    /// Code to string, for columns that have codes.
    pub fn vocabulary(&self) -> Option<&IdTable> {
        match self {
            ColumnData::Number { .. } => None,
            ColumnData::Category { vocabulary, .. } | ColumnData::Tags { vocabulary, .. } => Some(vocabulary),
        }
    }
}

/// Which item columns play a part beyond being features; positions in `items.columns`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Roles {
    /// Category or tags. The first code of a row is its category for features and the diversity cap; in trending per
    /// category a row stands under each of its codes.
    pub category: Option<usize>,
    /// Category or tags: author, brand, artist. "Same creator" features.
    pub creator: Option<usize>,
    /// Category: the series an item belongs to.
    pub series: Option<usize>,
    /// Number: the place in the series. "Next in series" features.
    pub series_position: Option<usize>,
    /// Category holding the display name.
    pub title: Option<usize>,
}

/// One entry of a history.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interaction {
    /// Item row.
    pub row: u32,
    /// Strength as `dataset.toml` maps it; 0: seen, but no sign of liking.
    pub weight: f32,
}

/// Per user, the items interacted with.
#[derive(Clone, Debug, Default)]
pub struct Histories {
    /// `[n_users + 1]`; empty when there are no users.
    pub offsets: Array<u64>,
    /// Item rows, oldest first where times are known, else in the order of the file.
    pub rows: Array<u32>,
    /// Weights.
    pub weights: Array<f32>,
}

impl Histories {
    /// The history of `user`, oldest first.
    pub fn of(&self, user: u32) -> impl ExactSizeIterator<Item = Interaction> + DoubleEndedIterator + '_ {
        let (from, to) = match (self.offsets.get(user as usize), self.offsets.get(user as usize + 1)) {
            (Some(&from), Some(&to)) => (from as usize, to as usize),
            _ => (0, 0),
        };
        self.rows[from..to].iter().zip(&self.weights[from..to]).map(|(&row, &weight)| Interaction { row, weight })
    }
}

/// Lists of scored rows, one list per key (compressed sparse rows), each best first.
#[derive(Clone, Debug, Default)]
pub struct Lists {
    /// `[n_keys + 1]`; empty when there are none.
    pub offsets: Array<u64>,
    /// Item rows.
    pub rows: Array<u32>,
    /// Scores, higher is better.
    pub scores: Array<f32>,
}

impl Lists {
    /// Where the list of `key` lies; empty for a key out of range.
    #[inline]
    fn range(&self, key: u32) -> std::ops::Range<usize> {
        match (self.offsets.get(key as usize), self.offsets.get(key as usize + 1)) {
            (Some(&from), Some(&to)) => from as usize..to as usize,
            _ => 0..0,
        }
    }

    /// Asks the memory for the list of `key`, for [`Self::of`] later.
    pub fn prefetch(&self, key: u32) {
        prefetch_range(&self.rows, self.range(key));
        prefetch_range(&self.scores, self.range(key));
    }

    /// The list of `key`: rows and scores; empty for a key out of range.
    #[inline]
    pub fn of(&self, key: u32) -> (&[u32], &[f32]) {
        (&self.rows[self.range(key)], &self.scores[self.range(key)])
    }
}

/// One list of scored rows, best first.
#[derive(Clone, Debug, Default)]
pub struct RankedList {
    /// Item rows.
    pub rows: Array<u32>,
    /// Scores.
    pub scores: Array<f32>,
}

/// A row-major matrix, f32 or f16.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// Columns.
    pub dim: usize,
    /// `[n, dim]`
    pub data: MatrixData,
}

/// The storage of a [`Matrix`].
#[derive(Clone, Debug)]
pub enum MatrixData {
    /// 4 bytes a value.
    F32(Array<f32>),
    /// 2 bytes a value.
    F16(Array<f16>),
}

impl Matrix {
    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        match &self.data {
            MatrixData::F32(values) => values.len() / self.dim.max(1),
            MatrixData::F16(values) => values.len() / self.dim.max(1),
        }
    }

    /// Appends row `row` to `out` as f32.
    ///
    /// # Panics
    /// If `row` is out of range.
    pub fn extend_row(&self, row: u32, out: &mut Vec<f32>) {
        let range = row as usize * self.dim..(row as usize + 1) * self.dim;
        match &self.data {
            MatrixData::F32(values) => out.extend_from_slice(&values[range]),
            MatrixData::F16(values) => out.extend(values[range].iter().map(|v| v.to_f32())),
        }
    }
}

/// A ranker as it lies in the bundle.
#[derive(Clone, Debug)]
pub struct RankerModel {
    /// File stem.
    pub name: String,
    /// What it wants and gives.
    pub manifest: RankerManifest,
    /// The ONNX file.
    pub onnx: PathBuf,
}

/// Small generations for tests of other rooms.
#[cfg(test)]
pub mod testing {
    use super::*;
    use crate::catalog::live::{Cell, LiveItem, LiveItems, extend_vector};
    use crate::index::live::{Change, LiveIndex, Policy};
    use crate::index::{BruteForce, IndexOptions, Kernel, SearchParams};

    /// `n` items with ids "0", "1", …; nothing else.
    pub fn plain(n: usize) -> Generation {
        let ids: Vec<String> = (0..n).map(|i| i.to_string()).collect();
        Generation {
            version: "test-0".into(),
            items: Entities { ids: IdTable::build(ids.iter(), true).unwrap(), columns: Vec::new() },
            users: Entities::default(),
            histories: Histories::default(),
            item_embeddings: None,
            user_embeddings: None,
            metric: Metric::InnerProduct,
            collaborative: Lists::default(),
            trending: RankedList::default(),
            popularity: Array::default(),
            trending_by_category: Lists::default(),
            text: None,
            text_columns: Vec::new(),
            rankers: Vec::new(),
            roles: Roles::default(),
            shared_index: SharedIndex::default(),
            shared_filters: OnceLock::new(),
            shared_records: OnceLock::new(),
            shared_fold_in: OnceLock::new(),
            shared_rankers: OnceLock::new(),
            ranker_reports: OnceLock::new(),
        }
    }

    /// Items with the given vectors, `[n, dim]`.
    pub fn with_embeddings(vectors: Vec<f32>, dim: usize) -> Generation {
        let mut generation = plain(vectors.len() / dim);
        generation.item_embeddings = Some(Matrix { dim, data: MatrixData::F32(vectors.into()) });
        generation
    }

    /// Says that the index was made so; what the CPU searches stays the exact one.
    pub fn set_index_options(generation: &mut Generation, options: IndexOptions) {
        generation.shared_index = SharedIndex::new(IndexSpec::new(options, 1), None);
    }

    /// The values "c0", "c1", … up to the highest of `codes`.
    fn vocabulary<'a>(codes: impl Iterator<Item = &'a u32>) -> Arc<IdTable> {
        let n = codes.filter(|code| **code != NO_CODE).max().map_or(0, |max| max + 1);
        let names: Vec<String> = (0..n).map(|code| format!("c{code}")).collect();
        Arc::new(IdTable::build(names.iter(), false).unwrap())
    }

    /// Adds a column of lists of the values "c0", "c1", ….
    pub fn add_tags(generation: &mut Generation, name: &str, lists: &[Vec<u32>]) {
        let ends = lists.iter().scan(0, |end, list| {
            *end += list.len() as u64;
            Some(*end)
        });
        let offsets: Vec<u64> = std::iter::once(0).chain(ends).collect();
        let vocabulary = vocabulary(lists.iter().flatten());
        let data = ColumnData::Tags { offsets: offsets.into(), codes: lists.concat().into(), vocabulary };
        generation.items.columns.push(Column { name: name.into(), data });
    }

    /// Adds a category column of values "c0", "c1", … and gives it the category role if it is the first.
    pub fn add_category(generation: &mut Generation, name: &str, codes: &[u32]) {
        let vocabulary = vocabulary(codes.iter());
        let data = ColumnData::Category { codes: codes.to_vec().into(), vocabulary };
        generation.items.columns.push(Column { name: name.into(), data });
        generation.roles.category.get_or_insert(generation.items.columns.len() - 1);
    }

    /// What makes `old` what `new` is, of which it has the first rows, columns and values.
    pub fn changes(old: &Generation, new: &Generation) -> LiveItems {
        let mut items = LiveItems::new(old.items.len());
        for (before, after) in old.items.columns.iter().zip(&new.items.columns) {
            if let (Some(before), Some(after)) = (before.data.vocabulary(), after.data.vocabulary()) {
                for code in before.len()..after.len() {
                    before.more.give(after.id(code as u32));
                }
            }
        }
        let vector = |of: &Generation, row: u32| {
            let mut vector = Vec::new();
            if (row as usize) < of.items.len() {
                extend_vector(of, None, row, &mut vector);
            }
            vector
        };
        let cells = |of: &Generation, row: u32| -> Box<[Cell]> {
            let cell = |column: &Column| match &column.data {
                ColumnData::Number { values, .. } => Cell::Number(values[row as usize]),
                data => Cell::Codes(data.codes(row).into()),
            };
            of.items.columns.iter().map(cell).collect()
        };
        let mut vectors = Vec::new();
        for row in 0..new.items.len() as u32 {
            let (now, known) = (vector(new, row), (row as usize) < old.items.len());
            let same = known && format!("{:?}", cells(old, row)) == format!("{:?}", cells(new, row));
            let other = now != vector(old, row);
            if !same || other {
                if !known {
                    old.items.ids.more.give(new.items.ids.id(row));
                }
                if other {
                    vectors.push(Change::Upsert { row, vector: now.clone() });
                }
                let vector = other.then(|| now.into_boxed_slice());
                items.put(
                    row,
                    Arc::new(LiveItem {
                        cells: cells(new, row),
                        vector,
                        inverse_norm: 1.0,
                        lines: old.rankers.iter().map(|_| OnceLock::new()).collect(),
                        text: None,
                    }),
                );
            }
        }
        if let Some(matrix) = &old.item_embeddings {
            let empty = Matrix { dim: matrix.dim, data: MatrixData::F32(Vec::new().into()) };
            let none = Arc::new(BruteForce::new(empty.clone(), old.metric, Kernel::detect()));
            let (options, policy) = (IndexOptions::BruteForce {}, Policy::of(0));
            let index = LiveIndex::new(none, empty, old.metric, options, SearchParams::default(), policy);
            index.apply(&vectors).unwrap();
            items.set_vectors(index.view());
        }
        items
    }

    /// Adds a number column.
    pub fn add_number(generation: &mut Generation, name: &str, values: &[f32]) {
        let data = ColumnData::Number { values: values.to_vec().into(), default: 0.0 };
        generation.items.columns.push(Column { name: name.into(), data });
    }
}
