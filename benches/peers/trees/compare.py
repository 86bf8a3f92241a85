"""Tree ensembles: Tastemaker's evaluator beside ONNX Runtime (one thread), the same model and rows, in turns.

    taskset -c 1 python benches/peers/trees/compare.py

Needs tests/golden/trees/requirements.txt and cargo. Times are CPU time of the scoring thread; the ratio is the median over the
rounds of one round's ratio. Scores are compared before anything is timed.
"""

import argparse
import json
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import lightgbm
import numpy as np
import onnx
import onnxruntime
from onnxmltools import convert_lightgbm
from onnxmltools.convert.common.data_types import FloatTensorType

ROOT = Path(__file__).resolve().parents[3]
WIDTH = 50


def binary():
    """Builds the bench and returns its executable."""
    command = ["cargo", "bench", "--bench", "trees", "--no-run", "--message-format=json", "-q"]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    artifacts = [json.loads(line) for line in lines if line.startswith("{")]
    return next(a["executable"] for a in artifacts if a.get("target", {}).get("name") == "trees" and a.get("executable"))


def model(n_trees, n_leaves, random):
    x = random.normal(size=(20000, WIDTH)).astype(np.float32)
    y = x[:, 0] * x[:, 1] + np.sin(x[:, 2] * 3) + np.abs(x[:, 3:12]).sum(1) + random.normal(size=len(x))
    options = {"verbose": -1, "n_jobs": 1, "seed": 1, "min_child_samples": 5}
    trained = lightgbm.LGBMRegressor(n_estimators=n_trees, num_leaves=n_leaves, **options).fit(x, y)
    return convert_lightgbm(trained, initial_types=[("x", FloatTensorType([None, WIDTH]))])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--shapes", default="300x31,300x63,300x255,100x1000", help="trees x leaves")
    parser.add_argument("--batches", default="1,64,900")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    random, executable = np.random.default_rng(3), binary()
    print("| trees x leaves | rows | ONNX Runtime µs | ours µs | ratio |\n|---|--:|--:|--:|--:|")
    for shape in arguments.shapes.split(","):
        exported = model(*map(int, shape.split("x")), random)
        output = exported.graph.output[0].name
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(exported.SerializeToString(), options)
        for n in map(int, arguments.batches.split(",")):
            rows = random.normal(size=(n, WIDTH)).astype(np.float32)
            with tempfile.TemporaryDirectory() as work:
                file, features = Path(work, "model.onnx"), Path(work, "rows")
                onnx.save(exported, file)
                features.write_bytes(rows.tobytes())
                command = [executable, file, output, str(WIDTH), features]
                ours = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                scores = np.array(json.loads(ours.stdout.readline()))
                theirs = session.run([output], {"x": rows})[0].reshape(-1)
                assert np.allclose(scores, theirs, rtol=1e-4, atol=1e-4), "the scores differ"
                repetitions, times = max(3, 3000 // n), []
                for _ in range(arguments.rounds):
                    start = time.thread_time_ns()
                    for _ in range(repetitions):
                        session.run([output], {"x": rows})
                    spent = time.thread_time_ns() - start
                    ours.stdin.write(f"{repetitions}\n")
                    ours.stdin.flush()
                    times.append((spent / repetitions / 1000, int(ours.stdout.readline()) / repetitions / 1000))
                ours.stdin.close()
                ours.wait()
            times = np.array(times)
            ratio = np.median(times[:, 0] / times[:, 1])
            print(f"| {shape} | {n} | {np.median(times[:, 0]):.1f} | {np.median(times[:, 1]):.1f} | {ratio:.2f} |", flush=True)


main()
