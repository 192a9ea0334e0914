"""Model files on disk: which format a folder holds, and how to read it without running it."""

from __future__ import annotations

from .base import Checkpoint, MappedFile, TensorView

__all__ = ["Checkpoint", "MappedFile", "TensorView"]
