"""`sceneray checkpoints`: list, verify, prune and show, on real checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.checkpoints import tensor_headers
from jobs.cli import arguments_of, main_of
from sceneray import checkpoint, config, retention, storage
from sceneray.data import town
from sceneray.errors import CheckpointError, ConfigError, StorageError
from tests.stores import tiny_settings
from tests.support import ROOT


def save(run: str, step: int, attempt: int = 1, miou: float | None = None, ema: bool = False) -> str:
    """Commit a checkpoint with two small tensors, and point at it."""
    tensors = {"head.weight": torch.full((2, 3), float(step)), "head.count": torch.tensor(step)}
    state = {
        "step": step,
        "position": 4 * step,
        "attempt": attempt,
        "metrics": {} if miou is None else {"miou": miou},
        "store_digest": "0" * 64,
        "classes": checkpoint.classes_to_json(town.CLASSES),
        "ignore_index": 255,
    }
    name = checkpoint.save(run, tensors, {}, state, tiny_settings("stores/none", run), tensors if ema else None)
    checkpoint.point(run, "last", name, state)
    if miou is not None:
        checkpoint.point(run, "best", name, state, better=True)
    return name


def unfinished(run: str, step: int, attempt: int = 1) -> str:
    """A checkpoint folder without a manifest."""
    name = checkpoint.name_of(step, attempt)
    storage.write_bytes(storage.join(run, name, "model.safetensors"), b"half")
    return name


def call(*arguments: str) -> dict[str, Any]:
    """Run the verb in this process."""
    from jobs.checkpoints import run

    return run(arguments_of("checkpoints", arguments))


def damage(run: str, name: str, file: str = "model.safetensors") -> None:
    """Alter the last byte of a file."""
    url = storage.join(run, name, file)
    data = storage.read_bytes(url)
    storage.write_bytes(url, data[:-1] + bytes([data[-1] ^ 1]))


def left(run: str) -> list[int]:
    """Steps of the checkpoint folders."""
    return [int(name.split("-")[1]) for name in retention.sizes(run)]


def test_list_shows_every_folder(any_root: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Newest first, with size, score, pointers and age; a folder that was never finished says so."""
    save(any_root, 10, miou=0.5)
    save(any_root, 20, miou=0.4)
    unfinished(any_root, 30)
    found = call("list", any_root)
    rows = found["checkpoints"]
    assert [(row["step"], row["committed"], row["miou"]) for row in rows] == [
        (30, False, None), (20, True, 0.4), (10, True, 0.5),
    ]  # fmt: skip
    assert [row["pointers"] for row in rows] == [[], ["last"], ["best"]]
    assert rows[0]["bytes"] == 4
    assert rows[1]["bytes"] == sum(size for _, size in storage.walk_files(storage.join(any_root, rows[1]["name"])))
    assert all(row["age_s"] is not None and row["age_s"] < 3600 for row in rows[1:])
    assert found["lost_pointers"] == []
    lines = capsys.readouterr().out.splitlines()
    assert "no manifest: never finished" in lines[1]
    assert "0.4000" in lines[2]
    assert "best" in lines[3]


def test_list_says_what_a_pointer_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pointer that names a checkpoint which is not there is reported, and does not hide the others."""
    run = str(tmp_path)
    save(run, 10)
    storage.remove(storage.join(run, save(run, 20, miou=0.5)))
    assert len(call("list", run)["lost_pointers"]) == 2
    assert f"{run}/best → {checkpoint.name_of(20, 1)}: not there" in capsys.readouterr().out


def test_verify_reads_everything(any_root: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole checkpoints verify; an unfinished folder is mentioned and is no damage; a pointer means its checkpoint."""
    save(any_root, 10, miou=0.5)
    save(any_root, 20, ema=True)
    unfinished(any_root, 30)
    assert call("verify", any_root)["damaged"] == []
    lines = capsys.readouterr().out.splitlines()
    assert "whole: 4 files" in lines[0]
    assert "whole: 5 files" in lines[1]
    assert "never finished" in lines[2]
    assert [row["name"] for row in call("verify", f"{any_root}/best")["checkpoints"]] == [checkpoint.name_of(10, 1)]


def test_verify_names_every_damage(any_root: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All checkpoints are looked at before the verb fails, and each damaged file is named."""
    names = [save(any_root, step) for step in (10, 20, 30, 40)]
    damage(any_root, names[0])
    storage.remove(storage.join(any_root, names[1], "optimizer.safetensors"))
    damage(any_root, names[1], "state.json")
    storage.write_bytes(storage.join(any_root, names[2], storage.MANIFEST), b"{")
    with pytest.raises(CheckpointError, match=r"3 of 4 checkpoints .* cannot be used") as caught:
        call("verify", any_root)
    assert all(name in str(caught.value) for name in names[:3])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "'model.safetensors'" in lines[0]
    assert "'optimizer.safetensors' is in the manifest but is missing" in lines[1]
    assert "'state.json'" in lines[1]
    assert "is not JSON" in lines[2]
    assert "whole" in lines[3]


def test_verify_one(tmp_path: Path) -> None:
    """One checkpoint may be verified alone: a damaged, an unfinished and an absent one each fail, the others do not."""
    run = str(tmp_path)
    good, bad = save(run, 10), save(run, 20)
    damage(run, bad)
    assert main_of("checkpoints", ["verify", f"{run}/{good}"]) == 0
    for name in (bad, unfinished(run, 30), checkpoint.name_of(99, 1), "last"):
        assert main_of("checkpoints", ["verify", f"{run}/{name}"]) == 1


def test_verify_finds_a_lost_pointer(tmp_path: Path) -> None:
    """A run whose RUN/last names nothing is not whole, though all its checkpoints are."""
    run = str(tmp_path)
    save(run, 10)
    storage.remove(storage.join(run, save(run, 20)))
    with pytest.raises(CheckpointError, match="last → "):
        call("verify", run)


def test_prune_keeps_the_newest_the_best_and_the_pointed(any_root: str) -> None:
    """All others go; with --dry-run they are named and stay."""
    for step, miou in [(10, 0.5), (20, 0.9), (30, 0.6), (40, 0.7), (50, 0.1), (60, None)]:
        save(any_root, step, miou=miou)
    arguments = ("prune", any_root, "--keep", "2", "--keep-best", "2")
    planned = call(*arguments, "--dry-run")
    assert left(any_root) == [10, 20, 30, 40, 50, 60]
    done = call(*arguments)
    assert done["removed"] == planned["removed"] == [checkpoint.name_of(step, 1) for step in (10, 30)]
    assert done["bytes"] > 0
    assert left(any_root) == [20, 40, 50, 60]
    assert call("verify", any_root)["damaged"] == []


def test_prune_by_default_keeps_three_and_the_best(tmp_path: Path) -> None:
    """Without options the newest three and the best one stay; the pointers' checkpoints always do."""
    run = str(tmp_path)
    for step, miou in [(10, 0.2), (20, 0.9), (30, 0.3), (40, 0.4), (50, 0.4), (60, 0.4)]:
        save(run, step, miou=miou)
    call("prune", run)
    assert left(run) == [20, 40, 50, 60]
    storage.write_json(f"{run}/best", {"checkpoint": checkpoint.name_of(40, 1)})
    call("prune", run, "--keep", "1", "--keep-best", "0")
    assert left(run) == [40, 60]


def test_prune_leaves_uploads_in_flight(tmp_path: Path) -> None:
    """Of folders without a manifest only those go whose step and attempt are both below the newest committed one's."""
    run = str(tmp_path)
    unfinished(run, 5, attempt=1)
    unfinished(run, 90, attempt=1)
    unfinished(run, 10, attempt=2)
    unfinished(run, 30, attempt=2)
    unfinished(run, 30, attempt=3)
    assert call("prune", run)["removed"] == []
    save(run, 20, attempt=2)
    assert call("prune", run)["removed"] == [checkpoint.name_of(5, 1)]
    assert left(run) == [10, 20, 30, 30, 90]


def test_show_tells_what_is_inside(any_root: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Position, scores, classes, settings that changed since, and every tensor's dtype and shape, from one pointer."""
    save(any_root, 10, miou=0.5, ema=True)
    now = tiny_settings("stores/none", any_root, "save.keep=7")
    storage.write_bytes(storage.join(any_root, "config.yaml"), config.dump(now).encode())
    shown = call("show", f"{any_root}/best", "--tensors")
    assert (shown["state"]["step"], shown["state"]["position"], shown["state"]["metrics"]) == (10, 40, {"miou": 0.5})
    assert shown["settings_changed"] == ["save.keep: 3 → 7"]
    assert shown["tensors"]["model.safetensors"] == shown["tensors"]["ema.safetensors"]
    assert shown["tensors"]["model.safetensors"]["head.weight"] == {"dtype": "F32", "shape": [2, 3]}
    assert shown["tensors"]["optimizer.safetensors"] == {}
    assert shown["digest"] == checkpoint.load(f"{any_root}/best").digest
    out = capsys.readouterr().out
    assert "head.weight  F32 2×3" in out
    assert "head.count  I64 scalar" in out
    assert "miou 0.5000" in out
    assert town.CLASSES[0].name in out


def test_show_reads_no_weights(tmp_path: Path) -> None:
    """Only the header of a file of tensors is read: with every weight cut off, it tells the same."""
    run = str(tmp_path)
    committed = storage.open_committed(storage.join(run, save(run, 10)))
    assert committed is not None
    whole = tensor_headers(committed, "model.safetensors")
    path = Path(committed.url) / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])
    assert tensor_headers(committed, "model.safetensors") == whole
    for broken in (b"", b"\xff" * 8, data[:20], (4).to_bytes(8, "little") + b"[[]]", b"\0" * 16):
        path.write_bytes(broken)
        with pytest.raises(StorageError, match="is damaged"):
            tensor_headers(committed, "model.safetensors")
    path.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        call("show", f"{run}/last")


@pytest.mark.parametrize("action", ["list", "verify", "prune", "show"])
def test_what_holds_no_checkpoint_is_an_error(tmp_path: Path, action: str) -> None:
    """A folder without checkpoints is refused with what to give instead."""
    with pytest.raises(CheckpointError, match="Give"):
        call(action, str(tmp_path))


@pytest.mark.parametrize(
    "arguments",
    [("list", "--keep", "2"), ("show", "--dry-run"), ("prune", "--tensors"), ("prune", "--keep", "0")],
)
def test_an_option_of_another_action_is_refused(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """`list --dry-run` would look like a promise: it is an error, and so is a number that keeps nothing."""
    save(str(tmp_path), 10)
    with pytest.raises(ConfigError, match="--"):
        call(arguments[0], str(tmp_path), *arguments[1:])


def test_json_has_the_list(tmp_path: Path) -> None:
    """--json may stand after the action and writes what was found."""
    run = str(tmp_path / "run")
    save(run, 10, miou=0.5)
    assert main_of("checkpoints", ["list", run, "--json", str(tmp_path / "out.json")]) == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())["checkpoints"]
    assert (row["step"], row["miou"], row["pointers"]) == (10, 0.5, ["best", "last"])


def test_listing_needs_no_torch(tmp_path: Path) -> None:
    """Looking at runs and checkpoints starts quickly: torch and ray stay unloaded."""
    run = str(tmp_path / "run")
    save(run, 10)
    code = (
        "import sys\nfrom jobs.cli import main_of\n"
        f"codes = [main_of('checkpoints', [action, {run!r}]) for action in ('list', 'verify', 'prune')]\n"
        "assert codes == [0, 0, 0]\nassert not {'torch', 'ray', 'pandas'} & set(sys.modules)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
