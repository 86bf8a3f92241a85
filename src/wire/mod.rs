//! The binary protocol: `u32` little-endian length, then a FlatBuffer of `schemas/tastemaker.fbs`.

mod changes;
pub mod client;
pub mod frame;
#[expect(missing_docs, unsafe_code, clippy::all, reason = "written by flatc")]
#[rustfmt::skip]
mod generated;
pub mod request;
pub mod response;

pub use generated::tastemaker::wire as schema;

use flatbuffers::VerifierOptions;

/// Limits of a message, checked before anything is allocated for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// User and item ids, bytes.
    pub id_bytes: usize,
    /// Context pairs.
    pub context_pairs: usize,
    /// All context keys and values, bytes.
    pub context_bytes: usize,
    /// Text query, bytes.
    pub query_bytes: usize,
    /// Values of a search vector.
    pub vector_values: usize,
    /// Vectors of a search.
    pub vectors: usize,
    /// Conditions of a search.
    pub conditions: usize,
    /// Values of all conditions of a search.
    pub condition_values: usize,
    /// Items of a rank, and items that a search leaves out.
    pub items: usize,
}

/// The limits of the protocol; HTTP has the same.
pub const LIMITS: Limits = Limits {
    id_bytes: 256,
    context_pairs: 64,
    context_bytes: 4096,
    query_bytes: 1024,
    vector_values: 8192,
    vectors: 64,
    conditions: 32,
    condition_values: 256,
    items: 10_000,
};

/// Nothing that the schema can say is deeper.
fn verifier(max_tables: usize) -> VerifierOptions {
    VerifierOptions { max_depth: 8, max_tables, max_apparent_size: 64 << 20, ignore_missing_null_terminator: false }
}
