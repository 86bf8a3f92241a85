use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, ValueEnum};

use crate::capacity::profile::Run;
use crate::capacity::{self, Arrivals, Load, Outcome, Profile, Target, plot, simulate};

/// `tastemaker plan`
#[derive(Debug, Args)]
#[command(after_help = "\
A profile is measured with the load-test harness, against a server on one CPU (--cpus 0, --no-cache for the first two):
  loadgen --json --server-pid PID --depth 16              > saturated.json
  loadgen --json --server-pid PID --rate A_FIFTH_OF_THAT  > light.json
  loadgen --json --server-pid PID --depth 16              > hits.json     (with its cache, warm)
  tastemaker plan --saturated saturated.json --light light.json --hits hits.json --rps 1000000 --p99-ms 10 --hit-ratio 0.6")]
pub struct Plan {
    /// Requests per second of all replicas.
    #[arg(long)]
    rps: f64,
    /// The 99th percentile of latency that is wanted, at most, ms. Left out: say how one replica fares at --rps.
    #[arg(long)]
    p99_ms: Option<f64>,
    /// What an answer costs a replica (TOML).
    #[arg(long, value_name = "FILE", required_unless_present = "saturated")]
    profile: Option<PathBuf>,
    /// Make the profile of these runs: a closed loop with more calls in flight than the server needs, without its cache.
    #[arg(long, value_name = "FILE", requires = "light", conflicts_with = "profile")]
    saturated: Option<PathBuf>,
    /// An open loop at about a fifth of that rate.
    #[arg(long, value_name = "FILE", requires = "saturated")]
    light: Option<PathBuf>,
    /// A closed loop against the warm cache.
    #[arg(long, value_name = "FILE", requires = "saturated")]
    hits: Option<PathBuf>,
    /// CPUs that the measured server had.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    cpus: u32,
    /// Write the profile there.
    #[arg(long, value_name = "FILE")]
    write_profile: Option<PathBuf>,
    /// Share of requests that the cache answers, 0 to 1.
    #[arg(long, default_value_t = 0.0)]
    hit_ratio: f64,
    /// Spacing of requests.
    #[arg(long, value_enum, default_value_t = Spacing::Poisson)]
    arrivals: Spacing,
    /// By what share the rate of Poisson arrivals swings around its mean, 0 to 1, each way for a tenth of a second on average.
    #[arg(long, default_value_t = 0.0)]
    swing: f64,
    /// How much more than the mean the busiest replica gets, a share.
    #[arg(long, default_value_t = 0.1)]
    imbalance: f64,
    /// How busy a replica may be at most, a share: what no simulation of a queue knows, such as pauses of the machine, takes room.
    #[arg(long, default_value_t = 0.85)]
    busy: f64,
    /// Requests to simulate.
    #[arg(long, default_value_t = 200_000, value_parser = clap::value_parser!(u32).range(1_000..=100_000_000))]
    requests: u32,
    /// Of the random numbers: the same seed gives the same plan.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Draw one replica's latency over its rate (SVG).
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Spacing {
    /// Exponential gaps: independent users.
    Poisson,
    /// Equal gaps.
    Constant,
}

impl Plan {
    pub fn run(self) -> anyhow::Result<()> {
        let positive = |flag: &str, value: f64| {
            anyhow::ensure!(value.is_finite() && value > 0.0, "{flag} {value}: must be above 0");
            Ok(())
        };
        let share = |flag: &str, value: f64, most: f64| {
            anyhow::ensure!((0.0..=most).contains(&value), "{flag} {value}: must be 0 to {most}");
            Ok(())
        };
        positive("--rps", self.rps)?;
        self.p99_ms.map_or(Ok(()), |ms| positive("--p99-ms", ms))?;
        share("--hit-ratio", self.hit_ratio, 1.0)?;
        share("--swing", self.swing, 1.0)?;
        share("--busy", self.busy, 1.0)?;
        positive("--busy", self.busy)?;
        share("--imbalance", self.imbalance, 10.0)?;
        let profile = self.profile()?;
        anyhow::ensure!(
            self.hit_ratio == 0.0 || profile.hit_us > 0.0,
            "--hit-ratio {}: the profile does not say what a hit costs (hit_us; --hits)",
            self.hit_ratio
        );
        if let Some(file) = &self.write_profile {
            std::fs::write(file, toml::to_string(&profile)?).with_context(|| file.display().to_string())?;
        }
        let target = Target {
            rps: self.rps,
            p99_ms: self.p99_ms.unwrap_or(f64::INFINITY),
            hit_ratio: self.hit_ratio,
            arrivals: match self.arrivals {
                Spacing::Poisson => Arrivals::Poisson { swing: self.swing },
                Spacing::Constant => Arrivals::Constant,
            },
            imbalance: self.imbalance,
            busy: self.busy,
            n_requests: self.requests as usize,
            seed: self.seed,
        };
        let rate = match self.p99_ms {
            Some(_) => self.replicas(&profile, &target)?,
            None => self.one(&profile, &target)?,
        };
        if let Some(file) = &self.plot {
            let mark = Some((rate, target.p99_ms)).filter(|mark| mark.1.is_finite());
            let svg = plot::latency_over_rate(&capacity::curve(&profile, &target), mark);
            std::fs::write(file, svg).with_context(|| file.display().to_string())?;
        }
        Ok(())
    }

    fn profile(&self) -> anyhow::Result<Profile> {
        let read = |file: &Path| std::fs::read_to_string(file).with_context(|| file.display().to_string());
        if let Some(file) = &self.profile {
            return Profile::parse(&read(file)?).map_err(|error| anyhow::anyhow!("{}: {error}", file.display()));
        }
        let run = |file: &PathBuf| -> anyhow::Result<Run> {
            serde_json::from_str(&read(file)?)
                .with_context(|| format!("{}: not a run of loadgen --json", file.display()))
        };
        let (Some(saturated), Some(light)) = (&self.saturated, &self.light) else {
            anyhow::bail!("--saturated and --light belong together");
        };
        let hits = self.hits.as_ref().map(run).transpose()?;
        let name = format!("fitted to {} and {}", saturated.display(), light.display());
        Ok(Profile::fit(name, self.cpus, &run(saturated)?, &run(light)?, hits.as_ref())?)
    }

    /// How many replicas; returns the rate of the busiest.
    fn replicas(&self, profile: &Profile, target: &Target) -> anyhow::Result<f64> {
        let plan = capacity::plan(profile, target)?;
        if self.json {
            say!(
                "{}",
                serde_json::json!({
                    "replicas": plan.replicas,
                    "replicas_to_lose_one": plan.replicas + 1,
                    "cpus": plan.replicas * u64::from(profile.cpus),
                    "capacity_rps": plan.capacity_rps,
                    "bottleneck": plan.all.bottleneck(),
                    "all": json(&plan.all),
                    "one_lost": plan.one_lost.as_ref().map(json),
                    "profile": profile,
                })
            );
            return Ok(plan.all.rps);
        }
        say!("{}: {} requests/s at most on CPUs: {}", profile.name, plan.capacity_rps.round(), profile.cpus);
        say!(
            "replicas: {} keep p99 at {} ms or less for {} requests/s and are busy for {:.0} % of the time at most; {} do so when one is lost",
            plan.replicas,
            target.p99_ms,
            target.rps,
            target.busy * 100.0,
            plan.replicas + 1
        );
        say!("what runs out first: {}", plan.all.bottleneck());
        table(&[("all", Some(&plan.all)), ("one lost", plan.one_lost.as_ref())])?;
        Ok(plan.all.rps)
    }

    /// How one replica fares.
    fn one(&self, profile: &Profile, target: &Target) -> anyhow::Result<f64> {
        let Target { rps, hit_ratio, arrivals, n_requests, seed, .. } = *target;
        let outcome = simulate(profile, &Load { rps, hit_ratio, arrivals, n_requests, seed });
        match self.json {
            true => say!("{}", json(&outcome)),
            false => table(&[("one replica", Some(&outcome))])?,
        }
        Ok(rps)
    }
}

fn json(outcome: &Outcome) -> serde_json::Value {
    let Outcome { rps, p50_ms, p90_ms, p99_ms, p999_ms, cpu, device, batch, behind: _ } = *outcome;
    serde_json::json!({
        "rps": rps, "p50_ms": p50_ms, "p90_ms": p90_ms, "p99_ms": p99_ms, "p999_ms": p999_ms, "cpu": cpu,
        "device": device, "batch": batch, "keeps_up": outcome.keeps_up(),
    })
}

fn table(lines: &[(&str, Option<&Outcome>)]) -> anyhow::Result<()> {
    say!(
        "{:12} {:>10} {:>6} {:>7} {:>9} {:>9} {:>9} {:>9}",
        "",
        "requests/s",
        "CPU",
        "device",
        "p50 ms",
        "p90",
        "p99",
        "p99.9"
    );
    for (name, outcome) in lines {
        let Some(o) = outcome else { continue };
        let device = o.device.map_or("-".to_owned(), |device| format!("{:.0} %", device * 100.0));
        let behind = if o.keeps_up() { "" } else { "  does not keep up" };
        say!(
            "{name:12} {:>10.0} {:>4.0} % {device:>7} {:>9.3} {:>9.3} {:>9.3} {:>9.3}{behind}",
            o.rps,
            o.cpu * 100.0,
            o.p50_ms,
            o.p90_ms,
            o.p99_ms,
            o.p999_ms
        );
    }
    Ok(())
}
