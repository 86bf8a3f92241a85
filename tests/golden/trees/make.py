"""Makes the models and scores beside it: python make.py, with requirements.txt installed.

Each NAME.onnx is a tree ensemble, and NAME.json holds rows (null: missing) and the scores that ONNX Runtime gives them.
"""

import json
from pathlib import Path

import lightgbm
import numpy as np
import onnx
import onnxruntime
import xgboost
from onnx import TensorProto, helper
from onnxmltools import convert_lightgbm, convert_xgboost
from onnxmltools.convert.common.data_types import FloatTensorType
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import FloatTensorType as SklearnFloat
from sklearn.ensemble import RandomForestClassifier

HERE = Path(__file__).parent
WIDTH = 6
random = np.random.default_rng(7)


def rows(n):
    """Numbers, a category in the last column, and holes."""
    x = random.normal(size=(n, WIDTH)).astype(np.float32)
    x[:, -1] = random.integers(0, 12, n)
    x[random.random(x.shape) < 0.1] = np.nan
    return x


def write(name, model, output, column=None):
    x = rows(40)
    if name == "forest":
        x = np.nan_to_num(x)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (scores,) = session.run([output], {"x": x})
    if isinstance(scores, list):  # of maps
        scores = np.array([[row[key] for key in sorted(row)] for row in scores])
    scores = scores.reshape(len(x), -1)[:, column or 0].astype(float)
    model.graph.name = name  # exporters draw one
    onnx.save(model, HERE / f"{name}.onnx")
    plain = [[None if np.isnan(v) else float(v) for v in row] for row in x]
    text = json.dumps({"output": output, "rows": plain, "scores": scores.tolist()})
    (HERE / f"{name}.json").write_text(text.replace("], [", "],\n["))


def every_mode():
    """Ensembles by hand: every comparison with and without missing values going along, on the thresholds and beside them."""
    modes = ["BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ"]
    tree = {key: [] for key in ("treeids", "nodeids", "featureids", "modes", "values", "truenodeids", "falsenodeids")}
    tree["missing_value_tracks_true"], votes = [], {key: [] for key in ("treeids", "nodeids", "ids", "weights")}
    for at, (mode, missing) in enumerate((mode, missing) for mode in modes for missing in (0, 1)):
        for node in range(3):
            leaf = node > 0
            line = (at, node, 0 if leaf else 5, "LEAF" if leaf else mode, 0.0 if leaf else 4.0 + at % 5, 0, 0, 0)
            if not leaf:
                line = (*line[:5], 1, 2, missing)
            for key, value in zip(tree, line):
                tree[key].append(value)
            if leaf:
                for key, value in zip(votes, (at, node, 0, 2.0 ** (at - 6) * (1 if node == 1 else -1))):
                    votes[key].append(value)
    node = helper.make_node(
        "TreeEnsembleRegressor", ["x"], ["sum"], domain="ai.onnx.ml", name="modes", n_targets=1, base_values=[0.5],
        aggregate_function="AVERAGE", **{f"nodes_{k}": v for k, v in tree.items()},
        **{f"target_{k}": v for k, v in votes.items()},
    )
    last = helper.make_node("Sigmoid", ["sum"], ["score"])
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, WIDTH])]
    outputs = [helper.make_tensor_value_info("score", TensorProto.FLOAT, [None, 1])]
    graph = helper.make_graph([node, last], "modes", inputs, outputs)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def by_index():
    """The newer operator: nodes by position, sets of values, two targets of which the graph takes the second."""
    def tensor(kind, values):
        return helper.make_tensor("", kind, [len(values)], values)

    node = helper.make_node(
        "TreeEnsemble", ["x"], ["sums"], domain="ai.onnx.ml", name="indexed", n_targets=2, aggregate_function=1,
        post_transform=0, tree_roots=[0, 3],
        nodes_featureids=[5, 0, 1, 5, 2],
        nodes_modes=tensor(TensorProto.UINT8, [6, 0, 3, 6, 1]),
        nodes_splits=tensor(TensorProto.FLOAT, [0.0, 0.1, -0.3, 0.0, 0.5]),
        nodes_truenodeids=[1, 0, 2, 4, 5], nodes_trueleafs=[0, 1, 1, 0, 1],
        nodes_falsenodeids=[2, 1, 3, 4, 6], nodes_falseleafs=[0, 1, 1, 1, 1],
        nodes_missing_value_tracks_true=[0, 1, 0, 1, 1],
        membership_values=tensor(TensorProto.FLOAT, [2.0, 3.0, 7.0, np.nan, 1.0, 7.0]),
        leaf_targetids=[1, 1, 1, 0, 1, 1, 1],
        leaf_weights=tensor(TensorProto.FLOAT, [0.5, -1.5, 2.25, 8.0, 0.125, -0.75, 3.0]),
    )
    column = helper.make_node("Gather", ["sums", "second"], ["score"], axis=1)
    second = helper.make_tensor("second", TensorProto.INT64, [], [1])
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, WIDTH])]
    outputs = [helper.make_tensor_value_info("score", TensorProto.FLOAT, [None])]
    graph = helper.make_graph([node, column], "indexed", inputs, outputs, [second])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 5)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def main():
    x = rows(2000)
    taste = np.nan_to_num(x[:, 0]) - np.nan_to_num(x[:, 1]) ** 2 + np.isin(x[:, 5], [2, 3, 7])
    liked = (taste > 0).astype(int)
    inputs = [("x", FloatTensorType([None, WIDTH]))]
    quiet = {"verbose": -1, "n_jobs": 1, "seed": 1}

    ranker = lightgbm.LGBMRanker(n_estimators=12, num_leaves=31, categorical_feature=[5], **quiet)
    ranker.fit(x, liked + (taste > 1), group=[20] * 100)
    write("ranker", convert_lightgbm(ranker, initial_types=inputs), "variable")

    classifier = lightgbm.LGBMClassifier(n_estimators=8, num_leaves=15, **quiet).fit(x, liked)
    write("zipmap", convert_lightgbm(classifier, initial_types=inputs), "probabilities", 1)

    deep = lightgbm.LGBMRegressor(n_estimators=4, num_leaves=80, min_child_samples=3, **quiet).fit(x, taste)
    write("split", convert_lightgbm(deep, initial_types=inputs, split=2), "variable")

    classifier = xgboost.XGBClassifier(n_estimators=10, max_depth=4, n_jobs=1, seed=1).fit(x, liked)
    write("xgboost", convert_xgboost(classifier, initial_types=inputs), "probabilities", 1)

    forest = RandomForestClassifier(5, max_depth=6, random_state=1).fit(np.nan_to_num(x), liked)
    options = {RandomForestClassifier: {"zipmap": False}}
    types = [("x", SklearnFloat([None, WIDTH]))]
    write("forest", convert_sklearn(forest, initial_types=types, options=options), "probabilities", 1)

    write("modes", every_mode(), "score")
    write("indexed", by_index(), "score")


main()
