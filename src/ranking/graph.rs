//! ONNX graphs as values per row: what the engine for dense networks can compute.
//!
//! The first axis is the batch's. What exporters write around a network is folded away: constants, shapes, casts, transposed
//! weights; every other axis is a matter of columns.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use rten_onnx::onnx::{AttributeProto, DataLocation, DataType, GraphProto, ModelProto, NodeProto, TensorProto};

use super::dense::ops::{Binary, Graph, Id, Op, Unary};

/// Values per row beyond this are no ranker's.
const MOST_COLUMNS: usize = 1 << 20;
/// The batch's size among the numbers of a shape.
const BATCH: i64 = i64::MIN;

/// Whole numbers up to it are values of f32, which features are.
const LARGEST_ID: usize = 1 << 24;
/// Operators whose results are values of their operands, or nearly so.
const MOVES: [&str; 14] = [
    "Cast",
    "Ceil",
    "Clip",
    "Concat",
    "Flatten",
    "Floor",
    "Gather",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
];

/// A tensor while the graph is read.
#[derive(Clone, Debug)]
enum Value {
    /// Known at load.
    Constant(Constant),
    /// A value per row of these axes. `turned`: the same before its last two axes were exchanged.
    Rows { id: Id, shape: Vec<usize>, turned: Option<Id> },
}

#[derive(Clone, Debug)]
struct Constant {
    dims: Vec<usize>,
    floats: Arc<Vec<f32>>,
    /// Whole numbers, as shapes and places are; [`BATCH`] stands for the batch's size.
    ints: Option<Arc<Vec<i64>>>,
}

/// The computation of `outputs` from `inputs`, each with its width.
///
/// # Errors
/// What makes the graph something else, with the node's name; that is no fault of the model, which the general runtime runs.
pub fn read(model: &ModelProto, inputs: &[(&str, usize)], outputs: &[&str]) -> Result<Graph, String> {
    let proto = model.graph.as_ref().ok_or("no graph")?;
    let mut reader = Reader { graph: Graph::default(), values: HashMap::new() };
    for tensor in &proto.initializer {
        if let Some(name) = tensor.name.as_deref() {
            // One that can't be read is missed by the node that wants it, which says more.
            reader.values.extend(constant(tensor).ok().map(|value| (name, Value::Constant(value))));
        }
    }
    for input in proto.input.iter().filter_map(|i| i.name.as_deref()) {
        let known = reader.values.contains_key(input) || inputs.iter().any(|(name, _)| *name == input);
        known.then_some(()).ok_or_else(|| format!("the input `{input}` is not given"))?;
    }
    for (at, (name, width)) in inputs.iter().enumerate() {
        reader.graph.inputs.push(*width);
        let id = reader.graph.push(Op::Input(at));
        let input = proto.input.iter().find(|i| i.name.as_deref() == Some(name));
        input.ok_or_else(|| format!("no input `{name}`"))?;
        reader.values.insert(name, Value::Rows { id, shape: vec![*width], turned: None });
    }
    for node in wanted(proto, outputs) {
        let value = reader.node(node).map_err(|reason| format!("{}: {reason}", named(node)))?;
        for (name, value) in node.output.iter().zip(value) {
            reader.values.insert(name, value);
        }
    }
    for output in outputs {
        match reader.values.get(output) {
            Some(Value::Rows { id, .. }) if reader.graph.width(*id) == 1 => reader.graph.outputs.push(*id),
            Some(Value::Rows { id, .. }) => {
                return Err(format!("`{output}` has {} values a row", reader.graph.width(*id)));
            }
            _ => return Err(format!("`{output}` does not depend on an input")),
        }
    }
    Ok(reader.graph)
}

/// Looks for tables with more rows than features can tell apart, whatever runs the model. Numbers that the graph computes of features may
/// be larger.
///
/// # Errors
/// The node that picks from such a table, and the input that it picks by.
pub fn check_ids(model: &ModelProto) -> Result<(), String> {
    let Some(proto) = &model.graph else { return Ok(()) };
    let tables = proto.initializer.iter().filter_map(|tensor| Some((tensor.name.as_deref()?, &tensor.dims)));
    let tables: HashMap<&str, &Vec<i64>> = tables.collect();
    let inputs = proto.input.iter().filter_map(|input| input.name.as_deref());
    // By name: the input that a value is, moved about.
    let mut origins: HashMap<&str, &str> =
        inputs.filter(|name| !tables.contains_key(name)).map(|name| (name, name)).collect();
    for node in &proto.node {
        let kind = node.op_type.as_deref().unwrap_or_default();
        let operand = |at: usize| node.input.get(at).map(String::as_str).unwrap_or_default();
        let table = tables.get(operand(0)).filter(|_| kind == "Gather");
        if let (Some(dims), Some(input)) = (table, origins.get(operand(1))) {
            let axis = node.attribute.iter().find(|a| a.name.as_deref() == Some("axis")).and_then(|a| a.i).unwrap_or(0);
            let axis = if axis < 0 { axis + dims.len() as i64 } else { axis };
            let rows = usize::try_from(axis).ok().and_then(|axis| dims.get(axis)).copied().unwrap_or(0);
            if rows > LARGEST_ID as i64 + 1 {
                let node = named(node);
                return Err(format!(
                    "{node}: picks one of {rows} rows by the input `{input}`, but features are float32, which has all \
                     whole numbers up to {LARGEST_ID} only; give such an id in two columns and put it together in the graph"
                ));
            }
        } else if MOVES.contains(&kind)
            && let Some(&origin) = node.input.iter().find_map(|name| origins.get(name.as_str()))
        {
            origins.extend(node.output.iter().map(|name| (name.as_str(), origin)));
        }
    }
    Ok(())
}

/// The nodes that the outputs depend on, in the file's order, which is that of computation.
fn wanted<'a>(proto: &'a GraphProto, outputs: &[&str]) -> Vec<&'a NodeProto> {
    let mut names: HashSet<&str> = outputs.iter().copied().collect();
    let mut nodes: Vec<&NodeProto> = Vec::new();
    for node in proto.node.iter().rev() {
        if node.output.iter().any(|name| names.contains(name.as_str())) {
            names.extend(node.input.iter().map(String::as_str));
            nodes.push(node);
        }
    }
    nodes.reverse();
    nodes
}

/// How messages call a node.
fn named(node: &NodeProto) -> String {
    let kind = node.op_type.as_deref().unwrap_or("?");
    match node.name.as_deref() {
        Some(name) if !name.is_empty() => format!("node `{name}` ({kind})"),
        _ => format!("the {kind} node of `{}`", node.output.first().map_or("?", String::as_str)),
    }
}

fn constant(tensor: &TensorProto) -> Result<Constant, String> {
    let name = tensor.name.as_deref().unwrap_or("?");
    if tensor.data_location == Some(DataLocation::EXTERNAL) {
        return Err(format!("`{name}` lies outside the file"));
    }
    let raw = tensor.raw_data.as_ref().map(|raw| raw.borrow());
    let (floats, ints): (Vec<f32>, Option<Vec<i64>>) = match (tensor.data_type, &raw) {
        (Some(DataType::FLOAT), Some(raw)) => {
            (raw.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(), None)
        }
        (Some(DataType::FLOAT), None) => (tensor.float_data.clone(), None),
        (Some(DataType::DOUBLE), Some(raw)) => {
            (raw.as_chunks::<8>().0.iter().map(|&bytes| f64::from_le_bytes(bytes) as f32).collect(), None)
        }
        (Some(DataType::DOUBLE), None) => (tensor.double_data.iter().map(|&v| v as f32).collect(), None),
        (Some(DataType::INT64), Some(raw)) => {
            (Vec::new(), Some(raw.as_chunks::<8>().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect()))
        }
        (Some(DataType::INT64), None) => (Vec::new(), Some(tensor.int64_data.clone())),
        (Some(DataType::INT32), Some(raw)) => {
            let values = raw.as_chunks::<4>().0.iter().map(|&bytes| i64::from(i32::from_le_bytes(bytes)));
            (Vec::new(), Some(values.collect()))
        }
        (Some(DataType::INT32), None) => (Vec::new(), Some(tensor.int32_data.iter().map(|&v| v.into()).collect())),
        (kind, _) => {
            return Err(format!("`{name}` is of type {}", kind.as_ref().and_then(|k| k.name()).unwrap_or("?")));
        }
    };
    let dims = tensor.dims.iter().map(|&n| usize::try_from(n).ok()).collect::<Option<Vec<usize>>>();
    let dims = dims.ok_or_else(|| format!("`{name}` has a negative size"))?;
    let wanted = dims.iter().try_fold(1usize, |all, &n| all.checked_mul(n));
    let len = ints.as_ref().map_or(floats.len(), Vec::len);
    if wanted != Some(len) {
        return Err(format!("`{name}` has {len} values for the shape {dims:?}"));
    }
    Ok(Constant::new(dims, floats, ints))
}

impl Constant {
    fn new(dims: Vec<usize>, floats: Vec<f32>, ints: Option<Vec<i64>>) -> Self {
        let floats = match &ints {
            Some(ints) => ints.iter().map(|&v| v as f32).collect(),
            None => floats,
        };
        Constant { dims, floats: Arc::new(floats), ints: ints.map(Arc::new) }
    }

    fn of_ints(ints: Vec<i64>) -> Self {
        Constant::new(vec![ints.len()], Vec::new(), Some(ints))
    }
}

/// The shape that two broadcast to, aligned at the last axis.
fn broadcast(a: &[usize], b: &[usize]) -> Result<Vec<usize>, String> {
    let rank = a.len().max(b.len());
    let of = |shape: &[usize], at: usize| (at + shape.len()).checked_sub(rank).map_or(1, |at| shape[at]);
    let size = |at: usize| match (of(a, at), of(b, at)) {
        (a, b) if a == b || b == 1 => Ok(a),
        (1, b) => Ok(b),
        _ => Err(format!("the shapes {a:?} and {b:?} do not fit")),
    };
    let shape = (0..rank).map(size).collect::<Result<Vec<usize>, String>>()?;
    check_size(&shape)?;
    Ok(shape)
}

/// For each place of `to`, the place of `from` that is broadcast there.
fn spread(from: &[usize], to: &[usize]) -> Vec<u32> {
    let mut places = vec![0u32];
    let lead = to.len() - from.len();
    let mut inner: usize = from.iter().product();
    for (axis, &n) in to.iter().enumerate() {
        let own = axis.checked_sub(lead).map_or(1, |axis| from[axis]);
        if axis >= lead {
            inner /= own.max(1);
        }
        let step = if own == 1 { 0 } else { inner as u32 };
        places = places.iter().flat_map(|&place| (0..n as u32).map(move |at| place + at * step)).collect();
    }
    places
}

fn check_size(shape: &[usize]) -> Result<usize, String> {
    let size = shape.iter().try_fold(1usize, |all, &n| all.checked_mul(n)).filter(|&n| n <= MOST_COLUMNS);
    size.ok_or_else(|| format!("more than {MOST_COLUMNS} values a row"))
}

/// An axis of a tensor of `rank` axes, counted from the front.
fn axis_of(axis: i64, rank: usize) -> Result<usize, String> {
    let at = if axis < 0 { axis + rank as i64 } else { axis };
    usize::try_from(at).ok().filter(|&at| at < rank).ok_or_else(|| format!("no axis {axis} of {rank}"))
}

/// An axis of a row's shape, from one of the whole tensor.
fn row_axis(axis: i64, shape: &[usize]) -> Result<usize, String> {
    axis_of(axis, shape.len() + 1)?.checked_sub(1).ok_or_else(|| "works across rows".to_owned())
}

struct Attributes<'a>(&'a [AttributeProto]);

impl<'a> Attributes<'a> {
    fn get(&self, name: &str) -> Option<&'a AttributeProto> {
        self.0.iter().find(|a| a.name.as_deref() == Some(name))
    }

    fn float(&self, name: &str, default: f32) -> f32 {
        self.get(name).and_then(|a| a.f).unwrap_or(default)
    }

    fn int(&self, name: &str, default: i64) -> i64 {
        self.get(name).and_then(|a| a.i).unwrap_or(default)
    }

    fn ints(&self, name: &str) -> Option<Vec<i64>> {
        self.get(name).map(|a| a.ints.clone())
    }
}

struct Reader<'a> {
    graph: Graph,
    values: HashMap<&'a str, Value>,
}

impl<'a> Reader<'a> {
    fn value(&self, node: &NodeProto, at: usize) -> Result<Value, String> {
        let name = node.input.get(at).filter(|name| !name.is_empty()).ok_or("an operand is missing")?;
        self.values.get(name.as_str()).cloned().ok_or_else(|| format!("`{name}` can't be read"))
    }

    fn optional(&self, node: &NodeProto, at: usize) -> Result<Option<Value>, String> {
        match node.input.get(at).is_some_and(|name| !name.is_empty()) {
            true => self.value(node, at).map(Some),
            false => Ok(None),
        }
    }

    fn rows(&self, node: &NodeProto, at: usize) -> Result<(Id, Vec<usize>), String> {
        match self.value(node, at)? {
            Value::Rows { id, shape, .. } => Ok((id, shape)),
            Value::Constant(_) => Err("an operand is constant that should depend on the rows".to_owned()),
        }
    }

    fn constant(&self, node: &NodeProto, at: usize) -> Result<Constant, String> {
        match self.value(node, at)? {
            Value::Constant(constant) => Ok(constant),
            Value::Rows { .. } => Err(format!("`{}` is not constant", node.input[at])),
        }
    }

    /// A list of whole numbers: an attribute, or an operand as in newer versions of an operator.
    fn ints(&self, node: &NodeProto, name: &str, at: usize) -> Result<Option<Vec<i64>>, String> {
        if let Some(ints) = Attributes(&node.attribute).ints(name) {
            return Ok(Some(ints));
        }
        if node.input.get(at).is_none_or(String::is_empty) {
            return Ok(None);
        }
        let ints = self.constant(node, at)?.ints.ok_or_else(|| format!("{name} are not whole numbers"))?;
        Ok(Some(ints.to_vec()))
    }

    fn one(&mut self, op: Op, shape: Vec<usize>) -> Result<Vec<Value>, String> {
        check_size(&shape)?;
        Ok(vec![Value::Rows { id: self.graph.push(op), shape, turned: None }])
    }

    fn take(&mut self, x: Id, columns: Vec<u32>, shape: Vec<usize>) -> Result<Vec<Value>, String> {
        self.one(Op::Take { x, columns: Arc::new(columns) }, shape)
    }

    fn node(&mut self, node: &'a NodeProto) -> Result<Vec<Value>, String> {
        if !matches!(node.domain.as_deref(), None | Some("" | "ai.onnx")) {
            return Err(format!("the domain {}", node.domain.as_deref().unwrap_or_default()));
        }
        let attributes = Attributes(&node.attribute);
        let kind = node.op_type.as_deref().unwrap_or_default();
        let unary = match kind {
            "Relu" => Some(Unary::Relu),
            "LeakyRelu" => Some(Unary::LeakyRelu { slope: attributes.float("alpha", 0.01) }),
            "Sigmoid" => Some(Unary::Sigmoid),
            "Tanh" => Some(Unary::Tanh),
            "Gelu" if attributes.get("approximate").and_then(|a| a.s.as_deref()).unwrap_or("none") == "none" => {
                Some(Unary::Gelu)
            }
            "Softplus" => Some(Unary::Softplus),
            "Elu" => Some(Unary::Elu { alpha: attributes.float("alpha", 1.0) }),
            "Erf" => Some(Unary::Erf),
            "Exp" => Some(Unary::Exp),
            "Log" => Some(Unary::Log),
            "Sqrt" => Some(Unary::Sqrt),
            "Abs" => Some(Unary::Abs),
            "Reciprocal" => Some(Unary::Reciprocal),
            _ => None,
        };
        if let Some(unary) = unary {
            let (x, shape) = self.rows(node, 0)?;
            return self.one(Op::Unary(unary, x), shape);
        }
        match kind {
            "Constant" => {
                let tensor = attributes.get("value").and_then(|a| a.t.as_ref());
                let value = match (tensor, attributes.get("value_ints"), attributes.get("value_int")) {
                    (Some(tensor), ..) => constant(tensor)?,
                    (_, Some(ints), _) => Constant::of_ints(ints.ints.clone()),
                    (.., Some(int)) => Constant::new(Vec::new(), Vec::new(), Some(vec![int.i.unwrap_or(0)])),
                    _ => {
                        let value =
                            attributes.get("value_float").and_then(|a| a.f).ok_or("a constant of another kind")?;
                        Constant::new(Vec::new(), vec![value], None)
                    }
                };
                Ok(vec![Value::Constant(value)])
            }
            "Identity" | "Dropout" | "Cast" => Ok(vec![self.value(node, 0)?]),
            "Shape" => {
                let (_, shape) = self.rows(node, 0)?;
                let all: Vec<i64> = [BATCH].into_iter().chain(shape.iter().map(|&n| n as i64)).collect();
                let clamp =
                    |at: i64| (if at < 0 { at + all.len() as i64 } else { at }).clamp(0, all.len() as i64) as usize;
                let (start, end) = (clamp(attributes.int("start", 0)), clamp(attributes.int("end", all.len() as i64)));
                Ok(vec![Value::Constant(Constant::of_ints(all[start..end.max(start)].to_vec()))])
            }
            "Neg" => {
                let (x, shape) = self.rows(node, 0)?;
                self.affine(x, shape, -1.0, 0.0)
            }
            "HardSigmoid" => {
                let (x, shape) = self.rows(node, 0)?;
                let (gain, add) = (attributes.float("alpha", 0.2), attributes.float("beta", 0.5));
                let x = self.id_of(self.graph.width(x), x, gain, add);
                self.one(Op::Unary(Unary::Clip { low: 0.0, high: 1.0 }, x), shape)
            }
            "Clip" => {
                let (x, shape) = self.rows(node, 0)?;
                let bound = |at: usize, name: &str, default: f32| -> Result<f32, String> {
                    let given = self.optional(node, at)?;
                    match given {
                        Some(Value::Constant(c)) if c.floats.len() == 1 => Ok(c.floats[0]),
                        Some(_) => Err("bounds that are not constant".to_owned()),
                        None => Ok(attributes.float(name, default)),
                    }
                };
                let low = bound(1, "min", f32::NEG_INFINITY)?;
                let high = bound(2, "max", f32::INFINITY)?;
                self.one(Op::Unary(Unary::Clip { low, high }, x), shape)
            }
            "PRelu" => {
                let (x, shape) = self.rows(node, 0)?;
                let slope = self.constant(node, 1)?;
                let down = self.id_of(self.graph.width(x), x, -1.0, 0.0);
                let down = self.graph.push(Op::Unary(Unary::Relu, down));
                let negative = slope.floats.iter().map(|v| -v).collect();
                let slope = Constant::new(slope.dims.clone(), negative, None);
                let Value::Rows { id: below, .. } = self.with_constant("Mul", down, &shape, &slope, false)?.remove(0)
                else {
                    return Err("a slope of another shape".to_owned());
                };
                let above = self.graph.push(Op::Unary(Unary::Relu, x));
                self.one(Op::Binary(Binary::Add, above, below), shape)
            }
            "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Max" | "Min" => self.arithmetic(node, kind),
            "Gemm" => self.gemm(node),
            "MatMul" => self.product(node),
            "Softmax" => {
                let (x, shape) = self.rows(node, 0)?;
                match row_axis(attributes.int("axis", -1), &shape)? {
                    axis if axis + 1 == shape.len() => self.one(Op::Softmax { x, len: shape[axis] }, shape.clone()),
                    _ => Err("across an axis other than the last".to_owned()),
                }
            }
            "ReduceSum" | "ReduceMean" => self.reduce(node, kind == "ReduceMean"),
            "BatchNormalization" => {
                let (x, shape) = self.rows(node, 0)?;
                let channels = *shape.first().ok_or("no channels")?;
                let inner = shape[1..].iter().product::<usize>();
                let [scale, shift, mean, variance] = [1, 2, 3, 4].map(|at| self.constant(node, at));
                let (scale, shift, mean, variance) = (scale?.floats, shift?.floats, mean?.floats, variance?.floats);
                if [&scale, &shift, &mean, &variance].iter().any(|c| c.len() != channels) {
                    return Err(format!("statistics of other than {channels} channels"));
                }
                let epsilon = attributes.float("epsilon", 1e-5);
                let gain = |at: usize| f64::from(scale[at]) / (f64::from(variance[at]) + f64::from(epsilon)).sqrt();
                let add = |at: usize| f64::from(shift[at]) - f64::from(mean[at]) * gain(at);
                let each = |of: &dyn Fn(usize) -> f64| (0..channels * inner).map(|at| of(at / inner) as f32).collect();
                let (gain, add) = (Arc::new(each(&gain)), Arc::new(each(&add)));
                self.one(Op::Affine { x, gain, add }, shape)
            }
            "LayerNormalization" => {
                let (x, shape) = self.rows(node, 0)?;
                let axis = row_axis(attributes.int("axis", -1), &shape)?;
                let len: usize = shape[axis..].iter().product();
                let gain = self.constant(node, 1)?.floats;
                let add = match self.optional(node, 2)? {
                    Some(Value::Constant(add)) => add.floats,
                    Some(_) => return Err("a bias that is not constant".to_owned()),
                    None => Arc::new(vec![0.0; len]),
                };
                if gain.len() != len || add.len() != len {
                    return Err(format!("gains of other than {len} columns"));
                }
                self.one(Op::LayerNorm { x, gain, add, epsilon: attributes.float("epsilon", 1e-5) }, shape)
            }
            "Concat" => self.concat(node, attributes.int("axis", 0)),
            "Gather" => self.gather(node, attributes.int("axis", 0)),
            "Slice" => self.slice(node),
            "Split" => {
                let (x, shape) = self.rows(node, 0)?;
                let axis = row_axis(attributes.int("axis", 0), &shape)?;
                let n = node.output.len();
                let sizes = match self.ints(node, "split", 1)? {
                    Some(sizes) => sizes.into_iter().map(|n| n.max(0) as usize).collect(),
                    None => vec![shape[axis].div_ceil(n); n],
                };
                let mut from = 0;
                let mut parts = Vec::new();
                for size in sizes {
                    let until = (from + size).min(shape[axis]);
                    parts.extend(self.pick(x, &shape, axis, &(from..until).collect::<Vec<_>>())?);
                    from = until;
                }
                Ok(parts)
            }
            "Transpose" => {
                let (x, shape) = self.rows(node, 0)?;
                let rank = shape.len() + 1;
                let order = attributes.ints("perm").unwrap_or_else(|| (0..rank as i64).rev().collect());
                let order = order.into_iter().map(|axis| axis_of(axis, rank)).collect::<Result<Vec<_>, _>>()?;
                if order.len() != rank || order[0] != 0 {
                    return Err("moves the batch".to_owned());
                }
                let order: Vec<usize> = order[1..].iter().map(|axis| axis - 1).collect();
                let to: Vec<usize> = order.iter().map(|&axis| shape[axis]).collect();
                let steps: Vec<usize> = (0..shape.len()).map(|axis| shape[axis + 1..].iter().product()).collect();
                let mut places = vec![0u32];
                for &axis in &order {
                    let (n, step) = (shape[axis] as u32, steps[axis] as u32);
                    places = places.iter().flat_map(|&place| (0..n).map(move |at| place + at * step)).collect();
                }
                let last_two = shape.len() == 2 && order == [1, 0];
                let mut turned = self.take(x, places, to)?;
                if let (Some(Value::Rows { turned, .. }), true) = (turned.first_mut(), last_two) {
                    *turned = Some(x);
                }
                Ok(turned)
            }
            "Flatten" => {
                let (id, shape) = self.rows(node, 0)?;
                match attributes.int("axis", 1) {
                    1 => Ok(vec![Value::Rows { id, shape: vec![shape.iter().product()], turned: None }]),
                    axis => Err(format!("at axis {axis}")),
                }
            }
            "Reshape" => self.reshape(node, attributes.int("allowzero", 0) != 0),
            "Squeeze" | "Unsqueeze" => self.squeeze(node, kind == "Squeeze"),
            "Expand" => {
                let to = self.constant(node, 1)?.ints.ok_or("a shape of fractions")?;
                let (x, shape) = self.rows(node, 0)?;
                let sizes: Vec<usize> = to.iter().map(|&n| if n == BATCH { 1 } else { n.max(1) as usize }).collect();
                match to.len().cmp(&(shape.len() + 1)) {
                    std::cmp::Ordering::Greater => return Err("adds axes before the batch".to_owned()),
                    std::cmp::Ordering::Equal if to[0] != BATCH && to[0] != 1 => return Err("a fixed batch".to_owned()),
                    _ => {}
                }
                let sizes = if sizes.len() == shape.len() + 1 { &sizes[1..] } else { &sizes[..] };
                let wide = broadcast(&shape, sizes)?;
                self.take(x, spread(&shape, &wide), wide)
            }
            _ => Err("not known to the engine for dense networks".to_owned()),
        }
    }

    fn id_of(&mut self, width: usize, x: Id, gain: f32, add: f32) -> Id {
        self.graph.push(Op::Affine { x, gain: Arc::new(vec![gain; width]), add: Arc::new(vec![add; width]) })
    }

    fn affine(&mut self, x: Id, shape: Vec<usize>, gain: f32, add: f32) -> Result<Vec<Value>, String> {
        let id = self.id_of(self.graph.width(x), x, gain, add);
        Ok(vec![Value::Rows { id, shape, turned: None }])
    }

    fn arithmetic(&mut self, node: &NodeProto, kind: &str) -> Result<Vec<Value>, String> {
        if node.input.len() != 2 {
            return Err(format!("{} operands", node.input.len()));
        }
        match (self.value(node, 0)?, self.value(node, 1)?) {
            (Value::Rows { id: a, shape: left, .. }, Value::Rows { id: b, shape: right, .. }) => {
                if left.len() != right.len() && left.len().min(right.len()) > 0 {
                    return Err(format!("rows of the shapes {left:?} and {right:?}"));
                }
                let binary = match kind {
                    "Add" => Binary::Add,
                    "Sub" => Binary::Sub,
                    "Mul" => Binary::Mul,
                    "Div" => Binary::Div,
                    "Max" => Binary::Max,
                    "Min" => Binary::Min,
                    _ => Binary::Pow,
                };
                let shape = broadcast(&left, &right)?;
                let wide = |graph: &mut Graph, x: Id, from: &[usize]| {
                    graph.push(Op::Take { x, columns: Arc::new(spread(from, &shape)) })
                };
                let a = wide(&mut self.graph, a, &left);
                // One column is broadcast by the step itself.
                let b = if self.graph.width(b) == 1 { b } else { wide(&mut self.graph, b, &right) };
                self.one(Op::Binary(binary, a, b), shape)
            }
            (Value::Rows { id, shape, .. }, Value::Constant(c)) => self.with_constant(kind, id, &shape, &c, false),
            (Value::Constant(c), Value::Rows { id, shape, .. }) => self.with_constant(kind, id, &shape, &c, true),
            (Value::Constant(a), Value::Constant(b)) => {
                let (Some(x), Some(y)) = (&a.ints, &b.ints) else { return Err("of two constants".to_owned()) };
                let n = x.len().max(y.len());
                if (x.len() != n && x.len() != 1) || (y.len() != n && y.len() != 1) {
                    return Err("of two constants".to_owned());
                }
                let of = |values: &[i64], at: usize| values[if values.len() == 1 { 0 } else { at }];
                let result = |at: usize| {
                    let (x, y) = (of(x, at), of(y, at));
                    let result = match kind {
                        _ if x == BATCH || y == BATCH => None,
                        "Add" => x.checked_add(y),
                        "Sub" => x.checked_sub(y),
                        "Mul" => x.checked_mul(y),
                        "Div" => x.checked_div(y),
                        _ => None,
                    };
                    result.ok_or_else(|| "of two constants".to_owned())
                };
                let ints = (0..n).map(result).collect::<Result<Vec<_>, _>>()?;
                let dims = if a.dims.len() > b.dims.len() { a.dims } else { b.dims };
                Ok(vec![Value::Constant(Constant::new(dims, Vec::new(), Some(ints)))])
            }
        }
    }

    /// `x kind c`, or `c kind x` if `first`.
    fn with_constant(
        &mut self,
        kind: &str,
        x: Id,
        shape: &[usize],
        c: &Constant,
        first: bool,
    ) -> Result<Vec<Value>, String> {
        // The constant's own batch axis is 1.
        let dims = match c.dims.len().checked_sub(shape.len() + 1) {
            Some(0) if c.dims[0] == 1 => &c.dims[1..],
            Some(_) => return Err(format!("a constant of the shape {:?} with rows of {shape:?}", c.dims)),
            None => &c.dims[..],
        };
        let wide = broadcast(shape, dims)?;
        let width = check_size(&wide)?;
        let values: Vec<f32> = spread(dims, &wide).into_iter().map(|at| c.floats[at as usize]).collect();
        let x = self.graph.push(Op::Take { x, columns: Arc::new(spread(shape, &wide)) });
        let scalar = values.first().copied().filter(|first| values.iter().all(|v| v == first));
        let (gain, add) = match (kind, first) {
            ("Add", _) => (vec![1.0; width], values),
            ("Sub", false) => (vec![1.0; width], values.iter().map(|v| -v).collect()),
            ("Sub", true) => (vec![-1.0; width], values),
            ("Mul", _) => (values, vec![0.0; width]),
            ("Div", false) => (values.iter().map(|v| 1.0 / v).collect(), vec![0.0; width]),
            ("Div", true) => {
                let x = self.graph.push(Op::Unary(Unary::Reciprocal, x));
                return self.one(Op::Affine { x, gain: Arc::new(values), add: Arc::new(vec![0.0; width]) }, wide);
            }
            ("Pow" | "Max" | "Min", _) => {
                let scalar = scalar.ok_or("several constants")?;
                let unary = match (kind, first) {
                    ("Max", _) => Unary::Clip { low: scalar, high: f32::INFINITY },
                    ("Min", _) => Unary::Clip { low: f32::NEG_INFINITY, high: scalar },
                    (_, false) => Unary::Pow { power: scalar },
                    _ => return Err("a power of a constant".to_owned()),
                };
                return self.one(Op::Unary(unary, x), wide);
            }
            _ => return Err("not known".to_owned()),
        };
        self.one(Op::Affine { x, gain: Arc::new(gain), add: Arc::new(add) }, wide)
    }

    /// `alpha · x · w + beta · c`
    fn gemm(&mut self, node: &NodeProto) -> Result<Vec<Value>, String> {
        let attributes = Attributes(&node.attribute);
        let Ok((x, shape)) = self.rows(node, 0) else { return Err("the rows stand on the right".to_owned()) };
        if attributes.int("transA", 0) != 0 {
            return Err("the rows are transposed".to_owned());
        }
        let w = self.constant(node, 1)?;
        let (&[rows, columns], [k]) = (&w.dims[..], &shape[..]) else {
            return Err(format!("weights of the shape {:?} for rows of {shape:?}", w.dims));
        };
        let turned = attributes.int("transB", 0) != 0;
        let (inputs, n) = if turned { (columns, rows) } else { (rows, columns) };
        if inputs != *k {
            return Err(format!("weights for {inputs} columns where there are {k}"));
        }
        let alpha = attributes.float("alpha", 1.0);
        let weight = |at: usize| alpha * if turned { w.floats[at % n * k + at / n] } else { w.floats[at] };
        let weights: Vec<f32> = (0..k * n).map(weight).collect();
        let bias = match self.optional(node, 2)? {
            Some(Value::Constant(c)) => {
                let dims = if c.dims.len() == 2 && c.dims[0] == 1 { &c.dims[1..] } else { &c.dims[..] };
                let fits = broadcast(dims, &[n]).is_ok_and(|shape| shape == [n]);
                fits.then_some(()).ok_or_else(|| format!("a bias of the shape {:?} for {n} columns", c.dims))?;
                let beta = attributes.float("beta", 1.0);
                spread(dims, &[n]).into_iter().map(|at| beta * c.floats[at as usize]).collect()
            }
            Some(_) => return Err("a bias that is not constant".to_owned()),
            None => vec![0.0; n],
        };
        self.one(Op::Dense { x, weights: Arc::new(weights), bias: Arc::new(bias), base: None, repeat: 1 }, vec![n])
    }

    fn product(&mut self, node: &NodeProto) -> Result<Vec<Value>, String> {
        match (self.value(node, 0)?, self.value(node, 1)?) {
            (Value::Rows { id: x, mut shape, .. }, Value::Constant(w)) => {
                let &[rows, n] = &w.dims[..] else { return Err(format!("weights of the shape {:?}", w.dims)) };
                if shape.last() != Some(&rows) || rows == 0 || n == 0 {
                    return Err(format!("weights of the shape {:?} for rows of {shape:?}", w.dims));
                }
                shape.pop();
                let repeat = check_size(&shape)?;
                shape.push(n);
                let bias = Arc::new(vec![0.0; n]);
                self.one(Op::Dense { x, weights: w.floats, bias, base: None, repeat }, shape)
            }
            (Value::Rows { id: a, shape: left, .. }, Value::Rows { id: b, shape: right, turned }) => {
                let (&[m, k], &[inner, n]) = (&left[..], &right[..]) else {
                    return Err(format!("rows of the shapes {left:?} and {right:?}"));
                };
                if k != inner || k == 0 {
                    return Err(format!("rows of the shapes {left:?} and {right:?}"));
                }
                let op = match turned {
                    Some(b) => Op::MatMul { a, b, m, k, n, turned: true },
                    None => Op::MatMul { a, b, m, k, n, turned: false },
                };
                self.one(op, vec![m, n])
            }
            _ => Err("the weights stand on the left".to_owned()),
        }
    }

    fn reduce(&mut self, node: &NodeProto, mean: bool) -> Result<Vec<Value>, String> {
        let (mut x, mut shape) = self.rows(node, 0)?;
        let axes = self.ints(node, "axes", 1)?.ok_or("works across rows")?;
        let mut axes = axes.into_iter().map(|axis| row_axis(axis, &shape)).collect::<Result<Vec<_>, _>>()?;
        axes.sort_unstable();
        axes.dedup();
        for &axis in axes.iter().rev() {
            let (len, inner) = (shape[axis].max(1), shape[axis + 1..].iter().product::<usize>());
            let scale = if mean { 1.0 / len as f32 } else { 1.0 };
            x = self.graph.push(Op::Sum { x, len, inner, scale });
            shape[axis] = 1;
        }
        if Attributes(&node.attribute).int("keepdims", 1) == 0 {
            for &axis in axes.iter().rev() {
                shape.remove(axis);
            }
        }
        Ok(vec![Value::Rows { id: x, shape, turned: None }])
    }

    fn concat(&mut self, node: &NodeProto, axis: i64) -> Result<Vec<Value>, String> {
        let values = (0..node.input.len()).map(|at| self.value(node, at)).collect::<Result<Vec<_>, _>>()?;
        if values.iter().all(|value| matches!(value, Value::Constant(c) if c.ints.is_some())) {
            let ints = values.iter().filter_map(|value| match value {
                Value::Constant(c) => c.ints.as_deref().cloned(),
                Value::Rows { .. } => None,
            });
            return Ok(vec![Value::Constant(Constant::of_ints(ints.flatten().collect()))]);
        }
        let (mut parts, mut shapes) = (Vec::new(), Vec::new());
        for value in values {
            let Value::Rows { id, shape, .. } = value else { return Err("a part that is constant".to_owned()) };
            parts.push(id);
            shapes.push(shape);
        }
        let axis = row_axis(axis, &shapes[0])?;
        let mut shape = shapes[0].clone();
        if shapes.iter().any(|s| s.len() != shape.len() || (0..s.len()).any(|at| at != axis && s[at] != shape[at])) {
            return Err(format!("parts of the shapes {shapes:?}"));
        }
        shape[axis] = shapes.iter().map(|s| s[axis]).sum();
        check_size(&shape)?;
        let x = self.graph.push(Op::Concat(parts));
        let (outer, inner) = (shape[..axis].iter().product::<usize>(), shape[axis + 1..].iter().product::<usize>());
        let mut columns = Vec::new();
        for group in 0..outer {
            let mut start = 0;
            for part in &shapes {
                let len = part[axis] * inner;
                columns.extend((0..len).map(|at| (start + group * len + at) as u32));
                start += outer * len;
            }
        }
        self.take(x, columns, shape)
    }

    /// The places `at` of an axis.
    fn pick(&mut self, x: Id, shape: &[usize], axis: usize, at: &[usize]) -> Result<Vec<Value>, String> {
        let inner: usize = shape[axis + 1..].iter().product();
        let outer: usize = shape[..axis].iter().product();
        let mut columns = Vec::new();
        for group in 0..outer {
            for place in at {
                columns.extend((0..inner).map(|inside| ((group * shape[axis] + place) * inner + inside) as u32));
            }
        }
        let mut shape = shape.to_vec();
        shape[axis] = at.len();
        self.take(x, columns, shape)
    }

    fn gather(&mut self, node: &NodeProto, axis: i64) -> Result<Vec<Value>, String> {
        match (self.value(node, 0)?, self.value(node, 1)?) {
            (Value::Rows { id, shape, .. }, Value::Constant(places)) => {
                let axis = row_axis(axis, &shape)?;
                let n = shape[axis] as i64;
                let ints = places.ints.as_ref().ok_or("places that are not whole numbers")?;
                let place = |&at: &i64| match if at < 0 { at + n } else { at } {
                    at if (0..n).contains(&at) => Ok(at as usize),
                    _ => Err(format!("place {at} of {n}")),
                };
                let at = ints.iter().map(place).collect::<Result<Vec<_>, _>>()?;
                let mut picked = self.pick(id, &shape, axis, &at)?;
                if let Some(Value::Rows { shape, .. }) = picked.first_mut() {
                    shape.splice(axis..axis + 1, places.dims.iter().copied());
                }
                Ok(picked)
            }
            (Value::Constant(table), Value::Rows { id, mut shape, .. }) => {
                let &[rows, dim] = &table.dims[..] else {
                    return Err(format!("a table of the shape {:?}", table.dims));
                };
                if axis != 0 || rows == 0 || dim == 0 {
                    return Err(format!("axis {axis} of a table"));
                }
                // Here all numbers are f32.
                if rows > LARGEST_ID + 1 {
                    return Err(format!("a table of {rows} rows"));
                }
                shape.push(dim);
                self.one(Op::Embedding { x: id, table: table.floats, dim }, shape)
            }
            (Value::Constant(list), Value::Constant(places)) => {
                let (Some(list), Some(at)) = (&list.ints, &places.ints) else { return Err("of constants".to_owned()) };
                let n = list.len() as i64;
                let pick = |&at: &i64| list.get(if at < 0 { at + n } else { at } as usize).copied();
                let ints = at.iter().map(pick).collect::<Option<Vec<_>>>().ok_or("a place that does not exist")?;
                Ok(vec![Value::Constant(Constant::new(places.dims, Vec::new(), Some(ints)))])
            }
            _ => Err("places and values that both depend on the rows".to_owned()),
        }
    }

    fn slice(&mut self, node: &NodeProto) -> Result<Vec<Value>, String> {
        let starts = self.ints(node, "starts", 1)?.ok_or("no starts")?;
        let ends = self.ints(node, "ends", 2)?.ok_or("no ends")?;
        let axes = self.ints(node, "axes", 3)?.unwrap_or_else(|| (0..starts.len() as i64).collect());
        let steps = self.ints(node, "steps", 4)?.unwrap_or_else(|| vec![1; starts.len()]);
        if ends.len() != starts.len() || axes.len() != starts.len() || steps.iter().any(|&step| step != 1) {
            return Err("steps other than 1".to_owned());
        }
        let range = |at: usize, n: usize| {
            let place = |v: i64| (if v < 0 { v.saturating_add(n as i64) } else { v }).clamp(0, n as i64) as usize;
            (place(starts[at])..place(ends[at])).collect::<Vec<usize>>()
        };
        match self.value(node, 0)? {
            Value::Constant(c) => {
                let ints = c.ints.as_ref().filter(|_| axes == [0]).ok_or("of a constant")?;
                let picked = range(0, ints.len()).into_iter().map(|at| ints[at]).collect();
                Ok(vec![Value::Constant(Constant::of_ints(picked))])
            }
            Value::Rows { id, shape, .. } => {
                let mut value = vec![Value::Rows { id, shape, turned: None }];
                for (at, &axis) in axes.iter().enumerate() {
                    let Value::Rows { id, shape, .. } = value[0].clone() else { return Err("no rows".to_owned()) };
                    let axis = row_axis(axis, &shape)?;
                    value = self.pick(id, &shape, axis, &range(at, shape[axis]))?;
                }
                Ok(value)
            }
        }
    }

    fn reshape(&mut self, node: &NodeProto, allow_zero: bool) -> Result<Vec<Value>, String> {
        let to = self.constant(node, 1)?.ints.ok_or("a shape of fractions")?;
        let (id, shape) = match self.value(node, 0)? {
            Value::Rows { id, shape, .. } => (id, shape),
            Value::Constant(c) => {
                let sizes = to.iter().map(|&n| usize::try_from(n).ok()).collect::<Option<Vec<_>>>();
                let fits = |dims: &Vec<usize>| dims.iter().product::<usize>() == c.floats.len();
                let dims = match sizes.filter(fits) {
                    Some(dims) => dims,
                    None if *to == [-1] => vec![c.floats.len()],
                    None => return Err("of a constant".to_owned()),
                };
                return Ok(vec![Value::Constant(Constant { dims, ..c })]);
            }
        };
        let width: usize = shape.iter().product();
        let Some((&batch, rest)) = to.split_first() else { return Err("to no axes".to_owned()) };
        let rest = rest
            .iter()
            .enumerate()
            .map(|(at, &n)| match n {
                0 if !allow_zero => shape.get(at).map(|&n| n as i64).ok_or("a size of 0"),
                n if n == BATCH => Err("moves the batch"),
                n => Ok(n),
            })
            .collect::<Result<Vec<i64>, _>>()?;
        let known: i64 = rest.iter().filter(|n| **n > 0).product();
        let open = rest.iter().filter(|n| **n == -1).count();
        let fits = match open {
            0 => known == width as i64 && (batch == -1 || batch == BATCH || (batch == 0 && !allow_zero)),
            1 => known > 0 && width as i64 % known == 0 && (batch == BATCH || (batch == 0 && !allow_zero)),
            _ => false,
        };
        if !fits || rest.iter().any(|&n| n < -1 || n == 0) {
            return Err(format!("rows of {shape:?} to {rest:?}"));
        }
        let shape = rest.iter().map(|&n| if n == -1 { width / known as usize } else { n as usize }).collect();
        Ok(vec![Value::Rows { id, shape, turned: None }])
    }

    fn squeeze(&mut self, node: &NodeProto, remove: bool) -> Result<Vec<Value>, String> {
        let axes = self.ints(node, "axes", 1)?;
        match self.value(node, 0)? {
            Value::Constant(mut c) => {
                c.dims = if remove { Vec::new() } else { vec![c.floats.len()] };
                match c.floats.len() {
                    1 => Ok(vec![Value::Constant(c)]),
                    _ => Err("of a constant".to_owned()),
                }
            }
            Value::Rows { id, mut shape, .. } => {
                if remove {
                    let axes = axes.ok_or("no axes, which may be the batch")?;
                    let mut axes = axes.into_iter().map(|a| row_axis(a, &shape)).collect::<Result<Vec<_>, _>>()?;
                    axes.sort_unstable();
                    for &axis in axes.iter().rev() {
                        if shape.remove(axis) != 1 {
                            return Err("an axis that is not 1".to_owned());
                        }
                    }
                } else {
                    let axes = axes.ok_or("no axes")?;
                    let rank = shape.len() + 1 + axes.len();
                    let mut axes = axes.into_iter().map(|a| axis_of(a, rank)).collect::<Result<Vec<_>, _>>()?;
                    axes.sort_unstable();
                    for axis in axes {
                        shape.insert(axis.checked_sub(1).ok_or("an axis before the batch")?, 1);
                    }
                }
                Ok(vec![Value::Rows { id, shape, turned: None }])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Kernel;
    use crate::ranking::Ranker;
    use crate::ranking::dense::{DenseRanker, Model};
    use rten_onnx::onnx::ValueInfoProto;

    fn floats(name: &str, dims: &[i64], values: &[f32]) -> TensorProto {
        TensorProto {
            name: Some(name.to_owned()),
            dims: dims.to_vec(),
            data_type: Some(DataType::FLOAT),
            float_data: values.to_vec(),
            ..TensorProto::default()
        }
    }

    fn whole(name: &str, dims: &[i64], values: &[i64]) -> TensorProto {
        let (data_type, int64_data) = (Some(DataType::INT64), values.to_vec());
        TensorProto {
            name: Some(name.to_owned()),
            dims: dims.to_vec(),
            data_type,
            int64_data,
            ..TensorProto::default()
        }
    }

    /// As in `node("Gemm", "x w b", "y", &[("alpha", 2.0)])`; whole numbers become both kinds of attribute.
    fn node(kind: &str, inputs: &str, outputs: &str, attributes: &[(&str, f32)]) -> NodeProto {
        let attribute = |&(name, value): &(&str, f32)| AttributeProto {
            name: Some(name.to_owned()),
            f: Some(value),
            i: Some(value as i64),
            ints: vec![value as i64],
            ..AttributeProto::default()
        };
        let names = |names: &str| names.split(' ').map(str::to_owned).collect();
        NodeProto {
            op_type: Some(kind.to_owned()),
            name: Some(format!("{kind}0")),
            input: names(inputs),
            output: names(outputs),
            attribute: attributes.iter().map(attribute).collect(),
            ..NodeProto::default()
        }
    }

    fn model(inputs: &[(&str, usize)], nodes: Vec<NodeProto>, initializer: Vec<TensorProto>) -> ModelProto {
        let input = |(name, _): &(&str, usize)| ValueInfoProto { name: Some((*name).to_owned()), ..Default::default() };
        let input = inputs.iter().map(input).collect();
        ModelProto {
            graph: Some(GraphProto { node: nodes, initializer, input, ..GraphProto::default() }),
            ..ModelProto::default()
        }
    }

    /// Scores of `y` for rows of `x`.
    fn scores(
        inputs: &[(&str, usize)],
        nodes: Vec<NodeProto>,
        constants: Vec<TensorProto>,
        rows: &[&[f32]],
    ) -> Vec<f32> {
        let graph = read(&model(inputs, nodes, constants), inputs, &["y"]).unwrap().simplified();
        let mut ranker = DenseRanker::new(Arc::new(Model::plain("m", &graph, Kernel::detect())));
        let (mut scores, n) = (Vec::new(), rows[0].len() / inputs[0].1);
        let rows: Vec<Vec<f32>> = rows.iter().map(|row| row.to_vec()).collect();
        ranker.score(&rows, n, &mut scores).unwrap();
        scores
    }

    fn near(got: &[f32], want: &[f32]) {
        let close =
            got.len() == want.len() && got.iter().zip(want).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs().max(1.0));
        assert!(close, "{got:?}, expected {want:?}");
    }

    #[test]
    fn products_sums_and_activations() {
        let nodes = vec![
            node("MatMul", "x w0", "m", &[]),
            node("Add", "b0 m", "s", &[]),
            node("Relu", "s", "a", &[]),
            node("Gemm", "a w1 b1", "b", &[("alpha", 2.0), ("beta", 3.0), ("transB", 1.0)]),
            node("Sigmoid", "b", "c", &[]),
            node("Identity", "c", "y", &[]),
        ];
        let constants = vec![
            floats("w0", &[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
            floats("b0", &[1, 3], &[7.0, 8.0, -90.0]),
            floats("w1", &[1, 3], &[0.01, 0.02, 3.0]),
            floats("b1", &[1], &[-0.5]),
        ];
        let want = |a: f32, b: f32| {
            let sum: f32 = 2.0 * (0.01 * (a + 4.0 * b + 7.0) + 0.02 * (2.0 * a + 5.0 * b + 8.0)) - 1.5;
            1.0 / (1.0 + (-sum).exp())
        };
        near(&scores(&[("x", 2)], nodes, constants, &[&[1.0, 2.0, 0.0, 3.0]]), &[want(1.0, 2.0), want(0.0, 3.0)]);
    }

    #[test]
    fn norms_and_concatenations() {
        let nodes = vec![
            node("Concat", "x z", "all", &[("axis", 1.0)]),
            node("BatchNormalization", "all g b m v", "n", &[("epsilon", 0.0)]),
            node("LayerNormalization", "n one zero", "l", &[("axis", -1.0), ("epsilon", 0.0)]),
            node("MatMul", "l w", "y", &[]),
        ];
        let constants = vec![
            floats("g", &[3], &[1.0, 2.0, 1.0]),
            floats("b", &[3], &[0.0, 1.0, 0.0]),
            floats("m", &[3], &[1.0, 1.0, 0.0]),
            floats("v", &[3], &[4.0, 4.0, 1.0]),
            floats("one", &[3], &[1.0; 3]),
            floats("zero", &[3], &[0.5; 3]),
            floats("w", &[3, 1], &[1.0, 0.0, 0.0]),
        ];
        // (3-1)/2 = 1, 2*(3-1)/2+1 = 3, 2: mean 2, variance 2/3; the first is -1 / sqrt(2/3) + 0.5.
        let got = scores(&[("x", 2), ("z", 1)], nodes, constants, &[&[3.0, 3.0], &[2.0]]);
        near(&got, &[0.5 - 1.5f32.sqrt()]);
    }

    #[test]
    fn interactions_and_factorisation() {
        // Fields [1, 2] and [3, 4]: their product is 11; sums over fields 4 and 6.
        let nodes = vec![
            node("Reshape", "x shape", "f", &[]),
            node("Transpose", "f", "t", &[]),
            node("MatMul", "f t", "z", &[]),
            node("Reshape", "z flat", "zf", &[]),
            node("Gather", "zf below", "dot", &[("axis", 1.0)]),
            node("ReduceSum", "f axis", "total", &[("keepdims", 0.0)]),
            node("Mul", "total total", "sq", &[]),
            node("ReduceSum", "sq axis", "fm", &[("keepdims", 1.0)]),
            node("Mul", "fm half", "h", &[]),
            node("Add", "dot h", "y", &[]),
        ];
        let mut nodes = nodes;
        nodes[1].attribute =
            vec![AttributeProto { name: Some("perm".into()), ints: vec![0, 2, 1], ..AttributeProto::default() }];
        let constants = vec![
            whole("shape", &[3], &[-1, 2, 2]),
            whole("flat", &[2], &[-1, 4]),
            whole("below", &[1], &[2]),
            whole("axis", &[1], &[1]),
            floats("half", &[], &[0.5]),
        ];
        near(&scores(&[("x", 4)], nodes, constants, &[&[1.0, 2.0, 3.0, 4.0]]), &[11.0 + 0.5 * (16.0 + 36.0)]);
    }

    #[test]
    fn embeddings_slices_and_shapes() {
        let nodes = vec![
            node("Slice", "x from to one", "id", &[]),
            node("Cast", "id", "whole", &[]),
            node("Gather", "table whole", "e", &[("axis", 0.0)]),
            node("Shape", "x", "size", &[]),
            node("Gather", "size zero", "n", &[("axis", 0.0)]),
            node("Unsqueeze", "n zero", "n1", &[]),
            node("Concat", "n1 two", "flat", &[("axis", 0.0)]),
            node("Reshape", "e flat", "row", &[]),
            node("Slice", "x one three one", "rest", &[]),
            node("Mul", "row rest", "p", &[]),
            node("Softplus", "p", "s", &[]),
            node("ReduceMean", "s one", "y", &[]),
        ];
        let constants = vec![
            whole("from", &[1], &[0]),
            whole("to", &[1], &[1]),
            whole("one", &[1], &[1]),
            whole("zero", &[1], &[0]),
            whole("two", &[1], &[2]),
            whole("three", &[1], &[i64::MAX]),
            floats("table", &[2, 2], &[1.0, 2.0, -3.0, 4.0]),
        ];
        let softplus = |v: f32| (1.0 + v.exp()).ln();
        let graph = read(&model(&[("x", 3)], nodes.clone(), constants.clone()), &[("x", 3)], &["y"]).unwrap();
        assert_eq!(graph.places(), [[2, 0, 0]]);
        let got = scores(&[("x", 3)], nodes, constants, &[&[1.0, 0.5, 0.25, 5.0, 1.0, 1.0]]);
        near(&got[..1], &[(softplus(-1.5) + softplus(1.0)) / 2.0]);
        assert!(got[1].is_nan(), "no row 5");
    }

    #[test]
    fn other_graphs_are_named() {
        let refused = |nodes: Vec<NodeProto>, constants: Vec<TensorProto>| {
            read(&model(&[("x", 2)], nodes, constants), &[("x", 2)], &["y"]).unwrap_err()
        };
        let w = || floats("w", &[2, 1], &[1.0, 2.0]);
        let error = refused(vec![node("TopK", "x", "y", &[])], vec![]);
        assert_eq!(error, "node `TopK0` (TopK): not known to the engine for dense networks");
        assert!(refused(vec![node("Relu", "z", "y", &[])], vec![]).contains("`z` can't be read"));
        assert!(refused(vec![node("MatMul", "w x", "y", &[])], vec![w()]).contains("stand on the left"));
        assert!(refused(vec![node("MatMul", "x w", "z", &[])], vec![w()]).contains("`y` does not depend"));
        assert!(refused(vec![node("Softmax", "x", "y", &[("axis", 0.0)])], vec![]).contains("works across rows"));
        assert!(refused(vec![node("Relu", "x", "y", &[])], vec![]).contains("2 values a row"));
        let short = floats("w", &[2, 2], &[1.0, 2.0]);
        assert!(refused(vec![node("MatMul", "x w", "y", &[])], vec![short]).contains("`w` can't be read"));
        let tall = floats("w", &[3, 1], &[1.0, 2.0, 3.0]);
        assert!(refused(vec![node("MatMul", "x w", "y", &[])], vec![tall]).contains("for rows of [2]"));
        let huge = vec![whole("to", &[2], &[1, i64::MAX]), floats("w", &[1, 1], &[1.0])];
        assert!(refused(vec![node("Expand", "x to", "y", &[])], huge).contains("do not fit"));
        assert!(read(&model(&[("x", 2), ("u", 2)], vec![], vec![]), &[("x", 2)], &["y"]).unwrap_err().contains("`u`"));
    }

    #[test]
    fn ids_that_features_cannot_hold_are_refused() {
        let rows = |n: i64| {
            let dims = vec![n, 8];
            vec![
                TensorProto { name: Some("table".into()), dims, ..TensorProto::default() },
                whole("size", &[], &[4096]),
            ]
        };
        let picked = |by: &str| {
            vec![
                node("Cast", "id", "whole", &[]),
                node("Squeeze", "whole", "one", &[]),
                node("Mul", "one size", "high", &[]),
                node("Gather", &format!("table {by}"), "y", &[]),
            ]
        };
        let check = |nodes: Vec<NodeProto>, n: i64| check_ids(&model(&[("id", 1)], nodes, rows(n)));
        let reason = check(picked("one"), (1 << 24) + 2).unwrap_err();
        let parts = ["node `Gather0` (Gather)", "16777218 rows", "`id`", "16777216"];
        assert!(parts.iter().all(|part| reason.contains(part)), "{reason}");
        assert_eq!(check(picked("one"), (1 << 24) + 1), Ok(()));
        // Put together of two columns, or known at load.
        assert_eq!(check(picked("high"), 1 << 30), Ok(()));
        assert_eq!(check(picked("size"), 1 << 30), Ok(()));
    }
}
