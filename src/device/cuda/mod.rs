//! NVIDIA GPUs. Everything of CUDA is opened at run time; a machine without it builds, tests and serves all the same.
//!
//! So far: what is there ([`probe`]), and the kernels' machine code for it ([`kernels`]). The engine itself is not there yet.

pub mod kernels;
pub mod probe;
