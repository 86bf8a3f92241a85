//! The whole program, with a stand-in for nvidia-smi and a server that answers.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::thread;

/// Says what `nvidia-smi dmon --format csv` says, once a second, of two GPUs.
const SMI: &str = r##"#!/bin/sh
[ "$1 $2 $3 $4 $5" = "dmon -s pucm -o DT" ] || exit 9
echo "#Date, Time, gpu, pwr, gtemp, mtemp, sm, mem, enc, dec, jpg, ofa, mclk, pclk, fb, bar1, ccpm"
echo "#YYYYMMDD, HH:MM:SS, Idx, W, C, C, %, %, %, %, %, %, MHz, MHz, MB, MB, MB"
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    now=$(date "+%Y%m%d, %H:%M:%S")
    echo "$now, 0, 650, 60, 70, 97, 40, 0, 0, 0, 0, 3201, 1980, 12345, 3, 0"
    echo "$now, 1, 70, 30, 40, 0, 0, 0, 0, 0, 0, 3201, 345, 4, 3, 0"
    sleep 1
done
"##;

/// Answers every request with an empty slate, until the test ends.
fn server() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                let (mut input, mut buffer) = (Vec::new(), [0; 4096]);
                while let Ok(n @ 1..) = stream.read(&mut buffer) {
                    input.extend_from_slice(&buffer[..n]);
                    let text = String::from_utf8_lossy(&input).into_owned();
                    let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
                    let length = head.lines().find_map(|line| {
                        let (name, value) = line.split_once(':')?;
                        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().unwrap())
                    });
                    if body.len() < length.unwrap_or(0) {
                        continue;
                    }
                    input.clear();
                    let answer = r#"{"items":[],"cache":"miss","degraded":[],"timings_us":{},"model_version":"x"}"#;
                    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", answer.len());
                    if stream.write_all((head + answer).as_bytes()).is_err() {
                        break;
                    }
                }
            });
        }
    });
    addr
}

#[test]
fn load_and_gpu_are_on_one_axis() {
    let folder = tempfile::tempdir().unwrap();
    let smi = folder.path().join("nvidia-smi");
    std::fs::write(&smi, SMI).unwrap();
    std::fs::set_permissions(&smi, std::fs::Permissions::from_mode(0o755)).unwrap();
    let (out, addr) = (folder.path().join("out"), server().to_string());
    let mut command = Command::new(env!("CARGO_BIN_EXE_gpu_profile"));
    command.arg("--out").arg(&out).arg("--nvidia-smi").arg(&smi).args(["--http", &addr, "--rate", "50"]);
    let ran = command.args(["--seconds", "3", "--warmup", "1", "--connections", "4"]).output().unwrap();
    let said = String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{said}");
    let csv = std::fs::read_to_string(out.join("profile.csv")).unwrap();
    let rows: Vec<&str> = csv.lines().skip(1).collect();
    assert_eq!(
        (csv.lines().next(), rows.len()),
        (Some("second,answers,p50_ms,p99_ms,sm,mem,fb,pwr,pclk,mclk"), 3),
        "{csv}"
    );
    assert!(rows.iter().any(|row| row.ends_with(",97.0,40.0,12345.0,650.0,1980.0,3201.0")), "{csv}");
    let answers: u64 = rows.iter().map(|row| row.split(',').nth(1).unwrap().parse::<u64>().unwrap()).sum();
    assert!((60..=240).contains(&answers), "{csv}");
    let page = std::fs::read_to_string(out.join("profile.md")).unwrap();
    assert!(page.contains("| power, W | 650 | 650 | 650 |") && page.contains("(profile.svg)"), "{page}");
    assert!(std::fs::read_to_string(out.join("profile.svg")).unwrap().contains("GPU: SM clock, MHz"));
    let load: serde_json::Value = serde_json::from_slice(&std::fs::read(out.join("load.json")).unwrap()).unwrap();
    assert_eq!(load["errors"], 0);
}

#[test]
fn without_nvidia_smi_it_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let run = |smi: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gpu_profile"));
        command.arg("--out").arg(folder.path()).args(["--nvidia-smi", smi, "--http", &server().to_string()]);
        let ran = command.args(["--seconds", "1", "--warmup", "0"]).output().unwrap();
        assert_eq!(ran.status.code(), Some(1));
        String::from_utf8_lossy(&ran.stderr).into_owned()
    };
    assert!(run("/nowhere/nvidia-smi").starts_with("gpu_profile: /nowhere/nvidia-smi: "));
    assert!(run("true").starts_with("gpu_profile: nvidia-smi dmon said nothing"));
}
