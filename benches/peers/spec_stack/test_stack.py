import asyncio
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[2] / "tools" / "train")]
import synthetic  # noqa: E402
from catalogue import Catalogue  # noqa: E402
from features import SignalReader  # noqa: E402
from network import Mlp  # noqa: E402
from stack import BusinessRulesReranker, RecommendationServer, ResultCache  # noqa: E402

COLUMNS = ["cross.dot", "candidate.ann.rank", "cross.cooccurrence_top3", "cross.same_category", "item.popularity"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    synthetic.write(directory, 300, 200, 8, 1)
    (directory / "rankers").mkdir()
    rng = np.random.default_rng(1)
    network = Mlp([rng.standard_normal((len(COLUMNS), 1)).astype(np.float32)], [np.zeros(1, np.float32)])
    network.save_onnx(directory / "rankers" / "main.onnx")
    (directory / "rankers" / "main.toml").write_text(f'[[inputs]]\nname = "features"\ncolumns = {COLUMNS}\n')
    return directory


def test_neighbours_are_shrunk_cosines(directory):
    catalogue = Catalogue(directory)
    dense = np.zeros((200, 300))
    for user in range(200):
        items, weights = catalogue.histories.of(user)
        dense[user, items] = weights
    dots = dense.T @ dense
    norms = np.sqrt(np.diag(dots))
    want = dots / (norms[:, None] * norms + 2)
    np.fill_diagonal(want, 0)
    for item in range(0, 300, 7):
        rows, scores = catalogue.neighbours.of(item)
        np.testing.assert_allclose(scores, want[item, rows], rtol=1e-5)
        assert len(rows) == (want[item] > 0).sum() and (np.diff(scores) <= 0).all()


def test_signals_equal_the_definition(directory):
    catalogue = Catalogue(directory)
    items, _ = catalogue.histories.of(3)
    weights = np.array([1.0, 0.5, 0.0] * len(items), np.float32)[: len(items)]
    got = SignalReader(catalogue).read(items, weights)
    found = [[] for _ in range(300)]
    for item, weight in zip(items, weights):
        if weight > 0:
            for row, score in zip(*catalogue.neighbours.of(item)):
                found[row].append((weight, score))
    for row, pairs in enumerate(found):
        scores = sorted((s for _, s in pairs), reverse=True)
        assert got.count[row] == len(pairs)
        assert got.max[row] == (scores[0] if scores else 0)
        assert got.top3[row] == pytest.approx(sum(scores[:3]), abs=1e-6)
        assert got.sum[row] == pytest.approx(sum(w * s for w, s in pairs), abs=1e-5)


@pytest.mark.parametrize("index", ["flat", "ivf"])
def test_answers_do_not_depend_on_assembly_and_hold_nothing_seen(directory, index):
    catalogue = Catalogue(directory)
    servers = [RecommendationServer(catalogue, directory, index=index, assembly=a, ann_k=50, cf_k=30, trending_k=10)
               for a in ("spec", "vectorised")]
    for user in ("user-0", "user-199", "stranger"):
        first, second = (asyncio.run(s.recommend(user, {}, 10))[0] for s in servers)
        assert first == second and [i["rank"] for i in first] == list(range(1, 11))
        seen = catalogue.histories.of(catalogue.user_row[user])[0] if user in catalogue.user_row else []
        assert not {i["item_id"] for i in first} & {f"item-{row}" for row in seen}


def test_diversity_turns_away_a_twin():
    vectors = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    rows, _ = BusinessRulesReranker(vectors, 0.5).apply_diversity(np.arange(3), np.array([1.0, 0.9, 0.5], np.float32), 3)
    assert rows.tolist() == [0, 2, 1]
    rows, _ = BusinessRulesReranker(vectors, 1.0).apply_diversity(np.arange(3), np.array([1.0, 0.9, 0.5], np.float32), 2)
    assert rows.tolist() == [0, 1]


def test_cache_forgets_the_least_used_and_the_old():
    async def story():
        cache = ResultCache(2)
        await cache.set("a", 1)
        await cache.set("b", 2)
        assert await cache.get("a") == 1
        await cache.set("c", 3)
        assert await cache.get("b") is None and await cache.get("a") == 1
        cache.entries["a"] = (0.0, 1)
        assert await cache.get("a") is None and "a" not in cache.entries

    asyncio.run(story())
