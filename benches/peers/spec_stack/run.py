"""Serves the stack: FastAPI on uvicorn with uvloop and httptools, one process. Pin it with `taskset -c CORE`."""

import argparse
import os
import sys
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import faiss  # noqa: E402
import orjson  # noqa: E402
import uvicorn  # noqa: E402
from fastapi import FastAPI, Response  # noqa: E402
from pydantic import BaseModel, Field  # noqa: E402

from catalogue import Catalogue  # noqa: E402
from stack import RecommendationServer  # noqa: E402


class Recommend(BaseModel):
    user_id: str
    context: dict[str, str] = {}
    n_items: int = Field(10, ge=1, le=500)


def application(server: RecommendationServer) -> FastAPI:
    app = FastAPI()

    @app.get("/healthz")
    async def health() -> Response:
        return Response(b"ok")

    @app.post("/v1/recommend")
    async def recommend(call: Recommend) -> Response:
        items, hit = await server.recommend(call.user_id, call.context, call.n_items)
        # Encoded by orjson at once: FastAPI's own encoder costs about as much as the ranker.
        body = orjson.dumps({"items": items, "model_version": "spec", "cache": "l1" if hit else "miss"})
        return Response(body, media_type="application/json")

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path, help="dataset directory with embeddings and rankers/main.*")
    parser.add_argument("--port", type=int, default=8010)
    parser.add_argument("--index", choices=["ivf", "flat"], default="ivf")
    parser.add_argument("--normalise", action="store_true", help="cosine, as the listing has it; the ranker knows dots")
    parser.add_argument("--recall", type=float, default=0.99, help="probes are tuned to it (default %(default)s)")
    parser.add_argument("--assembly", choices=["spec", "vectorised"], default="spec")
    parser.add_argument("--cache-size", type=int, default=0, help="entries, 0: off (default)")
    parser.add_argument("--mmr", type=float, default=0.95)
    args = parser.parse_args()
    faiss.omp_set_num_threads(1)
    server = RecommendationServer(
        Catalogue(args.dataset), args.dataset, index=args.index, normalise=args.normalise, recall=args.recall,
        assembly=args.assembly, cache_size=args.cache_size, mmr=args.mmr)
    probes = getattr(server.ann_index.index, "nprobe", None)
    print(f"{args.index}: nprobe {probes}, recall {server.ann_recall:.4f}", file=sys.stderr, flush=True)
    uvicorn.run(application(server), host="127.0.0.1", port=args.port, loop="uvloop", http="httptools",
                access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
