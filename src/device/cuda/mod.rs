//! NVIDIA GPUs. Everything of CUDA is opened at run time; a machine without it builds, tests and serves all the same.
//!
//! [`probe`] looks for a GPU, [`kernels`] has its machine code, [`context`] and [`stream`] are the driver made safe, [`ops`] the kernels as
//! safe calls, and [`engine`] is the device. [`dense`] compiles rankers, and [`ranker`] runs them. [`cuvs`] is vector search by cuVS, which the
//! engine does not use yet.

pub mod context;
pub mod cuvs;
pub mod dense;
#[cfg(test)]
mod emulated;
pub mod engine;
pub mod kernels;
pub mod ops;
pub mod probe;
pub mod ranker;
pub mod stream;
