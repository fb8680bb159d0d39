from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
from conftest import SHAPES

from fusenms import Detections, Detector, FusedModel, fuse
from fusenms.errors import BackendUnavailableError, InputError, SourceError, UnsupportedByBackendError
from fusenms.limits import Limits
from fusenms.runtime.drawing import draw
from fusenms.runtime.images import read_image
from fusenms.runtime.placement import letterbox

pytestmark = pytest.mark.usefixtures("shared_exports")

IMAGE = SHAPES / "shapes0.jpg"


@pytest.fixture(scope="module")
def fused() -> FusedModel:
    return fuse(SHAPES / "shapes.pt")


@pytest.fixture(scope="module")
def path(fused, tmp_path_factory) -> Path:
    return fused.save(tmp_path_factory.mktemp("model") / "shapes.ort.onnx")


@pytest.fixture(scope="module")
def detect(path):
    with Detector(path) as detector:
        yield detector


@pytest.mark.slow
def test_nothing_found_is_empty_arrays(detect):
    found = detect(np.zeros((40, 60, 3), np.uint8))[0]
    assert (found.boxes.shape, found.scores.shape, found.labels.shape) == ((0, 4), (0,), (0,))
    assert (found.boxes.dtype, found.scores.dtype, found.labels.dtype) == (np.float32, np.float32, np.int32)


@pytest.mark.slow
def test_path_array_and_pil_image_give_the_same(detect):
    from PIL import Image

    array = read_image(IMAGE)
    a, b, c = detect([IMAGE, array, Image.fromarray(array)])
    assert len(a) > 5
    for other in (b, c):
        np.testing.assert_array_equal(a.boxes, other.boxes)
        np.testing.assert_array_equal(a.labels, other.labels)


def test_boxes_are_where_the_shapes_are(detect):
    """Images drawn here, with known boxes: nearly all are found, at their place, in the image's own pixels."""
    import sys

    sys.path.insert(0, str(SHAPES))
    from fusenms.boxes import pairwise_iou
    from images import draw_image

    rng, hits, total = np.random.default_rng(5), 0, 0
    for _ in range(8):
        image, boxes, labels = draw_image(rng, 300, 420, radii=(16.0, 60.0))
        found = detect(image)[0]
        iou = pairwise_iou(boxes.astype(float), found.boxes.astype(float))
        total += len(boxes)
        hits += int(((iou > 0.5) & (labels[:, None] == found.labels[None])).any(1).sum())
    assert hits / total > 0.9, (hits, total)


def test_batches_give_what_single_images_give(path):
    images = [read_image(SHAPES / f"shapes{i % 2}.jpg")[: 200 + 20 * i] for i in range(7)]
    with Detector(path, batch_size=3) as threes, Detector(path, batch_size=1) as ones:
        for a, b in zip(threes(images), ones(images), strict=True):
            np.testing.assert_array_equal(a.labels, b.labels)
            np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-3)


@pytest.mark.slow
def test_threads_get_their_own_results(detect):
    images = [read_image(SHAPES / f"shapes{i}.jpg") for i in range(2)]
    expected = [detect(image)[0].boxes for image in images]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            if not np.array_equal(detect(images[i])[0].boxes, expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.slow
def test_names_preset_is_read_from_the_file(tmp_path):
    file = fuse(SHAPES / "shapes.pt", output_preset="tensorrt").save(tmp_path / "f.onnx")
    with Detector(file) as detect:
        assert len(detect(IMAGE)[0]) > 5


def test_gray_image_is_taken(detect):
    gray = cv2.imread(str(IMAGE), cv2.IMREAD_GRAYSCALE)
    assert isinstance(detect(gray)[0], Detections)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 5), np.uint8), r"uint8\[4, 4, 5\]; expected uint8 \[height, width, 3\]"),
        (np.zeros((4, 4, 3), np.float32), r"float32\[4, 4, 3\]; expected uint8"),
        (np.zeros((0, 4, 3), np.uint8), "expected uint8"),
        ([3], "found int; expected a path"),
        (["nowhere.jpg"], "nowhere.jpg: cannot be read"),
        ([__file__], "not a readable image"),
        ([Path(__file__).parent], "is a directory"),
    ],
)
def test_error_when_not_a_image(detect, image, message):
    with pytest.raises(InputError, match=message):
        detect(image)


@pytest.mark.slow
def test_error_when_backend_does_not_run_here(tmp_path, shapes_raw):
    file = fuse(shapes_raw, backend="trt").save(tmp_path / "f.onnx")
    with pytest.raises(UnsupportedByBackendError, match="fuse the weights again with backend='ort'"):
        Detector(file)


def test_end_to_end_file_for_trt_runs_here(zoo, tmp_path):
    """It has no plugin."""
    file = fuse(zoo / "shapes" / "yolo26-p.pt", backend="trt", unverified=True).save(
        tmp_path / "f.onnx", unverified=True
    )
    with Detector(file) as detect:
        assert len(detect(IMAGE)[0])


def test_error_when_provider_is_missing(path):
    with pytest.raises(BackendUnavailableError, match="ONNX Runtime has no NoSuchProvider; it has"):
        Detector(path, providers=["NoSuchProvider"])


def test_error_when_a_provider_does_not_start(path, monkeypatch):
    """ONNX Runtime then takes the CPU without an error."""
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda model, options, providers: real(model, options, providers[1:])
    )
    with pytest.raises(BackendUnavailableError, match="has CUDAExecutionProvider, but cannot start it on this machine"):
        Detector(path, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])


def test_error_when_file_is_missing():
    with pytest.raises(SourceError, match=r"nowhere\.onnx: cannot be read"):
        Detector("nowhere.onnx")


@pytest.mark.parametrize("shape", [(480, 640), (641, 333), (1, 500), (37, 37), (302, 500)])
def test_letterbox_maps_boxes_back(shape):
    image = np.random.default_rng(0).integers(0, 255, (*shape, 3), np.uint8)
    canvas, place = letterbox(image, 320, 320)
    assert canvas.shape == (320, 320, 3)
    corners = [place.left, place.top, place.left + place.inner_width, place.top + place.inner_height]
    np.testing.assert_allclose(place.to_image(np.array([corners], float)), [[0, 0, shape[1], shape[0]]], atol=1e-4)


def test_drawing_leaves_the_image_alone(detect):
    image = read_image(IMAGE)
    before = image.copy()
    drawn = draw(image, detect(image)[0])
    np.testing.assert_array_equal(image, before)
    assert (drawn != image).any()


def detections_of_golden(values):
    return values["detections"] if isinstance(values, dict) else values


def check_golden(detector: Detector, rows, file: Path) -> list[str]:
    """Every difference from the golden rows (box 0.5 px, score 2e-3, same label), as text. Those of RT-DETR reach out of the image."""
    image = read_image(file)
    sides = [image.shape[1], image.shape[0]] * 2
    rows = [row | {"box": np.clip(row["box"], 0, sides)} for row in rows]
    found, left, problems = detector(image)[0], list(range(len(rows))), []
    for box, score, label in found:
        near = [i for i in left if rows[i]["label"] == label and np.abs(box - rows[i]["box"]).max() <= 0.5]
        if near and abs(rows[near[0]]["score"] - score) <= 2e-3:
            left.remove(near[0])
        else:
            problems.append(f"{file.name}: not in the golden: label {label} score {score:.4f} box {box}")
    return problems + [f"{file.name}: missing {rows[i]}" for i in left]


def test_equals_ultralytics_on_every_photo(zoo, tmp_path):
    golden = json.loads((zoo / "golden" / "yolov8n.json").read_text())["images"]
    assert len(golden) == 38
    problems, total = [], 0
    with Detector(fuse(zoo / "derived" / "yolov8n.pt").save(tmp_path / "f.onnx")) as detector:
        for name, values in golden.items():
            file = next(p for p in (zoo / name, zoo / "photos" / name, zoo / "coco" / "images" / name) if p.exists())
            rows = detections_of_golden(values)
            total += len(rows)
            problems += check_golden(detector, rows, file)
    assert not problems, "\n".join(problems)
    assert total > 300


ONE_HEAD = ["yolov3-tinyu-p", "yolov5u-p", "yolov6-p", "yolov8-p", "yolov9-p", "yolo11-p", "yolo12-p"]


@pytest.mark.parametrize("size", [256, 640])
@pytest.mark.parametrize(
    ("name", "key", "settings"),
    [(name, "images", {}) for name in ONE_HEAD]
    + [(name, "images", {"one_to_many": True}) for name in ("yolov10-p", "yolo26-p")]
    + [(name, "images_end2end", {"backend": "portable"}) for name in ("yolov10-p", "yolo26-p")]
    + [("rtdetr-p", "images", {})],
)
def test_equals_ultralytics_on_shapes(zoo, tmp_path, name, key, settings, size):
    golden = json.loads((zoo / "shapes" / "golden" / f"{name}.json").read_text())[key]
    problems, total = [], 0
    fused = fuse(zoo / "shapes" / f"{name}.pt", size=size, unverified=True, **settings)  # verified in test_families.py
    with Detector(fused.save(tmp_path / "f.onnx", unverified=True)) as detector:
        for file, values in golden.items():
            if values["imgsz"] == size:
                total += len(values["detections"])
                problems += check_golden(detector, values["detections"], zoo / "shapes" / "images" / file)
    assert not problems, "\n".join(problems)
    assert total > 40


STRANGERS = {
    "derived/yolo26n_e2e.onnx": (0.25, {}),
    "deimv2_atto_320.onnx": (0.25, {}),
    "deimv2_femto_416.onnx": (0.25, {}),
    "fastestdet_352.onnx": (0.5, {}),
    "yolox_nano_raw_416.onnx": (0.25, {"at": "corner"}),
}


@pytest.mark.parametrize("file", STRANGERS)
def test_third_party_files_find_what_they_came_with(zoo, tmp_path, file):
    """Pixels, fit and decode together: labels, scores and boxes that were written down when the files were collected."""
    threshold, how = STRANGERS[file]
    entry = next(e for e in json.loads((zoo / "MANIFEST.json").read_text())["entries"] if e["file"] == file)
    fused = fuse(zoo / file, score_threshold=threshold, unverified=True)
    with Detector(fused.save(tmp_path / "f.onnx", unverified=True)) as detector:
        for name in ("bus", "zidane"):
            rows = entry.get(f"expected_{name}_jpg", [])
            image = read_image(zoo / "photos" / f"{name}.jpg")
            if how.get("at") == "corner":  # its authors put the image into the top left corner
                side = max(image.shape[:2])
                image = np.pad(
                    image, ((0, side - image.shape[0]), (0, side - image.shape[1]), (0, 0)), constant_values=114
                )
            found = detector(image)[0]
            assert len(found) == len(rows) or not rows
            for label, score, *box in rows:
                clipped = np.clip(box, 0, [image.shape[1], image.shape[0]] * 2)
                far = np.abs(found.boxes - clipped).max(1) + 1e3 * (np.abs(found.scores - score) > 2e-3)
                assert far.min() < 1.5, (label, score, box)
                assert not isinstance(label, int) or found.labels[far.argmin()] == label


def test_real_checkpoint_at_every_batch_size_is_as_alone(zoo, tmp_path):
    """Photos through the real network: each image's rows do not depend on what stands beside it."""
    from fusenms.graph.session import OnnxRuntimeRunner
    from fusenms.runtime.placement import load_tensor

    images = np.resize(load_tensor(zoo / "coco" / "images", 640, 640, False)[:16], (16, 3, 640, 640))
    runner = OnnxRuntimeRunner(fuse(zoo / "derived" / "yolov8n.pt", unverified=True).model)
    alone = [runner.infer(images[i : i + 1]) for i in range(16)]
    for batch in (2, 7, 16):
        together = runner.infer(images[:batch])
        for i in range(batch):
            np.testing.assert_array_equal(together["num_detections"][i], alone[i]["num_detections"][0])
            np.testing.assert_array_equal(together["labels"][i], alone[i]["labels"][0])
            np.testing.assert_allclose(together["boxes"][i], alone[i]["boxes"][0], atol=1e-2)
            np.testing.assert_allclose(together["scores"][i], alone[i]["scores"][0], atol=1e-4)


def test_pil_image_is_turned_and_scaled_as_the_file_is(tmp_path, detect):
    from PIL import Image

    image = Image.open(IMAGE)
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    deep = cv2.cvtColor(cv2.imread(str(IMAGE)), cv2.COLOR_BGR2GRAY).astype(np.uint16) * 256
    cv2.imwrite(str(tmp_path / "deep.png"), deep)
    for name in ("turned.jpg", "deep.png"):
        np.testing.assert_array_equal(read_image(tmp_path / name), read_image(Image.open(tmp_path / name)))


def test_error_when_closed(path):
    detector = Detector(path)
    detector.close()
    detector.close()
    with pytest.raises(InputError, match="the detector is closed"):
        detector(IMAGE)


def test_error_when_providers_is_text(path):
    with pytest.raises(InputError, match="expected a list of names"):
        Detector(path, providers="CPUExecutionProvider")


def test_quantized_model_is_run_one_by_one(zoo, tmp_path):
    """Dynamic quantization takes its ranges over the batch; an image must not depend on its neighbors."""
    file = fuse(zoo / "yolov8n_dynint8_640.onnx").save(tmp_path / "q.onnx")
    bus, zidane = zoo / "photos" / "bus.jpg", zoo / "photos" / "zidane.jpg"
    with Detector(file) as detect:
        alone, together = detect(bus)[0], detect([bus, zidane])[0]
    np.testing.assert_array_equal(alone.scores, together.scores)
    assert len(alone) == 5


@pytest.mark.slow
def test_fuse_runs_in_several_threads():
    errors: list[Exception] = []

    def work() -> None:
        try:
            fuse(SHAPES / "shapes.pt", size=64, unverified=True)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.slow
def test_close_while_others_call_gives_results_or_input_error(path):
    image, wrong = read_image(IMAGE), []
    for delay in (0.0, 0.002, 0.005, 0.01, 0.02):
        detector = Detector(path, threads=1)

        def work(detector: Detector = detector) -> None:
            try:
                while True:
                    assert len(detector([image, image])) == 2
            except InputError:
                pass
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(delay)
        detector.close()
        for thread in threads:
            thread.join()
    assert not wrong


def test_closed_before_images_are_read(path):
    detector = Detector(path)
    detector.close()
    with pytest.raises(InputError, match="the detector is closed"):
        detector(iter(lambda: pytest.fail("an image was read"), None))


def test_error_of_the_users_own_generator_passes_unchanged(detect):
    def images():
        yield IMAGE
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        detect(images())


def test_pickled_detector_opens_its_file_again(path, detect, monkeypatch, tmp_path):
    with Detector(path, batch_size=3, threads=1, limits=Limits(max_pixels=10_000)) as detector:
        data = pickle.dumps(detector)
    monkeypatch.chdir(tmp_path)
    with pickle.loads(data) as again:
        image = read_image(IMAGE)[:90, :90]
        np.testing.assert_array_equal(again(image)[0].boxes, detect(image)[0].boxes)
        with pytest.raises(InputError, match="expected at most 10000"):
            again(IMAGE)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", ["gone", "changed"])
def test_pickle_says_when_the_file_is_gone_or_changed(path, tmp_path, when, change):
    file = Path(shutil.copy(path, tmp_path / "f.onnx"))
    detector = Detector(file)
    data = pickle.dumps(detector) if when == "after" else b""
    file.unlink()
    if change == "changed":
        file.write_bytes(path.read_bytes() + b"\x72\x00")
    with pytest.raises(SourceError, match=r"f\.onnx: (is missing|has changed|cannot be read)"):
        pickle.loads(data) if when == "after" else pickle.dumps(detector)


def test_error_when_a_closed_detector_is_pickled(path):
    detector = Detector(path)
    detector.close()
    with pytest.raises(InputError, match="closed, so it cannot be pickled"):
        pickle.dumps(detector)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copy_is_closed_on_its_own(path, copied):
    detector = Detector(path)
    other = copied(detector)
    detector.close()
    assert len(other(IMAGE)[0]) > 5


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize(("threads", "said"), [(1, "found"), (2, "forked")])
def test_forked_child_gets_results_or_a_message(path, threads, said):
    code = f"""
import os, sys
from fusenms import Detector
from fusenms.errors import InputError
detect = Detector({str(path)!r}, threads={threads})
detect({str(IMAGE)!r})
if os.fork() == 0:
    try:
        print("found" if len(detect({str(IMAGE)!r})[0]) else "nothing", flush=True)
    except InputError as error:
        print("forked" if "forked" in str(error) else error, flush=True)
    os._exit(0)
os.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == said, done.stderr


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_error_when_threads_is_no_number(path, threads):
    with pytest.raises(InputError, match="threads is"):
        Detector(path, threads=threads)
