//! Requests: verified once, then read in place.

use std::time::Duration;

use flatbuffers::{FlatBufferBuilder, ForwardsUOffset, Vector, WIPOffset};
use smallvec::SmallVec;

use super::schema::{self, Body};
use super::{LIMITS, verifier};
use crate::api::{Call, RankCall, RecommendCall, SearchBy, SearchCall};
use crate::error::{Code, Error};

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

/// Tables that are verified: context pairs beyond their limit are then refused by name and not as damage.
const MAX_TABLES: usize = 4096;

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
        let by = if let Some(vector) = search.vector() {
            if vector.len() > LIMITS.vector_values {
                return Err(wrong(Error::fixed(Code::TooLarge, "vector has more than 8192 values")));
            }
            values.extend(vector.iter());
            SearchBy::Vector(&values)
        } else if let Some(item) = search.item_id() {
            SearchBy::Item(id(item, "item_id is empty or longer than 256 bytes").map_err(wrong)?)
        } else if let Some(user) = search.user_id() {
            SearchBy::User(id(user, "user_id is empty or longer than 256 bytes").map_err(wrong)?)
        } else {
            SearchBy::Text(query(search.text()).map_err(wrong)?.unwrap_or_default())
        };
        let call = SearchCall { by, k: search.k(), deadline: budget(search.deadline_us()) };
        return Ok(then(request_id, Request::Call(Call::Search(call))));
    }
    if let Some(rank) = message.body_as_rank() {
        let context = pairs(rank.context()).map_err(wrong)?;
        let items = rank.item_ids();
        if items.len() > LIMITS.items {
            return Err(wrong(Error::fixed(Code::TooLarge, "more than 10000 items")));
        }
        let mut item_ids: SmallVec<[&str; 64]> = SmallVec::with_capacity(items.len());
        for item in items.iter() {
            item_ids.push(id(item, "an item id is empty or longer than 256 bytes").map_err(wrong)?);
        }
        let call = RankCall {
            user_id: id(rank.user_id(), "user_id is empty or longer than 256 bytes").map_err(wrong)?,
            context: &context,
            item_ids: &item_ids,
            ranker: rank.ranker(),
            deadline: budget(rank.deadline_us()),
        };
        return Ok(then(request_id, Request::Call(Call::Rank(call))));
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
    let us =
        |deadline: Option<Duration>| deadline.map_or(0, |d| u32::try_from(d.as_micros()).unwrap_or(u32::MAX).max(1));
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
            let mut args = schema::SearchArgs { k: call.k, deadline_us: us(call.deadline), ..Default::default() };
            match call.by {
                SearchBy::Vector(values) => args.vector = Some(builder.create_vector(values)),
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
    };
    super::response::finish(builder, request_id, kind, body)
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

#[cfg(test)]
mod tests {
    use super::*;
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
        ) {
            let mut builder = FlatBufferBuilder::new();
            let context: Vec<(&str, &str)> = context.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
            let items: Vec<&str> = items.iter().map(String::as_str).collect();
            let deadline = flags[0].then(|| Duration::from_micros(77));
            let calls = [
                Request::Health,
                Request::Call(Call::Recommend(RecommendCall {
                    user_id: &user, context: &context, n_items: n, query: query.as_deref(),
                    explain: flags[0], timings: flags[1], no_cache: flags[2], deadline,
                })),
                Request::Call(Call::Search(SearchCall { by: SearchBy::Vector(&vector), k: n, deadline })),
                Request::Call(Call::Search(SearchCall { by: SearchBy::User(&user), k: n, deadline })),
                Request::Call(Call::Rank(RankCall {
                    user_id: &user, context: &context, item_ids: &items, ranker: None, deadline,
                })),
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
        assert!(
            error(Call::Search(SearchCall { by: SearchBy::Vector(&vector), k: 1, deadline: None })).contains("vector")
        );
    }

    #[test]
    fn an_answer_is_not_a_request() {
        let mut builder = FlatBufferBuilder::new();
        let frame = super::super::response::health(&mut builder, 4, true, "v").to_vec();
        assert_eq!(described(&frame).unwrap_err().error.message, "not a request");
        assert_eq!(described(b"garbage that is long enough").unwrap_err().request_id, 0);
    }
}
