"""tools/builtin_model: the trainer, on texts of a few lines."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

import gpt2_fast
from tools.builtin_model import (
    export,
    measure,
    network,
    optimizers,
    train,
    windows,
)

BUILTIN = Path(__file__).parent.parent / "gpt2_fast" / "data" / "builtin"


def test_rate() -> None:
    shares = [train.rate(x, 0.1, 0.5) for x in (0.0, 0.05, 0.1, 0.3, 0.5, 0.75, 1.0, 1.2)]
    assert shares == pytest.approx([0, 0.5, 1, 1, 1, 0.5, 0, 0])


def test_orthogonal_updates_have_like_singular_values() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(optimizers.orthogonal(torch.randn(2, 12, 30)))
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_is_momentum_made_orthogonal(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    orthogonal, multiplied = optimizers.orthogonal, set()

    def watched(update: torch.Tensor) -> torch.Tensor:
        multiplied.add(update.dtype)
        return orthogonal(update)

    monkeypatch.setattr(optimizers, "orthogonal", watched)
    groups = [[torch.nn.Parameter(torch.randn(*shape)) for _ in range(2)]
              for shape in ((12, 30), (30, 12), (9, 9))]  # fmt: skip
    parameters = [parameter for group in groups for parameter in group]
    muon = optimizers.Muon(groups, 0.3, dtype)
    for group in muon.param_groups:
        group["lr"] = 0.01
    wanted = [p.detach().clone() for p in parameters]
    momenta = [torch.zeros_like(p) for p in wanted]
    for _ in range(3):
        gradients = [torch.randn(*p.shape) for p in wanted]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        muon.step()
        for n, gradient in enumerate(gradients):
            momenta[n] = 0.95 * momenta[n] + 0.05 * gradient
            update = 0.05 * gradient + 0.95 * momenta[n]
            tall = update.shape[0] > update.shape[1]
            update = (update.T if tall else update)[None].to(dtype)
            update = orthogonal(update)[0].float()
            wanted[n] *= 1 - 0.01 * 0.3
            wanted[n] -= 0.2 * max(update.shape) ** 0.5 * 0.01 * (update.T if tall else update)
    assert multiplied == {dtype}
    # Alone or in a stack, products of bfloat16 are rounded in other places: 2^-8 of an update's
    # elements, which are up to 0.01.
    tolerance = 2e-5 if dtype == torch.float32 else 2e-4
    for parameter, expected in zip(parameters, wanted, strict=True):
        assert torch.allclose(parameter, expected, rtol=0, atol=tolerance)


def options(folder: Path, **changed: Any) -> Namespace:
    given = {
        "texts": folder / "texts",
        "run": folder / "run",
        "start": BUILTIN,
        "vocabulary": BUILTIN,
        "layers": network.Shape.layers,
        "width": 192,
        "heads": 6,
        "minutes": 1.0,
        "evaluate_every": 10.0,
        "learning_rate": 1e-3,
        "warm_up": 0.1,
        "decay_from": 0.5,
        "weight_decay": 0.1,
        "dropout": 0.1,
        "word_dropout": 0.0,
        "average": 0.995,
        "batch": 2,
        "teacher": [],
        "teacher_share": 0.5,
        "threads": 1,
        "seed": 0,
        "compile": False,
        "bfloat16": False,
    }
    return Namespace(**given | changed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for name, month in (("emma", "May"), ("poe", "June"), ("bible", "July")):
        text = "\n\n".join(f"It was the {n} of {month}, and she went out." for n in range(90))
        (tmp_path / "texts" / f"{name}.train.txt").write_text(text)
    (tmp_path / "texts" / "emma.heldout.txt").write_text("It was May, and she stayed. " * 60)
    return tmp_path


class Clock:
    """Says that every look at it is two seconds after the last."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 2.0
        return self.now


def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.builtin_model.train.time.monotonic", Clock())
    whole = train.Run(options(folder, run=folder / "whole", minutes=0.3))
    whole.train()
    assert whole.steps > 3

    first = train.Run(options(folder, minutes=0.3))
    before = first.set_rates

    def stop_after_two() -> None:
        before()
        first.stop = first.steps == 1

    monkeypatch.setattr(first, "set_rates", stop_after_two)
    first.train()
    assert first.steps == 2
    second = train.Run(options(folder, minutes=0.3))
    assert second.steps == 2
    second.train()
    assert second.steps == whole.steps
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_a_start_with_fewer_positions_is_continued_with_late_ones(tmp_path: Path) -> None:
    short, long = network.Shape(50, 8, 1, 16, 2), network.Shape(50, 20, 1, 16, 2)
    torch.manual_seed(0)
    model = network.GPT2(short)
    weights = {network.published_name(name): value for name, value in model.named_parameters()}
    export.write_model(tmp_path, weights, BUILTIN, heads=2)
    found = network.GPT2(long)

    network.load_model(found, tmp_path)

    old = model.wpe.detach().half().float()
    expected = torch.cat([old, old[4:], old[4:], old[4:]])
    assert torch.equal(found.wpe, expected)
    assert torch.equal(found.wte, model.wte.half().float())
    with pytest.raises(ValueError, match="8 positions, wanted at most 6"):
        network.load_model(network.GPT2(network.Shape(50, 6, 1, 16, 2)), tmp_path)
    with pytest.raises(ValueError, match=r"wanted wte.weight \(60, 16\), found \(50, 16\)"):
        network.load_model(network.GPT2(network.Shape(60, 8, 1, 16, 2)), tmp_path)
    del weights["ln_f.bias"]
    export.write_model(tmp_path, weights, BUILTIN, heads=2)
    with pytest.raises(ValueError, match=r"wanted ln_f\.bias \(16,\), found nothing"):
        network.load_model(network.GPT2(short), tmp_path)


def test_a_start_with_fewer_layers_says_the_same_and_learns_in_all(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = network.GPT2(network.Shape(50, 8, 4, 16, 2))
    with torch.no_grad():
        for parameter in model.parameters():  # the biases too
            parameter.add_(0.1 * torch.randn(parameter.shape))
    weights = {network.published_name(name): value for name, value in model.named_parameters()}
    export.write_model(tmp_path, weights, BUILTIN, heads=2)
    ids = torch.randint(50, (3, 9))
    expected = network.read_model(tmp_path).logits(ids[:, :-1])
    deep = network.GPT2(network.Shape(50, 8, 6, 16, 2))

    network.load_model(deep, tmp_path)

    assert torch.equal(deep.logits(ids[:, :-1]), expected)
    sources = {0: 0, 2: 1, 3: 2, 5: 3}  # 1 and 4 repeat 0 and 2
    for layer, source in sources.items():
        assert torch.equal(deep.h[layer].mlp_proj, model.h[source].mlp_proj.half().float())
    for layer in (1, 4):
        assert torch.equal(deep.h[layer].c_attn, deep.h[layer - 1].c_attn)
    deep(ids[:, :-1], ids[:, 1:]).backward()
    for layer, block in enumerate(deep.h):
        assert block.attn_proj.grad.abs().min() > 0, layer
        assert block.mlp_proj.grad.abs().min() > 0, layer
    with pytest.raises(ValueError, match="a model of 4 layers cannot have 3"):
        network.load_model(network.GPT2(network.Shape(50, 8, 3, 16, 2)), tmp_path)


def test_a_step_during_which_the_process_stood_still_counts_as_a_few(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("tools.builtin_model.train.time.monotonic", clock)
    run = train.Run(options(folder, minutes=0.25))
    before = run.set_rates

    def stand_still() -> None:
        before()
        clock.now += 1000.0 * (run.steps == 2)

    monkeypatch.setattr(run, "set_rates", stand_still)
    run.train()
    assert run.steps == 5  # of 2, 2, 4 x 2, 2 and 2 seconds


def test_windows_begin_with_a_paragraph_or_anywhere(folder: Path) -> None:
    run = train.Run(options(folder))
    tokenizer, end = windows.Tokenizer.from_folder(BUILTIN), windows.END
    assert tokenizer.decode([end]) == "<|endoftext|>"
    documents = random = 0
    for _ in range(40):
        ids, targets = run.windows.batch(5)
        assert ids.shape == targets.shape == (5, run.windows.length)
        assert torch.equal(ids[:, 1:], targets[:, :-1])
        for row in ids.tolist():
            if row[0] == end:
                documents += 1
                assert tokenizer.decode(row[1:9]).startswith("It was the ")
            else:
                random += 1
    assert 60 < documents < 140
    assert documents + random == 200


def test_each_kind_of_text_has_its_share_of_the_windows(folder: Path) -> None:
    run = train.Run(options(folder))
    tokenizer = windows.Tokenizer.from_folder(BUILTIN)
    months = ("May", "June", "July")
    counts = dict.fromkeys(months, 0)
    for _ in range(100):
        for row in run.windows.batch(10)[0].tolist():
            text = tokenizer.decode(row)
            assert sum(month in text for month in months) == 1
            counts.update((month, counts[month] + 1) for month in months if month in text)
    assert [counts[month] / 1000 for month in months] == pytest.approx(
        list(windows.SHARES.values()), abs=0.06
    )


@pytest.mark.parametrize("name", ["emma", "poe", "bible"])
def test_a_kind_of_text_that_is_missing_is_named(folder: Path, name: str) -> None:
    (folder / "texts" / f"{name}.train.txt").unlink()
    kinds = dict(zip(["emma", "poe", "bible"], windows.SHARES, strict=True))
    with pytest.raises(ValueError, match=f"{kinds[name]}: 0 tokens, wanted over 513"):
        train.Run(options(folder))


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
def test_attention_in_blocks_is_causal_attention(length: int) -> None:
    torch.manual_seed(length)
    given = [torch.randn(2, 3, length, 16, dtype=torch.float64, requires_grad=True) for _ in "qkv"]
    slope = torch.randn(2, 3, length, 16, dtype=torch.float64)
    found = network.attention(*given)
    wanted = torch.nn.functional.scaled_dot_product_attention(*given, is_causal=True)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, given, slope),
                               torch.autograd.grad(wanted, given, slope))  # fmt: skip


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_run_in_bfloat16_multiplies_updates_in_it(folder: Path, bfloat16: bool) -> None:
    muon, _ = train.Run(options(folder, bfloat16=bfloat16)).optimizers
    assert muon.dtype == (torch.bfloat16 if bfloat16 else torch.float32)


def test_dropped_keeps_the_mean() -> None:
    torch.manual_seed(1)
    x = torch.ones(301, 333)
    kept = network.dropped(x, 0.25)
    assert network.dropped(x, 0.0) is x
    assert kept.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert kept.mean().item() == pytest.approx(1.0, abs=0.01)
    # Neighbours, which share a random number, are independent all the same.
    zero = (kept == 0).flatten()
    assert (zero[:-1] & zero[1:]).float().mean().item() == pytest.approx(1 / 16, abs=0.005)


def test_word_dropout_takes_whole_embeddings() -> None:
    """Without layers the logits are linear in what each position holds."""
    torch.manual_seed(2)
    model = network.GPT2(network.Shape(50, 200, 0, 16, 2))
    model.ln_f = torch.nn.Identity()  # type: ignore[assignment]
    ids = torch.randint(0, 50, (40, 200))
    with torch.no_grad():
        found = model.logits(ids, word_dropout=0.25)
        place = model.wpe @ model.wte.T
        word = model.wte @ model.wte.T
    share = ((found - place) * word[ids]).sum(-1) / word[ids].square().sum(-1)
    assert torch.allclose(found, place + share[..., None] * word[ids], atol=1e-5)
    gone = share.abs() < 0.1
    assert torch.allclose(share[~gone], torch.tensor(4 / 3), atol=1e-3)
    assert gone.float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_a_run_passes_its_dropouts_on(folder: Path) -> None:
    run = train.Run(options(folder, dropout=0.25, word_dropout=0.5))
    seen: list[tuple[Any, ...]] = []

    def network_of(*given: Any) -> torch.Tensor:
        seen.append(given[2:])
        return torch.zeros(())

    run.loss(*run.windows.batch(2), network_of, run.taught)
    assert seen == [(0.25, 0.5)]


def test_compiling_changes_nothing_that_training_goes_on_from(folder: Path) -> None:
    run = train.Run(options(folder))
    run.save()
    before = run.checkpoint.read_bytes()

    run.warm_up(run.model, run.taught)

    run.save()
    assert run.checkpoint.read_bytes() == before
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_the_loss_with_teachers_is_a_cross_entropy_with_what_they_expect() -> None:
    torch.manual_seed(0)
    shape = network.Shape(50, 8, 1, 16, 2)
    model = network.GPT2(shape)
    ids, targets = torch.randint(50, (2, 3, 8))
    taught = torch.rand(3, 8, 50)
    taught /= taught.sum(-1, keepdim=True)
    logs = model.logits(ids).double().log_softmax(-1)
    came = -logs.gather(-1, targets[..., None]).mean()
    expected = -(taught * logs).sum(-1).mean()

    assert model(ids, targets).item() == pytest.approx(came.item(), rel=1e-5)
    mixed = model(ids, targets, 0.0, 0.0, taught, 0.3).item()
    assert mixed == pytest.approx((0.7 * came + 0.3 * expected).item(), rel=1e-5)


def test_a_run_learns_from_its_teachers(folder: Path) -> None:
    torch.manual_seed(1)
    for name in ("one", "other"):
        teacher = network.GPT2(network.Shape(layers=2, width=8, heads=1))
        with torch.no_grad():
            teacher.wte *= 50
        weights = {network.published_name(n): value for n, value in teacher.named_parameters()}
        export.write_model(folder / name, weights, BUILTIN, heads=1)
    given = {"start": None, "layers": 1, "width": 16, "heads": 2, "dropout": 0.0}
    teachers = [folder / "one", folder / "other"]
    run = train.Run(options(folder, teacher=teachers, teacher_share=1.0, **given))
    ids, targets = run.windows.batch(2)
    expected = run.taught(ids)
    each = [network.read_model(folder / name).logits(ids).softmax(-1) for name in ("one", "other")]
    assert torch.allclose(expected, (each[0] + each[1]) / 2, atol=1e-7)
    logs = run.model.logits(ids).log_softmax(-1)
    found = run.loss(ids, targets, run.model, run.taught)
    assert found.item() == pytest.approx(-(expected * logs).sum(-1).mean().item(), rel=1e-5)
    found.backward()
    assert all(
        parameter.grad is None for teacher in run.teachers for parameter in teacher.parameters()
    )


def test_a_teacher_of_other_tokens_is_refused(folder: Path) -> None:
    for shape, found in ((network.Shape(50, 512, 1, 8, 1), r"found 50 and 512"),
                         (network.Shape(4096, 500, 1, 8, 1), r"found 4096 and 500")):  # fmt: skip
        teacher = network.GPT2(shape)
        named = {network.published_name(n): value for n, value in teacher.named_parameters()}
        export.write_model(folder / "teacher", named, BUILTIN, heads=1)
        with pytest.raises(ValueError, match=rf"4096 tokens and at least 512 positions, {found}"):
            train.Run(options(folder, teacher=[folder / "teacher"]))


def test_warming_up_compiles_what_the_steps_run(folder: Path) -> None:
    """Other strides, or one tensor for both, would be compiled once more, on the clock."""
    run = train.Run(options(folder))
    seen: list[tuple[torch.Tensor, ...]] = []

    def network_of(*given: Any) -> torch.Tensor:
        seen.append(given[:2])
        loss: torch.Tensor = run.model(*given)
        return loss

    run.warm_up(network_of, run.taught)
    run.step(network_of, run.taught)

    (warm, step), facts = seen, [[(t.shape, t.stride(), t.dtype) for t in each] for each in seen]
    assert facts[0] == facts[1]
    for ids, targets in (warm, step):
        assert ids.data_ptr() != targets.data_ptr()


@pytest.mark.parametrize("decay", [0.995, 0.1])
def test_the_average_follows_the_weights(folder: Path, decay: float) -> None:
    run = train.Run(options(folder, minutes=1.0, average=decay))
    run.seconds = 30.0  # past the warm-up of the rate
    expected = [value.detach().double() for value in run.average.parameters()]
    for steps in (1, 2, 3):
        run.step(run.model, run.taught)
        for mean, value in zip(expected, run.model.parameters(), strict=True):
            mean.lerp_(value.detach().double(), max(1 - decay, 10 / (steps + 10)))
    for mean, value in zip(expected, run.average.parameters(), strict=True):
        assert torch.allclose(value.double(), mean, rtol=0, atol=1e-6)
    assert not torch.equal(run.average.wte, run.model.wte)


def test_exported_weights_are_what_the_engine_loads(folder: Path) -> None:
    run = train.Run(options(folder, minutes=0.0))
    run.train()
    entry = json.loads((run.out / "log.jsonl").read_text().splitlines()[0])
    text = (folder / "texts" / "emma.heldout.txt").read_text()
    with gpt2_fast.GPT2.from_pretrained(run.out / "best", precision="fp32", device="cpu") as model:
        found = measure.bits_per_byte(model, text)
    # Other windows, so nearly the same.
    assert found == pytest.approx(entry["model_bits_per_byte"], rel=0.05)
    for name in ("model.safetensors", "vocab.json", "merges.txt"):
        assert (run.out / "best" / name).read_bytes() == (BUILTIN / name).read_bytes(), name
