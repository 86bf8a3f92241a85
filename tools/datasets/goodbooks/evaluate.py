"""From the raw goodbooks files to judged figures: prepare, train, build, eval, floors.

Trains with the arguments that tools/train/README.md documents, measures every held-out reader with the server's own
pipeline and default configuration, and checks the figures against floors. Exit 0: all hold; 1: one does not, or a step
failed. Needs an interpreter with tools/train/requirements.txt for training (--python); itself only the standard library.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import prepare

HOLD_OUT = Path(__file__).with_name("hold_out.py")
TRAIN = Path(__file__).resolve().parents[2] / "train" / "train.py"
TRAIN_ARGUMENTS = [
    "--dim", "128", "--users", "30000", "--negatives", "150",
    "--column", "cross.overlap.tags", "--column", "item.avg_rating", "--column", "item.year",
]  # fmt: skip
RELEVANT = ["--relevant", "kind=2", "--relevant", "rating>=4"]
TEST = "test.parquet"
FOLD_IN = "fold_in.parquet"

# (row of the report, metric, cut-off, least value). Item-item cosine, the baseline to beat, has .148, .150 and .640.
FLOORS = [
    ("slate", "recall", 10, 0.160),
    ("slate", "ndcg", 10, 0.158),
    ("merged", "recall", 500, 0.64),
]
# Readers whom training never saw: item-item cosine has .209.
FOLD_IN_FLOORS = [("slate", "ndcg", 10, 0.209)]
# The whole pipeline must be worth more than any one of its sources.
BEATS_SOURCES = [("recall", 10), ("ndcg", 10)]
ALONE = " alone"


class Failed(Exception):
    """A step did not end well; the text says which."""


def value(quality: dict, metric: str, k: int) -> float | None:
    """A figure of one row, None where it was not measured."""
    return quality.get(metric, {}).get(str(k))


def judge_floors(report: dict, floors: list[tuple[str, str, int, float]]) -> list[tuple[bool, str]]:
    """Every floor: whether it holds, and a line that says so with figures."""
    rows = dict(report["rows"])
    verdicts = []
    for row, metric, k, floor in floors:
        got = value(rows.get(row, {}), metric, k)
        shown = "not measured" if got is None else f"{got:.4f}"
        verdicts.append((got is not None and got >= floor, f"{row} {metric}@{k} {shown}, floor {floor:.3f}"))
    return verdicts


def judge(report: dict) -> list[tuple[bool, str]]:
    """Every demand on an `eval --json` report, as `judge_floors`."""
    rows = dict(report["rows"])
    verdicts = judge_floors(report, FLOORS)
    sources = [name for name in rows if name.endswith(ALONE)]
    if not sources:
        verdicts.append((False, "no source was measured alone"))
    for source in sources:
        for metric, k in BEATS_SOURCES:
            slate, alone = value(rows.get("slate", {}), metric, k), value(rows[source], metric, k)
            measured = slate is not None and alone is not None
            shown = f"{slate:.4f} > {alone:.4f}" if measured else "not measured"
            verdicts.append((measured and slate > alone, f"slate beats {source}, {metric}@{k}: {shown}"))
    return verdicts


def table(report: dict) -> str:
    """The report's rows for people."""
    columns = [("recall", 10), ("ndcg", 10), ("coverage", 10), ("recall", 100), ("recall", 500)]
    lines = [f"{'':22}" + "".join(f"  {f'{metric}@{k}':>11}" for metric, k in columns)]
    for name, quality in report["rows"]:
        figures = (value(quality, metric, k) for metric, k in columns)
        lines.append(f"{name:22}" + "".join(f"  {'-' if f is None else f'{f:.4f}':>11}" for f in figures))
    return "\n".join(lines)


def run(name: str, command: list, **options) -> str:
    """Runs one step, says how long it took, returns what it printed."""
    start = time.monotonic()
    try:
        output = subprocess.run([str(c) for c in command], check=True, stdout=subprocess.PIPE, text=True, **options).stdout
    except OSError as error:
        raise Failed(f"{name}: {command[0]}: {error.strerror}") from None
    except subprocess.CalledProcessError as error:
        raise Failed(f"{name}: exit status {error.returncode}") from None
    print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return output


def evaluate(source: Path, work: Path, binary: str, python: str, users: int | None, fold_in: int | None) -> dict:
    """Makes `work`/dataset and `work`/bundle from `source` and returns the report of `eval --json`, of `fold_in` readers who
    were taken out if that is given."""
    dataset, bundle = work / "dataset", work / "bundle"
    names = prepare.prepare(source, dataset)
    if TEST not in names:
        raise prepare.Missing(f"{source}: missing {TEST}")
    measured = ["--test", dataset / TEST]
    if fold_in is not None:
        run("hold out", [python, HOLD_OUT, source, dataset, "--readers", fold_in])
        measured = ["--fold-in", dataset / FOLD_IN, "--value-column", "rating"]
    single = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    run("train", [python, TRAIN, dataset, "--binary", binary, *TRAIN_ARGUMENTS], env=single)
    run("build", [binary, "build", dataset, "--out", bundle, "--overwrite"])
    some = [] if users is None else ["--users", users]
    return json.loads(run("eval", [binary, "eval", bundle, *measured, *RELEVANT, "--json", *some]))


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="directory of the goodbooks Parquet files")
    parser.add_argument("--binary", default="tastemaker", help="the tastemaker executable (default: from PATH)")
    parser.add_argument("--python", default=sys.executable, help="interpreter for training (default: this one)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="make DIR/dataset and DIR/bundle and leave them there")
    parser.add_argument("--users", type=positive, metavar="N",
                        help="measure only N of the readers, as in `tastemaker eval`; the floors are meant for all")
    parser.add_argument("--fold-in", type=positive, metavar="N", help="take N readers out of the training, serve them by events")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            work = args.keep or Path(temporary)
            report = evaluate(args.source, work, args.binary, args.python, args.users, args.fold_in)
    except (Failed, prepare.Missing, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 1
    print(f"{report['users']} readers, {report['n_candidates']:.0f} merged candidates on average")
    print(table(report))
    verdicts = judge(report) if args.fold_in is None else judge_floors(report, FOLD_IN_FLOORS)
    for holds, line in verdicts:
        print(f"{'PASS' if holds else 'FAIL'}  {line}")
    return 0 if all(holds for holds, _ in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
