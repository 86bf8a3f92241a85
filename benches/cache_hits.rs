//! Share of hits of the result cache's policy beside others, on traces: `cargo bench --bench cache_hits [-- TRACE]`.
//!
//! All hold the same number of entries of the same size. TRACE is a file of keys, one a line, in the order that they are asked for.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;

use quick_cache::unsync::Cache;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// What holds entries.
trait Policy {
    /// Whether the key was there; it is afterwards, if the policy lets it in.
    fn ask(&mut self, key: u64) -> bool;
}

/// As the server has it: S3-FIFO (Yang et al., SOSP 2023) of quick_cache.
struct Ours(Cache<u64, ()>);

impl Policy for Ours {
    fn ask(&mut self, key: u64) -> bool {
        let hit = self.0.get(&key).is_some();
        if !hit {
            self.0.insert(key, ());
        }
        hit
    }
}

/// What was asked for least recently goes.
#[derive(Default)]
struct Lru {
    capacity: usize,
    clock: u64,
    asked: HashMap<u64, u64>,
    by_time: BTreeMap<u64, u64>,
}

impl Policy for Lru {
    fn ask(&mut self, key: u64) -> bool {
        self.clock += 1;
        let before = self.asked.insert(key, self.clock);
        if let Some(before) = before {
            self.by_time.remove(&before);
        } else if self.asked.len() > self.capacity
            && let Some((_, oldest)) = self.by_time.pop_first()
        {
            self.asked.remove(&oldest);
        }
        self.by_time.insert(self.clock, key);
        before.is_some()
    }
}

/// Knows the future (Belady): what is asked for latest goes. No policy hits more.
struct Clairvoyant {
    capacity: usize,
    at: usize,
    next: Vec<usize>,
    held: HashMap<u64, usize>,
    by_next: BTreeMap<usize, u64>,
}

impl Clairvoyant {
    fn new(trace: &[u64], capacity: usize) -> Self {
        let (mut later, mut next) = (HashMap::new(), vec![0; trace.len()]);
        for (at, key) in trace.iter().enumerate().rev() {
            // Those that are never asked for again differ, too.
            next[at] = later.insert(*key, at).unwrap_or(trace.len() + at);
        }
        Clairvoyant { capacity, at: 0, next, held: HashMap::new(), by_next: BTreeMap::new() }
    }
}

impl Policy for Clairvoyant {
    fn ask(&mut self, key: u64) -> bool {
        let next = self.next[self.at];
        self.at += 1;
        let before = self.held.insert(key, next);
        if let Some(before) = before {
            self.by_next.remove(&before);
        }
        self.by_next.insert(next, key);
        if self.held.len() > self.capacity
            && let Some((_, latest)) = self.by_next.pop_last()
        {
            self.held.remove(&latest);
        }
        before.is_some()
    }
}

/// `n` keys of `n_keys`, by a Zipf distribution of exponent `s`.
fn zipf(n: usize, n_keys: usize, s: f64) -> Vec<u64> {
    let mut sums: Vec<f64> = (1..=n_keys).map(|rank| (rank as f64).powf(-s)).collect();
    for rank in 1..n_keys {
        sums[rank] += sums[rank - 1];
    }
    let mut random = SmallRng::seed_from_u64(7);
    let total = sums[n_keys - 1];
    (0..n)
        .map(|_| {
            let wanted = random.random_range(0.0..total);
            sums.partition_point(|sum| *sum < wanted) as u64
        })
        .collect()
}

/// The trace with a crawler in it: one of `every` asks for what nobody asked for and nobody will.
fn scanned(trace: &[u64], every: usize) -> Vec<u64> {
    let crawler = |at: usize| at.is_multiple_of(every).then_some(1 << 40 | at as u64);
    trace.iter().enumerate().flat_map(|(at, key)| [Some(*key), crawler(at)]).flatten().collect()
}

/// The trace with bursts: after each tenth of it, as many keys as a tenth of the cache holds, each once.
fn swept(trace: &[u64], capacity: usize) -> Vec<u64> {
    let mut out = Vec::new();
    for (round, part) in trace.chunks(trace.len() / 10).enumerate() {
        out.extend_from_slice(part);
        out.extend((0..2 * capacity as u64).map(|at| 1 << 41 | (round as u64) << 24 | at));
    }
    out
}

fn main() {
    let mut traces = Vec::new();
    for s in [0.7, 0.9, 1.1] {
        traces.push((format!("Zipf {s}"), zipf(2_000_000, 200_000, s)));
    }
    traces.push(("Zipf 0.9, a crawler asks half of the time".into(), scanned(&zipf(1_000_000, 200_000, 0.9), 1)));
    traces.push(("Zipf 0.9, swept ten times".into(), swept(&zipf(2_000_000, 200_000, 0.9), 20_000)));
    let file = std::env::args().skip(1).find(|argument| !argument.starts_with("--"));
    if let Some(file) = file {
        let text = std::fs::read_to_string(&file).expect("a readable trace");
        let mut numbers = HashMap::new();
        let trace = text.lines().map(|line| {
            let n = numbers.len() as u64;
            *numbers.entry(line).or_insert(n)
        });
        traces.push((file.clone(), trace.collect()));
    }
    let mut table = String::from(
        "| trace | requests | keys | entries held | S3-FIFO (ours) | LRU | clairvoyant |\n|---|--:|--:|--:|--:|--:|--:|\n",
    );
    for (name, trace) in &traces {
        let n_keys = trace.iter().collect::<std::collections::HashSet<_>>().len();
        for share in [1, 10] {
            let capacity = (n_keys.min(200_000) * share / 100).max(1);
            let mut policies: [Box<dyn Policy>; 3] = [
                Box::new(Ours(Cache::new(capacity))),
                Box::new(Lru { capacity, ..Lru::default() }),
                Box::new(Clairvoyant::new(trace, capacity)),
            ];
            let hits = policies.each_mut().map(|policy| trace.iter().filter(|key| policy.ask(**key)).count());
            let [ours, lru, best] = hits.map(|hits| 100.0 * hits as f64 / trace.len() as f64);
            let _ = writeln!(
                table,
                "| {name} | {} | {n_keys} | {capacity} | {ours:.1} % | {lru:.1} % | {best:.1} % |",
                trace.len()
            );
            assert!(ours <= best + 1e-9 && lru <= best + 1e-9, "nobody beats who knows the future");
        }
    }
    print!("{table}");
}
