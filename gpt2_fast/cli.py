"""The `gpt2-fast` command: generate, score, eval, quantize, info, doctor, bench. See docs/cli.md.

Words are parsed by argparse, and rich is imported for tables only: typer takes four times as long
to import, which would delay the first token by a fifth.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import help_texts, terminal
from .errors import Gpt2FastError, ParameterError

if TYPE_CHECKING:
    from .model import GPT2
    from .results import Generation

OK, FAILED, USAGE, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141

_MAX_INPUT = 64 << 20  # bytes of standard input; a context holds far fewer


class _Parser(argparse.ArgumentParser):
    """argparse with every option written out in full, and errors as every other error here."""

    def __init__(self, **options: Any) -> None:
        # argparse makes a formatter for every option, to check its metavar; without a width each
        # would ask for the terminal's, with a module that takes milliseconds to import.
        super().__init__(
            allow_abbrev=False,
            formatter_class=functools.partial(argparse.HelpFormatter, width=80),
            **options,
        )

    def format_help(self) -> str:
        """The help, as wide as the terminal."""
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        return super().format_help()

    def print_help(self, file: Any = None) -> None:
        """Write the help; argparse's own would hide that it could not."""
        if file is None:
            terminal.write(self.format_help())
        else:
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"error: {message}\ntry: {self.prog} --help\n")


class _Version(argparse.Action):
    """Write the version; the native module that knows it is imported only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from . import __version__

        terminal.line(f"gpt2-fast {__version__}")
        parser.exit(OK)


def _parser() -> _Parser:
    parser = _Parser(
        prog="gpt2-fast",
        description="GPT-2 as fast as the hardware allows.",
        epilog=help_texts.MAIN + help_texts.EXIT_CODES,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="write the version and stop")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Any, summary: str, epilog: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=summary, description=summary, epilog=epilog + help_texts.EXIT_CODES
        )
        made.set_defaults(run=run)
        made.add_argument("--json", action="store_true", help="write JSON, one object a line")
        return made

    _generate_options(
        command("generate", _generate, "continue a text", help_texts.GENERATE),
    )
    score = command("score", _score, "say how probable a text is", help_texts.SCORE)
    score.add_argument("text", metavar="TEXT", help="what to score; - reads standard input")
    score.add_argument("--bos", action="store_true", help="score the first token as well")
    _model_options(score)
    _eval_options(command("eval", _eval, "measure a model on a data set", help_texts.EVAL))
    _quantize_options(
        command("quantize", _quantize, "prepare a model to load at once", help_texts.QUANTIZE)
    )
    info = command("info", _info, "describe the build, this machine and a model", help_texts.INFO)
    info.add_argument("-m", "--model", metavar="NAME", help="a model to describe as well")
    command("doctor", _doctor, "check every kernel on this machine", help_texts.DOCTOR)
    _bench_options(command("bench", _bench, "measure how fast this machine is", help_texts.BENCH))
    return parser


def _generate_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", metavar="PROMPT", help="the text to continue; - reads standard input")
    add("-n", "--max-new-tokens", type=int, default=100, metavar="N", help="at most (100)")
    add("--temperature", type=float, default=1.0, metavar="T", help="0 takes the likeliest (1)")
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest; 0: all (0)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest to P (1)")
    add("--min-p", type=float, default=0.0, metavar="P", help="of the likeliest's probability (0)")
    add("--seed", type=int, metavar="S", help="same seed, same text (a random one, which is shown)")
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    add("--num", type=int, default=1, metavar="N", help="number of samples (1)")
    add("--ignore-eos", action="store_true", help="go on after the end-of-text token")
    _model_options(parser)


def _model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add(
        "-m",
        "--model",
        metavar="NAME",
        help="builtin, builtin-draft, a folder, gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2,"
        " owner/name on the hub, or 124M, 355M, 774M, 1558M as OpenAI released them (builtin)",
    )
    add(
        "--precision",
        metavar="P",
        help="fp32, bf16, int8, int4; on CUDA bf16, fp16, int8, int4 (what the model was prepared "
        "in, else bf16)",
    )
    add("--kv-precision", metavar="P", help="int8: half the KV cache, on the CPU (as --precision)")
    add("--threads", type=int, metavar="N", help="processor threads (all this process may use)")
    add("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:1 (auto)")


def _eval_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--task", required=True, metavar="TASK", help="wikitext2 or lambada")
    add("--data", type=Path, required=True, metavar="FILE", help="the data set's file")
    add("--stride", type=int, metavar="N", help="wikitext2: new tokens per window (the context)")
    add("--detokenize", action="store_true", help="wikitext2: undo its tokenization, as the paper")
    _model_options(parser)


def _quantize_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="NAME", help="what to prepare: as --model of generate")
    add("-o", "--out", type=Path, required=True, metavar="FOLDER", help="where to write it")
    add("--precision", default="int8", metavar="P", help="fp32, bf16, int8 or int4 (int8)")
    add("--threads", type=int, metavar="N", help="processor threads (all this process may use)")
    add("--force", action="store_true", help="replace a prepared model that is there")


def _bench_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-m", "--model", default="124M", metavar="NAME", help="whose shape (124M)")
    add("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:1 (auto)")
    add("--precision", type=_words, metavar="P,P", help="of ours (all the device computes in)")
    add("--batch", type=_numbers, metavar="N,N", help="sequences at the same time (1,8,16)")
    add("--position", type=_numbers, metavar="N,N", help="where to decode (1,128,512,1023)")
    add("--steps", type=int, metavar="N", help="tokens of one measurement (16)")
    add("--rounds", type=int, metavar="N", help="measurements of each, in turns (5)")
    add("--no-rivals", action="store_true", help="measure ours only")
    add("--out", type=Path, metavar="FOLDER", help="write bench.md and bench.json there too")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: its words; None takes those of the process.

    Returns:
        The exit code, as the help lists them.
    """
    try:
        terminal.prepare()
        try:
            arguments = _parser().parse_args(argv)
            code = int(arguments.run(arguments))
        except SystemExit as leaving:  # help, version, or a wrong command line
            code = int(leaving.code or OK)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
        with contextlib.suppress(OSError, ValueError):
            terminal.write("\n" if terminal.is_terminal(sys.stdout) else "")
    except BrokenPipeError:
        code = BROKEN_PIPE
    except ParameterError as error:
        code = _complain(str(error), USAGE)
    except Gpt2FastError as error:
        code = _complain(str(error), FAILED)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        code = _complain(place + (error.strerror or str(error)), FAILED)
    except MemoryError:
        code = _complain("out of memory", FAILED)
    return code


def _complain(message: str, code: int) -> int:
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"error: {terminal.visible(message)}\n")
            sys.stderr.flush()
    return code


def _generate(arguments: argparse.Namespace) -> int:
    from .sampling import SamplingParams

    sampling: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "stop")
    }
    seed = arguments.seed
    # Short enough to type, and for JSON readers that know no integers above 2**53.
    sampling["seed"] = int.from_bytes(os.urandom(4), "little") if seed is None else seed
    sampling |= {"n": arguments.num, "ignore_eos": arguments.ignore_eos}
    SamplingParams.of(sampling)  # refused before anything is loaded
    prompt = _text("prompt", arguments.prompt)
    told = [] if arguments.json or seed is not None else [f"seed {sampling['seed']}"]
    with _load(arguments, told, samples=arguments.num) as model:
        if arguments.json or arguments.num > 1:
            return _whole(model, prompt, sampling, arguments.json)
        _stream(model, prompt, sampling)
    return OK


def _stream(model: GPT2, prompt: str, sampling: dict[str, Any]) -> None:
    pieces = model.stream(prompt, **sampling)  # refuses a prompt that does not fit
    shown = terminal.visible if terminal.is_terminal(sys.stdout) else str
    terminal.write(terminal.dim(shown(prompt), sys.stdout))
    for piece in pieces:
        terminal.write(shown(piece))
    terminal.line()
    if pieces.result.finish_reason == "numerical_error":
        raise Gpt2FastError("the model's logits were not finite")


def _whole(model: GPT2, prompt: str, sampling: dict[str, Any], as_json: bool) -> int:
    results = model.generate([prompt], **sampling)[0]
    samples: list[Generation] = [results] if sampling["n"] == 1 else results
    shown = terminal.visible if terminal.is_terminal(sys.stdout) else str
    for number, sample in enumerate(samples):
        if as_json:
            terminal.json_line(_sample_json(model, prompt, number, sample))
            continue
        heading = f"--- sample {number + 1} of {len(samples)}"
        terminal.line(terminal.dim(heading, sys.stdout))
        terminal.line(terminal.dim(shown(prompt), sys.stdout) + shown(sample.text))
    broken = [n for n, sample in enumerate(samples) if sample.finish_reason == "numerical_error"]
    if broken:
        which = ", ".join(str(number + 1) for number in broken)
        raise Gpt2FastError(f"the model's logits were not finite in sample {which}")
    return OK


def _sample_json(model: GPT2, prompt: str, number: int, sample: Generation) -> dict[str, Any]:
    timings = sample.timings
    return {
        "model": model.name,
        "precision": model.precision,
        "prompt": prompt,
        "sample": number,
        "seed": sample.seed,
        "text": sample.text,
        "token_ids": sample.token_ids,
        "logprobs": sample.logprobs,
        "finish_reason": sample.finish_reason,
        "timings": {
            "first_token": timings.first_token,
            "total": timings.total,
            "prompt_tokens": timings.prompt_tokens,
            "new_tokens": timings.new_tokens,
            "tokens_per_second": timings.tokens_per_second,
        },
    }


def _score(arguments: argparse.Namespace) -> int:
    from .scoring import score_facts, write_score

    text = _text("text", arguments.text)
    with _load(arguments, []) as model:
        facts = score_facts(model, text, bos=arguments.bos)
    if arguments.json:
        terminal.json_line(facts)
    else:
        write_score(facts)
    return OK


def _eval(arguments: argparse.Namespace) -> int:
    from .evaluate import evaluate, write_evaluation

    options = {"stride": arguments.stride, "detokenize": arguments.detokenize}
    with _load(arguments, []) as model:
        facts = evaluate(model, arguments.task, arguments.data, **options)
    if arguments.json:
        terminal.json_line(facts)
    else:
        write_evaluation(facts)
    return OK


def _quantize(arguments: argparse.Namespace) -> int:
    from .quantize import quantize, summary

    _warn_of_threads(arguments.threads)
    facts = quantize(
        arguments.model,
        arguments.out,
        precision=arguments.precision,
        threads=arguments.threads,
        force=arguments.force,
    )
    if arguments.json:
        terminal.json_line(facts)
    else:
        terminal.line(terminal.visible(summary(facts)))
    return OK


def _info(arguments: argparse.Namespace) -> int:
    from .info import write_info

    write_info(arguments.model, as_json=arguments.json)
    return OK


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import examine, write_report

    if terminal.is_terminal(sys.stderr):
        terminal.note("checking every kernel on every instruction set: some seconds")
    report = examine()
    if arguments.json:
        terminal.json_line(report)
    else:
        write_report(report)
    return OK if report["passed"] else FAILED


def _bench(arguments: argparse.Namespace) -> int:
    from .bench import Bench, measure, write_report

    names = {"precision": "precisions", "batch": "batches", "position": "positions"}
    asked = {
        names.get(name, name): getattr(arguments, name)
        for name in ("model", "device", "precision", "batch", "position", "steps", "rounds")
        if getattr(arguments, name) is not None
    }
    result = measure(Bench(**asked, rivals=not arguments.no_rivals))
    write_report(result, arguments.out, as_json=arguments.json)
    return OK if all(check["passed"] for check in result["checks"]) else FAILED


def _load(arguments: argparse.Namespace, told: list[str], samples: int = 1) -> GPT2:
    from .model import GPT2

    _warn_of_threads(arguments.threads)
    name = "builtin" if arguments.model is None else arguments.model
    model = GPT2.from_pretrained(
        name,
        device=arguments.device,
        precision=arguments.precision,
        kv_precision=arguments.kv_precision,
        threads=arguments.threads,
        max_batch=min(samples, 16),
    )
    if arguments.model is None:
        size = terminal.count(model.config.parameters)
        told = [f"model builtin ({size} parameters, for first steps; -m gpt2 is OpenAI's)", *told]
    if told:
        terminal.note("; ".join(told))
    return model


def _warn_of_threads(threads: int | None) -> None:
    from ._C import available_threads

    if threads is not None and threads > available_threads():
        terminal.note(f"warning: {threads} threads share {available_threads()} processors")


def _text(name: str, given: str) -> str:
    """The text of an argument; - reads standard input, less one line break at its end.

    Raises:
        ParameterError: it is not UTF-8, or too long.
        OSError: standard input is closed.
    """
    if given == "-":
        if sys.stdin is None:
            raise OSError(0, "standard input is closed")
        data = sys.stdin.buffer.read(_MAX_INPUT + 1)
        if len(data) > _MAX_INPUT:
            raise ParameterError(f"{name}: standard input has more than {_MAX_INPUT} bytes")
        data = data.removesuffix(b"\n").removesuffix(b"\r")
    else:
        try:
            data = os.fsencode(given)  # words that the locale could not decode are kept as bytes
        except UnicodeEncodeError as error:
            raise ParameterError(f"{name} is not Unicode text: {error.reason}") from error
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise ParameterError(
            f"{name} must be UTF-8, got byte 0x{byte:02x} at offset {error.start}"
        ) from error
