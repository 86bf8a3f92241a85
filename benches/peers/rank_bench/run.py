"""Rankers on one core: ONNX Runtime, rten, tract, LightGBM and ours take turns on the same models and the same requests.

    python benches/peers/rank_bench/run.py --cpu 1 --out record.md
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
from models import Model, all_models

ROOT = Path(__file__).resolve().parents[3]
N_ITEMS, N_ROWS, N_REQUESTS = 20_000, 900, 24
OURS = ["trees", "f32", "f32 table", "bf16", "bf16 table", "int8", "int8 table"]
# Model, ours, peer, least ratio of the peer's time to ours at 900 rows.
BARS = [
    *[(m, ours, "ort", least) for m in "SVL" for ours, least in (("f32", 1.0), ("f32 table", 1.8), ("int8 table", 5.5))],
    *[(m, "bf16 table", "ort", 4.5 if m == "V" else 3.3) for m in "SVL"],
    *[(m, "bf16 table", "ort rewritten", 2.2) for m in "SVL"],
    *[(m, "int8", "ort int8", 1.25) for m in "SVL"],
]
# Model, ours, least share of the core's ceiling at 900 rows, all that a call does beside its products counted as idle.
SHARES = [(m, ours, least) for m in "SVL" for ours, least in (("f32", 0.90), ("bf16", 0.90), ("int8", 0.85))]


class Peer:
    """A binary that answers a line of JSON at a time."""

    def __init__(self, *command):
        command = [str(part) for part in command]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, command: str, **arguments) -> dict:
        self.process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.process.args[0]} ended")
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


def built(target: str, *arguments) -> Path:
    """Builds what the arguments of cargo name and gives the place of the target's executable."""
    command = ["cargo", *arguments, "--message-format=json-render-diagnostics", "-q"]
    lines = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    made = [json.loads(line) for line in lines if line.startswith("{")]
    return Path(next(m["executable"] for m in made if m.get("executable") and m["target"]["name"] == target))


def requests(model: Model, items: np.ndarray, rng: np.random.Generator) -> list[dict]:
    """What is the request's is the same in all its rows, what is the item's the item's."""
    made = []
    for _ in range(N_REQUESTS):
        rows = np.sort(rng.choice(N_ITEMS, N_ROWS, replace=False)).astype(np.uint32)
        inputs, used = {}, 0
        for name, runs in model.inputs:
            parts = []
            for of, n in runs:
                if of == "request":
                    parts.append(np.repeat(rng.standard_normal((1, n)), N_ROWS, 0))
                elif of == "item":
                    parts.append(items[rows, used : used + n])
                    used += n
                else:
                    parts.append(rng.standard_normal((N_ROWS, n)))
            inputs[name] = np.ascontiguousarray(np.concatenate(parts, 1), np.float32)
        made.append({"inputs": inputs, "rows": rows})
    return made


def session(file: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def static_int8(model: Model, made: list[dict], folder: Path) -> Path:
    """ONNX Runtime's own static quantisation: QDQ, weights per channel, calibrated on the same requests."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.left = iter(made)

        def get_next(self):
            request = next(self.left, None)
            return request and request["inputs"]

    out = folder / f"{model.name}-int8.onnx"
    quantize_static(str(model.file), str(out), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)  # fmt: skip
    return out


def ndcg(reference: np.ndarray, scores: np.ndarray) -> float:
    """As the server measures it: f32's first ten are worth 10 to 1."""
    gains = np.zeros(len(reference))
    best = np.argsort(-reference, kind="stable")
    places = min(10, len(reference))
    gains[best[:places]] = 10 - np.arange(places)
    discount = 1 / np.log2(np.arange(places) + 2)
    return float((gains[np.argsort(-scores, kind="stable")[:places]] * discount).sum() / (gains[best[:places]] * discount).sum())


def feeds(model: Model, request: dict, batch: int, rewritten: bool) -> dict:
    if not rewritten:
        return {name: values[:batch] for name, values in request["inputs"].items()}
    runs = model.inputs[0][1]
    is_request = np.concatenate([np.full(n, of == "request") for of, n in runs])
    return {"request": request["inputs"]["features"][:1, is_request], "rows": request["rows"][:batch].astype(np.int64)}


def measure(model: Model, ours: Peer, tract: Peer | None, items: np.ndarray, folder: Path, args) -> list[dict]:
    rng = np.random.default_rng(11)
    made = requests(model, items, rng)
    files = []
    for at, request in enumerate(made):
        files.append(folder / f"{model.name}-{at}.bin")
        with files[-1].open("wb") as out:
            for values in request["inputs"].values():
                out.write(values.tobytes())
            out.write(request["rows"].tobytes())
    n_columns = sum(n for _, runs in model.inputs for of, n in runs if of == "item")
    (folder / "items.bin").write_bytes(np.ascontiguousarray(items[:, :n_columns]).tobytes())
    loaded = ours("load", name=model.name, onnx=str(model.file), inputs=model.inputs, items=str(folder / "items.bin"),
                  samples=[str(f) for f in files], n=N_ROWS)  # fmt: skip
    print(f"\n{model.name}: {model.title}")
    for key in ("f32", "bf16", "int8", "reason"):
        if key in loaded:
            print(f"  {key}: {loaded[key]}")
    others = []
    if tract and not model.booster:
        widths = [(name, model.width(name)) for name, _ in model.inputs]
        try:
            tract("load", name=model.name, onnx=str(model.file), inputs=widths, samples=[str(f) for f in files], n=N_ROWS)
            others.append("tract")
        except RuntimeError as error:
            print(f"  tract: {error}")
    if model.booster:
        others.append("lightgbm")
    sessions = {"ort": (session(model.file), False)}
    if model.rewritten:
        sessions["ort rewritten"] = (session(model.rewritten), True)
    if "ort int8" in model.peers:
        sessions["ort int8"] = (session(static_int8(model, made, folder)), False)
    reference = [sessions["ort"][0].run(["score"], r["inputs"])[0][:, 0] for r in made]
    engines = [*sessions, *others, *[e for e in ["rten", *OURS] if e in loaded["engines"]]]
    flops = loaded.get("flops", [None, None])
    results = []
    for batch in args.batches:
        asked = {name: [feeds(model, r, batch, rewritten) for r in made] for name, (_, rewritten) in sessions.items()}

        def turn(engine: str, rounds: int, scores: bool = False) -> tuple[list[int], list | None]:
            if engine == "tract":
                answer = tract("run", name=model.name, batch=batch, rounds=rounds, scores=scores)
                return answer["ns"], answer.get("scores")
            if engine in sessions:
                run, given = (lambda r: sessions[engine][0].run(["score"], r)[0][:, 0]), asked[engine]
            elif engine == "lightgbm":
                run, given = (lambda r: model.booster.predict(r, num_threads=1)), [r["features"] for r in asked["ort"]]
            else:
                answer = ours("run", name=model.name, engine=engine, batch=batch, rounds=rounds, scores=scores)
                return answer["ns"], answer.get("scores")
            times = []
            run(given[0])
            for round in range(rounds):
                request = given[round % N_REQUESTS]
                start = time.thread_time_ns()
                run(request)
                times.append(time.thread_time_ns() - start)
            return times, [run(r) for r in given] if scores else None

        fidelity, rounds = {}, {}
        for engine in engines:
            times, scores = turn(engine, 5, scores=True)
            rounds[engine] = int(np.clip(args.turn_ms * 1e6 / np.median(times), 3, 2000))
            if batch > 10:
                fidelity[engine] = np.mean([ndcg(r[:batch], np.array(s)) for r, s in zip(reference, scores)])
        turns = {engine: [] for engine in engines}
        for _ in range(args.turns):
            for engine in engines:
                turns[engine].append(np.median(turn(engine, rounds[engine])[0]))
        for engine in engines:
            us = float(np.median(turns[engine])) / 1e3
            work = flops[1 if "table" in engine else 0] if engine != "ort rewritten" else flops[1]
            ratios = {peer: float(np.median(np.array(turns[peer]) / turns[engine])) for peer in sessions}
            results.append({"model": model.name, "batch": batch, "engine": engine, "us": us, "ndcg": fidelity.get(engine),
                            "gflops": work and work * batch / us / 1e3, "ratios": ratios})  # fmt: skip
    return results


def report(results: list[dict], peak: list[float], titles: dict[str, str]) -> str:
    machine = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")

    def ceiling(engine: str) -> float:
        return peak[{"b": 1, "i": 2}.get(engine.removeprefix("ort ")[0], 0)]

    lines = [f"{time.strftime('%Y-%m-%d')}, {machine}, {os.cpu_count()} virtual CPUs, Linux {platform.release()}; "
             f"ONNX Runtime {ort.__version__}, 1 thread. CPU time, engines in turns on one core, medians.", "",
             f"The core's ceiling, in registers: f32 {peak[0]:.0f}, bf16 {peak[1]:.0f}, int8 {peak[2]:.0f} G/s.", ""]  # fmt: skip
    for batch in sorted({r["batch"] for r in results}, reverse=True):
        lines += [f"## {batch} candidates", "", "| model | engine | µs | G/s | of ceiling | × ort | NDCG@10 to f32 |",
                  "|---|---|--:|--:|--:|--:|--:|"]  # fmt: skip
        for r in (r for r in results if r["batch"] == batch):
            most = ceiling(r["engine"])
            speed = f"{r['gflops']:.0f} | {r['gflops'] / most:.0%}" if r["gflops"] and most else "| "
            near = "" if r["ndcg"] is None else f"{r['ndcg']:.5f}"
            title = f"{r['model']}: {titles[r['model']]}" if r["engine"] == "ort" else ""
            lines.append(f"| {title} | {r['engine']} | {r['us']:.1f} | {speed} | {r['ratios']['ort']:.2f} | {near} |")
        lines.append("")
    lines += ["## Bars at 900 candidates", "", "| model | ours | against | ratio | at least | |", "|---|---|---|--:|--:|---|"]
    for model, engine, peer, least in BARS:
        for r in results:
            if (r["model"], r["engine"], r["batch"]) == (model, engine, N_ROWS) and peer in r["ratios"]:
                held = "held" if r["ratios"][peer] >= least else "missed"
                lines.append(f"| {model} | {engine} | {peer} | {r['ratios'][peer]:.2f} | {least} | {held} |")
    for model, engine, least in SHARES:
        for r in results:
            if (r["model"], r["engine"], r["batch"]) == (model, engine, N_ROWS) and ceiling(engine):
                share = r["gflops"] / ceiling(engine)
                lines.append(f"| {model} | {engine} | the ceiling | {share:.2f} | {least} | {'held' if share >= least else 'missed'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, help="the bench, where it is not to be built: target/release/deps/rank-HASH")
    parser.add_argument("--tract", type=Path, help="the same of tract_peer")
    parser.add_argument("--no-tract", action="store_true", help="without tract, which takes some 9 minutes of CPU time to build once")
    parser.add_argument("--cpu", type=int, help="the core to run on; none where the command is pinned already")
    parser.add_argument("--models", nargs="*", help="names; all by default")
    parser.add_argument("--batches", nargs="*", type=int, default=[900, 64, 1])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--turn-ms", type=float, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    binary = args.binary or built("rank", "bench", "--bench", "rank", "--no-run")
    manifest = Path(__file__).parent / "tract/Cargo.toml"
    tract_binary = None if args.no_tract else args.tract or built(
        "tract_peer", "build", "--release", "--manifest-path", manifest, "--target-dir", ROOT / "target/tract")  # fmt: skip
    if args.cpu is not None:
        os.sched_setaffinity(0, {args.cpu})
    ours, tract = Peer(binary, "--json"), tract_binary and Peer(tract_binary)
    peak = ours("peak")
    items = np.random.default_rng(5).standard_normal((N_ITEMS, 128)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        models = [m for m in all_models(items, Path(folder)) if not args.models or m.name in args.models]
        results = [r for model in models for r in measure(model, ours, tract, items, Path(folder), args)]
    for peer in filter(None, (ours, tract)):
        peer.close()
    text = report(results, peak, {m.name: m.title for m in models})
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
