//! Rows beside the tables: what a worker's GPU memory has of items that came or changed.
//!
//! Tables are written once, so that all streams may read them. What changed since lies in memory of the worker's own stream: an item's
//! entry in a snapshot ([`LiveItems`]) has a place for good, and that is its place here. Before a batch the memory is brought from the
//! snapshot that it holds to the batch's: what differs is staged by one copy and put where it belongs by one kernel, in the stream's
//! order, so that a batch sees an item as its jobs were planned with it, never half of one, and nobody waits for anybody. Where nothing
//! changed, all of it is a comparison of addresses.
//!
//! A batch is kept waiting for no more than [`STEPS`] copies: until all is there, jobs of that snapshot are the CPU's. So are those of
//! snapshots that have no room.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::super::engine::{Resident, square, term};
use super::super::ops::{MoreRows, Vectors};
use super::super::stream::{Buffer, Part, Ring, Stream};
use super::ops::Beside;
use super::{Slates, Tables, in_series};
use crate::catalog::generation::NO_ROW;
use crate::catalog::live::{LiveItem, LiveItems, extend_vector};
use crate::device::DeviceError;
use crate::device::cpu::CpuDevice;
use crate::features::assemble::FeatureScratch;
use crate::features::history::SeriesColumns;
use crate::index::live::PAGE;
use crate::index::norm;

/// Words of a copy, at least.
const STAGED: usize = if cfg!(test) { 1 << 11 } else { 1 << 18 };
/// Pieces of a copy.
const PIECES: usize = if cfg!(test) { 1 << 8 } else { 1 << 14 };
/// Copies before a batch.
const STEPS: usize = 2;
/// Codes of a kind that one item may have.
const MOST_CODES: usize = 1024;

/// Sizes of what lies beside the tables.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Rows of the tables.
    pub n_rows: usize,
    /// Room beside them, a multiple of 32.
    pub n_more: usize,
    /// Values of a vector.
    pub width: usize,
    /// Whether scores need something of a vector beside it.
    pub with_norms: bool,
    /// By kind: codes that there is room for.
    pub codes: Vec<usize>,
    /// By ranker: words of an item's row.
    pub lines: Vec<usize>,
    /// By ranker: columns that depend on the item alone.
    pub columns: Vec<usize>,
    /// Words of what is known of an item's series.
    pub series: usize,
}

impl Shape {
    /// Bytes of a worker's memory.
    pub fn bytes(&self) -> u64 {
        4 * (Regions::new(self).end + self.staged() + 3 * PIECES) as u64
    }

    /// Words of a copy: an item fits, and so do the lists of all.
    fn staged(&self) -> usize {
        let codes: usize = self.codes.iter().map(|codes| 2 + codes.min(&MOST_CODES)).sum();
        let item = self.width + 2 + codes + self.others();
        (4 * self.n_more + item + PAGE).max(STAGED)
    }

    /// Pieces of an item, or of the lists, at most.
    fn pieces(&self) -> usize {
        8 + 2 * self.codes.len() + 2 * self.lines.len()
    }

    /// Words of an item beside vector and codes.
    fn others(&self) -> usize {
        self.lines.iter().chain(&self.columns).sum::<usize>() + self.series
    }
}

/// Where what lies beside the tables is, in words; each begins at 16 bytes.
#[derive(Clone, Debug)]
struct Regions {
    /// Bits of the tables' rows that are as they were.
    same: Range<usize>,
    /// Bits of the rows beside that have a vector and may be shown.
    there: Range<usize>,
    /// The row of each.
    names: Range<usize>,
    /// Rows, ascending, and then the place of each.
    changed: Range<usize>,
    vectors: Range<usize>,
    terms: Range<usize>,
    norms: Range<usize>,
    /// By kind: where codes of each begin and end, and the codes.
    codes: Vec<[Range<usize>; 2]>,
    /// By ranker.
    lines: Vec<Range<usize>>,
    columns: Vec<Range<usize>>,
    series: Range<usize>,
    end: usize,
}

impl Regions {
    fn new(shape: &Shape) -> Self {
        let mut end = 0usize;
        let mut take = |n: usize| {
            let start = end.next_multiple_of(4);
            end = start + n;
            start..end
        };
        let n = shape.n_more;
        let n_norms = if shape.with_norms { n } else { 0 };
        let (same, there) = (take(shape.n_rows.div_ceil(32)), take(n / 32));
        let (names, changed, vectors) = (take(n), take(2 * n), take(n * shape.width));
        let (terms, norms) = (take(n_norms), take(n_norms));
        let codes = shape.codes.iter().map(|codes| [take(2 * n), take(*codes)]).collect();
        let lines = shape.lines.iter().map(|words| take(n * words)).collect();
        let columns = shape.columns.iter().map(|words| take(n * words)).collect();
        let series = take(n * shape.series);
        Regions { same, there, names, changed, vectors, terms, norms, codes, lines, columns, series, end }
    }
}

/// What is still to be sent.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// Whether rows of the tables are as they were.
    Page(usize),
    /// An item.
    Item(u32),
    /// Which items there are.
    Lists,
}

/// A copy that is made up.
struct Staging<'a> {
    host: &'a mut [u32],
    n: usize,
    pieces: &'a mut Vec<u32>,
}

impl Staging<'_> {
    fn push(&mut self, to: usize, words: impl IntoIterator<Item = u32>) {
        let from = self.n;
        for word in words {
            self.host[self.n] = word;
            self.n += 1;
        }
        if self.n > from {
            self.pieces.extend([from as u32, to as u32, (self.n - from) as u32]);
        }
    }
}

/// Rows beside the tables, of one worker.
pub struct LiveRows {
    shape: Shape,
    regions: Regions,
    memory: Buffer<u32>,
    staged: Buffer<u32>,
    up: Ring<u32>,
    pieces: Vec<u32>,
    /// All is as in the bundle.
    bundle: Arc<LiveItems>,
    /// What the memory holds; `None`: some of this, some of that.
    told: Option<Arc<LiveItems>>,
    /// What it is brought to, and what is still to be sent.
    target: Option<Arc<LiveItems>>,
    queue: VecDeque<Step>,
    /// What has no room.
    refused: Option<Arc<LiveItems>>,
    /// The row of each place, as the memory has it, and all by row.
    names: Vec<u32>,
    by_row: Vec<(u32, u32)>,
    lists_differ: bool,
    /// By kind: where codes of each place begin and how many have room there; where the rest begins.
    spans: Vec<Vec<[u32; 2]>>,
    used: Vec<usize>,
    /// By kind: the most codes of an item.
    most_codes: Vec<usize>,
    /// The longest vector.
    longest: f64,
    vector: Vec<f32>,
    line: Vec<f32>,
    words: Vec<u32>,
    features: FeatureScratch,
}

impl LiveRows {
    /// Nothing beside the tables; the memory is told so by the first [`Self::know`].
    ///
    /// # Errors
    /// Out of memory, or what the driver says.
    pub fn new(stream: &Stream, shape: &Shape) -> Result<Self, DeviceError> {
        let (regions, n_staged, n_kinds) = (Regions::new(shape), shape.staged() + 3 * PIECES, shape.codes.len());
        Ok(LiveRows {
            memory: stream.buffer(regions.end)?,
            staged: stream.buffer(n_staged)?,
            up: Ring::new(stream, 2, n_staged)?,
            pieces: Vec::with_capacity(3 * PIECES),
            bundle: Arc::new(LiveItems::new(shape.n_rows)),
            told: None,
            target: None,
            queue: VecDeque::new(),
            refused: None,
            names: vec![NO_ROW; shape.n_more],
            by_row: Vec::with_capacity(shape.n_more),
            lists_differ: true,
            spans: vec![vec![[0; 2]; shape.n_more]; n_kinds],
            used: vec![0; n_kinds],
            most_codes: vec![0; n_kinds],
            longest: 0.0,
            vector: Vec::new(),
            line: Vec::new(),
            words: Vec::new(),
            features: FeatureScratch::default(),
            regions,
            shape: shape.clone(),
        })
    }

    /// Has it take the memory for what it is not.
    #[cfg(test)]
    pub fn pretend(&mut self, items: &Arc<LiveItems>) {
        self.told = Some(items.clone());
    }

    /// Has it know nothing of the memory.
    #[cfg(test)]
    pub fn forget(&mut self) {
        (self.told, self.target) = (None, None);
    }

    /// The longest vector beside the tables that there was.
    pub fn longest(&self) -> f64 {
        self.longest
    }

    /// The most codes of the kind that an item beside the tables had.
    pub fn most_codes(&self, kind: usize) -> usize {
        self.most_codes[kind]
    }

    /// Bits of the tables' rows that are as they were, and what lies beside, to score rows by.
    pub fn searched(&self) -> (Part<'_, u32>, Vectors<'_>, Option<Part<'_, f32>>, Part<'_, u32>) {
        let part = |range: &Range<usize>| self.memory.part(range.clone());
        let Regions { same, there, vectors, terms, .. } = &self.regions;
        let terms = self.shape.with_norms.then(|| part(terms).as_type());
        (part(same), Vectors::F32(part(vectors).as_type()), terms, part(there))
    }

    /// What lies beside, for exact scores.
    pub fn compared(&self) -> Beside<'_> {
        let Regions { vectors, norms, there, .. } = &self.regions;
        Beside {
            n: self.shape.n_more,
            vectors: self.memory.part(vectors.clone()).as_type(),
            norms: self.shape.with_norms.then(|| self.memory.part(norms.clone()).as_type()),
            there: self.memory.part(there.clone()),
        }
    }

    /// The row of each place.
    pub fn names(&self) -> MoreRows<'_> {
        self.more(&self.regions.names)
    }

    /// Rows that changed and their places, u32 `[2, n]`.
    pub fn changed(&self) -> MoreRows<'_> {
        self.more(&self.regions.changed)
    }

    /// Codes of a kind: where each item's begin and end, and what they are.
    pub fn codes(&self, kind: usize) -> (MoreRows<'_>, Part<'_, u32>) {
        let [spans, codes] = &self.regions.codes[kind];
        (self.more(spans), self.memory.part(codes.clone()))
    }

    /// What lies beside the table of a ranker.
    pub fn lines(&self, ranker: usize) -> MoreRows<'_> {
        self.more(&self.regions.lines[ranker])
    }

    /// Columns of items beside the table of a ranker.
    pub fn columns(&self, ranker: usize) -> MoreRows<'_> {
        self.more(&self.regions.columns[ranker])
    }

    /// What is known of items' series.
    pub fn series(&self) -> MoreRows<'_> {
        self.more(&self.regions.series)
    }

    fn more(&self, range: &Range<usize>) -> MoreRows<'_> {
        MoreRows { rows: self.memory.part(range.clone()), n: self.shape.n_more }
    }

    /// Has the memory know items as they are in a snapshot (`None`: as in the bundle), or come nearer to that; says whether it does.
    ///
    /// # Errors
    /// The GPU fails, or [`Device::load`](crate::device::Device::load) does.
    pub fn know(
        &mut self,
        stream: &Stream,
        rest: &mut CpuDevice,
        (tables, resident): (&Tables, &Resident),
        items: Option<&Arc<LiveItems>>,
        counted: &Slates,
    ) -> Result<bool, DeviceError> {
        let wanted = items.unwrap_or(&self.bundle).clone();
        let is = |held: &Option<Arc<LiveItems>>| held.as_ref().is_some_and(|held| Arc::ptr_eq(held, &wanted));
        for _ in 0..STEPS {
            if is(&self.told) {
                return Ok(true);
            }
            if self.target.is_none() && (is(&self.refused) || !self.plan(&wanted, tables)) {
                return Ok(false);
            }
            // Unless it is put back, what the memory holds is not known.
            let Some(target) = self.target.take() else { return Ok(false) };
            match self.step(stream, rest, (tables, resident), &target, counted)? {
                true if self.queue.is_empty() => self.told = Some(target),
                true => self.target = Some(target),
                // From the start, with all room.
                false => {}
            }
        }
        Ok(is(&self.told))
    }

    /// Finds out what is to be sent; `false`: it has no room.
    fn plan(&mut self, target: &Arc<LiveItems>, tables: &Tables) -> bool {
        self.queue.clear();
        match self.told.take() {
            Some(told) => {
                let pages = target.changed_rows(&told).map(|rows| Step::Page(rows.start as usize / PAGE));
                self.queue.extend(pages);
                self.queue.extend(target.changed_entries(&told).map(Step::Item));
                self.lists_differ |= told.n_entries() != target.n_entries();
            }
            None => {
                if let Err(reason) = self.fits(target, tables) {
                    // Once until it has: the next snapshot is not far.
                    if self.refused.replace(target.clone()).is_none() {
                        tracing::warn!(
                            reason,
                            "what came or changed of items has no room on the GPU: the CPU recommends"
                        );
                    }
                    return false;
                }
                self.refused = None;
                self.used.fill(0);
                self.spans.iter_mut().for_each(|spans| spans.fill([0; 2]));
                self.lists_differ = true;
                self.queue.extend((0..self.shape.n_rows.div_ceil(PAGE)).map(Step::Page));
                self.queue.extend((0..target.n_entries() as u32).map(Step::Item));
            }
        }
        self.queue.push_back(Step::Lists);
        self.target = Some(target.clone());
        true
    }

    /// Whether all codes have room, side by side.
    fn fits(&self, target: &LiveItems, tables: &Tables) -> Result<(), String> {
        for (kind, of) in tables.codes.iter().enumerate() {
            let lengths = || target.entries().map(|(_, item)| of.live(item).len());
            let (most, all) = (lengths().max().unwrap_or(0), lengths().sum::<usize>());
            if most > MOST_CODES || all > self.shape.codes[kind] {
                let room = self.shape.codes[kind];
                return Err(format!("{all} codes, up to {most} of an item; there is room for {room} and {MOST_CODES}"));
            }
        }
        Ok(())
    }

    /// Sends what one copy takes; `false`: there was no room, though there may be if all of it is sent anew.
    fn step(
        &mut self,
        stream: &Stream,
        rest: &mut CpuDevice,
        of: (&Tables, &Resident),
        target: &LiveItems,
        counted: &Slates,
    ) -> Result<bool, DeviceError> {
        let (mut host, mut pieces) = (self.up.take()?, std::mem::take(&mut self.pieces));
        pieces.clear();
        let mut staging = Staging { host: &mut host, n: 0, pieces: &mut pieces };
        let (mut all, mut n_items) = (true, 0);
        while let Some(&step) = self.queue.front() {
            let words = match step {
                Step::Page(_) => PAGE / 32,
                Step::Item(at) => self.item_words(of.0, target, at),
                Step::Lists => 4 * self.shape.n_more,
            };
            let is_full = staging.pieces.len() > 3 * (PIECES - self.shape.pieces());
            if staging.n > 0 && (is_full || staging.n + words > self.shape.staged()) {
                break;
            }
            match step {
                Step::Page(page) => self.send_page(target, page, &mut staging),
                Step::Item(at) => {
                    all = self.send_item(rest, of, target, at, &mut staging)?;
                    n_items += 1;
                }
                Step::Lists => self.send_lists(target, &mut staging),
            }
            if !all {
                break;
            }
            self.queue.pop_front();
        }
        let (n, end) = (staging.n, staging.n + pieces.len());
        if !all || end == 0 {
            self.up.give_idle(host);
            self.pieces = pieces;
            return Ok(all);
        }
        host[n..end].copy_from_slice(&pieces);
        self.up.give(stream.upload(host, end, self.staged.part_mut(0..end))?);
        let to = self.memory.part_mut(0..self.regions.end);
        stream.apply_changes(self.staged.part(0..n), self.staged.part(n..end), pieces.len() / 3, to)?;
        self.pieces = pieces;
        counted.sent.fetch_add(n_items, Relaxed);
        Ok(true)
    }

    /// Words of an item, or of one with as many codes as there may be.
    fn item_words(&self, tables: &Tables, target: &LiveItems, at: u32) -> usize {
        let codes =
            |item: &LiveItem| tables.codes.iter().map(|of| 2 + of.live(item).len().min(MOST_CODES)).sum::<usize>();
        self.shape.width + 2 + self.shape.others() + target.entry(at).map_or(0, |(_, item)| codes(item))
    }

    fn send_page(&self, target: &LiveItems, page: usize, staging: &mut Staging<'_>) {
        let same = &self.regions.same;
        let words = page * PAGE / 32..((page + 1) * PAGE / 32).min(same.len());
        let rows = |word: usize| 32 * word as u32..32 * word as u32 + 32;
        let bits = |word| rows(word).filter(|&row| target.is_bundle_s(row)).fold(0, |bits, row| bits | 1 << (row % 32));
        // Rows that came later have no such bits.
        staging.push(same.start + words.start, words.map(bits));
    }

    /// `false`: its codes have no room.
    fn send_item(
        &mut self,
        rest: &mut CpuDevice,
        (tables, resident): (&Tables, &Resident),
        target: &LiveItems,
        at: u32,
        staging: &mut Staging<'_>,
    ) -> Result<bool, DeviceError> {
        let Some((row, item)) = target.entry(at) else { return Ok(true) };
        let (generation, place) = (&resident.generation, at as usize);
        let Regions { vectors, terms, norms, codes, lines, columns, series, .. } = &self.regions;
        if std::mem::replace(&mut self.names[place], row) != row {
            self.lists_differ = true;
        }
        self.vector.clear();
        extend_vector(generation, Some(target), row, &mut self.vector);
        let (length, dot) = (square(&self.vector), tables.kernel.dot(&self.vector, &self.vector));
        self.longest = self.longest.max(length.sqrt());
        self.vector.resize(self.shape.width, 0.0);
        staging.push(vectors.start + place * self.shape.width, self.vector.iter().map(|value| value.to_bits()));
        if self.shape.with_norms {
            staging.push(terms.start + place, [(term(resident.by, length) as f32).to_bits()]);
            staging.push(norms.start + place, [norm(generation.metric, dot).to_bits()]);
        }
        for (kind, (of, [spans, room])) in tables.codes.iter().zip(codes).enumerate() {
            let (own, used) = (of.live(item), &mut self.used[kind]);
            let span = &mut self.spans[kind][place];
            if own.len() > span[1] as usize {
                if own.len() > MOST_CODES.min(room.len() - *used) {
                    return Ok(false);
                }
                *span = [*used as u32, own.len() as u32];
                *used += own.len();
            }
            self.most_codes[kind] = self.most_codes[kind].max(own.len());
            staging.push(spans.start + 2 * place, [span[0], span[0] + own.len() as u32]);
            staging.push(room.start + span[0] as usize, own.iter().copied());
        }
        for (ranker, (&words, region)) in tables.rankers.iter().zip(self.shape.lines.iter().zip(lines)) {
            if words > 0 {
                rest.line(generation, &ranker.weighted, target, row, &mut self.line)?;
                self.words.resize(words, 0);
                ranker.resident.put_line(&self.line, &mut self.words[..words]);
                staging.push(region.start + place * words, self.words[..words].iter().copied());
            }
        }
        for (ranker, region) in tables.rankers.iter().zip(columns) {
            if let Some(items) = &ranker.items {
                let (layout, line) = (&items.layout, &mut self.line);
                layout.fill_item(generation, target, row, &mut self.features, line);
                staging.push(region.start + place * layout.width(), line.iter().map(|value| value.to_bits()));
            }
        }
        if let Some(of) = SeriesColumns::of(generation, Some(target)).filter(|_| self.shape.series > 0) {
            staging.push(series.start + 2 * place, in_series(&of, row));
        }
        Ok(true)
    }

    fn send_lists(&mut self, target: &LiveItems, staging: &mut Staging<'_>) {
        let (n, Regions { there, names, changed, .. }) = (target.n_entries(), &self.regions);
        // Of the bundle's every one has a vector.
        let is_there = |at: u32| {
            let in_bundle = |row: u32| (row as usize) < self.shape.n_rows;
            let entry = target.entry(at);
            entry.is_some_and(|(row, item)| (in_bundle(row) || item.vector.is_some()) && !target.is_gone(row))
        };
        let bits = |word: u32| (0..32).filter(|bit| is_there(32 * word + bit)).fold(0, |bits, bit| bits | 1 << bit);
        staging.push(there.start, (0..there.len() as u32).map(bits));
        if !std::mem::take(&mut self.lists_differ) {
            return;
        }
        let by_row = &mut self.by_row;
        let before = by_row.len();
        by_row.retain(|&(row, at)| (at as usize) < n && self.names[at as usize] == row);
        let mut listed = before.min(n);
        if by_row.len() != listed {
            by_row.clear();
            listed = 0;
        }
        by_row.extend((listed..n).map(|at| (self.names[at], at as u32)));
        // Which takes no time where nearly all are in order.
        by_row.sort();
        staging.push(names.start, self.names[..n].iter().copied());
        staging.push(changed.start, by_row.iter().map(|(row, _)| *row));
        staging.push(changed.start + self.shape.n_more, by_row.iter().map(|(_, at)| *at));
    }
}
