"""Asks a running server the queries of goodbooks and says how early the right book comes.

MRR@k is the mean over queries of 1 / rank of the first relevant item among the k best, 0 where none is.
Needs pyarrow (tools/train/requirements.txt). Exit 1 when the server or the file can't answer.
"""

import argparse
import http.client
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


class Refused(Exception):
    """The server answered something else than a result; the text says what."""


def reciprocal_rank(answered: list, relevant: set) -> float:
    """1 / rank of the first relevant item, 0.0 without one."""
    return next((1.0 / rank for rank, item in enumerate(answered, 1) if item in relevant), 0.0)


def search(connection: http.client.HTTPConnection, text: str, k: int) -> list[int]:
    """The ids of the k best items for `text`, best first."""
    body = json.dumps({"text": text, "k": k})
    connection.request("POST", "/v1/search", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.read().decode(errors="replace")
    if response.status != 200:
        raise Refused(f"{text!r}: HTTP {response.status}: {answer.strip()}")
    return [item["item_id"] for item in json.loads(answer)["items"]]


def summary(rows: list[tuple[str, float]]) -> list[tuple[str, int, float, float]]:
    """(kind, queries, MRR, share with a hit) for all and for each kind, from (kind, reciprocal rank) rows."""
    kinds = ["all", *sorted({kind for kind, _ in rows})]
    lines = []
    for kind in kinds:
        ranks = [rank for of, rank in rows if kind in ("all", of)]
        lines.append((kind, len(ranks), sum(ranks) / len(ranks), sum(rank > 0 for rank in ranks) / len(ranks)))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("queries", type=Path, metavar="QUERIES", help="queries.parquet: kind, text, relevant")
    parser.add_argument("--addr", default="127.0.0.1:8000", help="the server's HTTP address (default %(default)s)")
    parser.add_argument("--k", type=int, default=10, help="results per query (default %(default)s)")
    args = parser.parse_args()
    try:
        queries = pq.read_table(args.queries, columns=["kind", "text", "relevant"]).to_pylist()
        connection = http.client.HTTPConnection(args.addr, timeout=10)
        rows = [(q["kind"], reciprocal_rank(search(connection, q["text"], args.k), set(q["relevant"]))) for q in queries]
    except (Refused, OSError, http.client.HTTPException, pa.ArrowException) as error:
        print(f"search_quality.py: {args.addr}: {error}", file=sys.stderr)
        return 1
    if not rows:
        print(f"search_quality.py: {args.queries}: no queries", file=sys.stderr)
        return 1
    print(f"{'':14}  queries  MRR@{args.k:<4}  found")
    for kind, n, mrr, found in summary(rows):
        print(f"{kind:14}  {n:>7}  {mrr:<8.4f}  {found:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
