//! Engines in files: built once, read back only if they are whole and exactly what is asked for.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use crate::{Capability, Profiles};

/// The first bytes of a file; the digit counts what follows.
const MAGIC: &[u8; 8] = b"TSTMTRT1";
/// No engine is larger: a length beyond it is damage, and is not allocated.
const MOST_BYTES: u64 = 16 << 30;
/// As long as another process may take to build an engine before this one builds it, too.
const PATIENCE: Duration = Duration::from_secs(600);
const PAUSE: Duration = Duration::from_millis(20);

/// All that an engine depends on. TensorRT promises nothing for another version of itself or another GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key<'a> {
    /// The ONNX file's bytes.
    pub model: &'a [u8],
    /// Which TensorRT.
    pub flavour: &'a str,
    /// Its whole version.
    pub version: &'a str,
    /// Of the GPU.
    pub capability: Capability,
    /// What it is built for.
    pub profiles: &'a Profiles,
    /// Inputs: names, types, widths.
    pub inputs: &'a str,
}

impl fmt::Display for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Key { model, flavour, version, capability, profiles, inputs } = self;
        let rows = profiles.rows();
        write!(f, "model {:032x} of {} bytes\n{flavour} {version}\n", xxh3_128(model), model.len())?;
        write!(f, "capability {capability}\nrows {rows:?}\ninputs {inputs}\n")
    }
}

/// What became of an engine's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// Read from its file.
    Whole,
    /// There was no file.
    Built,
    /// There was one, and it was not trusted.
    Rebuilt(String),
}

/// A folder of engines, which several processes may share.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// Of that folder, which is made when there is something to keep.
    pub fn new(folder: PathBuf) -> Self {
        Cache { folder }
    }

    /// The file of an engine.
    pub fn path(&self, key: &Key<'_>) -> PathBuf {
        self.folder.join(format!("{:032x}.plan", xxh3_128(key.to_string().as_bytes())))
    }

    /// The engine of that key: from its file, or built, by one of those that ask at the same time. A folder that can't be written costs a
    /// warning and building it at every start.
    ///
    /// # Errors
    /// `build`'s.
    pub fn get<E>(&self, key: &Key<'_>, build: impl FnOnce() -> Result<Vec<u8>, E>) -> Result<(Vec<u8>, Found), E> {
        let (path, text) = (self.path(key), key.to_string());
        let first = match read(&path, &text) {
            Ok(Some(plan)) => return Ok((plan, Found::Whole)),
            other => other,
        };
        let lock = fs::create_dir_all(&self.folder).and_then(|()| lock(&path));
        // The one that held the lock has written it.
        let second = if lock.is_ok() { read(&path, &text) } else { first };
        let found = match second {
            Ok(Some(plan)) => return Ok((plan, Found::Whole)),
            Ok(None) => Found::Built,
            Err(reason) => {
                tracing::warn!(file = %path.display(), reason, "the engine is built anew");
                Found::Rebuilt(reason)
            }
        };
        let plan = build()?;
        if let Err(error) = lock.and_then(|lock| write(&path, &text, &plan).map(|()| drop(lock))) {
            tracing::warn!(file = %path.display(), %error, "the engine can't be kept, and is built at every start");
        }
        Ok((plan, found))
    }
}

/// Holds the lock beside a file until what is returned is dropped; the system frees it when a process ends.
fn lock(path: &Path) -> io::Result<File> {
    let file = File::options().create(true).append(true).open(path.with_extension("lock"))?;
    let begun = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(fs::TryLockError::WouldBlock) if begun.elapsed() < PATIENCE => std::thread::sleep(PAUSE),
            // Whoever holds it hangs; a file is exchanged as a whole, so that two that write it do no harm.
            Err(fs::TryLockError::WouldBlock) => return Ok(file),
            Err(fs::TryLockError::Error(error)) => return Err(error),
        }
    }
}

/// Magic, length and checksum of the key and of the engine, key, engine.
fn header(key: &str, plan: &[u8]) -> Vec<u8> {
    let mut header = MAGIC.to_vec();
    for bytes in [key.as_bytes(), plan] {
        header.extend((bytes.len() as u64).to_le_bytes());
        header.extend(xxh3_64(bytes).to_le_bytes());
    }
    header.extend(key.as_bytes());
    header
}

fn write(path: &Path, key: &str, plan: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().prefix(".plan").tempfile_in(folder)?;
    file.write_all(&header(key, plan))?;
    file.write_all(plan)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    File::open(folder)?.sync_all()
}

/// The engine in a file; `None`: there is no file.
///
/// # Errors
/// Why it is not to be trusted.
fn read(path: &Path, key: &str) -> Result<Option<Vec<u8>>, String> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let cut = |error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof => "it is cut short".to_owned(),
        _ => error.to_string(),
    };
    let mut fixed = [0; 40];
    file.read_exact(&mut fixed).map_err(cut)?;
    if fixed[..8] != MAGIC[..] {
        return Err("it is no engine's file of this version".to_owned());
    }
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| fixed[8 + 8 * at + byte]));
    let mut found = vec![0; key.len()];
    if number(0) == key.len() as u64 {
        file.read_exact(&mut found).map_err(cut)?;
    }
    if found != key.as_bytes() || number(1) != xxh3_64(key.as_bytes()) {
        return Err("it is of another model, TensorRT, GPU or profile".to_owned());
    }
    let len = number(2);
    let there = file.metadata().map_err(|error| error.to_string())?.len();
    if len > MOST_BYTES || there != fixed.len() as u64 + number(0) + len {
        return Err(format!("it has {there} bytes, not those of an engine of {len}"));
    }
    let mut plan = Vec::new();
    file.take(len).read_to_end(&mut plan).map_err(cut)?;
    match plan.len() as u64 == len && xxh3_64(&plan) == number(3) {
        true => Ok(Some(plan)),
        false => Err("its checksum is another".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn key<'a>(model: &'a [u8], profiles: &'a Profiles) -> Key<'a> {
        let capability = Capability(8, 6);
        Key { model, flavour: "TensorRT", version: "11.4.0", capability, profiles, inputs: "features float32 [-1, 4]" }
    }

    fn built(plan: &[u8]) -> impl FnOnce() -> Result<Vec<u8>, Infallible> + use<'_> {
        || Ok(plan.to_vec())
    }

    fn never() -> Result<Vec<u8>, Infallible> {
        panic!("the file was there")
    }

    #[test]
    fn everything_that_matters_is_in_the_key() {
        let (one, two) = (Profiles::new(&[1], 8).unwrap(), Profiles::new(&[1, 2], 8).unwrap());
        let base = key(b"model", &one);
        let others = [
            key(b"modem", &one),
            key(b"model", &two),
            Key { flavour: "TensorRT-RTX", ..base.clone() },
            Key { version: "11.4.1", ..base.clone() },
            Key { capability: Capability(9, 0), ..base.clone() },
            Key { inputs: "features float32 [-1, 5]", ..base.clone() },
        ];
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path().join("made/when/needed"));
        assert_eq!(cache.get(&base, built(b"base")).unwrap(), (b"base".to_vec(), Found::Built));
        for (at, other) in others.iter().enumerate() {
            assert!(cache.path(other) != cache.path(&base), "{at}");
            let plan = [at as u8];
            assert_eq!(cache.get(other, built(&plan)).unwrap(), (plan.to_vec(), Found::Built));
            // As if the names of the files met.
            fs::copy(cache.path(other), cache.path(&base)).unwrap();
            let (plan, found) = cache.get(&base, built(b"base")).unwrap();
            assert_eq!(plan, b"base");
            assert!(matches!(&found, Found::Rebuilt(why) if why.contains("another model")), "{at}: {found:?}");
            assert_eq!(cache.get(&base, never).unwrap(), (b"base".to_vec(), Found::Whole));
        }
    }

    #[test]
    fn no_byte_may_change_or_be_missing() {
        let profiles = Profiles::new(&[1], 8).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (cache, key) = (Cache::new(folder.path().to_owned()), key(b"model", &profiles));
        let path = cache.path(&key);
        cache.get(&key, built(b"an engine")).unwrap();
        let whole = fs::read(&path).unwrap();
        let wrong = |bytes: &[u8], what: &str| {
            fs::write(&path, bytes).unwrap();
            let (plan, found) = cache.get(&key, built(b"an engine")).unwrap();
            assert!(plan == b"an engine" && matches!(found, Found::Rebuilt(_)), "{what}: {found:?}");
            assert_eq!(fs::read(&path).unwrap(), whole, "{what}");
        };
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            wrong(&bytes, &format!("byte {at}"));
            wrong(&whole[..at], &format!("{at} bytes"));
        }
        wrong(&[&whole[..], b"more"].concat(), "more");
        let error: Result<_, &str> = cache.get(&Key { version: "0", ..key }, || Err("no GPU"));
        assert_eq!(error, Err("no GPU"));
    }

    #[test]
    fn of_many_that_ask_one_builds() {
        let profiles = Profiles::new(&[1], 8).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let n_built = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    // Each like a process of its own.
                    let cache = Cache::new(folder.path().to_owned());
                    let build = || {
                        n_built.fetch_add(1, Ordering::Relaxed);
                        std::thread::yield_now();
                        Ok::<_, Infallible>(vec![7; 1 << 16])
                    };
                    assert_eq!(cache.get(&key(b"model", &profiles), build).unwrap().0, [7; 1 << 16]);
                });
            }
        });
        assert_eq!(n_built.into_inner(), 1);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_no_error() {
        let profiles = Profiles::new(&[1], 8).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let cache = Cache::new(file.join("below"));
        for _ in 0..2 {
            let (plan, found) = cache.get(&key(b"model", &profiles), built(b"engine")).unwrap();
            assert!(plan == b"engine" && found != Found::Whole, "{found:?}");
        }
    }
}
