//! Vector search on a GPU by NVIDIA's cuVS, through its C interface, which is opened at run time ([`Cuvs::load`]).
//!
//! The kinds, names and parameters are those of the CPU's indexes ([`Options::of`]). What comes out of a search is distances as cuVS
//! has them; [`Scale`] makes them scores, of which the higher is better. Memory is the caller's, as plain addresses: whoever makes an
//! index vouches for them once ([`Rows`]), whoever searches for each call.
//!
//! What cuVS can't do here: an `ivf_pq` index takes no filter, so more is fetched than wanted ([`fetch`]); in `cagra` a longer list of
//! candidates (`ef_search`, cuVS's `itopk_size`) than 512 is always searched by several blocks.

mod graph;
mod index;
mod library;
mod resources;
pub mod sys;
#[cfg(test)]
pub(super) mod tests;

pub use graph::CagraMaker;
pub use index::{Graph, Index, Kind, MAX_K, Neighbors, Options, Rows, Scale, Search, Value, Walk, fetch, itopk_size};
pub use library::{Cuvs, Unavailable, VERSION};
pub use resources::{Resources, Stream};

/// What went wrong in a call. The index and the resources stay usable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A number out of its range; nothing was called.
    #[error("{what} is {value}, expected {low} to {high}")]
    Argument {
        /// Which number.
        what: &'static str,
        /// What it is.
        value: u64,
        /// The least that it may be.
        low: u64,
        /// The most that it may be.
        high: u64,
    },
    /// What cuVS has nothing for; nothing was called.
    #[error("cuVS has no {0}")]
    Unsupported(&'static str),
    /// cuVS refused or failed.
    #[error("{call}: {said}")]
    Call {
        /// Its function.
        call: &'static str,
        /// Its own text.
        said: String,
    },
}

impl Error {
    /// Whether memory was lacking: a smaller batch may pass.
    pub fn is_out_of_memory(&self) -> bool {
        // Not `bad_alloc` as such: cuVS says that of any failure to allocate, a missing driver too.
        let lacking = |said: &str| said.contains("out_of_memory") || said.contains("cudaErrorMemoryAllocation");
        matches!(self, Error::Call { said, .. } if lacking(said) || said == "std::bad_alloc")
    }
}

/// Checks one number.
fn within(what: &'static str, value: u64, low: u64, high: u64) -> Result<(), Error> {
    if (low..=high).contains(&value) { Ok(()) } else { Err(Error::Argument { what, value, low, high }) }
}
