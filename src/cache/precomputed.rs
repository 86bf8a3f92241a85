//! Slates made ahead of time (`tastemaker precompute`), in a file that the server maps.
//!
//! Magic with a format number, time of making (seconds since 1970), slots, slates, then an open-addressing table of slots (key, offset,
//! length), then the values ([`super::value`]), which are checksummed one by one. Keys are those of the result cache, so a slate
//! is found only by the bundle, configuration and request that it was made for, of a user of whom nothing new is known.
#![allow(unsafe_code)] // A memory map.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use memmap2::{Mmap, MmapOptions};

use super::key::CacheKey;
use super::value;
use crate::api::Slate;
use crate::catalog::generation::Generation;

/// The last byte is the format.
const MAGIC: [u8; 8] = *b"TSMPRE\x00\x01";
const HEADER: usize = 8 + 8 + 8 + 8 + 16;
const SLOT: usize = 16 + 8 + 4;

/// A mapped file.
#[derive(Debug)]
pub struct Precomputed {
    bytes: Mmap,
    made: u64,
    n_slots: usize,
    n_slates: u64,
    scope: u128,
}

impl Precomputed {
    /// Maps a file and brings it into memory, so that no shard waits for the disk.
    ///
    /// # Errors
    /// It can't be read, or is not one.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let place = || path.display().to_string();
        let file = File::open(path).with_context(place)?;
        // SAFETY: `precompute` writes such files whole and renames them into place, and never writes to one again; what
        // is read from it is checked before it is used.
        let bytes = unsafe { MmapOptions::new().populate().map(&file) }.with_context(place)?;
        let Some(header) = bytes.first_chunk::<HEADER>().filter(|header| header.starts_with(&MAGIC)) else {
            bail!("{}: not a file of `tastemaker precompute`, or of another version", path.display());
        };
        let (made, n_slots, n_slates) = (number(header, 8), number(header, 16), number(header, 24));
        let mut scope = [0; 16];
        scope.copy_from_slice(&header[32..]);
        let table = usize::try_from(n_slots).ok().and_then(|n| n.checked_mul(SLOT));
        let fits = table.is_some_and(|table| table <= bytes.len() - HEADER);
        if !fits || !n_slots.is_power_of_two() || n_slates >= n_slots {
            bail!("{}: damaged", path.display());
        }
        Ok(Precomputed { made, n_slots: n_slots as usize, n_slates, scope: u128::from_le_bytes(scope), bytes })
    }

    /// Writes slates made at `made` (seconds since 1970) to a new file in the place of `path`. `scope` is a key of what shapes answers.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn write(path: &Path, made: u64, scope: u128, slates: &[(CacheKey, Vec<u8>)]) -> anyhow::Result<()> {
        let place = || path.display().to_string();
        let n_slots = (slates.len() * 2).next_power_of_two().max(2);
        let mut slots = vec![[0u8; SLOT]; n_slots];
        let mut offset = (HEADER + n_slots * SLOT) as u64;
        for (key, value) in slates {
            let mut at = *key as usize & (n_slots - 1);
            while slots[at] != [0; SLOT] {
                at = (at + 1) & (n_slots - 1);
            }
            slots[at][..16].copy_from_slice(&key.to_le_bytes());
            slots[at][16..24].copy_from_slice(&offset.to_le_bytes());
            slots[at][24..].copy_from_slice(&(value.len() as u32).to_le_bytes());
            offset += value.len() as u64;
        }
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(dir).with_context(place)?;
        let mut out = BufWriter::new(file.as_file_mut());
        let mut put = || -> std::io::Result<()> {
            out.write_all(&MAGIC)?;
            for number in [made, n_slots as u64, slates.len() as u64] {
                out.write_all(&number.to_le_bytes())?;
            }
            out.write_all(&scope.to_le_bytes())?;
            out.write_all(slots.as_flattened())?;
            slates.iter().try_for_each(|(_, value)| out.write_all(value))?;
            out.flush()?;
            out.get_ref().sync_all()
        };
        put().with_context(place)?;
        drop(out);
        file.persist(path).with_context(place)?;
        Ok(())
    }

    /// The slate under `key`.
    pub fn get(&self, key: CacheKey, generation: &Arc<Generation>) -> Option<Slate> {
        let table = self.bytes.get(HEADER..HEADER + self.n_slots * SLOT)?.as_chunks::<SLOT>().0;
        let mut at = key as usize & (self.n_slots - 1);
        // At least one slot is empty in a file that was not damaged.
        for _ in 0..self.n_slots {
            let slot = &table[at];
            let (offset, len) =
                (number(slot, 16) as usize, u32::from_le_bytes([slot[24], slot[25], slot[26], slot[27]]));
            if offset == 0 {
                return None;
            }
            if slot[..16] == key.to_le_bytes() {
                return value::decode(self.bytes.get(offset..offset.checked_add(len as usize)?)?, generation);
            }
            at = (at + 1) & (self.n_slots - 1);
        }
        None
    }

    /// When it was made, seconds since 1970.
    pub fn made(&self) -> u64 {
        self.made
    }

    /// Slates in it.
    pub fn len(&self) -> u64 {
        self.n_slates
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.n_slates == 0
    }

    /// What its slates were made for.
    pub fn scope(&self) -> u128 {
        self.scope
    }
}

fn number(bytes: &[u8], at: usize) -> u64 {
    let mut eight = [0; 8];
    eight.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(eight)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::SlateItem;
    use crate::candidates::SourceSet;
    use crate::catalog::generation::testing;
    use crate::context::StageTimings;
    use proptest::prelude::*;

    fn slate(generation: &Arc<Generation>, row: u32) -> Slate {
        Slate {
            generation: generation.clone(),
            items: vec![SlateItem { row, score: 1.0, sources: SourceSet(1), explanation: None }],
            degraded: Vec::new(),
            timings: StageTimings::default(),
            coverage: 1.0,
            known_user: true,
            n_candidates: 7,
        }
    }

    proptest! {
        #[test]
        fn what_was_written_is_found_and_nothing_else(
            // Low bits that meet.
            keys in prop::collection::btree_set((0u128..4, 0u128..40).prop_map(|(low, high)| high << 64 | low), 0..40),
            damage in any::<prop::sample::Index>(), bit in 0u8..8,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("slates");
            let generation = Arc::new(testing::plain(50));
            let slates: Vec<_> =
                (0u32..).zip(&keys).map(|(row, &key)| (key, value::encode(&slate(&generation, row)))).collect();
            Precomputed::write(&path, 12, 34, &slates).unwrap();
            let file = Precomputed::open(&path).unwrap();
            prop_assert_eq!((file.made(), file.scope(), file.len()), (12, 34, keys.len() as u64));
            for key in (0..4).flat_map(|low| (0..40).map(move |high: u128| high << 64 | low)) {
                let want = keys.iter().position(|k| *k == key).map(|row| row as u32);
                prop_assert_eq!(file.get(key, &generation).map(|slate| slate.items[0].row), want);
            }
            // Damage finds the right slate or none.
            drop(file);
            let mut bytes = std::fs::read(&path).unwrap();
            let at = damage.index(bytes.len());
            bytes[at] ^= 1 << bit;
            std::fs::write(&path, bytes).unwrap();
            if let Ok(file) = Precomputed::open(&path) {
                for (row, &key) in (0u32..).zip(&keys) {
                    let got = file.get(key, &generation);
                    let at_key = at >= HEADER && (at - HEADER) % SLOT < 24 && at < HEADER + file.n_slots * SLOT;
                    prop_assert!(got.is_none_or(|slate| at_key || slate.items[0].row == row));
                }
            }
        }
    }

    #[test]
    fn other_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "something else that is long enough to hold a header, and is none of ours"] {
            let path = dir.path().join("x");
            std::fs::write(&path, text).unwrap();
            assert!(Precomputed::open(&path).unwrap_err().to_string().contains('x'));
        }
        assert!(Precomputed::open(&dir.path().join("missing")).is_err());
    }
}
