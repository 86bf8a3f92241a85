//! The second level of the result cache: Redis, shared by replicas.

use std::sync::Arc;
use std::time::Instant;

use smallvec::smallvec;

use super::CacheConfig;
use super::key::CacheKey;
use crate::api::Ticket;
use crate::link::{Link, Lookup};

/// Results of all replicas.
#[derive(Debug)]
pub struct RedisCache {
    /// The way there.
    pub link: Arc<Link>,
    ttl_seconds: u32,
}

impl RedisCache {
    /// `None` where it is off.
    pub fn new(CacheConfig { enabled, ttl_seconds, redis, .. }: &CacheConfig) -> Option<Self> {
        let link = || Arc::new(Link::new("results", redis));
        (*enabled && !redis.url.is_empty()).then(|| RedisCache { link: link(), ttl_seconds: *ttl_seconds })
    }

    /// `PREFIX:1:` and the key in 32 hexadecimal digits.
    fn name(&self, key: CacheKey) -> Vec<u8> {
        let mut name = Vec::with_capacity(self.link.prefix().len() + 3 + 32);
        name.extend_from_slice(self.link.prefix().as_bytes());
        name.extend_from_slice(b":1:");
        let digits = key.to_be_bytes().into_iter().flat_map(|byte| [byte >> 4, byte & 15]);
        name.extend(digits.map(|digit| b"0123456789abcdef"[usize::from(digit)]));
        name
    }

    /// Asks for a value. False: nothing will come; compute.
    pub fn get(&self, key: CacheKey, shard: u16, ticket: Ticket, now: Instant) -> bool {
        // Without a connection not even the name is made.
        self.link.is_up()
            && self.link.get(Lookup { keys: smallvec![self.name(key)], shard, ticket, mark: 0, asked: now })
    }

    /// Stores a value, if there is a connection.
    pub fn set(&self, key: CacheKey, value: &[u8]) {
        let mut store = redis::cmd("SETEX");
        store.arg(self.name(key)).arg(self.ttl_seconds).arg(value);
        self.link.store(&store);
    }
}
