"""Takes whole readers out of the goodbooks files: what they did becomes `fold_in.parquet`, the rest a source without them.

For `tastemaker eval --fold-in`: readers whom training never saw, and whose history comes as events. Which readers they are depends
on their ids alone. Needs pyarrow.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import prepare
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

BY_READER = ("train.parquet", "test.parquet", "users.parquet")
FOLD_IN = "fold_in.parquet"


def chosen(readers: np.ndarray, n: int) -> np.ndarray:
    """The first `n` ids in the order of a multiplicative hash: spread over all, the same for everybody."""
    mixed = readers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return readers[np.argsort(mixed, kind="stable")[:n]]


def hold_out(source: Path, out: Path, n: int) -> int:
    """Fills `out`; returns the rows of `fold_in.parquet`. Raises Missing as `prepare` does."""
    prepare.prepare(source, out)
    users = pq.read_table(source / "users.parquet")
    held = pa.array(chosen(users["user_id"].to_numpy(), n), users["user_id"].type)
    parts = []
    for name in BY_READER:
        table = pq.read_table(source / name)
        of_held = pc.is_in(table["user_id"], held)
        (out / name).unlink()
        pq.write_table(table.filter(pc.invert(of_held)), out / name, compression="zstd")
        if name != "users.parquet":
            parts.append(table.filter(of_held))
    rows = pa.concat_tables(parts)
    pq.write_table(rows, out / FOLD_IN, compression="zstd")
    return rows.num_rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="directory of the goodbooks Parquet files")
    parser.add_argument("out", type=Path, metavar="OUT", help="dataset directory to make")
    parser.add_argument("--readers", type=int, default=5000, help="how many are taken out (default %(default)s)")
    args = parser.parse_args()
    try:
        rows = hold_out(args.source, args.out, args.readers)
    except (prepare.Missing, OSError, pa.ArrowException) as error:
        print(f"hold_out.py: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {args.readers} readers taken out, {rows} rows in {FOLD_IN}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
