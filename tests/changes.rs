//! Items and users that come, change and go, over real sockets.

mod common;

use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

use common::*;
use parking_lot::RwLock;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tastemaker::api::{Call, Change, Kind, RankCall, Receipt, RecommendCall, SearchBy, SearchCall};
use tastemaker::config::Config;
use tastemaker::index::{Filter, SearchParams, SearchScratch};
use tastemaker::server::{Options, Server};
use tastemaker::wire::client::{Answer, Client, ClientError};
use tastemaker::wire::request::Request;

fn logged(dir: &Path) -> Config {
    let mut config = config();
    config.events.log_dir = dir.join("log");
    config
}

fn ids(answer: Answer) -> Vec<String> {
    match answer {
        Answer::Slate(slate) => slate.items.into_iter().map(|item| item.item_id).collect(),
        Answer::Scored(items) => items.into_iter().filter(|(.., known)| *known).map(|(id, ..)| id).collect(),
        Answer::Results(results) => results.into_iter().flatten().map(|(id, ..)| id).collect(),
        other => panic!("{other:?}"),
    }
}

fn slate(client: &mut Client, call: RecommendCall<'_>) -> Vec<String> {
    ids(client.call(&Request::Call(Call::Recommend(call))).unwrap())
}

/// A config whose pins, caps and short times let items come out of every corner.
fn with_pins() -> Config {
    let mut config = config();
    let rules = "[[rules]]\naction = 'pin'\nitems = ['item-1', 'item-2', 'item-3']\nrank = 2";
    #[derive(serde::Deserialize)]
    struct Rules {
        rules: Vec<tastemaker::rerank::RuleConfig>,
    }
    config.rerank.rules = toml::from_str::<Rules>(rules).unwrap().rules;
    (config.cache.ttl_seconds, config.cache.stale_seconds) = (1, 60);
    config
}

/// One call of any kind that may name items.
fn any_call(client: &mut Client, random: &mut StdRng) -> Vec<String> {
    let (user, item) =
        (format!("user-{}", random.random_range(0..20)), format!("item-{}", random.random_range(0..600)));
    let vector: Vec<f32> = (0..48).map(|_| random.random_range(-1.0..1.0)).collect();
    let recommend = RecommendCall::new(&user, 10);
    let search = |by| Call::Search(SearchCall::new(by, 40));
    let items: Vec<String> = (0..50).map(|at| format!("item-{at}")).collect();
    let items: Vec<&str> = items.iter().map(String::as_str).collect();
    let call = match random.random_range(0..10) {
        0..4 => Call::Recommend(recommend),
        4 => Call::Recommend(RecommendCall { no_cache: true, query: Some("the"), ..recommend }),
        // All that there is: also what nobody proposes.
        5 => Call::Recommend(RecommendCall { n_items: 500, explain: true, ..recommend }),
        6 => search(SearchBy::Vectors { values: &vector, n: 3 }),
        7 => search(SearchBy::User(&user)),
        8 => match random.random_bool(0.5) {
            true => search(SearchBy::Text("the")),
            false => search(SearchBy::Item(&item)),
        },
        _ => Call::Rank(RankCall { user_id: &user, context: &[], item_ids: &items, ranker: None, deadline: None }),
    };
    match client.call(&Request::Call(call)).unwrap() {
        // The item to start from is gone, or the server has more to do than it can.
        Answer::Error { name, .. } if ["not_found", "overloaded", "deadline_exceeded"].contains(&name.as_str()) => {
            vec![]
        }
        answer => ids(answer),
    }
}

#[test]
fn what_is_deleted_never_comes_out_of_anything() {
    let server = start(with_pins(), Options::default());
    let (gone, over, calls) = (RwLock::new(HashSet::<String>::new()), AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (server, gone, over, calls) = (&server, &gone, &over, &calls);
            scope.spawn(move || {
                let (mut client, mut random) = (client(server), StdRng::seed_from_u64(seed));
                while !over.load(Relaxed) {
                    let before = gone.read().clone();
                    for id in any_call(&mut client, &mut random) {
                        if before.contains(&id) {
                            over.store(true, Relaxed);
                            panic!("{id} was deleted before the call");
                        }
                    }
                    calls.fetch_add(1, Relaxed);
                }
            });
        }
        let (mut client, mut random) = (client(&server), StdRng::seed_from_u64(99));
        for round in 0..40 {
            // What is shown goes first; then what has taken its place, and so on.
            let mut ids = slate(&mut client, RecommendCall::new(&format!("user-{}", round % 20), 3));
            ids.push(format!("item-{}", random.random_range(0..600)));
            ids.dedup();
            let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
            let receipt = client.delete_items(&ids, false).unwrap();
            assert_eq!((receipt.accepted as usize, receipt.unknown), (ids.len(), 0));
            gone.write().extend(ids.iter().map(|id| (*id).to_owned()));
            let until = calls.load(Relaxed) + 20;
            eventually("calls go on", || over.load(Relaxed) || calls.load(Relaxed) >= until);
        }
        over.store(true, Relaxed);
    });
    let mut client = client(&server);
    let gone = gone.into_inner();
    let left: HashSet<String> = slate(&mut client, RecommendCall::new("nobody", 500)).into_iter().collect();
    assert!(left.is_disjoint(&gone) && left.len() == 500.min(600 - gone.len()), "{} items", left.len());
    assert_eq!(metric(&server, "tastemaker_items_gone") as usize, gone.len());
    server.shut_down().unwrap();
}

#[test]
fn a_cached_slate_without_the_item_stays() {
    let server = start(config(), Options::default());
    let mut client = client(&server);
    let call = RecommendCall::new("user-1", 10);
    let first = client.recommend(&call).unwrap();
    let shown: HashSet<&str> = first.items.iter().map(|item| item.item_id.as_str()).collect();
    let other = (0..600).map(|at| format!("item-{at}")).find(|id| !shown.contains(id.as_str())).unwrap();
    client.delete_items(&[&other], false).unwrap();
    let again = client.recommend(&call).unwrap();
    assert_eq!((again.cache.as_str(), &again.items), ("l1", &first.items));
    client.delete_items(&[&first.items[3].item_id], false).unwrap();
    let fresh = client.recommend(&call).unwrap();
    assert_eq!(fresh.cache, "miss");
    assert_eq!(fresh.items.len(), 10);
    assert!(fresh.items.iter().all(|item| item.item_id != first.items[3].item_id));
    assert_eq!(client.recommend(&call).unwrap().cache, "l1");
    server.shut_down().unwrap();
}

#[test]
fn a_deleted_item_is_an_unknown_item() {
    let server = start(config(), Options::default());
    let mut client = client(&server);
    client.delete_items(&["item-7"], false).unwrap();
    let rank =
        RankCall { user_id: "user-1", context: &[], item_ids: &["item-7", "item-8"], ranker: None, deadline: None };
    let Answer::Scored(items) = client.call(&Request::Call(Call::Rank(rank))).unwrap() else { panic!() };
    assert_eq!((items[0].2, items[1].2), (false, true));
    let ClientError::Server { name, .. } = client.search(&SearchCall::new(SearchBy::Item("item-7"), 5)).unwrap_err()
    else {
        panic!()
    };
    assert_eq!(name, "not_found");
    server.shut_down().unwrap();
}

#[test]
fn both_protocols_delete() {
    let work = tempfile::tempdir().unwrap();
    let server = start(logged(work.path()), Options::default());
    let mut client = client(&server);
    let receipt = client.delete_items(&["item-1", "nope"], true).unwrap();
    assert_eq!(receipt, Receipt { accepted: 2, unknown: 1, durable: true, ..Receipt::default() });
    let call = |method: &str, path: &str, body: &str| {
        let response = http(server.addrs.http, method, path, body);
        (response.status, response.body)
    };
    let (status, body) = call("POST", "/v1/items/delete", r#"{"item_ids":["item-2","item-3"]}"#);
    assert_eq!((status, body.as_str()), (200, r#"{"accepted":2,"created":0,"durable":false,"unknown":0}"#));
    let (status, body) = call("DELETE", "/v1/items/item%2D4?durable=true", "");
    assert_eq!((status, body.as_str()), (200, r#"{"accepted":1,"created":0,"durable":true,"unknown":0}"#));
    assert_eq!(metric(&server, "tastemaker_items_gone"), 4.0);
    for (method, path, body, status, says) in [
        ("GET", "/v1/items", "", 405, "only POST or PUT"),
        ("POST", "/v1/items/item-1", "", 405, "only DELETE"),
        ("DELETE", "/v1/items/%ff", "", 400, "percent-encoded"),
        ("DELETE", "/v1/items/item-1?force=1", "", 400, "durable=true"),
        ("POST", "/v1/items/delete", r#"{"item_ids":[]}"#, 400, "0 items, expected 1 to 1000"),
        ("POST", "/v1/items/delete", r#"{"item_ids":["a",""]}"#, 400, "items[1]: the id is empty"),
        ("POST", "/v1/items/delete", r#"{"ids":[]}"#, 400, "unknown field `ids`"),
    ] {
        let got = call(method, path, body);
        assert!(got.0 == status && got.1.contains(says), "{method} {path} {body}: {got:?}");
    }
    server.shut_down().unwrap();
}

#[test]
fn a_restart_knows_what_was_deleted() {
    let work = tempfile::tempdir().unwrap();
    let server = start(logged(work.path()), Options::default());
    let first = slate(&mut client(&server), RecommendCall::new("user-1", 5));
    client(&server).delete_items(&first.iter().map(String::as_str).collect::<Vec<_>>(), true).unwrap();
    let second = slate(&mut client(&server), RecommendCall::new("user-1", 5));
    server.shut_down().unwrap();
    let server = start(logged(work.path()), Options::default());
    assert_eq!(slate(&mut client(&server), RecommendCall::new("user-1", 5)), second);
    assert!(first.iter().all(|id| !second.contains(id)));
    server.shut_down().unwrap();
}

#[test]
fn an_upserted_user_is_served_by_what_was_said() {
    let server = start(config(), Options::default());
    let mut client = client(&server);
    let generation = generation();
    let matrix = generation.user_embeddings.as_ref().unwrap();
    let vector = |row: u32| {
        let mut vector = Vec::new();
        matrix.extend_row(row, &mut vector);
        vector
    };
    let near = |client: &mut Client, user: &str| {
        let call = SearchCall::new(SearchBy::User(user), 20);
        client.search(&call).map(|found| found[0].iter().map(|(id, _)| id.clone()).collect::<Vec<_>>())
    };
    let cold = slate(&mut client, RecommendCall::new("new", 10));
    assert!(near(&mut client, "new").is_err());
    // A new user with the vector of a known one, and that one with another's.
    let user = |id, vector| Change { vector: Some(vector), ..Change::of(id) };
    let (five, nine) = (vector(5), vector(9));
    let receipt = client.change(Kind::UpsertUsers, &[user("new", &five), user("user-5", &nine)], false).unwrap();
    assert_eq!(receipt, Receipt { accepted: 2, created: 1, ..Receipt::default() });
    let warm = client.recommend(&RecommendCall::new("new", 10)).unwrap();
    assert!(warm.known_user && warm.cache == "miss");
    assert_ne!(warm.items.iter().map(|item| item.item_id.clone()).collect::<Vec<_>>(), cold);
    let by = |vector: &[f32]| {
        let mut found = Vec::new();
        let index = generation.index().unwrap();
        index.search(vector, 20, Filter::ALL, &SearchParams::default(), &mut SearchScratch::default(), &mut found);
        found.iter().map(|found| generation.items.ids.id(found.row).to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(near(&mut client, "new").unwrap(), by(&five));
    let found = near(&mut client, "user-5").unwrap();
    let seen: HashSet<&str> = generation.histories.of(5).map(|entry| generation.items.ids.id(entry.row)).collect();
    let want: Vec<String> = by(&nine).into_iter().filter(|id| !seen.contains(id.as_str())).collect();
    assert_eq!(found[..want.len()], want[..]);
    // Forgotten, both are nobody.
    let gone = [Change::of("new"), Change::of("user-5"), Change::of("who")];
    let receipt = client.change(Kind::DeleteUsers, &gone, false).unwrap();
    assert_eq!(receipt, Receipt { accepted: 3, unknown: 1, ..Receipt::default() });
    for user in ["new", "user-5"] {
        let answer = client.recommend(&RecommendCall::new(user, 10)).unwrap();
        assert!(!answer.known_user);
        assert_eq!(answer.items.into_iter().map(|item| item.item_id).collect::<Vec<_>>(), cold, "{user}");
    }
    server.shut_down().unwrap();
}

#[test]
fn what_does_not_fit_is_refused_as_a_whole() {
    let mut config = config();
    config.state.live_users_max = 3;
    let server = start(config, Options::default());
    let mut client = client(&server);
    let refused = |body: &str| {
        let response = http(server.addrs.http, "PUT", "/v1/users", body);
        (response.status, response.body)
    };
    let half =
        r#"{"users":[{"user_id":"a","embedding":[0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0]},{"user_id":"b","embedding":[1]}]}"#;
    let (status, text) = refused(half);
    assert!(status == 400 && text.contains("users[1].embedding: has 1 values, the catalogue's have 16"), "{text}");
    let (status, text) = refused(r#"{"users":[{"user_id":"a","columns":{"agee":1}}]}"#);
    assert!(status == 400 && text.contains("users[0].columns.agee: the bundle has no such column"), "{text}");
    assert_eq!(server.shared().live.n_profiles(), 0);
    let users = ["a", "b", "c"].map(Change::of);
    client.change(Kind::UpsertUsers, &users, false).unwrap();
    client.change(Kind::UpsertUsers, &users[..1], false).unwrap();
    let ClientError::Server { name, retryable, message, .. } =
        client.change(Kind::UpsertUsers, &[Change::of("d")], false).unwrap_err()
    else {
        panic!()
    };
    assert_eq!((name.as_str(), retryable), ("unavailable", true));
    assert!(message.contains("state.live_users_max is 3"), "{message}");
    server.shut_down().unwrap();
}

#[test]
fn users_survive_a_restart() {
    let work = tempfile::tempdir().unwrap();
    let server = start(logged(work.path()), Options::default());
    let vector = [0.25; 16];
    let change = Change { vector: Some(&vector), ..Change::of("new") };
    assert!(client(&server).change(Kind::UpsertUsers, &[change], true).unwrap().durable);
    client(&server).change(Kind::DeleteUsers, &[Change::of("user-3")], true).unwrap();
    let versions = |server: &Server| ["new", "user-3"].map(|id| server.shared().live.version_of(id));
    let before = versions(&server);
    server.shut_down().unwrap();
    let server = start(logged(work.path()), Options::default());
    assert!(before.iter().all(|version| *version != 0) && versions(&server) == before);
    server.shut_down().unwrap();
}
