"""The stock client against a server with the test bundle: check.py HTTP ADMIN TOKEN, run by tests/v2.rs."""

import json
import sys
from pathlib import Path

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/trees/ranker.json").read_text())


def refused(call, status, says):
    try:
        call()
    except InferenceServerException as error:
        assert error.status() == str(status) and says in error.message(), error
        return
    raise AssertionError(f"not refused: {says}")


def main(http, admin, token):
    client = triton.InferenceServerClient(http)
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("trees") and not client.is_model_ready("nobody")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("trees")
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 6]}], metadata
    assert client.get_model_config("trees")["max_batch_size"] > 0
    assert client.is_model_ready("trees", metadata["versions"][0])

    rows = np.array(GOLDEN["rows"], dtype=np.float32)  # null becomes NaN
    for binary_in in (True, False):
        for binary_out in (True, False):
            x = rows if binary_in else np.nan_to_num(rows)  # JSON has no NaN
            tensor = triton.InferInput("x", x.shape, "FP32")
            tensor.set_data_from_numpy(x, binary_data=binary_in)
            wanted = [triton.InferRequestedOutput("variable", binary_data=binary_out)]
            answer = client.infer("trees", [tensor], outputs=wanted, request_id="7", timeout=5_000_000)
            scores = answer.as_numpy("variable")
            assert scores.shape == (len(rows), 1) and answer.get_response()["id"] == "7"
            if binary_in:
                assert np.allclose(scores[:, 0], GOLDEN["scores"], atol=1e-5)
    tensor = triton.InferInput("x", rows.shape, "FP32")
    tensor.set_data_from_numpy(rows)
    assert client.infer("trees", [tensor]).as_numpy("variable").shape == (len(rows), 1), "outputs need not be named"
    asynchronous = [client.async_infer("trees", [tensor]) for _ in range(5)]
    assert all(call.get_result().as_numpy("variable").shape == (len(rows), 1) for call in asynchronous)

    wrong = triton.InferInput("x", [2, 5], "FP32")
    wrong.set_data_from_numpy(np.zeros((2, 5), np.float32))
    refused(lambda: client.infer("trees", [wrong]), 400, "shape is [2, 5]")
    refused(lambda: client.infer("nobody", [tensor]), 404, "nobody")
    refused(lambda: client.infer("trees", [tensor], model_version="0"), 404, "version")
    statistics = client.get_inference_statistics("trees")["model_stats"][0]
    assert statistics["inference_stats"]["success"]["count"] == 10, statistics

    repository = triton.InferenceServerClient(admin)
    assert {m["name"]: m["state"] for m in repository.get_model_repository_index()} == {"demo": "READY", "trees": "READY"}
    refused(lambda: repository.unload_model("trees"), 401, "admin_token")
    headers = {"Authorization": f"Bearer {token}"}
    repository.unload_model("trees", headers=headers)
    assert not client.is_model_ready("trees")
    repository.load_model("trees", headers=headers)
    assert client.is_model_ready("trees")
    print("ok")


main(*sys.argv[1:])
