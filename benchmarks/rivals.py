"""The engines that compare.py runs: ours, a hand-written torch loop, and transformers.

All have the same random weights (`gpt2_fast.sources.RandomSource`), take the same prompts and give
greedy tokens with the time of each. `settings` are what an engine can be run with; compare.py finds
its best one. torch and transformers are imported only by the process that runs them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gpt2_fast.sources import RandomSource

if TYPE_CHECKING:
    from gpt2_fast import GPT2Config

Prompts = list[list[int]]
WEIGHT_SEED = 0


@dataclass
class Run:
    """One generation: tokens of each prompt, seconds to the first and to the last of them."""

    tokens: list[list[int]]
    first: float
    total: float


class Engine(Protocol):
    """What compare.py needs of an engine."""

    settings: list[str]

    def use(self, setting: str) -> None:
        """Run with this setting from now on."""
        ...

    def generate(self, prompts: Prompts, new: int) -> Run:
        """Greedy continuations of prompts of equal length, `new` tokens each."""
        ...

    def logits(self, tokens: list[int]) -> list[float]:
        """(V,) of the token after `tokens`."""
        ...


def _threads(most: int) -> list[str]:
    """1 and all threads, in words."""
    return [f"{count} thread{'s' * (count > 1)}" for count in sorted({1, most})]


class Gpt2Fast:
    """Ours."""

    def __init__(self, config: GPT2Config, precision: str, threads: int, batch: int) -> None:
        from gpt2_fast import GPT2

        self.model = GPT2.from_config(
            config, weight_seed=WEIGHT_SEED, precision=precision, threads=threads, max_batch=batch
        )
        self.settings = [f"{_threads(threads)[-1]}, {self.model.isa}"]

    def use(self, setting: str) -> None:
        """There is one setting."""
        if setting not in self.settings:
            raise ValueError(f"unknown setting {setting!r}")

    def generate(self, prompts: Prompts, new: int) -> Run:
        """See `Engine`."""
        out = self.model.generate(prompts, max_new_tokens=new, temperature=0.0, ignore_eos=True)
        first = max(one.timings.first_token for one in out)
        return Run([one.token_ids for one in out], first, max(one.timings.total for one in out))

    def logits(self, tokens: list[int]) -> list[float]:
        """See `Engine`."""
        row: list[float] = self.model.forward(tokens)[-1].tolist()
        return row


def _state(config: GPT2Config, dtype: Any) -> dict[str, Any]:
    import torch

    source = RandomSource(config, WEIGHT_SEED)
    return {name: torch.from_numpy(a).to(dtype) for name, _, a, _ in source.tensors()}


def _dtype(precision: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


class TorchLoop:
    """GPT-2 in eager torch as one would write it for speed: a cache of full size made once,
    weights as (outputs, inputs), torch's fused attention, in-place residuals.
    """

    def __init__(self, config: GPT2Config, precision: str, threads: int, batch: int) -> None:
        import torch

        self.config, self.dtype = config, _dtype(precision)
        self.w = _state(config, self.dtype)
        for name, value in self.w.items():
            if name.startswith("h.") and value.ndim == 2:
                self.w[name] = value.T.contiguous()
        self.head = self.w.get("lm_head.weight", self.w["wte.weight"])
        shape = (config.n_layer, 2, batch, config.n_head, config.n_ctx, config.head_size)
        self.cache = torch.zeros(shape, dtype=self.dtype)
        self.settings = _threads(threads)

    def use(self, setting: str) -> None:
        """A number of threads."""
        import torch

        torch.set_num_threads(int(setting.split(maxsplit=1)[0]))

    def _norm(self, x: Any, name: str) -> Any:
        import torch.nn.functional as F

        w, eps = self.w, self.config.layer_norm_epsilon
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps)

    def _linear(self, x: Any, name: str) -> Any:
        import torch.nn.functional as F

        return F.linear(x, self.w[name + ".weight"], self.w[name + ".bias"])

    def _step(self, tokens: Any, past: int) -> Any:
        """(B, T) new tokens behind `past` cached ones -> (B, V) logits of the last."""
        import torch.nn.functional as F

        config = self.config
        batch, new = tokens.shape
        end = past + new
        x = F.embedding(tokens, self.w["wte.weight"]) + self.w["wpe.weight"][past:end]
        for layer in range(config.n_layer):
            block = f"h.{layer}."
            qkv = self._linear(self._norm(x, block + "ln_1"), block + "attn.c_attn")
            q, k, v = qkv.view(batch, new, 3, config.n_head, config.head_size).permute(
                2, 0, 3, 1, 4
            )
            keys, values = (
                self.cache[layer, 0, :batch, :, :end],
                self.cache[layer, 1, :batch, :, :end],
            )
            keys[:, :, past:] = k
            values[:, :, past:] = v
            mixed = F.scaled_dot_product_attention(
                q, keys, values, is_causal=past == 0, scale=config.attention_scale(layer)
            )
            mixed = mixed.transpose(1, 2).reshape(batch, new, config.n_embd)
            x += self._linear(mixed, block + "attn.c_proj")
            inner = self._linear(self._norm(x, block + "ln_2"), block + "mlp.c_fc")
            x += self._linear(F.gelu(inner, approximate="tanh"), block + "mlp.c_proj")
        return F.linear(self._norm(x[:, -1], "ln_f"), self.head)

    def generate(self, prompts: Prompts, new: int) -> Run:
        """See `Engine`."""
        import torch

        start = time.perf_counter()
        with torch.inference_mode():
            length = len(prompts[0])
            token = self._step(torch.tensor(prompts), 0).argmax(-1, keepdim=True)
            drawn = [token]
            first = time.perf_counter() - start
            for past in range(length, length + new - 1):
                token = self._step(token, past).argmax(-1, keepdim=True)
                drawn.append(token)
            tokens = torch.cat(drawn, 1).tolist()
        return Run(tokens, first, time.perf_counter() - start)

    def logits(self, tokens: list[int]) -> list[float]:
        """See `Engine`."""
        import torch

        with torch.inference_mode():
            row: list[float] = self._step(torch.tensor([tokens]), 0)[0].float().tolist()
        return row


class _Clock:
    """A streamer: transformers hands it the prompt, then each token as it comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:  # noqa: ARG002
        """Note the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


class Transformers:
    """`GPT2LMHeadModel.generate` with its cache."""

    def __init__(self, config: GPT2Config, precision: str, threads: int, batch: int) -> None:
        import torch
        import transformers as untyped

        transformers: Any = untyped
        del batch  # its cache grows by itself
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        theirs = transformers.GPT2Config(
            n_layer=config.n_layer,
            n_embd=config.n_embd,
            n_head=config.n_head,
            n_positions=config.n_ctx,
            vocab_size=config.vocab_size,
            layer_norm_epsilon=config.layer_norm_epsilon,
        )
        dtype = _dtype(precision)
        state = {f"transformer.{name}": value for name, value in _state(config, dtype).items()}
        state["lm_head.weight"] = state["transformer.wte.weight"]
        with torch.device("meta"):
            model: Any = transformers.GPT2LMHeadModel(theirs)
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
        if unexpected or any(not name.endswith("attn.bias") for name in missing):
            raise RuntimeError(f"transformers: missing {missing}, unexpected {unexpected}")
        model.tie_weights()
        self.model = model.eval()
        self.choice = transformers.GenerationConfig(
            do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0
        )
        self.model.generation_config = self.choice
        self.settings = [f"{n}, {how}" for n in _threads(threads) for how in ("eager", "sdpa")]

    def use(self, setting: str) -> None:
        """A number of threads and an attention."""
        import torch

        threads, _, how = setting.split()
        torch.set_num_threads(int(threads))
        self.model.set_attn_implementation(how)

    def generate(self, prompts: Prompts, new: int) -> Run:
        """See `Engine`."""
        import torch

        clock = _Clock()
        start = time.perf_counter()
        with torch.inference_mode():
            ids = torch.tensor(prompts)
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, streamer=clock
            )
        times = clock.times[1:]
        if len(times) != new:
            raise RuntimeError(f"transformers: wanted {new} tokens, got {len(times)}")
        tokens = out[:, ids.shape[1] :].tolist()
        return Run(tokens, times[0] - start, times[-1] - start)

    def logits(self, tokens: list[int]) -> list[float]:
        """See `Engine`."""
        import torch

        with torch.inference_mode():
            row: list[float] = self.model(torch.tensor([tokens])).logits[0, -1].float().tolist()
        return row


ENGINES: dict[str, Any] = {"gpt2_fast": Gpt2Fast, "torch": TorchLoop, "transformers": Transformers}


def random_prompts(config: GPT2Config, batch: int, context: int) -> Prompts:
    """Random token ids, the same for every engine."""
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (batch, context))
    rows: Prompts = ids.tolist()
    return rows
