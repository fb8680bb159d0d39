"""Flags come from the fields of the settings classes, and errors name parameters in Python and flags on the command line."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from pathlib import Path

import pytest

import fusenms
from fusenms import EngineSettings, LoadOptions, PostprocessConfig
from fusenms.cli import build_parser
from fusenms.cli.flags import add_fields, field_helps, fields_of, with_flags

PACKAGE = Path(fusenms.__file__).parent


@pytest.mark.parametrize("cls", [LoadOptions, PostprocessConfig, EngineSettings])
def test_every_field_is_explained(cls):
    helps = field_helps(cls)
    assert list(helps) == [field.name for field in fields(cls)]
    assert all(len(text) > 10 for text in helps.values())


def test_flags_give_the_defaults_of_the_class():
    parser = argparse.ArgumentParser()
    add_fields(parser, PostprocessConfig)
    assert PostprocessConfig(**fields_of(parser.parse_args([]), PostprocessConfig)) == PostprocessConfig()


def test_flags_have_the_types_of_the_fields():
    parser = argparse.ArgumentParser()
    add_fields(parser, PostprocessConfig)
    words = "--score-threshold 0.5 --max-detections 7 --class-agnostic --masks prototype --rounds 3"
    config = PostprocessConfig(**fields_of(parser.parse_args(words.split()), PostprocessConfig))
    assert config == PostprocessConfig(
        score_threshold=0.5, max_detections=7, class_agnostic=True, masks="prototype", rounds=3
    )


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("choose one with family='yolov5'", "choose one with --family yolov5"),
        ("leave class_agnostic=True out", "leave --class-agnostic out"),
        ("or fix the batch with batch=1", "or fix the batch with --batch 1"),
        ("score_threshold is 2; expected a number", "--score-threshold is 2; expected a number"),
        ("fuse it with backend='ort'", "fuse it with --backend ort"),
        ("backend is 'x'", "backend is 'x'"),
        ("m/max_detections.onnx: no such file", "m/max_detections.onnx: no such file"),
        ("(max_image_side)", "(max_image_side)"),
    ],
)
def test_message_names_flags_on_the_command_line(message, expected):
    assert with_flags(message) == expected


def test_errors_outside_the_command_line_name_parameters():
    known = {
        flag
        for parser in next(a for a in build_parser()._actions if a.dest == "command").choices.values()
        for action in parser._actions
        for flag in action.option_strings
        if flag.startswith("--")
    }
    named = {
        f"{path.relative_to(PACKAGE)}: {flag}"
        for path in PACKAGE.rglob("*.py")
        if "cli" not in path.relative_to(PACKAGE).parts
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", path.read_text())
        if flag in known
    }
    assert named == {
        "artifacts/report.py: --json",  # a docstring
        "engines/plugin.py: --std",  # a flag of nvcc
        *(f"deployment/docker.py: {flag}" for flag in ("--host", "--port")),  # the command of the image
    }
