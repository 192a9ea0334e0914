"""The `gpt2-fast` command: what it writes where, and how it ends."""

from __future__ import annotations

import errno
import io
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import gpt2_fast
from gpt2_fast import _C, GPT2, GPT2Config, cli, info, terminal
from gpt2_fast.results import Generation, Timings

BUILTIN = Path(gpt2_fast.__file__).parent / "data" / "builtin"
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def model() -> Any:
    with GPT2.from_pretrained("builtin") as loaded:
        yield loaded


def test_generate_writes_the_prompt_and_what_the_model_says(
    model: GPT2, capsys: pytest.CaptureFixture[str]
) -> None:
    text = model.generate(PROMPT, max_new_tokens=30, seed=5, top_p=0.9)

    words = ["generate", PROMPT, "-n", "30", "--seed", "5", "--top-p", "0.9"]
    assert cli.main(words) == 0

    out, err = capsys.readouterr()
    assert out == PROMPT + text + "\n"
    assert err.startswith("model builtin (4.9 million parameters")
    assert err.count("\n") == 1


def test_generate_says_nothing_else_when_model_and_seed_are_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["generate", PROMPT, "-n", "3", "-m", "builtin", "--seed", "1"]) == 0
    assert capsys.readouterr().err == ""


def test_the_seed_that_is_shown_gives_the_text_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", PROMPT, "-n", "20"]) == 0
    out, err = capsys.readouterr()
    shown = re.search(r"seed (\d+)", err)
    assert shown is not None
    assert cli.main(["generate", PROMPT, "-n", "20", "--seed", shown[1]]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize(
    ("words", "sampling"),
    [
        (["--temperature", "0"], {"temperature": 0}),
        (["--temperature", "0.5", "--top-k", "5"], {"temperature": 0.5, "top_k": 5}),
        (["--min-p", "0.2", "--stop", "a", "--stop", ", "], {"min_p": 0.2, "stop": ["a", ", "]}),
        (["--ignore-eos", "-n", "60"], {"ignore_eos": True, "max_new_tokens": 60}),
        (["--precision", "fp32", "--threads", "1"], {}),
        (["--max-new-tokens", "0"], {"max_new_tokens": 0}),
    ],
)
def test_json_holds_what_the_api_gives(
    words: list[str], sampling: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    precision = "fp32" if "fp32" in words else "bf16"
    sampling = {"max_new_tokens": 10, "seed": 3, **sampling}
    if "--max-new-tokens" not in words and "-n" not in words:
        words = [*words, "-n", "10"]
    with GPT2.from_pretrained("builtin", precision=precision) as loaded:
        expected = loaded.generate(PROMPT, **sampling)

    assert cli.main(["generate", PROMPT, "--json", "--seed", "3", *words]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    sample = json.loads(lines[0])
    for name in ("text", "token_ids", "logprobs", "finish_reason", "seed"):
        assert sample[name] == getattr(expected, name)
    assert sample["model"] == "builtin"
    assert sample["precision"] == precision
    assert sample["prompt"] == PROMPT
    assert sample["timings"]["new_tokens"] == len(expected.token_ids)
    assert sample["timings"]["total"] >= sample["timings"]["first_token"] >= 0


def test_ignore_eos_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", PROMPT, "--json", "-n", "20", "--seed", "172", "--temperature", "1000"]
    lengths = []
    for more in ([], ["--ignore-eos"]):
        assert cli.main([*words, *more]) == 0
        sample = json.loads(capsys.readouterr().out)
        lengths.append((len(sample["token_ids"]), sample["finish_reason"]))
    assert lengths == [(14, "eos"), (20, "length")]


def test_text_passes_through_a_pipe_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--num", "2"]):
        assert cli.main(["generate", "a\x1b[1m\rb", "-n", "0", *more]) == 0
        assert "a\x1b[1m\rb" in capsys.readouterr().out


def test_several_samples(model: GPT2, capsys: pytest.CaptureFixture[str]) -> None:
    texts = model.generate(PROMPT, max_new_tokens=8, seed=2, n=3)

    assert cli.main(["generate", PROMPT, "-n", "8", "--seed", "2", "--num", "3", "--json"]) == 0
    samples = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [sample["text"] for sample in samples] == [str(text) for text in texts]
    assert [sample["sample"] for sample in samples] == [0, 1, 2]
    assert len({str(text) for text in texts}) == 3

    assert cli.main(["generate", PROMPT, "-n", "8", "--seed", "2", "--num", "3"]) == 0
    shown = [f"--- sample {n + 1} of 3\n{PROMPT}{text}\n" for n, text in enumerate(texts)]
    assert capsys.readouterr().out == "".join(shown)


def feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_prompt_from_standard_input(
    end: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(monkeypatch, ("caf\u00e9 \u65e5\n" + end).encode())
    assert cli.main(["generate", "-", "-n", "0"]) == 0
    assert capsys.readouterr().out == "caf\u00e9 \u65e5" + ("\n\n" if end else "\n")


def test_failures_take_one_line_and_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(monkeypatch, b"a" * 1_000_000)  # one line of 1 MB: more tokens than the context holds
    for words, named in [
        (["generate", "x", "-m", str(tmp_path / "none")], "none"),
        (["generate", "-", "-m", "builtin", "--seed", "1"], "512"),
        (["generate", "x", "-m", "builtin", "--seed", "1", "--device", "cuda"], "cuda"),
        (["info", "-m", str(tmp_path)], str(tmp_path)),
    ]:
        assert cli.main(words) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(r"error: .+\n", err)
        assert named in err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "COMMAND"),
        (["write"], "write"),
        (["generate"], "PROMPT"),
        (["generate", "x", "--temp", "1"], "--temp"),  # no abbreviations
        (["generate", "x", "-n", "many"], "many"),
        (["generate", "x", "-n", "-1"], "max_new_tokens"),
        (["generate", "x", "--temperature", "nan"], "temperature"),
        (["generate", "x", "--top-p", "1.5"], "top_p"),
        (["generate", "x", "--seed", "-1"], "seed"),
        (["generate", "x", "--num", "0"], "n must be"),
        (["generate", "x", "--stop", ""], "stop"),
        (["generate", "x", "--threads", "0"], "threads"),
        (["generate", "x", "--precision", "fp64"], "fp64"),
        (["generate", "x", "--device", "tpu"], "tpu"),
        (["generate", "x\udcff"], "0xff at offset 1"),
        (["generate", "x\ud800"], "Unicode"),
        (["generate", "x", "-m", "gtp2"], "gpt2"),
        (["score", ""], "nothing to score"),
    ],
)
def test_wrong_command_lines_take_code_2(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if words[:1] in (["generate"], ["score"]) and "-m" not in words:
        words = [*words, "-m", "builtin", *(["--seed", "1"] if "--seed" not in words else [])]
        words = words[:-2] if words[0] == "score" else words
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.match(r"error: ", err)
    assert named in err
    assert "Traceback" not in err


def test_standard_input_must_be_utf8_and_finite(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(monkeypatch, b"ab\xff")
    assert cli.main(["score", "-"]) == 2
    assert "0xff at offset 2" in capsys.readouterr().err
    monkeypatch.setattr(cli, "_MAX_INPUT", 100)
    feed(monkeypatch, b"a" * 101)
    assert cli.main(["score", "-"]) == 2
    assert "more than 100 bytes" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["score", "-"]) == 1
    assert capsys.readouterr().err == "error: standard input is closed\n"


def test_a_model_that_breaks_down_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Generation(
        "some",
        token_ids=[5],
        logprobs=[float("nan")],
        finish_reason="numerical_error",
        timings=Timings(0.1, 0.1, 1, 1),
        seed=0,
    )
    monkeypatch.setattr(GPT2, "generate", lambda *_, **__: [broken])
    assert cli.main(["generate", PROMPT, "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["logprobs"] == [None]  # JSON has no NaN
    assert "not finite in sample 1" in err


def test_ctrl_c_keeps_the_text_and_takes_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stream(*_: Any, **__: Any) -> Any:
        yield ", there"
        raise KeyboardInterrupt

    monkeypatch.setattr(GPT2, "stream", stream)
    assert cli.main(["generate", PROMPT]) == 130
    out, err = capsys.readouterr()
    assert out == PROMPT + ", there"
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left on device\n"),
        (FileNotFoundError(errno.ENOENT, "Gone", "a\x1b"), 1, "error: a\\x1b: Gone\n"),
        (MemoryError(), 1, "error: out of memory\n"),
        (gpt2_fast.CapacityError("the cache is full"), 1, "error: the cache is full\n"),
        (BrokenPipeError(), 141, ""),
    ],
)  # fmt: skip
def test_exit_codes_of_errors(
    error: Exception,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(GPT2, "from_pretrained", fail)
    assert cli.main(["score", "x"]) == code
    assert capsys.readouterr().err == line


def test_score_is_the_apis(model: GPT2, capsys: pytest.CaptureFixture[str]) -> None:
    text = "She was obliged to leave her, na\u00efve \u65e5."
    for bos in (False, True):
        expected = model.score(text, bos=bos)
        assert cli.main(["score", "--json", text, *(["--bos"] if bos else [])]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["logprobs"] == expected.logprobs
        assert facts["token_ids"] == expected.token_ids
        assert facts["total"] == expected.total
        scored = len(expected.token_ids) - (not bos)
        assert facts["scored_tokens"] == scored
        first = 0 if bos else len(model.tokenizer.token_bytes(expected.token_ids[0]))
        length = len(text.encode()) - first
        assert facts["scored_bytes"] == length
        assert facts["bits_per_byte"] == pytest.approx(-expected.total / math.log(2) / length)
        assert facts["perplexity"] == pytest.approx(math.exp(-expected.total / scored))


def test_score_in_a_pipe_is_separated_by_tabs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["score", 'a\tb "c"']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "token\tid\tlog-prob\tprob"
    table = [line.split("\t") for line in lines[1:-3]]
    assert all(len(cells) == 4 for cells in table)
    assert "".join(json.loads(cells[0]) for cells in table) == 'a\tb "c"'
    assert table[0][2:] == ["", ""]
    assert float(table[1][3]) == pytest.approx(math.exp(float(table[1][2])), rel=1e-3)
    assert lines[-3].startswith("sum ")
    assert cli.main(["score", "a"]) == 0
    assert "perplexity     none" in capsys.readouterr().out


def test_info_describes_build_and_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPT2_FAST_THREADS", "2")
    assert cli.main(["info", "-m", "builtin", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["isa"] in facts["isas"]
    assert set(facts["isas"]) <= set(facts["isas_compiled"])
    assert (facts["threads"], facts["threads_why"]) == (2, "GPT2_FAST_THREADS")
    build = _C.build_info()["cuda"]
    assert facts["device_note"].startswith(f"CUDA {build}" if build else "CPU build")
    assert facts["memory_available"] > 0
    described = facts["model"]
    config = GPT2Config(**described["config"])
    assert described["parameters"] == config.parameters == 4_888_896
    for precision, sizes in described["plan"].items():
        assert sizes["total"] == gpt2_fast.plan(config, precision=precision, max_batch=1).total
    assert described["licence"] == "mit"
    assert "Austen" in described["source_texts"]

    assert cli.main(["info", "-m", "builtin"]) == 0
    out = capsys.readouterr().out
    assert "licence       mit" in out
    assert "4.9 million (4,888,896)" in out
    assert str(BUILTIN / "MODEL_CARD.md") in out


@pytest.mark.parametrize("name", [*gpt2_fast.PUBLISHED, "gpt2-xl", "distilgpt2"])
def test_info_of_a_published_name_needs_no_network(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gpt2_fast.checkpoints.hub.resolve", lambda *_: pytest.fail("looked up"))
    assert cli.main(["info", "-m", name, "--json"]) == 0
    described = json.loads(capsys.readouterr().out)["model"]
    sizes = {"124M": 124439808, "355M": 354823168, "774M": 774030080, "1558M": 1557611200}
    sizes |= {"gpt2-xl": 1557611200, "distilgpt2": 81912576}
    assert described["parameters"] == sizes[name]
    assert described["licence"]
    assert described["folder"] is None


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("---\nlicense: mit\ntags:\n- a: b\nsource_texts: 'x: y'\n---\nlicense: gpl\n",
         {"license": "mit", "source_texts": "x: y"}),
        ("license: mit\n", {}),
        ("---\nlicense: mit\n", {}),
        ("", {}),
    ],
)  # fmt: skip
def test_front_matter_of_a_model_card(text: str, fields: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    card = info._card(tmp_path)
    assert card["licence"] == fields.get("license")
    assert card["source_texts"] == fields.get("source_texts")


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"gpt2-fast {gpt2_fast.__version__}\n"
    for words in ([], ["generate"], ["score"], ["info"], ["doctor"]):
        assert cli.main([*words, "--help"]) == 0
        out = capsys.readouterr().out
        assert "examples:\n  " in out
        for code in (cli.OK, cli.FAILED, cli.USAGE, cli.INTERRUPTED, cli.BROKEN_PIPE):
            assert re.search(rf"^  {code}\b", out, re.MULTILINE)
        assert all(len(line) <= 100 for line in out.splitlines())


def test_control_characters_lose_their_power() -> None:
    assert terminal.visible("a\x1b[2J\tb\nc\x07\x9b\r\x7f") == "a\\x1b[2J\tb\nc\\x07\\x9b\\x0d\\x7f"
