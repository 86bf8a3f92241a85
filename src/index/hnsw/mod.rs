//! Hierarchical navigable small worlds: a graph in which each vector knows near ones in different directions, and a walk from link
//! to link comes to those nearest to a query (Malkov and Yashunin, TPAMI 2020).
//!
//! Departures from the paper:
//! - Walks read a copy in 8 bits a dimension ([`codes`]); what they find is scored exactly.
//! - Vectors are inserted in batches, without locks, and the graph depends on the seed alone ([`build`]).
//! - For inner products the graph is that of the vectors with one more coordinate that makes all of them as long as the longest
//!   (Bachrach et al., RecSys 2014): distances then say the same as products, and with lengths alike nothing changes. Queries lie
//!   far from such vectors, so walks begin from the longest as well. A graph of the products themselves misses a third of the best
//!   500, whatever the effort.
//! - Neighbours are left out a little less readily ([`build`]).
//! - Where a walk would look at no fewer rows than there are, or than a filter admits, they are scanned.
//! - The best found are kept in a buffer that is pruned now and then, not in a heap.

mod build;
mod codes;
mod search;
#[cfg(test)]
mod tests;

pub use codes::Lifted;
pub use search::NO_LINK;

use super::exact::{Exact, Rows};
use super::simd::Simd;
use super::{Filter, HnswOptions, IndexKind, Kernel, SearchParams, SearchScratch, Stored, VectorIndex};
use crate::candidates::{Packed, Scored, keep_best};
use crate::catalog::array::Array;
use crate::catalog::generation::{Matrix, Metric};
use codes::Codes;
use rayon::prelude::*;
use search::Layer;

pub use search::Walk;

/// Rows that a scan looks at in the time in which a walk looks at one: 6.5 and 14 ns at 64 dimensions.
const SCAN_ADVANTAGE: f64 = 2.0;
/// Rows that a scan scores at a time.
const SCAN_BLOCK: usize = 256;
/// Most neighbours that a graph may have.
const MAX_DEGREE: usize = 1024;
/// Rows, spread over all, from which walks begin where there are no upper layers.
const SPREAD_STARTS: usize = 256;
/// Inner product: the longest vectors, from which walks begin as well, at most so many.
const LONG_STARTS: usize = 512;
/// How much longer than the root mean square they are.
const LONG: f32 = 1.05;

/// What an index consists of, as a bundle stores it.
#[derive(Clone, Debug, Default)]
pub struct HnswParts {
    /// Most neighbours of a vector on the bottom layer.
    pub graph_degree: u32,
    /// `[n, graph_degree]` rows; a list that is not full ends with [`NO_LINK`].
    pub bottom: Array<u32>,
    /// Most neighbours of a node on the upper layers.
    pub upper_degree: u32,
    /// Number of nodes on each upper layer, lowest first; never rising.
    pub layer_sizes: Array<u32>,
    /// Row of each node of the upper layers; a layer's nodes are the first of them, and the first of all is the entry.
    pub upper_rows: Array<u32>,
    /// `[layer_sizes[l], upper_degree]` nodes for each upper layer in turn, as in `bottom`.
    pub upper: Array<u32>,
    /// `[dim]`: what vectors are coded about.
    pub center: Array<f32>,
    /// Rows from which walks on the bottom layer begin, beside the one to which the upper layers lead.
    pub starts: Array<u32>,
    /// `[n, 3 + dim / 4]`: the vectors in 8 bits a dimension, as the index codes them.
    pub codes: Array<u32>,
}

/// A graph over f32 or f16 rows.
#[derive(Debug)]
pub struct Hnsw {
    exact: Exact,
    codes: Codes,
    parts: HnswParts,
    /// What a search does that does not say.
    defaults: SearchParams,
}

/// Makes graphs elsewhere than on the threads of [`Hnsw::build`].
pub trait GraphMaker: std::fmt::Debug + Send + Sync {
    /// For messages.
    fn name(&self) -> String;

    /// The links of a graph without layers over `rows`, as [`Hnsw::from_graph`] takes them, and its degree, of at most
    /// `options.graph_degree`. Near is what [`Hnsw::build`] takes for near.
    ///
    /// # Errors
    /// What is in the way, for the operator.
    fn make(&self, rows: &Rows, metric: Metric, options: &HnswOptions) -> Result<(Vec<u32>, u32), String>;
}

/// The options in their ranges.
fn check(options: &HnswOptions) -> Result<(), String> {
    if !(4..=512).contains(&options.graph_degree) {
        return Err(format!("graph_degree is {}, not 4 to 512", options.graph_degree));
    }
    if options.ef_construction < options.graph_degree || options.ef_construction > 1 << 20 {
        let least = options.graph_degree;
        return Err(format!("ef_construction is {}, not graph_degree ({least}) to 1048576", options.ef_construction));
    }
    Ok(())
}

impl Hnsw {
    /// Builds the graph on the threads of rayon. `progress` is told of every step: its name, and how many of how many units are
    /// done.
    ///
    /// # Errors
    /// Options out of range, by name; or too many rows.
    pub fn build(
        options: &HnswOptions,
        exact: Exact,
        progress: &(dyn Fn(&str, u64, u64) + Sync),
    ) -> Result<Self, String> {
        check(options)?;
        let n = n_rows(&exact)?;
        let codes = Codes::new(exact.rows(), exact.metric(), Simd::detect());
        let graph = build::build(&codes, n, options, &|done| progress("graph", done, n as u64));
        let graph_is_layered = !graph.upper.is_empty();
        let parts = HnswParts {
            graph_degree: options.graph_degree,
            bottom: graph.bottom.links.into(),
            upper_degree: options.graph_degree / 2,
            layer_sizes: graph.upper.iter().map(|links| links.n_nodes() as u32).collect::<Vec<_>>().into(),
            upper_rows: graph.upper_rows.into(),
            upper: graph.upper.into_iter().flat_map(|links| links.links).collect::<Vec<_>>().into(),
            starts: starts(&exact, graph_is_layered).into(),
            center: codes.center().clone(),
            codes: codes.words().clone(),
        };
        Ok(Hnsw { exact, codes, parts, defaults: SearchParams::default() })
    }

    /// Takes what [`Self::parts`] gave. Every link is checked, so that no search can go astray.
    ///
    /// # Errors
    /// What does not fit, by its name.
    pub fn from_parts(parts: HnswParts, exact: Exact) -> Result<Self, String> {
        let n = n_rows(&exact)?;
        parts.validate(n)?;
        let (center, words) = (parts.center.clone(), parts.codes.clone());
        let codes = Codes::from_parts(exact.rows(), exact.metric(), Simd::detect(), center, words)?;
        Ok(Hnsw { exact, codes, parts, defaults: SearchParams::default() })
    }

    /// Takes a graph without layers that was made elsewhere, as CAGRA exports it: rows `[n, graph_degree]`.
    ///
    /// # Errors
    /// If the graph does not fit the matrix.
    pub fn from_graph(graph: Array<u32>, graph_degree: u32, exact: Exact) -> Result<Self, String> {
        let n = n_rows(&exact)?;
        let mut parts = HnswParts { graph_degree, bottom: graph, ..HnswParts::default() };
        parts.validate(n)?;
        let codes = Codes::new(exact.rows(), exact.metric(), Simd::detect());
        parts.starts = starts(&exact, false).into();
        (parts.center, parts.codes) = (codes.center().clone(), codes.words().clone());
        Ok(Hnsw { exact, codes, parts, defaults: SearchParams::default() })
    }

    /// Over a graph of `maker`'s, of the degree that `options` say, or less where there are fewer vectors.
    ///
    /// # Errors
    /// As [`Self::build`], and what the maker says, or makes that does not fit.
    pub fn made_by(
        maker: &dyn GraphMaker,
        options: &HnswOptions,
        matrix: &Matrix,
        metric: Metric,
    ) -> Result<Self, String> {
        check(options)?;
        let exact = Exact::new(matrix.clone(), metric, Kernel::detect());
        let (links, degree) = maker.make(exact.rows(), metric, options)?;
        Self::from_graph(links.into(), degree, exact)
            .map_err(|reason| format!("the graph by {}: {reason}", maker.name()))
    }

    /// With what a search does that does not say.
    pub fn with_defaults(self, defaults: SearchParams) -> Self {
        Hnsw { defaults, ..self }
    }

    /// What it consists of.
    pub fn parts(&self) -> &HnswParts {
        &self.parts
    }

    /// Walks to the nodes nearest to the query that `walk` holds.
    fn walk(&self, ef: usize, filter: Filter<'_>, walk: &mut Walk) {
        let parts = &self.parts;
        let (mut entry, degree) = (None, parts.upper_degree as usize);
        let mut end = parts.upper.len();
        for &size in parts.layer_sizes.iter().rev() {
            let from = end - size as usize * degree;
            let layer = Layer { links: &parts.upper[from..end], degree, rows: Some(&parts.upper_rows) };
            entry = Some(walk.descend(layer, &self.codes, entry.unwrap_or(0)));
            end = from;
        }
        let bottom = Layer { links: &parts.bottom, degree: parts.graph_degree as usize, rows: None };
        let entry = entry.map(|node| parts.upper_rows[node as usize]);
        let starts = parts.starts.iter().copied().chain(entry);
        walk.beam(bottom, &self.codes, ef, starts, |row| filter.allows(row));
    }

    /// Looks at every row that the filter admits, for the best `keep`.
    fn scan(&self, keep: usize, filter: Filter<'_>, walk: &mut Walk, block: &mut Vec<u32>) {
        walk.found.begin(keep);
        block.clear();
        filter.each(self.exact.rows().n_rows(), |row| {
            block.push(row);
            if block.len() == SCAN_BLOCK {
                walk.offer(&self.codes, block);
                block.clear();
            }
        });
        walk.offer(&self.codes, block);
    }
}

/// The rows from which walks begin: spread over all where no layers lead anywhere; and for inner products those much longer than
/// others, as any query may have them among its best.
fn starts(exact: &Exact, is_layered: bool) -> Vec<u32> {
    let rows = exact.rows();
    let n = rows.n_rows();
    let n_spread = if is_layered { 0 } else { n.min(SPREAD_STARTS) };
    let mut starts: Vec<u32> = (0..n_spread).map(|at| (at * n / n_spread) as u32).collect();
    if exact.metric() == Metric::InnerProduct {
        let square = |row: &mut Vec<f32>, at: u32| {
            row.clear();
            rows.extend_row(at, row);
            Packed::from(Scored { row: at, score: exact.kernel().dot(row, row) })
        };
        let mut squares: Vec<Packed> = (0..n as u32).into_par_iter().map_init(Vec::new, square).collect();
        let sum: f64 = squares.iter().map(|&entry| f64::from(Scored::from(entry).score)).sum();
        let least = LONG * LONG * (sum / n as f64) as f32;
        keep_best(&mut squares, LONG_STARTS);
        let longest = squares.iter().map(|&entry| Scored::from(entry)).filter(|long| long.score > least);
        starts.extend(longest.map(|long| long.row));
    }
    starts
}

fn n_rows(exact: &Exact) -> Result<usize, String> {
    let n = exact.rows().n_rows();
    match u32::try_from(n) {
        Ok(NO_LINK) | Err(_) => Err(format!("{n} rows, at most {} are possible", NO_LINK - 1)),
        Ok(_) => Ok(n),
    }
}

impl HnswParts {
    fn validate(&self, n: usize) -> Result<(), String> {
        let degree = self.graph_degree as usize;
        let check_links = |name: &str, links: &[u32], degree: usize, n: usize| {
            if !(1..=MAX_DEGREE).contains(&degree) {
                return Err(format!("{name}: degree is {degree}, not 1 to {MAX_DEGREE}"));
            }
            if Some(links.len()) != n.checked_mul(degree) {
                return Err(format!("{name}: {} links, not {n} * {degree}", links.len()));
            }
            // `NO_LINK` wraps to 0; written so that it becomes vector code.
            let most = links.iter().fold(0, |most, link| most.max(link.wrapping_add(1)));
            if most as usize > n { Err(format!("{name}: a link to {}, of {n}", most - 1)) } else { Ok(()) }
        };
        check_links("bottom", &self.bottom, degree, n)?;
        let mut from = 0;
        for (layer, size) in self.layer_sizes.iter().map(|&size| size as usize).enumerate() {
            let before = if layer == 0 { self.upper_rows.len() } else { self.layer_sizes[layer - 1] as usize };
            if size == 0 || size > before || layer == 0 && size != before {
                return Err(format!("layer_sizes: layer {} has {size} nodes, that below {before}", layer + 1));
            }
            let degree = self.upper_degree as usize;
            let links = self.upper.get(from..from + size * degree).ok_or("upper: too short")?;
            check_links("upper", links, degree, size)?;
            from += links.len();
        }
        if from != self.upper.len() {
            return Err(format!("upper: {} links, not {from}", self.upper.len()));
        }
        match self.upper_rows.iter().find(|&&row| row as usize >= n) {
            Some(row) => Err(format!("upper_rows: row {row}, of {n}")),
            None if self.layer_sizes.is_empty() && !self.upper_rows.is_empty() => {
                Err("upper_rows: without layers".into())
            }
            None => match self.starts.iter().find(|&&row| row as usize >= n) {
                Some(row) => Err(format!("starts: row {row}, of {n}")),
                None => Ok(()),
            },
        }
    }

    /// Size in memory.
    pub fn bytes(&self) -> usize {
        let links = [&self.bottom, &self.layer_sizes, &self.upper_rows, &self.upper, &self.starts, &self.codes];
        links.into_iter().map(|array| size_of_val(&array[..])).sum::<usize>() + size_of_val(&self.center[..])
    }
}

impl VectorIndex for Hnsw {
    fn kind(&self) -> IndexKind {
        IndexKind::Hnsw
    }

    fn dim(&self) -> usize {
        self.exact.rows().dim()
    }

    fn bytes(&self) -> usize {
        self.parts.bytes() + size_of_val(self.exact.norms())
    }

    fn search(
        &self,
        query: &[f32],
        k: usize,
        filter: Filter<'_>,
        params: &SearchParams,
        scratch: &mut SearchScratch,
        out: &mut Vec<Scored>,
    ) {
        let n = self.exact.rows().n_rows();
        if k == 0 || n == 0 || query.len() != self.dim() {
            return;
        }
        let SearchScratch { block: converted, best, rows, exact, hnsw: walk, .. } = scratch;
        self.codes.prepare(query, &mut walk.query);
        let k = k.min(n);
        let ef = params.or(&self.defaults).ef_search_of(k).clamp(k, n);
        let share = filter.share(n);
        // A walk has to come across `ef` rows that are admitted, and looks at about half the neighbours of each row on its way.
        let walked = ef as f64 / share * f64::from(self.parts.graph_degree) / 2.0;
        let scanned = share * n as f64 / SCAN_ADVANTAGE;
        // The codes are right but for few: what comes later among the candidates is not among the best `k`.
        let n_scored = k + k / 4 + 16;
        if scanned <= walked {
            self.scan(n_scored, filter, walk, rows);
        } else {
            self.walk(ef, filter, walk);
            if walk.found.len() < k {
                // What was estimated was wrong, or there is no way to some of them.
                self.scan(n_scored, filter, walk, rows);
            }
        }
        rows.clear();
        rows.extend(walk.found.finish(n_scored).iter().map(|&entry| Scored::from(entry).row));
        self.exact.rescore(query, rows, converted, exact, best);
        keep_best(best, k);
        out.extend(best.iter().map(|&entry| Scored::from(entry)));
    }

    fn stored(&self) -> Stored<'_> {
        Stored::Hnsw(&self.parts)
    }

    fn scores(&self, query: &[f32], rows: &[u32], scratch: &mut SearchScratch, out: &mut Vec<f32>) {
        self.exact.scores(query, rows, &mut scratch.block, out);
    }
}
