"""Which format a folder holds, and pickles, which are refused: faults 12 and 18."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from gpt2_fast.checkpoints import open_checkpoint, openai_bundle
from tests.checkpoints_support import (
    check_equal,
    config_json,
    hf_folder,
    random_state,
    refused,
    tiny_config,
)


def test_a_path_with_spaces_and_other_alphabets(tmp_path: Path) -> None:
    config = tiny_config()
    state = random_state(config)
    check_equal(hf_folder(tmp_path / "my modèle 模型 \\ 1", config, state), config, state)


@pytest.mark.parametrize(
    "name", ["hparams.json", "checkpoint", "model-100.index", "m.data-00000-of-00001"]
)
def test_openais_layout_goes_to_its_own_reader(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).touch()
    seen: list[Path] = []
    monkeypatch.setattr(openai_bundle, "open_bundle", lambda folder, _: seen.append(folder))
    open_checkpoint(tmp_path)
    assert seen == [tmp_path]


def test_a_folder_without_a_model_says_what_it_holds(tmp_path: Path) -> None:
    refused(lambda: open_checkpoint(tmp_path), "no model here: .* found an empty folder")
    (tmp_path / "notes.txt").touch()
    refused(lambda: open_checkpoint(tmp_path), r"no model here: .* found notes\.txt")
    refused(lambda: open_checkpoint(tmp_path / "notes.txt"), "found a file; give the folder")
    refused(lambda: open_checkpoint(tmp_path / "gone"), "found nothing there")
    for impossible in ("x" * 300, "nul\0inside"):
        refused(lambda name=impossible: open_checkpoint(name), "cannot be read|nothing there")


def test_a_folder_that_may_not_be_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    hf_folder(tmp_path, config, random_state(config))
    real = Path.exists

    def exists(path: Path, **options: bool) -> bool:
        if path.parent == tmp_path:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(Path, "exists", exists)
    refused(lambda: open_checkpoint(tmp_path), "cannot be read: .*Permission denied")


# Pickles


def test_a_pickle_is_refused_and_the_printed_command_converts_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    config = tiny_config()
    state = random_state(config)
    folder = tmp_path / "it's a model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_json(config)))
    weights = {"transformer." + name: torch.from_numpy(v) for name, v in state.items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]  # shares memory, as usual
    torch.save({"model": weights, "iteration": 5}, folder / "pytorch_model.bin")
    message = refused(lambda: open_checkpoint(folder), "a pickle, which can run any code")
    assert refused(lambda: open_checkpoint(folder / "pytorch_model.bin"), "a pickle") == message
    command = message.split("\n")[1].strip().replace("python ", f"{sys.executable} ", 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, timeout=120)
    check_equal(folder, config, state)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_a_pickle_never_runs(suffix: str, tmp_path: Path) -> None:
    import pickle

    hit = tmp_path / "hit"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / ("weights" + suffix)).write_bytes(pickle.dumps(Evil(hit)))
    refused(lambda: open_checkpoint(folder), "weights_only=True")
    assert not hit.exists()
    pickle.loads((folder / ("weights" + suffix)).read_bytes())
    assert hit.exists()  # so it would have


def test_a_binary_that_is_no_pickle_gets_no_conversion_command(tmp_path: Path) -> None:
    (tmp_path / "gpt2_124M.bin").write_bytes((20240326).to_bytes(4, "little") + bytes(1020))
    refused(lambda: open_checkpoint(tmp_path), r"no model here: .* found gpt2_124M\.bin")


def test_safetensors_beside_a_pickle_are_preferred(tmp_path: Path) -> None:
    config = tiny_config()
    state = random_state(config)
    hf_folder(tmp_path, config, state)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_equal(tmp_path, config, state)
