"""The reference on cases small enough to work out by hand, and against a plain greedy loop."""

from __future__ import annotations

import numpy as np
import pytest

from fusenms import PostprocessConfig
from fusenms.boxes import pairwise_iou
from fusenms.layout import Activation, BoxFormat, Decoded, Layout, Tap
from fusenms.reference import Rows, candidates, masks, postprocess

SIZE = (64, 64)


def found(boxes, scores, objectness=None, activation=Activation.NONE):
    """Candidates of corners ``[N, 4]`` and class values ``[N, C]``."""
    boxes, scores = np.asarray(boxes, np.float32), np.asarray(scores, np.float32)
    parts = [boxes, scores] if objectness is None else [boxes, scores, np.asarray(objectness, np.float32)[:, None]]
    head = np.concatenate(parts, 1)[None]
    stop = 4 + scores.shape[1]
    tap = None if objectness is None else Tap("h", 2, stop, stop + 1)
    layout = Layout("t", Tap("h", 2, 0, 4), Tap("h", 2, 4, stop), tap, activation, Decoded(BoxFormat.XYXY))
    return candidates({"h": head}, 0, layout, SIZE)


def apart(count):
    """Boxes that do not touch."""
    left = np.arange(count) * 10.0
    return np.stack((left, np.zeros(count), left + 8, np.full(count, 8.0)), 1)


def test_nothing_when_no_candidates():
    assert len(postprocess(found(np.zeros((0, 4)), np.zeros((0, 2))), PostprocessConfig()).rows) == 0


def test_score_equal_to_threshold_is_not_kept():
    scores = np.array([[0.5], [np.nextafter(np.float32(0.5), np.float32(1))]])
    result = postprocess(found(apart(2), scores), PostprocessConfig(score_threshold=0.5))
    assert result.indices.tolist() == [1]


def test_iou_equal_to_threshold_is_kept():
    boxes = [[0, 0, 10, 10], [0, 0, 10, 5]]
    result = postprocess(found(boxes, [[0.9], [0.8]]), PostprocessConfig(iou_threshold=0.5))
    assert result.indices.tolist() == [0, 1]


def test_iou_above_threshold_is_dropped():
    boxes = [[0, 0, 10, 10], [0, 0, 10, 5.01]]
    result = postprocess(found(boxes, [[0.9], [0.8]]), PostprocessConfig(iou_threshold=0.5))
    assert result.indices.tolist() == [0]


def test_other_class_is_kept_unless_class_agnostic():
    head = found([[0, 0, 10, 10]] * 2, [[0.9, 0], [0, 0.8]])
    assert postprocess(head, PostprocessConfig()).rows.labels.tolist() == [0, 1]
    assert postprocess(head, PostprocessConfig(class_agnostic=True)).rows.labels.tolist() == [0]


def test_only_a_kept_box_suppresses():
    boxes = [[0, 0, 10, 10], [0, 4, 10, 14], [0, 8, 10, 18]]  # a chain: each overlaps the next by 6 / 14
    result = postprocess(found(boxes, [[0.9], [0.8], [0.7]]), PostprocessConfig(iou_threshold=0.4))
    assert result.indices.tolist() == [0, 2]


def test_lower_index_and_lower_class_win_when_equal():
    result = postprocess(found([[0, 0, 8, 8]] * 3, [[0.5, 0.5]] * 3), PostprocessConfig())
    assert result.indices.tolist() == [0]
    assert result.rows.labels.tolist() == [0]


def test_every_class_is_a_candidate_when_multi_label():
    result = postprocess(found([[0, 0, 8, 8]], [[0.6, 0.1, 0.9]]), PostprocessConfig(multi_label=True))
    assert result.rows.labels.tolist() == [2, 0]


def test_score_is_objectness_times_class():
    result = postprocess(found(apart(2), [[0.9], [0.6]], [0.5, 1.0]), PostprocessConfig())
    np.testing.assert_allclose(result.rows.scores, [0.6, 0.45], rtol=1e-6)


def test_only_the_best_candidates_enter():
    scores = np.linspace(0.9, 0.5, 10)[:, None]
    config = PostprocessConfig(max_candidates=4, max_detections=4)
    assert postprocess(found(apart(10), scores), config).indices.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_candidate_with_unusable_score_is_left_out(value):
    result = postprocess(found(apart(2), [[value, 0.9], [0.3, 0.5]]), PostprocessConfig())
    assert result.indices.tolist() == [1]


def test_close_call_follows_what_was_observed():
    boxes = [[0, 0, 10, 10], [0, 0, 10, 5.00001]]  # IoU above 0.5 by a hundredth of the rounding
    head, config = found(boxes, [[0.9], [0.8]]), PostprocessConfig(iou_threshold=0.5)
    both = Rows(np.array(boxes), np.array([0.9, 0.8]), np.array([0, 0]))
    one = Rows(both.boxes[:1], both.scores[:1], both.labels[:1])
    assert postprocess(head, config).indices.tolist() == [0]
    for observed in (both, one):
        result = postprocess(head, config, observed)
        assert len(result.rows) == len(observed)
        assert result.close_calls == 1


def test_clear_decision_does_not_follow_what_was_observed():
    boxes = [[0, 0, 10, 10], [0, 0, 10, 5.1]]
    wrong = Rows(np.array(boxes), np.array([0.9, 0.8]), np.array([0, 0]))
    head, config = found(boxes, [[0.9], [0.8]]), PostprocessConfig(iou_threshold=0.5)
    assert len(postprocess(head, config, wrong).rows) == 1


@pytest.mark.parametrize(("height", "kept"), [(1e-5, 2), (1e-2, 1)])
def test_boxes_that_float32_may_not_tell_from_lines_are_close_calls(height, kept):
    boxes = [[0, 60, 10, 60 + height]] * 2  # one of the units in the last place of 60 is 4e-6
    observed = Rows(np.array(boxes), np.array([0.9, 0.8]), np.array([0, 0]))
    assert len(postprocess(found(boxes, [[0.9], [0.8]]), PostprocessConfig(), observed).rows) == kept


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_equal_to_a_plain_greedy_loop(seed, agnostic):
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 40, (120, 2))
    boxes = np.concatenate((low, low + rng.uniform(1, 25, (120, 2))), 1).astype(np.float32).astype(float)
    scores = rng.uniform(0, 1, (120, 3)).astype(np.float32)
    config = PostprocessConfig(score_threshold=0.3, iou_threshold=0.4, class_agnostic=agnostic, max_detections=25)
    kept: list[int] = []
    for i in np.argsort(-scores.max(1), kind="stable"):
        rivals = [k for k in kept if agnostic or scores[k].argmax() == scores[i].argmax()]
        if scores[i].max() > 0.3 and all(pairwise_iou(boxes[k : k + 1], boxes[i : i + 1])[0, 0] <= 0.4 for k in rivals):
            kept.append(int(i))
    assert postprocess(found(boxes, scores), config).indices.tolist() == kept[:25]


def test_pixels_of_masks_are_doubtful_only_where_rounding_decides():
    rng = np.random.default_rng(0)
    coefficients, prototypes = rng.normal(0, 1, (3, 8)), rng.normal(0, 1, (8, 16, 16)).astype(np.float32)
    boxes = np.array([[0.0, 0, 64, 64], [9.5, 9.5, 41, 33], [8, 8, 40, 32]])  # the last one's edges are those of pixels
    inside, doubtful = masks(coefficients, prototypes, boxes, SIZE)
    sums = np.einsum("nm,mhw->nhw", coefficients, prototypes.astype(float))
    np.testing.assert_array_equal(inside[0], sums[0] > 0)
    assert doubtful[0, 1:, 1:].sum() == 0
    assert doubtful[1].sum() == 0
    columns = np.zeros((16, 16), bool)
    columns[:, [2, 10]] = columns[[2, 8]] = True
    np.testing.assert_array_equal(doubtful[2], columns)
    prototypes[:, 5, 5] = 0
    assert masks(coefficients, prototypes, boxes, SIZE)[1][0, 5, 5]
