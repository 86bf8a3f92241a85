//! The kernels' source, for this crate and for its build script.

macro_rules! pieces {
    ($($file:literal),*) => {
        /// Names and texts of the files, in the order in which they make up [`SOURCE`].
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
    "gather_rows.cu",
    "scores.cu",
    "exact_scores.cu",
    "settle_lists.cu",
    "fill_columns.cu",
    "finish_slates.cu",
    "dense.cu",
    "take_neighbors.cu",
    "assemble_rows.cu",
    "live_rows.cu",
    "item_columns.cu"
);

/// Compute capabilities that are compiled for, as in `sm_90`: Ampere (A100; others), Ada, Hopper, Blackwell (B200; others).
pub const ARCHITECTURES: [u32; 6] = [80, 86, 89, 90, 100, 120];

/// What nvcc and NVRTC are told beside the architecture.
pub const OPTIONS: [&str; 1] = ["--std=c++17"];
