//! Tastemaker: an inference server for personalization.
#![deny(unsafe_code)]

pub mod api;
pub mod backoff;
pub mod cache;
pub mod candidates;
pub mod capacity;
pub mod catalog;
pub mod cli;
pub mod config;
pub mod context;
pub mod device;
pub mod error;
pub mod eval;
pub mod features;
pub mod index;
pub mod link;
pub mod memory;
pub mod pipeline;
pub mod ranking;
pub mod rerank;
pub mod response;
pub mod retrieval;
pub mod ring;
pub mod server;
pub mod state;
pub mod store;
pub mod telemetry;
#[cfg(test)]
mod testing;
pub mod wire;
