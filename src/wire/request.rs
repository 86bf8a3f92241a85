//! Requests: verified once, then read in place.

use std::time::Duration;

use flatbuffers::{FlatBufferBuilder, ForwardsUOffset, UnionWIPOffset, Vector, WIPOffset};
use smallvec::SmallVec;

use super::schema::{self, Body};
use super::{LIMITS, changes, verifier};
use crate::api::{
    Call, Change, ChangeCall, Event, EventsCall, Kind, RankCall, RecommendCall, SearchBy, SearchCall, SearchFilter,
};
use crate::catalog::conditions::{Compare, Demand};
use crate::context::now_ms;
use crate::error::{Code, Error};
use crate::index::SearchParams;
use crate::state::event::{self, MAX_EVENTS};

/// What a frame asks.
#[derive(Clone, Copy, Debug)]
pub enum Request<'a> {
    /// Work.
    Call(Call<'a>),
    /// Are you there?
    Health,
}

/// Why a frame is no request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// 0 where the frame is too damaged to tell.
    pub request_id: u64,
    /// For the client.
    pub error: Error,
}

/// Tables that are verified: as many events as a call may have with as many pairs each, so that what is beyond a limit is refused
/// by name and not as damage.
const MAX_TABLES: usize = MAX_EVENTS * (LIMITS.context_pairs + 2);

/// Pairs of the request context.
type Pairs<'a> = Vector<'a, ForwardsUOffset<schema::Pair<'a>>>;

/// Verifies `frame` and hands its request, borrowed from it, to `then`.
///
/// # Errors
/// Not a FlatBuffer of this schema, an answer instead of a request, or a field beyond its limit, which is named.
pub fn decode<R>(frame: &[u8], then: impl FnOnce(u64, Request<'_>) -> R) -> Result<R, Malformed> {
    let lost = |message| Malformed { request_id: 0, error: Error::fixed(Code::BadRequest, message) };
    if frame.len() < 8 || !schema::message_buffer_has_identifier(frame) {
        return Err(lost("not a TSTM message"));
    }
    let message = schema::root_as_message_with_opts(&verifier(MAX_TABLES), frame)
        .map_err(|_| lost("not a valid FlatBuffer of the schema"))?;
    let request_id = message.request_id();
    let wrong = |error| Malformed { request_id, error };
    if let Some(recommend) = message.body_as_recommend() {
        let context = pairs(recommend.context()).map_err(wrong)?;
        let call = RecommendCall {
            user_id: id(recommend.user_id(), "user_id is empty or longer than 256 bytes").map_err(wrong)?,
            context: &context,
            n_items: recommend.n_items(),
            query: query(recommend.query()).map_err(wrong)?,
            explain: recommend.explain(),
            timings: recommend.timings(),
            no_cache: recommend.no_cache(),
            deadline: budget(recommend.deadline_us()),
        };
        return Ok(then(request_id, Request::Call(Call::Recommend(call))));
    }
    if let Some(search) = message.body_as_search() {
        let mut values: SmallVec<[f32; 256]> = SmallVec::new();
        let given = [
            search.vector().is_some(),
            search.item_id().is_some(),
            search.user_id().is_some(),
            search.text().is_some(),
        ];
        if given.iter().filter(|g| **g).count() != 1 {
            let message = "a search takes exactly one of vector, item_id, user_id, text";
            return Err(wrong(Error::fixed(Code::BadRequest, message)));
        }
        let n_vectors = search.n_vectors();
        if n_vectors as usize > LIMITS.vectors {
            return Err(wrong(Error::fixed(Code::TooLarge, "more than 64 vectors")));
        }
        if n_vectors > 0 && search.vector().is_none() {
            return Err(wrong(Error::fixed(Code::BadRequest, "n_vectors goes with vector only")));
        }
        let by = if let Some(vector) = search.vector() {
            if vector.len() > LIMITS.vector_values * n_vectors.max(1) as usize {
                return Err(wrong(Error::fixed(Code::TooLarge, "a vector has more than 8192 values")));
            }
            values.extend(vector.iter());
            match n_vectors {
                0 => SearchBy::Vector(&values),
                n => SearchBy::Vectors { values: &values, n },
            }
        } else if let Some(item) = search.item_id() {
            SearchBy::Item(id(item, "item_id is empty or longer than 256 bytes").map_err(wrong)?)
        } else if let Some(user) = search.user_id() {
            SearchBy::User(id(user, "user_id is empty or longer than 256 bytes").map_err(wrong)?)
        } else {
            SearchBy::Text(query(search.text()).map_err(wrong)?.unwrap_or_default())
        };
        let mut values: SmallVec<[&str; 16]> = SmallVec::new();
        condition_values(search.filter(), &mut values).map_err(wrong)?;
        let conditions = conditions(search.filter(), &values).map_err(wrong)?;
        let exclude = item_ids(search.exclude_item_ids()).map_err(wrong)?;
        let call = SearchCall {
            by,
            k: search.k(),
            filter: SearchFilter { conditions: &conditions, exclude: &exclude, exclude_seen: search.exclude_seen() },
            params: SearchParams {
                n_probes: Some(search.n_probes()).filter(|n| *n != 0),
                refine_ratio: Some(search.refine_ratio()).filter(|ratio| *ratio != 0.0),
                ef_search: Some(search.ef_search()).filter(|n| *n != 0),
            },
            deadline: budget(search.deadline_us()),
        };
        return Ok(then(request_id, Request::Call(Call::Search(call))));
    }
    if let Some(rank) = message.body_as_rank() {
        let context = pairs(rank.context()).map_err(wrong)?;
        let item_ids = item_ids(Some(rank.item_ids())).map_err(wrong)?;
        let call = RankCall {
            user_id: id(rank.user_id(), "user_id is empty or longer than 256 bytes").map_err(wrong)?,
            context: &context,
            item_ids: &item_ids,
            ranker: rank.ranker(),
            deadline: budget(rank.deadline_us()),
        };
        return Ok(then(request_id, Request::Call(Call::Rank(call))));
    }
    if let Some(put) = message.body_as_put_events() {
        let record = record_of(put.events()).map_err(wrong)?;
        let call = EventsCall { record: &record, durable: put.durable(), deadline: budget(put.deadline_us()) };
        return Ok(then(request_id, Request::Call(Call::Events(call))));
    }
    if let Some((record, durable, deadline_us)) = changes::record(&message).map_err(wrong)? {
        let call = ChangeCall { record: &record, durable, deadline: budget(deadline_us) };
        return Ok(then(request_id, Request::Call(Call::Change(call))));
    }
    match message.body_as_health() {
        Some(_) => Ok(then(request_id, Request::Health)),
        None => Err(wrong(Error::fixed(Code::BadRequest, "not a request"))),
    }
}

fn id<'a>(id: &'a str, otherwise: &'static str) -> Result<&'a str, Error> {
    match (1..=LIMITS.id_bytes).contains(&id.len()) {
        true => Ok(id),
        false => Err(Error::fixed(Code::BadRequest, otherwise)),
    }
}

fn item_ids<'a>(ids: Option<Vector<'a, ForwardsUOffset<&'a str>>>) -> Result<SmallVec<[&'a str; 64]>, Error> {
    let Some(ids) = ids else { return Ok(SmallVec::new()) };
    if ids.len() > LIMITS.items {
        return Err(Error::fixed(Code::TooLarge, "more than 10000 items"));
    }
    let mut out = SmallVec::with_capacity(ids.len());
    for item in ids {
        out.push(id(item, "an item id is empty or longer than 256 bytes")?);
    }
    Ok(out)
}

/// The limits of events are checked where they become a record, for both protocols the same.
fn record_of(events: Vector<'_, ForwardsUOffset<schema::Event<'_>>>) -> Result<Vec<u8>, Error> {
    let mut encoder = event::Encoder::new(events.len(), now_ms())?;
    let mut context: SmallVec<[(&str, &str); 16]> = SmallVec::new();
    for event in events {
        context.clear();
        context.extend(event.context().into_iter().flatten().map(|pair| (pair.key(), pair.value())));
        encoder.push(&Event {
            event_id: event.event_id().unwrap_or_default(),
            user_id: event.user_id(),
            item_id: event.item_id(),
            kind: event.kind(),
            value: event.value().unwrap_or(f32::NAN),
            time_ms: event.time_ms(),
            context: &context,
        })?;
    }
    Ok(encoder.record())
}

/// Conditions of a search.
type Conditions<'a> = Vector<'a, ForwardsUOffset<schema::Condition<'a>>>;

/// The values of all conditions, one after another.
fn condition_values<'a>(filter: Option<Conditions<'a>>, out: &mut SmallVec<[&'a str; 16]>) -> Result<(), Error> {
    let Some(filter) = filter else { return Ok(()) };
    if filter.len() > LIMITS.conditions {
        return Err(Error::fixed(Code::TooLarge, "more than 32 conditions"));
    }
    for values in filter.iter().filter_map(|condition| condition.values()) {
        if out.len() + values.len() > LIMITS.condition_values {
            return Err(Error::fixed(Code::TooLarge, "conditions have more than 256 values"));
        }
        out.extend(values);
    }
    Ok(())
}

/// `values` are those of all conditions.
fn conditions<'a>(
    filter: Option<Conditions<'a>>,
    values: &'a [&'a str],
) -> Result<SmallVec<[(&'a str, Demand<'a>); 8]>, Error> {
    let (mut out, mut rest) = (SmallVec::new(), values);
    for condition in filter.into_iter().flatten() {
        let column = id(condition.column(), "a condition's column is empty or longer than 256 bytes")?;
        let (lt, le, gt, ge) = (condition.lt(), condition.le(), condition.gt(), condition.ge());
        let compare = Compare { lt, le, gt, ge, missing: condition.missing() };
        let demand = match (condition.values(), condition.eq(), compare.is_empty()) {
            (Some(values), None, true) => {
                let (own, others) = rest.split_at(values.len());
                rest = others;
                Demand::Values(own)
            }
            (None, Some(number), true) => Demand::Number(number),
            (None, None, _) => Demand::Compare(compare),
            _ => {
                let message = "a condition takes one of values, eq, and comparisons";
                return Err(Error::new(Code::BadRequest, format!("filter.{column}: {message}")));
            }
        };
        out.push((column, demand));
    }
    Ok(out)
}

fn query(query: Option<&str>) -> Result<Option<&str>, Error> {
    match query {
        Some(text) if text.len() > LIMITS.query_bytes => {
            Err(Error::fixed(Code::TooLarge, "query is longer than 1024 bytes"))
        }
        other => Ok(other),
    }
}

fn budget(us: u32) -> Option<Duration> {
    (us > 0).then(|| Duration::from_micros(u64::from(us)))
}

pub(super) fn us(deadline: Option<Duration>) -> u32 {
    deadline.map_or(0, |d| u32::try_from(d.as_micros()).unwrap_or(u32::MAX).max(1))
}

fn pairs<'a>(pairs: Option<Pairs<'a>>) -> Result<SmallVec<[(&'a str, &'a str); 16]>, Error> {
    let mut out = SmallVec::new();
    let Some(pairs) = pairs else { return Ok(out) };
    if pairs.len() > LIMITS.context_pairs {
        return Err(Error::fixed(Code::TooLarge, "context has more than 64 pairs"));
    }
    let mut bytes = 0;
    for pair in pairs {
        bytes += pair.key().len() + pair.value().len();
        out.push((pair.key(), pair.value()));
    }
    match bytes <= LIMITS.context_bytes {
        true => Ok(out),
        false => Err(Error::fixed(Code::TooLarge, "context is longer than 4096 bytes")),
    }
}

/// Makes the message of a request; `n_items` and `k` go out as they are.
pub fn encode<'b>(builder: &'b mut FlatBufferBuilder<'static>, request_id: u64, request: &Request<'_>) -> &'b [u8] {
    builder.reset();
    let (kind, body) = match request {
        Request::Health => (Body::Health, schema::Health::create(builder, &schema::HealthArgs {}).as_union_value()),
        Request::Call(Call::Recommend(call)) => {
            let args = schema::RecommendArgs {
                user_id: Some(builder.create_string(call.user_id)),
                context: context_offset(builder, call.context),
                n_items: call.n_items,
                query: call.query.map(|q| builder.create_string(q)),
                explain: call.explain,
                timings: call.timings,
                no_cache: call.no_cache,
                deadline_us: us(call.deadline),
            };
            (Body::Recommend, schema::Recommend::create(builder, &args).as_union_value())
        }
        Request::Call(Call::Search(call)) => {
            let SearchFilter { conditions, exclude, exclude_seen } = call.filter;
            let mut args = schema::SearchArgs {
                k: call.k,
                deadline_us: us(call.deadline),
                filter: filter_offset(builder, conditions),
                exclude_item_ids: strings_offset(builder, exclude),
                exclude_seen,
                n_probes: call.params.n_probes.unwrap_or(0),
                refine_ratio: call.params.refine_ratio.unwrap_or(0.0),
                ef_search: call.params.ef_search.unwrap_or(0),
                ..Default::default()
            };
            match call.by {
                SearchBy::Vector(values) => args.vector = Some(builder.create_vector(values)),
                SearchBy::Vectors { values, n } => {
                    args.vector = Some(builder.create_vector(values));
                    args.n_vectors = n;
                }
                SearchBy::Item(id) => args.item_id = Some(builder.create_string(id)),
                SearchBy::User(id) => args.user_id = Some(builder.create_string(id)),
                SearchBy::Text(text) => args.text = Some(builder.create_string(text)),
            }
            (Body::Search, schema::Search::create(builder, &args).as_union_value())
        }
        Request::Call(Call::Rank(call)) => {
            let items: Vec<_> = call.item_ids.iter().map(|id| builder.create_string(id)).collect();
            let args = schema::RankArgs {
                user_id: Some(builder.create_string(call.user_id)),
                context: context_offset(builder, call.context),
                item_ids: Some(builder.create_vector(&items)),
                ranker: call.ranker.map(|r| builder.create_string(r)),
                deadline_us: us(call.deadline),
            };
            (Body::Rank, schema::Rank::create(builder, &args).as_union_value())
        }
        Request::Call(Call::Events(call)) => {
            let mut events = Vec::new();
            // What is no record becomes what the server refuses.
            let _ = event::decode(call.record, |event| events.push(event_offset(builder, event)));
            (Body::PutEvents, put_events_offset(builder, &events, call.durable, call.deadline))
        }
        Request::Call(Call::Change(call)) => changes::offset_of(builder, call),
    };
    super::response::finish(builder, request_id, kind, body)
}

/// Makes the message of a change; its limits are the server's to check.
pub fn encode_changes<'b>(
    builder: &'b mut FlatBufferBuilder<'static>,
    request_id: u64,
    kind: Kind,
    changes: &[Change<'_>],
    durable: bool,
    deadline: Option<Duration>,
) -> &'b [u8] {
    builder.reset();
    let (kind, body) = changes::offset(builder, kind, |take| changes.iter().for_each(take), durable, us(deadline));
    super::response::finish(builder, request_id, kind, body)
}

/// Makes the message of events.
pub fn encode_events<'b>(
    builder: &'b mut FlatBufferBuilder<'static>,
    request_id: u64,
    events: &[Event<'_>],
    durable: bool,
    deadline: Option<Duration>,
) -> &'b [u8] {
    builder.reset();
    let events: Vec<_> = events.iter().map(|event| event_offset(builder, event)).collect();
    let body = put_events_offset(builder, &events, durable, deadline);
    super::response::finish(builder, request_id, Body::PutEvents, body)
}

fn event_offset<'a>(builder: &mut FlatBufferBuilder<'a>, event: &Event<'_>) -> WIPOffset<schema::Event<'a>> {
    let args = schema::EventArgs {
        user_id: Some(builder.create_string(event.user_id)),
        item_id: Some(builder.create_string(event.item_id)),
        kind: Some(builder.create_string(event.kind)),
        event_id: (!event.event_id.is_empty()).then(|| builder.create_string(event.event_id)),
        value: (!event.value.is_nan()).then_some(event.value),
        time_ms: event.time_ms,
        context: context_offset(builder, event.context),
    };
    schema::Event::create(builder, &args)
}

fn put_events_offset<'a>(
    builder: &mut FlatBufferBuilder<'a>,
    events: &[WIPOffset<schema::Event<'a>>],
    durable: bool,
    deadline: Option<Duration>,
) -> WIPOffset<UnionWIPOffset> {
    let events = Some(builder.create_vector(events));
    let args = schema::PutEventsArgs { events, durable, deadline_us: us(deadline) };
    schema::PutEvents::create(builder, &args).as_union_value()
}

type ContextOffset<'a> = WIPOffset<Vector<'a, ForwardsUOffset<schema::Pair<'a>>>>;

fn context_offset<'a>(builder: &mut FlatBufferBuilder<'a>, context: &[(&str, &str)]) -> Option<ContextOffset<'a>> {
    if context.is_empty() {
        return None;
    }
    let mut pairs: SmallVec<[_; 16]> = SmallVec::new();
    for (key, value) in context {
        let args =
            schema::PairArgs { key: Some(builder.create_string(key)), value: Some(builder.create_string(value)) };
        pairs.push(schema::Pair::create(builder, &args));
    }
    Some(builder.create_vector(&pairs))
}

fn strings_offset<'a>(
    builder: &mut FlatBufferBuilder<'a>,
    strings: &[&str],
) -> Option<WIPOffset<Vector<'a, ForwardsUOffset<&'a str>>>> {
    if strings.is_empty() {
        return None;
    }
    let strings: Vec<_> = strings.iter().map(|string| builder.create_string(string)).collect();
    Some(builder.create_vector(&strings))
}

fn filter_offset<'a>(
    builder: &mut FlatBufferBuilder<'a>,
    conditions: &[(&str, Demand<'_>)],
) -> Option<WIPOffset<Conditions<'a>>> {
    if conditions.is_empty() {
        return None;
    }
    let mut out: SmallVec<[_; 8]> = SmallVec::new();
    for (column, demand) in conditions {
        let mut args = schema::ConditionArgs { column: Some(builder.create_string(column)), ..Default::default() };
        match demand {
            Demand::Number(number) => args.eq = Some(*number),
            Demand::Values(values) => {
                let values: Vec<_> = values.iter().map(|value| builder.create_string(value)).collect();
                args.values = Some(builder.create_vector(&values));
            }
            Demand::Compare(Compare { lt, le, gt, ge, missing }) => {
                (args.lt, args.le, args.gt, args.ge, args.missing) = (*lt, *le, *gt, *ge, *missing);
            }
        }
        out.push(schema::Condition::create(builder, &args));
    }
    Some(builder.create_vector(&out))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Value;
    use crate::state::change;
    use proptest::prelude::*;

    fn described(frame: &[u8]) -> Result<(u64, String), Malformed> {
        decode(frame, |id, request| (id, format!("{request:?}")))
    }

    proptest! {
        #[test]
        fn round_trip(
            id in any::<u64>(), user in "[a-z0-9]{1,20}", n in any::<u32>(), query in prop::option::of("\\PC{0,20}"),
            context in prop::collection::vec(("[a-z]{0,5}", "\\PC{0,5}"), 0..10), flags in any::<[bool; 3]>(),
            vector in prop::collection::vec(-1f32..1.0, 0..20), items in prop::collection::vec("[a-z]{1,5}", 0..20),
            bounds in prop::collection::vec(prop::option::of(any::<f64>()), 4), params in (1u32..9, 1f32..9.0, 1u32..9),
        ) {
            let mut builder = FlatBufferBuilder::new();
            let context: Vec<(&str, &str)> = context.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
            let items: Vec<&str> = items.iter().map(String::as_str).collect();
            let deadline = flags[0].then(|| Duration::from_micros(77));
            let compare = Compare {
                lt: bounds[0], le: bounds[1], gt: bounds[2], ge: bounds[3], missing: flags[1].then_some(flags[2]),
            };
            let conditions = [
                ("year", Demand::Compare(compare)), ("tags", Demand::Values(&items)), ("price", Demand::Number(0.0)),
                ("category", Demand::Values(&items[items.len() / 2..])), ("none", Demand::Values(&[])),
            ];
            let filter = SearchFilter {
                conditions: &conditions, exclude: &items, exclude_seen: flags[1].then_some(flags[0]),
            };
            let params = match flags[2] {
                true => SearchParams {
                    n_probes: Some(params.0), refine_ratio: Some(params.1), ef_search: Some(params.2),
                },
                false => SearchParams::default(),
            };
            let batch: Vec<f32> = vector.repeat(3);
            let event = |item_id, at: usize| Event {
                event_id: &user[at % 2..], user_id: &user, item_id, kind: "view", value: bounds.len() as f32,
                time_ms: at as i64, context: &context,
            };
            let events: Vec<Event<'_>> = items.iter().chain(&["i"]).enumerate().map(|(at, item)| event(*item, at + 1)).collect();
            let record = event::tests::record(&events, 0);
            let list = Value::List(items.clone());
            let columns = [("a", Value::Number(1.5)), ("b", Value::Text(&user)), ("c", list), ("d", Value::Missing)];
            let full = Change { columns: &columns, vector: flags[0].then_some(&vector), ..Change::of(&user) };
            let gone = Change { available: flags[2].then_some(false), ..full.clone() };
            let records = [
                change::tests::record(Kind::UpsertItems, &[gone, Change::of("i")]),
                change::tests::record(Kind::UpsertUsers, &[full]),
                change::tests::record(Kind::DeleteItems, &[Change::of("i"), Change::of(&user)]),
                change::tests::record(Kind::DeleteUsers, &[Change::of(&user)]),
            ];
            let change = |record| Request::Call(Call::Change(ChangeCall { record, durable: flags[0], deadline }));
            let calls = [
                Request::Health,
                Request::Call(Call::Recommend(RecommendCall {
                    user_id: &user, context: &context, n_items: n, query: query.as_deref(),
                    explain: flags[0], timings: flags[1], no_cache: flags[2], deadline,
                })),
                Request::Call(Call::Search(SearchCall { deadline, ..SearchCall::new(SearchBy::Vector(&vector), n) })),
                Request::Call(Call::Search(SearchCall {
                    filter, params, deadline, ..SearchCall::new(SearchBy::User(&user), n)
                })),
                Request::Call(Call::Search(SearchCall {
                    filter, deadline, ..SearchCall::new(SearchBy::Vectors { values: &batch, n: 3 }, n)
                })),
                Request::Call(Call::Rank(RankCall {
                    user_id: &user, context: &context, item_ids: &items, ranker: None, deadline,
                })),
                Request::Call(Call::Events(EventsCall { record: &record, durable: flags[1], deadline })),
                change(&records[0]), change(&records[1]), change(&records[2]), change(&records[3]),
            ];
            for call in &calls {
                let frame = encode(&mut builder, id, call).to_vec();
                prop_assert_eq!(described(&frame).unwrap(), (id, format!("{call:?}")));
            }
        }

        #[test]
        fn damage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = described(&bytes);
        }
    }

    #[test]
    fn mutations_of_valid_frames_never_panic() {
        let mut builder = FlatBufferBuilder::new();
        let call = RecommendCall { context: &[("a", "b")], query: Some("words"), ..RecommendCall::new("user", 5) };
        let frame = encode(&mut builder, 9, &Request::Call(Call::Recommend(call))).to_vec();
        for at in 0..frame.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut damaged = frame.clone();
                damaged[at] = value;
                let _ = described(&damaged);
            }
            let _ = described(&frame[..at]);
        }
    }

    #[test]
    fn limits_name_the_field() {
        let mut builder = FlatBufferBuilder::new();
        let mut error = |call| {
            let frame = encode(&mut builder, 3, &Request::Call(call)).to_vec();
            let malformed = described(&frame).unwrap_err();
            assert_eq!(malformed.request_id, 3);
            malformed.error.message.into_owned()
        };
        assert!(error(Call::Recommend(RecommendCall::new("", 1))).contains("user_id"));
        let long = "x".repeat(2000);
        let call = RecommendCall { query: Some(&long), ..RecommendCall::new("u", 1) };
        assert!(error(Call::Recommend(call)).contains("query"));
        let context = [("k", long.as_str()), ("l", long.as_str()), ("m", long.as_str())];
        let call = RecommendCall { context: &context, ..RecommendCall::new("u", 1) };
        assert!(error(Call::Recommend(call)).contains("context"));
        let many = vec![("k", "v"); 500];
        let call = RecommendCall { context: &many, ..RecommendCall::new("u", 1) };
        assert!(error(Call::Recommend(call)).contains("more than 64 pairs"));
        let vector = vec![0.0; 9000];
        let by = |by| Call::Search(SearchCall::new(by, 1));
        assert!(error(by(SearchBy::Vector(&vector))).contains("vector"));
        assert!(error(by(SearchBy::Vectors { values: &vector, n: 65 })).contains("more than 64 vectors"));
        let filtered = |filter| Call::Search(SearchCall { filter, ..SearchCall::new(SearchBy::User("u"), 1) });
        let conditions = [("a", Demand::Number(1.0)); 33];
        let filter = SearchFilter { conditions: &conditions, ..SearchFilter::default() };
        assert!(error(filtered(filter)).contains("more than 32 conditions"));
        let values = ["x"; 129];
        let conditions = [("a", Demand::Values(&values)), ("b", Demand::Values(&values))];
        let filter = SearchFilter { conditions: &conditions, ..SearchFilter::default() };
        assert!(error(filtered(filter)).contains("more than 256 values"));
        let conditions = [("", Demand::Number(1.0))];
        let filter = SearchFilter { conditions: &conditions, ..SearchFilter::default() };
        assert!(error(filtered(filter)).contains("column is empty"));
        let filter = SearchFilter { exclude: &["x"; 10_001], ..SearchFilter::default() };
        assert!(error(filtered(filter)).contains("more than 10000 items"));
        let mut error = |event: Event<'_>, n| {
            let frame = encode_events(&mut builder, 3, &vec![event; n], false, None).to_vec();
            described(&frame).unwrap_err().error.message.into_owned()
        };
        let event = |user| Event::new(user, "i", "view");
        assert_eq!(error(event("u"), 1001), "1001 events, expected 1 to 1000");
        assert!(error(event(""), 3).contains("events[0].user_id"));
    }

    #[test]
    fn an_answer_is_not_a_request() {
        let mut builder = FlatBufferBuilder::new();
        let frame = super::super::response::health(&mut builder, 4, true, "v").to_vec();
        assert_eq!(described(&frame).unwrap_err().error.message, "not a request");
        assert_eq!(described(b"garbage that is long enough").unwrap_err().request_id, 0);
    }
}
