//! A real `redis-server`, and load to see what its faults do.

use std::io::Write as _;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use tastemaker::api::RecommendCall;
use tastemaker::wire::client::Client;

use super::{PATIENCE, eventually};

/// A `redis-server` of its own on a free port of the loopback interface.
pub struct Redis {
    child: Child,
    pub port: u16,
    _dir: tempfile::TempDir,
}

impl Redis {
    /// `None`, said out loud: there is no `redis-server` here.
    pub fn start(more: &[&str]) -> Option<Self> {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Self::start_at(port, more)
    }

    pub fn start_at(port: u16, more: &[&str]) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let spawned = Command::new("redis-server")
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir"])
            .arg(dir.path())
            .args(more)
            .stdout(Stdio::null())
            .spawn();
        let Ok(child) = spawned else {
            assert!(std::env::var_os("TASTEMAKER_REQUIRE_REDIS").is_none(), "redis-server is required and missing");
            // Not by `eprintln!`, which the test harness keeps to itself.
            let _ = writeln!(std::io::stderr(), "SKIPPED: there is no redis-server here");
            return None;
        };
        let redis = Redis { child, port, _dir: dir };
        eventually("redis-server listens", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
        Some(redis)
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub fn connect(&self) -> redis::Connection {
        redis::Client::open(self.url()).unwrap().get_connection_with_timeout(PATIENCE).unwrap()
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: a signal to a child that has not been waited for: the process id is still its own.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks without end, for users that are mostly new; counts, and keeps the slowest answer.
pub fn load(addr: std::net::SocketAddr, first: u64, stop: &AtomicBool, answered: &AtomicU64, slowest_us: &AtomicU64) {
    let mut client = Client::connect(addr, PATIENCE).unwrap();
    let mut n = first;
    while !stop.load(Relaxed) {
        n += 1;
        let user = format!("user-{}", n % 3000);
        let start = Instant::now();
        let slate =
            client.recommend(&RecommendCall { deadline: Some(PATIENCE), ..RecommendCall::new(&user, 10) }).unwrap();
        assert_eq!(slate.items.len(), 10);
        slowest_us.fetch_max(start.elapsed().as_micros() as u64, Relaxed);
        answered.fetch_add(1, Relaxed);
    }
}

/// Ends the load, also when the test fails.
pub struct Stops<'a>(pub &'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}
