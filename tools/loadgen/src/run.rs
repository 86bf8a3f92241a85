//! One measurement.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io::IsTerminal;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use flatbuffers::FlatBufferBuilder;
use hdrhistogram::Histogram;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Exp1, Zipf};
use serde::Serialize;
use tastemaker::capacity::plot::Point;

use crate::engine::{Engine, Pending};
use crate::protocol::{Protocol, Seen};
use crate::{Arrivals, Options};

/// What a measurement found. Latencies are in milliseconds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Calls per second asked for; 0 in a closed loop.
    pub offered_rps: f64,
    /// Answers without error per second.
    pub rps: f64,
    /// Answers without error.
    pub ok: u64,
    /// Answers with an error, and calls never answered.
    pub errors: u64,
    /// By name; `lost` for calls never answered.
    pub errors_by_name: BTreeMap<String, u64>,
    /// Answers that did without something, by stage and reason.
    pub degraded: BTreeMap<String, u64>,
    /// By cache status.
    pub cache: BTreeMap<String, u64>,
    /// Answers with fewer items than asked.
    pub short: u64,
    /// Median.
    pub p50_ms: f64,
    /// 90 %.
    pub p90_ms: f64,
    /// 99 %.
    pub p99_ms: f64,
    /// 99.9 %.
    pub p999_ms: f64,
    /// Largest.
    pub max_ms: f64,
    /// Mean of each stage, microseconds, from the answers.
    pub stages_us: BTreeMap<String, f64>,
    /// CPU time of the server per answer, microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_cpu_us: Option<f64>,
    /// HdrHistogram's percentile format, milliseconds.
    #[serde(skip)]
    pub hgrm: String,
    /// What was answered in each second of the measured time.
    #[serde(skip)]
    pub timeline: Vec<Second>,
}

/// One second of a measurement.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Second {
    /// Its end, seconds since 1970 began.
    pub unix: f64,
    /// Answers without error.
    pub ok: u64,
    /// Median latency, milliseconds; 0 without answers.
    pub p50_ms: f64,
    /// 99 %.
    pub p99_ms: f64,
}

/// Makes [`Report::timeline`].
struct Timeline {
    histogram: Histogram<u64>,
    next: Instant,
    seconds: Vec<Second>,
}

impl Timeline {
    fn tick(&mut self, now: Instant, end: Instant) {
        while now >= self.next && self.next <= end {
            let ms = |quantile: f64| self.histogram.value_at_quantile(quantile) as f64 / 1e6;
            let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let unix = unix.as_secs_f64() - now.saturating_duration_since(self.next).as_secs_f64();
            self.seconds.push(Second { unix, ok: self.histogram.len(), p50_ms: ms(0.5), p99_ms: ms(0.99) });
            self.histogram.reset();
            self.next += Duration::from_secs(1);
        }
    }
}

impl Report {
    /// For a plot.
    pub fn point(&self) -> Point {
        Point { rps: self.rps, p50_ms: self.p50_ms, p99_ms: self.p99_ms, p999_ms: self.p999_ms }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.offered_rps {
            0.0 => write!(f, "closed loop: {:.0} calls/s", self.rps)?,
            offered => write!(f, "offered {offered:.0} calls/s, achieved {:.0}", self.rps)?,
        }
        writeln!(f, "; {} ok, {} errors, {} short", self.ok, self.errors, self.short)?;
        writeln!(
            f,
            "latency ms: p50 {:.3}  p90 {:.3}  p99 {:.3}  p99.9 {:.3}  max {:.3}",
            self.p50_ms, self.p90_ms, self.p99_ms, self.p999_ms, self.max_ms
        )?;
        let list = |f: &mut fmt::Formatter<'_>, name: &str, counts: &BTreeMap<String, u64>| match counts.is_empty() {
            true => Ok(()),
            false => {
                writeln!(f, "{name}: {}", counts.iter().map(|(k, n)| format!("{k} {n}")).collect::<Vec<_>>().join(", "))
            }
        };
        list(f, "errors", &self.errors_by_name)?;
        list(f, "degraded", &self.degraded)?;
        list(f, "cache", &self.cache)?;
        if !self.stages_us.is_empty() {
            let stages: Vec<String> = self.stages_us.iter().map(|(stage, us)| format!("{stage} {us:.0}")).collect();
            writeln!(f, "stages µs: {}", stages.join(", "))?;
        }
        if let Some(us) = self.server_cpu_us {
            writeln!(f, "server CPU per answer: {us:.1} µs")?;
        }
        Ok(())
    }
}

/// Who asks next.
struct Users {
    ids: Vec<String>,
    zipf: Option<Zipf<f64>>,
}

impl Users {
    fn new(options: &Options) -> anyhow::Result<Self> {
        let ids: Vec<String> = match &options.users {
            Some(file) => {
                let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
                text.lines().map(str::trim).filter(|l| !l.is_empty()).map(String::from).collect()
            }
            None => (0..options.n_users).map(|n| format!("{}{n}", options.user_prefix)).collect(),
        };
        ensure!(!ids.is_empty(), "no users");
        let zipf = match options.zipf {
            0.0 => None,
            exponent => Some(Zipf::new(ids.len() as f64, exponent).context("--zipf")?),
        };
        Ok(Users { ids, zipf })
    }

    fn next(&self, rng: &mut SmallRng) -> &str {
        let at = match &self.zipf {
            Some(zipf) => zipf.sample(rng) as usize - 1,
            None => rng.random_range(0..self.ids.len()),
        };
        &self.ids[at.min(self.ids.len() - 1)]
    }
}

struct Recorder {
    histogram: Histogram<u64>,
    report: Report,
    stages: BTreeMap<String, (f64, u64)>,
    timeline: Timeline,
}

impl Recorder {
    fn answer(&mut self, options: &Options, seen: Seen, latency: Duration) {
        if let Some(error) = seen.error {
            self.report.errors += 1;
            *self.report.errors_by_name.entry(error).or_default() += 1;
            return;
        }
        self.report.ok += 1;
        self.histogram.saturating_record(latency.as_nanos() as u64);
        self.timeline.histogram.saturating_record(latency.as_nanos() as u64);
        self.report.short += u64::from(seen.items < options.n_items as usize);
        *self.report.cache.entry(seen.cache).or_default() += 1;
        for degraded in seen.degraded {
            *self.report.degraded.entry(degraded).or_default() += 1;
        }
        for (stage, us) in seen.timings {
            let (sum, n) = self.stages.entry(stage).or_default();
            *sum += f64::from(us);
            *n += 1;
        }
    }
}

/// Runs one measurement.
///
/// # Errors
/// No connection, no users, or a server that answers nonsense.
pub fn run(options: &Options) -> anyhow::Result<Report> {
    let users = Users::new(options)?;
    let mut rng = SmallRng::seed_from_u64(options.seed);
    let (addr, depth) = match options.http {
        Some(addr) => (addr, 1),
        None => (options.addr, options.depth as usize),
    };
    let mut protocol = match options.http {
        Some(addr) => Protocol::Http { host: addr.to_string() },
        None => Protocol::Binary(FlatBufferBuilder::new()),
    };
    let mut engine =
        Engine::connect(addr, options.connections as usize).with_context(|| format!("connecting to {addr}"))?;

    let start = Instant::now();
    let from = start + Duration::from_secs_f64(options.warmup);
    let end = from + Duration::from_secs_f64(options.seconds);
    // Answers still owed are waited for: a server that stalls must not look better for it.
    let give_up = end + Duration::from_secs(5);
    let mut recorder = Recorder {
        histogram: Histogram::new_with_bounds(1_000, 60_000_000_000, 3)?,
        report: Report { offered_rps: options.rate, ..Report::default() },
        stages: BTreeMap::new(),
        timeline: Timeline {
            histogram: Histogram::new_with_bounds(1_000, 60_000_000_000, 2)?,
            next: from + Duration::from_secs(1),
            seconds: Vec::new(),
        },
    };
    let mut due: VecDeque<Instant> = VecDeque::new();
    let mut next_due = start;
    let (mut next_id, mut next_connection, mut in_flight) = (1u64, 0usize, 0usize);
    let mut touched = Vec::new();
    let (mut cpu_from, mut cpu_end) = (None, None);
    let mut progress = Progress::new(start);
    loop {
        let now = Instant::now();
        if now >= from && cpu_from.is_none() {
            cpu_from = Some(cpu_time(options.server_pid));
        }
        if now >= end && cpu_end.is_none() {
            cpu_end = Some(cpu_time(options.server_pid));
        }
        let open = now < end;
        if !open && in_flight == 0 && due.is_empty() || now >= give_up {
            break;
        }
        if options.rate > 0.0 {
            while open && next_due <= now {
                due.push_back(next_due);
                let gap = match options.arrivals {
                    Arrivals::Constant => 1.0,
                    Arrivals::Poisson => Exp1.sample(&mut rng),
                };
                next_due += Duration::from_secs_f64(gap / options.rate);
            }
        }
        // Calls go out round-robin to connections with room.
        let n = engine.connections.len();
        for _ in 0..n {
            let connection = &mut engine.connections[next_connection % n];
            next_connection += 1;
            while !connection.broken && connection.pending.len() < depth {
                let intended = match options.rate > 0.0 {
                    true => match due.pop_front() {
                        Some(at) => at,
                        None => break,
                    },
                    false if open => now,
                    false => break,
                };
                protocol.write(options, next_id, users.next(&mut rng), &mut connection.output);
                connection.pending.push_back(Pending { id: next_id, intended });
                next_id += 1;
                in_flight += 1;
            }
            if options.rate > 0.0 && due.is_empty() {
                break;
            }
        }
        let wake = if options.rate > 0.0 && open { next_due } else { now + Duration::from_millis(20) };
        engine.turn(wake.min(give_up), &mut touched)?;

        let now = Instant::now();
        for &at in &touched {
            let connection = &mut engine.connections[at];
            let mut used = 0;
            while let Some((seen, len)) =
                protocol.read(&connection.input[used..]).map_err(|e| anyhow::anyhow!("malformed answer: {e}"))?
            {
                used += len;
                let place = match seen.id {
                    0 => Some(0),
                    id => connection.pending.iter().position(|p| p.id == id),
                };
                let Some(pending) = place.and_then(|place| connection.pending.remove(place)) else {
                    anyhow::bail!("an answer to a call that was not made");
                };
                in_flight -= 1;
                if pending.intended >= from && pending.intended < end {
                    recorder.answer(options, seen, now.saturating_duration_since(pending.intended));
                }
            }
            connection.input.drain(..used);
        }
        for connection in &mut engine.connections {
            if connection.broken && !connection.pending.is_empty() {
                let lost = connection.pending.len();
                connection.pending.clear();
                in_flight -= lost;
                recorder.report.errors += lost as u64;
                *recorder.report.errors_by_name.entry("lost".into()).or_default() += lost as u64;
            }
        }
        if engine.connections.iter().all(|c| c.broken) {
            break;
        }
        progress.tick(now, &recorder.report);
        recorder.timeline.tick(now, end);
    }
    progress.finish();
    let never: u64 = in_flight as u64 + due.len() as u64;
    if never > 0 {
        recorder.report.errors += never;
        *recorder.report.errors_by_name.entry("lost".into()).or_default() += never;
    }
    let cpu = cpu_from.flatten().zip(cpu_end.flatten());
    finish(options, recorder, cpu.map(|(from, end)| end - from))
}

fn finish(options: &Options, recorder: Recorder, cpu: Option<Duration>) -> anyhow::Result<Report> {
    let Recorder { histogram, mut report, stages, timeline } = recorder;
    report.timeline = timeline.seconds;
    let ms = |quantile: f64| histogram.value_at_quantile(quantile) as f64 / 1e6;
    report.rps = report.ok as f64 / options.seconds;
    (report.p50_ms, report.p90_ms, report.p99_ms, report.p999_ms) = (ms(0.5), ms(0.9), ms(0.99), ms(0.999));
    report.max_ms = histogram.max() as f64 / 1e6;
    report.stages_us = stages.into_iter().map(|(stage, (sum, n))| (stage, sum / n as f64)).collect();
    report.server_cpu_us = cpu.map(|cpu| cpu.as_secs_f64() * 1e6 / report.ok.max(1) as f64);
    report.hgrm = hgrm(&histogram);
    Ok(report)
}

/// HdrHistogram's text format: value, percentile, total count, 1 / (1 - percentile).
fn hgrm(histogram: &Histogram<u64>) -> String {
    let mut out = String::from("       Value     Percentile TotalCount 1/(1-Percentile)\n\n");
    let mut total = 0;
    for step in histogram.iter_quantiles(5) {
        total += step.count_since_last_iteration();
        let quantile = step.quantile_iterated_to();
        let inverse =
            if quantile < 1.0 { format!("{:14.2}", 1.0 / (1.0 - quantile)) } else { String::from("           inf") };
        out += &format!("{:12.3} {quantile:14.12} {total:10} {inverse}\n", step.value_iterated_to() as f64 / 1e6);
    }
    out +=
        &format!("#[Mean    = {:12.3}, StdDeviation   = {:12.3}]\n", histogram.mean() / 1e6, histogram.stdev() / 1e6);
    out += &format!("#[Max     = {:12.3}, Total count    = {:12}]\n", histogram.max() as f64 / 1e6, histogram.len());
    out
}

/// User and system time of a process.
fn cpu_time(pid: Option<u32>) -> Option<Duration> {
    let text = std::fs::read_to_string(format!("/proc/{}/stat", pid?)).ok()?;
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    Some(Duration::from_millis(ticks * 10))
}

struct Progress {
    bar: Option<indicatif::ProgressBar>,
    next: Instant,
    last_ok: u64,
}

impl Progress {
    fn new(start: Instant) -> Self {
        let bar = std::io::stderr().is_terminal().then(indicatif::ProgressBar::new_spinner);
        Progress { bar, next: start + Duration::from_secs(1), last_ok: 0 }
    }

    fn tick(&mut self, now: Instant, report: &Report) {
        if now >= self.next {
            self.next = now + Duration::from_secs(1);
            if let Some(bar) = &self.bar {
                bar.set_message(format!("{} calls/s, {} errors", report.ok - self.last_ok, report.errors));
                bar.tick();
            }
            self.last_ok = report.ok;
        }
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpListener};

    /// Answers every HTTP request, after a stall of 300 ms once, when `stall_at` requests have come.
    fn server(stall_at: usize) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let (mut input, mut served) = (Vec::new(), 0);
            let mut chunk = [0; 4096];
            while let Ok(n) = stream.read(&mut chunk) {
                if n == 0 {
                    break;
                }
                input.extend_from_slice(&chunk[..n]);
                while let Some(end) = input.windows(4).position(|w| w == b"\r\n\r\n") {
                    let head = String::from_utf8_lossy(&input[..end]).to_lowercase();
                    let length: usize =
                        head.split("content-length: ").nth(1).unwrap().split("\r\n").next().unwrap().parse().unwrap();
                    if input.len() < end + 4 + length {
                        break;
                    }
                    input.drain(..end + 4 + length);
                    served += 1;
                    if served == stall_at {
                        std::thread::sleep(Duration::from_millis(300));
                    }
                    let body = "{\"items\":[{\"item_id\":1}],\"cache\":\"miss\"}";
                    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                    if stream.write_all(answer.as_bytes()).is_err() {
                        return;
                    }
                }
            }
        });
        addr
    }

    fn options(addr: SocketAddr, more: &[&str]) -> Options {
        let addr = addr.to_string();
        let mut words = vec!["loadgen", "--http", &addr, "-c", "1", "-n", "1", "--warmup", "0", "--seconds", "1"];
        words.extend(more);
        Options::parse_from(words)
    }

    #[test]
    fn an_open_loop_sees_a_stall_in_every_call_that_it_delays() {
        let report = run(&options(server(100), &["--rate", "500", "--arrivals", "constant"])).unwrap();
        // 300 ms of stall at 500 calls/s delay 150 calls of 500; a harness that waits would report one.
        assert!(report.ok > 450, "{report}");
        assert!(report.p90_ms > 100.0, "{report}");
        assert!(report.max_ms >= 290.0, "{report}");
    }

    #[test]
    fn a_closed_loop_counts_and_times() {
        let report = run(&options(server(usize::MAX), &[])).unwrap();
        assert!(report.ok > 100 && report.errors == 0 && report.short == 0, "{report}");
        assert_eq!(report.cache["miss"], report.ok);
        assert!(report.hgrm.contains("Total count"));
    }

    #[test]
    fn a_server_that_goes_away_is_counted() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        std::thread::spawn(move || drop(listener.accept().unwrap()));
        let report = run(&options(addr, &[])).unwrap();
        assert_eq!(report.ok, 0);
        assert!(report.errors_by_name["lost"] >= 1);
    }

    #[test]
    fn nobody_listening_is_an_error() {
        let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert!(run(&options(addr, &[])).is_err());
    }
}
