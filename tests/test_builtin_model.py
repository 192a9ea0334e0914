"""tools/builtin_model: what made the built-in model, on texts of a few lines."""

from __future__ import annotations

import math
import struct
from pathlib import Path

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
    prepare,
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


def test_how_many_tokens_of_a_draft_are_accepted() -> None:
    text = "It was a truth universally acknowledged, that she would go out. " * 50
    with (
        gpt2_fast.GPT2.from_pretrained("builtin", precision="fp32", device="cpu") as whole,
        gpt2_fast.GPT2.from_pretrained("builtin-draft", precision="fp32", device="cpu") as small,
    ):
        ids, length = whole.tokenizer.encode(text), whole.config.n_ctx
        assert length < len(ids) < 2 * length
        distance = 0.0
        for window in (ids[:length], ids[length:]):
            p, q = (torch.tensor(m.forward(window)).double().softmax(-1) for m in (whole, small))
            distance += (p - q).abs().sum().item() / 2  # total variation
        wanted = 1 - distance / len(ids)
        assert measure.accepted(whole, small, text) == pytest.approx(wanted, rel=1e-6)
        assert measure.accepted(small, small, text) == pytest.approx(1)
        assert 0.3 < wanted < 0.95


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


def write_random(folder: Path, shape: network.Shape) -> None:
    parameters = network.GPT2(shape).named_parameters()
    named = {network.published_name(name): value for name, value in parameters}
    export.write_model(folder, named, BUILTIN, heads=shape.heads)


def test_exports_are_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shape = network.Shape(50, 8, 1, 16, 2)
    for name in ("one", "other"):
        write_random(tmp_path / name, shape)

    def run(share: str) -> None:
        words = [str(tmp_path / "one"), str(tmp_path / "out"), "--mix", str(tmp_path / "other")]
        monkeypatch.setattr("sys.argv", ["export", *words, share])
        export.main()

    run("0.25")
    found = export.read_weights(tmp_path / "out")
    one, other = (export.read_weights(tmp_path / name) for name in ("one", "other"))
    assert found.keys() == one.keys()
    for name, value in found.items():
        expected = 0.75 * one[name].float() + 0.25 * other[name].float()
        # The nearest of eight bits, and of fp16's numbers near zero.
        assert torch.equal(value, expected.bfloat16().half()), name
    with pytest.raises(ValueError, match=r"from 0 to 1, got 1\.5"):
        run("1.5")
    write_random(tmp_path / "other", network.Shape(50, 9, 1, 16, 2))
    with pytest.raises(ValueError, match=r"different shapes.*wpe\.weight"):
        run("0.25")
    write_random(tmp_path / "other", network.Shape(50, 8, 2, 16, 2))
    with pytest.raises(ValueError, match="a model of 2 layers cannot have 1"):
        run("0.25")


def test_an_export_is_mixed_with_one_of_fewer_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    for name, layers in (("one", 3), ("other", 2)):
        write_random(tmp_path / name, network.Shape(50, 8, layers, 16, 2))
    words = [tmp_path / "one", tmp_path / "out", "--mix", tmp_path / "other", 0.25]
    monkeypatch.setattr("sys.argv", ["export", *map(str, words)])

    export.main()

    found, one, other = (export.read_weights(tmp_path / n) for n in ("out", "one", "other"))
    assert found.keys() == one.keys()
    for layer, source in enumerate((0, 0, 1)):
        for name in ("attn.c_attn.weight", "mlp.c_proj.weight"):
            given = one[f"h.{layer}.{name}"].float()
            added = other[f"h.{source}.{name}"].float()
            if layer == 1 and name == "mlp.c_proj.weight":  # a repeated layer changes nothing
                added = torch.zeros_like(added)
            wanted = 0.75 * given + 0.25 * added
            # Half of the last of eight bits.
            assert torch.allclose(found[f"h.{layer}.{name}"].float(), wanted, rtol=4e-3, atol=1e-6)


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
