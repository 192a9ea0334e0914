"""TensorFlow itself reads what our writer writes, and we read what TensorFlow writes.

TensorFlow is no dependency of ours and does not share a process with the tests. It is looked for in
this Python, then in the Python that GPT2_FAST_TF_PYTHON names:

    python -m venv tf && tf/bin/pip install tensorflow-cpu
    GPT2_FAST_TF_PYTHON=tf/bin/python pytest -m slow tests/checkpoints/test_tensorflow.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2_fast.checkpoints.openai_bundle import open_bundle, verify_tensors
from gpt2_fast.config import GPT2Config

from . import bundle_writer as bw

pytestmark = pytest.mark.slow

CONFIG = GPT2Config(n_layer=12, n_embd=64, n_head=4, n_ctx=32, vocab_size=500, eos_token_id=None)

READ = """
import sys
import numpy as np
import tensorflow as tf
reader = tf.train.load_checkpoint(sys.argv[1])
names = reader.get_variable_to_shape_map()
np.savez(sys.argv[2], **{name.replace("/", "|"): reader.get_tensor(name) for name in names})
"""

# As gpt-2-simple saves: tf.compat.v1.train.Saver over graph variables, with Adam's slots.
WRITE = """
import sys
import numpy as np
import tensorflow as tf
v1 = tf.compat.v1
v1.disable_eager_execution()
given = np.load(sys.argv[1])
dtype = sys.argv[3]
step = v1.get_variable("global_step", initializer=np.int64(1000), trainable=False)
variables = []
for key in given.files:
    value = tf.cast(given[key], dtype)
    variables.append(v1.get_variable(key.replace("|", "/"), initializer=value))
if dtype == "float32":
    loss = tf.add_n([tf.reduce_sum(v * v) for v in variables])
    train = v1.train.AdamOptimizer(1e-9).minimize(loss)
saver = v1.train.Saver(save_relative_paths=True)
with v1.Session() as session:
    session.run(v1.global_variables_initializer())
    saver.save(session, sys.argv[2] + "/model", global_step=1000)
"""


@pytest.fixture(scope="module")
def tensorflow() -> str:
    """A Python that has TensorFlow."""
    if importlib.util.find_spec("tensorflow") is not None:
        return sys.executable
    # Half a gigabyte, and not for every Python that this package runs on: no extra asks for it. The
    # same layout from bundle_writer.py is read in every run.
    python = os.environ.get("GPT2_FAST_TF_PYTHON")
    if not python:
        pytest.skip("no TensorFlow here, and GPT2_FAST_TF_PYTHON names no Python that has it")
    return python


def run(python: str, script: str, *arguments: str | Path) -> None:
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": ""}
    command = [python, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    "options", [{}, {"block_bytes": 100, "restart_interval": 1}, {"shards": 3}], ids=str
)
def test_tensorflow_reads_ours(tensorflow: str, tmp_path: Path, options: dict[str, int]) -> None:
    tensors = bw.write_release(tmp_path, CONFIG, **options)
    run(tensorflow, READ, tmp_path, tmp_path / "read.npz")
    with np.load(tmp_path / "read.npz") as read:
        assert {name.replace("|", "/") for name in read.files} == set(tensors)
        for name in read.files:
            np.testing.assert_array_equal(read[name], tensors[name.replace("|", "/")])


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "float64"])
def test_we_read_tensorflows(tensorflow: str, tmp_path: Path, kind: str) -> None:
    tensors = bw.openai_tensors(CONFIG)
    rounded = {  # to what bfloat16 holds, so that every type holds it
        name: (value.view(np.uint32) & 0xFFFF0000).view(np.float32)
        for name, value in tensors.items()
    }
    if kind == "float16":
        rounded = {n: v.astype(np.float16).astype(np.float32) for n, v in rounded.items()}
    np.savez(tmp_path / "given.npz", **{n.replace("/", "|"): v for n, v in rounded.items()})
    run(tensorflow, WRITE, tmp_path / "given.npz", tmp_path, kind)
    assert (tmp_path / "checkpoint").exists()
    (tmp_path / "hparams.json").write_text(json.dumps(bw.hparams(CONFIG)))
    with open_bundle(tmp_path) as checkpoint:
        verify_tensors(checkpoint)
        tensors_read = checkpoint.tensors
        assert tensors_read["wte.weight"].dtype == {"float16": "F16", "bfloat16": "BF16"}.get(
            kind, "F32"
        )
        for name, stored in (
            ("wte.weight", "model/wte"),
            ("wpe.weight", "model/wpe"),
            ("h.11.attn.c_proj.weight", "model/h11/attn/c_proj/w"),
            ("h.2.mlp.c_proj.weight", "model/h2/mlp/c_proj/w"),
            ("h.10.attn.c_attn.bias", "model/h10/attn/c_attn/b"),
            ("h.7.ln_2.weight", "model/h7/ln_2/g"),
            ("ln_f.bias", "model/ln_f/b"),
        ):
            wanted = rounded[stored]
            wanted = wanted[0] if stored.endswith("/w") else wanted
            np.testing.assert_array_equal(tensors_read[name].float32(), wanted)
