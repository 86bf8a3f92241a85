use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use crate::catalog::bundle;
use crate::device::cpu;

/// `tastemaker inspect`
#[derive(Debug, Args)]
pub struct Inspect {
    /// Bundle directory.
    bundle: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Configuration file: `pipeline.engines` and the like decide what computes a ranker.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl Inspect {
    pub fn run(self) -> anyhow::Result<()> {
        let config = super::config(self.config.as_deref())?;
        let info = bundle::describe(&self.bundle)?;
        // Loaded as a server would: what a ranker is computed in is measured, and not the same on every machine.
        let reports = match info.rankers.is_empty() {
            true => Ok(Vec::new()),
            false => cpu::reports(config.pipeline, &Arc::new(bundle::open(&self.bundle)?)),
        };
        if self.json {
            let mut info = serde_json::to_value(&info)?;
            info["computed"] = serde_json::to_value(reports?.into_iter().collect::<BTreeMap<_, _>>())?;
            say!("{}", serde_json::to_string_pretty(&info)?);
            return Ok(());
        }
        say!("{info}");
        match reports {
            Ok(reports) => {
                for (name, report) in reports {
                    say!("computed      {name}: {report}");
                }
            }
            Err(error) => say!("computed      {error}"),
        }
        Ok(())
    }
}
