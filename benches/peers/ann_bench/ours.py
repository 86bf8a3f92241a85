"""Ours: the child process, and its indexes as contenders."""

import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np

from contenders import EF, PROBED, PROBED_FILTERED
from data import Allowed, Data

REPOSITORY = Path(__file__).resolve().parents[3]


def binary(profile: str = "release") -> str:
    """Builds the child and returns where it is."""
    command = ["cargo", "build", "--quiet", "--profile", profile, "--bench", "ann_peer", "--message-format", "json"]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: ended with {done.returncode}")
    for line in done.stdout.splitlines():
        message = json.loads(line)
        if message.get("target", {}).get("name") == "ann_peer" and message.get("executable"):
            return message["executable"]
    raise SystemExit(f"{' '.join(command)}: names no executable")


class Child:
    """The process. Its searches run on one thread, its builds on `threads`."""

    def __init__(self, path: str, threads: int):
        self.work = tempfile.TemporaryDirectory()
        self.threads = threads
        self.process = subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env={**os.environ, "RAYON_NUM_THREADS": str(threads)})

    def ask(self, **request) -> dict:
        """Its answer.

        Raises RuntimeError with its words where it says that something can't be done, or ends.
        """
        self.process.stdin.write(json.dumps(request, default=str) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"ann_peer ended with {self.process.wait()} on {request}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)
        self.work.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Ours:
    """An index of ours: `options` as `IndexOptions` has them, `params` names of `SearchParams` to sweep.

    A list of values is swept as it is; `"probed"` stands for shares of the lists, `"ef"` for lengths of the candidate
    list; a table has values per k, the next larger k's where one is absent.
    """

    library = "ours"
    filters = True
    batch = False

    def __init__(self, child: Child, data: Data, name: str, options: dict, params: dict):
        self.child, self.data, self.name, self.options, self.params = child, data, f"ours {name}", options, params
        if options["kind"].startswith("ivf"):
            # As the build has it where nothing is said.
            self.options = {"n_lists": round(2 * len(data.base) ** 0.5), **options}

    def build(self) -> dict:
        made = self.child.ask(op="build", name=self.name, options=self.options, base=self.data.base_path,
                              n=len(self.data.base), metric="inner_product")
        return {**made, "threads": self.child.threads, "kind": self.options["kind"]}

    def sweep(self, k: int, filtered: bool = False) -> list[dict]:
        def values(of) -> list:
            if of == "probed":
                n_lists = self.options["n_lists"]
                return sorted({max(1, round(n_lists * share)) for share in (PROBED_FILTERED if filtered else PROBED)})
            if of == "ef":
                return [ef for ef in EF if ef >= k]
            if isinstance(of, dict):
                sizes = sorted(int(size) for size in of)
                return of[str(next((size for size in sizes if size >= k), sizes[-1]))]
            return of

        return [dict(zip(self.params, chosen)) for chosen in product(*map(values, self.params.values()))]

    def measure(self, data: Data, rows: slice, k: int, params: dict, batch: bool,
                only: Allowed | None = None) -> tuple[np.ndarray, float]:
        """As `Contender.measure`; time is that of the searching thread."""
        out = Path(self.child.work.name) / "ids"
        answer = self.child.ask(op="search", name=self.name, queries=data.queries_path, n=len(data.queries),
                                rows=(rows.start, rows.stop), k=k, params=params, filter=only.path if only else None,
                                batch=batch, out=out)
        return np.fromfile(out, "<i8").reshape(rows.stop - rows.start, k), answer["cpu_us_per_query"]

    def touched(self, queries: np.ndarray, k: int, params: dict) -> float | None:
        """Bytes of codes and of refined rows per query: what is scanned is as many rows as that many lists have on average."""
        n, dim = self.data.base.shape
        width = {"f16": 2, "bf16": 2}.get(self.options.get("storage"), 4)
        code = {"ivf_flat": width * dim, "ivf_pq": self.options.get("pq_dim", dim / 2) / 2 + 4,
                "ivf_rabitq": dim / 8 + 4}.get(self.options["kind"])
        if code is None or "n_probes" not in params:
            return None
        scanned = n * min(1, params["n_probes"] / self.options["n_lists"])
        refined = k * params.get("refine_ratio", 0)
        # All would be refined: then nothing is estimated before.
        return scanned * dim if refined >= scanned else scanned * code + refined * dim


def contenders(child: Child, data: Data, path: Path) -> list[Ours]:
    """Those that a JSON file lists as `{"name", "options", "params"}` and that this build has."""
    made = []
    for entry in json.loads(path.read_text()):
        contender = Ours(child, data, entry["name"], entry["options"], entry.get("params", {}))
        try:
            contender.costs = contender.build()
        except RuntimeError as error:
            print(f"{contender.name}: left out: {error}", file=sys.stderr)
            continue
        made.append(contender)
    return made
