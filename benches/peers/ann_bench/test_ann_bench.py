import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import bench  # noqa: E402
import coverage  # noqa: E402
import data as datasets  # noqa: E402
import ours  # noqa: E402
import report  # noqa: E402
from contenders import FaissIvf, Store, faiss_parts  # noqa: E402
from report import Point  # noqa: E402


def point(recall: float, us: float, name: str = "ours a", **more) -> Point:
    return Point(name, name, name.split()[0], 10, {}, False, recalls=[recall], us=[us], **more)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return datasets.synthetic(tmp_path_factory.mktemp("cache"), 3000, 24, n_queries=60)


@pytest.fixture(scope="module")
def child():
    with ours.Child(ours.binary("dev"), 1) as child:
        yield child


@pytest.fixture(scope="module")
def scan(child, small):
    scan = ours.Ours(child, small, "brute_force", {"kind": "brute_force"}, {})
    made = scan.build()
    assert made["bytes"] > 0 and made["cpu_s"] > 0
    return scan


def test_data_are_the_same_every_time_and_look_like_embeddings(small):
    items, users = datasets.generate(3000, 24, 60, 7)
    assert (items == small.base).all() and (users == small.queries).all()
    assert not (datasets.generate(3000, 24, 60, 8)[0] == items).any()
    norms = np.linalg.norm(items, axis=1)
    assert norms.max() > 1.5 * np.median(norms) and norms.min() > 0.8
    assert 4 < datasets.effective_dimension(items) < 16
    np.testing.assert_allclose(np.linalg.norm(users, axis=1), 1, rtol=1e-5)


def test_truth_is_what_all_scores_say_with_and_without_a_filter(small):
    scores = small.queries @ small.base.T
    assert datasets.recall(datasets.truth(small, 60, 50), np.argsort(-scores, axis=1)[:, :50]) > 0.999
    only = datasets.allowed(small, 0.01)
    found = datasets.truth(small, 60, 50, only)
    n_allowed = only.rows.sum()
    assert 0 < n_allowed < 50 and only.rows[found[:, :n_allowed]].all() and (found[:, n_allowed:] == -1).all()
    assert (datasets.truth(small, 60, 50) != -1).all(), "kept apart from the filtered one"


def test_coverage_grows_to_all_in_every_order(small):
    exact = datasets.truth(small, 20, 50)
    found = coverage.coverage(small.base, small.queries[:20], exact, 8, [0, 96, 1500, 3000])
    assert len(found) == 3
    for shares in found.values():
        assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == pytest.approx(1) and shares[2] > 0.8
    whole, _, projection = found.values()
    assert projection[1] > whole[1], "96 vectors are three blocks, and less than any list"


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("selectivity", [1.0, 0.1, 0.01])
def test_our_exact_scan_finds_all(small, scan, batch, selectivity):
    only = datasets.allowed(small, selectivity) if selectivity < 1 else None
    found, us = scan.measure(small, slice(5, 60), 40, {}, batch, only)
    assert found.shape == (55, 40) and us > 0
    assert datasets.recall(found, datasets.truth(small, 60, 40, only)[5:]) > 0.999
    assert only is None or only.rows[found[found >= 0]].all()


def test_the_child_says_what_it_can_not_do(small, child, scan, tmp_path):
    search = {"op": "search", "name": scan.name, "queries": small.queries_path, "n": 60, "rows": (0, 1), "k": 5,
              "out": tmp_path / "ids"}
    for change, words in [({"name": "nobody"}, "no index nobody"), ({"rows": (50, 61)}, "rows 50..61 of 60"),
                          ({"rows": (2, 1)}, "rows 2..1"), ({"params": {"n_probe": 3}}, "n_probe"),
                          ({"queries": tmp_path / "none.npy"}, "none.npy"), ({"n": 61}, "60 rows"),
                          ({"filter": tmp_path / "none"}, "none"), ({"op": "dance"}, "dance"),
                          ({"out": tmp_path / "no" / "ids"}, "ids")]:
        with pytest.raises(RuntimeError, match=words):
            child.ask(**{**search, **change})
    assert child.ask(**search)["cpu_us_per_query"] > 0
    assert child.ask(op="core")["read_bytes_per_s"] > 1e6


def test_faiss_lists_find_more_with_more_probes_and_obey_a_filter(small):
    store = Store(small, 1)
    lists = FaissIvf("faiss IVF-SQ8", faiss_parts(small, store, 16)["sq8"])
    cost = lists.costs(store)
    assert cost["bytes"] > 3000 * 24 and set(cost["parts"]) == {"coarse", "ivf-sq8"}
    lists.open(store)
    exact = datasets.truth(small, 60, 20)
    found = [lists.measure(small, slice(0, 60), 20, {"n_probes": n}, True)[0] for n in (1, 4, 16)]
    recalls = [datasets.recall(rows, exact) for rows in found]
    assert recalls == sorted(recalls) and recalls[0] < 0.9 < recalls[2]
    assert lists.scanned(small.queries, 20, {"n_probes": 16}) == pytest.approx(3000)
    only = datasets.allowed(small, 0.1)
    found, _ = lists.measure(small, slice(0, 60), 20, {"n_probes": 16}, False, only)
    assert only.rows[found].all() and datasets.recall(found, datasets.truth(small, 60, 20, only)) > 0.9


def test_values_between_settings_are_interpolated():
    points = [point(0.90, 100), point(0.96, 400), point(0.93, 500), point(0.99, 1600)]
    assert [p.time for p in report.frontier(points)] == [100, 400, 1600]
    assert report.at_recall(points, 0.93) == pytest.approx(200)
    assert report.at_recall(points, 0.96) == pytest.approx(400)
    assert report.at_recall(points, 0.80) == 100
    assert report.at_recall(points, 0.995) is None


def test_ratios_take_the_best_of_each():
    points = [point(0.98, 100), point(0.98, 90, "ours b"), point(0.98, 270, "faiss a"),
              point(0.99, 200, "faiss b"), point(0.5, 10, "scann a")]
    faiss, scann = report.ratios(points, 0.95)
    assert (faiss["ours"], faiss["theirs"]) == ("ours b", "faiss b") and faiss["ratio"] == pytest.approx(200 / 90)
    assert scann["ratio"] is None and scann["best_recall"] == 0.5


def test_settings_of_no_use_are_not_timed():
    points = [point(0.5, 10), point(0.9, 100), point(0.89, 120), point(0.89, 200), point(0.9995, 300), point(0.9999, 500)]
    assert [p.time for p in bench.worth_timing(points, 0.85)] == [100, 120, 300]
    assert [p.time for p in bench.worth_timing(points[:1], 0.85)] == [10]


def test_the_whole_of_it(tmp_path, child):
    (tmp_path / "ours.json").write_text(json.dumps([{"name": "brute_force", "options": {"kind": "brute_force"}}]))
    bench.main([
        "--synthetic", "3000x24", "--cache", str(tmp_path), "--out", str(tmp_path / "out"), "--libraries", "faiss",
        "--ours", str(tmp_path / "ours.json"), "--ours-binary", child.process.args[0], "--rounds", "2",
        "--queries", "10", "--k", "10", "100", "--filtered", "--filtered-k", "10", "--selectivities", "0.1"])
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    ours_points = [p for p in record["points"] if p["library"] == "ours"]
    assert {(p["k"], p["selectivity"]) for p in ours_points} == {(10, 1), (100, 1), (10, 0.1)}
    assert all(p["recall"] > 0.999 and len(p["us"]) == 2 for p in ours_points)
    for rows in (*record["ratios"].values(), record["filtered_ratios"]["0.1"]["10"]):
        assert [row["library"] for row in rows] == ["faiss"] and rows[0]["ours"] == "ours brute_force"
        reached = rows[0]["best_recall"] >= rows[0]["recall"]
        assert rows[0]["ratio"] > 0 if reached else rows[0]["ratio"] is None
    text = (tmp_path / "out" / "record.md").read_text()
    assert "## k = 100" in text and "ours brute_force" in text and "admits 10% of the rows" in text
    plot = ElementTree.parse(tmp_path / "out" / "frontiers.svg").getroot()
    lines = plot.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) > 6
