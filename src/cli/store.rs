use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use clap::{Args, Subcommand, ValueEnum};
use redis::{Connection, Pipeline};
use serde::Deserialize;
use serde_json::{Map, json};

use super::progress::Reporter;
use crate::catalog::bundle;
use crate::catalog::conditions::hint;
use crate::catalog::generation::Generation;
use crate::context::now_ms;
use crate::server::changes::{ColumnsBody, ValueBody};
use crate::server::json::{Text, VectorBody};
use crate::store::FeaturesConfig;
use crate::store::user::{AVAILABLE, Embedding, OF_ITEMS, OF_USERS, schema_of};
use crate::store::value::{Field, FieldKind, FieldValue, Packed, Schema, StoredItem, pack};

/// Lines sent in one go.
const BATCH: usize = 500;

/// `tastemaker store`
#[derive(Debug, Args)]
pub struct Store {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write entities, a JSON object a line: `user_id` or `item_id`; `columns`, `embedding`, `history` (users: `item_id`, `weight`, `seen`),
    /// `available` (items), `made_ms`, all of them optional. A line takes the place of what was there.
    Push(Push),
    /// Show what the store has of an entity, as JSON.
    Get(Get),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    Users,
    Items,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Users => "user",
            Kind::Items => "item",
        }
    }
}

#[derive(Debug, Args)]
struct Push {
    /// Bundle directory: its columns are the schema.
    bundle: PathBuf,
    /// What the lines are of.
    #[arg(long, value_enum)]
    kind: Kind,
    /// File of lines; `-`: standard input.
    #[arg(long, value_name = "FILE")]
    from: PathBuf,
    /// The server's configuration file, for its `[features]`.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Write embeddings alone, as an external encoder does, for `features.embedding_ttl_seconds`.
    #[arg(long)]
    as_encoder: bool,
    /// How long Redis keeps values [default: for good].
    #[arg(long, value_name = "SECONDS")]
    ttl_seconds: Option<u32>,
}

#[derive(Debug, Args)]
struct Get {
    /// What it is.
    #[arg(value_enum)]
    kind: Kind,
    /// Its id.
    id: String,
    /// The server's configuration file, for its `[features]`.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line<'a> {
    #[serde(borrow, alias = "user_id", alias = "item_id")]
    id: Text<'a>,
    #[serde(default, borrow)]
    columns: ColumnsBody<'a>,
    #[serde(default)]
    embedding: Option<VectorBody>,
    #[serde(default, borrow)]
    history: Vec<HistoryLine<'a>>,
    #[serde(default)]
    available: Option<bool>,
    #[serde(default)]
    made_ms: Option<i64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct HistoryLine<'a> {
    #[serde(borrow)]
    item_id: Text<'a>,
    #[serde(default = "one")]
    weight: f32,
    #[serde(default = "yes")]
    seen: bool,
}

fn one() -> f32 {
    1.0
}

fn yes() -> bool {
    true
}

impl Store {
    pub fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::Push(push) => push.run(),
            Command::Get(get) => get.run(),
        }
    }
}

fn connect(file: &Path) -> anyhow::Result<(FeaturesConfig, Connection)> {
    let config = super::config(Some(file))?.features;
    ensure!(!config.redis.url.is_empty(), "{}: features.redis.url is empty", file.display());
    let connection = config.redis.connect().context("connecting to features.redis.url")?;
    Ok((config, connection))
}

impl Push {
    fn run(self) -> anyhow::Result<()> {
        let (config, mut connection) = connect(&self.config)?;
        let generation = bundle::open(&self.bundle)?;
        let schema = self.schema(&generation);
        let mut pipeline = redis::pipe();
        if !self.as_encoder {
            pipeline.cmd("SET").arg(config.schema_key(schema.id())).arg(schema.text()).ignore();
        }
        let input: Box<dyn BufRead> = match self.from.as_os_str() == "-" {
            true => Box::new(std::io::stdin().lock()),
            false => {
                let file = std::fs::File::open(&self.from).with_context(|| self.from.display().to_string())?;
                Box::new(BufReader::new(file))
            }
        };
        let progress = Reporter::new();
        progress.begin("writing", 0);
        let mut n = 0u64;
        for (at, line) in input.lines().enumerate() {
            let place = || format!("{}:{}", self.from.display(), at + 1);
            let line = line.with_context(place)?;
            if line.trim().is_empty() {
                continue;
            }
            let line: Line<'_> = serde_json::from_str(&line).with_context(place)?;
            self.add(&line, &schema, &generation, &config, &mut pipeline).with_context(place)?;
            n += 1;
            progress.advance(1);
            if n.is_multiple_of(BATCH as u64) {
                let () = pipeline.query(&mut connection).context("writing")?;
                pipeline.clear();
            }
        }
        if !pipeline.is_empty() {
            let () = pipeline.query(&mut connection).context("writing")?;
        }
        progress.finish();
        match self.as_encoder {
            true => say!("{n} embeddings"),
            false => say!("{n} {}s under schema {:016x}", self.kind.name(), schema.id()),
        }
        Ok(())
    }

    fn schema(&self, generation: &Generation) -> Schema {
        match self.kind {
            Kind::Users => schema_of(&generation.users.columns, &OF_USERS),
            Kind::Items => {
                let columns = &generation.items.columns;
                let texts =
                    generation.text_columns.iter().filter(|text| columns.iter().all(|column| column.name != **text));
                let texts = texts.map(|text| (text.as_str(), FieldKind::Text));
                schema_of(columns, &texts.chain(OF_ITEMS).collect::<Vec<_>>())
            }
        }
    }

    fn add(
        &self,
        line: &Line<'_>,
        schema: &Schema,
        generation: &Generation,
        config: &FeaturesConfig,
        pipeline: &mut Pipeline,
    ) -> anyhow::Result<()> {
        let id = &*line.id.0;
        ensure!((1..=crate::wire::LIMITS.id_bytes).contains(&id.len()), "an id has 1 to 256 bytes");
        let dim = generation.item_embeddings.as_ref().map(|items| items.dim);
        let vector = line.embedding.as_ref().map(|vector| &vector.0[..]);
        if let Some(vector) = vector {
            let Some(dim) = dim else { bail!("embedding: the catalogue has no embeddings") };
            ensure!(vector.len() == dim, "embedding: has {} values, the catalogue's have {dim}", vector.len());
            ensure!(vector.iter().all(|value| value.is_finite()), "embedding: holds a value that is not finite");
        }
        let kind = self.kind.name();
        if self.as_encoder {
            let Some(vector) = vector else { bail!("embedding: there is none") };
            let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
            let ttl = self.ttl_seconds.unwrap_or(config.embedding_ttl_seconds);
            pipeline.cmd("SETEX").arg(config.embedding_key(kind, id)).arg(ttl).arg(bytes).ignore();
        } else {
            let packed = self.pack(line, schema)?;
            let set = pipeline.cmd("SET").arg(config.key(kind, id)).arg(packed);
            if let Some(ttl) = self.ttl_seconds {
                set.arg("EX").arg(ttl);
            }
            set.ignore();
        }
        if self.kind == Kind::Items {
            pipeline.cmd("XADD").arg(config.items_key()).arg(("*", "id", id)).ignore();
        }
        Ok(())
    }

    fn pack(&self, line: &Line<'_>, schema: &Schema) -> anyhow::Result<Vec<u8>> {
        let fields = schema.fields();
        let is_column = |field: &&Field| !matches!(field.kind, FieldKind::Vector | FieldKind::Items);
        for (name, _) in &line.columns.0 {
            if !fields.iter().filter(is_column).any(|field| field.name == *name) {
                let names = fields.iter().filter(is_column).map(|field| field.name.as_str());
                bail!("columns.{name}: the bundle has no such column{}", hint(name, names));
            }
        }
        ensure!(self.kind == Kind::Users || line.history.is_empty(), "history: items have none");
        ensure!(self.kind == Kind::Items || line.available.is_none(), "available: users have none");
        let last = fields.last().map(|field| field.name.as_str());
        ensure!(line.available.is_none() || last == Some(AVAILABLE), "available: a column of the bundle has that name");
        let values = fields.iter().map(|field| {
            match field.kind {
                FieldKind::Vector => {
                    line.embedding.as_ref().map_or(FieldValue::Missing, |vector| FieldValue::Vector(vector.0.clone()))
                }
                FieldKind::Items => {
                    let items = line.history.iter().map(|entry| StoredItem {
                        id: &entry.item_id.0,
                        weight: entry.weight,
                        seen: entry.seen,
                    });
                    FieldValue::Items(items.collect())
                }
                // The last field of items, whatever it had to be called.
                _ if self.kind == Kind::Items && Some(field.name.as_str()) == last => {
                    line.available.map_or(FieldValue::Missing, |is| FieldValue::Number(f32::from(u8::from(is))))
                }
                _ => match line.columns.0.iter().find(|(name, _)| *name == field.name).map(|(_, value)| value) {
                    None | Some(ValueBody::Missing) => FieldValue::Missing,
                    Some(ValueBody::Number(number)) => FieldValue::Number(*number as f32),
                    Some(ValueBody::Text(text)) => FieldValue::Text(text),
                    Some(ValueBody::List(list)) => FieldValue::List(list.0.iter().map(|word| &*word.0).collect()),
                },
            }
        });
        let values: Vec<_> = values.collect();
        pack(schema, line.made_ms.unwrap_or_else(now_ms), &values).map_err(anyhow::Error::msg)
    }
}

impl Get {
    fn run(self) -> anyhow::Result<()> {
        let (config, mut connection) = connect(&self.config)?;
        let kind = self.kind.name();
        let (key, embedding_key) = (config.key(kind, &self.id), config.embedding_key(kind, &self.id));
        let (value, embedding): (Option<Vec<u8>>, Option<Vec<u8>>) =
            redis::cmd("MGET").arg(&key).arg(&embedding_key).query(&mut connection)?;
        ensure!(value.is_some() || embedding.is_some(), "the store has nothing of the {kind} `{}`", self.id);
        let mut out = Map::new();
        if let Some(value) = &value {
            let packed = Packed::of(value)?;
            let id = format!("{:016x}", packed.schema);
            let text: Option<String> =
                redis::cmd("GET").arg(config.schema_key(packed.schema)).query(&mut connection)?;
            let text = text.with_context(|| format!("the value's schema {id} is not in the store"))?;
            let schema = Schema::parse(&text).map_err(anyhow::Error::msg).context("the value's schema")?;
            let mut fields = Map::new();
            packed.read(&schema, |at, value| drop(fields.insert(schema.fields()[at].name.clone(), shown(value))))?;
            out.insert("schema".into(), id.into());
            out.insert("made_ms".into(), packed.made_ms.into());
            out.insert("age_seconds".into(), (now_ms().saturating_sub(packed.made_ms) as f64 / 1000.0).into());
            out.insert("fields".into(), fields.into());
        }
        if let Some(embedding) = embedding {
            let values = Embedding::of(&embedding, embedding.len() / 4).context("the embedding is none")?;
            out.insert("embedding".into(), json!(values.values()));
        }
        say!("{}", serde_json::to_string_pretty(&out)?);
        Ok(())
    }
}

fn shown(value: FieldValue<'_>) -> serde_json::Value {
    match value {
        FieldValue::Missing => serde_json::Value::Null,
        FieldValue::Number(number) => json!(number),
        FieldValue::Text(text) => json!(text),
        FieldValue::List(list) => json!(list),
        FieldValue::Vector(values) => json!(values),
        FieldValue::Items(items) => {
            items.iter().map(|item| json!({"item_id": item.id, "weight": item.weight, "seen": item.seen})).collect()
        }
    }
}
