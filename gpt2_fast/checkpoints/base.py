"""What every checkpoint format is turned into: a validated `Checkpoint` of mapped tensors.

Nothing here copies weights. A reader finds out where each tensor lies in a file, `Checkpoint`
compares that with what the configuration needs, and only then does anybody touch the data. numpy
is imported where arrays are made: a prepared file needs none, and the import takes as long as
loading one.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from math import prod
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

from gpt2_fast.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Self

    from gpt2_fast.config import GPT2Config

#: Stored element types a tensor may have -> bytes of one, and the numpy type its bytes are read as.
#: BF16 has no numpy type; its bits are handed on as uint16.
ELEMENT_TYPES: Mapping[str, tuple[int, str]] = MappingProxyType(
    {"F64": (8, "<f8"), "F32": (4, "<f4"), "F16": (2, "<f2"), "BF16": (2, "<u2")}
)


def _open_regular(path: Path) -> int:
    """A read-only descriptor of a regular file; anything else is refused without waiting for it.

    O_NONBLOCK lets a FIFO be opened, seen for what it is and closed, instead of waiting for its
    writer for ever.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise CheckpointError(f"{path}: cannot be opened: {error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: wanted a regular file, found something else")
    return descriptor


def read_bytes(path: Path, limit: int, count: int | None = None) -> bytes:
    """The whole of a small regular file, or its first `count` bytes.

    Raises:
        CheckpointError: it cannot be read, is not a regular file, or holds more than `limit` bytes.
    """
    descriptor = _open_regular(path)
    with os.fdopen(descriptor, "rb") as stream:
        try:
            size = os.fstat(descriptor).st_size
            if size > limit:
                raise CheckpointError(f"{path}: wanted at most {limit} bytes, found {size}")
            return stream.read(size if count is None else min(size, count))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error


class MappedFile:
    """A regular file mapped read-only, which notices when the file changes underneath.

    Attributes:
        path: the file, for messages.
        size: its length in bytes when it was opened.

    Raises:
        CheckpointError: the file is missing, empty, unreadable or not a regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._map: mmap.mmap | None = None
        self._descriptor = _open_regular(path)
        state = os.fstat(self._descriptor)
        self.size = state.st_size
        self._modified = state.st_mtime_ns
        if not self.size:
            self.close()
            raise CheckpointError(f"{path}: the file is empty")

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset`, copied.

        Raises:
            CheckpointError: they lie outside the file, or it cannot be read or has changed.
        """
        self._require(offset, count)
        descriptor = self._check_unchanged()
        data = bytearray()
        try:
            while len(data) < count:
                piece = os.pread(descriptor, count - len(data), offset + len(data))
                if not piece:
                    raise CheckpointError(
                        f"{self.path}: wanted {count} bytes at offset {offset}, found {len(data)}"
                    )
                data += piece
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error}") from error
        return bytes(data)

    def descriptor(self) -> int:
        """The open file's descriptor, which stays this object's; for readers in native code.

        Raises:
            CheckpointError: the file has changed since it was opened, or was closed.
        """
        return self._check_unchanged()

    def array(self, dtype: np.dtype[Any], offset: int, count: int) -> npt.NDArray[Any]:
        """`count` elements from byte `offset`: a read-only view of the mapped file, no copy.

        A page of a mapped file that has been cut off kills the process when it is touched, so the
        file's length and time of change are compared with those at opening on every call.
        """
        import numpy as np

        self._require(offset, count * dtype.itemsize)
        descriptor = self._check_unchanged()
        if self._map is None:
            try:
                self._map = mmap.mmap(descriptor, self.size, access=mmap.ACCESS_READ)
            except (OSError, ValueError, OverflowError) as error:
                raise CheckpointError(f"{self.path}: cannot be mapped: {error}") from error
        return np.frombuffer(self._map, dtype, count, offset)

    def release(self, offset: int, count: int) -> None:
        """Drop the pages of these bytes from resident memory; touching them reads them again."""
        if self._map is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        first = offset - offset % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, first, offset + count - first)

    def close(self) -> None:
        """Let go of the file. Arrays that are still in use keep their mapping alive."""
        mapped, self._map = self._map, None
        if mapped is not None:
            with contextlib.suppress(BufferError):  # then the last array that looks into it unmaps
                mapped.close()
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()

    def _require(self, offset: int, count: int) -> None:
        if offset < 0 or count < 0 or offset + count > self.size:
            raise CheckpointError(
                f"{self.path}: bytes {offset}..{offset + count} lie outside the file of "
                f"{self.size} bytes"
            )

    def _check_unchanged(self) -> int:
        if self._descriptor is None:
            raise CheckpointError(f"{self.path}: read after the checkpoint was closed")
        state = os.fstat(self._descriptor)
        if state.st_size != self.size or state.st_mtime_ns != self._modified:
            raise CheckpointError(
                f"{self.path}: changed while it was being read: {self.size} bytes when opened, "
                f"{state.st_size} now"
            )
        return self._descriptor


class TensorView:
    """One tensor inside a mapped file.

    Attributes:
        name: its canonical name.
        dtype: "F32", "F16" or "BF16": the type of `array`.
        shape: sizes, slowest dimension first.
        stored_name: what the file calls it, for messages.

    Raises:
        CheckpointError: the stored type is not a floating-point type that can be read, or the bytes
            do not lie inside the file.
    """

    def __init__(
        self,
        name: str,
        stored_dtype: str,
        shape: Sequence[int],
        source: MappedFile,
        offset: int,
        *,
        stored_name: str | None = None,
    ) -> None:
        self.name = name
        self.stored_name = name if stored_name is None else stored_name
        self.shape = tuple(shape)
        self._source = source
        self._offset = offset
        self._stored_dtype = stored_dtype
        if stored_dtype not in ELEMENT_TYPES:
            raise CheckpointError(
                f"{source.path}: tensor {self.stored_name}: wanted one of "
                f"{', '.join(ELEMENT_TYPES)}, found {stored_dtype}"
            )
        self._item_bytes, self._element = ELEMENT_TYPES[stored_dtype]
        if any(size < 0 for size in self.shape) or not 0 <= offset <= source.size - self.nbytes:
            raise CheckpointError(
                f"{source.path}: tensor {self.stored_name}: shape {list(self.shape)} at byte "
                f"{offset} does not fit into the file of {source.size} bytes"
            )

    @property
    def dtype(self) -> str:
        """The type of `array`: "F32" (also for stored F64), "F16" or "BF16"."""
        return "F32" if self._stored_dtype == "F64" else self._stored_dtype

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        return prod(self.shape) * self._item_bytes

    @property
    def path(self) -> Path:
        """The file it lies in."""
        return self._source.path

    @property
    def array(self) -> npt.NDArray[Any]:
        """Read-only values of `shape`: float32, float16, or uint16 holding the bits of BF16.

        A view of the mapped file where the bytes are aligned for their type, else a copy; stored
        F64 is rounded to float32 (values beyond its range become infinite). Take it, use it, let it
        go, and call `release`.

        Raises:
            CheckpointError: the file changed since it was opened, or was closed.
        """
        return self.rows(0, self.shape[0]) if self.shape else self._read(0, 1).reshape(())

    def rows(self, first: int, last: int) -> npt.NDArray[Any]:
        """Like `array`, for the rows first..last-1 of the slowest dimension only."""
        width = prod(self.shape[1:])
        flat = self._read(first * width, (last - first) * width)
        return flat.reshape((last - first, *self.shape[1:]))

    def float32(self) -> npt.NDArray[np.float32]:
        """A copy of the values as float32, exact for every stored type but F64."""
        return widen(self.array)

    def first_rows(self, rows: int) -> TensorView:
        """The same tensor with only its first `rows` rows."""
        return self._like(self.name, (rows, *self.shape[1:]))

    def renamed(self, name: str) -> TensorView:
        """The same tensor under another canonical name."""
        return self._like(name, self.shape)

    def _like(self, name: str, shape: tuple[int, ...]) -> TensorView:
        return TensorView(
            name,
            self._stored_dtype,
            shape,
            self._source,
            self._offset,
            stored_name=self.stored_name,
        )

    def release(self) -> None:
        """Drop the tensor's mapped pages from resident memory; using it again reads the file."""
        self._source.release(self._offset, self.nbytes)

    def __repr__(self) -> str:
        return f"TensorView({self.name!r}, {self.dtype}, {list(self.shape)}, {self.path.name!r})"

    def _read(self, first: int, count: int) -> npt.NDArray[Any]:
        import numpy as np

        offset = self._offset + first * self._item_bytes
        values = self._source.array(np.dtype(self._element), offset, count)
        if self._stored_dtype == "F64":
            with np.errstate(over="ignore"):
                values = values.astype(np.float32)
        elif not values.flags.aligned:
            values = values.copy()
        values.flags.writeable = False
        return values


def widen(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """float32 copy of what `TensorView.array` gives (uint16 means the upper half of a float32)."""
    import numpy as np

    if values.dtype == np.uint16:
        bits = values.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return values.astype(np.float32)


def validate_tensors(
    config: GPT2Config, tensors: Mapping[str, TensorView], folder: Path
) -> dict[str, TensorView]:
    """The tensors that `config` needs, in its order, after each was found with the right shape.

    Raises:
        CheckpointError: one is missing or has another shape; the message names it.
    """
    shapes = config.tensor_shapes()
    missing = [name for name in shapes if name not in tensors]
    if missing:
        shown = ", ".join(missing[:4]) + (" ..." if len(missing) > 4 else "")
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shapes)} tensors are missing: {shown}"
        )
    for name, wanted in shapes.items():
        view = tensors[name]
        if view.shape != wanted:
            turned = len(wanted) == 2 and view.shape == wanted[::-1]
            hint = " (transposed: linear weights are stored [in, out])" if turned else ""
            raise CheckpointError(
                f"{view.path}: tensor {view.stored_name}: wanted shape {list(wanted)}, "
                f"found {list(view.shape)}{hint}"
            )
    return {name: tensors[name] for name in shapes}


class Checkpoint:
    """A model on disk, checked against its configuration; a context manager.

    Attributes:
        config: the model's shape.
        tensors: canonical name -> TensorView, exactly the names of `config.tensor_shapes()`.
        folder: where it was read from.
        format: "huggingface" or "openai".

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape. The files are closed then.
    """

    def __init__(
        self,
        config: GPT2Config,
        tensors: Mapping[str, TensorView],
        folder: Path,
        format_name: str,
        files: Sequence[MappedFile] = (),
    ) -> None:
        self.config = config
        self.folder = folder
        self.format = format_name
        self._files = tuple(files)
        try:
            checked = validate_tensors(config, tensors, folder)
        except CheckpointError:
            self.close()
            raise
        self.tensors: Mapping[str, TensorView] = MappingProxyType(checked)

    def close(self) -> None:
        """Close the files. Arrays that were taken out before stay valid."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
