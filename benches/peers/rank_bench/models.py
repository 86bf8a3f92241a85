"""The models: common shapes of recommenders as ONNX. Perceptrons and trees are trained on a teacher, so that their scores have an
order worth keeping; the other networks have random weights."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import lightgbm
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

for tool in ("train", "export"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools" / tool))
import trees  # noqa: E402
from network import Mlp  # noqa: E402


@dataclass
class Model:
    name: str
    title: str
    # Name and runs of columns: what they depend on ("request", "item", "candidate") and how many.
    inputs: list[tuple[str, list[tuple[str, int]]]]
    file: Path
    # The same with the item's part looked up by id, for ONNX Runtime; perceptrons only.
    rewritten: Path | None = None
    peers: list[str] = field(default_factory=list)
    # Trees only: the library's own model.
    booster: lightgbm.Booster | None = None

    def width(self, name: str) -> int:
        return sum(n for _, n in dict(self.inputs)[name])


class Builder:
    """An ONNX graph under construction; weights are He-normal, or given."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self.nodes, self.constants = rng, [], []

    def constant(self, values: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def node(self, kind: str, *inputs: str, **attributes) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"{kind}{len(self.nodes)}", **attributes))
        return name

    def dense(self, x: str, k: int, m: int, relu: bool = True) -> str:
        w = (self.rng.standard_normal((k, m)) * np.sqrt(2 / k)).astype(np.float32)
        b = (self.rng.standard_normal(m) * 0.05).astype(np.float32)
        return self.layer(x, w, b, relu)

    def layer(self, x: str, w: np.ndarray, b: np.ndarray, relu: bool) -> str:
        out = self.node("Gemm", x, self.constant(w), self.constant(b))
        return self.node("Relu", out) if relu else out

    def save(self, file: Path, inputs: list[tuple[str, int, list]], score: str) -> None:
        self.nodes.append(helper.make_node("Identity", [score], ["score"], name="score"))
        graph = helper.make_graph(
            self.nodes,
            "ranker",
            [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs],
            [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n", 1])],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        onnx.save(model, file)


def rows(name: str, width: int) -> tuple[str, int, list]:
    return name, TensorProto.FLOAT, ["n", width]


def trained(runs: list[tuple[str, int]], hidden: list[int], items: np.ndarray, rng: np.random.Generator) -> Mlp:
    """A perceptron that has learnt a taste: the product of two projections, with noise."""
    n = 24_000
    x = rng.standard_normal((n, sum(m for _, m in runs))).astype(np.float32)
    is_item = np.concatenate([np.full(m, of == "item") for of, m in runs])
    x[:, is_item] = items[rng.integers(len(items), size=n)][:, : is_item.sum()]
    left = x[:, ~is_item] @ rng.standard_normal((int((~is_item).sum()), 6)) / np.sqrt((~is_item).sum())
    right = x[:, is_item] @ rng.standard_normal((int(is_item.sum()), 6)) / np.sqrt(is_item.sum())
    y = ((left * right).sum(1) + 0.5 * right[:, 0] + 0.3 * rng.standard_normal(n) > 0).astype(np.float32)
    return Mlp.fit(x, y, hidden, 2, rng)


def perceptron(name, title, runs, hidden, items, folder, rng) -> Model:
    net = trained(runs, hidden, items, rng)
    width, build = sum(n for _, n in runs), Builder(rng)
    value = "features"
    layers = list(zip(net.weights, net.biases))
    for at, (w, b) in enumerate(layers):
        value = build.layer(value, w, b, at + 1 < len(layers))
    file = folder / f"{name}.onnx"
    build.save(file, [rows("features", width)], value)
    # Exact algebra: request @ w_request + b once, item @ w_item from a table.
    is_item = np.concatenate([np.full(n, of == "item") for of, n in runs])
    w, b = layers[0]
    build = Builder(rng)
    table = build.constant((items[:, : is_item.sum()] @ w[is_item]).astype(np.float32))
    once = build.node("Gemm", "request", build.constant(np.ascontiguousarray(w[~is_item])), build.constant(b))
    value = build.node("Relu", build.node("Add", build.node("Gather", table, "rows"), once))
    for at, (w, b) in enumerate(layers[1:]):
        value = build.layer(value, w, b, at + 2 < len(layers))
    rewritten = folder / f"{name}-rewritten.onnx"
    request = ("request", TensorProto.FLOAT, [1, int((~is_item).sum())])
    build.save(rewritten, [request, ("rows", TensorProto.INT64, ["n"])], value)
    return Model(name, title, [("features", runs)], file, rewritten, ["ort int8"])


def two_inputs(items, folder, rng) -> Model:
    build = Builder(rng)
    x = build.node("Concat", "user", "item", axis=1)
    for k, m in ((128, 256), (256, 128)):
        x = build.dense(x, k, m)
    score = build.dense(x, 128, 1, relu=False)
    file = folder / "two.onnx"
    build.save(file, [rows("user", 64), rows("item", 64)], score)
    return Model("two", "user and item, 128-256-128-1", [("user", [("request", 64)]), ("item", [("item", 64)])], file)


def dcn(items, folder, rng) -> Model:
    build, width = Builder(rng), 128
    x = "features"
    for _ in range(3):
        w = (rng.standard_normal((width, width)) / np.sqrt(width)).astype(np.float32)
        gate = build.layer(x, w, (rng.standard_normal(width) * 0.05).astype(np.float32), relu=False)
        x = build.node("Add", build.node("Mul", "features", gate), x)
    deep = build.dense(build.dense("features", width, 256), 256, 128)
    score = build.dense(build.node("Concat", x, deep, axis=1), width + 128, 1, relu=False)
    file = folder / "dcn.onnx"
    build.save(file, [rows("features", width)], score)
    return Model("dcn", "DCN-v2, 3 cross layers, deep 256-128", [("features", [("request", 64), ("item", 64)])], file)


def dlrm(items, folder, rng) -> Model:
    build, fields, dim = Builder(rng), 9, 32
    bottom = build.dense(build.dense("dense", 16, 64), 64, dim)
    x = build.node("Concat", bottom, "user", "item", axis=1)
    x = build.node("Reshape", x, build.constant(np.array([-1, fields, dim])))
    z = build.node("MatMul", x, build.node("Transpose", x, perm=[0, 2, 1]))
    z = build.node("Reshape", z, build.constant(np.array([-1, fields * fields])))
    below = np.array([i * fields + j for i in range(fields) for j in range(i)])
    z = build.node("Concat", bottom, build.node("Gather", z, build.constant(below), axis=1), axis=1)
    z = build.dense(build.dense(z, dim + len(below), 256), 256, 128)
    score = build.dense(z, 128, 1, relu=False)
    file = folder / "dlrm.onnx"
    inputs = [("dense", [("candidate", 16)]), ("user", [("request", 4 * dim)]), ("item", [("item", 4 * dim)])]
    build.save(file, [rows(name, sum(n for _, n in runs)) for name, runs in inputs], score)
    return Model("dlrm", "DLRM, 9 fields of 32, top 256-128", inputs, file)


def deepfm(items, folder, rng) -> Model:
    build, fields, dim = Builder(rng), 12, 16
    x = build.node("Reshape", "features", build.constant(np.array([-1, fields, dim])))
    axis = build.constant(np.array([1]))
    total = build.node("ReduceSum", x, axis, keepdims=0)
    squares = build.node("ReduceSum", build.node("Mul", x, x), axis, keepdims=0)
    pairs = build.node("Sub", build.node("Mul", total, total), squares)
    half = build.constant(np.array(0.5, np.float32))
    second = build.node("Mul", build.node("ReduceSum", pairs, axis, keepdims=1), half)
    first = build.dense("features", fields * dim, 1, relu=False)
    deep = build.dense(build.dense("features", fields * dim, 256), 256, 128)
    deep = build.dense(deep, 128, 1, relu=False)
    score = build.node("Add", build.node("Add", first, second), deep)
    file = folder / "deepfm.onnx"
    build.save(file, [rows("features", fields * dim)], score)
    return Model("deepfm", "DeepFM, 12 fields of 16, deep 256-128", [("features", [("request", 96), ("item", 96)])], file)


def din(items, folder, rng) -> Model:
    build, length, dim = Builder(rng), 20, 32
    seen = build.node("Reshape", "history", build.constant(np.array([-1, length, dim])))
    item = build.node("Unsqueeze", "item", build.constant(np.array([1])))
    item = build.node("Add", item, build.constant(np.zeros((1, length, 1), np.float32)))
    parts = build.node("Concat", seen, item, build.node("Sub", seen, item), build.node("Mul", seen, item), axis=2)
    w = lambda k, m: build.constant((rng.standard_normal((k, m)) * np.sqrt(2 / k)).astype(np.float32))  # noqa: E731
    hidden = build.node("Sigmoid", build.node("MatMul", parts, w(4 * dim, 36)))
    weight = build.node("Reshape", build.node("MatMul", hidden, w(36, 1)), build.constant(np.array([-1, length])))
    weight = build.node("Unsqueeze", build.node("Softmax", weight, axis=1), build.constant(np.array([2])))
    taste = build.node("ReduceSum", build.node("Mul", seen, weight), build.constant(np.array([1])), keepdims=0)
    x = build.node("Concat", taste, "item", "user", axis=1)
    x = build.dense(build.dense(x, 2 * dim + 16, 200), 200, 80)
    score = build.dense(x, 80, 1, relu=False)
    file = folder / "din.onnx"
    inputs = [("history", [("request", length * dim)]), ("item", [("item", dim)]), ("user", [("request", 16)])]
    build.save(file, [rows(name, sum(n for _, n in runs)) for name, runs in inputs], score)
    return Model("din", "DIN, attention over 20 of 32, 200-80", inputs, file)


def tree_ensemble(items, folder, rng) -> Model:
    runs = [("request", 20), ("item", 20), ("candidate", 10)]
    x = rng.standard_normal((20_000, 50)).astype(np.float32)
    y = x[:, 0] * x[:, 20] + np.sin(x[:, 2] * 3) + np.abs(x[:, 20:30]).sum(1) + x[:, 40] + 0.5 * rng.standard_normal(len(x))
    options = {"objective": "regression", "num_leaves": 31, "verbose": -1, "num_threads": 1, "seed": 1, "deterministic": True}
    booster = lightgbm.train(options, lightgbm.Dataset(x, y), 300)
    ensemble, link = trees.lightgbm(booster.dump_model())
    file = folder / "lightgbm.onnx"
    onnx.save(trees.onnx_model(ensemble, link, "features", "score"), file)
    return Model("lightgbm", "LightGBM, 300 trees of 31 leaves, 50 features", [("features", runs)], file, booster=booster)


def all_models(items: np.ndarray, folder: Path) -> list[Model]:
    def rng(seed: int) -> np.random.Generator:
        return np.random.default_rng(seed)

    ends = [("request", 96), ("item", 128), ("request", 32)]
    return [
        perceptron("S", "128-256-128-1", [("request", 64), ("item", 64)], [256, 128], items, folder, rng(1)),
        perceptron("V", "256-256-128-64-1", ends, [256, 128, 64], items, folder, rng(2)),
        perceptron("L", "256-512-256-128-1", ends, [512, 256, 128], items, folder, rng(3)),
        two_inputs(items, folder, rng(4)),
        dcn(items, folder, rng(5)),
        dlrm(items, folder, rng(6)),
        deepfm(items, folder, rng(7)),
        din(items, folder, rng(8)),
        tree_ensemble(items, folder, rng(9)),
    ]
