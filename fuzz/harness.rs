//! What the fuzz targets do with their bytes. `tests/fuzz_regressions.rs` replays seeds and finds through the same code.
#![allow(dead_code)] // Every target uses its part.

use std::path::Path;
use std::time::Duration;

use flatbuffers::{FlatBufferBuilder, ForwardsUOffset, Vector, WIPOffset};
use tastemaker::api::{
    Call, Change, ChangeCall, Event, EventsCall, Kind, RankCall, RecommendCall, SearchBy, SearchCall, SearchFilter,
    Value,
};
use tastemaker::catalog::conditions::{Compare, Demand};
use tastemaker::catalog::generation::MatrixData;
use tastemaker::catalog::npy;
use tastemaker::config::Config;
use tastemaker::index::SearchParams;
use tastemaker::pipeline::models::{Model, ModelInput, ModelOutput};
use tastemaker::ranking::signature::Datatype;
use tastemaker::server::{changes, json, tensors};
use tastemaker::state::change::{self, Record};
use tastemaker::state::event;
use tastemaker::state::log::{EventLog, Limits};
use tastemaker::store::value::{Packed, Schema, pack};
use tastemaker::wire::frame::{self, Split};
use tastemaker::wire::request::Request;
use tastemaker::wire::{client, request, schema};

/// What a target does with its bytes.
pub type Run = fn(&[u8]);

/// Every target by name.
pub const TARGETS: [(&str, Run); 9] = [
    ("answer", answer),
    ("config", config),
    ("event_log", event_log),
    ("feature_value", feature_value),
    ("frame", frame),
    ("http_json", http_json),
    ("infer", infer),
    ("npy", npy),
    ("request", request),
];

/// A stream of frames, whole and in pieces of any size, falls into the same frames. Byte 0: the size limit; bytes 1 to
/// 8: sizes of the pieces, over and over; the rest: the stream.
pub fn frame(bytes: &[u8]) {
    let Some((&limit, rest)) = bytes.split_first() else { return };
    let Some((sizes, stream)) = rest.split_first_chunk::<8>() else { return };
    let limit = usize::from(limit) * 4;

    let (mut whole, mut at) = (Vec::new(), 0);
    let end = loop {
        match frame::split(&stream[at..], limit) {
            Split::Frame(frame) => {
                assert!(frame.len() <= limit);
                at += frame::PREFIX + frame.len();
                whole.push(frame);
            }
            Split::Partial { need } => {
                assert!(need > stream.len() - at && need <= limit + frame::PREFIX);
                break None;
            }
            Split::TooLarge { len } => {
                assert!(len > limit);
                break Some(len);
            }
        }
    };
    let mut again = Vec::new();
    whole.iter().for_each(|message| frame::append(&mut again, message));
    assert_eq!(again, stream[..at], "frames do not join up to what they were split from");

    let (mut buffer, mut pieces, mut sent) = (Vec::new(), Vec::new(), 0);
    let mut sizes = sizes.iter().cycle();
    let ended = 'stream: loop {
        loop {
            match frame::split(&buffer, limit) {
                Split::Frame(message) => {
                    pieces.push(message.to_vec());
                    let used = frame::PREFIX + message.len();
                    buffer.drain(..used);
                }
                Split::Partial { .. } => break,
                Split::TooLarge { len } => break 'stream Some(len),
            }
        }
        if sent == stream.len() {
            break None;
        }
        let size = usize::from(*sizes.next().unwrap_or(&0)).clamp(1, stream.len() - sent);
        buffer.extend_from_slice(&stream[sent..sent + size]);
        sent += size;
    };
    assert_eq!((pieces, ended), (whole.into_iter().map(<[u8]>::to_vec).collect(), end));
}

/// Byte 0 chooses: 0 takes the rest as a message, anything else damages a valid request by the rest.
pub fn request(bytes: &[u8]) {
    let Some((&kind, rest)) = bytes.split_first() else { return };
    let message = match kind {
        0 => rest.to_vec(),
        _ => damaged(valid_request(kind, rest), rest),
    };
    // Formatting reads every field.
    let decoded = request::decode(&message, |id, request| {
        let text = format!("{request:?}");
        let mut builder = FlatBufferBuilder::new();
        (id, text, request::encode(&mut builder, id, &request).to_vec())
    });
    match decoded {
        Ok((id, text, encoded)) => {
            let again = request::decode(&encoded, |id, request| (id, format!("{request:?}")));
            assert_eq!(again.ok(), Some((id, text)), "what was accepted does not survive a round trip");
        }
        Err(malformed) => assert!(!malformed.error.message.is_empty()),
    }
}

/// Byte 0: the length of a schema's text, which follows; the rest: a packed value, as it is and as a body under that schema with a checksum
/// that is right.
pub fn feature_value(bytes: &[u8]) {
    let Some((&length, rest)) = bytes.split_first() else { return };
    let (text, value) = rest.split_at(usize::from(length).min(rest.len()));
    let Ok(Ok(schema)) = std::str::from_utf8(text).map(Schema::parse) else { return };
    assert_eq!(Schema::parse(&schema.text()).as_ref(), Ok(&schema));
    let mut whole = b"TSF\x01".to_vec();
    let rest = [&schema.id().to_le_bytes()[..], &7i64.to_le_bytes(), value].concat();
    whole.extend_from_slice(&crc32fast::hash(&rest).to_le_bytes());
    whole.extend_from_slice(&rest);
    for bytes in [value, &whole] {
        let Ok(packed) = Packed::of(bytes) else { continue };
        let mut values = Vec::new();
        if packed.read(&schema, |_, value| values.push(value)).is_err() {
            continue;
        }
        // Vectors may hold what can't be packed; who reads them looks.
        if let Ok(again) = pack(&schema, packed.made_ms, &values) {
            let mut second = Vec::new();
            Packed::of(&again).and_then(|again| again.read(&schema, |_, value| second.push(value))).unwrap();
            assert_eq!(second, values, "what was read does not survive a round trip");
        }
    }
    // A byte more or less is another value, and none.
    assert!(Packed::of(&whole[..whole.len() - 1]).is_err());
}

/// As [`request`], of answers.
pub fn answer(bytes: &[u8]) {
    let Some((&kind, rest)) = bytes.split_first() else { return };
    let message = match kind {
        0 => rest.to_vec(),
        _ => damaged(valid_answer(kind, rest), rest),
    };
    match client::decode(&message) {
        Ok((_, client::Answer::Slate(slate))) => drop(slate.to_string()),
        Ok((_, other)) => drop(format!("{other:?}")),
        Err(error) => drop(error.to_string()),
    }
}

/// Bytes as each of the bodies of the HTTP API.
pub fn http_json(bytes: &[u8]) {
    fn said(result: Result<String, tastemaker::error::Error>) {
        assert!(!result.unwrap_or_else(|error| error.message.into_owned()).is_empty());
    }
    said(json::parse::<json::RecommendBody<'_>>(bytes).map(|body| format!("{body:?}")));
    said(json::parse::<json::SearchBody<'_>>(bytes).map(|body| format!("{body:?}")));
    said(json::parse::<json::RankBody<'_>>(bytes).map(|body| format!("{body:?}")));
    said(json::parse::<json::EventsBody<'_>>(bytes).map(|body| format!("{body:?}")));
    said(json::parse::<changes::ItemsBody<'_>>(bytes).map(|body| format!("{body:?}")));
    said(json::parse::<changes::UsersBody<'_>>(bytes).map(|body| format!("{body:?}")));
    said(json::parse::<changes::DeleteItemsBody<'_>>(bytes).map(|body| format!("{body:?}")));
    said(json::parse::<changes::DeleteUsersBody<'_>>(bytes).map(|body| format!("{body:?}")));
}

/// Bytes as a segment of the event log: what is read of it is read again, without further damage, and the log goes on. Byte 0: 0 for
/// the bytes as they are, else as many records and then damage; from 192 on it is the file of what is in force.
pub fn event_log(bytes: &[u8]) {
    let Some((&n, rest)) = bytes.split_first() else { return };
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { segment_bytes: 1 << 20, max_bytes: 1 << 30, max_age: None };
    let open = || {
        let mut records = Vec::new();
        EventLog::open(dir.path(), limits, |record| {
            // Whatever is in it, reading it neither panics nor runs on.
            let record = record.payload;
            let _ = event::decode_body(record, |event| drop(format!("{event:?}")));
            if let Ok(Record::Events(body) | Record::Change(_, body) | Record::Exposure(body)) = Record::of(record) {
                let _ = change::decode::<event::Damaged>(body, |change| {
                    drop(format!("{change:?}"));
                    Ok(())
                });
            }
            records.push(record.to_vec());
        })
        .map(|(log, found)| (log, found, records))
    };
    let file = dir.path().join("events-00000000000000000000.log");
    let segment = match n {
        0 => rest.to_vec(),
        n => {
            let (mut log, ..) = open().unwrap();
            let records: Vec<Vec<u8>> =
                (0..n % 8).map(|at| if n < 128 { vec![at; rest.len() % 40] } else { valid_change(at, rest) }).collect();
            log.append(records.iter().map(|record| &record[..])).unwrap();
            damaged(std::fs::read(&file).unwrap_or_default(), rest)
        }
    };
    let file = match n {
        192.. => {
            std::fs::remove_file(&file).unwrap_or_default();
            dir.path().join("state-00000000000000000000.snap")
        }
        _ => file,
    };
    std::fs::write(&file, segment).unwrap();
    // Of a newer format it may be, and is then refused.
    let Ok((mut log, _, records)) = open() else { return };
    // What was damaged of it is written anew.
    log.retain(&|take| records.iter().for_each(|record| take(record))).unwrap();
    log.append([&b"next"[..]]).unwrap();
    drop(log);
    let (_, found, mut again) = open().unwrap();
    assert_eq!((found.damaged_bytes, found.torn_bytes), (0, 0), "mended once, and for good");
    assert_eq!(again.pop().as_deref(), Some(&b"next"[..]));
    assert_eq!(again, records);
}

/// Bytes as the body of an inference. Bytes 0 and 1: where its JSON ends; 0: at the end.
pub fn infer(bytes: &[u8]) {
    let Some((length, body)) = bytes.split_first_chunk::<2>() else { return };
    let length = Some(usize::from(u16::from_le_bytes(*length))).filter(|&length| length > 0);
    let input = |name: &str, datatype, width| ModelInput { name: name.into(), datatype, width };
    let model = Model {
        name: "m".into(),
        inputs: vec![input("x", Datatype::Fp32, 2), input("ids", Datatype::Int64, 1), input("on", Datatype::Bool, 1)],
        output: ModelOutput { name: "score".into(), flat: false },
    };
    match tensors::decode(body, length, &model) {
        Ok(request) => {
            let (n, mut values) = (request.n as usize, vec![0.5]);
            assert!((1..=10_000).contains(&n));
            for (input, wanted) in request.inputs.iter().zip(&model.inputs) {
                input.write_to(&mut values);
                assert_eq!(values.len(), n * wanted.width, "{}", wanted.name);
            }
            assert_eq!(request.inputs.len(), model.inputs.len());
            let (answer, json_end) = tensors::encode(&request, &model, "v", &vec![0.25; n]);
            let text = &answer[..json_end.unwrap_or(answer.len())];
            assert!(serde_json::from_slice::<serde_json::Value>(text).is_ok());
            assert_eq!(answer.len() - text.len(), if request.binary { 4 * n } else { 0 });
        }
        Err(error) => assert!(!error.message.is_empty()),
    }
}

/// Text as a configuration file; one that is accepted says the same when it is written and read again.
pub fn config(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let file = Path::new("fuzz.toml");
    match Config::parse(&text, file) {
        Ok(config) => {
            let written = toml::to_string(&config).expect("an accepted configuration can be written");
            let again = Config::parse(&written, file).expect("an accepted configuration is accepted again");
            // Not the values themselves: NaN, which a rule's condition may hold, equals nothing.
            assert_eq!(toml::to_string(&again).as_ref(), Ok(&written));
        }
        Err(error) => assert!(error.to_string().starts_with("fuzz.toml:")),
    }
}

/// Byte 0: the number of rows expected; the rest: the file.
pub fn npy(bytes: &[u8]) {
    let Some((&n_rows, file)) = bytes.split_first() else { return };
    match npy::parse(file, Path::new("fuzz.npy"), usize::from(n_rows), "items.parquet") {
        Ok(matrix) => {
            assert!((1..=npy::MAX_DIM).contains(&matrix.dim));
            let (len, finite) = match &matrix.data {
                MatrixData::F32(values) => (values.len(), values.iter().all(|v| v.is_finite())),
                MatrixData::F16(values) => (values.len(), values.iter().all(|v| v.is_finite())),
            };
            assert_eq!(len, usize::from(n_rows) * matrix.dim);
            assert!(finite);
        }
        Err(error) => assert!(error.to_string().starts_with("fuzz.npy: ")),
    }
}

/// Overwrites bytes of `message`: from the third byte on, `edits` are places (two bytes) and values. The first two
/// bytes, where not 0, are the length to cut or to extend it to.
fn damaged(mut message: Vec<u8>, edits: &[u8]) -> Vec<u8> {
    let Some((length, edits)) = edits.split_first_chunk::<2>() else { return message };
    for edit in edits.as_chunks::<3>().0 {
        let at = usize::from(u16::from_le_bytes([edit[0], edit[1]])) % message.len();
        message[at] = edit[2];
    }
    match usize::from(u16::from_le_bytes(*length)) {
        0 => {}
        length => message.resize(length, 0),
    }
    message
}

/// A request of each kind; a few of its values come from `values`.
pub fn valid_request(kind: u8, values: &[u8]) -> Vec<u8> {
    let value = |at: usize| values.get(at).copied().unwrap_or(0);
    let vector: Vec<f32> = values.iter().map(|&v| f32::from(v)).collect();
    let long = "x".repeat(usize::from(value(5)) * 2);
    let context: Vec<(&str, &str)> =
        [("country", "fr"), ("", ""), (&long, "v")].into_iter().cycle().take(usize::from(value(6) % 70)).collect();
    let deadline = (value(7) > 0).then(|| Duration::from_micros(u64::from(value(7))));
    let items: Vec<&str> = ["item-1", "item-2", &long].into_iter().cycle().take(usize::from(value(8))).collect();
    let n_items = u32::from(value(9));
    let recommend = RecommendCall {
        user_id: "user-1",
        context: &context,
        n_items,
        query: (value(10) > 0).then_some(long.as_str()),
        explain: value(11) & 1 > 0,
        timings: value(11) & 2 > 0,
        no_cache: value(11) & 4 > 0,
        deadline,
    };
    let rank = RankCall {
        user_id: "user-1",
        context: &context,
        item_ids: &items,
        ranker: (value(10) > 0).then_some("main"),
        deadline,
    };
    let flags = value(12);
    let bound = |bit: u8| (flags & bit > 0).then(|| f64::from(value(13)) / 3.0);
    let compare = Compare {
        lt: bound(1),
        le: bound(2),
        gt: bound(4),
        ge: bound(8),
        missing: (flags & 16 > 0).then_some(flags & 32 > 0),
    };
    let conditions: Vec<(&str, Demand<'_>)> = [
        ("category", Demand::Values(&items)),
        ("year", Demand::Compare(compare)),
        (long.as_str(), Demand::Number(f64::from(value(13)))),
    ]
    .into_iter()
    .cycle()
    .take(usize::from(value(14) % 36))
    .collect();
    let filter = SearchFilter {
        conditions: &conditions,
        exclude: &items,
        exclude_seen: (flags & 64 > 0).then_some(flags & 128 > 0),
    };
    let params = match value(15) {
        0 => SearchParams::default(),
        n => SearchParams {
            n_probes: Some(u32::from(n)),
            refine_ratio: Some(f32::from(n)),
            ef_search: Some(u32::from(n)),
        },
    };
    let search = |by| Request::Call(Call::Search(SearchCall { by, k: n_items, filter, params, deadline }));
    let mut encoder = event::Encoder::new(1, 7).unwrap();
    let event = Event {
        event_id: ["", "e-1"][usize::from(flags & 1)],
        value: bound(2).map_or(f32::NAN, |value| value as f32),
        context: &context[..context.len().min(9)],
        ..Event::new("user-1", "item-1", "view")
    };
    let record = encoder.push(&event).map_or_else(|_| Vec::new(), |()| encoder.record());
    let change = valid_change(kind, values);
    let request = match kind % 10 {
        9 => Request::Call(Call::Change(ChangeCall { record: &change, durable: flags & 4 > 0, deadline })),
        8 => Request::Call(Call::Events(EventsCall { record: &record, durable: flags & 4 > 0, deadline })),
        0 => Request::Health,
        1 => Request::Call(Call::Recommend(recommend)),
        2 => Request::Call(Call::Rank(rank)),
        3 => search(SearchBy::Vector(&vector)),
        4 => search(SearchBy::Item("item-1")),
        5 => search(SearchBy::User(&long)),
        6 => search(SearchBy::Vectors { values: &vector, n: u32::from(value(4)) % 70 }),
        _ => search(SearchBy::Text(&long)),
    };
    request::encode(&mut FlatBufferBuilder::new(), u64::from(kind), &request).to_vec()
}

/// A record of each kind of change; a few of its values come from `values`.
pub fn valid_change(kind: u8, values: &[u8]) -> Vec<u8> {
    let value = |at: usize| values.get(at).copied().unwrap_or(0);
    let kind =
        [Kind::UpsertItems, Kind::UpsertUsers, Kind::DeleteItems, Kind::DeleteUsers][usize::from((kind / 10) % 4)];
    let long = "x".repeat(usize::from(value(5)));
    let vector: Vec<f32> = values.iter().take(8).map(|&v| f32::from(v)).collect();
    let list = ["a", "", &long].into_iter().cycle().take(usize::from(value(6) % 9)).collect();
    let columns = [
        ("price", Value::Number(f64::from(value(7)) / 3.0)),
        ("title", Value::Text(&long)),
        ("tags", Value::List(list)),
        ("year", Value::Missing),
    ];
    let upserts = matches!(kind, Kind::UpsertItems | Kind::UpsertUsers);
    let mut encoder = change::Encoder::carrying(kind);
    for at in 0..1 + value(8) % 4 {
        let change = Change {
            available: (value(9) & 1 > 0 && kind == Kind::UpsertItems).then_some(false),
            columns: if upserts { &columns[..usize::from(at) + 1] } else { &[] },
            vector: (value(9) & 2 > 0 && upserts).then_some(&vector[..]),
            ..Change::of(["item-1", "user-1"][usize::from(at % 2)])
        };
        encoder.push(&change).unwrap();
    }
    encoder.record()
}

/// An answer of each kind, with every field that it can have.
pub fn valid_answer(kind: u8, values: &[u8]) -> Vec<u8> {
    let value = |at: usize| values.get(at).copied().unwrap_or(0);
    let mut b = FlatBufferBuilder::new();
    let text = |b: &mut FlatBufferBuilder<'static>, text: &str| Some(b.create_string(text));
    let (body_type, body) = match kind % 5 {
        4 => {
            let args =
                schema::ChangeReceiptArgs { accepted: 3, created: u32::from(value(3)), unknown: 1, durable: true };
            (schema::Body::ChangeReceipt, schema::ChangeReceipt::create(&mut b, &args).as_union_value())
        }
        0 => {
            let model_version = text(&mut b, "books-1");
            let args = schema::HealthStatusArgs { ready: value(3) > 0, model_version };
            (schema::Body::HealthStatus, schema::HealthStatus::create(&mut b, &args).as_union_value())
        }
        1 => {
            let (name, message) = (text(&mut b, "shed"), text(&mut b, "too much work"));
            let args = schema::ErrorArgs { code: 503, name, message, retryable: true };
            (schema::Body::Error, schema::Error::create(&mut b, &args).as_union_value())
        }
        2 => {
            let mut items = Vec::new();
            for at in 0..value(3) % 8 {
                let item_id = text(&mut b, "item-1");
                let args = schema::ScoredItemArgs { item_id, score: f32::from(at), known: at > 0 };
                items.push(schema::ScoredItem::create(&mut b, &args));
            }
            let (model_version, ranker) = (text(&mut b, "books-1"), text(&mut b, "main"));
            let degraded = degraded(&mut b);
            let items = Some(b.create_vector(&items));
            // They add up to the number of items, or not.
            let lengths = [u32::from(value(3) % 8), u32::from(value(4) / 128)];
            let result_lengths = (value(5) > 0).then(|| b.create_vector(&lengths));
            let args =
                schema::ScoredItemsArgs { items, model_version, ranker, degraded, result_lengths, coverage: 0.5 };
            (schema::Body::ScoredItems, schema::ScoredItems::create(&mut b, &args).as_union_value())
        }
        _ => {
            let mut items = Vec::new();
            for at in 0..value(3) % 8 {
                let source = text(&mut b, "ann");
                let args = schema::SourceEvidenceArgs { source, score: 0.5, rank: u32::from(at) };
                let evidence = [schema::SourceEvidence::create(&mut b, &args)];
                let rules = [b.create_string("boost new")];
                let args = schema::ItemExplanationArgs {
                    evidence: Some(b.create_vector(&evidence)),
                    ranker_score: 0.25,
                    ranker_rank: u32::from(at),
                    rules: Some(b.create_vector(&rules)),
                    backfill: at > 3,
                };
                let explanation = (at % 2 == 0).then(|| schema::ItemExplanation::create(&mut b, &args));
                let item_id = text(&mut b, "item-1");
                let args = schema::SlateItemArgs { item_id, score: f32::from(at), sources: value(4), explanation };
                items.push(schema::SlateItem::create(&mut b, &args));
            }
            let stage = text(&mut b, "retrieve");
            let times = [schema::StageTime::create(&mut b, &schema::StageTimeArgs { stage, us: 12.5 })];
            let args = schema::SlateArgs {
                items: Some(b.create_vector(&items)),
                model_version: text(&mut b, "books-1"),
                cache: schema::Cache::L1,
                degraded: degraded(&mut b),
                timings: Some(b.create_vector(&times)),
                known_user: true,
                coverage: 0.5,
            };
            (schema::Body::Slate, schema::Slate::create(&mut b, &args).as_union_value())
        }
    };
    let args = schema::MessageArgs { request_id: 7, body_type, body: Some(body) };
    let message = schema::Message::create(&mut b, &args);
    schema::finish_message_buffer(&mut b, message);
    b.finished_data().to_vec()
}

type Degraded<'a> = WIPOffset<Vector<'a, ForwardsUOffset<schema::Degraded<'a>>>>;

fn degraded<'a>(b: &mut FlatBufferBuilder<'a>) -> Option<Degraded<'a>> {
    let (stage, reason) = (Some(b.create_string("rank")), Some(b.create_string("timeout")));
    let entries = [schema::Degraded::create(b, &schema::DegradedArgs { stage, reason })];
    Some(b.create_vector(&entries))
}
