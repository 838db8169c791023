"""Reading the documents: fenced blocks with the marker comment before them, and the command lines in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT

FENCE = re.compile(r"(?:^<!-- (?P<marker>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the comment `<!-- marker -->` on the line before it."""

    document: str
    language: str
    text: str
    marker: str

    @property
    def commands(self) -> list[list[str]]:
        """The command lines of a bash block, split into words; comments are left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def documents() -> list[Path]:
    """Every document for people."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str | None = None) -> list[Block]:
    """The fenced blocks of a document, all of them or those of one language."""
    found = [
        Block(path.name, match["language"], match["text"], match["marker"] or "")
        for match in FENCE.finditer(path.read_text(encoding="utf-8"))
    ]
    return [block for block in found if language in (None, block.language)]
