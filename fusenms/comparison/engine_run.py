"""`EngineRun`: an engine on a GPU, of which only the outputs can be read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fusenms.comparison.runs import FLOAT16, IMAGES, Place, Read
from fusenms.engines.base import Engine
from fusenms.engines.running import LIBRARIES, EngineRunner
from fusenms.errors import SourceError


class EngineRun:
    """An engine as a `Run`. Engines compute in TF32 or float16, which have the same unit roundoff."""

    jitters = False
    unit = FLOAT16

    def __init__(self, path: Path, engine: Engine) -> None:
        """Open an engine on this machine's GPU.

        Raises:
            SourceError: it was built by an unknown builder, or does not run at its usual shape.
            BackendUnavailableError: the engine cannot run on this machine.
        """
        builder = engine.info["builder"]["name"]
        if builder not in LIBRARIES:
            raise SourceError(f"{path}: was built by {builder}; expected {' or '.join(LIBRARIES)}")
        self.source = str(path)
        self._runner = EngineRunner(engine, LIBRARIES[builder]())
        usual = next(iter(engine.info["inputs"].values()))["opt"]
        self._batch = engine.info["inputs"][next(iter(engine.info["inputs"]))]["min"][0]
        self.size = int(usual[2]), int(usual[3])
        found = self.infer(np.full((1, 3, *self.size), 0.5, np.float32))
        self.places = [Place(number=IMAGES, name="images")]
        self.places += [
            Place(number=i + 1, name=name, operator="engine", inputs=(IMAGES,)) for i, name in enumerate(found)
        ]
        self.outputs = {place.name: place.number for place in self.places[1:]}
        self.readable = list(self.outputs.values())

    def bytes_of(self, number: int) -> int:
        return 2**20

    def infer(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Run one image ``[1, 3, height, width]`` and return the outputs by name, of that image."""
        found = self._runner.infer(images.repeat(self._batch, 0))
        return {name: value[:1] for name, value in found.items()}

    def reader(self, numbers: Sequence[int], jitter: float = 0.0) -> Read:
        def read(image: np.ndarray) -> list[np.ndarray]:
            found = self.infer(image)
            return [image if number == IMAGES else found[self.places[number].name] for number in numbers]

        return read
