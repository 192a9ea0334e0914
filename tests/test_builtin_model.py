"""tools/builtin_model: what made the built-in model, on texts of a few lines."""

from __future__ import annotations

import json
import math
import struct
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import gpt2_fast
from gpt2_fast.checkpoints.hub import resolve
from tools.builtin_model import (
    baselines,
    export,
    measure,
    network,
    optimizers,
    prepare,
    train,
    windows,
)

BUILTIN = Path(__file__).parent.parent / "gpt2_fast" / "data" / "builtin"


def xdr(*words: int | bytes) -> bytes:
    return b"".join(w if isinstance(w, bytes) else struct.pack(">i", w) for w in words)


def test_r_objects() -> None:
    string = [9 | (8 << 12), 3, "é!".encode()]
    names = [1, 9, 5, b"names"]
    lists = xdr(2, 1, 2, 19 | 512, 2, 13, 2, 7, 8, 16, 1, *string, 2 | 1024, *names)
    lists += xdr(16, 2, 9, 1, b"a", 9, 1, b"b", 254)
    assert prepare.named(prepare.RObject(b"X\n" + lists).item()) == {"a": [7, 8], "b": ["é!"]}
    version3 = xdr(3, 1, 2, 5, b"UTF-8", *string)
    assert prepare.RObject(b"X\n" + version3).item() == "é!"
    with pytest.raises(ValueError, match="R type 99"):
        prepare.RObject(b"X\n" + xdr(2, 1, 2, 99, 0)).item()
    with pytest.raises(ValueError, match="serialization"):
        prepare.RObject(b"A\n")


def test_clean_and_split() -> None:
    text = prepare.clean("  one\n two — ‘three’\n \n\n\n“four”\n")
    assert text == "one two -- 'three'\n\n\"four\"\n"
    paragraphs = "\n\n".join(f"paragraph {n}" for n in range(100)) + "\n"
    head, tail = prepare.split(paragraphs)
    assert head + tail == paragraphs
    assert tail.startswith("paragraph ")
    assert head.endswith("\n\n")
    assert 0.05 <= len(tail) / len(paragraphs) < 0.06


def test_a_book_without_its_cover_and_without_slurs() -> None:
    book = "CHAPTER I\n\n" + "CHAPTER I\nIt began." + " And on." * 80 + "THE END THE END\nLicence"
    assert prepare.between(book, "CHAPTER I\n", "THE END").startswith("CHAPTER I\nIt began.")
    assert prepare.between(book, "CHAPTER I\n", "THE END").endswith("And on.THE END ")
    with pytest.raises(ValueError, match="substring not found"):
        prepare.between(book, "CHAPTER II", "THE END")
    assert prepare.without_slurs("One niggard.\n\nTwo Niggers.\n\nThree.\n") == (
        "One niggard.\n\nThree.\n"
    )


def test_one_book_of_several() -> None:
    end = "*** END OF THE PROJECT GUTENBERG EBOOK, "
    books = f"CHAPTER I\n\nHolmes.\n\n{end}SHERLOCK\n\nBy Leo Tolstoy\n\nBOOK ONE: 1805\n\n\n"
    books += (
        f"CHAPTER I\n\nWell, Prince.\n\nBOOK TWO: 1805\n\nCHAPTER I\n\nMore.\n{end}WAR AND PEACE"
    )
    assert prepare.clean(prepare.war_and_peace(books)) == (
        "CHAPTER I\n\nWell, Prince.\n\nBOOK TWO: 1805\n\nCHAPTER I\n\nMore.\n"
    )


def test_tales_without_notices_and_poems() -> None:
    end = "\r\nEnd of The Project Gutenberg Etext of The Works, V. 1\r\nMore of it.\r\n"
    works = "A licence.\r\n*END*THE SMALL PRINT!*END*\r\n[Redactor's note: none\r\nof {it}]\r\n"
    works += (
        f"_One_ tale.{{*1}}\r\n\r\n~~~~~~ End of Text ~~~~~~\r\n{end}A licence.\r\n*END*A*END*\r\n"
    )
    works += f"Two ta\u00adles.\r\n\r\n~~~~~~ End of Texr ~~~~~~\r\n======POEMS\r\nThe Raven{end}"
    assert prepare.clean(prepare.tales(works)) == "One tale.\n\nTwo tales.\n"


def test_osis_prose() -> None:
    book = (
        '<chapter n="1"/><w lemma="a">In</w> <w>it</w>, <note placement="foot">no<w>!</w></note>'
        ' so &amp; so .<div eID="g1" type="x-p"/><title>T</title>Then<l n="1">verse</l>'
    )
    assert prepare.clean(prepare.osis_prose(book)) == "In it, so & so.\n\nThen verse\n"


def test_a_package_that_is_another_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(ValueError, match="sha256 is 2d711642"):
        prepare.Package("a", "0" * 64, ("false",)).fetch(tmp_path)


def test_kneser_ney_is_a_distribution_and_learns() -> None:
    random = np.random.default_rng(0)
    # A cycle with noise: counts 1 to 4 occur at every order, as the discounts need.
    ids = (np.arange(6000) % 7 + random.integers(0, 12, 6000) * (random.random(6000) < 0.3)) % 20
    model = baselines.KneserNey(ids.astype(np.int64), 20)
    for history in ([3, 4, 5, 6], [19, 19, 19, 19], [0, 1, 7, 9]):
        last = np.array([[*history, token] for token in range(20)], np.int64)
        found = np.full(20, 1 / 20)
        for order, table in enumerate(model.tables, 1):
            grams = np.array([baselines.codes(row[-order:], order)[0] for row in last])
            found = table.probabilities(grams, found)
        assert found.sum() == pytest.approx(1)
        assert (found > 0).all()
    assert model.nats(ids[:500]) / 500 < 0.7 * math.log(20)


def test_rate() -> None:
    shares = [train.rate(x, 0.1, 0.5) for x in (0.0, 0.05, 0.1, 0.3, 0.5, 0.75, 1.0, 1.2)]
    assert shares == pytest.approx([0, 0.5, 1, 1, 1, 0.5, 0, 0])


def test_orthogonal_updates_have_like_singular_values() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(optimizers.orthogonal(torch.randn(2, 12, 30)))
    assert values.min() > 0.6
    assert values.max() < 1.3


def options(folder: Path, **changed: Any) -> Namespace:
    given = {
        "texts": folder / "texts",
        "run": folder / "run",
        "start": BUILTIN,
        "vocabulary": BUILTIN,
        "layers": 6,
        "width": 192,
        "heads": 6,
        "minutes": 1.0,
        "evaluate_every": 10.0,
        "learning_rate": 1e-3,
        "warm_up": 0.1,
        "decay_from": 0.5,
        "weight_decay": 0.1,
        "dropout": 0.1,
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
    with pytest.raises(ValueError, match=r"wanted h\.1\.\S+ \(16, 48\), found nothing"):
        network.load_model(network.GPT2(network.Shape(50, 8, 2, 16, 2)), tmp_path)
    with pytest.raises(ValueError, match=r"wanted wte.weight \(60, 16\), found \(50, 16\)"):
        network.load_model(network.GPT2(network.Shape(60, 8, 1, 16, 2)), tmp_path)


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
    mixed = model(ids, targets, 0.0, taught, 0.3).item()
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


def test_how_many_tokens_of_a_draft_are_accepted() -> None:
    text = "It was a truth universally acknowledged, that she would go out. " * 3
    with (
        gpt2_fast.GPT2.from_pretrained("builtin", precision="fp32", device="cpu") as whole,
        gpt2_fast.GPT2.from_pretrained("builtin-draft", precision="fp32", device="cpu") as small,
    ):
        ids = whole.tokenizer.encode(text)
        p, q = (torch.tensor(one.forward(ids)).double().softmax(-1) for one in (whole, small))
        wanted = 1 - (p - q).abs().sum(-1).mean().item() / 2  # one less the total variation
        assert measure.accepted(whole, small, text) == pytest.approx(wanted, rel=1e-6)
        assert measure.accepted(small, small, text) == pytest.approx(1)
        assert 0.3 < wanted < 0.95


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


def test_the_draft_is_a_quarter_with_the_same_tokenizer() -> None:
    draft = resolve("builtin-draft")
    for name in ("vocab.json", "merges.txt"):
        assert (draft / name).read_bytes() == (BUILTIN / name).read_bytes(), name
    assert (draft / "model.safetensors").stat().st_size < 2_000_000
    with (
        gpt2_fast.GPT2.from_pretrained("builtin", device="cpu") as whole,
        gpt2_fast.GPT2.from_pretrained("builtin-draft", device="cpu") as small,
    ):
        assert small.config.parameters <= whole.config.parameters / 4
        assert small.config.n_ctx == whole.config.n_ctx
        text = "It was a truth universally acknowledged."
        ids = small.tokenizer.encode(text)
        assert ids == whole.tokenizer.encode(text)
        random = len(ids) * math.log(small.config.vocab_size)
        assert -whole.score(ids).total < -small.score(ids).total < 0.7 * random


def test_exports_are_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shape = network.Shape(50, 8, 1, 16, 2)
    models = {"one": network.GPT2(shape), "other": network.GPT2(shape)}
    for name, model in models.items():
        named = {network.published_name(n): value for n, value in model.named_parameters()}
        export.write_model(tmp_path / name, named, BUILTIN, heads=2)

    def run(share: str) -> None:
        words = [str(tmp_path / "one"), str(tmp_path / "out"), "--mix", str(tmp_path / "other")]
        monkeypatch.setattr("sys.argv", ["export", *words, share])
        export.main()

    run("0.25")
    found = export.read_weights(tmp_path / "out")
    one, other = (export.read_weights(tmp_path / name) for name in models)
    assert found.keys() == one.keys()
    for name, value in found.items():
        expected = (0.75 * one[name].double() + 0.25 * other[name].double()).half()
        assert torch.allclose(value.float(), expected.float(), rtol=1e-3, atol=1e-6), name
    with pytest.raises(ValueError, match=r"from 0 to 1, got 1\.5"):
        run("1.5")
    named = {
        network.published_name(n): v
        for n, v in network.GPT2(network.Shape(50, 9, 1, 16, 2)).named_parameters()
    }
    export.write_model(tmp_path / "other", named, BUILTIN, heads=2)
    with pytest.raises(ValueError, match=r"different shapes.*wpe\.weight"):
        run("0.25")


def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"wte.weight": torch.full((4, 2), 1e6), "wpe.weight": torch.zeros(4, 2)}
    with pytest.raises(ValueError, match="not finite in fp16"):
        export.write_model(tmp_path, weights, BUILTIN, heads=1)
    weights["wte.weight"] = torch.zeros(5_000_001, 1)
    export.write_model(tmp_path / "run", weights, BUILTIN, heads=1)  # a teacher may be large
    monkeypatch.setattr("sys.argv", ["export", str(tmp_path / "run"), str(tmp_path / "wheel")])
    with pytest.raises(ValueError, match="10,000,018 bytes"):
        export.main()
    assert not (tmp_path / "wheel").exists()
