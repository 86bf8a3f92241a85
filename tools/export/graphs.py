"""ONNX graphs brought into the form that the server takes, and into narrower numbers."""

import logging
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
from errors import ExportError
from onnx import (
    ModelProto,
    NodeProto,
    TensorProto,
    helper,
    numpy_helper,
    shape_inference,
    version_converter,
)

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
INTEGERS = (
    TensorProto.INT64,
    TensorProto.INT32,
    TensorProto.INT16,
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.BOOL,
)


@dataclass
class Input:
    """An input of the ranker: float32 `[n, width]`."""

    name: str
    # Of the manifest; empty until known.
    columns: list[str]
    width: int
    # A row's values as the model wants them; `()` for one value and no axis.
    shape: tuple[int, ...]
    # Whole numbers below this; None: any number.
    ids: int | None = None


def inner(node: NodeProto) -> list[onnx.GraphProto]:
    """The graphs in a node, as a loop has them."""
    found = [g for a in node.attribute for g in (*((a.g,) if a.HasField("g") else ()), *a.graphs)]
    return found + [g for graph in found for n in graph.node for g in inner(n)]


def load(file) -> ModelProto:
    """A file with everything that it refers to."""
    try:
        return onnx.load(file)
    except Exception as error:
        raise ExportError(f"{file}: not readable as ONNX: {error}") from error


def opset(model: ModelProto) -> int:
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)


def at_least(model: ModelProto, version: int) -> ModelProto:
    if opset(model) >= version:
        return model
    try:
        return version_converter.convert_version(model, version)
    except Exception as error:
        raise ExportError(f"opset {opset(model)} does not convert to {version}: {error}") from error


def given(model: ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs; constants may be listed among them, but are none."""
    constants = {t.name for t in model.graph.initializer}
    return [i for i in model.graph.input if i.name not in constants]


def shape_of(value: onnx.ValueInfoProto) -> list[int | None] | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]


def rename(nodes, old: str, new: str) -> None:
    """In nodes and the graphs in them, where no name may stand for something else."""
    for node in nodes:
        for names in (node.input, node.output):
            for at, name in enumerate(names):
                if name == old:
                    names[at] = new
        for graph in inner(node):
            rename(graph.node, old, new)
            for output in graph.output:
                output.name = new if output.name == old else output.name


def constant(model: ModelProto, name: str, values: np.ndarray) -> str:
    model.graph.initializer.append(numpy_helper.from_array(values, name))
    return name


def prune(model: ModelProto) -> None:
    """Leaves what the outputs depend on."""
    graph = model.graph
    wanted, kept = {o.name for o in graph.output}, []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
            for part in inner(node):
                wanted.update(n for inside in part.node for n in inside.input)
                wanted.update(o.name for o in part.output)
    kept.reverse()
    constants = [t for t in graph.initializer if t.name in wanted]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(constants)


def strip(model: ModelProto) -> None:
    """Removes what differs from machine to machine: notes, paths, stale shapes."""
    model.producer_name, model.producer_version, model.doc_string, model.graph.doc_string = (
        "tastemaker export",
        "",
        "",
        "",
    )
    model.graph.name = "ranker"
    names = set()
    for at, node in enumerate(model.graph.node):  # messages name nodes, and no two may have one name
        if not node.name or node.name in names:
            node.name = f"{node.op_type}_{at}"
        names.add(node.name)
    for part in (
        model,
        model.graph,
        *model.graph.node,
        *model.graph.initializer,
        *model.graph.input,
        *model.graph.output,
    ):
        del part.metadata_props[:]
        part.doc_string = ""
    del model.graph.value_info[:]


def ranker(model: ModelProto, inputs: list[Input], outputs: list[str], column: int | None) -> ModelProto:
    """The same with inputs float32 `[n, width]` and outputs float32 of one value per row, each named as asked for.

    `outputs`: names in the graph. `column`: of an output of several values per row, the one that is the score.
    """
    graph, front = model.graph, []
    by_name = {value.name: value for value in given(model)}
    for spec in inputs:
        if spec.name not in by_name:
            raise ExportError(f"no input `{spec.name}`; the model has {', '.join(by_name)}")
        kind = by_name[spec.name].type.tensor_type.elem_type
        if kind not in FLOATS + INTEGERS:
            raise ExportError(f"input `{spec.name}`: neither numbers nor truth values")
        value, steps = spec.name, []
        # Casts first: whole numbers stay exact where the rest is computed in fewer bits.
        if kind != TensorProto.FLOAT:
            steps.append(("Cast", [], {"to": kind}))
        if spec.shape != (spec.width,):
            shape = constant(model, f"{spec.name}/shape", np.array([-1, *spec.shape], np.int64))
            steps.append(("Reshape", [shape], {}))
        if steps:
            rename(graph.node, spec.name, f"{spec.name}/given")
        for at, (op, more, attributes) in enumerate(steps):
            result = f"{spec.name}/given" if at + 1 == len(steps) else f"{spec.name}/{at}"
            front.append(helper.make_node(op, [value, *more], [result], name=f"{op} {spec.name}", **attributes))
            value = result
    missing = [name for name in by_name if name not in {spec.name for spec in inputs}]
    if missing:
        raise ExportError(f"input `{missing[0]}` of the model has no --input")
    known = {o.name: o for o in graph.output}
    made = {name: node for node in graph.node for name in node.output}
    back, results = [], []
    for name in outputs:
        if name not in known:
            raise ExportError(f"no output `{name}`; the model has {', '.join(known)}")
        value = name
        if made.get(name) and made[name].op_type == "ZipMap":
            value = made[name].input[0]
        shape = shape_of(known[name]) if value == name else None
        # A row's only value may have any number of axes; what has several needs a column.
        rank_one = shape is not None and len(shape) == 1
        steps = []
        if column is not None:
            steps.append(("Gather", [constant(model, f"{name}/column", np.array([column], np.int64))], {"axis": 1}))
        elif not rank_one and shape != [shape and shape[0], 1]:
            steps.append(("Reshape", [constant(model, f"{name}/shape", np.array([-1, 1], np.int64))], {}))
        if value == name and known[name].type.tensor_type.elem_type != TensorProto.FLOAT:
            steps.append(("Cast", [], {"to": TensorProto.FLOAT}))
        if steps and value == name:
            value = f"{name}/made"
            rename(graph.node, name, value)
        elif value != name:
            graph.node.remove(made[name])
            steps = steps or [("Identity", [], {})]
        for at, (op, more, attributes) in enumerate(steps):
            result = name if at + 1 == len(steps) else f"{name}/{at}"
            back.append(helper.make_node(op, [value, *more], [result], name=f"{op} {name}", **attributes))
            value = result
        flat = rank_one and column is None
        results.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"] if flat else ["n", 1]))
    nodes = [*front, *graph.node, *back]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    graph.input.extend(helper.make_tensor_value_info(i.name, TensorProto.FLOAT, ["n", i.width]) for i in inputs)
    graph.output.extend(results)
    strip(model)
    prune(model)
    return checked(model)


def checked(model: ModelProto) -> ModelProto:
    try:
        onnx.checker.check_model(model)
        model.SerializeToString()
    except ValueError as error:
        raise ExportError(f"more than a file of 2 GiB holds: {error}") from error
    except onnx.checker.ValidationError as error:
        raise ExportError(f"not valid ONNX: {error}") from error
    return model


def half(model: ModelProto, kind: int) -> ModelProto:
    """Weights and arithmetic in float16 or bfloat16, inputs and outputs as before, with a Cast at each.

    That is the form that TensorRT needs, whose newer versions take precisions from the graph alone.
    """
    name = {TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}[kind]
    dtype = np.float16 if kind == TensorProto.FLOAT16 else ml_dtypes.bfloat16
    for unfit in model.graph.node:
        if unfit.domain in ("", "ai.onnx") and "Quantize" not in unfit.op_type and not inner(unfit):
            continue
        raise ExportError(f"--variant {name}: node `{unfit.name}` ({unfit.op_type}) has no such form")
    model = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    graph = model.graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    kinds.update({t.name: t.data_type for t in graph.initializer})
    # What becomes a whole number is computed in float32: half of the bits don't hold ids.
    exact = {v.name for v in graph.input}
    stays = set()
    for at, node in reversed(list(enumerate(graph.node))):
        counts = node.op_type == "Cast" and any(a.name == "to" and a.i in INTEGERS for a in node.attribute)
        if counts or exact.intersection(node.output):
            exact.update(node.input)
            stays.add(at)
    constants = {t.name: t for t in graph.initializer}
    narrow, nodes = {}, []

    def narrowed(value: str) -> str:
        """The name of the value in fewer bits, made where it is needed first."""
        if kinds.get(value) != TensorProto.FLOAT or (value not in exact and value not in constants):
            return value
        if value not in narrow:
            narrow[value] = f"{value}/{name}"
            if value in constants:
                values = numpy_helper.to_array(constants[value])
                with np.errstate(over="ignore"):
                    rounded = values.astype(dtype)
                if np.isinf(rounded.astype(np.float32)).any() and np.isfinite(values).all():
                    raise ExportError(f"--variant {name}: `{value}` holds {np.abs(values).max():g}, beyond its range")
                tensor = helper.make_tensor(narrow[value], kind, values.shape, rounded.tobytes(), raw=True)
                graph.initializer.append(tensor)
            else:
                nodes.append(helper.make_node("Cast", [value], [narrow[value]], name=f"Cast {narrow[value]}", to=kind))
        return narrow[value]

    outputs = {o.name for o in graph.output}
    for place, node in enumerate(list(graph.node)):
        if place not in stays:
            node.input[:] = [narrowed(i) for i in node.input]
            for attribute in node.attribute:
                narrow_attribute(node, attribute, kind, dtype)
        nodes.append(node)
        for at, out in enumerate(node.output):
            if out in outputs and place not in stays:
                rename(graph.node, out, f"{out}/{name}")
                nodes.append(
                    helper.make_node("Cast", [f"{out}/{name}"], [out], name=f"Cast {out}", to=TensorProto.FLOAT)
                )
    del graph.node[:]
    graph.node.extend(nodes)
    strip(model)
    prune(model)
    return checked(model)


def emulated(model: ModelProto) -> ModelProto:
    """A bfloat16 model for runtimes that only convert bfloat16: nodes compute in float32, what they give is rounded."""
    kinds = {
        v.name: v.type.tensor_type.elem_type
        for v in shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph.value_info
    }
    kinds.update({t.name: t.data_type for t in model.graph.initializer})
    made, nodes, wide = onnx.ModelProto(), [], set()
    made.CopyFrom(model)
    for node in made.graph.node:
        if node.op_type != "Cast":
            for at, value in enumerate(node.input):
                if kinds.get(value) == TensorProto.BFLOAT16:
                    if value not in wide:
                        nodes.append(helper.make_node("Cast", [value], [f"{value}/wide"], to=TensorProto.FLOAT))
                        wide.add(value)
                    node.input[at] = f"{value}/wide"
        nodes.append(node)
        for at, value in enumerate(node.output):
            if kinds.get(value) == TensorProto.BFLOAT16 and node.op_type != "Cast":
                node.output[at] = f"{value}/exact"
                nodes.append(helper.make_node("Cast", [node.output[at]], [value], to=TensorProto.BFLOAT16))
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    strip(made)
    return made


def narrow_attribute(node: NodeProto, attribute, kind: int, dtype) -> None:
    if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
        attribute.i = kind
    elif node.op_type in ("Constant", "ConstantOfShape") and attribute.type == onnx.AttributeProto.TENSOR:
        if attribute.t.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(attribute.t).astype(dtype)
            attribute.t.CopyFrom(helper.make_tensor("", kind, values.shape, values.tobytes(), raw=True))
    elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
        values = np.array(attribute.f if attribute.name == "value_float" else list(attribute.floats)).astype(dtype)
        node.attribute[0].CopyFrom(
            helper.make_attribute("value", helper.make_tensor("", kind, values.shape, values.tobytes(), raw=True))
        )


def int8(model: ModelProto, rows: list[dict[str, np.ndarray]], folder) -> ModelProto:
    """Weights and activations of 8 bits (QDQ, weights per channel), calibrated on `rows`, by ONNX Runtime's tool."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.left = iter(rows)

        def get_next(self):
            return next(self.left, None)

    if all(n.op_type not in ("Gemm", "MatMul") for n in model.graph.node):
        raise ExportError("--variant int8: the model has no products to quantise")
    onnx.save(model, folder / "plain.onnx")
    logging.getLogger().setLevel(logging.ERROR)  # it advises on the root's logger
    quantize_static(
        str(folder / "plain.onnx"),
        str(folder / "int8.onnx"),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    made = onnx.load(folder / "int8.onnx")
    strip(made)
    return checked(made)
