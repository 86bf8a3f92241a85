//! The second level of the result cache against a real `redis-server`; skipped, visibly, where there is none.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use common::redis_server::*;
use common::*;
use tastemaker::api::{Change, Event, Kind, RecommendCall, Value};
use tastemaker::config::Config;
use tastemaker::link::Breaker;
use tastemaker::server::{Options, Server};
use tastemaker::wire::client::SlateAnswer;

fn with_redis(url: String) -> Config {
    let mut config = config();
    config.cache.redis.url = url;
    // The machine that tests run on stalls for longer than a production budget.
    config.cache.redis.budget_ms = 1000;
    config
}

fn replica(config: Config) -> Server {
    let server = start(config, Options::default());
    eventually("Redis is connected", || breaker(&server) == Breaker::Closed);
    server
}

fn breaker(server: &Server) -> Breaker {
    server.shared().redis.as_ref().unwrap().link.breaker()
}

fn ask(server: &Server, user: &str) -> SlateAnswer {
    client(server).recommend(&RecommendCall::new(user, 10)).unwrap()
}

fn stored(server: &Server, n: f64) {
    eventually("results are stored", || metric(server, "tastemaker_redis_stored_total{use=\"results\"}") >= n);
}

#[test]
fn replicas_share_results_and_nothing_else() {
    let Some(redis) = Redis::start(&[]) else { return };
    let (a, b) = (replica(with_redis(redis.url())), replica(with_redis(redis.url())));
    let computed = ask(&a, "user-1");
    assert_eq!(computed.cache, "miss");
    stored(&a, 1.0);
    let shared = ask(&b, "user-1");
    assert_eq!(shared.cache, "l2");
    assert_eq!((&shared.items, shared.known_user), (&computed.items, computed.known_user));
    assert_eq!(ask(&b, "user-1").cache, "l1");
    assert_eq!(metric(&b, "recommendation_cache_hits_total{cache_level=\"l2\"}"), 1.0);

    // What one replica alone knows of a user is its own; what both know they share.
    let seen = Event::new("user-1", &computed.items[0].item_id, "click");
    client(&a).put_events(&[seen], false).unwrap();
    let moved = ask(&a, "user-1");
    assert_eq!(moved.cache, "miss");
    assert!(moved.items.iter().all(|item| item.item_id != computed.items[0].item_id));
    stored(&a, 2.0);
    assert_eq!(ask(&b, "user-1").cache, "l1");
    client(&b).put_events(&[seen], false).unwrap();
    let both = ask(&b, "user-1");
    assert_eq!((both.cache.as_str(), &both.items), ("l2", &moved.items));

    // Other rules, other answers.
    let mut other = with_redis(redis.url());
    other.rerank.mmr_lambda = 0.5;
    let c = replica(other);
    assert_eq!(ask(&c, "user-1").cache, "miss");
    for server in [a, b, c] {
        server.shut_down().unwrap();
    }
}

#[test]
fn what_is_no_value_of_ours_is_computed() {
    let Some(redis) = Redis::start(&[]) else { return };
    let (a, b) = (replica(with_redis(redis.url())), replica(with_redis(redis.url())));
    let computed = ask(&a, "user-2");
    stored(&a, 1.0);
    let mut connection = redis.connect();
    let keys: Vec<String> = redis::cmd("KEYS").arg("tastemaker:*").query(&mut connection).unwrap();
    let [key] = &keys[..] else { panic!("{keys:?}") };
    let ttl: i64 = redis::cmd("TTL").arg(key).query(&mut connection).unwrap();
    assert!((290..=300).contains(&ttl), "{ttl}");
    let () = redis::cmd("SET").arg(key).arg("a value of another version").query(&mut connection).unwrap();
    let answer = ask(&b, "user-2");
    assert_eq!((answer.cache.as_str(), &answer.items), ("miss", &computed.items));
    assert_eq!(metric(&b, "tastemaker_redis_unreadable_total{use=\"results\"}"), 1.0);
    a.shut_down().unwrap();
    b.shut_down().unwrap();
}

#[test]
fn a_password_is_used_and_never_shown() {
    let Some(redis) = Redis::start(&["--requirepass", "swordfish"]) else { return };
    let url = |password: &str| format!("redis://:{password}@127.0.0.1:{}", redis.port);
    let right = replica(with_redis(url("swordfish")));
    ask(&right, "user-3");
    stored(&right, 1.0);
    right.shut_down().unwrap();
    let wrong = start(with_redis(url("guess")), Options::default());
    eventually("it was refused", || metric(&wrong, "tastemaker_redis_failures_total{use=\"results\"}") >= 2.0);
    assert_eq!((ask(&wrong, "user-3").cache.as_str(), breaker(&wrong) == Breaker::Closed), ("miss", false));
    wrong.shut_down().unwrap();
    let mut bad = config();
    bad.cache.redis.url = "http://user:swordfish@host".into();
    let error = bad.validate().unwrap_err();
    assert!(error.contains("cache.redis.url") && !error.contains("swordfish"), "{error}");
}

#[test]
fn faults_of_redis_fail_no_call() {
    let Some(mut redis) = Redis::start(&[]) else { return };
    let mut config = with_redis(redis.url());
    config.cache.redis.budget_ms = 20;
    // Nothing stays in the first level for long, so that the second is asked.
    config.cache.capacity_bytes = 1 << 20;
    let server = replica(config);
    let (stop, answered, slowest) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let (addr, stop, answered, slowest) = (server.addrs.binary, &stop, &answered, &slowest);
            scope.spawn(move || load(addr, thread * 1000, stop, answered, slowest));
        }
        let _stops = Stops(&stop);
        let goes_on = |what: &str| {
            let before = answered.load(Relaxed);
            eventually(what, || answered.load(Relaxed) > before + 50);
        };
        let opens = || {
            let since = Instant::now();
            eventually("the breaker opens", || breaker(&server) != Breaker::Closed);
            assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
        };
        let closes = || eventually("the breaker closes", || breaker(&server) == Breaker::Closed);
        goes_on("healthy");

        redis.signal(libc::SIGSTOP);
        opens();
        goes_on("stopped");
        redis.signal(libc::SIGCONT);
        closes();
        goes_on("continued");

        let port = redis.port;
        drop(redis);
        opens();
        goes_on("gone");
        redis = Redis::start_at(port, &[]).unwrap();
        closes();
        goes_on("back, and empty");

        let mut connection = redis.connect();
        let () = redis::cmd("FLUSHALL").query(&mut connection).unwrap();
        goes_on("flushed");
        let () = redis::cmd("CONFIG").arg("SET").arg("maxmemory").arg("1mb").query(&mut connection).unwrap();
        let refused = || metric(&server, "tastemaker_redis_not_stored_total{use=\"results\"}");
        let before = refused();
        eventually("it refuses what it has no room for", || refused() > before);
        goes_on("full");
        assert_eq!(breaker(&server), Breaker::Closed, "a full Redis still answers lookups");
    });
    assert_eq!(
        metric(&server, "recommendation_requests_total{endpoint=\"recommend\",status=\"ok\"}"),
        answered.load(Relaxed) as f64
    );
    println!("{} calls, the slowest took {} µs", answered.load(Relaxed), slowest.load(Relaxed));
    server.shut_down().unwrap();
}

/// The event ids in the stream, in its order.
fn streamed(redis: &Redis, key: &str) -> Vec<String> {
    type Entry = (String, std::collections::HashMap<String, String>);
    let entries: Vec<Entry> = redis::cmd("XRANGE").arg((key, "-", "+")).query(&mut redis.connect()).unwrap();
    entries.into_iter().map(|(_, fields)| fields["event_id"].clone()).collect()
}

#[test]
fn events_reach_the_stream_once_and_in_order() {
    let Some(redis) = Redis::start(&[]) else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut config = config();
    config.events.log_dir = dir.path().to_owned();
    config.events.sync_interval_ms = 20;
    config.events.redis_stream.url = redis.url();
    config.events.redis_stream.key = "of events".into();
    let ids: Vec<String> = (0..1200).map(|n| format!("e{n}")).collect();
    let put = |server: &Server, ids: &[String]| {
        for some in ids.chunks(300) {
            let context = [("place", "home")];
            let event = |id| Event { event_id: id, context: &context, ..Event::new("u", "item-1", "view") };
            client(server).put_events(&some.iter().map(|id| event(id)).collect::<Vec<_>>(), true).unwrap();
        }
    };
    let server = start(config.clone(), Options::default());
    put(&server, &ids[..300]);
    eventually("the first are there", || streamed(&redis, "of events").len() == 300);
    // While Redis hangs, events are accepted; what it got of them is not sent twice.
    redis.signal(libc::SIGSTOP);
    put(&server, &ids[300..600]);
    std::thread::sleep(Duration::from_millis(300));
    server.shut_down().unwrap();
    redis.signal(libc::SIGCONT);
    // In the middle of a record.
    let _: () = redis::cmd("XTRIM").arg(("of events", "MAXLEN", 250)).query(&mut redis.connect()).unwrap();
    let server = start(config.clone(), Options::default());
    put(&server, &ids[600..900]);
    eventually("all are there", || streamed(&redis, "of events").last() == Some(&ids[899]));
    // Somebody else's key is left alone; serving goes on.
    let _: () = redis::cmd("SET").arg(("taken", "value")).query(&mut redis.connect()).unwrap();
    server.shut_down().unwrap();
    let got = streamed(&redis, "of events");
    let mut sorted = got.clone();
    sorted.sort_by_key(|id| id[1..].parse::<u32>().unwrap());
    sorted.dedup();
    assert_eq!(got, sorted, "in order, none twice");
    assert!(got.ends_with(&ids[300..900]), "none is missing");
    config.events.redis_stream.key = "taken".into();
    let server = start(config, Options::default());
    put(&server, &ids[900..]);
    eventually("the sink fails", || {
        metric(&server, "tastemaker_event_sink_failures_total{sink=\"redis_stream\"}") >= 1.0
    });
    let value: String = redis::cmd("GET").arg("taken").query(&mut redis.connect()).unwrap();
    assert_eq!(value, "value");
    server.shut_down().unwrap();
}

#[test]
fn what_is_deleted_here_does_not_come_from_there() {
    let Some(redis) = Redis::start(&[]) else { return };
    let (a, b) = (replica(with_redis(redis.url())), replica(with_redis(redis.url())));
    let computed = ask(&a, "user-1");
    stored(&a, 1.0);
    let gone = computed.items[0].item_id.as_str();
    client(&b).delete_items(&[gone], false).unwrap();
    let without = ask(&b, "user-1");
    assert!(without.cache == "miss" && without.items.iter().all(|item| item.item_id != gone), "{}", without.cache);
    // A slate that does not show it is shared all the same.
    let other = (2..80).map(|at| format!("user-{at}")).find(|user| {
        let slate = ask(&a, user);
        slate.items.iter().all(|item| item.item_id != gone)
    });
    let other = other.unwrap();
    eventually("the slate of the other is shared", || {
        redis::cmd("DBSIZE").query::<u64>(&mut redis.connect()).unwrap() >= 2 && ask(&b, &other).cache != "miss"
    });
    // What was upserted here makes other answers here.
    let change = Change { columns: &[("price", Value::Number(1.0))], ..Change::of("item-5") };
    client(&b).change(Kind::UpsertItems, &[change], false).unwrap();
    assert_eq!(ask(&b, &other).cache, "miss");
    for server in [a, b] {
        server.shut_down().unwrap();
    }
}
