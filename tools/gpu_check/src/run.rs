//! Everything on one machine with a GPU.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use tastemaker::device::cuda::cuvs::{Cuvs, Resources};
use tastemaker::device::cuda::probe::Unfit;

use crate::machine::{Gpu, Machine};
use crate::report::{KernelCheck, Report, day};
use crate::search::{Plan, Shape};
use crate::{CLEAN, DIFFERS, NO_GPU, Run, kernels, search};

/// The parts, in order.
const PARTS: [&str; 6] = ["tests", "kernels", "sanitizer", "cuvs", "bench-kernels", "bench-cuvs"];
/// Tools of compute-sanitizer that say something of kernels without `cudaMalloc`ed leaks.
const TOOLS: [&str; 3] = ["memcheck", "racecheck", "synccheck"];

/// Runs the parts that are asked for and writes the report; returns the exit code.
///
/// # Errors
/// Options that mean nothing, or a report that can't be written. What the GPU or cuVS gets wrong is in the report.
pub fn run(options: &Run) -> Result<u8> {
    let unknown = options.only.iter().find(|part| !PARTS.contains(&part.as_str()));
    ensure!(unknown.is_none(), "--only {}: expected {}", unknown.map_or("", |part| part), PARTS.join(", "));
    let wanted = |part: &str| options.only.is_empty() || options.only.iter().any(|only| only == part);
    let begun = Instant::now();
    let mut gpu = match Gpu::open(options.gpu, None) {
        Ok(gpu) => gpu,
        Err(error) if error.downcast_ref::<Unfit>().is_some() => {
            eprintln!("gpu_check: {error:#}");
            return Ok(NO_GPU);
        }
        Err(error) => return Err(error),
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let seed = options.seed.unwrap_or(now.as_nanos() as u64);
    let command = std::env::args().collect::<Vec<_>>().join(" ");
    let mut report =
        Report { format: 1, date: day(now.as_secs()), command, seed, gpu: gpu.gpu.to_string(), ..Report::default() };
    println!("{}; seed {seed}", gpu.gpu);

    if wanted("tests") {
        for program in programs(options.tests.as_deref())? {
            let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
            println!("tests of {name}");
            let ran = Command::new(&program).args(["cuda", "gpu"]).env("TASTEMAKER_REQUIRE_GPU", "1").status();
            report.programs.push((name, ran.is_ok_and(|status| status.success())));
        }
    }
    if wanted("kernels") {
        for kernel in kernels::KERNELS {
            let mut mismatches = Vec::new();
            for at in 0..options.shapes {
                // Few, but not all: a kernel that is wrong everywhere is said so once.
                if mismatches.len() == 5 {
                    break;
                }
                let shape = kernels::check(&mut gpu, kernel, 20_000, seed.wrapping_add(at.into()));
                mismatches.extend(shape.err().map(|error| format!("{error:#}")));
            }
            println!("{kernel}: {} of {} random shapes differ", mismatches.len(), options.shapes);
            mismatches.iter().for_each(|mismatch| println!("  {mismatch}"));
            report.kernel_checks.push(KernelCheck { kernel: kernel.into(), tried: options.shapes, mismatches });
        }
    }
    if wanted("sanitizer") {
        match sanitizer() {
            Some(tool) => sanitize(&tool, options, seed, &mut report)?,
            None => report.notes.push("compute-sanitizer is not installed: not run".into()),
        }
    }
    let until = begun + Duration::from_secs(options.budget_s);
    if wanted("bench-kernels") {
        let shape = if options.quick { [64, 100_000, 16] } else { [1024, 1_000_000, 256] };
        let timed = kernels::copy_bandwidth(&mut gpu, 1 << 30).and_then(|copied| {
            report.copy_bytes_per_second = copied;
            kernels::bench(&mut gpu, copied, shape)
        });
        match timed {
            Ok(times) => report.kernels = times,
            Err(error) => report.notes.push(format!("times of kernels: {error:#}")),
        }
        gpu.clear()?;
    }
    match Cuvs::load(options.cuvs.as_deref()) {
        Err(error) => report.cuvs = error.to_string(),
        Ok(cuvs) => {
            let (major, minor, patch) = cuvs.version;
            report.cuvs = format!("{major}.{minor}.{patch}");
            if let Err(error) = with_cuvs(&mut gpu, cuvs, options, (seed, until), &mut report) {
                // Checks that did not run are none that passed.
                report.programs.push((format!("cuVS: {error:#}"), false));
            }
        }
    }
    println!("cuVS: {}", report.cuvs);
    fs::create_dir_all(&options.out)?;
    for (name, text) in [("gpu.md", report.markdown()), ("gpu.json", serde_json::to_string_pretty(&report)?)] {
        let path = options.out.join(name);
        fs::write(&path, text).with_context(|| path.display().to_string())?;
    }
    println!("\n{}", report.markdown());
    Ok(if report.is_clean() { CLEAN } else { DIFFERS })
}

fn with_cuvs(
    gpu: &mut Gpu,
    cuvs: &'static Cuvs,
    options: &Run,
    (seed, until): (u64, Instant),
    report: &mut Report,
) -> Result<()> {
    let wanted = |part: &str| options.only.is_empty() || options.only.iter().any(|only| only == part);
    // SAFETY: the stream is the GPU's, of its primary context, which is current on this thread; it outlives the resources.
    let resources = &mut unsafe { Resources::new(cuvs, gpu.stream(), gpu.ordinal()) }?;
    if wanted("cuvs") {
        let shape = Shape { n: if options.quick { 5_000 } else { 50_000 }, dim: 96, n_centers: 300 };
        report.agreements = search::check(gpu, resources, shape, seed);
        for agreement in report.agreements.iter().filter(|agreement| !agreement.is_same) {
            println!("{agreement:?}");
        }
    }
    if wanted("bench-cuvs") {
        let full =
            [Shape { n: 1_000_000, dim: 128, n_centers: 10_000 }, Shape { n: 10_000_000, dim: 96, n_centers: 50_000 }];
        let small = [Shape { n: 100_000, dim: 128, n_centers: 1_000 }];
        for shape in if options.quick { &small[..] } else { &full[..] } {
            let needed = shape.n * shape.dim * 4 * 3;
            let (free, _) = gpu.memory()?;
            if free < needed {
                report
                    .notes
                    .push(format!("{} x {}: needs {needed} bytes on the GPU, {free} are free", shape.n, shape.dim));
                continue;
            }
            let plan = Plan {
                shape: *shape,
                ks: vec![10, 100, 500],
                batches: vec![1, 4, 16, 64, 256, 1024],
                until,
                each: Duration::from_millis(if options.quick { 50 } else { 200 }),
            };
            let notes = &mut report.notes;
            let mut progress = |line: String| {
                println!("{line}");
                notes.extend(line.strip_prefix("note: ").map(str::to_owned));
            };
            match search::bench(gpu, resources, &plan, seed, &mut progress) {
                Ok(speeds) => report.searches.extend(speeds),
                Err(error) => report.notes.push(format!("{} x {}: {error:#}", shape.n, shape.dim)),
            }
        }
    }
    Ok(())
}

/// The programs in a folder, by name.
fn programs(folder: Option<&Path>) -> Result<Vec<PathBuf>> {
    let Some(folder) = folder else { return Ok(Vec::new()) };
    let found = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut all = found.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    all.sort();
    Ok(all)
}

/// compute-sanitizer, in the path or where a toolkit has it.
fn sanitizer() -> Option<PathBuf> {
    let name = "compute-sanitizer";
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/local/cuda/bin".into()]);
    folders.map(|folder| folder.join(name)).find(|path| path.is_file())
}

/// Runs the checks of the kernels, fewer of them, under each tool.
fn sanitize(tool: &Path, options: &Run, seed: u64, report: &mut Report) -> Result<()> {
    let own = std::env::current_exe()?;
    for name in TOOLS {
        let out = std::env::temp_dir().join(format!("gpu_check-{name}-{}", std::process::id()));
        let mut command = Command::new(tool);
        command.args(["--tool", name]).arg(&own).args(["run", "--only", "kernels", "--shapes", "8", "--out"]).arg(&out);
        command.args(["--seed", &seed.to_string()]);
        command.args(options.gpu.map(|gpu| format!("--gpu={gpu}")));
        let ran = command.output().context("compute-sanitizer")?;
        let said = String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
        let _ = fs::remove_dir_all(&out);
        match findings(&said) {
            Some(n) => report.sanitizer.push((name.into(), n)),
            None => report
                .notes
                .push(format!("compute-sanitizer, {name}: no summary: {}", said.lines().last().unwrap_or(""))),
        }
        println!("compute-sanitizer, {name}: {:?} findings", findings(&said));
    }
    Ok(())
}

/// The number in the last summary; racecheck counts hazards, of which warnings are no findings.
fn findings(said: &str) -> Option<u64> {
    let summary = said.lines().rev().find(|line| line.contains("SUMMARY:"))?;
    let (_, counts) = summary.split_once("SUMMARY:")?;
    if let Some((_, errors)) = counts.split_once('(') {
        return errors.split_whitespace().next()?.parse().ok();
    }
    counts.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_of_the_sanitizer_are_read() {
        let said = "========= COMPUTE-SANITIZER\nx\n========= ERROR SUMMARY: 3 errors";
        assert_eq!(findings(said), Some(3));
        let said = "========= RACECHECK SUMMARY: 2 hazards displayed (1 errors, 1 warnings)";
        assert_eq!(findings(said), Some(1));
        assert_eq!(findings("Target application returned an error"), None);
    }
}
