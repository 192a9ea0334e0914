"""`gpt2-fast eval`: local files in the formats in which the data sets were published."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_fast import GPT2, ParameterError, cli, evaluate
from gpt2_fast.config import PUBLISHED
from gpt2_fast.evaluate import wikitext_plain
from tests.test_quantize import HELD_OUT

# As WikiText-2's files are: a blank before and after each line, empty lines, marked hyphens.
WIKITEXT = (
    " \n"
    " = Northanger Abbey = \n"
    " \n"
    " No one who had ever seen Catherine would have supposed her born to be an heroine . \n"
    ' " She was fond of all plays , " he said ( twice ) , for 1 @,@ 000 well @-@ paid days . \n'
    + " She learned and forgot it , and nobody minded in the least . \n"
    * 30
)
PASSAGES = (
    "she never could learn or understand anything before she was taught; and sometimes not even",
    "her mother wished her to learn music; and she was sure she should like her",
    "it was a very long day and the whole family went to sleep in the",
)


@pytest.fixture(scope="module")
def model() -> Any:
    with GPT2.from_pretrained("builtin", precision="fp32") as loaded:
        yield loaded


@pytest.fixture
def wikitext(tmp_path: Path) -> Path:
    path = tmp_path / "wiki.test.raw"
    path.write_text(WIKITEXT, encoding="utf-8")
    return path


@pytest.fixture(params=["jsonl", "txt"])
def lambada(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"lambada_test.{request.param}"
    lines = PASSAGES if request.param == "txt" else [json.dumps({"text": p}) for p in PASSAGES]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("stride", [None, 512, 100])
def test_wikitext_equals_windows_by_hand(model: GPT2, wikitext: Path, stride: int | None) -> None:
    found = evaluate.evaluate(model, "wikitext2", wikitext, stride=stride)

    lines = WIKITEXT.splitlines(keepends=True)
    text = "\n\n".join("" if line.isspace() else line for line in lines)
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(text)
    assert len(ids) > 512
    losses: list[float] = []
    step, done = stride or 512, 0
    for start in range(0, len(ids), step):
        window = ids[start : start + 512]
        logits = np.asarray(model.forward(window)).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        new = range(max(done - start, 1), len(window))
        losses += [-logprobs[place - 1, window[place]] for place in new]
        done = start + len(window)
        if done == len(ids):
            break
    assert found["tokens"] == len(ids)
    assert found["words"] == len(WIKITEXT.split()) + len(lines)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    total = float(np.mean(losses)) * len(ids)
    assert found["word_perplexity"] == pytest.approx(math.exp(total / found["words"]), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(
        total / math.log(2) / len(text.encode()), rel=1e-4
    )


def test_more_context_helps(model: GPT2, tmp_path: Path) -> None:
    """On English of the model's own kind; on WIKITEXT, which repeats one sentence, it need not."""
    novel = tmp_path / "novel.txt"
    novel.write_text(f"{HELD_OUT}\n" * 6, encoding="utf-8")
    side_by_side = evaluate.evaluate(model, "wikitext2", novel)
    overlapping = evaluate.evaluate(model, "wikitext2", novel, stride=64)
    assert side_by_side["tokens"] > 2 * model.config.n_ctx
    assert overlapping["perplexity"] < side_by_side["perplexity"]


def test_detokenized_text_is_fed_and_the_words_stay(model: GPT2, wikitext: Path) -> None:
    raw = evaluate.evaluate(model, "wikitext2", wikitext)
    plain = evaluate.evaluate(model, "wikitext2", wikitext, detokenize=True)
    assert plain["words"] == raw["words"]
    assert plain["bytes"] == len("".join(map(wikitext_plain, WIKITEXT.splitlines(keepends=True))))
    assert plain["protocol"]["text"] == "detokenized"
    assert plain["word_perplexity"] < raw["word_perplexity"]


@pytest.mark.parametrize(
    ("line", "plain"),
    [
        (" = Robert Boulter = \n", "= Robert Boulter =\n"),
        (" = = Career = = \n", "== Career ==\n"),
        (" \n", "\n"),
        ("", ""),
        (" 1 @,@ 000 and 2 @.@ 5 well @-@ known \n", "1,000 and 2.5 well-known\n"),
        (" She ( it 's ) said , \" no \" ; $ 5 . \n", 'She (it\'s) said, "no"; $5.\n'),
        (' " One " and " two " \n', '"One" and "two"\n'),
        (" the <unk> of it \n", "the <unk> of it\n"),
    ],
)  # fmt: skip
def test_wikitext_plain(line: str, plain: str) -> None:
    assert wikitext_plain(line) == plain


def test_lambada_equals_scores_by_hand(model: GPT2, lambada: Path) -> None:
    found = evaluate.evaluate(model, "lambada", lambada)

    nats, right, last = 0.0, 0, 0
    assert model.tokenizer is not None
    for passage in PASSAGES:
        before = len(model.tokenizer.encode(passage.rpartition(" ")[0]))
        ids = model.tokenizer.encode(passage)
        nats -= sum(p or 0.0 for p in model.score(ids).logprobs[before:])
        greedy = [int(np.argmax(row)) for row in np.asarray(model.forward(ids))[before - 1 : -1]]
        right += greedy == ids[before:]
        last += greedy[-1] == ids[-1]
    assert found["passages"] == len(PASSAGES)
    assert found["perplexity"] == pytest.approx(math.exp(nats / len(PASSAGES)), rel=1e-4)
    assert found["accuracy"] == right / len(PASSAGES)
    assert found["last_token_accuracy"] == last / len(PASSAGES)


def test_a_passage_longer_than_the_context_keeps_its_end(model: GPT2, tmp_path: Path) -> None:
    path = tmp_path / "lambada_test.txt"
    path.write_text("and then " * 400 + "again\n", encoding="utf-8")
    assert evaluate.evaluate(model, "lambada", path)["perplexity"] > 1


def test_every_size_has_its_published_figures(model: GPT2, lambada: Path) -> None:
    found = evaluate.evaluate(model, "lambada", lambada)
    assert {each["size"] for each in found["published"]} == set(PUBLISHED)
    for task, figures in evaluate.FIGURES.items():
        sizes = {figure.size for figure in figures if figure.source.startswith("Radford")}
        assert sizes == set(PUBLISHED), task


@pytest.mark.parametrize(
    ("task", "options", "content", "message"),
    [
        ("ptb", {}, b"x y", "task must be one of wikitext2, lambada, got 'ptb'"),
        ("wikitext2", {"stride": 0}, b"some words here", "stride must be in 1 .. 512, got 0"),
        ("wikitext2", {"stride": 513}, b"some words here", "stride must be in 1 .. 512, got 513"),
        ("wikitext2", {}, b"", "has no text to predict"),
        ("wikitext2", {}, b"\xff\xfe", "is not UTF-8"),
        ("lambada", {"stride": 5}, b"x y", "are for wikitext2"),
        ("lambada", {"detokenize": True}, b"x y", "are for wikitext2"),
        ("lambada", {}, b"\n\n", "has no passages"),
        ("lambada", {}, b"two words\nalone\n", "line 2 is no passage"),
        ("lambada", {}, b'{"text": "two words"}\n{"text": 5}\n', "line 2 is no passage"),
        ("lambada", {}, b'{"text": "two words"}\n{"txt": "a b"}\n', "line 2 is no passage"),
        ("lambada", {}, b'{"text": "two words"}\n{"text"\n', "line 2 is no passage"),
        ("lambada", {}, b"a " + b"\xc2\xa7" * 300, "has a last word of"),
    ],
)
def test_what_is_refused(
    model: GPT2, tmp_path: Path, task: str, options: dict[str, Any], content: bytes, message: str
) -> None:
    path = tmp_path / "data"
    path.write_bytes(content)
    with pytest.raises(ParameterError, match=message):
        evaluate.evaluate(model, task, path, **options)


def test_command_writes_results_protocol_and_published_figures(
    lambada: Path, wikitext: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "-m", "builtin", "--task"]
    assert cli.main([*words, "lambada", "--data", str(lambada)]) == 0
    out = capsys.readouterr().out
    assert "last token accuracy" in out
    assert "no stop words removed" in out
    assert "1558M\tperplexity\tEleutherAI/lm-evaluation-harness#911\t10.63" in out

    assert cli.main([*words, "wikitext2", "--data", str(wikitext), "--stride", "99", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["task"] == "wikitext2"
    assert facts["precision"] == "bf16"
    assert "99 new ones" in facts["protocol"]["windows"]


def test_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "-m", "builtin", "--task", "lambada", "--data", str(tmp_path / "none")]
    assert cli.main(words) == cli.FAILED
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'}: No such file or directory\n"
    assert cli.main(["eval", "-m", "builtin", "--task", "lambada"]) == cli.USAGE
