//! glommio 0.9 can park an executor whose tasks could run (`server::watchdog`). That it still does on this machine, so that
//! we notice when upstream has mended it; that kicks end such parks; and that the server, whose executors keep the preempt
//! timer out of the way, does not stall.

mod common;

use std::io::Write as _;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use common::*;
use glommio::{LocalExecutorBuilder, Placement};
use tastemaker::api::{Call, RecommendCall};
use tastemaker::device::sim::Script;
use tastemaker::server::{DeviceKind, Options, shard};
use tastemaker::wire::client::Client;
use tastemaker::wire::request::Request;

/// Each test wants the machine for itself.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(|e| e.into_inner())
}

/// Whether a task that yields for `duration`, on an executor with that preempt timer, came to its end. With `kicked`, eight reads of an eventfd stand
/// on its main ring, and somebody outside writes to it when the task has not moved for 2 ms.
fn yield_for(duration: Duration, preempt_timer: Duration, kicked: bool) -> bool {
    let (turns, done) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    // SAFETY: a plain system call; the descriptor that it returns belongs to nobody else.
    let mut event = unsafe { std::fs::File::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_SEMAPHORE)) };
    let fd = event.as_raw_fd();
    let executor = LocalExecutorBuilder::new(Placement::Unbound).preempt_timer(preempt_timer).spawn({
        let (turns, done) = (turns.clone(), done.clone());
        move || async move {
            for _ in 0..if kicked { 8 } else { 0 } {
                // SAFETY: a duplicate that belongs to this file alone.
                let file = unsafe { glommio::io::BufferedFile::from_raw_fd(libc::dup(fd)) };
                glommio::spawn_local(async move { while file.read_at(0, 8).await.is_ok() {} }).detach();
            }
            let start = Instant::now();
            while start.elapsed() < duration {
                glommio::executor().yield_task_queue_now().await;
                turns.fetch_add(1, Relaxed);
            }
            done.store(1, Relaxed);
        }
    });
    // Its thread ends with the process: a hung executor can't be joined.
    drop(executor.unwrap());
    let until = Instant::now() + duration + Duration::from_secs(1);
    let mut last = 0;
    while done.load(Relaxed) == 0 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(2));
        let now = turns.load(Relaxed);
        if now == last && kicked {
            event.write_all(&1u64.to_ne_bytes()).unwrap();
        }
        last = now;
    }
    done.load(Relaxed) == 1
}

#[test]
fn glommio_still_parks_executors_that_have_work() {
    let _alone = alone();
    let hung = (0..5).any(|_| !yield_for(Duration::from_secs(3), Duration::from_micros(20), false));
    assert!(
        hung,
        "five runs without a hang: if glommio has mended its park, `server::watchdog` and PREEMPT_TIMER can go"
    );
}

#[test]
fn kicks_end_wrong_parks() {
    let _alone = alone();
    for micros in [200, 2000] {
        assert!(yield_for(Duration::from_secs(3), Duration::from_micros(micros), true), "{micros} µs");
    }
}

#[test]
fn with_the_timer_out_of_the_way_there_is_no_wrong_park() {
    let _alone = alone();
    assert!(yield_for(Duration::from_secs(5), shard::PREEMPT_TIMER, false));
}

/// Closed loops of several depths for `duration`; the number of calls, and the longest that one took.
fn hammer(addr: std::net::SocketAddr, duration: Duration) -> (u64, Duration) {
    let until = Instant::now() + duration;
    let threads: Vec<_> = [1usize, 1, 8, 64]
        .into_iter()
        .map(|depth| {
            std::thread::spawn(move || {
                let mut client = Client::connect(addr, Duration::from_secs(5)).unwrap();
                let (mut calls, mut longest) = (0, Duration::ZERO);
                let call = RecommendCall { no_cache: true, ..RecommendCall::new("u", 3) };
                while Instant::now() < until {
                    let start = Instant::now();
                    (0..depth).for_each(|_| assert!(client.send(&Request::Call(Call::Recommend(call))).is_ok()));
                    (0..depth).for_each(|_| assert!(client.receive().is_ok(), "no answer within 5 s"));
                    longest = longest.max(start.elapsed());
                    calls += depth as u64;
                }
                (calls, longest)
            })
        })
        .collect();
    threads.into_iter().map(|t| t.join().unwrap()).fold((0, Duration::ZERO), |a, b| (a.0 + b.0, a.1.max(b.1)))
}

#[test]
fn the_server_does_not_stall() {
    let _alone = alone();
    for watchdog in [true, false] {
        let mut config = config();
        config.server.cpus = vec![0];
        config.server.max_in_flight = 1024;
        let server = start(config, Options { device: DeviceKind::Sim(Script::default()), watchdog });
        let (calls, longest) = hammer(server.addrs.binary, Duration::from_secs(3));
        println!("watchdog {watchdog}: {calls} calls, longest {longest:?}");
        assert!(calls > 1000);
        // A hang is for good; what the scheduler of a busy machine does to a thread is not.
        assert!(longest < Duration::from_millis(500), "{longest:?}");
        server.shut_down().unwrap();
    }
}

#[test]
fn http_is_served_while_the_binary_port_has_no_pause() {
    let _alone = alone();
    let mut config = config();
    config.server.cpus = vec![0];
    config.server.max_in_flight = 1024;
    let server = start_sim(config, Script::default());
    let addr = server.addrs.binary;
    let load = std::thread::spawn(move || hammer(addr, Duration::from_secs(3)));
    let until = Instant::now() + Duration::from_millis(2500);
    let mut times = Vec::new();
    while Instant::now() < until {
        let start = Instant::now();
        assert_eq!(http(server.addrs.admin, "GET", "/readyz", "").status, 200);
        times.push(start.elapsed());
    }
    times.sort_unstable();
    let median = times[times.len() / 2];
    assert!(median < Duration::from_millis(90), "median of {}: {median:?}", times.len());
    load.join().unwrap();
    server.shut_down().unwrap();
}
