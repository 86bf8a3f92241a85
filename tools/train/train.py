"""Trains what a dataset lacks: item and user embeddings (ALS) and a neural ranker.

The ranker learns from the feature columns that the server itself computes (`tastemaker features`), so that training and
serving can't differ. Part of every user's liked items is held out; embeddings and neighbours are made from the rest; the
ranker learns to find the held-out items among the candidates; then embeddings are made again from everything.

Deterministic for a seed and one thread. Writes into the dataset directory:
item_embeddings.npy, user_embeddings.npy, rankers/main.onnx, rankers/main.toml.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import implicit.cpu.als  # noqa: E402
import numpy as np  # noqa: E402
import scipy.sparse as sp  # noqa: E402

from dataset import Dataset  # noqa: E402
from network import Mlp  # noqa: E402

SCALAR_COLUMNS = [
    "cross.dot",
    "candidate.ann.rank",
    "candidate.ann.present",
    "candidate.collaborative.rank",
    "candidate.collaborative.present",
    "candidate.trending.rank",
    "cross.cooccurrence_sum",
    "cross.cooccurrence_max",
    "cross.cooccurrence_count",
    "cross.cooccurrence_mean",
    "cross.cooccurrence_top3",
    "user.history_length",
    "item.popularity",
]
ROLE_COLUMNS = {
    "category": ["cross.same_category"],
    "creator": ["cross.same_creator"],
    "series": ["cross.same_series"],
    "series_position": ["cross.next_in_series", "cross.series_gap"],
}


def factorize(matrix: sp.csr_matrix, args) -> tuple[np.ndarray, np.ndarray]:
    """User and item factors by implicit ALS (Hu, Koren & Volinsky, ICDM 2008)."""
    model = implicit.cpu.als.AlternatingLeastSquares(
        factors=args.dim,
        regularization=args.regularization,
        alpha=args.alpha,
        iterations=args.iterations,
        random_state=args.seed,
        num_threads=args.threads,
    )
    model.fit(matrix, show_progress=False)
    return np.asarray(model.user_factors, np.float32), np.asarray(model.item_factors, np.float32)


def hold_out(data: Dataset, share: float, rng: np.random.Generator) -> np.ndarray:
    """Marks `share` of the liked interactions of every user who liked 4 or more."""
    liked = np.flatnonzero(data.weight >= 1.0 if (data.weight >= 1.0).any() else data.weight > 0)
    count = np.bincount(data.user[liked], minlength=len(data.user_ids))
    chosen = liked[(rng.random(len(liked)) < share) & (count[data.user[liked]] >= 4)]
    mask = np.zeros(len(data.user), bool)
    mask[chosen] = True
    return mask


def columns_for(binary: str, bundle: Path, extra: list[str]) -> list[str]:
    """The columns that this catalogue can give."""
    info = json.loads(subprocess.check_output([binary, "inspect", str(bundle), "--json"]))
    columns = list(SCALAR_COLUMNS)
    for role, names in ROLE_COLUMNS.items():
        if role in info["roles"]:
            columns += names
    return columns + extra


def sample(features, rows, held, users, negatives, rng):
    """All positives and `negatives` uniform negatives per user with a positive: matrix, labels, user of each row."""
    keep, labels = [], []
    starts = np.flatnonzero(np.r_[True, rows[1:, 0] != rows[:-1, 0]])
    for start, end in zip(starts, np.r_[starts[1:], len(rows)]):
        wanted = held.get(users[int(rows[start, 0])], ())
        hit = np.isin(rows[start:end, 1].astype(np.int64), list(wanted))
        positive, negative = np.flatnonzero(hit), np.flatnonzero(~hit)
        if len(positive) == 0 or len(negative) == 0:
            continue
        picked = rng.choice(negative, min(negatives, len(negative)), replace=False)
        keep += [start + positive, start + picked]
        labels += [np.ones(len(positive), np.float32), np.zeros(len(picked), np.float32)]
    keep = np.concatenate(keep)
    return np.asarray(features[keep]), np.concatenate(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="dataset directory; results are written into it")
    parser.add_argument("--binary", default="tastemaker", help="the tastemaker executable")
    parser.add_argument("--dim", type=int, default=128, help="factors (default %(default)s)")
    parser.add_argument("--alpha", type=float, default=40.0, help="ALS confidence (default %(default)s)")
    parser.add_argument("--regularization", type=float, default=0.05, help="ALS regularization (default %(default)s)")
    parser.add_argument("--iterations", type=int, default=12, help="ALS iterations (default %(default)s)")
    parser.add_argument("--users", type=int, default=6000, help="users to learn the ranker from (default %(default)s)")
    parser.add_argument("--holdout", type=float, default=0.25, help="share of liked items held out (default %(default)s)")
    parser.add_argument("--negatives", type=int, default=60, help="negatives per user (default %(default)s)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 32], help="layer widths (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the sample (default %(default)s)")
    parser.add_argument("--column", action="append", default=[], help="another feature column; may be repeated")
    parser.add_argument("--plain", action="store_true", help="only columns that every catalogue with embeddings has")
    parser.add_argument("--keep-embeddings", action="store_true", help="the dataset's own embeddings stay; only rank")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="more are faster and not reproducible")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)

    data = Dataset(args.dataset)
    everything = np.ones(len(data.user), bool)
    held_mask = hold_out(data, args.holdout, rng)
    held: dict[int, set[int]] = {}
    for user, item in zip(data.user[held_mask], data.item[held_mask]):
        held.setdefault(int(user), set()).add(int(item))

    with tempfile.TemporaryDirectory() as work:
        part, bundle = Path(work) / "part", Path(work) / "bundle"
        data.write_part(part, ~held_mask)
        if args.keep_embeddings:
            for name in ("item_embeddings.npy", "user_embeddings.npy"):
                (part / name).symlink_to((args.dataset / name).resolve())
        else:
            users, items = factorize(data.matrix(~held_mask), args)
            np.save(part / "user_embeddings.npy", users)
            np.save(part / "item_embeddings.npy", items)
        subprocess.check_call([args.binary, "build", str(part), "--out", str(bundle)], stdout=sys.stderr)

        columns = SCALAR_COLUMNS + args.column if args.plain else columns_for(args.binary, bundle, args.column)
        chosen = rng.permutation(sorted(held))[: args.users].tolist()
        (Path(work) / "users").write_text("".join(f"{data.user_ids[u].as_py()}\n" for u in chosen))
        (Path(work) / "columns").write_text("".join(f"{c}\n" for c in columns))
        subprocess.check_call(
            [args.binary, "features", str(bundle), "--users", f"{work}/users", "--columns", f"{work}/columns",
             "--out", f"{work}/features"], stdout=sys.stderr)
        features = np.load(f"{work}/features/features.npy", mmap_mode="r")
        rows = np.load(f"{work}/features/rows.npy")
        x, y = sample(features, rows, held, chosen, args.negatives, rng)

    print(f"{len(y)} rows, {int(y.sum())} positive, {len(columns)} columns", file=sys.stderr)
    network = Mlp.fit(x, y, args.hidden, args.epochs, rng)
    rankers = args.dataset / "rankers"
    rankers.mkdir(exist_ok=True)
    network.save_onnx(rankers / "main.onnx")
    listed = "".join(f'    "{c}",\n' for c in columns)
    (rankers / "main.toml").write_text(
        f'# Made by tools/train.\n[[inputs]]\nname = "features"\ncolumns = [\n{listed}]\n\n[output]\nname = "score"\n')
    if not args.keep_embeddings:
        users, items = factorize(data.matrix(everything), args)
        np.save(args.dataset / "user_embeddings.npy", users)
        np.save(args.dataset / "item_embeddings.npy", items)


if __name__ == "__main__":
    main()
