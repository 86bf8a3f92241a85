"""Makes ids.onnx beside it: numbers and whole numbers, which pick rows of a table (python make.py, with numpy and onnx)."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

rng = np.random.default_rng(7)
constants = {
    "table": rng.standard_normal((7, 4)).astype(np.float32),
    "flat": np.array([-1, 8]),
    "w": rng.standard_normal((11, 1)).astype(np.float32),
    "b": np.array([0.25], np.float32),
}
nodes = [
    helper.make_node("Gather", ["table", "ids"], ["rows"]),
    helper.make_node("Reshape", ["rows", "flat"], ["side"]),
    helper.make_node("Concat", ["numbers", "side"], ["x"], axis=1),
    helper.make_node("Gemm", ["x", "w", "b"], ["score"]),
]
for at, node in enumerate(nodes):
    node.name = f"{node.op_type}{at}"
inputs = [helper.make_tensor_value_info("numbers", TensorProto.FLOAT, ["n", 3]),
          helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", 2])]  # fmt: skip
output = helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n", 1])
tensors = [numpy_helper.from_array(values, name) for name, values in constants.items()]
graph = helper.make_graph(nodes, "ids", inputs, [output], tensors)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
onnx.checker.check_model(model)
onnx.save(model, Path(__file__).parent / "ids.onnx")
