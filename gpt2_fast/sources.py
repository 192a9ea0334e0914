"""Where a model's parameters come from: a checkpoint or a prepared file, or a generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from .errors import ParameterError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from . import _C
    from .checkpoints import Checkpoint
    from .checkpoints.prepared import PreparedFile
    from .config import GPT2Config

#: Canonical name, stored type ("F32", "F16", "BF16"), array, and what to call when it was read.
Tensor: TypeAlias = "tuple[str, str, npt.NDArray[Any], Callable[[], None]]"


class Source(Protocol):
    """Gives every parameter of one model, as often as it is asked."""

    config: GPT2Config

    def tensors(self) -> Iterator[Tensor]:
        """Each parameter once."""
        ...

    def close(self) -> None:
        """Let go of files."""
        ...


class CheckpointSource:
    """Parameters of an open checkpoint, one at a time, memory-mapped."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = checkpoint.config
        self._checkpoint = checkpoint

    def tensors(self) -> Iterator[Tensor]:
        """Each parameter; its mapped pages leave memory after use."""
        for name, view in self._checkpoint.tensors.items():
            yield name, view.dtype, view.array, view.release

    def close(self) -> None:
        """Close the checkpoint's files."""
        self._checkpoint.close()


class PreparedSource:
    """Packed parameters of a prepared file, which go to the engine as they are."""

    def __init__(self, file: PreparedFile) -> None:
        self.config = file.config
        self._file = file

    def tensors(self) -> Iterator[Tensor]:
        """Raises ParameterError: a prepared file has no parameters by name."""
        raise ParameterError(
            f"{self._file.path}: a prepared file, without the original weights; save_prepared "
            "writes it again, save_pretrained needs the model it was made from"
        )

    def load_into(self, engine: _C.Engine) -> None:
        """Read everything at once, and close the file."""
        self._file.load_into(engine)
        self._file.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class RandomSource:
    """Parameters drawn as GPT-2's were at the start of its training.

    Source: openai/gpt-2, src/model.py: normal with standard deviation 0.02 (0.01 for positions),
    biases zero, norms one. Each tensor has a generator of its own, keyed by its name.
    """

    def __init__(self, config: GPT2Config, seed: int) -> None:
        self.config = config
        self._seed = seed

    def tensors(self) -> Iterator[Tensor]:
        """Each parameter in float32."""
        for name, shape in self.config.tensor_shapes().items():
            yield name, "F32", self._array(name, shape), lambda: None

    def close(self) -> None:
        """Nothing to let go of."""

    def _array(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        import numpy as np

        if len(shape) == 1:
            value = 1.0 if name.endswith(".weight") else 0.0
            return np.full(shape, value, dtype=np.float32)
        key = [self._seed, *name.encode()]
        draws = np.random.Generator(np.random.SFC64(key)).standard_normal(shape, dtype=np.float32)
        draws *= np.float32(0.01 if name == "wpe.weight" else 0.02)
        return draws
