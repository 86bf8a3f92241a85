//! Events over real sockets: what they change, what a restart and a `kill -9` leave of them.

mod common;

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::time::Duration;

use common::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tastemaker::api::{Call, Change, Event, Kind, RankCall, Receipt, RecommendCall, SearchBy, SearchCall, Value};
use tastemaker::config::Config;
use tastemaker::server::{Options, Server};
use tastemaker::wire::client::{Client, ClientError};
use tastemaker::wire::request::Request;

fn logged(dir: &Path) -> Config {
    let mut config = config();
    config.events.log_dir = dir.join("log");
    config
}

fn slate(client: &mut Client, user: &str, n: u32) -> Vec<String> {
    let slate = client.recommend(&RecommendCall::new(user, n)).unwrap();
    slate.items.into_iter().map(|item| item.item_id).collect()
}

/// Waits until folding in is ready: it is made beside the start.
fn folded(server: &Server) {
    eventually("folding in", || server.shared().generation.ready_fold_in().is_some());
}

#[test]
fn events_change_the_next_answer() {
    let server = start(config(), Options::default());
    folded(&server);
    let mut client = client(&server);
    // A user of the bundle: what is clicked goes, though the slate before is in the cache.
    let before = slate(&mut client, "user-1", 10);
    assert_eq!(slate(&mut client, "user-1", 10), before);
    let receipt = client.put_events(&[Event::new("user-1", &before[0], "click")], false).unwrap();
    assert_eq!(receipt, Receipt { accepted: 1, ..Receipt::default() });
    assert!(!slate(&mut client, "user-1", 10).contains(&before[0]));
    let search = SearchCall::new(SearchBy::User("user-1"), 600);
    assert!(client.search(&search).unwrap()[0].iter().all(|(id, _)| *id != before[0]));

    // A user whom nobody knew gets what a known one with the same history would: by all sources.
    let unknown = slate(&mut client, "new", 10);
    let generation = generation();
    let history: Vec<String> = generation.histories.of(5).map(|i| generation.items.ids.id(i.row).to_owned()).collect();
    let events: Vec<Event<'_>> = history.iter().map(|item| Event::new("new", item, "like")).collect();
    client.put_events(&events, false).unwrap();
    let answer = client.recommend(&RecommendCall { explain: true, ..RecommendCall::new("new", 20) }).unwrap();
    let sources = answer.items.iter().fold(0, |all, item| all | item.sources);
    assert_eq!(sources & 3, 3, "nearest neighbours and collaborative take part");
    assert!(!answer.known_user);
    let items: Vec<String> = answer.items.into_iter().map(|item| item.item_id).collect();
    assert_ne!(items[..10], unknown[..]);
    assert!(items.iter().all(|item| !history.contains(item)));
    let near = SearchCall::new(SearchBy::User("new"), 20);
    assert!(client.search(&near).unwrap()[0].iter().all(|(id, _)| !history.contains(id)));
    client.put_events(&[Event::new("cold", "item-9", "dislike")], false).unwrap();
    let ClientError::Server { name, .. } = client.search(&SearchCall::new(SearchBy::User("cold"), 5)).unwrap_err()
    else {
        panic!()
    };
    assert_eq!(name, "not_found");
    // More alike to the known user's slate than the unknown's was.
    let known = slate(&mut client, "user-5", 20);
    let common = |items: &[String]| items.iter().filter(|item| known.contains(item)).count();
    assert!(common(&items) > common(&unknown) && common(&items) >= 10, "{} of 20", common(&items));

    assert_eq!(metric(&server, "tastemaker_live_users"), 3.0);
    assert_eq!(metric(&server, "tastemaker_events_total"), 2.0 + history.len() as f64);
    server.shut_down().unwrap();
}

#[test]
fn rankings_of_such_users_are_the_same_in_company() {
    let mut config = config();
    config.server.cpus = vec![tastemaker::server::signals::allowed_cpus()[0]];
    let server = start(config, Options::default());
    folded(&server);
    let mut client = client(&server);
    let call = |user| RankCall {
        user_id: user,
        context: &[],
        item_ids: &["item-1", "item-2", "item-3"],
        // One whose calls share batches.
        ranker: Some("trees"),
        deadline: None,
    };
    let rank = |client: &mut Client| client.call(&Request::Call(Call::Rank(call("walker")))).unwrap();
    let cold = rank(&mut client);
    let events = ["item-10", "item-20", "item-30"].map(|item| Event::new("walker", item, "like"));
    client.put_events(&events, false).unwrap();
    let alone = rank(&mut client);
    assert_ne!(alone, cold);
    let batches = || metric(&server, "tastemaker_batch_size_count{kind=\"rank\"}");
    eventually("jobs were put together", || {
        let before = batches();
        (0..40).for_each(|_| assert!(client.send(&Request::Call(Call::Rank(call("walker")))).is_ok()));
        (0..40).for_each(|_| assert_eq!(client.receive().unwrap().1, alone));
        batches() - before < 40.0
    });
    server.shut_down().unwrap();
}

#[test]
fn what_is_cached_is_what_would_be_computed() {
    let server = start(config(), Options::default());
    folded(&server);
    let mut client = client(&server);
    let mut random = StdRng::seed_from_u64(11);
    let users: Vec<String> = (0..6).map(|n| format!("user-{n}")).chain(["new-1".into(), "new-2".into()]).collect();
    let (mut seen, mut gone, mut hits) = (HashMap::<String, HashSet<String>>::new(), HashSet::new(), 0);
    for step in 0..500 {
        let user = &users[random.random_range(0..users.len())];
        if random.random_ratio(1, 4) {
            // Of a kind that does not trend: what others like may reach a cached slate within its time, and so it may not here.
            let item = format!("item-{}", random.random_range(0..600));
            client.put_events(&[Event::new(user, &item, "dislike")], false).unwrap();
            seen.entry(user.clone()).or_default().insert(item);
        }
        if random.random_ratio(1, 20) {
            let vector: Vec<f32> = (0..16).map(|_| random.random_range(-1.0..1.0)).collect();
            client.change(Kind::UpsertUsers, &[Change { vector: Some(&vector), ..Change::of(user) }], false).unwrap();
        }
        if random.random_ratio(1, 60) {
            let (item, price) = (format!("item-{}", random.random_range(0..600)), random.random_range(1.0..90.0));
            let columns = [("price", Value::Number(price))];
            client.change(Kind::UpsertItems, &[Change { columns: &columns, ..Change::of(&item) }], false).unwrap();
            // It is there again.
            gone.remove(&item);
        }
        // In the end items go: of slates that do not show them the cached ones stay, whatever would be computed now.
        if step >= 400 && random.random_ratio(1, 3) {
            let call = RecommendCall::new(user, 10);
            let item = client.recommend(&call).unwrap().items[random.random_range(0..10)].item_id.clone();
            client.delete_items(&[&item], false).unwrap();
            gone.insert(item);
        }
        let call = RecommendCall::new(user, 10);
        let cached = client.recommend(&call).unwrap();
        let computed = client.recommend(&RecommendCall { no_cache: true, ..call }).unwrap();
        assert_eq!(computed.cache, "bypass");
        if gone.is_empty() || cached.cache == "miss" {
            assert_eq!(cached.items, computed.items);
        }
        assert!(cached.items.iter().all(|item| !gone.contains(&item.item_id)));
        hits += usize::from(cached.cache == "l1");
        let seen = seen.get(user);
        assert!(cached.items.iter().all(|item| seen.is_none_or(|seen| !seen.contains(&item.item_id))));
    }
    assert!(hits > 100, "{hits} hits");
    server.shut_down().unwrap();
}

#[test]
fn many_events_make_an_item_trend() {
    let server = start(config(), Options::default());
    let mut client = client(&server);
    let before = slate(&mut client, "nobody", 10);
    let unpopular = slate(&mut client, "nobody", 500).pop().unwrap();
    assert!(!before.contains(&unpopular));
    let users: Vec<String> = (0..500).map(|n| format!("crowd-{n}")).collect();
    let events: Vec<Event<'_>> = users.iter().map(|user| Event::new(user, &unpopular, "purchase")).collect();
    for _ in 0..4 {
        client.put_events(&events, false).unwrap();
    }
    eventually("an item trends", || {
        let call = RecommendCall { no_cache: true, ..RecommendCall::new("nobody", 10) };
        client.recommend(&call).unwrap().items.iter().any(|item| item.item_id == unpopular)
    });
    server.shut_down().unwrap();
}

#[test]
fn both_protocols_say_the_same() {
    let work = tempfile::tempdir().unwrap();
    let server = start(logged(work.path()), Options::default());
    let mut client = client(&server);
    let with_id = Event { event_id: "e-1", ..Event::new("u", "item-1", "view") };
    let receipt = client.put_events(&[with_id, Event::new("u", "no-such-item", "view")], true).unwrap();
    assert_eq!(receipt, Receipt { accepted: 2, unknown: 1, durable: true, ..Receipt::default() });
    let body = r#"{"events":[{"event_id":"e-1","user_id":"u","item_id":"item-1","kind":"view"},
        {"user_id":"u","item_id":"item-2","kind":"rating","value":4.5,"context":{"page":1}}],"durable":true}"#;
    let response = http(server.addrs.http, "POST", "/v1/events", body);
    assert_eq!(response.status, 200, "{}", response.body);
    let answer: serde_json::Value = serde_json::from_str(&response.body).unwrap();
    assert_eq!(answer, serde_json::json!({"accepted": 2, "duplicates": 1, "unknown_items": 0, "durable": true}));

    let refused = |body: &str| {
        let response = http(server.addrs.http, "POST", "/v1/events", body);
        (response.status, response.body)
    };
    for (body, says) in [
        ("{}", "missing field `events`"),
        (r#"{"events":[]}"#, "0 events, expected 1 to 1000"),
        (r#"{"events":[{"user_id":"u","item_id":"","kind":"view"}]}"#, "events[0].item_id is empty"),
        (r#"{"events":[{"user_id":"u","item_id":"i","kind":"view","when":3}]}"#, "unknown field `when`"),
        (r#"{"events":[{"user_id":"u","item_id":"i","kind":"view","time_ms":-3}]}"#, "events[0].time_ms"),
    ] {
        let (status, text) = refused(body);
        assert!(status == 400 && text.contains(says), "{body}: {status} {text}");
    }
    let one = r#"{"user_id":"u","item_id":"i","kind":"view"}"#;
    let many = format!(r#"{{"events":[{}]}}"#, vec![one; 1001].join(","));
    assert_eq!(refused(&many).0, 413);
    // Nothing of a call that is refused takes effect.
    let half =
        r#"{"events":[{"user_id":"v","item_id":"item-3","kind":"view"},{"user_id":"","item_id":"i","kind":"view"}]}"#;
    assert_eq!(refused(half).0, 400);
    assert_eq!(server.shared().live.version_of("v"), 0);
    server.shut_down().unwrap();
}

#[test]
fn without_a_log_nothing_is_durable() {
    let server = start(config(), Options::default());
    let error = client(&server).put_events(&[Event::new("u", "item-1", "view")], true).unwrap_err();
    let ClientError::Server { name, retryable, .. } = error else { panic!("{error}") };
    assert_eq!((name.as_str(), retryable), ("bad_request", false));
    server.shut_down().unwrap();
}

#[test]
fn a_restart_knows_what_happened_before() {
    let work = tempfile::tempdir().unwrap();
    let server = start(logged(work.path()), Options::default());
    folded(&server);
    let mut first = client(&server);
    for at in 0..30 {
        let item = format!("item-{}", at * 7);
        let id = format!("e{at}");
        let one = Event { event_id: &id, value: 5.0, ..Event::new("walker", &item, "rating") };
        first.put_events(&[one], at % 3 == 0).unwrap();
    }
    let before = slate(&mut first, "walker", 20);
    let entries = |server: &Server| server.shared().live.read("walker", |user| user.entries().to_vec()).unwrap();
    let known = entries(&server);
    server.shut_down().unwrap();

    let server = start(logged(work.path()), Options::default());
    folded(&server);
    assert_eq!(entries(&server), known);
    assert_eq!(slate(&mut client(&server), "walker", 20), before);
    let again = Event { event_id: "e3", ..Event::new("walker", "item-21", "rating") };
    assert_eq!(client(&server).put_events(&[again], true).unwrap().duplicates, 1);
    server.shut_down().unwrap();
}

#[test]
fn a_log_that_cannot_be_written_refuses_events_and_serves_on() {
    let work = tempfile::tempdir().unwrap();
    let mut config = logged(work.path());
    config.events.segment_bytes = 64 << 10;
    let server = start(config, Options::default());
    let mut client = client(&server);
    let items: Vec<String> = (0..500).map(|n| format!("item-{n}")).collect();
    let events: Vec<Event<'_>> = items.iter().map(|item| Event::new("u", item, "view")).collect();
    client.put_events(&events, true).unwrap();
    // The segment is full soon; the next one has no place to go to.
    let log = work.path().join("log");
    std::fs::rename(&log, work.path().join("away")).unwrap();
    std::fs::write(&log, "").unwrap();
    let mut refused = None;
    for _ in 0..10 {
        match client.put_events(&events, true) {
            Ok(_) => {}
            Err(ClientError::Server { name, retryable, .. }) => refused = Some((name, retryable)),
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(refused, Some(("unavailable".to_owned(), true)));
    assert_eq!(slate(&mut client, "u", 10).len(), 10);
    assert!(metric(&server, "tastemaker_event_calls_refused_total") > 0.0);
    std::fs::remove_file(&log).unwrap();
    std::fs::rename(work.path().join("away"), &log).unwrap();
    client.put_events(&events, true).unwrap();
    server.shut_down().unwrap();
}

#[test]
fn draining_answers_the_events_that_it_took() {
    let work = tempfile::tempdir().unwrap();
    let server = start(logged(work.path()), Options::default());
    let addr = server.addrs.binary;
    let client = std::thread::spawn(move || {
        let mut client = Client::connect(addr, PATIENCE).unwrap();
        let mut taken = 0;
        loop {
            let id = format!("d{taken}");
            match client.put_events(&[Event { event_id: &id, ..Event::new("d", "item-1", "view") }], true) {
                Ok(receipt) => taken += receipt.accepted,
                Err(ClientError::Server { name, .. }) if name == "unavailable" => return taken,
                Err(ClientError::Io(_)) => return taken,
                Err(other) => panic!("{other}"),
            }
        }
    });
    std::thread::sleep(Duration::from_millis(300));
    server.shut_down().unwrap();
    let taken = client.join().unwrap();
    let mut found = 0;
    let limits = tastemaker::state::log::Limits { segment_bytes: 1 << 20, max_bytes: 1 << 30, max_age: None };
    tastemaker::state::log::EventLog::open(&work.path().join("log"), limits, |_| found += 1).unwrap();
    assert!(taken > 0 && found >= taken, "{found} records, {taken} answered");
}

/// The ids of all events in Parquet files below `dir`.
fn carried(dir: &Path) -> Vec<String> {
    use arrow_array::cast::AsArray;
    let mut found = Vec::new();
    for day in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).filter(|path| path.is_dir()) {
        for hour in std::fs::read_dir(day).unwrap().map(|e| e.unwrap().path()) {
            for file in std::fs::read_dir(hour).unwrap().map(|e| e.unwrap().path()) {
                let file = std::fs::File::open(file).unwrap();
                let reader = parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(file).unwrap();
                for batch in reader.build().unwrap() {
                    let batch = batch.unwrap();
                    let ids = batch.column_by_name("event_id").unwrap().as_string::<i32>();
                    found.extend(ids.iter().map(|id| id.unwrap().to_owned()));
                }
            }
        }
    }
    found.sort();
    found
}

#[test]
fn events_are_carried_to_parquet_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = logged(dir.path());
    config.events.parquet.dir = dir.path().join("parquet");
    config.events.parquet.max_rows = 7;
    config.events.segment_bytes = 64 << 10;
    let mut ids: Vec<String> = (0..3000).map(|n| format!("e{n:04}")).collect();
    for round in ids.chunks(1000) {
        let server = start(config.clone(), Options::default());
        let mut client = client(&server);
        for some in round.chunks(50) {
            let events: Vec<_> =
                some.iter().map(|id| Event { event_id: id, ..Event::new("u", "item-1", "view") }).collect();
            client.put_events(&events, false).unwrap();
        }
        // Even those that nobody asked to be durable: they follow them to the disk.
        eventually("events are on the disk and read", || {
            metric(&server, "tastemaker_event_sink_events_total{sink=\"parquet\"}") >= 1000.0
        });
        assert_eq!(metric(&server, "tastemaker_event_sink_lost_total{sink=\"parquet\"}"), 0.0);
        server.shut_down().unwrap();
    }
    assert_eq!(carried(&config.events.parquet.dir.join("events")), ids);
    // A log that began anew is not carried over the files of the old one, and serving goes on.
    std::fs::remove_dir_all(&config.events.log_dir).unwrap();
    let server = start(config.clone(), Options::default());
    client(&server).put_events(&[Event { event_id: "late", ..Event::new("u", "item-1", "view") }], true).unwrap();
    eventually("the sink refuses", || metric(&server, "tastemaker_event_sink_failures_total{sink=\"parquet\"}") >= 1.0);
    server.shut_down().unwrap();
    assert_eq!(carried(&config.events.parquet.dir.join("events")), ids);
    // Files elsewhere begin with it.
    config.events.parquet.dir = dir.path().join("elsewhere");
    start(config.clone(), Options::default()).shut_down().unwrap();
    ids = carried(&config.events.parquet.dir.join("events"));
    assert_eq!(ids, ["late"]);
}

#[test]
fn sinks_need_a_log() {
    let mut config = config();
    config.events.parquet.dir = "somewhere".into();
    let error = config.events.validate().unwrap_err();
    assert!(error.contains("events.parquet.dir needs events.log_dir"), "{error}");
}

#[test]
fn what_was_shown_is_logged_and_carried() {
    use arrow_array::cast::AsArray;
    use arrow_array::types::{Float32Type, UInt32Type};
    let dir = tempfile::tempdir().unwrap();
    let mut config = logged(dir.path());
    config.events.parquet.dir = dir.path().join("parquet");
    config.events.exposure_rate = 1.0;
    let server = start(config.clone(), Options::default());
    let mut client = client(&server);
    let mut shown: HashMap<String, Vec<(String, f32)>> = HashMap::new();
    let context = [("device", "tv"), ("device", "phone")];
    for user in ["user-1", "user-2", "nobody"] {
        // Computed, and from the cache.
        for _ in 0..2 {
            let call = RecommendCall { context: &context, ..RecommendCall::new(user, 5) };
            let answer = client.recommend(&call).unwrap();
            let items = answer.items.into_iter().map(|item| (item.item_id, item.score)).collect();
            shown.insert(user.to_owned(), items);
        }
    }
    let _ = client.recommend(&RecommendCall::new("", 5)).unwrap_err();
    eventually("exposures are logged", || metric(&server, "tastemaker_exposures_total") >= 6.0);
    assert_eq!(metric(&server, "tastemaker_exposures_dropped_total"), 0.0);
    server.shut_down().unwrap();
    let mut rows = HashMap::new();
    let mut folders = vec![config.events.parquet.dir.join("exposures")];
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let file = std::fs::File::open(path).unwrap();
            let reader = parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(file).unwrap();
            for batch in reader.build().unwrap() {
                let batch = batch.unwrap();
                let column = |name: &str| batch.column_by_name(name).unwrap();
                for at in 0..batch.num_rows() {
                    let user = column("user_id").as_string::<i32>().value(at).to_owned();
                    let rank = column("rank").as_primitive::<UInt32Type>().value(at);
                    let item = column("item_id").as_string::<i32>().value(at).to_owned();
                    let score = column("score").as_primitive::<Float32Type>().value(at);
                    assert_eq!(shown[&user][rank as usize - 1], (item, score));
                    assert_eq!(column("context").as_map().value(at).column(1).as_string::<i32>().value(0), "phone");
                    *rows.entry((user, rank)).or_insert(0) += 1;
                }
            }
        }
    }
    assert_eq!(rows.len(), 15);
    assert!(rows.values().all(|n| *n == 2));
    // A restart reads them over.
    start(config, Options::default()).shut_down().unwrap();
}
