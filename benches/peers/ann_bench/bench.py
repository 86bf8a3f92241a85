"""Our vector indexes and those of Faiss, ScaNN, usearch and hnswlib: recall, CPU time, memory and build side by side.

One core, one thread each. Every setting of every contender is a point; rounds visit all points in a new order, each round
with queries of its own, the same for all. Times are CPU µs per query, medians over rounds.
"""

import argparse
import json
import os
import platform
import random
import shlex
import sys
import time
from pathlib import Path

# Before the libraries are loaded, which read them once.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import faiss  # noqa: E402

import data as datasets  # noqa: E402
import ours  # noqa: E402
import report  # noqa: E402
from contenders import Store, default_n_lists, peers  # noqa: E402
from report import Point  # noqa: E402

LIBRARIES = ["faiss", "scann", "hnswlib", "usearch", "faiss-hnsw"]


def log(*words) -> None:
    print(time.strftime("%H:%M:%S"), *words, file=sys.stderr, flush=True)


def log_cost(name: str, cost: dict, n: int) -> None:
    log(f"{name}: {cost['cpu_s']:.1f} CPU s, {cost['bytes'] / n:.0f} bytes per vector")


def worth_timing(points: list[Point], low: float) -> list[Point]:
    """Leaves out what a first look shows to be of no use: recall below `low`, or half again the time of one with more.

    A contender that stays below `low` keeps its best.
    """
    kept = []
    for own in report.by_name(points).values():
        useful = [p for p in own if p.recall >= low] or [max(own, key=lambda p: p.recall)]
        full = min((p.time for p in useful if p.recall >= 0.999), default=float("inf"))
        kept += [p for p in useful if p.time <= 1.5 * full
                 and not any(q.recall >= p.recall and 1.5 * q.time < p.time for q in useful)]
    return kept


class Bench:
    """Contenders that are ready to search, and what is asked of them."""

    def __init__(self, args, data: datasets.Data, contenders: list):
        self.args, self.data = args, data
        self.contenders = {contender.name: contender for contender in contenders}

    def points(self, ks: list[int], selectivity: float) -> list[Point]:
        filtered = selectivity < 1
        points = []
        for name, contender in self.contenders.items():
            if filtered and not contender.filters:
                continue
            ways = [contender.batch] + ([not contender.batch] if self.args.both_ways else [])
            for batch in ways:
                label = name + ("" if batch == contender.batch else ", in batches" if batch else ", one by one")
                points += [Point(label, name, contender.library, k, params, batch, selectivity)
                           for k in ks for params in contender.sweep(k, filtered)]
        return points

    def run(self, ks: list[int], selectivity: float = 1.0) -> list[Point]:
        """All points of a filter's selectivity (1: no filter), measured."""
        args, data = self.args, self.data
        only = datasets.allowed(data, selectivity) if selectivity < 1 else None
        exact = {k: datasets.truth(data, args.queries * args.rounds, k, only) for k in ks}

        def measure(point: Point, rows: slice) -> tuple[float, float]:
            contender = self.contenders[point.contender]
            found, us = contender.measure(data, rows, point.k, point.params, point.batch, only)
            return datasets.recall(found, exact[point.k][rows]), us

        points = self.points(ks, selectivity)
        look = slice(0, min(50, args.queries))
        for point in points:
            recall, us = measure(point, look)
            point.recalls, point.us = [recall], [us]
        kept = [point for k in ks for point in worth_timing([p for p in points if p.k == k], args.low)]
        log(f"selectivity {selectivity:g}: {len(kept)} of {len(points)} settings are timed")
        for point in kept:
            point.recalls, point.us = [], []
        for round_ in range(args.rounds):
            random.Random(round_).shuffle(kept)
            rows = slice(round_ * args.queries, (round_ + 1) * args.queries)
            for point in kept:
                recall, us = measure(point, rows)
                point.recalls.append(recall)
                point.us.append(us)
            log(f"round {round_ + 1} of {args.rounds}, load {os.getloadavg()[0]:.1f}")
        for point in kept:
            point.touched = self.touched(point, look)
        order = {name: at for at, name in enumerate(self.contenders)}
        return sorted(kept, key=lambda p: (p.k, order[p.contender], p.name, p.recall))

    def touched(self, point: Point, rows: slice) -> float | None:
        """Bytes read per query."""
        return self.contenders[point.contender].touched(self.data.queries[rows], point.k, point.params)


def machine() -> str:
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}"


def versions(libraries: list[str]) -> str:
    from importlib.metadata import version
    packages = {"faiss": "faiss-cpu", "faiss-hnsw": "faiss-cpu"}
    names = {packages.get(library, library) for library in libraries} | {"numpy"}
    return ", ".join(f"{name} {version(name)}" for name in sorted(names))


def markdown(record: dict, points: list[Point], filtered: list[Point]) -> str:
    lines = [f"# Vector search on one core: {record['data']}", "", f"Machine: {record['machine']}; {record['versions']}.",
             f"{record['n']} x {record['dim']} vectors (effective dimension {record['effective_dimension']:.1f}), inner "
             f"product, {record['n_lists']} lists of the peers. {record['rounds']} interleaved rounds of {record['queries']} queries, "
             f"pinned to core {record['core']}; CPU µs per query, medians. Load {record['load'][0]:.1f} at the start, "
             f"{record['load'][1]:.1f} at the end.",
             "Peers get a round's queries in one call, ours one query a call, unless a name says otherwise. Values at a "
             "recall are interpolated on a logarithmic scale between the settings around it.", "",
             f"`{record['command']}`", ""]
    for k in record["k"]:
        at_k = [p for p in points if p.k == k]
        target = report.TARGET.get(k, 0.95)
        lines += [f"## k = {k}", "", *report.recall_table(at_k, target), ""]
        if any(p.library == "ours" for p in at_k):
            lines += [*report.ratio_table(report.ratios(at_k, target)), ""]
        if record["read_bytes_per_s"]:
            lines += [f"Memory at recall {target:g}: codes and refined rows, without centroids.", "",
                      *report.memory_table(at_k, target, record["read_bytes_per_s"]), ""]
    lines += ["## Memory and build", "",
              "Bytes of the index as saved (peers) or as it says itself (ours, beside the matrix it was built from). "
              "k-means is counted for every kind that needs it.", "",
              *report.cost_table(record["costs"], record["n"]), ""]
    for selectivity in sorted({p.selectivity for p in filtered}):
        lines += [f"## Filter that admits {selectivity:.0%} of the rows", ""]
        for k in record["filtered_k"]:
            at_k = [p for p in filtered if p.selectivity == selectivity and p.k == k]
            lines += [f"k = {k}", "", *report.recall_table(at_k, 0.95), ""]
            if any(p.library == "ours" for p in at_k):
                lines += [*report.ratio_table(report.ratios(at_k, 0.95)), ""]
    lines += ["## Frontiers", ""]
    for k in record["k"]:
        lines += [f"k = {k}", "", *report.frontier_table([p for p in points if p.k == k]), ""]
    return "\n".join(lines)


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--synthetic", default="1000000x128", metavar="NxDIM", help="size of the data to make")
    source.add_argument("--dataset", type=Path, help="directory with item_embeddings.npy and user_embeddings.npy")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--cache", type=lambda path: Path(path).resolve(), required=True,
                        help="directory for data, exact neighbours and the peers' indexes")
    parser.add_argument("--libraries", nargs="*", choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument("--peers", nargs="+", metavar="TEXT", help="only those whose names contain one of these")
    parser.add_argument("--without-ours", action="store_true")
    parser.add_argument("--ours", type=Path, default=ours.REPOSITORY / "benches/peers/ann_bench/ours.json",
                        help="our contenders; kinds that the build does not have are left out")
    parser.add_argument("--ours-binary", help="the ann_peer executable; built by cargo if not given")
    parser.add_argument("--n-lists", type=int, help="lists of the peers' inverted files; default: about one per 220 rows")
    parser.add_argument("--k", type=int, nargs="+", default=[10, 100, 500])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--queries", type=int, default=100, help="queries a round")
    parser.add_argument("--low", type=float, default=0.85, help="recall below which settings are not timed")
    parser.add_argument("--both-ways", action="store_true", help="also peers one query a call and ours in batches")
    parser.add_argument("--filtered", action="store_true", help="also searches with filters")
    parser.add_argument("--selectivities", type=float, nargs="+", default=[0.01, 0.1, 0.5, 0.99])
    parser.add_argument("--filtered-k", type=int, nargs="+", default=[500])
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)),
                        help="the core to measure on; default: the last")
    parser.add_argument("--threads", type=int, default=1, help="of builds, theirs and ours")
    parser.add_argument("--rebuild", action="store_true", help="builds the peers' indexes anew, to time all builds now")
    parser.add_argument("--build-only", action="store_true", help="makes data and the peers' indexes and stops")
    parser.add_argument("--out", type=Path, help="directory for record.md, record.json and frontiers.svg")
    args = parser.parse_args(words)
    if not (args.out or args.build_only):
        parser.error("--out or --build-only")
    if args.rounds < 1 or args.queries < 1:
        parser.error("--rounds and --queries are at least 1")
    return args


def main(words: list[str] | None = None) -> None:
    args = arguments(words)
    faiss.omp_set_num_threads(args.threads)
    n_queries = max(2000, args.rounds * args.queries)
    if args.dataset:
        data = datasets.dataset(args.cache, args.dataset, n_queries, args.seed)
    else:
        try:
            n, dim = map(int, args.synthetic.split("x"))
        except ValueError:
            raise SystemExit(f"--synthetic {args.synthetic}: expected rows and dimension as in 200000x64") from None
        data = datasets.synthetic(args.cache, n, dim, n_queries, args.seed)
    if len(data.queries) < args.rounds * args.queries:
        raise SystemExit(f"{len(data.queries)} queries are too few for {args.rounds} rounds of {args.queries}")
    if len(data.base) < max(args.k):
        raise SystemExit(f"{len(data.base)} rows are fewer than k = {max(args.k)}")
    n, dim = data.base.shape
    n_lists = args.n_lists or default_n_lists(n)
    store = Store(data, args.threads, args.rebuild)
    contenders, costs = peers(data, store, n_lists, args.libraries), {}
    if args.peers:
        contenders = [c for c in contenders if any(text in c.name for text in args.peers)]
    for contender in contenders:
        costs[contender.name] = contender.costs(store)
        log_cost(contender.name, costs[contender.name], n)
    if args.build_only:
        return
    for contender in contenders:
        contender.open(store)
    faiss.omp_set_num_threads(1)
    child = None if args.without_ours else ours.Child(args.ours_binary or ours.binary(), args.threads)
    try:
        bandwidth = None
        if child:
            contenders += (own := ours.contenders(child, data, args.ours))
            for contender in own:
                costs[contender.name] = contender.costs
                log_cost(contender.name, contender.costs, n)
        # After the builds, which may have more threads than one.
        for process in [0] + ([child.process.pid] if child else []):
            os.sched_setaffinity(process, {args.core})
        bandwidth = child.ask(op="core")["read_bytes_per_s"] if child else None
        load = [os.getloadavg()[0]]
        bench = Bench(args, data, contenders)
        points = bench.run(args.k)
        filtered = [p for s in args.selectivities for p in bench.run(args.filtered_k, s)] if args.filtered else []
        load.append(os.getloadavg()[0])
    finally:
        if child:
            child.close()

    record = {"data": data.name, "n": n, "dim": dim, "n_lists": n_lists, "machine": machine(),
              "versions": versions(args.libraries), "effective_dimension": datasets.effective_dimension(data.base),
              "rounds": args.rounds, "queries": args.queries, "core": args.core, "k": args.k,
              "filtered_k": args.filtered_k, "load": load, "read_bytes_per_s": bandwidth, "costs": costs,
              "command": command(args),
              "ratios": {k: report.ratios([p for p in points if p.k == k], report.TARGET.get(k, 0.95)) for k in args.k},
              "filtered_ratios": {
                  f"{s:g}": {k: report.ratios([p for p in filtered if p.selectivity == s and p.k == k], 0.95)
                             for k in args.filtered_k} for s in args.selectivities if args.filtered}}
    args.out.mkdir(parents=True, exist_ok=True)
    text = markdown(record, points, filtered)
    (args.out / "record.md").write_text(text)
    record["points"] = [p.as_json() for p in points + filtered]
    (args.out / "record.json").write_text(json.dumps(record, indent=1))
    (args.out / "frontiers.svg").write_text(report.plot(points, f"{data.name}, one core"))
    print(text)


def command(args: argparse.Namespace) -> str:
    """What was asked for, without the paths of this machine."""
    default = vars(arguments(["--cache", ".", "--out", "."]))
    words = ["bench.py", "--cache CACHE", "--out OUT"]
    for name, value in vars(args).items():
        if name not in ("cache", "out", "ours", "ours_binary") and value != default[name]:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *(v.name if isinstance(v, Path) else str(v) for v in values)]
    return " ".join(words[:3] + [shlex.quote(word) for word in words[3:]])


if __name__ == "__main__":
    main()
