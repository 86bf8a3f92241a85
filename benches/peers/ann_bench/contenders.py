"""The peers: how each is built, kept on disk, and asked.

A contender searches with one or more parts (a coarse quantiser, codes, rows for re-ranking, a graph). Parts are built once,
kept under a hash of vectors and parameters with the seconds they took, and shared between contenders.
"""

import json
import shutil
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Callable

import faiss
import numpy as np

from data import Allowed, Data, fingerprint

IP = faiss.METRIC_INNER_PRODUCT
# Shares of the lists that are probed.
PROBED = [0.002, 0.004, 0.006, 0.008, 0.009, 0.010, 0.012, 0.014, 0.016, 0.020, 0.024, 0.028, 0.032, 0.039, 0.047, 0.064, 0.094, 0.128, 0.19]
PROBED_FILTERED = [0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0]
EF = [64, 128, 256, 512, 700, 1000, 1400, 2000, 2800, 4000]


@dataclass
class Part:
    """Something built: `build()` makes it, `write(it, path)` and `read(path)` keep it."""

    name: str
    spec: dict
    build: Callable[[], Any]
    write: Callable[[Any, str], None] = lambda index, path: faiss.write_index(index, path)
    read: Callable[[str], Any] = lambda path: faiss.read_index(path)
    needs: list["Part"] = field(default_factory=list)


class Store:
    """Parts on disk beside the data."""

    def __init__(self, data: Data, threads: int, rebuild: bool = False):
        self.data, self.threads, self.rebuild = data, threads, rebuild
        self.fingerprint = fingerprint(data.base)
        self.opened: dict[Path, Any] = {}
        self.fresh: set[Path] = set()

    def directory(self, part: Part) -> Path:
        key = fingerprint(self.fingerprint, part.spec, [p.spec for p in part.needs], self.threads)
        return self.data.directory / "indexes" / f"{part.name}-{key}"

    def made(self, part: Part) -> dict:
        """Builds it if it isn't there. `cpu_s` (all threads), `wall_s`, `threads`, `bytes`."""
        directory = self.directory(part)
        if not (directory / "cost.json").exists() or (self.rebuild and directory not in self.fresh):
            self.fresh.add(directory)
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            cpu, wall = time.process_time(), time.perf_counter()
            index = part.build()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            cost = {"cpu_s": cpu, "wall_s": wall, "threads": self.threads}
            part.write(index, str(directory / "index"))
            whole = directory / "index"
            files = whole.iterdir() if whole.is_dir() else [whole]
            cost["bytes"] = sum(file.stat().st_size for file in files)
            (directory / "cost.json").write_text(json.dumps(cost))
        return json.loads((directory / "cost.json").read_text())

    def open(self, part: Part) -> Any:
        directory = self.directory(part)
        if directory not in self.opened:
            self.made(part)
            self.opened[directory] = part.read(str(directory / "index"))
        return self.opened[directory]


class Contender:
    """`name` of a `library`; `parts` it searches with."""

    library: str
    name: str
    parts: list[Part]
    filters = False
    # One call for all queries is its best case.
    batch = True

    def costs(self, store: Store) -> dict:
        """Build seconds over all parts and what they need; bytes of what stays in memory."""
        needed = {p.name: p for part in self.parts for p in [*part.needs, part]}
        made = {name: store.made(part) for name, part in needed.items()}
        return {"cpu_s": sum(m["cpu_s"] for m in made.values()), "wall_s": sum(m["wall_s"] for m in made.values()),
                "threads": store.threads, "bytes": sum(made[p.name]["bytes"] for p in self.parts),
                "parts": {name: round(m["cpu_s"], 2) for name, m in made.items()}}

    def open(self, store: Store) -> None:
        """Reads its parts, having made what isn't there."""
        raise NotImplementedError

    def sweep(self, k: int, filtered: bool = False) -> list[dict]:
        raise NotImplementedError

    def search(self, queries: np.ndarray, k: int, params: dict, only: Any = None) -> np.ndarray:
        """Rows i64 `[n_queries, k]`, -1 where there is none. `only`: what `selector` made."""
        raise NotImplementedError

    def selector(self, only: Allowed) -> Any:
        """The filter as the library has it; `filters` says whether it has one."""
        raise NotImplementedError

    def measure(self, data: Data, rows: slice, k: int, params: dict, batch: bool,
                only: Allowed | None = None) -> tuple[np.ndarray, float]:
        """What `search` finds for those queries, in one call or one for each, and the CPU µs per query, of all threads."""
        queries = data.queries[rows]
        selected = self.selector(only) if only else None
        start = time.process_time()
        if batch:
            found = self.search(queries, k, params, selected)
        else:
            found = np.concatenate([self.search(query[None], k, params, selected) for query in queries])
        return found, (time.process_time() - start) * 1e6 / len(queries)

    def touched(self, queries: np.ndarray, k: int, params: dict) -> float | None:
        """Bytes of codes and rows read per query, where the library tells."""
        return None


class FaissIvf(Contender):
    """Lists of codes, and rows to re-rank by where `refine` names their format."""

    library = "faiss"

    def __init__(self, name: str, codes: Part, refine: Part | None = None,
                 factors: Callable[[int], list[float]] | None = None):
        self.name, self.parts = name, [codes] + ([refine] if refine else [])
        self.factors = factors
        self.filters = name == "faiss IVF-SQ8"

    def open(self, store):
        opened = [store.open(part) for part in self.parts]
        self.ivf = opened[0]
        self.index = faiss.IndexRefine(*opened) if len(opened) == 2 else opened[0]

    def sweep(self, k, filtered=False):
        probes = sorted({max(1, round(self.ivf.nlist * share)) for share in (PROBED_FILTERED if filtered else PROBED)})
        if self.factors is None:
            return [{"n_probes": n} for n in probes]
        return [{"n_probes": n, "k_factor": f} for n, f in product(probes, self.factors(k))]

    def search(self, queries, k, params, only=None):
        rabitq = isinstance(self.ivf, (faiss.IndexIVFRaBitQ, faiss.IndexIVFRaBitQFastScan))
        kind = faiss.IVFRaBitQSearchParameters if rabitq else faiss.SearchParametersIVF
        probe = kind(nprobe=params["n_probes"], **({"sel": only} if only is not None else {}))
        if rabitq:
            probe.qb = 8
        if self.factors is not None:
            probe = faiss.IndexRefineSearchParameters(k_factor=params["k_factor"], base_index_params=probe)
        return self.index.search(queries, k, params=probe)[1]

    def selector(self, only):
        return faiss.IDSelectorBitmap(np.packbits(only.rows, bitorder="little"))

    def scanned(self, queries, k, params):
        """Codes scanned per query."""
        faiss.cvar.indexIVF_stats.reset()
        self.search(queries, k, params)
        return faiss.cvar.indexIVF_stats.ndis / len(queries)

    def touched(self, queries, k, params):
        rows = k * params["k_factor"] * self.index.refine_index.sa_code_size() if self.factors is not None else 0
        return self.scanned(queries, k, params) * self.ivf.code_size + rows


class Graph(Contender):
    """A graph in any of three libraries.

    `augmented`: one more dimension turns inner product into L2, by which graphs find their way better.
    """

    def __init__(self, library: str, data: Data, augmented: bool, threads: int, degree: int = 32, ef_build: int = 128):
        self.library, self.augmented, self.threads = library, augmented, threads
        self.degree, self.ef_build = degree, ef_build
        kind = {"faiss": "HNSW", "hnswlib": "HNSW", "usearch": "HNSW bf16"}[library]
        self.name = f"{library} {kind}{' +L2' if augmented else ''}"
        self.dim = data.base.shape[1]
        # A multiple of 16, so that vector code has no remainder.
        self.width = (self.dim + 16) // 16 * 16 if augmented else self.dim
        part = f"{library}-graph{'-l2' if augmented else ''}"
        spec = {"library": library, "augmented": augmented, "degree": degree, "ef_build": ef_build}
        self.parts = [Part(part, spec, lambda: self.build(data.base), self.write, self.read)]

    def space(self, faiss_name: bool = False):
        if faiss_name:
            return faiss.METRIC_L2 if self.augmented else IP
        return {"hnswlib": {True: "l2", False: "ip"}, "usearch": {True: "l2sq", False: "ip"}}[self.library][self.augmented]

    def widened(self, rows: np.ndarray, is_base: bool) -> np.ndarray:
        if not self.augmented:
            return rows
        wide = np.zeros((len(rows), self.width), np.float32)
        wide[:, : self.dim] = rows
        if is_base:
            squares = np.einsum("ij,ij->i", rows, rows)
            wide[:, self.dim] = np.sqrt(squares.max() - squares)
        return wide

    def empty(self):
        if self.library == "hnswlib":
            import hnswlib
            return hnswlib.Index(self.space(), self.width)
        from usearch.index import Index
        return Index(ndim=self.width, metric=self.space(), dtype="bf16", connectivity=self.degree,
                     expansion_add=self.ef_build)

    def build(self, base):
        rows = self.widened(base, True)
        if self.library == "faiss":
            index = faiss.IndexHNSWFlat(self.width, self.degree, self.space(True))
            index.hnsw.efConstruction = self.ef_build
            index.add(rows)
            return index
        index = self.empty()
        if self.library == "hnswlib":
            index.init_index(max_elements=len(rows), M=self.degree, ef_construction=self.ef_build, random_seed=1)
            index.add_items(rows, num_threads=self.threads)
        else:
            index.add(np.arange(len(rows)), rows, threads=self.threads)
        return index

    def write(self, index, path):
        if self.library == "faiss":
            faiss.write_index(index, path)
        elif self.library == "hnswlib":
            index.save_index(path)
        else:
            index.save(path)

    def read(self, path):
        if self.library == "faiss":
            return faiss.read_index(path)
        index = self.empty()
        if self.library == "hnswlib":
            index.load_index(path)
        else:
            index.load(path)
        return index

    def open(self, store):
        self.index = store.open(self.parts[0])

    def sweep(self, k, filtered=False):
        return [{"ef_search": ef} for ef in EF if ef >= k]

    def search(self, queries, k, params, only=None):
        queries = self.widened(queries, False)
        if self.library == "faiss":
            return self.index.search(queries, k, params=faiss.SearchParametersHNSW(efSearch=params["ef_search"]))[1]
        if self.library == "hnswlib":
            self.index.set_ef(params["ef_search"])
            return self.index.knn_query(queries, k=k, num_threads=1)[0].astype(np.int64)
        self.index.expansion_search = params["ef_search"]
        return np.atleast_2d(self.index.search(queries, k, threads=1).keys.astype(np.int64))


class Scann(Contender):
    """Tree, anisotropic hashing, re-ranking by rows of f32 or bf16; `soar` spills each row to a second leaf."""

    library = "scann"

    def __init__(self, data: Data, threads: int, n_leaves: int, soar: bool = False, bf16: bool = False):
        self.soar, self.bf16, self.threads, self.n_leaves = soar, bf16, threads, n_leaves
        self.name = "scann" + " SOAR" * soar + " bf16" * bf16
        spec = {"library": "scann", "soar": soar, "n_leaves": n_leaves, **({"rows": "bf16"} if bf16 else {})}
        part = self.name.lower().replace(" ", "-")
        self.parts = [Part(part, spec, lambda: self.build(data.base), self.write, self.read)]

    def build(self, base):
        import scann
        spill = {"soar_lambda": 1.5, "overretrieve_factor": 2.0} if self.soar else {}
        return (scann.scann_ops_pybind.builder(base, 100, "dot_product").set_n_training_threads(self.threads)
                .tree(num_leaves=self.n_leaves, num_leaves_to_search=100,
                      training_sample_size=min(len(base), 250_000), **spill)
                .score_ah(2, anisotropic_quantization_threshold=0.2)
                .reorder(1000, quantize=scann.ReorderType.BFLOAT16 if self.bf16 else scann.ReorderType.FLOAT32).build())

    def write(self, index, path):
        Path(path).mkdir()
        index.serialize(path)

    def read(self, path):
        import scann
        return scann.scann_ops_pybind.load_searcher(path)

    def open(self, store):
        self.index = store.open(self.parts[0])

    def sweep(self, k, filtered=False):
        leaves = sorted({max(1, round(self.n_leaves * share)) for share in PROBED})
        factors = {10: [10, 30, 60], 100: [2, 4, 8]}.get(k, [1.2, 1.6, 2, 3])
        return [{"n_leaves": n, "reorder": round(k * f)} for n, f in product(leaves, factors)]

    def search(self, queries, k, params, only=None):
        found = self.index.search_batched(queries, final_num_neighbors=k, pre_reorder_num_neighbors=params["reorder"],
                                          leaves_to_search=params["n_leaves"])[0]
        return np.asarray(found).astype(np.int64)


def default_n_lists(n: int) -> int:
    """About 220 rows a list, a power of two: 4096 for a million, 1024 for 200,000."""
    return 2 ** max(2, round(np.log2(n / 220)))


def faiss_parts(data: Data, store: Store, n_lists: int) -> dict[str, Part]:
    """Coarse centroids by L2 k-means; rows go to the nearest by L2 and lists are probed by inner product.

    Faiss's own default for inner products (spherical k-means, rows assigned by inner product) is no better, and probes
    more where norms differ much.
    """
    base, dim = data.base, data.base.shape[1]
    sample = base[np.random.default_rng(3).permutation(len(base))[:200_000]]

    def centroids():
        kmeans = faiss.Kmeans(dim, n_lists, niter=10, seed=1, max_points_per_centroid=256, min_points_per_centroid=1)
        kmeans.train(base)
        return kmeans.centroids

    coarse = Part("coarse", {"n_lists": n_lists, "kmeans": "l2"}, centroids,
                  lambda c, path: np.save(path + ".npy", c) or Path(path + ".npy").rename(path), np.load)

    def ivf(name: str, make: Callable[[Any], Any], **more) -> Part:
        def build():
            centres = store.open(coarse)
            nearest, probing = faiss.IndexFlatL2(dim), faiss.IndexFlatIP(dim)
            nearest.add(centres)
            probing.add(centres)
            index = make(nearest)
            for key, value in more.items():
                setattr(index, key, value)
            index.train(sample)
            index.add(base)
            # The index frees its quantiser from here on, Python no longer does.
            probing.this.disown()
            index.quantizer, index.own_fields = probing, True
            return index

        return Part(name, {"codes": name, "n_lists": n_lists, **more}, build, needs=[coarse])

    def rows(name: str, kind) -> Part:
        def build():
            index = faiss.IndexScalarQuantizer(dim, kind, IP)
            index.train(sample)
            index.add(base)
            return index

        return Part(name, {"rows": name}, build)

    sq = faiss.ScalarQuantizer
    return {
        "flat": ivf("ivf-flat", lambda q: faiss.IndexIVFFlat(q, dim, n_lists, IP)),
        "sq8": ivf("ivf-sq8", lambda q: faiss.IndexIVFScalarQuantizer(q, dim, n_lists, sq.QT_8bit, IP, True)),
        "pq": ivf("ivf-pq", lambda q: faiss.IndexIVFPQ(q, dim, n_lists, dim // 4, 8, IP)),
        # Residuals are not this kind's default for inner products; without them it refines three times as many.
        "pqfs": ivf("ivf-pqfs", lambda q: faiss.IndexIVFPQFastScan(q, dim, n_lists, dim // 2, 4, IP), by_residual=True),
        "rabitq": ivf("ivf-rabitqfs", lambda q: faiss.IndexIVFRaBitQFastScan(q, dim, n_lists, IP)),
        "rabitq4": ivf("ivf-rabitq4", lambda q: faiss.IndexIVFRaBitQ(q, dim, n_lists, IP, True, 4)),
        "rows-bf16": rows("rows-bf16", sq.QT_bf16),
        "rows-sq8": rows("rows-sq8", sq.QT_8bit),
    }


def peers(data: Data, store: Store, n_lists: int, libraries: list[str]) -> list[Contender]:
    """Every contender of the libraries named, those that are quick to build first."""
    parts, threads = faiss_parts(data, store, n_lists), store.threads
    n_leaves = max(16, n_lists // 2)
    few = lambda k: {10: [4, 10, 20], 100: [1.5, 3, 6]}.get(k, [1.2, 1.6, 2.2, 3.2])  # noqa: E731
    many = lambda k: {10: [20, 50, 100], 100: [4, 8, 16]}.get(k, [2, 4, 8])  # noqa: E731
    made = {
        "faiss": lambda: [
            FaissIvf("faiss IVFFlat", parts["flat"]),
            FaissIvf("faiss IVF-SQ8", parts["sq8"]),
            FaissIvf("faiss IVFPQFastScan + bf16", parts["pqfs"], parts["rows-bf16"], few),
            FaissIvf("faiss IVFPQFastScan + SQ8", parts["pqfs"], parts["rows-sq8"], few),
            FaissIvf("faiss IVFPQ + bf16", parts["pq"], parts["rows-bf16"], few),
            FaissIvf("faiss IVF-RaBitQ fs + bf16", parts["rabitq"], parts["rows-bf16"], many),
            FaissIvf("faiss IVF-RaBitQ 4 bit", parts["rabitq4"]),
        ],
        "scann": lambda: [Scann(data, threads, n_leaves, **how) for how in ({}, {"bf16": True}, {"soar": True})],
        "hnswlib": lambda: [Graph("hnswlib", data, augmented, threads) for augmented in (False, True)],
        "usearch": lambda: [Graph("usearch", data, augmented, threads) for augmented in (False, True)],
        "faiss-hnsw": lambda: [Graph("faiss", data, augmented, threads) for augmented in (False, True)],
    }
    return [contender for library, make in made.items() if library in libraries for contender in make()]
