//! Opening cuVS, or why it can't be used, in one line.
#![allow(unsafe_code)] // Opens a library and calls its functions.

use std::error::Error as _;
use std::ffi::CStr;
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use super::Error;
use super::sys::{Api, CUVS_SUCCESS, cuvsError_t};

/// Major and minor version that [`super::sys`] is of. cuVS promises no more than that between its releases, and its library's name
/// tells no version.
pub const VERSION: (u16, u16) = (26, 10);

/// What the library itself needs and does not find on its own where it was installed by `pip`: each by its place below the folder of
/// the Python packages, in the order in which they need each other.
const PRELOADED: [&str; 4] = [
    "rapids_logger/lib64/librapids_logger.so",
    "librmm/lib64/librmm.so",
    "libkvikio/lib64/libkvikio.so",
    "nvidia/cu13/lib/libcudart.so.13",
];
/// What it opens when it first reads or writes a file, and without which the process would then end.
const CUFILE: &str = "nvidia/cu13/lib/libcufile.so.0";
/// What that reads in turn, and without which (some containers and virtual machines) it would wait for good.
const MODULES: &str = "/proc/modules";
const LIBRARY: &str = "libcuvs/lib64/libcuvs_c.so";

/// Why there is no cuVS to use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// No library of that name.
    #[error("no cuVS: libcuvs_c.so is not there; the Python package libcuvs-cu13=={}.{}.* has it", VERSION.0, VERSION.1)]
    NotThere,
    /// Another library that it is linked with.
    #[error("cuVS can't be opened: {0} is not there")]
    NoDependency(String),
    /// Anything else that the loader said: often that a library is of another version than cuVS was built with.
    #[error("cuVS can't be opened: {0}")]
    Unopenable(String),
    /// [`VERSION`]
    #[error("cuVS {major}.{minor}.{patch} is there; {}.{} is needed", VERSION.0, VERSION.1)]
    Version {
        /// What is there.
        major: u16,
        /// What is there.
        minor: u16,
        /// What is there.
        patch: u16,
    },
    /// A library of that name is something else.
    #[error("libcuvs_c.so is not cuVS {}.{}: it has no {name}", VERSION.0, VERSION.1)]
    NoFunction {
        /// The first that was not found.
        name: &'static str,
    },
}

/// The library, opened, with all that is needed of it.
#[derive(Debug)]
pub struct Cuvs {
    pub(super) api: Api,
    /// The whole version.
    pub version: (u16, u16, u16),
    /// Whether it can be trusted with files, or why not.
    pub files: Result<(), &'static str>,
}

/// A library of the folder: where `pip` puts it, or directly.
fn place(folder: &Path, below: &str) -> Option<PathBuf> {
    let direct = Path::new(below).file_name().map(|name| folder.join(name));
    [Some(folder.join(below)), direct].into_iter().flatten().find(|path| path.exists())
}

fn open(path: &Path) -> Result<Library, Unavailable> {
    // Not lazily: a function that is missing would end the process when it is first called.
    // SAFETY: the library is one that the operator or the system names cuVS's; what it runs on opening is trusted as the system's is.
    unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(|error| {
        let said = error.source().map_or_else(|| error.to_string(), ToString::to_string);
        match said.split_once(": cannot open shared object file: No such file") {
            Some((name, _)) if name.ends_with("libcuvs_c.so") => Unavailable::NotThere,
            Some((name, _)) => Unavailable::NoDependency(name.to_owned()),
            None => Unavailable::Unopenable(said),
        }
    })
}

impl Cuvs {
    /// Opens the library. `folder` is where the Python packages lie (`site-packages`), or all libraries side by side; without it the
    /// loader looks in its usual places. Takes a second, of the disk mostly; a GPU is not needed.
    ///
    /// What was opened stays open as long as the process, for the libraries have threads and what those clean up at exit.
    ///
    /// # Errors
    /// It is not there, not what is needed, or not of the version that is needed.
    pub fn load(folder: Option<&Path>) -> Result<&'static Cuvs, Unavailable> {
        let mut opened = Vec::new();
        let path = match folder {
            None => PathBuf::from("libcuvs_c.so"),
            Some(folder) => {
                for path in PRELOADED.iter().filter_map(|below| place(folder, below)) {
                    opened.push(open(&path)?);
                }
                place(folder, LIBRARY).ok_or(Unavailable::NotThere)?
            }
        };
        let files = match folder.and_then(|folder| place(folder, CUFILE)).unwrap_or_else(|| "libcufile.so.0".into()) {
            _ if !Path::new(MODULES).exists() => Err("files where there is no /proc/modules"),
            path => open(&path).map(|library| opened.push(library)).map_err(|_| "files without libcufile.so.0"),
        };
        let library = open(&path)?;
        let version = version(&library)?;
        if (version.0, version.1) != VERSION {
            let (major, minor, patch) = version;
            return Err(Unavailable::Version { major, minor, patch });
        }
        // SAFETY: it says that it is cuVS of the version that the types are of, and it is never closed.
        let api = unsafe { Api::of(&library) }.map_err(|name| Unavailable::NoFunction { name })?;
        opened.push(library);
        std::mem::forget(opened);
        // SAFETY: takes one number, of those that there are. cuVS would write of its own to standard output.
        unsafe { (api.cuvsSetLogLevel)(super::sys::CUVS_LOG_LEVEL_OFF) };
        Ok(Box::leak(Box::new(Cuvs { api, version, files })))
    }

    /// The status of `call` as a result, with what the library says of it; on the thread that called.
    pub(super) fn check(&self, call: &'static str, status: cuvsError_t) -> Result<(), Error> {
        if status == CUVS_SUCCESS { Ok(()) } else { Err(Error::Call { call, said: self.last_error() }) }
    }

    fn last_error(&self) -> String {
        // SAFETY: takes nothing, and returns null or a text that stays until this thread's next call.
        let text = unsafe {
            let text = (self.api.cuvsGetLastErrorText)();
            if text.is_null() { c"it said nothing" } else { CStr::from_ptr(text) }
        };
        // Behind it follows a trace of the stack.
        let text = text.to_string_lossy();
        let said = text.split("\nObtained ").next().unwrap_or_default();
        said.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
    }
}

fn version(library: &Library) -> Result<(u16, u16, u16), Unavailable> {
    let name = "cuvsVersionGet";
    // SAFETY: a function of that name has this type in every version that there is; it writes three numbers.
    let status = unsafe {
        let get = library.get::<unsafe extern "C" fn(*mut u16, *mut u16, *mut u16) -> cuvsError_t>(b"cuvsVersionGet\0");
        let get = get.map_err(|_| Unavailable::NoFunction { name })?;
        let (mut major, mut minor, mut patch) = (0, 0, 0);
        (get(&mut major, &mut minor, &mut patch) == CUVS_SUCCESS).then_some((major, minor, patch))
    };
    status.ok_or_else(|| Unavailable::Unopenable(format!("{name} fails")))
}
