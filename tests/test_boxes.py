import numpy as np
import pytest
from onnx import parser

from fusenms.boxes import area, cxcywh_to_xyxy, ordered, pairwise_iou, pairwise_probiou
from fusenms.fusion.backends.iou import oriented_limit, overlap_oriented
from fusenms.graph.builder import Graph
from fusenms.graph.session import OnnxRuntimeRunner


def test_no_boxes_when_empty():
    none = np.zeros((0, 4))
    assert cxcywh_to_xyxy(none).shape == (0, 4)
    assert pairwise_iou(none, none).shape == (0, 0)


def test_corners_of_center_and_size():
    np.testing.assert_array_equal(cxcywh_to_xyxy(np.array([[10.0, 20.0, 4.0, 6.0]])), [[8, 17, 12, 23]])


def test_iou_of_half_overlap_is_exact():
    whole, half = np.array([[0.0, 0.0, 10.0, 10.0]]), np.array([[0.0, 0.0, 10.0, 5.0]])
    assert pairwise_iou(whole, half)[0, 0] == 0.5


def test_degenerate_boxes_have_iou_zero_with_everything():
    boxes = np.array([[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 5.0, 9.0], [8.0, 8.0, 2.0, 2.0]])
    iou = pairwise_iou(boxes, boxes)
    assert iou[0, 0] == 1
    assert not iou[1:].any()
    assert not iou[:, 1:].any()
    assert area(boxes).tolist() == [100, 0, 0]


def test_negative_size_becomes_zero_when_ordered():
    np.testing.assert_array_equal(ordered(np.array([[5.0, 5.0, 2.0, 9.0]])), [[5, 5, 5, 9]])


def oriented(count: int, seed: int, thinnest: float = 4.0) -> np.ndarray:
    """Boxes near each other, of any angle."""
    rng = np.random.default_rng(seed)
    sides = np.exp(rng.uniform(np.log(thinnest), np.log(200), (count, 2)))
    return np.concatenate((rng.uniform(0, 120, (count, 2)), sides, rng.uniform(-4, 4, (count, 1))), 1)


def test_probabilistic_iou_is_that_of_the_usual_formulas():
    """Those of Ultralytics, batch_probiou, written out for one pair at a time."""
    boxes = oriented(40, 0)

    def terms(box):
        p, q, cos, sin = box[2] ** 2 / 12, box[3] ** 2 / 12, np.cos(box[4]), np.sin(box[4])
        return p * cos**2 + q * sin**2, p * sin**2 + q * cos**2, (p - q) * cos * sin

    for one in boxes[:8]:
        for two in boxes:
            (a1, b1, c1), (a2, b2, c2) = terms(one), terms(two)
            dx, dy = two[0] - one[0], one[1] - two[1]
            joint = (a1 + a2) * (b1 + b2) - (c1 + c2) ** 2
            t1 = ((a1 + a2) * dy**2 + (b1 + b2) * dx**2) / joint / 4
            t2 = (c1 + c2) * dx * dy / joint / 2
            t3 = np.log(joint / (4 * np.sqrt((a1 * b1 - c1**2) * (a2 * b2 - c2**2)))) / 2
            expected = 1 - np.sqrt(1 - np.exp(-(t1 + t2 + t3)) + 1e-7)
            np.testing.assert_allclose(pairwise_probiou(one[None], two[None])[0, 0], max(expected, 0), atol=1e-6)


def test_probabilistic_iou_of_equal_far_and_degenerate_boxes():
    box = np.array([[50.0, 50.0, 20.0, 10.0, 0.3]])
    assert pairwise_probiou(box, box)[0, 0] > 0.999
    quarter = box + np.array([0, 0, -10, 10, np.pi / 2])  # the same box, said the other way
    np.testing.assert_allclose(pairwise_probiou(box, quarter), pairwise_probiou(box, box), atol=1e-9)
    assert pairwise_probiou(box, box + np.array([500, 0, 0, 0, 0]))[0, 0] == 0
    for flat in ([0, 0, -20, 0, 0], [0, 0, 0, -10, 0], [0, 0, 0, -12, 0]):
        assert not pairwise_probiou(box, box + np.array(flat)).any()


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.45, 0.7, 0.99, 1.0])
@pytest.mark.parametrize("thinnest", [0.5, 4.0])
def test_graph_decides_as_the_probabilistic_iou_does(threshold, thinnest):
    """In float32, for boxes of up to 400 to 1 too, wherever the decision does not hang on rounding."""
    boxes, others = (oriented(60, seed, thinnest).astype(np.float32) for seed in (1, 2))
    model = parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
      g (float[1, n, 5] boxes, float[1, 5, m] others) => (float[1, n, 5] x) { x = Identity (boxes) }""")
    g = Graph(model)
    sides = g.split(g.tensor("boxes"), 2, 5), g.split(g.tensor("others"), 1, 5)
    g.set_outputs(
        [(overlap_oriented(g, *sides, oriented_limit(g, threshold)), "close", np.dtype(np.bool_), (1, "n", "m"))]
    )
    got = OnnxRuntimeRunner(g.to_model()).run({"boxes": boxes[None], "others": others.T[None]})["close"][0]
    overlap = pairwise_probiou(boxes.astype(np.float64), others.astype(np.float64))
    clear = np.abs(overlap - threshold) > 2e-5
    np.testing.assert_array_equal(got[clear], (overlap > threshold)[clear])
    assert clear.mean() > 0.9 or threshold in (0.0, 1.0)
    assert got.any() or threshold > 0.7
