"""`gpt2-fast quantize`, and what the other commands make of a prepared folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gpt2_fast import _C, GPT2, cli
from gpt2_fast.checkpoints import prepared
from tests.model_support import TINY, SpreadSource, write_folder

PROMPT = "Once upon a time"
GENERATE = ["generate", PROMPT, "-n", "12", "--seed", "4", "--json"]


def generated(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main([*GENERATE, *words]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return {name: facts[name] for name in ("precision", "token_ids", "logprobs")}


@pytest.mark.parametrize("precision", [None, "fp32", "bf16", "int4"])
def test_a_prepared_model_says_what_the_model_says(
    precision: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = precision or "int8"
    words = ["quantize", "builtin", "-o", str(tmp_path / "out")]
    words += [] if precision is None else ["--precision", precision]
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    path = re.escape(str(tmp_path / "out" / prepared.PREPARED_NAME))
    assert re.fullmatch(rf"{path}: {chosen}, .* MB of weights, 9\.8 MB before, [\d.]+ s\n", out)
    assert err == ""
    wanted = generated(["-m", "builtin", "--precision", chosen], capsys)
    assert generated(["-m", str(tmp_path / "out")], capsys) == wanted
    assert generated(["-m", str(tmp_path / "out"), "--precision", chosen], capsys) == wanted
    assert cli.main(["score", PROMPT, "-m", str(tmp_path / "out"), "--json"]) == 0
    score = json.loads(capsys.readouterr().out)
    with GPT2.from_pretrained("builtin", precision=chosen, device="cpu") as model:
        assert score["total"] == model.score(PROMPT).total


def test_quantize_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quantize", "builtin", "-o", str(tmp_path), "--precision", "int4", "--json"]
    assert cli.main(words) == 0
    facts = json.loads(capsys.readouterr().out)
    with GPT2.from_pretrained("builtin") as model:
        sizes = _C.plan(model.config.to_dict(), "int4", 1, 1)
        assert facts["bytes_before"] == 2 * model.config.parameters
    assert facts["bytes_after"] == sizes["weights"]
    assert facts["file"] == str(tmp_path / prepared.PREPARED_NAME)
    assert (facts["model"], facts["precision"]) == ("builtin", "int4")
    assert 0 < facts["seconds"] < 60


def test_quantize_replaces_only_when_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["quantize", "builtin", "-o", str(tmp_path)]
    assert cli.main(words) == 0
    before = (tmp_path / prepared.PREPARED_NAME).read_bytes()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(GPT2, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
        assert cli.main([*words, "--precision", "int4"]) == cli.USAGE
    err = capsys.readouterr().err
    assert err.startswith("error: out: ")
    assert "--force replaces it" in err
    assert (tmp_path / prepared.PREPARED_NAME).read_bytes() == before
    assert cli.main([*words, "--precision", "int4", "--force"]) == 0
    assert len((tmp_path / prepared.PREPARED_NAME).read_bytes()) < len(before)


def test_quantize_in_place_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write_folder(tmp_path / "model", SpreadSource(TINY), vocabulary=True))
    assert cli.main(["quantize", folder, "-o", folder]) == 0
    assert cli.main(["quantize", folder, "-o", folder, "--precision", "int4", "--force"]) == 0
    assert generated(["-m", folder], capsys)["precision"] == "int4"
    assert generated(["-m", folder, "--precision", "fp32"], capsys)["precision"] == "fp32"
    # From a prepared file alone: the same precision is a copy, another is refused.
    alone, copy = str(tmp_path / "alone"), str(tmp_path / "copy")
    assert cli.main(["quantize", folder, "-o", alone, "--precision", "int4"]) == 0
    assert cli.main(["quantize", alone, "-o", copy, "--precision", "int4"]) == 0
    name = prepared.PREPARED_NAME
    assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    capsys.readouterr()
    assert cli.main(["quantize", alone, "-o", str(tmp_path / "no")]) == cli.USAGE
    assert "got 'int8', but" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["builtin"], cli.USAGE, "required: -o/--out"),
        (["builtin", "-o", "{}/x", "--precision", "fp16"], cli.USAGE, "precision must be one of"),
        (["builtin", "-o", "{}/x", "--threads", "0"], cli.USAGE, "threads must be"),
        (["{}/none", "-o", "{}/x"], cli.FAILED, "no such file or folder"),
        (["builtin", "-o", "{}/file"], cli.FAILED, "cannot be written"),
    ],
)
def test_quantize_that_fails(
    words: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert cli.main(["quantize", *(word.format(tmp_path) for word in words)]) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_info_describes_a_prepared_folder_without_loading_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["quantize", "builtin", "-o", str(tmp_path)]) == 0
    path = tmp_path / prepared.PREPARED_NAME
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # only loading would see that
    path.write_bytes(data)
    capsys.readouterr()
    assert cli.main(["info", "-m", str(tmp_path), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)["model"]
    weights = described["plan"]["int8"]["weights"]
    assert described["prepared"] == {"precision": "int8", "layout": "cpu-1", "bytes": weights}
    assert (described["format"], described["stored_as"]) == ("prepared", ["int8"])
    assert list(described["plan"]) == ["int8"]
    assert cli.main(["info", "-m", str(tmp_path)]) == 0
    assert re.search(r"\nprepared +int8, layout cpu-1, 5\.2 MB\n", capsys.readouterr().out)
    assert cli.main([*GENERATE, "-m", str(tmp_path)]) == cli.FAILED
    assert f"{path}: damaged: piece 4" in capsys.readouterr().err


def test_info_of_both_kinds_in_one_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write_folder(tmp_path, SpreadSource(TINY), vocabulary=True))
    assert cli.main(["info", "-m", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["prepared"] is None
    assert cli.main(["quantize", folder, "-o", folder]) == 0
    capsys.readouterr()
    assert cli.main(["info", "-m", folder, "--json"]) == 0
    described = json.loads(capsys.readouterr().out)["model"]
    assert described["prepared"]["precision"] == "int8"
    assert (described["format"], described["stored_as"]) == ("huggingface", ["F32"])
    assert list(described["plan"]) == ["fp32", "bf16", "int8", "int4"]
