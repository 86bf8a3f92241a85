//! ONNX graphs that are perceptrons: a chain of matrix products, sums and activations.

use std::collections::HashMap;

use rten_onnx::onnx::{DataLocation, DataType, GraphProto, ModelProto, NodeProto, TensorProto};

use super::mlp::{Activation, Dense};

/// The layers of a graph from `input` to `output`.
///
/// # Errors
/// What makes the graph something else, with the node's name; that is no fault of the model, which the general runtime runs.
pub fn chain(model: &ModelProto, input: &str, output: &str) -> Result<Vec<Dense>, String> {
    let graph = model.graph.as_ref().ok_or("no graph")?;
    let constants = Constants::of(graph);
    let inputs: Vec<&str> = graph.input.iter().filter_map(|i| i.name.as_deref()).collect();
    if inputs.iter().filter(|name| constants.get(name).is_none()).ne([&input]) {
        return Err(format!("inputs {} where one is expected", inputs.join(", ")));
    }
    let mut layers: Vec<Dense> = Vec::new();
    // A layer is closed once something other than a bias has followed its product.
    let (mut current, mut open) = (input, false);
    let mut left = graph.node.len();
    while current != output {
        left = left.checked_sub(1).ok_or("a circle")?;
        let mut readers = graph.node.iter().filter(|node| node.input.iter().any(|name| name == current));
        let node = readers.next().ok_or_else(|| format!("nothing reads `{current}`"))?;
        if let Some(other) = readers.next() {
            return Err(format!("{} and {} read `{current}`", named(node), named(other)));
        }
        let at = || format!("{}: ", named(node));
        let kind = (node.domain.as_deref().unwrap_or_default(), node.op_type.as_deref().unwrap_or_default());
        match kind {
            ("" | "ai.onnx", "Gemm") => {
                layers.push(gemm(node, &constants, current).map_err(|e| at() + &e)?);
                open = true;
            }
            ("" | "ai.onnx", "MatMul") => {
                if node.input.first().map(String::as_str) != Some(current) {
                    return Err(at() + "the weights stand on the left");
                }
                let (weights, _, n) = constants.matrix(node.input.get(1)).map_err(|e| at() + &e)?;
                layers.push(Dense { weights, bias: vec![0.0; n], activation: Activation::None });
                open = true;
            }
            ("" | "ai.onnx", "Add") if open => {
                let other = node.input.iter().find(|name| *name != current);
                let layer = layers.last_mut().ok_or("a sum before any product")?;
                let bias = constants.vector(other, layer.bias.len()).map_err(|e| at() + &e)?;
                layer.bias.iter_mut().zip(bias).for_each(|(to, more)| *to += more);
            }
            ("" | "ai.onnx", "Relu" | "Sigmoid" | "Tanh") => {
                let layer = layers.last_mut().filter(|layer| layer.activation == Activation::None);
                let layer = layer.ok_or_else(|| at() + "an activation that follows no product")?;
                layer.activation = match kind.1 {
                    "Relu" => Activation::Relu,
                    "Sigmoid" => Activation::Sigmoid,
                    _ => Activation::Tanh,
                };
                open = false;
            }
            ("" | "ai.onnx", "Identity") => {}
            _ => return Err(format!("{} is a {}", named(node), kind.1)),
        }
        current = node.output.first().ok_or_else(|| at() + "no output")?;
    }
    match layers.last() {
        Some(last) if last.bias.len() == 1 => {}
        Some(last) => return Err(format!("`{output}` has {} values a row", last.bias.len())),
        None => return Err("no product".to_owned()),
    }
    for two in layers.windows(2) {
        if two[0].bias.len() * two[1].bias.len() != two[1].weights.len() {
            return Err("widths that do not fit together".to_owned());
        }
    }
    Ok(layers)
}

/// How messages call a node.
fn named(node: &NodeProto) -> String {
    match node.name.as_deref() {
        Some(name) if !name.is_empty() => format!("node `{name}`"),
        _ => format!("the node of `{}`", node.output.first().map_or("?", String::as_str)),
    }
}

/// `alpha · x · w + beta · c`
fn gemm(node: &NodeProto, constants: &Constants<'_>, current: &str) -> Result<Dense, String> {
    let attribute = |name: &str| node.attribute.iter().find(|a| a.name.as_deref() == Some(name));
    let number = |name: &str| attribute(name).and_then(|a| a.f).unwrap_or(1.0);
    let flag = |name: &str| attribute(name).and_then(|a| a.i).unwrap_or(0) != 0;
    if flag("transA") || node.input.first().map(String::as_str) != Some(current) {
        return Err("the rows are transposed or stand on the right".to_owned());
    }
    let (given, rows, columns) = constants.matrix(node.input.get(1))?;
    let (mut weights, n) = match flag("transB") {
        true => ((0..rows * columns).map(|at| given[at % rows * columns + at / rows]).collect(), rows),
        false => (given, columns),
    };
    weights.iter_mut().for_each(|w| *w *= number("alpha"));
    let mut bias = match node.input.get(2).filter(|name| !name.is_empty()) {
        Some(name) => constants.vector(Some(name), n)?,
        None => vec![0.0; n],
    };
    bias.iter_mut().for_each(|b| *b *= number("beta"));
    Ok(Dense { weights, bias, activation: Activation::None })
}

/// A graph's constants by name.
struct Constants<'a>(HashMap<&'a str, &'a TensorProto>);

impl<'a> Constants<'a> {
    fn of(graph: &'a GraphProto) -> Self {
        Constants(graph.initializer.iter().filter_map(|t| Some((t.name.as_deref()?, t))).collect())
    }

    fn get(&self, name: &str) -> Option<&'a TensorProto> {
        self.0.get(name).copied()
    }

    /// Values and shape; f32 that lies in the file only.
    fn values(&self, name: Option<&String>) -> Result<(Vec<f32>, &'a [i64]), String> {
        let name = name.ok_or("an operand is missing")?;
        let tensor = self.get(name).ok_or_else(|| format!("`{name}` is not constant"))?;
        if tensor.data_type != Some(DataType::FLOAT) || tensor.data_location == Some(DataLocation::EXTERNAL) {
            return Err(format!("`{name}` is not of float32 in the file"));
        }
        let values = match &tensor.raw_data {
            Some(raw) => raw.borrow().as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
            None => tensor.float_data.clone(),
        };
        let wanted = tensor.dims.iter().try_fold(1usize, |all, &n| all.checked_mul(usize::try_from(n).ok()?));
        if wanted != Some(values.len()) || values.is_empty() {
            return Err(format!("`{name}` has {} values for the shape {:?}", values.len(), tensor.dims));
        }
        Ok((values, &tensor.dims))
    }

    /// Values, rows, columns.
    fn matrix(&self, name: Option<&String>) -> Result<(Vec<f32>, usize, usize), String> {
        match self.values(name)? {
            (values, &[rows, columns]) => Ok((values, rows as usize, columns as usize)),
            (_, shape) => Err(format!("weights of the shape {shape:?}")),
        }
    }

    /// `n` values: one each, or one for all.
    fn vector(&self, name: Option<&String>, n: usize) -> Result<Vec<f32>, String> {
        let (values, shape) = self.values(name)?;
        match (values.len(), shape) {
            (len, &[_] | &[1, _]) if len == n => Ok(values),
            (1, &[] | &[1] | &[1, 1]) => Ok(vec![values[0]; n]),
            _ => Err(format!("a bias of the shape {shape:?} for {n} columns")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rten_onnx::onnx::{AttributeProto, ValueInfoProto};

    fn constant(name: &str, dims: &[i64], values: &[f32]) -> TensorProto {
        TensorProto {
            name: Some(name.to_owned()),
            dims: dims.to_vec(),
            data_type: Some(DataType::FLOAT),
            float_data: values.to_vec(),
            ..TensorProto::default()
        }
    }

    fn node(kind: &str, inputs: &[&str], output: &str) -> NodeProto {
        NodeProto {
            op_type: Some(kind.to_owned()),
            name: Some(format!("{kind}0")),
            input: inputs.iter().map(|&i| i.to_owned()).collect(),
            output: vec![output.to_owned()],
            ..NodeProto::default()
        }
    }

    fn model(nodes: Vec<NodeProto>, constants: Vec<TensorProto>) -> ModelProto {
        let value = |name: &str| ValueInfoProto { name: Some(name.to_owned()), ..ValueInfoProto::default() };
        let graph =
            GraphProto { node: nodes, initializer: constants, input: vec![value("x")], ..GraphProto::default() };
        ModelProto { graph: Some(graph), ..ModelProto::default() }
    }

    #[test]
    fn products_sums_and_activations_become_layers() {
        let number = |name: &str, f: f32| AttributeProto { name: Some(name.into()), f: Some(f), ..Default::default() };
        let trans_b = AttributeProto { name: Some("transB".into()), i: Some(1), ..Default::default() };
        let mut gemm = node("Gemm", &["a", "w1", "b1"], "b");
        gemm.attribute = vec![number("alpha", 2.0), number("beta", 3.0), trans_b];
        let nodes = vec![
            node("MatMul", &["x", "w0"], "m"),
            node("Add", &["b0", "m"], "s"),
            node("Relu", &["s"], "a"),
            gemm,
            node("Sigmoid", &["b"], "c"),
            node("Identity", &["c"], "y"),
        ];
        let constants = vec![
            constant("w0", &[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
            constant("b0", &[1, 3], &[7.0, 8.0, 9.0]),
            constant("w1", &[1, 3], &[1.0, 2.0, 3.0]),
            constant("b1", &[1], &[0.5]),
        ];
        let layers = chain(&model(nodes, constants), "x", "y").unwrap();
        let first = Dense {
            weights: vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            bias: vec![7.0, 8.0, 9.0],
            activation: Activation::Relu,
        };
        let second = Dense { weights: vec![2.0, 4.0, 6.0], bias: vec![1.5], activation: Activation::Sigmoid };
        assert_eq!(layers, [first, second]);
    }

    #[test]
    fn transposed_weights_are_turned() {
        let mut gemm = node("Gemm", &["x", "w"], "h");
        gemm.attribute = vec![AttributeProto { name: Some("transB".into()), i: Some(1), ..Default::default() }];
        let nodes = vec![gemm, node("MatMul", &["h", "v"], "y")];
        let constants =
            vec![constant("w", &[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), constant("v", &[2, 1], &[1.0, 1.0])];
        let layers = chain(&model(nodes, constants), "x", "y").unwrap();
        assert_eq!(layers[0].weights, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    }

    #[test]
    fn other_graphs_are_named() {
        let refused =
            |nodes: Vec<NodeProto>, constants: Vec<TensorProto>| chain(&model(nodes, constants), "x", "y").unwrap_err();
        let w = || constant("w", &[2, 1], &[1.0, 2.0]);
        assert_eq!(refused(vec![node("Softmax", &["x"], "y")], vec![]), "node `Softmax0` is a Softmax");
        assert_eq!(refused(vec![node("Relu", &["z"], "y")], vec![]), "nothing reads `x`");
        assert!(refused(vec![node("Relu", &["x"], "y")], vec![]).contains("follows no product"));
        assert!(refused(vec![node("MatMul", &["x", "v"], "y")], vec![w()]).contains("`v` is not constant"));
        let twice = vec![node("Relu", &["x"], "a"), node("MatMul", &["x", "w"], "y")];
        assert!(refused(twice, vec![w()]).contains("node `Relu0` and node `MatMul0` read `x`"));
        let late = vec![node("MatMul", &["x", "w"], "a"), node("Relu", &["a"], "b"), node("Add", &["b", "w"], "y")];
        assert!(refused(late, vec![w()]).contains("is a Add"));
        let short = constant("w", &[2, 2], &[1.0, 2.0]);
        assert!(refused(vec![node("MatMul", &["x", "w"], "y")], vec![short]).contains("2 values for the shape"));
        let wide = constant("w", &[1, 2], &[1.0, 2.0]);
        assert!(refused(vec![node("MatMul", &["x", "w"], "y")], vec![wide]).contains("2 values a row"));
        let cycle = vec![node("Identity", &["x"], "a"), node("Identity", &["a"], "x")];
        assert_eq!(refused(cycle, vec![]), "a circle");
    }
}
