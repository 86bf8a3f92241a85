//! NVIDIA GPUs. Everything of CUDA is opened at run time; a machine without it builds, tests and serves all the same.
//!
//! So far: what is there ([`probe`]), the kernels' machine code for it ([`kernels`]), and vector search
//! by cuVS ([`cuvs`]). The engine itself is not there yet.

pub mod cuvs;
pub mod kernels;
pub mod probe;
