//! Events and their encoding in the log: what a shard makes of a call, and what the writer and a replay read.

use smallvec::SmallVec;

use crate::error::{Code, Error};
use crate::wire::LIMITS;

/// Longest name of a kind, bytes.
pub const MAX_KIND_BYTES: usize = 64;
/// Events that one call may carry.
pub const MAX_EVENTS: usize = 1000;
/// How far ahead of the server's clock an event's time may be, milliseconds.
const MAX_AHEAD_MS: i64 = 24 * 3600 * 1000;

/// Something that a user did with an item.
#[derive(Clone, Debug, PartialEq)]
pub struct Event<'a> {
    /// Chosen by the client; the same id of the same user takes effect once. Empty: always takes effect.
    pub event_id: &'a str,
    /// 1 to 256 bytes; need not be known.
    pub user_id: &'a str,
    /// 1 to 256 bytes; of an unknown item the event is logged and changes nothing.
    pub item_id: &'a str,
    /// 1 to 64 bytes, as in `events.kinds`.
    pub kind: &'a str,
    /// As of a rating; NaN: none.
    pub value: f32,
    /// When it happened, milliseconds since 1970; 0: on arrival.
    pub time_ms: i64,
    /// The request context that it happened in.
    pub context: Context<'a>,
}

/// Keys and values.
pub type Context<'a> = SmallVec<[(&'a str, &'a str); 4]>;

/// Checks the events of a call and encodes them; `now_ms` is milliseconds since 1970.
///
/// # Errors
/// None, too many, or the first event that is not as [`Event`] says, with its place.
pub fn encode<'a>(
    events: impl ExactSizeIterator<Item = Event<'a>>,
    now_ms: i64,
    out: &mut Vec<u8>,
) -> Result<u32, Error> {
    let n = events.len();
    if !(1..=MAX_EVENTS).contains(&n) {
        let code = if n == 0 { Code::BadRequest } else { Code::TooLarge };
        return Err(Error::new(code, format!("{n} events, expected 1 to {MAX_EVENTS}")));
    }
    for (at, event) in events.enumerate() {
        check(&event, now_ms).map_err(|reason| Error::new(Code::BadRequest, format!("events[{at}].{reason}")))?;
        let time = if event.time_ms == 0 { now_ms } else { event.time_ms };
        out.extend_from_slice(&time.to_le_bytes());
        out.extend_from_slice(&event.value.to_le_bytes());
        for text in [event.event_id, event.user_id, event.item_id, event.kind] {
            put(text, out);
        }
        out.push(event.context.len() as u8);
        for (key, value) in &event.context {
            put(key, out);
            put(value, out);
        }
    }
    Ok(n as u32)
}

fn put(text: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(&(text.len() as u16).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn check(event: &Event<'_>, now_ms: i64) -> Result<(), &'static str> {
    let within = |text: &str, most: usize| (1..=most).contains(&text.len());
    if !within(event.user_id, LIMITS.id_bytes) {
        return Err("user_id is empty or longer than 256 bytes");
    }
    if !within(event.item_id, LIMITS.id_bytes) {
        return Err("item_id is empty or longer than 256 bytes");
    }
    if event.event_id.len() > LIMITS.id_bytes {
        return Err("event_id is longer than 256 bytes");
    }
    if !within(event.kind, MAX_KIND_BYTES) {
        return Err("kind is empty or longer than 64 bytes");
    }
    if event.value.is_infinite() {
        return Err("value is not finite");
    }
    if event.time_ms < 0 || event.time_ms > now_ms.saturating_add(MAX_AHEAD_MS) {
        return Err("time_ms is before 1970 or more than a day ahead");
    }
    if event.context.len() > LIMITS.context_pairs {
        return Err("context has more than 64 pairs");
    }
    let bytes = event.context.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>();
    match bytes <= LIMITS.context_bytes {
        true => Ok(()),
        false => Err("context is longer than 4096 bytes"),
    }
}

/// Hands every event of a record to `take`.
///
/// # Errors
/// The record is not what [`encode`] makes; events before the place were handed over.
pub fn decode<'a>(mut record: &'a [u8], mut take: impl FnMut(Event<'a>)) -> Result<(), Damaged> {
    let input = &mut record;
    while !input.is_empty() {
        let time_ms = i64::from_le_bytes(*bytes(input)?);
        let value = f32::from_le_bytes(*bytes(input)?);
        let [event_id, user_id, item_id, kind] = [text(input)?, text(input)?, text(input)?, text(input)?];
        let &[n] = bytes(input)?;
        let mut context = Context::new();
        for _ in 0..n {
            context.push((text(input)?, text(input)?));
        }
        take(Event { event_id, user_id, item_id, kind, value, time_ms, context });
    }
    Ok(())
}

/// A record that does not decode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a record of events")]
pub struct Damaged;

fn bytes<'a, const N: usize>(input: &mut &'a [u8]) -> Result<&'a [u8; N], Damaged> {
    let (head, rest) = input.split_first_chunk().ok_or(Damaged)?;
    *input = rest;
    Ok(head)
}

fn text<'a>(input: &mut &'a [u8]) -> Result<&'a str, Damaged> {
    let len = usize::from(u16::from_le_bytes(*bytes(input)?));
    let (head, rest) = input.split_at_checked(len).ok_or(Damaged)?;
    *input = rest;
    std::str::from_utf8(head).map_err(|_| Damaged)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An event without id, value and time.
    pub fn event<'a>(user_id: &'a str, item_id: &'a str, kind: &'a str) -> Event<'a> {
        Event { event_id: "", user_id, item_id, kind, value: f32::NAN, time_ms: 0, context: Context::new() }
    }

    /// One record of the events.
    pub fn record(events: &[Event<'_>], now_ms: i64) -> Vec<u8> {
        let mut out = Vec::new();
        encode(events.iter().cloned(), now_ms, &mut out).unwrap();
        out
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(
            ids in prop::collection::vec(("[a-z]{0,9}", "[a-zä]{1,9}", "[0-9]{1,4}", "[a-z]{1,8}", -9f32..9.0, 0i64..99), 1..9),
            pairs in prop::collection::vec(("[a-z]{0,4}", "[a-z]{0,4}"), 0..4), cut in any::<prop::sample::Index>(),
        ) {
            let events: Vec<Event<'_>> = ids.iter().map(|(id, user, item, kind, value, time)| Event {
                event_id: id, user_id: user, item_id: item, kind, value: *value, time_ms: *time,
                context: pairs.iter().map(|(k, v)| (&**k, &**v)).collect(),
            }).collect();
            let record = record(&events, 5);
            let mut back = Vec::new();
            decode(&record, |event| back.push(format!("{event:?}"))).unwrap();
            let on_arrival = |mut e: Event<'_>| {
                e.time_ms = if e.time_ms == 0 { 5 } else { e.time_ms };
                format!("{e:?}")
            };
            let want: Vec<_> = events.into_iter().map(on_arrival).collect();
            prop_assert_eq!(back, want);
            // Cut anywhere but between events it is damaged, and never panics.
            let _ = decode(&record[..cut.index(record.len())], |_| {});
        }

        #[test]
        fn damage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes, |_| {});
        }
    }

    #[test]
    fn errors_name_the_place() {
        let refused = |event: Event<'_>| {
            let good = self::event("u", "i", "view");
            encode([good, event].into_iter(), 0, &mut Vec::new()).unwrap_err().to_string()
        };
        let good = || event("u", "i", "view");
        assert_eq!(refused(event("", "i", "view")), "bad_request: events[1].user_id is empty or longer than 256 bytes");
        assert!(refused(event("u", &"i".repeat(257), "view")).contains("events[1].item_id"));
        assert!(refused(event("u", "i", "")).contains("events[1].kind"));
        assert!(refused(Event { value: f32::INFINITY, ..good() }).contains("events[1].value"));
        assert!(refused(Event { time_ms: MAX_AHEAD_MS + 1, ..good() }).contains("events[1].time_ms"));
        assert!(refused(Event { time_ms: -1, ..good() }).contains("events[1].time_ms"));
        assert_eq!(encode([].into_iter(), 0, &mut Vec::new()).unwrap_err().code, Code::BadRequest);
        let many = std::iter::repeat_n(good(), MAX_EVENTS + 1);
        assert_eq!(encode(many, 0, &mut Vec::new()).unwrap_err().code, Code::TooLarge);
    }
}
