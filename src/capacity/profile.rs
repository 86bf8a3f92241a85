//! What an answer costs a replica.

use serde::{Deserialize, Serialize};

use super::simulate::{Arrivals, Load, simulate};

/// Quantiles of the normal distribution above its median; the last stands for all beyond.
const NORMAL: [(f64, f64); 9] = [
    (0.6, 0.2533),
    (0.75, 0.6745),
    (0.9, 1.2816),
    (0.95, 1.6449),
    (0.98, 2.0537),
    (0.99, 2.3263),
    (0.995, 2.5758),
    (0.999, 3.0902),
    (1.0, 3.7190),
];
/// Requests of a simulation that a profile is fitted with.
const FIT_REQUESTS: usize = 50_000;
/// The widest service time that is tried.
const MOST_SIGMA: f64 = 2.0;

/// A service time as its quantiles: (share, µs), shares from 0 to 1 and rising, values that do not fall. In between it is linear.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Quantiles(pub Vec<(f64, f64)>);

impl Quantiles {
    /// The value at a share of all, 0 to 1.
    pub fn at(&self, share: f64) -> f64 {
        let above = self.0.partition_point(|point| point.0 < share).clamp(1, self.0.len() - 1);
        let ((low, from), (high, to)) = (self.0[above - 1], self.0[above]);
        if high > low { from + (to - from) * ((share - low) / (high - low)).clamp(0.0, 1.0) } else { to }
    }

    /// The mean.
    pub fn mean(&self) -> f64 {
        self.0.windows(2).map(|pair| (pair[1].0 - pair[0].0) * (pair[0].1 + pair[1].1) / 2.0).sum()
    }

    /// Log-normal of a mean, `sigma` the standard deviation of its logarithm.
    fn log_normal(mean: f64, sigma: f64) -> Self {
        let point = |share: f64, deviate: f64| (share, (sigma * deviate).exp());
        let below = NORMAL.iter().rev().map(|&(share, deviate)| point(1.0 - share, -deviate));
        let mut quantiles = Quantiles(below.chain([point(0.5, 0.0)]).chain(NORMAL.map(|(s, d)| point(s, d))).collect());
        let scale = mean / quantiles.mean();
        quantiles.0.iter_mut().for_each(|point| point.1 *= scale);
        quantiles
    }

    fn check(&self, key: &'static str) -> Result<(), ProfileError> {
        let wrong = |reason: String| Err(ProfileError { key, reason });
        if self.0.len() < 2 || self.0[0].0 != 0.0 || self.0[self.0.len() - 1].0 != 1.0 {
            return wrong("needs at least two points, the first at 0 and the last at 1".into());
        }
        for (at, pair) in self.0.windows(2).enumerate() {
            let rises = pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1;
            if !rises || pair.iter().any(|point| !(point.1.is_finite() && point.1 >= 0.0)) {
                return wrong(format!("points {at} and {}: shares must rise and times must not fall", at + 1));
            }
        }
        Ok(())
    }
}

/// What a replica spends on an answer that is computed on a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceCost {
    /// Batches that it computes at a time.
    pub streams: u32,
    /// (size, µs), sizes rising from 1: how long a batch takes while all streams are busy. In between it is linear; the last is the largest
    /// that is made.
    pub batches: Vec<(u32, f64)>,
}

impl DeviceCost {
    /// How long a batch of `n` takes, µs.
    pub fn batch_us(&self, n: u32) -> f64 {
        let above = self.batches.partition_point(|point| point.0 < n);
        match (above.checked_sub(1).map(|at| self.batches[at]), self.batches.get(above)) {
            (Some((low, from)), Some(&(high, to))) => from + (to - from) * f64::from(n - low) / f64::from(high - low),
            (None, Some(&(_, to))) => to,
            (Some((_, from)), None) => from,
            (None, None) => 0.0,
        }
    }

    /// The largest batch.
    pub fn most(&self) -> u32 {
        self.batches.last().map_or(1, |point| point.0)
    }
}

/// What an answer that is computed costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Miss {
    /// CPU time, µs: all of it, or what a device leaves to the CPU.
    pub cpu_us: Quantiles,
    /// The device, where one computes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceCost>,
}

/// What an answer costs a replica, as it was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Of what this is: bundle, machine, date.
    pub name: String,
    /// CPUs of a replica that serve.
    pub cpus: u32,
    /// CPU time of an answer from the cache, µs.
    pub hit_us: f64,
    /// CPU time more of a computed answer whose request finds a CPU idle, µs: context switches, and caches that others filled.
    pub wake_us: f64,
    /// Latency that no CPU time explains, µs: network, harness.
    pub transit_us: f64,
    /// An answer that is computed.
    pub miss: Miss,
}

/// A profile can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {reason}")]
pub struct ProfileError {
    /// The key, or the run.
    pub key: &'static str,
    /// What is wrong with it.
    pub reason: String,
}

/// What the load-test harness says of a run (`loadgen --json --server-pid`); what else it says is not needed.
#[derive(Clone, Debug, Deserialize)]
pub struct Run {
    /// Calls per second asked for; 0 in a closed loop.
    pub offered_rps: f64,
    /// Answers per second.
    pub rps: f64,
    /// Calls without an answer.
    pub errors: u64,
    /// CPU time of the server per answer, µs.
    pub server_cpu_us: Option<f64>,
    /// Median latency, ms.
    pub p50_ms: f64,
    /// 99 %, ms.
    pub p99_ms: f64,
}

impl Profile {
    /// Reads a profile.
    ///
    /// # Errors
    /// Not TOML of this shape, or numbers that make no sense; says where.
    pub fn parse(text: &str) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        let profile: Profile = toml::from_str(text)?;
        profile.check()?;
        Ok(profile)
    }

    fn check(&self) -> Result<(), ProfileError> {
        let wrong = |key, reason: &str| Err(ProfileError { key, reason: reason.to_owned() });
        if self.cpus == 0 {
            return wrong("cpus", "must be at least 1");
        }
        for (key, value) in [("hit_us", self.hit_us), ("wake_us", self.wake_us), ("transit_us", self.transit_us)] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(ProfileError { key, reason: "must be a number, 0 or more".into() });
            }
        }
        self.miss.cpu_us.check("miss.cpu_us")?;
        if self.miss.cpu_us.mean() <= 0.0 {
            return wrong("miss.cpu_us", "an answer that costs nothing");
        }
        if let Some(device) = &self.miss.device {
            if device.streams == 0 {
                return wrong("miss.device.streams", "must be at least 1");
            }
            let first = device.batches.first().is_some_and(|point| point.0 == 1 && point.1 > 0.0);
            let rises = device.batches.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1);
            if !first || !rises || device.batches.iter().any(|point| !point.1.is_finite()) {
                return wrong("miss.device.batches", "sizes must rise from 1, and times be above 0 and not fall");
            }
        }
        Ok(())
    }

    /// From runs of the harness against one server without its cache: `saturated`, a closed loop with more calls in flight than it
    /// needs, and `light`, an open loop at about a fifth of that rate; and `hits`, a closed loop against its warm cache.
    ///
    /// CPU time at saturation is what an answer costs; what it costs more in the light run falls to requests that found a CPU idle. Service
    /// times are taken for log-normal, as wide as it takes for the simulated light run to have the distance from p50 to p99 that was
    /// measured; by how much its p50 is too early is transit.
    ///
    /// # Errors
    /// Runs of another kind, with errors, or without the server's CPU time.
    pub fn fit(
        name: String,
        cpus: u32,
        saturated: &Run,
        light: &Run,
        hits: Option<&Run>,
    ) -> Result<Self, ProfileError> {
        let cost = |key: &'static str, run: &Run, open: bool| {
            let wrong = |reason: &str| ProfileError { key, reason: reason.to_owned() };
            match run.server_cpu_us {
                _ if run.errors > 0 => Err(wrong("has calls without an answer")),
                _ if open && run.offered_rps == 0.0 => Err(wrong("must be an open loop (--rate)")),
                _ if !open && run.offered_rps > 0.0 => Err(wrong("must be a closed loop")),
                Some(us) if us > 0.0 && run.rps > 0.0 => Ok(us),
                _ => Err(wrong("does not say what CPU time an answer took (--server-pid)")),
            }
        };
        let least = cost("saturated", saturated, false)?;
        let busy = cost("light", light, true)?;
        let hit_us = hits.map(|run| cost("hits", run, false)).transpose()?.unwrap_or(0.0);
        let load = light.rps * busy / 1e6 / f64::from(cpus);
        if load > 0.5 {
            let reason = format!("keeps the CPUs busy for {:.0} % of the time, more than half", load * 100.0);
            return Err(ProfileError { key: "light", reason });
        }
        let wake_us = ((busy - least) / (1.0 - load)).max(0.0);
        let profile = |sigma: f64, transit_us: f64| {
            let miss = Miss { cpu_us: Quantiles::log_normal(least, sigma), device: None };
            Profile { name: name.clone(), cpus, hit_us, wake_us, transit_us, miss }
        };
        let simulated = |sigma: f64| {
            let arrivals = Arrivals::poisson();
            simulate(
                &profile(sigma, 0.0),
                &Load { rps: light.rps, hit_ratio: 0.0, arrivals, n_requests: FIT_REQUESTS, seed: 1 },
            )
        };
        let (mut low, mut high) = (0.0, MOST_SIGMA);
        for _ in 0..12 {
            let middle = (low + high) / 2.0;
            let outcome = simulated(middle);
            match outcome.p99_ms - outcome.p50_ms < light.p99_ms - light.p50_ms {
                true => low = middle,
                false => high = middle,
            }
        }
        let sigma = (low + high) / 2.0;
        let profile = profile(sigma, (light.p50_ms - simulated(sigma).p50_ms).max(0.0) * 1e3);
        profile.check()?;
        Ok(profile)
    }

    /// Requests per second that a replica can answer at most.
    pub fn capacity_rps(&self, hit_ratio: f64) -> f64 {
        let misses = 1.0 - hit_ratio;
        let per_cpu = hit_ratio * self.hit_us + misses * self.miss.cpu_us.mean();
        let of_cpus = f64::from(self.cpus) * 1e6 / per_cpu.max(1e-9);
        match &self.miss.device {
            Some(device) if misses > 0.0 => {
                let most = device.most();
                let batches = f64::from(device.streams) * f64::from(most) * 1e6 / device.batch_us(most);
                of_cpus.min(batches / misses)
            }
            _ => of_cpus,
        }
    }
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;

    /// One CPU, exponential service time of a mean.
    pub fn exponential(mean_us: f64) -> Profile {
        let at = |share: f64| (share, -(1.0 - share).max(1e-6).ln() * mean_us);
        let shares = (0..1000).map(|n| f64::from(n) / 1000.0);
        let tail = [0.9995, 0.9999, 0.99999, 1.0];
        let mut points: Vec<_> = shares.chain(tail).map(at).collect();
        let mean = Quantiles(points.clone()).mean();
        points.iter_mut().for_each(|point| point.1 *= mean_us / mean);
        constant(1.0).with(Quantiles(points))
    }

    /// One CPU, the same service time always.
    pub fn constant(us: f64) -> Profile {
        let miss = Miss { cpu_us: Quantiles(vec![(0.0, us), (1.0, us)]), device: None };
        Profile { name: "test".into(), cpus: 1, hit_us: 0.0, wake_us: 0.0, transit_us: 0.0, miss }
    }

    impl Profile {
        fn with(mut self, cpu_us: Quantiles) -> Self {
            self.miss.cpu_us = cpu_us;
            self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "name = \"t\"\ncpus = 2\nhit_us = 2.5\nwake_us = 100.0\ntransit_us = 50.0\n\
        [miss]\ncpu_us = [[0.0, 100.0], [0.5, 200.0], [1.0, 400.0]]\n";

    #[test]
    fn quantiles_are_linear_in_between() {
        let quantiles = Quantiles(vec![(0.0, 100.0), (0.5, 200.0), (1.0, 400.0)]);
        assert_eq!([0.0, 0.25, 0.5, 0.75, 1.0].map(|q| quantiles.at(q)), [100.0, 150.0, 200.0, 300.0, 400.0]);
        assert_eq!(quantiles.mean(), 225.0);
    }

    #[test]
    fn a_profile_says_what_a_replica_can_do() {
        let profile = Profile::parse(TEXT).unwrap();
        assert_eq!(profile.capacity_rps(0.0).round(), 8889.0);
        assert_eq!(profile.capacity_rps(1.0).round(), 800_000.0);
        let device = "[miss.device]\nstreams = 2\nbatches = [[1, 100.0], [101, 200.0]]\n";
        let profile = Profile::parse(&format!("{TEXT}{device}")).unwrap();
        let cost = profile.miss.device.as_ref().unwrap();
        assert_eq!([1, 51, 101, 200].map(|n| cost.batch_us(n)), [100.0, 150.0, 200.0, 200.0]);
        assert_eq!(profile.capacity_rps(0.0).round(), 8889.0);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (from, to, key) in [
            ("cpus = 2", "cpus = 0", "cpus"),
            ("hit_us = 2.5", "hit_us = -1.0", "hit_us"),
            ("[0.0, 100.0]", "[0.1, 100.0]", "miss.cpu_us"),
            ("[0.5, 200.0]", "[0.5, 50.0]", "miss.cpu_us"),
            ("name", "nmae", "nmae"),
        ] {
            let error = Profile::parse(&TEXT.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
        for device in ["streams = 0\nbatches = [[1, 2.0]]", "streams = 1\nbatches = [[2, 2.0]]"] {
            let error = Profile::parse(&format!("{TEXT}[miss.device]\n{device}\n")).unwrap_err().to_string();
            assert!(error.contains("miss.device."), "{error}");
        }
    }

    #[test]
    fn log_normal_has_the_mean_and_width() {
        let quantiles = Quantiles::log_normal(250.0, 0.5);
        assert!((quantiles.mean() - 250.0).abs() < 1e-9 && quantiles.check("t").is_ok());
        assert!((quantiles.at(0.9) / quantiles.at(0.5) - (0.5f64 * 1.2816).exp()).abs() < 1e-9);
    }

    #[test]
    fn runs_give_back_what_made_them() {
        let miss = Miss { cpu_us: Quantiles::log_normal(250.0, 0.4), device: None };
        let made = Profile { name: "t".into(), cpus: 1, hit_us: 2.5, wake_us: 100.0, transit_us: 170.0, miss };
        let load = Load { rps: 800.0, hit_ratio: 0.0, arrivals: Arrivals::poisson(), n_requests: 100_000, seed: 9 };
        let outcome = simulate(&made, &load);
        let (us, p50_ms, p99_ms) = (Some(outcome.cpu / 800.0 * 1e6), outcome.p50_ms, outcome.p99_ms);
        let light = Run { offered_rps: 800.0, rps: 800.0, errors: 0, server_cpu_us: us, p50_ms, p99_ms };
        let closed = |rps: f64, us: f64| Run { offered_rps: 0.0, rps, server_cpu_us: Some(us), ..light.clone() };
        let (saturated, hits) = (closed(4000.0, 250.0), closed(4e5, 2.5));
        let profile = Profile::fit("t".into(), 1, &saturated, &light, Some(&hits)).unwrap();
        assert!((profile.wake_us - 100.0).abs() < 5.0 && profile.hit_us == 2.5, "{profile:?}");
        assert!((profile.miss.cpu_us.mean() - 250.0).abs() < 1e-9);
        assert!((profile.transit_us - 170.0).abs() < 10.0, "{profile:?}");
        assert!((profile.miss.cpu_us.at(0.99) / made.miss.cpu_us.at(0.99) - 1.0).abs() < 0.1, "{profile:?}");
        assert_eq!(Profile::parse(&toml::to_string(&profile).unwrap()).unwrap(), profile);
        let refused = |saturated: &Run, light: &Run| Profile::fit("t".into(), 1, saturated, light, None).unwrap_err();
        assert_eq!(refused(&light, &light).key, "saturated");
        assert_eq!(refused(&saturated, &saturated).key, "light");
        assert_eq!(refused(&saturated, &Run { rps: 3000.0, ..light.clone() }).key, "light");
        assert_eq!(refused(&Run { server_cpu_us: None, ..saturated.clone() }, &light).key, "saturated");
        assert_eq!(refused(&Run { errors: 1, ..saturated.clone() }, &light).key, "saturated");
    }
}
