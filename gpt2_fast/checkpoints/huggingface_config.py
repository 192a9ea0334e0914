"""`config.json` of a Hugging Face GPT-2 <-> GPT2Config.

Source of the names and defaults: transformers, configuration_gpt2.py.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from gpt2_fast.config import GPT2Config
from gpt2_fast.errors import CheckpointError, ParameterError

from .strict_json import read_object

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_CONFIG_LIMIT = 1 << 20

#: Names under which the tanh form of GELU goes, GPT-2's only activation.
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")

# Field of GPT2Config -> names in config.json, the first of which counts if several agree. Newer
# files may use the generic names; n_ctx sized nothing but a mask, n_positions sizes wpe.
_SIZES = {
    "n_layer": ("n_layer", "num_hidden_layers"),
    "n_embd": ("n_embd", "hidden_size"),
    "n_head": ("n_head", "num_attention_heads"),
    "vocab_size": ("vocab_size",),
    "n_ctx": ("n_positions", "max_position_embeddings"),
}
_SWITCHES = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
_DEFAULT_EOS = 50256


def read_config(path: Path) -> GPT2Config:
    """The model's shape from a `config.json`; fields with no part in its mathematics are ignored.

    Raises:
        CheckpointError: the file is not strict JSON, is for another model, lacks a size, or has a
            field of the wrong type or range. Names the field, what was wanted and what came.
    """
    fields = read_object(path, _CONFIG_LIMIT)
    model_type = fields.get("model_type", "gpt2")
    if model_type != "gpt2":
        raise CheckpointError(f"{path}: model_type: wanted 'gpt2', found {_shown(model_type)}")
    activation = fields.get("activation_function", TANH_GELU[0])
    if activation not in TANH_GELU:
        raise CheckpointError(
            f"{path}: activation_function: wanted one of {', '.join(TANH_GELU)}, "
            f"found {_shown(activation)}"
        )
    # Changes the order of two roundings in half precision, not the mathematics.
    _switch(fields, "reorder_and_upcast_attn", usual=False, path=path)
    values: dict[str, Any] = {name: _size(fields, name, path) for name in _SIZES}
    values |= {name: _switch(fields, name, usual, path) for name, usual in _SWITCHES.items()}
    values["n_inner"] = None if fields.get("n_inner") is None else _integer(fields, "n_inner", path)
    values["layer_norm_epsilon"] = _number(fields, "layer_norm_epsilon", 1e-5, path)
    values["eos_token_id"] = _eos(fields, values["vocab_size"], path)
    try:
        return GPT2Config(**values)
    except ParameterError as error:
        raise CheckpointError(f"{path}: {error}") from error


def config_fields(config: GPT2Config) -> dict[str, Any]:
    """What `config.json` says about a model, for files that we write."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.n_ctx,
        "n_ctx": config.n_ctx,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.n_inner,
        "activation_function": TANH_GELU[0],
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "scale_attn_weights": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.eos_token_id,
        "eos_token_id": config.eos_token_id,
    }


def _size(fields: Mapping[str, Any], name: str, path: Path) -> int:
    present = [stored for stored in _SIZES[name] if stored in fields]
    if name == "n_ctx" and not present and "n_ctx" in fields:
        present = ["n_ctx"]
    if not present:
        raise CheckpointError(f"{path}: {_SIZES[name][0]} is missing")
    found = [_integer(fields, stored, path) for stored in present]
    if len(set(found)) > 1:
        raise CheckpointError(f"{path}: {present[0]} is {found[0]}, but {present[1]} is {found[1]}")
    return found[0]


def _integer(fields: Mapping[str, Any], name: str, path: Path) -> int:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"{path}: {name}: wanted an integer, found {_shown(value)}")
    if abs(value) >= 1 << 63:
        raise CheckpointError(f"{path}: {name}: wanted an integer of at most 63 bits")
    return value


def _number(fields: Mapping[str, Any], name: str, usual: float, path: Path) -> float:
    value = fields.get(name, usual)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"{path}: {name}: wanted a number, found {_shown(value)}")
    return float(_integer(fields, name, path)) if isinstance(value, int) else value


def _switch(fields: Mapping[str, Any], name: str, usual: bool, path: Path) -> bool:
    value = fields.get(name, usual)
    if not isinstance(value, bool):
        raise CheckpointError(f"{path}: {name}: wanted true or false, found {_shown(value)}")
    return value


def _eos(fields: Mapping[str, Any], vocab_size: int, path: Path) -> int | None:
    """The token that ends a document. A default left over from a larger vocabulary counts as none:
    the model cannot produce it, and transformers loads such files without a word."""
    if fields.get("eos_token_id", _DEFAULT_EOS) is None:
        return None
    value = _integer({"eos_token_id": _DEFAULT_EOS, **fields}, "eos_token_id", path)
    if value < 0:
        raise CheckpointError(f"{path}: eos_token_id: wanted null or a token id, found {value}")
    if value < vocab_size:
        return value
    if "eos_token_id" in fields:
        warnings.warn(
            f"{path}: eos_token_id {value} lies outside the vocabulary of {vocab_size}; "
            "this model has no end token",
            stacklevel=2,
        )
    return None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
