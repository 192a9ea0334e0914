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

With `--teacher FOLDER`, once or more, it also learns from what those exported models, larger ones
say, expect after each token: more than the one token that came.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from gpt2_fast.tokenizer import Tokenizer

from .export import write_model
from .network import GPT2, Shape, load_model, published_name, read_model
from .optimizers import optimizers
from .windows import Windows

SAVE_SECONDS = 120.0


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
        self.average = copy.deepcopy(self.model)
        self.teachers = [self.read_teacher(folder, shape) for folder in arguments.teacher]
        dtype = torch.bfloat16 if arguments.bfloat16 else torch.float32
        self.optimizers = optimizers(self.model, arguments.weight_decay, dtype)
        self.windows = Windows(arguments.texts, tokenizer, shape.positions, arguments.seed)
        self.held_out = HeldOut(arguments.texts, tokenizer, shape.positions)
        self.steps = 0
        self.seconds = 0.0
        self.best = math.inf
        self.stop = False
        self.checkpoint = self.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self.load()

    def read_teacher(self, folder: Path, shape: Shape) -> GPT2:
        teacher = read_model(folder)
        found, wanted = (len(teacher.wte), len(teacher.wpe)), (shape.vocabulary, shape.positions)
        if found[0] != wanted[0] or found[1] < wanted[1]:
            raise ValueError(f"{folder}: wanted a teacher of {wanted[0]} tokens and at least "
                             f"{wanted[1]} positions, found {found[0]} and {found[1]}")  # fmt: skip
        return teacher

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

    def evaluate(self, loss: Tensor | None) -> None:
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
            "training_nats": None if loss is None else round(loss.item(), 4),
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

    def loss(self, ids: Tensor, targets: Tensor, model: Any, taught: Any) -> Tensor:
        """`model` is the network, `taught` what the teachers expect of ids; compiled or not."""
        options = self.options
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
            given: list[Any] = [ids, targets, options.dropout, options.word_dropout]
            if self.teachers:
                with torch.no_grad():
                    given += [taught(ids), options.teacher_share]
            loss: Tensor = model(*given)
        return loss

    def taught(self, ids: Tensor) -> Tensor:
        """Probabilities (B, T, V), the mean of all teachers'."""
        each = [teacher.logits(ids).softmax(-1) for teacher in self.teachers]
        return torch.stack(each).mean(0)

    def warm_up(self, model: Any, taught: Any) -> None:
        """Compile before the clock starts, and leave everything as it was."""
        shape = (self.options.batch, self.windows.length)
        ids, targets = torch.zeros((2, *shape), dtype=torch.int64)
        with torch.random.fork_rng(devices=[]):
            self.loss(ids, targets, model, taught).backward()
        self.model.zero_grad(set_to_none=True)

    def step(self, model: Any, taught: Any) -> Tensor:
        """Change the weights once; gives the loss."""
        self.set_rates()
        loss = self.loss(*self.windows.batch(self.options.batch), model, taught)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        weight = 1 - min(self.options.average, self.steps / (self.steps + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()),
                                 list(self.model.parameters()), weight)  # fmt: skip
        return loss.detach()

    def train(self) -> None:
        """Train until the minutes are spent or a signal stops it."""
        model: Any = self.model
        taught: Any = self.taught
        if self.options.compile:
            model, taught = torch.compile(model), torch.compile(taught)
        recent: Tensor | None = None  # loss
        usual: float | None = None  # seconds of a step
        saved = evaluated = self.seconds
        if self.steps == 0:
            self.evaluate(None)
        self.model.train()
        if self.options.compile:
            self.warm_up(model, taught)
        last = time.monotonic()
        while not self.stop and self.seconds < 60 * self.options.minutes:
            loss = self.step(model, taught)
            recent = loss if recent is None else recent.lerp(loss, 0.02)
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
    parser.add_argument("--word-dropout", type=float, default=0.0, help="of whole embeddings")
    parser.add_argument("--average", type=float, default=0.995, help="decay per step of averages")
    parser.add_argument("--batch", type=int, default=8, help="windows per step")
    parser.add_argument("--teacher", type=Path, action="append", default=[],
                        help="exported model to learn from; may be given again")  # fmt: skip
    parser.add_argument("--teacher-share", type=float, default=0.5, help="of what is wanted")
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
