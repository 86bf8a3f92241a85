//! The vector index in a bundle: its arrays, how it was made, and what it is searched with.

use serde::{Deserialize, Serialize};

use super::CatalogError;
use super::bundle::{Reader, Writer};
use super::generation::{Matrix, Metric};
use crate::index::{
    Blocks, Codes, Exact, Hnsw, HnswParts, IndexKind, IndexOptions, Ivf, IvfParts, Kernel, Lists, SearchParams, Simd,
    Stored, VectorIndex, Vectors, padded,
};
use std::sync::Arc;

/// What the manifest says of the index.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct IndexSpec {
    /// How it was made.
    pub options: IndexOptions,
    /// What it is searched with where a request does not say.
    #[serde(default)]
    pub search: SearchParams,
    /// What was measured when `search` was found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tuned: Option<Tuned>,
}

impl IndexSpec {
    /// Not tuned.
    pub fn new(options: IndexOptions) -> Self {
        IndexSpec { options, search: SearchParams::default(), tuned: None }
    }
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

/// Writes the arrays of an index.
pub(super) fn write(writer: &mut Writer, index: &dyn VectorIndex) -> Result<(), CatalogError> {
    match index.stored() {
        Stored::Nothing => Ok(()),
        Stored::Ivf(parts) => write_ivf(writer, parts),
        Stored::Hnsw(parts) => write_hnsw(writer, parts),
    }
}

fn write_hnsw(writer: &mut Writer, parts: &HnswParts) -> Result<(), CatalogError> {
    let n = parts.bottom.len() / parts.graph_degree as usize;
    writer.put("index.graph".into(), &parts.bottom, vec![n, parts.graph_degree as usize])?;
    writer.vector("index.layer_sizes", &parts.layer_sizes)?;
    writer.vector("index.upper_rows", &parts.upper_rows)?;
    let degree = parts.upper_degree as usize;
    writer.put("index.upper".into(), &parts.upper, vec![parts.upper.len() / degree.max(1), degree])?;
    writer.vector("index.center", &parts.center)?;
    writer.vector("index.starts", &parts.starts)?;
    writer.vector("index.codes", &parts.codes)
}

fn read_hnsw(reader: &Reader) -> Result<HnswParts, CatalogError> {
    let degree = |name: &str| reader.shape(name).and_then(|shape| shape.get(1)).map_or(0, |&degree| degree as u32);
    Ok(HnswParts {
        graph_degree: degree("index.graph"),
        bottom: reader.array("index.graph")?,
        upper_degree: degree("index.upper"),
        layer_sizes: reader.array("index.layer_sizes")?,
        upper_rows: reader.array("index.upper_rows")?,
        upper: reader.array("index.upper")?,
        center: reader.array("index.center")?,
        starts: reader.array("index.starts")?,
        codes: reader.array("index.codes")?,
    })
}

fn write_ivf(writer: &mut Writer, parts: &IvfParts) -> Result<(), CatalogError> {
    writer.put("index.centroids".into(), &parts.centroids, vec![parts.n_lists(), parts.padded])?;
    write_codes(writer, "index.coarse", &parts.coarse)?;
    writer.vector("index.offsets", &parts.offsets)?;
    writer.vector("index.ids", &parts.ids)?;
    let shape = vec![parts.ids.len(), parts.dim];
    match &parts.lists {
        Lists::Flat(Vectors::F32(values)) => writer.put("index.vectors".into(), values, shape),
        Lists::Flat(Vectors::F16(values)) => writer.put("index.vectors".into(), values, shape),
        Lists::Flat(Vectors::Bf16(values)) => writer.put("index.vectors".into(), values, shape),
        Lists::Pq { words, codes } => {
            writer.vector("index.words", words)?;
            write_codes(writer, "index.codes", codes)
        }
        Lists::Rabitq(codes) => write_codes(writer, "index.codes", codes),
    }
}

fn write_codes(writer: &mut Writer, name: &str, codes: &Codes) -> Result<(), CatalogError> {
    let n_blocks = codes.scales.len();
    writer.put(format!("{name}.blocks"), &codes.blocks, vec![n_blocks, codes.layout.bytes()])?;
    writer.vector(format!("{name}.refined"), &codes.refined)?;
    writer.vector(format!("{name}.scales"), &codes.scales)
}

/// Reads the index over `matrix`; `None` for the exact scan, which stores nothing.
pub(super) fn read(
    reader: &Reader,
    spec: &IndexSpec,
    matrix: &Matrix,
    metric: Metric,
) -> Result<Option<Arc<dyn VectorIndex>>, CatalogError> {
    let exact = || Exact::new(matrix.clone(), metric, Kernel::detect());
    let unfit = |reason: String| reader.corrupt("index", &reason);
    let options = match &spec.options {
        IndexOptions::BruteForce {} => return Ok(None),
        // Empty catalogues are scanned.
        _ if matrix.n_rows() == 0 => return Ok(None),
        IndexOptions::Hnsw(_) => {
            let index = Hnsw::from_parts(read_hnsw(reader)?, exact()).map_err(unfit)?;
            return Ok(Some(Arc::new(index.with_defaults(spec.search))));
        }
        IndexOptions::IvfFlat(options) | IndexOptions::IvfPq(options) | IndexOptions::IvfRabitq(options) => options,
    };
    let (kind, padded) = (spec.options.kind(), padded(matrix.dim));
    let of_signs = |has_bias| Blocks { n_subspaces: padded / 4, has_bias };
    let has_bias = metric == Metric::L2;
    let lists = match kind {
        IndexKind::IvfFlat => Lists::Flat(match reader.dtype("index.vectors") {
            Some("f16") => Vectors::F16(reader.array("index.vectors")?),
            Some("bf16") => Vectors::Bf16(reader.array("index.vectors")?),
            _ => Vectors::F32(reader.array("index.vectors")?),
        }),
        IndexKind::IvfPq => {
            let bytes = reader.shape("index.codes.blocks").and_then(|shape| shape.get(1)).copied().unwrap_or(0);
            let layout = Blocks::of_bytes(bytes, has_bias);
            let layout = layout.ok_or_else(|| reader.corrupt("index.codes.blocks", "its shape does not fit"))?;
            Lists::Pq { words: reader.array("index.words")?, codes: read_codes(reader, "index.codes", layout)? }
        }
        _ => Lists::Rabitq(read_codes(reader, "index.codes", of_signs(has_bias))?),
    };
    let parts = IvfParts {
        kind,
        dim: matrix.dim,
        padded,
        seed: options.seed,
        centroids: reader.array("index.centroids")?,
        coarse: read_codes(reader, "index.coarse", of_signs(true))?,
        offsets: reader.array("index.offsets")?,
        ids: reader.array("index.ids")?,
        lists,
    };
    let index = Ivf::from_parts(parts, exact(), Simd::detect()).map_err(unfit)?;
    Ok(Some(Arc::new(index.with_defaults(spec.search))))
}

fn read_codes(reader: &Reader, name: &str, layout: Blocks) -> Result<Codes, CatalogError> {
    Ok(Codes {
        layout,
        blocks: reader.array(&format!("{name}.blocks"))?,
        refined: reader.array(&format!("{name}.refined"))?,
        scales: reader.array(&format!("{name}.scales"))?,
    })
}
