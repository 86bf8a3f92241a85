//! The whole server over real sockets: that it answers right, and that nobody can make it answer wrong or not at all.

mod common;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use common::*;
use tastemaker::api::{Call, RankCall, RecommendCall, SearchBy, SearchCall, SearchFilter};
use tastemaker::catalog::conditions::{Compare, Demand};
use tastemaker::config::Config;
use tastemaker::device::sim::{Faults, Script};
use tastemaker::index::SearchParams;
use tastemaker::pipeline::local::LocalPipeline;
use tastemaker::server::{DeviceKind, Options, Server};
use tastemaker::wire::client::{Answer, decode};
use tastemaker::wire::request::Request;

fn sim(latency_ms: u64) -> Script {
    Script { latency: Duration::from_millis(latency_ms), ..Script::default() }
}

fn error_name(answer: &Answer) -> &str {
    match answer {
        Answer::Error { name, .. } => name,
        other => panic!("{other:?}"),
    }
}

#[test]
fn binary_http_and_eval_agree_to_the_item() {
    let server = start(config(), Options::default());
    let mut client = client(&server);
    let mut local = LocalPipeline::new(&config(), generation()).unwrap();
    let contexts: [&[(&str, &str)]; 2] = [&[], &[("category", "poetry"), ("hour", "9")]];
    for (at, user) in ["user-0", "user-7", "user-33", "user-79", "nobody"].into_iter().enumerate() {
        for query in [None, Some("silent city")] {
            let call = RecommendCall { context: contexts[at % 2], query, ..RecommendCall::new(user, 12) };
            let want = local.answer(&call).unwrap();
            let ids = &want.generation.items.ids;
            let want: Vec<(String, f32)> = want.items.iter().map(|i| (ids.id(i.row).to_owned(), i.score)).collect();
            assert_eq!(want.len(), 12);

            let slate = client.recommend(&call).unwrap();
            let got: Vec<(String, f32)> = slate.items.iter().map(|i| (i.item_id.clone(), i.score)).collect();
            assert_eq!(got, want, "{user} {query:?}: binary");
            assert_eq!(slate.known_user, user != "nobody");

            let context: HashMap<_, _> = call.context.iter().copied().collect();
            let body = serde_json::json!({ "user_id": user, "n_items": 12, "query": query, "context": context });
            let answer = http(server.addrs.http, "POST", "/v1/recommend", &body.to_string()).json();
            assert_eq!(answer["cache"], "l1", "the same request by another protocol is the same request");
            let items = answer["items"].as_array().unwrap();
            for (at, (item, (id, score))) in items.iter().zip(&want).enumerate() {
                assert_eq!(
                    (item["item_id"].as_str().unwrap(), item["rank"].as_u64().unwrap()),
                    (id.as_str(), at as u64 + 1)
                );
                assert_eq!(item["score"].as_f64().unwrap() as f32, *score);
            }
        }
    }
    server.shut_down().unwrap();
}

#[test]
fn no_item_that_the_user_knows_is_ever_shown() {
    let server = start(config(), Options::default());
    let mut client = client(&server);
    let generation = generation();
    for row in 0..generation.users.len() as u32 {
        let slate = client.recommend(&RecommendCall::new(generation.users.ids.id(row), 50)).unwrap();
        assert_eq!(slate.items.len(), 50);
        for item in &slate.items {
            let item = generation.items.ids.row(&item.item_id).unwrap();
            assert!(generation.histories.of(row).all(|seen| seen.row != item));
        }
    }
    server.shut_down().unwrap();
}

#[test]
fn search_and_rank_by_both_protocols() {
    let server = start(config(), Options::default());
    let mut client = client(&server);
    let by = [
        (SearchBy::Item("item-5"), r#"{"item_id":"item-5","k":7}"#),
        (SearchBy::User("user-5"), r#"{"user_id":"user-5","k":7}"#),
        (SearchBy::Text("silent city"), r#"{"text":"silent city","k":7}"#),
    ];
    let generation = generation();
    for (by, body) in by {
        let (by, body) = match by {
            // Ids of the synthetic catalogue are its own business.
            SearchBy::Item(_) => {
                let id = generation.items.ids.id(5);
                (SearchBy::Item(id), body.replace("item-5", id))
            }
            by => (by, body.to_owned()),
        };
        let call = Request::Call(Call::Search(SearchCall::new(by, 7)));
        let Answer::Scored(binary) = client.call(&call).unwrap() else { panic!("{by:?}") };
        let json = http(server.addrs.http, "POST", "/v1/search", &body).json();
        let items = json["items"].as_array().unwrap();
        assert_eq!((binary.len(), items.len()), (7, 7), "{by:?}");
        for (item, (id, score, _)) in items.iter().zip(&binary) {
            assert_eq!(item["item_id"].as_str().unwrap(), id);
            assert_eq!(item["score"].as_f64().unwrap() as f32, *score);
        }
        assert!(binary.windows(2).all(|pair| pair[0].1 >= pair[1].1));
    }

    let known = [generation.items.ids.id(3), generation.items.ids.id(2)];
    let items = [known[0], "no such item", known[1]];
    let call = RankCall { user_id: "user-1", context: &[], item_ids: &items, ranker: None, deadline: None };
    let Answer::Scored(binary) = client.call(&Request::Call(Call::Rank(call))).unwrap() else { panic!() };
    assert_eq!(
        binary.iter().map(|i| (i.0.as_str(), i.2)).collect::<Vec<_>>(),
        [(known[0], true), ("", false), (known[1], true)]
    );
    let body = serde_json::json!({ "user_id": "user-1", "item_ids": items });
    let json = http(server.addrs.http, "POST", "/v1/rank", &body.to_string()).json();
    assert_eq!(json["ranker"], "demo");
    assert!(json["items"][1].is_null());
    assert_eq!(json["items"][2]["score"].as_f64().unwrap() as f32, binary[2].1);

    let call = RankCall { ranker: Some("nope"), ..call };
    assert_eq!(error_name(&client.call(&Request::Call(Call::Rank(call))).unwrap()), "not_found");
    let call = SearchCall::new(SearchBy::Vector(&[1.0, 2.0]), 3);
    assert_eq!(error_name(&client.call(&Request::Call(Call::Search(call))).unwrap()), "bad_request");
    let call = SearchCall::new(SearchBy::Item("nope"), 3);
    assert_eq!(error_name(&client.call(&Request::Call(Call::Search(call))).unwrap()), "not_found");
    server.shut_down().unwrap();
}

/// Items and scores of one list of a search's answer.
fn listed(items: &serde_json::Value) -> Vec<(String, f32)> {
    let id = |id: &serde_json::Value| id.as_str().map_or_else(|| id.to_string(), str::to_owned);
    let items = items["items"].as_array().unwrap().iter();
    items.map(|item| (id(&item["item_id"]), item["score"].as_f64().unwrap() as f32)).collect()
}

#[test]
fn filtered_searches_return_what_passes_of_all() {
    let server = start(config(), Options::default());
    let (mut client, generation) = (client(&server), generation());
    let (items, n) = (&generation.items, generation.items.len());
    let data = |name: &str| &items.column(name).unwrap().data;
    let (category, tags) = (data("category"), data("tags"));
    let two = [category.vocabulary().unwrap().id(0), category.vocabulary().unwrap().id(1)];
    let (tag, half_known) = ([tags.vocabulary().unwrap().id(2)], [two[0], "no such"]);
    let year = |row: u32| f64::from(data("year").number(row).unwrap());
    let no_price = |row: u32| match data("price") {
        tastemaker::catalog::generation::ColumnData::Number { values, .. } => values[row as usize].is_nan(),
        other => panic!("{other:?}"),
    };
    let middle = year(n as u32 / 2);
    let range = |compare: Compare| Demand::Compare(compare);
    let later = range(Compare { ge: Some(middle), ..Compare::default() });
    let priceless = range(Compare { missing: Some(true), ..Compare::default() });
    type Passes<'a> = Box<dyn Fn(u32) -> bool + 'a>;
    type Filtered<'a> = (serde_json::Value, Vec<(&'a str, Demand<'a>)>, Passes<'a>);
    let filters: Vec<Filtered<'_>> = vec![
        (serde_json::json!({}), vec![], Box::new(|_| true)),
        (
            serde_json::json!({ "category": two, "year": { "ge": middle } }),
            vec![("category", Demand::Values(&two)), ("year", later)],
            Box::new(|row| category.codes(row).iter().any(|&code| code < 2) && year(row) >= middle),
        ),
        (
            serde_json::json!({ "tags": tag[0], "price": { "missing": true } }),
            vec![("tags", Demand::Values(&tag)), ("price", priceless)],
            Box::new(|row| tags.codes(row).contains(&2) && no_price(row)),
        ),
        (
            serde_json::json!({ "year": middle, "category": half_known }),
            vec![("year", Demand::Number(middle)), ("category", Demand::Values(&half_known))],
            Box::new(|row| year(row) == middle && category.codes(row) == [0]),
        ),
        (
            serde_json::json!({ "category": "no such" }),
            vec![("category", Demand::Values(&["no such"]))],
            Box::new(|_| false),
        ),
    ];
    let seen: Vec<u32> = generation.histories.of(5).map(|seen| seen.row).collect();
    let (mut vector, excluded) = (Vec::new(), [items.ids.id(1), items.ids.id(40), "no such item"]);
    generation.item_embeddings.as_ref().unwrap().extend_row(9, &mut vector);
    let item = items.ids.id(5);
    let starts = [
        (SearchBy::Vector(&vector), serde_json::json!({ "vector": vector })),
        (SearchBy::Item(item), serde_json::json!({ "item_id": item })),
        (SearchBy::User(generation.users.ids.id(5)), serde_json::json!({ "user_id": generation.users.ids.id(5) })),
        (SearchBy::Text("the silent city"), serde_json::json!({ "text": "the silent city" })),
    ];
    for (by, start) in &starts {
        let of_user = matches!(by, SearchBy::User(_));
        let everything = SearchFilter { exclude_seen: of_user.then_some(false), ..SearchFilter::default() };
        let all = client.search(&SearchCall { filter: everything, ..SearchCall::new(*by, 10_000) }).unwrap();
        match by {
            SearchBy::Text(_) => assert!(all[0].len() > 10),
            SearchBy::Item(_) => assert!(all[0].len() == n - 1 && all[0].iter().all(|found| found.0 != item)),
            _ => assert_eq!(all[0].len(), n),
        }
        for (json, conditions, passes) in &filters {
            for (k, exclude, exclude_seen) in [(10_000, &[][..], None), (7, &excluded[..], of_user.then_some(true))] {
                let want = all[0].iter().filter(|(id, _)| {
                    let row = items.ids.row(id).unwrap();
                    passes(row) && !exclude.contains(&id.as_str()) && !(of_user && seen.contains(&row))
                });
                let want: Vec<(String, f32)> = want.take(k as usize).cloned().collect();
                let filter = SearchFilter { conditions, exclude, exclude_seen };
                let call = SearchCall { filter, ..SearchCall::new(*by, k) };
                assert_eq!(client.search(&call).unwrap(), std::slice::from_ref(&want), "{call:?}");
                let mut body = start.clone();
                body["k"] = k.into();
                body["filter"] = json.clone();
                body["exclude_item_ids"] = exclude.into();
                if let Some(exclude_seen) = exclude_seen {
                    body["exclude_seen"] = exclude_seen.into();
                }
                let answer = http(server.addrs.http, "POST", "/v1/search", &body.to_string()).json();
                assert_eq!(listed(&answer), want, "{body}");
            }
        }
    }
    assert!(metric(&server, "tastemaker_filter_cache_bytes") > 0.0);
    server.shut_down().unwrap();
}

#[test]
fn several_vectors_are_answered_one_by_one() {
    let server = start(config(), Options::default());
    let (mut client, generation) = (client(&server), generation());
    let matrix = generation.item_embeddings.as_ref().unwrap();
    let (mut values, n) = (Vec::new(), 64);
    (0..n).for_each(|row| matrix.extend_row(row, &mut values));
    let category = generation.items.column("category").unwrap().data.vocabulary().unwrap().id(0);
    let conditions = [("category", Demand::Values(&[category]))];
    let params = SearchParams { n_probes: Some(8), refine_ratio: Some(2.0), ef_search: Some(64) };
    for conditions in [&conditions[..], &[]] {
        let filter = SearchFilter { conditions, ..SearchFilter::default() };
        let of = |by, k| SearchCall { filter, params, ..SearchCall::new(by, k) };
        let got = client.search(&of(SearchBy::Vectors { values: &values, n }, 20)).unwrap();
        let want: Vec<Vec<(String, f32)>> = values
            .chunks_exact(matrix.dim)
            .map(|vector| client.search(&of(SearchBy::Vector(vector), 20)).unwrap().remove(0))
            .collect();
        assert!(want.iter().all(|list| !list.is_empty()));
        assert_eq!(got, want);
        let body = serde_json::json!({
            "vectors": values.chunks_exact(matrix.dim).collect::<Vec<_>>(), "k": 20,
            "filter": if conditions.is_empty() { serde_json::json!({}) } else { serde_json::json!({ "category": category }) },
            "n_probes": 8, "refine_ratio": 2, "ef_search": 64,
        });
        let answer = http(server.addrs.http, "POST", "/v1/search", &body.to_string()).json();
        assert!(answer.get("items").is_none());
        assert_eq!(answer["results"].as_array().unwrap().iter().map(listed).collect::<Vec<_>>(), want);
        // One of several is a list of one.
        let one = client
            .call(&Request::Call(Call::Search(of(SearchBy::Vectors { values: &values[..matrix.dim], n: 1 }, 20))));
        assert!(matches!(one.unwrap(), Answer::Results(lists) if lists.len() == 1 && lists[0].len() == want[0].len()));
    }
    server.shut_down().unwrap();
}

#[test]
fn searches_say_what_is_wrong() {
    let server = start(config(), Options::default());
    let mut client = client(&server);
    let mut ask = |call: SearchCall<'_>| match client.call(&Request::Call(Call::Search(call))).unwrap() {
        Answer::Error { code, message, .. } => (code, message),
        other => panic!("{call:?}: {other:?}"),
    };
    let over_http = |body: String| {
        let response = http(server.addrs.http, "POST", "/v1/search", &body);
        (response.status, response.json()["error"]["message"].as_str().unwrap_or_default().to_owned())
    };
    // By both protocols.
    let compare = Compare { lt: Some(3.0), ..Compare::default() };
    let conditions: [(&str, Demand<'_>, &str, &[&str]); 6] = [
        ("categry", Demand::Values(&["x"]), r#"{"categry":"x"}"#, &["filter.categry", "did you mean `category`?"]),
        ("category", Demand::Number(3.0), r#"{"category":3}"#, &["filter.category", "holds strings"]),
        ("category", Demand::Compare(compare), r#"{"category":{"lt":3}}"#, &["filter.category", "compares numbers"]),
        ("year", Demand::Values(&["x"]), r#"{"year":["x"]}"#, &["filter.year", "holds numbers"]),
        ("year", Demand::Compare(Compare::default()), r#"{"year":{}}"#, &["filter.year", "is empty"]),
        ("", Demand::Number(1.0), r#"{"":1}"#, &["column is empty"]),
    ];
    for (column, demand, json, says) in conditions {
        let filter = SearchFilter { conditions: &[(column, demand)], ..SearchFilter::default() };
        let binary = ask(SearchCall { filter, ..SearchCall::new(SearchBy::Text("city"), 3) });
        let json = over_http(format!(r#"{{"text":"city","filter":{json}}}"#));
        assert_eq!((binary.0, json.0), (400, 400), "{column}: {} {}", binary.1, json.1);
        for says in says {
            assert!(binary.1.contains(says) && json.1.contains(says), "{says}: {} {}", binary.1, json.1);
        }
    }
    let vectors = [0.0; 16 * 65];
    let by = |n: u32| SearchBy::Vectors { values: &vectors[..16 * n as usize], n };
    assert_eq!(ask(SearchCall::new(by(65), 1)).0, 413);
    assert!(ask(SearchCall::new(by(64), 513)).1.contains("at most 32768"));
    assert!(ask(SearchCall::new(SearchBy::Vectors { values: &vectors[..40], n: 3 }, 1)).1.contains("16 each"));
    assert!(ask(SearchCall::new(by(1), 10_001)).1.contains("1 to 10000"));
    for (params, says) in [
        (SearchParams { n_probes: Some(65_537), ..SearchParams::default() }, "n_probes is 65537, expected 1 to 65536"),
        (SearchParams { refine_ratio: Some(0.5), ..SearchParams::default() }, "refine_ratio is 0.5, expected 1 to 100"),
        (SearchParams { refine_ratio: Some(f32::NAN), ..SearchParams::default() }, "expected 1 to 100"),
        (SearchParams { ef_search: Some(u32::MAX), ..SearchParams::default() }, "expected 1 to 65536"),
    ] {
        let (code, message) = ask(SearchCall { params, ..SearchCall::new(SearchBy::Text("city"), 3) });
        assert!(code == 400 && message.contains(says), "{message}");
    }
    let filter = SearchFilter { exclude_seen: Some(true), ..SearchFilter::default() };
    assert!(ask(SearchCall { filter, ..SearchCall::new(SearchBy::Text("city"), 3) }).1.contains("user_id only"));
    let unheard_of = format!(r#"{{"{}":1}}"#, "x".repeat(257));
    let many = |n: usize, element: &str| vec![element; n].join(",");
    let columns = (0..33).map(|at| format!(r#""c{at}":1"#)).collect::<Vec<_>>().join(",");
    let cases = [
        (r#""filter":{"year":null}"#.to_owned(), 400, "filter.year: invalid type: null"),
        (r#""filter":{"year":{"gte":1}}"#.to_owned(), 400, "filter.year: unknown field `gte`, expected one of `lt`"),
        (r#""filter":{"year":[1990]}"#.to_owned(), 400, "filter.year: invalid type: integer `1990`, expected a"),
        (r#""filter":["year"]"#.to_owned(), 400, "item columns and their conditions"),
        (format!(r#""filter":{unheard_of}"#), 400, "column is empty or longer than 256"),
        (format!(r#""filter":{{{columns}}}"#), 413, "more than 32 conditions"),
        (format!(r#""filter":{{"tags":[{}]}}"#, many(257, r#""x""#)), 413, "more than 256 values"),
        (format!(r#""exclude_item_ids":[{}]"#, many(10_001, "1")), 413, "more than 10000 items"),
        (r#""exclude_item_ids":[""]"#.to_owned(), 400, "an item id is empty"),
        (r#""n_probes":0"#.to_owned(), 400, "n_probes is 0, expected 1 to 65536"),
        (r#""refine_ratio":101"#.to_owned(), 400, "refine_ratio is 101, expected 1 to 100"),
        (r#""ef_search":0"#.to_owned(), 400, "ef_search is 0, expected 1 to 65536"),
        (r#""vectors":[[1]]"#.to_owned(), 400, "exactly one of"),
    ];
    for (field, status, says) in cases {
        let (got, message) = over_http(format!(r#"{{"text":"city",{field}}}"#));
        assert!(got == status && message.contains(says), "{says}: {got} {message}");
    }
    for (body, status, says) in [
        (r#"{"vectors":[]}"#.to_owned(), 400, "0 vectors, expected 1 to 64"),
        (r#"{"vectors":[[1,2],[3]]}"#.to_owned(), 400, "vectors[1] has 1 values, the first one has 2"),
        (format!(r#"{{"vectors":[{}]}}"#, many(65, "[]")), 413, "more than 64 vectors"),
        (format!(r#"{{"vectors":[[{}]]}}"#, many(8193, "1")), 413, "more than 8192 values"),
        (r#"{"user_id":"user-1","exclude_seen":"no"}"#.to_owned(), 400, "expected a boolean"),
    ] {
        let (got, message) = over_http(body);
        assert!(got == status && message.contains(says), "{says}: {got} {message}");
    }
    server.shut_down().unwrap();
}

#[test]
fn frames_may_come_byte_by_byte_and_many_at_once() {
    let server = start_sim(config(), sim(0));
    let mut stream = connect(server.addrs.binary);
    for byte in frame(1, &RecommendCall::new("user-1", 3)) {
        stream.write_all(&[byte]).unwrap();
    }
    assert_eq!(decode(&read_frame(&mut stream).unwrap()).unwrap().0, 1);
    let many: Vec<u8> =
        (2..502).flat_map(|id| frame(id, &RecommendCall { no_cache: true, ..RecommendCall::new("u", 3) })).collect();
    // A cut in the middle of a frame.
    stream.write_all(&many[..many.len() / 2 + 7]).unwrap();
    stream.write_all(&many[many.len() / 2 + 7..]).unwrap();
    let mut ids: Vec<u64> = (2..502).map(|_| decode(&read_frame(&mut stream).unwrap()).unwrap().0).collect();
    ids.sort_unstable();
    assert_eq!(ids, (2..502).collect::<Vec<_>>());
    server.shut_down().unwrap();
}

#[test]
fn half_a_frame_and_gone() {
    let server = start_sim(config(), sim(0));
    let whole = frame(1, &RecommendCall::new("user-1", 3));
    for len in 0..whole.len() {
        connect(server.addrs.binary).write_all(&whole[..len]).unwrap();
    }
    assert!(client(&server).recommend(&RecommendCall::new("user-2", 3)).is_ok());
    eventually("all connections are closed", || metric(&server, "tastemaker_connections") == 0.0);
    server.shut_down().unwrap();
}

#[test]
fn a_peer_that_only_stopped_sending_gets_its_answers() {
    let server = start_sim(config(), sim(5));
    let mut stream = connect(server.addrs.binary);
    for id in 0..10 {
        stream.write_all(&frame(id, &RecommendCall { no_cache: true, ..RecommendCall::new("u", 3) })).unwrap();
    }
    stream.shutdown(Shutdown::Write).unwrap();
    let mut ids: Vec<u64> = (0..10).map(|_| decode(&read_frame(&mut stream).unwrap()).unwrap().0).collect();
    ids.sort_unstable();
    assert_eq!(ids, (0..10).collect::<Vec<_>>());
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    server.shut_down().unwrap();
}

#[test]
fn an_oversized_frame_is_answered_and_ends_the_connection() {
    let server = start_sim(config(), sim(0));
    for len in [config().server.max_frame_bytes + 1, u32::MAX] {
        let mut stream = connect(server.addrs.binary);
        stream.write_all(&frame(7, &RecommendCall::new("user-1", 3))).unwrap();
        stream.write_all(&len.to_le_bytes()).unwrap();
        // What comes after it is not looked at, and does not cut the answer off.
        stream.write_all(&[0; 100_000]).unwrap();
        let mut names = Vec::new();
        for _ in 0..2 {
            match decode(&read_frame(&mut stream).unwrap()).unwrap() {
                (7, Answer::Slate(_)) => names.push("slate".to_owned()),
                (0, Answer::Error { name, .. }) => names.push(name),
                other => panic!("{other:?}"),
            }
        }
        names.sort_unstable();
        assert_eq!(names, ["slate", "too_large"]);
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "the end, not a reset");
    }
    server.shut_down().unwrap();
}

#[test]
fn garbage_is_answered_and_the_stream_goes_on() {
    let server = start_sim(config(), sim(0));
    let mut stream = connect(server.addrs.binary);
    let good = frame(1, &RecommendCall::new("user-1", 3));
    let mut damaged = good.clone();
    damaged.truncate(good.len() - 8);
    let len = damaged.len() as u32 - 4;
    damaged[..4].copy_from_slice(&len.to_le_bytes());
    let cases: [Vec<u8>; 4] =
        [vec![0, 0, 0, 0], b"\x05\0\0\0hello".to_vec(), [&[64, 0, 0, 0][..], &[0xa5; 64]].concat(), damaged];
    for garbage in &cases {
        stream.write_all(garbage).unwrap();
        let (id, answer) = decode(&read_frame(&mut stream).unwrap()).unwrap();
        assert_eq!((id, error_name(&answer)), (0, "bad_request"));
        stream.write_all(&good).unwrap();
        assert!(matches!(decode(&read_frame(&mut stream).unwrap()).unwrap(), (1, Answer::Slate(_))));
    }
    assert_eq!(metric(&server, "tastemaker_malformed_frames_total"), cases.len() as f64);
    // An HTTP request on the binary port announces a frame of a billion bytes.
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(error_name(&decode(&read_frame(&mut stream).unwrap()).unwrap().1), "too_large");
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    server.shut_down().unwrap();
}

#[test]
fn a_thousand_idle_connections_cost_nobody_anything() {
    tastemaker::server::signals::raise_file_limit();
    let server = start_sim(config(), sim(0));
    let idle: Vec<_> = (0..1000).map(|_| connect(server.addrs.binary)).collect();
    eventually("all are accepted", || metric(&server, "tastemaker_connections") >= 1000.0);
    let mut client = client(&server);
    for n in 0..200 {
        client.recommend(&RecommendCall { no_cache: true, ..RecommendCall::new("user-1", 3 + n % 5) }).unwrap();
    }
    drop(idle);
    eventually("the idle ones are gone", || metric(&server, "tastemaker_connections") == 1.0);
    let start = Instant::now();
    server.shut_down().unwrap();
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn connections_beyond_the_cap_are_closed_at_once() {
    let mut config = config();
    config.server.max_connections = 3;
    config.server.cpus = vec![0];
    let server = start_sim(config, sim(0));
    let mut kept: Vec<_> = (0..3).map(|_| client(&server)).collect();
    kept.iter_mut().for_each(|c| drop(c.recommend(&RecommendCall::new("u", 1)).unwrap()));
    let mut refused = connect(server.addrs.binary);
    assert!(matches!(refused.read(&mut [0]), Ok(0) | Err(_)));
    kept.pop();
    eventually("there is room again", || client(&server).recommend(&RecommendCall::new("u", 1)).is_ok());
    assert!(metric(&server, "tastemaker_connections_refused_total") >= 1.0);
    server.shut_down().unwrap();
}

#[test]
fn clients_that_go_away_leave_nothing_behind() {
    let server = start_sim(config(), sim(2));
    for round in 0..20 {
        let mut stream = connect(server.addrs.binary);
        for id in 0..10 {
            stream.write_all(&frame(id, &RecommendCall { no_cache: true, ..RecommendCall::new("u", 3) })).unwrap();
        }
        if round % 2 == 0 {
            // A reset instead of an end.
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
        }
        drop(stream);
        let mut http = connect(server.addrs.http);
        http.write_all(&http_request("POST", "/v1/recommend", r#"{"user_id":"u","no_cache":true}"#)).unwrap();
        drop(http);
    }
    eventually("nothing is in flight", || metric(&server, "tastemaker_in_flight") == 0.0);
    eventually("nothing is open", || metric(&server, "tastemaker_connections") == 0.0);
    assert!(client(&server).recommend(&RecommendCall::new("u", 3)).is_ok());
    let start = Instant::now();
    server.shut_down().unwrap();
    assert!(start.elapsed() < Duration::from_secs(5), "a client that left must not hold the drain up");
}

#[test]
fn overload_is_answered_at_once_and_every_call_exactly_once() {
    let mut config = config();
    config.server.max_in_flight = 4;
    config.server.cpus = vec![0];
    let server = start_sim(config, sim(30));
    let mut client = client(&server);
    let start = Instant::now();
    let sent: Vec<u64> = (0..200)
        .map(|_| {
            client
                .send(&Request::Call(Call::Recommend(RecommendCall { no_cache: true, ..RecommendCall::new("u", 3) })))
                .unwrap()
        })
        .collect();
    let (mut slates, mut shed, mut answered) = (0, 0, Vec::new());
    for _ in &sent {
        let (id, answer) = client.receive().unwrap();
        answered.push(id);
        match &answer {
            Answer::Slate(_) => slates += 1,
            Answer::Error { code: 429, name, retryable: true, .. } if name == "overloaded" => shed += 1,
            other => panic!("{other:?}"),
        }
        if shed == 190 {
            assert!(start.elapsed() < Duration::from_millis(500), "shedding waited for the work");
        }
    }
    answered.sort_unstable();
    assert_eq!(answered, sent);
    assert!(slates >= 4 && shed >= 190, "{slates} {shed}");
    assert_eq!(
        metric(&server, "recommendation_requests_total{endpoint=\"recommend\",status=\"overloaded\"}"),
        f64::from(shed)
    );
    server.shut_down().unwrap();
}

#[test]
fn a_late_answer_is_an_error_in_time() {
    let mut config = config();
    config.server.cpus = vec![0];
    let server = start_sim(config, sim(200));
    let mut client = client(&server);
    let call =
        RecommendCall { deadline: Some(Duration::from_millis(20)), no_cache: true, ..RecommendCall::new("u", 3) };
    for _ in 0..3 {
        let start = Instant::now();
        let answer = client.call(&Request::Call(Call::Recommend(call))).unwrap();
        assert_eq!(error_name(&answer), "deadline_exceeded");
        assert!(
            start.elapsed() >= Duration::from_millis(20) && start.elapsed() < Duration::from_millis(150),
            "{:?}",
            start.elapsed()
        );
    }
    let body = r#"{"user_id":"u","no_cache":true,"deadline_ms":20}"#;
    assert_eq!(http(server.addrs.http, "POST", "/v1/recommend", body).status, 408);
    eventually("the late jobs come back", || metric(&server, "tastemaker_in_flight") == 0.0);
    server.shut_down().unwrap();
}

#[test]
fn answers_overtake_each_other() {
    let mut config = config();
    config.server.cpus = vec![0];
    let server = start_sim(config, sim(50));
    let mut client = client(&server);
    client.recommend(&RecommendCall::new("cached", 3)).unwrap();
    let slow = client.send(&recommend("slow", 3)).unwrap();
    let fast = client.send(&recommend("cached", 3)).unwrap();
    let health = client.send(&Request::Health).unwrap();
    let order: Vec<u64> = (0..3).map(|_| client.receive().unwrap().0).collect();
    assert_eq!(order, [fast, health, slow]);
    server.shut_down().unwrap();
}

#[test]
fn identical_calls_in_flight_are_computed_once() {
    let server = start_sim(config(), sim(50));
    let mut clients: Vec<_> = (0..20).map(|_| client(&server)).collect();
    clients.iter_mut().for_each(|c| assert!(c.send(&recommend("same", 5)).is_ok()));
    for client in &mut clients {
        assert!(matches!(client.receive().unwrap().1, Answer::Slate(_)));
    }
    assert_eq!(metric(&server, "recommendation_requests_total{endpoint=\"recommend\",status=\"ok\"}"), 20.0);
    let computed = metric(&server, "recommendation_stage_latency_seconds_count{stage=\"queue\"}");
    let (shared, hits) = (
        metric(&server, "tastemaker_shared_total"),
        metric(&server, "recommendation_cache_hits_total{cache_level=\"l1\"}"),
    );
    assert_eq!((computed, computed + shared + hits), (1.0, 20.0));
    // The cache is on; asked to bypass it, nobody shares.
    let call = RecommendCall { no_cache: true, ..RecommendCall::new("same", 5) };
    clients.iter_mut().take(3).for_each(|c| assert!(c.send(&Request::Call(Call::Recommend(call))).is_ok()));
    clients.iter_mut().take(3).for_each(|c| drop(c.receive().unwrap()));
    assert_eq!(metric(&server, "recommendation_stage_latency_seconds_count{stage=\"queue\"}"), 4.0);
    server.shut_down().unwrap();
}

/// Sends identical calls so that they meet, and counts what became of them, and the computations.
fn together(server: &Server, user: &str, n: usize) -> (HashMap<String, usize>, f64) {
    let queued = || metric(server, "recommendation_stage_latency_seconds_count{stage=\"queue\"}");
    let before = queued();
    let call = RecommendCall::new(user, 5);
    // In one piece: the shard takes them in one turn.
    let frames: Vec<u8> = (0..n as u64).flat_map(|id| frame(id, &call)).collect();
    let mut stream = connect(server.addrs.binary);
    stream.write_all(&frames).unwrap();
    let mut outcomes = HashMap::new();
    for _ in 0..n {
        let outcome = match decode(&read_frame(&mut stream).unwrap()).unwrap().1 {
            Answer::Slate(_) => "ok".to_owned(),
            Answer::Error { name, .. } => name,
            other => panic!("{other:?}"),
        };
        *outcomes.entry(outcome).or_default() += 1;
    }
    (outcomes, queued() - before)
}

fn on_one_cpu() -> Config {
    let mut config = config();
    config.server.cpus = tastemaker::server::signals::allowed_cpus()[..1].to_vec();
    config.cache.negative_ttl_ms = 60_000;
    config
}

#[test]
fn a_defect_that_a_call_meets_answers_all_who_ask_the_same() {
    let server = start_sim(on_one_cpu(), Script { panic_every: 1, ..sim(0) });
    assert_eq!(together(&server, "same", 20), ([("internal".to_owned(), 20)].into(), 1.0));
    // And those who come a moment later; others meet their own.
    assert_eq!(together(&server, "same", 3), ([("internal".to_owned(), 3)].into(), 0.0));
    assert_eq!(together(&server, "other", 3), ([("internal".to_owned(), 3)].into(), 1.0));
    server.shut_down().unwrap();
}

#[test]
fn who_waits_for_a_call_that_has_no_answer_is_computed_by_one_of_them() {
    // The second batch fails by itself.
    let server = start_sim(on_one_cpu(), Script { fail_every: 2, ..sim(0) });
    assert_eq!(together(&server, "first", 1), ([("ok".to_owned(), 1)].into(), 1.0));
    let outcomes = [("unavailable".to_owned(), 1), ("ok".to_owned(), 19)].into();
    assert_eq!(together(&server, "same", 20), (outcomes, 2.0));
    server.shut_down().unwrap();
}

#[test]
fn a_result_past_its_time_is_served_while_one_computation_makes_it_anew() {
    let mut config = config();
    (config.cache.ttl_seconds, config.cache.stale_seconds) = (1, 60);
    let server = start(config, Options::default());
    let mut client = client(&server);
    let mut ask = || client.recommend(&RecommendCall::new("user-1", 10)).unwrap();
    let first = ask();
    assert_eq!(first.cache, "miss");
    std::thread::sleep(Duration::from_millis(1050));
    let stale = ask();
    assert_eq!((stale.cache.as_str(), &stale.items), ("stale", &first.items));
    eventually("it is new again", || ask().cache == "l1");
    assert_eq!(metric(&server, "tastemaker_cache_misses_total"), 1.0);
    eventually("nothing is left in flight", || metric(&server, "tastemaker_in_flight") == 0.0);
    server.shut_down().unwrap();
}

#[test]
fn a_failing_device_fails_calls_and_nothing_else() {
    for script in [Script { fail_every: 3, ..sim(1) }, Script { panic_every: 3, ..sim(1) }] {
        let server = start_sim(config(), script);
        let mut client = client(&server);
        let mut outcomes = HashMap::<String, usize>::new();
        for n in 0..60 {
            let user = format!("user-{n}");
            let outcome = match client.call(&recommend(&user, 3)).unwrap() {
                Answer::Slate(_) => "ok".to_owned(),
                Answer::Error { name, message, .. } => {
                    assert!(!message.contains("scripted"), "insides leaked: {message}");
                    name
                }
                other => panic!("{other:?}"),
            };
            *outcomes.entry(outcome).or_default() += 1;
        }
        let failed = outcomes.get("unavailable").or(outcomes.get("internal")).copied().unwrap_or(0);
        assert!(outcomes["ok"] >= 30 && (10..=20).contains(&failed), "{outcomes:?}");
        // Of those who wait for an identical call that fails one computes, or all have its answer.
        for _ in 0..10 {
            (0..5).for_each(|_| assert!(client.send(&recommend("together", 4)).is_ok()));
            (0..5).for_each(|_| drop(client.receive().unwrap()));
        }
        eventually("nothing is left", || metric(&server, "tastemaker_in_flight") == 0.0);
        server.shut_down().unwrap();
    }
}

#[test]
fn the_cpu_answers_for_a_device_that_hangs_or_fails() {
    let faults = Faults { seed: 3, fail: 30, hang: 30, hang_for: Duration::from_secs(2), ..Faults::default() };
    let mut config = config();
    config.cache.enabled = false;
    let device = DeviceKind::Guarded(Script { faults, ..Script::default() });
    let server = start(config, Options { device, ..Options::default() });
    let mut client = client(&server);
    let (mut moved, mut back, mut n) = (0, 0, 0);
    eventually("calls are moved, and the device is back after that", || {
        n += 1;
        let slate = client.recommend(&RecommendCall::new(&format!("user-{}", n % 80), 5)).unwrap();
        assert_eq!(slate.items.len(), 5);
        let flagged = slate.degraded.iter().any(|(stage, _)| stage == "queue");
        // What the simulated device answers comes from no source.
        assert_eq!(slate.items.iter().any(|item| item.sources != 0), flagged, "{:?}", slate.degraded);
        moved += usize::from(flagged);
        back += usize::from(moved > 0 && !flagged);
        moved > 20 && back > 20
    });
    assert!(metric(&server, "tastemaker_degraded_total{stage=\"queue\",reason=\"failed\"}") > 0.0);
    server.shut_down().unwrap();
}

#[test]
fn who_does_not_read_is_not_read() {
    let mut config = config();
    config.server.max_output_bytes = 1 << 16;
    config.server.max_in_flight = 65_536;
    let server = start_sim(config, sim(0));
    let mut stream = connect(server.addrs.binary);
    // 500 items are some 20 kB of answer: 3,000 of them are far more than sockets and limits hold.
    let call = RecommendCall::new("u", 500);
    const CALLS: u64 = 3000;
    // Computed once: what is read, not what is computed, is to be the bottleneck.
    let mut other = client(&server);
    other.recommend(&call).unwrap();
    let writer = {
        let mut stream = stream.try_clone().unwrap();
        std::thread::spawn(move || (0..CALLS).for_each(|id| stream.write_all(&frame(id, &call)).unwrap()))
    };
    // Others are served meanwhile.
    for _ in 0..50 {
        other.recommend(&RecommendCall::new("v", 5)).unwrap();
    }
    for id in 0..CALLS {
        let (got, answer) = decode(&read_frame(&mut stream).unwrap()).unwrap();
        assert!(matches!(answer, Answer::Slate(ref slate) if slate.items.len() == 500), "{id} {got}");
    }
    writer.join().unwrap();
    server.shut_down().unwrap();
}

#[test]
fn http_says_what_is_wrong() {
    let server = start(config(), Options::default());
    let ask = |method: &str, path: &str, body: &str| {
        let response = http(server.addrs.http, method, path, body);
        let error = &response.json()["error"];
        assert!(error["retryable"].is_boolean());
        (response.status, error["code"].as_str().unwrap().to_owned(), error["message"].as_str().unwrap().to_owned())
    };
    let cases = [
        ("POST", "/v1/recommend", "{", 400, "EOF"),
        ("POST", "/v1/recommend", "", 400, "EOF"),
        ("POST", "/v1/recommend", "[]", 400, ""),
        ("POST", "/v1/recommend", r#"{"n_items":3}"#, 400, "user_id"),
        ("POST", "/v1/recommend", r#"{"user_id":"u","n_itemz":3}"#, 400, "n_itemz"),
        ("POST", "/v1/recommend", r#"{"user_id":"u","n_items":0}"#, 400, "n_items"),
        ("POST", "/v1/recommend", r#"{"user_id":"u","n_items":100000}"#, 400, "1 to 500"),
        ("POST", "/v1/recommend", r#"{"user_id":"u","n_items":-1}"#, 400, ""),
        ("POST", "/v1/recommend", r#"{"user_id":""}"#, 400, "user_id"),
        ("POST", "/v1/recommend", "\u{1}\u{2}", 400, ""),
        ("POST", "/v1/search", r#"{"k":3}"#, 400, "exactly one"),
        ("POST", "/v1/search", r#"{"text":"x","item_id":"1"}"#, 400, "exactly one"),
        ("POST", "/v1/search", r#"{"vector":[1,2]}"#, 400, "2 values"),
        ("POST", "/v1/search", r#"{"text":" "}"#, 400, "empty"),
        ("POST", "/v1/search", r#"{"user_id":"nobody"}"#, 404, "user"),
        ("POST", "/v1/rank", r#"{"user_id":"u","item_ids":[]}"#, 400, "0 items"),
        ("POST", "/v1/rank", r#"{"user_id":"u","item_ids":["1"],"ranker":"x"}"#, 404, "ranker"),
        ("GET", "/v1/recommend", "", 405, "POST"),
        ("POST", "/v3/nothing", "", 404, "/v1/recommend"),
    ];
    for (method, path, body, status, says) in cases {
        let (got, _, message) = ask(method, path, body);
        assert_eq!(got, status, "{method} {path} {body}: {message}");
        assert!(message.contains(says), "{body}: {message}");
    }
    let long = "x".repeat(3000);
    assert_eq!(ask("POST", "/v1/recommend", &format!(r#"{{"user_id":"u","query":"{long}"}}"#)).0, 413);
    assert_eq!(ask("POST", "/v1/recommend", &format!(r#"{{"user_id":"{long}"}}"#)).0, 400);
    let huge = format!(r#"{{"user_id":"{}"}}"#, "x".repeat(2 << 20));
    let mut stream = connect(server.addrs.http);
    // The server may answer and close before it has read it all.
    let _ = stream.write_all(&http_request("POST", "/v1/recommend", &huge));
    assert_eq!(read_response(&mut stream).unwrap().status, 413);
    let refused = "recommendation_requests_total{endpoint=\"recommend\",status=\"bad_request\"}";
    assert!(metric(&server, refused) >= 10.0, "requests that did not become calls count, too");
    server.shut_down().unwrap();
}

#[test]
fn http_keeps_connections_and_takes_pipelines() {
    let server = start_sim(config(), sim(1));
    let mut stream = connect(server.addrs.http);
    let mut all = Vec::new();
    for n in 1..=20 {
        all.extend(http_request("POST", "/v1/recommend", &format!(r#"{{"user_id":"u","n_items":{n}}}"#)));
    }
    stream.write_all(&all).unwrap();
    for n in 1..=20 {
        let response = read_response(&mut stream).unwrap();
        assert_eq!((response.status, response.json()["items"].as_array().unwrap().len()), (200, n));
    }
    server.shut_down().unwrap();
}

#[test]
fn a_slow_loris_is_cut_off() {
    let server = start_sim(config(), sim(0));
    let mut stream = connect(server.addrs.http);
    stream.write_all(b"POST /v1/recommend HTTP/1.1\r\nhost: t\r\nx-slow: ").unwrap();
    let start = Instant::now();
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    server.shut_down().unwrap();
}

#[test]
fn numbers_and_strings_name_the_same_context() {
    let server = start_sim(config(), sim(0));
    for (body, cache) in [
        (r#"{"user_id":7,"context":{"b":1,"a":true},"n_items":3}"#, "miss"),
        (r#"{"user_id":"7","context":{"a":"true","b":"1"},"n_items":3}"#, "l1"),
        (r#"{"user_id":"7","context":{"a":"true","b":"2"},"n_items":3}"#, "miss"),
        (r#"{"user_id":"7","context":{"a":"true","b":"1"},"n_items":3,"no_cache":true}"#, "bypass"),
        (r#"{"user_id":"7","context":{"a":"true","b":"1"},"n_items":3,"explain":true}"#, "bypass"),
    ] {
        assert_eq!(http(server.addrs.http, "POST", "/v1/recommend", body).json()["cache"], cache, "{body}");
    }
    server.shut_down().unwrap();
}

#[test]
fn explanations_and_timings_come_where_asked_for() {
    let server = start(config(), Options::default());
    let body = r#"{"user_id":"user-7","n_items":5,"explain":true,"timings":true}"#;
    let answer = http(server.addrs.http, "POST", "/v1/recommend", body).json();
    for stage in ["plan", "queue", "ann", "collaborative", "features", "rank"] {
        assert!(answer["timings_us"][stage].as_f64().unwrap() > 0.0, "{stage}: {answer}");
    }
    for item in answer["items"].as_array().unwrap() {
        let named: Vec<&str> = item["sources"].as_array().unwrap().iter().map(|s| s.as_str().unwrap()).collect();
        let explained = item["explanation"]["sources"].as_object().unwrap();
        assert_eq!(explained.len(), named.len());
        assert!(named.iter().all(|source| explained[*source]["rank"].as_u64().unwrap() >= 1));
    }
    let plain = http(server.addrs.http, "POST", "/v1/recommend", r#"{"user_id":"user-7","n_items":5}"#).json();
    assert!(plain.get("timings_us").is_none() && plain["items"][0].get("explanation").is_none());
    assert_eq!(plain["degraded"].as_array().unwrap().len(), 0);
    server.shut_down().unwrap();
}

#[test]
fn the_admin_port_tells_how_it_is() {
    let server = start(config(), Options::default());
    let admin = |path: &str| http(server.addrs.admin, "GET", path, "");
    assert_eq!((admin("/healthz").status, admin("/readyz").status), (200, 200));
    assert_eq!(admin("/nothing").status, 404);
    assert_eq!(http(server.addrs.admin, "POST", "/metrics", "").status, 405);
    assert_eq!(admin("/generations").json()[0]["version"], generation().version.as_str());
    let mut client = client(&server);
    for n in 0..30 {
        client.recommend(&RecommendCall::new(&format!("user-{}", n % 10), 5)).unwrap();
    }
    let text = admin("/metrics").body;
    for name in [
        "recommendation_request_latency_seconds_bucket{endpoint=\"recommend\",status=\"ok\",le=\"0.01\"}",
        "recommendation_stage_latency_seconds_bucket{stage=\"rank\",le=\"0.005\"}",
        "recommendation_requests_total{endpoint=\"recommend\",status=\"ok\"} 30",
        "recommendation_cache_hits_total{cache_level=\"l1\"} 20",
        "model_inference_latency_seconds_count{model_name=\"demo\"} 10",
        "candidates_generated_bucket{source=\"ann\",le=\"500\"}",
        "recommendations_served_total{source=\"collaborative\"}",
    ] {
        assert!(text.contains(name), "{name} is missing:\n{text}");
    }
    server.shut_down().unwrap();
}

#[test]
fn a_taken_address_is_an_error() {
    let server = start_sim(config(), sim(0));
    let mut second = config();
    second.server.listen = server.addrs.binary;
    let error = tastemaker::server::Server::start(generation(), second, Options::default()).err().unwrap();
    assert!(format!("{error:#}").contains(&server.addrs.binary.to_string()), "{error:#}");
    server.shut_down().unwrap();
}

#[test]
fn draining_finishes_what_was_accepted_and_refuses_the_rest() {
    let mut config = config();
    config.server.cpus = vec![0];
    let server = start_sim(config, sim(20));
    let mut before = client(&server);
    let sent: Vec<u64> = (0..20)
        .map(|_| {
            before
                .send(&Request::Call(Call::Recommend(RecommendCall { no_cache: true, ..RecommendCall::new("u", 3) })))
                .unwrap()
        })
        .collect();
    let mut over_http = connect(server.addrs.http);
    over_http.write_all(&http_request("POST", "/v1/recommend", r#"{"user_id":"u","no_cache":true}"#)).unwrap();
    eventually("all are in flight", || metric(&server, "tastemaker_in_flight") >= 15.0);
    let admin = server.addrs.admin;
    server.stopper().stop();
    eventually("readiness is gone", || http(admin, "GET", "/readyz", "").status == 503);
    let after = before.send(&recommend("late", 3)).unwrap();
    let mut answers: HashMap<u64, Answer> = (0..21).map(|_| before.receive().unwrap()).collect();
    assert_eq!(error_name(&answers.remove(&after).unwrap()), "unavailable");
    assert!(sent.iter().all(|id| matches!(answers[id], Answer::Slate(_))));
    assert_eq!(read_response(&mut over_http).unwrap().status, 200);
    server.shut_down().unwrap();
}
