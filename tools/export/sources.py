"""Models as their own libraries run them, and as ONNX. Nothing is imported that the user's model does not need."""

import importlib
import inspect
import io
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import graphs
import numpy as np
import onnx
import trees
from errors import ExportError
from graphs import Input
from onnx import ModelProto, helper


@dataclass
class Source:
    """A model to export."""

    # For the manifest's first line.
    kind: str
    inputs: list[Input]
    # Names in `model`.
    outputs: list[str]
    model: ModelProto
    # What the model itself answers: inputs by name as it wants them, outputs by name, `[n]` or `[n, ...]`.
    predict: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
    # By input, by column: values that a column may have; normal noise where absent.
    values: dict[str, list[np.ndarray]] = field(default_factory=dict)
    # Numpy type of an input where it is not float32.
    dtypes: dict[str, np.dtype] = field(default_factory=dict)


def needed(module: str, file) -> object:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ExportError(f"{file}: needs {module}, which can't be imported: {error}") from error


def read(model: str, inputs: list[Input], outputs: list[str], opset: int) -> Source:
    path = Path(model)
    sys.path.insert(0, "")  # where the user's modules are
    if not path.exists():
        module, _, factory = model.partition(":")
        if not factory:
            raise ExportError(f"{model}: no such file, and no `package.module:factory`")
        return from_module(model, factory_module(model, module, factory), inputs, outputs, opset)
    kinds = {".onnx": from_onnx, ".txt": from_lightgbm, ".json": from_xgboost, ".ubj": from_xgboost}
    if path.suffix in kinds:
        try:
            return kinds[path.suffix](path, inputs, outputs)
        except ExportError as error:
            raise error if str(error).startswith(str(path)) else ExportError(f"{path}: {error}") from error
    if path.suffix in (".pt", ".pth", ".pt2", ".ts"):
        return from_module(model, torch_file(path), inputs, outputs, opset)
    raise ExportError(
        f"{path}: not one of .onnx, .txt (LightGBM), .json, .ubj (XGBoost), .pt, .pth, .ts, .pt2 (PyTorch)"
    )


def from_onnx(path: Path, inputs: list[Input], outputs: list[str]) -> Source:
    model = graphs.load(path)
    run = session(model)
    dtypes = {}
    for value in graphs.given(model):
        kind = value.type.tensor_type.elem_type
        dtypes[value.name] = helper.tensor_dtype_to_np_dtype(kind) if kind else np.dtype(np.float32)
    names = outputs or [o.name for o in model.graph.output][:1]
    known = {i.name for i in inputs}
    for value in graphs.given(model):
        if value.name not in known and not inputs:
            dims = graphs.shape_of(value)
            raise ExportError(f"--input is needed for `{value.name}` {dims or ''}: its feature columns")

    # One that was exported for a fixed batch answers by that many rows; the last of few is repeated.
    batch = next((shape[0] for shape in map(graphs.shape_of, graphs.given(model)) if shape and shape[0]), None)

    def answers(given):
        values = run.run(names, given)
        # A probability per class as a map per row.
        return [np.array([[row[c] for c in sorted(row)] for row in v]) if isinstance(v, list) else v for v in values]

    def predict(given):
        n = len(next(iter(given.values())))
        if not batch:
            return dict(zip(names, answers(given)))
        rows = [np.minimum(np.arange(at, at + batch), n - 1) for at in range(0, n, batch)]
        parts = [answers({k: v[some] for k, v in given.items()}) for some in rows]
        return {name: np.concatenate(values)[:n] for name, values in zip(names, zip(*parts))}

    return Source("ONNX", inputs, names, model, predict, dtypes=dtypes)


def session(model: ModelProto, optimize: bool = True):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime refuses the model: {error}") from error


def tree_input(inputs: list[Input], width: int, names: list[str]) -> Input:
    """The one input of an ensemble; its columns are the model's feature names unless something else is asked for."""
    if len(inputs) > 1:
        raise ExportError(f"an ensemble of trees has one input, not {len(inputs)}")
    if inputs:
        if inputs[0].width != width:
            raise ExportError(f"--input {inputs[0].name}: {inputs[0].width} values, but the model has {width} features")
        return inputs[0]
    default = [n for n in names if "." not in n]
    if default or len(names) != width:
        raise ExportError(
            "--input is needed: the model's feature names are no feature columns"
            + (f" (`{default[0]}`)" if default else "")
        )
    return Input("features", names, width, (width,))


def from_trees(kind, read, names, predict, inputs, outputs) -> Source:
    ensemble, link = read
    if len(outputs) > 1:
        raise ExportError("an ensemble of trees has one output")
    spec, score = tree_input(inputs, ensemble.n_features, names), (outputs or ["score"])[0]
    model = trees.onnx_model(ensemble, link, spec.name, score)
    return Source(
        kind, [spec], [score], model, lambda given: {score: predict(given[spec.name])}, {spec.name: ensemble.values()}
    )


def from_lightgbm(path: Path, inputs: list[Input], outputs: list[str]) -> Source:
    lightgbm = needed("lightgbm", path)
    try:
        booster = lightgbm.Booster(model_file=str(path))
    except lightgbm.basic.LightGBMError as error:
        raise ExportError(f"not readable as LightGBM: {error}") from error
    read = trees.lightgbm(booster.dump_model())
    return from_trees(
        "LightGBM", read, booster.feature_name(), lambda x: booster.predict(x, num_threads=1), inputs, outputs
    )


def from_xgboost(path: Path, inputs: list[Input], outputs: list[str]) -> Source:
    xgboost = needed("xgboost", path)
    booster = xgboost.Booster({"nthread": 1})
    try:
        booster.load_model(path)
    except (xgboost.core.XGBoostError, ValueError, UnicodeDecodeError) as error:
        raise ExportError(f"not readable as XGBoost: {str(error).splitlines()[0]}") from error
    read = trees.xgboost(bytes(booster.save_raw("json")))
    types = booster.feature_types

    def predict(x):
        names = booster.feature_names
        return booster.predict(xgboost.DMatrix(x, feature_names=names, feature_types=types, enable_categorical=True))

    return from_trees("XGBoost", read, booster.feature_names or [], predict, inputs, outputs)


def factory_module(model: str, module: str, factory: str):
    torch = needed("torch", model)
    try:
        made = getattr(importlib.import_module(module), factory)()
    except Exception as error:
        raise ExportError(f"{model}: {type(error).__name__}: {error}") from error
    if not isinstance(made, torch.nn.Module):
        raise ExportError(f"{model}: gives {type(made).__name__}, expected a torch.nn.Module")
    return made


def torch_file(path: Path):
    """A TorchScript, a pickled module, or a program of `torch.export`."""
    torch = needed("torch", path)
    warnings.simplefilter("ignore", FutureWarning)
    try:
        if path.suffix == ".pt2":
            return torch.export.load(path)
        try:
            return torch.jit.load(path, map_location="cpu")
        except RuntimeError:
            # A pickle runs what is in it: the README says so.
            more = {"weights_only": False} if "weights_only" in inspect.signature(torch.load).parameters else {}
            made = torch.load(path, map_location="cpu", **more)
    except Exception as error:
        raise ExportError(f"{path}: not readable as PyTorch: {error}") from error
    if not isinstance(made, torch.nn.Module):
        hint = (
            "; a state_dict alone has no computation: export with `package.module:factory`"
            if isinstance(made, dict)
            else ""
        )
        raise ExportError(f"{path}: holds {type(made).__name__}, expected a module{hint}")
    return made


def from_module(name: str, module, inputs: list[Input], outputs: list[str], opset: int) -> Source:
    import torch

    if not inputs:
        raise ExportError(f"{name}: needs an --input for each argument of `forward`, in that order")
    program = hasattr(module, "graph_signature")
    runs = module.module() if program else module.eval()

    def tensors(given):
        return tuple(torch.from_numpy(np.ascontiguousarray(given[i.name])) for i in inputs)

    dtypes = {i.name: np.dtype(np.int64) for i in inputs if i.ids is not None}
    # Neither 0 nor 1: these are special to exporters.
    example = tensors({i.name: np.zeros((3, *i.shape), dtypes.get(i.name, np.float32)) for i in inputs})

    def flat(answer) -> list:
        if isinstance(answer, dict):
            answer = list(answer.values())
        return list(answer) if isinstance(answer, (tuple, list)) else [answer]

    try:
        with torch.no_grad():
            n_outputs = len(flat(runs(*example)))
    except Exception as error:
        shapes = ", ".join(f"{i.name} {list(e.shape)} {e.dtype}" for i, e in zip(inputs, example))
        raise ExportError(f"{name}: does not run on {shapes}: {error}") from error
    names = outputs or (["score"] if n_outputs == 1 else [])
    if len(names) != n_outputs:
        raise ExportError(f"{name}: gives {n_outputs} outputs; name each by --output")
    model = exported(name, module, example, [i.name for i in inputs], names, opset)

    def predict(given):
        with torch.no_grad():
            return {n: v.numpy() for n, v in zip(names, flat(runs(*tensors(given))))}

    kind = "TorchScript" if isinstance(module, torch.jit.ScriptModule) else "PyTorch"
    return Source(kind, inputs, names, model, predict, dtypes=dtypes)


def exported(name: str, module, example: tuple, inputs: list[str], outputs: list[str], opset: int) -> ModelProto:
    """By the exporter that records programs where there is one; TorchScript by the older one, which alone reads it."""
    import torch

    known = inspect.signature(torch.onnx.export).parameters
    script = isinstance(module, torch.jit.ScriptModule)
    common = {"input_names": inputs, "output_names": outputs}
    buffer = io.BytesIO()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if "dynamic_shapes" in known and not script:
                program = hasattr(module, "graph_signature")
                batch = torch.export.Dim("n")
                # A program has said so itself.
                shapes = {} if program else {"dynamic_shapes": tuple({0: batch} for _ in example)}
                made = torch.onnx.export(
                    module,
                    () if program else example,
                    dynamo=True,
                    verbose=False,
                    opset_version=max(opset, 18),
                    **common,
                    **shapes,
                )
                model = made.model_proto
            else:
                more = {"dynamo": False} if "dynamo" in known else {}
                axes = {n: {0: "n"} for n in (*inputs, *outputs)}
                torch.onnx.export(module, example, buffer, dynamic_axes=axes, opset_version=opset, **common, **more)
                model = onnx.load_from_string(buffer.getvalue())
    except Exception as error:
        raise ExportError(f"{name}: torch.onnx.export: {type(error).__name__}: {error}") from error
    fixed = [v.name for v in graphs.given(model) if (graphs.shape_of(v) or [None])[0] is not None]
    if fixed:
        hint = "torch.export.export with dynamic_shapes={...: {0: torch.export.Dim('n')}}"
        raise ExportError(f"{name}: input `{fixed[0]}` has a fixed batch; make the program by {hint}")
    return model
