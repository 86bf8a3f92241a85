//! `tastemaker`: parse, validate, run.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = match tastemaker::cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let usage = error.use_stderr();
            // A closed pipe is the only way that this fails, and nobody is left to tell.
            let _ = error.print();
            return ExitCode::from(if usage { 2 } else { 0 });
        }
    };
    match tastemaker::cli::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tastemaker: {error:#}");
            ExitCode::FAILURE
        }
    }
}
