"""GPT-2: the thin model class over the native engine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from . import _C
from . import prompts as prompts_of
from .config import GPT2Config
from .device import PRECISIONS, choose, int8_cache, with_cache
from .errors import ParameterError
from .results import Generation, Plan, Score
from .sampling import SamplingParams, integer
from .sources import PreparedSource, RandomSource, Source

if TYPE_CHECKING:
    import os
    from types import TracebackType

    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Self

    from .generation import Batch, TextStream
    from .prompts import Prompt
    from .sources import Tensor
    from .tokenizer import Tokenizer

    Logits = npt.NDArray[np.float32]


class GPT2:
    """One GPT-2 model, ready to generate and to score.

    Make one with `from_pretrained` or `from_config`. A row's result depends only on its own tokens,
    parameters and seed, the weights and the precision: not on the batch, the threads, the
    instruction set or how a prompt was cut into passes.

    Threads may share one model: passes run one at a time, and all calls together may hold
    `max_batch` sequences; a call that finds none free raises CapacityError. Use it as a context
    manager, or call `close`, to give its memory back at once; a stream that is still being read
    keeps it until its end.

    Attributes:
        config: the shape.
        tokenizer: text to token ids and back, or None for a model without a vocabulary.
        precision: "fp32", "bf16" or "fp16", of weights, product inputs and KV cache; "int8" or
            "int4", of weights in groups with a scale each: on the CPU products take 8-bit
            activations in groups too, and the KV cache is bf16; on CUDA both are fp16. Sums are
            float32.
        kv_precision: "int8" if keys and values are 8-bit integers in groups, else None: the KV
            cache is what `precision` says.
        device: "cpu" or "cuda:0", "cuda:1", ...
        name: what it was loaded from.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners";
    openai/gpt-2, src/model.py.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer | None,
        *,
        name: str,
        device: str = "auto",
        precision: str = "bf16",
        kv_precision: str | None = None,
        threads: int | None = None,
        max_batch: int = 16,
    ) -> None:
        """Load every parameter of `source`; see `from_pretrained` for the other arguments."""
        self.config: GPT2Config = source.config
        self.tokenizer = tokenizer
        self.precision = precision
        self.kv_precision = kv_precision
        self.name = name
        self._source = source
        count = _threads(threads)
        chosen = choose(with_cache(device, kv_precision), precision)
        self.device = str(chosen)
        self._plan = plan(
            self.config,
            precision=precision,
            kv_precision=kv_precision,
            threads=count,
            max_batch=max_batch,
            device=chosen.kind,
        )
        self._engine: _C.Engine | None = _C.Engine(
            self.config.to_dict(),
            precision,
            _C.default_isa(),
            count,
            max_batch,
            chosen.kind,
            chosen.index,
            int8_cache(kv_precision, chosen.kind),
        )
        if isinstance(source, PreparedSource):
            source.load_into(self._engine)
            return
        for tensor, dtype, array, release in source.tensors():
            self._engine.load(tensor, array, dtype)
            release()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: str = "auto",
        precision: str | None = None,
        kv_precision: str | None = None,
        threads: int | None = None,
        max_batch: int = 16,
    ) -> GPT2:
        """Load a model.

        Args:
            name_or_path: "builtin" or "builtin-draft"; a folder in Hugging Face's or OpenAI's
                layout, or one that `save_prepared` wrote; a name on the hub (gpt2, gpt2-medium,
                gpt2-large, gpt2-xl, distilgpt2, owner/name); or one of OpenAI's releases (124M,
                355M, 774M, 1558M).
            device: "cpu", "cuda", "cuda:1", or "auto" for the best this build and machine have.
            precision: "fp32", "bf16", "int8" or "int4" on the CPU; "bf16", "fp16", "int8" or
                "int4" on CUDA. None takes that of the folder's prepared file, else "bf16".
            kv_precision: None, or "int8" on the CPU: about half the KV cache of bf16, and less to
                read at long contexts, for a small error (docs/numerics.md). "auto" is the CPU then.
            threads: processor threads; None takes what affinity and container quota allow, or
                GPT2_FAST_THREADS.
            max_batch: most sequences that run at the same time; more prompts wait their turn.

        Raises:
            CheckpointError: the files are damaged, unsafe, or not a GPT-2.
            DownloadError: the name could not be fetched.
            TokenizerError: the folder's vocabulary is damaged.
            DeviceError, CapacityError, ParameterError: as their names say.
        """
        from .checkpoints.hub import resolve
        from .pretrained import Beside, open_folder, ready_for_text

        folder = resolve(name_or_path)
        found = open_folder(folder, with_cache(device, kv_precision), precision)
        try:
            reading = Beside(lambda: ready_for_text(folder, found.source.config))
            model = cls(
                found.source,
                None,
                name=str(name_or_path),
                device=found.device,
                precision=found.precision,
                kv_precision=kv_precision,
                threads=threads,
                max_batch=max_batch,
            )
            model.tokenizer = reading.result()
        except BaseException:
            found.source.close()
            raise
        return model

    @classmethod
    def from_config(
        cls,
        config: GPT2Config,
        *,
        weight_seed: int = 0,
        tokenizer: Tokenizer | None = None,
        device: str = "auto",
        precision: str = "bf16",
        kv_precision: str | None = None,
        threads: int | None = None,
        max_batch: int = 16,
    ) -> GPT2:
        """A model with random weights of the published initialisation, for tests and benchmarks.

        Args:
            config: its shape.
            weight_seed: 0 .. 2**64 - 1; gives the same weights again.
            tokenizer: None for a model of token ids only.
            device, precision, kv_precision, threads, max_batch: as in `from_pretrained`.
        """
        return cls(
            RandomSource(config, integer("weight_seed", weight_seed, 0, 2**64 - 1)),
            tokenizer,
            name=f"random weights, seed {weight_seed}",
            device=device,
            precision=precision,
            kv_precision=kv_precision,
            threads=threads,
            max_batch=max_batch,
        )

    def plan(self) -> Plan:
        """Bytes this model takes; `gpt2_fast.plan` tells them before a model is made."""
        return self._plan

    @property
    def threads(self) -> int:
        """Processor threads the engine runs on."""
        return self._running().threads

    @property
    def isa(self) -> str:
        """Instruction set the engine runs on; "cuda" on a CUDA device."""
        return self._running().isa

    @overload
    def generate(self, prompts: str, **sampling: Any) -> Generation: ...
    @overload
    def generate(
        self, prompts: Sequence[int] | Sequence[str] | Sequence[Sequence[int]], **sampling: Any
    ) -> Any: ...
    def generate(self, prompts: Any, **sampling: Any) -> Any:
        """Continue one prompt or several.

        Args:
            prompts: a text or a list of token ids, or a list of such prompts. An empty one is the
                start of a document.
            sampling: the fields of `SamplingParams`.

        Returns:
            One prompt: a `Generation`; several: a list of them. With n > 1, a list of n in place of
            each. A `Generation` is a `str`, the new text without its prompt.

        Raises:
            ParameterError: an argument is unknown or outside its range.
            ContextOverflow: a prompt is longer than the context.
        """
        params = SamplingParams.of(sampling)
        single = prompts_of.is_single(prompts)
        given = [prompts] if single else list(prompts)
        names = ["prompt"] if single else [f"prompt {number}" for number in range(len(given))]
        batch = self._batch(given, names, params)
        for _ in batch.run(promptly=False):
            pass
        results = [each[0] if params.n == 1 else each for each in batch.results()]
        return results[0] if single else results

    def stream(self, prompt: Prompt, **sampling: Any) -> TextStream:
        """Continue one prompt, yielding text as soon as no stop text can take it back.

        The pieces joined are what `generate` returns; `result`, after the last one, is the whole
        `Generation`. Leaving the loop, or closing the iterator, stops the work.

        Args:
            prompt: a text or a list of token ids.
            sampling: the fields of `SamplingParams`; n must be 1.
        """
        from .generation import TextStream

        params = SamplingParams.of(sampling)
        if params.n != 1:
            raise ParameterError(f"n must be 1 to stream, got {params.n}")
        if not prompts_of.is_single(prompt) and len(prompt) > 0:
            raise ParameterError("prompt must be one text or one list of token ids to stream")
        return TextStream(self._batch([prompt], ["prompt"], params))

    def forward(self, token_ids: Any) -> Any:
        """Logits of every position.

        Args:
            token_ids: a sequence of T token ids, or a list of such sequences.

        Returns:
            float32 (T, V); for a list of sequences a list of such arrays.

        Raises:
            ParameterError: an id is out of range, or a sequence is empty.
            ContextOverflow: a sequence is longer than the context.
        """
        if not prompts_of.is_single(token_ids) or isinstance(token_ids, str):
            if isinstance(token_ids, str) or any(isinstance(ids, str) for ids in token_ids):
                raise ParameterError("token_ids must be integers, got text; encode it first")
            return [self._logits(ids, f"token_ids {n}") for n, ids in enumerate(token_ids)]
        return self._logits(token_ids, "token_ids")

    def score(self, text_or_token_ids: Any, *, bos: bool = False) -> Any:
        """Log-probability of every token of a text given those before it.

        Args:
            text_or_token_ids: a text or a list of token ids, or a list of such.
            bos: put the end-of-text token in front, so that the first token has a probability.

        Returns:
            A `Score`, or a list of them.

        Raises:
            ParameterError: nothing to score, an id out of range, or bos without such a token.
            ContextOverflow: the tokens, with the one in front, are more than the context holds.
        """
        if prompts_of.is_single(text_or_token_ids):
            return self._score(text_or_token_ids, bos, "text")
        return [self._score(one, bos, f"text {n}") for n, one in enumerate(text_or_token_ids)]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that `from_pretrained` and transformers load.

        The weights are those of the source, in its own types: loading in a narrower precision
        loses nothing here. Files already there are replaced only once the new ones are complete;
        a prepared file there, which held what is replaced, is removed.

        Raises:
            ParameterError: the model is closed, or came from a prepared file.
            CheckpointError: the folder cannot be written.
        """
        from .checkpoints.save import save_pretrained

        self._running()
        arrays = _arrays(self._source.tensors())
        save_pretrained(Path(folder), self.config, arrays, self.tokenizer)

    def save_prepared(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that `from_pretrained` loads as fast as it is read, in one precision.

        Its `gpt2_fast.safetensors` holds the weights as the CPU engine does, so that loading
        neither packs nor quantises; the bits of every result are those of this model, on every
        instruction set. An ordinary model of the same shape may lie in the folder too, for other
        precisions and devices.

        Raises:
            ParameterError: the model is closed or on CUDA, or the folder holds another one.
            CheckpointError: the folder cannot be written.
        """
        from .checkpoints.prepared import save_prepared

        packed = self._running().packed()
        save_prepared(Path(folder), self.config, self.precision, packed, self.tokenizer)

    def close(self) -> None:
        """Give the memory back; the model cannot be used any more. Closing twice is harmless."""
        self._engine = None
        self._source.close()

    def __enter__(self) -> Self:
        """The model itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the model."""
        self.close()

    def __repr__(self) -> str:
        """Name, size and precision."""
        millions = self.config.parameters / 1e6
        state = "closed" if self._engine is None else self.device
        if self._engine is not None and self.device == "cpu":
            state = f"{self._engine.threads} threads"
        return f"<GPT2 {self.name!r}: {millions:.1f}M parameters, {self.precision}, {state}>"

    def _batch(self, prompts: list[Any], names: list[str], params: SamplingParams) -> Batch:
        from .generation import Batch

        encoded = [
            prompts_of.for_generation(prompt, self.config, self.tokenizer, name)
            for prompt, name in zip(prompts, names, strict=True)
        ]
        return Batch(
            self._running(),
            encoded,
            params,
            tokenizer=self.tokenizer,
            n_ctx=self.config.n_ctx,
            eos=self.config.eos_token_id,
        )

    def _running(self) -> _C.Engine:
        if self._engine is None:
            raise ParameterError(f"this model ({self.name}) is closed")
        return self._engine

    def _logits(self, ids: Any, name: str) -> Logits:
        import numpy as np

        tokens = prompts_of.token_ids(ids, self.config.vocab_size, name)
        if not tokens:
            raise ParameterError(f"{name} is empty")
        prompts_of.require_fit(len(tokens), self.config, name)
        parts = self._passes(tokens, "all")
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _score(self, text: Prompt, bos: bool, name: str) -> Score:
        tokens = prompts_of.encode(text, self.config, self.tokenizer, name)
        if not tokens:
            raise ParameterError(f"{name} is empty: there is nothing to score")
        front = [self.config.eos_token_id] if bos else []
        if None in front:
            raise ParameterError("bos: this model has no end-of-text token")
        fed = [token for token in front if token is not None] + tokens
        prompts_of.require_fit(len(fed), self.config, name)
        logprobs: list[float | None] = [] if bos else [None]
        if len(fed) > 1:
            for part in self._passes(fed[:-1], fed[1:]):
                logprobs += part
        shown = [] if self.tokenizer is None else [_shown(self.tokenizer, t) for t in tokens]
        total = math.fsum(p for p in logprobs if p is not None)
        return Score(tokens, logprobs, total, shown)

    def _passes(self, tokens: list[int], want: Any) -> list[Any]:
        """Run one sequence in passes of at most MAX_ROWS tokens."""
        engine = self._running()
        sequence = engine.open()
        try:
            answers = []
            for start in range(0, len(tokens), engine.max_rows):
                end = start + engine.max_rows
                wanted = want if isinstance(want, str) else want[start:end]
                answers += engine.step([(sequence, tokens[start:end], wanted)])
            return answers
        finally:
            engine.close(sequence)


def plan(
    config: GPT2Config,
    *,
    precision: str = "bf16",
    kv_precision: str | None = None,
    threads: int | None = None,
    max_batch: int = 16,
    device: str = "cpu",
) -> Plan:
    """Bytes a model of this shape will take, without making it.

    Args:
        config: its shape.
        precision, kv_precision, threads, max_batch: as in `GPT2.from_pretrained`.
        device: "cpu" or "cuda"; the latter needs a CUDA build, but no GPU.

    Raises:
        ParameterError: an argument is outside its range.
        DeviceError: this build has no CUDA kernels.
    """
    if device not in PRECISIONS:
        raise ParameterError(f"device must be one of {', '.join(PRECISIONS)}, got {device!r}")
    if precision not in PRECISIONS[device]:
        allowed = ", ".join(PRECISIONS[device])
        raise ParameterError(f"precision must be one of {allowed}, got {precision!r}")
    sequences = integer("max_batch", max_batch, 1, 65536)
    bytes_kept = int8_cache(kv_precision, device)
    sizes = _C.plan(config.to_dict(), precision, _threads(threads), sequences, device, bytes_kept)
    return Plan(**_without_total(sizes))


def _arrays(tensors: Iterator[Tensor]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    for name, _, array, release in tensors:
        yield name, array
        release()


def _without_total(sizes: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if name != "total"}


def _threads(threads: int | None) -> int:
    return _C.available_threads() if threads is None else integer("threads", threads, 1, 1024)


def _shown(tokenizer: Tokenizer, token: int) -> str:
    """Text of one token; a padded vocabulary has ids without any."""
    return tokenizer.decode([token]) if token < tokenizer.vocab_size else ""
