"""Saving: what comes back, what transformers makes of it, and faults 17 and 18 of the list."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from gpt2_fast.checkpoints import open_checkpoint
from gpt2_fast.checkpoints.save import save_pretrained
from gpt2_fast.config import GPT2Config
from gpt2_fast.errors import CheckpointError, ParameterError
from tests.checkpoints_support import random_state, tiny_config

CONFIGS = [
    tiny_config(),
    tiny_config(n_embd=15, tie_word_embeddings=False, eos_token_id=4),
    tiny_config(n_inner=21, scale_attn_weights=False, layer_norm_epsilon=1e-6),
    tiny_config(n_embd=9, scale_attn_by_inverse_layer_idx=True),
]


class Vocabulary:
    """Writes a file as a tokenizer would."""

    def __init__(self, text: str = "{}") -> None:
        self.text = text

    def save(self, folder: Path) -> None:
        (folder / "vocab.json").write_text(self.text)


def values_in(folder: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(folder) as checkpoint:
        return {name: view.array.copy() for name, view in checkpoint.tensors.items()}


def check_holds(folder: Path, state: dict[str, np.ndarray]) -> None:
    found = values_in(folder)
    assert list(found) == list(state)
    for name, values in state.items():
        np.testing.assert_array_equal(found[name], values, strict=True)


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("kind", [np.float32, np.float16, np.uint16])
def test_what_was_saved_is_read_back(config: GPT2Config, kind: type, tmp_path: Path) -> None:
    state = {name: values.astype(kind) for name, values in random_state(config).items()}
    folder = tmp_path / "new" / "folder"
    save_pretrained(folder, config, state.items(), Vocabulary("saved"))
    check_holds(folder, state)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config == config
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "vocab.json",
    ]


def test_mixed_types_stay_what_they_are_and_aligned(tmp_path: Path) -> None:
    config = tiny_config(n_embd=15)  # odd sizes: nothing is aligned by luck
    state = random_state(config)
    kinds = (np.float16, np.float32, np.uint16, np.float64)
    for index, name in enumerate(state):
        state[name] = np.abs(state[name]).astype(kinds[index % 4])
    save_pretrained(tmp_path, config, reversed(state.items()))
    with open_checkpoint(tmp_path) as checkpoint:
        for name, view in checkpoint.tensors.items():
            assert view._offset % view._item_bytes == 0
            wanted = state[name]
            if wanted.dtype == np.float64:
                wanted = wanted.astype(np.float32)
            np.testing.assert_array_equal(view.array, wanted, strict=True)


def test_views_of_any_layout_are_saved_by_value(tmp_path: Path) -> None:
    config = tiny_config()
    state = random_state(config)
    turned = {
        name: np.asfortranarray(values).astype(">f4") if values.ndim == 2 else values[::-1][::-1]
        for name, values in state.items()
    }
    save_pretrained(tmp_path, config, turned.items())
    check_holds(tmp_path, state)


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_transformers_computes_the_same_logits_from_it(config: GPT2Config, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "n_layer": config.n_layer,
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_positions": config.n_ctx,
        "vocab_size": config.vocab_size,
        "n_inner": config.n_inner,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "scale_attn_weights": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attn_implementation": "eager",
    }
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    stored = theirs.state_dict()
    names = [n if n == "lm_head.weight" else "transformer." + n for n in config.tensor_shapes()]
    state = [
        (name, stored[long].numpy())
        for name, long in zip(config.tensor_shapes(), names, strict=True)
    ]
    save_pretrained(tmp_path, config, state)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert set(file.keys()) == set(names)  # those of its own save_pretrained
    again, report = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    ids = torch.arange(config.n_ctx)[None] % config.vocab_size
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, theirs(ids).logits)


def without(state: dict[str, np.ndarray], name: str) -> list[tuple[str, Any]]:
    return [item for item in state.items() if item[0] != name]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: without(s, "ln_f.bias"), r"1 are missing: ln_f\.bias"),
        (lambda s: [*s.items(), ("ln_f.bias", s["ln_f.bias"])], r"ln_f\.bias is given twice"),
        (lambda s: [*s.items(), ("h.2.ln_1.bias", s["ln_f.bias"])], "no tensor of this model"),
        (lambda s: (s | {"ln_f.bias": np.ones(11, np.float32)}).items(), r"wanted shape \[12\]"),
        (lambda s: (s | {"ln_f.bias": np.ones(12, np.int64)}).items(), "got int64"),
        (lambda s: (s | {"ln_f.bias": [object()] * 12}).items(), "got object"),
    ],
    ids=["missing", "twice", "unknown", "shape", "integers", "objects"],
)
def test_wrong_tensors_are_refused_and_the_old_files_stay(
    change: Any, match: str, tmp_path: Path
) -> None:
    config = tiny_config()
    old, new = random_state(config), random_state(config, seed=1)
    save_pretrained(tmp_path, config, old.items())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ParameterError, match=match):
        save_pretrained(tmp_path, config, change(new))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_error_in_the_source_of_tensors_passes_through(tmp_path: Path) -> None:
    def failing() -> Any:
        yield next(iter(random_state(tiny_config()).items()))
        raise KeyError("no more")

    with pytest.raises(KeyError, match="no more"):
        save_pretrained(tmp_path, tiny_config(), failing())
    assert not list(tmp_path.iterdir())


def test_a_model_can_be_saved_over_itself_and_leaves_other_files_alone(tmp_path: Path) -> None:
    config = tiny_config()
    state = random_state(config)
    save_pretrained(tmp_path, config, state.items())
    (tmp_path / "README.md").write_text("mine")
    with open_checkpoint(tmp_path) as checkpoint:
        doubled = ((name, view.float32() * 2) for name, view in checkpoint.tensors.items())
        save_pretrained(tmp_path, config, doubled)
    check_holds(tmp_path, {name: values * 2 for name, values in state.items()})
    assert (tmp_path / "README.md").read_text() == "mine"


# Interruption

WRITER = textwrap.dedent(
    """
    # Saves a model over an old one again and again, each time in a forked child that kills itself
    # one step later: a step is a tensor or a file operation that Python reports to audit hooks.
    import os, signal, sys
    from pathlib import Path
    from gpt2_fast.checkpoints.save import save_pretrained
    from tests.checkpoints.test_save import Vocabulary
    from tests.checkpoints_support import random_state, tiny_config

    config = tiny_config()
    old, new = random_state(config), random_state(config, seed=1)
    remaining = -1

    def step(event="open", args=()):
        global remaining
        if event == "open" or event.startswith(("os.", "tempfile.", "shutil.", "fcntl.")):
            remaining -= 1
            if remaining == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def stepping(state):
        for item in state.items():
            step()
            yield item

    for point in range(1, 10_000):
        folder = Path(sys.argv[1]) / str(point)
        save_pretrained(folder, config, old.items(), Vocabulary("old"))
        child = os.fork()
        if child == 0:
            remaining = point
            sys.addaudithook(step)
            save_pretrained(folder, config, stepping(new), Vocabulary("new"))
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
    print(point)
    """
)


def test_a_kill_at_any_point_leaves_whole_files(tmp_path: Path) -> None:
    config = tiny_config()
    old, new = random_state(config), random_state(config, seed=1)
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    steps = int(result.stdout)
    assert steps > len(new) + 15
    outcomes, abandoned = [], 0
    for point in range(1, steps + 1):
        folder = tmp_path / str(point)
        is_new = np.array_equal(values_in(folder)["wte.weight"], new["wte.weight"])
        check_holds(folder, new if is_new else old)
        vocabulary = (folder / "vocab.json").read_text()
        assert vocabulary == "new" or (vocabulary == "old" and not is_new)  # weights come last
        outcomes.append(is_new)
        abandoned += len(list(folder.iterdir())) > 3
        save_pretrained(folder, config, new.items(), Vocabulary("new"))
        assert len(list(folder.iterdir())) == 3  # what the killed process left is gone
    assert outcomes == sorted(outcomes)  # never back from new to old
    assert outcomes.count(False) > len(new)
    assert outcomes.count(True) > 2  # killed while cleaning up, and at last not killed
    assert abandoned > len(new)


def test_somebody_elses_unfinished_save_is_left_alone(tmp_path: Path) -> None:
    config = tiny_config()
    first, second = random_state(config), random_state(config, seed=1)

    def interleaved() -> Any:
        for index, item in enumerate(first.items()):
            if index == 3:
                save_pretrained(tmp_path, config, second.items())
            yield item

    save_pretrained(tmp_path, config, interleaved())
    check_holds(tmp_path, first)


# Disks and names


def test_a_full_disk_is_a_typed_error_and_the_old_files_stay(tmp_path: Path) -> None:
    small, large = tiny_config(), tiny_config(vocab_size=50_000)
    state = random_state(small)
    save_pretrained(tmp_path, small, state.items())
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            save_pretrained(tmp_path, large, random_state(large).items())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check_holds(tmp_path, state)
    assert len(list(tmp_path.iterdir())) == 2


def no_folder(path: Path) -> Path:
    path.write_text("a file")
    return path


@pytest.mark.parametrize(
    "make",
    [
        no_folder,
        lambda path: no_folder(path) / "below",
        lambda path: path / ("x" * 300),
        lambda path: path / "nul\0inside",
        lambda path: Path("/proc/none") / path.name,
    ],
    ids=["file", "below a file", "long name", "NUL", "read-only"],
)
def test_a_place_that_cannot_be_written_is_a_typed_error(make: Any, tmp_path: Path) -> None:
    config = tiny_config()
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_pretrained(make(tmp_path / "target"), config, random_state(config).items())


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    config = tiny_config()
    old = os.umask(0o022)
    try:
        save_pretrained(tmp_path, config, random_state(config).items())
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}
