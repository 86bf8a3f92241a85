use std::path::PathBuf;

use clap::Args;

use crate::catalog::bundle;

/// `tastemaker inspect`
#[derive(Debug, Args)]
pub struct Inspect {
    /// Bundle directory.
    bundle: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl Inspect {
    pub fn run(self) -> anyhow::Result<()> {
        let info = bundle::describe(&self.bundle)?;
        if self.json {
            say!("{}", serde_json::to_string_pretty(&info)?);
        } else {
            say!("{info}");
        }
        Ok(())
    }
}
