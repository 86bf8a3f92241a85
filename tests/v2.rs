//! The Open Inference Protocol v2 over real sockets.

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use common::*;
use serde_json::{Value, json};
use tastemaker::device::sim::Script;
use tastemaker::ranking::{Ranker, tree_model};
use tastemaker::server::{Options, Server};

const TOKEN: &str = "0123456789abcdef";

/// Status, head and body of a request with any headers and any body.
fn ask(addr: SocketAddr, method: &str, path: &str, headers: &str, body: &[u8]) -> (u16, String, Vec<u8>) {
    let mut stream = connect(addr);
    let head = format!("{method} {path} HTTP/1.1\r\nhost: t\r\n{headers}content-length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).unwrap();
    // The server may answer and close before it has read it all.
    let _ = stream.write_all(body);
    receive(&mut stream)
}

fn receive(stream: &mut TcpStream) -> (u16, String, Vec<u8>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap().to_lowercase();
    let mut body = vec![0; header(&head, "content-length").unwrap().parse().unwrap()];
    stream.read_exact(&mut body).unwrap();
    (head[9..12].parse().unwrap(), head, body)
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

fn get(server: &Server, path: &str) -> (u16, Value) {
    let (status, _, body) = ask(server.addrs.http, "GET", path, "", b"");
    (status, if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap() })
}

fn infer(server: &Server, model: &str, body: &Value) -> (u16, Value) {
    let path = format!("/v2/models/{model}/infer");
    let (status, _, body) = ask(server.addrs.http, "POST", &path, "", body.to_string().as_bytes());
    (status, serde_json::from_slice(&body).unwrap())
}

/// Rows for the tree ensemble and what it scores them, without a server.
fn rows_and_scores(n: usize) -> (Vec<f32>, Vec<f32>) {
    let rows: Vec<f32> = (0..n * 6).map(|at| ((at * 7919) % 4001) as f32 / 1000.0 - 2.0).collect();
    let onnx = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/trees/ranker.onnx");
    let manifest = toml::from_str(TREES_MANIFEST).unwrap();
    let mut ranker = tree_model::load("trees", &onnx, &manifest, &[6]).unwrap().unwrap();
    let mut scores = Vec::new();
    ranker.score(std::slice::from_ref(&rows), n, &mut scores).unwrap();
    (rows, scores)
}

fn body(rows: &[f32]) -> Value {
    json!({ "inputs": [{ "name": "x", "datatype": "FP32", "shape": [rows.len() / 6, 6], "data": rows }] })
}

#[test]
fn models_describe_themselves() {
    let server = start(config(), Options::default());
    let version = generation().version.clone();
    for path in ["/v2/health/live", "/v2/health/ready", "/v2/models/trees/ready", "/v2/models/demo/ready"] {
        assert_eq!(get(&server, path).0, 200, "{path}");
    }
    assert_eq!(get(&server, &format!("/v2/models/trees/versions/{version}/ready")).0, 200);
    let (status, about) = get(&server, "/v2");
    assert_eq!((status, about["name"].as_str()), (200, Some("tastemaker")));
    assert!(about["extensions"].as_array().unwrap().contains(&json!("binary_tensor_data")));
    let (_, metadata) = get(&server, "/v2/models/trees");
    assert_eq!(metadata["versions"], json!([version]));
    assert_eq!(metadata["inputs"], json!([{ "name": "x", "datatype": "FP32", "shape": [-1, 6] }]));
    assert_eq!(metadata["outputs"], json!([{ "name": "variable", "datatype": "FP32", "shape": [-1, 1] }]));
    let (_, config) = get(&server, "/v2/models/demo/config");
    assert_eq!(config["input"], json!([{ "name": "features", "data_type": "TYPE_FP32", "dims": [13] }]));
    let computed = &config["parameters"]["computed"]["string_value"];
    assert!(computed.as_str().unwrap().starts_with("dense, "), "{config}");
    assert_eq!(metadata["properties"]["computed"], "trees, f32");
    for path in
        ["/v2/models/nobody", "/v2/models/nobody/ready", "/v2/models/trees/versions/x", "/v2/nothing", "/v2/models"]
    {
        let (status, error) = get(&server, path);
        assert_eq!(status, 404, "{path}");
        assert!(error["error"].is_string(), "{path}: {error}");
    }
    server.shut_down().unwrap();
}

#[test]
fn inference_by_json_and_binary_gives_what_the_ranker_gives() {
    let server = start(config(), Options::default());
    for n in [1, 3, 64, 200] {
        let (rows, want) = rows_and_scores(n);
        let mut question = body(&rows);
        question["id"] = json!("q-1");
        let (status, answer) = infer(&server, "trees", &question);
        assert_eq!(status, 200, "{answer}");
        assert_eq!((answer["id"].as_str(), answer["model_name"].as_str()), (Some("q-1"), Some("trees")));
        let output = &answer["outputs"][0];
        assert_eq!((&output["name"], &output["shape"]), (&json!("variable"), &json!([n, 1])));
        let got: Vec<f32> = output["data"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
        assert_eq!(got, want);

        let text = json!({
            "inputs": [{ "name": "x", "datatype": "FP32", "shape": [n, 6], "parameters": { "binary_data_size": n * 24 } }],
            "outputs": [{ "name": "variable", "parameters": { "binary_data": true } }],
        })
        .to_string();
        let mut bytes = text.clone().into_bytes();
        bytes.extend(rows.iter().flat_map(|v| v.to_le_bytes()));
        let headers = format!("Inference-Header-Content-Length: {}\r\n", text.len());
        let (status, head, bytes) = ask(server.addrs.http, "POST", "/v2/models/trees/infer", &headers, &bytes);
        assert_eq!(status, 200);
        let end: usize = header(&head, "inference-header-content-length").unwrap().parse().unwrap();
        let answer: Value = serde_json::from_slice(&bytes[..end]).unwrap();
        assert_eq!(answer["outputs"][0]["parameters"]["binary_data_size"], json!(4 * n));
        let got: Vec<f32> = bytes[end..].as_chunks().0.iter().map(|&v| f32::from_le_bytes(v)).collect();
        assert_eq!(got, want);
    }
    let (_, stats) = get(&server, "/v2/models/trees/stats");
    let stats = &stats["model_stats"][0];
    assert_eq!((stats["inference_count"].as_u64(), stats["execution_count"].as_u64()), (Some(2 * 268), Some(8)));
    assert!(stats["inference_stats"]["compute_infer"]["ns"].as_u64().unwrap() > 0, "{stats}");
    assert_eq!(get(&server, "/v2/models/stats").1["model_stats"].as_array().unwrap().len(), 2);
    assert_eq!(metric(&server, "recommendation_requests_total{endpoint=\"infer\",status=\"ok\"}"), 8.0);
    server.shut_down().unwrap();
}

#[test]
fn a_tree_ensemble_ranks_in_the_pipeline() {
    let mut config = config();
    config.pipeline.rankers.insert("trees".into(), 1.0);
    let server = start(config, Options::default());
    let slate = client(&server).recommend(&tastemaker::api::RecommendCall::new("user-7", 10)).unwrap();
    assert_eq!(slate.items.len(), 10);
    assert!(slate.degraded.is_empty(), "{:?}", slate.degraded);
    assert_eq!(metric(&server, "model_inference_latency_seconds_count{model_name=\"trees\"}"), 1.0);
    assert_eq!(metric(&server, "model_inference_latency_seconds_count{model_name=\"demo\"}"), 0.0);
    server.shut_down().unwrap();
}

#[test]
fn what_is_malformed_is_answered_400_with_a_message() {
    let server = start(config(), Options::default());
    let path = "/v2/models/trees/infer";
    let good = body(&[0.0; 12]).to_string();
    let cases = [
        ("", String::new(), 400, "EOF"),
        ("", "{".into(), 400, "EOF"),
        ("", "null".into(), 400, "invalid type"),
        ("", "[".repeat(100_000), 400, ""),
        ("", good.replace("FP32", "INT8"), 400, "datatype is INT8, expected FP32"),
        ("", good.replace("[2,6]", "[2,7]"), 400, "shape is [2, 7]"),
        ("", good.replace("[2,6]", "[4000000000,6]"), 400, "shape is [4000000000, 6]"),
        ("", good.replace("\"x\"", "\"y\""), 400, "input `y`: the model has x"),
        ("Inference-Header-Content-Length: 99999\r\n", good.clone(), 400, "is 99999, but the body has"),
        ("Inference-Header-Content-Length: -1\r\n", good.clone(), 400, "is not a number"),
        ("Content-Encoding: gzip\r\n", good.clone(), 400, "gzip"),
        ("", " ".repeat(2 << 20), 413, "larger"),
    ];
    for (headers, body, status, says) in cases {
        let (got, _, answer) = ask(server.addrs.http, "POST", path, headers, body.as_bytes());
        let answer: Value = serde_json::from_slice(&answer).unwrap();
        let message = answer["error"].as_str().unwrap();
        assert_eq!(got, status, "{message}");
        assert!(message.contains(says), "{message} does not say {says}");
    }
    assert_eq!(ask(server.addrs.http, "GET", path, "", b"").0, 405);
    assert_eq!(ask(server.addrs.http, "POST", "/v2/models/trees", "", b"").0, 405);
    assert_eq!(ask(server.addrs.http, "POST", "/v2/models/nobody/infer", "", good.as_bytes()).0, 404);
    assert_eq!(infer(&server, "trees", &serde_json::from_str(&good).unwrap()).0, 200, "and goes on");
    let refused = "recommendation_requests_total{endpoint=\"infer\",status=\"bad_request\"}";
    assert_eq!(metric(&server, refused), 11.0);
    server.shut_down().unwrap();
}

#[test]
fn a_late_inference_and_one_too_many_are_told_so() {
    let mut config = config();
    config.server.cpus = vec![0];
    config.server.max_in_flight = 2;
    let server = start_sim(config, Script { latency: Duration::from_millis(300), ..Script::default() });
    let mut question = body(&[0.0; 6]);
    question["parameters"] = json!({ "timeout": 20_000 });
    assert_eq!(infer(&server, "trees", &question).0, 408);
    eventually("the late job is back", || metric(&server, "tastemaker_in_flight") == 0.0);
    let text = body(&[0.0; 6]).to_string();
    let mut busy: Vec<TcpStream> = (0..2).map(|_| connect(server.addrs.http)).collect();
    busy.iter_mut().for_each(|s| s.write_all(&http_request("POST", "/v2/models/trees/infer", &text)).unwrap());
    eventually("both are in flight", || metric(&server, "tastemaker_in_flight") == 2.0);
    let (status, answer) = infer(&server, "trees", &body(&[0.0; 6]));
    assert_eq!(status, 429, "{answer}");
    for stream in &mut busy {
        assert_eq!(receive(stream).0, 200);
    }
    server.shut_down().unwrap();
}

#[test]
fn what_is_computed_together_is_what_is_computed_alone() {
    use tastemaker::api::{Call, RankCall};
    use tastemaker::wire::client::Answer;
    use tastemaker::wire::request::Request;

    let mut config = config();
    config.server.cpus = vec![0];
    let server = start(config, Options::default());
    let mut client = client(&server);
    let generation = generation();
    let items: Vec<&str> = (0..20).map(|row| generation.items.ids.id(row * 7)).collect();
    let users: Vec<String> = (0..60).map(|user| format!("user-{user}")).collect();
    let call = |at: usize| {
        let ranker = Some(["trees", "demo"][at / 30]);
        let item_ids = if at % 9 == 8 { &["no such item"][..] } else { &items[at % 5..5 + at % 14] };
        Request::Call(Call::Rank(RankCall { user_id: &users[at], context: &[], item_ids, ranker, deadline: None }))
    };
    let alone: Vec<Answer> = (0..60).map(|at| client.call(&call(at)).unwrap()).collect();
    assert!(alone.iter().all(|answer| matches!(answer, Answer::Scored(_))));
    let batches = || metric(&server, "tastemaker_batch_size_count{kind=\"rank\"}");
    let before = batches();
    assert_eq!(before, 60.0);
    // One worker: while it computes the first, the others wait, and are taken along.
    let together = |client: &mut tastemaker::wire::client::Client| {
        let sent: Vec<u64> = (0..60).map(|at| client.send(&call(at)).unwrap()).collect();
        let mut got: std::collections::HashMap<u64, Answer> = sent.iter().map(|_| client.receive().unwrap()).collect();
        sent.iter().map(|id| got.remove(id).unwrap()).collect::<Vec<_>>()
    };
    eventually("jobs were put together", || {
        let before = batches();
        for (alone, got) in alone.iter().zip(together(&mut client)) {
            let (Answer::Scored(alone), Answer::Scored(got)) = (alone, &got) else { panic!("{got:?}") };
            let bits =
                |items: &[(String, f32, bool)]| items.iter().map(|i| (i.0.clone(), i.1.to_bits())).collect::<Vec<_>>();
            assert_eq!(bits(alone), bits(got));
        }
        batches() - before < 60.0
    });
    server.shut_down().unwrap();
}

#[test]
fn the_repository_needs_the_token() {
    let mut config = config();
    config.server.admin_token = TOKEN.into();
    let server = start(config, Options::default());
    let admin = |path: &str, headers: &str, body: &str| {
        let (status, _, body) = ask(server.addrs.admin, "POST", path, headers, body.as_bytes());
        (status, serde_json::from_slice::<Value>(&body).unwrap_or_default())
    };
    let states = |body: &str| -> Vec<String> {
        let (status, index) = admin("/v2/repository/index", "", body);
        assert_eq!(status, 200);
        index.as_array().unwrap().iter().map(|m| format!("{} {}", m["name"], m["state"]).replace('"', "")).collect()
    };
    assert_eq!(states(""), ["demo READY", "trees READY"]);
    let (load, unload) = ("/v2/repository/models/trees/load", "/v2/repository/models/trees/unload");
    for headers in
        ["", "Authorization: Bearer 0123456789abcdeF\r\n", "Authorization: Bearer \r\n", "Authorization: x\r\n"]
    {
        let (status, answer) = admin(unload, headers, "");
        assert_eq!(status, 401, "{headers}");
        assert!(answer["error"].as_str().unwrap().contains("admin_token"));
    }
    let token = format!("Authorization: Bearer {TOKEN}\r\n");
    assert_eq!(admin(unload, &token, r#"{"parameters":{"unload_dependents":false}}"#).0, 200);
    assert_eq!(states(""), ["demo READY", "trees UNAVAILABLE"]);
    assert_eq!(states(r#"{"ready":true}"#), ["demo READY"]);
    assert_eq!(get(&server, "/v2/models/trees/ready").0, 503);
    let (status, answer) = infer(&server, "trees", &body(&[0.0; 6]));
    assert_eq!((status, answer["error"].as_str()), (503, Some("model `trees` is unloaded")));
    assert_eq!(admin(load, &token, r#"{"parameters":{"config":"{}"}}"#).0, 400);
    assert_eq!(admin(load, &token, "").0, 200);
    assert_eq!(infer(&server, "trees", &body(&[0.0; 6])).0, 200);
    assert_eq!(admin("/v2/repository/models/nobody/load", &token, "").0, 404);
    assert_eq!(admin("/v2/repository/index", "", "[]").0, 400);
    assert_eq!(ask(server.addrs.admin, "GET", "/v2/repository/index", "", b"").0, 405);
    assert_eq!(ask(server.addrs.http, "POST", unload, &token, b"").0, 405, "only on the admin port");
    server.shut_down().unwrap();

    let server = start(common::config(), Options::default());
    let (status, _, answer) = ask(server.addrs.admin, "POST", unload, "Authorization: Bearer \r\n", b"");
    assert_eq!(status, 401, "without a token nothing may change state: {}", String::from_utf8_lossy(&answer));
    server.shut_down().unwrap();
}

/// The stock client of the protocol; `.ci/run` says by `TRITON_PYTHON` where a Python with it is.
#[test]
fn tritonclient_works() {
    let Some(python) = std::env::var_os("TRITON_PYTHON") else {
        // Not by `println!`, which the test harness keeps to itself.
        let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("SKIPPED: TRITON_PYTHON is not set\n"));
        return;
    };
    let mut config = config();
    config.server.admin_token = TOKEN.into();
    let server = start(config, Options::default());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/triton/check.py");
    let (http, admin) = (server.addrs.http.to_string(), server.addrs.admin.to_string());
    let ran = std::process::Command::new(python).arg(script).args([&http, &admin, TOKEN]).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(ran.status.success() && out.contains("ok"), "{out}{err}");
    server.shut_down().unwrap();
}
