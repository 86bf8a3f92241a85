"""Recall@k and NDCG@k of a running server's answers to `POST /v1/recommend`, ours or the stack's, over a sample of test users.

As `tastemaker eval` counts: found / relevant; binary gains over the best possible within k; means over users.
"""

import argparse
import asyncio
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from load import ask, encode


def truth(test: Path, user: str, item: str, relevant: list[str]) -> dict[str, set[str]]:
    """Relevant items by user; a rule is `COLUMN=NUMBER` or `COLUMN>=NUMBER`, any of them makes a row relevant."""
    table = pq.read_table(test)
    keep = np.full(len(table), not relevant)
    for rule in relevant:
        name, at_least, number = rule.partition(">=")
        if not at_least:
            name, _, number = rule.partition("=")
        values = table[name.strip()].to_numpy()
        keep |= values >= float(number) if at_least else values == float(number)
    out: dict[str, set[str]] = {}
    for u, i, wanted in zip(table[user].to_pylist(), table[item].to_pylist(), keep):
        if wanted:
            out.setdefault(str(u), set()).add(str(i))
    return out


def quality(answers: dict[str, list[str]], wanted: dict[str, set[str]], k: int) -> tuple[float, float]:
    recall, ndcg = [], []
    for user, answer in answers.items():
        relevant = wanted[user]
        hits = [rank for rank, item in enumerate(answer[:k]) if item in relevant]
        ideal = sum(1 / np.log2(rank + 2) for rank in range(min(k, len(relevant))))
        recall.append(len(hits) / len(relevant))
        ndcg.append(sum(1 / np.log2(rank + 2) for rank in hits) / ideal)
    return float(np.mean(recall)), float(np.mean(ndcg))


async def answers(port: int, users: list[str], k: int) -> dict[str, list[str]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    out = {}
    for user in users:
        body = json.loads(await ask(reader, writer, encode(user, k)))
        out[user] = [str(item["item_id"]) for item in body["items"]]
    writer.close()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--user", default="user_id")
    parser.add_argument("--item", default="item_id")
    parser.add_argument("--relevant", action="append", default=[], metavar="RULE")
    parser.add_argument("--users", type=int, default=2000, help="sample size (default %(default)s)")
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    wanted = truth(args.test, args.user, args.item, args.relevant)
    sample = np.random.default_rng(args.seed).permutation(sorted(wanted))[: args.users].tolist()
    recall, ndcg = quality(asyncio.run(answers(args.port, sample, args.k)), wanted, args.k)
    print(json.dumps({"users": len(sample), "k": args.k, "recall": round(recall, 4), "ndcg": round(ndcg, 4)}))


if __name__ == "__main__":
    main()
