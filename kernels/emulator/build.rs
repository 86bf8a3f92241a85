//! Compiles the kernels, as they are and with each planted bug, for the CPU.

use std::fmt::Write as _;
use std::path::PathBuf;

use tastemaker_kernels::{PIECES, kernels_of};

include!("src/planted.rs");

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
    // Kernels read memory as other types of the same size, as CUDA lets them; what is undefined in C++ ends in a trap.
    for flag in ["-fno-strict-aliasing", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"] {
        build.flag(flag);
    }
    build.file("src/scheduler.cpp");
    for (name, text) in variants.iter().map(|(n, t)| (*n, t)).chain([("variants", &table)]) {
        let path = out.join(format!("{name}.cpp"));
        std::fs::write(&path, text).expect("OUT_DIR is writable");
        build.file(path);
    }
    build.compile("tastemaker_emulator");
    for file in ["src/emulator.h", "src/scheduler.cpp", "src/planted.rs"] {
        println!("cargo::rerun-if-changed={file}");
    }
}
