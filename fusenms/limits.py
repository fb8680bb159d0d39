"""Bounds on what fusenms reads. Every limit on files of unknown origin is defined here."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fusenms.errors import ConfigError

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Bounds on files of unknown origin. A file that exceeds one is refused before it costs more than the bound.

    >>> Limits(max_file_bytes=100 * 2**20).max_modules
    10000

    Attributes:
        max_file_bytes: size of a checkpoint, an ONNX file or one file of external data, in bytes.
        max_archive_entries: entries of a checkpoint's zip archive.
        max_inflation: total uncompressed size of the archive's entries, as a multiple of the file size (beyond 16 MiB).
        max_pickle_bytes: size of the pickle in a checkpoint, in bytes.
        max_opcodes: instructions of that pickle.
        max_nesting: depth of nested containers, modules and subgraphs, in checkpoints, metadata and graphs.
        max_modules: layers of a network; a shared layer counts once for each use.
        max_parameters: weights of a network, counted in the same way.
        max_operations: operators that a checkpoint's network runs on one image.
        max_flops_per_pixel: floating-point operations of a checkpoint's network per input pixel.
        max_tensor_elements: elements of one tensor, stored or computed.
        max_channels: channels of one layer.
        max_repeats: kernel size, stride, padding and repeats of one layer.
        max_class_names: number of class names.
        max_name_length: characters of one class name.
        max_image_side: height or width that a file requests as its input size, in pixels.
        max_nodes: nodes of an ONNX graph, including its subgraphs.
        max_metadata_bytes: total size of a file's metadata, in bytes.
        max_run_seconds: time for one run of a graph of unknown origin, in seconds.
        max_image_file_bytes: size of an image file, in bytes.
        max_pixels: height times width of an image, read from its header before it is decoded.
        max_isolated_bytes: data memory of a child process of ``isolate``, in bytes (Linux).
        max_isolated_seconds: run time of that child process, in seconds.
        max_run_operations: multiplications and results of one run of an ONNX graph at its own batch size (or 1), if shapes are known.

    Example:
        >>> from fusenms import Limits
        >>> Limits(max_file_bytes=10**9).max_file_bytes
        1000000000
    """

    max_file_bytes: int = 4096 * MIB
    max_archive_entries: int = 20_000
    max_inflation: int = 20
    max_pickle_bytes: int = 32 * MIB
    max_opcodes: int = 1_000_000
    max_nesting: int = 64
    max_modules: int = 10_000
    max_parameters: int = 400_000_000
    max_operations: int = 40_000
    max_flops_per_pixel: int = 5_000_000
    max_tensor_elements: int = 200_000_000
    max_channels: int = 65_536
    max_repeats: int = 128
    max_class_names: int = 20_000
    max_name_length: int = 200
    max_image_side: int = 4096
    max_nodes: int = 100_000
    max_metadata_bytes: int = 8 * MIB
    max_run_seconds: float = 120.0
    max_image_file_bytes: int = 256 * MIB
    max_pixels: int = 100_000_000
    max_isolated_bytes: int = 4096 * MIB
    max_isolated_seconds: float = 600.0
    max_run_operations: int = 20_000_000_000_000

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ConfigError(f"{field.name} is {value!r}; expected a positive number")


DEFAULT_LIMITS = Limits()
