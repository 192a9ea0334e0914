"""Prepared models: the same bits after a round trip, which file is taken, and what may go wrong."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors

import gpt2_fast
from gpt2_fast import _C, GPT2, GPT2Config
from gpt2_fast.checkpoints import open_checkpoint, prepared
from gpt2_fast.checkpoints.folder import holds_prepared
from gpt2_fast.checkpoints.prepared import PreparedFile
from gpt2_fast.errors import CheckpointError, ParameterError
from tests.checkpoints_support import BUILTIN, tiny_config
from tests.model_support import TINY, SpreadSource, byte_tokenizer, facts, model_of, write_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = prepared.PREPARED_NAME
PRECISIONS = ("fp32", "bf16", "int8", "int4")
IDS = [1, 200, 3, 3, 256, 17, 90, 41]
ISAS = sorted({_C.isas()[0], _C.isas()[-1]})


def tiny(precision: str = "fp32", **how: Any) -> GPT2:
    return model_of(SpreadSource(TINY), byte_tokenizer(), precision=precision, device="cpu", **how)


def logits(model: GPT2) -> bytes:
    out: bytes = model.forward(IDS).tobytes()
    return out


def engine(config: GPT2Config = TINY, precision: str = "fp32", isa: str = "", threads: int = 1):
    return _C.Engine(config.to_dict(), precision, isa or _C.default_isa(), threads, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A prepared folder of TINY in fp32."""
    with tiny() as model:
        model.save_prepared(tmp_path / "made")
    return tmp_path / "made"


# The same bits


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_comes_back_has_the_bits_of_what_was_saved(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"max_new_tokens": 20, "seed": 3, "n": 2}
    for made_on in ISAS:
        monkeypatch.setenv("GPT2_FAST_ISA", made_on)
        with tiny(precision) as model:
            assert model.isa == made_on
            model.save_prepared(tmp_path / made_on)
            wanted = logits(model)
            texts = [facts(one) for one in model.generate("Once", **how)]
        for loaded_on in ISAS:
            monkeypatch.setenv("GPT2_FAST_ISA", loaded_on)
            for threads in (1, 3):
                with GPT2.from_pretrained(tmp_path / made_on, threads=threads) as model:
                    assert (model.isa, model.precision) == (loaded_on, precision)
                    assert model.config == TINY
                    assert logits(model) == wanted
                    assert [facts(one) for one in model.generate("Once", **how)] == texts
    files = [(tmp_path / isa / NAME).read_bytes() for isa in ISAS]
    assert files[0] == files[-1]


def test_a_file_of_many_pieces_is_read_by_any_number_of_threads(tmp_path: Path) -> None:
    with GPT2.from_pretrained("builtin", precision="fp32", device="cpu") as model:
        model.save_prepared(tmp_path)
        assert model.plan().weights > 12 << 20  # three stretches and more
        wanted = logits(model)
    for threads in (1, 2, 3, 7):
        with GPT2.from_pretrained(tmp_path, threads=threads) as model:
            assert logits(model) == wanted


def counted(config: GPT2Config) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters that no generator of random numbers can change."""
    start = 0
    for name, shape in config.tensor_shapes().items():
        numbers = np.arange(start, start + prod(shape), dtype=np.uint64) * np.uint64(2654435761)
        values = (numbers & np.uint64(0xFFFFFFFF)).astype(np.float64) / 2**32 - 0.5
        yield name, values.astype(np.float32).reshape(shape)
        start += prod(shape)


# sha256 of the packed bytes of two small models. Where these must change, the order of bytes has
# changed (or quantisation has): give `prepared.LAYOUT` another name, or old files are misread.
PINNED = {
    "fp32": {"tied": "b6550100137de315", "odd": "560d3595f50d2f47"},
    "bf16": {"tied": "6a0140d6fe6e1b97", "odd": "fc9804308079dc5d"},
    "int8": {"tied": "e45218a37d5b23a5", "odd": "9b4934ecdb84391f"},
    "int4": {"tied": "9212552421688d6e", "odd": "2bb40fb68fd7fa29"},
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_layout_is_the_one_that_its_name_stands_for(precision: str) -> None:
    odd = tiny_config(n_embd=75, n_head=5, n_inner=131, tie_word_embeddings=False)
    for which, config in (("tied", TINY), ("odd", odd)):
        for isa in _C.isas():
            one = engine(config, precision, isa)
            for name, values in counted(config):
                one.load(name, values, "F32")
            digest = hashlib.sha256(one.packed()).hexdigest()[:16]
            assert (prepared.LAYOUT, which, isa, digest) == (
                "cpu-1",
                which,
                isa,
                PINNED[precision][which],
            )


def test_the_file_is_what_the_format_says(folder: Path) -> None:
    data = (folder / NAME).read_bytes()
    ((name, tensor),) = safetensors.deserialize(data)
    assert (name, tensor["dtype"]) == ("weights", "U8")
    with tiny() as model:
        assert model._engine is not None
        assert bytes(tensor["data"]) == model._engine.packed().tobytes()
    assert (8 + int.from_bytes(data[:8], "little")) % 64 == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        NAME,
        "merges.txt",
        "vocab.json",
    ]


def test_the_packed_bytes_are_read_only_and_keep_the_engine() -> None:
    with tiny() as model:
        assert model._engine is not None
        view = model._engine.packed()
        before = view.tobytes()
    del model
    gc.collect()
    assert view.dtype == np.uint8
    assert view.tobytes() == before
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    with pytest.raises(ParameterError, match=r"packed: \d+ parameters were not loaded"):
        engine().packed()


# Which file is taken


def test_a_prepared_file_alone_serves_its_precision_on_the_cpu(folder: Path) -> None:
    for precision in (None, "fp32"):
        for device in ("auto", "cpu"):
            with GPT2.from_pretrained(folder, precision=precision, device=device) as model:
                assert (model.device, model.precision) == ("cpu", "fp32")
    with pytest.raises(ParameterError, match=r"got 'int8', but .* was prepared in 'fp32'"):
        GPT2.from_pretrained(folder, precision="int8")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(ParameterError, match=r"prepared file, which is for the CPU"):
            GPT2.from_pretrained(folder, device=device)
    with pytest.raises(ParameterError, match="device must be one of"):
        GPT2.from_pretrained(folder, device="tpu")
    for wrong in ("int3", "", "FP32", ["fp32"], 16):
        with pytest.raises(ParameterError, match="precision must be one of"):
            GPT2.from_pretrained(folder, precision=wrong)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="only a prepared model here"):
        open_checkpoint(folder)


def test_generate_takes_the_precision_of_the_file(folder: Path) -> None:
    with tiny() as model:
        wanted = model.generate("Once", max_new_tokens=9, seed=1)
    given = gpt2_fast.generate("Once", str(folder), max_new_tokens=9, seed=1)
    assert facts(given) == facts(wanted)


def test_ordinary_weights_beside_it_serve_every_other_precision(tmp_path: Path) -> None:
    write_folder(tmp_path, SpreadSource(TINY), vocabulary=True)
    described = (tmp_path / "config.json").read_bytes()
    with GPT2.from_pretrained(tmp_path, device="cpu") as model:
        assert model.precision == "bf16"
        model.save_prepared(tmp_path)
        ordinary = model.config
    with GPT2.from_pretrained(tmp_path, precision="int8", device="cpu") as model:
        model.save_prepared(tmp_path)  # in place of the one in bf16
        wanted = logits(model)
    assert (tmp_path / "config.json").read_bytes() == described
    for precision in PRECISIONS:
        with GPT2.from_pretrained(tmp_path, precision=precision, device="cpu") as model:
            assert model.precision == precision
            assert (logits(model) == wanted) == (precision == "int8")
    with GPT2.from_pretrained(tmp_path, device="cpu") as model:
        assert model.precision == "int8"
        with pytest.raises(ParameterError, match="without the original weights"):
            model.save_pretrained(tmp_path / "elsewhere")
        model.save_prepared(tmp_path / "copy")
    assert (tmp_path / "copy" / NAME).read_bytes() == (tmp_path / NAME).read_bytes()
    assert not (tmp_path / "elsewhere").exists()
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config == ordinary


def test_saving_other_weights_removes_the_prepared_ones(folder: Path) -> None:
    with model_of(SpreadSource(TINY, seed=1), byte_tokenizer(), device="cpu") as other:
        other.save_pretrained(folder)
        wanted = logits(other)
    assert not (folder / NAME).exists()
    with GPT2.from_pretrained(folder, precision="fp32", device="cpu") as model:
        assert logits(model) == wanted


def test_a_folder_with_another_model_is_left_alone(tmp_path: Path) -> None:
    write_folder(tmp_path, SpreadSource(GPT2Config(**{**TINY.to_dict(), "n_layer": 1})))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with tiny() as model, pytest.raises(ParameterError, match="n_layer: wanted 2, found 1"):
        model.save_prepared(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_write_that_fails_leaves_the_old_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write = prepared._write

    def full(path: Path, *rest: Any) -> None:
        write(path, *rest)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepared, "_write", full)
    with tiny("int4") as model, pytest.raises(CheckpointError, match="No space left"):
        model.save_prepared(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_closed_model_cannot_be_saved(tmp_path: Path) -> None:
    model = tiny()
    model.close()
    with pytest.raises(ParameterError, match="closed"):
        model.save_prepared(tmp_path)


LOADER = """
import sys
from gpt2_fast import GPT2
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
with GPT2.from_pretrained(sys.argv[1], threads=2) as small:
    small.forward([1])
before = peak()
model = GPT2.from_pretrained(sys.argv[2], threads=2)
print(peak() - before, model.plan().weights)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_loading_holds_the_weights_once(folder: Path, tmp_path: Path) -> None:
    config = GPT2Config(n_layer=2, n_embd=768, n_head=12, n_ctx=64, vocab_size=600, eos_token_id=0)
    words = byte_tokenizer()  # without a vocabulary GPT-2's would be counted
    with GPT2.from_config(config, tokenizer=words, precision="fp32", device="cpu") as model:
        model.save_prepared(tmp_path / "large")
    command = [sys.executable, "-c", LOADER, str(folder), str(tmp_path / "large")]
    path = str(Path(gpt2_fast.__file__).parents[1])
    done = subprocess.run(
        command, check=True, capture_output=True, timeout=60, env={**os.environ, "PYTHONPATH": path}
    )
    grown, weights = map(int, done.stdout.split())
    assert weights > 55e6
    assert 0.9 * weights < grown < 1.2 * weights


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_loading_lets_go_of_the_file(folder: Path) -> None:
    open_files = Path("/proc/self/fd")
    before = len(list(open_files.iterdir()))
    with GPT2.from_pretrained(folder) as model:
        assert len(list(open_files.iterdir())) == before
        wanted = logits(model)
        (folder / NAME).write_bytes(b"")  # as nobody should, but the model has what it needs
        assert logits(model) == wanted


def test_builtin_is_not_prepared() -> None:
    assert not holds_prepared(BUILTIN)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        PreparedFile(BUILTIN)


def test_header_is_json_with_texts_only(folder: Path) -> None:
    data = (folder / NAME).read_bytes()
    fields = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert json.loads(fields["__metadata__"]["config"]) == TINY.to_dict()
    assert all(isinstance(value, str) for value in fields["__metadata__"].values())


def test_generating_from_one_imports_no_numpy(tmp_path: Path) -> None:
    """numpy takes as long to import as 124M in int8 to load."""
    model_of(SpreadSource(TINY), precision="int8").save_prepared(tmp_path)
    script = (
        "import sys, gpt2_fast; model = gpt2_fast.GPT2.from_pretrained(sys.argv[1]); "
        "model.generate([1, 2, 3], max_new_tokens=2); print('numpy' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
