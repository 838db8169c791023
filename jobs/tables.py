"""A table as a verb's answer: drawn in a terminal, plain aligned columns in a log; and sizes and ages in words."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def show(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of cells on stdout."""
    plain = aligned([header, *rows])
    if not sys.stdout.isatty():
        print(plain)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=None, padding=(0, 2, 0, 0), header_style="bold underline")
    for row in rows:
        table.add_row(*map(Text, row))  # as text: what stands in [brackets] is no markup
    # Wider than the terminal, lines wrap there as those of a log would; rich would cut names short.
    Console(width=max(Console().width, *map(len, plain.splitlines())) + 2).print(table)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text with aligned columns.

    >>> aligned([["name", "steps"], ["a", "10"]])
    'name  steps\\na     10'
    """
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def size(count: float) -> str:
    """A number of bytes as people read it.

    >>> size(1234567)
    '1.2 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def age(seconds: float) -> str:
    """How long something is ago, in its largest unit.

    >>> age(720)
    '12 min'
    """
    for unit, length, next_length in (("s", 1, 60), ("min", 60, 3600), ("h", 3600, 86400)):
        if seconds < next_length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"
