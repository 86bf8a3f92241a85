"""The ranker's feature columns in vectorised numpy; each follows its twin in `src/features/assemble.rs`."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from catalogue import Catalogue

HISTORY_LENGTH = 200
SOURCES = ("ann", "collaborative", "trending", "search")


class Signals:
    """What the history says of every item: sum, max, top3 and count over the neighbour lists that hold it."""

    def __init__(self, n_items: int):
        self.sum, self.max, self.top3, self.count = (np.zeros(n_items, np.float32) for _ in range(4))


class SignalReader:
    """Item-item lists, packed so that one sort puts the entries of an item together, most similar first."""

    def __init__(self, catalogue: Catalogue):
        self.lists, self.n_items = catalogue.neighbours, len(catalogue.item_ids)
        rows, scores = self.lists.columns
        # Non-negative floats order as their bits do.
        inverted = np.uint64(0xFFFFFFFF) - scores.view(np.uint32).astype(np.uint64)
        self.keys = (rows.astype(np.uint64) << np.uint64(32)) | inverted

    def read(self, items: np.ndarray, weights: np.ndarray) -> Signals:
        out = Signals(self.n_items)
        liked = weights > 0
        items, weights = items[liked], weights[liked]
        if len(items) == 0:
            return out
        offsets, (rows, scores) = self.lists.offsets, self.lists.columns
        parts = [slice(offsets[i], offsets[i + 1]) for i in items]
        row = np.concatenate([rows[p] for p in parts])
        if len(row) == 0:
            return out
        weighted = np.concatenate([scores[p] * w for p, w in zip(parts, weights)])
        out.sum = np.bincount(row, weighted, self.n_items).astype(np.float32)
        keys = np.sort(np.concatenate([self.keys[p] for p in parts]))
        row = (keys >> np.uint64(32)).astype(np.int64)
        score = (np.uint64(0xFFFFFFFF) - (keys & np.uint64(0xFFFFFFFF))).astype(np.uint32).view(np.float32)
        starts = np.flatnonzero(np.r_[True, row[1:] != row[:-1]])
        count = np.diff(np.r_[starts, len(row)])
        padded = np.r_[score, np.float32(0), np.float32(0)]
        top3 = padded[starts] + padded[starts + 1] * (count > 1) + padded[starts + 2] * (count > 2)
        touched = row[starts]
        out.max[touched], out.top3[touched], out.count[touched] = score[starts], top3, count
        return out


@dataclass
class Request:
    """What the columns are computed from."""

    user_row: int | None
    user_vector: np.ndarray | None
    history: np.ndarray
    weights: np.ndarray
    signals: Signals
    # By source: rows, best first, and their scores.
    lists: dict[str, tuple[np.ndarray, np.ndarray]]


class FeatureColumns:
    """The columns of a ranker's manifest, compiled against a catalogue."""

    def __init__(self, manifest: Path, catalogue: Catalogue):
        inputs = tomllib.loads(manifest.read_text())["inputs"]
        if len(inputs) != 1:
            raise ValueError(f"{manifest}: {len(inputs)} inputs, this stack feeds one")
        self.input, self.names, self.catalogue = inputs[0]["name"], inputs[0]["columns"], catalogue
        self.n_items = len(catalogue.item_ids)
        self.log_popularity = np.log1p(catalogue.popularity)
        self.cached: dict[str, object] = {}
        self.static = {name: self._static(name) for name in self.names if self._is_number(name)}
        roles = catalogue.roles
        for role in ("category", "creator", "series"):
            if role in roles:
                self.cached[role] = catalogue.codes(roles[role])
        if "series_position" in roles:
            self.cached["position"] = catalogue.numbers(catalogue.table, roles["series_position"], np.nan)
        for name in self.names:
            if name.startswith("cross.overlap."):
                self.cached[name] = catalogue.codes(name.removeprefix("cross.overlap."))
        unknown = [name for name in self.names if not self._known(name)]
        if unknown:
            raise ValueError(f"{manifest}: columns that this stack does not compute: {', '.join(unknown)}")

    @staticmethod
    def _is_number(name: str) -> bool:
        kind, _, column = name.partition(".")
        own = {"item.embedding", "user.embedding", "item.popularity", "user.history_length"}
        return kind in ("item", "user") and bool(column) and name not in own

    def _static(self, name: str) -> np.ndarray:
        kind, _, column = name.partition(".")
        table = self.catalogue.table if kind == "item" else pq.read_table(self.catalogue.data.users_file)
        return self.catalogue.numbers(table, column)

    def _known(self, name: str) -> bool:
        return name in self.static or name in self.cached or hasattr(self, "_" + name.replace(".", "_")) or (
            name.startswith("candidate.") and name.split(".")[1] in SOURCES
            and name.split(".")[2] in ("score", "rank", "present"))

    def matrix(self, request: Request, rows: np.ndarray) -> np.ndarray:
        """f32 `[len(rows), width]`."""
        columns = [self._column(name, request, rows) for name in self.names]
        return np.column_stack([np.broadcast_to(c, len(rows)) if np.ndim(c) < 2 else c for c in columns]).astype(np.float32)

    def _column(self, name: str, request: Request, rows: np.ndarray):
        if name in self.static:
            values = self.static[name]
            if name.startswith("item."):
                return values[rows]
            return values.mean() if request.user_row is None else values[request.user_row]
        if name.startswith("candidate."):
            _, source, what = name.split(".")
            found, scores = request.lists.get(source, (np.empty(0, np.int64), np.empty(0, np.float32)))
            dense = np.zeros(self.n_items, np.float32)
            dense[found] = {"score": scores, "rank": 1 / np.arange(1, len(found) + 1), "present": 1.0}[what]
            return dense[rows]
        if name.startswith("cross.overlap."):
            codes, n_codes = self.cached[name]
            counts = self._counts(codes, n_codes, request)
            n_own = np.maximum((codes[rows] < n_codes).sum(1), 1)
            return counts[codes[rows]].sum(1) / self._n_liked(request) / n_own
        return getattr(self, "_" + name.replace(".", "_"))(request, rows)

    @staticmethod
    def _n_liked(request: Request) -> int:
        return max(1, int((request.weights > 0).sum()))

    @staticmethod
    def _counts(codes: np.ndarray, n_codes: int, request: Request) -> np.ndarray:
        """Occurrences of each code among the liked items; 0 for the padding."""
        counts = np.bincount(codes[request.history[request.weights > 0]].ravel(), minlength=n_codes + 1)
        counts[n_codes] = 0
        return counts

    def _cross_dot(self, request, rows):
        return 0.0 if request.user_vector is None else self.catalogue.item_embeddings[rows] @ request.user_vector

    def _cross_cooccurrence_sum(self, request, rows):
        return request.signals.sum[rows]

    def _cross_cooccurrence_max(self, request, rows):
        return request.signals.max[rows]

    def _cross_cooccurrence_top3(self, request, rows):
        return request.signals.top3[rows]

    def _cross_cooccurrence_count(self, request, rows):
        return np.log1p(request.signals.count[rows])

    def _cross_cooccurrence_mean(self, request, rows):
        return request.signals.sum[rows] / np.maximum(request.signals.count[rows], 1)

    def _user_history_length(self, request, rows):
        return np.log1p(len(request.history))

    def _item_popularity(self, request, rows):
        return self.log_popularity[rows]

    def _user_embedding(self, request, rows):
        vector = np.zeros(self.catalogue.item_embeddings.shape[1]) if request.user_vector is None else request.user_vector
        return np.broadcast_to(vector, (len(rows), len(vector)))

    def _item_embedding(self, request, rows):
        return self.catalogue.item_embeddings[rows]

    def _cross_same_creator(self, request, rows):
        codes, n_codes = self.cached["creator"]
        return np.log1p(self._counts(codes, n_codes, request)[codes[rows]].sum(1))

    def _cross_same_category(self, request, rows):
        codes, n_codes = self.cached["category"]
        codes = codes[:, :1]
        return self._counts(codes, n_codes, request)[codes[rows, 0]] / self._n_liked(request)

    def _series(self, request, rows):
        """Of each row's series: liked items in the history (-1 where the history has none), and the furthest position."""
        codes, n_codes = self.cached["series"]
        history = codes[request.history, 0]
        known = history < n_codes
        likes = np.full(n_codes + 1, -1.0)
        likes[history[known]] = 0
        np.add.at(likes, history[known & (request.weights > 0)], 1)
        furthest = np.full(n_codes + 1, np.nan)
        if "position" in self.cached:
            np.fmax.at(furthest, history[known], self.cached["position"][request.history[known]])
        return likes[codes[rows, 0]], furthest[codes[rows, 0]]

    def _cross_same_series(self, request, rows):
        likes, _ = self._series(request, rows)
        return np.log1p(np.maximum(likes, 0))

    def _gap(self, request, rows):
        likes, furthest = self._series(request, rows)
        gap = self.cached["position"][rows] - furthest
        return np.where((likes >= 0) & np.isfinite(gap), gap, 0.0)

    def _cross_next_in_series(self, request, rows):
        gap = self._gap(request, rows)
        return (gap > 0) & (gap <= 1)

    def _cross_series_gap(self, request, rows):
        return np.clip(self._gap(request, rows), -10, 10)
