"""A dataset directory as `tastemaker build` reads it, for programs that learn from it."""

import json
import sys
import tomllib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import scipy.sparse as sp


class Dataset:
    """A dataset directory as `tastemaker build` reads it: ids to rows, interactions to weights."""

    def __init__(self, directory: Path):
        self.directory = directory
        file = directory / "dataset.toml"
        self.config = tomllib.loads(file.read_text()) if file.exists() else {}
        items, users = self.config.get("items", {}), self.config.get("users", {})
        self.items_file = directory / items.get("file", "items.parquet")
        self.users_file = directory / users.get("file", "users.parquet")
        events = self.config.get("interactions", {})
        self.events_file = directory / events.get("file", "interactions.parquet")
        self.item_ids = pq.read_table(self.items_file, columns=[items.get("id", "item_id")]).column(0)
        if not self.users_file.exists():
            sys.exit(f"{self.users_file}: needed, for the order of the user embeddings")
        self.user_ids = pq.read_table(self.users_file, columns=[users.get("id", "user_id")]).column(0)
        self.user_column, self.item_column = events.get("user", "user_id"), events.get("item", "item_id")
        self.table = pq.read_table(self.events_file)
        self.user = rows_of(self.table[self.user_column], self.user_ids)
        self.item = rows_of(self.table[self.item_column], self.item_ids)
        self.weight = weights(self.table, events)
        known = (self.user >= 0) & (self.item >= 0)
        self.table = self.table.filter(pa.array(known))
        self.user, self.item, self.weight = self.user[known], self.item[known], self.weight[known]

    def matrix(self, keep: np.ndarray) -> sp.csr_matrix:
        """Users x items, weights of the liked interactions among `keep`."""
        use = keep & (self.weight > 0)
        shape = (len(self.user_ids), len(self.item_ids))
        return sp.csr_matrix((self.weight[use].astype(np.float32), (self.user[use], self.item[use])), shape=shape)

    def write_part(self, directory: Path, keep: np.ndarray) -> None:
        """A dataset like this one with only the interactions of `keep`."""
        directory.mkdir(parents=True)
        for file in (self.items_file, self.users_file):
            (directory / file.name).symlink_to(file.resolve())
        pq.write_table(self.table.filter(pa.array(keep)), directory / "part.parquet")
        config = {section: dict(value) if isinstance(value, dict) else value for section, value in self.config.items()}
        config.setdefault("items", {})["file"] = self.items_file.name
        config.setdefault("users", {})["file"] = self.users_file.name
        config.setdefault("interactions", {})["file"] = "part.parquet"
        # Text search takes no part in training.
        config["items"].pop("text", None)
        (directory / "dataset.toml").write_text(to_toml(config))


def rows_of(values: pa.ChunkedArray, ids: pa.ChunkedArray) -> np.ndarray:
    """Positions of `values` in `ids`, -1 where unknown."""
    found = pc.index_in(values.cast(pa.string()), value_set=ids.cast(pa.string()).combine_chunks())
    return found.fill_null(-1).to_numpy().astype(np.int64)


def weights(table: pa.Table, config: dict) -> np.ndarray:
    """Weights by `[[interactions.weight_rule]]`, a weight column, or 1."""
    rules = config.get("weight_rule", [])
    if not rules:
        column = config.get("weight")
        return table[column].to_numpy().astype(np.float32) if column else np.ones(len(table), np.float32)
    out = np.ones(len(table), np.float32)
    open_rows = np.ones(len(table), bool)
    for rule in rules:
        holds = open_rows.copy()
        for column, wanted in rule.get("where", {}).items():
            holds &= np.isin(table[column].to_numpy(), wanted if isinstance(wanted, list) else [wanted])
        out[holds] = rule["weight"]
        open_rows &= ~holds
    return out


def to_toml(config: dict) -> str:
    """The subset of TOML that dataset.toml uses; JSON scalars, lists and inline tables of scalars are TOML too."""
    def value(v):
        if isinstance(v, dict):
            return "{ " + ", ".join(f"{json.dumps(k)} = {value(x)}" for k, x in v.items()) + " }"
        if isinstance(v, list):
            return "[" + ", ".join(value(x) for x in v) + "]"
        return json.dumps(v)

    lines = [f"{k} = {value(v)}" for k, v in config.items() if not isinstance(v, dict)]
    for section, content in config.items():
        if isinstance(content, dict):
            lines += [f"[{section}]"] + [f"{k} = {value(v)}" for k, v in content.items()]
    return "\n".join(lines) + "\n"
