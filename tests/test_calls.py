"""What a detector takes: images of every form, settings of one call, streams, sizes, runtimes; and that each gives the same."""

from __future__ import annotations

import pickle
import threading
import time

import cv2
import numpy as np
import onnxruntime
import pytest
from conftest import SHAPES

from fusenms import Detections, Detector, FusedModel, fuse
from fusenms.errors import BackendUnavailableError, InputError, RunError
from fusenms.limits import Limits
from fusenms.runtime.ahead import work_ahead
from fusenms.runtime.images import read_image
from fusenms.runtime.placement import letterbox, rectangle

pytestmark = pytest.mark.usefixtures("shared_exports")

IMAGES = [SHAPES / f"shapes{i}.jpg" for i in (0, 1)]


@pytest.fixture(scope="module")
def fused() -> FusedModel:
    return fuse(SHAPES / "shapes.pt")


@pytest.fixture(scope="module")
def path(fused, tmp_path_factory):
    return fused.save(tmp_path_factory.mktemp("calls") / "shapes.ort.onnx")


@pytest.fixture(scope="module")
def detect(path):
    with Detector(path) as detector:
        yield detector


def assert_same(a: Detections, b: Detections, atol: float = 0.0) -> None:
    assert len(a) == len(b) > 3
    np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_allclose(a.scores, b.scores, rtol=0, atol=atol)
    np.testing.assert_allclose(a.boxes, b.boxes, rtol=0, atol=100 * atol)


def test_every_form_of_an_image_gives_the_same(detect, path):
    import torch

    array = read_image(IMAGES[0])
    opaque = np.dstack((array, np.full(array.shape[:2], 7, np.uint8)))
    data = IMAGES[0].read_bytes()
    forms = [array, opaque, data, bytearray(data), memoryview(data), torch.from_numpy(array), array[None][0]]
    expected = detect(IMAGES[0])[0]
    for found in detect(forms):
        assert_same(found, expected)
    for found in detect(np.stack([array, array])):
        assert_same(found, expected)
    gray = array.mean(2).astype(np.uint8)
    assert_same(detect(gray)[0], detect(gray[..., None])[0])
    with Detector(path, channels="bgr") as reversed_:
        for form in (np.ascontiguousarray(array[..., ::-1]), data, IMAGES[0]):
            assert_same(reversed_(form)[0], expected)
        wrong = reversed_(array)[0]
    assert len(wrong) != len(expected) or np.abs(wrong.scores - expected.scores).max() > 1e-3


@pytest.mark.parametrize(
    ("image", "way"),
    [
        (np.zeros((3, 40, 60), np.uint8), r"transpose\(1, 2, 0\)"),
        (np.zeros((40, 60, 3), np.float32), r"astype\(np.uint8\)"),
        ([np.zeros((2, 40, 60, 3), np.uint8)], r"a batch \[B, height, width, 3\]"),
        (b"", "bytes: not a readable image|not an image|cannot"),
        (b"no image", "bytes"),
    ],
)
def test_error_names_the_right_form(detect, image, way):
    with pytest.raises(InputError, match=way):
        detect(image)


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview])
def test_contents_have_a_limit(path, form):
    with (
        Detector(path, limits=Limits(max_image_file_bytes=100)) as small,
        pytest.raises(InputError, match=r"found 101 bytes; expected at most 100 .*max_image_file_bytes"),
    ):
        small(form(b"\xff" * 101))


def test_array_of_the_models_size_needs_no_opencv(detect, monkeypatch):
    array = letterbox(read_image(IMAGES[0]), 256, 256)[0]
    expected = detect(array)[0]

    def missing():
        raise AssertionError("OpenCV was used")

    monkeypatch.setattr("fusenms.runtime.placement.has_opencv", lambda: False)
    for module in ("images", "placement", "masks"):
        monkeypatch.setattr(f"fusenms.runtime.{module}.opencv", missing)
    assert_same(detect(array)[0], expected)


@pytest.mark.parametrize("share", [0.2, 0.4])
def test_higher_threshold_of_a_call_is_that_of_a_file(detect, share):
    scores = np.sort(np.concatenate([found.scores for found in detect(IMAGES)]))
    place = int(share * len(scores))
    threshold = float(scores[place : place + 2].mean())  # between two scores: at one, a file compares its logit
    with Detector(fuse(SHAPES / "shapes.pt", score_threshold=threshold)) as other:
        expected = other(IMAGES)
    for found, wanted, every in zip(detect(IMAGES, score_threshold=threshold), expected, detect(IMAGES), strict=True):
        assert_same(found, wanted)
        assert len(found) < len(every)


def test_classes_are_chosen_by_name_and_by_number(detect):
    every = detect(IMAGES[0])[0]
    name = detect.class_names[int(every.labels[0])]
    some = detect(IMAGES[0], labels=[name])[0]
    assert set(some.labels) == {every.labels[0]} and 0 < len(some) < len(every)
    np.testing.assert_array_equal(some.boxes, every.boxes[every.labels == every.labels[0]])
    other = detect(IMAGES[0], labels=[int(every.labels[0])], max_detections=1)[0]
    np.testing.assert_array_equal(other.boxes, every.boxes[:1])
    assert len(detect(IMAGES[0], labels=[])[0]) == 0


def test_thresholds_by_class(detect):
    every = detect(IMAGES[0])[0]
    label = int(every.labels[0])
    middle = float(np.median(every.scores[every.labels == label]))
    some = detect(IMAGES[0], score_threshold={detect.class_names[label]: middle})[0]
    wanted = (every.labels != label) | (every.scores > np.float32(middle))
    np.testing.assert_array_equal(some.boxes, every.boxes[wanted])
    assert not wanted.all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score_threshold": 0.1}, "at least 0.25, which the file was fused with.*a lower one"),
        ({"score_threshold": 1.1}, "from 0 to 1"),
        ({"score_threshold": {"nothing": 0.5}}, "the class 'nothing'; expected a number from 0 to"),
        ({"score_threshold": float("nan")}, "from 0 to 1"),
        ({"labels": "circle"}, "expected a list of classes"),
        ({"labels": [99]}, "found the class 99; expected a number from 0 to"),
        ({"labels": [True]}, "found the class True"),
        ({"max_detections": 301}, "from 1 to 300"),
        ({"max_detections": 0}, "from 1 to 300"),
    ],
)
def test_error_when_a_call_asks_for_what_the_file_has_not(detect, settings, message):
    with pytest.raises(InputError, match=message):
        detect(IMAGES[0], **settings)


@pytest.fixture(scope="module", params=["ort", "portable"])
def open_thresholds(request, tmp_path_factory):
    model = fuse(SHAPES / "shapes.pt", backend=request.param, runtime_thresholds=True)
    return model.save(tmp_path_factory.mktemp("open") / f"{request.param}.onnx")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_thresholds_of_a_call_are_fed(open_thresholds, runtime):
    """A lower threshold than the file's, another IoU threshold, and a class left out before the best class is chosen."""
    pytest.importorskip(runtime)
    settings = {"score_threshold": 0.01, "iou_threshold": 0.9}
    with (
        Detector(open_thresholds, runtime=runtime) as detect,
        Detector(fuse(SHAPES / "shapes.pt", **settings)) as other,
    ):
        for found, expected in zip(detect(IMAGES, **settings), other(IMAGES), strict=True):
            assert_same(found, expected, 1e-4)
        usual = detect(IMAGES[0])[0]
        assert len(usual) < len(detect(IMAGES[0], **settings)[0])
        for found, again in zip(detect(IMAGES), Detector(fuse(SHAPES / "shapes.pt"))(IMAGES), strict=True):
            assert_same(found, again, 1e-4)
        label = int(usual.labels[0])
        (some,) = detect(IMAGES[0], labels=[label])
        assert set(some.labels) == {label} and len(some) >= (usual.labels == label).sum()
        by_class = {0: 0.9, 1: 0.05, 2: 0.5}
        (each,) = detect(IMAGES[0], score_threshold=by_class, max_detections=5)
        assert len(each) == 5 and all(score > by_class[label] for _, score, label in each)
        with pytest.raises(InputError, match="iou_threshold is 2; expected a number from 0 to 1"):
            detect(IMAGES[0], iou_threshold=2)


def test_error_when_the_iou_threshold_is_built_in(detect):
    with pytest.raises(InputError, match=r"has it built in \(0.45\).*runtime_thresholds=True"):
        detect(IMAGES[0], iou_threshold=0.5)


def test_model_in_memory_is_opened(fused, detect):
    with Detector(fused, threads=1) as other:
        assert_same(other(IMAGES[0])[0], detect(IMAGES[0])[0], 1e-5)
        with pytest.raises(InputError, match="a model in memory"):
            pickle.dumps(other)


def test_session_options_and_provider_options_are_used(path, detect, monkeypatch):
    given = []
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: given.append((a, k)) or real(*a, **k))
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = [("CPUExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"})]
    with Detector(path, session_options=options, providers=providers) as other:
        assert_same(other(IMAGES[0])[0], detect(IMAGES[0])[0], 1e-5)
        with pytest.raises(InputError, match="session_options, which cannot be pickled"):
            pickle.dumps(other)
    ((arguments, keywords),) = given
    assert arguments[1] is options and keywords["providers"] == providers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runtime": "caffe"}, "expected one of auto, onnxruntime, openvino, ncnn, tensorrt"),
        ({"runtime": "ncnn"}, "runs in onnxruntime or openvino, not in ncnn"),
        ({"device": "gpu"}, "onnxruntime has: cpu, cuda"),
        ({"runtime": "openvino", "device": "cuda"}, "openvino has: cpu, gpu"),
        ({"runtime": "openvino", "providers": ["CPUExecutionProvider"]}, "found providers, but openvino has none"),
        ({"device": "cuda", "providers": ["CPUExecutionProvider"]}, "expected one of them"),
        ({"channels": "hsv"}, "expected one of 'rgb', 'bgr', 'nv12'"),
        ({"size": 320}, "takes 256x256 only.*dynamic_size=True"),
        ({"size": 100}, "expected a multiple of 32"),
        ({"providers": [("CPUExecutionProvider", 3)]}, "names with options"),
    ],
)
def test_error_when_it_cannot_be_opened_so(path, settings, message):
    with pytest.raises(InputError, match=message):
        Detector(path, **settings)


def test_error_when_there_is_no_gpu(path):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("there is a GPU")
    with pytest.raises(BackendUnavailableError, match="has no CUDAExecutionProvider"):
        Detector(path, device="cuda")


# Streams


def test_stream_gives_what_calls_give_with_errors_in_their_places(detect):
    items = [IMAGES[0], "nowhere.jpg", IMAGES[1], b"no image", *IMAGES, IMAGES[0]]
    found = list(detect.stream(items, batch_size=2, prefetch=1))
    assert len(found) == len(items)
    for item, one in zip(items, found, strict=True):
        if item in IMAGES:
            assert_same(one, detect(item)[0], 1e-5)
        else:
            assert isinstance(one, InputError)
    assert "nowhere.jpg" in str(found[1])
    assert list(detect.stream([])) == []


def test_stream_takes_settings(detect):
    (found,) = detect.stream(IMAGES[:1], score_threshold=0.8)
    assert_same(found, detect(IMAGES[0], score_threshold=0.8)[0])
    with pytest.raises(InputError, match="expected at least"):
        detect.stream(IMAGES, score_threshold=0.1)


def test_stream_without_end_is_read_a_bounded_number_ahead(detect):
    taken, array = [], read_image(IMAGES[0])

    def frames():
        while True:
            taken.append(1)
            yield array

    stream = detect.stream(frames(), batch_size=2, prefetch=2)
    for _ in range(5):
        next(stream)
    stream.close()
    time.sleep(0.1)
    count = len(taken)
    assert 5 <= count <= 5 + 2 * 2 + 3
    time.sleep(0.1)
    assert len(taken) == count
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fusenms-ahead") and not taken]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_error_of_the_users_iterable_comes_at_its_place(detect, batch_size):
    def some():
        yield IMAGES[0]
        raise ZeroDivisionError("mine")

    stream = detect.stream(some(), batch_size=batch_size)
    assert isinstance(next(stream), Detections)
    with pytest.raises(ZeroDivisionError, match="mine"):
        next(stream)


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"prefetch": 0}, {"readers": True}])
def test_error_when_a_stream_cannot_be_so(detect, settings):
    with pytest.raises(InputError, match="whole number of at least 1"):
        detect.stream(IMAGES, **(settings if settings != {"batch_size": 0} else {"batch_size": -1}))


def test_error_when_a_stream_gets_one_image(detect):
    with pytest.raises(InputError, match="expected an iterable of images"):
        detect.stream(IMAGES[0])


@pytest.mark.parametrize("threads", [1, 3])
def test_work_ahead_keeps_the_order(threads):
    def slow(number):
        time.sleep(0.003 * (number % 3))
        return number * number

    assert list(work_ahead(range(40), slow, 5, threads)) == [n * n for n in range(40)]


# Sizes


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dynamic")
    return fuse(SHAPES / "shapes.pt", dynamic_size=True).save(folder / "dynamic.ort.onnx")


def test_input_is_as_large_as_the_image_needs(dynamic, monkeypatch):
    wide = np.ascontiguousarray(read_image(IMAGES[0])[:200])
    shapes = []
    with Detector(dynamic) as detect:
        real = detect._runner.infer
        monkeypatch.setattr(
            detect._runner, "infer", lambda images, more: shapes.append(images.shape) or real(images, more)
        )
        found = detect([wide, IMAGES[0], wide])
        with Detector(dynamic, size=(256, 256)) as fixed:
            whole = fixed([wide, IMAGES[0]])
    height, width = wide.shape[:2]
    inner = round(height * 256 / width)
    assert shapes[0] == (2, 3, -(-inner // 32) * 32, 256) and len(shapes) == 2
    assert_same(found[0], found[2])
    for a, b in zip(found, whole, strict=False):
        assert len(a) > 3
        assert abs(len(a) - len(b)) <= 1
    with Detector(dynamic, size=320) as small:
        assert len(small(IMAGES[0])[0]) > 0


@pytest.mark.parametrize("shape", [(810, 1080), (1080, 810), (1, 999), (33, 31), (640, 640), (427, 640)])
def test_rectangle_is_in_whole_strides_and_holds_the_image(shape):
    rows, columns = rectangle(np.zeros((*shape, 3), np.uint8), 640, 640, 32)
    assert rows % 32 == 0 and columns % 32 == 0 and max(rows, columns) == 640
    gain = min(640 / shape[0], 640 / shape[1])
    assert rows - shape[0] * gain < 33 and columns - shape[1] * gain < 33
    _, place = letterbox(np.zeros((*shape, 3), np.uint8), rows, columns)
    assert (place.inner_height, place.inner_width) == tuple(max(1, round(side * gain)) for side in shape)


# Runtimes


@pytest.mark.parametrize("backend", ["ort", "portable"])
def test_openvino_gives_the_same(tmp_path, detect, backend):
    pytest.importorskip("openvino")
    file = fuse(SHAPES / "shapes.pt", backend=backend).save(tmp_path / "m.onnx")
    with Detector(file, runtime="openvino", threads=2) as other:
        assert other.runtime == "openvino"
        other.warm_up()
        for found, expected in zip(other(IMAGES), detect(IMAGES), strict=True):
            assert_same(found, expected, 1e-4)
        results: list[Detections] = []
        calls = [threading.Thread(target=lambda: results.extend(other(IMAGES[0]))) for _ in range(4)]
        for call in calls:
            call.start()
        for call in calls:
            call.join()
        assert len(results) == 4
        for found in results:
            assert_same(found, detect(IMAGES[0])[0], 1e-4)
        other = pickle.loads(pickle.dumps(other))
        assert_same(other(IMAGES[0])[0], detect(IMAGES[0])[0], 1e-4)


def test_openvino_run_is_stopped_at_its_time_limit(path):
    pytest.importorskip("openvino")
    with (
        Detector(path, runtime="openvino", limits=Limits(max_run_seconds=0.001)) as detect,
        pytest.raises(RunError, match="max_run_seconds"),
    ):
        detect([IMAGES[0]] * 8)


def test_error_when_openvino_is_not_there(path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'fusenms\[openvino\]'"):
        Detector(path, runtime="openvino")


def test_engine_is_opened_by_its_sidecar(tmp_path):
    """The way to the GPU: the sidecar names the runtime and the largest batch; without a GPU there is one clear error."""
    pytest.importorskip("tensorrt_rtx")
    from fusenms import EngineSettings, build_engine

    file = fuse(SHAPES / "shapes.pt", size=64, backend="portable").save(tmp_path / "m.onnx")
    engine = tmp_path / "m.rtx"
    build_engine(file, settings=EngineSettings(batch=(1, 2, 4))).save(engine)
    with pytest.raises(InputError, match="runs in tensorrt-rtx, not in tensorrt"):
        Detector(engine, runtime="tensorrt")
    try:
        detector = Detector(engine)
    except BackendUnavailableError as error:
        assert any(word in str(error) for word in ("GPU", "CUDA"))  # noqa: PT017, a GPU may be there
    else:
        assert detector.batch_size == 4
        assert detector(np.zeros((64, 64, 3), np.uint8))


@pytest.mark.parametrize("size", ["fixed", "dynamic"])
def test_engines_run_through_the_same_contract(tmp_path, monkeypatch, path, dynamic, detect, size):
    """An engine that ONNX Runtime stands in for: batches are split at its profile, filled up to its smallest one, and of its size."""
    import hashlib
    import json

    from fusenms.artifacts.fused import load_fused
    from fusenms.graph.session import OnnxRuntimeRunner
    from fusenms.runtime import opening

    model, seen = load_fused(path if size == "fixed" else dynamic), []
    engine = tmp_path / "m.rtx"
    engine.write_bytes(b"engine")
    inputs = {"images": {key: [size, 3, 256, 256] for key, size in (("min", 2), ("opt", 2), ("max", 3))}}
    info = {
        "builder": {"name": "TensorRT-RTX", "version": "1"},
        "engine": {"sha256": hashlib.sha256(b"engine").hexdigest()},
        "source": {"file": "m.onnx", "sha256": ""},
        "inputs": inputs,
        "metadata": model.metadata,
    }
    (tmp_path / "m.rtx.json").write_text(json.dumps(info))

    class Standing:
        def __init__(self, *_):
            self.runner = OnnxRuntimeRunner(model.model)

        def infer(self, images):
            seen.append(images.shape)
            return self.runner.infer(images)

        def close(self):
            self.runner.close()

    monkeypatch.setattr(opening, "EngineRunner", Standing)
    monkeypatch.setattr(opening, "LIBRARIES", {"TensorRT-RTX": lambda: None})
    with Detector(engine) as other:
        assert other.runtime == "tensorrt-rtx"
        found = other([IMAGES[0]] * 4)
    assert seen == [(3, 3, 256, 256), (2, 3, 256, 256)]
    for one in found:
        assert_same(one, detect(IMAGES[0])[0], 1e-5)


def test_large_images_are_scaled_before_their_channels_are_put_in_order(tmp_path, detect, monkeypatch):
    large = cv2.resize(cv2.imread(str(IMAGES[0])), (2000, 1500))
    cv2.imwrite(str(tmp_path / "large.png"), large)
    expected = detect(large[..., ::-1])[0]
    real, sizes = cv2.cvtColor, []
    monkeypatch.setattr(cv2, "cvtColor", lambda image, *a: sizes.append(image.shape) or real(image, *a))
    assert_same(detect(tmp_path / "large.png")[0], expected)
    assert sizes == [(256, 256, 3)]
