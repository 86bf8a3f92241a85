"""LightGBM and XGBoost ensembles as `TreeEnsemble` nodes (ai.onnx.ml 5), read from the libraries' own dumps.

Converters that exist write older operators, for which sets of categories become chains of tests, and take some rankers
for classifiers. Thresholds are float32 here as features are: each is rounded so that no float32 value changes sides.
"""

import json
from dataclasses import dataclass, field

import numpy as np
from errors import ExportError
from onnx import ModelProto, TensorProto, helper

# Of the standard, by number.
LEQ, LT, MEMBER = 0, 1, 6
# LightGBM takes what is nearer to zero for zero.
ZERO = 1e-35


@dataclass
class Split:
    feature: int
    mode: int
    # A threshold, or the set's members.
    value: float | list[float]
    true: object
    false: object
    missing_is_true: bool


@dataclass
class Ensemble:
    """A sum of trees, its nodes in the operator's form."""

    n_features: int
    base: float = 0.0
    roots: list[int] = field(default_factory=list)
    # (feature, mode, value, [true, false], [is a leaf, is a leaf], missing goes along with true)
    nodes: list[tuple] = field(default_factory=list)
    leaves: list[float] = field(default_factory=list)

    def add(self, root, read) -> None:
        """A tree; `read(key)` gives a node as a `Split`, whose sides are keys, or the value of a leaf."""
        top = read(root)
        if not isinstance(top, Split):
            self.base += float(top)
            return
        self.roots.append(len(self.nodes))
        open_splits = [(top, self._place(top))]
        while open_splits:
            split, at = open_splits.pop()
            for side, key in enumerate((split.true, split.false)):
                node = read(key)
                if isinstance(node, Split):
                    self.nodes[at][3][side] = self._place(node)
                    open_splits.append((node, self.nodes[at][3][side]))
                else:
                    self.nodes[at][3][side], self.nodes[at][4][side] = len(self.leaves), 1
                    self.leaves.append(float(node))

    def _place(self, split: Split) -> int:
        if not 0 <= split.feature < self.n_features:
            raise ExportError(f"a split on feature {split.feature} of {self.n_features}")
        self.nodes.append((split.feature, split.mode, split.value, [0, 0], [0, 0], int(split.missing_is_true)))
        return len(self.nodes) - 1

    def node(self, source: str, target: str):
        members = [v for n in self.nodes if n[1] == MEMBER for v in (*n[2], np.nan)]
        splits = [0.0 if n[1] == MEMBER else n[2] for n in self.nodes]
        extra = {"membership_values": floats(members[:-1])} if members else {}
        return helper.make_node(
            "TreeEnsemble",
            [source],
            [target],
            name="trees",
            domain="ai.onnx.ml",
            n_targets=1,
            aggregate_function=1,
            post_transform=0,
            tree_roots=self.roots,
            nodes_featureids=[n[0] for n in self.nodes],
            nodes_modes=helper.make_tensor("modes", TensorProto.UINT8, [len(self.nodes)], [n[1] for n in self.nodes]),
            nodes_splits=floats(splits),
            nodes_truenodeids=[n[3][0] for n in self.nodes],
            nodes_trueleafs=[n[4][0] for n in self.nodes],
            nodes_falsenodeids=[n[3][1] for n in self.nodes],
            nodes_falseleafs=[n[4][1] for n in self.nodes],
            nodes_missing_value_tracks_true=[n[5] for n in self.nodes],
            leaf_targetids=[0] * len(self.leaves),
            leaf_weights=floats(self.leaves),
            **extra,
        )

    def values(self) -> list[np.ndarray]:
        """By feature: zero, values beside every threshold and on it, every member of a set and what is in none."""
        found = [[0.0] for _ in range(self.n_features)]
        for feature, mode, value, *_ in self.nodes:
            if mode == MEMBER:
                found[feature] += [*value, max(value) + 1]
            else:
                with np.errstate(over="ignore"):
                    sides = [np.nextafter(np.float32(value), np.float32(s)) for s in (-np.inf, np.inf)]
                found[feature] += [value, *sides]
        # LightGBM reads what is nearer to zero as zero; and beyond this there is no room for noise.
        kept = [[x for x in values if x == 0 or 2 * ZERO < abs(x) < 1e30] for values in found]
        return [np.unique(np.array(values, np.float32)) for values in kept]


def floats(values):
    return helper.make_tensor("", TensorProto.FLOAT, [len(values)], np.array(values, np.float32))


def onnx_model(ensemble: Ensemble, link: list[tuple[str, float | None]], name: str, score: str) -> ModelProto:
    """`link`: operators that make the score of the sum, each with its constant."""
    if not ensemble.nodes:
        raise ExportError("no tree of the model has a split")
    steps = ([("Add", ensemble.base)] if ensemble.base else []) + link
    nodes, constants, value = [ensemble.node(name, "sum" if steps else score)], [], "sum"
    for at, (kind, constant) in enumerate(steps):
        inputs = [value]
        if constant is not None:
            constants.append(helper.make_tensor(f"number{at}", TensorProto.FLOAT, [1], [constant]))
            inputs.append(constants[-1].name)
        value = score if at + 1 == len(steps) else f"step{at}"
        nodes.append(helper.make_node(kind, inputs, [value], name=f"{kind}{at}"))
    graph = helper.make_graph(
        nodes,
        "ranker",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", ensemble.n_features])],
        [helper.make_tensor_value_info(score, TensorProto.FLOAT, ["n", 1])],
        constants,
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 5)], ir_version=8
    )


def at_most(threshold: float) -> float:
    """The largest float32 that is not above: x <= threshold says the same of every float32 x."""
    with np.errstate(over="ignore"):
        rounded = np.float32(threshold)
    return float(rounded if float(rounded) <= threshold else np.nextafter(rounded, np.float32(-np.inf)))


def lightgbm(dump: dict) -> tuple[Ensemble, list[tuple[str, float | None]]]:
    """Of `Booster.dump_model()`: the trees and what makes predictions of their sum."""
    if dump["num_class"] != 1 or dump["num_tree_per_iteration"] != 1:
        raise ExportError(f"{dump['num_class']} classes; a ranker has one score")
    trees = dump["tree_info"]
    ensemble = Ensemble(dump["max_feature_idx"] + 1)
    share = 1 / len(trees) if dump["average_output"] else 1.0

    def read(node):
        if "leaf_coeff" in node:
            raise ExportError("trees with linear models in their leaves (`linear_tree`) have no form in ONNX")
        if "leaf_value" in node:
            return node["leaf_value"] * share
        feature, kind = node["split_feature"], node["decision_type"]
        missing, left, right = node["missing_type"], node["left_child"], node["right_child"]
        if kind == "==":
            members = [float(v) for v in str(node["threshold"]).split("||")]
            return Split(feature, MEMBER, members, left, right, False)
        if kind != "<=":
            raise ExportError(f"a decision of type `{kind}`")
        threshold = node["threshold"]
        default, zero = node["default_left"], 0.0 <= threshold
        if missing == "Zero" and (default != zero or ZERO >= threshold > 0):
            raise ExportError(f"feature {feature} takes zeros for missing; train with zero_as_missing=false")
        return Split(feature, LEQ, at_most(threshold), left, right, default if missing != "None" else zero)

    for tree in trees:
        ensemble.add(tree["tree_structure"], read)
    objective, *options = dump.get("objective", "custom").split()
    options = dict(o.split(":", 1) for o in options if ":" in o)
    if objective in ("binary", "cross_entropy"):
        scale = float(options.get("sigmoid", 1))
        return ensemble, ([("Mul", scale)] if scale != 1 else []) + [("Sigmoid", None)]
    if objective in ("poisson", "gamma", "tweedie"):
        return ensemble, [("Exp", None)]
    plain = ("regression", "regression_l1", "huber", "fair", "quantile", "mape", "lambdarank", "rank_xendcg", "custom")
    if objective not in plain or "sqrt" in dump["objective"].split():
        raise ExportError(f"objective `{dump['objective']}` is not known")
    return ensemble, []


def xgboost(raw: bytes) -> tuple[Ensemble, list[tuple[str, float | None]]]:
    """Of `Booster.save_raw("json")`."""
    learner = json.loads(raw)["learner"]
    parameters, booster = learner["learner_model_param"], learner["gradient_booster"]
    if int(parameters["num_class"]) > 1 or int(parameters.get("num_target", 1)) > 1:
        raise ExportError(
            f"{parameters['num_class']} classes, {parameters['num_target']} targets; a ranker has one score"
        )
    if booster["name"] not in ("gbtree", "dart"):
        raise ExportError(f"booster `{booster['name']}`; only trees have a form here")
    weights = booster.get("weight_drop")
    trees = (booster["gbtree"] if booster["name"] == "dart" else booster)["model"]["trees"]
    ensemble = Ensemble(int(parameters["num_feature"]))
    for at, tree in enumerate(trees):
        sets = {}
        if tree["categories_nodes"]:
            starts = zip(tree["categories_nodes"], tree["categories_segments"], tree["categories_sizes"])
            sets = {node: [float(c) for c in tree["categories"][start : start + n]] for node, start, n in starts}
        share = weights[at] if weights else 1.0

        def read(node, tree=tree, sets=sets, share=share):
            left, right = tree["left_children"][node], tree["right_children"][node]
            if left == -1:
                return tree["split_conditions"][node] * share
            feature, default_left = tree["split_indices"][node], bool(tree["default_left"][node])
            if tree["split_type"][node] == 1:  # members go right
                return Split(feature, MEMBER, sets[node], right, left, not default_left)
            return Split(feature, LT, tree["split_conditions"][node], left, right, default_left)

        ensemble.add(0, read)
    base = parameters["base_score"].strip("[]")
    base, objective = float(base), learner["objective"]["name"]
    if objective in ("binary:logistic", "reg:logistic"):
        ensemble.base += float(np.log(base / (1 - base)))
        return ensemble, [("Sigmoid", None)]
    if objective in ("count:poisson", "reg:gamma", "reg:tweedie", "survival:cox"):
        ensemble.base += float(np.log(base))
        return ensemble, [("Exp", None)]
    if not objective.startswith(("rank:", "reg:", "binary:logitraw")):
        raise ExportError(f"objective `{objective}` is not known")
    ensemble.base += base
    return ensemble, []
