//! Metrics and logs.

pub mod metrics;

use std::io::IsTerminal;

use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

/// `[telemetry]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetryConfig {
    /// error, warn, info, debug, trace, or a filter as in `info,tastemaker::server=debug`. Default info.
    pub log_level: String,
    /// Lines of JSON instead of text. Default false.
    pub log_json: bool,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        TelemetryConfig { log_level: "info".into(), log_json: false }
    }
}

impl TelemetryConfig {
    /// Checks the filter.
    ///
    /// # Errors
    /// The key and what is wrong with its value.
    pub fn validate(&self) -> Result<(), String> {
        match EnvFilter::try_new(&self.log_level) {
            Ok(_) => Ok(()),
            Err(e) => Err(format!("telemetry.log_level is `{}`: {e}", self.log_level)),
        }
    }
}

/// Starts logging to standard error. A second call changes nothing.
///
/// # Errors
/// The filter does not parse.
pub fn init(config: &TelemetryConfig) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&config.log_level)?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // Else a line that can't be written panics: the pipe's reader may be gone, and the server serves on.
        .log_internal_errors(false)
        .with_ansi(std::io::stderr().is_terminal());
    // Only a logger that is there already makes this fail, and then that one stays.
    let _ = if config.log_json { builder.json().try_init() } else { builder.with_target(false).try_init() };
    Ok(())
}
