"""Pictures of a run: curves of loss and mIoU, and a contact sheet photo | truth | prediction."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from sceneray import checkpoint, storage
from sceneray.data.images import decode_image, decode_label, encode_jpeg
from sceneray.data.store import ClassInfo, Split
from sceneray.masks import colour_table
from sceneray.models.pspnet import PSPNet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = "pictures/curves.png"
CONTACT_SHEET = "pictures/contact_sheet.jpg"
# Of a contact sheet, in pixels: one column, the space between, the whole width, a line of text.
COLUMN, GAP, LINE = 360, 6, 24
SHEET = 3 * COLUMN + 2 * GAP
COLOURS = {"loss": "#4c72b0", "miou": "#c44e52", "pixel_accuracy": "#55a868"}


def write_curves(run: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write RUN/pictures/curves.png: training loss, and val mIoU and pixel accuracy, over epochs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _plot(left, rows, "train", {"loss": "loss"})
    left.set(title="training loss", xlabel="epoch")
    left.set_ylim(bottom=0)
    _plot(right, rows, "val", {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"})
    right.set(title="validation", xlabel="epoch", ylim=(0, 1))
    right.legend(frameon=False, loc="lower right")
    data = io.BytesIO()
    figure.savefig(data, format="png")
    storage.write_bytes(storage.join(run, CURVES), data.getvalue())


def write_contact_sheet(run: str, split: Split, rows: int) -> None:
    """Write RUN/pictures/contact_sheet.jpg: `rows` images spread over the split, as the best checkpoint sees them."""
    best = checkpoint.load(storage.join(run, "best"))
    data = sheet_of(checkpoint.build(best), split, best.classes, rows)
    storage.write_bytes(storage.join(run, CONTACT_SHEET), data)


def sheet_of(
    model: PSPNet, split: Split, classes: Sequence[ClassInfo], rows: int, device: torch.device | str = "cpu"
) -> bytes:
    """A contact sheet as JPEG: `rows` images spread over the split, as `model`, which is on `device`, sees them."""
    was_training = model.training
    model.eval()
    lines = []
    for index in np.unique(np.linspace(0, len(split) - 1, rows).round().astype(int)):
        sample = split.read(int(index))
        image, truth = decode_image(sample.image), decode_label(sample.label)
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].to(device)
        lines.append((image, truth, model.predict(pixels)[0].cpu().numpy()))
    model.train(was_training)
    return encode_jpeg(contact_sheet(lines, classes), 90)


def contact_sheet(
    rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], classes: Sequence[ClassInfo]
) -> np.ndarray:
    """One picture, uint8 [H, W, 3]: column heads, the rows, and the classes' colours below.

    Each row is photo uint8 [h, w, 3], truth uint8 [h, w] and prediction uint8 [h, w]; what no class labels is black.
    """
    colours = colour_table(classes)
    lines = [_header(("photograph", "truth", "prediction"))]
    for image, truth, prediction in rows:
        height = max(1, round(COLUMN * image.shape[0] / image.shape[1]))
        cells = [
            _resize(image, height, Image.Resampling.BILINEAR),
            _resize(colours[truth], height, Image.Resampling.NEAREST),
            _resize(colours[prediction], height, Image.Resampling.NEAREST),
        ]
        gap = np.full((height, GAP, 3), 255, np.uint8)
        lines.append(np.concatenate([cells[0], gap, cells[1], gap, cells[2]], axis=1))
    lines.append(_legend(classes))
    between = np.full((GAP, SHEET, 3), 255, np.uint8)
    parts = [part for line in lines for part in (line, between)]
    return np.concatenate(parts[:-1], axis=0)


def _header(words: Sequence[str]) -> np.ndarray:
    line, draw = _line(1)
    for number, word in enumerate(words):
        draw.text((number * (COLUMN + GAP) + COLUMN // 2, LINE // 2), word, "black", _font(), anchor="mm")
    return np.asarray(line)


def _legend(classes: Sequence[ClassInfo]) -> np.ndarray:
    """A square of its colour and its name for every class, in as many lines as it takes."""
    places, x, y = [], GAP, 0
    for info in classes:
        width = LINE + round(_font().getlength(info.name)) + 3 * GAP
        if x + width > SHEET and x > GAP:
            x, y = GAP, y + 1
        places.append((info, x, y * LINE))
        x += width
    line, draw = _line(y + 1)
    for info, left, top in places:
        draw.rectangle((left, top + 5, left + LINE - 10, top + LINE - 5), fill=info.color)
        draw.text((left + LINE - 4, top + LINE // 2), info.name, "black", _font(), anchor="lm")
    return np.asarray(line)


def _line(count: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    line = Image.new("RGB", (SHEET, count * LINE), "white")
    return line, ImageDraw.Draw(line)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=14)


def _resize(image: np.ndarray, height: int, how: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((COLUMN, height), how))


def _plot(axes: Axes, rows: Sequence[Mapping[str, Any]], kind: str, names: Mapping[str, str]) -> None:
    mine = [row for row in rows if row["kind"] == kind]
    for name, label in names.items():
        if mine:
            epochs, values = [row["epoch"] for row in mine], [row[name] for row in mine]
            axes.plot(epochs, values, label=label, color=COLOURS[name], marker="o" if len(mine) < 40 else "", ms=3)
    axes.set_xlim(0, max((row["epoch"] for row in mine), default=1) * 1.02)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
