//! L1: results in this process's memory, bounded in bytes (quick_cache: sharded, scan-resistant S3-FIFO).

use std::sync::Arc;
use std::time::{Duration, Instant};

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use super::CacheConfig;
use super::key::CacheKey;
use crate::api::Slate;

/// Bookkeeping of the cache per entry, bytes, about.
const OVERHEAD: usize = 96;

#[derive(Clone)]
struct Entry {
    slate: Arc<Slate>,
    stored: Instant,
}

#[derive(Clone)]
struct Bytes;

impl Weighter<CacheKey, Entry> for Bytes {
    fn weight(&self, _: &CacheKey, entry: &Entry) -> u64 {
        (entry.slate.size_bytes() + OVERHEAD) as u64
    }
}

/// Results by key; shared by all shards.
pub struct ResultCache {
    entries: Cache<CacheKey, Entry, Bytes>,
    ttl: Duration,
    stale: Duration,
}

impl ResultCache {
    /// An empty cache.
    pub fn new(config: &CacheConfig) -> Self {
        // A slate of ten items takes about half a KiB.
        let estimate = (config.capacity_bytes / 512).clamp(64, 1 << 24) as usize;
        ResultCache {
            entries: Cache::with_weighter(estimate, config.capacity_bytes, Bytes),
            ttl: Duration::from_secs(u64::from(config.ttl_seconds)),
            stale: Duration::from_secs(u64::from(config.stale_seconds)),
        }
    }

    /// The result, and whether it is older than the TTL and should be computed anew; none beyond the time that stale ones are
    /// served.
    pub fn get(&self, key: CacheKey, now: Instant) -> Option<(Arc<Slate>, bool)> {
        let entry = self.entries.get(&key)?;
        let age = now.saturating_duration_since(entry.stored);
        if age < self.ttl + self.stale {
            return Some((entry.slate, age >= self.ttl));
        }
        self.entries.remove(&key);
        None
    }

    /// Stores a result. Degraded ones are not stored: a minute later the answer may be whole.
    pub fn put(&self, key: CacheKey, slate: &Arc<Slate>, now: Instant) {
        if slate.degraded.is_empty() {
            self.entries.insert(key, Entry { slate: slate.clone(), stored: now });
        }
    }

    /// Memory in use, bytes, about.
    pub fn bytes(&self) -> u64 {
        self.entries.weight()
    }

    /// Results held.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::SlateItem;
    use crate::catalog::generation::testing;
    use crate::context::{Degradation, Reason, Stage};

    fn slate(n: usize) -> Slate {
        let item = SlateItem { row: 0, score: 0.0, sources: Default::default(), explanation: None };
        Slate {
            generation: Arc::new(testing::plain(1)),
            items: vec![item; n],
            degraded: Vec::new(),
            timings: Default::default(),
            known_user: true,
            n_candidates: 1,
            coverage: 1.0,
        }
    }

    #[test]
    fn results_expire() {
        let cache = ResultCache::new(&CacheConfig { ttl_seconds: 300, stale_seconds: 20, ..CacheConfig::default() });
        let now = Instant::now();
        cache.put(1, &Arc::new(slate(10)), now);
        let stale = |seconds| cache.get(1, now + Duration::from_secs(seconds)).map(|(_, stale)| stale);
        assert_eq!([0, 299, 300, 319].map(stale), [Some(false), Some(false), Some(true), Some(true)]);
        assert!(cache.get(2, now).is_none());
        assert_eq!(stale(320), None);
        assert!(cache.is_empty());
    }

    #[test]
    fn memory_is_bounded() {
        let config = CacheConfig { capacity_bytes: 1 << 20, ..CacheConfig::default() };
        let cache = ResultCache::new(&config);
        let (now, one) = (Instant::now(), Arc::new(slate(10)));
        for key in 0..20_000 {
            cache.put(key, &one, now);
            assert!(cache.bytes() <= config.capacity_bytes);
        }
        assert!(cache.len() > 500);
    }

    #[test]
    fn degraded_results_are_not_stored() {
        let cache = ResultCache::new(&CacheConfig::default());
        let mut degraded = slate(1);
        degraded.degraded.push(Degradation { stage: Stage::Ann, reason: Reason::Failed });
        cache.put(1, &Arc::new(degraded), Instant::now());
        assert!(cache.is_empty());
    }
}
