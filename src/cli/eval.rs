use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use clap::Args;
use serde::Serialize;

use super::progress::Reporter;
use crate::candidates::Source;
use crate::catalog::bundle;
use crate::eval::{Meter, Quality, Relevance, Truth, read_truth};
use crate::pipeline::local::LocalPipeline;

/// `tastemaker eval`
#[derive(Debug, Args)]
pub struct Eval {
    /// Bundle directory.
    bundle: PathBuf,
    /// Held-out interactions, Parquet.
    #[arg(long, value_name = "FILE")]
    test: PathBuf,
    /// Cut-offs.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "10,100", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    k: Vec<u32>,
    /// A test row is relevant when any of these holds, as in `rating>=4`; every row is when there are none.
    #[arg(long, value_name = "CONDITION")]
    relevant: Vec<Relevance>,
    /// User column of the test file.
    #[arg(long, default_value = "user_id")]
    user_column: String,
    /// Item column of the test file.
    #[arg(long, default_value = "item_id")]
    item_column: String,
    /// Measure only the first N users of a fixed shuffle.
    #[arg(long, value_name = "N")]
    users: Option<usize>,
    /// Configuration file; its rules and diversity take part.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Report {
    generation: String,
    users: usize,
    n_candidates: f64,
    rows: Vec<(String, Quality)>,
}

impl Eval {
    pub fn run(mut self) -> anyhow::Result<()> {
        self.k.sort_unstable();
        self.k.dedup();
        let mut config = super::config(self.config.as_deref())?;
        let ks: Vec<usize> = self.k.iter().map(|&k| k as usize).collect();
        let longest = *ks.last().context("--k: at least one cut-off")?;
        config.pipeline.max_n_items = config.pipeline.max_n_items.max(longest as u32);
        let generation = Arc::new(bundle::open(&self.bundle)?);
        let truth = sample(read_truth(&self.test, &self.user_column, &self.item_column, &self.relevant)?, self.users);

        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let entries: Vec<_> = truth.iter().collect();
        let progress = Reporter::new();
        progress.begin("evaluating users", entries.len() as u64);
        let parts: Vec<anyhow::Result<Measured>> = std::thread::scope(|scope| {
            let handles: Vec<_> = (0..threads)
                .map(|thread| {
                    let (entries, config, generation, ks, progress) = (&entries, &config, &generation, &ks, &progress);
                    scope.spawn(move || {
                        let mut pipeline = LocalPipeline::new(config, generation.clone())?;
                        let mut measured = Measured::default();
                        for (user, relevant) in entries.iter().skip(thread).step_by(threads) {
                            measured.users.push(measure(&mut pipeline, user, relevant, ks)?);
                            progress.advance(1);
                        }
                        Ok(measured)
                    })
                })
                .collect();
            handles
                .into_iter()
                .map(|h| h.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked"))))
                .collect()
        });
        progress.finish();
        let mut users = Vec::new();
        for part in parts {
            users.extend(part?.users);
        }
        let report = self.report(&generation, users, &ks)?;
        if self.json {
            say!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            print(&report, &ks)?;
        }
        Ok(())
    }

    fn report(
        &self,
        generation: &crate::catalog::generation::Generation,
        users: Vec<UserAnswers>,
        ks: &[usize],
    ) -> anyhow::Result<Report> {
        ensure!(!users.is_empty(), "{}: no users", self.test.display());
        let n_items = generation.items.len();
        let with_merged: Vec<usize> = ks.iter().copied().chain([500, usize::from(u16::MAX)]).collect();
        let mut slate = Meter::new(ks);
        let mut merged = Meter::new(&with_merged);
        let mut alone: [Meter; Source::COUNT] = std::array::from_fn(|_| Meter::new(&with_merged));
        for user in &users {
            slate.add(&user.slate, &user.relevant, user.n_relevant);
            merged.add(&user.merged, &user.relevant, user.n_relevant);
            for (meter, rows) in alone.iter_mut().zip(&user.by_source) {
                meter.add(rows, &user.relevant, user.n_relevant);
            }
        }
        let mut rows =
            vec![("slate".to_owned(), slate.quality(n_items)), ("merged".to_owned(), merged.quality(n_items))];
        for (source, meter) in Source::ALL.into_iter().zip(&alone) {
            if users.iter().any(|u| !u.by_source[source as usize].is_empty()) {
                rows.push((format!("{} alone", source.name()), meter.quality(n_items)));
            }
        }
        Ok(Report {
            generation: generation.version.clone(),
            users: users.len(),
            n_candidates: users.iter().map(|u| u.merged.len() as f64).sum::<f64>() / users.len() as f64,
            rows,
        })
    }
}

#[derive(Default)]
struct Measured {
    users: Vec<UserAnswers>,
}

/// Rows answered to one user, best first.
struct UserAnswers {
    slate: Vec<u32>,
    /// All candidates in the ranker's order.
    merged: Vec<u32>,
    by_source: [Vec<u32>; Source::COUNT],
    relevant: HashSet<u32>,
    n_relevant: usize,
}

fn measure(
    pipeline: &mut LocalPipeline,
    user: &str,
    relevant: &HashSet<String>,
    ks: &[usize],
) -> anyhow::Result<UserAnswers> {
    let longest = ks.last().copied().unwrap_or(10) as u32;
    let shown = pipeline.recommend(user, longest).with_context(|| format!("user {user}"))?;
    let generation = pipeline.generation().clone();
    let all = pipeline.candidates(user).with_context(|| format!("user {user}"))?;
    let by_source = std::array::from_fn(|source| {
        let ranks = &all.candidates.source_ranks[source];
        let mut rows: Vec<(u16, u32)> =
            ranks.iter().copied().zip(all.candidates.rows.iter().copied()).filter(|&(rank, _)| rank > 0).collect();
        rows.sort_unstable();
        rows.into_iter().map(|(_, row)| row).collect()
    });
    let items = &generation.items;
    Ok(UserAnswers {
        slate: shown.items.iter().map(|item| item.row).collect(),
        merged: all.items.iter().map(|item| item.row).collect(),
        by_source,
        relevant: relevant.iter().filter_map(|id| items.ids.row(id)).collect(),
        n_relevant: relevant.len(),
    })
}

/// The first `n` users in the order of a hash of their ids: the same for everybody, independent of the file's order.
fn sample(truth: Truth, n: Option<usize>) -> Truth {
    let Some(n) = n else { return truth };
    let mut users: Vec<_> = truth.into_iter().collect();
    users.sort_by_key(|(user, _)| xxhash_rust::xxh3::xxh3_64(user.as_bytes()));
    users.truncate(n);
    users.into_iter().collect()
}

fn print(report: &Report, ks: &[usize]) -> anyhow::Result<()> {
    say!("{}: {} users, {:.0} merged candidates on average", report.generation, report.users, report.n_candidates);
    say_part!("{:22}", "");
    for k in ks {
        say_part!("  recall@{k:<5} ndcg@{k:<5} coverage@{k:<5}");
    }
    say!("  recall@500  recall@all");
    for (name, quality) in &report.rows {
        say_part!("{name:22}");
        for k in ks {
            say_part!("  {:<12.4} {:<10.4} {:<14.3}", quality.recall[k], quality.ndcg[k], quality.coverage[k]);
        }
        match (quality.recall.get(&500), quality.recall.get(&usize::from(u16::MAX))) {
            (Some(at_500), Some(all)) => say!("  {at_500:<10.4}  {all:.4}"),
            _ => say!(""),
        }
    }
    Ok(())
}
