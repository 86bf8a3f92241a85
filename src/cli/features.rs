use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Args;

use super::progress::Reporter;
use crate::catalog::{bundle, npy};
use crate::pipeline::local::LocalPipeline;

/// `tastemaker features`
#[derive(Debug, Args)]
pub struct Features {
    /// Bundle directory.
    bundle: PathBuf,
    /// User ids, one a line.
    #[arg(long, value_name = "FILE")]
    users: PathBuf,
    /// Feature columns, one a line; `tastemaker inspect` shows those of a ranker.
    #[arg(long, value_name = "FILE")]
    columns: PathBuf,
    /// Directory to write: features.npy f32 [n, width], rows.npy f32 [n, 2]: line of the user, row of the item.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Configuration file.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl Features {
    pub fn run(self) -> anyhow::Result<()> {
        let config = super::config(self.config.as_deref())?;
        let lines = |file: &PathBuf| -> anyhow::Result<Vec<String>> {
            let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
            Ok(text.lines().map(str::trim).filter(|l| !l.is_empty()).map(String::from).collect())
        };
        let (users, columns) = (lines(&self.users)?, lines(&self.columns)?);
        let mut pipeline = LocalPipeline::new(&config, Arc::new(bundle::open(&self.bundle)?))?;
        let progress = Reporter::new();
        progress.begin("computing features", users.len() as u64);
        let (mut matrix, mut rows, mut width) = (Vec::new(), Vec::new(), 0);
        for (line, user) in users.iter().enumerate() {
            let (items, features, n_columns) = pipeline.features(user, &columns)?;
            // Exact in f32 up to 16,777,216.
            rows.extend(items.iter().flat_map(|&row| [line as f32, row as f32]));
            matrix.extend(features);
            width = n_columns;
            progress.advance(1);
        }
        progress.finish();
        std::fs::create_dir_all(&self.out).with_context(|| self.out.display().to_string())?;
        npy::write_f32(&self.out.join("features.npy"), &matrix, width)?;
        npy::write_f32(&self.out.join("rows.npy"), &rows, 2)?;
        say!("{}: {} rows x {width} columns of {} users", self.out.display(), rows.len() / 2, users.len());
        Ok(())
    }
}
