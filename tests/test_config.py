import pytest

from fusenms import PostprocessConfig
from fusenms.errors import ConfigError


def test_defaults_when_nothing_is_given():
    config = PostprocessConfig()
    assert (config.score_threshold, config.iou_threshold, config.max_detections) == (0.25, 0.45, 300)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("score_threshold", -0.1),
        ("score_threshold", 1.01),
        ("score_threshold", float("nan")),
        ("score_threshold", "0.5"),
        ("iou_threshold", 2),
        ("max_detections", 0),
        ("max_detections", 1.5),
        ("max_candidates", True),
        ("class_agnostic", 1),
        ("output_preset", "nobody"),
    ],
)
def test_error_names_setting_and_value_when_out_of_range(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value!r}; expected"):
        PostprocessConfig(**{name: value})


def test_error_when_more_detections_than_candidates():
    with pytest.raises(ConfigError, match="less than max_detections 300"):
        PostprocessConfig(max_candidates=100)


def test_error_when_setting_is_unknown():
    with pytest.raises(ConfigError, match="unknown setting conf; expected score_threshold"):
        PostprocessConfig.from_dict({"conf": 0.3})


def test_numpy_numbers_are_taken():
    import numpy as np

    config = PostprocessConfig(score_threshold=np.float32(0.5), max_detections=np.int64(7))
    assert config.to_dict() | {"score_threshold": 0.5, "max_detections": 7} == config.to_dict()
    assert type(config.max_detections) is int


def test_dict_round_trip():
    config = PostprocessConfig(score_threshold=0.1, class_agnostic=True, output_preset="yolov7")
    assert PostprocessConfig.from_dict(config.to_dict()) == config


def test_preset_is_read_under_its_first_name():
    """Files of 0.1.0 call it ``names``."""
    assert PostprocessConfig.from_dict({"names": "yolov7"}).output_preset == "yolov7"
