"""Other people's engines beside ours, one file each: `python -m benchmarks.peers` compares them."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from benchmarks.peers.contract import Peer

OURS = "gpt2_fast"
#: Name -> module, in the order of the reports.
MODULES = {
    OURS: "ours",
    "torch": "torch_loop",
    "torch_int8": "torch_int8",
    "transformers": "transformers",
    "transformers_compiled": "transformers_compiled",
    "ctranslate2": "ctranslate2",
    "llama_cpp": "llama_cpp",
    "onnx_runtime": "onnx_runtime",
    "openvino_genai": "openvino_genai",
}
PRECISIONS = ("fp32", "bf16", "int8", "int4")


def find(name: str) -> Peer:
    """The module of an engine.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in MODULES:
        raise ValueError(f"engine must be one of {', '.join(MODULES)}, got {name!r}")
    return cast("Peer", import_module(f"benchmarks.peers.{MODULES[name]}"))


def missing(name: str, precision: str) -> str | None:
    """Why an engine cannot run here in a precision, or None."""
    peer = find(name)
    if precision not in peer.PRECISIONS:
        return f"has no {precision}; it has {', '.join(peer.PRECISIONS)}"
    return peer.missing(precision)


def versions(name: str) -> dict[str, str]:
    """The versions of what an engine is made of, where installed."""
    known = {package: _version(package) for package in find(name).PACKAGES}
    return {package: version for package, version in known.items() if version is not None}


def _version(package: str) -> str | None:
    from importlib import metadata  # 20 ms that no engine's cold start shall wait for

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
