//! ONNX graphs whose score comes from tree ensembles (`ai.onnx.ml`), as LightGBM, XGBoost and scikit-learn are exported; the
//! general runtime does not have these operators.
//!
//! Where the operators' text is silent (one column of votes for two classes, base values of two classes), ONNX Runtime is followed.

use std::path::Path;

use rten_onnx::onnx::{GraphProto, NodeProto};

use super::manifest::RankerManifest;
use super::precision::Report;
use super::tree_nodes::{self, Attributes, attribute, numbers};
use super::trees::{Column, Forest, Node, ROWS, Tree};
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
    let model = super::read_onnx(onnx).map_err(|e| wrong(format!("{}: {e}", onnx.display())))?;
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

    fn report(&self) -> Report {
        Report::other("trees", None)
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

/// Makes one operator ready for an input of these columns.
fn ensemble(node: &NodeProto, columns: &[(usize, usize)], kernel: Kernel) -> Result<Ensemble, String> {
    let attributes = Attributes(node);
    let kind = node.op_type.as_deref().unwrap_or_default();
    let (mut trees, n_targets) = tree_nodes::read(node, columns.len())?;

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
    let votes = || {
        trees.iter().flat_map(|tree| &tree.0).flat_map(|node| match node {
            Node::Leaf(votes) => &votes[..],
            Node::Split { .. } => &[],
        })
    };
    let (mut n_columns, mut binary) = (n_targets, None);
    if kind == "TreeEnsembleClassifier" && n_targets == 2 {
        if base.len() == 2 {
            return Err("two base values of two classes, which nobody agrees on".into());
        }
        if votes().all(|vote| vote.0 == 0) {
            let negative = votes().any(|vote| vote.1 < 0.0);
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

#[cfg(test)]
mod tests {
    use super::*;
    use rten_onnx::onnx::AttributeProto;
    use std::path::PathBuf;

    fn golden(file: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/trees").join(file)
    }

    fn graph(name: &str) -> GraphProto {
        crate::ranking::read_onnx(&golden(&format!("{name}.onnx"))).unwrap().graph.unwrap()
    }

    fn manifest(output: &str) -> RankerManifest {
        toml::from_str(&format!("[[inputs]]\nname = \"x\"\ncolumns = []\n[output]\nname = \"{output}\"")).unwrap()
    }

    #[test]
    fn exported_models_score_as_in_onnx_runtime() {
        for name in ["forest", "indexed", "modes", "ranker", "split", "xgboost", "zipmap"] {
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
}
