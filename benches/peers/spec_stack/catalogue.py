"""What the stack keeps in memory: a dataset directory with its trained artefacts, and item-item lists made from it.

The lists, histories and popularity follow `src/catalog/{cooccurrence,build,popularity}.rs`, so that both servers rank the
same candidates by the same numbers.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools" / "train"))
from dataset import Dataset  # noqa: E402

MAX_NEIGHBOURS = 300
SHRINKAGE = 2.0
MAX_HISTORY = 1000
MAX_TRENDING = 1000


class Rows:
    """Compressed rows: entry `at` of row `r` is `values[offsets[r] + at]`."""

    def __init__(self, offsets: np.ndarray, *columns: np.ndarray):
        self.offsets, self.columns = offsets, columns

    def of(self, row: int):
        part = slice(self.offsets[row], self.offsets[row + 1])
        return tuple(column[part] for column in self.columns)


class Catalogue:
    """Arrays by item row and user row. Rows are those of items.parquet and users.parquet."""

    def __init__(self, directory: Path):
        self.data = data = Dataset(directory)
        self.item_ids = [str(i) for i in data.item_ids.to_pylist()]
        self.user_row = {str(u): row for row, u in enumerate(data.user_ids.to_pylist())}
        self.item_embeddings = np.ascontiguousarray(np.load(directory / "item_embeddings.npy"), np.float32)
        self.user_embeddings = np.ascontiguousarray(np.load(directory / "user_embeddings.npy"), np.float32)
        self.histories = self._histories()
        self.popularity = np.bincount(data.item, data.weight, len(self.item_ids)).astype(np.float32)
        best = np.argsort(-self.popularity, kind="stable")
        self.trending = best[:MAX_TRENDING]
        self.neighbours = self._neighbours(directory / "spec_stack_neighbours.npz")
        self.table = pq.read_table(data.items_file)
        self.roles = data.config.get("items", {})

    def _histories(self) -> Rows:
        """Rows (item, weight) by user, oldest first; of repeats the last stays."""
        data, column = self.data, self.data.config.get("interactions", {}).get("timestamp")
        if column:
            order = np.lexsort((data.table[column].to_numpy(), data.user))
        else:
            order = np.argsort(data.user, kind="stable")
        user, item, weight = data.user[order], data.item[order], data.weight[order]
        pair = user * len(self.item_ids) + item
        _, last_from_end = np.unique(pair[::-1], return_index=True)
        keep = np.sort(len(pair) - 1 - last_from_end)
        user, item, weight = user[keep], item[keep], weight[keep]
        return Rows(np.searchsorted(user, np.arange(len(self.user_row) + 1)), item, weight.astype(np.float32))

    def _neighbours(self, cache: Path) -> Rows:
        """Rows (item, similarity) by item: cosine over users with shrinkage, best first."""
        if cache.exists():
            saved = np.load(cache)
            return Rows(saved["offsets"], saved["rows"], saved["scores"])
        import scipy.sparse as sp

        n_items = len(self.item_ids)
        offsets, (items, weights) = self.histories.offsets, self.histories.columns
        users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        newest = offsets[users + 1] - np.arange(len(items)) <= MAX_HISTORY
        use = newest & (weights > 0)
        matrix = sp.csr_matrix((weights[use], (users[use], items[use])), shape=(len(offsets) - 1, n_items))
        by_item = matrix.T.tocsr()
        norms = np.sqrt(np.asarray(by_item.multiply(by_item).sum(1)).ravel())
        starts, rows, scores = [0], [], []
        for begin in range(0, n_items, 500):
            dots = (by_item[begin : begin + 500] @ matrix).tocsr()
            for at in range(dots.shape[0]):
                part = slice(dots.indptr[at], dots.indptr[at + 1])
                other, dot = dots.indices[part], dots.data[part]
                other, dot = other[other != begin + at], dot[other != begin + at]
                similarity = (dot / (norms[begin + at] * norms[other] + SHRINKAGE)).astype(np.float32)
                best = np.lexsort((other, -similarity))[:MAX_NEIGHBOURS]
                rows.append(other[best])
                scores.append(similarity[best])
                starts.append(starts[-1] + len(best))
        lists = Rows(np.array(starts), np.concatenate(rows).astype(np.int64), np.concatenate(scores))
        np.savez(cache, offsets=lists.offsets, rows=lists.columns[0], scores=lists.columns[1])
        return lists

    def codes(self, column: str) -> tuple[np.ndarray, int]:
        """A string or list column as codes `[n_items, most values]`, and their number, which is also the padding."""
        lists = [([] if v is None else v if isinstance(v, list) else [v]) for v in self.table[column].to_pylist()]
        vocabulary = {value: code for code, value in enumerate(dict.fromkeys(v for values in lists for v in values))}
        width = max(1, max(map(len, lists)))
        codes = np.full((len(lists), width), len(vocabulary), np.int64)
        for row, values in enumerate(lists):
            codes[row, : len(values)] = [vocabulary[v] for v in values]
        return codes, len(vocabulary)

    def numbers(self, table, column: str, missing: float | None = None) -> np.ndarray:
        """A number column; what is missing gets the mean, or `missing`."""
        values = table[column].cast("float64").to_numpy(zero_copy_only=False).astype(np.float64)
        fill = np.nanmean(values) if missing is None else missing
        return np.where(np.isfinite(values), values, fill).astype(np.float32)
