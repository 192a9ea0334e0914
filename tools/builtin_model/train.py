"""Train the built-in model, a small GPT-2, on the texts that prepare.py wrote.

    python -m tools.builtin_model.train TEXTS RUN --minutes 50

trains from scratch; `--start gpt2_fast/data/builtin` continues from an exported model instead. The
schedule follows the clock: the learning rate warms up, stays, and falls in a straight line to zero
at the end of `--minutes`, however fast the machine is. RUN receives

* checkpoint.pt: everything a run needs to go on: weights, averages, optimiser, random numbers,
  minutes spent. It is written every few minutes and when SIGINT or SIGTERM arrives; the same
  command then goes on from there
* best/: the exported weights with the lowest held-out loss so far
* log.jsonl: a line per report; curve.png: the held-out curve, if matplotlib is installed

The matrices of the blocks learn by Muon, which makes each update orthogonal (Jordan et al. 2024,
"Muon: An optimizer for hidden layers in neural networks", kellerjordan.github.io/posts/muon), with
the scale of Liu et al. 2025 (arXiv:2502.16982, section 2.2); embeddings and vectors learn by AdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2_fast.tokenizer import Tokenizer

from .export import write_model
from .windows import Windows

SAVE_SECONDS = 120.0
AVERAGE = 0.995  # decay of the averaged weights per step


@dataclass(frozen=True)
class Shape:
    """Dimensions of the model: V ids, T positions, L layers of width C with H heads."""

    vocabulary: int = 4096
    positions: int = 512
    layers: int = 6
    width: int = 192
    heads: int = 6


def dropped(x: Tensor, dropout: float) -> Tensor:
    """x with elements set to zero with a probability of `dropout`, to the nearest 1/256.

    A random number of 64 bits decides on eight elements. F.dropout draws one for each, which takes
    a tenth of a step on two processors.
    """
    cut = round(256 * dropout)
    if not cut:
        return x
    drawn = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    kept = drawn.view(torch.uint8)[: x.numel()].view(x.shape) >= cut
    return x * (kept * (256 / (256 - cut)))


class Block(nn.Module):
    """One transformer block, pre-LN; names and (in, out) matrices are those of the checkpoints."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        C, deep = shape.width, 0.02 / math.sqrt(2 * shape.layers)
        self.heads = shape.heads
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.c_attn = nn.Parameter(0.02 * torch.randn(C, 3 * C))
        self.c_attn_bias = nn.Parameter(torch.zeros(3 * C))
        self.attn_proj = nn.Parameter(deep * torch.randn(C, C))
        self.attn_proj_bias = nn.Parameter(torch.zeros(C))
        self.c_fc = nn.Parameter(0.02 * torch.randn(C, 4 * C))
        self.c_fc_bias = nn.Parameter(torch.zeros(4 * C))
        self.mlp_proj = nn.Parameter(deep * torch.randn(4 * C, C))
        self.mlp_proj_bias = nn.Parameter(torch.zeros(C))

    def forward(self, x: Tensor, dropout: float) -> Tensor:
        B, T, C = x.shape
        qkv = F.linear(self.ln_1(x), self.c_attn.T, self.c_attn_bias)
        q, k, v = qkv.view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = F.linear(y.transpose(1, 2).reshape(B, T, C), self.attn_proj.T, self.attn_proj_bias)
        x = x + dropped(y, dropout)
        h = F.gelu(F.linear(self.ln_2(x), self.c_fc.T, self.c_fc_bias), approximate="tanh")
        return x + dropped(F.linear(h, self.mlp_proj.T, self.mlp_proj_bias), dropout)


class GPT2(nn.Module):
    """GPT-2 with a tied head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.wte = nn.Parameter(0.02 * torch.randn(shape.vocabulary, shape.width))
        self.wpe = nn.Parameter(0.01 * torch.randn(shape.positions, shape.width))
        self.h = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.ln_f = nn.LayerNorm(shape.width)

    def forward(self, ids: Tensor, targets: Tensor, dropout: float = 0.0) -> Tensor:
        """Mean loss in nats per token; ids and targets are (B, T)."""
        x = F.embedding(ids, self.wte) + self.wpe[: ids.shape[1]]
        x = dropped(x, dropout)
        for block in self.h:
            x = block(x, dropout)
        logits = self.ln_f(x) @ self.wte.T
        loss: Tensor = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return loss


# Names in this file -> names in checkpoints.
RENAMED = {
    "c_attn": "attn.c_attn.weight",
    "c_attn_bias": "attn.c_attn.bias",
    "attn_proj": "attn.c_proj.weight",
    "attn_proj_bias": "attn.c_proj.bias",
    "c_fc": "mlp.c_fc.weight",
    "c_fc_bias": "mlp.c_fc.bias",
    "mlp_proj": "mlp.c_proj.weight",
    "mlp_proj_bias": "mlp.c_proj.bias",
    "wte": "wte.weight",
    "wpe": "wpe.weight",
}


def published_name(name: str) -> str:
    """The checkpoint's name of a parameter: h.0.c_fc is h.0.mlp.c_fc.weight there."""
    prefix, _, last = name.rpartition(".")
    last = RENAMED.get(last, last)
    return f"{prefix}.{last}" if prefix else last


def load_model(model: GPT2, folder: Path) -> None:
    """Start from the weights of an exported model of the same shape, or with fewer positions.

    Positions that it lacks begin as copies of the later half of those it has: a late position
    means "far from the beginning", which an early one does not.
    """
    held = {
        name.removeprefix("transformer."): value
        for name, value in load_file(folder / "model.safetensors").items()
    }
    known, wanted = len(held["wpe.weight"]), len(model.wpe)
    if known > wanted:
        raise ValueError(f"{folder} has {known} positions, wanted at most {wanted}")
    late = known // 2 + torch.arange(max(0, wanted - known)) % (known - known // 2)
    held["wpe.weight"] = torch.cat([held["wpe.weight"], held["wpe.weight"][late]])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = held.get(published_name(name))
            if start is None or start.shape != parameter.shape:
                found = "nothing" if start is None else tuple(start.shape)
                wants = f"{published_name(name)} {tuple(parameter.shape)}"
                raise ValueError(f"{folder}: wanted {wants}, found {found}")
            parameter.copy_(start)


def orthogonal(update: Tensor) -> Tensor:
    """Nearest matrices with equal singular values, roughly, of a stack (N, R, C) with R <= C.

    Five steps of the quintic iteration x <- a x + b (x x^T) x + c (x x^T)^2 x (Jordan et al. 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = update / (update.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum made orthogonal; the root mean square of an update is 0.2 x the rate."""

    def __init__(self, groups: list[list[nn.Parameter]], decay: float) -> None:
        super().__init__([{"params": group} for group in groups], {"lr": 0.0, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """One step; each group holds matrices of one shape, which go through in one stack."""
        for group in self.param_groups:
            updates = []
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 0.05)
                updates.append(parameter.grad.lerp(momentum, 0.95))
            stack = torch.stack(updates)
            tall = stack.shape[1] > stack.shape[2]
            stack = orthogonal(stack.mT if tall else stack)
            scale = 0.2 * math.sqrt(max(stack.shape[1:])) * group["lr"]
            for parameter, update in zip(group["params"], stack, strict=True):
                parameter.mul_(1 - group["lr"] * group["decay"])
                parameter.sub_(scale * (update.mT if tall else update))


def optimizers(model: GPT2, decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices: dict[tuple[int, ...], list[nn.Parameter]] = {}
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if name.startswith("h.") and parameter.ndim == 2:
            matrices.setdefault(tuple(parameter.shape), []).append(parameter)
        elif parameter.ndim == 1:
            vectors.append(parameter)
    tables = [
        {"params": vectors, "weight_decay": 0.0},
        {"params": [model.wte, model.wpe], "weight_decay": decay},
    ]
    return [Muon(list(matrices.values()), decay), torch.optim.AdamW(tables, betas=(0.9, 0.95))]


class HeldOut:
    """The held-out parts of the novels, one after the other, in windows of the whole context."""

    def __init__(self, texts: Path, tokenizer: Tokenizer, length: int) -> None:
        data = "".join(path.read_text("utf-8") for path in sorted(texts.glob("*.heldout.txt"))
                       if not path.name.startswith("alice"))  # fmt: skip
        self.bytes = len(data.encode())
        ids = torch.tensor(tokenizer.encode(data))
        whole = (len(ids) - 1) // length * length
        self.ids = ids[:whole].view(-1, length)
        self.targets = ids[1 : whole + 1].view(-1, length)
        self.rest = ids[None, whole:]
        self.tokens = len(ids)

    @torch.no_grad()
    def bits_per_byte(self, model: GPT2) -> float:
        """Loss of all tokens but the first, over all bytes."""
        model.eval()
        nats = 0.0
        for ids, targets in zip(self.ids.split(16), self.targets.split(16), strict=True):
            nats += float(model(ids, targets)) * ids.numel()
        if self.rest.shape[1] > 1:
            nats += float(model(self.rest[:, :-1], self.rest[:, 1:])) * (self.rest.shape[1] - 1)
        model.train()
        return nats / self.bytes / math.log(2)


def rate(progress: float, warm_up: float, decay_from: float) -> float:
    """Share of the peak learning rate after a share `progress` of the time."""
    if progress < warm_up:
        return progress / warm_up
    if progress < decay_from:
        return 1.0
    return max(0.0, (1.0 - progress) / (1.0 - decay_from))


class Run:
    """A training run: its state, and how that goes to disk and back."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.options = arguments
        torch.manual_seed(arguments.seed)
        torch.set_num_threads(arguments.threads)
        self.out: Path = arguments.run
        self.out.mkdir(parents=True, exist_ok=True)
        self.vocabulary: Path = arguments.vocabulary
        tokenizer = Tokenizer.from_folder(self.vocabulary)
        if tokenizer is None:
            raise ValueError(f"{self.vocabulary} has no vocab.json and merges.txt")
        shape = Shape(
            tokenizer.vocab_size,
            layers=arguments.layers,
            width=arguments.width,
            heads=arguments.heads,
        )
        self.model = GPT2(shape)
        if arguments.start:
            load_model(self.model, arguments.start)
        self.average = GPT2(shape)
        self.average.load_state_dict(self.model.state_dict())
        self.optimizers = optimizers(self.model, arguments.weight_decay)
        self.windows = Windows(arguments.texts, tokenizer, shape.positions, arguments.seed)
        self.held_out = HeldOut(arguments.texts, tokenizer, shape.positions)
        self.steps = 0
        self.seconds = 0.0
        self.best = math.inf
        self.stop = False
        self.checkpoint = self.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self.load()

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "torch": torch.get_rng_state(),
            "windows": json.dumps(self.windows.random.bit_generator.state),
            "steps": self.steps,
            "seconds": self.seconds,
            "best": self.best,
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, held in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(held)
        torch.set_rng_state(state["torch"])
        self.windows.random.bit_generator.state = json.loads(state["windows"])
        self.steps, self.seconds, self.best = state["steps"], state["seconds"], state["best"]

    def evaluate(self, loss: float | None) -> None:
        """Measure the model and its average on the held-out text; keep the better if it is best."""
        found = {
            "model": self.held_out.bits_per_byte(self.model),
            "average": self.held_out.bits_per_byte(self.average),
        }
        better = min(found, key=lambda name: found[name])
        if found[better] < self.best:
            self.best = found[better]
            chosen = self.average if better == "average" else self.model
            weights = {published_name(name): value for name, value in chosen.named_parameters()}
            write_model(self.out / "best", weights, self.vocabulary, heads=chosen.h[0].heads)  # type: ignore[arg-type]
        entry = {
            "minutes": round(self.seconds / 60, 2),
            "steps": self.steps,
            "tokens": self.steps * self.options.batch * self.windows.length,
            "training_nats": None if loss is None else round(loss, 4),
            **{f"{name}_bits_per_byte": round(value, 5) for name, value in found.items()},
        }
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
        sys.stderr.write(json.dumps(entry) + "\n")

    def set_rates(self) -> None:
        options = self.options
        share = rate(self.seconds / (60 * options.minutes), options.warm_up, options.decay_from)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * options.learning_rate

    def warm_up(self, compiled: Any) -> None:
        """Compile before the clock starts, and leave everything as it was."""
        ids = torch.zeros(self.options.batch, self.windows.length, dtype=torch.int64)
        with (
            torch.random.fork_rng(devices=[]),
            torch.autocast("cpu", torch.bfloat16, enabled=self.options.bfloat16),
        ):
            compiled(ids, ids, self.options.dropout).backward()
        self.model.zero_grad(set_to_none=True)

    def train(self) -> None:
        """Train until the minutes are spent or a signal stops it."""
        compiled: Any = torch.compile(self.model) if self.options.compile else self.model
        bfloat16 = self.options.bfloat16
        recent = 0.0
        usual: float | None = None  # seconds of a step
        saved = evaluated = self.seconds
        if self.steps == 0:
            self.evaluate(None)
        self.model.train()
        if self.options.compile:
            self.warm_up(compiled)
        last = time.monotonic()
        while not self.stop and self.seconds < 60 * self.options.minutes:
            self.set_rates()
            ids, targets = self.windows.batch(self.options.batch)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = compiled(ids, targets, self.options.dropout)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.steps += 1
            recent = loss.item() if not recent else 0.98 * recent + 0.02 * loss.item()
            weight = 1 - min(AVERAGE, self.steps / (self.steps + 10))
            with torch.no_grad():
                for mean, value in zip(
                    self.average.parameters(), self.model.parameters(), strict=True
                ):
                    mean.lerp_(value, weight)
            took = time.monotonic() - last
            # A process that was stopped did not train.
            counted = took if usual is None else min(took, 4 * usual)
            usual = counted if usual is None else 0.95 * usual + 0.05 * counted
            self.seconds += counted
            last = time.monotonic()
            if self.seconds - evaluated > 60 * self.options.evaluate_every:
                self.evaluate(recent)
                evaluated = self.seconds
                last = time.monotonic()
            if self.seconds - saved > SAVE_SECONDS:
                self.save()
                saved = self.seconds
        if not self.stop:
            self.evaluate(recent)
        self.save()


def plot(log: Path, picture: Path) -> None:
    """The held-out curve of a log, if matplotlib is there."""
    try:
        from matplotlib import pyplot as plt  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return
    entries = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    figure, axes = plt.subplots()
    for name in ("model", "average"):
        values = [entry[f"{name}_bits_per_byte"] for entry in entries]
        axes.plot([entry["minutes"] for entry in entries], values, label=name)
    axes.set_xlabel("minutes")
    axes.set_ylabel("bits per byte, held-out")
    axes.legend()
    figure.savefig(picture)


def main() -> None:
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description="train the built-in model")
    parser.add_argument("texts", type=Path, help="what prepare.py wrote")
    parser.add_argument("run", type=Path, help="folder of the run; goes on if it has a checkpoint")
    parser.add_argument("--start", type=Path, help="exported model to continue from")
    parser.add_argument("--vocabulary", type=Path, default=root / "gpt2_fast/data/builtin",
                        help="folder with vocab.json and merges.txt")  # fmt: skip
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--width", type=int, default=Shape.width)
    parser.add_argument("--heads", type=int, default=Shape.heads)
    parser.add_argument("--minutes", type=float, default=60, help="time to train, of all sittings")
    parser.add_argument("--evaluate-every", type=float, default=6, help="minutes")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--warm-up", type=float, default=0.03, help="share of the time")
    parser.add_argument("--decay-from", type=float, default=0.3, help="share of the time")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=8, help="windows per step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--bfloat16", action="store_true", help="for processors that multiply it")
    run = Run(parser.parse_args())

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        run.stop = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    run.train()
    plot(run.out / "log.jsonl", run.out / "curve.png")


if __name__ == "__main__":
    main()
