//! Files as one compressed stream, cut into pieces that a transfer takes, and back.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

/// What the stream begins with; its version is the format's.
const MAGIC: &[u8; 8] = b"TSTMGPU1";
/// Longest name of a file.
const MAX_NAME: u32 = 4096;

/// A file to carry.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Where it lies when it is unpacked; relative.
    pub name: PathBuf,
    /// What it holds.
    pub bytes: Vec<u8>,
    /// Whether it is a program.
    pub is_executable: bool,
}

/// Describes the pieces; lies beside the first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The stream's pieces in order: bytes and checksum (xxh3, 64 bits) of each.
    pub pieces: Vec<(u64, u64)>,
    /// Name and size of each file.
    pub files: Vec<(PathBuf, u64)>,
}

/// Name of piece `at`.
pub fn name(at: usize) -> String {
    format!("piece-{at:02}.bin")
}

/// Writes the pieces of `entries`, which are taken one by one, to `folder`: the first at most `limit - first_holds` bytes long, because that much lies beside it, the
/// others `limit`.
///
/// # Errors
/// The first has no room, or the disk fails.
pub fn pack(
    entries: impl IntoIterator<Item = Result<Entry>>,
    folder: &Path,
    limit: u64,
    first_holds: u64,
    level: i32,
) -> Result<Manifest> {
    ensure!(first_holds < limit, "{first_holds} bytes lie beside the first piece, and a piece has {limit}");
    let mut stream = zstd::Encoder::new(Vec::new(), level)?;
    // Libraries have the same code far apart.
    stream.long_distance_matching(true)?;
    stream.write_all(MAGIC)?;
    let mut files = Vec::new();
    for entry in entries {
        let Entry { name, bytes, is_executable } = entry?;
        let text = name.to_str().with_context(|| format!("{}: not UTF-8", name.display()))?;
        stream.write_all(&(text.len() as u32).to_le_bytes())?;
        stream.write_all(text.as_bytes())?;
        stream.write_all(&[u8::from(is_executable)])?;
        stream.write_all(&(bytes.len() as u64).to_le_bytes())?;
        stream.write_all(&bytes)?;
        files.push((name, bytes.len() as u64));
    }
    let stream = stream.finish()?;
    let mut manifest = Manifest { pieces: Vec::new(), files };
    let (mut rest, mut room) = (&stream[..], limit - first_holds);
    while !rest.is_empty() {
        let (piece, more) = rest.split_at(rest.len().min(room as usize));
        let path = folder.join(name(manifest.pieces.len()));
        fs::write(&path, piece).with_context(|| path.display().to_string())?;
        manifest.pieces.push((piece.len() as u64, xxh3_64(piece)));
        (rest, room) = (more, limit);
    }
    Ok(manifest)
}

/// Unpacks the pieces that lie in `folders` (each in any of them) below `into`; returns the files.
///
/// # Errors
/// A piece that is missing or damaged, by name; a name that leads out of `into`.
pub fn unpack(manifest: &Manifest, folders: &[PathBuf], into: &Path) -> Result<Vec<PathBuf>> {
    let mut stream = Vec::new();
    for (at, &(len, checksum)) in manifest.pieces.iter().enumerate() {
        let name = name(at);
        let path = folders.iter().map(|folder| folder.join(&name)).find(|path| path.exists());
        let path = path.with_context(|| format!("{name} is missing: copy it beside the others"))?;
        let piece = fs::read(&path).with_context(|| path.display().to_string())?;
        ensure!(piece.len() as u64 == len && xxh3_64(&piece) == checksum, "{}: damaged", path.display());
        stream.extend_from_slice(&piece);
    }
    let mut stream = zstd::Decoder::new(&stream[..])?;
    // As far back as the packer looks.
    stream.window_log_max(27)?;
    let mut magic = [0; 8];
    stream.read_exact(&mut magic)?;
    ensure!(&magic == MAGIC, "the pieces are not of this program");
    let mut written = Vec::new();
    loop {
        let mut word = [0; 4];
        match stream.read(&mut word[..1])? {
            0 => return Ok(written),
            _ => stream.read_exact(&mut word[1..])?,
        }
        let length = u32::from_le_bytes(word);
        ensure!(length <= MAX_NAME, "the pieces are not of this program");
        let mut text = vec![0; length as usize];
        stream.read_exact(&mut text)?;
        let name = PathBuf::from(String::from_utf8(text)?);
        if name.components().any(|part| !matches!(part, Component::Normal(_))) {
            bail!("{}: leads elsewhere", name.display());
        }
        let (mut mode, mut len) = ([0], [0; 8]);
        stream.read_exact(&mut mode)?;
        stream.read_exact(&mut len)?;
        let path = into.join(&name);
        fs::create_dir_all(path.parent().unwrap_or(into))?;
        let mut file = fs::File::create(&path).with_context(|| path.display().to_string())?;
        let copied = std::io::copy(&mut (&mut stream).take(u64::from_le_bytes(len)), &mut file)?;
        ensure!(copied == u64::from_le_bytes(len), "{}: cut off", name.display());
        if mode[0] != 0 {
            file.set_permissions(fs::Permissions::from_mode(0o755))?;
        }
        written.push(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_come_back_from_pieces_within_the_limit() {
        let (folder, into) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut state = 7u64;
        let mut noise = |n: usize| -> Vec<u8> {
            let mut next = || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 56) as u8
            };
            (0..n).map(|_| next()).collect()
        };
        let entries = [
            Entry { name: "bin/run".into(), bytes: noise(20_000), is_executable: true },
            Entry { name: "empty".into(), bytes: Vec::new(), is_executable: false },
            Entry { name: "lib/x.so".into(), bytes: noise(50_000), is_executable: false },
        ];
        let manifest = pack(entries.iter().cloned().map(Ok), folder.path(), 16_000, 10_000, 3).unwrap();
        let sizes: Vec<u64> = manifest.pieces.iter().map(|piece| piece.0).collect();
        assert_eq!((sizes[0], sizes[1]), (6_000, 16_000));
        assert!(sizes.len() == 6 && sizes.iter().all(|&size| size <= 16_000), "{sizes:?}");
        // Pieces may lie in several folders.
        let elsewhere = tempfile::tempdir().unwrap();
        fs::rename(folder.path().join(name(3)), elsewhere.path().join(name(3))).unwrap();
        let folders = [folder.path().to_owned(), elsewhere.path().to_owned()];
        let files = unpack(&manifest, &folders, into.path()).unwrap();
        assert_eq!(files, entries.iter().map(|e| e.name.clone()).collect::<Vec<_>>());
        for entry in &entries {
            let path = into.path().join(&entry.name);
            assert_eq!(fs::read(&path).unwrap(), entry.bytes);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o100 != 0, entry.is_executable);
        }
        let said = |manifest: &Manifest, folders: &[PathBuf]| {
            format!("{:#}", unpack(manifest, folders, into.path()).unwrap_err())
        };
        assert_eq!(said(&manifest, &folders[..1]), "piece-03.bin is missing: copy it beside the others");
        fs::write(folder.path().join(name(1)), noise(16_000)).unwrap();
        assert!(said(&manifest, &folders).ends_with("piece-01.bin: damaged"));
        let said = pack(entries.iter().cloned().map(Ok), folder.path(), 16_000, 16_000, 3).unwrap_err().to_string();
        assert_eq!(said, "16000 bytes lie beside the first piece, and a piece has 16000");
        let outward = [Entry { name: "../x".into(), bytes: vec![1], is_executable: false }];
        let manifest = pack(outward.into_iter().map(Ok), folder.path(), 1000, 0, 3).unwrap();
        let said = unpack(&manifest, &folders[..1], into.path()).unwrap_err().to_string();
        assert_eq!(said, "../x: leads elsewhere");
    }
}
