//! glommio 0.9 can park an executor whose tasks could run (an event lands between its last look and the park). From
//! outside, that is a shard with work queued that does not move: its eventfd is kicked, which ends the wrong park.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::time::Duration;

use super::service::Shared;

/// How often shards are looked at; a wrong park lasts at most twice as long.
const INTERVAL: Duration = Duration::from_millis(2);

/// Watches until `stop`.
pub fn run(shared: &Arc<Shared>, stop: &AtomicBool) {
    let mut last: Vec<u64> = shared.completions.iter().map(|c| c.progress()).collect();
    while !stop.load(Acquire) {
        std::thread::sleep(INTERVAL);
        for (completions, last) in shared.completions.iter().zip(&mut last) {
            let progress = completions.progress();
            if progress == *last && !completions.is_empty() {
                completions.wake();
                shared.metrics.watchdog_kicks.fetch_add(1, Relaxed);
            }
            *last = progress;
        }
    }
}
