"""Large prepared files: mapped while they are loaded, copied beside the first results, let go."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import gpt2_fast
from gpt2_fast import _C, GPT2, GPT2Config
from gpt2_fast.checkpoints import prepared
from gpt2_fast.checkpoints.prepared import PreparedFile
from gpt2_fast.errors import CheckpointError
from tests.model_support import SpreadSource, byte_tokenizer, model_of

if TYPE_CHECKING:
    from collections.abc import Callable

MAPS = Path("/proc/self/maps")
FILES = Path("/proc/self/fd")
# What is mapped can be seen there alone; every Linux that CI runs on has it.
pytestmark = pytest.mark.skipif(not MAPS.exists(), reason="no /proc")

NAME = prepared.PREPARED_NAME
# 58 MB in fp32: fifteen stretches, the last of them short and not whole pages.
CONFIG = GPT2Config(n_layer=2, n_embd=768, n_head=12, n_ctx=64, vocab_size=600, eos_token_id=0)
IDS = [1, 200, 3, 3, 256, 17, 90, 41]
PIECE = 1 << 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of CONFIG in fp32, which no test changes."""
    folder = tmp_path_factory.mktemp("large")
    with model_of(SpreadSource(CONFIG), byte_tokenizer(), device="cpu") as model:
        model.save_prepared(folder)
    return folder


@pytest.fixture(scope="module")
def wanted(made: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Logits after IDS, from weights that were read."""
    folder = moved(made, tmp_path_factory.mktemp("read"), 64)
    with GPT2.from_pretrained(folder) as model:
        assert not mapped(folder)
        return logits(model)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return moved(made, tmp_path, 4096)


def moved(made: Path, folder: Path, alignment: int) -> Path:
    """A copy in which the weights begin at an odd multiple of `alignment`."""
    for path in made.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    data = (made / NAME).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].rstrip(b" ")
    header += b" " * ((alignment - 8 - len(header)) % (2 * alignment))
    (folder / NAME).write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    return folder


def logits(model: GPT2) -> bytes:
    out: bytes = model.forward(IDS).tobytes()
    return out


def engine(threads: int = 2) -> _C.Engine:
    return _C.Engine(CONFIG.to_dict(), "fp32", _C.default_isa(), threads, 1)


def answer(one: _C.Engine) -> bytes:
    sequence = one.open()
    try:
        (out,) = one.step([(sequence, IDS, "all")])
    finally:
        one.close(sequence)
    return bytes(out.tobytes())


def mapped(folder: Path) -> bool:
    """Whether this process has the folder's prepared file mapped."""
    return str(folder / NAME) in MAPS.read_text()


def soon(true: Callable[[], bool]) -> None:
    """Wait until it is."""
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_mapping_serves_at_once_and_is_gone_soon(
    threads: int, folder: Path, wanted: bytes
) -> None:
    before = len(list(FILES.iterdir()))
    with GPT2.from_pretrained(folder, threads=threads) as model:
        assert mapped(folder)
        seen = set()
        while mapped(folder):  # stretch after stretch goes
            seen.add(logits(model))
        assert seen == {wanted}
        assert len(list(FILES.iterdir())) == before
        assert logits(model) == wanted
        (folder / NAME).write_bytes(b"")
        assert logits(model) == wanted


def test_a_model_that_is_not_used_lets_go_too(folder: Path, wanted: bytes) -> None:
    with GPT2.from_pretrained(folder) as model:
        soon(lambda: not mapped(folder))
        (folder / NAME).unlink()
        assert logits(model) == wanted


def test_the_mapping_ends_with_the_model(folder: Path) -> None:
    before = len(list(FILES.iterdir()))
    for used in (False, True):
        with GPT2.from_pretrained(folder) as model:
            if used:
                logits(model)
        del model
        assert not mapped(folder)
        assert len(list(FILES.iterdir())) == before


def test_packed_bytes_are_those_of_the_file_and_no_longer_mapped(folder: Path) -> None:
    file = PreparedFile(folder)
    one = engine()
    file.load_into(one)
    file.close()
    packed = one.packed()
    assert not mapped(folder)
    assert packed.tobytes() == (folder / NAME).read_bytes()[-packed.size :]


def test_packed_bytes_are_asked_for_in_the_midst_of_copying(folder: Path) -> None:
    data = (folder / NAME).read_bytes()

    def left() -> int:
        """Bytes that are still mapped."""
        lines = [line for line in MAPS.read_text().splitlines() if line.endswith(NAME)]
        ends = [line.split(" ", 1)[0].split("-") for line in lines]
        return sum(int(end, 16) - int(begin, 16) for begin, end in ends)

    in_time = 0
    for _ in range(4):
        file = PreparedFile(folder)
        one = engine()
        file.load_into(one)
        file.close()
        whole = left()
        soon(lambda whole=whole: left() < whole)
        in_time += left() > 0
        packed = one.packed()
        assert left() == 0
        assert packed.tobytes() == data[-packed.size :]
    assert in_time


def test_another_parameter_can_be_loaded_into_it(folder: Path) -> None:
    name, shape = "h.1.mlp.c_proj.weight", (4 * CONFIG.n_embd, CONFIG.n_embd)
    other = np.random.default_rng(5).standard_normal(shape, np.float32) * np.float32(0.1)
    with model_of(SpreadSource(CONFIG, replace={name: other}), device="cpu") as model:
        expected = logits(model)
    file = PreparedFile(folder)
    one = engine()
    file.load_into(one)
    file.close()
    one.load(name, other, "F32")
    assert answer(one) == expected
    assert not mapped(folder)


def test_a_file_takes_the_place_of_another(folder: Path, tmp_path: Path, wanted: bytes) -> None:
    second = tmp_path / "second"
    with model_of(SpreadSource(CONFIG, seed=1), byte_tokenizer(), device="cpu") as model:
        model.save_prepared(second)
        expected = logits(model)
    with ExitStack() as stack:
        files = [PreparedFile(one) for one in (folder, second)]
        for file in files:
            stack.callback(file.close)
        one = engine()
        for turn in (0, 1, 0, 0, 1):
            files[turn].load_into(one)
            assert not mapped((second, folder)[turn])
            assert answer(one) == (wanted, expected)[turn]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_first_damage_is_named_and_nothing_stays(
    threads: int, folder: Path, wanted: bytes
) -> None:
    path = folder / NAME
    good = path.read_bytes()
    before = len(list(FILES.iterdir()))
    one = engine(threads)
    start = 8 + int.from_bytes(good[:8], "little")
    for places in ([0], [40 * PIECE, 17 * PIECE + 5, 18 * PIECE], [len(good) - start - 1]):
        bad = bytearray(good)
        for place in places:
            bad[start + place] ^= 16
        path.write_bytes(bad)
        file = PreparedFile(folder)
        with pytest.raises(CheckpointError, match=rf"damaged: piece {min(places) // PIECE}, bytes"):
            file.load_into(one)
        file.close()
        assert not mapped(folder)
        assert len(one.missing()) == len(CONFIG.tensor_shapes())
        with pytest.raises(CheckpointError, match="were not loaded"):
            answer(one)
        assert len(list(FILES.iterdir())) == before
    path.write_bytes(good)
    file = PreparedFile(folder)
    file.load_into(one)
    file.close()
    assert answer(one) == wanted


@pytest.mark.parametrize("how", ["written", "cut off"])
def test_a_change_before_the_copy_is_an_error(how: str, folder: Path, wanted: bytes) -> None:
    """Whoever wrote into the file may have changed what the first look found right."""
    path = folder / NAME
    good = path.read_bytes()
    for _ in range(20):  # until the change is earlier than the copy
        path.write_bytes(good)
        file = PreparedFile(folder)
        one = engine()
        file.load_into(one)
        size = len(good)
        if how == "written":
            with path.open("r+b") as stream:
                stream.seek(size - 5)
                stream.write(bytes([good[-5] ^ 1]))
        else:
            os.truncate(path, size - PIECE)
        in_time = mapped(folder)
        file.close()
        if in_time:
            break
    assert in_time
    reason = r"damaged: piece \d+" if how == "written" else f"the file ends at byte {size - PIECE}"
    with pytest.raises(CheckpointError, match=rf"changed while it was being loaded: .*{reason}"):
        one.packed()
    for _ in range(2):
        with pytest.raises(CheckpointError, match=reason):
            answer(one)
    path.write_bytes(good)
    file = PreparedFile(folder)
    file.load_into(one)
    file.close()
    assert answer(one) == wanted


def test_a_forked_child_has_the_model_too(folder: Path) -> None:
    code = """
import os, sys, warnings
from gpt2_fast import GPT2
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads at a fork
ids = [1, 200, 3]
model = GPT2.from_pretrained(sys.argv[1], threads=2)
children = []
expected = model.forward(ids).tobytes()
for _ in range(8):
    child = os.fork()
    if child == 0:
        same = model.forward(ids).tobytes() == expected
        model.close()
        os._exit(0 if same else 1)
    children.append(child)
codes = {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
print(codes, model.forward(ids).tobytes() == expected)
"""
    assert run(code, folder) == "{0} True"


def test_without_another_thread_it_is_copied_at_once(folder: Path, wanted: bytes) -> None:
    code = """
import ctypes, hashlib, sys
from pathlib import Path
import tests.checkpoints.test_prepared_mapped as here
file = here.PreparedFile(Path(sys.argv[1]))
one = here.engine(threads=1)
libc = ctypes.CDLL(None, use_errno=True)
attributes = ctypes.create_string_buffer(256)
assert libc.pthread_attr_init(attributes) == 0
assert libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(1 << 46)) == 0  # none has it
assert libc.pthread_setattr_default_np(attributes) == 0
file.load_into(one)
print(here.mapped(Path(sys.argv[1])), hashlib.sha256(here.answer(one)).hexdigest())
"""
    assert run(code, folder) == f"False {hashlib.sha256(wanted).hexdigest()}"


def run(code: str, folder: Path) -> str:
    path = str(Path(gpt2_fast.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )
    return done.stdout.strip()
