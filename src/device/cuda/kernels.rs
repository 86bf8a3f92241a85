//! The kernels' machine code for a GPU: embedded where nvcc was at hand when this was built, else made by NVRTC and kept on disk.
#![allow(unsafe_code)] // Calls of NVRTC, through cudarc.

use std::ffi::{CStr, CString};
use std::io::Write as _;
use std::path::Path;

use cudarc::nvrtc::{result as nvrtc, sys};
use tastemaker_kernels::{FATBIN, OPTIONS, SOURCE};
use xxhash_rust::xxh3::xxh3_128;

use super::probe::Version;

/// The functions of NVRTC that are called here. cudarc panics where one is missing, so they are looked for first.
const NEEDED: [&[u8]; 8] = [
    b"nvrtcVersion\0",
    b"nvrtcCreateProgram\0",
    b"nvrtcCompileProgram\0",
    b"nvrtcGetProgramLogSize\0",
    b"nvrtcGetProgramLog\0",
    b"nvrtcGetCUBINSize\0",
    b"nvrtcGetCUBIN\0",
    b"nvrtcDestroyProgram\0",
];
/// What a kept file begins with; its version is the format's.
const MAGIC: [u8; 8] = *b"TSTMCUB1";
/// Magic, key, length and checksum.
const HEADER: usize = 8 + 16 + 8 + 16;

/// Why there is no machine code.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// No library of that name.
    #[error("no NVRTC: libnvrtc.so.13 is not there or can't be opened, and this build has no compiled kernels")]
    NoNvrtc,
    /// A library of that name is none.
    #[error("libnvrtc.so is not NVRTC: it has no {0}")]
    NotNvrtc(String),
    /// What it said first.
    #[error("NVRTC {nvrtc} does not compile the kernels for sm_{arch}: {said}")]
    Compile {
        /// Which one.
        nvrtc: Version,
        /// For what.
        arch: u32,
        /// First line of its log, or the error's name.
        said: String,
    },
}

/// Machine code that a driver loads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Image {
    /// Several architectures' code and PTX, part of this program.
    Embedded(&'static [u8]),
    /// Code for one architecture.
    Compiled(Vec<u8>),
}

impl Image {
    /// For the driver.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Image::Embedded(bytes) => bytes,
            Image::Compiled(bytes) => bytes,
        }
    }
}

/// Machine code for a GPU of `capability`. What NVRTC makes is kept in `cache`, if there is one; a cache that can't be written costs a
/// compilation of about a second at each start, and a warning.
///
/// # Errors
/// Nothing is embedded, and NVRTC is missing or fails.
pub fn image(capability: Version, cache: Option<&Path>) -> Result<Image, KernelError> {
    match FATBIN {
        Some(fatbin) => Ok(Image::Embedded(fatbin)),
        None => {
            let (arch, nvrtc) = (capability.0 * 10 + capability.1, Nvrtc::open()?);
            kept(cache, &Key { arch, nvrtc: nvrtc.version, source: SOURCE }, || nvrtc.compile(SOURCE, arch))
                .map(Image::Compiled)
        }
    }
}

/// NVRTC, opened, with all that is needed of it.
#[derive(Clone, Copy, Debug)]
pub struct Nvrtc {
    /// Its own.
    pub version: Version,
}

impl Nvrtc {
    /// Opens the library.
    ///
    /// # Errors
    /// It is not there, or is something else.
    pub fn open() -> Result<Self, KernelError> {
        // SAFETY: a library is opened by NVRTC's name, and code that it runs on opening is trusted as the system's is.
        if !unsafe { sys::is_culib_present() } {
            return Err(KernelError::NoNvrtc);
        }
        // SAFETY: as above; it was there just now.
        let library = unsafe { sys::culib() };
        for name in NEEDED {
            // SAFETY: the symbol is not called, only looked for.
            if unsafe { library.get::<unsafe extern "C" fn()>(name) }.is_err() {
                return Err(KernelError::NotNvrtc(String::from_utf8_lossy(&name[..name.len() - 1]).into_owned()));
            }
        }
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the function is there, and writes two integers; they stay 0 where it fails.
        let _ = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
        Ok(Nvrtc { version: Version(major.max(0) as u32, minor.max(0) as u32) })
    }

    /// Machine code for `sm_{arch}` exactly, so that an NVRTC newer than the driver does no harm; warnings go to the log.
    ///
    /// # Errors
    /// What it says of the source, or of the architecture.
    pub fn compile(self, source: &str, arch: u32) -> Result<Vec<u8>, KernelError> {
        let (cubin, log) = self.compile_with(source, arch, &[])?;
        if !log.is_empty() {
            tracing::warn!(arch, log, "NVRTC warns of the kernels");
        }
        Ok(cubin)
    }

    /// With more options; also returns the warnings.
    fn compile_with(self, source: &str, arch: u32, more: &[&str]) -> Result<(Vec<u8>, String), KernelError> {
        let failed = |said: String| KernelError::Compile { nvrtc: self.version, arch, said };
        let text = CString::new(source).map_err(|_| failed("the source holds a NUL".into()))?;
        let program = Program(nvrtc::create_program(&text, Some(c"kernels.cu")).map_err(|e| failed(e.to_string()))?);
        let architecture = format!("--gpu-architecture=sm_{arch}");
        let options: Vec<&str> = OPTIONS.iter().chain(more).copied().chain([architecture.as_str()]).collect();
        // SAFETY: the program is one that `create_program` returned, destroyed when `program` is dropped.
        let compiled = unsafe { nvrtc::compile_program(program.0, &options) };
        let log = program.log();
        compiled.map_err(|error| failed(log.lines().next().map_or(error.to_string(), str::to_owned)))?;
        let (mut size, mut cubin) = (0, Vec::new());
        // SAFETY: the program was compiled; the function writes one size.
        let got = unsafe { sys::nvrtcGetCUBINSize(program.0, &mut size) }.result();
        got.map_err(|error| failed(error.to_string()))?;
        cubin.resize(size, 0u8);
        // SAFETY: the buffer has the size that was asked for.
        let got = unsafe { sys::nvrtcGetCUBIN(program.0, cubin.as_mut_ptr().cast()) }.result();
        got.map_err(|error| failed(error.to_string()))?;
        Ok((cubin, log))
    }
}

/// A program of NVRTC's.
struct Program(sys::nvrtcProgram);

impl Program {
    /// What was said of it, without the end's NUL and empty lines.
    fn log(&self) -> String {
        // SAFETY: the program exists until it is dropped.
        let log = unsafe { nvrtc::get_program_log(self.0) }.unwrap_or_default();
        let bytes: Vec<u8> = log.iter().map(|&c| c as u8).collect();
        let text = CStr::from_bytes_until_nul(&bytes).map_or(String::new(), |text| text.to_string_lossy().into_owned());
        text.trim().to_owned()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by `create_program`, destroyed once. A failure leaves memory behind and nothing else.
        let _ = unsafe { nvrtc::destroy_program(self.0) };
    }
}

/// What machine code depends on.
#[derive(Clone, Copy, Debug)]
struct Key<'a> {
    arch: u32,
    nvrtc: Version,
    source: &'a str,
}

impl Key<'_> {
    fn hash(&self) -> u128 {
        let Key { arch, nvrtc, source } = self;
        xxh3_128(format!("{arch} {nvrtc} {OPTIONS:?} {source}").as_bytes())
    }

    fn file(&self) -> String {
        format!("kernels-sm_{}-{:032x}.cubin", self.arch, self.hash())
    }
}

/// What `cache` keeps for `key`, or what `compile` makes, which is kept from then on.
fn kept(
    cache: Option<&Path>,
    key: &Key<'_>,
    compile: impl FnOnce() -> Result<Vec<u8>, KernelError>,
) -> Result<Vec<u8>, KernelError> {
    let path = cache.map(|folder| folder.join(key.file()));
    if let Some(path) = &path {
        match std::fs::read(path) {
            Ok(file) => match open(&file, key.hash()) {
                Some(cubin) => return Ok(cubin.to_vec()),
                None => tracing::warn!(file = %path.display(), "kept kernels are damaged: they are compiled anew"),
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(file = %path.display(), %error, "kept kernels can't be read"),
        }
    }
    let cubin = compile()?;
    if let (Some(folder), Some(path)) = (cache, &path)
        && let Err(error) = keep(folder, path, key.hash(), &cubin)
    {
        tracing::warn!(file = %path.display(), %error, "kernels can't be kept: they are compiled at each start");
    }
    Ok(cubin)
}

/// The machine code in a kept file, if the file is whole and the key's.
fn open(file: &[u8], key: u128) -> Option<&[u8]> {
    let (header, cubin) = file.split_at_checked(HEADER)?;
    (header == self::header(key, cubin)).then_some(cubin)
}

fn header(key: u128, cubin: &[u8]) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&MAGIC);
    header[8..24].copy_from_slice(&key.to_le_bytes());
    header[24..32].copy_from_slice(&(cubin.len() as u64).to_le_bytes());
    header[32..].copy_from_slice(&xxh3_128(cubin).to_le_bytes());
    header
}

/// Writes beside and renames: whoever reads sees all or nothing, also of two that write.
fn keep(folder: &Path, path: &Path, key: u128, cubin: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(&header(key, cubin))?;
    file.write_all(cubin)?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::Cell;
    use tastemaker_kernels::{ARCHITECTURES, PIECES, kernels_of};

    const KEY: Key<'static> = Key { arch: 90, nvrtc: Version(13, 0), source: "f" };

    /// Asks the cache; the code, and whether it had to be made.
    fn ask(cache: Option<&Path>, key: &Key<'_>, made: &[u8]) -> (Vec<u8>, bool) {
        let asked = Cell::new(false);
        let compile = || {
            asked.set(true);
            Ok(made.to_vec())
        };
        (kept(cache, key, compile).unwrap(), asked.get())
    }

    #[test]
    fn what_was_made_is_kept_for_the_same_key_alone() {
        let work = tempfile::tempdir().unwrap();
        // A folder that is still to be made.
        let cache = work.path().join("a/b");
        assert_eq!(ask(Some(&cache), &KEY, b"one"), (b"one".to_vec(), true));
        assert_eq!(ask(Some(&cache), &KEY, b"two"), (b"one".to_vec(), false));
        for other in [Key { arch: 80, ..KEY }, Key { nvrtc: Version(13, 1), ..KEY }, Key { source: "g", ..KEY }] {
            assert_eq!(ask(Some(&cache), &other, b"two"), (b"two".to_vec(), true), "{other:?}");
        }
        assert_eq!(ask(Some(&cache), &KEY, b"two"), (b"one".to_vec(), false));
        assert_eq!(ask(None, &KEY, b"two"), (b"two".to_vec(), true));
        // Nothing but what is kept is left.
        assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 4);
        // Another key's file under this one's name is not trusted.
        std::fs::copy(cache.join(Key { arch: 80, ..KEY }.file()), cache.join(KEY.file())).unwrap();
        assert_eq!(ask(Some(&cache), &KEY, b"three"), (b"three".to_vec(), true));
        assert_eq!(ask(Some(&cache), &KEY, b"four"), (b"three".to_vec(), false));
    }

    #[test]
    fn a_cache_that_is_none_costs_a_compilation() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for _ in 0..2 {
            assert_eq!(ask(Some(file.path()), &KEY, b"one"), (b"one".to_vec(), true));
        }
    }

    #[test]
    fn a_failure_is_not_kept() {
        let work = tempfile::tempdir().unwrap();
        assert_eq!(kept(Some(work.path()), &KEY, || Err(KernelError::NoNvrtc)), Err(KernelError::NoNvrtc));
        assert_eq!(std::fs::read_dir(work.path()).unwrap().count(), 0);
    }

    proptest! {
        #[test]
        fn a_damaged_file_is_never_trusted(
            cubin in prop::collection::vec(any::<u8>(), 0..200), at in any::<prop::sample::Index>(), change in 1u8.., cut in any::<bool>(),
        ) {
            let work = tempfile::tempdir().unwrap();
            ask(Some(work.path()), &KEY, &cubin);
            let path = work.path().join(KEY.file());
            let mut file = std::fs::read(&path).unwrap();
            let at = at.index(file.len());
            if cut { file.truncate(at) } else { file[at] ^= change }
            std::fs::write(&path, &file).unwrap();
            prop_assert_eq!(ask(Some(work.path()), &KEY, b"anew"), (b"anew".to_vec(), true));
            prop_assert_eq!(ask(Some(work.path()), &KEY, b"again"), (b"anew".to_vec(), false));
        }
    }

    /// NVRTC; without it the tests say that they are skipped, or fail where `.ci/run` says that it is there.
    fn nvrtc() -> Option<Nvrtc> {
        let nvrtc = Nvrtc::open();
        if let Err(error) = &nvrtc {
            assert!(std::env::var_os("TASTEMAKER_REQUIRE_NVRTC").is_none(), "NVRTC is required: {error}");
            // Not by `println!`, which the test harness keeps to itself.
            let _ = writeln!(std::io::stderr(), "SKIPPED: {error}");
        }
        let nvrtc = nvrtc.ok()?;
        // Found in front of any other where the emulated driver is what a program is to use.
        let is_real = nvrtc.compile("", 90).is_ok_and(|cubin| cubin.starts_with(b"\x7fELF"));
        if !is_real {
            let _ = writeln!(std::io::stderr(), "SKIPPED: NVRTC is the emulated one, or compiles nothing");
        }
        Some(nvrtc).filter(|_| is_real || std::env::var_os("TASTEMAKER_REQUIRE_NVRTC").is_some())
    }

    #[test]
    fn nvrtc_compiles_the_kernels_for_every_architecture() {
        let Some(nvrtc) = nvrtc() else { return };
        for arch in ARCHITECTURES {
            let (cubin, log) = nvrtc.compile_with(SOURCE, arch, &["--ptxas-options=--warn-on-spills"]).unwrap();
            assert_eq!(log, "", "sm_{arch}");
            assert!(cubin.starts_with(b"\x7fELF"), "sm_{arch}");
            for kernel in PIECES.iter().flat_map(|(_, source)| kernels_of(source)) {
                let section = format!(".text.{kernel}\0");
                assert!(cubin.windows(section.len()).any(|at| at == section.as_bytes()), "{kernel}, sm_{arch}");
            }
        }
    }

    #[test]
    fn nvrtc_says_what_is_wrong() {
        let Some(nvrtc) = nvrtc() else { return };
        let said = |source: &str, arch| nvrtc.compile(source, arch).unwrap_err().to_string();
        let broken = said("#line 7 \"broken.cu\"\n__global__ void f() { nowhere(); }", 90);
        assert!(broken.contains("broken.cu(7): error: identifier \"nowhere\" is undefined"), "{broken}");
        let unknown = said(SOURCE, 31);
        assert!(unknown.contains("does not compile the kernels for sm_31"), "{unknown}");
        assert!(said("a\0b", 90).contains("NUL"));
    }
}
