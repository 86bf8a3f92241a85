use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;

use crate::catalog::bundle;
use crate::device::{Choice, check_engines, cpu, select};
use crate::rerank::Reranker;

/// `tastemaker check`
#[derive(Debug, Args)]
pub struct Check {
    /// Configuration file.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// The device to look for, as for serve; cpu looks for none.
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: Choice,
    /// Also check rules and rankers against this bundle.
    bundle: Option<PathBuf>,
}

impl Check {
    pub fn run(self) -> anyhow::Result<()> {
        let config = super::config(Some(&self.config))?;
        let selected = select(self.device)?;
        if let Some(path) = &self.bundle {
            let generation = bundle::open(path)?;
            Reranker::compile(&config.rerank, &generation)
                .with_context(|| format!("{} against {}", self.config.display(), path.display()))?;
            cpu::try_rankers(config.pipeline.clone(), &generation)?;
            check_engines(&config.pipeline, &generation, !selected.gpus.is_empty()).map_err(anyhow::Error::msg)?;
        }
        say!("{}: ok", self.config.display());
        if self.device != Choice::Cpu {
            say!("device: {}: {}", selected.name, selected.reason);
        }
        Ok(())
    }
}
