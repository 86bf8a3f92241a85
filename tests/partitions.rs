//! A server over an index in partitions: divided while it serves, and with partitions that fail or hang.

mod common;
#[path = "../src/index/partitions/scripted.rs"]
mod scripted;

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use common::{client, config, connect, eventually, http, metric, read_response};
use serde_json::Value;
use tastemaker::api::{Call, RecommendCall, SearchBy, SearchCall};
use tastemaker::candidates::Scored;
use tastemaker::catalog::bundle;
use tastemaker::catalog::generation::{Generation, Matrix, Metric};
use tastemaker::config::Config;
use tastemaker::index::partitions::place;
use tastemaker::index::{
    BruteForce, Exact, Filter, IndexKind, Kernel, Partitioned, SearchParams, SearchScratch, VectorIndex,
};
use tastemaker::server::{Options, Server};
use tastemaker::wire::client::Answer;
use tastemaker::wire::request::Request;

use scripted::Scripted;

const TOKEN: &str = "0123456789abcdef";

/// Of this test alone: its index will be exchanged.
fn own_generation() -> Arc<Generation> {
    Arc::new(bundle::open(common::bundle_path()).unwrap())
}

fn with_token() -> Config {
    let mut config = config();
    config.server.admin_token = TOKEN.into();
    config
}

/// An admin call with the token.
fn admin(server: &Server, path: &str, body: &str) -> (u16, Value) {
    let mut stream = connect(server.addrs.admin);
    let length = body.len();
    let request = format!(
        "POST {path} HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {TOKEN}\r\ncontent-length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).unwrap();
    let response = read_response(&mut stream).unwrap();
    (response.status, response.json())
}

fn index_state(server: &Server) -> Value {
    http(server.addrs.admin, "GET", "/index", "").json()
}

#[test]
fn dividing_the_index_while_it_serves_changes_no_answer() {
    let generation = own_generation();
    let items = generation.item_embeddings.clone().unwrap();
    let server = Server::start(generation, with_token(), Options::default()).unwrap();
    let queries: Vec<Vec<f32>> = (0..8)
        .map(|at| {
            let mut query = Vec::new();
            items.extend_row(at * 70, &mut query);
            query
        })
        .collect();
    let ask = |client: &mut tastemaker::wire::client::Client, query: &[f32]| {
        let answer = client.call(&Request::Call(Call::Search(SearchCall::new(SearchBy::Vector(query), 100)))).unwrap();
        let Answer::Scored(items) = answer else { panic!("{answer:?}") };
        items.into_iter().map(|(id, score, _)| (id, score.to_bits())).collect::<Vec<_>>()
    };
    let want: Vec<_> = queries.iter().map(|query| ask(&mut client(&server), query)).collect();
    assert!(want.iter().all(|found| found.len() == 100));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let searching: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let (mut client, mut n) = (client(&server), 0);
                    while !done.load(SeqCst) {
                        for (query, want) in queries.iter().zip(&want) {
                            assert_eq!(ask(&mut client, query), *want);
                        }
                        n += 1;
                    }
                    n
                })
            })
            .collect();
        for partitions in [4, 7, 1, 2] {
            let (status, state) = admin(&server, "/index/rebalance", &format!("{{\"partitions\": {partitions}}}"));
            assert_eq!(status, 202, "{state}");
            eventually("rebalanced", || {
                let state = index_state(&server);
                assert_ne!(state["rebalance"]["state"], "failed", "{state}");
                state["rebalance"]["state"] == "done" && state["rebalance"]["partitions"] == partitions
            });
            let state = index_state(&server);
            let pieces = state["partitions"].as_array().unwrap();
            // An index of one piece has none.
            let n_items: u64 = pieces.iter().map(|piece| piece["n_items"].as_u64().unwrap()).sum();
            assert_eq!((pieces.len(), n_items), if partitions == 1 { (0, 0) } else { (partitions, 600) }, "{state}");
            assert_eq!(metric(&server, "tastemaker_partitions"), pieces.len() as f64);
        }
        done.store(true, SeqCst);
        for searching in searching {
            assert!(searching.join().unwrap() > 0);
        }
    });
    assert_eq!(queries.iter().map(|query| ask(&mut client(&server), query)).collect::<Vec<_>>(), want);
    server.shut_down().unwrap();
}

#[test]
fn dividing_the_index_needs_the_token_and_a_number() {
    let server = Server::start(own_generation(), with_token(), Options::default()).unwrap();
    assert_eq!(http(server.addrs.admin, "POST", "/index/rebalance", "{\"partitions\": 2}").status, 401);
    assert_eq!(http(server.addrs.admin, "GET", "/index/rebalance", "").status, 405);
    assert_eq!(http(server.addrs.admin, "POST", "/index", "").status, 405);
    assert_eq!(http(server.addrs.admin, "GET", "/index/else", "").status, 404);
    for (body, reason) in [
        ("", "`partitions` is missing"),
        ("{}", "`partitions` is missing"),
        ("{\"partitions\": \"4\"}", "not a number"),
        ("{\"partitions\": 0}", "expected 1 to 256"),
        ("{\"partitions\": 257}", "expected 1 to 256"),
        ("{\"partition\": 2}", "unknown field `partition`"),
        ("[]", "not an object"),
    ] {
        let (status, answer) = admin(&server, "/index/rebalance", body);
        assert_eq!(status, 400, "{body}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(reason), "{body}: {answer}");
    }
    assert_eq!(index_state(&server)["rebalance"]["state"], "none");
    server.shut_down().unwrap();
}

/// A generation in four partitions, of which the second is scripted; and the share of the items that are in the others.
fn with_scripted() -> (Arc<Generation>, Arc<Scripted>, f64) {
    let generation = own_generation();
    let (items, n) = (generation.item_embeddings.clone().unwrap(), generation.items.len() as u32);
    let places = place((0..n).map(|row| generation.items.ids.id(row)), 4).unwrap();
    let covered = 1.0 - places[1].len() as f64 / f64::from(n);
    let (index, scripted) = scripted::scripted(&items, generation.metric, places);
    generation.exchange_index(Arc::new(index));
    (generation, scripted, covered)
}

fn with_searchers(n: u32) -> Config {
    let mut config = config();
    config.server.searchers = Some(n);
    config
}

fn post(server: &Server, path: &str, body: &str) -> Value {
    let response = http(server.addrs.http, "POST", path, body);
    assert_eq!(response.status, 200, "{}", response.body);
    response.json()
}

const SEARCH: &str = r#"{"item_id": "item-3", "k": 50, "deadline_ms": 8000}"#;
const RECOMMEND: &str = r#"{"user_id": "user-5", "n_items": 10, "deadline_ms": 8000}"#;

/// What `degraded` says of the search for nearest neighbours.
fn degraded(answer: &Value) -> Vec<&str> {
    let all = answer["degraded"].as_array().unwrap().iter();
    all.filter(|entry| entry["stage"] == "ann").map(|entry| entry["reason"].as_str().unwrap()).collect()
}

#[test]
fn a_partition_that_fails_leaves_a_partial_answer_that_says_so() {
    for n_searchers in [0, 2] {
        let (generation, scripted, covered) = with_scripted();
        let mut config = with_searchers(n_searchers);
        config.cache.negative_ttl_ms = 0;
        let server = Server::start(generation, config, Options::default()).unwrap();
        let whole = post(&server, "/v1/search", SEARCH);
        assert_eq!((whole.get("coverage"), degraded(&whole).len()), (None, 0));
        scripted.panics.store(true, SeqCst);
        for (path, body) in [("/v1/search", SEARCH), ("/v1/recommend", RECOMMEND), ("/v1/recommend", RECOMMEND)] {
            let answer = post(&server, path, body);
            assert!((answer["coverage"].as_f64().unwrap() - covered).abs() < 1e-6, "{answer}");
            assert_eq!(degraded(&answer), ["failed"]);
            assert!(!answer["items"].as_array().unwrap().is_empty());
            if path == "/v1/recommend" {
                assert_eq!(answer["cache"], "miss", "what is degraded is not kept");
            }
        }
        let call = RecommendCall { no_cache: true, ..RecommendCall::new("user-5", 10) };
        let slate = client(&server).recommend(&call).unwrap();
        assert!((f64::from(slate.coverage) - covered).abs() < 1e-6);
        assert_eq!(slate.degraded, [("ann".to_owned(), "failed".to_owned())]);
        assert_eq!(metric(&server, "tastemaker_partitions_down"), 1.0);
        assert!(metric(&server, "tastemaker_partition_troubles_total{reason=\"failed\"}") >= 1.0);
        assert!(metric(&server, "tastemaker_degraded_total{stage=\"ann\",reason=\"failed\"}") >= 4.0);
        let pieces = index_state(&server)["partitions"].clone();
        assert_eq!((&pieces[0]["up"], &pieces[1]["up"]), (&Value::Bool(true), &Value::Bool(false)));
        scripted.panics.store(false, SeqCst);
        eventually("whole again", || post(&server, "/v1/search", SEARCH) == whole);
        let answer = post(&server, "/v1/recommend", RECOMMEND);
        assert_eq!(
            (answer.get("coverage"), degraded(&answer).len(), &answer["cache"]),
            (None, 0, &Value::from("miss"))
        );
        assert_eq!(post(&server, "/v1/recommend", RECOMMEND)["cache"], "l1");
        server.shut_down().unwrap();
    }
}

#[test]
fn a_partition_that_hangs_is_left_out_in_time() {
    let (generation, scripted, covered) = with_scripted();
    let mut config = with_searchers(2);
    config.pipeline.partition_budget_ms = 1000;
    let server = Server::start(generation, config, Options::default()).unwrap();
    let whole = post(&server, "/v1/search", SEARCH);
    scripted.open(false);
    for (path, body) in [("/v1/search", SEARCH), ("/v1/recommend", RECOMMEND)] {
        let began = Instant::now();
        let answer = post(&server, path, body);
        assert!(began.elapsed() < Duration::from_secs(8));
        assert!((answer["coverage"].as_f64().unwrap() - covered).abs() < 1e-6, "{answer}");
        assert_eq!(degraded(&answer), ["deadline"]);
        assert!(!answer["items"].as_array().unwrap().is_empty());
    }
    assert!(metric(&server, "tastemaker_partition_troubles_total{reason=\"deadline\"}") >= 1.0);
    scripted.open(true);
    eventually("whole again", || post(&server, "/v1/search", SEARCH) == whole);
    server.shut_down().unwrap();
}
