"""docs/training.md tells what is: its settings with their defaults, the fields of metrics rows; and every link leads
somewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from sceneray import config, profiling, runlog
from sceneray.config import TrainSettings
from sceneray.training import Runtime, fit
from tests.documents import FENCE, documents
from tests.stores import tiny_settings, town_store
from tests.support import ROOT

PAGE = ROOT / "docs" / "training.md"
DESCRIBED = ("save", "log", "resources", "cost")  # groups of which the page lists every setting
SETTING = re.compile(r"^\| `([a-z_.]+)` \| `([^`]*)` \|", re.M)
ROW = re.compile(r"^\| `(train|val|profile)` \| (.*) \|$", re.M)
LINK = re.compile(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)")
LINKS = [
    pytest.param(path, *match.groups(), id=f"{path.name}: {match[0][2:-1]}")
    for path in documents()
    for match in LINK.finditer(FENCE.sub("", path.read_text(encoding="utf-8")))
]


def defaults(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a tree by its dotted name, with its default as YAML has it."""
    for name, field in cls.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from defaults(kind, f"{prefix}{name}.")
        elif not field.is_required():
            yield prefix + name, field.get_default(call_default_factory=True)


def told() -> list[tuple[str, Any]]:
    """The settings of the page's table and their defaults."""
    return [(name, yaml.safe_load(default)) for name, default in SETTING.findall(PAGE.read_text(encoding="utf-8"))]


def fields(kind: str) -> set[str]:
    """The fields that the page tells of a kind of row, those that every row has left out."""
    watching = PAGE.read_text(encoding="utf-8").split("## Watching")[1].split("## The settings")[0]
    (text,) = [cell for row, cell in ROW.findall(watching) if row == kind]
    return set(re.findall(r"`([a-z_]+)`", text)) - {"epoch"}


def anchors(path: Path) -> set[str]:
    """What a link may name after `#`: the headings of a document, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_every_setting_of_the_table_has_that_default() -> None:
    """Each row names a setting that there is, once, with the default that it has."""
    known = dict(defaults(TrainSettings))
    assert len(told()) > 30
    assert len(dict(told())) == len(told()), "a setting stands there twice"
    for name, default in told():
        assert name in known, f"there is no setting {name}"
        assert (default, type(default)) == (known[name], type(known[name])), name


def test_the_table_leaves_no_setting_out() -> None:
    """Of the groups about keeping a run alive, watching it and paying for it, every setting stands in the table."""
    wanted = {name for name, _ in defaults(TrainSettings) if name.split(".")[0] in DESCRIBED}
    assert wanted <= dict(told()).keys()


def test_what_may_change_is_told() -> None:
    """The page names each setting that a run may be resumed with another value of."""
    (sentence,) = re.findall(r"learned\. (`[^.]*(?:\.[a-z][^.]*)*) may\s+change\.", PAGE.read_text(encoding="utf-8"))
    assert set(re.findall(r"`([a-z_.]+)`", sentence)) == set(config.RESUMABLE_WITH_OTHER)


def test_the_fields_of_metrics_are_told(tmp_path: Path) -> None:
    """A run's rows have the fields that the page lists, no more and no less."""
    town_store(str(tmp_path / "store"))
    priced = ("cost.price_per_hour={default: 1}", "epochs=1", "log.contact_sheet=0")
    fit(tiny_settings(str(tmp_path / "store"), str(tmp_path / "run"), *priced), Runtime())
    rows = runlog.read_metrics(str(tmp_path / "run"))
    for kind in ("train", "val"):
        found = set().union(*(row.keys() for row in rows if row["kind"] == kind))
        assert found - {"kind", "step", "epoch"} == fields(kind)
    assert set(profiling.STAGES) | {"steps", "step_s", "gradient_all_reduce_s"} == fields("profile")


def test_the_run_folder_has_what_is_told(tmp_path: Path) -> None:
    """Every file and folder that a run leaves is in the tree of docs/formats.md, and so is all of state.json."""
    town_store(str(tmp_path / "store"))
    run = tmp_path / "run"
    extra = ("epochs=1", "log={every_steps: 1, contact_sheet: 1, tensorboard: true, samples: true, pictures_every: 1}")
    fit(tiny_settings(str(tmp_path / "store"), str(run), *extra), Runtime())
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    (tree,) = [match["text"] for match in FENCE.finditer(text) if match["text"].startswith("RUN/")]
    told_names = set(re.findall(r"^  ([a-z]+)|, ([a-z]+) {2}", tree, re.M))
    names = {name for pair in told_names for name in pair if name}
    # What begins with a dot are the locks of a local file system.
    assert {path.name.partition(".")[0] for path in run.iterdir() if not path.name.startswith(".")} <= names
    (state,) = (run / "checkpoints").glob("*/state.json")
    for key in json.loads(state.read_text()):
        assert f"`{key}`" in text, key


@pytest.mark.parametrize(("path", "target", "anchor"), LINKS)
def test_a_link_leads_somewhere(path: Path, target: str, anchor: str) -> None:
    """A relative link names a file of the repository, and after `#` a heading of it."""
    found = (path.parent / target).resolve() if target else path
    assert found.exists()
    assert found.is_relative_to(ROOT)
    if anchor:
        assert anchor in anchors(found)
