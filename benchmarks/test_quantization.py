"""The quality figures, on little."""

from __future__ import annotations

import numpy as np

from benchmarks import quantization
from gpt2_fast import GPT2Config


def test_log_probabilities_are_those_of_softmax() -> None:
    logits = np.array([[0.0, np.log(3.0)], [1000.0, 1000.0]], np.float32)
    found = np.exp(quantization.log_probabilities(logits))
    np.testing.assert_allclose(found, [[0.25, 0.75], [0.5, 0.5]], rtol=1e-6)


def test_narrower_precisions_cost_more() -> None:
    rows = quantization.on_text("It was a truth universally acknowledged. " * 12)
    divergence = [float(row["KL, nats per token"]) for row in rows]
    names = ["fp32", "bf16", "int8", "int4"]
    assert [row["precision"] for row in rows] == [*names, *(f"{p}, int8 cache" for p in names)]
    assert divergence[0] == 0
    assert 0 < divergence[1] < divergence[2] < divergence[3] < 0.5
    assert 0 < divergence[4] < divergence[2]  # the cache alone costs less than int8 weights

    config = GPT2Config(n_layer=2, n_embd=64, n_head=2, n_ctx=32, vocab_size=90, eos_token_id=None)
    rows = quantization.on_random_weights(config, 20)
    errors = [float(row["error / spread, root mean square"]) for row in rows]
    assert errors[0] == 0
    assert 0 < errors[1] < errors[2] < errors[3] < 2
    assert 0 < errors[4] < errors[2]
    assert quantization.as_markdown(rows).count("\n") == 10
