use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, ValueEnum};

use super::progress::Reporter;
use crate::catalog::build::{self, BuildOptions, Progress};
use crate::device::{self, Choice};
use crate::index::partitions::MAX_PARTITIONS;
use crate::index::{GraphMaker, HnswOptions, IndexOptions, IvfOptions, Storage};

/// `tastemaker build`
#[derive(Debug, Args)]
pub struct Build {
    /// Dataset directory: items.parquet and, optionally, dataset.toml, users, interactions, embeddings, rankers.
    dataset: PathBuf,
    /// Bundle directory to write. It appears at once and whole, or not at all.
    #[arg(long, value_name = "BUNDLE")]
    out: PathBuf,
    /// Replace an existing bundle.
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    index: IndexArgs,
}

/// Which index, and how it is made.
#[derive(Debug, Args)]
pub struct IndexArgs {
    /// Vector index over the item embeddings.
    #[arg(long, value_enum, default_value_t = Kind::BruteForce)]
    index: Kind,
    /// Inverted lists; about 4 √n when absent.
    #[arg(long, value_name = "N")]
    n_lists: Option<u32>,
    /// ivf_pq: subspaces of 4 bits each, pq_dim / 2 bytes a vector; half the dimension when absent.
    #[arg(long, value_name = "N")]
    pq_dim: Option<u32>,
    /// ivf_flat: how vectors lie in the lists.
    #[arg(long, value_enum)]
    storage: Option<Stored>,
    /// hnsw, cagra: most neighbours of a vector; 32 when absent.
    #[arg(long, value_name = "N")]
    graph_degree: Option<u32>,
    /// hnsw, cagra: candidates that are looked at for a vector's neighbours; 200 when absent.
    #[arg(long, value_name = "N")]
    ef_construction: Option<u32>,
    /// cagra: the GPU that makes the graph, cuda:N; the one with the most memory when absent.
    #[arg(long, value_name = "cuda:N")]
    device: Option<Choice>,
    /// cagra: folder with cuVS, as `device.cuvs` of the configuration; where the loader looks when absent.
    #[arg(long, value_name = "FOLDER")]
    cuvs: Option<PathBuf>,
    /// Divide the index into so many partitions, by a hash of the items' ids: 1 to 256. Parameters are each partition's own.
    #[arg(long, value_name = "P", default_value_t = 1)]
    partitions: u32,
    /// Seed of everything random in the index.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

/// Vector index kinds that this build can make.
#[derive(Clone, Copy, Debug, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Kind {
    /// Exact scan: no parameters, recall 1.
    BruteForce,
    /// Inverted lists of full vectors.
    IvfFlat,
    /// Inverted lists of 4-bit product-quantised vectors, refined by 8 bits: the fastest for most.
    IvfPq,
    /// Inverted lists of one bit a dimension (RaBitQ), refined by 8 bits: the smallest scan.
    IvfRabitq,
    /// Hierarchical navigable small world graph: for few results (k of 10 to 100).
    Hnsw,
    /// hnsw whose graph cuVS's CAGRA makes on a GPU; the bundle is served without one.
    Cagra,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Stored {
    F32,
    F16,
    Bf16,
}

impl IndexArgs {
    /// # Errors
    /// A flag that does not concern the kind.
    fn options(&self) -> anyhow::Result<IndexOptions> {
        let storage = self.storage.map(|storage| match storage {
            Stored::F32 => Storage::F32,
            Stored::F16 => Storage::F16,
            Stored::Bf16 => Storage::Bf16,
        });
        let ivf =
            IvfOptions { n_lists: self.n_lists, seed: self.seed, storage, pq_dim: self.pq_dim, ..Default::default() };
        let of_lists = ivf != IvfOptions { seed: self.seed, ..Default::default() };
        let of_graph = self.graph_degree.is_some() || self.ef_construction.is_some();
        let of_gpu = self.device.is_some() || self.cuvs.is_some();
        let fits = match self.index {
            Kind::BruteForce => !of_lists && !of_graph && !of_gpu,
            Kind::Hnsw => !of_lists && !of_gpu,
            Kind::Cagra => !of_lists,
            _ => !of_graph && !of_gpu,
        };
        anyhow::ensure!(fits, "a flag does not concern this --index; `tastemaker build --help` says which do");
        let defaults = HnswOptions::default();
        Ok(match self.index {
            Kind::BruteForce => IndexOptions::BruteForce {},
            Kind::Hnsw | Kind::Cagra => IndexOptions::Hnsw(HnswOptions {
                graph_degree: self.graph_degree.unwrap_or(defaults.graph_degree),
                ef_construction: self.ef_construction.unwrap_or(defaults.ef_construction),
                seed: self.seed,
            }),
            Kind::IvfFlat => IndexOptions::IvfFlat(ivf),
            Kind::IvfPq => IndexOptions::IvfPq(ivf),
            Kind::IvfRabitq => IndexOptions::IvfRabitq(ivf),
        })
    }

    /// What makes the graph, where it is not the CPU.
    ///
    /// # Errors
    /// There is no such GPU, or no cuVS; or partitions, which are the CPU's.
    fn graphs(&self) -> anyhow::Result<Option<Arc<dyn GraphMaker>>> {
        let Kind::Cagra = self.index else { return Ok(None) };
        anyhow::ensure!(self.partitions == 1, "--index cagra makes one graph: --partitions is for `--index hnsw`");
        device::graph_maker(self.device.unwrap_or_default(), self.cuvs.as_deref())
            .map(Some)
            .map_err(|error| anyhow::anyhow!("--index cagra: {error}"))
    }
}

impl Progress for Reporter {
    fn begin(&self, stage: &str, total: u64) {
        Reporter::begin(self, stage, total);
    }

    fn advance(&self, steps: u64) {
        Reporter::advance(self, steps);
    }
}

impl Build {
    pub fn run(self) -> anyhow::Result<()> {
        let (index, partitions) = (self.index.options()?, self.index.partitions);
        anyhow::ensure!(
            (1..=MAX_PARTITIONS).contains(&partitions),
            "--partitions {partitions}: must be 1 to {MAX_PARTITIONS}"
        );
        let graphs = self.index.graphs()?;
        let progress = Reporter::new();
        let try_rankers: Option<build::TryRankers> = Some(super::try_rankers);
        let options = BuildOptions { overwrite: self.overwrite, try_rankers, index, partitions, graphs };
        let report = build::build(&self.dataset, &self.out, &options, &progress)?;
        progress.finish();
        say!("{report}");
        Ok(())
    }
}
