"""Embeddings like those of two-tower models, their exact neighbours and filters, kept on disk."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np

BLOCK = 50_000


@dataclass
class Data:
    """Vectors f32 `[n, dim]` and queries f32 `[n_queries, dim]`; the score is the inner product."""

    name: str
    directory: Path
    base: np.ndarray
    queries: np.ndarray

    @property
    def base_path(self) -> Path:
        return self.directory / "base.npy"

    @property
    def queries_path(self) -> Path:
        return self.directory / "queries.npy"


def directions(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; zeros stay."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(norms > 0, norms, 1)).astype(np.float32)


def spectrum(dim: int) -> np.ndarray:
    """Standard deviations per principal axis that fall as a power of the axis' rank; their mean square is 1."""
    deviations = np.arange(1, dim + 1) ** -0.55
    return (deviations * np.sqrt(dim / np.sum(deviations**2))).astype(np.float32)


def generate(n: int, dim: int, n_queries: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Items f32 `[n, dim]` and users f32 `[n_queries, dim]`.

    Items lie in clusters of three levels (genre, sub-genre, series) with Zipf sizes and widths of their own, in a cone
    around a common direction, with a decaying spectrum along rotated axes; popularity has a heavy tail and shows in the
    norm. A user is a mixture of one to five items drawn by popularity, with noise and the offset of another tower: not
    distributed as items are.
    """
    rng = np.random.default_rng([seed, n, dim])
    n_clusters = max(16, n // 50)
    axes = np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32)
    wide = spectrum(dim)
    narrow = 0.5 * wide + 0.5

    def level(parents: np.ndarray | None, count: int, spread: float) -> np.ndarray:
        offsets = spread * wide * rng.standard_normal((count, dim), dtype=np.float32)
        return offsets if parents is None else parents[rng.integers(0, len(parents), count)] + offsets

    genres = level(None, max(20, n_clusters // 200), 1.0)
    subgenres = level(genres, max(100, n_clusters // 20), 0.8)
    centres = level(subgenres, n_clusters, 0.6)
    cone = 0.35 * wide * rng.standard_normal(dim, dtype=np.float32)
    sizes = rng.permutation(np.arange(1, n_clusters + 1) ** -0.7)
    members = rng.choice(n_clusters, n, p=sizes / sizes.sum())
    widths = rng.uniform(0.35, 0.85, n_clusters).astype(np.float32)
    popularity = 1 + rng.pareto(1.5, n)
    norms = (0.85 + 0.12 * np.log1p(popularity)).astype(np.float32)

    items = np.empty((n, dim), np.float32)
    for start in range(0, n, BLOCK):
        of = members[start : start + BLOCK]
        noise = rng.standard_normal((len(of), dim), dtype=np.float32)
        rows = (centres[of] + widths[of, None] * narrow * noise + cone) @ axes.T
        items[start : start + BLOCK] = directions(rows) * norms[start : start + BLOCK, None]

    cumulative = np.cumsum(popularity) / popularity.sum()
    tower = directions(rng.standard_normal((1, dim), dtype=np.float32))[0]
    users = np.empty((n_queries, dim), np.float32)
    for user in users:
        n_interests = rng.integers(1, 6)
        liked = directions(items[np.searchsorted(cumulative, rng.random(n_interests)).clip(0, n - 1)])
        mixture = rng.dirichlet(np.ones(n_interests)).astype(np.float32) @ liked
        noise = narrow * rng.standard_normal(dim, dtype=np.float32) @ axes.T
        user[:] = mixture / np.linalg.norm(mixture) + 0.45 * noise / np.linalg.norm(noise) + 0.25 * tower
    return items, directions(users)


def effective_dimension(rows: np.ndarray) -> float:
    """Participation ratio of the covariance's eigenvalues: of as many equal axes the spread might be."""
    rows = rows[:20_000] - rows[:20_000].mean(0)
    eigenvalues = np.linalg.eigvalsh(rows.T @ rows)
    return float(eigenvalues.sum() ** 2 / (eigenvalues**2).sum())


def synthetic(cache: Path, n: int, dim: int, n_queries: int = 2000, seed: int = 7) -> Data:
    name = f"syn{n // 1000}k" if n < 1_000_000 else f"syn{n / 1_000_000:g}m"
    directory = cache / f"{name}-{dim}-{n_queries}-{seed}"
    if not (directory / "queries.npy").exists():
        directory.mkdir(parents=True, exist_ok=True)
        items, users = generate(n, dim, n_queries, seed)
        np.save(directory / "base.npy", items)
        np.save(directory / "queries.npy", users)
    return opened(f"{name} x {dim}", directory)


def dataset(cache: Path, source: Path, n_queries: int = 2000, seed: int = 7) -> Data:
    """The item and user embeddings of a dataset directory, queries being users drawn at random."""
    items = np.load(source / "item_embeddings.npy").astype(np.float32)
    users = np.load(source / "user_embeddings.npy").astype(np.float32)
    if items.ndim != 2 or users.ndim != 2 or items.shape[1] != users.shape[1]:
        raise SystemExit(f"{source}: items {items.shape} and users {users.shape} are not matrices of one dimension")
    directory = cache / f"{source.resolve().name}-{fingerprint(items)}-{n_queries}-{seed}"
    if not (directory / "queries.npy").exists():
        directory.mkdir(parents=True, exist_ok=True)
        drawn = np.random.default_rng(seed).permutation(len(users))[:n_queries]
        np.save(directory / "base.npy", items)
        np.save(directory / "queries.npy", users[drawn])
    return opened(f"{source.resolve().name} x {items.shape[1]}", directory)


def opened(name: str, directory: Path) -> Data:
    return Data(name, directory, np.load(directory / "base.npy"), np.load(directory / "queries.npy"))


def fingerprint(*parts) -> str:
    """16 hexadecimal digits of a hash of arrays and of whatever JSON can say."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else json.dumps(part).encode())
    return digest.hexdigest()


@dataclass
class Allowed:
    """A filter: bool `[n]`, and a file of it: little-endian u64 words, row `i` in bit `i % 64` of word `i / 64`."""

    rows: np.ndarray
    path: Path


def allowed(data: Data, selectivity: float) -> Allowed:
    """Rows drawn at random, the same for every query."""
    rows = np.random.default_rng(11).random(len(data.base)) < selectivity
    words = np.zeros(-(-len(rows) // 64) * 8, np.uint8)
    bits = np.packbits(rows, bitorder="little")
    words[: len(bits)] = bits
    path = data.directory / f"allowed-{selectivity:g}"
    words.tofile(path)
    return Allowed(rows, path)


def truth(data: Data, n_queries: int, k: int, only: Allowed | None = None) -> np.ndarray:
    """Exact neighbours of the first queries: i64 `[n_queries, k]`, best first, -1 where fewer are allowed.

    Kept beside the data under a hash of all that decides them.
    """
    queries = data.queries[:n_queries]
    key = fingerprint(data.base, queries, k, *([only.rows] if only else []))
    path = data.directory / f"truth-{key}.npy"
    if path.exists():
        return np.load(path)
    rows = np.flatnonzero(only.rows) if only else np.arange(len(data.base))
    found = np.full((n_queries, k), -1)
    n_found = min(k, len(rows))
    if n_found:
        base = data.base[rows] if only else data.base
        found[:, :n_found] = rows[faiss.knn(queries, base, n_found, faiss.METRIC_INNER_PRODUCT)[1]]
    np.save(path, found)
    return found


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Share of the exact neighbours that were found; absent ones (-1) are not asked for."""
    wanted = got = 0
    for row, want in zip(found, exact):
        want = want[want >= 0]
        wanted += len(want)
        got += len(np.intersect1d(row, want))
    return got / wanted if wanted else 1.0
