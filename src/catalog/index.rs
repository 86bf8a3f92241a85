//! The vector index in a bundle: its arrays, how it was made, and what it is searched with.

use serde::{Deserialize, Serialize};

use super::CatalogError;
use super::bundle::{Reader, Writer};
use super::generation::{IdTable, Matrix, Metric};
use crate::index::{
    Blocks, BruteForce, Codes, Exact, Hnsw, HnswParts, IndexKind, IndexOptions, Ivf, IvfParts, Kernel, Lists,
    Partitioned, SearchParams, Searchers, Simd, Stored, VectorIndex, Vectors, build_over, padded, partitions,
};
use parking_lot::{Mutex, RwLock};
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::{Arc, OnceLock};

/// What the manifest says of the index.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct IndexSpec {
    /// How it was made; in partitions, each of them.
    pub options: IndexOptions,
    /// What it is divided into; absent: it is of one piece.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partitions: Option<PartitionSpec>,
    /// What it is searched with where a request does not say.
    #[serde(default)]
    pub search: SearchParams,
    /// What was measured when `search` was found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tuned: Option<Tuned>,
}

impl IndexSpec {
    /// Not tuned.
    pub fn new(options: IndexOptions, n_partitions: u32) -> Self {
        let placement = || PartitionSpec { n: n_partitions, placement: partitions::PLACEMENT.into() };
        let partitions = (n_partitions > 1).then(placement);
        IndexSpec { options, partitions, search: SearchParams::default(), tuned: None }
    }

    /// Number of partitions; 1: it is of one piece.
    pub fn n_partitions(&self) -> u32 {
        self.partitions.as_ref().map_or(1, |partitions| partitions.n)
    }
}

/// How items are divided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionSpec {
    /// Number of partitions, 2 to [`partitions::MAX_PARTITIONS`].
    pub n: u32,
    /// What says which item goes where: [`partitions::PLACEMENT`].
    pub placement: String,
}

/// What `tastemaker tune` measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tuned {
    /// Results asked for.
    pub k: u32,
    /// Share of the exact best k that was found, on queries that the parameters were not chosen by.
    pub recall: f64,
    /// CPU time of a search on the machine that tuned, microseconds.
    pub search_us: f64,
    /// The same for the exact scan.
    pub exact_us: f64,
    /// Queries that were measured.
    pub n_queries: u32,
}

impl std::fmt::Display for IndexSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "index         {:>10}", self.options.kind())?;
        self.partitions.iter().try_for_each(|partitions| write!(f, " in {} partitions", partitions.n))?;
        let SearchParams { n_probes, refine_ratio, ef_search } = self.search;
        n_probes.iter().try_for_each(|n| write!(f, ", n_probes {n}"))?;
        refine_ratio.iter().try_for_each(|n| write!(f, ", refine_ratio {n}"))?;
        ef_search.iter().try_for_each(|n| write!(f, ", ef_search {n}"))?;
        match &self.tuned {
            Some(Tuned { k, recall, search_us, exact_us, n_queries }) => write!(
                f,
                "; recall@{k} {recall:.4} in {search_us:.0} us, exact scan {exact_us:.0} us ({n_queries} queries, when tuned)"
            ),
            None => Ok(()),
        }
    }
}

/// Where the arrays of a partition's index lie.
fn folder(partition: usize) -> String {
    format!("index.{partition}")
}

/// The index of a generation, which all workers share and which may be exchanged while it is searched.
#[derive(Debug)]
pub(super) struct SharedIndex {
    spec: IndexSpec,
    /// Made by the first that asks, where the bundle stores none.
    current: OnceLock<RwLock<Option<Arc<dyn VectorIndex>>>>,
    n_changes: AtomicU32,
    /// Held by who makes another one.
    making: Mutex<()>,
}

impl Default for SharedIndex {
    fn default() -> Self {
        Self::new(IndexSpec::new(IndexOptions::BruteForce {}, 1), None)
    }
}

impl SharedIndex {
    pub fn new(spec: IndexSpec, index: Option<Arc<dyn VectorIndex>>) -> Self {
        let current = index.map_or_else(OnceLock::new, |index| OnceLock::from(RwLock::new(Some(index))));
        SharedIndex { spec, current, n_changes: AtomicU32::new(0), making: Mutex::new(()) }
    }

    pub fn spec(&self) -> &IndexSpec {
        &self.spec
    }

    pub fn get(&self, matrix: Option<&Matrix>, metric: Metric) -> Option<Arc<dyn VectorIndex>> {
        let make = |matrix: &Matrix| {
            Arc::new(BruteForce::new(matrix.clone(), metric, Kernel::detect())) as Arc<dyn VectorIndex>
        };
        self.current.get_or_init(|| RwLock::new(matrix.map(make))).read().clone()
    }

    /// See [`super::generation::Generation::made_index`].
    pub fn made(&self) -> Option<Arc<dyn VectorIndex>> {
        self.current.get().and_then(|current| current.read().clone())
    }

    /// See [`super::generation::Generation::index_changes`].
    pub fn n_changes(&self) -> u32 {
        self.n_changes.load(Acquire)
    }

    pub fn exchange(&self, index: Arc<dyn VectorIndex>) {
        let mut current = self.current.get_or_init(RwLock::default).write();
        let before = current.replace(index);
        // Whoever sees the new number finds the new index.
        self.n_changes.fetch_add(1, Release);
        drop(current);
        drop(before);
    }

    /// See [`super::generation::Generation::rebalance`].
    pub fn rebalance(
        &self,
        matrix: &Matrix,
        metric: Metric,
        ids: &IdTable,
        n_partitions: u32,
        searchers: &Arc<Searchers>,
        progress: &(dyn Fn(&str, u64, u64) + Sync),
    ) -> Result<(), String> {
        let _making = self.making.try_lock().ok_or("the index is being rebalanced already")?;
        let mut search = self.spec.search;
        if let Some(n_probes) = &mut search.n_probes {
            let sizes = [self.spec.n_partitions(), n_partitions];
            *n_probes = partitions::n_probes_for(*n_probes, sizes, self.spec.options.n_lists().is_some());
        }
        let index = make(&self.spec.options, matrix, metric, ids, n_partitions, search, progress)?;
        if let Some(whole) = index.partitioned() {
            whole.give(searchers.clone());
        }
        self.exchange(index);
        Ok(())
    }
}

/// Makes an index over `matrix`, whose rows have `ids`.
///
/// # Errors
/// A number of partitions out of range, options that do not fit.
pub(super) fn make(
    options: &IndexOptions,
    matrix: &Matrix,
    metric: Metric,
    ids: &IdTable,
    n_partitions: u32,
    search: SearchParams,
    progress: &(dyn Fn(&str, u64, u64) + Sync),
) -> Result<Arc<dyn VectorIndex>, String> {
    if n_partitions == 1 {
        let exact = Exact::new(matrix.clone(), metric, Kernel::detect());
        return build_over(options, exact, search, progress);
    }
    let places = place(ids, n_partitions)?;
    Ok(Arc::new(Partitioned::build(options, matrix, metric, places, search, progress)?))
}

/// Writes the arrays of an index.
pub(super) fn write(writer: &mut Writer, index: &dyn VectorIndex) -> Result<(), CatalogError> {
    write_to(writer, "index", index)
}

fn write_to(writer: &mut Writer, at: &str, index: &dyn VectorIndex) -> Result<(), CatalogError> {
    match index.stored() {
        Stored::Nothing => Ok(()),
        Stored::Ivf(parts) => write_ivf(writer, at, parts),
        Stored::Hnsw(parts) => write_hnsw(writer, at, parts),
        Stored::Partitions(whole) => whole
            .pieces()
            .iter()
            .enumerate()
            .try_for_each(|(partition, piece)| write_to(writer, &folder(partition), &**piece.index())),
    }
}

fn write_hnsw(writer: &mut Writer, at: &str, parts: &HnswParts) -> Result<(), CatalogError> {
    let n = parts.bottom.len() / parts.graph_degree as usize;
    writer.put(format!("{at}.graph"), &parts.bottom, vec![n, parts.graph_degree as usize])?;
    writer.vector(format!("{at}.layer_sizes"), &parts.layer_sizes)?;
    writer.vector(format!("{at}.upper_rows"), &parts.upper_rows)?;
    let degree = parts.upper_degree as usize;
    writer.put(format!("{at}.upper"), &parts.upper, vec![parts.upper.len() / degree.max(1), degree])?;
    writer.vector(format!("{at}.center"), &parts.center)?;
    writer.vector(format!("{at}.starts"), &parts.starts)?;
    writer.vector(format!("{at}.codes"), &parts.codes)
}

fn read_hnsw(reader: &Reader, at: &str) -> Result<HnswParts, CatalogError> {
    let degree = |name: &str| reader.shape(name).and_then(|shape| shape.get(1)).map_or(0, |&degree| degree as u32);
    Ok(HnswParts {
        graph_degree: degree(&format!("{at}.graph")),
        bottom: reader.array(&format!("{at}.graph"))?,
        upper_degree: degree(&format!("{at}.upper")),
        layer_sizes: reader.array(&format!("{at}.layer_sizes"))?,
        upper_rows: reader.array(&format!("{at}.upper_rows"))?,
        upper: reader.array(&format!("{at}.upper"))?,
        center: reader.array(&format!("{at}.center"))?,
        starts: reader.array(&format!("{at}.starts"))?,
        codes: reader.array(&format!("{at}.codes"))?,
    })
}

fn write_ivf(writer: &mut Writer, at: &str, parts: &IvfParts) -> Result<(), CatalogError> {
    writer.put(format!("{at}.centroids"), &parts.centroids, vec![parts.n_lists(), parts.padded])?;
    write_codes(writer, &format!("{at}.coarse"), &parts.coarse)?;
    writer.vector(format!("{at}.offsets"), &parts.offsets)?;
    writer.vector(format!("{at}.ids"), &parts.ids)?;
    writer.put(format!("{at}.promises"), &parts.promises, vec![parts.n_blocks(), 2])?;
    let shape = vec![parts.ids.len(), parts.dim];
    match &parts.lists {
        Lists::Flat(Vectors::F32(values)) => writer.put(format!("{at}.vectors"), values, shape),
        Lists::Flat(Vectors::F16(values)) => writer.put(format!("{at}.vectors"), values, shape),
        Lists::Flat(Vectors::Bf16(values)) => writer.put(format!("{at}.vectors"), values, shape),
        Lists::Pq { words, codes } => {
            writer.vector(format!("{at}.words"), words)?;
            write_codes(writer, &format!("{at}.codes"), codes)
        }
        Lists::Rabitq(codes) => write_codes(writer, &format!("{at}.codes"), codes),
    }
}

fn write_codes(writer: &mut Writer, name: &str, codes: &Codes) -> Result<(), CatalogError> {
    let n_blocks = codes.scales.len();
    writer.put(format!("{name}.blocks"), &codes.blocks, vec![n_blocks, codes.layout.bytes()])?;
    writer.vector(format!("{name}.refined"), &codes.refined)?;
    writer.vector(format!("{name}.scales"), &codes.scales)
}

/// Reads the index over `matrix`, whose rows have `ids`; `None` for the exact scan of one piece, which stores nothing.
pub(super) fn read(
    reader: &Reader,
    spec: &IndexSpec,
    matrix: &Matrix,
    metric: Metric,
    ids: &IdTable,
) -> Result<Option<Arc<dyn VectorIndex>>, CatalogError> {
    let Some(partitions) = &spec.partitions else {
        return match spec.options {
            IndexOptions::BruteForce {} => Ok(None),
            _ => Ok(Some(read_from(reader, "index", spec, Exact::new(matrix.clone(), metric, Kernel::detect()))?)),
        };
    };
    if partitions.placement != partitions::PLACEMENT {
        return Err(reader.corrupt("index", &format!("unknown placement `{}`", partitions.placement)));
    }
    let places = place(ids, partitions.n).map_err(|reason| reader.corrupt("index", &reason))?;
    let mut pieces = Vec::new();
    for (at, rows) in places.into_iter().enumerate() {
        let exact = Exact::of_chosen(matrix.clone(), rows.clone(), metric, Kernel::detect());
        pieces.push((read_from(reader, &folder(at), spec, exact)?, rows));
    }
    Ok(Some(Arc::new(Partitioned::new(spec.options.kind(), matrix, metric, pieces))))
}

/// The rows of each partition.
///
/// # Errors
/// A number of partitions out of range.
pub(super) fn place(ids: &IdTable, n_partitions: u32) -> Result<Vec<Arc<[u32]>>, String> {
    partitions::place((0..ids.len() as u32).map(|row| ids.id(row)), n_partitions)
}

/// Reads the index over the rows of `exact`.
fn read_from(reader: &Reader, at: &str, spec: &IndexSpec, exact: Exact) -> Result<Arc<dyn VectorIndex>, CatalogError> {
    let unfit = |reason: String| reader.corrupt(at, &reason);
    let array = |name: &str| format!("{at}.{name}");
    let options = match &spec.options {
        // Empty catalogues are scanned.
        _ if exact.rows().n_rows() == 0 => return Ok(Arc::new(BruteForce::over(exact))),
        IndexOptions::BruteForce {} => return Ok(Arc::new(BruteForce::over(exact))),
        IndexOptions::Hnsw(_) => {
            let index = Hnsw::from_parts(read_hnsw(reader, at)?, exact).map_err(unfit)?;
            return Ok(Arc::new(index.with_defaults(spec.search)));
        }
        IndexOptions::IvfFlat(options) | IndexOptions::IvfPq(options) | IndexOptions::IvfRabitq(options) => options,
    };
    let (kind, dim) = (spec.options.kind(), exact.rows().dim());
    let padded = padded(dim);
    let of_signs = |has_bias| Blocks { n_subspaces: padded / 4, has_bias };
    let has_bias = exact.metric() == Metric::L2;
    let lists = match kind {
        IndexKind::IvfFlat => {
            let name = array("vectors");
            Lists::Flat(match reader.dtype(&name) {
                Some("f16") => Vectors::F16(reader.array(&name)?),
                Some("bf16") => Vectors::Bf16(reader.array(&name)?),
                _ => Vectors::F32(reader.array(&name)?),
            })
        }
        IndexKind::IvfPq => {
            let name = array("codes.blocks");
            let bytes = reader.shape(&name).and_then(|shape| shape.get(1)).copied().unwrap_or(0);
            let layout = Blocks::of_bytes(bytes, has_bias);
            let layout = layout.ok_or_else(|| reader.corrupt(&name, "its shape does not fit"))?;
            Lists::Pq { words: reader.array(&array("words"))?, codes: read_codes(reader, &array("codes"), layout)? }
        }
        _ => Lists::Rabitq(read_codes(reader, &array("codes"), of_signs(has_bias))?),
    };
    let parts = IvfParts {
        kind,
        dim,
        padded,
        seed: options.seed,
        centroids: reader.array(&array("centroids"))?,
        coarse: read_codes(reader, &array("coarse"), of_signs(true))?,
        offsets: reader.array(&array("offsets"))?,
        ids: reader.array(&array("ids"))?,
        promises: reader.array(&array("promises"))?,
        lists,
    };
    let index = Ivf::from_parts(parts, exact, Simd::detect()).map_err(unfit)?;
    Ok(Arc::new(index.with_defaults(spec.search)))
}

fn read_codes(reader: &Reader, name: &str, layout: Blocks) -> Result<Codes, CatalogError> {
    Ok(Codes {
        layout,
        blocks: reader.array(&format!("{name}.blocks"))?,
        refined: reader.array(&format!("{name}.refined"))?,
        scales: reader.array(&format!("{name}.scales"))?,
    })
}
