use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use anyhow::{Context as _, bail};
use clap::Args;
use parking_lot::Mutex;

use super::progress::Reporter;
use crate::cache::precomputed::Precomputed;
use crate::cache::{key, value};
use crate::catalog::bundle;
use crate::catalog::generation::Generation;
use crate::context::now_ms;
use crate::device::Context;
use crate::pipeline::local::LocalPipeline;

/// `tastemaker precompute`
#[derive(Debug, Args)]
pub struct Precompute {
    /// Bundle directory.
    bundle: PathBuf,
    /// For whom: `top:N`, those with the longest histories; `all`; or a file of user ids, one a line.
    #[arg(long, value_name = "USERS", default_value = "top:100000")]
    users: String,
    /// Slate lengths, as in 10,20 [default: pipeline.default_n_items].
    #[arg(short, long, value_name = "LIST", value_delimiter = ',')]
    n_items: Vec<u32>,
    /// File to write; `cache.precomputed` names it to the server.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// The server's configuration file: slates made under another are not served.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Threads [default: one per CPU].
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

impl Precompute {
    pub fn run(self) -> anyhow::Result<()> {
        let config = super::config(self.config.as_deref())?;
        config.validate().map_err(anyhow::Error::msg)?;
        let generation = Arc::new(bundle::open(&self.bundle)?);
        let users = users(&self.users, &generation)?;
        let lengths = if self.n_items.is_empty() { vec![config.pipeline.default_n_items] } else { self.n_items };
        if let Some(n) = lengths.iter().find(|n| !(1..=config.pipeline.max_n_items).contains(*n)) {
            bail!("--n-items: {n} is not 1 to {} (pipeline.max_n_items)", config.pipeline.max_n_items);
        }
        let scope = key::scope(&generation.version, &config)?;
        let made = now_ms() / 1000;
        let progress = Reporter::new();
        progress.begin("precomputing slates", users.len() as u64);
        let (next, slates, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()), Mutex::new(None));
        let work = || -> anyhow::Result<()> {
            let mut pipeline = LocalPipeline::new(&config, generation.clone())?;
            let mut own = Vec::new();
            while let Some(user) = users.get(next.fetch_add(1, Relaxed)) {
                for &n in &lengths {
                    let slate = pipeline.recommend(user, n)?;
                    if slate.degraded.is_empty() {
                        let at = key::recommend(&scope, user, 0, 0, &Context::default(), "", n);
                        own.push((at, value::encode(&slate)));
                    }
                }
                progress.advance(1);
            }
            slates.lock().append(&mut own);
            Ok(())
        };
        let threads = self.threads.or(std::thread::available_parallelism().ok().map(Into::into)).unwrap_or(1);
        std::thread::scope(|scope| {
            for _ in 0..threads.clamp(1, users.len().max(1)) {
                scope.spawn(|| {
                    if let Err(error) = work() {
                        failed.lock().get_or_insert(error);
                    }
                });
            }
        });
        progress.finish();
        if let Some(error) = failed.into_inner() {
            return Err(error);
        }
        let mut slates = slates.into_inner();
        // The same users make the same file, whatever the threads did.
        slates.sort_unstable_by_key(|(key, _)| *key);
        slates.dedup_by_key(|(key, _)| *key);
        Precomputed::write(&self.out, made as u64, key::of_scope(&scope), &slates)?;
        let bytes = std::fs::metadata(&self.out)?.len();
        say!(
            "{}: {} slates of {} users, {:.1} MiB",
            self.out.display(),
            slates.len(),
            users.len(),
            bytes as f64 / (1 << 20) as f64
        );
        Ok(())
    }
}

/// Whom `--users` names.
fn users(named: &str, generation: &Generation) -> anyhow::Result<Vec<String>> {
    let id = |row: u32| generation.users.ids.id(row).to_owned();
    let all = 0..generation.users.len() as u32;
    if named == "all" {
        return Ok(all.map(id).collect());
    }
    if let Some(n) = named.strip_prefix("top:") {
        let n: usize = n.parse().with_context(|| format!("--users {named}: expected a number after `top:`"))?;
        let mut rows: Vec<u32> = all.collect();
        rows.sort_by_key(|&row| std::cmp::Reverse(generation.histories.of(row).len()));
        rows.truncate(n);
        return Ok(rows.into_iter().map(id).collect());
    }
    let text = std::fs::read_to_string(named).with_context(|| format!("--users {named}"))?;
    Ok(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(String::from).collect())
}
