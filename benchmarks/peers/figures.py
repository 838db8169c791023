"""From what was measured to what is printed: rates, shares, ratios, tables. Nothing here measures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def window_seconds(ends: Sequence[float], skip: int) -> float:
    """Seconds from the end of step `skip` to the end of the last."""
    if len(ends) <= skip:
        raise ValueError(f"{len(ends)} steps were timed; with {skip} to warm up there must be more")
    return ends[-1] - ends[skip - 1]


def images_per_second(ends: Sequence[float], skip: int, batch: int) -> float:
    """Rate of the steps after the first `skip` (at least 1)."""
    return (len(ends) - skip) * batch / window_seconds(ends, skip)


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """ours / theirs within each repetition, where both met the same machine: the median, the least and the most."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, the least and the most."""
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


def share_of(rows: Sequence[Mapping[str, Any]], field: str, seconds: float) -> float | None:
    """The sum of `field` over the rows as a share of `seconds`; None where a row lacks it."""
    values = [row.get(field) for row in rows]
    if not values or any(value is None for value in values):
        return None
    return float(sum(value for value in values if value is not None)) / seconds


def median_or_none(values: Sequence[float | None]) -> float | None:
    """The median, or None where one value is missing."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known and len(known) == len(values) else None


def cell(value: object) -> str:
    """A value as a table shows it: numbers with three digits that count, a missing one as a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, its columns of equal width."""
    cells = [list(columns), *[[cell(value) for value in row] for row in rows]]
    widths = [max(len(line[at]) for line in cells) for at in range(len(columns))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
