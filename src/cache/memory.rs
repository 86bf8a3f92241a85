//! L1: results in this process's memory, bounded in bytes (quick_cache: sharded, scan-resistant S3-FIFO).

use std::sync::Arc;
use std::time::{Duration, Instant};

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use super::CacheConfig;
use super::key::CacheKey;
use crate::api::Slate;
use crate::context::Reason;
use crate::error::Error;

/// Bookkeeping of the cache per entry, bytes, about.
const OVERHEAD: usize = 96;

#[derive(Clone)]
struct Entry {
    /// A slate, or why there is none.
    result: Result<Arc<Slate>, Error>,
    stored: Instant,
}

impl Entry {
    /// Whether it is to be served for a short time only.
    fn is_negative(&self) -> bool {
        self.result.as_ref().map_or(true, |slate| !slate.degraded.is_empty())
    }
}

/// What the cache has.
#[derive(Clone, Debug)]
pub enum Cached {
    /// A result.
    Fresh(Arc<Slate>),
    /// One that is older than the TTL and should be computed anew.
    Stale(Arc<Slate>),
    /// It could not be computed just now.
    Fault(Error),
}

#[derive(Clone)]
struct Bytes;

impl Weighter<CacheKey, Entry> for Bytes {
    fn weight(&self, _: &CacheKey, entry: &Entry) -> u64 {
        (entry.result.as_ref().map_or(0, |slate| slate.size_bytes()) + OVERHEAD) as u64
    }
}

/// Results by key; shared by all shards.
pub struct ResultCache {
    entries: Cache<CacheKey, Entry, Bytes>,
    ttl: Duration,
    stale: Duration,
    negative_ttl: Duration,
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
            negative_ttl: Duration::from_millis(u64::from(config.negative_ttl_ms)),
        }
    }

    /// The result; none beyond the time that stale ones are served, or that negative ones are.
    pub fn get(&self, key: CacheKey, now: Instant) -> Option<Cached> {
        let entry = self.entries.get(&key)?;
        let age = now.saturating_duration_since(entry.stored);
        let negative = entry.is_negative();
        match entry.result {
            Err(fault) if age < self.negative_ttl => return Some(Cached::Fault(fault)),
            Ok(slate) if age < if negative { self.negative_ttl } else { self.ttl } => {
                return Some(Cached::Fresh(slate));
            }
            Ok(slate) if !negative && age < self.ttl + self.stale => return Some(Cached::Stale(slate)),
            _ => {}
        }
        self.entries.remove(&key);
        None
    }

    /// Stores a result. Degraded ones are stored for the negative TTL: a moment later the answer may be whole, but a key that many ask for is
    /// not computed again for each of them until then. One that ran out of time is not: others may have more.
    pub fn put(&self, key: CacheKey, slate: &Arc<Slate>, now: Instant) {
        match slate.degraded.is_empty() {
            true => self.entries.insert(key, Entry { result: Ok(slate.clone()), stored: now }),
            false if slate.degraded.iter().any(|degraded| degraded.reason == Reason::Deadline) => {}
            false => self.put_negative(key, Ok(slate.clone()), now),
        }
    }

    /// Remembers for the negative TTL that a result could not be computed for a defect that the same call would meet again.
    pub fn put_fault(&self, key: CacheKey, fault: &Error, now: Instant) {
        self.put_negative(key, Err(fault.clone()), now);
    }

    fn put_negative(&self, key: CacheKey, result: Result<Arc<Slate>, Error>, now: Instant) {
        // Whatever there is, stale perhaps, is better.
        if !self.negative_ttl.is_zero() && self.get(key, now).is_none() {
            self.entries.insert(key, Entry { result, stored: now });
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
    use crate::context::{Degradation, Stage};
    use crate::error::Code;

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
        let stale = |seconds| cache.get(1, now + Duration::from_secs(seconds)).map(|c| matches!(c, Cached::Stale(_)));
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
    fn what_is_less_than_asked_for_is_kept_for_a_moment() {
        let cache = ResultCache::new(&CacheConfig { negative_ttl_ms: 500, ..CacheConfig::default() });
        let (now, whole) = (Instant::now(), Arc::new(slate(1)));
        let degraded = |reason| {
            let mut slate = slate(1);
            slate.degraded.push(Degradation { stage: Stage::Ann, reason });
            Arc::new(slate)
        };
        let fault = Error::fixed(Code::Internal, "x");
        let at = |key, ms| cache.get(key, now + Duration::from_millis(ms));
        cache.put(1, &degraded(Reason::Failed), now);
        assert!(matches!(at(1, 499), Some(Cached::Fresh(_))) && at(1, 500).is_none());
        cache.put_fault(2, &fault, now);
        assert!(matches!(at(2, 499), Some(Cached::Fault(_))));
        // It can be computed again.
        cache.put(2, &whole, now);
        assert!(matches!(at(2, 499), Some(Cached::Fresh(_))));
        // Nothing of this takes the place of a result, be it stale.
        let later = now + Duration::from_secs(310);
        cache.put(2, &degraded(Reason::Failed), later);
        cache.put_fault(2, &fault, later);
        assert!(matches!(at(2, 310_000), Some(Cached::Stale(slate)) if slate.degraded.is_empty()));
        // Another call may have more time.
        cache.put(3, &degraded(Reason::Deadline), now);
        assert!(at(3, 0).is_none());
        let off = ResultCache::new(&CacheConfig { negative_ttl_ms: 0, ..CacheConfig::default() });
        off.put(1, &degraded(Reason::Failed), now);
        off.put_fault(2, &fault, now);
        assert!(off.is_empty());
    }
}
