import copy
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import evaluate  # noqa: E402
import prepare  # noqa: E402
import search_quality  # noqa: E402


def script(name: str, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, HERE / name, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def source(tmp_path):
    directory = tmp_path / "source"
    directory.mkdir()
    for name in ("items", "users", "train", "test"):
        (directory / f"{name}.parquet").write_text(name)
    (directory / "LICENSE").write_text("CC BY-SA 4.0")
    (directory / "notes.txt").write_text("not data")
    return directory


# prepare.py


def test_a_dataset_is_links_and_a_description(source, tmp_path):
    out = tmp_path / "new" / "out"
    done = script("prepare.py", source, out)
    assert done.returncode == 0, done.stderr
    names = {"items.parquet", "users.parquet", "train.parquet", "test.parquet", "LICENSE", "dataset.toml"}
    assert {path.name for path in out.iterdir()} == names
    assert all((out / name).is_symlink() for name in names - {"dataset.toml"})
    assert (out / "items.parquet").read_text() == "items"
    assert not (out / "dataset.toml").is_symlink()
    assert (out / "dataset.toml").read_bytes() == (HERE / "dataset.toml").read_bytes()


def test_links_hold_from_anywhere(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare.prepare(Path("source"), Path("out"))
    assert (tmp_path / "out" / "items.parquet").resolve() == source / "items.parquet"


def test_copies_outlive_the_source_and_may_replace_links(source, tmp_path):
    out = tmp_path / "out"
    assert script("prepare.py", source, out).returncode == 0
    assert script("prepare.py", source, out, "--copy").returncode == 0
    (source / "items.parquet").unlink()
    assert not (out / "items.parquet").is_symlink() and (out / "items.parquet").read_text() == "items"


def test_again_renews_its_own_and_spares_the_rest(source, tmp_path):
    out = tmp_path / "out"
    prepare.prepare(source, out)
    (out / "user_embeddings.npy").write_text("trained")
    (out / "dataset.toml").write_text("stale")
    prepare.prepare(source, out)
    assert (out / "user_embeddings.npy").read_text() == "trained"
    assert (out / "dataset.toml").read_text() != "stale"
    assert (source / "items.parquet").read_text() == "items"


def test_what_is_missing_is_said_in_one_line(source, tmp_path):
    (source / "items.parquet").unlink()
    (source / "train.parquet").unlink()
    done = script("prepare.py", source, tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr == f"prepare.py: {source}: missing items.parquet, train.parquet\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["source", "."])
def test_the_source_is_never_replaced(source, tmp_path, out):
    done = script("prepare.py", source, source / out if out == "." else tmp_path / out)
    assert done.returncode == 1 and "itself" in done.stderr
    assert not (source / "items.parquet").is_symlink()


def test_no_source_and_wrong_usage(tmp_path):
    done = script("prepare.py", tmp_path / "none", tmp_path / "out")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert script("prepare.py").returncode == 2
    assert script("prepare.py", tmp_path).returncode == 2


# evaluate.py


def quality(recall: float, ndcg: float, at_500: float | None = None) -> dict:
    more = {} if at_500 is None else {"500": at_500}
    return {"users": 3, "recall": {"10": recall, "100": 0.4, **more}, "ndcg": {"10": ndcg}, "coverage": {"10": 0.9}}


GOOD = {
    "generation": "goodbooks-0", "users": 3, "n_candidates": 650.0,
    "rows": [
        ["slate", quality(0.163, 0.163)],
        ["merged", quality(0.162, 0.162, 0.67)],
        ["ann alone", quality(0.09, 0.08, 0.6)],
        ["collaborative alone", quality(0.14, 0.14, 0.5)],
    ],
}  # fmt: skip


def failures(report: dict) -> list[str]:
    return [line for holds, line in evaluate.judge(report) if not holds]


def test_good_figures_pass_every_demand():
    assert failures(GOOD) == []
    assert len(evaluate.judge(GOOD)) == 3 + 2 * 2


@pytest.mark.parametrize(
    ("row", "metric", "k", "figure", "expected"),
    [
        (0, "recall", "10", 0.1599, ["slate recall@10 0.1599, floor 0.160"]),
        (0, "ndcg", "10", 0.1579, ["slate ndcg@10 0.1579, floor 0.158"]),
        (1, "recall", "500", 0.6399, ["merged recall@500 0.6399, floor 0.640"]),
        (3, "ndcg", "10", 0.17, ["slate beats collaborative alone, ndcg@10: 0.1630 > 0.1700"]),
        (2, "recall", "10", 0.163, ["slate beats ann alone, recall@10: 0.1630 > 0.1630"]),
        (0, "recall", "10", float("nan"), 3),
    ],
)
def test_each_demand_can_fail(row, metric, k, figure, expected):
    report = copy.deepcopy(GOOD)
    report["rows"][row][1][metric][k] = figure
    failed = failures(report)
    assert failed == expected if isinstance(expected, list) else len(failed) == expected


def test_a_floor_is_reached_by_equality():
    report = copy.deepcopy(GOOD)
    report["rows"][1][1]["recall"]["500"] = 0.64
    assert failures(report) == []


def test_what_was_not_measured_fails():
    report = copy.deepcopy(GOOD)
    report["rows"] = [row for row in report["rows"] if row[0] == "slate"]
    assert failures(report) == ["merged recall@500 not measured, floor 0.640", "no source was measured alone"]


def test_table_shows_every_row():
    lines = evaluate.table(GOOD).splitlines()
    assert lines[0].split() == ["recall@10", "ndcg@10", "coverage@10", "recall@100", "recall@500"]
    assert lines[1].split() == ["slate", "0.1630", "0.1630", "0.9000", "0.4000", "-"]
    assert lines[2].split()[-1] == "0.6700" and len(lines) == 5


@pytest.fixture
def server(tmp_path):
    """An executable that stands in for both the server's and the interpreter: notes its arguments, prints a report."""
    def make(report: dict, fails: str = "") -> Path:
        file = tmp_path / "tastemaker"
        (tmp_path / "report.json").write_text(json.dumps(report))
        file.write_text(
            f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\n[ "$1" = "{fails}" ] && exit 3\n'
            f'[ "$1" = eval ] && cat {tmp_path}/report.json\nexit 0\n')
        file.chmod(0o755)
        return file
    return make


def test_the_whole_way_with_stand_ins(source, tmp_path, server):
    binary = server(GOOD)
    keep = tmp_path / "keep"
    done = script("evaluate.py", source, "--binary", binary, "--python", binary, "--keep", keep, "--users", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("PASS") == 7 and "FAIL" not in done.stdout
    train, build, measure = (tmp_path / "calls").read_text().splitlines()
    assert train.split()[1:] == [str(keep / "dataset"), "--binary", str(binary), *evaluate.TRAIN_ARGUMENTS]
    assert build == f"build {keep}/dataset --out {keep}/bundle --overwrite"
    assert measure.endswith("--relevant kind=2 --relevant rating>=4 --json --users 3")
    assert (keep / "dataset" / "items.parquet").is_symlink()


def test_readers_are_taken_out_and_come_as_events(source, tmp_path, server):
    report = {"generation": "g", "users": 2, "n_candidates": 0.0, "rows": [["slate", quality(0.12, 0.21)]]}
    binary = server(report)
    keep = tmp_path / "keep"
    arguments = [source, "--binary", binary, "--python", binary, "--keep", keep, "--fold-in", 2]
    done = script("evaluate.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "PASS  slate ndcg@10 0.2100, floor 0.209" in done.stdout
    hold, _, _, measure = (tmp_path / "calls").read_text().splitlines()
    assert hold.split()[1:] == [str(source), str(keep / "dataset"), "--readers", "2"]
    assert measure.startswith(f"eval {keep}/bundle --fold-in {keep}/dataset/fold_in.parquet --value-column rating --relevant")
    report["rows"][0][1]["ndcg"]["10"] = 0.2
    server(report)
    assert script("evaluate.py", *arguments).returncode == 1


def test_held_out_readers_are_in_one_place_only(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    readers = list(range(1, 51))
    for name in prepare.required():
        pq.write_table(pa.table({"user_id": readers, "item_id": readers}), source / name)
    pq.write_table(pa.table({"user_id": readers, "item_id": [7] * 50}), source / "test.parquet")
    done = script("hold_out.py", source, out, "--readers", 10)
    assert done.returncode == 0, done.stderr
    held = pq.read_table(out / "fold_in.parquet")
    assert held.num_rows == 20
    taken = set(held["user_id"].to_pylist())
    assert len(taken) == 10 and max(taken) > 30 and min(taken) < 20
    for name in ("train.parquet", "test.parquet", "users.parquet"):
        left = pq.read_table(out / name)["user_id"].to_pylist()
        assert set(left) == set(readers) - taken
    assert pq.read_table(source / "train.parquet").num_rows == 50
    (source / "items.parquet").unlink()
    done = script("hold_out.py", source, out)
    assert done.returncode == 1 and done.stderr == f"hold_out.py: {source}: missing items.parquet\n"


def test_bad_figures_and_broken_steps_exit_1(source, tmp_path, server):
    report = copy.deepcopy(GOOD)
    report["rows"][0][1]["recall"]["10"] = 0.01
    binary = server(report)
    done = script("evaluate.py", source, "--binary", binary, "--python", binary)
    assert done.returncode == 1 and "FAIL  slate recall@10 0.0100, floor 0.160" in done.stdout
    binary = server(GOOD, fails="build")
    done = script("evaluate.py", source, "--binary", binary, "--python", binary)
    assert done.returncode == 1 and done.stderr.endswith("evaluate.py: build: exit status 3\n")
    done = script("evaluate.py", source, "--binary", tmp_path / "none", "--python", tmp_path / "none")
    assert done.returncode == 1 and "No such file" in done.stderr
    (source / "test.parquet").unlink()
    done = script("evaluate.py", source, "--binary", binary, "--python", binary)
    assert done.returncode == 1 and done.stderr == f"evaluate.py: {source}: missing test.parquet\n"
    assert script("evaluate.py", source, "--users", "0").returncode == 2


def test_documented_arguments_are_those_that_are_used():
    readme = (evaluate.TRAIN.parent / "README.md").read_text()
    documented = readme[readme.index("train.py GOODBOOKS"):].split("```")[0].replace("\\\n", " ").splitlines()[0].split()
    assert documented[documented.index("--dim"):] == evaluate.TRAIN_ARGUMENTS


# search_quality.py


def test_reciprocal_rank_by_hand():
    assert search_quality.reciprocal_rank([7, 8, 9], {8, 9}) == 0.5
    assert search_quality.reciprocal_rank([7], {8}) == 0.0
    assert search_quality.reciprocal_rank([], {8}) == 0.0


def test_summary_by_hand():
    rows = [("title", 1.0), ("author", 0.0), ("title", 0.5)]
    assert search_quality.summary(rows) == [("all", 3, 0.5, 2 / 3), ("author", 1, 0.0, 0.0), ("title", 2, 0.75, 1.0)]


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, answer = 400, {"error": "no"}
        if self.path == "/v1/search" and asked["text"] != "refuse":
            status, answer = 200, {"items": [{"item_id": i, "score": 1.0} for i in range(1, asked["k"] + 1)]}
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def queries(file: Path, *rows: tuple) -> Path:
    columns = {name: [row[at] for row in rows] for at, name in enumerate(["kind", "text", "relevant"])}
    pq.write_table(pa.table(columns), file)
    return file


def test_queries_are_asked_and_counted(tmp_path, address):
    file = queries(tmp_path / "q", ("title", "é", [2]), ("title", "b", [50]), ("series", "c", [4, 1]))
    done = script("search_quality.py", file, "--addr", address)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[1:] == [["all", "3", "0.5000", "0.6667"], ["series", "1", "1.0000", "1.0000"],
                        ["title", "2", "0.2500", "0.5000"]]  # fmt: skip


def test_a_refusal_and_a_silent_port_exit_1(tmp_path, address):
    file = queries(tmp_path / "q", ("title", "refuse", [2]))
    done = script("search_quality.py", file, "--addr", address)
    assert done.returncode == 1 and "'refuse': HTTP 400" in done.stderr and done.stderr.count("\n") == 1
    assert script("search_quality.py", file, "--addr", "127.0.0.1:1").returncode == 1
    assert script("search_quality.py", tmp_path / "none", "--addr", address).returncode == 1
