"""A run's live line: one that rewrites itself in a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

LOG_EVERY_S = 10.0


class LiveLine:
    """Shows the progress rows of a training run on stderr."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.shown_at = -LOG_EVERY_S
        self.width = 0

    def __enter__(self) -> LiveLine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.terminal and self.width:
            print(file=sys.stderr)

    def __call__(self, row: dict[str, Any]) -> None:
        """Show one row: a training step, a validation, or that the run is stopping."""
        if row["kind"] == "train":
            self._update(step_line(row))
        elif row["kind"] == "val":
            self._line(
                f"epoch {row['epoch']:.4g}: val mIoU {row['miou']:.4f}, pixel accuracy {row['pixel_accuracy']:.4f}"
            )
        elif row["kind"] == "note":
            self._line(row["text"])
        elif row["kind"] == "stopping":
            self._line("stopping: saving a checkpoint (Ctrl-C again leaves at once)")

    def _update(self, text: str) -> None:
        if self.terminal:
            print(f"\r{text:<{self.width}}", end="", file=sys.stderr, flush=True)
            self.width = len(text)
        elif time.monotonic() - self.shown_at >= LOG_EVERY_S:
            self.shown_at = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def _line(self, text: str) -> None:
        if self.terminal:
            print(f"\r{text:<{self.width}}", file=sys.stderr, flush=True)
            self.width = 0
        else:
            print(text, file=sys.stderr, flush=True)


def step_line(row: dict[str, Any]) -> str:
    """`epoch 3.2/12  step 160/600  41.3 images/s  loss 0.812  lr 0.00731  1:54 left`, and the cost, if priced."""
    spent = f"  cost {row['cost']:.2f}" if "cost" in row else ""
    return (
        f"epoch {row['epoch']:.1f}/{row['epochs']:g}  step {row['step']}/{row['steps']}  "
        f"{row['images_per_second']:.1f} images/s  loss {row['loss']:.4f}  lr {row['lr']:.5f}  "
        f"{duration(row['seconds_left'])} left{spent}"
    )


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`.

    >>> duration(123.4)
    '2:03'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
