//! From a dataset to a bundle, and from a bundle to the generation that serves.

pub mod array;
pub mod build;
pub mod bundle;
pub mod conditions;
pub mod cooccurrence;
pub mod dataset;
pub mod generation;
pub mod index;
pub mod live;
pub mod live_text;
pub mod names;
pub mod npy;
pub mod popularity;
pub mod records;
pub mod synthetic;
pub mod text;

use std::path::{Path, PathBuf};

/// What is wrong with a dataset or a bundle; the text names the file and, where there are, row and column.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// The file system refused.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file or directory.
        file: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The file as a whole.
    #[error("{}: {reason}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A column is missing or of the wrong type.
    #[error("{}: column `{column}`: {reason}", file.display())]
    Column {
        /// The file.
        file: PathBuf,
        /// The column.
        column: String,
        /// What is wrong.
        reason: String,
    },
    /// A value.
    #[error("{}: row {row}: column `{column}`: {reason}", file.display())]
    Row {
        /// The file.
        file: PathBuf,
        /// From 0.
        row: usize,
        /// The column.
        column: String,
        /// What is wrong.
        reason: String,
    },
    /// The bundle can't be trusted.
    #[error("{}: corrupt: {reason}", file.display())]
    Corrupt {
        /// The file.
        file: PathBuf,
        /// What does not hold.
        reason: String,
    },
    /// The place to write to is taken.
    #[error("{}: {reason}", path.display())]
    Exists {
        /// The directory.
        path: PathBuf,
        /// What to do.
        reason: String,
    },
}

impl CatalogError {
    fn io(file: &Path, source: std::io::Error) -> Self {
        CatalogError::Io { file: file.into(), source }
    }

    fn file(file: &Path, reason: impl Into<String>) -> Self {
        CatalogError::File { file: file.into(), reason: reason.into() }
    }

    fn column(file: &Path, column: &str, reason: impl Into<String>) -> Self {
        CatalogError::Column { file: file.into(), column: column.into(), reason: reason.into() }
    }

    fn corrupt(file: &Path, reason: impl Into<String>) -> Self {
        CatalogError::Corrupt { file: file.into(), reason: reason.into() }
    }
}
