//! What unit tests of several rooms share.

/// Numbers from -0.5 to 0.5, the same for the same seed (Knuth's MMIX linear congruential generator).
pub fn noise(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    }
}
