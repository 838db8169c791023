"""`sceneray serve` refuses before anything starts: a port in use, no key on an open door, a bundle it cannot read."""

from __future__ import annotations

import inspect
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from jobs.cli import main_of
from jobs.serve import cpu_share, serving
from sceneray import storage
from sceneray.errors import BundleError, ConfigError, ServingError
from serve import keys
from serve.settings import ServeArgs
from tests.bundles import write_bundle
from tests.support import ROOT


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A good bundle."""
    return write_bundle(str(tmp_path_factory.mktemp("bundle")))


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused here must be refused before Ray is started."""

    def started(*args: object, **options: object) -> None:
        raise AssertionError(f"Ray was started: {args} {options}")

    monkeypatch.setattr("jobs.serve.ray_session", started)
    monkeypatch.delenv("SCENERAY_API_KEY", raising=False)


def test_a_port_in_use(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One clear sentence with the fix, exit code not 0, and the one who listens there is not disturbed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert main_of("serve", [bundle, "--port", str(port)]) == 1
        with socket.create_connection(("127.0.0.1", port)):
            pass
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"port {port}" in said
    assert "--port" in said


@pytest.mark.parametrize("port", ["-1", "70000"])
def test_a_port_that_is_none(bundle: str, port: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A number that is no port is refused in a sentence too."""
    assert main_of("serve", [bundle, f"--port={port}"]) == 1
    assert "cannot listen" in capsys.readouterr().err


def test_beyond_this_machine_a_key_is_needed(bundle: str) -> None:
    """Listening on all addresses without a key is refused; the sentence names the variable."""
    with pytest.raises(ServingError, match="SCENERAY_API_KEY"), serving(bundle, host="0.0.0.0"):
        pass


def test_beyond_this_machine_keys_or_the_word_open_the_way(bundle: str, tmp_path: Path) -> None:
    """A key of the shell, digests, a key file or `insecure` are each enough: the next step is Ray, which stops here."""
    file = tmp_path / "keys.json"
    file.write_bytes(keys.to_json([]))
    for options in ({"api_keys": "ab" * 32}, {"api_keys_file": str(file)}, {"insecure": True}):
        with pytest.raises(AssertionError, match="Ray was started"), serving(bundle, host="0.0.0.0", **options):
            pass


def test_the_shells_key_is_asked_for_beside_a_key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SCENERAY_API_KEY becomes a digest among the arguments, unless they name digests themselves."""
    from jobs.serve import _own_key

    monkeypatch.setenv("SCENERAY_API_KEY", "open sesame")
    assert _own_key({"api_keys_file": "x"}) == {"api_keys": (keys.digest_of("open sesame"),)}
    assert _own_key({"api_keys": "ab" * 32}) == {}


def test_a_bundle_that_is_not_there(tmp_path: Path) -> None:
    """No bundle: the sentence says how to write one."""
    with pytest.raises(BundleError, match="sceneray export"), serving(str(tmp_path)):
        pass


def test_a_bundle_of_another_format(tmp_path: Path) -> None:
    """A bundle of a later format version is refused before Ray starts."""
    url = write_bundle(str(tmp_path))
    storage.write_json(f"{url}/manifest.json", storage.read_json(f"{url}/manifest.json") | {"version": 2})
    with pytest.raises(BundleError, match="format version 2"), serving(url):
        pass


def test_a_damaged_bundle(tmp_path: Path) -> None:
    """A truncated file is found before Ray starts."""
    url = write_bundle(str(tmp_path))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BundleError, match="damaged"), serving(url):
        pass


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_batch_sizes": 4}, "did you mean 'max_batch_size'"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"replicas": "many"}, "replicas"),
        ({"max_queued_pixels": 100}, "at least max_pixels"),
        ({"replicas": 3, "max_replicas": 2}, "at least replicas"),
        ({"together": True, "ingress_replicas": 2}, "leave ingress_replicas at 1"),
        ({"together": True, "replicas": 0, "max_replicas": 2}, "keep at least one of replicas"),
        ({"api_keys": "not-a-digest"}, "sha256"),
        ({"require_keys": True}, "sceneray keys new"),
        ({"api_keys_file": "no/such/keys.json"}, "no key file"),
        ({"cors_origins": "*"}, "origins by name"),
        ({"cors_origins": "https://app.example.org/path"}, "origins by name"),
        ({"deadline_s": 0}, "deadline_s"),
    ],
)
def test_a_wrong_option(bundle: str, options: dict[str, object], said: str) -> None:
    """An unknown or impossible option is named, the nearest known one with it."""
    with pytest.raises(ConfigError, match=said), serving(bundle, **options):
        pass


def test_the_builder_is_typed() -> None:
    """Serve checks arguments only where the annotation is the class itself, not its name."""
    code = "import inspect, serve.app as a; p = inspect.signature(a.build).parameters; print(p['args'].annotation)"
    env = {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(ServeArgs)


def shipped(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A settings file of serve/, and the arguments in it."""
    config = yaml.safe_load((ROOT / "serve" / name).read_text())
    (application,) = config["applications"]
    assert application["import_path"] == "serve.app:build"
    return config, application["args"]


def test_the_shipped_config_fits_the_builder() -> None:
    """serve/config.yaml names the builder, its arguments are valid, and a late answer is ours before it is Ray's."""
    config, given = shipped("config.yaml")
    args = ServeArgs.model_validate(given)
    assert args.max_replicas is not None
    assert config["http_options"]["host"] == "127.0.0.1"
    assert config["http_options"]["request_timeout_s"] > args.deadline_s
    assert set(json.loads(args.model_dump_json())) == set(inspect.signature(ServeArgs).parameters)


def test_the_cluster_config_refuses_to_start_without_keys() -> None:
    """serve/config.cluster.yaml listens on every interface: as shipped it is refused, with a key file it is valid."""
    config, given = shipped("config.cluster.yaml")
    assert config["http_options"]["host"] == "0.0.0.0"
    with pytest.raises(ValidationError, match="require_keys is set"):
        ServeArgs.model_validate(given)
    args = ServeArgs.model_validate(given | {"api_keys_file": "s3://models/keys.json"})
    assert config["http_options"]["request_timeout_s"] > args.deadline_s


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"threads": 4, "concurrent_batches": 2}),
        ({"replicas": 2}, {"threads": 2, "concurrent_batches": 2}),
        ({"replicas": 8}, {"threads": 1}),
        ({"threads": 3}, {"threads": 3}),
        ({"concurrent_batches": 1}, {"threads": 8}),
        ({"gpus": 1}, {"threads": 8}),
    ],
)
def test_a_machine_of_ones_own_is_shared_out(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], expected: dict[str, int]
) -> None:
    """Of eight cores two passes at a time have half each; what was given is kept, and a GPU has passes one by one."""
    monkeypatch.setattr("sceneray.devices.usable_cores", lambda: 8)
    assert cpu_share(ServeArgs(bundle="b", **given)) == expected
