//! Runs the load generator against a server while `nvidia-smi dmon` samples the GPU, and shows both on one time axis.

mod dmon;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;

#[derive(Parser)]
#[command(about = "Loads a server, samples its GPU meanwhile by nvidia-smi dmon, and shows both on one time axis")]
struct Cli {
    /// Folder for profile.md, profile.svg, profile.csv and load.json.
    #[arg(long)]
    out: PathBuf,
    /// The GPU whose samples are shown.
    #[arg(long, default_value_t = 0)]
    gpu: u32,
    /// The program that samples.
    #[arg(long, default_value = "nvidia-smi")]
    nvidia_smi: PathBuf,
    #[command(flatten)]
    load: loadgen::Options,
}

fn profile(options: &Cli) -> Result<bool> {
    ensure!(options.load.sweep.is_empty(), "--sweep: one rate at a time is profiled");
    std::fs::create_dir_all(&options.out).with_context(|| options.out.display().to_string())?;
    let dmon = dmon::Dmon::start(&options.nvidia_smi, Some(options.gpu))?;
    let load = loadgen::run::run(&options.load);
    let samples = dmon.stop();
    let (load, samples) = (load?, samples?);
    let rows = report::join(&load.timeline, &samples, options.gpu);
    ensure!(rows.iter().any(|row| row.gpu.iter().any(Option::is_some)), "no sample fell into the measured time");
    let command = std::env::args().collect::<Vec<_>>().join(" ");
    let files = [
        ("profile.md", report::markdown(&rows, &load, &command)),
        ("profile.svg", report::svg(&rows)),
        ("profile.csv", report::csv(&rows)),
        ("load.json", serde_json::to_string_pretty(&load)?),
    ];
    for (name, text) in files {
        let path = options.out.join(name);
        std::fs::write(&path, text).with_context(|| path.display().to_string())?;
    }
    println!("{load}{}: written", options.out.join("profile.md").display());
    Ok(load.ok > 0)
}

fn main() -> ExitCode {
    match profile(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("gpu_profile: no call succeeded");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("gpu_profile: {error:#}");
            ExitCode::FAILURE
        }
    }
}
