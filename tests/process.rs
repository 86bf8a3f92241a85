//! The server as a process: signals under load, and machines that forbid what it needs.

mod common;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use common::*;
use tastemaker::api::{Call, Change, Event, Kind, RecommendCall, SearchBy, SearchCall, SearchFilter, Value};
use tastemaker::catalog::conditions::Demand;
use tastemaker::wire::client::{Answer, Client};
use tastemaker::wire::request::Request;

/// `tastemaker serve` on free ports, its log as JSON.
struct Served {
    child: Child,
    log: Option<BufReader<std::process::ChildStderr>>,
    binary: SocketAddr,
    http: SocketAddr,
}

impl Served {
    fn start() -> Self {
        Self::start_with("")
    }

    /// With more of a configuration.
    #[expect(clippy::zombie_processes, reason = "Drop waits")]
    fn start_with(more: &str) -> Self {
        let config = tempfile::NamedTempFile::new().unwrap();
        let config = config.path();
        std::fs::write(config, format!("[telemetry]\nlog_json = true\n{more}")).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_tastemaker"))
            .arg("serve")
            .arg(bundle_path())
            .args(["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--config"])
            .arg(config)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        loop {
            let mut line = String::new();
            assert!(log.read_line(&mut line).unwrap() > 0, "the server ended");
            let fields = &serde_json::from_str::<serde_json::Value>(&line).unwrap()["fields"];
            if fields["message"] == "serving" {
                let addr = |name: &str| fields[name].as_str().unwrap().parse().unwrap();
                return Served { binary: addr("binary"), http: addr("http"), child, log: Some(log) };
            }
        }
    }

    fn terminate(&self) {
        // SAFETY: a signal to a child that has not been waited for: the process id is still its own.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) }, 0);
    }

    /// Waits for the end; the exit code and the rest of the log.
    fn ended(mut self) -> (Option<i32>, String) {
        let mut rest = String::new();
        if let Some(log) = &mut self.log {
            log.read_to_string(&mut rest).unwrap();
        }
        (self.child.wait().unwrap().code(), rest)
    }
}

impl Drop for Served {
    /// A test that fails leaves no server behind: it would hold the pipe that `cargo test` writes to.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What one client of [`sigterm_under_load_loses_no_accepted_call`] saw.
#[derive(Default)]
struct Seen {
    slates: u64,
    refused: u64,
    /// When calls were sent that nobody answered.
    unanswered: Vec<Instant>,
}

fn load(addr: SocketAddr) -> Seen {
    const DEPTH: usize = 16;
    let mut client = Client::connect(addr, PATIENCE).unwrap();
    let mut seen = Seen::default();
    let mut pending = std::collections::HashMap::new();
    let mut n = 0u64;
    let mut open = true;
    loop {
        while open && pending.len() < DEPTH {
            n += 1;
            let user = format!("user-{}", n % 80);
            let call = RecommendCall { no_cache: !n.is_multiple_of(3), ..RecommendCall::new(&user, 10) };
            match client.send(&Request::Call(Call::Recommend(call))) {
                Ok(id) => drop(pending.insert(id, Instant::now())),
                Err(_) => open = false,
            }
        }
        if pending.is_empty() {
            return seen;
        }
        match client.receive() {
            Ok((id, answer)) => {
                pending.remove(&id).unwrap();
                match answer {
                    Answer::Slate(_) => seen.slates += 1,
                    Answer::Error { name, retryable: true, .. } => {
                        seen.refused += 1;
                        open &= name != "unavailable";
                    }
                    other => panic!("{other:?}"),
                }
            }
            Err(_) => {
                seen.unanswered = pending.into_values().collect();
                return seen;
            }
        }
    }
}

#[test]
fn sigterm_under_load_loses_no_accepted_call() {
    let served = Served::start();
    let addr = served.binary;
    let clients: Vec<_> = (0..8).map(|_| std::thread::spawn(move || load(addr))).collect();
    // Until load is steady: the server has answered some thousand calls.
    let mut probe = Client::connect(addr, PATIENCE).unwrap();
    for _ in 0..100 {
        // Shed or late is an answer, too.
        let call = RecommendCall { no_cache: true, ..RecommendCall::new("user-1", 10) };
        probe.call(&Request::Call(Call::Recommend(call))).unwrap();
    }
    served.terminate();
    let terminated = Instant::now();
    let (mut slates, mut refused) = (0, 0);
    for client in clients {
        let seen = client.join().unwrap();
        slates += seen.slates;
        refused += seen.refused;
        // What is sent to a server that has said goodbye is not accepted; what is sent before or just after the signal is.
        let settled = terminated + Duration::from_millis(15);
        assert!(seen.unanswered.iter().all(|sent| *sent > settled), "{} calls lost", seen.unanswered.len());
    }
    assert!(slates > 500 && refused > 0, "{slates} slates, {refused} refused");
    drop(probe);
    let (code, log) = served.ended();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("\"signal\":\"SIGTERM\"") && log.contains("drained"), "{log}");
    assert!(terminated.elapsed() < Duration::from_secs(5));
}

/// What one client of [`acknowledged_events_survive_kill_9`] sent: the ids that were acknowledged, and those of the call that was not.
fn put_until_the_end(
    addr: SocketAddr,
    user: &str,
    round: usize,
    retry: Vec<String>,
    calls: &AtomicUsize,
) -> (Vec<String>, Vec<String>) {
    let mut acknowledged = Vec::new();
    let Ok(mut client) = Client::connect(addr, PATIENCE) else { return (acknowledged, retry) };
    let mut ids = retry;
    for call in 0.. {
        if ids.is_empty() {
            ids = (0..=call % 4).map(|n| format!("{round}-{call}-{n}")).collect();
        }
        let item = format!("item-{}", call % 600);
        let events: Vec<Event<'_>> =
            ids.iter().map(|id| Event { event_id: id, ..Event::new(user, &item, "view") }).collect();
        match client.put_events(&events, true) {
            Ok(receipt) => {
                assert!(receipt.durable && receipt.accepted as usize == ids.len());
                acknowledged.append(&mut ids);
                calls.fetch_add(1, Relaxed);
            }
            Err(_) => break,
        }
    }
    (acknowledged, ids)
}

#[test]
fn acknowledged_events_survive_kill_9() {
    const USERS: [&str; 3] = ["a", "b", "c"];
    let rounds = std::env::var("TASTEMAKER_KILL_ROUNDS").map_or(4, |n| n.parse().unwrap());
    let work = tempfile::tempdir().unwrap();
    let config = format!(
        "[events]\nlog_dir = {:?}\nsegment_bytes = 65536\nhistory_per_user = 10000\n",
        work.path().join("log").to_str().unwrap()
    );
    let mut before: [(Vec<String>, Vec<String>); 3] = Default::default();
    let mut all = 0;
    for round in 0..rounds {
        let served = Served::start_with(&config);
        // What was acknowledged is there: sent again, every one of it is a repetition.
        let mut client = Client::connect(served.binary, PATIENCE).unwrap();
        for (user, (acknowledged, _)) in USERS.iter().zip(&before) {
            for ids in acknowledged.chunks(500) {
                let event = |id| Event { event_id: id, ..Event::new(user, "item-1", "view") };
                let events: Vec<Event<'_>> = ids.iter().map(|id: &String| event(id)).collect();
                let receipt = client.put_events(&events, false).unwrap();
                assert_eq!(receipt.duplicates as usize, ids.len(), "round {round}: events of {user} are lost");
            }
        }
        let (addr, pid) = (served.binary, served.child.id());
        let sent = before.map(|(_, retry)| retry);
        let calls = AtomicUsize::new(0);
        before = std::thread::scope(|scope| {
            let clients: Vec<_> = USERS
                .iter()
                .zip(sent)
                .map(|(user, retry)| (user, retry, &calls))
                .map(|(user, retry, calls)| scope.spawn(move || put_until_the_end(addr, user, round, retry, calls)))
                .collect();
            eventually("events are acknowledged", || calls.load(Relaxed) > 3);
            std::thread::sleep(Duration::from_millis((round * 37) as u64 % 150));
            // SAFETY: as in `terminate`.
            assert_eq!(unsafe { libc::kill(pid as i32, libc::SIGKILL) }, 0);
            let mut ended = clients.into_iter().map(|client| client.join().unwrap());
            std::array::from_fn(|_| ended.next().unwrap())
        });
        all += before.iter().map(|(acknowledged, _)| acknowledged.len()).sum::<usize>();
        drop(served);
    }
    assert!(all > rounds, "{all} events in {rounds} rounds");
    println!("{all} events in {rounds} rounds");
}

/// What was acknowledged of an item or user last.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Known {
    Price(u32),
    Gone,
    User(usize),
}

/// The change of number `n`: what it is of, and what it makes of it.
fn change_of(n: u32) -> (String, Known) {
    match n % 5 {
        3 => (format!("fresh-{}", n / 3 % 60), Known::Gone),
        4 => (format!("new-{}", n % 40), Known::User(n as usize % 16)),
        _ => (format!("fresh-{}", n % 60), Known::Price(n)),
    }
}

fn one_hot(at: usize) -> Vec<f32> {
    (0..16).map(|dim| if dim == at { 1.0 } else { 0.01 * dim as f32 }).collect()
}

fn make(client: &mut Client, (id, known): &(String, Known)) -> bool {
    // So long that retention has something to do.
    let title = "a title of some length ".repeat(200);
    let (vector, columns, kind);
    let mut change = Change::of(id);
    match known {
        Known::Gone => kind = Kind::DeleteItems,
        Known::User(at) => {
            (vector, kind) = (one_hot(*at), Kind::UpsertUsers);
            change.vector = Some(&vector);
        }
        Known::Price(price) => {
            (vector, kind) = (one_hot(*price as usize % 16), Kind::UpsertItems);
            columns = [("price", Value::Number(f64::from(*price))), ("title", Value::Text(&title))];
            (change.vector, change.columns) = (Some(&vector[..]), &columns);
        }
    }
    client.change(kind, &[change], true).is_ok()
}

fn holds(client: &mut Client, id: &str, known: Known) -> bool {
    let best =
        |client: &mut Client, by, k| client.search(&SearchCall::new(by, k)).ok().map(|mut found| found.remove(0));
    match known {
        Known::Gone => best(client, SearchBy::Item(id), 1).is_none(),
        Known::User(at) => best(client, SearchBy::User(id), 5) == best(client, SearchBy::Vector(&one_hot(at)), 5),
        Known::Price(price) => {
            let vector = one_hot(price as usize % 16);
            let conditions = [("price", Demand::Number(f64::from(price)))];
            let filter = SearchFilter { conditions: &conditions, ..SearchFilter::default() };
            let found =
                client.search(&SearchCall { filter, ..SearchCall::new(SearchBy::Vector(&vector), 100) }).unwrap();
            found[0].iter().any(|(found, _)| found == id)
        }
    }
}

#[test]
fn acknowledged_changes_survive_kill_9_and_retention() {
    let rounds = std::env::var("TASTEMAKER_KILL_ROUNDS").map_or(3, |n| n.parse().unwrap());
    let work = tempfile::tempdir().unwrap();
    let dir = work.path().join("log");
    let config = format!(
        "[events]\nlog_dir = {:?}\nsegment_bytes = 65536\nmax_bytes = 1048576\n[state]\nlive_items_max = 60\n",
        dir.to_str().unwrap()
    );
    let mut known = HashMap::<String, Known>::new();
    let mut n = 0;
    for round in 0..rounds {
        let served = Served::start_with(&config);
        let mut client = Client::connect(served.binary, PATIENCE).unwrap();
        for (id, known) in &known {
            assert!(holds(&mut client, id, *known), "round {round}: {id} is not {known:?}");
        }
        let (done, pid, start) = (AtomicUsize::new(0), served.child.id(), n);
        let last = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                // The first may have been made before the kill, and is made again.
                for n in start.. {
                    let change = change_of(n);
                    if !make(&mut client, &change) {
                        return n;
                    }
                    known.insert(change.0, change.1);
                    done.fetch_add(1, Relaxed);
                }
                u32::MAX
            });
            eventually("changes are acknowledged", || done.load(Relaxed) > if round == 0 { 600 } else { 20 });
            std::thread::sleep(Duration::from_millis((round * 37) as u64 % 150));
            // SAFETY: as in `terminate`.
            assert_eq!(unsafe { libc::kill(pid as i32, libc::SIGKILL) }, 0);
            writer.join().unwrap()
        });
        n = last;
        // Nobody knows whether it was made.
        known.remove(&change_of(n).0);
        drop(served);
    }
    let carried =
        std::fs::read_dir(&dir).unwrap().any(|entry| entry.unwrap().path().extension().is_some_and(|e| e == "snap"));
    assert!(carried && n > 600, "{n} changes in {rounds} rounds");
    println!("{n} changes in {rounds} rounds");
}

#[test]
fn an_idle_server_ends_at_once_on_sigterm() {
    let served = Served::start();
    let (_binary, _http) = (connect(served.binary), connect(served.http));
    let start = Instant::now();
    served.terminate();
    let (code, log) = served.ended();
    assert_eq!(code, Some(0), "{log}");
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
}

#[test]
fn a_server_that_nobody_listens_to_serves_and_drains() {
    let mut served = Served::start();
    served.log = None;
    let mut client = Client::connect(served.binary, PATIENCE).unwrap();
    client.recommend(&RecommendCall::new("user-1", 10)).unwrap();
    drop(client);
    served.terminate();
    assert_eq!(served.ended().0, Some(0));
}

/// Runs `serve` with `io_uring_setup` failing with `errno`.
fn serve_without_io_uring(errno: i32) -> (Option<i32>, String) {
    const ALLOW: u32 = 0x7fff_0000;
    const ERRNO: u32 = 0x0005_0000;
    let instruction = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    // Load the system call's number; if it is io_uring_setup, fail; else allow.
    let filter = [
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_io_uring_setup as u32),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, ERRNO | errno as u32),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, ALLOW),
    ];
    let mut command = Command::new(env!("CARGO_BIN_EXE_tastemaker"));
    command.arg("serve").arg(bundle_path()).args([
        "--listen",
        "127.0.0.1:0",
        "--http",
        "127.0.0.1:0",
        "--admin",
        "127.0.0.1:0",
    ]);
    // SAFETY: between fork and exec only two system calls are made, on memory that the closure owns.
    unsafe {
        command.pre_exec(move || {
            let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
            let failed = libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
                || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) != 0;
            if failed { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    let out = command.output().unwrap();
    (out.status.code(), String::from_utf8(out.stderr).unwrap())
}

#[test]
fn a_machine_without_io_uring_is_told_in_one_line() {
    for (errno, says) in [(libc::EPERM, "io_uring is forbidden here"), (libc::ENOSYS, "has no io_uring")] {
        let (code, stderr) = serve_without_io_uring(errno);
        assert_eq!(code, Some(1), "{stderr}");
        let lines: Vec<&str> = stderr.lines().filter(|l| l.starts_with("tastemaker: ")).collect();
        assert!(lines.len() == 1 && lines[0].contains(says), "{stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
}
