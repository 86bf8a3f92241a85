//! The feature store against a real `redis-server`; skipped, visibly, where there is none.

mod common;

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::redis_server::*;
use common::*;
use tastemaker::api::{Change, Event, Kind, RecommendCall, SearchBy, SearchCall, Value};
use tastemaker::config::Config;
use tastemaker::context::now_ms;
use tastemaker::link::Breaker;
use tastemaker::server::{Options, Server};
use tastemaker::store::value::{Field, FieldKind, FieldValue, Schema, StoredItem, pack};
use tastemaker::wire::client::{Client, SlateAnswer};

fn schema() -> Schema {
    let field = |(name, kind): (&str, FieldKind)| Field { name: name.into(), kind };
    let fields = [
        ("age", FieldKind::Number),
        ("country", FieldKind::Text),
        ("embedding", FieldKind::Vector),
        ("history", FieldKind::Items),
    ];
    Schema::new(fields.map(field).into()).unwrap()
}

fn with_store(url: String) -> Config {
    let mut config = config();
    config.features.redis.url = url;
    // The machine that tests run on stalls for longer than a production budget.
    config.features.redis.budget_ms = 1000;
    // What trends depends on events, which other servers of a test do not get.
    config.pipeline.trending_k = 0;
    config
}

fn replica(config: Config) -> Server {
    let server = start(config, Options::default());
    // Else it is ready some time after the first answers.
    server.shared().live.prepare_fold_in();
    eventually("Redis is connected", || breaker(&server) == Breaker::Closed);
    server
}

fn breaker(server: &Server) -> Breaker {
    server.shared().store.as_ref().unwrap().link.breaker()
}

fn set(redis: &Redis, key: &str, value: &[u8]) {
    let () = redis::cmd("SET").arg(key).arg(value).query(&mut redis.connect()).unwrap();
}

fn put_schema(redis: &Redis, schema: &Schema) {
    set(redis, &format!("tastemaker:f1:schema:{:016x}", schema.id()), schema.text().as_bytes());
}

/// Writes a user as a pipeline does.
fn put_user(redis: &Redis, id: &str, made_ms: i64, vector: Option<&[f32]>, history: &[(&str, f32, bool)]) {
    let item = |&(id, weight, seen): &(&'static str, f32, bool)| StoredItem { id, weight, seen };
    // Ids of a test live as long as it does.
    let history: Vec<(&'static str, f32, bool)> =
        history.iter().map(|&(id, weight, seen)| (&*Box::leak(id.to_owned().into_boxed_str()), weight, seen)).collect();
    let values = [
        FieldValue::Number(33.0),
        FieldValue::Text("fr"),
        vector.map_or(FieldValue::Missing, |vector| FieldValue::Vector(vector.into())),
        FieldValue::Items(history.iter().map(item).collect()),
    ];
    put_schema(redis, &schema());
    set(redis, &format!("tastemaker:f1:user:{id}"), &pack(&schema(), made_ms, &values).unwrap());
}

fn ask(server: &Server, user: &str) -> SlateAnswer {
    client(server).recommend(&RecommendCall { no_cache: true, ..RecommendCall::new(user, 10) }).unwrap()
}

fn lookups(server: &Server, kind: &str, level: &str) -> f64 {
    metric(server, &format!("tastemaker_feature_lookups_total{{kind=\"{kind}\",level=\"{level}\"}}"))
}

fn of_link(server: &Server, name: &str) -> f64 {
    metric(server, &format!("tastemaker_redis_{name}_total{{use=\"features\"}}"))
}

/// A vector that no trained user has.
fn vector(sign: f32) -> Vec<f32> {
    (0..16).map(|at| sign * if at % 3 == 0 { 0.5 } else { -0.25 }).collect()
}

#[test]
fn what_another_process_writes_is_as_if_it_had_been_told_here() {
    let Some(redis) = Redis::start(&[]) else { return };
    let with = replica(with_store(redis.url()));
    let mut without = config();
    without.pipeline.trending_k = 0;
    let without = start(without, Options::default());
    without.shared().live.prepare_fold_in();
    let history = [("item-3", 1.0, true), ("item-40", 0.5, true), ("item-7", 1.0, true)];
    let events = [("item-3", "like"), ("item-40", "click"), ("item-7", "like")];
    for (user, vector) in
        [("nobody", None), ("user-1", None), ("user-2", Some(vector(1.0))), ("stranger", Some(vector(-1.0)))]
    {
        put_user(&redis, user, now_ms(), vector.as_deref(), &history);
        let events: Vec<Event<'_>> = events.iter().map(|&(item, kind)| Event::new(user, item, kind)).collect();
        client(&without).put_events(&events, false).unwrap();
        if let Some(vector) = &vector {
            let change = Change { vector: Some(vector), ..Change::of(user) };
            client(&without).change(Kind::UpsertUsers, &[change], false).unwrap();
        }
        let (a, b) = (ask(&with, user), ask(&without, user));
        assert_eq!(a.items, b.items, "{user}");
        assert!(a.known_user && a.degraded.is_empty(), "{user}: {:?}", a.degraded);
        assert!(a.items.iter().all(|item| history.iter().all(|(id, ..)| *id != item.item_id)), "{user}");
        let search = |server: &Server| client(server).search(&SearchCall::new(SearchBy::User(user), 20)).unwrap();
        assert_eq!(search(&with), search(&without), "{user}");
    }
    // The first lookup found the schema on its way; the second calls of each found the memory.
    assert_eq!((lookups(&with, "user", "redis"), lookups(&with, "user", "memory")), (4.0, 4.0));
    assert_eq!(metric(&with, "tastemaker_feature_age_seconds_count{kind=\"user\"}"), 8.0);
    // An event here comes on top of what the store says.
    let event = Event::new("stranger", "item-9", "like");
    client(&with).put_events(&[event], false).unwrap();
    client(&without).put_events(&[event], false).unwrap();
    assert_eq!(ask(&with, "stranger").items, ask(&without, "stranger").items);
    // Rankings have the user, too.
    let ranked = |server: &Server| {
        let body = r#"{"user_id": "stranger", "item_ids": ["item-1", "item-2", "item-9"]}"#;
        http(server.addrs.http, "POST", "/v1/rank", body).json()["items"].clone()
    };
    assert_eq!(ranked(&with), ranked(&without));
    with.shut_down().unwrap();
    without.shut_down().unwrap();
}

#[test]
fn cached_answers_follow_what_the_store_says() {
    let Some(redis) = Redis::start(&[]) else { return };
    let mut config = with_store(redis.url());
    config.features.memory_ttl_seconds = 1;
    let server = replica(config);
    let ask = |user: &str| client(&server).recommend(&RecommendCall::new(user, 10)).unwrap();
    let none = ask("nobody");
    assert_eq!((none.cache.as_str(), ask("nobody").cache.as_str(), none.known_user), ("miss", "l1", false));
    assert_eq!((lookups(&server, "user", "missing"), lookups(&server, "user", "negative")), (1.0, 1.0));
    // That there was nobody is forgotten with an event of this user.
    put_user(&redis, "nobody", now_ms(), None, &[("item-3", 1.0, true)]);
    client(&server).put_events(&[Event::new("nobody", "item-50", "view")], false).unwrap();
    let told = ask("nobody");
    assert_eq!((told.cache.as_str(), told.known_user), ("miss", true));
    assert_eq!(ask("nobody").cache, "l1");
    // The same content, made again, is the same; another is another.
    let mut misses = metric(&server, "tastemaker_cache_misses_total");
    for (history, computed) in [(("item-3", 1.0, true), false), (("item-8", 1.0, true), true)] {
        put_user(&redis, "nobody", now_ms(), None, &[history]);
        let read = lookups(&server, "user", "redis");
        let mut last = None;
        eventually("it is read again", || {
            last = Some(ask("nobody"));
            lookups(&server, "user", "redis") > read
        });
        let now = metric(&server, "tastemaker_cache_misses_total");
        assert_eq!(now > misses, computed, "{history:?}");
        misses = now;
        // What is cached is what would be computed.
        let fresh = client(&server).recommend(&RecommendCall { no_cache: true, ..RecommendCall::new("nobody", 10) });
        assert_eq!(last.unwrap().items, fresh.unwrap().items);
    }
    server.shut_down().unwrap();
}

#[test]
fn a_stale_answer_after_a_lookup_is_logged_as_shown() {
    let Some(redis) = Redis::start(&[]) else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut config = with_store(redis.url());
    (config.features.memory_ttl_seconds, config.cache.ttl_seconds, config.cache.stale_seconds) = (1, 1, 600);
    config.events.log_dir = dir.path().to_owned();
    config.events.exposure_rate = 1.0;
    let server = replica(config);
    put_user(&redis, "user-1", now_ms(), None, &[("item-3", 1.0, true)]);
    let ask = || client(&server).recommend(&RecommendCall::new("user-1", 10)).unwrap().cache;
    assert_eq!(ask(), "miss");
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(ask(), "stale");
    assert_eq!(lookups(&server, "user", "redis"), 2.0);
    eventually("both are logged", || metric(&server, "tastemaker_exposures_total") >= 2.0);
    server.shut_down().unwrap();
}

#[test]
fn what_is_no_value_of_this_schema_is_never_read_as_one() {
    let Some(redis) = Redis::start(&[]) else { return };
    let server = replica(with_store(redis.url()));
    let good = pack(
        &schema(),
        now_ms(),
        &[FieldValue::Missing, FieldValue::Missing, FieldValue::Missing, FieldValue::Missing],
    )
    .unwrap();
    let mut flipped = good.clone();
    flipped[30] ^= 4;
    let mut format = good.clone();
    format[3] = 2;
    // Another schema of the same kinds, whose text lies under its id, or does not, or is another's.
    let renamed = Schema::parse("height:number\nplace:text\nembedding:vector\nhistory:items\n").unwrap();
    let absent = Schema::parse("a:number\n").unwrap();
    let forged = Schema::parse("b:number\n").unwrap();
    put_schema(&redis, &schema());
    put_schema(&redis, &renamed);
    set(&redis, &format!("tastemaker:f1:schema:{:016x}", forged.id()), b"age:number\n");
    let one = |schema: &Schema| pack(schema, now_ms(), &[FieldValue::Number(5.0)]).unwrap();
    let values: [(&str, Vec<u8>, bool); 8] = [
        ("user-0", good[..good.len() - 1].to_vec(), false),
        ("user-1", flipped, false),
        ("user-2", format, false),
        ("user-3", b"something else".to_vec(), false),
        ("user-4", one(&absent), false),
        ("user-5", one(&forged), false),
        ("user-6", good, true),
        (
            "user-7",
            pack(
                &renamed,
                now_ms(),
                &[FieldValue::Number(5.0), FieldValue::Text("x"), FieldValue::Missing, FieldValue::Missing],
            )
            .unwrap(),
            true,
        ),
    ];
    let mut unreadable = 0.0;
    for (user, value, readable) in values {
        set(&redis, &format!("tastemaker:f1:user:{user}"), &value);
        let slate = ask(&server, user);
        assert_eq!((slate.items.len(), slate.degraded.len(), slate.known_user), (10, 0, true), "{user}");
        unreadable += f64::from(u8::from(!readable));
        assert_eq!(of_link(&server, "unreadable"), unreadable, "{user}");
        let read = lookups(&server, "user", if readable { "redis" } else { "missing" });
        assert!(read > 0.0, "{user}");
    }
    server.shut_down().unwrap();
}

#[test]
fn values_that_are_too_old_are_done_without() {
    let Some(redis) = Redis::start(&[]) else { return };
    let mut config = with_store(redis.url());
    config.features.user_max_age_seconds = 3600;
    let server = replica(config);
    put_user(&redis, "old", now_ms() - 3_700_000, None, &[("item-3", 1.0, true)]);
    put_user(&redis, "new", now_ms() - 3_500_000, None, &[("item-3", 1.0, true)]);
    assert_eq!((ask(&server, "old").known_user, ask(&server, "new").known_user), (false, true));
    assert_eq!((lookups(&server, "user", "too_old"), lookups(&server, "user", "redis")), (1.0, 1.0));
    assert_eq!(metric(&server, "tastemaker_feature_age_seconds_bucket{kind=\"user\",le=\"900\"}"), 0.0);
    assert_eq!(metric(&server, "tastemaker_feature_age_seconds_bucket{kind=\"user\",le=\"3600\"}"), 1.0);
    server.shut_down().unwrap();
}

fn bytes(vector: &[f32]) -> Vec<u8> {
    vector.iter().flat_map(|value| value.to_le_bytes()).collect()
}

#[test]
fn an_encoders_vector_takes_the_place_of_the_trained_one() {
    let Some(redis) = Redis::start(&[]) else { return };
    let mut config = with_store(redis.url());
    config.features.embeddings = true;
    let server = replica(config);
    let near = |by: SearchBy<'_>| {
        let mut call = SearchCall::new(by, 20);
        call.filter.exclude_seen = matches!(by, SearchBy::User(_)).then_some(false);
        client(&server).search(&call).unwrap()
    };
    for (user, sign) in [("user-4", 1.0), ("nobody", -1.0)] {
        set(&redis, &format!("emb:user:{user}"), &bytes(&vector(sign)));
        assert_eq!(near(SearchBy::User(user)), near(SearchBy::Vector(&vector(sign))), "{user}");
        assert!(ask(&server, user).known_user);
    }
    // A user who is told of by both: the encoder's vector, the store's history.
    put_user(&redis, "both", now_ms(), Some(&vector(1.0)), &[("item-3", 1.0, true)]);
    set(&redis, "emb:user:both", &bytes(&vector(-1.0)));
    assert_eq!(near(SearchBy::User("both")), near(SearchBy::Vector(&vector(-1.0))));
    assert!(ask(&server, "both").items.iter().all(|item| item.item_id != "item-3"));
    // One round trip for both keys of a call.
    let before = (of_link(&server, "round_trips"), of_link(&server, "misses"));
    ask(&server, "somebody else");
    assert_eq!((of_link(&server, "round_trips") - before.0, of_link(&server, "misses") - before.1), (1.0, 2.0));
    // What is no vector of this catalogue is refused and counted, and the trained one is used.
    let mut nan = vector(1.0);
    nan[7] = f32::NAN;
    let mut infinite = vector(1.0);
    infinite[0] = f32::INFINITY;
    let trained = generation();
    for (at, wrong) in
        [bytes(&vector(1.0)[1..]), bytes(&nan), bytes(&infinite), b"x".to_vec(), Vec::new()].iter().enumerate()
    {
        let user = format!("user-{}", 10 + at);
        set(&redis, &format!("emb:user:{user}"), wrong);
        let mut own = Vec::new();
        let row = trained.users.ids.row(&user).unwrap();
        trained.user_embeddings.as_ref().unwrap().extend_row(row, &mut own);
        assert_eq!(near(SearchBy::User(&user)), near(SearchBy::Vector(&own)), "{user}");
        assert_eq!(of_link(&server, "unreadable"), at as f64 + 1.0);
    }
    assert!(lookups(&server, "embedding", "redis") == 3.0 && lookups(&server, "embedding", "memory") >= 3.0);
    server.shut_down().unwrap();
}

#[test]
fn without_redis_what_is_known_here_serves_and_says_so() {
    let Some(mut redis) = Redis::start(&["--requirepass", "swordfish"]) else { return };
    let mut config = with_store(format!("redis://:swordfish@127.0.0.1:{}", redis.port));
    config.features.redis.key_prefix = "shop".into();
    config.features.memory_ttl_seconds = 1;
    let server = replica(config);
    let authorized = |redis: &Redis| {
        let url = format!("redis://:swordfish@127.0.0.1:{}", redis.port);
        redis::Client::open(url).unwrap().get_connection_with_timeout(PATIENCE).unwrap()
    };
    let write = |redis: &Redis| {
        let values = [
            FieldValue::Missing,
            FieldValue::Missing,
            FieldValue::Missing,
            FieldValue::Items(vec![StoredItem { id: "item-3", weight: 1.0, seen: true }]),
        ];
        let value = pack(&schema(), now_ms(), &values).unwrap();
        let mut connection = authorized(redis);
        let id = format!("shop:f1:schema:{:016x}", schema().id());
        let () = redis::cmd("SET").arg(id).arg(schema().text()).query(&mut connection).unwrap();
        let () = redis::cmd("SET").arg("shop:f1:user:stored").arg(&value[..]).query(&mut connection).unwrap();
    };
    write(&redis);
    let stored = ask(&server, "stored");
    assert!(stored.known_user && stored.degraded.is_empty());
    let port = redis.port;
    drop(redis);
    eventually("the breaker opens", || breaker(&server) != Breaker::Closed);
    std::thread::sleep(Duration::from_millis(1100));
    // Read more than a second ago, and no newer one is to be had.
    let still = ask(&server, "stored");
    assert_eq!((&still.items, still.degraded.len()), (&stored.items, 0));
    assert!(lookups(&server, "user", "stale") >= 1.0);
    // Of the other nobody knows whether there is a value.
    let other = client(&server).recommend(&RecommendCall::new("user-9", 10)).unwrap();
    assert_eq!(other.degraded, [("features".to_owned(), "failed".to_owned())]);
    assert!(other.known_user && other.items.len() == 10);
    // It is kept for a moment: an outage is no stampede.
    let again = client(&server).recommend(&RecommendCall::new("user-9", 10)).unwrap();
    assert_eq!((again.cache.as_str(), again.degraded.len()), ("l1", 1));
    assert!(metric(&server, "recommendation_cache_hits_total{cache_level=\"negative\"}") >= 1.0);
    redis = Redis::start_at(port, &["--requirepass", "swordfish"]).unwrap();
    eventually("the breaker closes", || breaker(&server) == Breaker::Closed);
    write(&redis);
    eventually("the answer is whole again", || {
        client(&server).recommend(&RecommendCall::new("user-9", 10)).unwrap().degraded.is_empty()
    });
    server.shut_down().unwrap();
}

#[test]
fn upserts_are_written_through_for_other_replicas() {
    let Some(redis) = Redis::start(&[]) else { return };
    let mut config = with_store(redis.url());
    (config.features.write_through, config.features.write_ttl_seconds) = (true, 100);
    (config.features.memory_ttl_seconds, config.features.negative_ttl_seconds) = (1, 0);
    let (a, b) = (replica(config.clone()), replica(config));
    // Both have looked before.
    assert!(!ask(&a, "new").known_user && !ask(&b, "new").known_user);
    client(&a).put_events(&[Event::new("new", "item-3", "like")], false).unwrap();
    let own = vector(1.0);
    let change = Change { columns: &[("age", Value::Number(20.0))], vector: Some(&own), ..Change::of("new") };
    client(&a).change(Kind::UpsertUsers, &[change], false).unwrap();
    let written = ask(&a, "new");
    assert!(written.known_user);
    let key = "tastemaker:f1:user:new";
    let ttl = || redis::cmd("TTL").arg(key).query::<i64>(&mut redis.connect()).unwrap();
    eventually("it is written", || ttl() > 90);
    let near = |server: &Server| client(server).search(&SearchCall::new(SearchBy::User("new"), 20)).unwrap();
    // What the vector knows goes with it: events of before do not move it there, nor here.
    assert_eq!(near(&b), client(&b).search(&SearchCall::new(SearchBy::Vector(&own), 20)).unwrap());
    // An event here moves it here, as without a store.
    client(&a).put_events(&[Event::new("new", "item-9", "like")], false).unwrap();
    assert_ne!(near(&a), near(&b));
    // Who is deleted is gone for all.
    client(&a).change(Kind::DeleteUsers, &[Change::of("new")], false).unwrap();
    assert!(!ask(&a, "new").known_user);
    eventually("it is gone", || ttl() == -2);
    eventually("the other's memory forgets it", || !ask(&b, "new").known_user);
    a.shut_down().unwrap();
    b.shut_down().unwrap();
}

#[test]
fn changes_of_items_are_followed() {
    let Some(redis) = Redis::start(&[]) else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut config = with_store(redis.url());
    config.events.log_dir = dir.path().to_owned();
    config.features.embeddings = true;
    config.features.item_max_age_seconds = 3600;
    let fields = [
        ("price", FieldKind::Number),
        ("category", FieldKind::Text),
        ("tags", FieldKind::List),
        ("title", FieldKind::Text),
        ("vector", FieldKind::Vector),
        ("available", FieldKind::Number),
    ];
    let schema = Schema::new(fields.map(|(name, kind)| Field { name: name.into(), kind }).into()).unwrap();
    let write = |id: &str, made_ms: i64, price: f32, vector: &[f32], available: f32| {
        let values = [
            FieldValue::Number(price),
            FieldValue::Text("a new category"),
            FieldValue::List(vec!["x"]),
            FieldValue::Text("The followed"),
            FieldValue::Vector(vector.into()),
            FieldValue::Number(available),
        ];
        put_schema(&redis, &schema);
        set(&redis, &format!("tastemaker:f1:item:{id}"), &pack(&schema, made_ms, &values).unwrap());
        let () = redis::cmd("XADD")
            .arg(("tastemaker:f1:items", "*", "id", id))
            .query(&mut redis.connect())
            .map(|_: String| ())
            .unwrap();
    };
    let counted = |server: &Server, result: &str| {
        metric(server, &format!("tastemaker_followed_items_total{{result=\"{result}\"}}"))
    };
    let nearest = |server: &Server, sign: f32| {
        client(server).search(&SearchCall::new(SearchBy::Vector(&vector(sign)), 3)).unwrap()[0]
            .iter()
            .map(|item| item.0.clone())
            .collect::<Vec<_>>()
    };
    // Before the server starts.
    write("followed-1", now_ms(), 5.0, &vector(4.0), 1.0);
    write("item-4", now_ms(), 6.0, &vector(3.0), 1.0);
    let server = replica(config.clone());
    eventually("they are upserted", || metric(&server, "tastemaker_live_items") >= 2.0);
    assert_eq!(counted(&server, "upserted"), 2.0);
    assert_eq!(nearest(&server, 1.0)[..2], ["followed-1", "item-4"]);
    // Words of others may be alike.
    let text = |server: &Server| {
        let found = client(server).search(&SearchCall::new(SearchBy::Text("followed"), 20)).unwrap();
        found[0].iter().filter(|item| ["followed-1", "item-4"].contains(&&*item.0)).count()
    };
    assert_eq!(text(&server), 2);
    // While it runs: one goes, one is too old, one has no value, one's vector is the encoder's, one's is none.
    write("item-4", now_ms(), 6.0, &vector(3.0), 0.0);
    write("item-5", now_ms() - 7_200_000, 6.0, &vector(9.0), 1.0);
    let xadd = |id: &str| {
        let _: String =
            redis::cmd("XADD").arg(("tastemaker:f1:items", "*", "id", id)).query(&mut redis.connect()).unwrap();
    };
    xadd("nothing");
    set(&redis, "emb:item:item-6", &bytes(&vector(-5.0)));
    xadd("item-6");
    write("item-7", now_ms(), 6.0, &[1.0], 1.0);
    eventually("all were looked at", || {
        ["upserted", "too_old", "missing", "unreadable"].map(|result| counted(&server, result)) == [4.0, 1.0, 1.0, 1.0]
    });
    eventually("they took effect", || {
        nearest(&server, -1.0)[0] == "item-6" && nearest(&server, 1.0)[0] == "followed-1"
    });
    assert!(!nearest(&server, 1.0).contains(&"item-4".to_owned()));
    assert!(metric(&server, "tastemaker_followed_items_lag_seconds") < 20.0);
    server.shut_down().unwrap();
    // A start reads it all again, and nothing is upserted twice.
    let server = replica(config.clone());
    eventually("they are looked at", || counted(&server, "unchanged") >= 3.0);
    assert_eq!((counted(&server, "upserted"), metric(&server, "tastemaker_live_items")), (0.0, 3.0));
    server.shut_down().unwrap();
    // Without Redis it is all there.
    drop(redis);
    let server = start(config, Options::default());
    assert_eq!((nearest(&server, 1.0)[0].as_str(), text(&server)), ("followed-1", 1));
    server.shut_down().unwrap();
}

#[test]
fn the_command_line_writes_what_servers_read() {
    let Some(redis) = Redis::start(&[]) else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let config_file =
        file("c.toml", &format!("[features]\nembeddings = true\n[features.redis]\nurl = \"{}\"\n", redis.url()));
    let run = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_tastemaker"));
        let output = command.arg("store").args(arguments).arg("--config").arg(&config_file).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let push = |kind: &str, from: &std::path::Path, more: &[&str]| {
        let bundle = bundle_path().to_str().unwrap();
        run(&[&["push", bundle, "--kind", kind, "--from", from.to_str().unwrap()], more].concat())
    };
    let mut config = with_store(redis.url());
    config.features.embeddings = true;
    let server = replica(config);
    let users = file(
        "users.jsonl",
        r#"{"user_id": "cli", "columns": {"age": 31, "country": "fr"}, "history": [{"item_id": "item-3"}, {"item_id": "item-8", "weight": 0.5, "seen": false}]}

{"user_id": 17, "columns": {}, "made_ms": 5}
"#,
    );
    let (code, out, err) = push("users", &users, &["--ttl-seconds", "1000"]);
    assert_eq!((code, out.starts_with("2 users under schema ")), (Some(0), true), "{out}{err}");
    let (code, out, err) = run(&["get", "users", "cli"]);
    assert_eq!(code, Some(0), "{err}");
    let shown: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((shown["fields"]["age"].as_f64(), shown["fields"]["device"].is_null()), (Some(31.0), true), "{out}");
    assert_eq!(shown["fields"]["history"][1], serde_json::json!({"item_id": "item-8", "weight": 0.5, "seen": false}));
    let slate = ask(&server, "cli");
    assert!(slate.known_user && slate.items.iter().all(|item| item.item_id != "item-3"));
    // As many as are sent in one go, and none.
    for (lines, said) in [(500, "500 users"), (0, "0 users")] {
        let many: String = (0..lines).map(|n| format!("{{\"user_id\": \"many-{n}\"}}\n")).collect();
        let (code, out, err) = push("users", &file("many.jsonl", &many), &[]);
        assert!(code == Some(0) && out.starts_with(said), "{out}{err}");
    }
    // An encoder's vectors, and items.
    let numbers = |vector: &[f32]| vector.iter().map(f32::to_string).collect::<Vec<_>>().join(",");
    let encoded = file("e.jsonl", &format!(r#"{{"user_id": "encoded", "embedding": [{}]}}"#, numbers(&vector(1.0))));
    assert_eq!(push("users", &encoded, &["--as-encoder"]).0, Some(0));
    let near = |by: SearchBy<'_>| client(&server).search(&SearchCall::new(by, 5)).unwrap();
    assert_eq!(near(SearchBy::User("encoded")), near(SearchBy::Vector(&vector(1.0))));
    let items = file(
        "items.jsonl",
        &format!(
            r#"{{"item_id": "pushed", "columns": {{"price": 2.5}}, "embedding": [{}]}}
{{"item_id": "item-9", "available": false}}"#,
            numbers(&vector(9.0))
        ),
    );
    assert_eq!(push("items", &items, &[]).0, Some(0));
    eventually("the items are there", || {
        near(SearchBy::Vector(&vector(1.0)))[0][0].0 == "pushed" && metric(&server, "tastemaker_items_gone") == 1.0
    });
    // What is wrong is named, with its place.
    for (line, reason) in [
        (
            r#"{"user_id": "a", "columns": {"agee": 1}}"#,
            "columns.agee: the bundle has no such column; did you mean `age`?",
        ),
        (r#"{"user_id": "a", "columns": {"age": "old"}}"#, "age: is not what a field of kind number holds"),
        (r#"{"user_id": "a", "embedding": [1]}"#, "embedding: has 1 values, the catalogue's have 16"),
        (r#"{"user_id": "a", "ages": 1}"#, "unknown field `ages`"),
        (r#"{"user_id": ""}"#, "an id has 1 to 256 bytes"),
    ] {
        let (code, _, err) = push("users", &file("wrong.jsonl", &format!("\n{line}\n")), &[]);
        assert!(code == Some(1) && err.contains("wrong.jsonl:2") && err.contains(reason), "{line}: {err}");
    }
    let (code, _, err) = run(&["get", "items", "unknown"]);
    assert!(code == Some(1) && err.contains("nothing of the item `unknown`"), "{err}");
    server.shut_down().unwrap();
}

/// Passes bytes on to a Redis, answers `delay_ms` later; takes connections until the test ends.
fn slow_proxy(to: u16, delay_ms: Arc<AtomicU64>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let Ok(client) = client else { return };
            let Ok(redis) = TcpStream::connect(("127.0.0.1", to)) else { continue };
            let delay_ms = delay_ms.clone();
            let pump = |mut from: TcpStream, mut to: TcpStream, delay_ms: Option<Arc<AtomicU64>>| {
                std::thread::spawn(move || {
                    let mut chunk = [0; 16 << 10];
                    while let Ok(n @ 1..) = from.read(&mut chunk) {
                        if let Some(delay) = &delay_ms {
                            std::thread::sleep(Duration::from_millis(delay.load(Relaxed)));
                        }
                        if to.write_all(&chunk[..n]).is_err() {
                            break;
                        }
                    }
                    let _ = to.shutdown(std::net::Shutdown::Both);
                    let _ = from.shutdown(std::net::Shutdown::Both);
                })
            };
            pump(client.try_clone().unwrap(), redis.try_clone().unwrap(), None);
            pump(redis, client, Some(delay_ms));
        }
    });
    port
}

#[test]
fn faults_cost_at_most_the_budget_and_fail_no_call() {
    let Some(redis) = Redis::start(&[]) else { return };
    const BUDGET_MS: u32 = 20;
    let delay = Arc::new(AtomicU64::new(0));
    let proxy = slow_proxy(redis.port, delay.clone());
    let url = format!("redis://127.0.0.1:{proxy}");
    let mut config = with_store(url.clone());
    config.features.redis.budget_ms = BUDGET_MS;
    config.features.embeddings = true;
    // Results are shared, too: a call may wait for both.
    config.cache.redis.url = url;
    config.cache.redis.budget_ms = BUDGET_MS;
    // Memories are small and short, so that Redis is asked.
    (config.cache.capacity_bytes, config.features.memory_bytes) = (1 << 20, 1 << 20);
    (config.features.memory_ttl_seconds, config.features.negative_ttl_seconds) = (1, 1);
    let server = replica(config);
    for at in 0..200 {
        put_user(&redis, &format!("user-{at}"), now_ms(), None, &[("item-3", 1.0, true)]);
    }
    let (stop, answered) = (AtomicBool::new(false), AtomicU64::new(0));
    let times = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let (addr, stop, answered, times) = (server.addrs.binary, &stop, &answered, &times);
            scope.spawn(move || {
                let mut client = Client::connect(addr, PATIENCE).unwrap();
                let mut n = thread * 1000;
                while !stop.load(Relaxed) {
                    n += 1;
                    let user = format!("user-{}", n % 3000);
                    let start = Instant::now();
                    let call = RecommendCall { deadline: Some(PATIENCE), ..RecommendCall::new(&user, 10) };
                    assert_eq!(client.recommend(&call).unwrap().items.len(), 10);
                    times.lock().unwrap().push(start.elapsed());
                    answered.fetch_add(1, Relaxed);
                }
            });
        }
        let _stops = Stops(&stop);
        let p99 = |what: &str| {
            times.lock().unwrap().clear();
            eventually(what, || times.lock().unwrap().len() >= 300);
            let mut times = std::mem::take(&mut *times.lock().unwrap());
            times.sort_unstable();
            let p99 = times[times.len() * 99 / 100];
            println!("{what}: p99 {p99:?} of {}", times.len());
            p99
        };
        let state = |link: usize| server.shared().links[link].breaker();
        let opens = || {
            let since = Instant::now();
            eventually("the breakers open", || (0..2).all(|link| state(link) != Breaker::Closed));
            assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
        };
        let closes = || eventually("the breakers close", || (0..2).all(|link| state(link) == Breaker::Closed));
        // Two lookups one after another, and what a busy machine adds.
        let healthy = p99("healthy");
        let most = healthy + Duration::from_millis(u64::from(2 * BUDGET_MS + 20));
        let bounded = |what: &str| {
            let p99 = p99(what);
            assert!(p99 <= most, "{what}: {p99:?}, at most {most:?}");
        };

        redis.signal(libc::SIGSTOP);
        opens();
        bounded("stopped");
        redis.signal(libc::SIGCONT);
        closes();
        bounded("continued");

        delay.store(200, Relaxed);
        opens();
        bounded("slow");
        delay.store(0, Relaxed);
        closes();
        bounded("fast again");

        let mut connection = redis.connect();
        let () = redis::cmd("FLUSHALL").query(&mut connection).unwrap();
        bounded("flushed");
        let () = redis::cmd("CONFIG").arg("SET").arg("maxmemory").arg("1mb").query(&mut connection).unwrap();
        bounded("full");
        assert_eq!(breaker(&server), Breaker::Closed, "a full Redis still answers lookups");
        drop(connection);

        let port = redis.port;
        drop(redis);
        opens();
        bounded("gone");
        let _back = Redis::start_at(port, &[]).unwrap();
        closes();
        bounded("back, and empty");
    });
    let ok = metric(&server, "recommendation_requests_total{endpoint=\"recommend\",status=\"ok\"}");
    assert_eq!(ok, answered.load(Relaxed) as f64);
    server.shut_down().unwrap();
}
