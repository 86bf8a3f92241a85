//! In which numbers a model is computed: chosen at load by what it does to the order of candidates.

use std::fmt;

use serde::{Deserialize, Serialize};

pub use super::dense::kernels::Precision;
use crate::index::Kernel;

/// What a manifest asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wanted {
    /// The narrowest that keeps the order.
    #[default]
    Auto,
    /// f32.
    F32,
    /// bf16 where it keeps the order, else f32.
    Bf16,
    /// int8 where it keeps the order, else f32.
    Int8,
}

impl Wanted {
    /// What to try, in that order, before f32.
    pub fn trials(self) -> &'static [Precision] {
        match self {
            Wanted::Auto => &[Precision::Int8, Precision::Bf16],
            Wanted::F32 => &[],
            Wanted::Bf16 => &[Precision::Bf16],
            Wanted::Int8 => &[Precision::Int8],
        }
    }
}

/// How near scores are to those of f32.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Fidelity {
    /// NDCG@10 against the order of f32, mean over requests: its first ten are worth 10 to 1.
    pub ndcg: f64,
    /// Largest difference of a score, over the spread (standard deviation) of f32's scores.
    pub error: f64,
}

/// Places that count in [`Fidelity::ndcg`].
const PLACES: usize = 10;

impl Fidelity {
    /// Compares the scores of each request. A score that is NaN here and not there is as far off as can be.
    pub fn of(reference: &[Vec<f32>], scores: &[Vec<f32>]) -> Self {
        let requests: Vec<_> = reference.iter().zip(scores).filter(|(r, _)| !r.is_empty()).collect();
        let ndcg = requests.iter().map(|(r, s)| ndcg(r, s)).sum::<f64>() / requests.len().max(1) as f64;
        let values = || requests.iter().flat_map(|(r, _)| r.iter()).map(|&v| f64::from(v)).filter(|v| v.is_finite());
        let n = values().count().max(1) as f64;
        let mean = values().sum::<f64>() / n;
        let spread = (values().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt().max(f64::from(f32::MIN_POSITIVE));
        let pairs = requests.iter().flat_map(|(r, s)| r.iter().zip(s.iter()));
        let off = |(r, s): (&f32, &f32)| match (r.is_finite(), s.is_finite()) {
            (true, true) => f64::from(r - s).abs() / spread,
            (false, false) => 0.0,
            _ => f64::INFINITY,
        };
        // Without a request nothing is known, and nothing may be rounded.
        let ndcg = if requests.is_empty() { 0.0 } else { ndcg };
        Fidelity { ndcg, error: pairs.map(off).fold(0.0, f64::max) }
    }

    /// The worse of both in each respect.
    pub fn worse(self, other: Self) -> Self {
        Fidelity { ndcg: self.ndcg.min(other.ndcg), error: self.error.max(other.error) }
    }
}

/// Places by score, best first; ties by place, NaN last, as the server orders.
fn order(scores: &[f32]) -> Vec<usize> {
    let key = |at: usize| if scores[at].is_nan() { f32::NEG_INFINITY } else { scores[at] };
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| key(b).total_cmp(&key(a)).then(a.cmp(&b)));
    order
}

fn ndcg(reference: &[f32], scores: &[f32]) -> f64 {
    let mut gains = vec![0.0; reference.len()];
    for (place, at) in order(reference).into_iter().take(PLACES).enumerate() {
        gains[at] = (PLACES - place) as f64;
    }
    let sum = |order: Vec<usize>| {
        let places = order.into_iter().take(PLACES).enumerate();
        places.map(|(place, at)| gains[at] / (place as f64 + 2.0).log2()).sum::<f64>()
    };
    sum(order(scores)) / sum(order(reference))
}

/// How a model is computed, and what that costs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// `dense`, `trees`, `rten` or `onnxruntime`.
    pub engine: &'static str,
    /// For the general runtimes: what kept it from another engine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Of products.
    pub precision: Precision,
    /// What was tried, fastest first, and how near it came to f32.
    pub tried: Vec<(Precision, Fidelity)>,
    /// Requests and candidates that it was measured on.
    pub samples: (usize, usize),
    /// Whether the request's and the items' parts are computed apart.
    pub split: bool,
    /// Memory for what depends on items alone.
    pub table_bytes: usize,
    #[serde(skip)]
    pub(super) kernel: Kernel,
}

impl Report {
    pub(super) fn dense() -> Self {
        Report {
            engine: "dense",
            reason: None,
            precision: Precision::F32,
            tried: Vec::new(),
            samples: (0, 0),
            split: false,
            table_bytes: 0,
            kernel: Kernel::Portable,
        }
    }

    /// Of a model that runs on another engine.
    pub fn other(engine: &'static str, reason: Option<String>) -> Self {
        Report { engine, reason, ..Report::dense() }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.engine != "dense" {
            write!(f, "{}, f32", self.engine)?;
            return self.reason.iter().try_for_each(|reason| write!(f, " ({reason})"));
        }
        write!(f, "dense, {}, {:?}", self.precision.name(), self.kernel)?;
        if self.split {
            write!(f, ", split, {:.1} MiB of items' parts", self.table_bytes as f64 / f64::from(1 << 20))?;
        }
        if !self.tried.is_empty() {
            write!(f, "; against f32 on {} candidates of {} requests:", self.samples.1, self.samples.0)?;
        }
        for (at, (precision, fidelity)) in self.tried.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            write!(f, "{comma} {} ndcg@10 {:.5}, error {:.4}", precision.name(), fidelity.ndcg, fidelity.error)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_order_is_worth_one_and_swaps_less() {
        let reference: Vec<f32> = (0..40).map(|v| (v * 7 % 40) as f32).collect();
        let scaled: Vec<f32> = reference.iter().map(|v| v * 3.0 - 1.0).collect();
        assert_eq!(ndcg(&reference, &scaled), 1.0);
        let (best, second) = (order(&reference)[0], order(&reference)[1]);
        let mut swapped = reference.clone();
        swapped.swap(best, second);
        let whole: f64 = (0..10).map(|place| (10 - place) as f64 / (place as f64 + 2.0).log2()).sum();
        let lost = 1.0 - 1.0 / 3f64.log2();
        assert!((ndcg(&reference, &swapped) - (whole - lost) / whole).abs() < 1e-12);
        let fidelity = Fidelity::of(std::slice::from_ref(&reference), &[swapped]);
        assert!(fidelity.ndcg < 1.0 && fidelity.error > 0.0);
        assert_eq!(Fidelity::of(&[], &[]).ndcg, 0.0);
        let mut broken = reference.clone();
        broken[3] = f32::NAN;
        assert_eq!(Fidelity::of(&[reference], &[broken]).error, f64::INFINITY);
    }
}
