import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx.reference import ReferenceEvaluator

sys.path.insert(0, str(Path(__file__).parent))
import synthetic  # noqa: E402
from dataset import Dataset, to_toml, weights  # noqa: E402
from network import Mlp  # noqa: E402
from train import factorize, hold_out, sample  # noqa: E402

BINARY = os.environ.get("TASTEMAKER")


def tiny(directory: Path) -> Dataset:
    directory.mkdir(exist_ok=True)
    pq.write_table(pa.table({"item_id": [10, 20, 30]}), directory / "items.parquet")
    pq.write_table(pa.table({"user_id": ["a", "b"]}), directory / "users.parquet")
    events = {"user_id": ["b", "a", "a", "nobody"], "item_id": [30, 10, 99, 10], "rating": [5, 3, 5, 5]}
    pq.write_table(pa.table(events), directory / "interactions.parquet")
    (directory / "dataset.toml").write_text(
        '[items]\ntext = ["title"]\n[[interactions.weight_rule]]\nwhere = { rating = [4, 5] }\nweight = 1.0\n'
        "[[interactions.weight_rule]]\nweight = 0.5\n")
    return Dataset(directory)


def test_rows_follow_the_files_and_unknown_ids_are_left_out(tmp_path):
    data = tiny(tmp_path)
    assert data.user.tolist() == [1, 0] and data.item.tolist() == [2, 0]
    assert data.weight.tolist() == [1.0, 0.5]
    assert data.matrix(np.array([True, False])).toarray().tolist() == [[0, 0, 0], [0, 0, 1]]


def test_first_rule_that_holds_decides():
    table = pa.table({"kind": [2, 1, 1], "rating": [0, 5, 1]})
    rules = [{"where": {"kind": 2}, "weight": 3.0}, {"where": {"rating": [4, 5], "kind": 1}, "weight": 2.0}]
    assert weights(table, {"weight_rule": rules}).tolist() == [3.0, 2.0, 1.0]
    assert weights(table, {"weight": "rating"}).tolist() == [0.0, 5.0, 1.0]


def test_part_keeps_everything_but_the_rows_and_the_text(tmp_path):
    data = tiny(tmp_path / "all")
    data.write_part(tmp_path / "part", np.array([False, True]))
    part = Dataset(tmp_path / "part")
    assert part.user.tolist() == [0] and part.weight.tolist() == [0.5]
    assert "text" not in part.config["items"]


def test_toml_survives():
    config = {"name": 'a "b"', "items": {"text": ["x", "y"], "n": 1.5}, "interactions": {
        "weight_rule": [{"where": {"rating": [4, 5]}, "weight": 1.0}, {"weight": 0.2}]}}
    assert tomllib.loads(to_toml(config)) == config


def test_network_learns_and_onnx_says_the_same(tmp_path):
    rng = np.random.default_rng(0)
    # Far from standardized, one column constant; the answer is not linear.
    x = (rng.standard_normal((4000, 3)) * [100, 0.01, 0] + [5, -3, 7]).astype(np.float32)
    y = ((x[:, 0] > 5) ^ (x[:, 1] > -3)).astype(np.float32)
    network = Mlp.fit(x, y, [16, 8], 200, rng)
    assert ((network(x) > 0) == y).mean() > 0.95
    network.save_onnx(tmp_path / "n.onnx")
    run = ReferenceEvaluator(onnx.load(tmp_path / "n.onnx"))
    for n in (1, 7):
        (score,) = run.run(None, {"features": x[:n]})
        assert score.shape == (n, 1)
        np.testing.assert_allclose(score[:, 0], network(x[:n]), rtol=1e-4, atol=1e-4)


def test_hold_out_spares_users_with_little(tmp_path):
    synthetic.write(tmp_path, 60, 40, 4, 1)
    data = Dataset(tmp_path)
    few = data.user < 20
    keep = np.ones(len(few), bool)
    keep[np.flatnonzero(few)] = False
    keep[np.flatnonzero(few)[np.r_[True, np.diff(data.user[few]) > 0]]] = True
    data.user, data.item, data.weight = data.user[keep], data.item[keep], data.weight[keep]
    held = hold_out(data, 0.5, np.random.default_rng(1))
    assert held.any() and not held[data.user < 20].any()


def test_sample_takes_every_positive_and_so_many_negatives():
    rows = np.array([[0, 5], [0, 6], [0, 7], [1, 5], [1, 8]], np.float32)
    features = np.arange(10, dtype=np.float32).reshape(5, 2)
    x, y = sample(features, rows, {40: {6}, 41: {9}}, [40, 41], 1, np.random.default_rng(1))
    assert y.tolist() == [1.0, 0.0] and x[0].tolist() == [2.0, 3.0] and x[1].tolist() in ([0.0, 1.0], [4.0, 5.0])


def test_factors_repeat_for_a_seed(tmp_path):
    synthetic.write(tmp_path, 60, 40, 4, 1)
    data = Dataset(tmp_path)

    class args:
        dim, regularization, alpha, iterations, seed, threads = 4, 0.05, 20.0, 3, 1, 1

    first, second = (factorize(data.matrix(np.ones(len(data.user), bool)), args) for _ in range(2))
    assert first[0].shape == (40, 4) and first[1].shape == (60, 4)
    assert all((a == b).all() for a, b in zip(first, second))


@pytest.mark.skipif(not BINARY, reason="TASTEMAKER names no executable")
def test_ranker_repeats_and_finds_more_in_100_than_rank_fusion(tmp_path):
    outputs = []
    for name in ("one", "two"):
        directory = tmp_path / name
        synthetic.write(directory, 5000, 3000, 64, 1)
        events = pq.read_table(directory / "interactions.parquet")
        test = np.random.default_rng(2).random(len(events)) < 0.2
        pq.write_table(events.filter(pa.array(test)), tmp_path / "test.parquet")
        pq.write_table(events.filter(pa.array(~test)), directory / "interactions.parquet")
        train = [sys.executable, str(Path(__file__).parent / "train.py"), str(directory), "--binary", BINARY]
        subprocess.check_call([*train, "--plain", "--keep-embeddings", "--users", "2500", "--hidden", "32", "16"])
        outputs.append([(directory / "rankers" / file).read_bytes() for file in ("main.onnx", "main.toml")])
    assert outputs[0] == outputs[1]

    def recall() -> float:
        bundle = tmp_path / "bundle"
        subprocess.check_call([BINARY, "build", str(directory), "--out", str(bundle), "--overwrite"])
        out = subprocess.check_output([BINARY, "eval", str(bundle), "--test", str(tmp_path / "test.parquet")], text=True)
        # slate, then recall, NDCG and coverage at 10, then recall at 100
        return next(float(line.split()[4]) for line in out.splitlines() if line.startswith("slate"))

    ranked = recall()
    for file in (directory / "rankers").iterdir():
        file.unlink()
    assert ranked > recall()
