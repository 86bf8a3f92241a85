"""Tastemaker and the specification's stack on the same data, ranker and k's, one core each in turn, and a record of it.

Rounds are interleaved: each starts every server anew on the server core, warms it up, measures its peak (closed loop) and
then its latency at 70 % of that peak (open loop), while the load generator has a core of its own. Medians over rounds.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = {"ours": "tastemaker", "ours_binary": "tastemaker, binary protocol",
         "spec": "stack, a vector per candidate", "vectorised": "stack, vectorised"}


@contextmanager
def server(kind: str, cache: bool, args):
    """Starts one on the server core, waits until it answers, stops that process at the end."""
    ours = kind.startswith("ours")
    if ours:
        command = [args.binary, "serve", args.bundle, "--http", f"127.0.0.1:{args.port}",
                   "--listen", f"127.0.0.1:{args.port + 1}", "--admin", f"127.0.0.1:{args.port + 2}",
                   "--cpus", str(args.server_core)] + ([] if cache else ["--no-cache"])
    else:
        command = [sys.executable, str(HERE / "run.py"), args.dataset, "--port", str(args.port),
                   "--assembly", kind, "--index", args.index, "--cache-size", "100000" if cache else "0"]
    process = subprocess.Popen(["taskset", "-c", str(args.server_core), *command],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        health = f"http://127.0.0.1:{args.port + 2 if ours else args.port}/{'readyz' if ours else 'healthz'}"
        for _ in range(600):
            if process.poll() is not None:
                sys.exit(f"{' '.join(command)}: ended with {process.returncode}")
            try:
                urllib.request.urlopen(health, timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        else:
            sys.exit(f"{' '.join(command)}: not ready within a minute")
        yield
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def load(args, kind: str, users: Path, seconds: float, rate: float, seed: int) -> dict:
    """`rps`, `p50_ms`, `p99_ms`, `errors` from the generator on its own core; both print them as one line of JSON."""
    if kind == "ours_binary":
        command = [args.loadgen, "--addr", f"127.0.0.1:{args.port + 1}", "--depth", str(args.depth), "--json"]
    elif args.loadgen:
        command = [args.loadgen, "--http", f"127.0.0.1:{args.port}", "--json"]
    else:
        command = [sys.executable, str(HERE / "load.py"), "--port", str(args.port)]
    command += ["--users", str(users), "--seconds", str(seconds), "--rate", str(rate),
                "--connections", str(args.connections), "--n-items", "10", "--seed", str(seed)]
    out = subprocess.check_output(["taskset", "-c", str(args.load_core), *command], text=True)
    return json.loads(out.strip().splitlines()[-1])


def run(command: list[str]) -> str:
    return subprocess.check_output([str(c) for c in command], text=True).strip()


def machine() -> str:
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="dataset directory with embeddings and rankers/main.*")
    parser.add_argument("--binary", help="the tastemaker executable; without it only the stack runs")
    parser.add_argument("--bundle", help="bundle built from the dataset")
    parser.add_argument("--loadgen", help="tools/loadgen executable; default: load.py, which tops out at some thousand rps")
    parser.add_argument("--test", help="test.parquet, to state quality beside speed")
    parser.add_argument("--relevant", action="append", default=[], metavar="RULE", help="for --test, as eval.py has it")
    parser.add_argument("--kinds", nargs="+", choices=list(NAMES), default=["ours", "ours_binary", "spec", "vectorised"])
    parser.add_argument("--index", choices=["ivf", "flat"], default="ivf", help="the stack's index")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--depth", type=int, default=16, help="calls in flight per connection of the binary protocol")
    parser.add_argument("--users", type=int, default=2000, help="distinct users asked for; few, so that the cache hits")
    parser.add_argument("--quality-users", type=int, default=1000)
    parser.add_argument("--server-core", type=int, default=0)
    parser.add_argument("--load-core", type=int, default=1)
    parser.add_argument("--port", type=int, default=18000, help="this and the next two")
    parser.add_argument("--out", type=Path, required=True, help="markdown record to write")
    args = parser.parse_args()
    if any(kind.startswith("ours") for kind in args.kinds) and not (args.binary and args.bundle and args.loadgen):
        parser.error("--binary, --bundle and --loadgen are needed to run ours; or leave ours out of --kinds")

    import numpy as np
    from catalogue import Catalogue
    from eval import answers

    # Also makes the lists that every start of the stack then loads.
    catalogue = Catalogue(Path(args.dataset))
    ids = np.random.default_rng(1).permutation(sorted(catalogue.user_row))[: args.users].tolist()
    results: dict[tuple[bool, str], list[dict]] = {}
    quality: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as work:
        users = Path(work) / "users"
        users.write_text("\n".join(ids))
        for round_ in range(args.rounds):
            order = args.kinds if round_ % 2 == 0 else args.kinds[::-1]
            for cache in (False, True):
                for kind in order:
                    with server(kind, cache, args):
                        if args.test and kind not in quality and kind != "ours_binary":
                            quality[kind] = json.loads(run([
                                sys.executable, HERE / "eval.py", "--port", args.port, "--test", args.test,
                                "--users", args.quality_users,
                                *(part for rule in args.relevant for part in ("--relevant", rule))]))
                        if cache:
                            # Everybody once, so that hits are what is timed.
                            asyncio.run(answers(args.port, ids, 10))
                        load(args, kind, users, 2, 0, 100 + round_)
                        peak = load(args, kind, users, args.seconds, 0, round_)
                        part = load(args, kind, users, args.seconds, 0.7 * peak["rps"], 50 + round_)
                    row = {"peak": peak["rps"], "p50": part["p50_ms"], "p99": part["p99_ms"],
                           "errors": peak["errors"] + part["errors"]}
                    results.setdefault((cache, kind), []).append(row)
                    print(f"round {round_ + 1} cache {'on' if cache else 'off'} {kind}: {row}", file=sys.stderr, flush=True)

    peers = [kind for kind in args.kinds if not kind.startswith("ours")]
    lines = ["# Tastemaker and the specification's Python stack", "", f"Machine: {machine()}.",
             f"Server on core {args.server_core}, load on core {args.load_core}; {args.rounds} interleaved rounds of "
             f"{args.seconds:g} s, medians; {args.connections} connections, {args.users} users, 10 items, over HTTP/1.1 "
             f"(binary protocol: {args.depth} calls in flight per connection).",
             f"Load: {'tools/loadgen' if args.loadgen else 'load.py'}. Latency from the intended send, Poisson arrivals, "
             "at 70 % of each server's own peak.", "",
             "| cache | server | peak rps | lowest to highest | p50 ms | p99 ms | errors | "
             + " | ".join(f"times {NAMES[kind]}" for kind in peers) + " |",
             "| --- | --- | --: | --: | --: | --: | --: |" + " --: |" * len(peers)]
    for cache in (False, True):
        bases = [statistics.median(r["peak"] for r in results[cache, kind]) for kind in peers]
        for kind in args.kinds:
            rows = results[cache, kind]
            peaks = [r["peak"] for r in rows]
            median = {key: statistics.median(r[key] for r in rows) for key in ("peak", "p50", "p99")}
            ratios = " | ".join(f"{median['peak'] / base:.1f}" for base in bases)
            lines.append(f"| {'on' if cache else 'off'} | {NAMES[kind]} | {median['peak']:.0f} | {min(peaks):.0f} to "
                         f"{max(peaks):.0f} | {median['p50']:.2f} | {median['p99']:.2f} | "
                         f"{sum(r['errors'] for r in rows)} | {ratios} |")
    if quality:
        lines += ["", "| server | recall@10 | NDCG@10 | users |", "| --- | --: | --: | --: |"]
        lines += [f"| {NAMES[k]} | {q['recall']:.4f} | {q['ndcg']:.4f} | {q['users']} |" for k, q in quality.items()]
    args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
