//! Waits between attempts at something that fails.

use std::time::Duration;

use rand::Rng;

/// The wait after `failures` (1 or more) in a row: doubling from `first` to `longest`, give or take half, so that many who wait do not
/// come back at once.
pub fn pause(failures: u32, (first, longest): (Duration, Duration), random: &mut impl Rng) -> Duration {
    let pause = first.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(longest);
    pause.mul_f64(random.random_range(0.5..1.5))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    #[test]
    fn waits_double_and_end() {
        let mut random = SmallRng::seed_from_u64(1);
        let range = (Duration::from_millis(100), Duration::from_secs(5));
        for (failures, want) in [(1, 100), (2, 200), (4, 800), (7, 5000), (u32::MAX, 5000)] {
            for _ in 0..100 {
                let ms = pause(failures, range, &mut random).as_millis();
                assert!((want / 2..=want * 3 / 2).contains(&ms), "{failures}: {ms}");
            }
        }
    }
}
