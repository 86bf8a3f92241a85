//! Items and users that come, change and go, over real sockets.

mod common;

use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

use common::*;
use parking_lot::RwLock;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tastemaker::api::{
    Call, Change, Event, Kind, RankCall, Receipt, RecommendCall, SearchBy, SearchCall, SearchFilter, Value,
};
use tastemaker::catalog::conditions::Demand;
use tastemaker::catalog::generation::ColumnData;
use tastemaker::config::Config;
use tastemaker::index::{Filter, SearchParams, SearchScratch};
use tastemaker::server::{Options, Server};
use tastemaker::state::change::OwnedValue;
use tastemaker::wire::client::{Answer, Client, ClientError};
use tastemaker::wire::request::Request;

fn logged(dir: &Path) -> Config {
    let mut config = config();
    config.events.log_dir = dir.join("log");
    config
}

/// Waits until folding in is ready: it is made beside the start.
fn folded(server: &Server) {
    eventually("folding in", || server.shared().generation.ready_fold_in().is_some());
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

/// Ends the others, also when a check fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
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
        let _over = Over(&over);
        let (mut client, mut random) = (client(&server), StdRng::seed_from_u64(99));
        for round in 0..40 {
            // What is shown goes first; then what has taken its place, and so on.
            let mut ids = slate(&mut client, RecommendCall::new(&format!("user-{}", round % 20), 3));
            ids.push(format!("item-{}", random.random_range(0..600)));
            ids.dedup();
            let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
            let receipt = client.delete_items(&ids, false).unwrap();
            // The last one may be gone already.
            assert!(receipt.accepted as usize == ids.len() && receipt.unknown <= 1);
            gone.write().extend(ids.iter().map(|id| (*id).to_owned()));
            let until = calls.load(Relaxed) + 12;
            eventually("calls go on", || over.load(Relaxed) || calls.load(Relaxed) >= until);
        }
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

/// The values of an item of the bundle, by column.
fn values(id: &str) -> (Vec<(String, OwnedValue)>, Vec<f32>) {
    let generation = generation();
    let row = generation.items.ids.row(id).unwrap();
    let columns = generation.items.columns.iter().map(|column| {
        let text = |code: &u32| column.data.vocabulary().unwrap().id(*code).into();
        let value = match &column.data {
            ColumnData::Number { values, .. } if values[row as usize].is_nan() => OwnedValue::Missing,
            ColumnData::Number { values, .. } => OwnedValue::Number(f64::from(values[row as usize])),
            ColumnData::Category { .. } => match column.data.codes(row) {
                [] => OwnedValue::Missing,
                codes => OwnedValue::Text(text(&codes[0])),
            },
            ColumnData::Tags { .. } => OwnedValue::List(column.data.codes(row).iter().map(text).collect()),
        };
        (column.name.clone(), value)
    });
    let mut vector = Vec::new();
    generation.item_embeddings.as_ref().unwrap().extend_row(row, &mut vector);
    (columns.collect(), vector)
}

fn upsert(client: &mut Client, id: &str, (columns, vector): &(Vec<(String, OwnedValue)>, Vec<f32>)) -> Receipt {
    let columns: Vec<_> = columns.iter().map(|(name, value)| (name.as_str(), value.value())).collect();
    let change = Change { columns: &columns, vector: Some(vector), ..Change::of(id) };
    client.change(Kind::UpsertItems, &[change], false).unwrap()
}

#[test]
fn a_new_item_is_served_as_one_of_the_bundle() {
    let server = start(config(), Options::default());
    folded(&server);
    let mut client = client(&server);
    let twin = values("item-7");
    let before = client.recommend(&RecommendCall::new("user-1", 10)).unwrap();
    assert_eq!(upsert(&mut client, "fresh", &twin), Receipt { accepted: 1, created: 1, ..Receipt::default() });
    assert_eq!(upsert(&mut client, "fresh", &twin).created, 0);
    assert_eq!(
        client.recommend(&RecommendCall::new("user-1", 10)).unwrap().cache,
        "miss",
        "a new item may be the best"
    );
    // By vector it is where its twin is, with the same score.
    let near = client.search(&SearchCall::new(SearchBy::Vector(&twin.1), 600)).unwrap().remove(0);
    let score = |id: &str| near.iter().find(|(other, _)| other == id).unwrap().1;
    assert_eq!(score("fresh"), score("item-7"));
    assert_eq!(near.len(), 600);
    // From an item to it, and from it to the item.
    let from = |client: &mut Client, id: &str| {
        client.search(&SearchCall::new(SearchBy::Item(id), 2)).unwrap()[0]
            .iter()
            .map(|(id, _)| id.clone())
            .collect::<Vec<_>>()
    };
    assert!(from(&mut client, "item-7").contains(&"fresh".to_owned()));
    assert!(from(&mut client, "fresh").contains(&"item-7".to_owned()));
    // By attributes.
    let category = twin.0.iter().find(|(name, _)| name == "category").unwrap();
    let OwnedValue::Text(category) = &category.1 else { panic!() };
    let conditions = [("category", Demand::Values(&[&**category]))];
    let filtered = |client: &mut Client, conditions: &[(&str, Demand<'_>)]| {
        let filter = SearchFilter { conditions, ..SearchFilter::default() };
        let call = SearchCall { filter, ..SearchCall::new(SearchBy::Vector(&twin.1), 700) };
        client.search(&call).unwrap().remove(0).into_iter().map(|(id, _)| id).collect::<Vec<_>>()
    };
    assert!(filtered(&mut client, &conditions).contains(&"fresh".to_owned()));
    // With a value that nobody had before.
    let other = [("category", Value::Text("brand new"))];
    client.change(Kind::UpsertItems, &[Change { columns: &other, ..Change::of("fresh") }], false).unwrap();
    assert!(!filtered(&mut client, &conditions).contains(&"fresh".to_owned()));
    assert_eq!(filtered(&mut client, &[("category", Demand::Values(&["brand new"]))]), ["fresh"]);
    // By words: of its twin's first, then of its own.
    let words =
        |client: &mut Client, text: &str| client.search(&SearchCall::new(SearchBy::Text(text), 600)).unwrap().remove(0);
    let Some((_, OwnedValue::Text(title))) = twin.0.iter().find(|(name, _)| name == "title") else { panic!() };
    let found = words(&mut client, title);
    let score = |id: &str| found.iter().find(|(other, _)| other == id).map(|found| found.1);
    let (own, other) = (score("fresh").unwrap(), score("item-7").unwrap());
    assert!((own - other).abs() < 1e-5 * other, "{own} {other}");
    let other = [("title", Value::Text("Quixotic Zeppelins"))];
    client.change(Kind::UpsertItems, &[Change { columns: &other, ..Change::of("item-8") }], false).unwrap();
    let found = words(&mut client, "zepelins");
    assert_eq!(found[0].0, "item-8", "{:?}", &found[..3.min(found.len())]);
    let query = RecommendCall { query: Some("quixotic"), ..RecommendCall::new("nobody", 10) };
    assert_eq!(slate(&mut client, query)[0], "item-8");
    // Ranked, as every item is; and in slates, which hold all that there is.
    let rank =
        RankCall { user_id: "user-1", context: &[], item_ids: &["fresh", "item-7"], ranker: None, deadline: None };
    let Answer::Scored(ranked) = client.call(&Request::Call(Call::Rank(rank))).unwrap() else { panic!() };
    assert!(ranked[0].2 && ranked[0].1.is_finite() && ranked[0].1 != 0.0);
    let response = http(server.addrs.http, "POST", "/v1/search", r#"{"item_id":"fresh","k":1}"#);
    assert_eq!(response.json()["items"][0]["item_id"], "item-7", "{}", response.body);
    // What is done with it counts: it is seen, moves the user, and trends.
    client.put_events(&[Event::new("walker", "fresh", "like")], false).unwrap();
    let near: Vec<String> = client.search(&SearchCall::new(SearchBy::User("walker"), 5)).unwrap()[0]
        .iter()
        .map(|(id, _)| id.clone())
        .collect();
    assert!(near.contains(&"item-7".to_owned()) && !near.contains(&"fresh".to_owned()), "{near:?}");
    let crowd: Vec<String> = (0..500).map(|at| format!("crowd-{at}")).collect();
    let events: Vec<Event<'_>> = crowd.iter().map(|user| Event::new(user, "fresh", "purchase")).collect();
    (0..4).for_each(|_| assert_eq!(client.put_events(&events, false).unwrap().accepted, 500));
    eventually("a new item trends", || {
        let call = RecommendCall { no_cache: true, ..RecommendCall::new("nobody", 10) };
        client.recommend(&call).unwrap().items.iter().any(|item| item.item_id == "fresh" && item.sources & 4 > 0)
    });
    // It goes as every item goes, and comes back.
    client.delete_items(&["fresh"], false).unwrap();
    assert!(!slate(&mut client, RecommendCall::new("nobody", 500)).contains(&"fresh".to_owned()));
    assert!(client.search(&SearchCall::new(SearchBy::Item("fresh"), 5)).is_err());
    assert_eq!(client.change(Kind::UpsertItems, &[Change::of("fresh")], false).unwrap().created, 1);
    assert!(from(&mut client, "item-7").contains(&"fresh".to_owned()));
    let after = client.recommend(&RecommendCall::new("user-1", 10)).unwrap();
    assert_eq!(after.items.len(), before.items.len());
    server.shut_down().unwrap();
}

#[test]
fn a_changed_item_is_not_found_by_what_it_was() {
    let mut config = config();
    let rule = "[[rules]]\naction = 'exclude'\nwhere = { category = 'CATEGORY' }";
    #[derive(serde::Deserialize)]
    struct Rules {
        rules: Vec<tastemaker::rerank::RuleConfig>,
    }
    // Excluded is the category that user-1's best item does not have yet.
    let (one, two) = (values("item-1"), values("item-2"));
    let category = |of: &(Vec<(String, OwnedValue)>, Vec<f32>)| match of.0.iter().find(|(name, _)| name == "category") {
        Some((_, OwnedValue::Text(text))) => text.to_string(),
        other => panic!("{other:?}"),
    };
    let all: HashSet<String> = (0..600).map(|at| category(&values(&format!("item-{at}")))).collect();
    let forbidden = all.into_iter().find(|name| *name != category(&one) && *name != category(&two)).unwrap();
    config.rerank.rules = toml::from_str::<Rules>(&rule.replace("CATEGORY", &forbidden)).unwrap().rules;
    let server = start(config, Options::default());
    let mut client = client(&server);
    let best = |client: &mut Client, vector: &[f32]| {
        client.search(&SearchCall::new(SearchBy::Vector(vector), 600)).unwrap().remove(0)
    };
    let score = |found: &[(String, f32)], id: &str| found.iter().find(|(other, _)| other == id).unwrap().1;
    let before = best(&mut client, &one.1);
    client.change(Kind::UpsertItems, &[Change { vector: Some(&two.1), ..Change::of("item-1") }], false).unwrap();
    let after = best(&mut client, &one.1);
    assert_ne!(score(&after, "item-1"), score(&before, "item-1"));
    assert_eq!(score(&after, "item-1"), score(&after, "item-2"));
    assert_eq!(after.len(), 600);
    // A rule acts on what an item is now, in the next slate.
    let shown = slate(&mut client, RecommendCall::new("user-1", 10));
    let columns = [("category", Value::Text(&forbidden))];
    let changes: Vec<Change<'_>> = shown[..2].iter().map(|id| Change { columns: &columns, ..Change::of(id) }).collect();
    client.change(Kind::UpsertItems, &changes, false).unwrap();
    let next = slate(&mut client, RecommendCall::new("user-1", 10));
    assert!(shown[..2].iter().all(|id| !next.contains(id)) && next.len() == 10);
    // Unavailable is gone, and its changes wait for it to come back.
    let unavailable = Change { available: Some(false), ..Change::of(&next[0]) };
    client.change(Kind::UpsertItems, &[unavailable], false).unwrap();
    assert!(!slate(&mut client, RecommendCall::new("user-1", 10)).contains(&next[0]));
    client.change(Kind::UpsertItems, &[Change::of(&next[0])], false).unwrap();
    assert_eq!(slate(&mut client, RecommendCall::new("user-1", 10)), next);
    server.shut_down().unwrap();
}

#[test]
fn upserts_of_items_are_bounded_and_checked() {
    let mut config = config();
    config.state.live_items_max = 2;
    let server = start(config, Options::default());
    let mut client = client(&server);
    let refused = |body: &str| {
        let response = http(server.addrs.http, "POST", "/v1/items", body);
        (response.status, response.body)
    };
    for (body, says) in [
        (
            r#"{"items":[{"item_id":"a","columns":{"categry":"x"}}]}"#,
            "items[0].columns.categry: the bundle has no such column; did you mean `category`?",
        ),
        (
            r#"{"items":[{"item_id":"a"},{"item_id":"b","columns":{"category":3}}]}"#,
            "items[1].columns.category: is a number, but the column holds strings",
        ),
        (r#"{"items":[{"item_id":"a","embedding":[1,2]}]}"#, "items[0].embedding: has 2 values"),
    ] {
        let (status, text) = refused(body);
        let text: serde_json::Value = serde_json::from_str(&text).unwrap();
        let message = text["error"]["message"].as_str().unwrap();
        assert!(status == 400 && message.starts_with(says), "{message}");
    }
    let (status, text) = refused(r#"{"items":[{"item_id":"a"},{"item_id":"b"}]}"#);
    assert_eq!((status, text.as_str()), (200, r#"{"accepted":2,"created":2,"durable":false,"unknown":0}"#));
    assert_eq!(refused(r#"{"items":[{"item_id":"c"}]}"#).0, 503);
    assert_eq!(refused(r#"{"items":[{"item_id":"a","columns":{"category":"new"}}]}"#).0, 200);
    // What is deleted needs no room.
    client.delete_items(&["item-1", "a"], false).unwrap();
    assert_eq!(metric(&server, "tastemaker_live_items"), 2.0);
    assert_eq!(slate(&mut client, RecommendCall::new("nobody", 10)).len(), 10);
    server.shut_down().unwrap();
}

#[test]
fn items_survive_a_restart() {
    let work = tempfile::tempdir().unwrap();
    let server = start(logged(work.path()), Options::default());
    let mut first = client(&server);
    for at in 0..30 {
        upsert(&mut first, &format!("fresh-{at}"), &values(&format!("item-{at}")));
    }
    first.put_events(&[Event::new("walker", "fresh-3", "like")], false).unwrap();
    first.delete_items(&["fresh-5"], true).unwrap();
    let found = |server: &Server| client(server).search(&SearchCall::new(SearchBy::Item("fresh-7"), 50)).unwrap();
    let (before, digest) = (found(&server), server.shared().live.items().unwrap().digest());
    let version = server.shared().live.version_of("walker");
    server.shut_down().unwrap();
    let server = start(logged(work.path()), Options::default());
    assert_eq!(found(&server), before);
    assert_eq!(server.shared().live.items().unwrap().digest(), digest);
    assert_eq!(server.shared().live.version_of("walker"), version);
    server.shut_down().unwrap();
}

#[test]
fn many_items_that_came_are_found_while_their_vectors_are_compacted() {
    let server = start(config(), Options::default());
    let mut client = client(&server);
    let mut random = StdRng::seed_from_u64(5);
    let vectors: Vec<Vec<f32>> = (0..3000).map(|_| (0..16).map(|_| random.random_range(-1.0..1.0)).collect()).collect();
    let names: Vec<String> = (0..3000).map(|at| format!("bulk-{at}")).collect();
    let index = || server.shared().live.items().unwrap().vectors().unwrap().clone();
    let mut held = None;
    for (names, vectors) in names.chunks(1000).zip(vectors.chunks(1000)) {
        let changes: Vec<Change<'_>> = names
            .iter()
            .zip(vectors)
            .map(|(name, vector)| Change { vector: Some(vector), ..Change::of(name) })
            .collect();
        assert_eq!(client.change(Kind::UpsertItems, &changes, false).unwrap().created, 1000);
        held = Some(index());
    }
    let held = held.unwrap();
    let best = |client: &mut Client, at: usize| {
        let found = client.search(&SearchCall::new(SearchBy::Item(&names[at]), 20)).unwrap().remove(0);
        found.into_iter().map(|(id, _)| id).collect::<Vec<_>>()
    };
    let before: Vec<_> = (0..3000).step_by(300).map(|at| best(&mut client, at)).collect();
    // Its bytes tell what it is made of: once it is compacted it has codes, and no side list.
    eventually("vectors are compacted", || !std::sync::Arc::ptr_eq(&held, &index()));
    let after: Vec<_> = (0..3000).step_by(300).map(|at| best(&mut client, at)).collect();
    assert_eq!(after, before);
    assert!(before.iter().flatten().filter(|id| id.starts_with("bulk-")).count() > 100);
    client.delete_items(&[&before[0][0]], false).unwrap();
    assert_eq!(best(&mut client, 0)[..19], before[0][1..]);
    server.shut_down().unwrap();
}
