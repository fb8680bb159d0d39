"""Operators that are not exported: what is said of each kind, and that the way out which is said works."""

from __future__ import annotations

import inspect
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from test_custom_ops import EXAMPLE, LAYOUT, SETTINGS
from third_party import YoloNas
from torch import nn
from torch.nn import functional

import fusenms
from fusenms import contract
from fusenms.errors import ConfigError, SourceError, UnsupportedOperatorError
from fusenms.fusion.backends import BACKENDS
from fusenms.sources import operators
from fusenms.sources.operators import registration
from fusenms.sources.quiet import quiet_exporters
from fusenms.sources.unsupported import NO_WAY_OUT

pytestmark = pytest.mark.slow
PLUGIN = "com.example::Plugin"


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    monkeypatch.setattr(registration, "_made_by", {})
    before = dict(registration.REGISTERED)
    registration.REGISTERED.clear()
    yield
    registration.REGISTERED.clear()
    registration.REGISTERED.update(before)


# Operators that no exporter knows, in the ways that they are written.


@torch.library.custom_op("operators_tests::swish", mutates_args=())
def swish(x: torch.Tensor, beta: float) -> torch.Tensor:
    return x * torch.sigmoid(beta * x)


@torch.library.custom_op("operators_tests::halves", mutates_args=())
def halves(x: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return x[:, : sizes[0]].clone(), x[:, sizes[0] :].clone()


@halves.register_fake
def _(x, sizes):
    return x[:, : sizes[0]].clone(), x[:, sizes[0] :].clone()


@torch.library.custom_op("operators_tests::sampled", mutates_args=())
def sampled(value: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Deformable attention of one head and level: values ``[B, C, H, W]`` at places ``[B, Q, P, 2]`` (0 to 1), weighted ``[B, Q, P]``."""
    found = functional.grid_sample(value, 2 * places - 1, align_corners=False)
    return (found * weights[:, None]).sum(3)


@sampled.register_fake
def _(value, places, weights):
    return value.new_empty(value.shape[0], value.shape[1], places.shape[1])


class ByNumpy(torch.autograd.Function):
    """Neither a symbolic nor a forward that can be exported."""

    @staticmethod
    def forward(ctx, x, k):
        return torch.from_numpy(x.detach().numpy() * np.float32(k))


class TwoOutputs(torch.autograd.Function):
    @staticmethod
    def forward(x, k):
        return torch.from_numpy(x.detach().numpy() * np.float32(k)), x + k

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


class WithSymbolic(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(np.abs(x.detach().numpy()))

    @staticmethod
    def symbolic(g, x):
        return g.op("Abs", x)


class ByTensors(torch.autograd.Function):
    """Without a symbolic, but its forward can be exported."""

    @staticmethod
    def forward(ctx, x):
        return x * torch.sigmoid(x)


class Resized(torch.autograd.Function):
    """Bicubic resizing with scales that are known at run time only."""

    @staticmethod
    def forward(ctx, x, scales):
        return functional.interpolate(x, scale_factor=scales.tolist(), mode="bicubic", align_corners=False)


kept_apply = ByNumpy.apply


def resize(op, x, scales):
    every = op.Concat([1.0, 1.0], scales, axis=0)
    how = {"coordinate_transformation_mode": "pytorch_half_pixel", "cubic_coeff_a": -0.75, "nearest_mode": "floor"}
    return op.Resize(x, None, every, mode="cubic", **how)


def sample(op, value, places, weights):
    grid = op.Sub(op.Mul(places, 2.0), 1.0)
    found = op.GridSample(
        value, grid, align_corners=0, mode="linear" if op.opset >= 20 else "bilinear", padding_mode="zeros"
    )
    return op.ReduceSum(op.Mul(found, op.Unsqueeze(weights, [1])), [3], keepdims=0)


class Net(nn.Module):
    """A convolution, and the function behind it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.function = nn.Conv2d(3, 8, 3, 2, 1), function

    def forward(self, x, scales=None):
        return self.function(self.conv(x)) if scales is None else self.function(self.conv(x), scales)


class Detector(YoloNas):
    """A detector, and the function before its head."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images):
        return super().forward(self.function(images))


def attention(x):
    places = torch.sigmoid(x[:, :2].flatten(2).transpose(1, 2)[:, :, None])
    weights = torch.softmax(x[:, :1].flatten(2).transpose(1, 2), 1)
    return sampled(x, places, weights)


def asinh(x):
    return torch.asinh(x)


def svdvals(x):
    return x + torch.linalg.svdvals(x).sum(-1)[..., None, None]


def hypot(x):
    return torch.hypot(x, x + 1)


def moved(x):
    grid = torch.tanh(x.permute(0, 2, 3, 1)[..., :2] / 100)
    return functional.grid_sample(x.sigmoid(), grid, align_corners=False)


def swished(x):
    return swish(x, 1.5)


def by_numpy(x):
    return ByNumpy.apply(x, 1.5)


def resized_by_brightness(x):
    scales = torch.stack((1 + (x.mean() > 0), 2 + (x.mean() > 0))).float()
    return Resized.apply(x, scales).amax((2, 3))


# A registration serves both exporters.


def torchscript(module, inputs, axes=True):
    stream = io.BytesIO()
    dynamic = {"x": {0: "batch"}} if axes else {}
    with operators.in_torchscript([17]), quiet_exporters(), torch.no_grad():
        torch.onnx.export(
            module, inputs, stream, dynamo=False, opset_version=17, input_names=["x", "y"][: len(inputs)], dynamic_axes=dynamic
        )  # fmt: skip
    return onnx.load_from_string(stream.getvalue())


def torch_export(module, inputs):
    shapes = {0: torch.export.Dim.DYNAMIC}
    with operators.in_torch_export(lambda: module(*inputs)) as table, quiet_exporters(), torch.no_grad():
        program = torch.onnx.export(
            module, inputs, dynamo=True, opset_version=18, verbose=False, custom_translation_table=table,
            dynamic_shapes=(shapes, None)[: len(inputs)],
        )  # fmt: skip
    return program.model_proto


def run(model, *inputs):
    session = onnxruntime.InferenceSession(model.SerializeToString())
    names = [entry.name for entry in session.get_inputs()]
    return session.run(None, dict(zip(names, (value.numpy() for value in inputs), strict=True)))


REGISTERED = {
    "same name": (asinh, "aten::asinh", "Asinh"),
    "formula": (asinh, "aten::asinh", lambda op, x: op.Log(op.Add(x, op.Sqrt(op.Add(op.Mul(x, x), 1.0))))),
    "two tensors": (hypot, "aten::hypot", lambda op, a, b: op.Sqrt(op.Add(op.Mul(a, a), op.Mul(b, b)))),
    "packet": (lambda x: halves(x, [3, 5])[0], torch.ops.operators_tests.halves, lambda op, x, n: op.Split(x, n, axis=1, outputs=2)),
    "one that PyTorch exports": (functional.gelu, "aten::gelu", lambda op, x, how: op.Mul(x, op.Sigmoid(op.Mul(x, 1.702)))),
    "deformable attention": (attention, sampled, sample),
    "function": (by_numpy, ByNumpy, lambda op, x, k: op.Mul(x, k)),
    "apply kept before": (lambda x: kept_apply(x, 1.5), ByNumpy, lambda op, x, k: op.Mul(x, k)),
    "function of two outputs": (lambda x: TwoOutputs.apply(x, 2.5)[0], TwoOutputs, lambda op, x, k: [op.Mul(x, k), op.Add(x, k)]),
}  # fmt: skip


SOON = ("deformable attention",)


@pytest.mark.parametrize(
    ("case", "exporter"),
    [
        pytest.param(case, exporter, marks=[] if exporter is torchscript or case in SOON else [pytest.mark.thorough])
        for case in REGISTERED
        for exporter in (torchscript, torch_export)
    ],
)
def test_registered_operator_equals_pytorch(case, exporter):
    function, operator, to = REGISTERED[case]
    declared = (
        {"shape": lambda x, k: [x.shape] * (2 if operator is TwoOutputs else 1)} if isinstance(operator, type) else {}
    )
    fusenms.register_operator(operator, to, **declared)
    module = Net(function).eval()
    model = exporter(module, (torch.rand(2, 3, 32, 32),))
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = module(images).numpy()
    most = (
        0.03 if case == "one that PyTorch exports" else 1e-5
    )  # the formula of another gelu, which shows that it was taken
    found = np.abs(run(model, images)[0] - expected).max()
    assert found < most
    assert most < 0.01 or found > 1e-3


@pytest.mark.parametrize(
    "exporter",
    [lambda *given: torchscript(*given, axes=False), pytest.param(torch_export, marks=pytest.mark.thorough)],
    ids=["torchscript", "torch_export"],
)
def test_bicubic_resizing_with_scales_given_at_run_time(exporter):
    """The super-resolution network of the tutorial on deployment."""
    fusenms.register_operator(
        Resized, resize, shape=lambda x, scales: (x.shape[0], x.shape[1], 2 * x.shape[2], 2 * x.shape[3])
    )
    module = Net(Resized.apply).eval()
    images = torch.rand(2, 3, 16, 16)
    model = exporter(module, (images, torch.tensor([2.0, 2.0])))
    for scales in (torch.tensor([2.0, 2.0]), torch.tensor([1.5, 3.0])):
        with torch.no_grad():
            expected = module(images, scales).numpy()
        (got,) = run(model, images, scales)
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() < 1e-5


def test_registration_ends_with_none_and_leaves_pytorch_alone():
    fusenms.register_operator("aten::asinh", "Asinh")
    forward = ByNumpy.forward
    fusenms.register_operator(ByNumpy, "Abs")
    torchscript(Net(asinh).eval(), (torch.rand(2, 3, 32, 32),))
    assert ByNumpy.forward is forward
    fusenms.register_operator("aten::asinh", None)
    fusenms.register_operator(ByNumpy, None)
    assert not registration.REGISTERED
    with pytest.raises(torch.onnx.errors.UnsupportedOperatorError):
        torchscript(Net(asinh).eval(), (torch.rand(2, 3, 32, 32),))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("aten::asinhh", "Asinh"), r"operator is 'aten::asinhh'; expected the name .* did you mean 'aten::asinh'"),
        (("nowhere::fold", "Fold"), r"operator is 'nowhere::fold'; .* once the library is imported"),
        ((3, "Fold"), r"operator is 3; expected the name"),
        (("aten::asinh", "a b"), r"to is 'a b'; expected an ONNX operator"),
        (("aten::asinh", "Asinh", (1, 2)), r"shape is \(1, 2\); expected a function"),
        (("aten::asinh", "Asinh", None, torch.float32), r"found dtype without shape"),
        (("aten::asinh", "Asinh", lambda x: x.shape, "float"), r"dtype is 'float'; expected a torch.dtype"),
    ],
)
def test_error_when_a_registration_is_none(arguments, message):
    operator, to, *rest = arguments
    with pytest.raises(ConfigError, match=message):
        fusenms.register_operator(operator, to, **dict(zip(("shape", "dtype"), rest, strict=False)))
    assert not registration.REGISTERED


# What doctor and fuse say, and that following it works.


@dataclass(frozen=True)
class Case:
    """What is not exported, what is said, and a function that does what is said; it returns arguments of doctor."""

    function: Callable[..., Any]
    operator: str
    remedy: str
    follow: Callable[[], dict[str, Any] | None] | None
    opset: int = 17
    kind: str = "unsupported-operator"


def quoted(text: str, formula: Callable[..., Any] | None = None) -> Callable[[], None]:
    """Run the call of ``register_operator`` that a remedy quotes, with the formula in place of its own."""

    def follow() -> None:
        operator, to = re.fullmatch(r"fusenms.register_operator\((.*?), (.*)\)", text).groups()  # type: ignore[union-attr]
        fusenms.register_operator(operator.strip("'"), formula or to.strip("'"))

    return follow


CASES = {
    "older opset": Case(moved, "aten::grid_sampler", "opset 16 has it: opset=16", lambda: {"opset": 16}, opset=13),
    "newer exporter": Case(
        asinh, "aten::asinh", "the torch.export-based exporter has it at opset 18: fuse takes it by itself",
        lambda: {"fuse": True},
    ),
    "same name in ONNX": Case(
        asinh, "aten::asinh", "ONNX has it: fusenms.register_operator('aten::asinh', 'Asinh')",
        quoted("fusenms.register_operator('aten::asinh', 'Asinh')"),
    ),
    "formula": Case(
        hypot, "aten::hypot", "those of ONNX: fusenms.register_operator('aten::hypot', lambda op, x, other: …)",
        quoted("fusenms.register_operator('aten::hypot', …)", lambda op, x, other: op.Sqrt(op.Add(op.Mul(x, x), op.Mul(other, other)))),
    ),
    "operator of a library": Case(
        swished, "operators_tests::swish", "fusenms.register_operator('operators_tests::swish', lambda op, x, beta: …)",
        quoted("fusenms.register_operator('operators_tests::swish', …)", lambda op, x, k: op.Mul(x, op.Sigmoid(op.Mul(x, k)))),
    ),
    "deformable attention": Case(
        attention, "operators_tests::sampled", "register_operator('operators_tests::sampled', lambda op, value, places, weights: …)",
        quoted("fusenms.register_operator('operators_tests::sampled', …)", sample),
    ),
    "function": Case(
        by_numpy, "a value of the image becomes a constant", "fusenms.register_operator(FUNCTION, f)",
        lambda: fusenms.register_operator(ByNumpy, lambda op, x, k: op.Mul(x, k)), kind="detached-data",
    ),
    "scale at run time": Case(
        resized_by_brightness, "a value of the image becomes", "fusenms.register_operator(FUNCTION, f)",
        lambda: fusenms.register_operator(Resized, resize), kind="detached-data",
    ),
    "no way out": Case(svdvals, "aten::linalg_svdvals", NO_WAY_OUT, None),
}  # fmt: skip
FEW = ("older opset", "function")


def cases():
    return [pytest.param(name, marks=[] if name in FEW else [pytest.mark.thorough]) for name in CASES]


def last_line(function):
    lines, start = inspect.getsourcelines(function)
    return start + len(lines) - 1


@pytest.mark.parametrize("name", cases())
def test_doctor_names_operator_line_and_a_way_out_that_works(name):
    case = CASES[name]
    (finding,) = fusenms.doctor(Net(case.function).eval(), EXAMPLE, opset=case.opset).findings
    assert (finding.kind, finding.file) == (case.kind, __file__)
    where = (
        ByNumpy.forward
        if case.function is by_numpy
        else Resized.forward
        if case.function is resized_by_brightness
        else case.function
    )
    assert finding.line == last_line(where)
    assert case.operator in finding.message
    assert case.remedy in finding.remedy
    if case.follow is None:
        return
    changed = case.follow() or {}
    if changed.pop("fuse", False):
        fused = fusenms.fuse(Detector(case.function), **SETTINGS)
        assert fused.report
        assert "opset 18" in fused.notes[0]
        return
    found = fusenms.doctor(Net(case.function).eval(), EXAMPLE, **{"opset": case.opset} | changed)
    assert found, found
    assert found.dynamic == {"batch": "equal", "size": "equal"}


@pytest.mark.parametrize(
    "function", [lambda x: WithSymbolic.apply(x), lambda x: ByTensors.apply(x)], ids=["symbolic", "tensors"]
)
def test_function_that_is_exported_has_no_finding(function):
    found = fusenms.doctor(Net(function).eval(), EXAMPLE)
    assert found or function.__name__ == "symbolic", found


SAID = [
    (moved, {"opset": 13}, "aten::grid_sampler is not exported at opset 13; opset 16 has it: opset=16"),
    (asinh, {"opset": 17}, "aten::asinh is not exported at opset 17; ONNX has it: fusenms.register_operator"),
    (svdvals, {"opset": 17}, "aten::linalg_svdvals is not exported at opset 17; no way out: ONNX has no such operator"),
    (swished, {"opset": 17}, "operators_tests::swish is not exported at opset 17; say what it is in operators of ONNX"),
]


@pytest.mark.parametrize(("function", "options", "text"), SAID, ids=lambda value: getattr(value, "__name__", None))
def test_fuse_says_the_same(function, options, text):
    with pytest.raises(UnsupportedOperatorError) as caught:
        fusenms.fuse(Detector(function), **SETTINGS, **options)
    said = str(caught.value)
    assert re.search(
        rf"Detector: the network could not be exported: test_operators.py:{last_line(function)} `.*`: ", said
    ), said
    assert text in said
    assert "fusenms.doctor(module, example)" in said


@pytest.mark.parametrize("case", ["formula", "operator of a library", "function"])
def test_detector_with_a_registered_operator_is_fused_and_verified(case):
    CASES[case].follow()
    fused = fusenms.fuse(Detector(lambda x: CASES[case].function(x) / 1.5), **SETTINGS, opset=17)
    assert fused.report, fused.report
    assert {node.domain for node in fused.model.graph.node} == {""}
    assert not [note for note in fused.notes if "constant in the export" in note]


def test_wrong_formula_is_found_by_the_comparison_with_pytorch():
    fusenms.register_operator(swish, lambda op, x, beta: op.Mul(x, op.Sigmoid(x)))
    with pytest.raises(SourceError, match="differs from PyTorch"):
        fusenms.fuse(Detector(swished), **SETTINGS)


@pytest.mark.parametrize(("function", "operator"), [(swished, swish), (by_numpy, ByNumpy)], ids=["library", "function"])
def test_doctor_names_a_wrong_formula_where_it_is_called(function, operator):
    fusenms.register_operator(operator, lambda op, x, k: op.Mul(x, 3.0))
    (finding,) = fusenms.doctor(Net(function).eval(), EXAMPLE).findings
    assert (finding.kind, finding.line) == ("unsupported-operator", last_line(function))
    assert "is registered" in finding.message
    assert "register_operator" in finding.remedy


def test_error_when_an_export_does_not_depend_on_the_image():
    with pytest.raises(
        SourceError,
        match=r"does not depend on the image, which the network does; constant in the export: test_operators\.py",
    ):
        fusenms.fuse(Detector(by_numpy), **SETTINGS)


# Operators that nothing here runs.


@pytest.mark.parametrize("backend", BACKENDS)
def test_plugin_is_carried_through_and_never_called_verified(backend, tmp_path):
    fusenms.register_operator(swish, PLUGIN, shape=lambda x, beta: x.shape)
    fused = fusenms.fuse(Detector(swished), backend=backend, unverified=True, **SETTINGS)
    assert fused.report is None
    assert "not compared with PyTorch, because nothing here runs com.example::Plugin" in fused.notes[0]
    assert re.search(
        r"not verified: nothing here runs com.example::Plugin; only what comes after the head .* 0 mismatches",
        fused.notes[-1],
    )
    with pytest.raises(ConfigError, match="was not verified"):
        fused.save(tmp_path / "plugin.onnx")
    path = fused.save(tmp_path / "plugin.onnx", unverified=True)
    model = onnx.load(path)
    assert {entry.key: entry.value for entry in model.metadata_props}[contract.KEY_VERIFICATION] == contract.UNVERIFIED
    (node,) = (node for node in model.graph.node if node.domain == "com.example")
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    declared = {entry.name: entry.type.tensor_type for entry in inferred}[node.output[0]]
    assert (declared.elem_type, len(declared.shape.dim), declared.shape.dim[1].dim_value) == (
        onnx.TensorProto.FLOAT,
        4,
        3,
    )
    behind = next(one for one in model.graph.node if node.output[0] in one.input)  # inferred through the node
    assert len({entry.name: entry for entry in inferred}[behind.output[0]].type.tensor_type.shape.dim) == 4
    with pytest.raises(UnsupportedOperatorError, match=PLUGIN):
        fusenms.verify(path)


def test_error_when_a_plugin_is_to_be_verified():
    fusenms.register_operator(swish, PLUGIN, shape=lambda x, beta: x.shape)
    with pytest.raises(
        UnsupportedOperatorError, match=f"nothing here runs {PLUGIN}, so that the result cannot be verified"
    ):
        fusenms.fuse(Detector(swished), **SETTINGS)
    with pytest.raises(UnsupportedOperatorError, match="leave strict out"):
        fusenms.fuse(Detector(swished), unverified=True, strict=True, **SETTINGS)


def test_error_when_an_operator_of_another_domain_is_not_declared():
    fusenms.register_operator(swish, PLUGIN)
    with pytest.raises(
        UnsupportedOperatorError, match=r"no operator com.example::Plugin .* custom_ops='LIB'.* declare it with"
    ):
        fusenms.fuse(Detector(swished), unverified=True, **SETTINGS)


def test_doctor_says_that_nothing_runs_a_plugin():
    fusenms.register_operator(swish, PLUGIN)
    (finding,) = fusenms.doctor(Net(swished).eval(), EXAMPLE).findings
    assert (finding.kind, finding.line) == ("unsupported-operator", last_line(swished))
    assert "operators_tests::swish becomes com.example::Plugin" in finding.message
    fusenms.register_operator(swish, PLUGIN, shape=lambda x, beta: x.shape)
    found = fusenms.doctor(Net(swished).eval(), EXAMPLE)
    assert not found.findings
    assert found.dynamic["batch"] == "not run: nothing here runs com.example::Plugin"


def test_raw_file_with_a_plugin_is_fused_with_a_layout(tmp_path):
    fusenms.register_operator(swish, PLUGIN, shape=lambda x, beta: x.shape)
    raw = fusenms.load(Detector(swished), example=EXAMPLE, layout=LAYOUT)
    onnx.save(raw.model, tmp_path / "raw.onnx")
    with pytest.raises(UnsupportedOperatorError, match=PLUGIN):
        fusenms.fuse(tmp_path / "raw.onnx")
    with pytest.raises(UnsupportedOperatorError, match=PLUGIN):
        fusenms.fuse(tmp_path / "raw.onnx", layout=LAYOUT)
    fused = fusenms.fuse(tmp_path / "raw.onnx", layout=LAYOUT, unverified=True)
    assert fused.report is None
    assert "not verified" in fused.notes[-1]


def test_broken_tail_behind_a_plugin_is_found(monkeypatch):
    """What comes after the head is still compared with the reference."""
    from fusenms import pipeline
    from fusenms.errors import VerificationError

    fusenms.register_operator(swish, PLUGIN, shape=lambda x, beta: x.shape)
    build = pipeline.fuse_head

    def broken(*given):
        fused = build(*given)
        for node in fused.model.graph.node:
            if node.op_type == "NonMaxSuppression":
                del node.input[3:]
        return fused

    monkeypatch.setattr(pipeline, "fuse_head", broken)
    with pytest.raises(VerificationError):
        fusenms.fuse(Detector(swished), unverified=True, **SETTINGS)


@pytest.mark.parametrize(
    "exporter",
    [torchscript, pytest.param(torch_export, marks=pytest.mark.thorough)],
    ids=["torchscript", "torch_export"],
)
def test_declared_sizes_that_change_are_open(exporter):
    """A declared shape gives fixed sizes where they do not follow from the batch or from the image."""
    fusenms.register_operator(swish, PLUGIN, shape=lambda x, beta: (x.shape[0], 5, 7), dtype=torch.int32)
    model = exporter(Net(lambda x: swish(x, 2.0)).eval(), (torch.rand(2, 3, 32, 32),))
    declared = model.graph.output[0].type.tensor_type
    assert [dim.dim_value for dim in declared.shape.dim] == [0, 5, 7]
    assert declared.elem_type == onnx.TensorProto.INT32


# torchvision, where it is installed.


def test_operators_of_torchvision():
    ops = pytest.importorskip("torchvision.ops", exc_type=Exception)

    class Deformed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.offset, self.deform = nn.Conv2d(3, 18, 3, 1, 1), ops.DeformConv2d(3, 8, 3, padding=1)

        def forward(self, x):
            return self.deform(x, self.offset(x))

    class Aligned(nn.Module):
        def forward(self, x):
            numbers = torch.arange(x.shape[0]).float()[:, None]
            rows = torch.cat([numbers, torch.tensor([[2.0, 3, 40, 50]]).expand(x.shape[0], 4)], 1)
            return ops.roi_align(x, rows, (4, 4), 1.0, 2, True)

    class Suppressed(nn.Module):
        def forward(self, x):
            return x[:, :, ops.nms(x[0, 0, :, :4], x[0, 0, :, 4], 0.5)]

    def deform(op, x, weight, offset, mask, bias, *numbers):
        high, wide, top, left, down, across, groups, offset_groups, masked = numbers
        return op.DeformConv(
            x, weight, offset, bias, mask if masked else None, strides=[high, wide], pads=[top, left, top, left],
            dilations=[down, across], group=groups, offset_group=offset_groups,
        )  # fmt: skip

    assert fusenms.doctor(Aligned(), EXAMPLE)
    (finding,) = fusenms.doctor(Aligned(), EXAMPLE, opset=13).findings
    assert "opset=16" in finding.remedy
    (finding,) = fusenms.doctor(Suppressed(), EXAMPLE).findings
    assert (finding.kind, finding.file) == ("nms-inside", __file__)
    (finding,) = fusenms.doctor(Deformed(), EXAMPLE).findings
    assert finding.file == __file__
    assert "has it at opset 20: opset=20" in finding.remedy
    fusenms.register_operator("torchvision::deform_conv2d", deform)
    assert fusenms.doctor(Deformed(), EXAMPLE, opset=20)
