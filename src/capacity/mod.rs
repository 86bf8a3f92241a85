//! How many replicas a load takes: a discrete-event simulation fed with measured service times.
//!
//! A [`Profile`] says what an answer costs a replica, from two or three runs of the load-test harness. [`plan`] finds the fewest replicas
//! that keep the latency asked for, and what is left of it when one is lost.

pub mod plot;
pub mod profile;
pub mod simulate;

pub use profile::{Profile, ProfileError};
pub use simulate::{Arrivals, Load, Outcome, simulate};

use plot::Point;

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Requests per second of all replicas.
    pub rps: f64,
    /// The 99th percentile that is wanted, at most, ms.
    pub p99_ms: f64,
    /// Share of requests that the cache answers, 0 to 1.
    pub hit_ratio: f64,
    /// When they come.
    pub arrivals: Arrivals,
    /// How much more than the mean the busiest replica gets, a share.
    pub imbalance: f64,
    /// How busy the busiest replica may be, a share: what no simulation of a queue knows, such as pauses of the machine, takes room.
    pub busy: f64,
    /// Requests to simulate for each number of replicas.
    pub n_requests: usize,
    /// Of the random numbers: the same seed gives the same plan.
    pub seed: u64,
}

/// The fewest replicas, and how the busiest of them fares.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How many.
    pub replicas: u64,
    /// Requests per second that one can answer at most.
    pub capacity_rps: f64,
    /// With all of them.
    pub all: Outcome,
    /// With one fewer; none where there is but one.
    pub one_lost: Option<Outcome>,
}

/// No number of replicas is enough.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("no number of replicas keeps p99 at {wanted} ms: one with next to nothing to do has {least:.3} ms")]
pub struct Unreachable {
    /// Asked for, ms.
    pub wanted: f64,
    /// Of an unloaded replica, ms.
    pub least: f64,
}

/// Replicas in all beyond which nobody looks.
const MOST: u64 = 1 << 24;

/// The fewest replicas that keep the latency of the busiest within `target`.
///
/// # Errors
/// There is no such number.
pub fn plan(profile: &Profile, target: &Target) -> Result<Plan, Unreachable> {
    let capacity_rps = profile.capacity_rps(target.hit_ratio);
    let with = |replicas: u64| simulate(profile, &load(target, replicas));
    let keeps = |outcome: &Outcome| {
        let has_room = outcome.cpu.max(outcome.device.unwrap_or(0.0)) <= target.busy;
        outcome.keeps_up() && has_room && outcome.p99_ms <= target.p99_ms
    };
    let mut high = ((target.rps / capacity_rps).ceil() as u64).clamp(1, MOST);
    // The number that saturates them is too few, or is the answer.
    let (mut low, mut all) = (high - 1, with(high));
    while !keeps(&all) {
        // More replicas have less to do each; from here on that changes nothing.
        if high == MOST || load(target, high).rps < capacity_rps / 1000.0 {
            return Err(Unreachable { wanted: target.p99_ms, least: all.p99_ms });
        }
        low = high;
        high = (high + (high / 8).max(1)).min(MOST);
        all = with(high);
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        let outcome = with(middle);
        match keeps(&outcome) {
            true => (high, all) = (middle, outcome),
            false => low = middle,
        }
    }
    let one_lost = (high > 1).then(|| with(high - 1));
    Ok(Plan { replicas: high, capacity_rps, all, one_lost })
}

fn load(target: &Target, replicas: u64) -> Load {
    let share = target.rps / replicas as f64;
    Load {
        rps: if replicas > 1 { share * (1.0 + target.imbalance) } else { share },
        hit_ratio: target.hit_ratio,
        arrivals: target.arrivals,
        n_requests: target.n_requests,
        seed: target.seed,
    }
}

/// Latency of one replica from a twentieth of its capacity to all but none of it left.
pub fn curve(profile: &Profile, target: &Target) -> Vec<Point> {
    let capacity = profile.capacity_rps(target.hit_ratio);
    let shares = (1..=18).map(|at| f64::from(at) * 0.05).chain([0.925, 0.95, 0.97]);
    let of = |share: f64| {
        let outcome = simulate(profile, &Load { rps: capacity * share, ..load(target, 1) });
        let Outcome { p50_ms, p99_ms, p999_ms, .. } = outcome;
        Point { rps: capacity * share, p50_ms, p99_ms, p999_ms }
    };
    shares.map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::profile::testing;
    use super::*;

    fn target(rps: f64, p99_ms: f64) -> Target {
        Target {
            rps,
            p99_ms,
            hit_ratio: 0.0,
            arrivals: Arrivals::poisson(),
            imbalance: 0.0,
            busy: 1.0,
            n_requests: 40_000,
            seed: 1,
        }
    }

    #[test]
    fn the_fewest_that_keep_the_target() {
        let profile = testing::exponential(1000.0);
        // M/M/1: p99 = ln 100 / (1/S - λ), so that at 20 ms λ = 1000 - 230 = 770 a second.
        let found = plan(&profile, &target(77_000.0, 20.0)).unwrap();
        assert!((97..=104).contains(&found.replicas), "{}", found.replicas);
        assert!(found.all.p99_ms <= 20.0);
        let one_fewer = found.one_lost.unwrap();
        assert!(one_fewer.p99_ms > 20.0 && one_fewer.cpu > found.all.cpu);
        assert_eq!(found.capacity_rps.round(), 1000.0);
    }

    #[test]
    fn one_is_enough_for_little() {
        let found = plan(&testing::exponential(1000.0), &target(10.0, 20.0)).unwrap();
        assert_eq!((found.replicas, found.one_lost.is_none()), (1, true));
    }

    #[test]
    fn what_no_replica_reaches_is_said() {
        let refused = plan(&testing::exponential(1000.0), &target(5_000.0, 2.0)).unwrap_err();
        assert!(refused.least > 4.0 && refused.least < 6.0, "{refused}");
    }

    #[test]
    fn uneven_and_bursty_loads_take_more() {
        let profile = testing::exponential(1000.0);
        let even = plan(&profile, &target(50_000.0, 20.0)).unwrap().replicas;
        let uneven = Target { imbalance: 0.3, ..target(50_000.0, 20.0) };
        let bursty = Target { arrivals: Arrivals::Poisson { swing: 0.5 }, ..target(50_000.0, 20.0) };
        assert!(plan(&profile, &uneven).unwrap().replicas as f64 > even as f64 * 1.2);
        assert!(plan(&profile, &bursty).unwrap().replicas > even);
        let with_room = Target { busy: 0.25, ..target(50_000.0, 20.0) };
        assert!(plan(&profile, &with_room).unwrap().replicas.abs_diff(200) < 10);
    }
}
