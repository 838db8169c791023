"""`sceneray predict`: files found and named, masks and overlays written, an endpoint asked with patience."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from jobs.cli import main_of
from jobs.predict import expand, output_names
from sceneray.data.images import decode_image, decode_label
from sceneray.errors import DataError
from tests.bundles import agree, half_bright, write_bundle
from tests.unit.serve.uploads import encoded


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundle whose answers are known."""
    return write_bundle(str(tmp_path_factory.mktemp("bundle")))


def photo(path: Path, height: int = 48, width: int = 64) -> str:
    """A half-bright PNG at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(Image.fromarray(half_bright(height, width)[0]), "PNG"))
    return str(path)


def test_masks_overlays_and_shares(bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each image gets its mask and its overlay, the table its classes, and --json everything."""
    first, second = photo(tmp_path / "a.png"), photo(tmp_path / "b.png", 40, 80)
    out = tmp_path / "out"
    argv = [first, second, "--bundle", bundle, "--out", str(out), "--json", str(tmp_path / "result.json")]
    assert main_of("predict", argv) == 0
    assert agree(decode_label((out / "a.mask.png").read_bytes()), half_bright()[1])
    assert agree(decode_label((out / "b.mask.png").read_bytes()), half_bright(40, 80)[1])
    assert decode_image((out / "b.overlay.jpg").read_bytes()).shape == (40, 80, 3)
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()[:4]] == ["class", "dark", "bright", "never"]
    result = json.loads((tmp_path / "result.json").read_text())
    assert [Path(row["mask"]).name for row in result["images"]] == ["a.mask.png", "b.mask.png"]
    assert sum(part["share"] for part in result["images"][0]["classes"]) == pytest.approx(1)


def test_one_bad_image_does_not_stop_the_others(
    bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The good ones are written; the verb fails at its end and names each bad one with its reason."""
    photo(tmp_path / "in" / "good.png")
    photo(tmp_path / "in" / "thin.png", height=4)
    (tmp_path / "in" / "text.jpg").write_text("no photograph")
    out = tmp_path / "out"
    assert main_of("predict", [str(tmp_path / "in"), "--bundle", bundle, "--out", str(out)]) == 1
    assert {path.name for path in out.iterdir()} == {"good.mask.png", "good.overlay.jpg"}
    said = capsys.readouterr().err
    assert "2 of 3 images failed" in said
    assert "thin.png: an image must be at least 8 pixels" in said
    assert "text.jpg" in said


def test_a_folder_expands_to_its_images(tmp_path: Path) -> None:
    """Image files directly in the folder, by suffix of any case, each once; other files are left alone."""
    for name in ("b.JPG", "a.png", "notes.txt", "deep/c.png"):
        photo(tmp_path / name)
    names = [Path(url).name for url in expand([str(tmp_path), str(tmp_path / "a.png")])]
    assert names == ["a.png", "b.JPG"]


@pytest.mark.parametrize("there", [False, True])
def test_no_image_there(tmp_path: Path, there: bool) -> None:
    """A path that leads nowhere and a folder without images say what is expected."""
    folder = tmp_path / "folder"
    if there:
        folder.mkdir()
    with pytest.raises(DataError, match=r"no image at .*folder: give a file, or a folder"):
        expand([str(folder)])


def test_names_never_collide() -> None:
    """Images of one stem, or of stems that differ in case alone, are numbered; a number already taken is passed."""
    urls = ["/x/a.jpg", "/y/a.png", "/z/A.jpg", "/z/a-2.jpg", "/z/b.c.jpg"]
    assert list(output_names(urls).values()) == ["a", "a-2", "A-3", "a-2-2", "b.c"]


def test_nobody_listens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An endpoint that is not there: one sentence with how to start one."""
    argv = [photo(tmp_path / "a.png"), "--url", "http://127.0.0.1:9", "--out", str(tmp_path)]
    assert main_of("predict", argv) == 1
    assert "sceneray serve" in capsys.readouterr().err
