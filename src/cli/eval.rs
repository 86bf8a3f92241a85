use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use serde::Serialize;
use xxhash_rust::xxh3::xxh3_64;

use super::progress::Reporter;
use crate::api::{Event, RecommendCall};
use crate::candidates::Source;
use crate::catalog::bundle;
use crate::catalog::generation::Generation;
use crate::config::Config;
use crate::eval::{Columns, Interaction, Meter, Quality, Relevance, read_interactions, read_truth};
use crate::pipeline::local::LocalPipeline;
use crate::server::{Options, Server};
use crate::state::event::MAX_EVENTS;
use crate::wire::client::Client;

/// `tastemaker eval`
#[derive(Debug, Args)]
pub struct Eval {
    /// Bundle directory.
    bundle: PathBuf,
    /// Held-out interactions, Parquet.
    #[arg(long, value_name = "FILE", required_unless_present = "fold_in")]
    test: Option<PathBuf>,
    /// Interactions of users who were not in the training data, Parquet: half of each user's are played as events through a running
    /// server, the other half is what its slate should find.
    #[arg(long, value_name = "FILE", conflicts_with = "test")]
    fold_in: Option<PathBuf>,
    /// Column of values of the fold-in file: an event with one is a `rating`, one without a `like`.
    #[arg(long, value_name = "COLUMN", requires = "fold_in")]
    value_column: Option<String>,
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
    /// On average; 0: not measured.
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
        let columns = Columns { user: &self.user_column, item: &self.item_column, value: self.value_column.as_deref() };
        let users = match (&self.test, &self.fold_in) {
            (_, Some(file)) => {
                let played = sample(read_interactions(file, columns, &self.relevant)?, self.users);
                fold_in(config, &generation, &played, longest as u32)?
            }
            (Some(file), None) => {
                let truth = read_truth(file, columns.user, columns.item, &self.relevant)?;
                let entries: Vec<_> = sample(truth, self.users).into_iter().collect();
                side_by_side(
                    &entries,
                    || LocalPipeline::new(&config, generation.clone()),
                    |pipeline, (user, relevant)| measure(pipeline, user, relevant, &ks).map(Some),
                )?
            }
            (None, None) => bail!("--test or --fold-in is needed"),
        };
        let report = self.report(&generation, users, &ks)?;
        if self.json {
            say!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            print(&report, &ks)?;
        }
        Ok(())
    }

    fn report(&self, generation: &Generation, users: Vec<UserAnswers>, ks: &[usize]) -> anyhow::Result<Report> {
        ensure!(!users.is_empty(), "no users to measure");
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
        let mut rows = vec![("slate".to_owned(), slate.quality(n_items))];
        if users.iter().any(|u| !u.merged.is_empty()) {
            rows.push(("merged".to_owned(), merged.quality(n_items)));
        }
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

/// Measures every entry, on as many threads as there are CPUs, each with what `start` makes.
fn side_by_side<T: Sync, S>(
    entries: &[T],
    start: impl Fn() -> anyhow::Result<S> + Sync,
    measure: impl Fn(&mut S, &T) -> anyhow::Result<Option<UserAnswers>> + Sync,
) -> anyhow::Result<Vec<UserAnswers>> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let progress = Reporter::new();
    progress.begin("evaluating users", entries.len() as u64);
    let parts: Vec<anyhow::Result<Vec<UserAnswers>>> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads)
            .map(|thread| {
                let (start, measure, progress) = (&start, &measure, &progress);
                scope.spawn(move || {
                    let (mut state, mut measured) = (start()?, Vec::new());
                    for entry in entries.iter().skip(thread).step_by(threads) {
                        measured.extend(measure(&mut state, entry)?);
                        progress.advance(1);
                    }
                    Ok(measured)
                })
            })
            .collect();
        handles.into_iter().map(|h| h.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked")))).collect()
    });
    progress.finish();
    Ok(parts.into_iter().collect::<anyhow::Result<Vec<_>>>()?.into_iter().flatten().collect())
}

/// Plays half of each user's interactions as events through a server of its own, and asks it for a slate.
fn fold_in(
    mut config: Config,
    generation: &Arc<Generation>,
    played: &BTreeMap<String, Vec<Interaction>>,
    n_items: u32,
) -> anyhow::Result<Vec<UserAnswers>> {
    for addr in [&mut config.server.listen, &mut config.server.http, &mut config.server.admin] {
        *addr = SocketAddr::from(([127, 0, 0, 1], 0));
    }
    config.events.log_dir = PathBuf::new();
    config.events.max_users = config.events.max_users.max(u32::try_from(played.len())?.saturating_mul(2));
    let known = played.keys().filter(|user| generation.users.ids.row(user).is_some()).count();
    if known > 0 {
        tracing::warn!(known, of = played.len(), "users of the fold-in file were in the training data");
    }
    let server = Server::start(generation.clone(), config, Options::default())?;
    server.shared().live.prepare_fold_in();
    let entries: Vec<_> = played.iter().collect();
    let connect = || Client::connect(server.addrs.binary, Duration::from_secs(30)).context("connecting");
    let measured =
        side_by_side(&entries, connect, |client, (user, rows)| play(client, generation, user, rows, n_items));
    server.shut_down()?;
    measured
}

fn play(
    client: &mut Client,
    generation: &Generation,
    user: &str,
    rows: &[Interaction],
    n_items: u32,
) -> anyhow::Result<Option<UserAnswers>> {
    // The file need not be in the order of time: halves by a hash are the same for everybody.
    let mut rows: Vec<&Interaction> = rows.iter().collect();
    rows.sort_by_cached_key(|row| xxh3_64(format!("{user} {}", row.item).as_bytes()));
    let (given, hidden) = rows.split_at(rows.len() / 2);
    let relevant: HashSet<&str> = hidden.iter().filter(|row| row.relevant).map(|row| row.item.as_str()).collect();
    if given.is_empty() || relevant.is_empty() {
        return Ok(None);
    }
    let events: Vec<Event<'_>> = given
        .iter()
        .map(|row| match row.value {
            Some(value) => Event { value, ..Event::new(user, &row.item, "rating") },
            None => Event::new(user, &row.item, "like"),
        })
        .collect();
    for events in events.chunks(MAX_EVENTS) {
        client.put_events(events, false).with_context(|| format!("user {user}"))?;
    }
    let call = RecommendCall { no_cache: true, ..RecommendCall::new(user, n_items) };
    let slate = client.recommend(&call).with_context(|| format!("user {user}"))?;
    let items = &generation.items.ids;
    Ok(Some(UserAnswers {
        slate: slate.items.iter().filter_map(|item| items.row(&item.item_id)).collect(),
        merged: Vec::new(),
        by_source: Default::default(),
        n_relevant: relevant.len(),
        relevant: relevant.into_iter().filter_map(|id| items.row(id)).collect(),
    }))
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
fn sample<T>(all: BTreeMap<String, T>, n: Option<usize>) -> BTreeMap<String, T> {
    let Some(n) = n else { return all };
    let mut users: Vec<_> = all.into_iter().collect();
    users.sort_by_key(|(user, _)| xxh3_64(user.as_bytes()));
    users.truncate(n);
    users.into_iter().collect()
}

fn print(report: &Report, ks: &[usize]) -> anyhow::Result<()> {
    say_part!("{}: {} users", report.generation, report.users);
    match report.n_candidates {
        n if n > 0.0 => say!(", {n:.0} merged candidates on average"),
        _ => say!(""),
    }
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
