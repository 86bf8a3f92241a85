//! NVIDIA GPUs. Everything of CUDA is opened at run time; a machine without it builds, tests and serves all the same.
//!
//! [`probe`] looks for a GPU, [`kernels`] has its machine code, [`context`] and [`stream`] are the driver made safe, [`ops`] the kernels as
//! safe calls, [`engine`] is the device, and [`pipeline`] what of it keeps recommendations there from the neighbours to the slate. [`dense`]
//! compiles rankers, and [`ranker`] runs them. [`cuvs`] is vector search by cuVS, which [`finder`] has the engine use for the bundle's index.
//! [`tensorrt`] says whether a ranker can be TensorRT's.

pub mod context;
pub mod cuvs;
pub mod dense;
#[cfg(test)]
mod emulated;
pub mod engine;
mod finder;
pub mod kernels;
pub mod ops;
pub mod pipeline;
pub mod probe;
pub mod ranker;
pub mod stream;
pub mod tensorrt;
mod timeline;
