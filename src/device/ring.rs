//! The bounded queue from shards to workers.

use super::Job;
use crate::ring::Ring;

/// Jobs on their way to workers.
pub type JobQueue = Ring<Box<Job>>;
