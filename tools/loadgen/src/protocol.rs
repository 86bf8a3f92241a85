//! Requests and answers of the two protocols.

use flatbuffers::FlatBufferBuilder;
use tastemaker::api::{Call, Event, RecommendCall};
use tastemaker::wire::client::{Answer, decode};
use tastemaker::wire::frame::{self, PREFIX, Split};
use tastemaker::wire::request::{Request, encode, encode_events};

use crate::Options;

/// What an answer said.
#[derive(Debug, Default, PartialEq)]
pub struct Seen {
    /// As in the request; 0 for HTTP.
    pub id: u64,
    /// Name of the error, if it is one.
    pub error: Option<String>,
    /// Slate length.
    pub items: usize,
    /// miss, l1, bypass.
    pub cache: String,
    /// `stage:reason`
    pub degraded: Vec<String>,
    /// Stage and microseconds.
    pub timings: Vec<(String, f32)>,
}

/// Writes requests and reads answers.
pub enum Protocol {
    /// FlatBuffers frames.
    Binary(FlatBufferBuilder<'static>),
    /// HTTP/1.1 with JSON.
    Http {
        /// The Host header.
        host: String,
    },
}

impl Protocol {
    /// Appends a request for `user`, or events of the user.
    pub fn write(&mut self, options: &Options, id: u64, user: &str, out: &mut Vec<u8>) {
        if options.events > 0 {
            return self.write_events(options, id, user, out);
        }
        match self {
            Protocol::Binary(builder) => {
                let call = RecommendCall {
                    query: options.query.as_deref(),
                    timings: options.timings,
                    no_cache: options.no_cache,
                    ..RecommendCall::new(user, options.n_items)
                };
                frame::append(out, encode(builder, id, &Request::Call(Call::Recommend(call))));
            }
            Protocol::Http { host } => {
                let mut body = serde_json::json!({ "user_id": user, "n_items": options.n_items });
                if let Some(query) = &options.query {
                    body["query"] = query.as_str().into();
                }
                if options.no_cache {
                    body["no_cache"] = true.into();
                }
                post(host, "/v1/recommend", &body.to_string(), out);
            }
        }
    }

    fn write_events(&mut self, options: &Options, id: u64, user: &str, out: &mut Vec<u8>) {
        let number = |at: u32| (id * 1000 + u64::from(at)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
        let items: Vec<String> = (0..options.events)
            .map(|at| format!("{}{}", options.item_prefix, number(at) % options.n_event_items))
            .collect();
        match self {
            Protocol::Binary(builder) => {
                let events: Vec<Event<'_>> = items.iter().map(|item| Event::new(user, item, "view")).collect();
                frame::append(out, encode_events(builder, id, &events, options.durable, None));
            }
            Protocol::Http { host } => {
                let events: Vec<_> = items
                    .iter()
                    .map(|item| serde_json::json!({ "user_id": user, "item_id": item, "kind": "view" }))
                    .collect();
                let body = serde_json::json!({ "events": events, "durable": options.durable });
                post(host, "/v1/events", &body.to_string(), out);
            }
        }
    }

    /// The answer at the front of `input` and its length; `None` while it is not whole.
    ///
    /// # Errors
    /// What came is no answer.
    pub fn read(&self, input: &[u8]) -> Result<Option<(Seen, usize)>, String> {
        match self {
            Protocol::Binary(_) => match frame::split(input, 64 << 20) {
                Split::Partial { .. } => Ok(None),
                Split::TooLarge { len } => Err(format!("a frame of {len} bytes")),
                Split::Frame(message) => {
                    let (id, answer) = decode(message).map_err(|e| e.to_string())?;
                    let seen = match answer {
                        Answer::Slate(slate) => Seen {
                            id,
                            error: None,
                            items: slate.items.len(),
                            cache: slate.cache,
                            degraded: slate.degraded.iter().map(|(s, r)| format!("{s}:{r}")).collect(),
                            timings: slate.timings,
                        },
                        Answer::Received(receipt) => Seen { id, items: receipt.accepted as usize, ..Seen::default() },
                        Answer::Error { name, .. } => Seen { id, error: Some(name), ..Seen::default() },
                        other => return Err(format!("unexpected {other:?}")),
                    };
                    Ok(Some((seen, PREFIX + message.len())))
                }
            },
            Protocol::Http { .. } => http_answer(input),
        }
    }
}

fn post(host: &str, path: &str, body: &str, out: &mut Vec<u8>) {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    out.extend_from_slice(head.as_bytes());
    out.extend_from_slice(body.as_bytes());
}

fn http_answer(input: &[u8]) -> Result<Option<(Seen, usize)>, String> {
    let Some(end) = input.windows(4).position(|w| w == b"\r\n\r\n") else { return Ok(None) };
    let head = std::str::from_utf8(&input[..end]).map_err(|_| "headers are not text")?;
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|l| l.split(' ').nth(1)).unwrap_or("?").to_owned();
    let length = lines
        .filter_map(|l| l.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse::<usize>().ok())
        .ok_or("an answer without content-length")?;
    let Some(body) = input.get(end + 4..end + 4 + length) else { return Ok(None) };
    let mut seen = Seen::default();
    if status == "200" {
        // The whole body is not parsed: the harness shares the machine with what it measures.
        seen.items = count(body, b"\"item_id\"");
        let cache = find(body, b"\"cache\":\"").map(|at| &body[at..]);
        seen.cache = cache
            .and_then(|c| c.split(|&b| b == b'"').next())
            .map_or_else(String::new, |c| String::from_utf8_lossy(c).into_owned());
    } else {
        seen.error = Some(status);
    }
    Ok(Some((seen, end + 4 + length)))
}

fn find(body: &[u8], what: &[u8]) -> Option<usize> {
    body.windows(what.len()).position(|w| w == what).map(|at| at + what.len())
}

fn count(body: &[u8], what: &[u8]) -> usize {
    body.windows(what.len()).filter(|w| *w == what).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_answers_are_split_where_they_end() {
        let one = b"HTTP/1.1 200 OK\r\nContent-Length: 42\r\n\r\n{\"items\":[{\"item_id\":1}],\"cache\":\"miss\"}  ";
        let mut two = one.to_vec();
        two.extend_from_slice(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 2\r\n\r\n{}");
        for cut in 0..one.len() {
            assert_eq!(http_answer(&one[..cut]), Ok(None), "{cut}");
        }
        let (seen, used) = http_answer(&two).unwrap().unwrap();
        assert_eq!((seen.items, seen.cache.as_str(), used), (1, "miss", one.len()));
        let (seen, _) = http_answer(&two[used..]).unwrap().unwrap();
        assert_eq!(seen.error.as_deref(), Some("429"));
        assert!(http_answer(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
    }
}
