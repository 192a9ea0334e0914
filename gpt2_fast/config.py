"""GPT-2's shape: the four published sizes and any other.

Field names are those of Hugging Face's `config.json` (transformers, configuration_gpt2.py), with
`n_ctx` for the number of positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .errors import ParameterError

# A sanity ceiling for every dimension: larger than any GPT-2 ever trained, small enough that the
# products of two dimensions stay far from overflow.
_LIMITS = {
    "n_layer": 1024,
    "n_embd": 65536,
    "n_head": 4096,
    "n_ctx": 1 << 20,
    "vocab_size": 1 << 24,
    "n_inner": 1 << 20,
}


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """Shape and constants of one GPT-2 model.

    Attributes:
        n_layer, n_embd, n_head: L layers of width C with H heads; C is divisible by H.
        n_ctx: positions the model was trained with.
        vocab_size: V rows of the token embedding.
        n_inner: width of the MLP; None means 4 * n_embd.
        layer_norm_epsilon: added to the variance, in squared units of the activations.
        scale_attn_weights: divide scores by sqrt(C / H).
        scale_attn_by_inverse_layer_idx: divide scores by (layer + 1) as well.
        tie_word_embeddings: the output head is the token embedding.
        eos_token_id: ends a document and starts one; None for models without it.

    Raises:
        ParameterError: a field is of the wrong type or outside its range.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3;
    openai/gpt-2, src/model.py.
    """

    n_layer: int = 12
    n_embd: int = 768
    n_head: int = 12
    n_ctx: int = 1024
    vocab_size: int = 50257
    n_inner: int | None = None
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    eos_token_id: int | None = 50256

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            value: object = getattr(self, name)
            if name == "n_inner" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
                raise ParameterError(f"{name} must be an integer in 1..{limit}, got {value!r}")
        for name in (
            "scale_attn_weights",
            "scale_attn_by_inverse_layer_idx",
            "tie_word_embeddings",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ParameterError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.n_embd % self.n_head:
            raise ParameterError(
                f"n_embd must be divisible by n_head, got n_embd {self.n_embd} and "
                f"n_head {self.n_head}"
            )
        eps: object = self.layer_norm_epsilon
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
            raise ParameterError(f"layer_norm_epsilon must be a number in (0, 1), got {eps!r}")
        eos: object = self.eos_token_id
        if eos is not None and (
            isinstance(eos, bool) or not isinstance(eos, int) or not 0 <= eos < self.vocab_size
        ):
            raise ParameterError(
                f"eos_token_id must be None or in 0..{self.vocab_size - 1}, got {eos!r}"
            )

    @property
    def head_size(self) -> int:
        """D, the width of one head."""
        return self.n_embd // self.n_head

    @property
    def inner_size(self) -> int:
        """I, the width of the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def parameters(self) -> int:
        """Number of trained values; a tied head counts once."""
        c, i, v = self.n_embd, self.inner_size, self.vocab_size
        block = 4 * c + c * 3 * c + 3 * c + c * c + c + 2 * c * i + i + c
        head = 0 if self.tie_word_embeddings else v * c
        return v * c + self.n_ctx * c + self.n_layer * block + 2 * c + head

    def attention_scale(self, layer: int) -> float:
        """The factor that multiplies q.k in `layer` (counted from 0)."""
        scale = self.head_size**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every parameter; linear weights are [in, out]."""
        c, i = self.n_embd, self.inner_size
        shapes: dict[str, tuple[int, ...]] = {
            "wte.weight": (self.vocab_size, c),
            "wpe.weight": (self.n_ctx, c),
        }
        for layer in range(self.n_layer):
            prefix = f"h.{layer}."
            shapes |= {
                prefix + "ln_1.weight": (c,),
                prefix + "ln_1.bias": (c,),
                prefix + "attn.c_attn.weight": (c, 3 * c),
                prefix + "attn.c_attn.bias": (3 * c,),
                prefix + "attn.c_proj.weight": (c, c),
                prefix + "attn.c_proj.bias": (c,),
                prefix + "ln_2.weight": (c,),
                prefix + "ln_2.bias": (c,),
                prefix + "mlp.c_fc.weight": (c, i),
                prefix + "mlp.c_fc.bias": (i,),
                prefix + "mlp.c_proj.weight": (i, c),
                prefix + "mlp.c_proj.bias": (c,),
            }
        shapes |= {"ln_f.weight": (c,), "ln_f.bias": (c,)}
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, c)
        return shapes

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dictionary."""
        return asdict(self)


def _published(n_layer: int, n_embd: int, n_head: int) -> GPT2Config:
    return GPT2Config(n_layer=n_layer, n_embd=n_embd, n_head=n_head)


#: OpenAI's names -> shapes. Source: openai/gpt-2, models/*/hparams.json.
PUBLISHED: Mapping[str, GPT2Config] = {
    "124M": _published(12, 768, 12),
    "355M": _published(24, 1024, 16),
    "774M": _published(36, 1280, 20),
    "1558M": _published(48, 1600, 25),
}
