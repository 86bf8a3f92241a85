//! Compiles the kernels, as they are and with each planted bug, for the CPU.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use tastemaker_kernels::{PIECES, kernels_of};

include!("src/planted.rs");

/// Kernels read memory as other types of the same size, as CUDA lets them; what is undefined in C++ ends in a trap.
const CHECKED: [&str; 3] = ["-fno-strict-aliasing", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"];

/// C++ of a variant: `pieces`, and a table of the kernels in them.
fn unit(name: &str, pieces: &[(&str, String)]) -> String {
    let mut text = String::from("#include \"emulator.h\"\n");
    for (file, source) in pieces {
        write!(text, "#line 1 \"{file}\"\n{source}").unwrap();
    }
    writeln!(text, "extern const emu::Kernel emu_kernels_{name}[] = {{").unwrap();
    let kernels: Vec<&str> = pieces.iter().flat_map(|(_, source)| kernels_of(source)).collect();
    for kernel in &kernels {
        writeln!(
            text,
            "{{\"{kernel}\", emu::Caller<{kernel}>::n, emu::Caller<{kernel}>::sizes, emu::Caller<{kernel}>::run}},"
        )
        .unwrap();
    }
    writeln!(text, "}};\nextern const size_t emu_n_{name} = {};", kernels.len()).unwrap();
    text
}

/// A folder with the emulated driver and NVRTC, under the names by which both are looked for; `None`, with a warning, where the
/// compiler can't make them, unless TASTEMAKER_REQUIRE_EMULATOR is set. They name themselves as they are first asked for, so that one
/// that is open already is found again.
fn libraries(out: &Path, plain: &str) -> Option<PathBuf> {
    let folder = out.join("cuda");
    std::fs::create_dir_all(&folder).expect("OUT_DIR is writable");
    let unit = out.join("driver_kernels.cpp");
    let table = "\nstruct emu_variant { const char* name; const emu::Kernel* kernels; size_t n; };\n\
        extern const emu_variant emu_variants[] = {{\"plain\", emu_kernels_plain, emu_n_plain}};\n\
        extern const size_t emu_n_variants = 1;\n";
    std::fs::write(&unit, format!("{plain}{table}")).expect("OUT_DIR is writable");
    let kernels = unit.to_str().expect("OUT_DIR is UTF-8");
    for (name, sources) in [
        ("libcuda.so", &["driver/driver.cpp", "src/scheduler.cpp", kernels][..]),
        ("libnvrtc.so", &["driver/nvrtc.cpp"]),
    ] {
        let mut command =
            cc::Build::new().cpp(true).warnings(false).opt_level(1).debug(false).get_compiler().to_command();
        command.args(["-std=c++17", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden", "-Isrc"]);
        command.args(CHECKED).arg(format!("-Wl,-soname,{name}")).args(sources).arg("-o").arg(folder.join(name));
        let why = match command.output() {
            Ok(ran) if ran.status.success() => continue,
            Ok(ran) => String::from_utf8_lossy(&ran.stderr).lines().next().unwrap_or("it said nothing").to_owned(),
            Err(error) => error.to_string(),
        };
        assert!(std::env::var_os("TASTEMAKER_REQUIRE_EMULATOR").is_none(), "no emulated {name}: {why}");
        println!("cargo::warning=no emulated {name}: {why}");
        return None;
    }
    Some(folder)
}

fn main() {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    let mut variants =
        vec![("plain", unit("plain", &PIECES.iter().map(|&(f, s)| (f, s.to_owned())).collect::<Vec<_>>()))];
    let prelude = PIECES[0];
    for bug in PLANTED {
        let with = |(file, source): (&'static str, &str)| {
            let n = source.matches(bug.from).count();
            assert!(file != bug.file || n == 1, "{}: `{}` occurs {n} times in {file}", bug.name, bug.from);
            (file, if file == bug.file { source.replace(bug.from, bug.to) } else { source.to_owned() })
        };
        let own = PIECES.iter().find(|(_, source)| kernels_of(source).any(|kernel| kernel == bug.kernel));
        let own = own.unwrap_or_else(|| panic!("{}: no kernel {}", bug.name, bug.kernel));
        variants.push((bug.name, unit(bug.name, &[with(prelude), with(*own)])));
    }
    // What the emulator itself is tested by.
    let own = ("selftest.cu", include_str!("src/selftest.cu").to_owned());
    variants.push(("selftest", unit("selftest", &[(prelude.0, prelude.1.to_owned()), own])));
    let libraries = libraries(&out, &variants[0].1);
    println!(
        "cargo::rustc-env=EMULATED_CUDA={}",
        libraries.map_or(String::new(), |folder| folder.display().to_string())
    );
    let mut table = String::from(
        "#include \"emulator.h\"\nstruct emu_variant { const char* name; const emu::Kernel* kernels; size_t n; };\n",
    );
    for (name, _) in &variants {
        writeln!(table, "extern const emu::Kernel emu_kernels_{name}[]; extern const size_t emu_n_{name};").unwrap();
    }
    table.push_str("extern const emu_variant emu_variants[] = {\n");
    for (name, _) in &variants {
        writeln!(table, "{{\"{name}\", emu_kernels_{name}, emu_n_{name}}},").unwrap();
    }
    writeln!(table, "}};\nextern const size_t emu_n_variants = {};", variants.len()).unwrap();

    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").include("src").warnings(false).opt_level(1).debug(false);
    for flag in CHECKED {
        build.flag(flag);
    }
    build.file("src/scheduler.cpp");
    for (name, text) in variants.iter().map(|(n, t)| (*n, t)).chain([("variants", &table)]) {
        let path = out.join(format!("{name}.cpp"));
        std::fs::write(&path, text).expect("OUT_DIR is writable");
        build.file(path);
    }
    build.compile("tastemaker_emulator");
    for file in ["src/emulator.h", "src/scheduler.cpp", "src/planted.rs", "driver/driver.cpp", "driver/nvrtc.cpp"] {
        println!("cargo::rerun-if-changed={file}");
    }
    println!("cargo::rerun-if-env-changed=TASTEMAKER_REQUIRE_EMULATOR");
}
