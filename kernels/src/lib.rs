//! The GPU kernels: their source, compiled where nvcc was at hand, and how they are launched. Knows no driver.
//! kernels/README.md says how they are written.
#![forbid(unsafe_code)]

mod assemble;
mod columns;
pub mod dense;
mod launch;
mod live;
mod slates;
mod source;

pub use assemble::{AssembleRows, RowKind, RowPart, VoidHoles};
pub use columns::{CopyColumns, FillSeries};
pub use launch::{
    Bf16GatherAsF32, DevicePtr, FilterCandidates, Gather, GatherRows, Launch, MAX_K, MAX_MERGED, MOST_ARGUMENTS,
    MaskScores, MergeCandidates, PartitionMerge, ScoreBy, Scores, ScoresBf16, ScoresF32, ShapeError, THREADS,
    TakeNeighbors, TopkSelect,
};
pub use live::{ApplyChanges, FindPlaces, More, NamePlaces};
pub use slates::{
    AddScores, Column, CountBy, ExactScores, FillColumns, FillCounts, FinishSlates, MaskSeen, SettleLists, SumOrder,
};
pub use source::{ARCHITECTURES, OPTIONS, PIECES, SOURCE};

/// [`SOURCE`], compiled for [`ARCHITECTURES`] and as PTX for the first of them, which newer ones can translate; `None` where the build
/// found no nvcc that works.
#[cfg(have_fatbin)]
pub const FATBIN: Option<&[u8]> = Some(include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")));
/// [`SOURCE`], compiled: no nvcc that works was found when this was built.
#[cfg(not(have_fatbin))]
pub const FATBIN: Option<&[u8]> = None;

/// Names of the kernels in a piece of source.
pub fn kernels_of(source: &str) -> impl Iterator<Item = &str> {
    source.lines().filter_map(|line| line.strip_prefix("KERNEL(")?.split(',').next())
}
