"""On a real Ray of this machine, the server answers as it does without."""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import SHAPES
from served import SECONDS, in_process, read_all, request

import fusenms
from fusenms.cli import main
from fusenms.errors import BackendUnavailableError, ConfigError, InputError

pytest.importorskip("ray.serve", reason="needs Ray Serve: pip install 'fusenms[ray]'")

from fusenms.serving.ray_serve import Replicas, running

IMAGES = [(SHAPES / name).read_bytes() for name in ("shapes0.jpg", "shapes1.jpg")]
SIZE = 64


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    fused = fusenms.fuse(SHAPES / "shapes.pt", size=SIZE, unverified=True)
    return fused.save(tmp_path_factory.mktemp("file") / "shapes.ort.onnx", unverified=True)


@pytest.mark.thorough
def test_ray_serves_as_one_machine_does(file, tmp_path):
    other = tmp_path / "other.onnx"
    other.write_bytes(file.read_bytes())
    with fusenms.Detector(file, threads=1) as detect:
        expected = [detect(image)[0].to_dicts() for image in IMAGES]
        zeros = np.zeros((2, 3, SIZE, SIZE), np.float32)
        outputs = detect.run_tensors({"images": zeros})
    flags = ("--ray", "local", "--replicas", "1:2", "--batch-delay", "300", "--max-body", "200000")
    with in_process(str(file), str(other), *flags) as served:
        assert served.get("/v2/health/ready") == (200, {"ready": True})
        assert served.get("/v2/models/shapes")[1]["inputs"][0]["shape"] == [-1, 3, SIZE, SIZE]
        assert served.get("/v2/models/none")[0] == 404
        for name in ("shapes", "other"):
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(lambda image: served.post(f"/detect/{name}", image), IMAGES * 8))  # noqa: B023
            assert [status for status, _ in answers] == [200] * 16
            for (_, answer), rows in zip(answers, expected * 8, strict=True):
                assert answer["model"] == name
                assert [row["label"] for row in answer["detections"]] == [row["label"] for row in rows]
                np.testing.assert_allclose(
                    [row["box"] for row in answer["detections"]], [row["box"] for row in rows], atol=0.01
                )
        tensor = {"name": "images", "datatype": "FP32", "shape": list(zeros.shape), "data": zeros.ravel().tolist()}
        status, answer = served.post("/v2/models/shapes/infer", json.dumps({"inputs": [tensor]})[:1000])
        assert status == 400 and "not JSON" in answer["error"]
        binary = tensor | {"parameters": {"binary_data_size": zeros.nbytes}}
        del binary["data"]
        head = json.dumps({"inputs": [binary]}).encode()
        length = {"Inference-Header-Content-Length": str(len(head))}
        status, answer = served.post("/v2/models/shapes/infer", head + zeros.tobytes(), **length)
        found = {each["name"]: each["data"] for each in answer["outputs"]}
        assert status == 200 and found["labels"] == outputs["labels"].ravel().tolist()
        assert served.post("/detect/shapes", b"none")[0] == 400
        assert served.post("/detect/shapes?labels=whale", IMAGES[0])[0] == 400
        assert served.post("/detect/shapes", IMAGES[0], "text/plain")[0] == 415
        assert served.post("/detect/shapes", bytes(300_000))[0] == 413
        assert served.metric('fusenms_requests_total{model="other",route="detect",status="200"}') == 16
        taken = [served.connect() for _ in range(4)]
        for connection in taken:
            connection.sendall(request("/detect/shapes", IMAGES[0]))
        while served.metric('fusenms_open_requests{route="detect"}') < 4:
            assert served.process.poll() is None
        served.process.send_signal(signal.SIGTERM)
        for connection in taken:
            assert b" 200 OK" in read_all(connection)[:20]
            connection.close()
        assert served.process.wait(SECONDS) == 0


def test_bad_arguments_are_refused(file, capsys, monkeypatch):
    for address in ("", "ray://host:10001"):
        with (
            pytest.raises(InputError, match="expected local, auto or HOST:PORT"),
            running(address, [file], "127.0.0.1", 0, fusenms.ServeSettings(), fusenms.Limits(), Replicas()),
        ):
            pass
    for numbers in ((0, 1), (2, 1)):
        with pytest.raises(ConfigError, match="expected MIN:MAX with 1 <= MIN <= MAX"):
            Replicas(*numbers)
    assert main(["serve", str(file), "--replicas", "1:2"]) == 1
    assert "--replicas without --ray" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["serve", str(file), "--ray", "local", "--replicas", "1:2:3"])


def test_error_where_there_is_no_cluster(file, monkeypatch):
    def refuses(**_):
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr("ray.init", refuses)
    with (
        pytest.raises(BackendUnavailableError, match=r"found no Ray cluster at auto \(Could not find any"),
        running("auto", [file], "127.0.0.1", 0, fusenms.ServeSettings(), fusenms.Limits(), Replicas()),
    ):
        pass
