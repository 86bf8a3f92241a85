//! ONNX graphs whose score comes from tree ensembles (`ai.onnx.ml`), as LightGBM, XGBoost and scikit-learn are exported; the
//! general runtime does not have these operators.
//!
//! Where the operators' text is silent (one column of votes for two classes, base values of two classes), ONNX Runtime is followed.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use rten_onnx::onnx::{AttributeProto, DataType, GraphProto, ModelProto, NodeProto, TensorProto};

use super::manifest::RankerManifest;
use super::trees::{Column, Forest, Node, ROWS, Test, Tree};
use super::{RankError, Ranker};
use crate::index::Kernel;

/// Nodes that may lie between the ensemble and the score; more is a circle.
const MAX_STEPS: usize = 64;

/// A ranker made of tree ensembles and what little stands around them.
pub struct TreeRanker {
    name: String,
    /// Values per row of each input.
    widths: Vec<usize>,
    ensembles: Vec<Ensemble>,
    program: Vec<Step>,
    /// `[ensembles' most features]`
    features: Vec<Column>,
    /// What the program works on; the scores end up in the first.
    values: Vec<Column>,
}

/// One operator.
#[derive(Debug)]
struct Ensemble {
    /// Input and position of each feature that the forest reads.
    features: Vec<(usize, usize)>,
    forest: Forest,
    /// Times the sums, before the base values; 1 / trees for an average.
    scale: f32,
    /// `[n_targets]`
    base: Vec<f32>,
    post: Post,
    binary: Option<Binary>,
}

/// What follows the sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Post {
    None,
    Logistic,
    Softmax,
}

/// How one column of votes becomes two classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Binary {
    /// No vote is negative, and no logistic follows: the sum is a probability, s becomes 1 - s and s.
    Share,
    /// s becomes -s and s, then the transform.
    Margin,
}

impl Ensemble {
    fn n_columns(&self) -> usize {
        self.forest.n_targets() + usize::from(self.binary.is_some())
    }

    fn finish(&self, n: usize, values: &mut [Column]) {
        for (column, base) in values.iter_mut().zip(&self.base) {
            column.0[..n].iter_mut().for_each(|v| *v = *v * self.scale + base);
        }
        if let Some(binary) = self.binary {
            let (other, column) = values.split_at_mut(1);
            for (other, v) in other[0].0[..n].iter_mut().zip(&mut column[0].0[..n]) {
                *v = *other;
                *other = if binary == Binary::Share { 1.0 - *v } else { -*v };
            }
        }
        match self.post {
            Post::Logistic => {
                values.iter_mut().flat_map(|c| &mut c.0[..n]).for_each(|v| *v = logistic(*v));
            }
            Post::Softmax if self.binary.is_none() && values.len() > 1 => {
                for row in 0..n {
                    let most = values.iter().fold(f32::NEG_INFINITY, |most, c| most.max(c.0[row]));
                    let mut sum = 0.0;
                    for column in &mut *values {
                        column.0[row] = (column.0[row] - most).exp();
                        sum += column.0[row];
                    }
                    values.iter_mut().for_each(|c| c.0[row] /= sum);
                }
            }
            _ => {}
        }
    }
}

/// Of -v exactly 1 minus that of v, as near as f32 comes.
fn logistic(v: f32) -> f32 {
    let small = 1.0 / (1.0 + v.abs().exp());
    if v < 0.0 { small } else { 1.0 - small }
}

/// A step from ensembles to the score; the numbers are places in `values`.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Step {
    /// Writes the ensemble's columns from `at`.
    Score { ensemble: usize, at: usize },
    /// Changes every value of `n` columns from `at`.
    Map { change: Change, at: usize, n: usize },
    /// Adds `n` columns from `from` to those from `at`.
    Add { at: usize, from: usize, n: usize },
    /// Puts the column `from` to `at`.
    Pick { at: usize, from: usize },
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Change {
    Times(f32),
    Over(f32),
    Plus(f32),
    Minus(f32),
    Exp,
    Logistic,
}

impl Change {
    fn of(self, v: f32) -> f32 {
        match self {
            Change::Times(c) => v * c,
            Change::Over(c) => v / c,
            Change::Plus(c) => v + c,
            Change::Minus(c) => v - c,
            Change::Exp => v.exp(),
            Change::Logistic => logistic(v),
        }
    }
}

/// Loads a model if it has tree ensembles; `None` if it has none. `widths` are the values per row of the manifest's inputs.
///
/// # Errors
/// What makes the ensembles, or what is around them, something that can't be scored; it names the node, and the tree.
pub fn load(
    name: &str,
    onnx: &Path,
    manifest: &RankerManifest,
    widths: &[usize],
) -> Result<Option<TreeRanker>, RankError> {
    let wrong = |reason: String| RankError { ranker: name.to_owned(), reason };
    let read =
        || ModelProto::parse_file(std::fs::File::open(onnx).map_err(|e| e.to_string())?).map_err(|e| e.to_string());
    let model = read().map_err(|e| wrong(format!("{}: {e}", onnx.display())))?;
    match &model.graph {
        Some(graph) if graph.node.iter().any(is_ensemble) => {
            TreeRanker::compile(name, graph, manifest, widths, Kernel::detect()).map(Some).map_err(wrong)
        }
        _ => Ok(None),
    }
}

impl TreeRanker {
    fn compile(
        name: &str,
        graph: &GraphProto,
        manifest: &RankerManifest,
        widths: &[usize],
        kernel: Kernel,
    ) -> Result<Self, String> {
        let mut compiler = Compiler::new(graph, manifest, widths, kernel)?;
        let output = manifest.output.name.as_str();
        if !graph.output.iter().any(|o| o.name.as_deref() == Some(output)) {
            let known: Vec<&str> = graph.output.iter().filter_map(|o| o.name.as_deref()).collect();
            return Err(format!("no output `{output}`; the model has {}", known.join(", ")));
        }
        match compiler.value(output, 0, 0)? {
            1 => {}
            // Of two classes the second is the one that one wants.
            2 if compiler.ensembles.iter().all(|e| e.n_columns() == 2) => {
                compiler.program.push(Step::Pick { at: 0, from: 1 });
            }
            n => return Err(format!("`{output}` has {n} values a row, and nothing says which is the score")),
        }
        let features = compiler.ensembles.iter().map(|e| e.features.len()).max().unwrap_or(0);
        Ok(TreeRanker {
            name: name.to_owned(),
            widths: widths.to_vec(),
            ensembles: compiler.ensembles,
            program: compiler.program,
            features: vec![Column([0.0; ROWS]); features],
            values: vec![Column([0.0; ROWS]); compiler.n_values],
        })
    }
}

impl Ranker for TreeRanker {
    fn name(&self) -> &str {
        &self.name
    }

    fn rows_are_independent(&self) -> bool {
        true
    }

    fn score(&mut self, inputs: &[Vec<f32>], n: usize, scores: &mut Vec<f32>) -> Result<(), RankError> {
        scores.clear();
        let sizes = inputs.iter().map(Vec::len);
        if sizes.ne(self.widths.iter().map(|width| n * width)) {
            let sizes: Vec<usize> = inputs.iter().map(Vec::len).collect();
            let reason = format!("inputs of {sizes:?} values for {n} rows of {:?}", self.widths);
            return Err(RankError { ranker: self.name.clone(), reason });
        }
        let TreeRanker { widths, ensembles, program, features, values, .. } = self;
        for first in (0..n).step_by(ROWS) {
            let n = ROWS.min(n - first);
            for step in &*program {
                match *step {
                    Step::Score { ensemble, at } => {
                        let ensemble = &ensembles[ensemble];
                        for row in 0..n {
                            for (column, &(input, place)) in features.iter_mut().zip(&ensemble.features) {
                                column.0[row] = inputs[input][(first + row) * widths[input] + place];
                            }
                        }
                        let values = &mut values[at..at + ensemble.n_columns()];
                        values.fill(Column([0.0; ROWS]));
                        ensemble.forest.score(features, n, values);
                        ensemble.finish(n, values);
                    }
                    Step::Map { change, at, n: columns } => {
                        let values = values[at..at + columns].iter_mut().flat_map(|c| &mut c.0[..n]);
                        values.for_each(|v| *v = change.of(*v));
                    }
                    Step::Add { at, from, n: columns } => {
                        let (to, from) = values.split_at_mut(from);
                        for (to, from) in to[at..].iter_mut().zip(&from[..columns]) {
                            to.0.iter_mut().zip(&from.0).for_each(|(to, from)| *to += from);
                        }
                    }
                    Step::Pick { at, from } => values[at] = values[from],
                }
            }
            scores.extend_from_slice(&values[0].0[..n]);
        }
        Ok(())
    }
}

fn is_ensemble(node: &NodeProto) -> bool {
    let kind = node.op_type.as_deref().unwrap_or_default();
    let kinds = ["TreeEnsembleRegressor", "TreeEnsembleClassifier", "TreeEnsemble"];
    node.domain.as_deref() == Some("ai.onnx.ml") && kinds.contains(&kind)
}

/// How messages call a node.
fn named(node: &NodeProto) -> String {
    match node.name.as_deref() {
        Some(name) if !name.is_empty() => format!("node `{name}`"),
        _ => format!("the node of `{}`", node.output.first().map_or("?", String::as_str)),
    }
}

/// Follows a graph back from its score.
struct Compiler<'a> {
    graph: &'a GraphProto,
    inputs: Vec<&'a str>,
    widths: &'a [usize],
    kernel: Kernel,
    ensembles: Vec<Ensemble>,
    program: Vec<Step>,
    n_values: usize,
}

impl<'a> Compiler<'a> {
    fn new(
        graph: &'a GraphProto,
        manifest: &'a RankerManifest,
        widths: &'a [usize],
        kernel: Kernel,
    ) -> Result<Self, String> {
        let inputs: Vec<&str> = manifest.inputs.iter().map(|i| i.name.as_str()).collect();
        let constant = |name: &str| graph.initializer.iter().any(|t| t.name.as_deref() == Some(name));
        let known: Vec<&str> = graph.input.iter().filter_map(|i| i.name.as_deref()).filter(|n| !constant(n)).collect();
        if let Some(name) = inputs.iter().find(|name| !known.contains(name)) {
            return Err(format!("no input `{name}`; the model has {}", known.join(", ")));
        }
        if inputs.len() != known.len() {
            return Err(format!("the manifest fills {} of the model's inputs {}", inputs.len(), known.join(", ")));
        }
        Ok(Compiler { graph, inputs, widths, kernel, ensembles: Vec::new(), program: Vec::new(), n_values: 0 })
    }

    fn producer(&self, name: &str) -> Option<&'a NodeProto> {
        self.graph.node.iter().find(|node| node.output.iter().any(|output| output == name))
    }

    /// The one value of a constant.
    fn constant(&self, name: &str) -> Option<f64> {
        let tensor = self.graph.initializer.iter().find(|t| t.name.as_deref() == Some(name)).or_else(|| {
            let node = self.producer(name).filter(|node| node.op_type.as_deref() == Some("Constant"))?;
            attribute(node, "value")?.t.as_ref()
        })?;
        match numbers(tensor).as_deref() {
            Ok(&[value]) => Some(value),
            _ => None,
        }
    }

    /// Adds the steps that put `name` to the columns from `at`; returns how many columns there are.
    fn value(&mut self, name: &str, at: usize, depth: usize) -> Result<usize, String> {
        let node = self.producer(name).ok_or_else(|| format!("`{name}` does not come from a tree ensemble"))?;
        let of = |e: String| format!("{}: {e}", named(node));
        if depth > MAX_STEPS {
            return Err(of("too much, or a circle, after the trees".into()));
        }
        let kind = node.op_type.as_deref().unwrap_or_default();
        let input = |index: usize| node.input.get(index).map(String::as_str).unwrap_or_default();
        let n = match kind {
            _ if is_ensemble(node) => {
                if kind == "TreeEnsembleClassifier" && node.output.get(1).map(String::as_str) != Some(name) {
                    return Err(of(format!("`{name}` is the class; the score is in the other output")));
                }
                let columns = self.columns(input(0), 0)?;
                let ensemble = ensemble(node, &columns, self.kernel).map_err(of)?;
                let n = ensemble.n_columns();
                self.program.push(Step::Score { ensemble: self.ensembles.len(), at });
                self.ensembles.push(ensemble);
                n
            }
            "Identity" | "ZipMap" => self.value(input(0), at, depth + 1)?,
            "Cast" => match attribute(node, "to").and_then(|a| a.i) {
                // FLOAT and DOUBLE of the standard.
                Some(1 | 11) => self.value(input(0), at, depth + 1)?,
                _ => return Err(of("casts the score to something else than a float".into())),
            },
            "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" => match self.value(input(0), at, depth + 1)? {
                1 => 1,
                n => return Err(of(format!("gives another shape to {n} values a row"))),
            },
            "Gather" | "ArrayFeatureExtractor" => {
                let n = self.value(input(0), at, depth + 1)?;
                let axis = attribute(node, "axis").and_then(|a| a.i).unwrap_or(0);
                let index = self.constant(input(1)).map(|i| if i < 0.0 { i + n as f64 } else { i });
                match index {
                    Some(index)
                        if (0.0..n as f64).contains(&index) && (kind != "Gather" || axis == 1 || axis == -1) =>
                    {
                        self.program.push(Step::Pick { at, from: at + index as usize });
                        1
                    }
                    _ => return Err(of(format!("does not take one of the {n} values of a row"))),
                }
            }
            "Exp" | "Sigmoid" => {
                let n = self.value(input(0), at, depth + 1)?;
                let change = if kind == "Exp" { Change::Exp } else { Change::Logistic };
                self.program.push(Step::Map { change, at, n });
                n
            }
            "Mul" | "Div" | "Add" | "Sub" | "Sum" => {
                let constant = match (kind, node.input.len()) {
                    ("Sum", _) => None,
                    ("Mul" | "Add", 2) => self.constant(input(0)).map(|c| (c, 1)),
                    _ => None,
                };
                let constant = constant.or_else(|| self.constant(input(1)).filter(|_| kind != "Sum").map(|c| (c, 0)));
                match (constant, kind) {
                    (Some((c, other)), _) => {
                        let n = self.value(input(other), at, depth + 1)?;
                        let c = c as f32;
                        let change = match kind {
                            "Mul" => Change::Times(c),
                            "Div" => Change::Over(c),
                            "Add" => Change::Plus(c),
                            _ => Change::Minus(c),
                        };
                        self.program.push(Step::Map { change, at, n });
                        n
                    }
                    (None, "Add" | "Sum") if !node.input.is_empty() => {
                        let n = self.value(input(0), at, depth + 1)?;
                        for more in &node.input[1..] {
                            if self.value(more, at + n, depth + 1)? != n {
                                return Err(of("sums of different widths".into()));
                            }
                            self.program.push(Step::Add { at, from: at + n, n });
                        }
                        n
                    }
                    _ => return Err(of(format!("{kind} of something else than a number"))),
                }
            }
            _ => return Err(of(format!("{kind} after tree ensembles is not supported"))),
        };
        self.n_values = self.n_values.max(at + n);
        Ok(n)
    }

    /// Where each column of an ensemble's input comes from: input and position.
    fn columns(&self, name: &str, depth: usize) -> Result<Vec<(usize, usize)>, String> {
        if let Some(input) = self.inputs.iter().position(|input| *input == name) {
            return Ok((0..self.widths[input]).map(|place| (input, place)).collect());
        }
        let node = self.producer(name).ok_or_else(|| format!("`{name}` comes from nowhere"))?;
        let of = |e: &str| format!("{}: {e}", named(node));
        if depth > MAX_STEPS {
            return Err(of("too much, or a circle, before the trees"));
        }
        let integer = |name: &str| attribute(node, name).and_then(|a| a.i);
        match node.op_type.as_deref().unwrap_or_default() {
            "Identity" | "Cast" if node.input.len() != 1 => Err(of("one input is expected")),
            "Identity" => self.columns(&node.input[0], depth + 1),
            "Cast" if matches!(integer("to"), Some(1 | 11)) => self.columns(&node.input[0], depth + 1),
            "Concat" | "FeatureVectorizer" if matches!(integer("axis"), None | Some(1 | -1)) => {
                let parts: Result<Vec<_>, _> = node.input.iter().map(|part| self.columns(part, depth + 1)).collect();
                Ok(parts?.concat())
            }
            kind => Err(of(&format!("{kind} before tree ensembles is not supported"))),
        }
    }
}

fn attribute<'a>(node: &'a NodeProto, name: &str) -> Option<&'a AttributeProto> {
    node.attribute.iter().find(|a| a.name.as_deref() == Some(name))
}

/// The values of a tensor that lies in the file.
fn numbers(tensor: &TensorProto) -> Result<Vec<f64>, String> {
    let raw = tensor.raw_data.as_ref().map(|raw| raw.borrow());
    let raw = raw.as_ref().map(|raw| raw.as_slice()).filter(|raw| !raw.is_empty());
    let kind = tensor.data_type.ok_or("a tensor without a type")?;
    Ok(match (kind, raw) {
        (DataType::FLOAT, Some(raw)) => raw.as_chunks().0.iter().map(|&b| f64::from(f32::from_le_bytes(b))).collect(),
        (DataType::FLOAT, None) => tensor.float_data.iter().map(|&v| f64::from(v)).collect(),
        (DataType::DOUBLE, Some(raw)) => raw.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect(),
        (DataType::DOUBLE, None) => tensor.double_data.clone(),
        (DataType::INT64, Some(raw)) => raw.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b) as f64).collect(),
        (DataType::INT64, None) => tensor.int64_data.iter().map(|&v| v as f64).collect(),
        (DataType::INT32, Some(raw)) => raw.as_chunks().0.iter().map(|&b| f64::from(i32::from_le_bytes(b))).collect(),
        (DataType::UINT8, Some(raw)) => raw.iter().map(|&v| f64::from(v)).collect(),
        (DataType::INT32 | DataType::UINT8, None) => tensor.int32_data.iter().map(|&v| f64::from(v)).collect(),
        (kind, _) => return Err(format!("a tensor of type {}", kind.name().unwrap_or("?"))),
    })
}

/// The attributes of an ensemble.
struct Attributes<'a>(&'a NodeProto);

impl<'a> Attributes<'a> {
    fn ints(&self, name: &str) -> &'a [i64] {
        attribute(self.0, name).map_or(&[], |a| &a.ints)
    }

    fn int(&self, name: &str) -> Option<i64> {
        attribute(self.0, name).and_then(|a| a.i)
    }

    /// Of floats, or of a tensor, which is called by that name or by that of its own.
    fn numbers(&self, name: &str) -> Result<Vec<f64>, String> {
        let given = attribute(self.0, name);
        let tensor = given.filter(|a| a.t.is_some()).or_else(|| attribute(self.0, &format!("{name}_as_tensor")));
        match (tensor.and_then(|a| a.t.as_ref()), given) {
            (Some(tensor), _) => numbers(tensor).map_err(|e| format!("{name}: {e}")),
            (None, Some(given)) => Ok(given.floats.iter().map(|&v| f64::from(v)).collect()),
            (None, None) => Ok(Vec::new()),
        }
    }

    fn text(&self, name: &str) -> &'a str {
        attribute(self.0, name).and_then(|a| a.s.as_deref()).unwrap_or_default()
    }
}

/// A tree's node as the file has it.
#[derive(Clone, Debug)]
struct Raw {
    /// For messages.
    tree: i64,
    id: i64,
    kind: RawKind,
}

#[derive(Clone, Debug)]
enum RawKind {
    Leaf(Vec<(u32, f32)>),
    Split { feature: u32, mode: Mode, missing: bool, yes: usize, no: usize },
}

#[derive(Clone, Debug, PartialEq)]
enum Mode {
    AtMost(f64),
    Below(f64),
    AtLeast(f64),
    Above(f64),
    Is(f64),
    IsNot(f64),
    Among(Vec<f32>),
}

impl Mode {
    fn new(name: &str, value: f64) -> Result<Self, String> {
        if value.is_nan() {
            return Err("its threshold is not a number".into());
        }
        if value == f64::NEG_INFINITY && matches!(name, "BRANCH_LT" | "BRANCH_GTE") {
            return Err("nothing lies below its threshold".into());
        }
        Ok(match name {
            "BRANCH_LEQ" => Mode::AtMost(value),
            "BRANCH_LT" => Mode::Below(value),
            "BRANCH_GTE" => Mode::AtLeast(value),
            "BRANCH_GT" => Mode::Above(value),
            "BRANCH_EQ" => Mode::Is(value),
            "BRANCH_NEQ" => Mode::IsNot(value),
            _ => return Err(format!("no mode `{name}`")),
        })
    }
}

/// The largest f32 that is at most `value`: what an f32 is compared with instead.
fn at_most(value: f64) -> f32 {
    let near = value as f32;
    if f64::from(near) > value { near.next_down() } else { near }
}

/// The largest f32 below `value`.
fn below(value: f64) -> f32 {
    let near = value as f32;
    if f64::from(near) >= value { near.next_down() } else { near }
}

/// The value as an f32 if it is one: nothing else can equal it.
fn exactly(value: f64) -> Vec<f32> {
    if f64::from(value as f32) == value { vec![value as f32] } else { Vec::new() }
}

/// Makes one operator ready for an input of these columns.
fn ensemble(node: &NodeProto, columns: &[(usize, usize)], kernel: Kernel) -> Result<Ensemble, String> {
    let attributes = Attributes(node);
    let kind = node.op_type.as_deref().unwrap_or_default();
    let (raw, roots, n_targets) = match kind {
        "TreeEnsemble" => by_index(&attributes)?,
        _ => by_id(&attributes, kind == "TreeEnsembleClassifier")?,
    };
    let mut seen = vec![false; raw.len()];
    let built = roots.iter().map(|&root| tree(&raw, root, columns.len(), &mut seen));
    let mut trees: Vec<Tree> = built.collect::<Result<_, _>>()?;
    if let Some(lost) = raw.iter().zip(&seen).find_map(|(node, seen)| (!seen && node.tree >= 0).then_some(node)) {
        return Err(format!("tree {}, node {}: no branch leads to it", lost.tree, lost.id));
    }

    let scale = match (attributes.text("aggregate_function"), attributes.int("aggregate_function")) {
        ("SUM", _) | ("", None | Some(1)) => 1.0,
        ("AVERAGE", _) | ("", Some(0)) => 1.0 / trees.len() as f32,
        (text, number) => {
            return Err(format!("aggregate_function {text}{}", number.map_or(String::new(), |n| n.to_string())));
        }
    };
    let post = match (attributes.text("post_transform"), attributes.int("post_transform")) {
        ("NONE", _) | ("", None | Some(0)) => Post::None,
        ("SOFTMAX", _) | ("", Some(1)) => Post::Softmax,
        ("LOGISTIC", _) | ("", Some(2)) => Post::Logistic,
        (text, number) => {
            return Err(format!("post_transform {text}{}", number.map_or(String::new(), |n| n.to_string())));
        }
    };
    let mut base: Vec<f32> = attributes.numbers("base_values")?.iter().map(|&v| v as f32).collect();
    let mut votes = raw.iter().filter_map(|n| match &n.kind {
        RawKind::Leaf(votes) => Some(votes),
        RawKind::Split { .. } => None,
    });
    let (mut n_columns, mut binary) = (n_targets, None);
    if kind == "TreeEnsembleClassifier" && n_targets == 2 {
        if base.len() == 2 {
            return Err("two base values of two classes, which nobody agrees on".into());
        }
        if votes.clone().flatten().all(|vote| vote.0 == 0) {
            let negative = votes.any(|votes| votes.iter().any(|vote| vote.1 < 0.0));
            let share = !negative && post != Post::Logistic;
            (n_columns, binary) = (1, Some(if share { Binary::Share } else { Binary::Margin }));
        }
        base.resize(n_columns.min(base.len()), 0.0);
        // One base value is that of the first class.
        if !base.is_empty() {
            base.resize(n_columns, 0.0);
        }
    }
    match base.len() {
        0 => base = vec![0.0; n_columns],
        n if n == n_columns => {}
        n => return Err(format!("{n} base values for {n_columns} targets")),
    }

    // Only what is asked for is gathered.
    let mut used: Vec<u32> = Vec::new();
    let features = |tree: &mut Tree, each: &mut dyn FnMut(&mut u32)| {
        for node in &mut tree.0 {
            if let Node::Split { feature, .. } = node {
                each(feature);
            }
        }
    };
    trees.iter_mut().for_each(|tree| features(tree, &mut |feature| used.push(*feature)));
    used.sort_unstable();
    used.dedup();
    let place = |feature: u32| used.binary_search(&feature).unwrap_or_default() as u32;
    trees.iter_mut().for_each(|tree| features(tree, &mut |feature| *feature = place(*feature)));
    Ok(Ensemble {
        features: used.iter().map(|&feature| columns[feature as usize]).collect(),
        forest: Forest::new(&trees, n_columns, kernel),
        scale,
        base,
        post,
        binary,
    })
}

/// Nodes, roots and number of targets of the operators whose nodes have ids per tree.
fn by_id(attributes: &Attributes<'_>, classifier: bool) -> Result<(Vec<Raw>, Vec<usize>, usize), String> {
    let [trees, ids] = ["nodes_treeids", "nodes_nodeids"].map(|name| attributes.ints(name));
    let modes = attribute(attributes.0, "nodes_modes").map_or(&[][..], |a| &a.strings);
    let [features, yes, no] =
        ["nodes_featureids", "nodes_truenodeids", "nodes_falsenodeids"].map(|name| attributes.ints(name));
    let missing = attributes.ints("nodes_missing_value_tracks_true");
    let values = attributes.numbers("nodes_values")?;
    let n = trees.len();
    let lengths = [
        ("nodes_nodeids", ids.len()),
        ("nodes_modes", modes.len()),
        ("nodes_featureids", features.len()),
        ("nodes_truenodeids", yes.len()),
        ("nodes_falsenodeids", no.len()),
        ("nodes_values", values.len()),
        ("nodes_missing_value_tracks_true", if missing.is_empty() { n } else { missing.len() }),
    ];
    if let Some((name, len)) = lengths.iter().find(|(_, len)| *len != n) {
        return Err(format!("{len} {name} for {n} nodes_treeids"));
    }
    if n == 0 {
        return Err("no trees".into());
    }
    let mut places = HashMap::with_capacity(n);
    for at in 0..n {
        if places.insert((trees[at], ids[at]), at).is_some() {
            return Err(format!("tree {}, node {}: twice", trees[at], ids[at]));
        }
    }
    let [prefix, count] = if classifier { ["class", "class"] } else { ["target", "n_targets"] };
    let n_targets = match classifier {
        true => {
            let strings = attribute(attributes.0, "classlabels_strings").map_or(0, |a| a.strings.len());
            strings.max(attributes.ints("classlabels_int64s").len())
        }
        false => usize::try_from(attributes.int(count).unwrap_or(0)).unwrap_or(0),
    };
    if n_targets < 1 + usize::from(classifier) {
        return Err(format!("{n_targets} {}", if classifier { "classes" } else { "targets" }));
    }
    let list = |name: &str| attributes.ints(&format!("{prefix}_{name}"));
    let (vote_trees, vote_nodes, vote_targets) = (list("treeids"), list("nodeids"), list("ids"));
    let weights = attributes.numbers(&format!("{prefix}_weights"))?;
    if [vote_nodes.len(), vote_targets.len(), weights.len()] != [vote_trees.len(); 3] {
        return Err(format!("{prefix}_treeids, _nodeids, _ids and _weights differ in length"));
    }
    let mut votes: Vec<Vec<(u32, f32)>> = vec![Vec::new(); n];
    for (at, &weight) in weights.iter().enumerate() {
        let (tree, id, target) = (vote_trees[at], vote_nodes[at], vote_targets[at]);
        let of = |e: &str| format!("tree {tree}, node {id}: {e}");
        let &place = places.get(&(tree, id)).ok_or_else(|| of("a vote of a node that there is not"))?;
        if modes[place] != "LEAF" {
            return Err(of("a vote of a node that is not a leaf"));
        }
        let target = u32::try_from(target).ok().filter(|&t| (t as usize) < n_targets);
        let target = target.ok_or_else(|| of(&format!("a vote for {} of {n_targets}", vote_targets[at])))?;
        if !weight.is_finite() {
            return Err(of("a vote that is not a finite number"));
        }
        match votes[place].iter_mut().find(|vote| vote.0 == target) {
            Some(vote) => vote.1 += weight as f32,
            None => votes[place].push((target, weight as f32)),
        }
    }
    let mut raw = Vec::with_capacity(n);
    let (mut children, mut order) = (HashSet::new(), Vec::new());
    for at in 0..n {
        let of = |e: String| format!("tree {}, node {}: {e}", trees[at], ids[at]);
        if order.last() != Some(&trees[at]) && !order.contains(&trees[at]) {
            order.push(trees[at]);
        }
        let kind = if modes[at] == "LEAF" {
            RawKind::Leaf(std::mem::take(&mut votes[at]))
        } else {
            let mut child = |branch: &str, id: i64| {
                let place = places.get(&(trees[at], id)).copied();
                let place =
                    place.ok_or_else(|| of(format!("its {branch} branch is node {id}, which the tree lacks")))?;
                children.insert(place);
                Ok::<_, String>(place)
            };
            let (yes, no) = (child("true", yes[at])?, child("false", no[at])?);
            let feature = u32::try_from(features[at]).map_err(|_| of(format!("feature {}", features[at])))?;
            let mode = Mode::new(&modes[at], values[at]).map_err(of)?;
            RawKind::Split { feature, mode, missing: missing.get(at).is_some_and(|&m| m != 0), yes, no }
        };
        raw.push(Raw { tree: trees[at], id: ids[at], kind });
    }
    let mut roots: HashMap<i64, usize> = HashMap::new();
    for at in (0..n).filter(|at| !children.contains(at)) {
        if let Some(first) = roots.insert(trees[at], at) {
            return Err(format!("tree {}: no branch leads to nodes {} and {}", trees[at], ids[first], ids[at]));
        }
    }
    let root = |tree: &i64| roots.get(tree).copied().ok_or_else(|| format!("tree {tree}: a circle without a root"));
    Ok((raw, order.iter().map(root).collect::<Result<_, _>>()?, n_targets))
}

/// As [`by_id`], of the operator whose nodes are known by their position.
fn by_index(attributes: &Attributes<'_>) -> Result<(Vec<Raw>, Vec<usize>, usize), String> {
    const MODES: [&str; 6] = ["BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ"];
    let features = attributes.ints("nodes_featureids");
    let [yes, no] = ["nodes_truenodeids", "nodes_falsenodeids"].map(|name| attributes.ints(name));
    let [yes_leaf, no_leaf] = ["nodes_trueleafs", "nodes_falseleafs"].map(|name| attributes.ints(name));
    let missing = attributes.ints("nodes_missing_value_tracks_true");
    let (values, modes) = (attributes.numbers("nodes_splits")?, attributes.numbers("nodes_modes")?);
    let (targets, weights) = (attributes.ints("leaf_targetids"), attributes.numbers("leaf_weights")?);
    let n = features.len();
    let lengths = [
        ("nodes_truenodeids", yes.len()),
        ("nodes_falsenodeids", no.len()),
        ("nodes_trueleafs", yes_leaf.len()),
        ("nodes_falseleafs", no_leaf.len()),
        ("nodes_splits", values.len()),
        ("nodes_modes", modes.len()),
        ("nodes_missing_value_tracks_true", if missing.is_empty() { n } else { missing.len() }),
    ];
    if let Some((name, len)) = lengths.iter().find(|(_, len)| *len != n) {
        return Err(format!("{len} {name} for {n} nodes_featureids"));
    }
    if targets.len() != weights.len() {
        return Err(format!("{} leaf_targetids for {} leaf_weights", targets.len(), weights.len()));
    }
    let roots = attributes.ints("tree_roots");
    let n_targets = usize::try_from(attributes.int("n_targets").unwrap_or(0)).unwrap_or(0);
    if roots.is_empty() || n_targets == 0 {
        return Err(format!("{} trees for {n_targets} targets", roots.len()));
    }
    let tree_of = |root: i64| roots.iter().position(|&r| r == root);
    let members = attributes.numbers("membership_values")?;
    let mut members = members.split(|v| v.is_nan());
    let (mut raw, mut tree) = (Vec::with_capacity(n + weights.len()), 0);
    for at in 0..n {
        tree = tree_of(at as i64).unwrap_or(tree);
        let of = |e: String| format!("tree {tree}, node {at}: {e}");
        let place = |branch: &str, index: i64, leaf: i64| {
            let (len, from) = if leaf != 0 { (weights.len(), n) } else { (n, 0) };
            let index = usize::try_from(index).ok().filter(|&index| index < len);
            index.map(|index| from + index).ok_or_else(|| of(format!("its {branch} branch leads nowhere")))
        };
        let (yes, no) = (place("true", yes[at], yes_leaf[at])?, place("false", no[at], no_leaf[at])?);
        let mode = match modes[at] {
            6.0 => {
                let values = members.next().ok_or_else(|| of("no membership_values are left for it".into()))?;
                Mode::Among(values.iter().flat_map(|&v| exactly(v)).collect())
            }
            mode => {
                let name = MODES.get(mode as usize).ok_or_else(|| of(format!("no mode {mode}")))?;
                Mode::new(name, values[at]).map_err(of)?
            }
        };
        let feature = u32::try_from(features[at]).map_err(|_| of(format!("feature {}", features[at])))?;
        let missing = missing.get(at).is_some_and(|&m| m != 0);
        raw.push(Raw { tree: tree as i64, id: at as i64, kind: RawKind::Split { feature, mode, missing, yes, no } });
    }
    for (at, (&target, &weight)) in targets.iter().zip(&weights).enumerate() {
        let known = u32::try_from(target).ok().filter(|&t| (t as usize) < n_targets && weight.is_finite());
        let target = known.ok_or_else(|| format!("leaf {at}: a vote of {weight} for {target} of {n_targets}"))?;
        raw.push(Raw { tree: -1, id: at as i64, kind: RawKind::Leaf(vec![(target, weight as f32)]) });
    }
    let root = |&root: &i64| {
        let place = usize::try_from(root).ok().filter(|&root| root < n);
        place.ok_or_else(|| format!("a tree has its root at node {root} of {n}"))
    };
    Ok((raw, roots.iter().map(root).collect::<Result<_, _>>()?, n_targets))
}

/// A tree in the one form that is scored. Tests for one value after another that lead to the same node, as exporters write
/// categories, become one test; a node with several parents is there once for each.
fn tree(raw: &[Raw], root: usize, n_features: usize, seen: &mut [bool]) -> Result<Tree, String> {
    let mut nodes: Vec<Node> = Vec::new();
    let mut open = vec![(root, None)];
    while let Some((at, parent)) = open.pop() {
        let of = |e: String| format!("tree {}, node {}: {e}", raw[at].tree, raw[at].id);
        if nodes.len() > 4 * raw.len() {
            return Err(of("its branches form a circle, or too many share it".into()));
        }
        seen[at] = true;
        let new = nodes.len() as u32;
        if let Some((parent, branch)) = parent
            && let Node::Split { yes, no, .. } = &mut nodes[parent as usize]
        {
            *(if branch { yes } else { no }) = new;
        }
        let (feature, mode, missing, mut yes, mut no) = match &raw[at].kind {
            RawKind::Leaf(votes) => {
                nodes.push(Node::Leaf(votes.clone()));
                continue;
            }
            RawKind::Split { feature, mode, missing, yes, no } => (*feature, mode, *missing, *yes, *no),
        };
        if feature as usize >= n_features {
            return Err(of(format!("asks for feature {feature} of {n_features}")));
        }
        let (test, turned, missing) = match mode {
            Mode::AtMost(value) => (Test::AtMost(at_most(*value)), false, missing),
            Mode::Below(value) => (Test::AtMost(below(*value)), false, missing),
            Mode::Above(value) => (Test::AtMost(at_most(*value)), true, !missing),
            Mode::AtLeast(value) => (Test::AtMost(below(*value)), true, !missing),
            // What is not a number is not equal to anything.
            Mode::IsNot(value) => (Test::In(exactly(*value)), true, false),
            Mode::Among(values) => (Test::In(values.clone()), false, missing),
            Mode::Is(value) => {
                let mut values = exactly(*value);
                while let RawKind::Split { feature: f, mode: Mode::Is(value), missing: m, yes: y, no: n } =
                    &raw[no].kind
                    && (*f, *m, *y) == (feature, missing, yes)
                    && values.len() < raw.len()
                {
                    seen[no] = true;
                    values.extend(exactly(*value));
                    no = *n;
                }
                (Test::In(values), false, missing)
            }
        };
        if turned {
            (yes, no) = (no, yes);
        }
        nodes.push(Node::Split { feature, test, missing, yes: 0, no: 0 });
        open.push((no, Some((new, false))));
        open.push((yes, Some((new, true))));
    }
    Ok(Tree(nodes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn golden(file: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/trees").join(file)
    }

    fn graph(name: &str) -> GraphProto {
        let file = std::fs::File::open(golden(&format!("{name}.onnx"))).unwrap();
        ModelProto::parse_file(file).unwrap().graph.unwrap()
    }

    fn manifest(output: &str) -> RankerManifest {
        toml::from_str(&format!("[[inputs]]\nname = \"x\"\ncolumns = []\n[output]\nname = \"{output}\"")).unwrap()
    }

    #[test]
    fn exported_models_score_as_in_onnx_runtime() {
        for name in ["forest", "modes", "ranker", "split", "xgboost", "zipmap"] {
            let text = std::fs::read_to_string(golden(&format!("{name}.json"))).unwrap();
            let json: serde_json::Value = serde_json::from_str(&text).unwrap();
            let number = |v: &serde_json::Value| v.as_f64().map_or(f32::NAN, |v| v as f32);
            let rows: Vec<Vec<f32>> = serde_json::from_value::<Vec<Vec<serde_json::Value>>>(json["rows"].clone())
                .unwrap()
                .iter()
                .map(|row| row.iter().map(number).collect())
                .collect();
            let want: Vec<f32> = json["scores"].as_array().unwrap().iter().map(number).collect();
            let manifest = manifest(json["output"].as_str().unwrap());
            for kernel in Kernel::available() {
                let mut ranker = TreeRanker::compile(name, &graph(name), &manifest, &[6], kernel).unwrap();
                let (mut scores, mut one) = (Vec::new(), Vec::new());
                // More rows than are scored together, and not a multiple.
                let all: Vec<f32> = rows.iter().chain(&rows).chain(&rows).flatten().copied().collect();
                ranker.score(&[all], 3 * rows.len(), &mut scores).unwrap();
                for (at, score) in scores.iter().enumerate() {
                    let want = want[at % rows.len()];
                    // Sums in another order, and another exp.
                    let near = (score - want).abs() <= 2e-6 * (1.0 + want.abs());
                    assert!(near, "{name} {kernel:?} row {at}: {score}, not {want}");
                    ranker.score(&[rows[at % rows.len()].clone()], 1, &mut one).unwrap();
                    assert_eq!(one[0].to_bits(), score.to_bits(), "alone as in the batch");
                }
            }
        }
    }

    #[test]
    fn a_model_without_trees_is_somebody_elses() {
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("engines/demo.onnx");
        assert!(load("demo", &demo, &RankerManifest::default(), &[]).unwrap().is_none());
        let ranker = load("m", &golden("modes.onnx"), &manifest("score"), &[6]).unwrap();
        let mut ranker = ranker.unwrap();
        let mut scores = vec![1.0];
        let error = ranker.score(&[vec![0.0; 5]], 1, &mut scores).unwrap_err().to_string();
        assert!(error.contains("`m`") && error.contains("[5] values for 1 rows of [6]"), "{error}");
        assert!(scores.is_empty());
        assert!(ranker.score(&[vec![0.0; 6], vec![0.0; 6]], 1, &mut scores).is_err());
        ranker.score(&[Vec::new()], 0, &mut scores).unwrap();
        assert!(scores.is_empty());
    }

    #[test]
    fn two_classes_follow_onnx_runtime() {
        // Class ids, weights, base values, transform; the score of the second class as ONNX Runtime 1.32 gives it.
        type Case = (&'static [i64], [f32; 2], &'static [f32], &'static str, f32);
        let cases: [Case; 11] = [
            (&[0, 0], [0.2, 0.5], &[], "NONE", 0.7),
            (&[0, 0], [0.2, 0.5], &[0.1], "NONE", 0.8),
            (&[0, 0], [0.2, -0.5], &[0.1], "NONE", -0.2),
            (&[0, 0], [0.2, 0.5], &[], "LOGISTIC", 0.668_187_74),
            (&[0, 0], [0.2, -0.5], &[0.1], "LOGISTIC", 0.450_166),
            (&[0, 0], [0.2, -0.5], &[], "SOFTMAX", -0.3),
            (&[1, 1], [0.2, 0.5], &[0.1], "NONE", 0.7),
            (&[1, 1], [0.2, -0.5], &[], "LOGISTIC", 0.425_557_5),
            (&[0, 1], [0.2, 0.5], &[0.1], "LOGISTIC", 0.622_459_35),
            (&[0, 1], [0.2, -0.5], &[], "SOFTMAX", 0.331_812_03),
            (&[0, 1], [0.2, -0.5], &[0.1], "SOFTMAX", 0.310_025_54),
        ];
        for (ids, weights, base, post, want) in cases {
            let mut graph = graph("xgboost");
            let node = graph.node.iter_mut().find(|n| is_ensemble(n)).unwrap();
            let mut ints = |name: &str, values: &[i64]| put(node, name, |a| a.ints = values.to_vec());
            ints("nodes_treeids", &[0, 1]);
            ints("nodes_nodeids", &[0, 0]);
            ints("nodes_featureids", &[0, 0]);
            ints("nodes_truenodeids", &[0, 0]);
            ints("nodes_falsenodeids", &[0, 0]);
            ints("nodes_missing_value_tracks_true", &[]);
            ints("class_treeids", &[0, 1]);
            ints("class_nodeids", &[0, 0]);
            ints("class_ids", ids);
            put(node, "nodes_values", |a| a.floats = vec![0.0; 2]);
            put(node, "nodes_modes", |a| a.strings = vec!["LEAF".into(); 2]);
            put(node, "class_weights", |a| a.floats = weights.to_vec());
            put(node, "base_values", |a| a.floats = base.to_vec());
            put(node, "post_transform", |a| a.s = Some(post.into()));
            let manifest = manifest("probabilities");
            let mut ranker = TreeRanker::compile("m", &graph, &manifest, &[6], Kernel::Portable).unwrap();
            let mut scores = Vec::new();
            ranker.score(&[vec![0.0; 6]], 1, &mut scores).unwrap();
            assert!((scores[0] - want).abs() < 1e-6, "{ids:?} {weights:?} {base:?} {post}: {} {want}", scores[0]);
        }
    }

    /// Changes an attribute, or adds it.
    fn put(node: &mut NodeProto, name: &str, change: impl FnOnce(&mut AttributeProto)) {
        if !node.attribute.iter().any(|a| a.name.as_deref() == Some(name)) {
            node.attribute.push(AttributeProto { name: Some(name.to_owned()), ..AttributeProto::default() });
        }
        change(node.attribute.iter_mut().find(|a| a.name.as_deref() == Some(name)).unwrap());
    }

    #[test]
    fn malformed_ensembles_name_the_node_and_the_tree() {
        type Damage = fn(&mut NodeProto);
        let cases: [(Damage, &str); 17] = [
            (|n| put(n, "nodes_truenodeids", |a| a.ints[3] = 9), "tree 1, node 0: its true branch is node 9"),
            (|n| put(n, "nodes_falsenodeids", |a| a.ints[0] = 0), "tree 0, node 0: no branch leads to it"),
            (|n| put(n, "nodes_truenodeids", |a| a.ints[0] = 2), "tree 0: no branch leads to nodes 0 and 1"),
            (|n| put(n, "nodes_nodeids", |a| a.ints[2] = 1), "tree 0, node 1: twice"),
            (|n| put(n, "nodes_featureids", |a| a.ints[6] = 6), "tree 2, node 0: asks for feature 6 of 6"),
            (|n| put(n, "nodes_featureids", |a| a.ints[6] = -1), "tree 2, node 0: feature -1"),
            (|n| put(n, "nodes_modes", |a| a.strings[0] = "BRANCH".into()), "tree 0, node 0: no mode `BRANCH`"),
            (|n| put(n, "nodes_modes", |a| a.strings[1] = "BRANCH_LT".into()), "tree 0, node 1: a vote of a node"),
            (|n| put(n, "nodes_values", |a| a.floats[0] = f32::NAN), "tree 0, node 0: its threshold"),
            (|n| put(n, "nodes_values", |a| a.floats.truncate(35)), "35 nodes_values for 36 nodes_treeids"),
            (|n| put(n, "target_nodeids", |a| a.ints[0] = 7), "tree 0, node 7: a vote of a node that there is not"),
            (|n| put(n, "target_ids", |a| a.ints[0] = 1), "tree 0, node 1: a vote for 1 of 1"),
            (|n| put(n, "target_weights", |a| a.floats[0] = f32::INFINITY), "tree 0, node 1: a vote that is not"),
            (|n| put(n, "target_ids", |a| a.ints.truncate(23)), "differ in length"),
            (|n| put(n, "aggregate_function", |a| a.s = Some("MAX".into())), "aggregate_function MAX"),
            (|n| put(n, "post_transform", |a| a.s = Some("PROBIT".into())), "post_transform PROBIT"),
            (|n| put(n, "base_values", |a| a.floats = vec![1.0; 3]), "3 base values for 1 targets"),
        ];
        for (damage, says) in cases {
            let mut graph = graph("modes");
            damage(graph.node.iter_mut().find(|n| is_ensemble(n)).unwrap());
            let error = TreeRanker::compile("m", &graph, &manifest("score"), &[6], Kernel::Portable).err();
            let error = error.unwrap_or_else(|| panic!("accepted: {says}"));
            assert!(error.contains("node `modes`") && error.contains(says), "{error}, not {says}");
        }
    }

    #[test]
    fn what_can_not_be_followed_names_the_node() {
        let refused = |name: &str, output: &str, widths: &[usize], damage: &dyn Fn(&mut GraphProto)| {
            let mut graph = graph(name);
            damage(&mut graph);
            TreeRanker::compile("m", &graph, &manifest(output), widths, Kernel::Portable).err().unwrap()
        };
        assert!(refused("modes", "nowhere", &[6], &|_| {}).contains("no output `nowhere`; the model has score"));
        assert!(refused("modes", "score", &[3], &|_| {}).contains("asks for feature 5 of 3"));
        assert!(refused("xgboost", "label", &[6], &|_| {}).contains("`label` is the class"));
        let last = |graph: &mut GraphProto, kind: &str| {
            graph.node.last_mut().unwrap().op_type = Some(kind.into());
        };
        assert!(refused("modes", "score", &[6], &|g| last(g, "Tanh")).contains("the node of `score`: Tanh"));
        assert!(refused("modes", "score", &[6], &|g| last(g, "Mul")).contains("Mul of something else"));
        let circle = refused("modes", "score", &[6], &|g| g.node.last_mut().unwrap().input[0] = "score".into());
        assert!(circle.contains("a circle"), "{circle}");
        let renamed = refused("modes", "score", &[6], &|g| g.input[0].name = Some("y".into()));
        assert!(renamed.contains("no input `x`; the model has y"), "{renamed}");
    }

    #[test]
    fn thresholds_are_rounded_to_what_decides_alike() {
        for value in [0.1f64, -0.1, 1.0, 0.0, -0.0, 1e-50, -1e-50, 1e300, -1e300, f64::from(f32::MAX)] {
            for near in [value as f32, (value as f32).next_up(), (value as f32).next_down()] {
                assert_eq!(near <= at_most(value), f64::from(near) <= value, "{near:e} <= {value:e}");
                assert_eq!(near <= below(value), f64::from(near) < value, "{near:e} < {value:e}");
                assert_eq!(exactly(value).contains(&near), f64::from(near) == value);
            }
        }
    }
}
