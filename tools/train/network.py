"""A small multi-layer perceptron: standardized inputs, ReLU layers, one logit; trained by Adam, saved as ONNX."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Mlp:
    """Weights `[in, out]` and biases; the first layer has the standardization folded in."""

    def __init__(self, weights: list[np.ndarray], biases: list[np.ndarray]):
        self.weights, self.biases = weights, biases

    def __call__(self, x: np.ndarray) -> np.ndarray:
        for at, (w, b) in enumerate(zip(self.weights, self.biases)):
            x = x @ w + b
            if at + 1 < len(self.weights):
                x = np.maximum(x, 0)
        return x[:, 0]

    @classmethod
    def fit(cls, x: np.ndarray, y: np.ndarray, hidden: list[int], epochs: int, rng: np.random.Generator) -> "Mlp":
        """Binary cross-entropy on `x` `[n, width]`, `y` `[n]` in {0, 1}; learning rate falls to 0 along a cosine."""
        mean, std = x.mean(0), x.std(0)
        std[std < 1e-6] = 1.0
        z = ((x - mean) / std).astype(np.float32)
        sizes = [x.shape[1], *hidden, 1]
        net = cls(
            [(rng.standard_normal((i, o)) * np.sqrt(2 / i)).astype(np.float32) for i, o in zip(sizes, sizes[1:])],
            [np.zeros(o, np.float32) for o in sizes[1:]],
        )
        parameters = net.weights + net.biases
        first = [np.zeros_like(p) for p in parameters]
        second = [np.zeros_like(p) for p in parameters]
        batch, step = 1024, 0
        steps = epochs * -(-len(y) // batch)
        for _ in range(epochs):
            order = rng.permutation(len(y))
            for start in range(0, len(y), batch):
                pick = order[start : start + batch]
                gradients = net._gradients(z[pick], y[pick])
                step += 1
                rate = 2e-3 * 0.5 * (1 + np.cos(np.pi * step / steps))
                for p, g, m, v in zip(parameters, gradients, first, second):
                    m += 0.1 * (g - m)
                    v += 0.001 * (g * g - v)
                    p -= rate * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        # (x - mean) / std @ w + b  =  x @ (w / std) + (b - mean / std @ w)
        scaled = net.weights[0] / std[:, None]
        net.biases[0] = (net.biases[0] - mean @ scaled).astype(np.float32)
        net.weights[0] = scaled.astype(np.float32)
        return net

    def _gradients(self, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
        layers = [x]
        for at, (w, b) in enumerate(zip(self.weights, self.biases)):
            x = x @ w + b
            if at + 1 < len(self.weights):
                x = np.maximum(x, 0)
            layers.append(x)
        delta = ((1 / (1 + np.exp(-layers[-1][:, 0])) - y) / len(y))[:, None].astype(np.float32)
        weights, biases = [], []
        for at in range(len(self.weights) - 1, -1, -1):
            weights.insert(0, layers[at].T @ delta)
            biases.insert(0, delta.sum(0))
            if at:
                delta = (delta @ self.weights[at].T) * (layers[at] > 0)
        return weights + biases

    def save_onnx(self, file: Path) -> None:
        """Input `features` f32 [n, width], output `score` f32 [n, 1]; the batch axis is dynamic."""
        nodes, initializers, name = [], [], "features"
        for at, (w, b) in enumerate(zip(self.weights, self.biases)):
            last = at + 1 == len(self.weights)
            initializers += [numpy_helper.from_array(w, f"w{at}"), numpy_helper.from_array(b, f"b{at}")]
            out = "score" if last else f"linear{at}"
            nodes.append(helper.make_node("Gemm", [name, f"w{at}", f"b{at}"], [out], name=f"gemm{at}"))
            name = out
            if not last:
                nodes.append(helper.make_node("Relu", [name], [f"relu{at}"], name=f"relu{at}"))
                name = f"relu{at}"
        graph = helper.make_graph(
            nodes,
            "ranker",
            [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", self.weights[0].shape[0]])],
            [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n", 1])],
            initializers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        onnx.save(model, file)
