"""The specification's classes, put together: the same names, the same stages, the same order.

What its listing leaves open is done the quick way: seen items are left out of retrieval, cross features are computed for
all candidates at once, and `assembly="vectorised"` hands that matrix to the ranker, where `"spec"` makes one feature vector
per candidate from dictionaries, as the listing does.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from pathlib import Path

import faiss
import numpy as np
import onnxruntime as ort
import orjson

from catalogue import Catalogue
from features import HISTORY_LENGTH, FeatureColumns, Request, SignalReader

MMR_POOL = 256


class ANNIndex:
    """Faiss, inner product; `ivf` (100 lists, as specified) or `flat`."""

    N_LISTS = 100

    def __init__(self, vectors: np.ndarray, kind: str = "ivf", normalise: bool = False):
        self.normalise = normalise
        vectors = vectors.copy()
        if normalise:
            faiss.normalize_L2(vectors)
        flat = faiss.IndexFlatIP(vectors.shape[1])
        if kind == "flat":
            self.index = flat
        else:
            lists = min(self.N_LISTS, max(1, len(vectors) // 39))
            self.quantizer = flat
            self.index = faiss.IndexIVFFlat(flat, vectors.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
            self.index.train(vectors)
        self.index.add(vectors)
        self.vectors = vectors

    def tune(self, queries: np.ndarray, k: int, wanted: float) -> float:
        """Sets the fewest probes that find `wanted` of the exact top `k`; returns what they find."""
        if not hasattr(self.index, "nprobe"):
            return 1.0
        exact = np.argsort(-(queries @ self.vectors.T), axis=1, kind="stable")[:, :k]
        recall = 0.0
        for probes in range(1, self.index.nlist + 1):
            self.index.nprobe = probes
            _, found = self.index.search(queries, k)
            recall = np.mean([len(np.intersect1d(f, e)) / k for f, e in zip(found, exact)])
            if recall >= wanted:
                break
        return float(recall)

    async def search(self, query: np.ndarray | None, k: int, seen: np.ndarray):
        if query is None:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        query = query.reshape(1, -1).copy()
        if self.normalise:
            faiss.normalize_L2(query)
        scores, rows = self.index.search(query, min(k + len(seen), self.index.ntotal))
        fresh = (rows[0] >= 0) & ~np.isin(rows[0], seen)
        return rows[0][fresh][:k], scores[0][fresh][:k]


class CFCache:
    """Candidates by the neighbours of the history."""

    async def get_candidates(self, signals, k: int, seen: np.ndarray):
        scores = signals.sum.copy()
        scores[seen] = 0
        k = min(k, len(scores))
        rows = np.argpartition(-scores, k - 1)[:k]
        rows = rows[scores[rows] > 0]
        rows = rows[np.lexsort((rows, -scores[rows]))]
        return rows, scores[rows]


class PopularityService:
    """What most readers liked."""

    def __init__(self, catalogue: Catalogue):
        self.trending, self.scores = catalogue.trending, catalogue.popularity[catalogue.trending]

    async def get_trending(self, k: int, seen: np.ndarray):
        fresh = ~np.isin(self.trending, seen)
        return self.trending[fresh][:k], self.scores[fresh][:k]


class FeatureStore:
    """Embeddings, histories and features, all in memory."""

    def __init__(self, catalogue: Catalogue, columns: FeatureColumns):
        self.catalogue, self.columns, self.reader = catalogue, columns, SignalReader(catalogue)

    async def get_user(self, user_id: str):
        row = self.catalogue.user_row.get(user_id)
        if row is None:
            nothing = np.empty(0, np.int64)
            return None, None, nothing, nothing.astype(np.float32), nothing
        items, weights = self.catalogue.histories.of(row)
        return row, self.catalogue.user_embeddings[row], items[-HISTORY_LENGTH:], weights[-HISTORY_LENGTH:], items

    async def get_batch_item_features(self, request: Request, rows: np.ndarray) -> np.ndarray:
        return self.columns.matrix(request, rows)


class OptimizedRanker:
    """ONNX Runtime, one thread, all graph optimisations, warmed up."""

    def __init__(self, model: Path, input_name: str, width: int):
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self.input = input_name
        for _ in range(10):
            self.predict_batch(np.zeros((700, width), np.float32))

    def predict_batch(self, features: np.ndarray) -> np.ndarray:
        return self.session.run(None, {self.input: features})[0].reshape(-1)


class BusinessRulesReranker:
    """Maximal marginal relevance over embeddings; no business rules are configured on either side."""

    def __init__(self, vectors: np.ndarray, weight: float):
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        self.unit = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
        self.weight = weight

    def apply_diversity(self, rows: np.ndarray, scores: np.ndarray, n: int):
        if self.weight >= 1 or len(rows) == 0:
            return rows[:n], scores[:n]
        rows, scores = rows[: max(MMR_POOL, n)], scores[: max(MMR_POOL, n)]
        spread = scores[0] - scores[-1]
        value = self.weight * ((scores - scores[-1]) / spread if spread > 0 else np.zeros_like(scores))
        unit, closest, penalty = self.unit[rows], None, 1 - self.weight
        picked = []
        for _ in range(min(n, len(rows))):
            best = int(np.argmax(value if closest is None else value - penalty * closest))
            picked.append(best)
            value[best] = -np.inf
            similar = unit @ unit[best]
            closest = similar if closest is None else np.maximum(closest, similar)
        return rows[picked], scores[picked]

    def apply_business_rules(self, rows, scores, context):
        return rows, scores


class ResultCache:
    """Least recently used in memory, entries live 300 s. Size 0: off."""

    def __init__(self, size: int, ttl: float = 300.0):
        self.size, self.ttl, self.entries = size, ttl, OrderedDict()

    @staticmethod
    def make_key(user_id: str, context: dict, n_items: int) -> str:
        digest = hashlib.md5(orjson.dumps(context, option=orjson.OPT_SORT_KEYS)).hexdigest()[:8]
        return f"recs:{user_id}:{digest}:{n_items}"

    async def get(self, key: str):
        found = self.entries.get(key)
        if found is None:
            return None
        if found[0] < time.monotonic():
            del self.entries[key]
            return None
        self.entries.move_to_end(key)
        return found[1]

    async def set(self, key: str, value) -> None:
        self.entries[key] = (time.monotonic() + self.ttl, value)
        self.entries.move_to_end(key)
        while len(self.entries) > self.size:
            self.entries.popitem(last=False)


class RecommendationServer:
    """The main path: candidates, ranking, re-ranking, cache."""

    def __init__(self, catalogue: Catalogue, directory: Path, *, index="ivf", normalise=False, recall=0.99,
                 assembly="spec", cache_size=0, mmr=0.95, ann_k=500, cf_k=300, trending_k=100):
        self.catalogue, self.assembly = catalogue, assembly
        self.columns = FeatureColumns(directory / "rankers" / "main.toml", catalogue)
        self.ann_index = ANNIndex(catalogue.item_embeddings, index, normalise)
        queries = catalogue.user_embeddings[:: max(1, len(catalogue.user_embeddings) // 256)].copy()
        if normalise:
            faiss.normalize_L2(queries)
        self.ann_recall = self.ann_index.tune(queries, min(ann_k, len(catalogue.item_ids)), recall)
        self.cf_cache, self.popularity_service = CFCache(), PopularityService(catalogue)
        self.feature_store = FeatureStore(catalogue, self.columns)
        self.ranker = OptimizedRanker(directory / "rankers" / "main.onnx", self.columns.input, self._width())
        self.reranker = BusinessRulesReranker(catalogue.item_embeddings, mmr)
        self.result_cache = ResultCache(cache_size) if cache_size else None
        self.k = (ann_k, cf_k, trending_k)

    def _width(self) -> int:
        dim = self.catalogue.item_embeddings.shape[1]
        return sum(dim if name.endswith(".embedding") else 1 for name in self.columns.names)

    async def recommend(self, user_id: str, context: dict, n_items: int) -> tuple[list[dict], bool]:
        """Items best first, and whether the cache had them."""
        if self.result_cache is not None:
            key = self.result_cache.make_key(user_id, context, n_items)
            cached = await self.result_cache.get(key)
            if cached is not None:
                return cached, True
        request, rows, seen = await self.generate_candidates(user_id)
        rows, scores = await self._rank_candidates(request, rows)
        final = self._rerank(rows, scores, seen, context, n_items)
        if self.result_cache is not None:
            await self.result_cache.set(key, final)
        return final, False

    async def generate_candidates(self, user_id: str) -> tuple[Request, np.ndarray, np.ndarray]:
        row, vector, history, weights, seen = await self.feature_store.get_user(user_id)
        signals = self.feature_store.reader.read(history, weights)
        ann_k, cf_k, trending_k = self.k
        results = await asyncio.gather(
            self.ann_index.search(vector, ann_k, seen),
            self.cf_cache.get_candidates(signals, cf_k, seen),
            self.popularity_service.get_trending(trending_k, seen),
        )
        lists = dict(zip(("ann", "collaborative", "trending"), results))
        rows = np.unique(np.concatenate([found for found, _ in results])).astype(np.int64)
        return Request(row, vector, history, weights, signals, lists), rows, seen

    async def _rank_candidates(self, request: Request, rows: np.ndarray):
        matrix = await self.feature_store.get_batch_item_features(request, rows)
        if self.assembly == "spec":
            item_features = dict(zip(rows.tolist(), matrix))
            batch = []
            for item in rows.tolist():
                batch.append(item_features.get(item))
            matrix = np.array(batch, np.float32)
        scores = self.ranker.predict_batch(np.ascontiguousarray(matrix))
        order = np.argsort(-scores, kind="stable")
        return rows[order], scores[order]

    def _rerank(self, rows, scores, seen, context, n_items) -> list[dict]:
        top = max(4 * n_items, 128)
        fresh = ~np.isin(rows, seen)
        rows, scores = rows[fresh][:top], scores[fresh][:top]
        rows, scores = self.reranker.apply_diversity(rows, scores, n_items * 2)
        rows, scores = self.reranker.apply_business_rules(rows, scores, context)
        ids = self.catalogue.item_ids
        return [
            {"item_id": ids[row], "score": score, "rank": at + 1}
            for at, (row, score) in enumerate(zip(rows[:n_items].tolist(), scores[:n_items].tolist()))
        ]
