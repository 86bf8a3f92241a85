//! Engines by TensorRT: an ONNX model becomes one for the GPU that is asked for, with a profile per batch size, kept in a file and run on
//! the caller's stream.
//!
//! The feature `tensorrt` is TensorRT 11.4, `tensorrt-rtx` is TensorRT-RTX 1.7, which builds engines where there is no GPU; the former
//! goes first. Libraries are opened at run time. Without either feature there is the [`cache`] and no more. This is a crate of its own so that the
//! bindings are tested without building the server beside them.
//!
//! In which numbers a model is computed is what the model says: networks are strongly typed. There is no cache of timings: `trtx` has none
//! of TensorRT's, and TensorRT-RTX, which does not time, has none.
#![deny(unsafe_code)]

#[cfg(any(feature = "tensorrt", feature = "tensorrt-rtx"))]
pub mod build;
pub mod cache;
#[cfg(any(feature = "tensorrt", feature = "tensorrt-rtx"))]
pub mod library;
#[cfg(any(feature = "tensorrt", feature = "tensorrt-rtx"))]
pub mod session;
#[cfg(all(test, any(feature = "tensorrt", feature = "tensorrt-rtx")))]
mod tests;

use std::fmt;
use std::path::PathBuf;

/// Why TensorRT can't be used, or what it refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No library of that name, or one that can't be opened.
    #[error("TensorRT can't be opened: {said}")]
    NoLibrary {
        /// The loader's words.
        said: String,
    },
    /// Another version than the program was built for.
    #[error("{} is version {found}; {needed} is needed", path.display())]
    Version {
        /// The library.
        path: PathBuf,
        /// As it says.
        found: String,
        /// As the headers say.
        needed: String,
    },
    /// The model is not what is said of it, or not what can be ranked with.
    #[error("{0}")]
    Model(String),
    /// TensorRT refused.
    #[error("TensorRT: {what}: {}", if said.is_empty() { "it said nothing".to_owned() } else { said.join("; ") })]
    Refused {
        /// What was asked of it.
        what: &'static str,
        /// What it logged, the first first.
        said: Vec<String>,
    },
}

/// The library's name in logs and keys; `None`: this was built without.
pub const FLAVOUR: Option<&str> = if cfg!(feature = "tensorrt") {
    Some("TensorRT")
} else if cfg!(feature = "tensorrt-rtx") {
    Some("TensorRT-RTX")
} else {
    None
};

/// Major and minor of a GPU's compute capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability(pub u32, pub u32);

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// An input of a model, `[n, width]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input {
    /// Its name in the model.
    pub name: String,
    /// Values of a row.
    pub width: usize,
}

/// The numbers of rows that an engine is built for, one profile each: from 1 to that many, and fastest with so many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profiles(Vec<usize>);

impl Profiles {
    /// The most rows that an engine is built for: what a launch of our own kernels takes.
    pub const MOST_ROWS: usize = 1 << 26;

    /// For batches of up to so many requests, each of `width` candidates.
    ///
    /// # Errors
    /// There is none, or a number of rows is out of 1 to [`Profiles::MOST_ROWS`].
    pub fn new(requests: &[usize], width: usize) -> Result<Self, Error> {
        let rows = |n: &usize| {
            let rows = n.checked_mul(width).filter(|rows| (1..=Self::MOST_ROWS).contains(rows));
            let wrong = || Error::Model(format!("{n} requests of {width} candidates, 1 to {} rows", Self::MOST_ROWS));
            rows.ok_or_else(wrong)
        };
        let mut rows = requests.iter().map(rows).collect::<Result<Vec<_>, _>>()?;
        rows.sort_unstable();
        rows.dedup();
        match rows.is_empty() {
            true => Err(Error::Model("no batch sizes to build an engine for".to_owned())),
            false => Ok(Profiles(rows)),
        }
    }

    /// The most rows of each, ascending.
    pub fn rows(&self) -> &[usize] {
        &self.0
    }

    /// The one for so many rows.
    pub fn of(&self, rows: usize) -> Option<usize> {
        let at = self.0.partition_point(|&most| most < rows);
        (rows > 0 && at < self.0.len()).then_some(at)
    }
}

#[cfg(test)]
mod shapes {
    use super::*;

    #[test]
    fn a_profile_is_the_smallest_that_holds_the_rows() {
        let profiles = Profiles::new(&[8, 1, 32, 8], 1024).unwrap();
        assert_eq!(profiles.rows(), [1024, 8192, 32768]);
        let found = [0, 1, 1024, 1025, 8192, 32768, 32769].map(|rows| profiles.of(rows));
        assert_eq!(found, [None, Some(0), Some(0), Some(1), Some(1), Some(2), None]);
        let wrong = [(&[][..], 4), (&[0][..], 4), (&[1][..], 0), (&[usize::MAX][..], 2), (&[1 << 20][..], 65)];
        for (requests, width) in wrong {
            assert!(matches!(Profiles::new(requests, width), Err(Error::Model(_))), "{requests:?} {width}");
        }
    }
}
