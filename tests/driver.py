"""The parts of the CUDA driver API that tests and benchmarks of the kernels need, through cuda-python."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Grid = tuple[int, int]


class Gpu:
    """The first GPU, in the context that PyTorch and the CUDA runtime also use. Memory is freed by `close`."""

    def __init__(self) -> None:
        """Open the GPU. Raises AssertionError if there is none."""
        self.call("cuInit", 0)
        self.device = self.call("cuDeviceGet", 0)
        self.call("cuCtxSetCurrent", self.call("cuDevicePrimaryCtxRetain", self.device))
        self.stream = self.call("cuStreamCreate", 0)  # waits for the default stream, which fills and copies
        self._places: list[int] = []
        self._modules: list[Any] = []

    @staticmethod
    def call(function: str, *arguments: Any) -> Any:
        """Call the driver, and return its result without the error code."""
        from cuda.bindings import driver

        error, *result = getattr(driver, function)(*arguments)
        assert int(error) == 0, f"{function}: {error}"
        return result[0] if result else None

    def close(self) -> None:
        self.synchronize()
        for place in self._places:
            self.call("cuMemFree", place)
        for module in self._modules:
            self.call("cuModuleUnload", module)
        self._places, self._modules = [], []

    def name(self) -> str:
        return self.call("cuDeviceGetName", 128, self.device).split(b"\0")[0].decode()

    def attribute(self, name: str) -> int:
        """An attribute of the device, such as ``L2_CACHE_SIZE``."""
        from cuda.bindings import driver

        kind = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return self.call("cuDeviceGetAttribute", kind, self.device)

    def allocate(self, size: int) -> int:
        """Allocate ``size`` bytes, fill them with nonzero values, and return their address."""
        place = int(self.call("cuMemAlloc", max(size, 1)))
        self._places.append(place)
        self.call("cuMemsetD8", place, 0xA5, max(size, 1))
        return place

    def upload(self, array: np.ndarray) -> int:
        """Copy an array to the GPU, and return its address."""
        array = np.ascontiguousarray(array)
        place = self.allocate(array.nbytes)
        self.call("cuMemcpyHtoD", place, array.ctypes.data, array.nbytes)
        return place

    def download(self, place: int, shape: Sequence[int], dtype: Any) -> np.ndarray:
        self.synchronize()
        array = np.empty(shape, dtype)
        self.call("cuMemcpyDtoH", array.ctypes.data, place, array.nbytes)
        return array

    def kernels(self, ptx: bytes, *names: str) -> list[Any]:
        """Load a module, and return its kernels with these names."""
        self._modules.append(self.call("cuModuleLoadData", ptx))
        return [self.call("cuModuleGetFunction", self._modules[-1], name.encode()) for name in names]

    def launch(self, kernel: Any, grid: Grid, threads: int, addresses: Sequence[int], *more: Sequence[int]) -> None:
        """Launch a kernel. Its arguments are ``addresses``, then the groups in ``more``, alternately int32 and addresses."""
        groups = (addresses, *more)
        kinds = [ctypes.c_int if i % 2 else ctypes.c_void_p for i, group in enumerate(groups) for _ in group]
        values = [value for group in groups for value in group]
        arguments = (tuple(values), tuple(kinds)) if values else 0
        self.call("cuLaunchKernel", kernel, *grid, 1, threads, 1, 1, 0, self.stream, arguments, 0)

    def synchronize(self) -> None:
        self.call("cuStreamSynchronize", self.stream)

    def graph(self, works: Sequence[Callable[[], None]]) -> Callable[[], None]:
        """Capture the launches of ``works``, in order, as one CUDA graph. Return a function that launches it."""
        from cuda.bindings import driver

        self.call("cuStreamBeginCapture", self.stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        for work in works:
            work()
        graph = self.call("cuStreamEndCapture", self.stream)
        made = self.call("cuGraphInstantiate", graph, 0)
        return lambda: self.call("cuGraphLaunch", made, self.stream)

    def milliseconds(self, work: Callable[[], None]) -> float:
        """Time of the launches of ``work``, measured with CUDA events."""
        start, end = self.call("cuEventCreate", 0), self.call("cuEventCreate", 0)
        self.call("cuEventRecord", start, self.stream)
        work()
        self.call("cuEventRecord", end, self.stream)
        self.call("cuEventSynchronize", end)
        elapsed = self.call("cuEventElapsedTime", start, end)
        for event in (start, end):
            self.call("cuEventDestroy", event)
        return elapsed
