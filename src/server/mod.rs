//! Sockets, shards, admission, completions.

pub mod completions;
pub mod service;

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// `[server]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerConfig {
    /// Address of the binary protocol. Default 127.0.0.1:7070.
    pub listen: SocketAddr,
    /// Address of HTTP/JSON. Default 127.0.0.1:8000.
    pub http: SocketAddr,
    /// Address of metrics, health and administration. Default 127.0.0.1:8002.
    pub admin: SocketAddr,
    /// CPUs to run on, one shard and one worker each. Empty: all that the process may use.
    pub cpus: Vec<usize>,
    /// Calls in flight per shard; more are answered `overloaded`. 1 to 65536, default 256.
    pub max_in_flight: u32,
    /// Binary connections per shard. 1 to 1048576, default 4096.
    pub max_connections: u32,
    /// Largest frame and HTTP body, bytes. 1024 to 64 MiB, default 1 MiB.
    pub max_frame_bytes: u32,
    /// Unsent answers of one connection beyond which it is not read, bytes. Default 4 MiB.
    pub max_output_bytes: u32,
    /// Time budget of a call that names none, milliseconds. 1 to 60000, default 1000.
    pub default_deadline_ms: u32,
    /// Largest time budget, milliseconds. 1 to 600000, default 10000.
    pub max_deadline_ms: u32,
    /// A connection that sends nothing for this long is closed, seconds. 1 to 86400, default 600.
    pub idle_timeout_seconds: u32,
    /// On SIGTERM, time to finish what was accepted, milliseconds. 0 to 600000, default 10000.
    pub drain_timeout_ms: u32,
}

impl Default for ServerConfig {
    fn default() -> Self {
        ServerConfig {
            listen: SocketAddr::from(([127, 0, 0, 1], 7070)),
            http: SocketAddr::from(([127, 0, 0, 1], 8000)),
            admin: SocketAddr::from(([127, 0, 0, 1], 8002)),
            cpus: Vec::new(),
            max_in_flight: 256,
            max_connections: 4096,
            max_frame_bytes: 1 << 20,
            max_output_bytes: 4 << 20,
            default_deadline_ms: 1000,
            max_deadline_ms: 10_000,
            idle_timeout_seconds: 600,
            drain_timeout_ms: 10_000,
        }
    }
}

impl ServerConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// The key, its value and its range.
    pub fn validate(&self) -> Result<(), String> {
        let ranges = [
            ("max_in_flight", self.max_in_flight, 1, 65_536),
            ("max_connections", self.max_connections, 1, 1 << 20),
            ("max_frame_bytes", self.max_frame_bytes, 1024, 64 << 20),
            ("max_output_bytes", self.max_output_bytes, 1 << 16, 1 << 30),
            ("max_deadline_ms", self.max_deadline_ms, 1, 600_000),
            ("default_deadline_ms", self.default_deadline_ms, 1, self.max_deadline_ms),
            ("idle_timeout_seconds", self.idle_timeout_seconds, 1, 86_400),
            ("drain_timeout_ms", self.drain_timeout_ms, 0, 600_000),
        ];
        match ranges.iter().find(|(_, value, low, high)| !(low..=high).contains(&value)) {
            Some((key, value, low, high)) => Err(format!("server.{key} is {value}, expected {low} to {high}")),
            None => Ok(()),
        }
    }
}
