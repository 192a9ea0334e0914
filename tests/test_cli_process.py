"""The `gpt2-fast` command as a process: pipes, signals, encodings, terminals, imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gpt2_fast
from gpt2_fast import GPT2, GPT2Config

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def slow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes for seconds: 8,000 tokens of context."""
    config = GPT2Config(n_layer=2, n_embd=64, n_head=2, n_ctx=8000, vocab_size=4096, eos_token_id=0)
    folder = tmp_path_factory.mktemp("slow") / "model"
    with GPT2.from_pretrained("builtin") as model:
        tokenizer = model.tokenizer
    with GPT2.from_config(config, tokenizer=tokenizer) as made:
        made.save_pretrained(folder)
    return folder


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "gpt2_fast", *words]


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    return {**kept, "PYTHONPATH": str(ROOT), **changes}


def run(words: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
    env = environment(**options.pop("env", {}))
    return subprocess.run(words, check=False, capture_output=True, env=env, timeout=60, **options)


def test_module_is_the_command_and_imports_little() -> None:
    script = (
        "import sys; before = set(sys.modules); from gpt2_fast.cli import main; "
        f"code = main(['generate', {PROMPT!r}, '-n', '5', '--seed', '1']); "
        "heavy = {'torch', 'transformers', 'rich', 'typer', 'huggingface_hub', 'requests',"
        " 'tiktoken', 'hashlib', 'shutil', 'difflib'}; "
        "print(code, sorted(heavy & set(sys.modules) - before))"
    )
    inside = run([sys.executable, "-c", script])
    outside = run(command("generate", PROMPT, "-n", "5", "--seed", "1"))
    assert outside.returncode == 0
    assert inside.stdout == outside.stdout + b"0 []\n"


def test_imports_without_site_home_or_network(tmp_path: Path) -> None:
    import numpy as np

    places = os.pathsep.join([str(ROOT), str(Path(np.__file__).parent.parent)])
    script = "import gpt2_fast, sys; print(gpt2_fast.__version__, 'torch' in sys.modules)"
    env = {"PYTHONPATH": places, "PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-S", "-O", "-W", "error", "-c", script],
        check=False,
        capture_output=True,
        env=env,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.stderr == b""
    assert done.stdout.decode().split() == [gpt2_fast.__version__, "False"]


def test_reader_that_leaves(slow_folder: Path) -> None:
    words = command("generate", PROMPT, "-m", str(slow_folder), "-n", "7000", "--seed", "1")
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(len(PROMPT)) == PROMPT.encode()
        process.stdout.close()
        assert process.wait(30) == 141
        assert process.stderr.read() == b""


def test_ctrl_c_while_it_writes(slow_folder: Path) -> None:
    words = command("generate", PROMPT, "-m", str(slow_folder), "-n", "7000", "--seed", "1")
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.read(len(PROMPT) + 10)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(30) == 130
        assert process.stderr.read() == b""
    assert first.startswith(PROMPT.encode())
    assert len(rest) < 40_000  # it did not write to the end


@pytest.mark.parametrize(
    "env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}]
)
def test_encodings_that_lack_characters(env: dict[str, str]) -> None:
    words = command("generate", "caf\u00e9", "-n", "3", "--seed", "1")
    done = run(words, env={"PYTHONUTF8": "0", **env})
    plain = run(words, env={"PYTHONUTF8": "1"})
    assert done.returncode == plain.returncode == 0
    assert done.stdout.decode("ascii").startswith("caf\\xe9")
    assert done.stdout.decode("ascii").replace("\\xe9", "\u00e9") == plain.stdout.decode()


@pytest.mark.parametrize(
    ("redirection", "message"),
    [
        (">&-", b"error: standard output is closed\n"),
        (">/dev/full", b"error: No space left on device\n"),
        ("<&-", b"error: standard input is closed\n"),
    ],
)
def test_closed_and_full_files(redirection: str, message: bytes) -> None:
    prompt = "-" if "<" in redirection else PROMPT
    words = command("generate", prompt, "-m", "builtin", "--seed", "1")
    for given in (words, command("--help")) if "full" in redirection else (words,):
        done = run(["sh", "-c", f'exec "$@" {redirection}', "sh", *given])
        assert (done.returncode, done.stdout, done.stderr) == (1, b"", message)


def on_terminal(words: list[str], **changes: str) -> bytes:
    """What a command writes to a terminal."""
    ours, theirs = os.openpty()
    env = environment(**{"TERM": "xterm", "COLUMNS": "80", **changes})
    try:
        files = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        subprocess.run(words, check=True, env=env, timeout=60, **files)
        return os.read(ours, 1 << 16)
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no pseudo-terminals")
def test_styles_on_a_terminal_only() -> None:
    words = command("generate", PROMPT, "-n", "3", "--seed", "1", "-m", "builtin")
    assert b"\x1b[2m" + PROMPT.encode() + b"\x1b[0m" in on_terminal(words)
    table = on_terminal(command("score", "to \x1b[2J be", "-m", "builtin"))
    assert b"\x1b[2J" not in table
    assert b"perplexity" in table
    for plain in (words, command("score", "to be")):
        assert b"\x1b" not in on_terminal(plain, NO_COLOR="1")
        assert b"\x1b" not in run(plain).stdout
    assert b"\x1b" not in on_terminal(words, TERM="dumb")
