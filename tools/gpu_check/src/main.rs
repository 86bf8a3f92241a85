//! Carries the GPU's tests to a machine with a GPU, runs them there against the CPU, and measures. README.md says how.

mod catalogue;
mod dense;
mod engine;
mod exact;
mod kernels;
mod machine;
mod onnx;
mod pack;
mod pieces;
mod pipeline;
mod report;
mod run;
mod search;
mod strip;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// All was run, and nothing differs.
const CLEAN: u8 = 0;
/// The program could not do what it was told.
const FAILED: u8 = 1;
/// There is no GPU that can be used here.
const NO_GPU: u8 = 3;
/// Something differs from the CPU, or a test failed.
const DIFFERS: u8 = 4;
/// The time was over before everything was run, because something took too long or hung.
const CUT_OFF: u8 = 5;

#[derive(Parser)]
#[command(about = "Carries the GPU tests to a machine with a GPU, runs them there against the CPU, and measures")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the tests and pack them, with cuVS, into pieces.
    Pack(Pack),
    /// Unpack pieces.
    Unpack(Unpack),
    /// Run everything on this machine's GPU. Ends with 0: nothing differs, 3: no GPU, 4: something differs, 5: cut off by --limit-s, 1: it could
    /// not be run.
    Run(Run),
}

#[derive(Args)]
struct Pack {
    /// Folder for the pieces, one folder each.
    #[arg(long)]
    out: PathBuf,
    /// Folder of the Python packages with libcuvs-cu13 (site-packages); nothing of cuVS is carried without.
    #[arg(long)]
    cuvs: Option<PathBuf>,
    /// GPU whose code is kept of cuVS, as in sm_90.
    #[arg(long, default_value_t = 90)]
    arch: u32,
    /// Most that a piece holds, MiB.
    #[arg(long, default_value_t = 64)]
    limit_mib: u64,
    /// zstd's level, 1 to 22.
    #[arg(long, default_value_t = 19)]
    level: i32,
    /// Cargo profile of the tests.
    #[arg(long, default_value = "gpu-carry")]
    profile: String,
    /// Also carry what cuVS needs of a CUDA toolkit, for a machine that has a driver alone: some pieces more.
    #[arg(long)]
    toolkit: bool,
    /// Folder of TensorRT's libraries, to carry them too; this program is then built with the feature, which takes libclang.
    #[arg(long)]
    tensorrt: Option<PathBuf>,
    /// Further tests to carry beside the library's own, by the name of their file in tests/; they must not need the repository.
    #[arg(long)]
    test: Vec<String>,
}

#[derive(Args)]
struct Unpack {
    /// Where the pieces are; manifest.json lies beside the first.
    #[arg(required = true)]
    folders: Vec<PathBuf>,
    /// Where the files go.
    #[arg(long)]
    into: PathBuf,
}

#[derive(Args)]
struct Run {
    /// Folder for gpu.md and gpu.json.
    #[arg(long, default_value = ".")]
    out: PathBuf,
    /// Number of the GPU; without it the one with the most memory.
    #[arg(long)]
    gpu: Option<u32>,
    /// Folder with cuVS, as for `pack`; without it the loader's usual places.
    #[arg(long)]
    cuvs: Option<PathBuf>,
    /// Folder of TensorRT's libraries, where this was built with the feature; without it the loader's usual places.
    #[arg(long)]
    tensorrt: Option<PathBuf>,
    /// Folder with programs of tests; each is run for what concerns the GPU.
    #[arg(long)]
    tests: Option<PathBuf>,
    /// Seed of everything random; a new one each time without.
    #[arg(long)]
    seed: Option<u64>,
    /// Seconds after which nothing new begins; what is left out is noted.
    #[arg(long, default_value_t = 480)]
    budget_s: u64,
    /// Seconds after which it ends with what there is, whatever it is at.
    #[arg(long, default_value_t = 570)]
    limit_s: u64,
    /// Parts to run: kernels, engine, cuvs, bench-kernels, bench-pipeline, tensorrt, bench-engine, bench-exact, tests, bench-cuvs, sanitizer; all without.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Random shapes of each kernel.
    #[arg(long, default_value_t = 200)]
    shapes: u32,
    /// Small vectors and one effort: for a first look.
    #[arg(long)]
    quick: bool,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Pack(options) => pack::pack(&options).map(|()| CLEAN),
        Command::Unpack(options) => pack::unpack(&options).map(|()| CLEAN),
        Command::Run(options) => run::run(&options),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("gpu_check: {error:#}");
            ExitCode::from(FAILED)
        }
    }
}
