//! Regenerates `src/wire/generated.rs` from `schemas/tastemaker.fbs`; `--check` only compares.
//!
//! Run from the project's root: `cargo run --manifest-path tools/flatgen/Cargo.toml [-- --check]`.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, bail, ensure};

const SCHEMA: &str = "schemas/tastemaker.fbs";
const GENERATED: &str = "src/wire/generated.rs";

fn main() -> anyhow::Result<()> {
    let check = match std::env::args().nth(1).as_deref() {
        None => false,
        Some("--check") => true,
        Some(other) => bail!("unknown argument `{other}`"),
    };
    ensure!(Path::new(SCHEMA).exists(), "{SCHEMA} is not here: run from the project's root");
    let out = tempfile::tempdir()?;
    let status = Command::new(flatc_fork::flatc()).arg("--rust").arg("-o").arg(out.path()).arg(SCHEMA).status()?;
    ensure!(status.success(), "flatc failed");
    let fresh = std::fs::read_to_string(out.path().join("tastemaker_generated.rs")).context("flatc's output")?;
    if !check {
        std::fs::write(GENERATED, fresh)?;
        println!("{GENERATED}: written");
        return Ok(());
    }
    ensure!(std::fs::read_to_string(GENERATED)? == fresh, "{GENERATED} is not what {SCHEMA} gives; run tools/flatgen");
    println!("{GENERATED}: current");
    Ok(())
}
