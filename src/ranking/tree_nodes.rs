//! The nodes of an `ai.onnx.ml` operator, checked and brought into the one form that is scored.

use std::collections::{HashMap, HashSet};

use rten_onnx::onnx::{AttributeProto, DataType, NodeProto, TensorProto};

use super::trees::{Node, Test, Tree};

/// The trees of one operator, and how many targets or classes they vote for.
///
/// # Errors
/// What is malformed, with tree and node, or a test of a feature beyond `n_features`.
pub(super) fn read(node: &NodeProto, n_features: usize) -> Result<(Vec<Tree>, usize), String> {
    let attributes = Attributes(node);
    let kind = node.op_type.as_deref().unwrap_or_default();
    let (raw, roots, n_targets) = match kind {
        "TreeEnsemble" => by_index(&attributes)?,
        _ => by_id(&attributes, kind == "TreeEnsembleClassifier")?,
    };
    let mut seen = vec![false; raw.len()];
    let built = roots.iter().map(|&root| tree(&raw, root, n_features, &mut seen));
    let trees = built.collect::<Result<_, _>>()?;
    match raw.iter().zip(&seen).find_map(|(node, seen)| (!seen && node.tree >= 0).then_some(node)) {
        Some(lost) => Err(format!("tree {}, node {}: no branch leads to it", lost.tree, lost.id)),
        None => Ok((trees, n_targets)),
    }
}

/// The attribute of that name.
pub(super) fn attribute<'a>(node: &'a NodeProto, name: &str) -> Option<&'a AttributeProto> {
    node.attribute.iter().find(|a| a.name.as_deref() == Some(name))
}

/// The values of a tensor that lies in the file.
pub(super) fn numbers(tensor: &TensorProto) -> Result<Vec<f64>, String> {
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
pub(super) struct Attributes<'a>(pub &'a NodeProto);

impl<'a> Attributes<'a> {
    pub(super) fn ints(&self, name: &str) -> &'a [i64] {
        attribute(self.0, name).map_or(&[], |a| &a.ints)
    }

    pub(super) fn int(&self, name: &str) -> Option<i64> {
        attribute(self.0, name).and_then(|a| a.i)
    }

    /// Of floats, or of a tensor, which is called by that name or by that of its own.
    pub(super) fn numbers(&self, name: &str) -> Result<Vec<f64>, String> {
        let given = attribute(self.0, name);
        let tensor = given.filter(|a| a.t.is_some()).or_else(|| attribute(self.0, &format!("{name}_as_tensor")));
        match (tensor.and_then(|a| a.t.as_ref()), given) {
            (Some(tensor), _) => numbers(tensor).map_err(|e| format!("{name}: {e}")),
            (None, Some(given)) => Ok(given.floats.iter().map(|&v| f64::from(v)).collect()),
            (None, None) => Ok(Vec::new()),
        }
    }

    pub(super) fn text(&self, name: &str) -> &'a str {
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
