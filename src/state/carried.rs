//! What the log said of items and users, in a file of its own: segments go when they are old, upserts and deletions do not.
//!
//! `state-SEQUENCE.snap` says all that was in force before the record of that sequence. It is a segment whose header has that sequence and
//! whose records are numbered from 0. It appears whole or not at all, and takes the place of the one before.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use super::log::{self, FORMAT, Logged, Place};

/// The sequence that a file's name says; `None`: it is none of these.
fn named(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("state-")?.strip_suffix(".snap")?.parse().ok()
}

/// What was read.
#[derive(Debug, Default)]
pub struct Carried {
    /// Records before this one are in the file.
    pub sequence: u64,
    /// The file's size.
    pub bytes: u64,
    /// The file as it was found, if it was damaged, and how many bytes of it.
    pub damaged: Option<(PathBuf, u64)>,
}

/// Hands the records of the newest file in `dir` to `take`; `None`: there is none.
///
/// # Errors
/// It can't be read, or is of a newer format.
pub fn read(dir: &Path, mut take: impl FnMut(Logged<'_>)) -> anyhow::Result<Option<Carried>> {
    let Some((sequence, path)) = log::listed(dir, named)?.pop() else { return Ok(None) };
    let bytes = fs::read(&path)?;
    let begins = log::begins(&bytes)?;
    let (records, damaged) = log::records(&bytes, 0);
    for (number, payload) in records {
        take(Logged {
            format: begins.map_or(FORMAT, |(format, _)| format),
            sequence: number,
            place: Place::Carried,
            payload,
        });
    }
    let damaged = damaged + if begins.is_none() { log::HEADER as u64 } else { 0 };
    let damaged = match damaged {
        0 => None,
        damaged => {
            let beside = path.with_extension("damaged");
            fs::copy(&path, &beside)?;
            Some((beside, damaged))
        }
    };
    Ok(Some(Carried { sequence, bytes: bytes.len() as u64, damaged }))
}

/// Writes what `each` hands over, all that was in force before the record `sequence`, and removes older files. Returns the file's size; 0:
/// there was nothing, and there is no file.
///
/// # Errors
/// The files that were there before are still.
pub fn write(dir: &Path, sequence: u64, each: impl FnOnce(&mut dyn FnMut(&[u8]))) -> io::Result<u64> {
    let before = log::listed(dir, named)?;
    let beside = dir.join("state.new");
    let mut out = BufWriter::with_capacity(1 << 20, File::create(&beside)?);
    out.write_all(&log::header(FORMAT, sequence))?;
    let (mut number, mut bytes, mut result) = (0u64, log::HEADER as u64, Ok(()));
    each(&mut |payload| {
        let mut put = || {
            out.write_all(&log::record_header(number, payload))?;
            out.write_all(payload)
        };
        if result.is_ok() {
            result = put();
        }
        number += 1;
        bytes += (log::RECORD_HEADER + payload.len()) as u64;
    });
    let written = result.and_then(|()| out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all());
    if let Err(error) = written {
        // Half a file is worth nothing.
        let _ = fs::remove_file(&beside);
        return Err(error);
    }
    let path = dir.join(format!("state-{sequence:020}.snap"));
    match number {
        0 => fs::remove_file(&beside)?,
        _ => fs::rename(&beside, &path)?,
    }
    log::sync_directory(dir)?;
    for (_, old) in before.into_iter().filter(|(_, old)| number == 0 || *old != path) {
        fs::remove_file(old)?;
    }
    Ok(if number == 0 { 0 } else { bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(dir: &Path) -> (Option<u64>, Vec<Vec<u8>>, bool) {
        let mut records = Vec::new();
        let carried = read(dir, |record| records.push(record.payload.to_vec())).unwrap();
        let damaged = carried.as_ref().is_some_and(|carried| carried.damaged.is_some());
        (carried.map(|carried| carried.sequence), records, damaged)
    }

    fn put(dir: &Path, sequence: u64, records: &[&[u8]]) -> u64 {
        write(dir, sequence, |take| records.iter().for_each(|record| take(record))).unwrap()
    }

    #[test]
    fn the_newest_is_what_there_is() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(all(dir.path()), (None, vec![], false));
        put(dir.path(), 7, &[b"one"]);
        let bytes = put(dir.path(), 9, &[b"one", b"", b"two"]);
        assert_eq!(all(dir.path()), (Some(9), vec![b"one".to_vec(), vec![], b"two".to_vec()], false));
        let files: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!((files.len(), fs::metadata(&files[0]).unwrap().len()), (1, bytes));
        assert_eq!((put(dir.path(), 12, &[]), all(dir.path())), (0, (None, vec![], false)));
    }

    #[test]
    fn damage_anywhere_loses_at_most_the_record_that_it_hit() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), 3, &[b"one", b"two", b"three"]);
        let path = dir.path().join(format!("state-{:020}.snap", 3));
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 4;
            fs::write(&path, &bytes).unwrap();
            let (sequence, records, damaged) = all(dir.path());
            assert!(sequence == Some(3) && damaged, "byte {at}");
            assert_eq!(records.len(), 3 - usize::from(at >= log::HEADER), "byte {at}");
            fs::write(&path, &whole[..at]).unwrap();
            assert!(all(dir.path()).1.len() < 3);
        }
    }
}
