//! Events as entries of a Redis stream, for consumer groups. An entry's id is the place of its event in the log, so that an entry
//! that is there is not added twice, and the stream itself says where to go on.

use std::time::Duration;

use anyhow::{Context as _, bail};
use redis::{Client, Connection, Value};
use serde::{Deserialize, Serialize};

use super::{Position, Sink};
use crate::config::{in_range, redis_url};
use crate::state::event::Event;
use crate::state::exposure::{Exposed, Exposure};

/// Entries sent in one go.
const BATCH: usize = 256;
/// What a batch may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// `[events.redis_stream]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StreamConfig {
    /// As `cache.redis.url`. Empty, the default: off.
    pub url: String,
    /// The stream's key. Default `tastemaker:events`. A server needs one of its own: entries are numbered by its log.
    pub key: String,
    /// Entries kept, about; the oldest go. 1000 to 1e9, default 1000000.
    pub max_length: u32,
    /// Time to connect and to authenticate, milliseconds. 1 to 60000, default 1000.
    pub connect_timeout_ms: u32,
}

impl Default for StreamConfig {
    fn default() -> Self {
        StreamConfig {
            url: String::new(),
            key: "tastemaker:events".into(),
            max_length: 1_000_000,
            connect_timeout_ms: 1000,
        }
    }
}

impl StreamConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// The key, its value (but for the URL, which may hold a password) and its range.
    pub fn validate(&self) -> Result<(), String> {
        let ranges = [
            ("max_length", self.max_length, 1000, 1_000_000_000),
            ("connect_timeout_ms", self.connect_timeout_ms, 1, 60_000),
        ];
        in_range("events.redis_stream", ranges)?;
        if !(1..=512).contains(&self.key.len()) {
            return Err("events.redis_stream.key is empty or longer than 512 bytes".to_owned());
        }
        redis_url("events.redis_stream.url", &self.url)
    }
}

/// See the module.
pub struct StreamSink {
    config: StreamConfig,
    connection: Option<Connection>,
    /// Commands that were not sent.
    packed: Vec<u8>,
    n_packed: usize,
}

impl StreamSink {
    /// Sends as configured.
    pub fn new(config: StreamConfig) -> Self {
        StreamSink { config, connection: None, packed: Vec::new(), n_packed: 0 }
    }

    /// The beginning of an entry.
    fn entry(&self, at: Position) -> redis::Cmd {
        let mut add = redis::cmd("XADD");
        // Ids begin at 0-1: the sequence plus one keeps the first of all above that.
        add.arg(&self.config.key).arg("MAXLEN").arg("~").arg(self.config.max_length);
        add.arg(format!("{}-{}", at.sequence + 1, at.index));
        add
    }

    /// Its end.
    fn add(&mut self, mut add: redis::Cmd, context: &[(&str, &str)]) -> anyhow::Result<()> {
        for (key, value) in context {
            add.arg(format!("context.{key}")).arg(*value);
        }
        self.packed.extend(add.get_packed_command());
        self.n_packed += 1;
        if self.n_packed >= BATCH { self.send() } else { Ok(()) }
    }

    fn send(&mut self) -> anyhow::Result<()> {
        let n = std::mem::take(&mut self.n_packed);
        let packed = std::mem::take(&mut self.packed);
        if n == 0 {
            return Ok(());
        }
        let connection = self.connection.as_mut().context("not connected")?;
        connection.send_packed_command(&packed)?;
        for _ in 0..n {
            if let Value::ServerError(error) = connection.recv_response()? {
                bail!("Redis refused an entry: {error:?}");
            }
        }
        self.packed = packed;
        self.packed.clear();
        Ok(())
    }
}

impl Sink for StreamSink {
    fn name(&self) -> &'static str {
        "redis_stream"
    }

    fn resume(&mut self) -> anyhow::Result<Position> {
        self.connection = None;
        self.packed.clear();
        self.n_packed = 0;
        let timeout = Duration::from_millis(u64::from(self.config.connect_timeout_ms));
        let client = Client::open(self.config.url.as_str()).context("events.redis_stream.url")?;
        let mut connection =
            client.get_connection_with_timeout(timeout).context("connecting to events.redis_stream.url")?;
        connection.set_read_timeout(Some(PATIENCE))?;
        connection.set_write_timeout(Some(PATIENCE))?;
        // A list of at most one entry, which is a list of id and fields.
        let newest: Vec<(String, Value)> = redis::cmd("XREVRANGE")
            .arg((&self.config.key, "+", "-", "COUNT", 1))
            .query(&mut connection)
            .with_context(|| format!("reading the stream `{}`", self.config.key))?;
        self.connection = Some(connection);
        let Some((last, _)) = newest.first() else { return Ok(Position::default()) };
        let place = last.split_once('-').and_then(|(record, index)| {
            let (record, index) = (record.parse::<u64>().ok()?, index.parse::<u32>().ok()?);
            Some(Position { sequence: record.checked_sub(1)?, index: index + 1 })
        });
        place.with_context(|| format!("the stream `{}` holds entries of somebody else: {}", self.config.key, last))
    }

    fn take(&mut self, at: Position, event: &Event<'_>) -> anyhow::Result<()> {
        let mut add = self.entry(at);
        add.arg("time_ms").arg(event.time_ms).arg("user_id").arg(event.user_id).arg("item_id").arg(event.item_id);
        add.arg("kind").arg(event.kind);
        if !event.event_id.is_empty() {
            add.arg("event_id").arg(event.event_id);
        }
        if !event.value.is_nan() {
            add.arg("value").arg(event.value.to_string());
        }
        self.add(add, event.context)
    }

    fn expose(&mut self, at: Position, exposure: &Exposure<'_>) -> anyhow::Result<()> {
        let join =
            |text: &dyn Fn(&Exposed<'_>) -> String| exposure.items.iter().map(text).collect::<Vec<_>>().join(",");
        let mut add = self.entry(at);
        add.arg("time_ms").arg(exposure.time_ms).arg("user_id").arg(exposure.user_id).arg("kind").arg("exposure");
        add.arg("model_version").arg(exposure.model_version).arg("cache").arg(exposure.cache);
        // Ids may hold anything: as a list of JSON.
        let ids: Vec<&str> = exposure.items.iter().map(|item| item.item_id).collect();
        add.arg("item_ids").arg(serde_json::to_string(&ids)?);
        add.arg("scores").arg(join(&|item| item.score.to_string()));
        add.arg("sources").arg(join(&|item| item.sources.to_string()));
        self.add(add, &exposure.context)
    }

    fn keep(&mut self, _next: u64, _closing: bool) -> anyhow::Result<()> {
        self.send()
    }
}
