//! One replica under a load, event by event.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::profile::Profile;

/// When requests come.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrivals {
    /// At equal distances.
    Constant,
    /// Independently of each other, at a rate that changes between `1 - swing` and `1 + swing` of its mean, each for a tenth of a
    /// second on average.
    Poisson {
        /// 0 to 1.
        swing: f64,
    },
}

impl Arrivals {
    /// Independently of each other, at one rate.
    pub const fn poisson() -> Self {
        Arrivals::Poisson { swing: 0.0 }
    }
}

/// How long a rate lasts on average, ns.
const SWING_NS: f64 = 1e8;

/// What a replica is asked.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Requests per second.
    pub rps: f64,
    /// Share that the cache answers, 0 to 1.
    pub hit_ratio: f64,
    /// When they come.
    pub arrivals: Arrivals,
    /// How many; the first tenth is not counted.
    pub n_requests: usize,
    /// Of the random numbers.
    pub seed: u64,
}

/// How a replica fared.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Requests per second that it was asked.
    pub rps: f64,
    /// Median, ms.
    pub p50_ms: f64,
    /// 90 %, ms.
    pub p90_ms: f64,
    /// 99 %, ms.
    pub p99_ms: f64,
    /// 99.9 %, ms.
    pub p999_ms: f64,
    /// Share of the time that its CPUs were busy, as if all of their work were done while requests came: above 1, it was not.
    pub cpu: f64,
    /// Share of what its device could compute in full batches; a busy device makes smaller ones too.
    pub device: Option<f64>,
    /// Mean size of the device's batches.
    pub batch: Option<f64>,
    /// Share of all requests that had no answer when the last one came.
    pub behind: f64,
}

impl Outcome {
    /// Whether it answered as fast as it was asked.
    pub fn keeps_up(&self) -> bool {
        self.behind < 0.02
    }

    /// What runs out first.
    pub fn bottleneck(&self) -> &'static str {
        if self.device.is_some_and(|device| device > self.cpu) { "device" } else { "CPU" }
    }
}

/// A piece of a request's work on a CPU.
#[derive(Clone, Copy, Debug)]
struct Work {
    request: u32,
    ns: u64,
    then: Then,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    Answer,
    Device,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrival,
    /// A CPU is done with the work of this place.
    Cpu(u32),
    Device(u32),
}

struct Replica<'a> {
    profile: &'a Profile,
    rng: SmallRng,
    now: u64,
    events: BinaryHeap<Reverse<(u64, Event)>>,
    /// By request.
    arrived: Vec<u64>,
    answered: usize,
    waiting: VecDeque<Work>,
    /// By CPU: what it is at.
    cpus: Vec<Option<Work>>,
    for_device: VecDeque<u32>,
    /// By stream: its batch; empty while it idles.
    streams: Vec<Vec<u32>>,
    cpu_ns: u64,
    batches: u64,
    batched: u64,
    /// Nanoseconds.
    latencies: Vec<u64>,
    first_counted: u32,
}

/// Requests of a replica from the first to the last, with latencies that end with its last answer.
pub fn simulate(profile: &Profile, load: &Load) -> Outcome {
    let streams = profile.miss.device.as_ref().map_or(0, |device| device.streams as usize);
    let mut replica = Replica {
        profile,
        rng: SmallRng::seed_from_u64(load.seed),
        now: 0,
        events: BinaryHeap::new(),
        arrived: Vec::with_capacity(load.n_requests),
        answered: 0,
        waiting: VecDeque::new(),
        cpus: vec![None; profile.cpus as usize],
        for_device: VecDeque::new(),
        streams: vec![Vec::new(); streams],
        cpu_ns: 0,
        batches: 0,
        batched: 0,
        latencies: Vec::with_capacity(load.n_requests),
        first_counted: (load.n_requests / 10) as u32,
    };
    let (span, behind) = replica.run(load);
    let span = span.max(1) as f64;
    let mut latencies = std::mem::take(&mut replica.latencies);
    latencies.sort_unstable();
    let ms = |share: f64| {
        let at = (latencies.len() as f64 * share).ceil() as usize;
        latencies.get(at.saturating_sub(1)).map_or(0.0, |&ns| ns as f64 / 1e6) + profile.transit_us / 1e3
    };
    Outcome {
        rps: load.rps,
        p50_ms: ms(0.5),
        p90_ms: ms(0.9),
        p99_ms: ms(0.99),
        p999_ms: ms(0.999),
        cpu: replica.cpu_ns as f64 / span / f64::from(profile.cpus),
        device: profile.miss.device.as_ref().map(|device| {
            let full_us = device.batch_us(device.most()) / f64::from(device.most());
            replica.batched as f64 * full_us * 1e3 / span / f64::from(device.streams)
        }),
        batch: (replica.batches > 0).then(|| replica.batched as f64 / replica.batches as f64),
        behind: behind as f64 / load.n_requests.max(1) as f64,
    }
}

impl Replica<'_> {
    /// Returns when the last request came, ns, and how many were without an answer then.
    fn run(&mut self, load: &Load) -> (u64, usize) {
        let mut clock =
            Clock { mean_ns: 1e9 / load.rps.max(1e-9), arrivals: load.arrivals, high: true, until: 0.0, now: 0.0 };
        let mut last = (0, 0);
        self.events.push(Reverse((clock.next(&mut self.rng), Event::Arrival)));
        while let Some(Reverse((now, event))) = self.events.pop() {
            self.now = now;
            match event {
                Event::Arrival => {
                    self.arrive(load.hit_ratio);
                    last = (now, self.arrived.len() - self.answered);
                    if self.arrived.len() < load.n_requests {
                        self.events.push(Reverse((clock.next(&mut self.rng), Event::Arrival)));
                    }
                }
                Event::Cpu(cpu) => {
                    if let Some(done) = self.cpus[cpu as usize].take() {
                        match done.then {
                            Then::Answer => self.answer(done.request),
                            Then::Device => self.for_device.push_back(done.request),
                        }
                    }
                }
                Event::Device(stream) => {
                    let batch = std::mem::take(&mut self.streams[stream as usize]);
                    for request in batch {
                        let ns = self.cpu_share();
                        self.waiting.push_back(Work { request, ns, then: Then::Answer });
                    }
                }
            }
            self.start_batches();
            self.start_work();
        }
        last
    }

    fn arrive(&mut self, hit_ratio: f64) {
        let request = self.arrived.len() as u32;
        self.arrived.push(self.now);
        let ns = |us: f64| (us * 1e3) as u64;
        let work = if self.rng.random::<f64>() < hit_ratio {
            Work { request, ns: ns(self.profile.hit_us), then: Then::Answer }
        } else {
            let idle = self.cpus.iter().any(Option::is_none);
            let wake = if idle { ns(self.profile.wake_us) } else { 0 };
            let then = if self.streams.is_empty() { Then::Answer } else { Then::Device };
            Work { request, ns: self.cpu_share() + wake, then }
        };
        self.waiting.push_back(work);
    }

    /// CPU time of a computed answer, ns; half of it where there is a way to a device and one back.
    fn cpu_share(&mut self) -> u64 {
        let us = self.profile.miss.cpu_us.at(self.rng.random());
        (us * if self.streams.is_empty() { 1e3 } else { 0.5e3 }) as u64
    }

    fn answer(&mut self, request: u32) {
        self.answered += 1;
        if request >= self.first_counted {
            self.latencies.push(self.now - self.arrived[request as usize]);
        }
    }

    fn start_work(&mut self) {
        for cpu in 0..self.cpus.len() {
            if self.cpus[cpu].is_none()
                && let Some(work) = self.waiting.pop_front()
            {
                self.cpus[cpu] = Some(work);
                self.cpu_ns += work.ns;
                self.events.push(Reverse((self.now + work.ns, Event::Cpu(cpu as u32))));
            }
        }
    }

    fn start_batches(&mut self) {
        let Some(device) = &self.profile.miss.device else { return };
        for (stream, batch) in self.streams.iter_mut().enumerate() {
            if batch.is_empty() && !self.for_device.is_empty() {
                let n = self.for_device.len().min(device.most() as usize);
                batch.extend(self.for_device.drain(..n));
                let ns = (device.batch_us(n as u32) * 1e3) as u64;
                self.batches += 1;
                self.batched += n as u64;
                self.events.push(Reverse((self.now + ns, Event::Device(stream as u32))));
            }
        }
    }
}

/// Says when the next request comes.
struct Clock {
    mean_ns: f64,
    arrivals: Arrivals,
    high: bool,
    /// When the rate changes, ns.
    until: f64,
    now: f64,
}

impl Clock {
    fn next(&mut self, rng: &mut SmallRng) -> u64 {
        let mut exponential = |mean: f64| -(1.0 - rng.random::<f64>()).ln() * mean;
        match self.arrivals {
            Arrivals::Constant => self.now += self.mean_ns,
            Arrivals::Poisson { swing: 0.0 } => self.now += exponential(self.mean_ns),
            Arrivals::Poisson { swing } => loop {
                let rate = if self.high { 1.0 + swing } else { 1.0 - swing };
                let at = self.now + exponential(self.mean_ns / rate.max(1e-9));
                if at <= self.until {
                    self.now = at;
                    break;
                }
                // Without memory: what is left of the gap begins anew at the other rate.
                self.now = self.until;
                self.until += exponential(SWING_NS);
                self.high = !self.high;
            },
        }
        self.now as u64
    }
}

#[cfg(test)]
mod tests {
    use super::super::profile::{DeviceCost, testing};
    use super::*;

    fn load(rps: f64) -> Load {
        Load { rps, hit_ratio: 0.0, arrivals: Arrivals::poisson(), n_requests: 200_000, seed: 7 }
    }

    fn near(got: f64, want: f64, share: f64) {
        assert!((got / want - 1.0).abs() <= share, "{got} for {want}");
    }

    #[test]
    fn one_cpu_and_exponential_times_are_m_m_1() {
        for rps in [300.0, 700.0] {
            let outcome = simulate(&testing::exponential(1000.0), &load(rps));
            // Sojourn times are exponential with rate 1/S - λ (any text on queues).
            let rate = 1000.0 - rps;
            near(outcome.p50_ms, 2f64.ln() / rate * 1e3, 0.05);
            near(outcome.p99_ms, 100f64.ln() / rate * 1e3, 0.08);
            near(outcome.cpu, rps / 1000.0, 0.02);
        }
    }

    #[test]
    fn several_cpus_share_a_queue() {
        let mut profile = testing::exponential(1000.0);
        profile.cpus = 4;
        let outcome = simulate(&profile, &load(3200.0));
        // Erlang C for 4 servers at 0.8: P(wait) = 0.5964; waits beyond that are exponential with rate 4/S - λ = 800/s.
        // The service itself is exponential too: P(T > t) = (1-C) e^-μt + C (s·e^-μt - μ·e^-st)/(s - μ), s = 800, μ = 1000 -> p99 at 6.2 ms.
        let beyond = |t: f64| {
            let (c, mu, s) = (0.5964, 1.0, 0.8);
            (1.0 - c) * (-mu * t).exp() + c * (s * (-mu * t).exp() - mu * (-s * t).exp()) / (s - mu)
        };
        near(beyond(outcome.p99_ms), 0.01, 0.15);
        near(outcome.cpu, 0.8, 0.02);
    }

    #[test]
    fn constant_arrivals_at_an_idle_cpu_wait_for_nothing() {
        let mut profile = testing::constant(100.0);
        (profile.wake_us, profile.transit_us) = (50.0, 10.0);
        let outcome = simulate(&profile, &Load { arrivals: Arrivals::Constant, ..load(1000.0) });
        near(outcome.p999_ms, 0.16, 0.01);
        near(outcome.cpu, 0.15, 0.01);
        let alone = simulate(&profile, &Load { arrivals: Arrivals::Constant, ..load(9_900.0) });
        near(alone.cpu, 0.99, 0.02);
    }

    #[test]
    fn hits_cost_what_they_cost() {
        let mut profile = testing::constant(1000.0);
        profile.hit_us = 10.0;
        let outcome = simulate(&profile, &Load { hit_ratio: 0.9, ..load(1000.0) });
        near(outcome.cpu, 0.109, 0.04);
        assert!(outcome.p50_ms < 0.1 && outcome.p99_ms > 1.0, "{outcome:?}");
    }

    #[test]
    fn a_device_takes_what_waits() {
        let mut profile = testing::constant(1.5);
        profile.miss.device = Some(DeviceCost { streams: 2, batches: vec![(1, 100.0), (100, 400.0)] });
        near(profile.capacity_rps(0.0), 500_000.0, 0.01);
        let light = simulate(&profile, &load(100.0));
        near(light.batch.unwrap(), 1.0, 0.05);
        near(light.p50_ms, 0.1015, 0.02);
        let heavy = simulate(&profile, &load(450_000.0));
        assert!(heavy.batch.unwrap() > 30.0 && heavy.bottleneck() == "device", "{heavy:?}");
        near(heavy.device.unwrap(), 0.9, 0.02);
        assert!(heavy.keeps_up());
        assert!(!simulate(&profile, &load(2_000_000.0)).keeps_up());
    }

    #[test]
    fn the_same_seed_gives_the_same() {
        let profile = testing::exponential(1000.0);
        let bursty = Load { arrivals: Arrivals::Poisson { swing: 0.5 }, ..load(600.0) };
        assert_eq!(simulate(&profile, &bursty), simulate(&profile, &bursty));
        assert_ne!(simulate(&profile, &bursty), simulate(&profile, &Load { seed: 8, ..bursty }));
        near(simulate(&profile, &bursty).cpu, 0.6, 0.05);
        assert!(simulate(&profile, &bursty).p99_ms > 1.2 * simulate(&profile, &load(600.0)).p99_ms);
    }

    #[test]
    fn too_much_is_seen() {
        let outcome = simulate(&testing::exponential(1000.0), &load(1500.0));
        assert!(!outcome.keeps_up() && outcome.p99_ms > 1000.0);
    }
}
