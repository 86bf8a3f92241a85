//! Reading the event log behind its writer, for those who carry events elsewhere.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::log::{self, HEADER, Logged, Place, RECORD_HEADER};

/// Bytes read at a time; more for a record that is larger.
const CHUNK: usize = 1 << 20;

/// A reader that goes on where it was.
#[derive(Debug)]
pub struct Follower {
    dir: PathBuf,
    next: u64,
    segment: Option<Segment>,
    buffer: Vec<u8>,
    lost: u64,
}

#[derive(Debug)]
struct Segment {
    file: File,
    first: u64,
    format: u32,
    /// Of what was not read yet.
    offset: u64,
}

impl Follower {
    /// Reads the log in `dir` from the record of sequence `next` on.
    pub fn new(dir: &Path, next: u64) -> Self {
        Follower { dir: dir.to_owned(), next, segment: None, buffer: Vec::new(), lost: 0 }
    }

    /// Sequence of the next record.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Records that were gone before they were read, or damaged.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Hands records below the sequence `until`, which must be in the log, to `take`.
    /// Returns after about a MiB or when there are no more.
    ///
    /// # Errors
    /// A file can't be read; what was handed over counts as read.
    pub fn read(&mut self, until: u64, mut take: impl FnMut(Logged<'_>)) -> io::Result<()> {
        while self.next < until {
            if self.segment.is_none() && !self.open(until)? {
                return Ok(());
            }
            let Some(segment) = &mut self.segment else { return Ok(()) };
            let mut want = CHUNK;
            // Until there is a whole record, or no more of the file.
            let filled = loop {
                self.buffer.resize(want, 0);
                let filled = read_at(&segment.file, &mut self.buffer, segment.offset)?;
                let whole = filled >= RECORD_HEADER && {
                    let len = log::number(&self.buffer, 0, 4) as usize;
                    len > log::MAX_RECORD || filled >= RECORD_HEADER + len
                };
                if whole || filled < want {
                    break filled;
                }
                want = want.max(RECORD_HEADER + log::number(&self.buffer, 0, 4) as usize);
            };
            let (mut at, mut any) = (0, false);
            while at + RECORD_HEADER <= filled && self.next < until {
                // Records before `next` are there when it lies in the middle of a segment.
                match log::record(&self.buffer[..filled], at, segment.first) {
                    Some((len, sequence)) => {
                        if sequence >= until {
                            self.next = until;
                            return Ok(());
                        }
                        if sequence >= self.next {
                            self.lost += sequence - self.next;
                            let payload = &self.buffer[at + RECORD_HEADER..at + RECORD_HEADER + len];
                            take(Logged { format: segment.format, sequence, place: Place::Since, payload });
                            self.next = sequence + 1;
                            any = true;
                        }
                        at += RECORD_HEADER + len;
                    }
                    // Damage, unless the rest of it was not read yet.
                    None => {
                        let len = log::number(&self.buffer, at, 4) as usize;
                        let cut = filled == want && len <= log::MAX_RECORD && at + RECORD_HEADER + len > filled;
                        if cut {
                            break;
                        }
                        at += 1;
                    }
                }
            }
            segment.offset += at as u64;
            if at == 0 {
                // The file ends, and what is wanted lies behind it.
                let first = segment.first;
                self.segment = None;
                let Some((begins, path)) =
                    log::listed(&self.dir, log::named)?.into_iter().find(|(begins, _)| *begins > first)
                else {
                    return Ok(());
                };
                self.lost += begins.saturating_sub(self.next);
                self.next = self.next.max(begins);
                self.segment = Some(Segment::open(&path, begins)?);
            } else if any {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Opens the segment of the next record; where it is gone, the first after it. False: there is none.
    fn open(&mut self, until: u64) -> io::Result<bool> {
        let segments = log::listed(&self.dir, log::named)?;
        let at = segments.iter().rposition(|(first, _)| *first <= self.next).unwrap_or(0);
        let Some((first, path)) = segments.get(at) else { return Ok(false) };
        let first = *first;
        if first > self.next {
            self.lost += first.min(until) - self.next;
            self.next = first.min(until);
        }
        self.segment = Some(Segment::open(path, first)?);
        Ok(true)
    }
}

impl Segment {
    fn open(path: &Path, first: u64) -> io::Result<Self> {
        let file = File::open(path)?;
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0)?;
        let format = log::begins(&header).map_err(io::Error::other)?.map_or(log::FORMAT, |(format, _)| format);
        Ok(Segment { file, first, format, offset: HEADER as u64 })
    }
}

/// Reads until `buffer` is full or the file ends.
fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use super::super::log::{EventLog, Limits};
    use super::*;
    use proptest::prelude::*;

    fn payload(n: u64, size: usize) -> Vec<u8> {
        let mut payload = n.to_le_bytes().to_vec();
        payload.resize(8 + size, n as u8);
        payload
    }

    fn open(dir: &Path, segment_bytes: u64, max_bytes: u64) -> EventLog {
        let limits = Limits { segment_bytes, max_bytes, max_age: None::<Duration> };
        EventLog::open(dir, limits, |_| {}).unwrap().0
    }

    fn read(follower: &mut Follower, until: u64) -> Vec<u64> {
        let mut got = Vec::new();
        for _ in 0..10_000 {
            let before = follower.next();
            follower
                .read(until, |Logged { format, sequence, payload, .. }| {
                    assert_eq!((format, log::number(payload, 0, 8)), (log::FORMAT, sequence));
                    assert!(payload[8..].iter().all(|&b| b == sequence as u8));
                    got.push(sequence);
                })
                .unwrap();
            if follower.next() == before {
                break;
            }
        }
        got
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn everything_is_read_once_wherever_it_begins(
            sizes in prop::collection::vec(prop_oneof![8 => 0usize..200, 1 => 400_000usize..1_500_000], 1..30),
            segment_bytes in 200u64..4000, from in 0usize..30, steps in prop::collection::vec(0u64..8, 0..12),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let mut log = open(dir.path(), segment_bytes, 1 << 40);
            let from = from.min(sizes.len()) as u64;
            let mut follower = Follower::new(dir.path(), from);
            let mut steps = steps.into_iter();
            let (mut got, mut until) = (Vec::new(), 0);
            for (n, size) in (0u64..).zip(&sizes) {
                log.append([&payload(n, *size)[..]]).unwrap();
                if n % 3 == 2 {
                    // Never beyond what is there.
                    until = (until + steps.next().unwrap_or(3)).min(n + 1);
                    got.extend(read(&mut follower, until));
                }
            }
            got.extend(read(&mut follower, sizes.len() as u64));
            prop_assert_eq!(got, (from..sizes.len() as u64).collect::<Vec<_>>());
            prop_assert_eq!((follower.next(), follower.lost()), (sizes.len() as u64, 0));
        }
    }

    #[test]
    fn what_retention_took_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path(), 200, 1000);
        for n in 0..100 {
            log.append([&payload(n, 50)[..]]).unwrap();
        }
        assert!(log.retain(&|_| {}).unwrap() > 0);
        let mut follower = Follower::new(dir.path(), 5);
        let got = read(&mut follower, 100);
        assert_eq!(got.last(), Some(&99));
        assert_eq!(got.len() as u64 + follower.lost(), 95);
        assert!(follower.lost() > 0);
    }

    #[test]
    fn a_damaged_record_costs_itself_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path(), 1 << 20, 1 << 30);
        for n in 0..6 {
            log.append([&payload(n, 50)[..]]).unwrap();
        }
        let path = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        bytes[HEADER + 2 * (RECORD_HEADER + 58) + RECORD_HEADER + 20] ^= 1;
        fs::write(&path, bytes).unwrap();
        let mut follower = Follower::new(dir.path(), 0);
        assert_eq!(read(&mut follower, 6), [0, 1, 3, 4, 5]);
        assert_eq!(follower.lost(), 1);
    }
}
