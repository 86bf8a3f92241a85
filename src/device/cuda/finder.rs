//! Neighbours by an index of cuVS, of the kind and with the parameters that the bundle's has: made on the GPU over the vectors that lie
//! there, once for all workers ([`Indexed`]), and searched on each worker's stream ([`Finder`]).
//!
//! What such an index misses is missed, as by the CPU's of its kind; what it finds is scored again on the CPU, and what came or changed
//! since is found there. Whatever is in the way of it leaves the engine with its exact search.
#![allow(unsafe_code)] // Calls of cuVS, on memory that this module has.

use std::any::Any;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use tastemaker_kernels::MAX_K;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::context::Context;
use super::cuvs::{self, Cuvs, Error, Index, Kind, Neighbors, Options, Resources, Rows, Scale, Search, Value, Walk};
use super::ops::ListsMut;
use super::stream::{Buffer, Part, Stream, Table};
use crate::catalog::generation::Generation;
use crate::device::{DeviceConfig, DeviceError, IndexChoice};
use crate::index::SearchParams;

/// Values of vectors up to which all are scored rather than an index made, by [`IndexChoice::Auto`]: a GPU that computes 20 TFLOP/s does
/// that for 37,000 queries a second.
const EXACT_VALUES: usize = 1 << 28;
/// Workspace of a worker that cuVS begins with, bytes.
const POOL_BYTES: usize = 64 << 20;
/// The least share of rows that a walk through a graph, or through lists, is told to be content with: all of fewer are scored sooner.
const LEAST_SHARE: f64 = 0.125;
/// Seconds without a query after which a kernel that stays ends, and the share of the GPU that it takes.
const PERSISTENT: Walk = Walk::Persistent { lifetime: 2.0, device_usage: 0.5 };
/// Longest list of candidates that such a kernel walks with.
const PERSISTENT_ITOPK: usize = 1024;

/// The index that is to be made.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    options: Options,
    /// The bundle's.
    search: SearchParams,
    n_rows: usize,
    width: usize,
}

impl Plan {
    /// For a generation with `n_rows` vectors of `dim` values; `None`: all rows are to be scored.
    ///
    /// # Errors
    /// What cuVS has no index for.
    pub fn of(
        config: &DeviceConfig,
        generation: &Generation,
        [n_rows, dim, width]: [usize; 3],
    ) -> Result<Option<Self>, Error> {
        let spec = generation.index_spec();
        let wanted = match config.index {
            IndexChoice::Exact => false,
            IndexChoice::Auto => n_rows * width > EXACT_VALUES,
            IndexChoice::Bundle => true,
        };
        if !wanted {
            return Ok(None);
        }
        let options = match Options::of(&spec.options.clone().at_most(n_rows), n_rows, dim)? {
            Options::BruteForce => return Ok(None),
            options => options,
        };
        if config.vectors != crate::device::Storage::F32 {
            return Err(Error::Unsupported("index over vectors in bf16"));
        }
        let mut search = spec.search;
        if let (Some(n_probes), None) = (&mut search.n_probes, spec.options.n_lists()) {
            // What was found for partitions, whose lists are fewer by the root of their number.
            *n_probes = (f64::from(*n_probes) * f64::from(spec.n_partitions()).sqrt()).ceil() as u32;
        }
        Ok(Some(Plan { options, search, n_rows, width }))
    }

    /// GPU memory that making it takes at most, about; bytes. Lists have room for half as many more, and are trained on half of the vectors.
    pub fn bytes(&self) -> u64 {
        let (n, vectors) = (self.n_rows as u64, (self.n_rows * self.width * 4) as u64);
        match self.options {
            Options::BruteForce => 0,
            Options::IvfFlat { .. } => 2 * vectors + 12 * n,
            Options::IvfPq { pq_dim, pq_bits, .. } => vectors / 2 + n * (u64::from(pq_dim * pq_bits / 8) * 3 / 2 + 12),
            // Both graphs, and the longer one's distances.
            Options::Cagra { graph_degree, intermediate_graph_degree } => {
                n * (u64::from(graph_degree) + 2 * u64::from(intermediate_graph_degree)) * 4
            }
        }
    }

    /// GPU memory that each worker takes for searches of `most_queries`, bytes.
    pub fn worker_bytes(most_queries: usize) -> u64 {
        (POOL_BYTES + most_queries * MAX_K as usize * 12) as u64
    }

    /// Name of the file that keeps the index, which depends on all of this.
    fn file(&self, generation: &Generation, cuvs: &Cuvs) -> String {
        let Plan { options, n_rows, width, search: _ } = self;
        let of =
            format!("{} {:?} {options:?} {n_rows} {width} {:?}", generation.version, generation.metric, cuvs.version);
        format!("{}-{:016x}.cuvs", options.kind().name(), xxh3_64(of.as_bytes()))
    }
}

/// An index on a GPU, which all its workers search.
#[derive(Debug)]
pub struct Indexed {
    index: Index,
    /// The bundle's.
    search: SearchParams,
    cuvs: &'static Cuvs,
    context: Arc<Context>,
    /// Of what made the index, which may give memory back on it: gone after the index.
    _stream: Arc<dyn Any + Send + Sync>,
}

impl Drop for Indexed {
    fn drop(&mut self) {
        // What follows is cuVS's giving back, in the context that is current.
        self.context.bind_anyway();
    }
}

impl Indexed {
    /// Makes the index over `vectors` (f32 `[n_rows, width]`), or reads it where `config` says that one is kept. Waits for the GPU.
    ///
    /// # Errors
    /// What is in the way, for the operator; the vectors are as they were.
    pub fn new(
        stream: &Stream,
        ordinal: u32,
        (cuvs, vectors): (&'static Cuvs, &Table<f32>),
        plan: Plan,
        generation: &Generation,
        config: &DeviceConfig,
    ) -> Result<Self, String> {
        let context = stream.context().clone();
        context.bind().map_err(|error| error.to_string())?;
        let began = Instant::now();
        let said = |error: Error| error.to_string();
        // SAFETY: the stream is one of this context, which is current on this thread; what is made here lives as long as this call, and the
        // index has the stream kept.
        let resources = &mut unsafe { Resources::new(cuvs, cuvs::Stream(stream.raw()), ordinal) }.map_err(said)?;
        let all = vectors.part(0..plan.n_rows * plan.width);
        let (address, owner) = (stream.of(&all).0, Arc::new(vectors.clone()));
        // SAFETY: a table of that size on this GPU, which nobody writes and which stays while its owner does.
        let rows = unsafe { Rows::new(address, [plan.n_rows as u64, plan.width as u64], Value::F32, owner) };
        let rows = rows.map_err(said)?;
        let kept = Some(Path::new(&config.index_cache)).filter(|folder| !folder.as_os_str().is_empty());
        let kept = kept.map(|folder| Kept { folder: folder.to_owned(), file: plan.file(generation, cuvs) });
        let (kind, metric) = (plan.options.kind(), generation.metric);
        let read = kept.as_ref().and_then(|kept| {
            let path = kept.sound()?;
            // SAFETY: the context is current, and the rows are written; the file is one that was written here, by its checksum.
            let loaded = unsafe { Index::load(resources, kind, metric, rows.clone(), &path) };
            loaded.map_err(|error| tracing::warn!(file = %path.display(), %error, "a kept index can't be read: it is made anew")).ok()
        });
        let from = if read.is_some() { "read" } else { "made" };
        let index = match read {
            Some(index) => index,
            None => {
                // SAFETY: the context is current, and the rows are written.
                let made = unsafe { Index::build(resources, plan.options, metric, rows) }.map_err(said)?;
                if let Some(kept) = &kept
                    && let Err(error) = kept.keep(|path| made.store(resources, path).map_err(said))
                {
                    tracing::warn!(folder = %kept.folder.display(), error, "an index can't be kept: it is made at each start");
                }
                made
            }
        };
        tracing::info!(
            device = %format_args!("cuda:{ordinal}"),
            kind = kind.name(),
            from,
            seconds = began.elapsed().as_secs_f64(),
            "index of cuVS ready"
        );
        Ok(Indexed { index, search: plan.search, cuvs, context, _stream: stream.kept() })
    }

    /// Whether its distances are those of the vectors.
    pub fn is_of_vectors(&self) -> bool {
        self.index.kind() != Kind::IvfPq
    }

    /// How to look for `wanted` neighbours and as many more as a user may have seen, where `admitted` of the rows may come out, and how many
    /// to take; `None` where all rows had better be scored.
    pub fn asked(&self, [wanted, seen, least]: [usize; 3], admitted: f64, effort: &SearchParams) -> Option<Asked> {
        let mut params = effort.or(&self.search);
        let (kind, n) = (self.index.kind(), self.index.n() as usize);
        // A quarter more for what rules and changes of items leave out.
        let fetched = ((wanted + seen) * 5 / 4).clamp(least, MAX_K as usize);
        let searched = match kind {
            Kind::IvfPq => cuvs::fetch(wanted as u32, admitted, &params, true)?.max(fetched as u32),
            _ if admitted < LEAST_SHARE => return None,
            _ => fetched as u32,
        };
        let searched = searched.min(n as u32);
        // By what is wanted, not by what is taken beside; the fewer rows are admitted, the more lists.
        let n_lists = self.index.n_lists();
        let n_probes = params.n_probes_of(wanted, n, n_lists as usize) as f64 / admitted.max(LEAST_SHARE);
        params.n_probes = Some((n_probes.ceil() as u32).clamp(1, n_lists.max(1)));
        params.ef_search = Some(params.ef_search_of(wanted).max(searched as usize) as u32);
        Some(Asked { fetched, searched, params })
    }
}

/// A search that is to be made.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// Rows of a list.
    pub fetched: usize,
    /// Rows that the index is asked for.
    searched: u32,
    params: SearchParams,
}

/// Why a search was not made.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The index can't be searched; all rows can be scored.
    #[error(transparent)]
    Index(Error),
    /// The GPU failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// What one worker searches an index by, on its stream.
#[derive(Debug)]
pub struct Finder {
    resources: Resources,
    /// i64 and f32 `[n, searched]`
    neighbors: Buffer<i64>,
    distances: Buffer<f32>,
    persistent_queries: usize,
    indexed: Arc<Indexed>,
    /// Gone after the resources.
    _stream: Arc<dyn Any + Send + Sync>,
}

impl Drop for Finder {
    fn drop(&mut self) {
        self.indexed.context.bind_anyway();
        // No search goes on when the index is given up; one that a lost context holds is none.
        let _ = self.resources.synchronize();
    }
}

impl Finder {
    /// For at most `most_queries` at a time.
    ///
    /// # Errors
    /// No memory, or what cuVS says.
    pub fn new(
        stream: &Stream,
        ordinal: u32,
        indexed: Arc<Indexed>,
        config: &DeviceConfig,
        most_queries: usize,
    ) -> Result<Self, Failure> {
        indexed.context.bind()?;
        // SAFETY: the stream is of the context, which is current; it is kept longer than the resources, and whoever calls makes the context
        // current.
        let resources = unsafe { Resources::new(indexed.cuvs, cuvs::Stream(stream.raw()), ordinal) };
        let mut resources = resources.map_err(Failure::Index)?;
        // Else each search would allocate, which waits for all streams.
        resources.pool(POOL_BYTES).map_err(Failure::Index)?;
        let len = most_queries * MAX_K as usize;
        Ok(Finder {
            resources,
            neighbors: stream.buffer(len)?,
            distances: stream.buffer(len)?,
            persistent_queries: config.persistent_queries as usize,
            indexed,
            _stream: stream.kept(),
        })
    }

    /// What it searches.
    pub fn indexed(&self) -> &Indexed {
        &self.indexed
    }

    /// Puts on the stream the search for `n_queries` (f32 `[n_queries, width]`): [`Asked::fetched`] rows for each, holes at the end where
    /// fewer were found. `available`: bits of the rows that may come out.
    ///
    /// # Errors
    /// What cuVS or the GPU says.
    ///
    /// # Panics
    /// If something is too short for the shapes, or another stream's.
    pub fn find(
        &mut self,
        stream: &Stream,
        (queries, n_queries): (Part<'_, f32>, usize),
        asked: &Asked,
        available: Option<Part<'_, u32>>,
        out: ListsMut<'_>,
    ) -> Result<(), Failure> {
        let Indexed { index, context, .. } = &*self.indexed;
        let (n_rows, searched) = (index.n() as usize, asked.searched as usize);
        let len = n_queries * searched;
        assert!(
            queries.len() >= n_queries * index.dim() as usize && len <= self.neighbors.len(),
            "{n_queries} queries"
        );
        assert!(available.is_none_or(|bits| bits.len() >= n_rows.div_ceil(32)), "bits of {n_rows} rows");
        context.bind()?;
        let itopk_size = cuvs::itopk_size(asked.searched, &asked.params);
        let stays =
            index.kind() == Kind::Cagra && n_queries <= self.persistent_queries && itopk_size <= PERSISTENT_ITOPK;
        if stays {
            // It reads queries when it is called, not when the stream comes to it.
            stream.synchronize()?;
        }
        let filters = index.kind().filters();
        let search = Search {
            queries: stream.of(&queries).0,
            n_queries: n_queries as u32,
            k: asked.searched,
            params: &asked.params,
            walk: if stays { PERSISTENT } else { Walk::Auto },
            filter: available.filter(|_| filters).map(|bits| stream.of(&bits).0),
        };
        let to = Neighbors {
            rows: stream.of(&self.neighbors.part_mut(0..len).0).0,
            distances: stream.of(&self.distances.part_mut(0..len).0).0,
        };
        // SAFETY: the context is current on this thread. All memory is this stream's or a table's, of the sizes that were checked, and is
        // used in the stream's order, as the search is; a search that does not wait for the stream was preceded by a wait, and ends before
        // the call does.
        unsafe { index.search(&mut self.resources, &search, to) }.map_err(Failure::Index)?;
        let scale = Scale::of(index.metric());
        stream.take_neighbors(
            (self.neighbors.part(0..len), self.distances.part(0..len)),
            [scale.factor, scale.offset],
            [n_queries, searched, n_rows, asked.fetched],
            // Also those that the index left out: a bitset costs it little, and a row that is gone more.
            available,
            out,
        )?;
        Ok(())
    }
}

/// Where an index is kept: its file, which is cuVS's own, and beside it one with its length and checksum.
struct Kept {
    folder: PathBuf,
    file: String,
}

impl Kept {
    fn path(&self) -> PathBuf {
        self.folder.join(&self.file)
    }

    fn sum_path(&self) -> PathBuf {
        self.folder.join(format!("{}.xxh3", self.file))
    }

    /// Length and checksum (xxh3, 64 bits), as the file beside has them.
    fn sum(path: &Path) -> std::io::Result<String> {
        let (mut file, mut hash, mut piece, mut len) = (std::fs::File::open(path)?, Xxh3::new(), vec![0; 1 << 20], 0);
        loop {
            match file.read(&mut piece)? {
                0 => return Ok(format!("{len} {:016x}\n", hash.digest())),
                n => {
                    hash.update(&piece[..n]);
                    len += n;
                }
            }
        }
    }

    /// The file, if it is there and whole.
    fn sound(&self) -> Option<PathBuf> {
        let path = self.path();
        if !path.exists() {
            return None;
        }
        let want = std::fs::read_to_string(self.sum_path());
        match (Self::sum(&path), want) {
            (Ok(sum), Ok(want)) if sum == want => return Some(path),
            (Ok(_), Ok(_)) => tracing::warn!(file = %path.display(), "a kept index is damaged: it is made anew"),
            (Err(error), _) | (_, Err(error)) => {
                tracing::warn!(file = %path.display(), %error, "a kept index can't be read")
            }
        }
        None
    }

    /// Has `write` write the file elsewhere, and puts it in its place: whoever reads sees all or nothing.
    fn keep(&self, write: impl FnOnce(&Path) -> Result<(), String>) -> Result<(), String> {
        let said = |error: std::io::Error| error.to_string();
        std::fs::create_dir_all(&self.folder).map_err(said)?;
        let file = tempfile::NamedTempFile::new_in(&self.folder).map_err(said)?.into_temp_path();
        write(&file)?;
        let sum = Self::sum(&file).map_err(said)?;
        // Without its sum, or with another's, a file is not trusted.
        file.persist(self.path()).map_err(|error| said(error.error))?;
        let mut beside = tempfile::NamedTempFile::new_in(&self.folder).map_err(said)?;
        std::io::Write::write_all(&mut beside, sum.as_bytes()).map_err(said)?;
        beside.persist(self.sum_path()).map_err(|error| said(error.error))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
