"""Write the built-in model's folder: weights in fp16, config.json, tokenizer files, model card.

    python -m tools.builtin_model.export RUN/best gpt2_fast/data/builtin --card MODEL_CARD.md

The folder has Hugging Face's layout, so `transformers` reads it as well as `gpt2_fast` does. Its
weights are rounded to the eight significant bits of bfloat16, which measures no worse: the zeros
behind them make the wheel smaller by a seventh of the model (deflate leaves 77 % instead of 92 %).

`--mix FOLDER SHARE` adds weights of an earlier export to it, element by element: what one long run
began from and what it came to often make a better model together (Wortsman et al. 2022,
arXiv:2203.05482).
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LIMIT = 10_000_000  # bytes of weights that the wheel has room for


def write_model(
    folder: Path, weights: Mapping[str, Tensor], vocabulary: Path, *, heads: int
) -> None:
    """Write weights under their Hugging Face names in fp16, with config and tokenizer beside them.

    Args:
        folder: made if it does not exist; files in it are replaced.
        weights: all parameters; the head is tied, so it has no entry.
        vocabulary: folder of vocab.json and merges.txt.
        heads: the one dimension that no tensor's shape shows.
    """
    tensors = {
        f"transformer.{name}": value.detach().to(torch.float16).contiguous()
        for name, value in weights.items()
    }
    if not all(bool(value.isfinite().all()) for value in tensors.values()):
        raise ValueError("a weight is not finite in fp16")
    V, C = weights["wte.weight"].shape
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": V,
        "n_positions": weights["wpe.weight"].shape[0],
        "n_ctx": weights["wpe.weight"].shape[0],
        "n_embd": C,
        "n_layer": layer_count(weights),
        "n_head": heads,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-05,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for name in ("vocab.json", "merges.txt"):
        if (vocabulary / name).resolve() != (folder / name).resolve():
            shutil.copyfile(vocabulary / name, folder / name)


def layer_count(weights: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[1] for name in weights if name.startswith("h.")})


def mixed(
    weights: Mapping[str, Tensor], others: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """(1 - share) of the one and a share of the others, in float32."""
    if not 0 <= share <= 1:
        raise ValueError(f"a share of other weights is from 0 to 1, got {share}")
    shapes = [{n: tuple(v.shape) for n, v in each.items()} for each in (weights, others)]
    if shapes[0] != shapes[1]:
        different = min(set(shapes[0].items()) ^ set(shapes[1].items()))
        raise ValueError(f"weights of different shapes cannot be mixed: {different}")
    return {
        name: value.float().lerp(others[name].float(), share) for name, value in weights.items()
    }


def deepened(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A model of more layers that gives the same logits.

    Layers are repeated evenly. A repeated one's projections into the residual stream are zero, so
    it changes nothing until it is trained (Wu et al. 2024, arXiv:2401.02415, section 3.2).
    """
    known = layer_count(weights)
    if known > layers:
        raise ValueError(f"a model of {known} layers cannot have {layers}")
    deep = {name: value for name, value in weights.items() if not name.startswith("h.")}
    for layer in range(layers):
        source = layer * known // layers
        new = layer > 0 and source == (layer - 1) * known // layers
        prefix = f"h.{source}."
        for name, value in weights.items():
            if name.startswith(prefix):
                last = name.removeprefix(prefix)
                nothing = new and ".c_proj." in last
                deep[f"h.{layer}.{last}"] = torch.zeros_like(value) if nothing else value
    return deep


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Weights under their names without the prefix `transformer`."""
    held = load_file(folder / "model.safetensors")
    return {name.removeprefix("transformer."): value for name, value in held.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="write the built-in model's folder")
    parser.add_argument("source", type=Path, help="RUN/best of train.py")
    parser.add_argument("out", type=Path, help="folder to write, e.g. gpt2_fast/data/builtin")
    parser.add_argument("--card", type=Path, help="model card to put beside the weights")
    parser.add_argument("--mix", nargs=2, metavar=("FOLDER", "SHARE"),
                        help="an earlier export, and its share of the weights")  # fmt: skip
    arguments = parser.parse_args()
    weights = read_weights(arguments.source)
    if arguments.mix:
        others = deepened(read_weights(Path(arguments.mix[0])), layer_count(weights))
        weights = mixed(weights, others, float(arguments.mix[1]))
    weights = {name: value.to(torch.bfloat16) for name, value in weights.items()}
    size = sum(value.nbytes for value in weights.values())
    if size > LIMIT:
        raise ValueError(f"the weights take {size:,} bytes, more than {LIMIT:,}")
    heads = json.loads((arguments.source / "config.json").read_text("utf-8"))["n_head"]
    write_model(arguments.out, weights, arguments.source, heads=heads)
    if arguments.card:
        shutil.copyfile(arguments.card, arguments.out / "MODEL_CARD.md")


if __name__ == "__main__":
    main()
