//! A weighted mean of several rankers.

/// Adds member scores up; a member that failed is simply not added.
#[derive(Debug, Default)]
pub struct WeightedMean {
    sum: Vec<f32>,
    weight: f32,
}

impl WeightedMean {
    /// Begins for `n` candidates.
    pub fn begin(&mut self, n: usize) {
        self.sum.clear();
        self.sum.resize(n, 0.0);
        self.weight = 0.0;
    }

    /// Adds one member's scores.
    pub fn add(&mut self, scores: &[f32], weight: f32) {
        for (sum, score) in self.sum.iter_mut().zip(scores) {
            *sum += weight * score;
        }
        self.weight += weight;
    }

    /// The weighted scores of the members that answered so far, added up: `[n]`.
    pub fn sum(&self) -> &[f32] {
        &self.sum
    }

    /// The mean over the members that answered, their weights renormalised; `None` when none did.
    pub fn finish(&mut self) -> Option<&[f32]> {
        if self.weight <= 0.0 {
            return None;
        }
        for sum in &mut self.sum {
            *sum /= self.weight;
        }
        Some(&self.sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_member_is_renormalised_away() {
        let mut mean = WeightedMean::default();
        mean.begin(2);
        mean.add(&[1.0, 2.0], 3.0);
        mean.add(&[5.0, 6.0], 1.0);
        assert_eq!(mean.finish(), Some(&[2.0, 3.0][..]));
        mean.begin(2);
        mean.add(&[1.0, 2.0], 3.0);
        assert_eq!(mean.finish(), Some(&[1.0, 2.0][..]));
        mean.begin(2);
        assert_eq!(mean.finish(), None);
    }
}
