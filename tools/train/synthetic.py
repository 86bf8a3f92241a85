"""Writes a small synthetic dataset directory: tastes in a few dimensions, readers who mostly follow theirs, embeddings
that show them with noise. For tests of this tool and for the demo's ranker."""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def write(directory: Path, n_items: int, n_users: int, dim: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_genres = min(12, n_items)
    centres = rng.standard_normal((n_genres, dim))
    genre = rng.integers(n_genres, size=n_items)
    items = centres[genre] + 0.7 * rng.standard_normal((n_items, dim))
    fame = rng.permutation(np.log(1 / np.arange(1, n_items + 1)))
    favourite = rng.integers(n_genres, size=(n_users, 2))
    users = centres[favourite].mean(1) + 0.5 * rng.standard_normal((n_users, dim))
    user, item = [], []
    for row in range(n_users):
        # The Gumbel trick draws without replacement, in proportion to exp(taste + fame).
        taste = items @ users[row] / np.sqrt(dim) * 2.0
        drawn = np.argsort(-(taste + 0.7 * fame + rng.gumbel(size=n_items)))
        item.append(drawn[: 5 + rng.geometric(1 / 20)])
        user.append(np.full(len(item[-1]), row))
    user, item = np.concatenate(user), np.concatenate(item)
    directory.mkdir(parents=True, exist_ok=True)
    table = {"item_id": [f"item-{i}" for i in range(n_items)], "genre": [f"genre-{g}" for g in genre]}
    pq.write_table(pa.table(table), directory / "items.parquet")
    user_ids = np.array([f"user-{u}" for u in range(n_users)])
    pq.write_table(pa.table({"user_id": user_ids}), directory / "users.parquet")
    liked = {"user_id": user_ids[user], "item_id": np.array(table["item_id"])[item],
             "timestamp": rng.integers(1_700_000_000, 1_702_600_000, len(user))}
    pq.write_table(pa.table(liked), directory / "interactions.parquet")
    for name, vectors in (("item", items), ("user", users)):
        noisy = vectors + 0.3 * rng.standard_normal(vectors.shape)
        unit = noisy / np.linalg.norm(noisy, axis=1, keepdims=True)
        np.save(directory / f"{name}_embeddings.npy", unit.astype(np.float32))
    (directory / "dataset.toml").write_text(
        'name = "synthetic"\n\n[items]\ncategory = "genre"\n\n[interactions]\ntimestamp = "timestamp"\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--items", type=int, default=5000)
    parser.add_argument("--users", type=int, default=3000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    write(args.directory, args.items, args.users, args.dim, args.seed)


if __name__ == "__main__":
    main()
