//! The command line: one file per command.

/// `println!` whose failure is the command's.
macro_rules! say {
    ($($part:tt)*) => { std::io::Write::write_fmt(&mut std::io::stdout(), format_args!("{}\n", format_args!($($part)*)))? };
}

/// `print!` whose failure is the command's.
macro_rules! say_part {
    ($($part:tt)*) => { std::io::Write::write_fmt(&mut std::io::stdout(), format_args!($($part)*))? };
}

mod build;
mod check;
mod demo;
mod eval;
mod features;
mod inspect;
mod plan;
mod precompute;
pub mod progress;
mod recommend;
mod serve;
mod store;
mod tune;

use std::io::Write as _;

use clap::{Parser, Subcommand};

/// Inference server for personalization: retrieval, ranking and re-ranking in one process.
#[derive(Debug, Parser)]
#[command(
    name = "tastemaker",
    version,
    propagate_version = true,
    subcommand_required = true,
    arg_required_else_help = true
)]
#[command(after_help = "Exit codes: 0 ok, 1 failed, 2 usage.\nStart with `tastemaker demo`.")]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a synthetic catalogue, build it, serve it and show a result.
    Demo(demo::Demo),
    /// Turn a dataset directory into a bundle.
    Build(build::Build),
    /// Serve a bundle until SIGTERM or SIGINT, then drain.
    Serve(serve::Serve),
    /// Ask a running server for recommendations.
    Recommend(recommend::Recommend),
    /// Measure recall, NDCG and coverage of the served pipeline on held-out interactions.
    Eval(eval::Eval),
    /// Find search parameters of the index that reach a recall in the least time, and write them into the bundle.
    Tune(tune::Tune),
    /// Show what is in a bundle, after verifying every checksum.
    Inspect(inspect::Inspect),
    /// Validate a configuration file, and its rules against a bundle.
    Check(check::Check),
    /// Make slates ahead of time for a server to serve.
    Precompute(precompute::Precompute),
    /// Say how many replicas a load takes, by a simulation that is fed with measured service times.
    Plan(plan::Plan),
    /// Write users and items to the feature store that servers share, or show what it has.
    Store(store::Store),
    /// Export the ranker's feature columns for given users, to train on what serving computes.
    Features(features::Features),
}

/// Runs the command.
///
/// # Errors
/// Whatever made it fail, for a person to read; the exit code is then 1.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    let done = match cli.command {
        Command::Demo(command) => command.run(),
        Command::Build(command) => command.run(),
        Command::Serve(command) => command.run(),
        Command::Recommend(command) => command.run(),
        Command::Eval(command) => command.run(),
        Command::Tune(command) => command.run(),
        Command::Inspect(command) => command.run(),
        Command::Check(command) => command.run(),
        Command::Precompute(command) => command.run(),
        Command::Plan(command) => command.run(),
        Command::Features(command) => command.run(),
        Command::Store(command) => command.run(),
    };
    // Buffered output may only now find out.
    done.and_then(|()| Ok(std::io::stdout().flush()?)).or_else(|error| match error.downcast_ref::<std::io::Error>() {
        // Nobody reads any more (`| head`): there is nothing left to do, and nobody to tell.
        Some(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        _ => Err(error),
    })
}

/// Reads the configuration file, or the defaults where there is none.
fn config(file: Option<&std::path::Path>) -> anyhow::Result<crate::config::Config> {
    Ok(match file {
        Some(file) => crate::config::Config::read(file)?,
        None => crate::config::Config::default(),
    })
}

/// Whether the rankers of a generation load, for [`crate::catalog::build::BuildOptions::try_rankers`].
fn try_rankers(generation: &crate::catalog::generation::Generation) -> Result<(), String> {
    use crate::device::{DeviceError, cpu};
    cpu::try_rankers(Default::default(), generation).map_err(|error| match error {
        DeviceError::Load { reason, .. } => reason,
        other => other.to_string(),
    })
}

/// Parses `key=value`.
fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE".to_owned()),
    }
}
