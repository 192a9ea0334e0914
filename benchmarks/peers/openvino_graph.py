"""GPT-2 as an OpenVINO model with its cache as state, as OpenVINO GenAI wants it.

Written operator by operator: an export would need optimum-intel, which wants another transformers
than the rest of the comparison. Inputs and states have the names and shapes of its exports.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.peers.contract import Shape


class _Builder:
    """Operators in the making."""

    def __init__(self, shape: Shape, weights: dict[str, Any]) -> None:
        import openvino as ov
        from openvino import opset13

        self.shape, self.weights = shape, weights
        self.op: Any = opset13
        self.float: Any = ov.Type.f32
        self.sinks: list[Any] = []
        any_size = ov.PartialShape([-1, -1])
        self.ids = self._input("input_ids", any_size, ov.Type.i64)
        self.mask = self._input("attention_mask", any_size, ov.Type.i64)
        self.places = self._input("position_ids", any_size, ov.Type.i64)
        self.beams = self._input("beam_idx", ov.PartialShape([-1]), ov.Type.i32)
        self.words = self._weight("wte.weight")

    def _input(self, name: str, shape: Any, kind: Any) -> Any:
        made = self.op.parameter(shape, kind, name=name)
        made.output(0).get_tensor().set_names({name})
        return made

    def _weight(self, name: str) -> Any:
        return self.op.constant(np.ascontiguousarray(self.weights.pop(name)), name=name)

    def _linear(self, x: Any, name: str) -> Any:
        weights = self.op.constant(np.ascontiguousarray(self.weights.pop(name + ".weight").T))
        weights.set_friendly_name(name)
        product = self.op.matmul(x, weights, transpose_a=False, transpose_b=True)
        return self.op.add(product, self._weight(name + ".bias"))

    def _norm(self, x: Any, name: str) -> Any:
        epsilon = self.shape.layer_norm_epsilon
        axes = self.op.constant([-1], np.int64)
        normed = self.op.mvn(x, axes, normalize_variance=True, eps=epsilon, eps_mode="INSIDE_SQRT")
        scaled = self.op.multiply(normed, self._weight(name + ".weight"))
        return self.op.add(scaled, self._weight(name + ".bias"))

    def _cached(self, new: Any, name: str) -> Any:
        """Old and new keys or values; the old ones are state."""
        import openvino as ov

        op, heads, width = self.op, self.shape.n_head, self.shape.head_size
        batch = op.gather(op.shape_of(self.ids), op.constant([0], np.int64), op.constant(0))
        rest = op.constant([heads, 0, width], np.int64)
        empty = op.broadcast(op.constant(0.0, np.float32), op.concat([batch, rest], 0))
        old = op.read_value(empty, name, self.float, ov.PartialShape([-1, heads, -1, width]))
        mine = op.gather(old, self.beams, op.constant(0))
        both = op.concat([mine, new], 2)
        self.sinks.append(op.assign(both, name))
        return both

    def _attention(self, x: Any, layer: int, allowed: Any) -> Any:
        op, stem = self.op, f"h.{layer}.attn"
        qkv = self._linear(x, stem + ".c_attn")
        split = op.split(qkv, op.constant(2, np.int64), 3)
        heads = op.constant([0, 0, self.shape.n_head, self.shape.head_size], np.int64)
        order = op.constant([0, 2, 1, 3], np.int64)
        q, k, v = (
            op.transpose(op.reshape(split.output(i), heads, special_zero=True), order)
            for i in range(3)
        )
        # The names that optimum gives the states of its exports.
        names = [
            f"past_key_values.{layer}.{part}present.{layer}.{part}" for part in ("key", "value")
        ]
        keys, values = self._cached(k, names[0]), self._cached(v, names[1])
        mixed = op.scaled_dot_product_attention(q, keys, values, allowed, causal=False)
        flat = op.constant([0, 0, self.shape.n_embd], np.int64)
        return self._linear(
            op.reshape(op.transpose(mixed, order), flat, special_zero=True), stem + ".c_proj"
        )

    def _allowed(self) -> Any:
        """(B, 1, T, S): positions up to one's own that the mask does not forbid."""
        op = self.op
        length = op.gather(op.shape_of(self.mask), op.constant(1), op.constant(0))
        seen = op.range(op.constant(0, np.int64), length, op.constant(1, np.int64), "i64")
        own = op.unsqueeze(self.places, op.constant([1, 3], np.int64))
        earlier = op.less_equal(seen, own)
        given = op.unsqueeze(op.convert(self.mask, "boolean"), op.constant([1, 2], np.int64))
        return op.logical_and(earlier, given)

    def build(self) -> Any:
        """From ids to the logits of every position; GenAI itself drops all but the last."""
        import openvino as ov

        op = self.op
        zero, allowed = op.constant(0), self._allowed()
        places = op.gather(self._weight("wpe.weight"), self.places, zero)
        x = op.add(op.gather(self.words, self.ids, zero), places)
        for layer in range(self.shape.n_layer):
            block = f"h.{layer}."
            x = op.add(x, self._attention(self._norm(x, block + "ln_1"), layer, allowed))
            inner = self._linear(self._norm(x, block + "ln_2"), block + "mlp.c_fc")
            x = op.add(x, self._linear(op.gelu(inner, "tanh"), block + "mlp.c_proj"))
        logits = op.matmul(self._norm(x, "ln_f"), self.words, transpose_a=False, transpose_b=True)
        logits.output(0).get_tensor().set_names({"logits"})
        inputs = [self.ids, self.mask, self.places, self.beams]
        return ov.Model([op.result(logits)], self.sinks, inputs, "gpt2")


def model(shape: Shape, weights: dict[str, Any]) -> Any:
    """The model in float32; `weights` is emptied."""
    return _Builder(shape, weights).build()
