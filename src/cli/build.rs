use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::progress::Reporter;
use crate::catalog::build::{self, BuildOptions, Progress};

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
    /// Vector index over the item embeddings.
    #[arg(long, value_enum, default_value_t = IndexKind::BruteForce)]
    index: IndexKind,
}

/// Vector index kinds that this build can make.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum IndexKind {
    /// Exact scan: no parameters, recall 1.
    #[value(name = "brute_force")]
    BruteForce,
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
        let IndexKind::BruteForce = self.index;
        let progress = Reporter::new();
        let options = BuildOptions { overwrite: self.overwrite, try_rankers: Some(super::try_rankers) };
        let report = build::build(&self.dataset, &self.out, &options, &progress)?;
        progress.finish();
        say!("{report}");
        Ok(())
    }
}
