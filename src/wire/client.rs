//! A blocking client of the binary protocol, for the command line, tools and tests.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use flatbuffers::FlatBufferBuilder;

use super::frame::{self, Split};
use super::request::{Request, encode, encode_changes, encode_events};
use super::{schema, verifier};
use crate::api::{Call, Change, Event, Kind, Receipt, RecommendCall, SearchCall};

/// Largest answer accepted, bytes.
const MAX_ANSWER: usize = 64 << 20;

/// What went wrong between client and server.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// The server answered what is not an answer.
    #[error("the server sent a malformed answer: {0}")]
    Malformed(String),
    /// The server answered with an error.
    #[error("{name} ({code}): {message}")]
    Server {
        /// As in HTTP.
        code: u16,
        /// Its name.
        name: String,
        /// For a person.
        message: String,
        /// Whether trying again may help.
        retryable: bool,
    },
}

/// An answer, owned.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// To Recommend.
    Slate(SlateAnswer),
    /// To Search and Rank: id, score, whether the item is known.
    Scored(Vec<(String, f32, bool)>),
    /// To Search of several vectors: the items of each query, as in `Scored`.
    Results(Vec<Vec<(String, f32, bool)>>),
    /// To PutEvents.
    Received(Receipt),
    /// To UpsertItems and the like.
    Changed(Receipt),
    /// To Health.
    Health {
        /// Whether calls are taken.
        ready: bool,
        /// The bundle.
        model_version: String,
    },
    /// A failed call.
    Error {
        /// As in HTTP.
        code: u16,
        /// Its name.
        name: String,
        /// For a person.
        message: String,
        /// Whether trying again may help.
        retryable: bool,
    },
}

/// A slate as it came over the wire.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SlateAnswer {
    /// In order.
    pub items: Vec<ItemAnswer>,
    /// The bundle.
    pub model_version: String,
    /// miss, l1 or bypass.
    pub cache: String,
    /// Stage and reason.
    pub degraded: Vec<(String, String)>,
    /// Stage and microseconds.
    pub timings: Vec<(String, f32)>,
    /// Whether the bundle has the user.
    pub known_user: bool,
    /// Share of the items that the search for nearest neighbours saw.
    pub coverage: f32,
}

/// One item of a slate.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ItemAnswer {
    /// Id.
    pub item_id: String,
    /// Score.
    pub score: f32,
    /// Bits as in the schema.
    pub sources: u8,
    /// Lines for a person; empty unless asked for.
    pub explanation: String,
}

impl fmt::Display for SlateAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "rank  score      item                  sources")?;
        for (at, item) in self.items.iter().enumerate() {
            let sources: Vec<&str> =
                crate::candidates::SourceSet(item.sources).iter().map(crate::candidates::Source::name).collect();
            write!(f, "{:>4}  {:<9.4}  {:<20}  {}", at + 1, item.score, item.item_id, sources.join(" "))?;
            if !item.explanation.is_empty() {
                write!(f, "  [{}]", item.explanation)?;
            }
            writeln!(f)?;
        }
        let user = if self.known_user { "known user" } else { "unknown user" };
        write!(f, "{}, {user}, cache {}", self.model_version, self.cache)?;
        for (stage, reason) in &self.degraded {
            write!(f, ", degraded: {stage} {reason}")?;
        }
        if !self.degraded.is_empty() && self.coverage < 1.0 {
            write!(f, ", coverage {:.2}", self.coverage)?;
        }
        if !self.timings.is_empty() {
            let times: Vec<String> = self.timings.iter().map(|(stage, us)| format!("{stage} {us:.0}")).collect();
            write!(f, "\nµs: {}", times.join(", "))?;
        }
        Ok(())
    }
}

/// A connection. Requests may be pipelined: send several, then receive.
pub struct Client {
    stream: TcpStream,
    builder: FlatBufferBuilder<'static>,
    received: Vec<u8>,
    next_id: u64,
}

impl Client {
    /// Connects; `timeout` bounds connecting and every read and write after it.
    ///
    /// # Errors
    /// As the operating system says.
    pub fn connect(addr: SocketAddr, timeout: Duration) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&addr, timeout)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        Ok(Client { stream, builder: FlatBufferBuilder::new(), received: Vec::new(), next_id: 1 })
    }

    /// Sends a request; returns the id that its answer will carry.
    ///
    /// # Errors
    /// The connection broke.
    pub fn send(&mut self, request: &Request<'_>) -> io::Result<u64> {
        let id = self.next_id;
        self.next_id += 1;
        let message = encode(&mut self.builder, id, request);
        write(&mut self.stream, message)?;
        Ok(id)
    }

    /// Receives the next answer, whichever request it is for.
    ///
    /// # Errors
    /// The connection broke, or the answer is malformed.
    pub fn receive(&mut self) -> Result<(u64, Answer), ClientError> {
        loop {
            match frame::split(&self.received, MAX_ANSWER) {
                Split::Frame(message) => {
                    let (answer, used) = (decode(message), message.len() + frame::PREFIX);
                    self.received.drain(..used);
                    return answer;
                }
                Split::TooLarge { len } => return Err(ClientError::Malformed(format!("a frame of {len} bytes"))),
                Split::Partial { .. } => {
                    let mut chunk = [0; 16 << 10];
                    match self.stream.read(&mut chunk) {
                        Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                        Ok(n) => self.received.extend_from_slice(&chunk[..n]),
                        Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                        Err(e) => return Err(e.into()),
                    }
                }
            }
        }
    }

    /// One request and its answer.
    ///
    /// # Errors
    /// The connection broke, or another request's answer came: nothing may be in flight.
    pub fn call(&mut self, request: &Request<'_>) -> Result<Answer, ClientError> {
        let id = self.send(request)?;
        self.answer(id)
    }

    fn answer(&mut self, id: u64) -> Result<Answer, ClientError> {
        match self.receive()? {
            (answered, answer) if answered == id || answered == 0 => Ok(answer),
            (answered, _) => Err(ClientError::Malformed(format!("answer to {answered}, expected {id}"))),
        }
    }

    /// A slate.
    ///
    /// # Errors
    /// As [`Self::call`], or the server's own.
    pub fn recommend(&mut self, call: &RecommendCall<'_>) -> Result<SlateAnswer, ClientError> {
        match self.call(&Request::Call(Call::Recommend(*call)))? {
            Answer::Slate(slate) => Ok(slate),
            other => Err(unexpected(other)),
        }
    }

    /// Tells what users did; `durable` waits for the disk.
    ///
    /// # Errors
    /// As [`Self::call`], or the server's own.
    pub fn put_events(&mut self, events: &[Event<'_>], durable: bool) -> Result<Receipt, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        let message = encode_events(&mut self.builder, id, events, durable, None);
        write(&mut self.stream, message)?;
        match self.answer(id)? {
            Answer::Received(receipt) => Ok(receipt),
            other => Err(unexpected(other)),
        }
    }

    /// Changes items or users, as `kind` says; `durable` waits for the disk.
    ///
    /// # Errors
    /// As [`Self::call`], or the server's own.
    pub fn change(&mut self, kind: Kind, changes: &[Change<'_>], durable: bool) -> Result<Receipt, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        let message = encode_changes(&mut self.builder, id, kind, changes, durable, None);
        write(&mut self.stream, message)?;
        match self.answer(id)? {
            Answer::Changed(receipt) => Ok(receipt),
            other => Err(unexpected(other)),
        }
    }

    /// Takes items away; `durable` waits for the disk.
    ///
    /// # Errors
    /// As [`Self::change`].
    pub fn delete_items(&mut self, ids: &[&str], durable: bool) -> Result<Receipt, ClientError> {
        let changes: Vec<Change<'_>> = ids.iter().map(|id| Change::of(id)).collect();
        self.change(Kind::DeleteItems, &changes, durable)
    }

    /// The items and scores of each query, best first; one list, unless the call has several vectors.
    ///
    /// # Errors
    /// As [`Self::call`], or the server's own.
    pub fn search(&mut self, call: &SearchCall<'_>) -> Result<Vec<Vec<(String, f32)>>, ClientError> {
        let results = match self.call(&Request::Call(Call::Search(*call)))? {
            Answer::Scored(items) => vec![items],
            Answer::Results(results) => results,
            other => return Err(unexpected(other)),
        };
        let scored = |items: Vec<(String, f32, bool)>| items.into_iter().map(|(id, score, _)| (id, score)).collect();
        Ok(results.into_iter().map(scored).collect())
    }
}

fn write(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let mut out = Vec::with_capacity(message.len() + frame::PREFIX);
    frame::append(&mut out, message);
    stream.write_all(&out)
}

fn unexpected(answer: Answer) -> ClientError {
    match answer {
        Answer::Error { code, name, message, retryable } => ClientError::Server { code, name, message, retryable },
        other => ClientError::Malformed(format!("{other:?}")),
    }
}

/// Decodes an answer.
///
/// # Errors
/// Not a FlatBuffer of this schema, or a request.
pub fn decode(message: &[u8]) -> Result<(u64, Answer), ClientError> {
    if message.len() < 8 || !schema::message_buffer_has_identifier(message) {
        return Err(ClientError::Malformed("not a TSTM message".into()));
    }
    let message = schema::root_as_message_with_opts(&verifier(1_000_000), message)
        .map_err(|e| ClientError::Malformed(e.to_string()))?;
    let answer = if let Some(slate) = message.body_as_slate() {
        Answer::Slate(SlateAnswer {
            items: slate
                .items()
                .iter()
                .map(|item| ItemAnswer {
                    item_id: item.item_id().to_owned(),
                    score: item.score(),
                    sources: item.sources(),
                    explanation: item.explanation().map(described).unwrap_or_default(),
                })
                .collect(),
            model_version: slate.model_version().to_owned(),
            cache: slate.cache().variant_name().unwrap_or("?").to_lowercase(),
            degraded: pairs(slate.degraded()),
            timings: slate
                .timings()
                .map(|t| t.iter().map(|t| (t.stage().to_owned(), t.us())).collect())
                .unwrap_or_default(),
            known_user: slate.known_user(),
            coverage: slate.coverage(),
        })
    } else if let Some(scored) = message.body_as_scored_items() {
        let mut items = scored.items().iter().map(|i| (i.item_id().to_owned(), i.score(), i.known()));
        match scored.result_lengths() {
            None => Answer::Scored(items.collect()),
            Some(lengths) => {
                if lengths.iter().map(u64::from).sum::<u64>() != scored.items().len() as u64 {
                    return Err(ClientError::Malformed("result_lengths are not those of the items".into()));
                }
                Answer::Results(lengths.iter().map(|n| items.by_ref().take(n as usize).collect()).collect())
            }
        }
    } else if let Some(receipt) = message.body_as_events_receipt() {
        Answer::Received(Receipt {
            accepted: receipt.accepted(),
            duplicates: receipt.duplicates(),
            unknown: receipt.unknown_items(),
            durable: receipt.durable(),
            ..Receipt::default()
        })
    } else if let Some(receipt) = message.body_as_change_receipt() {
        Answer::Changed(Receipt {
            accepted: receipt.accepted(),
            created: receipt.created(),
            unknown: receipt.unknown(),
            durable: receipt.durable(),
            ..Receipt::default()
        })
    } else if let Some(health) = message.body_as_health_status() {
        Answer::Health { ready: health.ready(), model_version: health.model_version().unwrap_or_default().to_owned() }
    } else if let Some(error) = message.body_as_error() {
        Answer::Error {
            code: error.code(),
            name: error.name().to_owned(),
            message: error.message().to_owned(),
            retryable: error.retryable(),
        }
    } else {
        return Err(ClientError::Malformed("a request".into()));
    };
    Ok((message.request_id(), answer))
}

fn pairs(
    degraded: Option<flatbuffers::Vector<'_, flatbuffers::ForwardsUOffset<schema::Degraded<'_>>>>,
) -> Vec<(String, String)> {
    let entries = degraded.into_iter().flatten();
    entries.map(|d| (d.stage().to_owned(), d.reason().to_owned())).collect()
}

fn described(explanation: schema::ItemExplanation<'_>) -> String {
    let mut parts = Vec::new();
    for evidence in explanation.evidence().into_iter().flatten() {
        parts.push(format!("{} #{} {:.3}", evidence.source(), evidence.rank(), evidence.score()));
    }
    if explanation.ranker_rank() > 0 {
        parts.push(format!("ranker #{} {:.3}", explanation.ranker_rank(), explanation.ranker_score()));
    }
    parts.extend(explanation.rules().into_iter().flatten().map(|rule| format!("rule {rule}")));
    if explanation.backfill() {
        parts.push("backfill".to_owned());
    }
    parts.join(", ")
}
