use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Args;

use super::progress::Reporter;
use crate::catalog::bundle;
use crate::catalog::generation::Matrix;
use crate::catalog::index::{IndexSpec, Tuned};
use crate::index::{BruteForce, Kernel, VectorIndex, tune::Task};

/// `tastemaker tune`
#[derive(Debug, Args)]
pub struct Tune {
    /// Bundle directory. Its manifest is written anew; a server that serves it sees no change before it loads it again.
    bundle: PathBuf,
    /// Share of the exact best k that is to be found, 0 to 1.
    #[arg(long, default_value_t = 0.95)]
    recall: f64,
    /// Results asked for.
    #[arg(short, long, default_value_t = 500)]
    k: u32,
    /// Queries: users' embeddings spread over all, or items' where there are no users. Half of them choose, half measure.
    #[arg(long, default_value_t = 1024)]
    queries: u32,
    /// Say what would be written, and write nothing.
    #[arg(long)]
    dry_run: bool,
}

impl Tune {
    pub fn run(self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.recall > 0.0 && self.recall <= 1.0,
            "--recall {}: must be above 0, at most 1",
            self.recall
        );
        anyhow::ensure!((1..=10_000).contains(&self.k), "--k {}: must be 1 to 10000", self.k);
        let generation = bundle::open(&self.bundle)?;
        let at = || self.bundle.display().to_string();
        let items = generation.item_embeddings.as_ref().with_context(|| format!("{}: no item embeddings", at()))?;
        let index = generation.index().with_context(|| format!("{}: no index", at()))?;
        let queries = match &generation.user_embeddings {
            Some(users) if users.n_rows() >= 2 => spread(users, self.queries as usize),
            _ => spread(items, self.queries as usize),
        };
        let queries: Vec<&[f32]> = queries.chunks_exact(items.dim).collect();
        let oracle: Arc<dyn VectorIndex> =
            Arc::new(BruteForce::new(items.clone(), generation.metric, Kernel::detect()));
        let k = (self.k as usize).min(items.n_rows());
        let task = Task { index: &*index, oracle: &*oracle, k, recall: self.recall };
        let progress = Reporter::new();
        progress.begin("trying parameters", 0);
        let found =
            task.run(&queries, &|_, _| progress.advance(1)).map_err(|reason| anyhow::anyhow!("{}: {reason}", at()))?;
        progress.finish();
        let micros = |time: std::time::Duration| time.as_secs_f64() * 1e6;
        let tuned = Tuned {
            k: k as u32,
            recall: found.recall,
            search_us: micros(found.search),
            exact_us: micros(found.exact),
            n_queries: queries.len() as u32 / 2,
        };
        let (version, spec) = if self.dry_run {
            let info = bundle::describe(&self.bundle)?;
            (info.version, IndexSpec { search: found.params, tuned: Some(tuned), ..info.index })
        } else {
            bundle::set_search(&self.bundle, found.params, tuned)?
        };
        say!("{version}\n{spec}");
        Ok(())
    }
}

/// Up to `n` rows spread over all.
fn spread(matrix: &Matrix, n: usize) -> Vec<f32> {
    let (rows, mut out) = (matrix.n_rows(), Vec::new());
    let n = n.min(rows);
    (0..n).for_each(|at| matrix.extend_row((at * rows / n) as u32, &mut out));
    out
}
