"""`fuse`: its keywords, and what it tells of each step."""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import get_type_hints

import pytest
from conftest import SHAPES

import fusenms
from fusenms import LoadOptions, PostprocessConfig, fuse, load, recognize
from fusenms.artifacts.report import Check, Report
from fusenms.config import ConfigFields
from fusenms.errors import ConfigError, VerificationError
from fusenms.events import Compared, Fused, Progress, Recognized, Verified
from fusenms.sources import LoadFields

WEIGHTS = SHAPES / "shapes.pt"


@pytest.fixture(scope="module")
def raw():
    return load(WEIGHTS, size=64)


@pytest.mark.parametrize(("keywords", "cls"), [(LoadFields, LoadOptions), (ConfigFields, PostprocessConfig)])
def test_keywords_are_the_fields(keywords, cls):
    assert get_type_hints(keywords) == {field.name: get_type_hints(cls)[field.name] for field in fields(cls)}


@pytest.mark.slow
def test_each_step_is_told_and_logged(raw, caplog):
    events = []
    with caplog.at_level(logging.INFO, logger="fusenms"):
        fused = fuse(raw, precision="fp16", on_event=events.append)
    steps = [event for event in events if not isinstance(event, Progress)]
    assert [type(event) for event in steps] == [Recognized, Fused, Compared, Verified]
    assert [record.getMessage() for record in caplog.records] == [event.summary for event in steps]
    assert steps[-1].report is fused.report
    progress = [event for event in events if isinstance(event, Progress)]
    assert progress
    assert all(event.done < event.total for event in progress)


def test_a_report_with_mismatches_is_told_and_raised(raw, monkeypatch):
    wrong = Report((Check(batch=1, image=0, case="random", problems=("row 0 differs",)),), (1,))
    monkeypatch.setattr("fusenms.pipeline.verify", lambda *_, **__: wrong)
    events = []
    with pytest.raises(VerificationError, match="row 0 differs"):
        fuse(raw, on_event=events.append)
    assert events[-1] == Verified(report=wrong)


def test_config_and_its_fields_make_the_same(raw):
    by_value = fuse(raw, config=PostprocessConfig(score_threshold=0.4), unverified=True)
    assert by_value.config == fuse(raw, score_threshold=0.4, unverified=True).config


@pytest.mark.thorough
@pytest.mark.slow
def test_options_and_their_fields_make_the_same():
    by_value = fuse(WEIGHTS, options=LoadOptions(size=64), unverified=True)
    assert by_value.model == fuse(WEIGHTS, size=64, unverified=True).model


def test_recognized_layout_is_taken(raw, monkeypatch):
    layout = recognize(raw)
    monkeypatch.setattr("fusenms.pipeline.recognize", lambda *_: pytest.fail("the layout is known"))
    assert fuse(raw, layout=layout, unverified=True).layout.family == layout.family


@pytest.mark.slow
def test_images_may_be_a_folder(raw):
    assert len(fuse(raw, images=SHAPES).report.checks) > len(fuse(raw).report.checks) - 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config": PostprocessConfig(), "score_threshold": 0.3}, "found config and score_threshold"),
        ({"options": LoadOptions(), "size": 64}, "found options and size"),
        ({"size": 64}, "found size with a RawModel, which is loaded already"),
        ({"isolate": True, "pixels": "bgr"}, "found pixels, isolate with a RawModel"),
        ({"images": SHAPES, "unverified": True}, "images are only used to verify"),
        ({"precision": "int3"}, "precision is 'int3'; expected one of fp32, fp16"),
        ({"backend": "nothing"}, "backend is 'nothing'"),
        ({"scores": 0.3}, "unknown setting scores"),
        ({"images": "nowhere"}, "nowhere: is not a folder"),
    ],
)
def test_error_says_what_does_not_go_together(raw, settings, message):
    with pytest.raises(fusenms.FusenmsError, match=message):
        fuse(raw, **settings)


def test_unknown_option_of_load_is_named():
    with pytest.raises(ConfigError, match="unknown option names; expected size, "):
        load(WEIGHTS, names=["a"])
