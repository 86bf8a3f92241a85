//! One computation per key across the process: whoever comes first leads, the others wait for its answer.
//!
//! Duty of a leader: [`SingleFlight::finish`] exactly once or [`SingleFlight::pass_on`], whatever became of its computation. The shard's service keeps
//! it by finishing when the leader's job comes back, and every job comes back (see `device::worker`).

use std::collections::HashMap;

use parking_lot::Mutex;
use smallvec::SmallVec;

use super::key::CacheKey;
use crate::api::Ticket;

/// Waiting calls of one key; more compute for themselves.
const MAX_WAITERS: usize = 1024;
const SHARDS: usize = 64;

/// A call that waits for another's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiter {
    /// Where it lives.
    pub shard: u16,
    /// Its shard's name for it.
    pub ticket: Ticket,
}

/// What a call is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Compute, then `finish`.
    Leader,
    /// Wait.
    Follower,
    /// Compute alone: too many wait already.
    Alone,
}

/// Waiters of one key.
pub type Waiters = SmallVec<[Waiter; 4]>;

/// Keys that are being computed now. The locks are held for a map operation only.
pub struct SingleFlight {
    shards: Vec<Mutex<HashMap<CacheKey, Waiters>>>,
}

impl Default for SingleFlight {
    fn default() -> Self {
        SingleFlight { shards: (0..SHARDS).map(|_| Mutex::default()).collect() }
    }
}

impl SingleFlight {
    fn shard(&self, key: CacheKey) -> &Mutex<HashMap<CacheKey, Waiters>> {
        &self.shards[(key >> 64) as usize % SHARDS]
    }

    /// Joins the computation of `key`, or begins it.
    pub fn join(&self, key: CacheKey, waiter: Waiter) -> Role {
        let mut flights = self.shard(key).lock();
        match flights.get_mut(&key) {
            None => {
                flights.insert(key, Waiters::new());
                Role::Leader
            }
            Some(waiters) if waiters.len() >= MAX_WAITERS => Role::Alone,
            Some(waiters) => {
                waiters.push(waiter);
                Role::Follower
            }
        }
    }

    /// Begins the computation of `key`, unless somebody computes it.
    pub fn lead(&self, key: CacheKey) -> bool {
        let mut flights = self.shard(key).lock();
        let free = !flights.contains_key(&key);
        if free {
            flights.insert(key, Waiters::new());
        }
        free
    }

    /// Hands the computation of `key` on to whoever waits for it longest, who must finish it; `None`: nobody waits, and it has ended.
    pub fn pass_on(&self, key: CacheKey) -> Option<Waiter> {
        let mut flights = self.shard(key).lock();
        let waiters = flights.get_mut(&key)?;
        if waiters.is_empty() {
            flights.remove(&key);
            return None;
        }
        Some(waiters.remove(0))
    }

    /// Ends the computation of `key`; whoever waited must now be answered.
    pub fn finish(&self, key: CacheKey) -> Waiters {
        self.shard(key).lock().remove(&key).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn one_leader_and_everybody_is_handed_back() {
        let flights = SingleFlight::default();
        let (leaders, waiting) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for shard in 0..4u16 {
                let (flights, leaders, waiting) = (&flights, &leaders, &waiting);
                scope.spawn(move || {
                    for n in 0..100 {
                        match flights.join(7, Waiter { shard, ticket: Ticket(n) }) {
                            Role::Leader => leaders.fetch_add(1, Ordering::Relaxed),
                            Role::Follower => waiting.fetch_add(1, Ordering::Relaxed),
                            Role::Alone => 0,
                        };
                    }
                });
            }
        });
        assert_eq!(leaders.load(Ordering::Relaxed), 1);
        assert_eq!(flights.finish(7).len(), waiting.load(Ordering::Relaxed));
        assert_eq!(flights.join(7, Waiter { shard: 0, ticket: Ticket(0) }), Role::Leader);
        assert!(!flights.lead(7) && flights.lead(8) && !flights.lead(8));
    }

    #[test]
    fn a_computation_is_handed_on_to_one_at_a_time() {
        let flights = SingleFlight::default();
        let waiter = |n| Waiter { shard: 0, ticket: Ticket(n) };
        assert_eq!(flights.pass_on(1), None);
        assert_eq!([0, 1, 2].map(|n| flights.join(1, waiter(n))), [Role::Leader, Role::Follower, Role::Follower]);
        assert_eq!(flights.pass_on(1), Some(waiter(1)));
        assert_eq!(flights.join(1, waiter(3)), Role::Follower);
        assert_eq!(
            [flights.pass_on(1), flights.pass_on(1), flights.pass_on(1)],
            [Some(waiter(2)), Some(waiter(3)), None]
        );
        assert_eq!(flights.join(1, waiter(4)), Role::Leader);
    }

    #[test]
    fn waiters_are_bounded() {
        let flights = SingleFlight::default();
        let roles: Vec<Role> =
            (0..MAX_WAITERS as u64 + 2).map(|n| flights.join(1, Waiter { shard: 0, ticket: Ticket(n) })).collect();
        assert_eq!(roles.iter().filter(|r| **r == Role::Alone).count(), 1);
    }
}
