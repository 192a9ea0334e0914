"""torch's side of `gpt2-fast bench --device cuda`: rivals, copy bandwidth, times of single kernels.

Imported only where torch is installed and has a CUDA device. Every rival has our weights and is
written as one writes it for speed: a cache of full size made once, weights as (outputs, inputs),
no copy to the host before the last token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bench_engine import WEIGHT_SEED, Row, random_tokens
from .sources import RandomSource

if TYPE_CHECKING:
    from .bench_report import Kernel
    from .config import GPT2Config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_COPY_BYTES, _COPIES = 1 << 30, 20


def wait(device: torch.device) -> None:
    """Until everything enqueued there is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_gbps(device: torch.device) -> float:
    """Bytes read plus bytes written per second, in GB/s, best of several copies of 1 GiB."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(_COPIES):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        stop.record()
        stop.synchronize()
        best = min(best, start.elapsed_time(stop) / 1e3)
    return 2 * _COPY_BYTES / best / 1e9


def device_kernels(run: Callable[[], Any], device: torch.device) -> list[Kernel]:
    """Every kernel that ran on the device during `run`, ours included, in order of its start.

    Times are the device's own, taken by CUPTI, so neither Python nor a launch is part of them.
    """
    from torch.profiler import ProfilerActivity, profile

    wait(device)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        wait(device)
    found: list[Kernel] = [
        (event.name, float(event.time_range.start), float(event.time_range.end))
        for event in recorded.events() or []
        if event.device_type.name == "CUDA" and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return sorted(found, key=lambda kernel: kernel[1])


def state(config: GPT2Config, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The weights, linear ones as (outputs, inputs)."""
    made = {}
    for name, _, array, release in RandomSource(config, WEIGHT_SEED).tensors():
        value = torch.from_numpy(array).to(device=device, dtype=dtype)
        release()
        linear = name.startswith("h.") and value.ndim == 2
        made[name] = value.T.contiguous() if linear else value
    return made


class TorchModel(nn.Module):
    """One decode step of GPT-2 in torch: attention written out (`fused` off) or torch's own.

    With `whole`, attention goes over the whole cache under a mask, so that no shape depends on the
    position and `torch.compile` can record a CUDA graph; else over the part that is filled.
    """

    def __init__(
        self,
        config: GPT2Config,
        weights: dict[str, Tensor],
        batch: int,
        *,
        fused: bool,
        whole: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.fused, self.whole = config, fused, whole
        for name, value in weights.items():
            self.register_buffer(name.replace(".", "_"), value)
        first = weights["wte.weight"]
        shape = (config.n_layer, 2, batch, config.n_head, config.n_ctx, config.head_size)
        self.register_buffer("cache", 0.1 * torch.randn(shape, device=first.device).to(first.dtype))
        self.register_buffer("places", torch.arange(config.n_ctx, device=first.device))

    def _w(self, name: str) -> Tensor:
        value: Tensor = getattr(self, name.replace(".", "_"))
        return value

    def _norm(self, x: Tensor, name: str) -> Tensor:
        eps = self.config.layer_norm_epsilon
        return F.layer_norm(
            x, x.shape[-1:], self._w(name + ".weight"), self._w(name + ".bias"), eps
        )

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._w(name + ".weight"), self._w(name + ".bias"))

    def _attend(self, q: Tensor, layer: int, position: Tensor, end: int) -> Tensor:
        batch = q.shape[0]
        cache, scale = self._w("cache"), self.config.attention_scale(layer)
        keys, values = cache[layer, 0, :batch, :, :end], cache[layer, 1, :batch, :, :end]
        mask = (self._w("places")[None, :end] <= position) if self.whole else None
        if self.fused:
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
        scores = q @ keys.transpose(-1, -2) * scale
        return torch.softmax(scores, -1) @ values

    def forward(self, tokens: Tensor, position: Tensor, end: int) -> Tensor:
        """Logits (B, V) of (B,) tokens at `position` (1,); `end` keys are looked at."""
        config, batch = self.config, tokens.shape[0]
        x = self._w("wte.weight")[tokens] + self._w("wpe.weight")[position]
        for layer in range(config.n_layer):
            block = f"h.{layer}."
            qkv = self._linear(self._norm(x, block + "ln_1"), block + "attn.c_attn")
            parts = qkv.view(batch, 3, config.n_head, 1, config.head_size).unbind(1)
            for part, new in enumerate(parts[1:]):
                self._w("cache")[layer, part, :batch].index_copy_(2, position, new)
            mixed = self._attend(parts[0], layer, position, end).reshape(batch, config.n_embd)
            x = x + self._linear(mixed, block + "attn.c_proj")
            inner = self._linear(self._norm(x, block + "ln_2"), block + "mlp.c_fc")
            x = x + self._linear(F.gelu(inner, approximate="tanh"), block + "mlp.c_proj")
        head = "wte.weight" if config.tie_word_embeddings else "lm_head.weight"
        return F.linear(self._norm(x, "ln_f"), self._w(head))


class TorchRunner:
    """`TorchModel` as a runner: "torch eager", "torch SDPA" or "torch.compile"."""

    def __init__(
        self, name: str, config: GPT2Config, precision: str, weights: dict[str, Tensor], batch: int
    ) -> None:
        self.name, self.precision = name, precision
        self._config, self._device = config, weights["wte.weight"].device
        self._compiled = name == "torch.compile"
        self._model: Any = TorchModel(
            config, weights, batch, fused=name != "torch eager", whole=self._compiled
        )
        self._step: Any = self._model
        if self._compiled:
            mode = "reduce-overhead" if self._device.type == "cuda" else "default"
            self._step = torch.compile(self._model, fullgraph=True, dynamic=False, mode=mode)
        self._places = [torch.tensor([p], device=self._device) for p in range(config.n_ctx)]
        self._tokens, self._position = torch.empty(0), 0

    def begin(self, batch: int, position: int) -> None:
        """See `Runner`; what the cache holds does not matter for speed."""
        last = [row[-1] for row in random_tokens(self._config, batch, position + 1)]
        self._tokens, self._position = torch.tensor(last, device=self._device), position

    def steps(self, count: int) -> None:
        """See `Runner`."""
        drawn = []
        with torch.inference_mode():
            for _ in range(count):
                self._tokens = self._logits(self._tokens).argmax(-1)
                drawn.append(self._tokens)
            torch.stack(drawn).cpu()

    def end(self) -> None:
        """See `Runner`."""

    def logits(self, tokens: list[int]) -> Row:
        """See `Runner`."""
        self._position = 0
        with torch.inference_mode():
            for token in tokens:
                row = self._logits(torch.tensor([token], device=self._device))
            made: Row = row[0].float().cpu().numpy()
        return made

    def close(self) -> None:
        """See `Runner`."""
        self._model = self._step = None

    def _logits(self, tokens: Tensor) -> Tensor:
        end = self._config.n_ctx if self._compiled else self._position + 1
        out: Tensor = self._step(tokens, self._places[self._position], end)
        self._position += 1
        return out


class TransformersRunner:
    """`GPT2LMHeadModel` with its own cache and torch's fused attention, without `generate`."""

    name = "transformers"

    def __init__(self, config: GPT2Config, precision: str, weights: dict[str, Tensor]) -> None:
        import transformers as untyped

        transformers: Any = untyped
        self.precision, self._config = precision, config
        self._device = weights["wte.weight"].device
        theirs = transformers.GPT2Config(
            n_layer=config.n_layer,
            n_embd=config.n_embd,
            n_head=config.n_head,
            n_positions=config.n_ctx,
            n_inner=config.inner_size,
            vocab_size=config.vocab_size,
            layer_norm_epsilon=config.layer_norm_epsilon,
            attn_implementation="sdpa",
        )
        given = {
            f"transformer.{n}": v.T if n.startswith("h.") and v.ndim == 2 else v
            for n, v in weights.items()
        }
        given["lm_head.weight"] = weights.get("lm_head.weight", weights["wte.weight"])
        with torch.device("meta"):
            model: Any = transformers.GPT2LMHeadModel(theirs)
        missing, unexpected = model.load_state_dict(given, strict=False, assign=True)
        if unexpected or any(not name.endswith("attn.bias") for name in missing):
            raise RuntimeError(f"transformers: missing {missing}, unexpected {unexpected}")
        self._model: Any = model.eval()
        self._new_cache: Any = transformers.DynamicCache
        self._cache: Any = None
        # Its name since 5.24; the older one warns there.
        taken = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in taken else "past_key_values"
        self._tokens = torch.empty(0)

    def begin(self, batch: int, position: int) -> None:
        """See `Runner`."""
        ids = torch.tensor(random_tokens(self._config, batch, position + 1), device=self._device)
        self._cache, self._tokens = self._new_cache(), ids[:, :-1]
        with torch.inference_mode():
            self._forward()
        self._tokens = ids[:, -1:]
        wait(self._device)

    def steps(self, count: int) -> None:
        """See `Runner`."""
        drawn = []
        with torch.inference_mode():
            for _ in range(count):
                self._tokens = self._forward()[:, -1].argmax(-1, keepdim=True)
                drawn.append(self._tokens)
            torch.cat(drawn, 1).cpu()

    def end(self) -> None:
        """See `Runner`."""
        self._cache = None

    def logits(self, tokens: list[int]) -> Row:
        """See `Runner`."""
        self._cache = self._new_cache()
        self._tokens = torch.tensor([tokens], device=self._device)
        with torch.inference_mode():
            row: Row = self._forward()[0, -1].float().cpu().numpy()
        return row

    def close(self) -> None:
        """See `Runner`."""
        self._model = self._cache = None

    def _forward(self) -> Tensor:
        given = {self._cache_name: self._cache, "use_cache": True, "logits_to_keep": 1}
        made: Tensor = self._model(self._tokens, **given).logits
        return made


def rivals(
    config: GPT2Config, precision: str, device: torch.device, batch: int
) -> list[tuple[str, Callable[[], Any]]]:
    """Name and maker of every rival, in the 16-bit type of `precision`."""
    kept: dict[str, Tensor] = {}

    def weights() -> dict[str, Tensor]:
        if not kept:
            kept.update(state(config, DTYPES[precision], device))
        return kept

    made: list[tuple[str, Callable[[], Any]]] = [
        (name, lambda name=name: TorchRunner(name, config, precision, weights(), batch))  # type: ignore[misc]
        for name in ("torch eager", "torch SDPA", "torch.compile")
    ]
    return [*made, ("transformers", lambda: TransformersRunner(config, precision, weights()))]
