//! What changed of items since the bundle was built, as it stands at one moment.
//!
//! A snapshot never changes; a new one shares with the one before all that no change touched. A call takes one when it is planned and
//! keeps it to its answer. A row belongs to one item for good: those of the bundle come first, items that came later follow, named by
//! [`IdTable::more`]. What is known of a row that changed lies in an entry of its own; arrays of the bundle do not reach that far, so
//! whoever reads one by row asks here first.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use smallvec::SmallVec;

use super::conditions::Test;
use super::generation::{Generation, IdTable};
use super::live_text::{LiveText, LiveTexts};
use crate::index::live::{PAGE, States, View};

/// Marks the state of an item that must not be shown; the rest of it is the place of its entry plus one, or 0.
const GONE: u32 = 1 << 31;
/// Entries that are copied together.
const CHUNK: usize = 64;

/// A value of an item's column.
#[derive(Clone, Debug, PartialEq)]
pub enum Cell {
    /// NaN where missing.
    Number(f32),
    /// As in [`super::generation::ColumnData::codes`].
    Codes(SmallVec<[u32; 4]>),
}

/// An item that changed. Immutable: a change makes another one.
#[derive(Debug, Default)]
pub struct LiveItem {
    /// By item column.
    pub cells: Box<[Cell]>,
    /// f32 `[dim]`, where one was upserted.
    pub vector: Option<Box<[f32]>>,
    /// `1 / |vector|`; 0 without one.
    pub inverse_norm: f32,
    /// By ranker: what its table would have of the item, once a worker has computed it.
    pub lines: Box<[OnceLock<Box<[f32]>>]>,
    /// What is searched of it, where that is not what the bundle's index has.
    pub text: Option<Arc<LiveText>>,
}

impl LiveItem {
    /// The number of a column; NaN where it is missing or holds no numbers.
    pub fn number(&self, column: usize) -> f32 {
        match self.cells.get(column) {
            Some(Cell::Number(number)) => *number,
            _ => f32::NAN,
        }
    }

    /// The codes of a column.
    pub fn codes(&self, column: usize) -> &[u32] {
        match self.cells.get(column) {
            Some(Cell::Codes(codes)) => codes,
            _ => &[],
        }
    }

    /// Whether it fulfils all of `tests`, each with the position of its column.
    pub fn passes(&self, tests: &[(u32, Test)]) -> bool {
        tests.iter().all(|(column, test)| test.holds(self.number(*column as usize), self.codes(*column as usize)))
    }
}

type Entries = Vec<Arc<Vec<(u32, Arc<LiveItem>)>>>;

/// One state of all items; see the module.
#[derive(Clone, Debug, Default)]
pub struct LiveItems {
    /// By row: 0 where it is as in the bundle.
    states: States,
    n_gone: usize,
    /// Rows and what is known of them, in the order in which they first changed.
    entries: Entries,
    n_entries: usize,
    n_bundle: u32,
    /// The bundle's and later ones.
    n_rows: u32,
    /// The vectors of [`Self::entries`].
    vectors: Option<Arc<View>>,
    /// Their words.
    texts: LiveTexts,
    digest: u64,
    bytes: usize,
}

impl LiveItems {
    /// All as in the bundle.
    pub fn new(n_bundle: usize) -> Self {
        LiveItems { n_bundle: n_bundle as u32, n_rows: n_bundle as u32, ..LiveItems::default() }
    }

    /// Rows that there are, also of what is gone.
    pub fn n_rows(&self) -> u32 {
        self.n_rows
    }

    /// Whether `row` must not be shown.
    #[inline]
    pub fn is_gone(&self, row: u32) -> bool {
        match self.states.get(row) {
            // A row of nobody: its name was given by who shares the generation.
            0 => row >= self.n_bundle,
            state => state & GONE > 0,
        }
    }

    /// Whether `row` was deleted.
    pub fn is_deleted(&self, row: u32) -> bool {
        self.states.get(row) & GONE > 0
    }

    /// Items that were deleted.
    pub fn n_gone(&self) -> usize {
        self.n_gone
    }

    /// Items that came or changed.
    pub fn n_entries(&self) -> usize {
        self.n_entries
    }

    /// What is known of `row`, where it came or changed.
    #[inline]
    pub fn get(&self, row: u32) -> Option<&LiveItem> {
        self.place(row).and_then(|place| self.entry(place)).map(|(_, item)| &**item)
    }

    /// The place of `row` among [`Self::entries`], where it came or changed: the same in every later snapshot.
    #[inline]
    pub fn place(&self, row: u32) -> Option<u32> {
        (self.states.get(row) & !GONE).checked_sub(1)
    }

    /// The row of the entry at a place, and what is known of it.
    #[inline]
    pub fn entry(&self, place: u32) -> Option<(u32, &Arc<LiveItem>)> {
        let (row, item) = self.entries.get(place as usize / CHUNK)?.get(place as usize % CHUNK)?;
        Some((*row, item))
    }

    /// Whether `row` is the bundle's and as it is there.
    pub fn is_bundle_s(&self, row: u32) -> bool {
        row < self.n_bundle && self.states.get(row) == 0
    }

    /// Rows outside of which nobody came, changed for the first time, went or came back, from `other` to here.
    pub fn changed_rows<'a>(&'a self, other: &'a LiveItems) -> impl Iterator<Item = Range<u32>> + use<'a> {
        let page = |at: usize| (at * PAGE) as u32..((at + 1) * PAGE) as u32;
        self.states.changed_pages(&other.states).map(page)
    }

    /// Places of the entries that are not what they are in `other`.
    pub fn changed_entries<'a>(&'a self, other: &'a LiveItems) -> impl Iterator<Item = u32> + use<'a> {
        let chunks = self
            .entries
            .iter()
            .zip(0u32..)
            .filter(|(chunk, at)| other.entries.get(*at as usize).is_none_or(|before| !Arc::ptr_eq(before, chunk)));
        chunks.flat_map(|(chunk, at)| (0..chunk.len() as u32).map(move |within| at * CHUNK as u32 + within)).filter(
            |&place| match (self.entry(place), other.entry(place)) {
                (Some((row, item)), Some((before, held))) => row != before || !Arc::ptr_eq(item, held),
                _ => true,
            },
        )
    }

    /// Everything that came or changed.
    pub fn entries(&self) -> impl Iterator<Item = (u32, &Arc<LiveItem>)> {
        self.entries.iter().flat_map(|chunk| chunk.iter()).map(|(row, item)| (*row, item))
    }

    /// Whether the bundle's vector of `row` is not that of an item that may be found.
    #[inline]
    pub fn hides_vector(&self, row: u32) -> bool {
        match self.states.get(row) {
            0 => false,
            state if state & GONE > 0 => true,
            _ => self.get(row).is_some_and(|item| item.vector.is_some()),
        }
    }

    /// Whether `text` is what is to be searched of `row`, and may be shown.
    pub fn holds_text(&self, row: u32, text: &Arc<LiveText>) -> bool {
        self.get(row).is_some_and(|item| item.text.as_ref().is_some_and(|held| Arc::ptr_eq(held, text)))
    }

    /// Whether the bundle's words of `row` are not its words.
    pub fn hides_text(&self, row: u32) -> bool {
        self.get(row).is_some_and(|item| item.text.is_some())
    }

    /// Words that came.
    pub fn texts(&self) -> &LiveTexts {
        &self.texts
    }

    /// The index over the vectors that came.
    pub fn vectors(&self) -> Option<&Arc<View>> {
        self.vectors.as_ref()
    }

    /// Names what came and changed; the same upserts make the same, in any process. What is gone does not enter.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// Sets whether `row` may be shown; says whether that changed.
    pub fn set_gone(&mut self, row: u32, gone: bool) -> bool {
        let changes = self.is_deleted(row) != gone;
        if changes {
            self.states.set(row, self.states.get(row) ^ GONE);
            self.n_gone = if gone { self.n_gone + 1 } else { self.n_gone - 1 };
        }
        changes
    }

    /// Puts an item in the place of what was known of `row`, which is the bundle's, known, or the next one.
    pub fn put(&mut self, row: u32, item: Arc<LiveItem>) {
        self.n_rows = self.n_rows.max(row + 1);
        let state = self.states.get(row);
        match (state & !GONE).checked_sub(1) {
            Some(place) => {
                let chunk = Arc::make_mut(&mut self.entries[place as usize / CHUNK]);
                chunk[place as usize % CHUNK].1 = item;
            }
            None => {
                if self.n_entries.is_multiple_of(CHUNK) {
                    self.entries.push(Arc::new(Vec::with_capacity(CHUNK)));
                }
                let last = self.entries.len() - 1;
                Arc::make_mut(&mut self.entries[last]).push((row, item));
                self.n_entries += 1;
                self.states.set(row, state | self.n_entries as u32);
            }
        }
    }

    /// Adds words of items that have them by now.
    pub fn add_texts(&mut self, documents: Vec<(u32, Arc<LiveText>)>) {
        let mut texts = std::mem::take(&mut self.texts);
        texts.add(documents, |row, text| self.holds_text(row, text));
        self.texts = texts;
    }

    /// Puts the index over all that came in its place.
    pub fn set_vectors(&mut self, vectors: Arc<View>) {
        self.vectors = Some(vectors);
    }

    /// Memory of what came and changed, bytes, about.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// See [`Self::bytes`].
    pub fn set_bytes(&mut self, bytes: usize) {
        self.bytes = bytes;
    }

    /// See [`Self::digest`].
    pub fn set_digest(&mut self, digest: u64) {
        self.digest = digest;
    }
}

/// Rows that there are: those of the bundle, and what came later.
pub fn n_rows(generation: &Generation, items: Option<&LiveItems>) -> usize {
    items.map_or(generation.items.len(), |items| items.n_rows() as usize)
}

/// Whether any of `rows` must not be shown.
pub fn any_gone(items: Option<&LiveItems>, rows: impl IntoIterator<Item = u32>) -> bool {
    items.is_some_and(|items| items.n_gone > 0 && rows.into_iter().any(|row| items.is_gone(row)))
}

/// The row of an item that may be shown.
pub fn row_of(ids: &IdTable, items: Option<&LiveItems>, id: &str) -> Option<u32> {
    let is_there = |row: u32| match items {
        Some(items) => row < items.n_rows && !items.is_gone(row),
        None => (row as usize) < ids.len(),
    };
    ids.row(id).filter(|&row| is_there(row))
}

/// Appends the vector of `row` to `out`; says whether it has one.
pub fn extend_vector(generation: &Generation, items: Option<&LiveItems>, row: u32, out: &mut Vec<f32>) -> bool {
    if let Some(vector) = items.and_then(|items| items.get(row)?.vector.as_deref()) {
        out.extend_from_slice(vector);
        return true;
    }
    match &generation.item_embeddings {
        Some(matrix) if (row as usize) < matrix.n_rows() => {
            matrix.extend_row(row, out);
            true
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_stays_as_it_was() {
        let mut items = LiveItems::new(6000);
        assert!(items.set_gone(5000, true) && !items.set_gone(5000, true));
        let before = items.clone();
        assert!(items.set_gone(5000, false) && items.set_gone(3, true));
        assert_eq!((before.is_gone(5000), before.is_gone(3), before.n_gone()), (true, false, 1));
        assert_eq!((items.is_gone(5000), items.is_gone(3), items.n_gone()), (false, true, 1));
        assert!(items.is_gone(u32::MAX) && !items.is_deleted(u32::MAX));
        assert!(any_gone(Some(&before), [1, 5000]) && !any_gone(Some(&items), [1, 5000]) && !any_gone(None, [1]));
    }

    #[test]
    fn entries_are_found_by_their_rows() {
        let item = |number: f32| Arc::new(LiveItem { cells: [Cell::Number(number)].into(), ..LiveItem::default() });
        let mut items = LiveItems::new(10);
        items.set_gone(7, true);
        for row in (0..300).rev() {
            items.put(row, item(row as f32));
        }
        let before = items.clone();
        items.put(7, item(0.5));
        assert_eq!((items.n_rows(), items.n_entries(), items.entries().count()), (300, 300, 300));
        assert!(items.is_gone(7) && items.get(7).unwrap().number(0) == 0.5 && before.get(7).unwrap().number(0) == 7.0);
        assert!(items.entries().all(|(row, item)| row == 7 || item.number(0) == row as f32));
        assert!(items.get(300).is_none() && items.get(u32::MAX).is_none() && items.place(300).is_none());
        assert!(items.hides_vector(7) && !items.hides_vector(8));
    }

    #[test]
    fn what_differs_between_snapshots_is_told() {
        let item = || Arc::new(LiveItem::default());
        let mut items = LiveItems::new(5000);
        (0..200).for_each(|row| items.put(20 * row, item()));
        let before = items.clone();
        assert_eq!((items.changed_rows(&before).count(), items.changed_entries(&before).count()), (0, 0));
        // A change of what has changed already leaves states as they were.
        items.put(20 * 70, item());
        assert_eq!(
            (items.changed_rows(&before).count(), items.changed_entries(&before).collect::<Vec<_>>()),
            (0, vec![70])
        );
        assert_eq!(items.entry(70).map(|(row, _)| row), Some(1400));
        items.put(5000, item());
        assert!(items.set_gone(2100, true));
        for (one, other) in [(&items, &before), (&before, &items)] {
            assert_eq!(one.changed_rows(other).collect::<Vec<_>>(), [2048..3072, 4096..5120]);
        }
        assert_eq!(items.changed_entries(&before).collect::<Vec<_>>(), [70, 200]);
        assert_eq!(before.changed_entries(&items).collect::<Vec<_>>(), [70]);
        assert!(
            !items.is_bundle_s(2100) && !items.is_bundle_s(20) && items.is_bundle_s(21) && !items.is_bundle_s(5001)
        );
    }
}
