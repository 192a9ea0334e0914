"""`gpt2-fast info`: what was built, what this machine runs of it, and what a model is."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import terminal
from .config import PUBLISHED, GPT2Config

_MAX_CARD = 1 << 16  # bytes of a model card that are read for its front matter

#: Names that mean a published model, to its shape: nothing has to be downloaded to describe them.
_NAMED = {
    "gpt2": PUBLISHED["124M"],
    "gpt2-medium": PUBLISHED["355M"],
    "gpt2-large": PUBLISHED["774M"],
    "gpt2-xl": PUBLISHED["1558M"],
    "distilgpt2": GPT2Config(n_layer=6),
    **PUBLISHED,
}
_OPENAI_CARD = {
    "card": "https://github.com/openai/gpt-2/blob/master/model_card.md",
    "licence": "Modified MIT, https://github.com/openai/gpt-2/blob/master/LICENSE",
    "source_texts": "WebText: pages linked from Reddit before 2018; never published",
}
_DISTIL_CARD = {
    "card": "https://huggingface.co/distilbert/distilgpt2",
    "licence": "Apache-2.0",
    "source_texts": "OpenWebText, with OpenAI's 124M as the teacher",
}


def build_facts() -> dict[str, Any]:
    """The build and the machine: what `gpt2-fast info --json` writes without a model."""
    from . import _C

    build = _C.build_info()
    threads, why = _threads(_C.available_threads())
    return {
        "version": build["version"],
        "compiler": build["compiler"],
        "build_type": build["build_type"],
        "cuda": build["cuda"],
        "device_note": build["cuda_note"],
        **_cuda_devices(),
        "isas_compiled": list(build["isas_compiled"]),
        "isas": _C.isas(),
        "isa": _C.default_isa(),
        "isa_forced": bool(os.environ.get("GPT2_FAST_ISA")),
        "threads": threads,
        "threads_why": why,
        "memory_available": _C.available_memory(),
    }


def _cuda_devices() -> dict[str, Any]:
    """The CUDA devices, or in words why there is none."""
    from . import _C
    from .errors import DeviceError

    try:
        return {"cuda_devices": _C.cuda_devices(), "cuda_missing": None}
    except DeviceError as error:
        return {"cuda_devices": [], "cuda_missing": str(error)}


def model_facts(name: str) -> dict[str, Any]:
    """What a model is and takes, without loading it.

    Args:
        name: as in `GPT2.from_pretrained`.

    Returns:
        Shape, parameters, bytes per precision (as `gpt2_fast.plan` says, for one sequence), files,
        the prepared file if there is one, and what its card says. Of a published name that is no
        folder here: what is published.

    Raises:
        ParameterError, CheckpointError, DownloadError: as in `GPT2.from_pretrained`.
    """
    from .checkpoints.hub import resolve

    if name in _NAMED and not Path(name).is_dir():
        config = _NAMED[name]
        card: dict[str, str | None] = dict(_DISTIL_CARD if name == "distilgpt2" else _OPENAI_CARD)
        files: dict[str, Any] = dict.fromkeys(("folder", "format", "stored_as", "prepared"))
    else:
        folder = resolve(name)
        config, files = _folder_facts(folder)
        card = _card(folder)
    return {
        "name": name,
        "parameters": config.parameters,
        "config": config.to_dict(),
        "plan": _plans(config, files),
        **files,
        **card,
    }


def _folder_facts(folder: Path) -> tuple[GPT2Config, dict[str, Any]]:
    """Shape and files of a folder, from their headers."""
    from .checkpoints import open_checkpoint
    from .checkpoints.folder import holds_ordinary, holds_prepared
    from .checkpoints.prepared import PreparedFile

    facts: dict[str, Any] = {"folder": str(folder), "prepared": None}
    if holds_prepared(folder):
        file = PreparedFile(folder)
        file.close()
        facts["prepared"] = {
            "precision": file.precision,
            "layout": file.layout,
            "bytes": file.nbytes,
        }
        if not holds_ordinary(folder):
            return file.config, facts | {"format": "prepared", "stored_as": [file.precision]}
    with open_checkpoint(folder) as checkpoint:
        stored = sorted({view.dtype for view in checkpoint.tensors.values()})
        return checkpoint.config, facts | {"format": checkpoint.format, "stored_as": stored}


def write_info(model: str | None, *, as_json: bool) -> None:
    """Write the facts of the build, and of `model` if one is named."""
    facts = build_facts()
    if model is not None:
        facts["model"] = model_facts(model)
    if as_json:
        terminal.json_line(facts)
        return
    terminal.pairs(_build_lines(facts))
    if model is not None:
        terminal.line()
        terminal.pairs(_model_lines(facts["model"]))


def _threads(count: int) -> tuple[int, str]:
    """How many threads run, and what decided it."""
    if os.environ.get("GPT2_FAST_THREADS"):
        return count, "GPT2_FAST_THREADS"
    processors = os.cpu_count() or 1
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        allowed = processors
    if count < allowed:
        return count, f"the container's processor quota; {allowed} processors are allowed"
    if allowed < processors:
        return count, f"the affinity mask, of {processors} processors"
    return count, "all processors"


def _plans(config: GPT2Config, files: dict[str, Any]) -> dict[str, dict[str, int]]:
    from .device import PRECISIONS
    from .model import plan

    possible = files["stored_as"] if files["format"] == "prepared" else PRECISIONS["cpu"]
    plans = {precision: plan(config, precision=precision, max_batch=1) for precision in possible}
    return {name: {**asdict(sizes), "total": sizes.total} for name, sizes in plans.items()}


def _card(folder: Path) -> dict[str, str | None]:
    """Where the model card lies and what its front matter says of licence and texts."""
    for name in ("MODEL_CARD.md", "README.md"):
        try:
            with (folder / name).open("rb") as file:
                text = file.read(_MAX_CARD).decode(errors="replace")
        except OSError:
            continue
        fields = _front_matter(text)
        return {
            "card": str(folder / name),
            "licence": fields.get("license"),
            "source_texts": fields.get("source_texts"),
        }
    return {"card": None, "licence": None, "source_texts": None}


def _front_matter(text: str) -> dict[str, str]:
    """The plain `key: value` lines between the first two lines of three dashes.

    Source: Hugging Face, "Model Cards", metadata section. Lists and nested fields are not read.
    """
    lines = text.splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    fields: dict[str, str] = {}
    for line in lines[1:]:
        if line.rstrip() == "---":
            return fields
        key, colon, value = line.partition(":")
        if colon and value.strip() and key == key.strip():
            fields[key] = value.strip().strip("\"'")
    return {}  # it never ended


def _device_line(device: dict[str, Any]) -> str:
    major, minor = device["capability"]
    return (
        f"cuda:{device['index']} {device['name']}, capability {major}.{minor}, "
        f"{device['multiprocessors']} multiprocessors, {terminal.size(device['memory_bytes'])}"
    )


def _build_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    why = "GPT2_FAST_ISA" if facts["isa_forced"] else "the best this machine runs"
    return [
        ("gpt2-fast", f"{facts['version']}, {facts['build_type']}, {facts['compiler']}"),
        ("device", facts["device_note"]),
        *(("CUDA device", _device_line(device)) for device in facts["cuda_devices"]),
        *(
            [("CUDA device", facts["cuda_missing"])]
            if facts["cuda"] and facts["cuda_missing"]
            else []
        ),
        ("compiled for", " ".join(facts["isas_compiled"])),
        ("this machine runs", " ".join(facts["isas"])),
        ("in use", f"{facts['isa']} ({why})"),
        ("threads", f"{facts['threads']} ({facts['threads_why']})"),
        ("memory available", terminal.size(facts["memory_available"])),
    ]


def _model_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    config = GPT2Config(**facts["config"])
    where = facts["folder"] or "not looked up: the name of a published model"
    stored = f" ({facts['format']}, {' '.join(facts['stored_as'])})" if facts["folder"] else ""
    shape = (
        f"{config.n_layer} layers, width {config.n_embd}, {config.n_head} heads, "
        f"context {config.n_ctx}, vocabulary {config.vocab_size}"
    )
    memory = [
        (
            f"memory, {precision}",
            ", ".join(
                [
                    f"{terminal.size(sizes['total'])}: weights {terminal.size(sizes['weights'])}",
                    f"cache of one full sequence {terminal.size(sizes['cache'])}",
                    f"scratch {terminal.size(sizes['scratch'])}",
                ]
            ),
        )
        for precision, sizes in facts["plan"].items()
    ]
    prepared = []
    if file := facts["prepared"]:
        size = terminal.size(file["bytes"])
        prepared = [("prepared", f"{file['precision']}, layout {file['layout']}, {size}")]
    return [
        ("model", facts["name"]),
        ("parameters", f"{terminal.count(facts['parameters'])} ({facts['parameters']:,})"),
        ("shape", shape),
        *memory,
        ("files", where + stored),
        *prepared,
        ("model card", facts["card"] or "none in this folder"),
        ("licence", facts["licence"] or "not stated in this folder"),
        ("source texts", facts["source_texts"] or "not stated in this folder"),
    ]
