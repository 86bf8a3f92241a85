//! `nvidia-smi dmon`: started, read, stopped.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, ensure};

/// What is shown: name, unit, column of `dmon`.
pub const COLUMNS: [(&str, &str, &str); 6] = [
    ("utilisation", "%", "sm"),
    ("memory traffic", "%", "mem"),
    ("memory used", "MiB", "fb"),
    ("power", "W", "pwr"),
    ("SM clock", "MHz", "pclk"),
    ("memory clock", "MHz", "mclk"),
];

/// One line of `dmon`.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Seconds since 1970 began.
    pub unix: f64,
    /// Which GPU.
    pub gpu: u32,
    /// In the order of [`COLUMNS`]; `None` where the GPU has no such reading.
    pub values: [Option<f64>; COLUMNS.len()],
}

/// Reads lines, the headers first: newer and older versions have different columns in different places.
#[derive(Debug, Default)]
pub struct Lines {
    places: HashMap<String, usize>,
}

impl Lines {
    /// The line's sample; `None` for headers.
    ///
    /// `offset`: seconds by which local time is ahead of UTC.
    ///
    /// # Errors
    /// A line that fits no header.
    pub fn read(&mut self, line: &str, offset: i64) -> Result<Option<Sample>> {
        let fields: Vec<&str> = line.trim_start_matches('#').split(',').map(str::trim).collect();
        if line.trim().is_empty() {
            return Ok(None);
        }
        if line.trim_start().starts_with('#') || fields.contains(&"gpu") {
            // The second header has units, and no `gpu`.
            if fields.contains(&"gpu") {
                self.places = fields.iter().enumerate().map(|(at, name)| (name.to_lowercase(), at)).collect();
            }
            return Ok(None);
        }
        let field = |name: &str| self.places.get(name).and_then(|&at| fields.get(at)).copied();
        let said = || format!("nvidia-smi: `{line}`");
        let date = field("date").with_context(said)?.replace('/', "");
        let day: u64 = date.parse().with_context(said)?;
        let clock: Vec<u64> = field("time")
            .with_context(said)?
            .split(':')
            .map(str::parse)
            .collect::<Result<_, _>>()
            .with_context(said)?;
        ensure!(date.len() == 8 && clock.len() == 3, said());
        let days = days_since_1970((day / 10_000) as i64, (day / 100 % 100) as i64, (day % 100) as i64);
        let unix = (days * 86_400 + (clock[0] * 3600 + clock[1] * 60 + clock[2]) as i64 - offset) as f64;
        let values = COLUMNS.map(|(_, _, column)| field(column).and_then(|value| value.parse().ok()));
        Ok(Some(Sample { unix, gpu: field("gpu").with_context(said)?.parse().with_context(said)?, values }))
    }
}

/// Days from 1970 on (Hinnant, "chrono-compatible low-level date algorithms").
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * (month + if month > 2 { -3 } else { 9 }) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

/// Seconds by which local time is ahead of UTC now.
fn local_offset() -> i64 {
    // SAFETY: the structure is filled for a time that was just taken, and belongs to this function.
    unsafe {
        let now = libc::time(std::ptr::null_mut());
        let mut parts = std::mem::zeroed::<libc::tm>();
        libc::localtime_r(&now, &mut parts);
        parts.tm_gmtoff
    }
}

/// A running `nvidia-smi dmon`.
pub struct Dmon {
    child: Child,
    reader: JoinHandle<()>,
    samples: Arc<Mutex<(Vec<Sample>, Option<String>)>>,
}

impl Dmon {
    /// Starts `program`, one sample a second.
    ///
    /// # Errors
    /// It can't be run.
    pub fn start(program: &Path, gpu: Option<u32>) -> Result<Dmon> {
        let mut command = Command::new(program);
        command.args(["dmon", "-s", "pucm", "-o", "DT", "-d", "1", "--format", "csv"]);
        if let Some(gpu) = gpu {
            command.args(["-i", &gpu.to_string()]);
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .with_context(|| program.display().to_string())?;
        let out = BufReader::new(child.stdout.take().context("no output")?);
        let samples = Arc::new(Mutex::new((Vec::new(), None)));
        let (offset, shared) = (local_offset(), samples.clone());
        let reader = std::thread::spawn(move || {
            let mut lines = Lines::default();
            for line in out.lines().map_while(Result::ok) {
                let read = lines.read(&line, offset);
                let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
                match read {
                    Ok(sample) => shared.0.extend(sample),
                    // The first is enough.
                    Err(error) => drop(shared.1.get_or_insert(format!("{error:#}"))),
                }
            }
        });
        Ok(Dmon { child, reader, samples })
    }

    /// Stops it; what it said.
    ///
    /// # Errors
    /// It said nothing that could be read.
    pub fn stop(mut self) -> Result<Vec<Sample>> {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = self.reader.join();
        let (samples, error) = std::mem::take(&mut *self.samples.lock().unwrap_or_else(PoisonError::into_inner));
        ensure!(!samples.is_empty(), "{}", error.unwrap_or_else(|| "nvidia-smi dmon said nothing".into()));
        Ok(samples)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_found_by_name() {
        let mut lines = Lines::default();
        let header = "#Date, Time, gpu, pwr, gtemp, mtemp, sm, mem, enc, dec, jpg, ofa, mclk, pclk, fb, bar1, ccpm";
        assert_eq!(lines.read(header, 0).unwrap(), None);
        assert_eq!(
            lines.read("#YYYYMMDD, HH:MM:SS, Idx, W, C, C, %, %, %, %, %, %, MHz, MHz, MB, MB, MB", 0).unwrap(),
            None
        );
        let line = "20261126, 15:04:05, 0, 651, 61, 70, 98, 55, 0, 0, 0, 0, 3201, 1980, 12345, 3, 0";
        let values = [98.0, 55.0, 12345.0, 651.0, 1980.0, 3201.0].map(Some);
        let unix = 1_795_705_445.0;
        assert_eq!(lines.read(line, 0).unwrap(), Some(Sample { unix, gpu: 0, values }));
        // An hour ahead of UTC; a reading that the GPU does not have; other places.
        lines.read("# gpu, sm, Date, Time, mem", 0).unwrap();
        let sample = lines.read("1, -, 20261126, 15:04:05, 7", 3600).unwrap().unwrap();
        assert_eq!((sample.unix, sample.gpu, sample.values[0], sample.values[1]), (unix - 3600.0, 1, None, Some(7.0)));
        let said = lines.read("1, 2", 0).unwrap_err().to_string();
        assert_eq!(said, "nvidia-smi: `1, 2`");
        assert!(Lines::default().read("NVIDIA-SMI has failed", 0).is_err());
    }
}
