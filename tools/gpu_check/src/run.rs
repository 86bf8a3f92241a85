//! Everything on one machine with a GPU.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use tastemaker::device::cuda::cuvs::{Cuvs, Resources};
use tastemaker::device::cuda::probe::Unfit;

use crate::machine::{Gpu, Machine};
use crate::report::{KernelCheck, Report, day};
use crate::search::{Plan, Shape};
use crate::{CLEAN, CUT_OFF, DIFFERS, FAILED, NO_GPU, Run, engine, exact, kernels, pipeline, search};

/// The parts, in order: what tells most in the least time comes first.
const PARTS: [&str; 11] = [
    "kernels",
    "engine",
    "cuvs",
    "bench-kernels",
    "bench-pipeline",
    "tensorrt",
    "bench-engine",
    "bench-exact",
    "tests",
    "bench-cuvs",
    "sanitizer",
];
/// Tools of compute-sanitizer that say something of kernels without `cudaMalloc`ed leaks.
const TOOLS: [&str; 3] = ["memcheck", "racecheck", "synccheck"];
/// What recommendations may take, so that others have their turn.
const PIPELINE_SECONDS: u64 = 150;
/// What TensorRT may take, which builds its engines anew.
const TENSORRT_SECONDS: u64 = 120;
/// What indexes over the larger vectors take, about.
const LARGE_SECONDS: u64 = 150;

/// What was found so far, and what is being done.
#[derive(Debug, Default)]
struct Now {
    report: Report,
    part: String,
}

/// Writes the report's two files.
fn write(report: &Report, out: &Path) -> Result<()> {
    fs::create_dir_all(out)?;
    for (name, text) in [("gpu.md", report.markdown()), ("gpu.json", serde_json::to_string_pretty(report)?)] {
        let path = out.join(name);
        fs::write(&path, text).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// One run: which parts are wanted, and when it is to end.
struct Session<'a> {
    options: &'a Run,
    begun: Instant,
    now: Arc<Mutex<Now>>,
    report: Report,
}

impl Session<'_> {
    fn until(&self) -> Instant {
        self.begun + Duration::from_secs(self.options.budget_s)
    }

    /// Whether a part is wanted and there is time; says so if there is none.
    fn begins(&mut self, part: &str) -> bool {
        let wanted = self.options.only.is_empty() || self.options.only.iter().any(|only| only == part);
        if wanted && Instant::now() >= self.until() {
            let note = format!("{part}: left out, {} s are over", self.options.budget_s);
            println!("{note}");
            self.report.notes.push(note);
            return false;
        }
        if wanted {
            println!("-- {part}, {} s after the start", self.begun.elapsed().as_secs());
            self.now.lock().unwrap_or_else(PoisonError::into_inner).part = part.to_owned();
        }
        wanted
    }

    /// Takes over what was found of recommendations.
    fn take(&mut self, what: &str, found: Result<pipeline::Found>) {
        match found {
            Ok(pipeline::Found { checks, speeds, notes }) => {
                self.report.slates.extend(checks);
                self.report.pipelines.extend(speeds);
                self.report.notes.extend(notes);
            }
            // Checks that did not run are none that passed.
            Err(error) => self.report.programs.push((format!("{what}: {error:#}"), false)),
        }
    }

    /// Keeps what was found so far, on the disk too.
    fn save(&mut self) -> Result<()> {
        self.report.judge();
        self.now.lock().unwrap_or_else(PoisonError::into_inner).report = self.report.clone();
        write(&self.report, &self.options.out)
    }
}

/// Ends the process with what was found when the time is over: a GPU may hang.
fn watch(now: Arc<Mutex<Now>>, options: &Run, begun: Instant) {
    let (limit, out) = (Duration::from_secs(options.limit_s), options.out.clone());
    std::thread::spawn(move || {
        std::thread::sleep((begun + limit).saturating_duration_since(Instant::now()));
        let mut now = now.lock().unwrap_or_else(PoisonError::into_inner);
        let note = format!("{}: cut off, {} s are over", now.part, limit.as_secs());
        eprintln!("gpu_check: {note}");
        now.report.notes.push(note);
        let written = write(&now.report, &out);
        println!("\n{}", now.report.markdown());
        let code = if now.report.is_clean() { CUT_OFF } else { DIFFERS };
        std::process::exit(i32::from(if written.is_ok() { code } else { FAILED }));
    });
}

/// Runs the parts that are asked for and writes the report; returns the exit code.
///
/// # Errors
/// Options that mean nothing, or a report that can't be written. What the GPU or cuVS gets wrong is in the report.
pub fn run(options: &Run) -> Result<u8> {
    let unknown = options.only.iter().find(|part| !PARTS.contains(&part.as_str()));
    ensure!(unknown.is_none(), "--only {}: expected {}", unknown.map_or("", |part| part), PARTS.join(", "));
    let begun = Instant::now();
    let now = Arc::new(Mutex::new(Now { part: "opening the GPU".into(), ..Now::default() }));
    watch(now.clone(), options, begun);
    let mut gpu = match Gpu::open(options.gpu, None) {
        Ok(gpu) => gpu,
        Err(error) if error.downcast_ref::<Unfit>().is_some() => {
            eprintln!("gpu_check: {error:#}");
            return Ok(NO_GPU);
        }
        Err(error) => return Err(error),
    };
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let seed = options.seed.unwrap_or(since_1970.as_nanos() as u64);
    let command = std::env::args().collect::<Vec<_>>().join(" ");
    let date = day(since_1970.as_secs());
    let report = Report { format: 1, date, command, seed, gpu: gpu.gpu.to_string(), ..Report::default() };
    let session = &mut Session { options, begun, now, report };
    println!("{}; seed {seed}", gpu.gpu);
    let cuvs = Cuvs::load(options.cuvs.as_deref());
    session.report.cuvs = match &cuvs {
        Ok(Cuvs { version: (major, minor, patch), .. }) => format!("{major}.{minor}.{patch}"),
        Err(error) => error.to_string(),
    };
    println!("cuVS: {}", session.report.cuvs);

    if session.begins("kernels") {
        check_kernels(&mut gpu, session, seed);
        session.save()?;
    }
    let (n, dim) = if options.quick { (3_000, 24) } else { (50_000, 64) };
    let setting = engine::Setting { n, dim, ordinal: gpu.gpu.ordinal, cuvs: options.cuvs.as_deref(), seed };
    if session.begins("engine") {
        let n_jobs = if options.quick { 32 } else { 512 };
        match engine::check(&setting, n_jobs, cuvs.is_ok(), session.until()) {
            Ok(checks) => session.report.engines = checks,
            Err(error) => session.report.programs.push((format!("engine: {error:#}"), false)),
        }
        session.report.engines.iter().for_each(|check| println!("{check:?}"));
        session.save()?;
    }
    if let Ok(cuvs) = cuvs.as_ref().copied()
        && session.begins("cuvs")
    {
        let shape = Shape { n: if options.quick { 5_000 } else { 50_000 }, dim: 96, n_centers: 300 };
        match resources(&gpu, cuvs) {
            Ok(mut resources) => session.report.agreements = search::check(&mut gpu, &mut resources, shape, seed),
            // Checks that did not run are none that passed.
            Err(error) => session.report.programs.push((format!("cuVS: {error:#}"), false)),
        }
        for agreement in session.report.agreements.iter().filter(|agreement| !agreement.is_same) {
            println!("{agreement:?}");
        }
        session.save()?;
    }
    if session.begins("bench-kernels") {
        let shape = if options.quick { [64, 100_000, 16] } else { [1024, 1_000_000, 256] };
        let timed = kernels::copy_bandwidth(&mut gpu, 1 << 30).and_then(|copied| {
            session.report.copy_bytes_per_second = copied;
            kernels::bench(&mut gpu, copied, shape)
        });
        match timed {
            Ok(times) => session.report.kernels = times,
            Err(error) => session.report.notes.push(format!("times of kernels: {error:#}")),
        }
        gpu.clear()?;
        session.save()?;
    }
    if session.begins("bench-pipeline") {
        let plan = pipeline_plan(session, &gpu, seed, PIPELINE_SECONDS)?;
        let found = pipeline::bench(&plan, &mut |line| println!("{line}"));
        session.take("recommendations", found);
        session.save()?;
    }
    if session.begins("tensorrt") {
        let folder = options.tensorrt.clone().unwrap_or_default();
        match pipeline::tensorrt_is_there(&folder) {
            Ok(()) => {
                let mut plan = pipeline_plan(session, &gpu, seed, TENSORRT_SECONDS)?;
                // Each has a context per batch size, with memory of its own.
                plan.workers.truncate(2);
                let found = pipeline::bench_tensorrt(&plan, &folder, &mut |line| println!("{line}"));
                session.take("TensorRT", found);
            }
            Err(reason) => {
                println!("TensorRT: not run: {reason}");
                session.report.notes.push(format!("TensorRT: not run: {reason}"));
            }
        }
        session.save()?;
    }
    if session.begins("bench-engine") {
        let n = if options.quick { 3_000 } else { 200_000 };
        let setting = engine::Setting { n, dim: 128, ..setting };
        let each = Duration::from_millis(if options.quick { 50 } else { 1000 });
        match engine::bench(&setting, &[1, 16, 64], each, session.until()) {
            Ok(speeds) => session.report.engine_speeds = speeds,
            Err(error) => session.report.notes.push(format!("speed of the engines: {error:#}")),
        }
        session.save()?;
    }
    if session.begins("bench-exact") {
        let full = exact::Plan {
            shape: Shape { n: 1_000_000, dim: 128, n_centers: 10_000 },
            ks: vec![10, 100, 500],
            batches: vec![1, 4, 16, 64, 256, 1024],
            each: Duration::from_millis(100),
            until: session.until(),
        };
        let plan = match options.quick {
            true => exact::Plan {
                shape: Shape { n: 3_000, dim: 24, n_centers: 30 },
                ks: vec![10, 40],
                batches: vec![1, 8],
                each: Duration::from_millis(10),
                ..full
            },
            false => full,
        };
        match exact::bench(&mut gpu, &plan, seed) {
            Ok(exact::Found { speeds, wrong, notes }) => {
                wrong.iter().chain(&notes).for_each(|line| println!("{line}"));
                session.report.searches.extend(speeds);
                session.report.programs.extend(wrong.into_iter().map(|what| (what, false)));
                session.report.notes.extend(notes);
            }
            Err(error) => session.report.notes.push(format!("exact search: {error:#}")),
        }
        gpu.clear()?;
        session.save()?;
    }
    if session.begins("tests") {
        for program in programs(options.tests.as_deref())? {
            let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
            println!("tests of {name}");
            let mut command = Command::new(&program);
            command.args(["cuda", "gpu"]);
            match bounded(&mut command, session.until())? {
                Some((status, said)) => {
                    print!("{said}");
                    session.report.programs.push((name, status.success()));
                }
                None => session.report.notes.push(format!("tests of {name}: cut off, the time is over")),
            }
        }
        session.save()?;
    }
    if let Ok(cuvs) = cuvs.as_ref().copied()
        && session.begins("bench-cuvs")
    {
        match resources(&gpu, cuvs) {
            Ok(mut resources) => bench_cuvs(&mut gpu, &mut resources, session, seed)?,
            Err(error) => session.report.notes.push(format!("cuVS: {error:#}")),
        }
        session.save()?;
    }
    if session.begins("sanitizer") {
        match sanitizer() {
            Some(tool) => sanitize(&tool, session, seed)?,
            None => session.report.notes.push("compute-sanitizer is not installed: not run".into()),
        }
    }
    session.save()?;
    println!("\n{}", session.report.markdown());
    Ok(if session.report.is_clean() { CLEAN } else { DIFFERS })
}

/// Every kernel over random shapes, as far as there is time.
fn check_kernels(gpu: &mut Gpu, session: &mut Session<'_>, seed: u64) {
    let shapes = session.options.shapes;
    for kernel in kernels::KERNELS {
        let (mut mismatches, mut tried) = (Vec::new(), 0);
        // Few, but not all: a kernel that is wrong everywhere is said so once.
        while tried < shapes && mismatches.len() < 5 && Instant::now() < session.until() {
            let shape = kernels::check(gpu, kernel, 20_000, seed.wrapping_add(tried.into()));
            mismatches.extend(shape.err().map(|error| format!("{error:#}")));
            tried += 1;
        }
        println!("{kernel}: {} of {tried} random shapes differ", mismatches.len());
        mismatches.iter().for_each(|mismatch| println!("  {mismatch}"));
        if tried < shapes && mismatches.is_empty() {
            session.report.notes.push(format!("{kernel}: {tried} of {shapes} shapes, the time is over"));
        }
        session.report.kernel_checks.push(KernelCheck { kernel: kernel.into(), tried, mismatches });
    }
}

fn resources(gpu: &Gpu, cuvs: &'static Cuvs) -> Result<Resources> {
    // SAFETY: the stream is the GPU's, of its primary context, which is current on this thread, and which outlives the resources.
    Ok(unsafe { Resources::new(cuvs, gpu.stream(), gpu.ordinal()) }?)
}

/// Runs a program to its end, or kills it when the time is over; its status and what it said.
fn bounded(command: &mut Command, until: Instant) -> Result<Option<(ExitStatus, String)>> {
    // A pipe that nobody reads would hold it up.
    let said = tempfile::NamedTempFile::new()?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(said.reopen()?)
        .stderr(said.reopen()?)
        .spawn()
        .with_context(|| format!("{:?}", command.get_program()))?;
    loop {
        if let Some(status) = child.try_wait()? {
            let bytes = fs::read(said.path())?;
            return Ok(Some((status, String::from_utf8_lossy(&bytes).into_owned())));
        }
        if Instant::now() >= until {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// How recommendations are measured, for so many seconds: with as large batches, and as many workers, as the GPU has memory for.
fn pipeline_plan(session: &Session<'_>, gpu: &Gpu, seed: u64, seconds: u64) -> Result<pipeline::Plan> {
    let until = session.until().min(Instant::now() + Duration::from_secs(seconds));
    let left = until.saturating_duration_since(Instant::now()).as_secs_f64();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let n_items = 1_000_000;
    // Vectors, and the rows of a ranker's first layer; a worker has the scores of a batch, and a quarter more for all else.
    let (tables, scores) = (n_items * (128 + 512) * 4, n_items * 4 * 5 / 4);
    let room = (gpu.memory()?.0 / 10 * 8).saturating_sub(tables);
    let batches: Vec<usize> =
        [1, 8, 32, 128, 512, 1024].into_iter().filter(|&n| n == 1 || n * scores <= room).collect();
    let largest = batches.iter().copied().max().unwrap_or(1);
    let fits = |&n: &usize| n == 1 || (n <= cores && n * largest * scores <= room);
    let plan = pipeline::Plan {
        shape: Shape { n: n_items, dim: 128, n_centers: 10_000 },
        sources: [500, 300, 100],
        share: 1,
        batches,
        workers: [1, 2, 4, 8].into_iter().filter(fits).collect(),
        n_checked: 64,
        // Of all batches and workers together a third; what is left is for loading.
        each: Duration::from_secs_f64((left / 120.0).clamp(0.05, 1.0)),
        until,
        ordinal: gpu.gpu.ordinal,
        seed,
    };
    if !session.options.quick {
        return Ok(plan);
    }
    Ok(pipeline::Plan {
        shape: Shape { n: 3_000, dim: 24, n_centers: 30 },
        sources: [60, 40, 20],
        share: 8,
        batches: vec![1, 8],
        workers: vec![1, 2],
        n_checked: 8,
        each: Duration::from_millis(20),
        ..plan
    })
}

/// Speed and recall of every index, of the larger vectors where there is time.
fn bench_cuvs(gpu: &mut Gpu, resources: &mut Resources, session: &mut Session<'_>, seed: u64) -> Result<()> {
    let quick = session.options.quick;
    let full =
        [Shape { n: 1_000_000, dim: 128, n_centers: 10_000 }, Shape { n: 10_000_000, dim: 96, n_centers: 50_000 }];
    let small = [Shape { n: 100_000, dim: 128, n_centers: 1_000 }];
    for (at, shape) in (if quick { &small[..] } else { &full[..] }).iter().enumerate() {
        let until = session.until();
        let left = until.saturating_duration_since(Instant::now()).as_secs();
        if at > 0 && left < LARGE_SECONDS {
            let note = format!("{} x {}: left out, {left} s are left of {LARGE_SECONDS}", shape.n, shape.dim);
            println!("{note}");
            session.report.notes.push(note);
            continue;
        }
        let needed = shape.n * shape.dim * 4 * 3;
        let (free, _) = gpu.memory()?;
        if free < needed {
            let note = format!("{} x {}: needs {needed} bytes on the GPU, {free} are free", shape.n, shape.dim);
            session.report.notes.push(note);
            continue;
        }
        let plan = Plan {
            shape: *shape,
            ks: vec![10, 100, 500],
            batches: vec![1, 4, 16, 64, 256, 1024],
            until,
            each: Duration::from_millis(if quick { 50 } else { 200 }),
        };
        let notes = &mut session.report.notes;
        let mut progress = |line: String| {
            println!("{line}");
            notes.extend(line.strip_prefix("note: ").map(str::to_owned));
        };
        match search::bench(gpu, resources, &plan, seed, &mut progress) {
            Ok(speeds) => session.report.searches.extend(speeds),
            Err(error) => session.report.notes.push(format!("{} x {}: {error:#}", shape.n, shape.dim)),
        }
        session.save()?;
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
fn sanitize(tool: &Path, session: &mut Session<'_>, seed: u64) -> Result<()> {
    let (own, until) = (std::env::current_exe()?, session.until());
    for name in TOOLS {
        let out = tempfile::tempdir()?;
        let mut command = Command::new(tool);
        command.args(["--tool", name]).arg(&own).args(["run", "--only", "kernels", "--shapes", "8", "--out"]);
        command.arg(out.path()).args(["--seed", &seed.to_string()]);
        command.args(session.options.gpu.map(|gpu| format!("--gpu={gpu}")));
        let note = match bounded(&mut command, until)? {
            None => Some("cut off, the time is over".to_owned()),
            Some((_, said)) => match findings(&said) {
                Some(n) => {
                    println!("compute-sanitizer, {name}: {n} findings");
                    session.report.sanitizer.push((name.into(), n));
                    None
                }
                None => Some(format!("no summary: {}", said.lines().last().unwrap_or(""))),
            },
        };
        session.report.notes.extend(note.map(|note| format!("compute-sanitizer, {name}: {note}")));
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
