"""Requests per second of one server and one bundle, its ranker computed by each engine in turn.

    python benches/end_to_end/rankers.py --make /tmp/million --out record.md          # 1 M items x 128, made once
    python benches/end_to_end/rankers.py --bundle shelf/bundle --users users.txt      # any other bundle

Rounds are interleaved: each starts the server anew on its core with every engine, warms it up and measures its peak in a
closed loop, without the result cache, while the load generator has a core of its own. Medians over rounds; ratios are of
one round's.
Needs benches/peers/rank_bench/requirements.txt, and pyarrow to make a bundle.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def make(folder: Path, binary: Path, n_items: int, n_users: int, dim: int, min_ndcg: float) -> Path:
    """A dataset of clustered vectors with a ranker of 256-128-64-1 over user, item and other features, and its bundle.

    The ranker is trained on a teacher: its scores have an order worth keeping, which decides on precisions.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    sys.path.insert(0, str(ROOT / "benches/peers/rank_bench"))
    from models import Builder, rows, trained

    bundle = folder / "bundle"
    if bundle.exists():
        return bundle
    rng, data = np.random.default_rng(1), folder / "data"
    (data / "rankers").mkdir(parents=True, exist_ok=True)
    centres = rng.standard_normal((1000, dim)).astype(np.float32)
    cluster = rng.integers(len(centres), size=n_items)
    items = centres[cluster] + 0.7 * rng.standard_normal((n_items, dim), np.float32)
    taste = rng.integers(len(centres), size=(n_users, 3))
    users = centres[taste].mean(1) + 0.3 * rng.standard_normal((n_users, dim), np.float32)
    # As long as standard normal vectors, which the ranker is trained on.
    items, users = (v * np.sqrt(np.float32(dim)) / np.linalg.norm(v, axis=1, keepdims=True) for v in (items, users))
    for name, vectors in (("item", items), ("user", users)):
        np.save(data / f"{name}_embeddings.npy", vectors.astype(np.float32))
    # 40 items of each user's clusters, those that are famous more often.
    order = np.argsort(cluster, kind="stable")
    starts = np.searchsorted(cluster[order], np.arange(len(centres) + 1))
    chosen = taste[np.arange(n_users)[:, None], rng.integers(3, size=(n_users, 40))]
    place = rng.random(chosen.shape) ** 3 * (starts[chosen + 1] - starts[chosen])
    liked = order[starts[chosen] + place.astype(np.int64)]
    pq.write_table(pa.table({"item_id": np.arange(n_items), "price": rng.random(n_items)}), data / "items.parquet")
    pq.write_table(pa.table({"user_id": np.arange(n_users)}), data / "users.parquet")
    events = {"user_id": np.repeat(np.arange(n_users), 40), "item_id": liked.ravel()}
    pq.write_table(pa.table(events), data / "interactions.parquet")
    scalars = ["cross.cooccurrence_max", "candidate.ann.rank", "candidate.collaborative.rank", "item.price"]
    columns, build = ["user.embedding", "item.embedding", *scalars], Builder(rng)
    runs = [("request", dim), ("item", dim), ("candidate", len(scalars))]
    net = trained(runs, [256, 128, 64], items[rng.integers(n_items, size=20_000)], rng)
    value = "features"
    for at, (w, b) in enumerate(zip(net.weights, net.biases)):
        value = build.layer(value, w, b, at + 1 < len(net.weights))
    build.save(data / "rankers/main.onnx", [rows("features", 2 * dim + len(scalars))], value)
    listed = "".join(f'    "{c}",\n' for c in columns)
    (data / "rankers/main.toml").write_text(
        f'[[inputs]]\nname = "features"\ncolumns = [\n{listed}]\n\n[output]\nname = "score"\n\n'
        f"[calibration]\nmin_ndcg = {min_ndcg}\n")
    subprocess.check_call([binary, "build", data, "--out", bundle, "--index", "ivf_pq"])
    subprocess.check_call([binary, "tune", bundle])
    return bundle


@contextmanager
def server(args, bundle: Path, engine: str, work: Path):
    """On its core, ready; gives the address of the binary protocol."""
    config = work / f"{engine}.toml"
    library = f'onnxruntime = "{args.onnxruntime}"\n' if args.onnxruntime else ""
    config.write_text(
        f'[pipeline]\nengines = {{ {args.ranker} = "{engine}" }}\n{library}[telemetry]\nlog_json = true\n')
    command = ["taskset", "-c", args.server_core, args.binary, "serve", bundle, "--config", config, "--no-cache",
               "--cpus", args.server_core]  # fmt: skip
    for port in ("--listen", "--http", "--admin"):
        command += [port, "127.0.0.1:0"]
    with (work / "log").open("w+") as log:
        process = subprocess.Popen([str(c) for c in command], stderr=log, stdout=subprocess.DEVNULL)
        try:
            yield ready(process, work / "log", args.ranker)
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def ready(process, log: Path, ranker: str) -> tuple[str, str]:
    """The address of the binary protocol, and how the ranker is computed."""
    for _ in range(1200):
        for line in log.read_text().splitlines():
            fields = json.loads(line).get("fields", {}) if line.startswith("{") else {}
            if fields.get("message") == "serving":
                with urllib.request.urlopen(f"http://{fields['http']}/v2/models/{ranker}", timeout=10) as answer:
                    return fields["binary"], json.load(answer)["properties"]["computed"]
        if process.poll() is not None:
            sys.exit(f"the server ended with {process.returncode}: {log.read_text()[-2000:]}")
        time.sleep(0.1)
    sys.exit("the server is not ready after two minutes")


def peak(args, address: str, users: Path, seconds: float) -> dict:
    command = ["taskset", "-c", args.load_core, args.loadgen, "--addr", address, "--users", users, "--seconds", seconds,
               "--rate", 0, "--connections", 4, "--depth", 4, "--n-items", 10, "--timings", "--json"]  # fmt: skip
    return json.loads(subprocess.check_output([str(c) for c in command], text=True).strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", type=Path, metavar="DIR", help="make a bundle there, or take the one there is")
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--min-ndcg", type=float, default=0.999, help="of the ranker that is made: the floor of precisions")
    parser.add_argument("--bundle", type=Path, help="measure this one instead")
    parser.add_argument("--users", type=Path, help="ids that ask, one a line; with --bundle")
    parser.add_argument("--ranker", default="main")
    parser.add_argument("--engines", nargs="+", default=["rten", "auto"], help="first the one that ratios are against")
    parser.add_argument("--onnxruntime", help="its library, where it is among the engines")
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/tastemaker")
    parser.add_argument("--loadgen", type=Path, default=ROOT / "target/release/loadgen")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--server-core", default="0")
    parser.add_argument("--load-core", default="1")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not (args.make or (args.bundle and args.users)):
        parser.error("--make DIR, or --bundle and --users")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        n_users = min(50_000, args.items)
        bundle = args.bundle or make(
            args.make, args.binary, args.items, n_users, args.dim, args.min_ndcg)
        users = args.users or work / "users"
        if not args.users:
            users.write_text("".join(f"{u}\n" for u in np.random.default_rng(2).permutation(n_users)[:5000]))
        found, computed = {engine: [] for engine in args.engines}, {}
        for at in range(args.rounds):
            for engine in args.engines if at % 2 == 0 else args.engines[::-1]:
                with server(args, bundle, engine, work) as (address, computed[engine]):
                    peak(args, address, users, 2)
                    found[engine].append(peak(args, address, users, args.seconds))
                rps = found[engine][-1]["rps"]
                print(f"round {at + 1} {engine}: {rps:.0f} requests/s", file=sys.stderr, flush=True)
    machine = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                    if line.startswith("model name")), "?")  # fmt: skip
    what = args.bundle.name if args.bundle else f"{args.items} items x {args.dim}"
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {machine}, {os.cpu_count()} virtual CPUs; {what}; server on one core, load on",
        f"another, binary protocol, no result cache; {args.rounds} interleaved rounds of {args.seconds:g} s, medians.",
        "",
        "| engine | computed | requests/s | lowest to highest | ratio | rank, µs | errors |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    base = [r["rps"] for r in found[args.engines[0]]]
    for engine, reports in found.items():
        rps = [r["rps"] for r in reports]
        ratio = statistics.median(a / b for a, b in zip(rps, base))
        rank = statistics.median(r.get("stages_us", {}).get("rank", float("nan")) for r in reports)
        lines.append(f"| {engine} | {computed[engine].split(';')[0]} | {statistics.median(rps):.0f} | {min(rps):.0f} to "
                     f"{max(rps):.0f} | {ratio:.2f} | {rank:.0f} | {sum(r['errors'] for r in reports)} |")  # fmt: skip
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
