//! What an ONNX file declares of a model: the names, types and shapes of its inputs and outputs.

use std::path::Path;

use rten_onnx::onnx::{DataType, ValueInfoProto};

/// Types of values that models take and give here; the names are those of the Open Inference Protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Datatype {
    /// One byte, 0 or 1.
    Bool,
    /// 32-bit integer.
    Int32,
    /// 64-bit integer.
    Int64,
    /// 32-bit float.
    Fp32,
    /// 64-bit float.
    Fp64,
}

impl Datatype {
    /// The protocol's name.
    pub fn name(self) -> &'static str {
        match self {
            Datatype::Bool => "BOOL",
            Datatype::Int32 => "INT32",
            Datatype::Int64 => "INT64",
            Datatype::Fp32 => "FP32",
            Datatype::Fp64 => "FP64",
        }
    }

    /// Bytes of a value.
    pub fn size(self) -> usize {
        match self {
            Datatype::Bool => 1,
            Datatype::Int32 | Datatype::Fp32 => 4,
            Datatype::Int64 | Datatype::Fp64 => 8,
        }
    }
}

/// An input or output of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// In the graph.
    pub name: String,
    /// Of its values.
    pub datatype: Datatype,
    /// Dimensions; 0 where the file does not say, and for a whole shape that it does not say.
    pub rank: usize,
}

/// Inputs and outputs of a model, as the file declares them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Signature {
    /// In the graph's order; constants are not among them.
    pub inputs: Vec<TensorSpec>,
    /// In the graph's order; those that are no tensors, or of another type, are left out.
    pub outputs: Vec<TensorSpec>,
}

impl Signature {
    /// Reads it from an ONNX file.
    ///
    /// # Errors
    /// The file can't be read or parsed, or an input is of a type that no ranker here takes.
    pub fn read(onnx: &Path) -> Result<Self, String> {
        let graph = super::read_onnx(onnx)?.graph.unwrap_or_default();
        let constant = |value: &&ValueInfoProto| !graph.initializer.iter().any(|t| t.name == value.name);
        let inputs = graph.input.iter().filter(constant).map(spec).collect::<Result<_, _>>()?;
        Ok(Signature { inputs, outputs: graph.output.iter().flat_map(spec).collect() })
    }
}

fn spec(value: &ValueInfoProto) -> Result<TensorSpec, String> {
    let name = value.name.clone().unwrap_or_default();
    let tensor = value.r#type.as_ref().and_then(|t| t.tensor_type.as_ref());
    let datatype = match tensor.and_then(|t| t.elem_type) {
        Some(DataType::BOOL) => Datatype::Bool,
        Some(DataType::INT32) => Datatype::Int32,
        Some(DataType::INT64) => Datatype::Int64,
        Some(DataType::FLOAT) => Datatype::Fp32,
        Some(DataType::DOUBLE) => Datatype::Fp64,
        other => {
            let other = other.as_ref().and_then(DataType::name).unwrap_or("no tensor");
            return Err(format!("`{name}` is {other}, which is not supported"));
        }
    };
    let rank = tensor.and_then(|t| t.shape.as_ref()).map_or(0, |shape| shape.dim.len());
    Ok(TensorSpec { name, datatype, rank })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let spec = |name: &str, datatype, rank| TensorSpec { name: name.into(), datatype, rank };
        let demo = Signature::read(&root.join("engines/demo.onnx")).unwrap();
        assert_eq!(demo.inputs, [spec("features", Datatype::Fp32, 2)]);
        // A label and a sequence of maps, of which the label is a tensor.
        let zipmap = Signature::read(&root.join("tests/golden/trees/zipmap.onnx")).unwrap();
        assert_eq!(zipmap.inputs, [spec("x", Datatype::Fp32, 2)]);
        assert_eq!(zipmap.outputs, [spec("label", Datatype::Int64, 1)]);
        assert!(Signature::read(&root.join("Cargo.toml")).is_err());
    }
}
