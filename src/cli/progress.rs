//! Progress of long work: a bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use parking_lot::Mutex;

/// One stage of long work after another.
pub struct Reporter {
    bar: Option<ProgressBar>,
    plain: Mutex<Option<Plain>>,
}

struct Plain {
    stage: String,
    total: u64,
    done: u64,
    said: Instant,
}

impl Default for Reporter {
    fn default() -> Self {
        Self::new()
    }
}

impl Reporter {
    /// Plain lines come at most this often within a stage.
    const PLAIN_EVERY: Duration = Duration::from_secs(5);

    /// Chooses by whether standard error is a terminal.
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{msg:28} {wide_bar} {pos}/{len} {elapsed}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(0).with_style(style)
        });
        Reporter { bar, plain: Mutex::new(None) }
    }

    /// Begins a stage of `total` steps; 0 where the number is unknown.
    pub fn begin(&self, stage: &str, total: u64) {
        match &self.bar {
            Some(bar) => {
                bar.reset();
                bar.set_length(total);
                bar.set_message(stage.to_owned());
            }
            None => {
                eprintln!("{stage} …");
                *self.plain.lock() = Some(Plain { stage: stage.to_owned(), total, done: 0, said: Instant::now() });
            }
        }
    }

    /// Adds finished steps.
    pub fn advance(&self, steps: u64) {
        match &self.bar {
            Some(bar) => bar.inc(steps),
            None => {
                if let Some(plain) = &mut *self.plain.lock() {
                    plain.done += steps;
                    if plain.said.elapsed() >= Self::PLAIN_EVERY {
                        plain.said = Instant::now();
                        eprintln!("{}: {} of {}", plain.stage, plain.done, plain.total);
                    }
                }
            }
        }
    }

    /// Ends the last stage and clears the bar.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
