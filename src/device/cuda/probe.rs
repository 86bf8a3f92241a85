//! Which GPU there is, or in one line why there is none. Never panics, whatever is installed under the driver's name.
#![allow(unsafe_code)] // Calls of the driver, through cudarc.

use std::fmt;

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};
use cudarc::driver::{DriverError, result};

/// What a driver must support: nvcc 13.0 made the kernels, and a driver runs what a CUDA of its own major version or an older one made.
pub const MIN_CUDA: Version = Version(13, 0);
/// What a GPU must be able to do: the kernels use `__reduce_or_sync`, which is Ampere's.
pub const MIN_CAPABILITY: Version = Version(8, 0);
/// The least memory that is worth it: a context, the libraries' code and staging alone take about one. Whether a bundle fits is found when
/// it is loaded.
pub const MIN_MEMORY_BYTES: u64 = 4 << 30;

/// The functions that are called here. cudarc panics where one is missing, so they are looked for first.
const NEEDED: [&[u8]; 7] = [
    b"cuInit\0",
    b"cuDriverGetVersion\0",
    b"cuDeviceGetCount\0",
    b"cuDeviceGet\0",
    b"cuDeviceGetName\0",
    b"cuDeviceGetAttribute\0",
    b"cuDeviceTotalMem_v2\0",
];

/// Major and minor, of CUDA or of a compute capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// A GPU that can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// The driver's number of it: the N of `cuda:N`.
    pub ordinal: u32,
    /// As the driver names it.
    pub name: String,
    /// Compute capability.
    pub capability: Version,
    /// All memory, used or not.
    pub memory_bytes: u64,
    /// The CUDA that the driver supports.
    pub cuda: Version,
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Gpu { name, capability, memory_bytes, cuda, .. } = self;
        let gib = *memory_bytes as f64 / (1u64 << 30) as f64;
        write!(f, "{name}, {gib:.1} GiB, compute capability {capability}, driver for CUDA {cuda}")
    }
}

/// Why there is no GPU to use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// Nothing is installed under the driver's name, or it can't be opened.
    #[error("no NVIDIA driver: libcuda.so.1 is not there or can't be opened")]
    NoDriver,
    /// A library of that name is no driver.
    #[error("libcuda.so is not a driver: it has no {0}")]
    NotADriver(String),
    /// The toolkit's library for linking was found first.
    #[error("libcuda.so is the CUDA toolkit's stub, which only links; take its folder out of LD_LIBRARY_PATH")]
    Stub,
    /// Library and kernel module are of different versions: usually the driver was upgraded underneath.
    #[error("the NVIDIA driver's library and its kernel module differ in version; restart the machine")]
    Mismatch,
    /// The driver sees none, or is told to by `CUDA_VISIBLE_DEVICES`.
    #[error("no NVIDIA GPU: the driver sees none")]
    NoDevice,
    /// Fewer than asked for.
    #[error("no GPU {ordinal}: the driver sees {n}, from 0 on")]
    NoSuchDevice {
        /// Asked for.
        ordinal: u32,
        /// Seen.
        n: u32,
    },
    /// [`MIN_CUDA`]
    #[error("the NVIDIA driver supports CUDA {0}; {MIN_CUDA} or later is needed: install driver 580 or later")]
    OldDriver(Version),
    /// [`MIN_CAPABILITY`]
    #[error("{name} has compute capability {capability}; {MIN_CAPABILITY} or later is needed (Ampere)")]
    OldArchitecture {
        /// The GPU.
        name: String,
        /// Its capability.
        capability: Version,
    },
    /// [`MIN_MEMORY_BYTES`]
    #[error("{name} has {} MiB of memory; {} are needed", memory_bytes >> 20, MIN_MEMORY_BYTES >> 20)]
    LittleMemory {
        /// The GPU.
        name: String,
        /// All that it has.
        memory_bytes: u64,
    },
    /// Anything else that the driver said.
    #[error("the NVIDIA driver failed: {0}")]
    Driver(String),
}

impl From<DriverError> for Unfit {
    fn from(error: DriverError) -> Self {
        match error.0 {
            CUresult::CUDA_ERROR_STUB_LIBRARY => Unfit::Stub,
            CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => Unfit::Mismatch,
            CUresult::CUDA_ERROR_NO_DEVICE => Unfit::NoDevice,
            // The code's name only: its text would be another call of the driver.
            other => Unfit::Driver(format!("{other:?}")),
        }
    }
}

/// The GPU of that number, or of all that are fit the one with the most memory.
///
/// # Errors
/// Why there is none; of several unfit ones the first.
pub fn probe(ordinal: Option<u32>) -> Result<Gpu, Unfit> {
    // Of equal ones the first.
    probe_all(ordinal)?.into_iter().rev().max_by_key(|gpu| gpu.memory_bytes).ok_or(Unfit::NoDevice)
}

/// The GPU of that number, or all that are fit, in the order of their numbers: at least one.
///
/// # Errors
/// As [`probe`].
pub fn probe_all(ordinal: Option<u32>) -> Result<Vec<Gpu>, Unfit> {
    // Should cudarc assert anything else of a driver's answers, that must not end a server that has a CPU.
    std::panic::catch_unwind(|| look(ordinal)).unwrap_or_else(|_| Err(Unfit::Driver("it answered nonsense".into())))
}

fn look(ordinal: Option<u32>) -> Result<Vec<Gpu>, Unfit> {
    // SAFETY: a library is opened by the driver's name, and code that it runs on opening is trusted as the system's is.
    if !unsafe { sys::is_culib_present() } {
        return Err(Unfit::NoDriver);
    }
    // SAFETY: as above; it was there just now.
    let library = unsafe { sys::culib() };
    for name in NEEDED {
        // SAFETY: the symbol is not called, only looked for.
        if unsafe { library.get::<unsafe extern "C" fn()>(name) }.is_err() {
            return Err(Unfit::NotADriver(String::from_utf8_lossy(&name[..name.len() - 1]).into_owned()));
        }
    }
    result::init()?;
    let mut version = 0;
    // SAFETY: the function is there, and writes one integer.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result()?;
    let cuda = u32::try_from(version).unwrap_or(0);
    let cuda = Version(cuda / 1000, cuda % 1000 / 10);
    if cuda < MIN_CUDA {
        return Err(Unfit::OldDriver(cuda));
    }
    let n = u32::try_from(result::device::get_count()?).unwrap_or(0);
    match ordinal {
        _ if n == 0 => Err(Unfit::NoDevice),
        Some(ordinal) if ordinal >= n => Err(Unfit::NoSuchDevice { ordinal, n }),
        Some(ordinal) => Ok(vec![one(ordinal, cuda)?]),
        None => {
            let (mut fit, mut first) = (Vec::new(), None);
            for gpu in (0..n).map(|ordinal| one(ordinal, cuda)) {
                match gpu {
                    Ok(gpu) => fit.push(gpu),
                    Err(unfit) => first = first.or(Some(unfit)),
                }
            }
            first.filter(|_| fit.is_empty()).map_or(Ok(fit), Err)
        }
    }
}

fn one(ordinal: u32, cuda: Version) -> Result<Gpu, Unfit> {
    let device = result::device::get(ordinal as i32)?;
    let attribute = |which| {
        // SAFETY: the device is one that `get` returned.
        unsafe { result::device::get_attribute(device, which) }.map(|value| u32::try_from(value).unwrap_or(0))
    };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let mut name = [0u8; 128];
    // SAFETY: the function is there, and writes at most as many bytes as it is told. Not by cudarc, which panics where no NUL is among them.
    unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as i32, device) }.result()?;
    let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
    let (name, capability) = (String::from_utf8_lossy(name).into_owned(), Version(major, minor));
    // SAFETY: the device is one that `get` returned.
    let memory_bytes = unsafe { result::device::total_mem(device) }? as u64;
    if capability < MIN_CAPABILITY {
        return Err(Unfit::OldArchitecture { name, capability });
    }
    if memory_bytes < MIN_MEMORY_BYTES {
        return Err(Unfit::LittleMemory { name, memory_bytes });
    }
    Ok(Gpu { ordinal, name, capability, memory_bytes, cuda })
}
