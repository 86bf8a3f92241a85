"""Lays a dataset directory out of the goodbooks Parquet files: dataset.toml beside links to them.

The files that dataset.toml names must be there; other Parquet files and the licence come along when they are.
Running it again renews what it made and touches nothing else.
"""

import argparse
import os
import shutil
import sys
import tomllib
from pathlib import Path

DESCRIPTION = Path(__file__).with_name("dataset.toml")
LICENCE = "LICENSE"


class Missing(Exception):
    """The source lacks something; the text says what."""


def required(description: Path = DESCRIPTION) -> list[str]:
    """The data files that a dataset description names."""
    tables = tomllib.loads(description.read_text()).values()
    return [table["file"] for table in tables if isinstance(table, dict) and "file" in table]


def place(source: Path, target: Path, copy: bool) -> None:
    """Puts a link to `source`, or a copy of it, at `target`, in the place of what is there."""
    new = target.with_name(f".{target.name}.new")
    new.unlink(missing_ok=True)
    if copy:
        shutil.copyfile(source, new)
    else:
        new.symlink_to(source.resolve())
    os.replace(new, target)


def prepare(source: Path, out: Path, copy: bool = False) -> list[str]:
    """Fills `out` and returns the names of the data files in it.

    Raises Missing when `source` lacks a file or is `out` itself.
    """
    if not source.is_dir():
        raise Missing(f"{source}: no such directory")
    absent = [name for name in required() if not (source / name).is_file()]
    if absent:
        raise Missing(f"{source}: missing {', '.join(absent)}")
    if out.exists() and out.samefile(source):
        raise Missing(f"{out}: would replace the source by links to itself; name another directory")
    out.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in source.glob("*.parquet") if path.is_file())
    for name in names + [LICENCE] * (source / LICENCE).is_file():
        place(source / name, out / name, copy)
    place(DESCRIPTION, out / DESCRIPTION.name, copy=True)
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="directory of the goodbooks Parquet files")
    parser.add_argument("out", type=Path, metavar="OUT", help="dataset directory to make")
    parser.add_argument("--copy", action="store_true", help="copy the data instead of linking to it")
    args = parser.parse_args()
    try:
        names = prepare(args.source, args.out, args.copy)
    except (Missing, OSError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: dataset.toml and {len(names)} Parquet files", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
