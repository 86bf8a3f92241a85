use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match loadgen::measure(&loadgen::Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("loadgen: no call succeeded");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("loadgen: {error:#}");
            ExitCode::FAILURE
        }
    }
}
