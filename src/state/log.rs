//! The event log: segments of checksummed records. One writer appends; a start replays.
//!
//! A segment is `events-SEQUENCE.log`: a header (magic, format, sequence of its first record, checksum), then records, each
//! `u32` length, `u64` sequence, `u64` xxh3 of the payload seeded with the sequence, payload; all little-endian. A record is
//! written whole or cut off again, so only a crash leaves a torn tail; it is cut at the next start. Damage elsewhere loses
//! the records that it hit: the others are found again behind it, and the damaged file is kept beside the mended one.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::carried;
use super::change::Record;
use super::event::Damaged;

const MAGIC: &[u8; 8] = b"TSTMEVNT";
/// From format 2 on the first byte of a record is its kind; before, all were of events.
pub(super) const FORMAT: u32 = 2;
const OLDEST_FORMAT: u32 = 1;
pub(super) const HEADER: usize = 32;
pub(super) const RECORD_HEADER: usize = 20;
/// Largest payload; a length beyond it is damage.
pub const MAX_RECORD: usize = 64 << 20;
/// A sequence further ahead than this is damage.
const MAX_SEQUENCE_GAP: u64 = 1 << 20;

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// A segment ends at this size.
    pub segment_bytes: u64,
    /// Of all segments together; the one that is written stays whatever its size.
    pub max_bytes: u64,
    /// Of a segment's last change; `None`: no matter.
    pub max_age: Option<Duration>,
}

/// What a start found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    /// Segments read.
    pub segments: usize,
    /// Records read.
    pub records: u64,
    /// Bytes of a torn tail, cut off.
    pub torn_bytes: u64,
    /// Bytes of damaged places that were left out.
    pub damaged_bytes: u64,
    /// Copies of damaged segments as they were found.
    pub damaged: Vec<PathBuf>,
}

/// Where a record was read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The file of what was in force; see [`super::carried`].
    Carried,
    /// The log, and what it said of items and users is in that file already.
    Before,
    /// The log, after that.
    Since,
}

/// A record as it is read again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Logged<'a> {
    /// Of its segment; see [`super::change::Record`].
    pub format: u32,
    /// Its number in the log, or in the file.
    pub sequence: u64,
    /// Where it was.
    pub place: Place,
    /// What was appended.
    pub payload: &'a [u8],
}

/// Hands records that say anew what is in force to what it is given.
pub type Carrying<'a> = dyn Fn(&mut dyn FnMut(&[u8])) + 'a;

impl<'a> Logged<'a> {
    /// What it is of.
    ///
    /// # Errors
    /// Nothing known.
    pub fn content(&self) -> Result<Record<'a>, Damaged> {
        match self.format {
            1 => Ok(Record::Events(self.payload)),
            _ => Record::of(self.payload),
        }
    }
}

/// An open log.
#[derive(Debug)]
pub struct EventLog {
    dir: PathBuf,
    limits: Limits,
    /// The segment that is written; `None`: the next record begins one.
    current: Option<Segment>,
    sealed: VecDeque<Sealed>,
    next_sequence: u64,
    buffer: Vec<u8>,
    /// What records before this one said of items and users is in a file of its own.
    carried: u64,
    carried_bytes: u64,
    /// That file was damaged.
    carry_again: bool,
}

#[derive(Debug)]
struct Segment {
    file: File,
    path: PathBuf,
    bytes: u64,
}

#[derive(Debug)]
struct Sealed {
    path: PathBuf,
    bytes: u64,
    changed: SystemTime,
    /// Sequence after its last record.
    end: u64,
}

/// What is in a segment.
#[derive(Debug, Default, PartialEq, Eq)]
struct Parsed {
    records: Vec<Range<usize>>,
    /// Sequence after the last record.
    next_sequence: u64,
    /// Places between records that are none.
    damaged: Vec<Range<usize>>,
    /// End of the last record.
    end: usize,
}

impl EventLog {
    /// Opens the log in `dir`, which is made where it is missing, and hands every record to `take`.
    ///
    /// # Errors
    /// The directory can't be made or read, or holds a segment of a newer format.
    pub fn open(dir: &Path, limits: Limits, mut take: impl FnMut(Logged<'_>)) -> anyhow::Result<(Self, Replayed)> {
        let place = || dir.display().to_string();
        fs::create_dir_all(dir).with_context(place)?;
        let paths: Vec<PathBuf> = listed(dir, named).with_context(place)?.into_iter().map(|(_, path)| path).collect();
        let mut log = EventLog {
            dir: dir.to_owned(),
            limits,
            current: None,
            sealed: VecDeque::new(),
            next_sequence: 0,
            buffer: Vec::new(),
            carried: 0,
            carried_bytes: 0,
            carry_again: false,
        };
        let mut found = Replayed::default();
        if let Some(carried) = carried::read(dir, &mut take).with_context(place)? {
            (log.carried, log.carried_bytes) = (carried.sequence, carried.bytes);
            if let Some((path, bytes)) = carried.damaged {
                found.damaged_bytes += bytes;
                found.damaged.push(path);
                log.carry_again = true;
            }
        }
        if let Some(newest) = paths.last() {
            // A process that was killed may have left it to the operating system.
            File::open(newest).and_then(|file| file.sync_all()).with_context(place)?;
        }
        let last = paths.len().saturating_sub(1);
        for (at, path) in paths.into_iter().enumerate() {
            log.replay(path, at == last, &mut found, &mut take)?;
        }
        log.next_sequence = log.next_sequence.max(log.carried);
        Ok((log, found))
    }

    fn replay(
        &mut self,
        path: PathBuf,
        last: bool,
        found: &mut Replayed,
        take: &mut impl FnMut(Logged<'_>),
    ) -> anyhow::Result<()> {
        let place = || path.display().to_string();
        let bytes = fs::read(&path).with_context(place)?;
        let begins = begins(&bytes).with_context(place)?;
        let first = begins.map(|(_, first)| first);
        let parsed = parse(&bytes, first.or_else(|| named(&path)).unwrap_or(0).max(self.next_sequence));
        if parsed.records.is_empty() && parsed.end == bytes.len() {
            // A start that wrote nothing, or a crash before the header was whole.
            return fs::remove_file(&path).with_context(place);
        }
        let payload = |record: &Range<usize>| &bytes[record.start + RECORD_HEADER..record.end];
        // Without a header the records themselves tell: one of format 1 begins with a time, which rarely looks like a kind.
        let has_kind = |record| Record::of(payload(record)).is_ok();
        let guess = || if parsed.records.iter().all(has_kind) { FORMAT } else { OLDEST_FORMAT };
        let format = begins.map_or_else(guess, |(format, _)| format);
        for record in &parsed.records {
            let sequence = number(&bytes, record.start + 4, 8);
            let place = if sequence < self.carried { Place::Before } else { Place::Since };
            take(Logged { format, sequence, place, payload: payload(record) });
        }
        self.next_sequence = parsed.next_sequence;
        found.segments += 1;
        found.records += parsed.records.len() as u64;
        let tail = (bytes.len() - parsed.end) as u64;
        let mut kept = bytes.len() as u64;
        let whole = parsed.damaged.is_empty() && first.is_some();
        if whole && tail > 0 && last {
            found.torn_bytes += tail;
            kept = parsed.end as u64;
            let file = OpenOptions::new().write(true).open(&path).with_context(place)?;
            file.set_len(kept).and_then(|()| file.sync_all()).with_context(place)?;
        } else if !whole || tail > 0 {
            found.damaged_bytes += tail + parsed.damaged.iter().map(|range| range.len() as u64).sum::<u64>();
            found.damaged_bytes += if first.is_none() { HEADER as u64 } else { 0 };
            let begins =
                parsed.records.first().map_or(self.next_sequence, |record| number(&bytes, record.start + 4, 8));
            let mut mended = header(format, begins).to_vec();
            parsed.records.iter().for_each(|record| mended.extend_from_slice(&bytes[record.clone()]));
            kept = mended.len() as u64;
            let beside = path.with_extension("mended");
            let file = File::create(&beside).with_context(place)?;
            file.write_all_at(&mended, 0).and_then(|()| file.sync_all()).with_context(place)?;
            found.damaged.push(set_aside(&path)?);
            fs::rename(&beside, &path).with_context(place)?;
            sync_directory(&self.dir).with_context(place)?;
        }
        let changed = fs::metadata(&path).and_then(|m| m.modified()).unwrap_or(SystemTime::now());
        self.sealed.push_back(Sealed { path, bytes: kept, changed, end: parsed.next_sequence });
        Ok(())
    }

    /// Appends records; they are in the operating system's hands when this returns, so that the end of this process does
    /// not lose them, and on the disk after [`Self::sync`].
    ///
    /// # Errors
    /// None of them was kept; the log stays usable.
    pub fn append<'a>(&mut self, records: impl IntoIterator<Item = &'a [u8]>) -> io::Result<()> {
        if self.current.as_ref().is_some_and(|segment| segment.bytes >= self.limits.segment_bytes) {
            self.sync()?;
            self.seal();
        }
        let sequence = self.next_sequence;
        if self.current.is_none() {
            self.current = Some(self.begin()?);
        }
        let Self { current: Some(segment), buffer, next_sequence, .. } = self else {
            return Err(io::Error::other("no segment"));
        };
        buffer.clear();
        for payload in records {
            if payload.len() > MAX_RECORD {
                *next_sequence = sequence;
                return Err(io::Error::other("a record is larger than the log takes"));
            }
            buffer.extend_from_slice(&record_header(*next_sequence, payload));
            buffer.extend_from_slice(payload);
            *next_sequence += 1;
        }
        match segment.file.write_all_at(buffer, segment.bytes) {
            Ok(()) => {
                segment.bytes += buffer.len() as u64;
                Ok(())
            }
            Err(error) => {
                *next_sequence = sequence;
                // What was written of them must not come back at the next start.
                if segment.file.set_len(segment.bytes).is_err() {
                    self.seal();
                }
                Err(error)
            }
        }
    }

    /// Puts everything that was appended on the disk.
    ///
    /// # Errors
    /// It may not be there, and trying again would not tell; what follows goes into another segment.
    pub fn sync(&mut self) -> io::Result<()> {
        let Some(segment) = &self.current else { return Ok(()) };
        let done = segment.file.sync_data();
        if done.is_err() {
            self.seal();
        }
        done
    }

    /// Removes the oldest segments while there are more than the limits allow; says how many. What they alone said of items and users is
    /// written to a file of its own before, records that `state` hands over.
    ///
    /// # Errors
    /// That file can't be written, or a segment can't be removed.
    pub fn retain(&mut self, state: &Carrying<'_>) -> io::Result<usize> {
        let mut removed = 0;
        if self.carry_again {
            self.carry(state)?;
        }
        while let Some(oldest) = self.sealed.front() {
            let age = oldest.changed.elapsed().unwrap_or_default();
            if self.bytes() <= self.limits.max_bytes && self.limits.max_age.is_none_or(|max| age <= max) {
                break;
            }
            if self.carried < oldest.end {
                self.carry(state)?;
                continue;
            }
            fs::remove_file(&oldest.path)?;
            self.sealed.pop_front();
            removed += 1;
        }
        Ok(removed)
    }

    fn carry(&mut self, state: &Carrying<'_>) -> io::Result<()> {
        self.carried_bytes = carried::write(&self.dir, self.next_sequence, state)?;
        (self.carried, self.carry_again) = (self.next_sequence, false);
        Ok(())
    }

    /// Sequence of the next record.
    pub fn next_sequence(&self) -> u64 {
        self.next_sequence
    }

    /// Size of the file of what was in force.
    pub fn carried_bytes(&self) -> u64 {
        self.carried_bytes
    }

    /// Size of all segments.
    pub fn bytes(&self) -> u64 {
        self.sealed.iter().map(|s| s.bytes).sum::<u64>() + self.current.as_ref().map_or(0, |s| s.bytes)
    }

    fn begin(&self) -> io::Result<Segment> {
        let path = self.dir.join(format!("events-{:020}.log", self.next_sequence));
        // A segment of this name holds no record: its header was all that was written.
        let file = OpenOptions::new().write(true).create(true).truncate(true).open(&path)?;
        let written = file.write_all_at(&header(FORMAT, self.next_sequence), 0).and_then(|()| file.sync_all());
        if let Err(error) = written.and_then(|()| sync_directory(&self.dir)) {
            // Half a segment is worth nothing.
            let _ = fs::remove_file(&path);
            return Err(error);
        }
        Ok(Segment { file, path, bytes: HEADER as u64 })
    }

    fn seal(&mut self) {
        if let Some(Segment { path, bytes, .. }) = self.current.take() {
            self.sealed.push_back(Sealed { path, bytes, changed: SystemTime::now(), end: self.next_sequence });
        }
    }
}

pub(super) fn sync_directory(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Renames a damaged segment out of the way.
fn set_aside(path: &Path) -> anyhow::Result<PathBuf> {
    let mut aside = path.with_extension("damaged");
    let mut n = 1;
    while aside.exists() {
        n += 1;
        aside = path.with_extension(format!("damaged-{n}"));
    }
    fs::rename(path, &aside).with_context(|| path.display().to_string())?;
    Ok(aside)
}

pub(super) fn header(format: u32, first_sequence: u64) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&format.to_le_bytes());
    header[16..24].copy_from_slice(&first_sequence.to_le_bytes());
    let sum = xxh3_64(&header[..24]);
    header[24..].copy_from_slice(&sum.to_le_bytes());
    header
}

/// The files in `dir` whose names say a sequence, ascending.
pub(super) fn listed(dir: &Path, named: impl Fn(&Path) -> Option<u64>) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        found.extend(named(&path).map(|sequence| (sequence, path)));
    }
    found.sort();
    Ok(found)
}

/// What goes before the payload of a record.
pub(super) fn record_header(sequence: u64, payload: &[u8]) -> [u8; RECORD_HEADER] {
    let mut header = [0; RECORD_HEADER];
    header[..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    header[4..12].copy_from_slice(&sequence.to_le_bytes());
    header[12..].copy_from_slice(&xxh3_64_with_seed(payload, sequence).to_le_bytes());
    header
}

/// The sequence of a segment's first record, by its file's name; `None`: it is none.
pub(super) fn named(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("events-")?.strip_suffix(".log")?.parse().ok()
}

/// Format and first sequence; `None`: no header.
pub(super) fn begins(bytes: &[u8]) -> anyhow::Result<Option<(u32, u64)>> {
    let Some(header) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
    if header[..8] != MAGIC[..] || xxh3_64(&header[..HEADER - 8]).to_le_bytes() != header[HEADER - 8..] {
        return Ok(None);
    }
    let format = number(header, 8, 4);
    if !(u64::from(OLDEST_FORMAT)..=u64::from(FORMAT)).contains(&format) {
        bail!("is of format {format}; this version knows {OLDEST_FORMAT} to {FORMAT}");
    }
    Ok(Some((format as u32, number(header, 16, 8))))
}

pub(super) fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    let mut eight = [0; 8];
    eight[..len].copy_from_slice(&bytes[at..at + len]);
    u64::from_le_bytes(eight)
}

fn parse(bytes: &[u8], first: u64) -> Parsed {
    let mut parsed = Parsed { next_sequence: first, end: HEADER.min(bytes.len()), ..Parsed::default() };
    let mut at = HEADER;
    while at + RECORD_HEADER <= bytes.len() {
        match record(bytes, at, parsed.next_sequence) {
            Some((len, sequence)) => {
                if at > parsed.end {
                    parsed.damaged.push(parsed.end..at);
                }
                parsed.records.push(at..at + RECORD_HEADER + len);
                at += RECORD_HEADER + len;
                (parsed.end, parsed.next_sequence) = (at, sequence + 1);
            }
            None => at += 1,
        }
    }
    parsed
}

/// Numbers and payloads of a file's records, numbered from `first` on, and how many bytes are none of them.
pub(super) fn records(bytes: &[u8], first: u64) -> (Vec<(u64, &[u8])>, u64) {
    let parsed = parse(bytes, first);
    let of =
        |record: &Range<usize>| (number(bytes, record.start + 4, 8), &bytes[record.start + RECORD_HEADER..record.end]);
    let damaged = parsed.damaged.iter().map(|range| range.len()).sum::<usize>() + (bytes.len() - parsed.end);
    (parsed.records.iter().map(of).collect(), damaged as u64)
}

/// Payload length and sequence of the record at `at`, if one is there.
pub(super) fn record(bytes: &[u8], at: usize, expected: u64) -> Option<(usize, u64)> {
    let (len, sequence) = (number(bytes, at, 4) as usize, number(bytes, at + 4, 8));
    let start = at + RECORD_HEADER;
    let plausible = len <= MAX_RECORD && (expected..expected.saturating_add(MAX_SEQUENCE_GAP)).contains(&sequence);
    let payload = bytes.get(start..start + len).filter(|_| plausible)?;
    (xxh3_64_with_seed(payload, sequence) == number(bytes, at + 12, 8)).then_some((len, sequence))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { segment_bytes: 1 << 20, max_bytes: 1 << 30, max_age: None };

    fn open(dir: &Path, limits: Limits) -> (EventLog, Replayed, Vec<Vec<u8>>) {
        let mut records = Vec::new();
        let (log, found) = EventLog::open(dir, limits, |record| records.push(record.payload.to_vec())).unwrap();
        (log, found, records)
    }

    fn payload(n: usize) -> Vec<u8> {
        format!("record {n} {}", "x".repeat(n % 7)).into_bytes()
    }

    fn write(dir: &Path, limits: Limits, range: Range<usize>) {
        let (mut log, ..) = open(dir, limits);
        for n in range {
            log.append([&payload(n)[..]]).unwrap();
        }
        log.sync().unwrap();
    }

    fn segments(dir: &Path) -> Vec<PathBuf> {
        let mut paths: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
        paths.retain(|path| path.extension().is_some_and(|e| e == "log"));
        paths.sort();
        paths
    }

    #[test]
    fn what_was_written_is_read_again_across_segments_and_starts() {
        let dir = tempfile::tempdir().unwrap();
        let small = Limits { segment_bytes: 200, ..LIMITS };
        write(dir.path(), small, 0..30);
        write(dir.path(), small, 30..60);
        let (log, found, records) = open(dir.path(), small);
        assert_eq!(records, (0..60).map(payload).collect::<Vec<_>>());
        assert!(found.segments > 5 && found.damaged.is_empty() && found.torn_bytes == 0, "{found:?}");
        assert_eq!(log.bytes(), segments(dir.path()).iter().map(|p| fs::metadata(p).unwrap().len()).sum::<u64>());
    }

    #[test]
    fn a_log_cut_anywhere_gives_what_is_whole_and_goes_on() {
        let whole = tempfile::tempdir().unwrap();
        write(whole.path(), LIMITS, 0..6);
        let path = &segments(whole.path())[0];
        let bytes = fs::read(path).unwrap();
        for len in 0..bytes.len() {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join(path.file_name().unwrap()), &bytes[..len]).unwrap();
            let (mut log, found, records) = open(dir.path(), LIMITS);
            assert!(found.damaged.is_empty(), "{len}: {found:?}");
            assert_eq!(records, (0..records.len()).map(payload).collect::<Vec<_>>(), "{len}");
            let read = records.len();
            log.append([&b"next"[..]]).unwrap();
            drop(log);
            let (_, found, records) = open(dir.path(), LIMITS);
            assert_eq!((records.len(), &records[read][..]), (read + 1, &b"next"[..]), "{len}");
            assert_eq!(found.torn_bytes, 0, "{len}");
        }
    }

    #[test]
    fn a_flipped_bit_anywhere_loses_at_most_the_record_that_it_hit() {
        let whole = tempfile::tempdir().unwrap();
        write(whole.path(), LIMITS, 0..6);
        let path = &segments(whole.path())[0];
        let bytes = fs::read(path).unwrap();
        for at in 0..bytes.len() {
            for bit in [0, 3, 7] {
                let dir = tempfile::tempdir().unwrap();
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << bit;
                fs::write(dir.path().join(path.file_name().unwrap()), &damaged).unwrap();
                // A later segment stays readable whatever happened to the first.
                let opened = EventLog::open(dir.path(), LIMITS, |_| {});
                let Ok((mut log, first)) = opened else {
                    panic!("byte {at}: {:?}", opened.err());
                };
                log.append([&b"next"[..]]).unwrap();
                drop(log);
                let (_, found, records) = open(dir.path(), LIMITS);
                let lost = usize::from(at >= HEADER);
                let wrong = records.iter().filter(|r| &r[..] != b"next" && !(0..6).any(|n| payload(n) == **r)).count();
                assert_eq!(wrong, 0, "byte {at}");
                assert!(records.len() >= 7 - lost, "byte {at}: {} records", records.len());
                assert_eq!(records.last().unwrap(), b"next", "byte {at}");
                // Mended: nothing is found a second time, and the original is kept, unless it looked like a torn tail.
                assert_eq!((found.damaged_bytes, found.torn_bytes), (0, 0), "byte {at}");
                assert!(first.damaged.len() == 1 || first.torn_bytes > 0, "byte {at}: {first:?}");
            }
        }
    }

    #[test]
    fn the_oldest_segments_go() {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits { segment_bytes: 100, max_bytes: 500, max_age: None };
        write(dir.path(), limits, 0..40);
        let (mut log, ..) = open(dir.path(), limits);
        assert!(log.retain(&|_| {}).unwrap() > 0);
        assert!(log.bytes() <= 500);
        let (_, found, records) = open(dir.path(), limits);
        assert_eq!(records.last().unwrap(), &payload(39));
        assert!(found.damaged.is_empty() && records.len() < 40, "{found:?}");
        let old = Limits { max_age: Some(Duration::ZERO), ..LIMITS };
        let (mut log, ..) = open(dir.path(), old);
        std::thread::sleep(Duration::from_millis(5));
        log.retain(&|_| {}).unwrap();
        assert_eq!(log.bytes(), 0);
    }

    #[test]
    fn a_write_that_fails_leaves_nothing_and_the_log_usable() {
        let dir = tempfile::tempdir().unwrap();
        let (mut log, ..) = open(dir.path(), LIMITS);
        log.append([&payload(0)[..]]).unwrap();
        let too_large = vec![0; MAX_RECORD + 1];
        log.append([&payload(7)[..], &too_large]).unwrap_err();
        // A descriptor that can't be written, as a full disk would have it.
        let path = log.current.as_ref().unwrap().path.clone();
        let good = std::mem::replace(&mut log.current.as_mut().unwrap().file, File::open(&path).unwrap());
        log.append([&payload(8)[..]]).unwrap_err();
        drop(good);
        log.append([&payload(1)[..]]).unwrap();
        drop(log);
        let (_, found, records) = open(dir.path(), LIMITS);
        assert_eq!(records, [payload(0), payload(1)]);
        assert!(found.damaged.is_empty(), "{found:?}");
    }

    /// Of tests/golden/log/make.py, with its header and with a damaged one.
    #[test]
    fn a_log_of_the_first_format_is_read() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/log/format-1.log");
        for damage in [0, 1] {
            let dir = tempfile::tempdir().unwrap();
            let mut bytes = fs::read(&golden).unwrap();
            bytes[HEADER - 1] ^= damage;
            fs::write(dir.path().join("events-00000000000000000000.log"), bytes).unwrap();
            // Twice: what is mended keeps its format.
            for _ in 0..2 {
                let mut users = Vec::new();
                EventLog::open(dir.path(), LIMITS, |record| {
                    assert_eq!(record.format, 1);
                    super::super::event::decode_body(record.payload, |event| users.push(event.user_id.to_owned()))
                        .unwrap();
                })
                .unwrap();
                assert_eq!(users, ["a", "a", "b"]);
            }
        }
    }

    #[test]
    fn what_is_in_force_outlives_its_segment() {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits { segment_bytes: 100, max_bytes: 500, max_age: None };
        write(dir.path(), limits, 0..40);
        let (mut log, ..) = open(dir.path(), limits);
        let asked = std::cell::Cell::new(0);
        let state = |take: &mut dyn FnMut(&[u8])| {
            asked.set(asked.get() + 1);
            take(b"items");
            take(b"users");
        };
        // Once for all that go, and not again before something goes that came later.
        assert!(log.retain(&state).unwrap() > 1 && asked.get() == 1 && log.carried_bytes() > 0);
        log.append([&payload(40)[..]]).unwrap();
        log.retain(&state).unwrap();
        assert_eq!(asked.get(), 1);
        drop(log);
        let mut places = Vec::new();
        let (log, found) =
            EventLog::open(dir.path(), limits, |record| places.push((record.place, record.payload.to_vec()))).unwrap();
        assert_eq!(places[..2], [(Place::Carried, b"items".to_vec()), (Place::Carried, b"users".to_vec())]);
        let last = places.len() - 1;
        assert!(places[2..last].iter().all(|(place, _)| *place == Place::Before) && last > 2);
        assert_eq!(places[last], (Place::Since, payload(40)));
        assert!(found.damaged.is_empty(), "{found:?}");
        // Without any segment, numbers go on.
        segments(dir.path()).iter().for_each(|path| fs::remove_file(path).unwrap());
        assert!(open(dir.path(), limits).0.next_sequence() == 40 && log.next_sequence() == 41);
    }

    #[test]
    fn a_newer_format_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), LIMITS, 0..1);
        let path = &segments(dir.path())[0];
        let mut bytes = fs::read(path).unwrap();
        bytes[8] = 9;
        let sum = xxh3_64(&bytes[..HEADER - 8]).to_le_bytes();
        bytes[HEADER - 8..HEADER].copy_from_slice(&sum);
        fs::write(path, bytes).unwrap();
        let error = EventLog::open(dir.path(), LIMITS, |_| {}).unwrap_err();
        assert!(format!("{error:#}").contains("is of format 9"), "{error:#}");
    }
}
