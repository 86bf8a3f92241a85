//! Any ONNX model, by the embedded pure-Rust runtime `rten`.

use std::path::Path;
use std::sync::Arc;

use rten::{DataType, Model, NodeId, RunOptions, ThreadPool, Value, ValueOrView, ValueType};
use rten_tensor::prelude::*;
use rten_tensor::{NdTensorView, Tensor};

use super::manifest::RankerManifest;
use super::precision::Report;
use super::wiring::{Wiring, one_per_row};
use super::{RankError, Ranker};

/// An ONNX model on the CPU, one thread.
pub struct OnnxRanker {
    name: String,
    model: Model,
    inputs: Vec<(NodeId, usize)>,
    /// By input: its values as whole numbers, where the model wants these.
    whole: Vec<Option<Vec<i32>>>,
    outputs: Vec<NodeId>,
    wiring: Wiring,
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
        let (known_inputs, known_outputs) = (names_of(model.input_ids()), names_of(model.output_ids()));
        let wiring = Wiring::new(manifest, widths, &known_inputs, &known_outputs).map_err(wrong)?;
        let inputs: Vec<_> = wiring.inputs.iter().map(|&(at, width)| (model.input_ids()[at], width)).collect();
        let is_whole = |id| model.node_info(id).and_then(|i| i.dtype()) == Some(ValueType::Tensor(DataType::Int32));
        let whole = inputs.iter().map(|(id, _)| is_whole(*id).then(Vec::new)).collect();
        let outputs = wiring.outputs.iter().map(|&at| model.output_ids()[at]).collect();
        let options = RunOptions::default().with_thread_pool(Some(pool));
        let mut ranker =
            OnnxRanker { name: name.to_owned(), model, inputs, whole, outputs, wiring, options, reason: None };
        Wiring::try_batches(&mut ranker, widths)?;
        Ok(ranker)
    }

    /// The same, with what keeps the model from a faster engine for its report.
    pub fn because(self, reason: Option<String>) -> Self {
        OnnxRanker { reason, ..self }
    }

    /// Values of a row, for each input of the manifest.
    pub fn widths(&self) -> impl Iterator<Item = usize> {
        self.inputs.iter().map(|(_, width)| *width)
    }

    fn run(&mut self, inputs: &[Vec<f32>], n: usize) -> Result<Vec<Value>, String> {
        let mut values: Vec<(NodeId, ValueOrView<'_>)> = Vec::with_capacity(inputs.len());
        for (((id, width), given), whole) in self.inputs.iter().zip(inputs).zip(&mut self.whole) {
            let value = match whole {
                None => NdTensorView::try_from_data([n, *width], given.as_slice()).map(ValueOrView::from),
                Some(whole) => {
                    whole.clear();
                    whole.extend(given.iter().map(|&v| v as i32));
                    NdTensorView::try_from_data([n, *width], whole.as_slice()).map(ValueOrView::from)
                }
            };
            let value = value.map_err(|e| format!("input of {} values for {n} x {width}: {e}", given.len()))?;
            values.push((*id, value));
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
        let values = self.run(inputs, n);
        let wrong = |reason: String| RankError { ranker: self.name.clone(), reason };
        let mut outputs: Vec<Tensor<f32>> = Vec::with_capacity(self.outputs.len());
        for value in values.map_err(wrong)? {
            let output: Tensor<f32> =
                value.try_into().map_err(|_| wrong("the output is not of type float32".to_owned()))?;
            one_per_row(output.shape(), n).map_err(wrong)?;
            outputs.push(output);
        }
        let outputs: Vec<_> = outputs.iter().map(|output| output.to_contiguous()).collect();
        let outputs: Vec<&[f32]> = outputs.iter().map(|output| output.data()).collect();
        self.wiring.combine(&outputs, n, scores);
        Ok(())
    }

    fn report(&self) -> Report {
        Report::other("rten", self.reason.clone())
    }
}
