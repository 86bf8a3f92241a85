//! Load-test harness: closed loop, or open loop with latency from the intended send time (no coordinated omission).

pub mod engine;
mod protocol;
pub mod run;

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use clap::{Parser, ValueEnum};
use run::Report;
use tastemaker::capacity::plot::{Point, latency_over_rate};

/// Drives a recommendation server and reports latency, rates, errors and degradations.
#[derive(Clone, Debug, Parser)]
#[command(version, after_help = "Exit codes: 0 ok, 1 failed or no call succeeded, 2 usage.")]
pub struct Options {
    /// Binary protocol at this address.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7070")]
    pub addr: SocketAddr,
    /// HTTP at this address instead.
    #[arg(long, value_name = "ADDR")]
    pub http: Option<SocketAddr>,
    /// Connections.
    #[arg(short, long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub connections: u32,
    /// Calls in flight per connection (binary only; HTTP has 1).
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub depth: u32,
    /// Calls per second, in an open loop; 0: closed loop, as fast as answers come.
    #[arg(long, default_value_t = 0.0)]
    pub rate: f64,
    /// Spacing of an open loop's calls.
    #[arg(long, value_enum, default_value_t = Arrivals::Poisson)]
    pub arrivals: Arrivals,
    /// Measured time, seconds.
    #[arg(long, default_value_t = 10.0)]
    pub seconds: f64,
    /// Time before that, not measured, seconds.
    #[arg(long, default_value_t = 1.0)]
    pub warmup: f64,
    /// User ids, one a line.
    #[arg(long, value_name = "FILE")]
    pub users: Option<PathBuf>,
    /// Without a file: users `PREFIX0` to `PREFIX(n-1)`.
    #[arg(long, default_value_t = 2000)]
    pub n_users: u64,
    /// Without a file: what comes before the number.
    #[arg(long, default_value = "user-")]
    pub user_prefix: String,
    /// Exponent of a Zipf distribution over users; 0: uniform.
    #[arg(long, default_value_t = 0.0)]
    pub zipf: f64,
    /// Slate length.
    #[arg(short, long, default_value_t = 10)]
    pub n_items: u32,
    /// Send events instead, this many a call, all of the call's user.
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub events: u32,
    /// Items of the events: `PREFIX0` to `PREFIX(n-1)`.
    #[arg(long, default_value_t = 10_000)]
    pub n_event_items: u64,
    /// What comes before the number.
    #[arg(long, default_value = "item-")]
    pub item_prefix: String,
    /// Wait for the disk with each call of events.
    #[arg(long)]
    pub durable: bool,
    /// Text query of every call.
    #[arg(long)]
    pub query: Option<String>,
    /// Ask for stage times and report their means (binary only).
    #[arg(long)]
    pub timings: bool,
    /// Ask for fresh computation.
    #[arg(long)]
    pub no_cache: bool,
    /// Server process, for CPU time per call.
    #[arg(long, value_name = "PID")]
    pub server_pid: Option<u32>,
    /// CPU to run on.
    #[arg(long)]
    pub cpu: Option<usize>,
    /// Seed of users and arrivals.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// One line of JSON on standard output.
    #[arg(long)]
    pub json: bool,
    /// Write the latency distribution in HdrHistogram's percentile format.
    #[arg(long, value_name = "FILE")]
    pub hgrm: Option<PathBuf>,
    /// Several rates in turn, as in 100,200,400, or as shares of the measured peak, as in 10%,50%,90%.
    #[arg(long, value_name = "RATES", value_delimiter = ',')]
    pub sweep: Vec<String>,
    /// Plot of a sweep.
    #[arg(long, value_name = "FILE.svg", requires = "sweep")]
    pub plot: Option<PathBuf>,
}

/// Spacing of calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Arrivals {
    /// Exponential gaps: independent users.
    Poisson,
    /// Equal gaps.
    Constant,
}

/// Runs what the options ask for and prints it; whether any call succeeded.
///
/// # Errors
/// An option out of range, or as [`run::run`].
pub fn measure(options: &Options) -> anyhow::Result<bool> {
    ensure!(options.n_event_items > 0, "--n-event-items must be 1 or more");
    ensure!(options.seconds > 0.0 && options.seconds <= 86_400.0, "--seconds must be above 0");
    ensure!(options.warmup >= 0.0 && options.warmup <= 3600.0, "--warmup must be 0 or more");
    ensure!(options.rate >= 0.0 && options.rate.is_finite(), "--rate must be 0 or more");
    ensure!(options.zipf >= 0.0 && options.zipf.is_finite(), "--zipf must be 0 or more");
    if let Some(cpu) = options.cpu {
        engine::pin(cpu);
    }
    if options.sweep.is_empty() {
        let report = run::run(options)?;
        show(options, &report)?;
        return Ok(report.ok > 0);
    }
    let mut peak = None;
    let mut reports = Vec::new();
    for rate in &options.sweep {
        let rate = match rate.strip_suffix('%') {
            Some(share) => {
                let share: f64 = share.trim().parse().with_context(|| format!("--sweep: `{rate}`"))?;
                let peak = match peak {
                    Some(peak) => peak,
                    None => {
                        let closed = run::run(&Options { rate: 0.0, hgrm: None, ..options.clone() })?;
                        eprintln!("peak {:.0} calls/s", closed.rps);
                        *peak.insert(closed.rps)
                    }
                };
                peak * share / 100.0
            }
            None => rate.trim().parse().with_context(|| format!("--sweep: `{rate}`"))?,
        };
        ensure!(rate > 0.0, "--sweep: rates must be above 0");
        let report = run::run(&Options { rate, ..options.clone() })?;
        show(options, &report)?;
        reports.push(report);
    }
    if let Some(file) = &options.plot {
        let points: Vec<Point> = reports.iter().map(Report::point).collect();
        std::fs::write(file, latency_over_rate(&points, None)).with_context(|| file.display().to_string())?;
        eprintln!("{}: written", file.display());
    }
    Ok(reports.iter().any(|r| r.ok > 0))
}

fn show(options: &Options, report: &run::Report) -> anyhow::Result<()> {
    if options.json {
        println!("{}", serde_json::to_string(report)?);
    } else {
        println!("{report}");
    }
    if let Some(file) = &options.hgrm {
        std::fs::write(file, &report.hgrm).with_context(|| file.display().to_string())?;
    }
    Ok(())
}
