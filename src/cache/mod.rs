//! Result cache.

pub mod key;
pub mod memory;
pub mod precomputed;
pub mod redis;
pub mod singleflight;
pub mod value;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::in_range;
use crate::link::RedisConfig;

/// `[cache]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CacheConfig {
    /// Whether results are cached. Default true.
    pub enabled: bool,
    /// Memory for results, bytes. 1 MiB to 1 TiB, default 64 MiB.
    pub capacity_bytes: u64,
    /// How long a result is served. 1 to 86400, default 300.
    pub ttl_seconds: u32,
    /// How long after that a result is still served while it is computed anew. 0 to 86400, default 30.
    pub stale_seconds: u32,
    /// How long an answer that did without something is served again, and a defect that a call met answers the same call, milliseconds. 0 to
    /// 60000, default 1000; 0: neither is.
    pub negative_ttl_ms: u32,
    /// File of slates made by `tastemaker precompute`, asked where the memory knows nothing. Empty, the default: none.
    pub precomputed: PathBuf,
    /// How long after it was made that file is served, seconds. 1 to 31536000, default 86400.
    pub precomputed_max_age_seconds: u32,
    /// Redis behind it, for several replicas.
    pub redis: RedisConfig,
}

impl Default for CacheConfig {
    fn default() -> Self {
        CacheConfig {
            enabled: true,
            capacity_bytes: 64 << 20,
            ttl_seconds: 300,
            stale_seconds: 30,
            negative_ttl_ms: 1000,
            precomputed: PathBuf::new(),
            precomputed_max_age_seconds: 86_400,
            redis: RedisConfig::default(),
        }
    }
}

impl CacheConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// The key, its value and its range.
    pub fn validate(&self) -> Result<(), String> {
        if !((1 << 20)..=(1 << 40)).contains(&self.capacity_bytes) {
            return Err(format!("cache.capacity_bytes is {}, expected 1 MiB to 1 TiB", self.capacity_bytes));
        }
        let ranges = [
            ("ttl_seconds", self.ttl_seconds, 1, 86_400),
            ("stale_seconds", self.stale_seconds, 0, 86_400),
            ("negative_ttl_ms", self.negative_ttl_ms, 0, 60_000),
            ("precomputed_max_age_seconds", self.precomputed_max_age_seconds, 1, 31_536_000),
        ];
        in_range("cache", ranges)?;
        self.redis.validate("cache.redis")
    }
}
