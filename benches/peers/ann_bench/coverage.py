"""How many vectors hold the best k: of whole lists, and of blocks of 32 in several orders. Prints a table.

Nothing is coded and nothing timed: this is what ranking decides alone. Lists are those of one k-means, as `index::ivf` trains them.
"""
import argparse
from pathlib import Path

import faiss
import numpy as np

import data as datasets

BLOCK = 32


class Blocks:
    """Rows of each list in the order of `key`, descending, `BLOCK` by `BLOCK`."""

    def __init__(self, lists: np.ndarray, n_lists: int, key: np.ndarray):
        order = np.lexsort((-key, lists))
        place = np.arange(len(lists)) - np.searchsorted(lists[order], lists[order])
        self.starts = np.flatnonzero(place % BLOCK == 0)
        self.order, self.list = order, lists[order][self.starts]
        self.sizes = np.diff(np.append(self.starts, len(lists)))
        self.of_row = np.empty(len(lists), int)
        self.of_row[order] = np.repeat(np.arange(len(self.starts)), self.sizes)

    def mean(self, values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values[self.order], self.starts) / self.sizes


def coverage(base: np.ndarray, queries: np.ndarray, exact: np.ndarray, n_lists: int, scanned: list[int]) -> dict:
    """`{order: [share of the exact best among the first n vectors, for each n of scanned]}`, inner product."""
    kmeans = faiss.Kmeans(base.shape[1], n_lists, niter=8, seed=1, max_points_per_centroid=64, min_points_per_centroid=1)
    kmeans.train(base)
    centroids, lists = kmeans.centroids, kmeans.index.search(base, 1)[1][:, 0]
    residuals = ((base - centroids[lists]) ** 2).sum(1)
    squares = np.maximum((centroids**2).sum(1), 1e-12)
    gains = np.einsum("ij,ij->i", base, centroids[lists]) / squares[lists]
    counts = np.maximum(np.bincount(lists, minlength=n_lists), 1)
    spreads = np.sqrt(np.bincount(lists, residuals, n_lists) / counts)
    by_length, by_gain = Blocks(lists, n_lists, residuals), Blocks(lists, n_lists, gains)
    lengths, gain = np.sqrt(by_length.mean(residuals)), by_gain.mean(gains)
    rest = np.sqrt(np.maximum(by_gain.mean(residuals) - (gain - 1) ** 2 * squares[by_gain.list], 0))
    orders = {
        "whole lists": (by_length, lambda dots, norm: (dots + 0.15 * spreads * norm)[by_length.list]),
        "blocks by length of residuals": (by_length, lambda dots, norm: dots[by_length.list] + 0.35 * lengths * norm),
        "blocks by projection": (by_gain, lambda dots, norm: dots[by_gain.list] * gain + 0.2 * rest * norm),
    }
    found = {name: np.zeros(len(scanned)) for name in orders}
    for query, best in zip(queries, exact):
        dots, norm = centroids @ query, np.linalg.norm(query)
        for name, (blocks, rank) in orders.items():
            order = np.argsort(-rank(dots, norm), kind="stable")
            before = np.empty(len(order), int)
            before[order] = np.cumsum(blocks.sizes[order])
            reached = before[blocks.of_row[best]]
            found[name] += [(reached <= n).mean() for n in scanned]
    return {name: list(shares / len(queries)) for name, shares in found.items()}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=lambda path: Path(path).resolve(), required=True)
    parser.add_argument("--synthetic", default="1000000x128", metavar="NxDIM")
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--n-lists", type=int, nargs="+")
    parser.add_argument("--k", type=int, default=500)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--scanned", type=int, nargs="+", required=True, help="vectors that are looked at")
    args = parser.parse_args(words)
    if args.dataset:
        data = datasets.dataset(args.cache, args.dataset)
    else:
        data = datasets.synthetic(args.cache, *map(int, args.synthetic.split("x")))
    exact, base = datasets.truth(data, args.queries, args.k), np.ascontiguousarray(data.base, np.float32)
    print(f"| {data.name}, k = {args.k}, lists | order |", *(f" {n} |" for n in args.scanned), sep="")
    print("| --: | --- |", *(" --: |" for _ in args.scanned), sep="")
    for n_lists in args.n_lists or [round(2 * len(base) ** 0.5)]:
        for name, shares in coverage(base, data.queries[: args.queries], exact, n_lists, args.scanned).items():
            print(f"| {n_lists} | {name} |", *(f" {share:.3f} |" for share in shares), sep="", flush=True)


if __name__ == "__main__":
    main()
