//! What was found, for people and for `benches/record/`.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

/// Everything of one run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// Format of this file.
    pub format: u32,
    /// Day of the run, as year-month-day; UTC.
    pub date: String,
    /// As it was typed.
    pub command: String,
    /// Of everything random.
    pub seed: u64,
    /// Name, memory, compute capability and driver of the GPU.
    pub gpu: String,
    /// Version of cuVS, or why it was not used.
    pub cuvs: String,
    /// Bytes a second that a copy on the GPU reads, and writes as many.
    pub copy_bytes_per_second: f64,
    /// Programs of tests: name, and whether all passed.
    pub programs: Vec<(String, bool)>,
    /// Random shapes that were tried of each kernel, and what differed.
    pub kernel_checks: Vec<KernelCheck>,
    /// The engine that serves beside the CPU's.
    pub engines: Vec<EngineCheck>,
    /// cuVS beside the CPU.
    pub agreements: Vec<Agreement>,
    /// Tools of compute-sanitizer: name and number of findings; none where it is not installed.
    pub sanitizer: Vec<(String, u64)>,
    /// Times of kernels.
    pub kernels: Vec<KernelTime>,
    /// Speed of the engines.
    pub engine_speeds: Vec<EngineSpeed>,
    /// Recommendations that stay on the GPU, beside the CPU's.
    #[serde(default)]
    pub slates: Vec<SlateCheck>,
    /// Their speed.
    #[serde(default)]
    pub pipelines: Vec<PipelineSpeed>,
    /// Speed of searches.
    pub searches: Vec<SearchSpeed>,
    /// What was aimed at, as far as it was measured: [`Report::judge`].
    #[serde(default)]
    pub bars: Vec<Bar>,
    /// What went wrong, and what was left out.
    pub notes: Vec<String>,
}

/// Something that was aimed at. One that is missed is no error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bar {
    /// Of what, and how it was measured.
    pub what: String,
    /// The least that will do.
    pub wanted: f64,
    /// What it was.
    pub got: f64,
}

/// Slates of the GPU beside the CPU's in f32.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SlateCheck {
    /// Widths of the ranker's layers.
    pub network: String,
    /// What ranks: `dense`, ours, or `TensorRT`.
    pub engine: String,
    /// Of products.
    pub numbers: String,
    /// Jobs that were compared.
    pub jobs: usize,
    /// Of these, those that have the CPU's candidates, all of them.
    pub same_candidates: usize,
    /// Candidates of a job, mean.
    pub candidates: f64,
    /// NDCG@10 against the order of the CPU's scores, whose first ten are worth 10 to 1.
    pub ndcg: f64,
    /// Largest difference of a score, over the spread (standard deviation) of the CPU's.
    pub score_error: f64,
    /// The least NDCG that is no defect.
    pub floor: f64,
    /// Whether nothing is wrong.
    pub is_same: bool,
    /// What failed.
    pub note: String,
}

/// Speed of recommendations that stay on the GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PipelineSpeed {
    /// Items and dimension.
    pub dataset: String,
    /// Widths of the ranker's layers.
    pub network: String,
    /// What ranks.
    pub engine: String,
    /// Of products.
    pub numbers: String,
    /// Candidates that are asked for.
    pub candidates: u32,
    /// Requests at a time, of each worker.
    pub batch: usize,
    /// Workers side by side, each with a stream.
    pub workers: usize,
    /// Median of a batch, from the host and back, with what the CPU does of it.
    pub p50_seconds: f64,
    /// All batches but one in a hundred took less.
    pub p99_seconds: f64,
    /// Of all workers.
    pub requests_per_second: f64,
    /// Share of requests that were computed on the GPU as a whole.
    pub whole: f64,
    /// Copies between host and GPU per batch.
    pub copies: usize,
    /// What the GPU is at a batch, as one graph; alone.
    pub device_seconds: f64,
    /// The same by stage, of kernels that are launched one by one.
    pub stages: Vec<StageShare>,
}

/// What a stage takes of a batch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageShare {
    /// `copies`, `retrieve`, `merge`, `features`, `rank`, `select`; `tensorrt` is its part of ranking.
    pub stage: String,
    /// Between events on the stream; median.
    pub seconds: f64,
}

/// A kernel beside its twin.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelCheck {
    /// Which.
    pub kernel: String,
    /// Random shapes.
    pub tried: u32,
    /// What differed, with the seed that shows it again.
    pub mismatches: Vec<String>,
}

/// The engine of the GPU beside the CPU's exact one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EngineCheck {
    /// How it finds neighbours.
    pub what: String,
    /// Jobs that were compared.
    pub jobs: u32,
    /// Share of jobs whose answers are the same to the bit, or of an index of rows that were found.
    pub recall: f64,
    /// The least that will do.
    pub floor: f64,
    /// Whether that will do.
    pub is_same: bool,
    /// What failed, or why it was left out.
    pub note: String,
}

/// Speed of an engine with one worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EngineSpeed {
    /// `gpu` or `cpu`.
    pub device: String,
    /// Items and dimension.
    pub dataset: String,
    /// Jobs at a time, every other one a search and a recommendation.
    pub batch: usize,
    /// Median of a batch.
    pub seconds: f64,
    /// `batch / seconds`
    pub jobs_per_second: f64,
}

/// An index beside the CPU's exact search.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// Kind and metric.
    pub index: String,
    /// What was asked.
    pub what: String,
    /// Share of the CPU's rows that it found.
    pub recall: f64,
    /// The least that will do.
    pub floor: f64,
    /// Largest difference of a score, relative to it.
    pub score_off: f64,
    /// Whether that will do.
    pub is_same: bool,
}

/// Time of a kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelTime {
    /// Which.
    pub kernel: String,
    /// On what.
    pub shape: String,
    /// Median of a launch.
    pub seconds: f64,
    /// Read and written at least.
    pub bytes: u64,
    /// That traffic's share of what a copy moves in the same time; 1 is the floor of the time.
    pub of_copy: f64,
    /// Multiplications and additions of its products, where there are any.
    #[serde(default)]
    pub flops: u64,
}

/// Speed of a search.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SearchSpeed {
    /// Vectors and dimension.
    pub dataset: String,
    /// Of the index.
    pub kind: String,
    /// Results.
    pub k: u32,
    /// What was traded.
    pub effort: String,
    /// Queries at a time.
    pub batch: usize,
    /// Against the exact search.
    pub recall: f64,
    /// Median of one call, from the host, until its results are there.
    pub seconds: f64,
    /// `batch / seconds`
    pub queries_per_second: f64,
    /// Making the index.
    pub build_seconds: f64,
}

/// Queries of the DLRM-style core at a time.
pub const DLRM_BATCH: usize = 1024;
/// What its shape begins with.
pub const DLRM_SHAPE: &str = "1024 x 270, DLRM-style";
/// Copies of a batch that stays on the GPU: in, and out.
pub const COPIES: usize = 2;
/// What is aimed at, of the shapes that the bars are of.
const ITEMS: &str = "1000000 x 128";
const CANDIDATES: u32 = 900;

impl Report {
    /// Sets the bars that something was measured of.
    pub fn judge(&mut self) {
        let mut bars = Vec::new();
        let mut bar = |what: String, wanted: f64, got: Option<f64>| {
            bars.extend(got.map(|got| Bar { what, wanted, got }));
        };
        let best = |all: &mut dyn Iterator<Item = f64>| all.max_by(f64::total_cmp);
        for k in [10, 100, 500, 1024] {
            let shape = format!("1024 x 1000000, k {k}");
            let of = |time: &&KernelTime| time.kernel == "topk_select" && time.shape == shape;
            let got = self.kernels.iter().find(of).map(|time| time.of_copy);
            bar(format!("topk_select, {shape}: share of a copy's bandwidth"), 0.7, got);
        }
        let found = |s: &&SearchSpeed| s.dataset == ITEMS && s.k == 500 && s.batch == 256 && s.recall >= 0.95;
        let got = best(&mut self.searches.iter().filter(found).map(|s| s.queries_per_second));
        bar(format!("retrieval, {ITEMS}, k 500, batch 256, recall 0.95: queries/s"), 100_000.0, got);
        for check in self.slates.iter().filter(|check| check.numbers.starts_with("bf16")) {
            bar(format!("slates, {}, {}: NDCG@10", check.network, check.numbers), 0.999, Some(check.ndcg));
        }
        for (network, wanted) in [("256-512-256-128-1", 150_000.0), ("128-256-128-1", 1_000_000.0)] {
            let of = |s: &&PipelineSpeed| s.network == network && s.dataset == ITEMS && s.candidates == CANDIDATES;
            let got = best(&mut self.pipelines.iter().filter(of).map(|s| s.requests_per_second));
            bar(format!("recommendations, {ITEMS}, {CANDIDATES} candidates, {network}: requests/s"), wanted, got);
        }
        let pairs = self.kernels.iter().find(|time| time.shape.starts_with(DLRM_SHAPE));
        let got = pairs.map(|time| DLRM_BATCH as f64 / time.seconds);
        let what = "a DLRM-style core on 270 pairs, not an MLPerf result (one H200 there, a larger model: 48,000 to 74,000): queries/s";
        bar(what.to_owned(), 48_000.0, got);
        self.bars = bars;
    }

    /// Whether nothing was found wrong.
    pub fn is_clean(&self) -> bool {
        self.programs.iter().all(|(_, passed)| *passed)
            && self.kernel_checks.iter().all(|check| check.mismatches.is_empty())
            && self.engines.iter().all(|check| check.is_same)
            && self.slates.iter().all(|check| check.is_same)
            && self.pipelines.iter().all(|speed| speed.copies <= COPIES)
            && self.agreements.iter().all(|agreement| agreement.is_same)
            && self.sanitizer.iter().all(|(_, findings)| *findings == 0)
    }

    /// Tables in Markdown.
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        let Report { date, command, seed, gpu, cuvs, .. } = self;
        let _ = writeln!(out, "# GPU check\n\n{date}, {gpu}. cuVS: {cuvs}. Seed {seed}.\n\n```\n{command}\n```\n");
        let verdict = if self.is_clean() { "nothing differs" } else { "**something differs**" };
        let _ = writeln!(out, "Result: {verdict}.\n\n| check | result |\n|---|---|");
        for (name, passed) in &self.programs {
            let _ = writeln!(out, "| tests: {name} | {} |", if *passed { "passed" } else { "**failed**" });
        }
        for KernelCheck { kernel, tried, mismatches } in &self.kernel_checks {
            let _ = writeln!(out, "| {kernel}, {tried} random shapes | {} mismatches |", mismatches.len());
        }
        for EngineCheck { what, jobs, recall, floor, is_same, note } in &self.engines {
            let mark = if *is_same { "" } else { " **too little**" };
            let colon = if note.is_empty() { "" } else { ": " };
            let _ =
                writeln!(out, "| engine, {what} | {recall:.4} of {jobs} jobs (at least {floor}){mark}{colon}{note} |");
        }
        for check in &self.slates {
            let SlateCheck { network, engine, numbers, jobs, same_candidates, candidates, ndcg, .. } = check;
            let _ = write!(
                out,
                "| recommendations, {network}, {engine}, {numbers} | {same_candidates} of {jobs} with the CPU's {candidates:.0} candidates, \
                 NDCG@10 {ndcg:.5} (at least {}), scores off by {:.1e} of their spread",
                check.floor, check.score_error
            );
            let (mark, colon) =
                (if check.is_same { "" } else { " **wrong**" }, if check.note.is_empty() { "" } else { ": " });
            let _ = writeln!(out, "{mark}{colon}{} |", check.note);
        }
        for speed in self.pipelines.iter().filter(|speed| speed.copies > COPIES) {
            let PipelineSpeed { network, engine, batch, copies, .. } = speed;
            let _ = writeln!(out, "| copies of a batch, {network}, {engine}, {batch} requests | **{copies}** |");
        }
        for (tool, findings) in &self.sanitizer {
            let _ = writeln!(out, "| compute-sanitizer, {tool} | {findings} findings |");
        }
        for Agreement { index, what, recall, floor, score_off, is_same } in &self.agreements {
            let mark = if *is_same { "" } else { " **too little**" };
            let _ = writeln!(
                out,
                "| {index}: {what} | recall {recall:.4} (at least {floor}), scores off by {score_off:.1e}{mark} |"
            );
        }
        if !self.bars.is_empty() {
            let _ = writeln!(out, "\n| what was aimed at | wanted | measured | |\n|---|--:|--:|---|");
            for Bar { what, wanted, got } in &self.bars {
                let digits = if *wanted < 10.0 { 4 } else { 0 };
                let met = if got >= wanted { "pass" } else { "fail" };
                let _ = writeln!(out, "| {what} | {wanted:.digits$} | {got:.digits$} | {met} |");
            }
        }
        if !self.kernels.is_empty() {
            let bandwidth = 2.0 * self.copy_bytes_per_second / 1e9;
            let _ = writeln!(out, "\nA copy on the GPU moves {bandwidth:.0} GB/s, read and written.\n");
            let _ = writeln!(out, "| kernel | shape | µs | MB | of the copy's bandwidth | TFLOP/s |");
            let _ = writeln!(out, "|---|---|--:|--:|--:|--:|");
            for KernelTime { kernel, shape, seconds, bytes, of_copy, flops } in &self.kernels {
                let (us, mb, share) = (seconds * 1e6, *bytes as f64 / 1e6, of_copy * 100.0);
                let speed = if *flops > 0 { format!("{:.1}", *flops as f64 / seconds / 1e12) } else { String::new() };
                let _ = writeln!(out, "| {kernel} | {shape} | {us:.1} | {mb:.1} | {share:.0} % | {speed} |");
            }
        }
        if !self.engine_speeds.is_empty() {
            let _ = writeln!(out, "\n| items | engine, one worker | batch | ms | jobs/s |\n|---|---|--:|--:|--:|");
            for EngineSpeed { device, dataset, batch, seconds, jobs_per_second } in &self.engine_speeds {
                let ms = seconds * 1e3;
                let _ = writeln!(out, "| {dataset} | {device} | {batch} | {ms:.3} | {jobs_per_second:.0} |");
            }
        }
        self.pipeline_tables(&mut out);
        if !self.searches.is_empty() {
            let head = "\n| vectors | index | k | effort | recall | batch | ms | queries/s |\n|---|---|--:|---|--:|--:|--:|--:|";
            let _ = writeln!(out, "{head}");
            for s in &self.searches {
                let (ms, qps) = (s.seconds * 1e3, s.queries_per_second);
                let _ = writeln!(
                    out,
                    "| {} | {} | {} | {} | {:.4} | {} | {ms:.3} | {qps:.0} |",
                    s.dataset, s.kind, s.k, s.effort, s.recall, s.batch
                );
            }
        }
        if !self.notes.is_empty() {
            let _ = writeln!(out, "\nNotes:\n");
            for note in &self.notes {
                let _ = writeln!(out, "- {note}");
            }
        }
        out
    }

    fn pipeline_tables(&self, out: &mut String) {
        if self.pipelines.is_empty() {
            return;
        }
        let _ = writeln!(
            out,
            "\nRecommendations as a whole, {COPIES} copies a batch. \"On the GPU\" is one batch alone; what is missing to p50 is the CPU's.\n\n\
             | items | ranker | candidates | workers | batch | p50 ms | p99 ms | requests/s | on the GPU, ms | as a whole |\n\
             |---|---|--:|--:|--:|--:|--:|--:|--:|--:|"
        );
        let ranker = |s: &PipelineSpeed| format!("{}, {}, {}", s.network, s.engine, s.numbers);
        for s in &self.pipelines {
            let [p50, p99, gpu] = [s.p50_seconds, s.p99_seconds, s.device_seconds].map(|seconds| seconds * 1e3);
            let (share, candidates) = (s.whole * 100.0, s.candidates);
            let _ = writeln!(
                out,
                "| {} | {} | {candidates} | {} | {} | {p50:.3} | {p99:.3} | {:.0} | {gpu:.3} | {share:.1} % |",
                s.dataset,
                ranker(s),
                s.workers,
                s.batch,
                s.requests_per_second
            );
        }
        let _ = writeln!(
            out,
            "\nTime of their stages, of kernels launched one by one:\n\n| ranker | batch | stages |\n|---|--:|---|"
        );
        for s in self.pipelines.iter().filter(|s| s.workers == 1) {
            let all: f64 = s.stages.iter().map(|stage| stage.seconds).sum();
            let stages = s.stages.iter().map(|StageShare { stage, seconds }| {
                format!("{stage} {:.0} % ({:.1} µs)", seconds / all * 100.0, seconds * 1e6)
            });
            let _ = writeln!(out, "| {} | {} | {} |", ranker(s), s.batch, stages.collect::<Vec<_>>().join(", "));
        }
    }
}

/// The day of `seconds` after 1970 began, as year-month-day (Hinnant, "chrono-compatible low-level date algorithms").
pub fn day(seconds: u64) -> String {
    let days = (seconds / 86_400) as i64 + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    format!("{:04}-{month:02}-{day:02}", year + era * 400 + i64::from(month <= 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_named() {
        let days = [
            (0, "1970-01-01"),
            (951_782_400, "2000-02-29"),
            (1_795_702_000, "2026-11-26"),
            (4_107_542_400, "2100-03-01"),
        ];
        for (seconds, name) in days {
            assert_eq!(day(seconds), name);
        }
    }

    #[test]
    fn bars_are_of_what_was_measured() {
        let mut report = Report::default();
        report.judge();
        assert!(report.bars.is_empty());
        let speed = |dataset: &str, copies, requests_per_second| PipelineSpeed {
            dataset: dataset.into(),
            network: "256-512-256-128-1".into(),
            engine: "dense".into(),
            numbers: "bf16".into(),
            candidates: CANDIDATES,
            batch: 1024,
            workers: 1,
            p50_seconds: 0.01,
            p99_seconds: 0.02,
            requests_per_second,
            whole: 1.0,
            copies,
            device_seconds: 0.005,
            stages: vec![StageShare { stage: "rank".into(), seconds: 0.005 }],
        };
        report.pipelines = vec![speed(ITEMS, 2, 120_000.0), speed(ITEMS, 2, 149_999.0), speed("10 x 2", 2, 1e9)];
        let time = |kernel: &str, shape: &str, seconds, of_copy| KernelTime {
            kernel: kernel.into(),
            shape: shape.into(),
            seconds,
            bytes: 1,
            of_copy,
            flops: 1,
        };
        report.kernels = vec![
            time("topk_select", "1024 x 1000000, k 100", 1.0, 0.75),
            time("dense_rank", &format!("{DLRM_SHAPE}, 0.47 MFLOP a pair, bf16"), 0.0128, 0.1),
        ];
        report.judge();
        let got: Vec<f64> = report.bars.iter().map(|bar| bar.got).collect();
        assert_eq!(got, [0.75, 149_999.0, 80_000.0]);
        let text = report.markdown();
        let passed = [" | 0.7000 | 0.7500 | pass |", " | 150000 | 149999 | fail |", " | 48000 | 80000 | pass |"];
        assert!(passed.iter().all(|line| text.contains(line)), "{text}");
        // A bar that is missed is no error; a copy too many is.
        assert!(report.is_clean());
        report.pipelines.push(speed(ITEMS, 3, 1.0));
        assert!(!report.is_clean() && report.markdown().contains("| copies of a batch,"));
    }

    #[test]
    fn a_report_says_what_is_wrong() {
        let mut report = Report { programs: vec![("x".into(), true)], ..Report::default() };
        assert!(report.is_clean() && report.markdown().contains("nothing differs"));
        report.sanitizer.push(("memcheck".into(), 1));
        assert!(!report.is_clean() && report.markdown().contains("**something differs**"));
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    }
}
