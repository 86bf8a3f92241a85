"""A small open-loop load generator for `POST /v1/recommend` over kept-alive connections; for servers of up to a few
thousand requests per second. Latency counts from the intended send, so a stall delays all that it held up."""

import argparse
import asyncio
import json
import random
import time

import numpy as np


class Answer(Exception):
    """A response that is not 200, or not whole."""


async def ask(reader, writer, request: bytes) -> bytes:
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head[:14]:
        raise Answer(head.split(b"\r\n")[0].decode(errors="replace"))
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return await reader.readexactly(int(line[15:]))
    raise Answer("no content-length")


def encode(user: str, n_items: int) -> bytes:
    body = json.dumps({"user_id": user, "n_items": n_items}).encode()
    head = f"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def load(port: int, users: list[str], seconds: float, rate: float, connections: int, n_items: int, seed: int) -> dict:
    """`rate` 0: every connection asks again as soon as it is answered (the peak); else Poisson arrivals."""
    random_state = random.Random(seed)
    requests = [encode(user, n_items) for user in users]
    latencies, errors = [], 0
    begin = time.perf_counter()
    end = begin + seconds
    arrivals: asyncio.Queue = asyncio.Queue()

    async def connection():
        nonlocal errors
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            while True:
                if rate:
                    intended = await arrivals.get()
                    if intended is None:
                        return
                else:
                    intended = time.perf_counter()
                    if intended >= end:
                        return
                try:
                    await ask(reader, writer, random_state.choice(requests))
                    latencies.append(time.perf_counter() - intended)
                except Answer:
                    errors += 1
        finally:
            writer.close()

    async def schedule():
        at = begin
        while rate and at < end:
            delay = at - time.perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            arrivals.put_nowait(at)
            at += random_state.expovariate(rate)
        for _ in range(connections):
            arrivals.put_nowait(None)

    await asyncio.gather(schedule(), *(connection() for _ in range(connections)))
    taken = time.perf_counter() - begin
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3 if latencies else (float("nan"),) * 2
    return {"rps": len(latencies) / taken, "offered": rate, "p50_ms": float(p50), "p99_ms": float(p99), "errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--users", required=True, help="file of user ids, one a line")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rate", type=float, default=0, help="requests per second; 0: as fast as answers come")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--n-items", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    users = open(args.users).read().split()
    import uvloop

    print(json.dumps(uvloop.run(
        load(args.port, users, args.seconds, args.rate, args.connections, args.n_items, args.seed))))


if __name__ == "__main__":
    main()
