"""`sceneray keys`: a key is shown once, its file keeps a hash, and what the file says is what an endpoint asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.cli import main_of
from sceneray import storage
from serve import keys
from serve.keys import KeyRing


def made(capsys: pytest.CaptureFixture[str], url: str, name: str, *options: str) -> str:
    """The key that `sceneray keys new` prints: all of its stdout."""
    assert main_of("keys", ["new", "--file", url, "--id", name, *options]) == 0
    return capsys.readouterr().out.strip()


def test_a_key_is_made_listed_and_revoked(any_root: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """On each file system: two keys open the door, neither stands in the file, and a revoked one no longer opens."""
    url, result = f"{any_root}/keys.json", tmp_path / "result.json"
    alice = made(capsys, url, "alice", "--requests-per-s", "2.5", "--expires", "2999-01-01T00:00:00Z")
    bob = made(capsys, url, "bob", "--json", str(result))
    assert len({alice, bob}) == 2
    assert len(alice) > 40
    ring = KeyRing(keys.read(url))
    assert [ring.find(key).id for key in (alice, bob)] == ["alice", "bob"]
    for text in (storage.read_bytes(url).decode(), result.read_text()):
        assert alice not in text
        assert bob not in text
    assert main_of("keys", ["list", "--file", url, "--json", str(result)]) == 0
    said = capsys.readouterr().out
    assert "alice" in said
    assert "2.5" in said
    assert alice not in said
    assert [row["id"] for row in json.loads(result.read_text())["keys"]] == ["alice", "bob"]
    assert main_of("keys", ["revoke", "--file", url, "--id", "alice"]) == 0
    ring = KeyRing(keys.read(url))
    assert ring.find(alice) is None
    assert ring.find(bob) is not None


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["new"], "needs --id"),
        (["new", "--id", "two words"], "id"),
        (["new", "--id", "x", "--requests-per-s", "0"], "requests_per_s"),
        (["new", "--id", "x", "--expires", "tomorrow"], "expires"),
        (["list", "--requests-per-s", "3"], "revoke it and make a new one"),
        (["revoke", "--id", "alise"], "did you mean 'alice'"),
        (["new", "--id", "alice"], "already"),
    ],
)
def test_a_wrong_command_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    """It exits with the code of a wrong setting and says why; the file is as before."""
    file = tmp_path / "keys.json"
    made(capsys, str(file), "alice")
    before = file.read_bytes()
    assert main_of("keys", [*argv, "--file", str(file)]) == 2
    assert said in capsys.readouterr().err
    assert file.read_bytes() == before


def test_no_file_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Listing or revoking where there is no file says how to write one, and writes none."""
    for argv in (["list"], ["revoke", "--id", "alice"]):
        assert main_of("keys", [*argv, "--file", str(tmp_path / "keys.json")]) == 2
        assert "sceneray keys new" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
