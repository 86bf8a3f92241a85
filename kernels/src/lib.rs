//! The GPU kernels: their source, compiled where nvcc was at hand, and how they are launched. Knows no driver.
#![forbid(unsafe_code)]

mod launch;

pub use launch::{
    Bf16GatherAsF32, DevicePtr, FilterCandidates, Gather, GatherRows, Launch, MAX_K, MAX_MERGED, MergeCandidates,
    PartitionMerge, ShapeError, THREADS, TopkSelect,
};

macro_rules! pieces {
    ($($file:literal),*) => {
        /// Names and texts of the files, in the order in which they make up [`SOURCE`]; kernels/README.md says how they are written.
        pub const PIECES: &[(&str, &str)] = &[$(($file, include_str!(concat!("../", $file)))),*];

        /// The one unit that nvcc and NVRTC compile. It includes nothing. Lines are numbered as in the files.
        pub const SOURCE: &str = concat!($("#line 1 \"", $file, "\"\n", include_str!(concat!("../", $file))),*);
    };
}

pieces!(
    "prelude.cu",
    "topk_select.cu",
    "partition_merge.cu",
    "merge_candidates.cu",
    "filter_candidates.cu",
    "gather_rows.cu"
);

/// Names of the kernels in a piece of source.
pub fn kernels_of(source: &str) -> impl Iterator<Item = &str> {
    source.lines().filter_map(|line| line.strip_prefix("KERNEL(")?.split(',').next())
}
