//! What was read of entities, in memory, bounded in bytes: in front of Redis, and for when Redis is away.

use std::sync::Arc;
use std::time::{Duration, Instant};

use quick_cache::Weighter;
use quick_cache::sync::Cache;

/// Bookkeeping per entry, bytes, about.
const OVERHEAD: usize = 96;

/// Memory that a value takes.
pub trait Size {
    /// Bytes, about.
    fn bytes(&self) -> usize;
}

struct Held<T> {
    /// `None`: there was nothing.
    value: Option<Arc<T>>,
    read: Instant,
    /// What was known of the entity here when there was nothing.
    version: u64,
}

// Derived, it would want `T` to be one.
impl<T> Clone for Held<T> {
    fn clone(&self) -> Self {
        Held { value: self.value.clone(), read: self.read, version: self.version }
    }
}

#[derive(Clone)]
struct Bytes;

impl<T: Size> Weighter<Arc<str>, Held<T>> for Bytes {
    fn weight(&self, id: &Arc<str>, held: &Held<T>) -> u64 {
        (OVERHEAD + id.len() + held.value.as_ref().map_or(0, |value| value.bytes())) as u64
    }
}

/// What the memory knows.
#[derive(Debug, PartialEq, Eq)]
pub enum Memory<T> {
    /// Read a short time ago: there is this, or nothing.
    Fresh(Option<Arc<T>>),
    /// Read longer ago than that.
    Stale(Arc<T>),
    /// Nothing that is of use.
    Unknown,
}

/// Values of one kind by entity; shared by all shards.
pub struct MemoryTier<T: Size> {
    entries: Cache<Arc<str>, Held<T>, Bytes>,
    ttl: Duration,
    negative_ttl: Duration,
}

impl<T: Size> MemoryTier<T> {
    /// An empty one of `capacity` bytes. Values are fresh for `ttl`, the knowledge that there is none for `negative_ttl`.
    pub fn new(capacity: u64, ttl: Duration, negative_ttl: Duration) -> Self {
        let estimate = (capacity / 512).clamp(64, 1 << 24) as usize;
        MemoryTier { entries: Cache::with_weighter(estimate, capacity, Bytes), ttl, negative_ttl }
    }

    /// What is known of an entity. That there was nothing counts only while `version`, of what events and upserts say of it here, is the
    /// same as then: whoever tells us of an entity may have told others.
    pub fn get(&self, id: &str, version: u64, now: Instant) -> Memory<T> {
        let Some(held) = self.entries.get(id) else { return Memory::Unknown };
        let age = now.saturating_duration_since(held.read);
        match held.value {
            Some(value) if age < self.ttl => Memory::Fresh(Some(value)),
            Some(value) => Memory::Stale(value),
            None if age < self.negative_ttl && held.version == version => Memory::Fresh(None),
            None => Memory::Unknown,
        }
    }

    /// Keeps what was read at `read`.
    pub fn put(&self, id: &str, value: Option<Arc<T>>, version: u64, read: Instant) {
        self.entries.insert(id.into(), Held { value, read, version });
    }

    /// Memory in use, bytes, about.
    pub fn bytes(&self) -> u64 {
        self.entries.weight()
    }

    /// Entities held.
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

    impl Size for [u8; 100] {
        fn bytes(&self) -> usize {
            100
        }
    }

    #[test]
    fn values_age_and_what_was_not_there_is_asked_for_again() {
        let tier = MemoryTier::new(1 << 20, Duration::from_secs(60), Duration::from_secs(5));
        let (now, value) = (Instant::now(), Arc::new([0; 100]));
        tier.put("a", Some(value.clone()), 0, now);
        tier.put("b", None, 7, now);
        let at = |id: &str, version, seconds| tier.get(id, version, now + Duration::from_secs(seconds));
        assert_eq!(at("a", 0, 59), Memory::Fresh(Some(value.clone())));
        // An event does not make what was read wrong.
        assert_eq!(at("a", 9, 59), Memory::Fresh(Some(value.clone())));
        assert_eq!(at("a", 0, 60), Memory::Stale(value));
        assert_eq!(at("b", 7, 4), Memory::Fresh(None));
        // An event or an upsert of it came.
        assert_eq!((at("b", 8, 4), at("b", 7, 5), at("c", 0, 0)), (Memory::Unknown, Memory::Unknown, Memory::Unknown));
    }

    #[test]
    fn memory_is_bounded() {
        let tier: MemoryTier<[u8; 100]> = MemoryTier::new(1 << 20, Duration::from_secs(60), Duration::from_secs(5));
        let now = Instant::now();
        for at in 0..20_000 {
            tier.put(&format!("user-{at}"), (at % 2 == 0).then(|| Arc::new([0; 100])), 0, now);
            assert!(tier.bytes() <= 1 << 20);
        }
        assert!(tier.len() > 3000 && !tier.is_empty());
    }
}
