"""Makes an ONNX ranker of a trained model, with its manifest, and holds it against the model that it came from.

    export.py MODEL --out DATASET/rankers [--name main] --input NAME=COLUMN,COLUMN*WIDTH,... [...]

MODEL is package.module:factory, .pt, .pth, .ts or .pt2 (PyTorch), .json or .ubj (XGBoost), .txt (LightGBM), or .onnx.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import check
import graphs
import numpy as np
import onnx
import sources
from errors import ExportError
from graphs import Input
from onnx import ModelProto, TensorProto

VARIANTS = ("fp16", "bf16", "int8")


def parse_input(text: str) -> Input:
    """`NAME=COLUMN,COLUMN*WIDTH,...` or `NAME=@FILE` with a column a line."""
    name, equals, columns = text.partition("=")
    if not (name and equals and columns):
        raise ExportError(f"--input {text}: expected NAME=COLUMN,COLUMN*WIDTH,... or NAME=@FILE")
    if columns.startswith("@"):
        try:
            listed = [line.strip() for line in Path(columns[1:]).read_text().splitlines()]
        except OSError as error:
            raise ExportError(f"--input {name}: {columns[1:]}: {error.strerror}") from error
    else:
        listed = columns.split(",")
    names, width = [], 0
    for column in filter(None, listed):
        column, _, wide = column.partition("*")
        if wide and not (wide.isdecimal() and int(wide)):
            raise ExportError(f"--input {name}: `{column}*{wide}`: the width is no number above 0")
        names.append(column)
        width += int(wide or 1)
    return Input(name, names, width, (width,))


def setting(texts: list[str], option: str, inputs: dict[str, Input]):
    """`NAME=VALUE` pairs, each with its input."""
    for text in texts:
        name, _, value = text.partition("=")
        if name not in inputs:
            raise ExportError(f"{option} {text}: no --input `{name}`")
        yield inputs[name], value


def parse_inputs(args) -> list[Input]:
    inputs = {}
    for text in args.input:
        spec = parse_input(text)
        if spec.name in inputs:
            raise ExportError(f"--input {spec.name}: given twice")
        inputs[spec.name] = spec
    for spec, value in setting(args.ids, "--ids", inputs):
        if not (value.isdecimal() and 0 < int(value) <= 1 << 24):
            raise ExportError(f"--ids {spec.name}={value}: expected 1 to 16777216, which is what float32 counts to")
        spec.ids = int(value)
    for spec, value in setting(args.shape, "--shape", inputs):
        parts = [p for p in value.split(",") if p]
        if not all(p.isdecimal() for p in parts) or np.prod([int(p) for p in parts], dtype=int) != spec.width:
            raise ExportError(f"--shape {spec.name}={value}: the product must be the input's {spec.width} values")
        spec.shape = tuple(int(p) for p in parts)
    return list(inputs.values())


def read_data(file: Path, inputs: list[Input]) -> dict[str, np.ndarray]:
    """Rows of the user's own: an .npz with an array `[n, width]` per input, or Parquet with the feature columns."""
    try:
        if file.suffix == ".npz":
            with np.load(file) as arrays:
                data = {i.name: np.asarray(arrays[i.name], np.float32).reshape(len(arrays[i.name]), -1) for i in inputs}
        else:
            import pyarrow.parquet as pq

            table = pq.read_table(file)
            columns = {
                c: np.array(table[c].to_pylist(), np.float32).reshape(len(table), -1) for i in inputs for c in i.columns
            }
            data = {i.name: np.concatenate([columns[c] for c in i.columns], 1) for i in inputs}
    except (KeyError, OSError, ValueError) as error:
        raise ExportError(f"--data {file}: {error}") from error
    for spec in inputs:
        if data[spec.name].shape[1] != spec.width:
            raise ExportError(
                f"--data {file}: {data[spec.name].shape[1]} values for `{spec.name}`, expected {spec.width}"
            )
    if len({len(v) for v in data.values()}) != 1 or not len(next(iter(data.values()))):
        raise ExportError(f"--data {file}: inputs of different numbers of rows, or none")
    return data


def pieces(data: dict[str, np.ndarray], n: int):
    length = len(next(iter(data.values())))
    for start in range(0, length, n):
        yield {name: values[start : start + n] for name, values in data.items()}


def verify(source: sources.Source, model: ModelProto, data: dict | None, args) -> float:
    """The largest relative difference from the source.

    Raises ExportError beyond the tolerance, or where a row's score depends on the rows beside it.
    """
    run, worst = sources.session(model), 0.0
    rng = np.random.default_rng(args.seed)
    trials = [check.rows(source.inputs, n, source.values, rng) for n in check.BATCHES]
    trials += list(pieces(data, 900))[:20] if data else []
    for given in trials:
        n = len(next(iter(given.values())))
        which = "source"
        try:
            want = source.predict(check.native(source.inputs, source.dtypes, given))
            which = "exported model"
            got = run.run(source.outputs, given)
        except Exception as error:
            raise ExportError(f"{args.model}: the {which} does not run on {n} rows: {error}") from error
        for name, values in zip(source.outputs, got):
            expected = check.score(want[name], n, args.column)
            if values.shape not in ((n,), (n, 1)):
                raise ExportError(
                    f"output `{name}` has shape {list(values.shape)} for {n} rows, expected [{n}] or [{n}, 1]"
                )
            off = check.furthest(expected, check.score(values, n, None))
            if off > args.tolerance:
                raise ExportError(
                    f"output `{name}` differs from the source by {off:.3g} of its largest value on {n} rows; "
                    f"--tolerance is {args.tolerance:g}"
                )
            worst = max(worst, off)
    few = next(t for t in trials if len(next(iter(t.values()))) == 7)
    for name, together in zip(source.outputs, run.run(source.outputs, few)):
        alone = [run.run([name], one)[0].ravel() for one in pieces(few, 1)]
        if check.furthest(np.concatenate(alone).astype(float), together.ravel().astype(float)) > args.tolerance:
            raise ExportError(f"output `{name}` of a row depends on the rows beside it; a ranker scores each row alone")
    return worst


def variant(
    kind: str, source: sources.Source, model: ModelProto, data: dict | None, args
) -> tuple[ModelProto, check.Fidelity]:
    rng = np.random.default_rng(args.seed + 1)
    if data:
        batches = list(pieces(data, 900))[:50]
    else:
        batches = [check.rows(source.inputs, 900, source.values, rng) for _ in range(8)]
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if kind == "int8":
        if not data:
            print(
                "warning: int8 is calibrated on random rows; --data with real ones is what to serve with",
                file=sys.stderr,
            )
        with tempfile.TemporaryDirectory() as folder:
            made = graphs.int8(copy, batches, Path(folder))
    else:
        made = graphs.half(copy, {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[kind])
    # bf16 is what ONNX Runtime's CPU provider does not compute; and an optimizer would take roundings away.
    run = sources.session(graphs.emulated(made), optimize=False) if kind == "bf16" else sources.session(made)
    exact, pairs = sources.session(model), []
    for given in batches:
        n = len(next(iter(given.values())))
        both = [r.run(source.outputs, given) for r in (exact, run)]
        pairs += [(check.score(a, n, None), check.score(b, n, None)) for a, b in zip(*both)]
    found = check.fidelity(pairs)
    if not found.ndcg >= args.min_ndcg:
        raise ExportError(
            f"--variant {kind}: {found} on {'--data' if data else 'random rows'}; --min-ndcg is {args.min_ndcg:g}"
        )
    return made, found


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def manifest(source: sources.Source, model: str, args) -> str:
    lines = [f"# Made by tools/export from {model} ({source.kind})."]
    for spec in source.inputs:
        lines += ["[[inputs]]", f"name = {quoted(spec.name)}", "columns = ["]
        lines += [*(f"    {quoted(column)}," for column in spec.columns), "]", ""]
    output = ("score", args.score) if args.score else ("name", source.outputs[0])
    return "\n".join([*lines, "[output]", f"{output[0]} = {quoted(output[1])}", ""])


def export(args) -> list[str]:
    """Writes all files or none; what was made, a line each."""
    inputs = parse_inputs(args)
    if not all(part.isidentifier() for part in args.name.replace("-", "_").split(".")):
        raise ExportError(f"--name {args.name}: letters, digits, `_` and `-` only")
    if args.column is not None and len(args.output) > 1:
        raise ExportError("--column: only with one output")
    source = sources.read(args.model, inputs, args.output, args.opset)
    if len(source.outputs) > 1 and not args.score:
        raise ExportError(
            f"outputs {', '.join(source.outputs)}: --score says how they make one, as in '0.7 * a + 0.3 * b'"
        )
    data = read_data(args.data, source.inputs) if args.data else None
    model = graphs.ranker(graphs.at_least(source.model, args.opset), source.inputs, source.outputs, args.column)
    worst = verify(source, model, data, args)
    files = {f"{args.name}.onnx": model}
    done = [f"{args.name}.onnx: opset {graphs.opset(model)}, within {worst:.2g} of the {source.kind} model"]
    for kind in dict.fromkeys(args.variant):
        made, found = variant(kind, source, model, data, args)
        files[f"variants/{args.name}.{kind}.onnx"] = made
        done.append(f"variants/{args.name}.{kind}.onnx: against float32 {found}")
    text = manifest(source, Path(args.model).name, args)
    contents = {}
    for name, made in files.items():
        contents[name] = made.SerializeToString(deterministic=True)
        contents[name.removesuffix("onnx") + "toml"] = text.encode()
    taken = [name for name in contents if (args.out / name).exists()]
    if taken and not args.overwrite:
        raise ExportError(f"{args.out / taken[0]}: exists; --overwrite replaces it")
    write(args.out, contents)
    return done


def write(out: Path, contents: dict[str, bytes]) -> None:
    """All files or none: each under another name first, then renamed."""
    placed = []
    try:
        for name, content in contents.items():
            file = out / name
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f".{file.name}.part")
            placed.append((part, file))
            part.write_bytes(content)
        for part, file in placed:
            os.replace(part, file)
    except OSError as error:
        raise ExportError(f"{error.filename or out}: {error.strerror}") from error
    finally:
        for part, _ in placed:
            part.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument(
        "--out", type=Path, required=True, help="directory for NAME.onnx and NAME.toml, and variants/ in it"
    )
    parser.add_argument("--name", default="main", help="the ranker's name (default %(default)s)")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=COLUMNS",
        help="an input and its feature columns, COLUMN or COLUMN*WIDTH, by commas, or @FILE, one a line; "
        "for PyTorch in the order of forward's arguments; trees may go without",
    )
    parser.add_argument(
        "--ids", action="append", default=[], metavar="NAME=N", help="the input is whole numbers below N (int64)"
    )
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="NAME=A,B",
        help="a row of the input is [A, B] for the model, as a sequence is; empty: [n] without an axis",
    )
    parser.add_argument(
        "--output",
        action="append",
        default=[],
        metavar="NAME",
        help="outputs: PyTorch's in their order, or which of an ONNX file (default: score, the first)",
    )
    parser.add_argument(
        "--column", type=int, help="of an output of several values a row, the one that is the score, from 0"
    )
    parser.add_argument(
        "--score", metavar="EXPRESSION", help="one score of several outputs: 0.7 * click + 0.3 * purchase"
    )
    parser.add_argument("--opset", type=int, default=17, help="least opset, 17 or more (default %(default)s)")
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="rows to check and calibrate on: .npz by input, or Parquet by column"
    )
    parser.add_argument(
        "--variant", action="append", default=[], choices=VARIANTS, help="another file in variants/; repeatable"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest difference from the source, over the largest score or 1 (default %(default)s)",
    )
    parser.add_argument(
        "--min-ndcg", type=float, default=0.98, help="least NDCG@10 of a variant to float32 (default %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument("--seed", type=int, default=1, help="of the random rows")
    args = parser.parse_args(arguments)
    if args.opset < 17:
        parser.error("--opset: 17 or more")
    try:
        for line in export(args):
            print(line)
    except ExportError as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
