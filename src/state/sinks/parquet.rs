//! Events and exposures as Parquet files, by the hour that they happened in: `DIR/events/date=2026-11-25/hour=13/FIRST-LAST.parquet`,
//! named after the log's records that they are of, and `DIR/exposures/…` with a row per item shown. Every reader of partitioned
//! data sets reads one of these directories as one table.
//!
//! `_cursor.json` is written after the files of a round: a start removes what is newer than it says, and writes that anew.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use arrow_array::builder::{
    Float32Builder, MapBuilder, StringBuilder, StringDictionaryBuilder, TimestampMillisecondBuilder, UInt8Builder,
    UInt32Builder, UInt64Builder,
};
use arrow_array::types::Int32Type;
use arrow_array::{ArrayRef, RecordBatch};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use serde::{Deserialize, Serialize};

use super::{Position, Sink};
use crate::config::in_range;
use crate::state::event::Event;
use crate::state::exposure::Exposure;
use crate::state::log::sync_directory;

const CURSOR: &str = "_cursor.json";
const HOUR_MS: i64 = 3_600_000;
/// Hours that are open at a time; events of more close a round.
const MOST_HOURS: usize = 64;

/// `[events.parquet]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ParquetConfig {
    /// Directory to write to, made where it is missing. Empty, the default: off.
    pub dir: PathBuf,
    /// Files are written when the oldest event waits for so long, seconds. 1 to 86400, default 300.
    pub flush_seconds: u32,
    /// Or when so many events wait. 1 to 10000000, default 200000; one takes about 200 bytes of memory.
    pub max_rows: u32,
}

impl Default for ParquetConfig {
    fn default() -> Self {
        ParquetConfig { dir: PathBuf::new(), flush_seconds: 300, max_rows: 200_000 }
    }
}

impl ParquetConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// The key, its value and its range.
    pub fn validate(&self) -> Result<(), String> {
        let ranges = [("flush_seconds", self.flush_seconds, 1, 86_400), ("max_rows", self.max_rows, 1, 10_000_000)];
        in_range("events.parquet", ranges)
    }
}

/// What is in the files: all events of the records before `next`.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Cursor {
    next: u64,
}

/// See the module.
pub struct ParquetSink {
    config: ParquetConfig,
    /// Of what the files hold.
    next: u64,
    /// By hour since 1970.
    events: BTreeMap<i64, EventRows>,
    exposures: BTreeMap<i64, ExposureRows>,
    n_rows: usize,
    oldest: Option<Instant>,
}

#[derive(Default)]
struct EventRows {
    sequence: UInt64Builder,
    index: UInt32Builder,
    time: TimestampMillisecondBuilder,
    event_id: StringBuilder,
    user_id: StringBuilder,
    item_id: StringBuilder,
    kind: StringDictionaryBuilder<Int32Type>,
    value: Float32Builder,
    context: Contexts,
}

/// A row per item.
#[derive(Default)]
struct ExposureRows {
    sequence: UInt64Builder,
    rank: UInt32Builder,
    time: TimestampMillisecondBuilder,
    user_id: StringBuilder,
    item_id: StringBuilder,
    score: Float32Builder,
    sources: UInt8Builder,
    model_version: StringDictionaryBuilder<Int32Type>,
    cache: StringDictionaryBuilder<Int32Type>,
    context: Contexts,
}

/// Maps of keys and values.
struct Contexts(MapBuilder<StringBuilder, StringBuilder>);

impl Default for Contexts {
    fn default() -> Self {
        Contexts(MapBuilder::new(None, StringBuilder::default(), StringBuilder::default()))
    }
}

impl Contexts {
    fn push(&mut self, context: &[(&str, &str)]) -> anyhow::Result<()> {
        for (key, value) in context {
            self.0.keys().append_value(key);
            self.0.values().append_value(value);
        }
        Ok(self.0.append(true)?)
    }

    fn finish(&mut self) -> ArrayRef {
        Arc::new(self.0.finish())
    }
}

impl ExposureRows {
    fn push(&mut self, sequence: u64, exposure: &Exposure<'_>) -> anyhow::Result<()> {
        for (rank, item) in (1..).zip(&exposure.items) {
            self.sequence.append_value(sequence);
            self.rank.append_value(rank);
            self.time.append_value(exposure.time_ms);
            self.user_id.append_value(exposure.user_id);
            self.item_id.append_value(item.item_id);
            self.score.append_value(item.score);
            self.sources.append_value(item.sources);
            self.model_version.append_value(exposure.model_version);
            self.cache.append_value(exposure.cache);
            self.context.push(&exposure.context)?;
        }
        Ok(())
    }

    fn finish(mut self) -> anyhow::Result<RecordBatch> {
        let columns: Vec<(&str, ArrayRef, bool)> = vec![
            ("sequence", Arc::new(self.sequence.finish()), false),
            ("rank", Arc::new(self.rank.finish()), false),
            ("time", Arc::new(self.time.finish().with_timezone("UTC")), false),
            ("user_id", Arc::new(self.user_id.finish()), false),
            ("item_id", Arc::new(self.item_id.finish()), false),
            ("score", Arc::new(self.score.finish()), false),
            ("sources", Arc::new(self.sources.finish()), false),
            ("model_version", Arc::new(self.model_version.finish()), false),
            ("cache", Arc::new(self.cache.finish()), false),
            ("context", self.context.finish(), false),
        ];
        Ok(RecordBatch::try_from_iter_with_nullable(columns)?)
    }
}

impl EventRows {
    fn push(&mut self, at: Position, event: &Event<'_>) -> anyhow::Result<()> {
        self.sequence.append_value(at.sequence);
        self.index.append_value(at.index);
        self.time.append_value(event.time_ms);
        self.event_id.append_option((!event.event_id.is_empty()).then_some(event.event_id));
        self.user_id.append_value(event.user_id);
        self.item_id.append_value(event.item_id);
        self.kind.append_value(event.kind);
        self.value.append_option((!event.value.is_nan()).then_some(event.value));
        self.context.push(event.context)
    }

    fn finish(mut self) -> anyhow::Result<RecordBatch> {
        let columns: Vec<(&str, ArrayRef, bool)> = vec![
            ("sequence", Arc::new(self.sequence.finish()), false),
            ("index", Arc::new(self.index.finish()), false),
            ("time", Arc::new(self.time.finish().with_timezone("UTC")), false),
            ("event_id", Arc::new(self.event_id.finish()), true),
            ("user_id", Arc::new(self.user_id.finish()), false),
            ("item_id", Arc::new(self.item_id.finish()), false),
            ("kind", Arc::new(self.kind.finish()), false),
            ("value", Arc::new(self.value.finish()), true),
            ("context", self.context.finish(), false),
        ];
        Ok(RecordBatch::try_from_iter_with_nullable(columns)?)
    }
}

impl ParquetSink {
    /// Writes as configured.
    pub fn new(config: ParquetConfig) -> Self {
        ParquetSink { config, next: 0, events: BTreeMap::new(), exposures: BTreeMap::new(), n_rows: 0, oldest: None }
    }

    fn write(&mut self, next: u64) -> anyhow::Result<()> {
        for (hour, rows) in std::mem::take(&mut self.events) {
            self.put("events", hour, next, &rows.finish()?)?;
        }
        for (hour, rows) in std::mem::take(&mut self.exposures) {
            self.put("exposures", hour, next, &rows.finish()?)?;
        }
        self.save(next)?;
        (self.n_rows, self.oldest) = (0, None);
        Ok(())
    }

    /// Writes a file of what happened in an hour.
    fn put(&self, what: &str, hour: i64, next: u64, rows: &RecordBatch) -> anyhow::Result<()> {
        let (first, last) = (self.next, next - 1);
        let dir = self.config.dir.join(what).join(partition(hour));
        fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        let path = dir.join(format!("{first:020}-{last:020}.parquet"));
        let hidden = dir.join(format!(".{first:020}.tmp"));
        write_file(&hidden, rows).with_context(|| hidden.display().to_string())?;
        appear(&hidden, &path)
    }

    fn save(&mut self, next: u64) -> anyhow::Result<()> {
        let (path, hidden) = (self.config.dir.join(CURSOR), self.config.dir.join("._cursor.tmp"));
        let place = || path.display().to_string();
        let text = serde_json::to_vec(&Cursor { next })?;
        let file = File::create(&hidden).with_context(place)?;
        std::os::unix::fs::FileExt::write_all_at(&file, &text, 0).and_then(|()| file.sync_all()).with_context(place)?;
        appear(&hidden, &path)?;
        self.next = next;
        Ok(())
    }
}

impl Sink for ParquetSink {
    fn name(&self) -> &'static str {
        "parquet"
    }

    fn resume(&mut self) -> anyhow::Result<Position> {
        self.events.clear();
        self.exposures.clear();
        (self.n_rows, self.oldest) = (0, None);
        let place = || format!("{} (events.parquet.dir)", self.config.dir.display());
        fs::create_dir_all(&self.config.dir).with_context(place)?;
        let path = self.config.dir.join(CURSOR);
        let cursor = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).with_context(|| path.display().to_string())?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Cursor::default(),
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        };
        // What a round that did not end has left.
        for path in below(&self.config.dir, 4).with_context(place)? {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let unfinished = name.starts_with('.') && name.ends_with(".tmp");
            if unfinished || last_sequence(name).is_some_and(|last| last >= cursor.next) {
                fs::remove_file(&path).with_context(|| path.display().to_string())?;
            }
        }
        self.next = cursor.next;
        Ok(Position { sequence: cursor.next, index: 0 })
    }

    fn take(&mut self, at: Position, event: &Event<'_>) -> anyhow::Result<()> {
        self.events.entry(event.time_ms.div_euclid(HOUR_MS)).or_default().push(at, event)?;
        self.oldest.get_or_insert_with(Instant::now);
        self.n_rows += 1;
        Ok(())
    }

    fn expose(&mut self, at: Position, exposure: &Exposure<'_>) -> anyhow::Result<()> {
        self.exposures.entry(exposure.time_ms.div_euclid(HOUR_MS)).or_default().push(at.sequence, exposure)?;
        self.oldest.get_or_insert_with(Instant::now);
        self.n_rows += exposure.items.len();
        Ok(())
    }

    fn keep(&mut self, next: u64, closing: bool) -> anyhow::Result<()> {
        let flush_after = Duration::from_secs(u64::from(self.config.flush_seconds));
        let due = self.n_rows >= self.config.max_rows as usize
            || self.events.len() + self.exposures.len() > MOST_HOURS
            || self.oldest.is_some_and(|oldest| closing || oldest.elapsed() >= flush_after);
        if due { self.write(next) } else { Ok(()) }
    }
}

/// `date=2026-11-25/hour=13` of an hour since 1970 (civil from days: Hinnant, chrono-compatible low-level date algorithms).
fn partition(hour: i64) -> String {
    let (days, hour) = (hour.div_euclid(24), hour.rem_euclid(24));
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("date={year:04}-{month:02}-{day:02}/hour={hour:02}")
}

fn last_sequence(name: &str) -> Option<u64> {
    name.strip_suffix(".parquet")?.split_once('-')?.1.parse().ok()
}

/// Files in `dir` and in directories in it, `depth` levels.
fn below(dir: &Path, depth: usize) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true if depth > 1 => found.extend(below(&entry.path(), depth - 1)?),
            true => {}
            false => found.push(entry.path()),
        }
    }
    Ok(found)
}

/// Gives a file that is on the disk its name, for good.
fn appear(hidden: &Path, path: &Path) -> anyhow::Result<()> {
    let place = || path.display().to_string();
    fs::rename(hidden, path).with_context(place)?;
    path.parent().map_or(Ok(()), sync_directory).with_context(place)
}

fn write_file(path: &Path, rows: &RecordBatch) -> anyhow::Result<()> {
    let properties = WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::default())).build();
    let mut writer = ArrowWriter::try_new(File::create(path)?, rows.schema(), Some(properties))?;
    writer.write(rows)?;
    let file = writer.into_inner()?;
    file.sync_all()?;
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use arrow_array::cast::AsArray;
    use arrow_array::types::{Float32Type, TimestampMillisecondType, UInt64Type};
    use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

    #[test]
    fn hours_have_the_names_of_their_days() {
        for (hour, want) in [
            (0, "date=1970-01-01/hour=00"),
            (-1, "date=1969-12-31/hour=23"),
            (24 * 59 + 5, "date=1970-03-01/hour=05"),
            (24 * 11_016, "date=2000-02-29/hour=00"),
            (24 * 20_782 + 13, "date=2026-11-25/hour=13"),
        ] {
            assert_eq!(partition(hour), want);
        }
    }

    /// Sequence, hour, user and value of all rows, in order of the files.
    fn rows(dir: &Path) -> Vec<(u64, i64, String, f32)> {
        let mut files: Vec<_> = below(dir, 4).unwrap();
        files.retain(|path| path.extension().is_some_and(|e| e == "parquet"));
        files.sort();
        let mut rows = Vec::new();
        for file in files {
            for batch in ParquetRecordBatchReaderBuilder::try_new(File::open(file).unwrap()).unwrap().build().unwrap() {
                let batch = batch.unwrap();
                let column = |name: &str| batch.column_by_name(name).unwrap();
                for at in 0..batch.num_rows() {
                    assert_eq!(column("context").as_map().value_length(at), 1);
                    rows.push((
                        column("sequence").as_primitive::<UInt64Type>().value(at),
                        column("time").as_primitive::<TimestampMillisecondType>().value(at) / HOUR_MS,
                        column("user_id").as_string::<i32>().value(at).to_owned(),
                        column("value").as_primitive::<Float32Type>().value(at),
                    ));
                }
            }
        }
        rows
    }

    fn take(sink: &mut ParquetSink, sequence: u64) {
        let user = format!("u{sequence}");
        let time_ms = HOUR_MS * (100 + sequence as i64 % 3) + 5;
        let event = Event {
            value: sequence as f32,
            time_ms,
            context: &[("place", "home")],
            ..Event::new(&user, "i", "rating")
        };
        sink.take(Position { sequence, index: 0 }, &event).unwrap();
    }

    #[test]
    fn every_event_is_in_one_file_whatever_was_interrupted() {
        let dir = tempfile::tempdir().unwrap();
        let config = ParquetConfig { dir: dir.path().join("out"), max_rows: 4, ..ParquetConfig::default() };
        let mut sink = ParquetSink::new(config.clone());
        assert_eq!(sink.resume().unwrap(), Position::default());
        for sequence in 0..6 {
            take(&mut sink, sequence);
            sink.keep(sequence + 1, false).unwrap();
        }
        // Four are kept, two wait and are lost with the process; another round wrote a file and not its cursor.
        let mut sink = ParquetSink::new(config.clone());
        assert_eq!(sink.resume().unwrap().sequence, 4);
        let cursor = fs::read(config.dir.join(CURSOR)).unwrap();
        (4..9).for_each(|sequence| take(&mut sink, sequence));
        sink.keep(9, false).unwrap();
        fs::write(config.dir.join(CURSOR), cursor).unwrap();
        fs::write(config.dir.join("events/date=1970-01-05/hour=04/.00000000000000000009.tmp"), "half").unwrap();
        let mut sink = ParquetSink::new(config.clone());
        assert_eq!(sink.resume().unwrap().sequence, 4);
        (4..10).for_each(|sequence| take(&mut sink, sequence));
        sink.keep(10, true).unwrap();
        let mut got = rows(&config.dir);
        got.sort_by_key(|row| row.0);
        let want: Vec<_> = (0..10u64).map(|n| (n, 100 + n as i64 % 3, format!("u{n}"), n as f32)).collect();
        assert_eq!(got, want);
        assert!(below(&config.dir, 4).unwrap().iter().all(|path| path.extension().is_none_or(|e| e != "tmp")));
    }

    #[test]
    fn a_directory_that_cannot_be_used_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut sink = ParquetSink::new(ParquetConfig { dir: file.path().join("x"), ..ParquetConfig::default() });
        let error = format!("{:#}", sink.resume().unwrap_err());
        assert!(error.contains("events.parquet.dir"), "{error}");
    }
}
