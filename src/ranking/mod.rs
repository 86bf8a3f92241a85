//! Models that score candidates.

pub mod manifest;
