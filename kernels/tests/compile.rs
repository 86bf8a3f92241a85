//! What nvcc makes of the kernels: no warning, no spilled register, no stack, for every architecture; and a table of the registers and
//! the shared memory that they take.
//! Compiled, not run. `NVCC=… cargo test -p tastemaker-kernels -- --nocapture`

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::Command;

use tastemaker_kernels::{ARCHITECTURES, FATBIN, OPTIONS, PIECES, SOURCE, kernels_of};

/// The compiler; without one the tests say that they are skipped, or fail where `.ci/run` says that there is one.
fn nvcc() -> Option<String> {
    let nvcc = std::env::var("NVCC").ok().filter(|nvcc| !nvcc.is_empty());
    if nvcc.is_none() {
        assert!(std::env::var_os("TASTEMAKER_REQUIRE_NVCC").is_none(), "nvcc is required, and NVCC does not name it");
        // Not by `println!`, which the test harness keeps to itself.
        let _ = writeln!(std::io::stderr(), "SKIPPED: NVCC names no compiler");
    }
    nvcc
}

/// What ptxas says of a kernel.
#[derive(Debug, Default, PartialEq)]
struct Usage {
    kernel: String,
    registers: u32,
    shared: u32,
    stack: u32,
    spilled: u32,
}

/// The number before ` word`.
fn before(line: &str, word: &str) -> Option<u32> {
    let (front, _) = line.split_once(word)?;
    front.trim_end().rsplit([' ', ',', '\t']).next()?.parse().ok()
}

fn usages(report: &str) -> Vec<Usage> {
    let mut all: Vec<Usage> = Vec::new();
    for line in report.lines() {
        if line.contains("Compiling entry function") {
            let kernel = line.split('\'').nth(1).unwrap_or_default().to_owned();
            all.push(Usage { kernel, ..Usage::default() });
        } else if let Some(last) = all.last_mut() {
            last.stack = before(line, "bytes stack frame").unwrap_or(last.stack);
            let spilled = ["bytes spill stores", "bytes spill loads"].iter().filter_map(|word| before(line, word));
            last.spilled += spilled.sum::<u32>();
            if let Some((_, used)) = line.split_once("Used ") {
                last.registers = before(used, "registers").unwrap_or(0);
                last.shared = before(used, "bytes smem").unwrap_or(0);
            }
        }
    }
    all.sort_by(|a, b| a.kernel.cmp(&b.kernel));
    all
}

#[test]
fn reports_are_read() {
    let report = "ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'f' for 'sm_90'
ptxas info    : Function properties for f
    64 bytes stack frame, 128 bytes spill stores, 60 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 64 bytes cumulative stack size, 33852 bytes smem, 408 bytes cmem[0]";
    let f = Usage { kernel: "f".into(), registers: 64, shared: 33852, stack: 64, spilled: 188 };
    assert_eq!(usages(report), [f]);
}

#[test]
fn every_architecture_is_compiled_without_a_warning_or_a_spill() {
    let Some(nvcc) = nvcc() else { return };
    let folder = std::env::temp_dir().join(format!("tastemaker-kernels-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let unit = folder.join("kernels.cu");
    std::fs::write(&unit, SOURCE).unwrap();
    let mut kernels: Vec<&str> = PIECES.iter().flat_map(|(_, source)| kernels_of(source)).collect();
    kernels.sort_unstable();
    // Registers of each kernel by architecture, and what does not differ between these.
    let mut rows: Vec<String> = kernels.iter().map(|kernel| format!("| {kernel} |")).collect();
    let (mut head, mut foot) = (String::from("| registers of |"), String::from("| cubin of all, bytes |"));
    let mut shared = vec![0; kernels.len()];
    let mut wrong = Vec::new();
    for arch in ARCHITECTURES {
        let cubin = folder.join(format!("sm_{arch}.cubin"));
        let ran = Command::new(&nvcc)
            .args(["-cubin", "-O3", "-Xptxas", "-v", "-Werror", "all-warnings"])
            .args(OPTIONS)
            .arg(format!("-arch=sm_{arch}"))
            .arg(&unit)
            .arg("-o")
            .arg(&cubin)
            .output()
            .unwrap_or_else(|error| panic!("{nvcc}: {error}"));
        let report = String::from_utf8_lossy(&ran.stderr);
        assert!(ran.status.success(), "sm_{arch}: {report}");
        let bytes = std::fs::metadata(&cubin).unwrap().len();
        let usages = usages(&report);
        assert_eq!(usages.iter().map(|u| u.kernel.as_str()).collect::<Vec<_>>(), kernels, "sm_{arch}: {report}");
        write!(head, " sm_{arch} |").unwrap();
        write!(foot, " {bytes} |").unwrap();
        for (at, usage) in usages.iter().enumerate() {
            write!(rows[at], " {} |", usage.registers).unwrap();
            shared[at] = shared[at].max(usage.shared);
            if usage.stack + usage.spilled > 0 {
                wrong.push(format!("{}, sm_{arch}", usage.kernel));
            }
        }
    }
    std::fs::remove_dir_all(&folder).unwrap();
    println!("{head} shared memory, bytes |\n|---|{}", "--:|".repeat(ARCHITECTURES.len() + 1));
    for (row, shared) in rows.iter().zip(shared) {
        println!("{row} {shared} |");
    }
    println!("{foot} |");
    assert!(wrong.is_empty(), "registers are spilled, or there is a stack: {wrong:?}");
}

#[test]
fn what_is_embedded_is_a_fatbin() {
    match FATBIN {
        Some(fatbin) => {
            assert_eq!(fatbin.first_chunk(), Some(&0xba55_ed50u32.to_le_bytes()));
            println!("{} bytes embedded", fatbin.len());
        }
        None => assert!(std::env::var_os("TASTEMAKER_REQUIRE_NVCC").is_none(), "nothing is embedded"),
    }
}
