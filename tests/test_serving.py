"""A server answers with what the detector finds, speaks v2 with a client that others wrote, and counts what it does."""

from __future__ import annotations

import io
import json
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import SHAPES
from served import in_process, in_thread

import fusenms
from fusenms.cli import main
from fusenms.errors import BackendUnavailableError, ConfigError, SourceError
from fusenms.runtime.images import read_image
from fusenms.runtime.placement import letterbox, to_tensor

pytestmark = pytest.mark.usefixtures("shared_exports")

IMAGE, OTHER = (SHAPES / name for name in ("shapes0.jpg", "shapes1.jpg"))
SIZE = 160


@pytest.fixture(scope="module")
def files(tmp_path_factory, shared_exports):
    """A file with thresholds in each run, and one with frames as its input."""
    folder = tmp_path_factory.mktemp("files")
    weights = SHAPES / "shapes.pt"
    return [
        fusenms.fuse(weights, size=SIZE, runtime_thresholds=True, unverified=True).save(
            folder / "shapes.ort.onnx", unverified=True
        ),
        fusenms.fuse(weights, size=64, frames="dynamic", unverified=True).save(
            folder / "frames.v2.onnx", unverified=True
        ),
    ]


@pytest.fixture(scope="module")
def served(files):
    with in_thread(*files) as server:
        yield server


@pytest.fixture(scope="module")
def detect(files):
    with fusenms.Detector(files[0], threads=1) as detector:
        yield detector


def tensor(count=1, seed=0):
    """Images as the file takes them: of the example images, so that there is something to find."""
    canvases = [letterbox(read_image((IMAGE, OTHER)[(i + seed) % 2]), SIZE, SIZE)[0] for i in range(count)]
    return to_tensor(canvases)


@pytest.mark.parametrize("kind", ["image/jpeg", "image/png", "application/octet-stream", "IMAGE/JPEG; q=1"])
def test_detect_gives_what_the_detector_finds(served, detect, kind):
    status, answer = served.post("/detect/shapes", IMAGE.read_bytes(), kind)
    found = detect(IMAGE)[0]
    assert status == 200 and len(found) > 3
    assert answer == {
        "model": "shapes", "height": found.masks.place.height, "width": found.masks.place.width,
        "detections": json.loads(json.dumps(found.to_dicts())), "converged": True,
    }  # fmt: skip


def test_detect_takes_a_file_without_content_type_and_in_chunks(served, detect):
    status, _, answer = served.call(
        "POST", "/detect/shapes", iter([IMAGE.read_bytes()[:500], IMAGE.read_bytes()[500:]])
    )
    assert status == 200 and json.loads(answer)["detections"] == detect(IMAGE)[0].to_dicts()


@pytest.mark.parametrize(
    ("query", "settings"),
    [
        ("score_threshold=0.8", {"score_threshold": 0.8}),
        ("iou_threshold=0.1", {"iou_threshold": 0.1}),
        ("labels=0&labels=square", {"labels": [0, "square"]}),
        ("max_detections=2", {"max_detections": 2}),
    ],
)
def test_detect_takes_the_settings_of_a_call(served, detect, query, settings):
    status, answer = served.post(f"/detect/shapes?{query}", IMAGE.read_bytes())
    assert status == 200, answer
    assert answer["detections"] == detect(IMAGE, **settings)[0].to_dicts()


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("score_threshold=high", "score_threshold='high'.*expected a number"),
        ("score_threshold=nan", "expected a number from 0 to 1"),
        ("score_threshold=2", "expected a number from 0 to 1"),
        ("score_threshold=0.5&score_threshold=0.6", "found score_threshold twice"),
        ("labels=whale", "found the class 'whale'"),
        ("labels=99999999999999999999999", "found the class"),
        ("labels=" + "9" * 5000, "found the class"),
        ("max_detections=" + "9" * 5000, "expected a number"),
        ("max_detections=0", "expected a whole number from 1"),
        ("max_detections=1e3", "expected a number"),
        ("conf=0.5", "found 'conf' in the query; expected score_threshold, iou_threshold, labels, max_detections"),
    ],
)
def test_settings_that_the_file_does_not_take_are_refused(served, query, message):
    status, answer = served.post(f"/detect/shapes?{query}", IMAGE.read_bytes())
    assert status == 400
    assert re.search(message, answer["error"]), answer


@pytest.mark.slow
def test_each_of_many_requests_gets_its_own_answer(served, detect):
    """Images, settings that differ, tensors, and errors, all at once, in few batches."""
    jobs = [(IMAGE, None), (OTHER, None), (IMAGE, 0.8), (OTHER, 0.05), (None, None), (b"none", None)] * 8
    expected = {
        job: detect(job[0], score_threshold=job[1])[0].to_dicts() for job in jobs if isinstance(job[0], type(IMAGE))
    }
    outputs = detect.run_tensors({"images": tensor(2)})

    def ask(job):
        image, threshold = job
        if image is None:
            status, answer = served.post("/v2/models/shapes/infer", json.dumps(request({"images": tensor(2)})))
            boxes = next(each for each in answer["outputs"] if each["name"] == "boxes")
            return status == 200 and np.allclose(boxes["data"], outputs["boxes"].ravel(), atol=1e-3)
        if isinstance(image, bytes):
            return served.post("/detect/shapes", image)[0] == 400
        query = "" if threshold is None else f"?score_threshold={threshold}"
        status, answer = served.post(f"/detect/shapes{query}", image.read_bytes())
        return status == 200 and close(answer["detections"], expected[job])

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, jobs))
    assert served.model().queued == 0


def close(found, expected):
    """Equal but for the rounding of another batch size."""
    return [row["label"] for row in found] == [row["label"] for row in expected] and np.allclose(
        [row["box"] for row in found], [row["box"] for row in expected], atol=0.01
    )


def request(tensors, **more):
    """A request of v2 in JSON."""
    names = {"float32": "FP32", "uint8": "UINT8", "bool": "BOOL"}
    return {
        "inputs": [
            {"name": name, "datatype": names[array.dtype.name], "shape": list(array.shape), "data": array.tolist()}
            for name, array in tensors.items()
        ]
    } | more  # fmt: skip


@pytest.fixture(scope="module")
def triton(served):
    http = pytest.importorskip("tritonclient.http", reason="needs tritonclient: pip install 'tritonclient[http]'")
    with http.InferenceServerClient(f"{served.host}:{served.port}") as client:
        client.InferInput, client.InferRequestedOutput = http.InferInput, http.InferRequestedOutput
        yield client


def test_triton_client_reads_what_there_is(triton, files):
    assert triton.is_server_live() and triton.is_server_ready() and triton.is_model_ready("shapes")
    assert triton.is_model_ready("shapes", "1") and not triton.is_model_ready("shapes", "2")
    assert not triton.is_model_ready("other")
    assert triton.get_server_metadata()["name"] == "fusenms"
    found = fusenms.inspect(files[0])
    metadata = triton.get_model_metadata("shapes")
    assert metadata["inputs"][0] == {"name": "images", "datatype": "FP32", "shape": [-1, 3, SIZE, SIZE]}
    assert [each["name"] for each in metadata["inputs"]] == [each.name for each in found.inputs]
    shapes = [[size if isinstance(size, int) else -1 for size in each.shape] for each in found.outputs]
    assert [each["shape"] for each in metadata["outputs"]] == shapes
    assert [each["name"] for each in metadata["outputs"]] == [each.name for each in found.outputs]
    assert [each["datatype"] for each in metadata["outputs"]] == ["INT32", "FP32", "FP32", "INT32"]
    frames = triton.get_model_metadata("frames", "1")["inputs"]
    assert frames == [{"name": "frames", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}]
    config = triton.get_model_config("shapes")
    assert config["max_batch_size"] == 8 and config["input"][0]["dims"] == [3, SIZE, SIZE]
    assert sorted(each["name"] for each in triton.get_model_repository_index()) == ["frames", "shapes"]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("asked", [(), ("boxes", "labels")])
def test_triton_client_infers(triton, detect, binary, asked):
    images = tensor(2)
    given = triton.InferInput("images", images.shape, "FP32")
    given.set_data_from_numpy(images, binary_data=binary)
    threshold = triton.InferInput("score_threshold", [1], "FP32")
    threshold.set_data_from_numpy(np.array([0.5], np.float32), binary_data=not binary)
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in asked] or None
    answer = triton.infer("shapes", [given, threshold], outputs=outputs, request_id="seven")
    expected = detect.run_tensors({"images": images, "score_threshold": np.array([0.5], np.float32)})
    assert expected["num_detections"].min() > 0
    names = asked or tuple(expected)
    assert [each["name"] for each in answer.get_response()["outputs"]] == list(names)
    assert answer.get_response()["id"] == "seven"
    for name in names:
        np.testing.assert_array_equal(answer.as_numpy(name), expected[name])
        assert answer.as_numpy(name).dtype == expected[name].dtype


def test_triton_client_gets_errors(triton):
    from tritonclient.utils import InferenceServerException

    given = triton.InferInput("images", [1, 3, SIZE, SIZE + 1], "FP32")
    given.set_data_from_numpy(np.zeros((1, 3, SIZE, SIZE + 1), np.float32))
    with pytest.raises(InferenceServerException, match="expected images float32"):
        triton.infer("shapes", [given])
    with pytest.raises(InferenceServerException, match="found the model 'other'; expected one of shapes, frames"):
        triton.infer("other", [given])


def test_frames_are_inferred_and_detected(served, files):
    frame = np.full((96, 128, 3), 114, np.uint8)
    status, answer = served.post("/v2/models/frames/infer", json.dumps(request({"frames": frame[None]})))
    assert status == 200 and answer["outputs"][0]["data"] == [0]
    status, answer = served.post("/detect/frames", IMAGE.read_bytes())
    with fusenms.Detector(files[1], threads=1) as detect:
        assert status == 200 and answer["detections"] == detect(IMAGE)[0].to_dicts()


@pytest.mark.slow
def test_metrics_count_what_was_done(files):
    with in_thread(files[0]) as served:
        for body in (IMAGE.read_bytes(), b"none"):
            served.post("/detect/shapes", body)
        served.post("/v2/models/shapes/infer", json.dumps(request({"images": tensor(3)})))
        served.get("/nothing/here")
        served.get("/detect/shapes")
        route = 'fusenms_requests_total{model="shapes",route='
        assert served.metric(f'{route}"detect",status="200"}}') == served.metric(f'{route}"detect",status="400"}}') == 1
        assert served.metric(f'{route}"infer",status="200"}}') == 1
        assert served.metric('fusenms_requests_total{model="",route="none",status="404"}') == 1
        assert served.metric('fusenms_requests_total{model="",route="none",status="405"}') == 1
        assert served.metric('fusenms_images_total{model="shapes"}') == 4
        assert served.metric('fusenms_batch_images_count{model="shapes"}') == 2
        assert served.metric('fusenms_batch_images_bucket{le="2.0",model="shapes"}') == 1
        assert served.metric('fusenms_queue_images{model="shapes"}') == 0
        assert served.metric('fusenms_request_seconds_count{model="shapes",route="detect"}') == 1


def test_clients_cannot_add_labels_to_metrics(served):
    before = len(served.call("GET", "/metrics")[2].splitlines())
    for number in range(5):
        served.get(f"/v2/models/other{number}")
        served.get(f"/path{number}")
    first = len(served.call("GET", "/metrics")[2].splitlines())
    for number in range(5, 50):
        served.get(f"/v2/models/other{number}")
        served.get(f"/path{number}")
    assert before <= first == len(served.call("GET", "/metrics")[2].splitlines())


@pytest.mark.slow
def test_names_are_those_of_the_files_up_to_the_first_dot(files, tmp_path):
    with in_thread(*files) as served:
        assert served.get("/v2/models/frames")[0] == 200 and served.get("/v2/models/frames.v2")[0] == 404
    other = tmp_path / "shapes.copy.onnx"
    other.write_bytes(files[0].read_bytes())
    with pytest.raises(ConfigError, match="would both be served as shapes"):
        fusenms.asgi_app([files[0], other])
    with pytest.raises(ConfigError, match="has no name before its first dot"):
        fusenms.asgi_app([tmp_path / ".onnx"])
    for none in ([], str(files[0])):
        with pytest.raises(ConfigError, match="expected a list of at least one fused file"):
            fusenms.asgi_app(none)
    with pytest.raises(SourceError, match="cannot be read"):
        fusenms.asgi_app([files[0], tmp_path / "missing.onnx"])


def test_app_runs_in_the_service_of_others(files, detect):
    """Mounted, without its own lifespan: nothing of it has to be started."""
    pytest.importorskip("httpx", reason="needs httpx, which starlette's test client uses")
    from starlette.applications import Starlette
    from starlette.routing import Mount
    from starlette.testclient import TestClient

    app = fusenms.asgi_app(files[:1], fusenms.ServeSettings(threads=1))
    client = TestClient(Starlette(routes=[Mount("/vision", app)]))
    answer = client.post("/vision/detect/shapes", content=IMAGE.read_bytes(), headers={"Content-Type": "image/jpeg"})
    assert answer.json()["detections"] == detect(IMAGE)[0].to_dicts()
    app.state.models.close()
    assert client.get("/vision/v2/health/ready").status_code == 503


def test_images_of_every_kind_that_the_detector_reads(served, detect):
    from PIL import Image

    for kind in ("PNG", "BMP", "TIFF", "WEBP"):
        data = io.BytesIO()
        Image.open(OTHER).save(data, kind)
        status, answer = served.post("/detect/shapes", data.getvalue(), f"image/{kind.lower()}")
        assert status == 200 and answer["detections"] == detect(data.getvalue())[0].to_dicts()


def test_error_without_the_extra(monkeypatch, files):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match=r"needs starlette .*pip install 'fusenms\[serve\]'"):
        fusenms.asgi_app(files)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; expected a whole number, more than 0"),
        ({"batch_delay": -1}, "batch_delay is -1; expected a number, 0 or more"),
        ({"max_body": 1.5}, "max_body is 1.5; expected a whole number"),
        ({"read_timeout": float("inf")}, "read_timeout is inf"),
        ({"max_queue": 4}, "less than batch_size"),
        ({"max_bodies": 4}, "less than max_body"),
        ({"threads": True}, "threads is True"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        fusenms.ServeSettings(**settings)


@pytest.mark.slow
def test_command_says_what_is_wrong(files, capsys):
    with in_thread(files[0]) as other:
        assert main(["serve", str(files[0]), "--port", str(other.port)]) == 1
        assert f"port {other.port}: cannot be used (Address already in use)" in capsys.readouterr().err
    assert main(["serve", str(files[0]), "--host", "no.such.host.invalid"]) == 1
    assert main(["serve", str(files[0]), "--port", "99999"]) == 1
    assert main(["serve", str(IMAGE), "--port", "0"]) == 1
    assert main(["serve", str(files[0]), str(files[0]), "--port", "0"]) == 1
    assert main(["serve", str(files[0]), "--isolate"]) == 1  # said by the child process


@pytest.mark.slow
def test_command_serves(files, detect):
    with in_process(str(files[0]), "--threads", "1") as served:
        assert served.get("/v2/health/ready") == (200, {"ready": True})
        assert served.post("/detect/shapes", IMAGE.read_bytes())[1]["detections"] == detect(IMAGE)[0].to_dicts()
