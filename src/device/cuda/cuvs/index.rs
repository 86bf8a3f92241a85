//! Indexes: made, searched, extended, stored.
#![allow(unsafe_code)] // Calls of cuVS on device memory.

use std::any::Any;
use std::ffi::CString;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::Arc;

use tastemaker_kernels::DevicePtr;

use super::library::Cuvs;
use super::resources::{Owned, Resources, Tensor, call, owned};
use super::sys::*;
use super::{Error, within};
use crate::catalog::generation::Metric;
use crate::index::{HnswOptions, IndexKind, IndexOptions, IvfOptions, SearchParams};

/// The most that a search returns for a query: what our own kernels select.
pub const MAX_K: u32 = tastemaker_kernels::MAX_K;
/// Longest list of candidates of a `cagra` search.
const MAX_ITOPK: usize = 65_536;
/// What a search of several blocks adds to its list at a time, and what every list is a multiple of.
const ITOPK_STEP: usize = 32;

/// How values of vectors are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    F16,
}

impl Value {
    /// Of one value.
    pub fn bytes(self) -> u64 {
        match self {
            Value::F32 => 4,
            Value::F16 => 2,
        }
    }
}

/// The kinds of index. The same words as on the CPU, but for the graph: what is an `hnsw` there is a `cagra` here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Exact scan.
    BruteForce,
    /// Inverted lists of full vectors.
    IvfFlat,
    /// Inverted lists of product-quantised vectors. Its distances are approximate: its results want to be scored anew.
    IvfPq,
    /// A graph without layers (Ootomo et al., ICDE 2024).
    Cagra,
}

impl Kind {
    /// As in files and reports.
    pub fn name(self) -> &'static str {
        match self {
            Kind::BruteForce => "brute_force",
            Kind::IvfFlat => "ivf_flat",
            Kind::IvfPq => "ivf_pq",
            Kind::Cagra => "cagra",
        }
    }

    /// Whether a search can be told which rows it may return.
    pub fn filters(self) -> bool {
        self != Kind::IvfPq
    }
}

/// How an index is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Options {
    /// [`Kind::BruteForce`]
    BruteForce,
    /// [`Kind::IvfFlat`]
    IvfFlat {
        /// Number of lists, 1 to the number of vectors.
        n_lists: u32,
        /// Iterations of k-means, 1 to 100.
        kmeans_n_iters: u32,
    },
    /// [`Kind::IvfPq`]
    IvfPq {
        /// Number of lists, 1 to the number of vectors.
        n_lists: u32,
        /// Iterations of k-means, 1 to 100.
        kmeans_n_iters: u32,
        /// Subspaces; with `pq_bits` a whole number of bytes. cuVS is fastest at multiples of 32.
        pq_dim: u32,
        /// Bits of each, 4 to 8.
        pq_bits: u32,
    },
    /// [`Kind::Cagra`]
    Cagra {
        /// Neighbours of a vector, 4 to 512.
        graph_degree: u32,
        /// Neighbours among which these are chosen; at least as many, at most 1,024.
        intermediate_graph_degree: u32,
    },
}

impl Options {
    /// What is nearest to a CPU index of `options` over `n` vectors.
    ///
    /// Departures: seeds have no effect; codes have 8 bits a subspace, not 4, because here a table look-up costs the same for both;
    /// `ivf_rabitq`, which cuVS has for C++ only, becomes `ivf_pq` with an eighth of the dimension; `hnsw` becomes `cagra` of the same
    /// degree, with `ef_construction` as the intermediate one.
    ///
    /// # Errors
    /// Lists of values that cuVS does not have (`bf16`).
    pub fn of(options: &IndexOptions, n: usize, dim: usize) -> Result<Options, Error> {
        let lists = |ivf: &IvfOptions| (ivf.n_lists_of(n) as u32, ivf.kmeans_n_iters_or_usual());
        let codes = |ivf: &IvfOptions, usual: usize| {
            let (n_lists, kmeans_n_iters) = lists(ivf);
            let pq_dim = ivf.pq_dim.unwrap_or(usual.max(1).next_multiple_of(8) as u32);
            Options::IvfPq { n_lists, kmeans_n_iters, pq_dim, pq_bits: 8 }
        };
        Ok(match options {
            IndexOptions::BruteForce {} => Options::BruteForce,
            IndexOptions::IvfFlat(IvfOptions { storage: Some(crate::index::Storage::Bf16), .. }) => {
                return Err(Error::Unsupported("lists of bf16 values"));
            }
            IndexOptions::IvfFlat(ivf) => {
                let (n_lists, kmeans_n_iters) = lists(ivf);
                Options::IvfFlat { n_lists, kmeans_n_iters }
            }
            IndexOptions::IvfPq(ivf) => codes(ivf, dim / 2),
            IndexOptions::IvfRabitq(ivf) => codes(ivf, dim / 8),
            IndexOptions::Hnsw(HnswOptions { graph_degree, ef_construction, .. }) => Options::Cagra {
                graph_degree: *graph_degree,
                intermediate_graph_degree: (*ef_construction).clamp(*graph_degree, 1024),
            },
        })
    }

    /// What they make.
    pub fn kind(self) -> Kind {
        match self {
            Options::BruteForce => Kind::BruteForce,
            Options::IvfFlat { .. } => Kind::IvfFlat,
            Options::IvfPq { .. } => Kind::IvfPq,
            Options::Cagra { .. } => Kind::Cagra,
        }
    }

    fn check(self, n: u64) -> Result<(), Error> {
        within("n_rows", n, 1, u64::from(u32::MAX) - 1)?;
        match self {
            Options::BruteForce => Ok(()),
            Options::IvfFlat { n_lists, kmeans_n_iters } => {
                within("n_lists", n_lists.into(), 1, n)?;
                within("kmeans_n_iters", kmeans_n_iters.into(), 1, 100)
            }
            Options::IvfPq { n_lists, kmeans_n_iters, pq_dim, pq_bits } => {
                within("n_lists", n_lists.into(), 1, n)?;
                within("kmeans_n_iters", kmeans_n_iters.into(), 1, 100)?;
                within("pq_bits", pq_bits.into(), 4, 8)?;
                within("pq_dim", pq_dim.into(), 1, 4096)?;
                within("pq_dim * pq_bits modulo 8", u64::from(pq_dim * pq_bits % 8), 0, 0)
            }
            Options::Cagra { graph_degree, intermediate_graph_degree } => {
                within("graph_degree", graph_degree.into(), 4, 512)?;
                within("intermediate_graph_degree", intermediate_graph_degree.into(), graph_degree.into(), 1024)
            }
        }
    }
}

/// Vectors in device memory, `[n, dim]`, row-major and without gaps, with whoever keeps them there.
#[derive(Clone)]
pub struct Rows {
    address: DevicePtr,
    n: u64,
    dim: u32,
    value: Value,
    /// Held, and otherwise not looked at.
    _owner: Arc<dyn Any + Send + Sync>,
}

impl std::fmt::Debug for Rows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rows {{ {:#x}: {:?} [{}, {}] }}", self.address, self.value, self.n, self.dim)
    }
}

impl Rows {
    /// # Errors
    /// No rows, no dimension, or no memory.
    ///
    /// # Safety
    /// Memory of that size lies at the address on the GPU that it is used with; it stays, and nobody writes to it, as long as `owner`
    /// lives.
    pub unsafe fn new(
        address: DevicePtr,
        [n, dim]: [u64; 2],
        value: Value,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<Rows, Error> {
        within("n_rows", n, 1, u64::from(u32::MAX) - 1)?;
        within("dim", dim, 1, 65_536)?;
        within("the rows' address", address, 1, u64::MAX)?;
        Ok(Rows { address, n, dim: dim as u32, value, _owner: owner })
    }

    /// Number of vectors.
    pub fn n(&self) -> u64 {
        self.n
    }

    /// Dimension.
    pub fn dim(&self) -> u32 {
        self.dim
    }

    /// A call's view of the rows from `first` on.
    fn tensor<'a>(&self, first: u64, shape: &'a mut [i64; 2], ordinal: u32) -> Tensor<'a> {
        *shape = [(self.n - first) as i64, i64::from(self.dim)];
        let before = first * u64::from(self.dim) * self.value.bytes();
        Tensor::new(self.address + before, self.value.dl(), shape, ordinal)
    }

    /// Whether rows begin where a graph's search reads them, at multiples of 16 bytes.
    fn is_padded(&self) -> bool {
        self.address.is_multiple_of(16) && (u64::from(self.dim) * self.value.bytes()).is_multiple_of(16)
    }
}

/// How a distance of cuVS's becomes a score: `factor * distance + offset`, of which the higher is better.
///
/// cuVS returns for inner products the product itself, best first; for cosine `1 - cos`; for L2 the square.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    /// 1 or -1.
    pub factor: f32,
    /// 0 or 1.
    pub offset: f32,
}

impl Scale {
    /// That of a metric.
    pub fn of(metric: Metric) -> Scale {
        match metric {
            Metric::InnerProduct => Scale { factor: 1.0, offset: 0.0 },
            Metric::Cosine => Scale { factor: -1.0, offset: 1.0 },
            Metric::L2 => Scale { factor: -1.0, offset: 0.0 },
        }
    }

    /// The score.
    pub fn score(self, distance: f32) -> f32 {
        self.factor.mul_add(distance, self.offset)
    }
}

fn distance_type(metric: Metric) -> cuvsDistanceType {
    match metric {
        Metric::InnerProduct => InnerProduct,
        Metric::Cosine => CosineExpanded,
        Metric::L2 => L2Expanded,
    }
}

/// How a graph is searched.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Walk {
    /// As cuVS chooses: by one block a query if there are queries for two blocks on every multiprocessor and the list of candidates is at
    /// most 512 long, else by several.
    #[default]
    Auto,
    /// By one block a query; for lists of at most 1,024.
    OneBlock,
    /// By several blocks a query.
    SeveralBlocks,
    /// By one block a query, of a kernel that stays on the GPU and takes queries as they come: for small batches. Allocations and other
    /// kernels may have to wait for it to end.
    Persistent {
        /// After how many seconds without a query it ends.
        lifetime: f32,
        /// What share of the GPU it takes, above 0 and at most 1.
        device_usage: f32,
    },
}

/// What is asked of a search.
#[derive(Clone, Copy, Debug)]
pub struct Search<'a> {
    /// Queries, `[n_queries, dim]`, of the index's type.
    pub queries: DevicePtr,
    /// At least 1.
    pub n_queries: u32,
    /// Results of each, 1 to [`MAX_K`] and at most the number of vectors.
    pub k: u32,
    /// Effort.
    pub params: &'a SearchParams,
    /// Effort of a graph's search.
    pub walk: Walk,
    /// u32 words of bits, one for each vector of the index: those that may be returned. `None`: all.
    pub filter: Option<DevicePtr>,
}

/// Where the results go. Where there are fewer than `k`, rows are none of the index's.
#[derive(Clone, Copy, Debug)]
pub struct Neighbors {
    /// i64 `[n_queries, k]`
    pub rows: DevicePtr,
    /// f32 `[n_queries, k]`; see [`Scale`].
    pub distances: DevicePtr,
}

/// A graph in device memory, which is the index's, and can't be held beyond it:
/// ```compile_fail,E0505
/// fn held(index: tastemaker::device::cuda::cuvs::Index) -> u64 {
///     let graph = index.graph().unwrap();
///     drop(index);
///     graph.address
/// }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Graph<'a> {
    /// u32 `[n, degree]`, row-major
    pub address: DevicePtr,
    /// Number of vectors.
    pub n: u64,
    /// Neighbours of each.
    pub degree: u32,
    index: std::marker::PhantomData<&'a Index>,
}

/// Length of the list of candidates of a graph's search for `k`: cuVS makes it a multiple of 32.
pub fn itopk_size(k: u32, params: &SearchParams) -> usize {
    params.ef_search_of(k as usize).next_multiple_of(ITOPK_STEP)
}

/// How many to fetch so that `k` are left of them, but for bad luck, where `share` of all rows are admitted and the index takes no filter;
/// `None` where that is more than [`MAX_K`], and an exact search with a filter is the better one.
///
/// Four standard deviations above the mean, as if admitted rows were spread evenly; with [`SearchParams::refine_ratio`]'s candidates where
/// `refined`.
pub fn fetch(k: u32, share: f64, params: &SearchParams, refined: bool) -> Option<u32> {
    let wanted = if refined { params.n_refined_of(k as usize, IndexKind::IvfPq) as f64 } else { f64::from(k) };
    if share >= 1.0 {
        // Refining fewer than usual is better than none.
        return Some((wanted as u32).min(MAX_K).max(k));
    }
    let share = share.max(1e-9);
    let mean = wanted / share;
    let spread = (wanted * (1.0 - share)).sqrt() / share;
    let fetched = (mean + 4.0 * spread).ceil();
    let least = (f64::from(k) / share + 4.0 * (f64::from(k) * (1.0 - share)).sqrt() / share).ceil();
    if least > f64::from(MAX_K) { None } else { Some(fetched.min(f64::from(MAX_K)) as u32) }
}

#[derive(Debug)]
enum Raw {
    BruteForce(Owned<cuvsBruteForceIndex>),
    IvfFlat(Owned<cuvsIvfFlatIndex>),
    IvfPq(Owned<cuvsIvfPqIndex>),
    Cagra(Owned<cuvsCagraIndex>, Option<Owned<cuvsDataset>>),
}

/// An index on a GPU, for all its workers.
///
/// [`Kind::BruteForce`] and [`Kind::Cagra`] look at the rows that they were made of and hold them; the others have copies.
#[derive(Debug)]
pub struct Index {
    // Before the rows that it looks at.
    raw: Raw,
    rows: Option<Rows>,
    cuvs: &'static Cuvs,
    metric: Metric,
    n: u64,
    dim: u32,
    value: Value,
    n_lists: u32,
}

// SAFETY: cuVS's indexes belong to no thread: they hold device memory, whose context the caller of every function here makes current, as
// `Resources::new` demands.
unsafe impl Send for Index {}
// SAFETY: through `&self` it is searched, stored and looked at only, which in C++ takes it by a constant reference. cuVS's tests search one
// index from many threads, each with resources of its own, and what a search of a graph makes when it first needs it lies behind a lock.
unsafe impl Sync for Index {}

impl Index {
    /// Makes an index of `rows`. Waits for the GPU.
    ///
    /// # Errors
    /// Options out of range, or what cuVS says.
    ///
    /// # Safety
    /// As [`Resources::new`]: the context is current. What writes the rows is before this on the resources' stream, or done.
    pub unsafe fn build(
        resources: &mut Resources,
        options: Options,
        metric: Metric,
        rows: Rows,
    ) -> Result<Index, Error> {
        options.check(rows.n)?;
        let (cuvs, ordinal) = (resources.cuvs, resources.ordinal);
        let (mut shape, distance) = ([0; 2], distance_type(metric));
        let mut n_lists_made = 0;
        let raw = match options {
            Options::BruteForce => {
                let index = owned!(cuvs, cuvsBruteForceIndexCreate, cuvsBruteForceIndexDestroy)?;
                let mut data = rows.tensor(0, &mut shape, ordinal);
                // SAFETY: handles of this library; `rows` vouches for the memory, and stays with the index.
                unsafe { call!(cuvs, cuvsBruteForceBuild(resources.raw(), data.raw(), distance, 0.0, index.raw())) }?;
                Raw::BruteForce(index)
            }
            Options::IvfFlat { n_lists, kmeans_n_iters } => {
                let mut params = owned!(cuvs, cuvsIvfFlatIndexParamsCreate, cuvsIvfFlatIndexParamsDestroy)?;
                let fields = params.fields();
                (fields.metric, fields.n_lists, fields.kmeans_n_iters) = (distance, n_lists, kmeans_n_iters);
                let index = owned!(cuvs, cuvsIvfFlatIndexCreate, cuvsIvfFlatIndexDestroy)?;
                let mut data = rows.tensor(0, &mut shape, ordinal);
                // SAFETY: handles of this library; `rows` vouches for the memory while it is copied.
                unsafe { call!(cuvs, cuvsIvfFlatBuild(resources.raw(), params.raw(), data.raw(), index.raw())) }?;
                n_lists_made = n_lists;
                Raw::IvfFlat(index)
            }
            Options::IvfPq { n_lists, kmeans_n_iters, pq_dim, pq_bits } => {
                let mut params = owned!(cuvs, cuvsIvfPqIndexParamsCreate, cuvsIvfPqIndexParamsDestroy)?;
                let fields = params.fields();
                (fields.metric, fields.n_lists, fields.kmeans_n_iters) = (distance, n_lists, kmeans_n_iters);
                (fields.pq_dim, fields.pq_bits) = (pq_dim, pq_bits);
                let index = owned!(cuvs, cuvsIvfPqIndexCreate, cuvsIvfPqIndexDestroy)?;
                let mut data = rows.tensor(0, &mut shape, ordinal);
                // SAFETY: handles of this library; `rows` vouches for the memory while it is copied.
                unsafe { call!(cuvs, cuvsIvfPqBuild(resources.raw(), params.raw(), data.raw(), index.raw())) }?;
                n_lists_made = n_lists;
                Raw::IvfPq(index)
            }
            Options::Cagra { graph_degree, intermediate_graph_degree } => {
                let mut params = owned!(cuvs, cuvsCagraIndexParamsCreate, cuvsCagraIndexParamsDestroy)?;
                let fields = params.fields();
                fields.metric = distance;
                // cuVS warns of a degree that is not below the number of vectors, and makes it so.
                fields.graph_degree = graph_degree as usize;
                fields.intermediate_graph_degree = intermediate_graph_degree as usize;
                fields.build_algo = AUTO_SELECT;
                let index = owned!(cuvs, cuvsCagraIndexCreate, cuvsCagraIndexDestroy)?;
                let dataset = dataset(resources, &rows)?;
                // SAFETY: handles of this library; rows and dataset stay with the index.
                unsafe { call!(cuvs, cuvsCagraBuild(resources.raw(), params.raw(), dataset.raw(), index.raw())) }?;
                Raw::Cagra(index, Some(dataset))
            }
        };
        resources.synchronize()?;
        Ok(Index::of(raw, cuvs, metric, n_lists_made, rows))
    }

    fn of(raw: Raw, cuvs: &'static Cuvs, metric: Metric, n_lists: u32, rows: Rows) -> Index {
        let (n, dim, value) = (rows.n, rows.dim, rows.value);
        let looks_at_rows = matches!(raw, Raw::BruteForce(_) | Raw::Cagra(..));
        Index { raw, rows: looks_at_rows.then_some(rows), cuvs, metric, n, dim, value, n_lists }
    }

    /// A [`Kind::Cagra`] over a graph that was made before ([`Self::graph`]): `[n, degree]` rows, which are copied to the GPU. Waits for it.
    ///
    /// # Errors
    /// A graph that does not fit the rows or leads beyond them; rows that do not begin at multiples of 16 bytes; or what cuVS says.
    ///
    /// # Safety
    /// As [`Self::build`].
    pub unsafe fn of_graph(
        resources: &mut Resources,
        metric: Metric,
        rows: Rows,
        graph: &[u32],
        degree: u32,
    ) -> Result<Index, Error> {
        within("graph_degree", degree.into(), 1, 1024)?;
        let links = rows.n * u64::from(degree);
        within("the graph's links", graph.len() as u64, links, links)?;
        within("the graph's farthest row", graph.iter().copied().max().unwrap_or(0).into(), 0, rows.n - 1)?;
        if !rows.is_padded() {
            return Err(Error::Unsupported("graph over rows that do not begin at multiples of 16 bytes"));
        }
        let cuvs = resources.cuvs;
        let (mut shape, mut graph_shape) = ([0; 2], [rows.n as i64, i64::from(degree)]);
        let index = owned!(cuvs, cuvsCagraIndexCreate, cuvsCagraIndexDestroy)?;
        let mut data = rows.tensor(0, &mut shape, resources.ordinal);
        let mut graph = Tensor::of_host(graph, (kDLUInt, 32), &mut graph_shape);
        let (handle, metric_type) = (resources.raw(), distance_type(metric));
        // SAFETY: handles of this library, tensors that live until it returns; the rows stay with the index, and the graph, which is the
        // host's, is copied before `synchronize` returns.
        unsafe { call!(cuvs, cuvsCagraIndexFromArgs(handle, metric_type, graph.raw(), data.raw(), index.raw())) }?;
        resources.synchronize()?;
        Ok(Index::of(Raw::Cagra(index, None), cuvs, metric, 0, rows))
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self.raw {
            Raw::BruteForce(_) => Kind::BruteForce,
            Raw::IvfFlat(_) => Kind::IvfFlat,
            Raw::IvfPq(_) => Kind::IvfPq,
            Raw::Cagra(..) => Kind::Cagra,
        }
    }

    /// What it was made for.
    pub fn metric(&self) -> Metric {
        self.metric
    }

    /// Number of vectors.
    pub fn n(&self) -> u64 {
        self.n
    }

    /// Dimension.
    pub fn dim(&self) -> u32 {
        self.dim
    }

    /// Inverted lists; 0 for kinds without.
    pub fn n_lists(&self) -> u32 {
        self.n_lists
    }

    /// Puts a search on the resources' stream. What of `search` is out of range is found before anything is called.
    ///
    /// # Errors
    /// A number out of range, a filter that the kind does not take, or what cuVS says.
    ///
    /// # Safety
    /// As [`Resources::new`]: the context is current. Memory of the sizes that [`Search`] and [`Neighbors`] say lies at their addresses
    /// until the stream is done, and meanwhile nobody else writes to the former or uses the latter; queries and filter are written on that
    /// stream, or done.
    pub unsafe fn search(&self, resources: &mut Resources, search: &Search<'_>, out: Neighbors) -> Result<(), Error> {
        let &Search { queries, n_queries, k, params, walk, filter } = search;
        within("n_queries", n_queries.into(), 1, i32::MAX as u64)?;
        within("k", k.into(), 1, self.n.min(MAX_K.into()))?;
        if filter.is_some() && !self.kind().filters() {
            return Err(Error::Unsupported("filter for ivf_pq"));
        }
        let (cuvs, ordinal, handle) = (resources.cuvs, resources.ordinal, resources.raw());
        let shape = [i64::from(n_queries), i64::from(k)];
        let (mut rows_shape, mut distances_shape) = (shape, shape);
        let mut queries_shape = [shape[0], i64::from(self.dim)];
        let mut words = [self.n.div_ceil(32) as i64];
        let mut queries = Tensor::new(queries, self.value.dl(), &mut queries_shape, ordinal);
        let mut rows = Tensor::new(out.rows, (kDLInt, 64), &mut rows_shape, ordinal);
        let mut distances = Tensor::new(out.distances, Value::F32.dl(), &mut distances_shape, ordinal);
        let mut bits = filter.map(|filter| Tensor::new(filter, (kDLUInt, 32), &mut words, ordinal));
        let filter = match &mut bits {
            Some(bits) => cuvsFilter { addr: bits.raw() as usize, kind: BITSET },
            None => cuvsFilter { addr: 0, kind: NO_FILTER },
        };
        let n_probes = || params.n_probes_of(k as usize, self.n as usize, self.n_lists as usize) as u32;
        let (queries, rows, distances) = (queries.raw(), rows.raw(), distances.raw());
        match &self.raw {
            Raw::BruteForce(index) => {
                // SAFETY: handles of this library, tensors that live until it returns; the caller vouches for their memory.
                unsafe { call!(cuvs, cuvsBruteForceSearch(handle, index.raw(), queries, rows, distances, filter)) }
            }
            Raw::IvfFlat(index) => {
                let params = &mut resources.ivf_flat;
                params.fields().n_probes = n_probes();
                let (params, index) = (params.raw(), index.raw());
                // SAFETY: as above.
                unsafe { call!(cuvs, cuvsIvfFlatSearch(handle, params, index, queries, rows, distances, filter)) }
            }
            Raw::IvfPq(index) => {
                let params = &mut resources.ivf_pq;
                params.fields().n_probes = n_probes();
                let (params, index) = (params.raw(), index.raw());
                // SAFETY: as above.
                unsafe { call!(cuvs, cuvsIvfPqSearch(handle, params, index, queries, rows, distances)) }
            }
            Raw::Cagra(index, _) => {
                let itopk_size = itopk_size(k, params);
                let most = match walk {
                    Walk::OneBlock | Walk::Persistent { .. } => 1024,
                    Walk::Auto | Walk::SeveralBlocks => MAX_ITOPK,
                };
                within("itopk_size", itopk_size as u64, 1, most as u64)?;
                let params = &mut resources.cagra;
                let fields = params.fields();
                fields.itopk_size = itopk_size;
                fields.algo = match walk {
                    Walk::Auto => AUTO,
                    Walk::SeveralBlocks => MULTI_CTA,
                    Walk::OneBlock | Walk::Persistent { .. } => SINGLE_CTA,
                };
                fields.persistent = false;
                if let Walk::Persistent { lifetime, device_usage } = walk {
                    within("device_usage, percent", (device_usage * 100.0) as u64, 1, 100)?;
                    fields.persistent = true;
                    (fields.persistent_lifetime, fields.persistent_device_usage) = (lifetime, device_usage);
                }
                let (params, index) = (params.raw(), index.raw());
                // SAFETY: as above.
                unsafe { call!(cuvs, cuvsCagraSearch(handle, params, index, queries, rows, distances, filter)) }
            }
        }
    }

    /// Takes further vectors in: those of `extended` behind the [`Self::n`] first, which are what the index has. Row numbers go on. Waits
    /// for the GPU. Clusters and codes are not trained anew; a graph links the new vectors to what is there.
    ///
    /// `ids`: i64 `[new vectors]`, the new row numbers in ascending order. Only inverted lists read them.
    ///
    /// # Errors
    /// Rows that do not fit, or what cuVS says; the index is then as it was, or in part extended, and should be made anew.
    ///
    /// # Safety
    /// As [`Self::build`], and `ids` as described.
    pub unsafe fn extend(&mut self, resources: &mut Resources, extended: Rows, ids: DevicePtr) -> Result<(), Error> {
        within("dim", extended.dim.into(), self.dim.into(), self.dim.into())?;
        within("n_rows", extended.n, self.n + 1, u64::from(u32::MAX) - 1)?;
        if extended.value != self.value {
            return Err(Error::Unsupported("index of f32 and f16 at once"));
        }
        let (cuvs, ordinal, handle) = (resources.cuvs, resources.ordinal, resources.raw());
        let (mut shape, mut ids_shape) = ([0; 2], [(extended.n - self.n) as i64]);
        let mut new = extended.tensor(self.n, &mut shape, ordinal);
        let mut ids = Tensor::new(ids, (kDLInt, 64), &mut ids_shape, ordinal);
        match &mut self.raw {
            Raw::BruteForce(_) => {
                // SAFETY: as here.
                *self = unsafe { Index::build(resources, Options::BruteForce, self.metric, extended) }?;
                return Ok(());
            }
            Raw::IvfFlat(index) => {
                // SAFETY: handles of this library, tensors that live until it returns, memory that rows and caller vouch for.
                unsafe { call!(cuvs, cuvsIvfFlatExtend(handle, new.raw(), ids.raw(), index.raw())) }?;
            }
            Raw::IvfPq(index) => {
                // SAFETY: as above.
                unsafe { call!(cuvs, cuvsIvfPqExtend(handle, new.raw(), ids.raw(), index.raw())) }?;
            }
            Raw::Cagra(index, old) => {
                let params = owned!(cuvs, cuvsCagraExtendParamsCreate, cuvsCagraExtendParamsDestroy)?;
                let dataset = dataset(resources, &extended)?;
                let first = self.n as i64;
                // SAFETY: as above; the index looks at the new dataset from now on, which stays with it.
                unsafe { call!(cuvs, cuvsCagraExtend(handle, params.raw(), dataset.raw(), first, index.raw())) }?;
                resources.synchronize()?;
                *old = Some(dataset);
                self.n = extended.n;
                self.rows = Some(extended);
                return Ok(());
            }
        }
        resources.synchronize()?;
        self.n = extended.n;
        Ok(())
    }

    /// Writes what was trained and linked to a file of cuVS's own; [`Self::load`] wants the rows again. Waits for the GPU. For graphs there
    /// is a way without such files, [`Self::graph`] and [`Self::of_graph`].
    ///
    /// # Errors
    /// [`Cuvs::files`]; [`Kind::BruteForce`], which has nothing to store; or what cuVS says, of the disk too.
    pub fn store(&self, resources: &mut Resources, path: &Path) -> Result<(), Error> {
        let (cuvs, handle, name) = (resources.cuvs, resources.raw(), c_path(path)?);
        cuvs.files.map_err(Error::Unsupported)?;
        let name = name.as_ptr();
        // SAFETY: handles of this library, and a text that lives until it returns.
        unsafe {
            match &self.raw {
                Raw::BruteForce(_) => return Err(Error::Unsupported("file for brute_force")),
                Raw::IvfFlat(index) => call!(cuvs, cuvsIvfFlatSerialize(handle, name, index.raw())),
                Raw::IvfPq(index) => call!(cuvs, cuvsIvfPqSerialize(handle, name, index.raw())),
                Raw::Cagra(index, _) => call!(cuvs, cuvsCagraSerializeGraph(handle, name, index.raw())),
            }
        }?;
        resources.synchronize()
    }

    /// Reads what [`Self::store`] wrote, of the same kind, metric and rows, by the same version of cuVS. Waits for the GPU.
    ///
    /// The file must be trusted: cuVS checks little of it. Bundles keep checksums.
    ///
    /// # Errors
    /// [`Cuvs::files`]; a file that is not such a one, or does not fit the rows.
    ///
    /// # Safety
    /// As [`Self::build`].
    pub unsafe fn load(
        resources: &mut Resources,
        kind: Kind,
        metric: Metric,
        rows: Rows,
        path: &Path,
    ) -> Result<Index, Error> {
        let (cuvs, handle, file) = (resources.cuvs, resources.raw(), c_path(path)?);
        cuvs.files.map_err(Error::Unsupported)?;
        let (mut dim, mut n, mut n_lists) = (0, rows.n as i64, 0);
        let raw = match kind {
            Kind::BruteForce => return Err(Error::Unsupported("file for brute_force")),
            Kind::IvfFlat => {
                let index = owned!(cuvs, cuvsIvfFlatIndexCreate, cuvsIvfFlatIndexDestroy)?;
                // SAFETY: handles of this library, a text that lives until it returns, numbers that are written.
                unsafe {
                    call!(cuvs, cuvsIvfFlatDeserialize(handle, file.as_ptr(), index.raw()))?;
                    call!(cuvs, cuvsIvfFlatIndexGetDim(index.raw(), &mut dim))?;
                    call!(cuvs, cuvsIvfFlatIndexGetNLists(index.raw(), &mut n_lists))?;
                }
                Raw::IvfFlat(index)
            }
            Kind::IvfPq => {
                let index = owned!(cuvs, cuvsIvfPqIndexCreate, cuvsIvfPqIndexDestroy)?;
                // SAFETY: as above.
                unsafe {
                    call!(cuvs, cuvsIvfPqDeserialize(handle, file.as_ptr(), index.raw()))?;
                    call!(cuvs, cuvsIvfPqIndexGetDim(index.raw(), &mut dim))?;
                    call!(cuvs, cuvsIvfPqIndexGetSize(index.raw(), &mut n))?;
                    call!(cuvs, cuvsIvfPqIndexGetNLists(index.raw(), &mut n_lists))?;
                }
                Raw::IvfPq(index)
            }
            Kind::Cagra => {
                let index = owned!(cuvs, cuvsCagraIndexCreate, cuvsCagraIndexDestroy)?;
                let dataset = dataset(resources, &rows)?;
                // SAFETY: as above; rows and dataset stay with the index.
                unsafe {
                    call!(cuvs, cuvsCagraDeserializeGraph(handle, file.as_ptr(), index.raw()))?;
                    call!(cuvs, cuvsCagraIndexGetSize(index.raw(), &mut n))?;
                    // Before a search could look beyond the rows.
                    within("the graph's n_rows", n as u64, rows.n, rows.n)?;
                    call!(cuvs, cuvsCagraUpdateDataset(handle, dataset.raw(), index.raw()))?;
                    call!(cuvs, cuvsCagraIndexGetDims(index.raw(), &mut dim))?;
                }
                Raw::Cagra(index, Some(dataset))
            }
        };
        resources.synchronize()?;
        within("the index's dim", dim as u64, rows.dim.into(), rows.dim.into())?;
        within("the index's n_rows", n as u64, rows.n, rows.n)?;
        Ok(Index::of(raw, cuvs, metric, n_lists as u32, rows))
    }

    /// The graph of a [`Kind::Cagra`], as [`crate::index::Hnsw::from_graph`] takes it when it was copied to the host.
    ///
    /// # Errors
    /// Another kind, or what cuVS says.
    pub fn graph(&self) -> Result<Graph<'_>, Error> {
        let Raw::Cagra(index, _) = &self.raw else { return Err(Error::Unsupported("graph but that of cagra")) };
        let mut view = MaybeUninit::<DLManagedTensor>::zeroed();
        // SAFETY: a handle of this library; it fills the structure, for which all zeros are a value, and of which the deleter gives back what
        // it allocated for the shape.
        let (tensor, shape) = unsafe {
            call!(self.cuvs, cuvsCagraIndexGetGraph(index.raw(), view.as_mut_ptr()))?;
            let view = view.assume_init_mut();
            let tensor = view.dl_tensor;
            let is_plain = tensor.ndim == 2 && !tensor.shape.is_null() && tensor.strides.is_null();
            let shape = is_plain.then(|| tensor.shape.cast::<[i64; 2]>().read());
            if let Some(delete) = view.deleter {
                delete(view);
            }
            (tensor, shape)
        };
        match shape {
            Some([n, degree]) if (tensor.dtype.code, tensor.dtype.bits) == (kDLUInt as u8, 32) => Ok(Graph {
                address: tensor.data as DevicePtr + tensor.byte_offset,
                n: n as u64,
                degree: degree as u32,
                index: std::marker::PhantomData,
            }),
            _ => Err(Error::Unsupported("graph but one of u32, row by row")),
        }
    }
}

/// Rows as a graph's index wants them, looked at where they lie if they lie so.
fn dataset(resources: &Resources, rows: &Rows) -> Result<Owned<cuvsDataset>, Error> {
    let (cuvs, mut shape) = (resources.cuvs, [0; 2]);
    let mut data = rows.tensor(0, &mut shape, resources.ordinal);
    let handle = resources.raw();
    // SAFETY: handles of this library, and a tensor that lives until it returns; what looks at the rows is kept with them.
    unsafe {
        let make = |raw: *mut *mut cuvsDataset| match rows.is_padded() {
            true => call!(cuvs, cuvsDatasetMakePaddedView(handle, data.raw(), raw)),
            false => call!(cuvs, cuvsDatasetMakePadded(handle, data.raw(), CUVS_DATASET_MEM_TYPE_DEVICE, raw)),
        };
        Owned::new(cuvs, make, ("cuvsDatasetDestroy", cuvs.api.cuvsDatasetDestroy))
    }
}

fn c_path(path: &Path) -> Result<CString, Error> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Error::Unsupported("file whose name holds a NUL"))
}
