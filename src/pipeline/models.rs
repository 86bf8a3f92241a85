//! The rankers of a generation as models of their own, whose tensors a client fills itself.

use crate::catalog::generation::Generation;
use crate::features::assemble::Layout;
use crate::ranking::signature::{Datatype, Signature};

/// A ranker and the tensors that it takes and gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    /// The ranker's name.
    pub name: String,
    /// In the manifest's order.
    pub inputs: Vec<ModelInput>,
    /// The output that is the score.
    pub output: ModelOutput,
}

/// An input, `[n, width]` for any `n`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelInput {
    /// In the graph.
    pub name: String,
    /// As the graph declares it.
    pub datatype: Datatype,
    /// Values per row.
    pub width: usize,
}

/// An output of type FP32, one value per row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelOutput {
    /// In the graph.
    pub name: String,
    /// `[n]` rather than `[n, 1]`.
    pub flat: bool,
}

impl Model {
    /// The rankers of a generation, in its order.
    ///
    /// # Errors
    /// A ranker whose file, inputs or columns can't be made out; the text names it.
    pub fn all(generation: &Generation) -> Result<Vec<Self>, String> {
        generation
            .rankers
            .iter()
            .map(|ranker| {
                let of = |e: String| format!("ranker `{}`: {e}", ranker.name);
                let signature = Signature::read(&ranker.onnx).map_err(of)?;
                let mut inputs = Vec::new();
                for input in &ranker.manifest.inputs {
                    let width = Layout::compile(&input.columns, generation).map_err(|e| of(e.to_string()))?.width();
                    let spec = signature.inputs.iter().find(|spec| spec.name == input.name);
                    let datatype = spec.ok_or_else(|| of(format!("no input `{}`", input.name)))?.datatype;
                    inputs.push(ModelInput { name: input.name.clone(), datatype, width });
                }
                // An expression over several outputs has no name of its own.
                let name = match ranker.manifest.output.name.as_str() {
                    "" => "score".to_owned(),
                    name => name.to_owned(),
                };
                let flat = signature.outputs.iter().any(|spec| spec.name == name && spec.rank == 1);
                Ok(Model { name: ranker.name.clone(), inputs, output: ModelOutput { name, flat } })
            })
            .collect()
    }
}
