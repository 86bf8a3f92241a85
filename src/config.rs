//! The configuration file: every section, composed of the structs that stand next to the code they configure.
//!
//! An unknown key is an error that names the key, its line and the nearest known one. Flags override the file.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cache::CacheConfig;
use crate::context::nearest;
use crate::device::DeviceConfig;
use crate::pipeline::PipelineConfig;
use crate::rerank::RerankConfig;
use crate::server::ServerConfig;
use crate::state::{EventsConfig, StateConfig};
use crate::store::FeaturesConfig;
use crate::telemetry::TelemetryConfig;

/// `tastemaker.toml`. Every key has a default; `docs/tastemaker.toml` shows each with its unit and range.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Sockets, shards, workers, limits.
    pub server: ServerConfig,
    /// Sources, features, ranking.
    pub pipeline: PipelineConfig,
    /// How a GPU is used.
    pub device: DeviceConfig,
    /// Diversity and business rules.
    pub rerank: RerankConfig,
    /// Result cache.
    pub cache: CacheConfig,
    /// Events and what they change.
    pub events: EventsConfig,
    /// Items and users that come and change at run time.
    pub state: StateConfig,
    /// Features that replicas share.
    pub features: FeaturesConfig,
    /// Logs.
    pub telemetry: TelemetryConfig,
}

/// Why a configuration was refused; the text names the file, the place and the key.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("{}: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A key that does not exist.
    #[error("{}:{line}: unknown key `{key}`{}", file.display(), nearest.as_ref().map(|n| format!("; did you mean `{n}`?")).unwrap_or_default())]
    UnknownKey {
        /// The file.
        file: PathBuf,
        /// Line from 1.
        line: usize,
        /// The key.
        key: String,
        /// The nearest key that exists at that place.
        nearest: Option<String>,
    },
    /// A value of the wrong type, or TOML that does not parse.
    #[error("{}:{line}: {message}", file.display())]
    Invalid {
        /// The file.
        file: PathBuf,
        /// Line from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// A value out of its range.
    #[error("{}: {message}", file.display())]
    Range {
        /// The file.
        file: PathBuf,
        /// Names the key, the value and the range.
        message: String,
    },
}

impl Config {
    /// Reads and validates a file.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn read(file: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(file).map_err(|source| ConfigError::Read { file: file.into(), source })?;
        Self::parse(&text, file)
    }

    /// Parses and validates `text`; `file` is for messages only.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn parse(text: &str, file: &Path) -> Result<Self, ConfigError> {
        let config: Config = toml::from_str(text).map_err(|e| {
            let line = e.span().map_or(1, |span| 1 + text[..span.start.min(text.len())].matches('\n').count());
            match unknown_field(e.message()) {
                Some((key, known)) => {
                    let nearest = nearest(&key, known.iter().map(String::as_str)).map(String::from);
                    ConfigError::UnknownKey { file: file.into(), line, key, nearest }
                }
                None => ConfigError::Invalid { file: file.into(), line, message: e.message().to_owned() },
            }
        })?;
        config.validate().map_err(|message| ConfigError::Range { file: file.into(), message })?;
        Ok(config)
    }

    /// Checks ranges; the error names the key, the value and the range.
    ///
    /// # Errors
    /// The first key out of range.
    pub fn validate(&self) -> Result<(), String> {
        self.server.validate()?;
        self.pipeline.validate()?;
        self.device.validate()?;
        self.rerank.validate()?;
        self.cache.validate()?;
        self.events.validate()?;
        self.state.validate()?;
        self.features.validate()?;
        self.telemetry.validate()
    }
}

/// Checks whole numbers of a section: key, value, least and most.
///
/// # Errors
/// The first key out of its range, its value and its range.
pub(crate) fn in_range<T: PartialOrd + Display, const N: usize>(
    section: &str,
    ranges: [(&str, T, T, T); N],
) -> Result<(), String> {
    match ranges.iter().find(|(_, value, low, high)| value < low || value > high) {
        Some((key, value, low, high)) => Err(format!("{section}.{key} is {value}, expected {low} to {high}")),
        None => Ok(()),
    }
}

/// Checks the URL of a `key`, where there is one; the text does not show it, for it may hold a password.
///
/// # Errors
/// It is none of Redis.
pub(crate) fn redis_url(key: &str, url: &str) -> Result<(), String> {
    match url.is_empty() || redis::Client::open(url).is_ok() {
        true => Ok(()),
        false => Err(format!("{key} is not as in redis://[USER:PASSWORD@]HOST[:PORT][/DB] or unix:///PATH")),
    }
}

/// The key and the known keys in serde's "unknown field" message.
fn unknown_field(message: &str) -> Option<(String, Vec<String>)> {
    if !message.contains("unknown field") {
        return None;
    }
    let mut quoted = message.split('`').skip(1).step_by(2).map(String::from);
    let key = quoted.next()?;
    Some((key, quoted.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::TableStorage;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("t.toml"))
    }

    #[test]
    fn empty_file_is_the_default() {
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn default_passes_its_own_validation() {
        Config::default().validate().unwrap();
    }

    #[test]
    fn unknown_key_names_the_nearest_one() {
        let error = parse("[cache]\nenabled = true\nttl_second = 5\n").unwrap_err();
        assert_eq!(error.to_string(), "t.toml:3: unknown key `ttl_second`; did you mean `ttl_seconds`?");
    }

    #[test]
    fn unknown_section_names_the_nearest_one() {
        let error = parse("\n[pipelin]\n").unwrap_err();
        assert_eq!(error.to_string(), "t.toml:2: unknown key `pipelin`; did you mean `pipeline`?");
    }

    #[test]
    fn wrong_type_names_the_line() {
        let error = parse("[cache]\nenabled = 3\n").unwrap_err();
        assert!(matches!(error, ConfigError::Invalid { line: 2, .. }), "{error}");
    }

    #[test]
    fn what_a_gpu_s_tables_may_be_in_is_told() {
        let tables = |value: &str| parse(&format!("[device]\ntables = \"{value}\"\n"));
        for wanted in [TableStorage::F32, TableStorage::Bf16, TableStorage::Int8] {
            assert_eq!(tables(wanted.name()).unwrap().device.tables, wanted);
        }
        let error = tables("int4").unwrap_err();
        assert!(matches!(error, ConfigError::Invalid { line: 2, .. }), "{error}");
        assert!(error.to_string().contains("unknown variant `int4`, expected one of `f32`, `bf16`, `int8`"), "{error}");
        // Vectors have no such numbers.
        let error = parse("[device]\nvectors = \"int8\"\n").unwrap_err().to_string();
        assert!(error.contains("unknown variant `int8`, expected `f32` or `bf16`"), "{error}");
    }

    #[test]
    fn the_annotated_file_shows_every_key_at_its_default() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/tastemaker.toml");
        let text = std::fs::read_to_string(&file).unwrap();
        assert_eq!(Config::parse(&text, &file).unwrap(), Config::default());
        let shown: toml::Table = toml::from_str(&text).unwrap();
        let every = toml::Table::try_from(Config::default()).unwrap();
        for (section, keys) in &every {
            for key in keys.as_table().unwrap().keys() {
                // An empty list beside tables of the same name would not be TOML.
                let is_shown = shown[section].get(key).is_some() || text.contains(&format!("# [[{section}.{key}]]"));
                assert!(is_shown, "docs/tastemaker.toml lacks [{section}] {key}");
            }
        }
    }
}
