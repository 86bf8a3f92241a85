//! Tree ensembles beside another engine: scores rows of a model as often as it is told to, for `benches/peers/trees/compare.py`,
//! which is the command.
//!
//! `trees MODEL OUTPUT WIDTH ROWS < commands`, where ROWS is a file of f32 `[n, WIDTH]`. It prints the scores as JSON, then reads
//! a number of repetitions per line and prints the nanoseconds of CPU that they took.

use std::io::{BufRead, Write};
use std::path::Path;

use anyhow::Context as _;
use tastemaker::ranking::{Ranker, tree_model};

fn cpu_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a plain system call that fills the struct.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

fn main() -> anyhow::Result<()> {
    // `cargo bench` adds a flag of its own.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let [model, output, width, rows] = &arguments[..] else {
        println!("benches/peers/trees/compare.py runs this");
        return Ok(());
    };
    let width: usize = width.parse()?;
    let rows: Vec<f32> = std::fs::read(rows)?.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
    let manifest = format!("[[inputs]]\nname = \"x\"\ncolumns = []\n[output]\nname = \"{output}\"");
    let manifest = toml::from_str(&manifest)?;
    let mut ranker = tree_model::load("trees", Path::new(model), &manifest, &[width])?.context("no trees")?;
    let (inputs, n, mut scores) = ([rows.clone()], rows.len() / width, Vec::new());
    ranker.score(&inputs, n, &mut scores)?;
    println!("{}", serde_json::to_string(&scores)?);
    for line in std::io::stdin().lock().lines() {
        let repetitions: u32 = line?.trim().parse()?;
        let start = cpu_ns();
        for _ in 0..repetitions {
            ranker.score(std::hint::black_box(&inputs), n, &mut scores)?;
        }
        println!("{}", cpu_ns() - start);
        std::io::stdout().flush()?;
    }
    Ok(())
}
