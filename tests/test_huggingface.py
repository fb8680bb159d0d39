"""Hugging Face detectors: tiny ones of every kind, saved as transformers saves them, give what transformers itself makes of them."""

from __future__ import annotations

import json
from functools import cache

import cv2
import numpy as np
import pytest
import torch

from fusenms import Detector, fuse, load
from fusenms.artifacts.fused import load_fused
from fusenms.artifacts.preprocessing import PIXELS, Pixels
from fusenms.errors import ConfigError, SourceError
from fusenms.fusion.backends import BACKENDS
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.runtime.placement import to_tensor
from fusenms.sources.huggingface import SIGMOID, SOFTMAX

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_exports")]

transformers = pytest.importorskip("transformers", reason="needs transformers (pip install 'fusenms[hf]')")
transformers.logging.set_verbosity_error()

SIZE = (96, 128)
LABELS = {0: "cat", 1: "dog", 2: "cow", 3: "hen", 4: "pig"}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
HGNET = {
    "stem_channels": [3, 8, 8], "hidden_sizes": [8, 16, 16, 32], "stage_in_channels": [8, 8, 16, 16], "stage_mid_channels": [8] * 4,
    "stage_out_channels": [8, 16, 16, 32], "stage_num_blocks": [1] * 4, "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True], "stage_kernel_size": [3, 3, 5, 5], "stage_numb_of_layers": [2] * 4,
}  # fmt: skip
LEVELS = ["stage2", "stage3", "stage4"]
RT = {
    "d_model": 32, "encoder_hidden_dim": 32, "encoder_in_channels": [16, 16, 32], "decoder_in_channels": [32] * 3, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "num_queries": 30, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_layers": 1,
}  # fmt: skip
OLD = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_queries": 20, "use_timm_backbone": False, "use_pretrained_backbone": False,
}  # fmt: skip
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "num_detection_tokens": 20,
}


def config(kind: str):
    t, names = transformers, {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}}
    one, three = (
        (lambda: t.ResNetConfig(**RESNET, out_features=["stage4"])),
        (lambda: t.ResNetConfig(**RESNET, out_features=LEVELS)),
    )
    return {
        "rt_detr": lambda: t.RTDetrConfig(
            backbone_config=t.RTDetrResNetConfig(**RESNET, out_features=LEVELS), **RT, **names
        ),
        "rt_detr_v2": lambda: t.RTDetrV2Config(
            backbone_config=t.RTDetrResNetConfig(**RESNET, out_features=LEVELS), **RT, **names
        ),
        "d_fine": lambda: t.DFineConfig(backbone_config=t.HGNetV2Config(**HGNET, out_features=LEVELS), **RT, **names),
        "detr": lambda: t.DetrConfig(backbone_config=one(), **OLD, **names),
        "conditional_detr": lambda: t.ConditionalDetrConfig(backbone_config=one(), **OLD, **names),
        "deformable_detr": lambda: t.DeformableDetrConfig(backbone_config=three(), **OLD, **names),
        "yolos": lambda: t.YolosConfig(**VIT, image_size=list(SIZE), **names),
    }[kind]()


KINDS = ["rt_detr", "rt_detr_v2", "d_fine", "detr", "conditional_detr", "deformable_detr", "yolos"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory for each kind, made once, with its model."""
    made: dict[str, tuple] = {}

    def make(kind: str):
        if kind not in made:
            torch.manual_seed(0)
            model = transformers.AutoModelForObjectDetection.from_config(config(kind)).eval()
            for (
                parameter
            ) in model.parameters():  # those of a new model are so small that all scores are alike, in no order
                if parameter.ndim >= 2:
                    torch.nn.init.normal_(
                        parameter, 0, (1.1 if kind == "d_fine" else 1.5) * parameter[0].numel() ** -0.5
                    )
            path = tmp_path_factory.mktemp("hf") / kind
            model.save_pretrained(path)
            size = {"height": SIZE[0], "width": SIZE[1]}
            (path / "preprocessor_config.json").write_text(
                json.dumps({"size": size, "do_rescale": True, "do_normalize": False})
            )
            made[kind] = (path, model)
        return made[kind]

    return make


@pytest.fixture(scope="module")
def raw(folder):
    return cache(lambda kind: load(folder(kind)[0]))


@pytest.mark.covering(default=0)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_reference(raw, kind, backend):
    fused = fuse(raw(kind), backend=backend, score_threshold=0.05, max_detections=40)
    assert fused.report, fused.report
    assert fused.class_names == tuple(LABELS.values())
    assert (fused.image.height, fused.image.width, fused.image.stretch) == (*SIZE, True)


@pytest.mark.covering(default=0)
@pytest.mark.parametrize("kind", KINDS)
def test_gives_what_transformers_makes_of_it(folder, raw, kind):
    """Against its own post-processing: sigmoids over query x class, or the best class of each query."""
    model = folder(kind)[1]
    images = np.random.default_rng(3).random((3, 3, *SIZE), np.float32)
    threshold = 0.2 if kind in SOFTMAX else 0.3
    got = OnnxRuntimeRunner(fuse(raw(kind), score_threshold=threshold, max_detections=100).model).infer(images)
    with torch.no_grad():
        outputs = model(pixel_values=torch.from_numpy(images))
    if kind in SOFTMAX:
        processor = transformers.DetrImageProcessorPil()
        found = processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=[SIZE] * 3)
    else:
        assert kind in SIGMOID
        processor = transformers.RTDetrImageProcessorPil()
        found = processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=[SIZE] * 3)
    total = 0
    for i, expected in enumerate(found):
        order = expected["scores"].argsort(descending=True, stable=True)
        scores, labels, boxes = (expected[key][order].numpy() for key in ("scores", "labels", "boxes"))
        count = int(got["num_detections"][i, 0])
        if kind not in SOFTMAX:  # its top-k has as many rows as there are queries; ours has as many as max_detections
            count = min(count, len(scores))
        assert count == len(scores)
        np.testing.assert_allclose(got["scores"][i, :count], scores, atol=1e-4)
        same = np.abs(np.diff(scores, prepend=2, append=-1)).reshape(-1)
        clear = (same[:-1] > 1e-4) & (same[1:] > 1e-4)
        assert (got["labels"][i, :count] == labels)[clear].all()
        np.testing.assert_allclose(got["boxes"][i, :count][clear], boxes[clear], atol=1e-2)
        total += count
    assert total > 10


def test_preprocessing_comes_from_the_directory(folder, tmp_path):
    path, _ = folder("detr")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        (copy / name).write_bytes((path / name).read_bytes())
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    wanted = {
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
        "size": {"shortest_edge": 100, "longest_edge": 200},
    }
    (copy / "preprocessor_config.json").write_text(json.dumps(wanted))
    raw = load(copy)
    assert raw.pixels == Pixels("rgb", 1.0, tuple(mean), tuple(std))
    assert (raw.image.height, raw.image.width, raw.stretch) == (96, 96, False)


def copied(folder, kind, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder(kind)[0].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.mark.covering(default=0)
@pytest.mark.parametrize(("kind", "pixels"), [("detr", "imagenet"), ("rt_detr", "rgb")])
def test_pixels_are_the_usual_ones_where_the_directory_does_not_say(folder, tmp_path, kind, pixels):
    copy = copied(folder, kind, tmp_path)
    (copy / "preprocessor_config.json").unlink()
    raw = load(copy, size=SIZE)
    assert (raw.pixels, raw.stretch) == (PIXELS[pixels], True)
    assert f"the usual pixels of {kind} ({pixels}) are used" in raw.notes[-1]


@pytest.mark.parametrize(
    "settings",
    [
        {"do_normalize": True, "image_mean": "x", "image_std": "y"},
        {"do_normalize": True, "image_mean": [0.5, 0.5, 0.5]},
        {"do_normalize": True, "image_mean": None, "image_std": None},
        {"do_normalize": True, "image_mean": 0.5, "image_std": 0.5},
        {"do_normalize": True, "image_mean": [0, 0, 0], "image_std": [0, 0, 0]},
        {"size": {"height": -5, "width": 64}},
        {"size": {"height": "x", "width": 64}},
        {"size": "big"},
        {"do_rescale": True, "rescale_factor": "a"},
        {"do_rescale": True, "rescale_factor": 0},
    ],
    ids=str,
)
def test_error_when_preprocessing_cannot_be_used(folder, tmp_path, settings):
    copy = copied(folder, "detr", tmp_path)
    (copy / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(SourceError, match=r"preprocessor_config\.json: cannot be used"):
        load(copy)


def test_error_when_the_network_does_not_run(folder, tmp_path):
    copy = copied(folder, "d_fine", tmp_path)
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"num_queries": 0}))
    with pytest.raises(SourceError, match=r"the network does not run|cannot be loaded"):
        load(copy)


@pytest.mark.thorough
def test_detector_stretches_and_maps_back(folder, tmp_path):
    file = fuse(folder("rt_detr")[0], score_threshold=0.01).save(tmp_path / "f.onnx")
    image = np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8)
    with Detector(file) as detect:
        found = detect(image)[0]
    squeezed = cv2.resize(image, SIZE[::-1], interpolation=cv2.INTER_LINEAR)
    outputs = OnnxRuntimeRunner(load_fused(file).model).infer(to_tensor([squeezed]))
    count = int(outputs["num_detections"][0, 0])
    assert len(found) == count > 0
    expected = (outputs["boxes"][0, :count] * np.array([200 / 128, 300 / 96] * 2)).clip(0, [200, 300] * 2)
    np.testing.assert_allclose(found.boxes, expected, atol=1e-2)


def damaged(path, kind):
    """A sound directory with one thing wrong."""
    weights, settings = path / "model.safetensors", json.loads((path / "config.json").read_text())
    if kind == "no config":
        (path / "config.json").unlink()
    elif kind == "config is text":
        (path / "config.json").write_text("hello")
    elif kind == "another model":
        (path / "config.json").write_text(json.dumps(settings | {"model_type": "bert"}))
    elif kind == "pickled weights":
        weights.unlink()
        torch.save({"model": 1}, path / "pytorch_model.bin")
    elif kind == "cut short":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "other weights":
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(2)}, weights)
    elif kind == "wrong classes":
        names = {str(i): f"c{i}" for i in range(7)}
        (path / "config.json").write_text(
            json.dumps(settings | {"id2label": names, "label2id": {v: int(k) for k, v in names.items()}})
        )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no config", "has no config.json; expected a directory of a Hugging Face detector"),
        ("config is text", "config.json: cannot be read"),
        ("another model", "is a 'bert'; expected a detector of rt_detr"),
        ("pickled weights", "has no .safetensors; expected the weights in that format, which holds no code"),
        ("cut short", "cannot be loaded by transformers"),
        ("other weights", "the weights lack .* expected weights of the model in config.json"),
        ("wrong classes", "cannot be loaded by transformers|the weights lack|do not fit|the 7 classes of its config"),
    ],
)  # fmt: skip
def test_error_when_directory_is_damaged(folder, tmp_path, kind, message):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder("detr")[0].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    damaged(copy, kind)
    with pytest.raises(SourceError, match=message):
        load(copy)


def test_no_code_of_the_directory_runs(folder, tmp_path):
    copy, mark = tmp_path / "copy", tmp_path / "mark"
    copy.mkdir()
    for file in folder("detr")[0].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    settings = json.loads((copy / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForObjectDetection": "own.OwnModel"}
    (copy / "config.json").write_text(json.dumps(settings | {"auto_map": own}))
    (copy / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass OwnConfig: pass\nclass OwnModel: pass\n")
    assert load(copy).task == "detect"  # transformers' own classes
    assert not mark.exists()


def test_error_when_size_is_left_open(folder):
    with pytest.raises(ConfigError, match="works at one size only; leave dynamic_size out"):
        load(folder("detr")[0], dynamic_size=True)
