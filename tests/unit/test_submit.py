"""What `sceneray submit` sends: the command, the resolved settings, and which paths it refuses."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import submit
from sceneray import config
from sceneray.config import TrainSettings
from sceneray.errors import ConfigError
from tune.settings import TuneSettings

HERE = "http://127.0.0.1:8265"
AWAY = "http://10.0.0.5:8265"


def placed_at(address: str) -> Callable[[str, str], str]:
    """How paths are placed on the cluster at `address`."""
    return lambda what, url: submit.on_cluster(what, url, address)


def test_local_paths_become_absolute_where_the_cluster_may_be_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through a loopback address paths are resolved, and the user is told whose disk they mean."""
    monkeypatch.chdir(tmp_path)
    words = ["runs/a/best", "--data=stores/a", "--split", "val"]
    command, files = submit.compose("evaluate", words, placed_at(HERE))
    assert command == ["evaluate", f"{tmp_path}/runs/a/best", "--data", f"{tmp_path}/stores/a", "--split", "val"]
    assert files == {}
    assert "on the machine of the cluster's head" in capsys.readouterr().err


def test_only_the_arguments_that_are_files_are_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A word that equals a file's name but means something else stays as it is."""
    monkeypatch.chdir(tmp_path)
    command, _ = submit.compose("prepare", ["town", "town", "--seed", "1"], placed_at(HERE))
    assert command == ["prepare", "town", f"{tmp_path}/town", "--seed", "1"]


@pytest.mark.parametrize(
    ("verb", "words", "what"),
    [
        ("prepare", ["folder", "s3://b/photos", "stores/a"], "SOURCE or STORE is 'stores/a'"),
        ("evaluate", ["s3://b/run/best", "--data", "/data/store"], "--data is '/data/store'"),
        ("export", ["s3://b/run/best", "bundles/a"], "BUNDLE is 'bundles/a'"),
    ],
)
def test_a_path_on_this_machine_is_refused_for_another_cluster(verb: str, words: list[str], what: str) -> None:
    """A cluster elsewhere cannot see this disk: the message says so, and what to give instead."""
    with pytest.raises(ConfigError, match=f"{what}, a path on this machine.*s3://bucket/key"):
        submit.compose(verb, words, placed_at(AWAY))


def test_training_settings_travel_resolved(tmp_path: Path) -> None:
    """The job gets one file: the settings with their overrides, checked here; flags of the verb stay."""
    path = tmp_path / "mine.yaml"
    path.write_text("run: s3://b/runs/a\ndata: {store: s3://b/stores/a, cache: /scratch}\nepochs: 3\n")
    words = [str(path), "epochs=7", "optimizer.lr=0.5", "--dry-run"]
    command, files = submit.compose("train", words, placed_at(AWAY))
    assert command == ["train", "settings.yaml", "--dry-run"]
    sent = tmp_path / "settings.yaml"
    sent.write_text(files["settings.yaml"])
    settings = config.load(TrainSettings, str(sent))
    assert (settings.epochs, settings.optimizer.lr, settings.data.cache) == (7, 0.5, "/scratch")


@pytest.mark.parametrize(
    "override", ["run=runs/a", "data.store=/stores/a", "init_from=runs/b/best", "model.weights=w.pth"]
)
def test_each_path_in_training_settings_is_refused_for_another_cluster(tmp_path: Path, override: str) -> None:
    """Settings that name this machine's files are refused with the setting's name."""
    path = tmp_path / "mine.yaml"
    path.write_text("run: s3://b/runs/a\ndata: {store: s3://b/stores/a}\n")
    with pytest.raises(ConfigError, match=f"^{override.split('=')[0]} is '"):
        submit.compose("train", [str(path), override], placed_at(AWAY))


def test_a_sweep_travels_resolved_and_checked(tmp_path: Path) -> None:
    """A sweep's folder and its training paths are placed, and a space that training would refuse never leaves."""
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "sweep: s3://b/s\ntrain: {data: {store: s3://b/a}}\nspace: {optimizer.lr: {loguniform: [1e-3, 1e-1]}}\n"
    )
    command, files = submit.compose("tune", [str(path), "trials=3"], placed_at(AWAY))
    assert command == ["tune", "settings.yaml"]
    sent = tmp_path / "settings.yaml"
    sent.write_text(files["settings.yaml"])
    assert config.load(TuneSettings, str(sent)).trials == 3
    with pytest.raises(ConfigError, match="sweep is 'here'"):
        submit.compose("tune", [str(path), "sweep=here"], placed_at(AWAY))
    with pytest.raises(ConfigError, match=r"did you mean 'optimizer\.lr'"):
        submit.compose("tune", [str(path), "space={optimizer.lrr: {choice: [1]}}"], placed_at(HERE))


def test_unknown_arguments_of_the_verb_are_refused_here() -> None:
    """The verb's own parser looks at its words before anything is sent."""
    with pytest.raises(SystemExit):
        submit.compose("export", ["a", "b", "--nmae", "x"], placed_at(HERE))


def test_submits_own_options_may_stand_anywhere() -> None:
    """--address and the like are taken out of the verb's words, before it or after it; the rest stays in order."""
    parser = argparse.ArgumentParser()
    submit.add_arguments(parser)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--debug", action="store_true")
    line = ["--no-wait", "evaluate", "a", "--split", "val", "--address", AWAY, "--json", "x.json", "--workers", "2"]
    args = parser.parse_args(line)
    assert submit.take_own_arguments(args) == ["a", "--split", "val", "--workers", "2"]
    assert (args.address, args.wait, args.json, args.verb) == (AWAY, False, Path("x.json"), "evaluate")


def test_no_secret_is_forwarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Region and endpoint go along where they are set; keys and tokens never do."""
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "secret")
    environment = submit.forwarded()
    assert environment["AWS_REGION"] == "eu-north-1"
    assert "secret" not in environment.values()
    assert set(environment) <= {*submit.FORWARDED, *submit.STOPPING, "SCENERAY_COMMIT"}


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://10.0.0.5:10001", "auto"])
def test_the_address_is_that_of_the_dashboard(address: str) -> None:
    """A cluster address of another kind is refused with an example of the right one."""
    args = argparse.Namespace(address=address, verb="export", arguments=["a", "b"], wait=True, json=None, debug=False)
    with pytest.raises(ConfigError, match=r"such as http://127\.0\.0\.1:8265"):
        submit.run(args)
