//! Looks at the shards from outside: the one thread whose clock does not depend on glommio.
//!
//! glommio 0.9 parks an executor whose tasks could run when an event reaches its latency ring between its last look and the
//! run of its queues. Almost always that event is the preempt timer's, and shards run with that timer out of the way
//! ([`super::shard::PREEMPT_TIMER`]). Should another event do it, a completion on the executor's main ring ends the park:
//! the shard has reads of an eventfd standing there, and a kick ends one of them. A timer inside such an executor is no
//! cure. `tests/park.rs` shows the park and the cures.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::time::{Duration, Instant};

use super::service::Shared;

/// How often shards are looked at.
const INTERVAL: Duration = Duration::from_millis(2);
/// A shard that sleeps is woken this often while it has connections or calls: calls run out of time, and a park that looks
/// like sleep from outside must end, too.
const BUSY_PULSE: Duration = Duration::from_millis(6);
/// And this often when it has neither.
const IDLE_PULSE: Duration = Duration::from_millis(100);

/// What was seen of a shard.
struct Seen {
    turns: u64,
    since: Instant,
    /// It was woken since it last moved.
    woken: bool,
}

/// Watches until `stop`.
pub fn run(shared: &Arc<Shared>, stop: &AtomicBool) {
    let fresh = |turns| Seen { turns, since: Instant::now(), woken: false };
    let mut seen: Vec<Seen> = shared.completions.iter().map(|c| fresh(c.progress())).collect();
    while !stop.load(Acquire) {
        std::thread::sleep(INTERVAL);
        for ((completions, shard), seen) in shared.completions.iter().zip(&shared.metrics.shards).zip(&mut seen) {
            let turns = completions.progress();
            if turns != seen.turns {
                *seen = fresh(turns);
                continue;
            }
            let busy = shard.in_flight.load(Relaxed) + shard.connections.load(Relaxed) > 0;
            let pulse = if busy { BUSY_PULSE } else { IDLE_PULSE };
            if seen.woken || !completions.armed() || !completions.is_empty() {
                // It has work and does not move: parked wrongly, or one turn takes long. A kick harms neither.
                shared.metrics.watchdog_kicks.fetch_add(1, Relaxed);
                completions.kick();
            } else if seen.since.elapsed() >= pulse {
                completions.wake();
                seen.woken = true;
            }
        }
    }
}
