//! Events and their encoding in the log: what a shard makes of a call, and what the writer and a replay read.

use smallvec::SmallVec;

use super::change::Record;
use crate::error::{Code, Error};
use crate::wire::LIMITS;

/// Longest name of a kind, bytes.
pub const MAX_KIND_BYTES: usize = 64;
/// Events that one call may carry.
pub const MAX_EVENTS: usize = 1000;
/// How far ahead of the server's clock an event's time may be, milliseconds.
const MAX_AHEAD_MS: i64 = 24 * 3600 * 1000;

/// Something that a user did with an item.
#[derive(Clone, Copy, Debug, PartialEq)]
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
    /// The request context that it happened in: keys and values.
    pub context: &'a [(&'a str, &'a str)],
}

impl<'a> Event<'a> {
    /// An event on arrival, without id, value and context.
    pub fn new(user_id: &'a str, item_id: &'a str, kind: &'a str) -> Self {
        Event { event_id: "", user_id, item_id, kind, value: f32::NAN, time_ms: 0, context: &[] }
    }
}

/// Checks the events of a call and makes a record of them.
#[derive(Debug)]
pub struct Encoder {
    now_ms: i64,
    n: usize,
    record: Vec<u8>,
}

impl Encoder {
    /// For a call of `n` events; `now_ms` is milliseconds since 1970.
    ///
    /// # Errors
    /// None or too many.
    pub fn new(n: usize, now_ms: i64) -> Result<Self, Error> {
        let code = match n {
            1..=MAX_EVENTS => {
                let mut record = Vec::with_capacity(1 + 64 * n);
                record.push(Record::EVENTS);
                return Ok(Encoder { now_ms, n: 0, record });
            }
            0 => Code::BadRequest,
            _ => Code::TooLarge,
        };
        Err(Error::new(code, format!("{n} events, expected 1 to {MAX_EVENTS}")))
    }

    /// Appends an event.
    ///
    /// # Errors
    /// It is not as [`Event`] says; the text names its place.
    pub fn push(&mut self, event: &Event<'_>) -> Result<(), Error> {
        let (at, out) = (self.n, &mut self.record);
        check(event, self.now_ms).map_err(|reason| Error::new(Code::BadRequest, format!("events[{at}].{reason}")))?;
        let time = if event.time_ms == 0 { self.now_ms } else { event.time_ms };
        out.extend_from_slice(&time.to_le_bytes());
        // One NaN for all: records of the same events are the same.
        let value = if event.value.is_nan() { f32::NAN } else { event.value };
        out.extend_from_slice(&value.to_le_bytes());
        for text in [event.event_id, event.user_id, event.item_id, event.kind] {
            put(text, out);
        }
        out.push(event.context.len() as u8);
        for (key, value) in event.context {
            put(key, out);
            put(value, out);
        }
        self.n += 1;
        Ok(())
    }

    /// What the log takes.
    pub fn record(self) -> Vec<u8> {
        self.record
    }
}

pub(super) fn put(text: &str, out: &mut Vec<u8>) {
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
/// The record is not what [`Encoder`] makes; events before the place were handed over.
pub fn decode(record: &[u8], take: impl FnMut(&Event<'_>)) -> Result<(), Damaged> {
    match Record::of(record)? {
        Record::Events(body) => decode_body(body, take),
        _ => Err(Damaged),
    }
}

/// The same of what follows the record's kind, which is the whole record in format 1 of the log.
///
/// # Errors
/// As [`decode`].
pub fn decode_body(mut body: &[u8], mut take: impl FnMut(&Event<'_>)) -> Result<(), Damaged> {
    let input = &mut body;
    while !input.is_empty() {
        let time_ms = i64::from_le_bytes(*bytes(input)?);
        let value = f32::from_le_bytes(*bytes(input)?);
        let [event_id, user_id, item_id, kind] = [text(input)?, text(input)?, text(input)?, text(input)?];
        let &[n] = bytes(input)?;
        let mut context: SmallVec<[_; 8]> = SmallVec::new();
        for _ in 0..n {
            context.push((text(input)?, text(input)?));
        }
        take(&Event { event_id, user_id, item_id, kind, value, time_ms, context: &context });
    }
    Ok(())
}

/// A record that does not decode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a record of the log")]
pub struct Damaged;

pub(super) fn bytes<'a, const N: usize>(input: &mut &'a [u8]) -> Result<&'a [u8; N], Damaged> {
    let (head, rest) = input.split_first_chunk().ok_or(Damaged)?;
    *input = rest;
    Ok(head)
}

pub(super) fn text<'a>(input: &mut &'a [u8]) -> Result<&'a str, Damaged> {
    let len = usize::from(u16::from_le_bytes(*bytes(input)?));
    let (head, rest) = input.split_at_checked(len).ok_or(Damaged)?;
    *input = rest;
    std::str::from_utf8(head).map_err(|_| Damaged)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// One record of the events.
    pub fn record(events: &[Event<'_>], now_ms: i64) -> Vec<u8> {
        let mut encoder = Encoder::new(events.len(), now_ms).unwrap();
        events.iter().for_each(|event| encoder.push(event).unwrap());
        encoder.record()
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(
            ids in prop::collection::vec(("[a-z]{0,9}", "[a-zä]{1,9}", "[0-9]{1,4}", "[a-z]{1,8}", -9f32..9.0, 0i64..99), 1..9),
            pairs in prop::collection::vec(("[a-z]{0,4}", "[a-z]{0,4}"), 0..4), cut in any::<prop::sample::Index>(),
        ) {
            let pairs: Vec<(&str, &str)> = pairs.iter().map(|(k, v)| (&**k, &**v)).collect();
            let events: Vec<Event<'_>> = ids.iter().map(|(id, user, item, kind, value, time)| Event {
                event_id: id, user_id: user, item_id: item, kind, value: *value, time_ms: *time,
                context: &pairs,
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
            let _ = decode_body(&bytes, |_| {});
        }
    }

    #[test]
    fn errors_name_the_place() {
        let good = || Event::new("u", "i", "view");
        let refused = |event: Event<'_>| {
            let mut encoder = Encoder::new(2, 0).unwrap();
            encoder.push(&good()).unwrap();
            encoder.push(&event).unwrap_err().to_string()
        };
        assert_eq!(
            refused(Event::new("", "i", "view")),
            "bad_request: events[1].user_id is empty or longer than 256 bytes"
        );
        assert!(refused(Event::new("u", &"i".repeat(257), "view")).contains("events[1].item_id"));
        assert!(refused(Event::new("u", "i", "")).contains("events[1].kind"));
        assert!(refused(Event { value: f32::INFINITY, ..good() }).contains("events[1].value"));
        assert!(refused(Event { time_ms: MAX_AHEAD_MS + 1, ..good() }).contains("events[1].time_ms"));
        assert!(refused(Event { time_ms: -1, ..good() }).contains("events[1].time_ms"));
        assert_eq!(Encoder::new(0, 0).unwrap_err().code, Code::BadRequest);
        assert_eq!(Encoder::new(MAX_EVENTS + 1, 0).unwrap_err().code, Code::TooLarge);
    }
}
