import numpy as np

from fusenms.boxes import area, cxcywh_to_xyxy, ordered, pairwise_iou


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
