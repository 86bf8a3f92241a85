//! Looks at the shards from outside: the one thread whose clock does not depend on glommio.
//!
//! glommio 0.9 can park an executor whose tasks could run (an event lands between its last look and the park), and a timer
//! inside such an executor does not end the park. A completion on the executor's main ring does; the shard always has a
//! read of its eventfd standing there, so a write to it is such a completion.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::time::{Duration, Instant};

use super::service::Shared;

/// How often shards are looked at; a wrong park lasts at most twice as long.
const INTERVAL: Duration = Duration::from_millis(2);
/// A shard that sleeps is woken this often while it has connections or calls: calls run out of time, and a park that looks
/// like sleep from outside must end, too.
const BUSY_PULSE: Duration = Duration::from_millis(8);
/// And this often when it has neither.
const IDLE_PULSE: Duration = Duration::from_millis(100);

/// Watches until `stop`.
pub fn run(shared: &Arc<Shared>, stop: &AtomicBool) {
    let now = Instant::now();
    let mut seen: Vec<(u64, Instant)> = shared.completions.iter().map(|c| (c.progress(), now)).collect();
    while !stop.load(Acquire) {
        std::thread::sleep(INTERVAL);
        let now = Instant::now();
        for ((completions, shard), (turns, since)) in
            shared.completions.iter().zip(&shared.metrics.shards).zip(&mut seen)
        {
            let progress = completions.progress();
            if progress != *turns {
                (*turns, *since) = (progress, now);
                continue;
            }
            let busy = shard.in_flight.load(Relaxed) + shard.connections.load(Relaxed) > 0;
            let pulse = if busy { BUSY_PULSE } else { IDLE_PULSE };
            if !completions.armed() || !completions.is_empty() {
                // It has work and does not move: parked wrongly, or one turn takes long. A kick harms neither.
                completions.wake();
                shared.metrics.watchdog_kicks.fetch_add(1, Relaxed);
            } else if now.saturating_duration_since(*since) >= pulse {
                completions.wake();
                *since = now;
            }
        }
    }
}
