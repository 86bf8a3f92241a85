//! A small catalogue, a server on free ports, and clients that misbehave.
#![allow(dead_code)] // Every test binary uses its part.

pub mod redis_server;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tastemaker::api::{Call, RecommendCall};
use tastemaker::catalog::build::{self, BuildOptions, Silent};
use tastemaker::catalog::bundle;
use tastemaker::catalog::generation::Generation;
use tastemaker::catalog::synthetic::{self, SyntheticOptions};
use tastemaker::config::Config;
use tastemaker::device::sim::Script;
use tastemaker::server::{DeviceKind, Options, Server};
use tastemaker::wire::client::Client;
use tastemaker::wire::request::Request;

/// How long anything in a test may take before it counts as stuck.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Of the second ranker of [`bundle_path`], a tree ensemble.
pub const TREES_MANIFEST: &str = r#"
[[inputs]]
name = "x"
columns = ["cross.dot", "item.popularity", "candidate.ann.rank", "user.history_length", "context.hour", "context.shelf"]
[output]
name = "variable"
"#;

/// A bundle of 600 items and 80 users with the demo's ranker and a tree ensemble, made once per test binary.
pub fn bundle_path() -> &'static Path {
    static BUNDLE: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    &BUNDLE.get_or_init(|| build_bundle(&BuildOptions::default())).1
}

/// The same, made with other options, in a folder that is gone when it is dropped.
pub fn build_bundle(options: &BuildOptions) -> (tempfile::TempDir, PathBuf) {
    let work = tempfile::tempdir().unwrap();
    let (data, out) = (work.path().join("data"), work.path().join("bundle"));
    synthetic::generate(&data, &SyntheticOptions { n_items: 600, n_users: 80, dim: 16, seed: 3 }).unwrap();
    std::fs::create_dir_all(data.join("rankers")).unwrap();
    for file in ["demo.onnx", "demo.toml"] {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("engines").join(file);
        std::fs::copy(from, data.join("rankers").join(file)).unwrap();
    }
    let trees = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/trees/ranker.onnx");
    std::fs::copy(trees, data.join("rankers/trees.onnx")).unwrap();
    std::fs::write(data.join("rankers/trees.toml"), TREES_MANIFEST).unwrap();
    build::build(&data, &out, options, &Silent).unwrap();
    (work, out)
}

/// That bundle, opened once.
pub fn generation() -> Arc<Generation> {
    static GENERATION: OnceLock<Arc<Generation>> = OnceLock::new();
    GENERATION.get_or_init(|| Arc::new(bundle::open(bundle_path()).unwrap())).clone()
}

/// The default configuration on free ports of the loopback interface.
pub fn config() -> Config {
    let mut config = Config::default();
    for addr in [&mut config.server.listen, &mut config.server.http, &mut config.server.admin] {
        addr.set_port(0);
    }
    config
}

/// A server over [`generation`].
pub fn start(config: Config, options: Options) -> Server {
    Server::start(generation(), config, options).unwrap()
}

/// A server whose device only pretends.
pub fn start_sim(config: Config, script: Script) -> Server {
    start(config, Options { device: DeviceKind::Sim(script), ..Options::default() })
}

/// A client that gives up after [`PATIENCE`].
pub fn client(server: &Server) -> Client {
    Client::connect(server.addrs.binary, PATIENCE).unwrap()
}

/// A recommendation as a request.
pub fn recommend<'a>(user: &'a str, n_items: u32) -> Request<'a> {
    Request::Call(Call::Recommend(RecommendCall::new(user, n_items)))
}

/// A frame with a recommendation, as bytes.
pub fn frame(id: u64, call: &RecommendCall<'_>) -> Vec<u8> {
    let mut builder = flatbuffers::FlatBufferBuilder::new();
    let message = tastemaker::wire::request::encode(&mut builder, id, &Request::Call(Call::Recommend(*call)));
    let mut out = Vec::new();
    tastemaker::wire::frame::append(&mut out, message);
    out
}

/// A plain connection that gives up after [`PATIENCE`].
pub fn connect(addr: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(addr).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Reads one frame.
pub fn read_frame(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix)?;
    let mut frame = vec![0; u32::from_le_bytes(prefix) as usize];
    stream.read_exact(&mut frame)?;
    Ok(frame)
}

/// An HTTP response.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Response {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }
}

/// Reads one HTTP response.
pub fn read_response(stream: &mut TcpStream) -> std::io::Result<Response> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let length = head
        .to_lowercase()
        .split("content-length: ")
        .nth(1)
        .map_or(0, |rest| rest.split("\r\n").next().unwrap().parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Ok(Response { status, head, body: String::from_utf8(body).unwrap() })
}

/// An HTTP request as bytes.
pub fn http_request(method: &str, path: &str, body: &str) -> Vec<u8> {
    format!("{method} {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// One HTTP request on a connection of its own.
pub fn http(addr: SocketAddr, method: &str, path: &str, body: &str) -> Response {
    let mut stream = connect(addr);
    stream.write_all(&http_request(method, path, body)).unwrap();
    read_response(&mut stream).unwrap()
}

/// The value of the metric with exactly these labels.
pub fn metric(server: &Server, name_and_labels: &str) -> f64 {
    let text = http(server.addrs.admin, "GET", "/metrics", "").body;
    let line = text.lines().find(|l| l.strip_prefix(name_and_labels).is_some_and(|rest| rest.starts_with(' ')));
    let line = line.unwrap_or_else(|| panic!("no {name_and_labels} in\n{text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// Waits until `holds`, or panics after [`PATIENCE`].
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = std::time::Instant::now() + PATIENCE;
    while !holds() {
        assert!(std::time::Instant::now() < until, "never: {what}");
        std::thread::yield_now();
    }
}
