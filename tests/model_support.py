"""Small models for the tests of the whole model: random, or scripted to say what a test wants.

Random parameters are spread over every tensor: biases are not 0, layer norm weights not 1, so that
leaving one out is seen. Each tensor has its own generator, so that large models can be made again,
tensor by tensor, in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file
from torch import Tensor

from gpt2_fast import _C, GPT2, GPT2Config, Tokenizer
from gpt2_fast.checkpoints.huggingface_config import config_fields

if TYPE_CHECKING:
    from gpt2_fast import Generation

Array = npt.NDArray[Any]

BUILTIN = Path(__file__).parent.parent / "gpt2_fast" / "data" / "builtin"
TINY = GPT2Config(n_layer=2, n_embd=24, n_head=3, n_ctx=64, vocab_size=257, eos_token_id=256)


class SpreadSource:
    """Random parameters, one tensor at a time, made again whenever they are asked for.

    Args:
        config: the shape.
        seed: the same values for the same seed.
        spread: standard deviation of every matrix; larger means surer predictions.
        replace: tensors by canonical name that take the place of random ones.
    """

    def __init__(
        self,
        config: GPT2Config,
        seed: int = 0,
        *,
        spread: float = 0.1,
        replace: Mapping[str, Array] | None = None,
    ) -> None:
        self.config = config
        self._seed, self._spread, self._replace = seed, spread, dict(replace or {})
        self.closed = False

    def array(self, name: str) -> Array:
        """One tensor, float32."""
        if name in self._replace:
            return self._replace[name]
        generator = np.random.Generator(np.random.SFC64([self._seed, *name.encode()]))
        shape = self.config.tensor_shapes()[name]
        values = generator.standard_normal(shape, dtype=np.float32)
        values *= np.float32(self._spread)
        if len(shape) == 1 and name.endswith(".weight"):
            values += np.float32(1)
        return values

    def tensors(self) -> Iterator[tuple[str, str, Array, Callable[[], None]]]:
        """What `gpt2_fast.sources.Source` asks for."""
        for name in self.config.tensor_shapes():
            yield name, "F32", self.array(name), lambda: None

    def close(self) -> None:
        """Remembered, for tests of who closes what."""
        self.closed = True


def state_of(source: SpreadSource, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All parameters as torch tensors."""
    return {
        name: torch.from_numpy(source.array(name)).to(dtype)
        for name in source.config.tensor_shapes()
    }


def model_of(
    source: SpreadSource, tokenizer: Tokenizer | None = None, *, precision: str = "fp32", **how: Any
) -> GPT2:
    """A model of these parameters."""
    return GPT2(source, tokenizer, name="test", precision=precision, **how)


@cache
def tiny_model(precision: str = "fp32", max_batch: int = 16, threads: int = 2) -> GPT2:
    """TINY with random parameters, byte by byte; made once and shared, so never closed."""
    return model_of(
        SpreadSource(TINY),
        byte_tokenizer(),
        precision=precision,
        max_batch=max_batch,
        threads=threads,
    )


def _printable() -> dict[int, str]:
    """GPT-2's names for bytes, as vocab.json spells them: openai/gpt-2, src/encoder.py."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


def write_byte_vocabulary(folder: Path) -> None:
    """vocab.json and merges.txt of 257 tokens: id b is byte b, id 256 ends a text."""
    names = _printable()
    vocabulary = {names[byte]: byte for byte in range(256)} | {"<|endoftext|>": 256}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


@cache
def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose tokens are single bytes: every text crosses every border there is."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_byte_vocabulary(Path(folder))
        tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


def write_folder(folder: Path, source: SpreadSource, *, vocabulary: bool = False) -> Path:
    """A Hugging Face folder, written by the safetensors package."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {name: name if name == "lm_head.weight" else "transformer." + name
             for name in source.config.tensor_shapes()}  # fmt: skip
    arrays = {stored: source.array(name) for name, stored in names.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_fields(source.config)), encoding="utf-8")
    if vocabulary:
        write_byte_vocabulary(folder)
    return folder


def transformers_model(source: SpreadSource, dtype: torch.dtype) -> Any:
    """transformers' GPT2LMHeadModel with these parameters, for evaluation."""
    from transformers import GPT2Config as TheirConfig
    from transformers import GPT2LMHeadModel

    c = source.config
    config = TheirConfig(
        n_layer=c.n_layer,
        n_embd=c.n_embd,
        n_head=c.n_head,
        n_positions=c.n_ctx,
        n_inner=c.n_inner,
        vocab_size=c.vocab_size,
        layer_norm_epsilon=c.layer_norm_epsilon,
        scale_attn_weights=c.scale_attn_weights,
        scale_attn_by_inverse_layer_idx=c.scale_attn_by_inverse_layer_idx,
        tie_word_embeddings=c.tie_word_embeddings,
        bos_token_id=c.eos_token_id,
        eos_token_id=c.eos_token_id,
    )
    with torch.device("meta"):  # no time spent on parameters that are replaced
        model = GPT2LMHeadModel(config)
    state = {
        name if name == "lm_head.weight" else "transformer." + name: tensor
        for name, tensor in state_of(source, dtype).items()
    }
    if c.tie_word_embeddings:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model.eval()


def transformers_logits(source: SpreadSource, ids: Sequence[int], dtype: torch.dtype) -> Tensor:
    """(T, V) logits of transformers in `dtype`."""
    with torch.no_grad():
        logits: Tensor = transformers_model(source, dtype)(torch.tensor([list(ids)])).logits[0]
    return logits


def random_ids(config: GPT2Config, length: int, seed: int = 0) -> list[int]:
    """Token ids, all of the vocabulary."""
    ids: list[int] = np.random.default_rng(seed).integers(config.vocab_size, size=length).tolist()
    return ids


def scripted_source(script: Mapping[int, int], *, n_ctx: int = 96) -> SpreadSource:
    """Parameters of a model that, greedily, says script[p] at position p whatever came before.

    Position p is unit vector p and the token embedding is 0; attention and MLP add nothing; row v
    of the head points at every position that is followed by v. Elsewhere it says "?".
    """
    config = GPT2Config(
        n_layer=1,
        n_embd=n_ctx,
        n_head=1,
        n_ctx=n_ctx,
        vocab_size=257,
        eos_token_id=256,
        tie_word_embeddings=False,
    )
    head = np.zeros((257, n_ctx), np.float32)
    for position in range(n_ctx):
        # The token at position p + 1 is predicted at position p.
        head[script.get(position + 1, ord("?")), position] = 3
    zeros = {
        name: np.zeros(shape, np.float32)
        for name, shape in config.tensor_shapes().items()
        if name.startswith("h.") or name in {"wte.weight", "ln_f.bias"}
    }
    replace = zeros | {
        "wpe.weight": np.eye(n_ctx, dtype=np.float32),
        "ln_f.weight": np.ones(n_ctx, np.float32),
        "lm_head.weight": head,
    }
    return SpreadSource(config, replace=replace)


def scripted_model(text: str | bytes | Iterable[int], **how: Any) -> GPT2:
    """A model that continues a prompt of one token with `text`, byte by byte, at temperature 0."""
    data = text.encode() if isinstance(text, str) else text
    return model_of(scripted_source(dict(enumerate(data, start=1))), byte_tokenizer(), **how)


def drawing(seed: int = 0, temperature: float = 1.0, *, drawable: int = 0) -> _C.Draw:
    """How to draw without any filter; temperature 0 takes the likeliest token."""
    return _C.Draw(
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        openai_top_p=False,
        seed=seed,
        sample=0,
        drawable=drawable,
    )


def facts(generation: Generation) -> tuple[Any, ...]:
    """Everything about a generation but its timings; floats compare by their bits."""
    return (
        generation.text,
        tuple(generation.token_ids),
        np.array(generation.logprobs, np.float32).tobytes(),
        generation.finish_reason,
        generation.seed,
    )


def free(model: GPT2) -> int:
    """Blocks of the cache that nobody holds."""
    assert model._engine is not None
    return model._engine.free_blocks


def assert_all_free(model: GPT2) -> None:
    assert model._engine is not None
    assert model._engine.free_blocks == model._engine.blocks
    # And every sequence: as many as there are can be opened.
    opened = [model._engine.open() for _ in range(model._engine.blocks // 4)]
    for sequence in opened:
        model._engine.close(sequence)


def mixed_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 .. 64 tokens; short, page-sized and full ones among them."""
    rng = np.random.default_rng(seed)
    lengths = [1, 2, 15, 16, 17, 32, 63, 64, *rng.integers(1, 65, size=count)][:count]
    return [random_ids(TINY, int(length), seed * 1000 + i) for i, length in enumerate(lengths)]
