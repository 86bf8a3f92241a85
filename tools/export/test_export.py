import importlib.util
import json
import os
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import lightgbm
import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xgboost
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent))
import check  # noqa: E402
import export  # noqa: E402
import sources  # noqa: E402

BINARY = os.environ.get("TASTEMAKER")
needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed")
CONTEXT = [f"context.{c}" for c in "abcdef"]

# A user module, as tests write it into their folder.
NETS = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        layers = nn.Linear(16, 32), nn.ReLU(), nn.BatchNorm1d(32), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 1)
        self.net = nn.Sequential(*layers)

    def forward(self, user, item):
        return self.net(torch.cat([user, item], 1))

class Dlrm(nn.Module):
    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(50, 8) for _ in range(3))
        self.bottom = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 8))
        self.top = nn.Sequential(nn.Linear(8 + 6, 32), nn.ReLU(), nn.Linear(32, 1))
        self.register_buffer("below", torch.tensor([4, 8, 9, 12, 13, 14]))

    def forward(self, dense, ids):
        x = self.bottom(dense)
        z = torch.stack([x] + [table(ids[:, at]) for at, table in enumerate(self.tables)], 1)
        pairs = torch.bmm(z, z.transpose(1, 2)).flatten(1).index_select(1, self.below)
        return self.top(torch.cat([x, pairs], 1)).squeeze(1)

class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.click, self.buy = nn.Linear(4 * 6, 8), nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, history):
        x = torch.relu(self.body(history.flatten(1)))
        return torch.sigmoid(self.click(x)), self.buy(x)[:, 0]

class Centred(nn.Module):
    def forward(self, x):
        return (x - x.mean(0)).sum(1)

def seeded(make):
    def factory():
        torch.manual_seed(1)
        return make()
    return factory

two, dlrm, heads, centred = map(seeded, (Two, Dlrm, Heads, Centred))
"""
TWO = ["--input", "user=user.embedding*8", "--input", "item=item.embedding*8"]
DLRM = ["--input", f"dense={','.join(CONTEXT[:5])}", "--input", "ids=context.x,context.y,context.z", "--ids", "ids=50"]
HEADS = ["--input", "history=context.h*24", "--shape", "history=4,6", "--output", "click", "--output", "buy"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, the working directory, whose module is the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    (tmp_path / "nets.py").write_text(NETS)
    return tmp_path


def run(*arguments) -> int:
    return export.main([str(a) for a in arguments])


def refused(capsys, *arguments) -> str:
    """What is said of a model that is not exported; nothing may be written."""
    assert run(*arguments, "--out", "out") == 1
    assert not list(Path("out").rglob("*")) if Path("out").exists() else True
    return capsys.readouterr().err


def rows(n, rng):
    """Six features: holes, and whole numbers in the last."""
    x = rng.normal(size=(n, 6)).astype(np.float32)
    x[:, 5] = rng.integers(0, 12, n)
    x[rng.random(x.shape) < 0.1] = np.nan
    return x


def training():
    x = rows(2000, np.random.default_rng(7))
    y = np.nan_to_num(x[:, 0]) - np.nan_to_num(x[:, 1]) ** 2 + np.isin(x[:, 5], [2, 3, 7])
    return x, y


def lightgbm_model(file, y, n_trees=12, names=CONTEXT, **options) -> lightgbm.Booster:
    x, _ = training()
    group = [20] * 100 if options["objective"] == "lambdarank" else None
    categories = options.pop("categories", "auto")
    data = lightgbm.Dataset(x, y, group=group, feature_name=names, categorical_feature=categories)
    booster = lightgbm.train({"verbose": -1, "num_threads": 1, "seed": 1, **options}, data, n_trees)
    booster.save_model(file)
    return booster


def xgboost_model(file, y, categories=False, **options) -> xgboost.Booster:
    x, _ = training()
    data = xgboost.DMatrix(
        x, y, feature_names=CONTEXT, feature_types=["q"] * 5 + ["c" if categories else "q"], enable_categorical=True
    )
    if options["objective"].startswith("rank"):
        data.set_group([20] * 100)
    booster = xgboost.train({"nthread": 1, "max_depth": 5, **options}, data, 12)
    booster.save_model(file)
    return booster


def onnx_scores(file, given):
    return sources.session(onnx.load(file)).run(None, given)[0].ravel()


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "lambdarank", "categories": [5]},
        {"objective": "binary", "sigmoid": 2.0},
        {"objective": "regression", "boosting": "rf", "bagging_freq": 1, "bagging_fraction": 0.7, "num_leaves": 300},
        {"objective": "poisson", "use_missing": False},
        {"objective": "regression", "boosting": "dart"},
    ],
)
def test_lightgbm(folder, options):
    _, y = training()
    y = {"lambdarank": np.digitize(y, [-1, 0, 1]), "binary": y > 0, "poisson": np.abs(y)}.get(options["objective"], y)
    booster = lightgbm_model("model.txt", y, **options)
    assert run("model.txt", "--out", "out") == 0
    x = rows(500, np.random.default_rng(8))
    np.testing.assert_allclose(onnx_scores("out/main.onnx", {"features": x}), booster.predict(x), rtol=1e-5, atol=1e-5)
    manifest = tomllib.loads(Path("out/main.toml").read_text())
    assert manifest == {"inputs": [{"name": "features", "columns": CONTEXT}], "output": {"name": "score"}}


@pytest.mark.parametrize(
    "file, options",
    [
        ("model.json", {"objective": "rank:ndcg", "categories": True}),
        ("model.json", {"objective": "binary:logistic"}),
        ("model.json", {"objective": "count:poisson"}),
        ("model.ubj", {"objective": "reg:squarederror", "booster": "dart", "rate_drop": 0.3}),
        ("model.ubj", {"objective": "binary:logitraw", "num_parallel_tree": 2}),
    ],
)
def test_xgboost(folder, file, options):
    _, y = training()
    kind = options["objective"]
    y = np.digitize(y, [-1, 0, 1]) if "rank" in kind else y > 0 if "binary" in kind else np.abs(y)
    booster = xgboost_model(file, y, **options)
    assert (
        run(file, "--out", "out", "--name", "trees", "--output", "relevance", "--input", f"x={','.join(CONTEXT)}") == 0
    )
    x = rows(500, np.random.default_rng(8))
    data = xgboost.DMatrix(x, feature_names=CONTEXT, feature_types=booster.feature_types, enable_categorical=True)
    np.testing.assert_allclose(onnx_scores("out/trees.onnx", {"x": x}), booster.predict(data), rtol=1e-5, atol=1e-5)
    assert tomllib.loads(Path("out/trees.toml").read_text())["output"] == {"name": "relevance"}


def test_trees_without_a_form_are_refused(folder, capsys):
    x, y = training()
    classes = np.digitize(y, [-1, 0, 1])
    lightgbm_model("classes.txt", classes, objective="multiclass", num_class=4)
    assert "classes.txt: 4 classes" in refused(capsys, "classes.txt")
    lightgbm_model("linear.txt", y, objective="regression", linear_tree=True)
    assert "linear.txt: trees with linear models in their leaves" in refused(capsys, "linear.txt")
    lightgbm_model("zero.txt", y, objective="regression", zero_as_missing=True)
    assert "zero_as_missing=false" in refused(capsys, "zero.txt")
    lightgbm_model("names.txt", y, objective="regression", names=[f"f{at}" for at in range(6)])
    assert "names.txt: --input is needed: the model's feature names are no feature columns (`f0`)" in refused(
        capsys, "names.txt"
    )
    assert "5 values, but the model has 6 features" in refused(capsys, "names.txt", "--input", "x=context.a*5")
    xgboost.train({"booster": "gblinear"}, xgboost.DMatrix(np.nan_to_num(x), y), 2).save_model("linear.json")
    assert "linear.json: booster `gblinear`" in refused(capsys, "linear.json")
    Path("broken.json").write_text("{")
    assert "broken.json: not readable as XGBoost" in refused(capsys, "broken.json")
    Path("broken.txt").write_text("tree")
    assert "broken.txt: not readable as LightGBM" in refused(capsys, "broken.txt")


def test_a_failed_check_writes_nothing(folder, capsys):
    lightgbm_model("model.txt", training()[1], objective="regression")
    said = refused(capsys, "model.txt", "--tolerance", "1e-12")
    assert "output `score` differs from the source by" in said and "--tolerance is 1e-12" in said


def onnx_file(file, nodes, inputs, outputs, constants, opset=13, **options):
    """`inputs`, `outputs`: name, type, shape."""
    infos = [[helper.make_tensor_value_info(*v) for v in values] for values in (inputs, outputs)]
    tensors = [numpy_helper.from_array(v, name) for name, v in constants.items()]
    graph = helper.make_graph(nodes, "made on /home/somebody", *infos, tensors, doc_string="/home/somebody")
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, doc_string="/home/somebody"
    )
    onnx.save(model, file, **options)


def two_inputs(file, rng, **options):
    w1, w2 = rng.normal(size=(16, 64)).astype(np.float32) / 4, rng.normal(size=(64, 1)).astype(np.float32) / 8
    nodes = [
        helper.make_node("Concat", ["user", "item"], ["x"], axis=1),
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w2"], ["score"]),
    ]
    onnx_file(
        file,
        nodes,
        [("user", 1, [1, 8]), ("item", 1, [1, 8])],
        [("score", 1, [1, 1])],
        {"w1": w1, "b1": rng.normal(size=64).astype(np.float32), "w2": w2},
        **options,
    )
    return lambda user, item: (
        np.maximum(
            np.concatenate([user, item], 1) @ w1 + numpy_helper.to_array(onnx.load(file).graph.initializer[1]), 0
        )
        @ w2
    )[:, 0]


def dlrm(file, rng):
    """Numbers and three ids of 5,000, which a half has no room for; the scores are float64."""
    fields, table = 4, rng.normal(size=(5000, 8)).astype(np.float32)
    below = np.array([i * fields + j for i in range(fields) for j in range(i)])
    constants = {
        "w": rng.normal(size=(5, 8)).astype(np.float32) / 2,
        "table": table,
        "one": np.array([1]),
        "below": below,
        "flat": np.array([-1, fields * fields]),
        "v": rng.normal(size=(14, 1)).astype(np.float32) / 4,
        "unused": table,
    }
    nodes = [
        helper.make_node("MatMul", ["dense", "w"], ["bottom"]),
        helper.make_node("Unsqueeze", ["bottom", "one"], ["first"]),
        helper.make_node("Gather", ["table", "ids"], ["e"]),
        helper.make_node("Concat", ["first", "e"], ["z"], axis=1),
        helper.make_node("Transpose", ["z"], ["zt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["z", "zt"], ["dots"]),
        helper.make_node("Reshape", ["dots", "flat"], ["all"]),
        helper.make_node("Gather", ["all", "below"], ["pairs"], axis=1),
        helper.make_node("Concat", ["bottom", "pairs"], ["top"], axis=1),
        helper.make_node("MatMul", ["top", "v"], ["narrow"]),
        helper.make_node("Cast", ["narrow"], ["score"], to=TensorProto.DOUBLE),
    ]
    onnx_file(
        file, nodes, [("dense", 1, ["b", 5]), ("ids", 7, ["b", 3])], [("score", 11, ["b", 1])], constants, opset=15
    )


DLRM_5000 = [*DLRM[:-1], "ids=5000"]


def test_onnx_becomes_a_ranker(folder):
    want = two_inputs(
        "two.onnx", np.random.default_rng(1), save_as_external_data=True, size_threshold=0, location="weights"
    )
    assert run("two.onnx", "--out", "out", *TWO) == 0
    assert sorted(p.name for p in Path("out").iterdir()) == ["main.onnx", "main.toml"]
    Path("weights").unlink()
    model = onnx.load("out/main.onnx")
    assert b"somebody" not in Path("out/main.onnx").read_bytes()
    assert model.opset_import[0].version >= 17
    for value, width in ((model.graph.input[0], 8), (model.graph.input[1], 8), (model.graph.output[0], 1)):
        batch, row = value.type.tensor_type.shape.dim
        assert (batch.dim_param, row.dim_value) == ("n", width)
    x = np.random.default_rng(2).normal(size=(2, 9, 8)).astype(np.float32)
    Path("two.onnx").write_bytes(Path("out/main.onnx").read_bytes())
    found = onnx_scores("out/main.onnx", {"user": x[0], "item": x[1]})
    np.testing.assert_allclose(found, want(*x), rtol=1e-5, atol=1e-5)
    assert tomllib.loads(Path("out/main.toml").read_text()) == {
        "inputs": [{"name": "user", "columns": ["user.embedding"]}, {"name": "item", "columns": ["item.embedding"]}],
        "output": {"name": "score"},
    }


def test_ids_sequences_and_other_types_become_rows_of_float32(folder):
    dlrm("dlrm.onnx", np.random.default_rng(3))
    assert run("dlrm.onnx", "--out", "out", *DLRM_5000) == 0
    model = onnx.load("out/main.onnx")
    assert [v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)] == [TensorProto.FLOAT] * 3
    assert "unused" not in {t.name for t in model.graph.initializer}
    rng = np.random.default_rng(4)
    dense, ids = rng.normal(size=(7, 5)).astype(np.float32), rng.integers(0, 5000, (7, 3))
    want = sources.session(onnx.load("dlrm.onnx")).run(None, {"dense": dense, "ids": ids})[0].ravel()
    found = onnx_scores("out/main.onnx", {"dense": dense, "ids": ids.astype(np.float32)})
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_graphs_in_nodes_see_the_new_input(folder):
    node, info = helper.make_node, helper.make_tensor_value_info
    inner = [node("Cast", ["x"], ["f"], to=TensorProto.FLOAT), node("ReduceSum", ["f", "axis"], ["sum"])]
    branches = [helper.make_graph(inner, name, [], [info("sum", 1, None)]) for name in ("yes", "no")]
    nodes = [node("If", ["true"], ["score"], then_branch=branches[0], else_branch=branches[1])]
    constants = {"true": np.array(True), "axis": np.array([1])}
    onnx_file("if.onnx", nodes, [("x", 7, ["n", 6])], [("score", 1, ["n", 1])], constants)
    assert run("if.onnx", "--out", "out", "--input", "x=context.a*6", "--ids", "x=9") == 0
    x = np.random.default_rng(6).integers(0, 9, (5, 6)).astype(np.float32)
    np.testing.assert_allclose(onnx_scores("out/main.onnx", {"x": x}), x.sum(1))


def test_of_probabilities_a_column_is_the_score(folder, capsys):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Softmax", ["y"], ["p"])]
    w = np.random.default_rng(5).normal(size=(6, 3)).astype(np.float32)
    onnx_file("classes.onnx", nodes, [("x", 1, ["n", 6])], [("p", 1, ["n", 3])], {"w": w})
    assert "one value per row" in refused(capsys, "classes.onnx", "--input", "x=context.a*6")
    assert run("classes.onnx", "--out", "out", "--input", "x=context.a*6", "--column", "2") == 0
    x = np.random.default_rng(6).normal(size=(5, 6)).astype(np.float32)
    p = np.exp(x @ w)
    np.testing.assert_allclose(onnx_scores("out/main.onnx", {"x": x}), p[:, 2] / p.sum(1), rtol=1e-5)


def test_models_that_are_no_rankers_are_refused(folder, capsys):
    rng, x = np.random.default_rng(1), ["--input", "x=context.a*6"]
    node = helper.make_node
    nodes = [
        node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1),
        node("Sub", ["x", "m"], ["d"]),
        node("ReduceSum", ["d", "axis"], ["score"]),
    ]
    onnx_file("mean.onnx", nodes, [("x", 1, ["n", 6])], [("score", 1, ["n", 1])], {"axis": np.array([1])})
    assert "depends on the rows beside it" in refused(capsys, "mean.onnx", *x)
    nodes = [node("Reshape", ["x", "s"], ["y"]), node("ReduceSum", ["y", "axis"], ["score"])]
    constants = {"axis": np.array([1]), "s": np.array([4, 6])}
    onnx_file("fixed.onnx", nodes, [("x", 1, ["n", 6])], [("score", 1, ["n", 1])], constants)
    assert "fixed.onnx: the source does not run on 1 rows" in refused(capsys, "fixed.onnx", *x)
    two_inputs("two.onnx", rng)
    assert "no input `x`; the model has user, item" in refused(capsys, "two.onnx", *x)
    assert "input `item` of the model has no --input" in refused(capsys, "two.onnx", *TWO[:2])
    assert "--input is needed for `user`" in refused(capsys, "two.onnx")
    assert "no output `y`; the model has score" in refused(capsys, "two.onnx", *TWO, "--output", "y")
    Path("broken.onnx").write_bytes(b"no model")
    assert "broken.onnx: " in refused(capsys, "broken.onnx", *x)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nothing.pt"], "nothing.pt: no such file"),
        (["two.csv"], "two.csv: not one of .onnx"),
        (["two.onnx", "--input", "user"], "--input user: expected NAME=COLUMN"),
        (["two.onnx", "--input", "user=@nowhere"], "--input user: nowhere: No such file"),
        (["two.onnx", "--input", "user=a*0"], "`a*0`: the width is no number above 0"),
        (["two.onnx", *TWO, "--ids", "users=3"], "--ids users=3: no --input `users`"),
        (["two.onnx", *TWO, "--ids", "user=99999999"], "expected 1 to 16777216"),
        (["two.onnx", *TWO, "--shape", "user=3,3"], "--shape user=3,3: the product must be the input's 8 values"),
        (["two.onnx", *TWO, "--name", "a/b"], "--name a/b: letters"),
        (["two.onnx", *TWO, "--data", "nowhere.npz"], "--data nowhere.npz"),
        (["two.onnx", *TWO, "--output", "score", "--output", "score2"], "score2"),
    ],
)
def test_mistakes_are_named(folder, capsys, arguments, says):
    two_inputs("two.onnx", np.random.default_rng(1))
    Path("two.csv").touch()
    assert says in refused(capsys, *arguments)


def test_files_are_the_same_each_time_and_never_replaced_unasked(folder, capsys):
    two_inputs("two.onnx", np.random.default_rng(1))
    variants = [a for kind in export.VARIANTS for a in ("--variant", kind)]
    made = []
    for out in ("one", "other"):
        assert run("two.onnx", "--out", out, *TWO, *variants) == 0
        made.append({p.relative_to(out): p.read_bytes() for p in Path(out).rglob("*") if p.is_file()})
    assert made[0] == made[1] and len(made[0]) == 8
    assert run("two.onnx", "--out", "one", *TWO) == 1
    assert "one/main.onnx: exists; --overwrite replaces it" in capsys.readouterr().err
    assert run("two.onnx", "--out", "one", *TWO, "--overwrite") == 0


@pytest.mark.parametrize("kind, number", [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)])
def test_halves_keep_inputs_outputs_and_ids(folder, kind, number):
    dlrm("dlrm.onnx", np.random.default_rng(3))
    assert run("dlrm.onnx", "--out", "out", *DLRM_5000, "--variant", kind) == 0
    model = onnx.load(f"out/variants/main.{kind}.onnx")
    assert [v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)] == [TensorProto.FLOAT] * 3
    assert {t.data_type for t in model.graph.initializer} == {number, TensorProto.INT64}
    inferred = onnx.shape_inference.infer_shapes(model)
    kinds = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    for node in model.graph.node:
        if node.op_type == "MatMul":
            assert kinds[node.output[0]] == number
    assert Path(f"out/variants/main.{kind}.toml").read_text() == Path("out/main.toml").read_text()


def test_what_does_not_fit_a_variant_is_refused(folder, capsys):
    lightgbm_model("model.txt", training()[1], objective="regression")
    assert "--variant fp16: node `trees`" in refused(capsys, "model.txt", "--variant", "fp16")
    assert "--variant int8: the model has no products" in refused(capsys, "model.txt", "--variant", "int8")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["score"])]
    big = np.full((6, 1), 1e5, np.float32)
    onnx_file("big.onnx", nodes, [("x", 1, ["n", 6])], [("score", 1, ["n", 1])], {"w": big})
    said = refused(capsys, "big.onnx", "--input", "x=context.a*6", "--variant", "fp16")
    assert "`w` holds 100000, beyond its range" in said
    two_inputs("two.onnx", np.random.default_rng(1))
    said = refused(capsys, "two.onnx", *TWO, "--variant", "int8", "--min-ndcg", "1.1")
    assert "--variant int8: NDCG@10" in said and "--min-ndcg is 1.1" in said


def test_int8_is_calibrated_on_what_is_given(folder, capsys):
    two_inputs("two.onnx", np.random.default_rng(1))
    rng = np.random.default_rng(2)
    data = {name: rng.normal(size=(2000, 8)).astype(np.float32) for name in ("user", "item")}
    np.savez("rows.npz", **data)
    columns = {f"{name}.embedding": pa.array(list(values)) for name, values in data.items()}
    pq.write_table(pa.table(columns), "rows.parquet")
    made = []
    for file in ("rows.npz", "rows.parquet"):
        assert run("two.onnx", "--out", file[5:], *TWO, "--variant", "int8", "--data", file) == 0
        assert "warning" not in capsys.readouterr().err
        made.append(Path(file[5:], "variants/main.int8.onnx").read_bytes())
    assert made[0] == made[1]
    assert "QLinearMatMul" in made[0].decode("latin1") or "DequantizeLinear" in made[0].decode("latin1")
    assert run("two.onnx", "--out", "random", *TWO, "--variant", "int8") == 0
    assert "int8 is calibrated on random rows" in capsys.readouterr().err


@needs_torch
@pytest.mark.parametrize(
    "factory, arguments", [("two", TWO), ("dlrm", DLRM), ("heads", [*HEADS, "--score", "click + buy / 2"])]
)
def test_pytorch_modules(folder, factory, arguments):
    import nets
    import torch

    assert run(f"nets:{factory}", "--out", "out", *arguments, "--variant", "fp16") == 0
    model = onnx.load("out/main.onnx")
    assert model.opset_import[0].version >= 17 and not any(t.external_data for t in model.graph.initializer)
    inputs = sources.session(model)
    rng = np.random.default_rng(3)
    given = {i.name: rng.normal(size=(5, i.shape[1])).astype(np.float32) for i in inputs.get_inputs()}
    if "ids" in given:
        given["ids"] = rng.integers(0, 50, (5, 3)).astype(np.float32)
    tensors = {name: torch.from_numpy(v) for name, v in given.items()}
    if "ids" in tensors:
        tensors["ids"] = tensors["ids"].long()
    if "history" in tensors:
        tensors["history"] = tensors["history"].reshape(5, 4, 6)
    with torch.no_grad():
        want = getattr(nets, factory)().eval()(**tensors)
    for found, expected in zip(inputs.run(None, given), want if isinstance(want, tuple) else [want]):
        np.testing.assert_allclose(found.ravel(), expected.numpy().ravel(), rtol=1e-4, atol=1e-5)


@needs_torch
def test_pytorch_files(folder, capsys):
    import nets
    import torch

    torch.jit.script(nets.two().eval()).save("script.pt")
    x = (torch.zeros(3, 5), torch.zeros(3, 3, dtype=torch.long))
    torch.jit.trace(nets.dlrm().eval(), x).save("trace.ts")
    torch.save(nets.two().eval(), "pickle.pth")
    torch.save(nets.two().state_dict(), "weights.pth")
    files = [("script.pt", TWO), ("trace.ts", DLRM), ("pickle.pth", TWO)]
    if hasattr(torch, "export") and hasattr(torch.export, "Dim"):
        n, example = torch.export.Dim("n"), (torch.zeros(3, 8), torch.zeros(3, 8))
        program = torch.export.export(nets.two().eval(), example, dynamic_shapes=({0: n}, {0: n}))
        torch.export.save(program, "program.pt2")
        torch.export.save(torch.export.export(nets.two().eval(), example), "fixed.pt2")
        files.append(("program.pt2", TWO))
        assert "fixed.pt2: input `user` has a fixed batch" in refused(capsys, "fixed.pt2", *TWO)
    for file, arguments in files:
        assert run(file, "--out", "out", "--name", file.replace(".", "-"), *arguments) == 0
    # One model, however it came.
    given = {name: np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32) for name in ("user", "item")}
    found = [onnx_scores(f"out/{f.replace('.', '-')}.onnx", given) for f, arguments in files if arguments is TWO]
    for other in found[1:]:
        np.testing.assert_allclose(found[0], other, rtol=1e-5, atol=1e-6)
    assert (
        (Path("out") / "script-pt.toml").read_text().startswith("# Made by tools/export from script.pt (TorchScript).")
    )


@needs_torch
def test_pytorch_mistakes_are_named(folder, capsys):
    import nets
    import torch

    torch.save(nets.two().state_dict(), "weights.pth")
    assert "weights.pth: holds OrderedDict, expected a module; a state_dict alone" in refused(
        capsys, "weights.pth", *TWO
    )
    assert "nets:two: needs an --input for each argument" in refused(capsys, "nets:two")
    assert "nets:nobody: AttributeError" in refused(capsys, "nets:nobody", *TWO)
    assert "nets:two: does not run on user [3, 8] torch.float32" in refused(capsys, "nets:two", *TWO[:2])
    assert "gives 2 outputs; name each by --output" in refused(capsys, "nets:heads", *HEADS[:4])
    assert "--score says how they make one" in refused(capsys, "nets:heads", *HEADS)
    assert "depends on the rows beside it" in refused(capsys, "nets:centred", "--input", "x=context.a*6")


def post(address, path, body):
    request = urllib.request.Request(f"http://{address}{path}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@pytest.mark.skipif(not BINARY, reason="TASTEMAKER names no executable")
def test_the_server_scores_as_the_source(folder):
    rng = np.random.default_rng(9)
    data = folder / "data"
    data.mkdir()
    pq.write_table(pa.table({"item_id": list(range(40)), "price": rng.random(40)}), data / "items.parquet")
    pq.write_table(pa.table({"user_id": list(range(10))}), data / "users.parquet")
    np.save(data / "item_embeddings.npy", rng.normal(size=(40, 8)).astype(np.float32))
    np.save(data / "user_embeddings.npy", rng.normal(size=(10, 8)).astype(np.float32))
    rankers = data / "rankers"
    _, y = training()
    lightgbm_model("lightgbm.txt", np.digitize(y, [-1, 0, 1]), objective="lambdarank", categories=[5])
    xgboost_model("xgboost.json", y > 0, objective="binary:logistic")
    two_inputs("two.onnx", rng)
    dlrm("dlrm.onnx", rng)
    # Name, model, arguments, engine.
    models = [
        ("lightgbm", "lightgbm.txt", [], "trees"),
        ("xgboost", "xgboost.json", [], "trees"),
        ("two", "two.onnx", TWO, "dense"),
        ("dlrm", "dlrm.onnx", DLRM_5000, "dense"),
        ("two-int8", "two.onnx", TWO, None),
    ]
    if importlib.util.find_spec("torch"):
        models += [("torch-two", "nets:two", TWO, "dense"), ("torch-dlrm", "nets:dlrm", DLRM, "dense")]
        models += [("torch-heads", "nets:heads", [*HEADS, "--score", "click + buy / 2"], "dense")]
        import nets
        import torch

        torch.jit.script(nets.two().eval()).save("script.pt")
        models.append(("script", "script.pt", TWO, "dense"))
    for name, model, arguments, _ in models:
        # A sequence needs columns that there are: 24 values of the context, one each.
        arguments = [
            "history=" + ",".join(f"context.h{at}" for at in range(24)) if a == HEADS[1] else a for a in arguments
        ]
        variant = ["--variant", "int8"] if name == "two-int8" else []
        assert run(model, "--out", rankers, "--name", name, *arguments, *variant) == 0
    # The server takes the 8-bit graph as any other.
    for end in ("onnx", "toml"):
        os.replace(rankers / f"variants/two-int8.int8.{end}", rankers / f"two-int8.{end}")
    subprocess.check_call([BINARY, "build", str(data), "--out", "bundle"])
    info = json.loads(subprocess.check_output([BINARY, "inspect", "bundle", "--json"]))
    assert sorted(info["computed"]) == sorted(name for name, *_ in models)
    for name, _, _, engine in models:
        assert engine in (None, info["computed"][name]["engine"]), info["computed"][name]
    Path("serve.toml").write_text("[telemetry]\nlog_json = true\n")
    command = [BINARY, "serve", "bundle", "--config", "serve.toml"]
    for port in ("--listen", "--http", "--admin"):
        command += [port, "127.0.0.1:0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            said = (json.loads(line)["fields"] for line in server.stderr)
            address = next(fields["http"] for fields in said if fields.get("message") == "serving")
            for name, model, arguments, _ in models:
                inputs = export.parse_inputs(parsed(arguments))
                outputs = [b for a, b in zip(arguments, arguments[1:]) if a == "--output"]
                source = sources.read(model, inputs, outputs, 17)
                given = check.rows(source.inputs, 30, source.values, rng)
                given = {k: np.nan_to_num(v) for k, v in given.items()}  # JSON has no NaN
                want = source.predict(check.native(source.inputs, source.dtypes, given))
                want = [np.asarray(want[o], float).ravel() for o in source.outputs]
                want = want[0] if len(want) == 1 else want[0] + want[1] / 2
                body = [
                    {"name": k, "datatype": "FP32", "shape": list(v.shape), "data": v.ravel().tolist()}
                    for k, v in given.items()
                ]
                answer = post(address, f"/v2/models/{name}/infer", {"inputs": body})
                found = np.array(answer["outputs"][0]["data"])
                tolerance = 0.1 if name == "two-int8" else 1e-4
                assert check.furthest(want, found) < tolerance, name
        finally:
            server.terminate()
            server.stderr.close()
    assert server.returncode is not None


def parsed(arguments):
    class Args:
        input, ids, shape = (
            [b for a, b in zip(arguments, arguments[1:]) if a == o] for o in ("--input", "--ids", "--shape")
        )

    return Args
