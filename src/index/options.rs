//! How an index is made, and what a search may trade. Names as cuVS spells them.

use serde::{Deserialize, Serialize};

/// The kinds of index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IndexKind {
    /// Exact scan.
    BruteForce,
    /// Inverted lists of full vectors.
    IvfFlat,
    /// Inverted lists of 4-bit product-quantised vectors, refined.
    IvfPq,
    /// Inverted lists of RaBitQ codes, one bit a dimension, refined.
    IvfRabitq,
    /// Hierarchical navigable small world graph.
    Hnsw,
}

impl IndexKind {
    /// As on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            IndexKind::BruteForce => "brute_force",
            IndexKind::IvfFlat => "ivf_flat",
            IndexKind::IvfPq => "ivf_pq",
            IndexKind::IvfRabitq => "ivf_rabitq",
            IndexKind::Hnsw => "hnsw",
        }
    }
}

impl std::fmt::Display for IndexKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// How an index is made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum IndexOptions {
    /// Exact scan: no parameters.
    BruteForce {},
    /// See [`IndexKind::IvfFlat`].
    IvfFlat(IvfOptions),
    /// See [`IndexKind::IvfPq`].
    IvfPq(IvfOptions),
    /// See [`IndexKind::IvfRabitq`].
    IvfRabitq(IvfOptions),
    /// See [`IndexKind::Hnsw`].
    Hnsw(HnswOptions),
}

impl IndexOptions {
    /// The kind that they make.
    pub fn kind(&self) -> IndexKind {
        match self {
            IndexOptions::BruteForce {} => IndexKind::BruteForce,
            IndexOptions::IvfFlat(_) => IndexKind::IvfFlat,
            IndexOptions::IvfPq(_) => IndexKind::IvfPq,
            IndexOptions::IvfRabitq(_) => IndexKind::IvfRabitq,
            IndexOptions::Hnsw(_) => IndexKind::Hnsw,
        }
    }

    /// The number of lists that was asked for.
    pub fn n_lists(&self) -> Option<u32> {
        match self {
            IndexOptions::IvfFlat(ivf) | IndexOptions::IvfPq(ivf) | IndexOptions::IvfRabitq(ivf) => ivf.n_lists,
            IndexOptions::BruteForce {} | IndexOptions::Hnsw(_) => None,
        }
    }

    /// For `n` vectors, which may be fewer than the lists that were asked for.
    pub fn at_most(mut self, n: usize) -> Self {
        if let IndexOptions::IvfFlat(ivf) | IndexOptions::IvfPq(ivf) | IndexOptions::IvfRabitq(ivf) = &mut self
            && let Some(n_lists) = &mut ivf.n_lists
        {
            *n_lists = (*n_lists).min(n as u32).max(1);
        }
        self
    }

    /// The defaults of a kind.
    pub fn of(kind: IndexKind) -> Self {
        match kind {
            IndexKind::BruteForce => IndexOptions::BruteForce {},
            IndexKind::IvfFlat => IndexOptions::IvfFlat(IvfOptions::default()),
            IndexKind::IvfPq => IndexOptions::IvfPq(IvfOptions::default()),
            IndexKind::IvfRabitq => IndexOptions::IvfRabitq(IvfOptions::default()),
            IndexKind::Hnsw => IndexOptions::Hnsw(HnswOptions::default()),
        }
    }
}

/// How inverted lists are made. What is absent has a default that follows from the vectors; what does not concern the kind is
/// refused.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IvfOptions {
    /// Number of lists, 1 to the number of vectors; about `4 √n` when absent.
    pub n_lists: Option<u32>,
    /// Iterations of k-means, 1 to 100; 10 when absent.
    pub kmeans_n_iters: Option<u32>,
    /// Seed of everything random; the same seed gives the same index.
    pub seed: u64,
    /// `ivf_flat`: how vectors lie in the lists; f32 when absent.
    pub storage: Option<Storage>,
    /// `ivf_pq`: subspaces of 4 bits each, 4 to 1024: `pq_dim / 2` bytes a vector. Half the dimension when absent.
    pub pq_dim: Option<u32>,
}

impl IvfOptions {
    /// Number of lists for `n` vectors, as asked for or about `2 √n`.
    pub fn n_lists_of(&self, n: usize) -> usize {
        let usual = || ((2.0 * (n as f64).sqrt()).round() as usize).clamp(n.min(1), n.div_ceil(8));
        self.n_lists.map_or_else(usual, |wanted| wanted as usize)
    }

    /// Iterations of k-means, as asked for or 10.
    pub fn kmeans_n_iters_or_usual(&self) -> u32 {
        self.kmeans_n_iters.unwrap_or(10)
    }
}

/// How full vectors are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Storage {
    /// 4 bytes a value.
    #[default]
    F32,
    /// 2 bytes: 11 bits of precision, magnitudes up to 65,504.
    F16,
    /// 2 bytes: 8 bits of precision, any magnitude.
    Bf16,
}

/// How a graph is made (Malkov and Yashunin, TPAMI 2020).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HnswOptions {
    /// Most neighbours of a vector on the bottom layer, 4 to 512; half as many above.
    pub graph_degree: u32,
    /// Candidates that are looked at for a vector's neighbours, at least `graph_degree`.
    pub ef_construction: u32,
    /// Seed of the layers.
    pub seed: u64,
}

impl Default for HnswOptions {
    fn default() -> Self {
        HnswOptions { graph_degree: 32, ef_construction: 200, seed: 0 }
    }
}

/// What a search may trade between recall and time; each kind reads what concerns it and has defaults for what is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SearchParams {
    /// IVF: how much is scanned, in lists of average length, 1 to `n_lists`; the blocks that promise most, whatever their list.
    pub n_probes: Option<u32>,
    /// IVF with codes: candidates that are refined, as a multiple of k, 1 to 100. Where that is all that is scanned, nothing is estimated
    /// before.
    pub refine_ratio: Option<f32>,
    /// HNSW: length of the list of candidates, at least k; `2 k`, but at least 64, when absent.
    pub ef_search: Option<u32>,
}

impl SearchParams {
    /// These, and `others` where these say nothing.
    pub fn or(&self, others: &SearchParams) -> SearchParams {
        SearchParams {
            n_probes: self.n_probes.or(others.n_probes),
            refine_ratio: self.refine_ratio.or(others.refine_ratio),
            ef_search: self.ef_search.or(others.ef_search),
        }
    }

    /// Of each the larger, where either says something.
    pub fn most(&self, others: &SearchParams) -> SearchParams {
        SearchParams {
            n_probes: self.n_probes.max(others.n_probes),
            refine_ratio: match (self.refine_ratio, others.refine_ratio) {
                (Some(one), Some(other)) => Some(one.max(other)),
                (one, other) => one.or(other),
            },
            ef_search: self.ef_search.max(others.ef_search),
        }
    }

    /// Lists of average length that are scanned without a filter, of `n_lists` with `n` vectors.
    pub fn n_probes_of(&self, k: usize, n: usize, n_lists: usize) -> usize {
        let wanted = self.n_probes.map_or_else(
            || {
                // As many as hold some dozens of vectors for each that is wanted, and never so few that neighbours just
                // across a border are missed.
                let average = (n as f64 / n_lists.max(1) as f64).max(1.0);
                let enough = 28.0 * (k as f64).max(20.0) / average;
                enough.max((n_lists as f64).sqrt() * 0.5).ceil() as usize
            },
            |n| n as usize,
        );
        wanted.clamp(1, n_lists.max(1))
    }

    /// Candidates that an index of codes refines.
    pub fn n_refined_of(&self, k: usize, kind: IndexKind) -> usize {
        let usual = if kind == IndexKind::IvfPq { 2.0 } else { 4.0 };
        let wanted = (k as f64 * f64::from(self.refine_ratio.unwrap_or(usual).clamp(1.0, 100.0))).ceil() as usize;
        if self.refine_ratio.is_some() { wanted } else { wanted.max(k + 100) }
    }

    /// Length of a walk's list of candidates.
    pub fn ef_search_of(&self, k: usize) -> usize {
        self.ef_search.map_or((2 * k).max(64), |ef| ef as usize).max(k)
    }

    /// Checks ranges, whatever the kind; what an index has less of it uses all of.
    ///
    /// # Errors
    /// The name, the value and the range.
    pub fn validate(&self) -> Result<(), String> {
        let whole = [("n_probes", self.n_probes), ("ef_search", self.ef_search)];
        if let Some((name, Some(value))) = whole.iter().find(|(_, v)| v.is_some_and(|v| !(1..=65_536).contains(&v))) {
            return Err(format!("{name} is {value}, expected 1 to 65536"));
        }
        match self.refine_ratio {
            Some(ratio) if !(1.0..=100.0).contains(&ratio) => {
                Err(format!("refine_ratio is {ratio}, expected 1 to 100"))
            }
            _ => Ok(()),
        }
    }
}
