//! Opening TensorRT and its ONNX parser, and what it logs.
#![allow(unsafe_code)] // Opens libraries and asks for their version.

use std::collections::VecDeque;
use std::error::Error as _;
use std::ffi::OsString;
use std::path::Path;

use libloading::os::unix::{Library as Opened, RTLD_LOCAL, RTLD_NOW};
use parking_lot::Mutex;
use trtx::{LogHandler, Logger, Severity, trtx_sys};

use crate::Error;

/// The library itself and its parser, by the names that their major version has.
const NAMES: [&str; 2] = match cfg!(feature = "tensorrt") {
    true => ["libnvinfer.so.11", "libnvonnxparser.so.11"],
    false => ["libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"],
};
/// Its name in logs.
pub(crate) const NAME: &str = match crate::FLAVOUR {
    Some(name) => name,
    None => "TensorRT",
};
/// Lines of what went wrong that are kept for whoever asks next.
const KEPT_LINES: usize = 16;

/// The one library of the process, and the folder that it was asked for in.
static OPENED: Mutex<Option<(String, &'static Library)>> = Mutex::new(None);
/// What went wrong lately. TensorRT has one logger in a process, whoever calls.
static SAID: Mutex<VecDeque<String>> = Mutex::new(VecDeque::new());

/// TensorRT, opened.
#[derive(Debug)]
pub struct Library {
    /// Major, minor, patch.
    pub version: String,
    /// For all that TensorRT makes; it keeps the first that it is given.
    pub(crate) logger: Logger,
    /// Builders and parsers work one after the other: what is logged meanwhile is theirs.
    pub(crate) building: Mutex<()>,
}

/// Hands on what TensorRT says.
struct Lines;

impl LogHandler for Lines {
    fn log(&self, severity: Severity, message: &str) {
        match severity {
            Severity::InternalError | Severity::Error => {
                tracing::error!("{NAME}: {message}");
                let mut said = SAID.lock();
                said.truncate(KEPT_LINES - 1);
                said.push_back(message.trim().to_owned());
            }
            Severity::Warning => tracing::warn!("{NAME}: {message}"),
            Severity::Info => tracing::debug!("{NAME}: {message}"),
            Severity::Verbose => tracing::trace!("{NAME}: {message}"),
        }
    }
}

impl Library {
    /// Opens TensorRT, once. `folder` has its libraries; empty: where the loader looks. It needs no GPU, and stays open.
    ///
    /// # Errors
    /// It is not there or of another version, or the process has it from another folder.
    pub fn open(folder: &str) -> Result<&'static Library, Error> {
        let mut opened = OPENED.lock();
        if let Some((from, library)) = opened.as_ref() {
            let other =
                || Error::NoLibrary { said: format!("that of `{folder}` is asked for, that of `{from}` is open") };
            return if from == folder { Ok(library) } else { Err(other()) };
        }
        let paths = NAMES.map(|name| Path::new(folder).join(name));
        let [library, parser] = &paths;
        check_version(library, &open(library)?)?;
        open(parser)?;
        // What is open already is what a path leads to.
        let refused = |error: trtx::Error| Error::NoLibrary { said: error.to_string() };
        trtx::dynamically_load_tensorrt(Some(OsString::from(library))).map_err(refused)?;
        trtx::dynamically_load_tensorrt_onnxparser(Some(OsString::from(parser))).map_err(refused)?;
        let logger = Logger::new(Lines).map_err(refused)?;
        let (version, building) = (needed(), Mutex::new(()));
        let library: &_ = Box::leak(Box::new(Library { version, logger, building }));
        tracing::info!(folder, version = library.version, "{NAME} is open");
        *opened = Some((folder.to_owned(), library));
        Ok(library)
    }

    /// What went wrong since this was asked last, as an error of `what`.
    pub(crate) fn refused(&self, what: &'static str) -> Error {
        Error::Refused { what, said: SAID.lock().drain(..).collect() }
    }

    /// Forgets what went wrong before.
    pub(crate) fn listen(&self) {
        SAID.lock().clear();
    }
}

fn open(path: &Path) -> Result<Opened, Error> {
    // Not lazily: a function that is missing would end the process when it is first called.
    // SAFETY: the library is one that the operator or the system names TensorRT's; what it runs on opening is trusted as the system's is.
    let library = unsafe { Opened::open(Some(path), RTLD_NOW | RTLD_LOCAL) };
    library.map_err(|error| Error::NoLibrary { said: error.source().map_or(error.to_string(), ToString::to_string) })
}

/// What the bindings are of.
fn needed() -> String {
    // SAFETY: both return a constant of the headers.
    unsafe {
        let [major, minor] = [trtx_sys::get_tensorrt_major_version(), trtx_sys::get_tensorrt_minor_version()];
        format!("{major}.{minor}.{}", trtx_sys::get_tensorrt_patch_version())
    }
}

fn check_version(path: &Path, library: &Opened) -> Result<(), Error> {
    let wrong = |found: String| Error::Version { path: path.to_owned(), found, needed: needed() };
    // SAFETY: a function of that name has this type in every version that there is: it takes nothing and returns a number.
    let found = unsafe {
        let get = library.get::<unsafe extern "C" fn() -> i32>(b"getInferLibVersion\0");
        get.map_err(|_| wrong("nothing: it has no getInferLibVersion".to_owned()))?()
    };
    // SAFETY: as in `needed`.
    match i64::from(found) == i64::from(unsafe { trtx_sys::get_tensorrt_version() }) {
        true => Ok(()),
        false => Err(wrong(format!("{}.{}.{}", found / 10_000, found / 100 % 100, found % 100))),
    }
}

/// Where `.ci/run` says that the libraries are, for tests; without them they say that they are skipped.
#[cfg(test)]
pub(crate) fn for_tests() -> Option<&'static Library> {
    let variable = "TASTEMAKER_TENSORRT_RTX";
    let folder = std::env::var(variable).ok().filter(|folder| !folder.is_empty() && cfg!(not(feature = "tensorrt")));
    if folder.is_none() {
        assert!(std::env::var_os("TASTEMAKER_REQUIRE_TENSORRT_RTX").is_none(), "{variable} names no libraries");
        // Not by `println!`, which the test harness keeps to itself.
        let _ = std::io::Write::write_fmt(
            &mut std::io::stderr(),
            format_args!("SKIPPED: {variable} names no libraries of TensorRT-RTX\n"),
        );
    }
    folder.map(|folder| Library::open(&folder).unwrap())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_not_there_or_something_else_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = open(&folder.path().join(NAMES[0])).unwrap_err();
        assert!(matches!(&error, Error::NoLibrary { said } if said.contains(NAMES[0])), "{error}");
        // Any other library.
        let path = Path::new("libm.so.6");
        let error = check_version(path, &open(path).unwrap()).unwrap_err();
        assert!(matches!(&error, Error::Version { found, .. } if found.contains("getInferLibVersion")), "{error}");
    }
}
