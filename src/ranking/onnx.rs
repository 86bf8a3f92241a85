//! Any ONNX model, by the embedded pure-Rust runtime `rten`.

use std::path::Path;
use std::sync::Arc;

use rten::{Model, NodeId, RunOptions, ThreadPool, Value, ValueOrView};
use rten_tensor::prelude::*;
use rten_tensor::{NdTensorView, Tensor};

use super::expression::Expression;
use super::manifest::RankerManifest;
use super::precision::Report;
use super::{RankError, Ranker};

/// An ONNX model on the CPU, one thread.
pub struct OnnxRanker {
    name: String,
    model: Model,
    inputs: Vec<(NodeId, usize)>,
    outputs: Vec<NodeId>,
    /// What makes one score of them.
    score: Expression,
    options: RunOptions,
    /// What keeps the model from a faster engine.
    reason: Option<String>,
}

impl OnnxRanker {
    /// Loads a model and warms it up, which also proves that every operator is there and that shapes agree.
    ///
    /// `widths[i]` is the number of feature values of the manifest's i-th input. Runs on `pool`; call from inside it.
    ///
    /// # Errors
    /// A file that can't be read, a missing operator, a wrong input or output; the text names it.
    pub fn load(
        name: &str,
        onnx: &Path,
        manifest: &RankerManifest,
        widths: &[usize],
        pool: Arc<ThreadPool>,
    ) -> Result<Self, RankError> {
        let wrong = |reason: String| RankError { ranker: name.to_owned(), reason };
        let model = Model::load_file(onnx).map_err(|e| wrong(format!("{}: {e}", onnx.display())))?;
        let names_of = |ids: &[NodeId]| {
            let name = |&id: &NodeId| model.node_info(id).and_then(|info| info.name()).unwrap_or("?").to_owned();
            ids.iter().map(name).collect::<Vec<_>>()
        };
        let mut inputs = Vec::new();
        for (input, &width) in manifest.inputs.iter().zip(widths) {
            let known = names_of(model.input_ids());
            let Some(at) = known.iter().position(|n| *n == input.name) else {
                return Err(wrong(format!("no input `{}`; the model has {}", input.name, known.join(", "))));
            };
            inputs.push((model.input_ids()[at], width));
        }
        if inputs.len() != model.input_ids().len() {
            let known = names_of(model.input_ids());
            return Err(wrong(format!(
                "the manifest fills {} of the model's inputs {}",
                inputs.len(),
                known.join(", ")
            )));
        }
        let known = names_of(model.output_ids());
        let (score, names) = manifest.output.expression().map_err(wrong)?;
        let place = |name: &String| match known.iter().position(|n| n == name) {
            Some(at) => Ok(model.output_ids()[at]),
            None => Err(wrong(format!("no output `{name}`; the model has {}", known.join(", ")))),
        };
        let outputs = names.iter().map(place).collect::<Result<Vec<_>, _>>()?;
        let options = RunOptions::default().with_thread_pool(Some(pool));
        let mut ranker = OnnxRanker { name: name.to_owned(), model, inputs, outputs, score, options, reason: None };
        // One row and many: a graph exported with a fixed batch fails here and not at the first request.
        for n in [1, 7, 900] {
            let features: Vec<Vec<f32>> = widths.iter().map(|width| vec![0.0; n * width]).collect();
            ranker.score(&features, n, &mut Vec::new())?;
        }
        Ok(ranker)
    }

    /// The same, with what keeps the model from a faster engine for its report.
    pub fn because(self, reason: String) -> Self {
        OnnxRanker { reason: Some(reason), ..self }
    }

    /// Values of a row, for each input of the manifest.
    pub fn widths(&self) -> impl Iterator<Item = usize> {
        self.inputs.iter().map(|(_, width)| *width)
    }

    fn run(&self, inputs: &[Vec<f32>], n: usize) -> Result<Vec<Value>, String> {
        let mut values: Vec<(NodeId, ValueOrView<'_>)> = Vec::with_capacity(inputs.len());
        for ((id, width), values_of) in self.inputs.iter().zip(inputs) {
            let view = NdTensorView::<f32, 2>::try_from_data([n, *width], values_of.as_slice())
                .map_err(|e| format!("input of {} values for {n} x {width}: {e}", values_of.len()))?;
            values.push((*id, view.into()));
        }
        self.model.run(values, &self.outputs, Some(self.options.clone())).map_err(|e| e.to_string())
    }
}

impl Ranker for OnnxRanker {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, inputs: &[Vec<f32>], n: usize, scores: &mut Vec<f32>) -> Result<(), RankError> {
        scores.clear();
        let wrong = |reason: String| RankError { ranker: self.name.clone(), reason };
        let mut outputs: Vec<Tensor<f32>> = Vec::with_capacity(self.outputs.len());
        for value in self.run(inputs, n).map_err(wrong)? {
            let output: Tensor<f32> =
                value.try_into().map_err(|_| wrong("the output is not of type float32".to_owned()))?;
            if output.shape() != [n] && output.shape() != [n, 1] {
                return Err(wrong(format!("the output's shape is {:?}, expected [{n}] or [{n}, 1]", output.shape())));
            }
            outputs.push(output);
        }
        match (&self.score, &outputs[..]) {
            (Expression::Output(0), [output]) => scores.extend(output.iter()),
            (score, outputs) => {
                let columns: Vec<_> = outputs.iter().map(|output| output.to_contiguous()).collect();
                let columns: Vec<&[f32]> = columns.iter().map(|output| output.data()).collect();
                scores.extend((0..n).map(|row| score.value(&|at| columns[at][row])));
            }
        }
        Ok(())
    }

    fn report(&self) -> Report {
        Report::other("onnx", self.reason.clone())
    }
}
