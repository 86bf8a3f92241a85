//! Our side of the comparison with other vector indexes: builds indexes and searches them as `bench.py` asks, a JSON object
//! a line on standard input, one answer a line on standard output, `{"error": TEXT}` for what can't be done.
//!
//! Times are the CPU's: of the searching thread for searches, of all threads for builds. Loading, checking and writing are
//! not in them. Ids leave as little-endian i64 `[n, k]`, -1 where fewer than k were found; filters come as little-endian
//! u64 words in which row `i` has bit `i % 64` of word `i / 64`.

use std::collections::HashMap;
use std::hint::black_box;
use std::io::{BufRead, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use libc::{CLOCK_PROCESS_CPUTIME_ID, CLOCK_THREAD_CPUTIME_ID, clock_gettime, clockid_t, timespec};
use serde::Deserialize;
use serde_json::{Value, json};
use tastemaker::candidates::Scored;
use tastemaker::catalog::generation::{Matrix, Metric};
use tastemaker::catalog::npy;
use tastemaker::index::{
    self, Filter, IndexOptions, Partitioned, SearchParams, SearchScratch, VectorIndex, partitions,
};

/// Bytes read to learn the bandwidth of memory: many times any cache.
const MEASURED_BYTES: usize = 256 << 20;

/// What can be asked for.
#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
enum Request {
    /// How fast this core reads memory in order.
    Core {},
    /// Makes an index over the `n` rows of the `.npy` file `base`; one of the same name is replaced.
    Build {
        name: String,
        options: IndexOptions,
        base: PathBuf,
        n: usize,
        metric: Metric,
        /// Of items whose ids are their rows; searched one after another. 1, the default: none.
        #[serde(default = "one")]
        partitions: u32,
    },
    /// Forgets an index.
    Drop { name: String },
    /// Searches for rows `first..last` of the `.npy` file `queries`, which has `n` of them.
    Search {
        name: String,
        queries: PathBuf,
        n: usize,
        rows: (usize, usize),
        k: usize,
        #[serde(default)]
        params: SearchParams,
        filter: Option<PathBuf>,
        /// All in one call instead of one call for each.
        #[serde(default)]
        batch: bool,
        out: PathBuf,
    },
}

fn one() -> u32 {
    1
}

/// What stays between requests.
#[derive(Default)]
struct Session {
    indexes: HashMap<String, Arc<dyn VectorIndex>>,
    matrices: HashMap<PathBuf, Matrix>,
    filters: HashMap<PathBuf, Vec<u64>>,
    scratch: SearchScratch,
}

/// A search as asked for, its input in memory.
struct Search<'a> {
    index: &'a dyn VectorIndex,
    /// f32 `[n, dim]`
    queries: &'a [f32],
    k: usize,
    filter: Filter<'a>,
    params: SearchParams,
    batch: bool,
}

impl Session {
    fn answer(&mut self, line: &str) -> Result<Value, String> {
        match serde_json::from_str(line).map_err(|e| e.to_string())? {
            Request::Core {} => Ok(json!({ "read_bytes_per_s": read_bandwidth() })),
            Request::Build { name, options, base, n, metric, partitions } => {
                let matrix = self.matrix(&base, n)?.clone();
                let ids: Vec<String> = (0..n).map(|row| row.to_string()).collect();
                let (wall, cpu) = (Instant::now(), seconds(CLOCK_PROCESS_CPUTIME_ID));
                let index: Arc<dyn VectorIndex> = if partitions == 1 {
                    index::build(&options, &matrix, metric, &|_, _, _| ())?
                } else {
                    let places = partitions::place(ids.iter().map(String::as_str), partitions)?;
                    let params = SearchParams::default();
                    Arc::new(Partitioned::build(&options, &matrix, metric, places, params, &|_, _, _| ())?)
                };
                let (wall, cpu) = (wall.elapsed().as_secs_f64(), seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu);
                let bytes = index.bytes();
                self.indexes.insert(name, index);
                Ok(
                    json!({ "wall_s": wall, "cpu_s": cpu, "bytes": bytes, "bytes_per_vector": bytes as f64 / n.max(1) as f64 }),
                )
            }
            Request::Drop { name } => Ok(json!({ "dropped": self.indexes.remove(&name).is_some() })),
            Request::Search { name, queries, n, rows, k, params, filter, batch, out } => {
                let index = self.indexes.get(&name).ok_or_else(|| format!("no index {name}"))?.clone();
                let matrix = self.matrix(&queries, n)?;
                if matrix.dim != index.dim() {
                    return Err(format!("{}: dim is {}, the index has {}", queries.display(), matrix.dim, index.dim()));
                }
                let rows = rows.0..rows.1;
                if rows.start > rows.end || rows.end > n {
                    return Err(format!("rows {rows:?} of {n}"));
                }
                let queries = rows_of(matrix, rows);
                if let Some(path) = &filter
                    && !self.filters.contains_key(path)
                {
                    self.filters.insert(path.clone(), words(path)?);
                }
                let filter = filter.map_or(Filter::ALL, |path| Filter::ALL.within(&self.filters[&path]));
                let search = Search { index: index.as_ref(), queries: &queries, k, filter, params, batch };
                let (found, us) = search.run(&mut self.scratch);
                write_ids(&out, &found, k).map_err(|e| format!("{}: {e}", out.display()))?;
                Ok(json!({ "cpu_us_per_query": us / found.len().max(1) as f64 }))
            }
        }
    }

    /// Read once; what comes from one path is shared.
    fn matrix(&mut self, path: &Path, n: usize) -> Result<&Matrix, String> {
        if !self.matrices.contains_key(path) {
            let matrix = npy::read(path, n, "the request").map_err(|e| e.to_string())?;
            self.matrices.insert(path.to_owned(), matrix);
        }
        let matrix = &self.matrices[path];
        if matrix.n_rows() == n { Ok(matrix) } else { Err(format!("{}: {} rows", path.display(), matrix.n_rows())) }
    }
}

impl Search<'_> {
    /// What is found for each query, and the thread's CPU time for all in microseconds.
    fn run(&self, scratch: &mut SearchScratch) -> (Vec<Vec<Scored>>, f64) {
        let dim = self.index.dim();
        let mut found: Vec<_> = (0..self.queries.len() / dim).map(|_| Vec::with_capacity(self.k)).collect();
        let start = seconds(CLOCK_THREAD_CPUTIME_ID);
        if self.batch {
            self.index.search_batch(self.queries, self.k, self.filter, &self.params, scratch, &mut found);
        } else {
            for (query, out) in self.queries.chunks_exact(dim).zip(&mut found) {
                self.index.search(query, self.k, self.filter, &self.params, scratch, out);
            }
        }
        let us = (seconds(CLOCK_THREAD_CPUTIME_ID) - start) * 1e6;
        (found, us)
    }
}

/// Rows of a matrix as f32.
fn rows_of(matrix: &Matrix, rows: Range<usize>) -> Vec<f32> {
    let mut values = Vec::with_capacity(rows.len() * matrix.dim);
    for row in rows {
        matrix.extend_row(row as u32, &mut values);
    }
    values
}

fn words(path: &Path) -> Result<Vec<u64>, String> {
    let bytes = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let (words, rest) = bytes.as_chunks::<8>();
    if !rest.is_empty() {
        return Err(format!("{}: {} bytes are not whole words of 8", path.display(), bytes.len()));
    }
    Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
}

fn write_ids(path: &Path, found: &[Vec<Scored>], k: usize) -> std::io::Result<()> {
    let mut bytes = Vec::with_capacity(found.len() * k * 8);
    for found in found {
        let ids = found.iter().map(|scored| i64::from(scored.row)).chain(std::iter::repeat(-1));
        bytes.extend(ids.take(k).flat_map(i64::to_le_bytes));
    }
    std::fs::write(path, bytes)
}

/// Seconds of a CPU clock.
fn seconds(clock: clockid_t) -> f64 {
    let mut time = timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes to `time`, which outlives it, and to nothing else.
    let status = unsafe { clock_gettime(clock, &mut time) };
    assert_eq!(status, 0, "Linux has these clocks");
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Bytes per second of this core reading memory in order, the median of some passes.
fn read_bandwidth() -> f64 {
    let memory = vec![1u64; MEASURED_BYTES / 8];
    let mut passes = [0.0; 7];
    for pass in &mut passes {
        let start = seconds(CLOCK_THREAD_CPUTIME_ID);
        // Independent sums: adding must not be what is waited for.
        let mut sums = [0u64; 32];
        for block in memory.as_chunks::<32>().0 {
            for (sum, value) in sums.iter_mut().zip(block) {
                *sum = sum.wrapping_add(*value);
            }
        }
        black_box(sums);
        *pass = MEASURED_BYTES as f64 / (seconds(CLOCK_THREAD_CPUTIME_ID) - start);
    }
    passes.sort_by(f64::total_cmp);
    passes[passes.len() / 2]
}

fn main() -> std::io::Result<()> {
    let mut session = Session::default();
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let answer = session.answer(&line?).unwrap_or_else(|error| json!({ "error": error }));
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}
