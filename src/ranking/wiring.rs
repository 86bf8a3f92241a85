//! What the runtimes for any ONNX model have in common: names of a manifest found in a graph, outputs made one score.

use super::expression::Expression;
use super::manifest::RankerManifest;
use super::{RankError, Ranker};

/// Where a manifest's inputs and outputs are in a model.
#[derive(Debug)]
pub(super) struct Wiring {
    /// By the manifest's input: its place among the model's inputs, and values of a row.
    pub inputs: Vec<(usize, usize)>,
    /// Places among the model's outputs.
    pub outputs: Vec<usize>,
    /// What makes one score of them.
    score: Expression,
}

impl Wiring {
    /// `widths[i]` is the number of values of the manifest's i-th input; `inputs` and `outputs` are the names that the model has.
    ///
    /// # Errors
    /// A name that the model does not have, or an input that the manifest does not fill.
    pub fn new(
        manifest: &RankerManifest,
        widths: &[usize],
        inputs: &[String],
        outputs: &[String],
    ) -> Result<Self, String> {
        let place = |what: &str, name: &str, known: &[String]| {
            let at = known.iter().position(|n| n == name);
            at.ok_or_else(|| format!("no {what} `{name}`; the model has {}", known.join(", ")))
        };
        let wired = manifest.inputs.iter().zip(widths).map(|(i, &width)| Ok((place("input", &i.name, inputs)?, width)));
        let wired = wired.collect::<Result<Vec<_>, String>>()?;
        if wired.len() != inputs.len() {
            let known = inputs.join(", ");
            return Err(format!("the manifest fills {} of the model's inputs {known}", wired.len()));
        }
        let (score, names) = manifest.output.expression()?;
        let outputs = names.iter().map(|name| place("output", name, outputs)).collect::<Result<_, _>>()?;
        Ok(Wiring { inputs: wired, outputs, score })
    }

    /// Makes `n` scores of the outputs, `[n]` each, in the order of [`Wiring::outputs`].
    pub fn combine(&self, outputs: &[&[f32]], n: usize, scores: &mut Vec<f32>) {
        match (&self.score, outputs) {
            (Expression::Output(0), [output]) => scores.extend_from_slice(output),
            (score, outputs) => scores.extend((0..n).map(|row| score.value(&|at| outputs[at][row]))),
        }
    }

    /// Scores one row and many: a graph that was exported with a fixed batch fails here and not at the first request.
    pub fn try_batches(ranker: &mut dyn Ranker, widths: &[usize]) -> Result<(), RankError> {
        for n in [1, 7, 900] {
            let features: Vec<Vec<f32>> = widths.iter().map(|width| vec![0.0; n * width]).collect();
            ranker.score(&features, n, &mut Vec::new())?;
        }
        Ok(())
    }
}

/// # Errors
/// An output that is not one value per row.
pub(super) fn one_per_row<T: PartialEq + TryFrom<usize> + std::fmt::Debug>(
    shape: &[T],
    n: usize,
) -> Result<(), String> {
    let is = |at: usize, want: usize| T::try_from(want).is_ok_and(|want| shape[at] == want);
    match shape.len() {
        1 if is(0, n) => Ok(()),
        2 if is(0, n) && is(1, 1) => Ok(()),
        _ => Err(format!("the output's shape is {shape:?}, expected [{n}] or [{n}, 1]")),
    }
}
