//! How much of everything there is, and where it lies in what is uploaded.

use std::ops::Range;

use tastemaker_kernels::{FinishSlates, MAX_K, MAX_MERGED};

use crate::device::DeviceConfig;
use crate::pipeline::PipelineConfig;

/// Batches are filled up to one of these sizes, below the largest that there may be.
const BUCKETS: [usize; 6] = [1, 8, 32, 128, 512, 1024];
/// Neighbours beyond those that are wanted, so that rounding does not leave open which they are.
const SPARE: usize = 128;
/// Rows that the users of a batch have seen, for each request that there is room for, and at least.
const SEEN: [usize; 2] = [1024, 16_384];
/// Words of codes that the histories of a batch hold, for each request and each kind of code, and at least.
const CODES: [usize; 2] = [512, 16_384];

/// Sizes of a worker's pipeline, in values.
#[derive(Clone, Debug)]
pub struct Sizes {
    /// Items.
    pub n_rows: usize,
    /// Room for items that came or changed; a multiple of 32.
    pub more: usize,
    /// Values of a query, zeros at its end among them.
    pub query: usize,
    /// Neighbours that are looked for.
    pub fetched: usize,
    /// The most that each source gives.
    pub widths: [usize; 4],
    /// Of rankers: values that the CPU computes of a request, and columns of a candidate.
    pub rankers: Vec<[usize; 2]>,
    /// Liked items of a request.
    pub liked: usize,
    /// Kinds of codes that are counted.
    pub counted: usize,
    /// Sizes that batches are filled up to, ascending.
    pub buckets: Vec<usize>,
}

impl Sizes {
    /// For `n_rows` items; a reason where that can't be.
    pub fn new(
        config: &PipelineConfig,
        device: &DeviceConfig,
        n_rows: usize,
        query: usize,
        rankers: Vec<[usize; 2]>,
        counted: usize,
    ) -> Result<Self, String> {
        let widths = [config.ann_k, config.collaborative_k, config.trending_k, config.search_k].map(|k| k as usize);
        let (k, all) = (widths[0], widths.iter().sum::<usize>());
        if !(1..=MAX_K as usize - SPARE / 4).contains(&k) {
            return Err(format!("pipeline.ann_k is {k}, which is not 1 to {}", MAX_K as usize - SPARE / 4));
        }
        if all > MAX_MERGED as usize {
            return Err(format!("the sources give {all} candidates, which is more than {MAX_MERGED}"));
        }
        let more = Self::room(device);
        let largest = Self::largest(device, n_rows);
        let buckets = BUCKETS.into_iter().filter(|&bucket| bucket < largest).chain([largest]).collect();
        let (fetched, liked) = ((k + SPARE).min(MAX_K as usize), config.history_length as usize);
        Ok(Sizes { n_rows, more, query, fetched, widths, rankers, liked, counted, buckets })
    }

    /// The most requests whose scores of all rows there is room for at a time.
    pub fn largest(device: &DeviceConfig, n_rows: usize) -> usize {
        let columns = Self::columns_of(n_rows, Self::room(device));
        let fit = usize::try_from(device.workspace_bytes).unwrap_or(usize::MAX) / (4 * columns.max(1));
        fit.min(device.max_batch_size as usize).max(1)
    }

    /// Words of the scores of as many requests as there is room for.
    pub fn scores(device: &DeviceConfig, n_rows: usize) -> usize {
        Self::largest(device, n_rows) * Self::columns_of(n_rows, Self::room(device))
    }

    fn room(device: &DeviceConfig) -> usize {
        (device.live_items as usize).next_multiple_of(32)
    }

    fn columns_of(n_rows: usize, more: usize) -> usize {
        if more == 0 { n_rows } else { (n_rows + more).next_multiple_of(4) }
    }

    /// Scores of a request: of all items, then of those beside the tables.
    pub fn columns(&self) -> usize {
        Self::columns_of(self.n_rows, self.more)
    }

    /// Requests of the largest bucket.
    pub fn most(&self) -> usize {
        self.buckets.last().copied().unwrap_or(1)
    }

    /// Candidates of a request.
    pub fn width(&self) -> usize {
        self.widths.iter().sum()
    }

    /// Items of a record, for a request that wants `top_m`.
    pub fn items(&self, top_m: usize) -> usize {
        top_m.clamp(1, self.width()).next_multiple_of(4)
    }

    /// Words of all records at most.
    pub fn records(&self) -> usize {
        self.most() * FinishSlates::record(self.items(usize::MAX))
    }

    /// Words of a request's lists and liked items in the tail at most.
    pub fn lists(&self) -> usize {
        2 * (self.width() - self.widths[0] + self.liked)
    }

    /// Words of the tail of a batch, of whatever bucket.
    pub fn tail(&self) -> usize {
        let most = self.most();
        most * self.lists() + (most * SEEN[0]).max(SEEN[1]) + self.counted * (most * CODES[0]).max(CODES[1])
    }

    /// Words of what is uploaded at most.
    pub fn input(&self) -> usize {
        Regions::new(self, self.most()).tail + self.tail()
    }

    /// Bytes of a worker's buffers beside the rankers' and what it searches by.
    pub fn bytes(&self) -> u64 {
        let (most, width) = (self.most(), self.width());
        let columns = self.rankers.iter().map(|ranker| ranker[1]).max().unwrap_or(0);
        let words = self.input() + self.records() + most * (3 * self.fetched + 6);
        // Rows and scores of lists, rows, sources, scores, ranks and places of candidates, dots, columns, scores, sums.
        let candidate = 8 + 4 + 1 + 16 + 8 + 4 + 4 + 4 * columns + 4 + 4;
        (4 * words + most * width * candidate) as u64
    }
}

/// Where what is asked lies in what is uploaded, in words; each begins at 16 bytes.
#[derive(Clone, Debug)]
pub struct Regions {
    /// u32 `[n]`: rows that are searched.
    pub scanned: Range<usize>,
    /// f32 `[n, 4]`
    pub bounds: Range<usize>,
    /// u32 `[n, 8]`
    pub words: Range<usize>,
    /// u32 `[n, 2 * counted]`
    pub counted: Range<usize>,
    /// f32 `[n, query]`
    pub queries: Range<usize>,
    /// f32 `[n, shared]`, by ranker.
    pub shared: Vec<Range<usize>>,
    /// Where the tail begins.
    pub tail: usize,
}

impl Regions {
    /// Of a bucket.
    pub fn new(sizes: &Sizes, bucket: usize) -> Self {
        let mut end = 4usize;
        let mut take = |n: usize| {
            let start = end.next_multiple_of(4);
            end = start + n;
            start..end
        };
        let (scanned, bounds, words) = (take(bucket), take(4 * bucket), take(8 * bucket));
        let (counted, queries) = (take(2 * sizes.counted * bucket), take(sizes.query * bucket));
        let shared = sizes.rankers.iter().map(|ranker| take(ranker[0] * bucket)).collect();
        Regions { scanned, bounds, words, counted, queries, shared, tail: end.next_multiple_of(4) }
    }
}
