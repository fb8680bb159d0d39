"""The attributes of a layer in a checkpoint: the known ones, and how each is read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fusenms.limits import Limits
from fusenms.sources.torch_modules.fields import Field, shown
from fusenms.sources.torch_modules.layers import StandIn

_HOOKS = frozenset({
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
})  # fmt: skip


_EVERY_MODULE = frozenset({
    "training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_is_full_backward_hook",
    "i", "f", "type", "np",  # trainers add these to each layer
})  # fmt: skip


_UNUSED = frozenset({
    # of layers: arguments of the constructor that the computation does not use
    "c", "c_", "c1", "c2", "g", "deploy", "groups", "id_tensor", "in_channels", "out_channels", "dim", "is_first", "channel", "mean", "std",
    "all_head_dim", "num_layers", "hidden_dim", "d_model", "im2col_step", "embed_dim", "kdim", "vdim", "_qkv_same_embed_dim", "dropout",
    "batch_first", "head_dim", "bias_k", "bias_v", "d",
    # of heads: caches, and settings of training and of the trainer's own export
    "nl", "no", "ne", "nk", "nk_sigma", "npr", "inplace", "anchors", "strides", "shape", "shapes", "valid_mask", "grid", "anchor_grid",
    "max_det", "end2end", "_end2end", "export", "format", "dynamic", "legacy", "include_nms", "concat", "xyxy", "detect", "angle",
    "nhead", "num_decoder_layers", "num_denoising", "label_noise_ratio", "box_noise_scale", "feat_strides",
    # of networks: their description and their training
    "names", "args", "yaml", "yaml_file", "pt_path", "nc", "criterion", "task", "hyp", "class_weights", "gr", "traced", "md", "date",
    "kpt_shape", "kpt_names", "kpt_oks_sigmas", "version", "fp16", "transforms", "overrides", "override",
})  # fmt: skip
"""Attributes in checkpoints that the computation of a stand-in does not use. `names` and `args` are read from the record."""


class Attributes:
    """The attributes of a layer in the file. Each is taken once, with a check. The remaining ones are refused."""

    def __init__(self, state: Mapping[str, Any], where: str, limits: Limits) -> None:
        self._state, self.where, self.limits = state, where, limits
        self._taken = set(_EVERY_MODULE)
        for key in _HOOKS:
            if (hooks := state.get(key)) is not None and hooks != {}:
                raise ValueError(f"{where} carries hooks; expected plain weights")

    def __call__(self, name: str, field: Field, *default: Any) -> Any:
        """The checked value of an attribute, or the default if the layer does not have it.

        Raises:
            ValueError: the value is invalid, or it is missing and there is no default.
        """
        if name not in self._state:
            if default:
                return default[0]
            raise ValueError(f"{self.where} has no attribute {name}")
        try:
            return field(self.take(name), self.limits)
        except ValueError as error:
            raise ValueError(f"{self.where}: {name} {error}") from None

    def has(self, name: str) -> bool:
        """Whether the layer has this attribute."""
        return name in self._state

    def take(self, *names: str) -> Any:
        """The value of the last of these attributes, unchecked."""
        self._taken.update(names)
        return self._state.get(names[-1])

    def refuse_others(self, cls: type[nn.Module]) -> None:
        """Refuse attributes that were not taken.

        Raises:
            ValueError: there is an unknown attribute.
        """
        known = self._taken | _HOOKS | (_UNUSED | cls.parts | set(cls.tensors) if issubclass(cls, StandIn) else set())
        if unknown := [name for name in self._state if name not in known]:
            raise ValueError(
                f"{self.where} has an attribute that fusenms does not know: {shown_name(unknown[0])}. It may change what the layer "
                "computes; pass the .onnx of this model"
            )


def shown_name(name: Any) -> str:
    """The name of an attribute, for a message."""
    return name[:60] if isinstance(name, str) and name.isprintable() else shown(name)
