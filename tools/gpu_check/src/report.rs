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
    /// Speed of searches.
    pub searches: Vec<SearchSpeed>,
    /// What went wrong, and what was left out.
    pub notes: Vec<String>,
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

impl Report {
    /// Whether nothing was found wrong.
    pub fn is_clean(&self) -> bool {
        self.programs.iter().all(|(_, passed)| *passed)
            && self.kernel_checks.iter().all(|check| check.mismatches.is_empty())
            && self.engines.iter().all(|check| check.is_same)
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
        if !self.kernels.is_empty() {
            let bandwidth = 2.0 * self.copy_bytes_per_second / 1e9;
            let _ = writeln!(out, "\nA copy on the GPU moves {bandwidth:.0} GB/s, read and written.\n");
            let _ = writeln!(out, "| kernel | shape | µs | MB | of the copy's bandwidth |\n|---|---|--:|--:|--:|");
            for KernelTime { kernel, shape, seconds, bytes, of_copy } in &self.kernels {
                let (us, mb, share) = (seconds * 1e6, *bytes as f64 / 1e6, of_copy * 100.0);
                let _ = writeln!(out, "| {kernel} | {shape} | {us:.1} | {mb:.1} | {share:.0} % |");
            }
        }
        if !self.engine_speeds.is_empty() {
            let _ = writeln!(out, "\n| items | engine, one worker | batch | ms | jobs/s |\n|---|---|--:|--:|--:|");
            for EngineSpeed { device, dataset, batch, seconds, jobs_per_second } in &self.engine_speeds {
                let ms = seconds * 1e3;
                let _ = writeln!(out, "| {dataset} | {device} | {batch} | {ms:.3} | {jobs_per_second:.0} |");
            }
        }
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
    fn a_report_says_what_is_wrong() {
        let mut report = Report { programs: vec![("x".into(), true)], ..Report::default() };
        assert!(report.is_clean() && report.markdown().contains("nothing differs"));
        report.sanitizer.push(("memcheck".into(), 1));
        assert!(!report.is_clean() && report.markdown().contains("**something differs**"));
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    }
}
