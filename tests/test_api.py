"""`gpt2_fast.generate`, what the package exports, and results as values."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

import gpt2_fast
from gpt2_fast import GPT2, Generation, ParameterError, SamplingParams, Timings, api
from tests.model_support import TINY, SpreadSource, byte_tokenizer, facts, model_of, write_folder


@pytest.fixture(autouse=True)
def _no_kept_models() -> types.GeneratorType:  # type: ignore[type-arg]
    yield
    while api._models:
        api._models.popitem()


def folders(tmp_path: Path, count: int) -> list[Path]:
    return [
        write_folder(tmp_path / str(i), SpreadSource(TINY, seed=i), vocabulary=True)
        for i in range(count)
    ]


def test_the_first_command_of_the_readme() -> None:
    text = gpt2_fast.generate("Once upon a time", max_new_tokens=20, seed=1)
    assert isinstance(text, str)
    assert len(text.token_ids) == 20 or text.finish_reason == "eos"
    assert text == gpt2_fast.generate("Once upon a time", max_new_tokens=20, seed=1)
    pieces = gpt2_fast.generate("Once upon a time", max_new_tokens=20, seed=1, stream=True)
    assert iter(pieces) is pieces
    assert "".join(pieces) == text
    exact = gpt2_fast.generate("Once upon a time", max_new_tokens=20, seed=1, precision="fp32")
    assert isinstance(exact, Generation)


def test_prompts_and_arguments_reach_the_model(tmp_path: Path) -> None:
    [folder] = folders(tmp_path, 1)
    with GPT2.from_pretrained(folder, precision="bf16") as model:
        wanted = [
            [facts(each) for each in per_prompt]
            for per_prompt in model.generate(["a", "b"], n=2, seed=[1, 2], max_new_tokens=5)
        ]
        for which in (model, folder, str(folder)):
            texts = gpt2_fast.generate(["a", "b"], which, n=2, seed=[1, 2], max_new_tokens=5)
            assert [[facts(each) for each in per_prompt] for per_prompt in texts] == wanted
    with pytest.raises(ParameterError, match="did you mean max_new_tokens"):
        gpt2_fast.generate("a", folder, max_tokens=5)
    with pytest.raises(ParameterError, match="precision"):
        gpt2_fast.generate("a", folder, precision="int3")
    with pytest.raises(gpt2_fast.CheckpointError, match="no such file or folder"):
        gpt2_fast.generate("a", tmp_path / "missing")


def test_the_last_two_models_are_kept(tmp_path: Path) -> None:
    names = folders(tmp_path, 3)
    for folder in names:
        gpt2_fast.generate("a", folder, max_new_tokens=1)
    assert [Path(key[0]) for key in api._models] == names[1:]
    first, second = api._models.values()
    gpt2_fast.generate("a", names[1], max_new_tokens=1)
    assert list(api._models.values()) == [second, first]  # the one used last stays longest


def test_a_model_no_longer_kept_still_finishes_its_stream(tmp_path: Path) -> None:
    names = folders(tmp_path, 3)
    whole = gpt2_fast.generate([1], names[0], seed=1, max_new_tokens=40, ignore_eos=True)
    pieces = gpt2_fast.generate(
        [1], names[0], seed=1, max_new_tokens=40, ignore_eos=True, stream=True
    )
    start = next(pieces)
    for folder in names[1:]:
        gpt2_fast.generate("a", folder, max_new_tokens=1)
    assert start + "".join(pieces) == whole


def test_threads_may_use_more_models_than_are_kept(tmp_path: Path) -> None:
    names = folders(tmp_path, 4)
    alone = [facts(gpt2_fast.generate("a", f, seed=1, max_new_tokens=8)) for f in names]
    wrong: list[object] = []

    def work(first: int) -> None:
        try:
            for i in range(40):
                which = (first + i) % len(names)
                if (
                    facts(gpt2_fast.generate("a", names[which], seed=1, max_new_tokens=8))
                    != (alone[which])
                ):
                    wrong.append(which)
        except Exception as error:  # noqa: BLE001
            wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert len(api._models) <= 2


def test_every_public_name_is_there() -> None:
    for name in gpt2_fast.__all__:
        assert getattr(gpt2_fast, name) is not None
    assert set(gpt2_fast.__all__) == set(dir(gpt2_fast))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gpt2_fast.nothing  # noqa: B018
    assert issubclass(gpt2_fast.ContextOverflow, ValueError)
    assert issubclass(gpt2_fast.CapacityError, MemoryError)


def test_importing_is_light() -> None:
    """No numpy, torch, network or tokenizer until something is used."""
    code = (
        "import sys, gpt2_fast; "
        "print([m for m in ('numpy', 'torch', 'tiktoken', 'huggingface_hub', 'safetensors', 'rich',"
        " 'transformers', 'gpt2_fast._C') if m in sys.modules])"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"


def test_generating_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import gpt2_fast; "
        "print(len(gpt2_fast.generate('a', max_new_tokens=3, seed=1, ignore_eos=True).token_ids))"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "3"


def generation() -> Generation:
    return Generation(
        " text",
        token_ids=[1, 2],
        logprobs=[-1.0, -2.5],
        finish_reason="stop",
        timings=Timings(0.5, 1.5, 3, 2),
        seed=7,
    )


def test_a_generation_is_a_str() -> None:
    result = generation()
    assert result == " text"
    assert "Now" + result == "Now text"
    assert type(result.text) is str
    assert {" text": 1}[result] == 1
    assert result.timings.tokens_per_second == 1.0
    assert Timings(1.0, 1.0, 1, 1).tokens_per_second == 0.0
    assert Timings(1.0, 1.0, 1, 5).tokens_per_second == 0.0


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_generation_can_be_copied(protocol: int) -> None:
    for twin in (
        pickle.loads(pickle.dumps(generation(), protocol)),
        copy.copy(generation()),
        copy.deepcopy(generation()),
    ):
        assert isinstance(twin, Generation)
        assert facts(twin) == facts(generation())
        assert twin.timings == generation().timings


def test_parameters_are_a_value() -> None:
    assert SamplingParams(top_k=3) == SamplingParams(top_k=3)
    assert SamplingParams(top_k=3) != SamplingParams(top_k=4)
    with pytest.raises(AttributeError):
        SamplingParams().top_k = 3  # type: ignore[misc]


def test_a_model_may_be_given_to_several_calls() -> None:
    with model_of(SpreadSource(TINY), byte_tokenizer()) as model:
        first = gpt2_fast.generate("a", model, seed=1, max_new_tokens=4)
        assert facts(gpt2_fast.generate("a", model, seed=1, max_new_tokens=4)) == facts(first)
        assert api._models == {}
