"""GPT-2 as an ONNX graph of ONNX Runtime's own fused operators, written node by node.

An export of a torch module would leave the fusing to an optimizer that knows some versions of some
models. Here the attention is `GroupQueryAttention`, which writes new keys and values into a cache
of full length in place, and the head sees the last position only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.peers.contract import Shape

FUSED = "com.microsoft"


class _Graph:
    """Nodes and constants in the making."""

    def __init__(self, shape: Shape, weights: dict[str, Any]) -> None:
        self.shape, self.weights = shape, weights
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, array: Any) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def weight(self, name: str) -> str:
        return self.constant(name, self.weights.pop(name))

    def node(
        self, operator: str, inputs: list[str], outputs: list[str], domain: str = "", **how: Any
    ) -> str:
        from onnx import helper

        name = f"{outputs[0]}/{operator}"
        made = helper.make_node(operator, inputs, outputs, name=name, domain=domain, **how)
        self.nodes.append(made)
        return outputs[0]

    def linear(self, x: str, name: str) -> str:
        product = self.node("MatMul", [x, self.weight(name + ".weight")], [name + "/product"])
        return self.node("Add", [product, self.weight(name + ".bias")], [name])

    def add_norm(self, x: str, more: str, name: str) -> tuple[str, str]:
        """The normalised sum, and the sum."""
        outputs = [name, "", "", name + "/sum"]
        scales = [self.weight(name + ".weight"), self.weight(name + ".bias")]
        epsilon = self.shape.layer_norm_epsilon
        self.node("SkipLayerNormalization", [x, more, *scales], outputs, FUSED, epsilon=epsilon)
        return name, name + "/sum"

    def attention(self, x: str, layer: int) -> str:
        stem, heads = f"h.{layer}.attn", self.shape.n_head
        qkv = self.linear(x, stem + ".c_attn")
        cached = [f"past.{layer}.key", f"past.{layer}.value"]
        mixed = self.node(
            "GroupQueryAttention",
            [qkv, "", "", *cached, "seqlens_k", "total_sequence_length"],
            [stem, f"present.{layer}.key", f"present.{layer}.value"],
            FUSED,
            num_heads=heads,
            kv_num_heads=heads,
            do_rotary=0,
        )
        return self.linear(mixed, stem + ".c_proj")

    def body(self) -> None:
        """From ids to the logits of the last position."""
        words, places = self.weight("wte.weight"), self.weight("wpe.weight")
        x = self.node("Gather", [words, "input_ids"], ["wte"])
        more = self.node("Gather", [places, "position_ids"], ["wpe"])
        for layer in range(self.shape.n_layer):
            block = f"h.{layer}."
            normed, x = self.add_norm(x, more, block + "ln_1")
            more = self.attention(normed, layer)
            normed, x = self.add_norm(x, more, block + "ln_2")
            product = self.node(
                "MatMul",
                [normed, self.weight(block + "mlp.c_fc.weight")],
                [block + "mlp.c_fc"],
            )
            bias = self.weight(block + "mlp.c_fc.bias")
            inner = self.node("FastGelu", [product, bias], [block + "mlp"], FUSED)
            more = self.linear(inner, block + "mlp.c_proj")
        normed, _ = self.add_norm(x, more, "ln_f")
        last = self.constant("last", np.array(-1, np.int64))
        final = self.node("Gather", [normed, last], ["final"], axis=1)
        head = self.constant("head.weight", self.words.T)
        self.node("MatMul", [final, head], ["logits"])

    def build(self) -> Any:
        from onnx import TensorProto, helper

        self.words = self.weights["wte.weight"]
        self.body()
        shape = self.shape
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "new"])
            for name in ("input_ids", "position_ids")
        ]
        inputs.append(helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, ["batch"]))
        inputs.append(helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, []))
        outputs = [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", shape.vocab_size])
        ]
        for layer in range(shape.n_layer):
            for part in ("key", "value"):
                sizes: list[str | int | None] = ["batch", shape.n_head, "length", shape.head_size]
                for side, ends in (("past", inputs), ("present", outputs)):
                    name = f"{side}.{layer}.{part}"
                    ends.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes))
        graph = helper.make_graph(self.nodes, "gpt2", inputs, outputs, self.constants)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid(FUSED, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def model(shape: Shape, weights: dict[str, Any]) -> Any:
    """The graph in float32; `weights` is emptied."""
    return _Graph(shape, weights).build()
