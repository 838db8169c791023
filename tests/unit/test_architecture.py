"""The house's shape: who may import whom, importing does no work, and what no file may hold."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support import ROOT, tracked_files

SOURCES = {
    "sceneray": ROOT / "platform" / "sceneray",
    "jobs": ROOT / "jobs",
    "tune": ROOT / "tune",
    "serve": ROOT / "serve",
}
MOST_LINES = 350
MOST_BYTES = 1_000_000

# What every verb shares; all else in jobs/ is somebody's verb, which nobody outside jobs/ imports.
SHARED_BY_VERBS = {"jobs.cli", "jobs.ray_session", "jobs.progress"}
PACKAGES = {
    "sceneray": {"sceneray"},
    "serve": {"serve", "sceneray"},
    "tune": {"tune", "sceneray", *SHARED_BY_VERBS},
    "jobs": {"jobs", "tune", "serve", "sceneray"},
}
BASE = {"errors", "retries", "local_files", "storage", "config_errors", "config_base", "config_run", "config"}
# Modules of the library that know only what lies below them. The loop (steps, training) may know all of these.
LIBRARY = {
    "errors": set(),
    "retries": {"errors"},
    "local_files": {"errors"},
    "config_errors": set(),
    "storage": {"errors", "retries", "local_files"},
    "config": BASE,
    "models": BASE | {"models"},
    "data": BASE | {"data"},
    "losses": BASE,
    "optim": BASE | {"models"},
    "metrics": BASE | {"data"},
    "masks": BASE | {"data"},
    "client_messages": {"errors", "data", "masks"},
    "client": {"errors", "client_messages"},
    "liveness": set(),
    "votes": set(),
    "profiling": {"storage"},
    "ema": {"models"},
    "parallel": {"models"},
    "status": {"errors", "storage"},
    "costs": {"errors", "status"},
    "retention": {"errors", "storage"},
    "checkpoint": BASE | {"data", "models", "retention"},
    "saver": BASE | {"checkpoint"},
    "repository": {"errors", "storage"},
    "bundle": BASE | {"data", "models", "masks", "checkpoint", "environment", "repository"},
    "onnx_graph": BASE | {"models"},
    "devices": set(),
    "cuda_graphs": set(),
    "runtimes": BASE | {"bundle", "cuda_graphs", "devices", "models", "onnx_graph"},
    "predictor": BASE | {"data", "models", "masks", "bundle", "runtimes"},
    "promotion": BASE | {"data", "metrics", "checkpoint", "bundle", "predictor", "evaluation", "repository"},
}


@cache
def modules() -> dict[str, Path]:
    """Every module of the four packages, by its dotted name."""
    found = {}
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(module: str, *, top_level: bool = False) -> set[str]:
    """Dotted names that a module imports anywhere in it (or where it is imported), but for type checkers only."""
    return set(_imported(ast.parse(modules()[module].read_text()).body, top_level))


def _imported(body: list[ast.AST], top_level: bool) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in modules() else str(node.module)
        elif not (top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                yield from _imported(getattr(node, field, []), top_level)


def within(name: str, allowed: set[str]) -> bool:
    """True where `name` is one of `allowed` or lies in one of them."""
    return any(name == one or name.startswith(one + ".") for one in allowed)


def run_python(code: str, folder: Path, *arguments: str) -> dict[str, object]:
    """Run `code` in a fresh interpreter in an empty folder; the JSON of its last line."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)]), "HOME": str(folder)}
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_platform_is_a_source_root_and_no_package():
    """`platform/` holds no module of its own: as a package it would shadow Python's `platform`, and nothing starts."""
    assert [path.name for path in (ROOT / "platform").iterdir() if path.suffix in (".py", ".pyi")] == []
    assert not (ROOT / "platform.py").exists()
    for name in ("jobs", "tune", "serve"):
        assert (ROOT / name / "__init__.py").exists()


def test_every_package_is_installed():
    """pyproject.toml names every package there is, so that an installed copy lacks none; and all settings files."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert set(setup["packages"]) == there
    data = {path for name, globs in setup["package-data"].items() for g in globs for path in SOURCES[name].glob(g)}
    others = {path for name in SOURCES for path in SOURCES[name].rglob("*") if path.is_file() and path.suffix != ".py"}
    assert {path for path in others if "__pycache__" not in path.parts} == data


def test_the_walk_sees_the_whole_house():
    """The tests below look at all the modules there are, not at a part."""
    assert len(modules()) > 50
    assert {"sceneray.data.store", "jobs.cli", "tune.search", "serve.app"} <= set(modules())
    assert "ray" in imports("jobs.ray_session")
    assert "ray" not in imports("jobs.ray_session", top_level=True)


@pytest.mark.parametrize("package", list(PACKAGES))
def test_packages_import_along_the_arrows(package):
    """jobs knows tune and serve, all three know the library, and the library knows none of them."""
    for module in modules():
        if module.split(".")[0] == package:
            ours = {name for name in imports(module) if name.split(".")[0] in PACKAGES}
            wrong = {name for name in ours if not within(name, PACKAGES[package])}
            assert not wrong, f"{module} imports {sorted(wrong)}"


def test_one_part_of_the_library_knows_ray():
    """In sceneray only ray_train imports ray, nobody there imports it, and nobody there knows a web framework."""
    for module in modules():
        if module.split(".")[0] == "sceneray":
            tops = {name.split(".")[0] for name in imports(module)}
            assert not tops & {"fastapi", "starlette", "uvicorn"}, module
            if not within(module, {"sceneray.ray_train"}):
                assert "ray" not in tops, module
                assert not any(within(name, {"sceneray.ray_train"}) for name in imports(module)), module
                assert "sceneray.training" not in imports(module), module


@pytest.mark.parametrize("layer", list(LIBRARY))
def test_the_library_is_layered(layer):
    """Each part of the library imports only parts below it."""
    allowed = {"sceneray"} if layer in ("bundle", "checkpoint") else set()  # for the version they write down
    seen = 0
    for module in modules():
        if within(module, {f"sceneray.{layer}"}):
            seen += 1
            for name in imports(module):
                if name.split(".")[0] == "sceneray" and name not in allowed:
                    inner = name.partition(".")[2]
                    assert within(inner, LIBRARY[layer]), f"{module} imports {name}"
    assert seen


def test_no_module_imports_itself_in_a_circle():
    """Following the imports that run when a module is imported never leads back to it."""
    graph = {module: {name for name in imports(module, top_level=True) if name in modules()} for module in modules()}

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path, module))
        if module not in done:
            for name in graph[module]:
                walk(name, (*path, module))
            done.add(module)

    done: set[str] = set()
    for module in graph:
        walk(module, ())


def test_inside_serve_and_tune_the_name_is_rays():
    """`import serve` or `import tune` would hide Ray's modules of those names where they are used."""
    for module in modules():
        assert not imports(module) & {"serve", "tune"}, module


IMPORT_ALL = """
import importlib, json, os, sys, threading
# Arguments that no parser would take: whoever reads them while being imported ends the process.
assert sys.argv[1:] == ["--no-such-option"]
modules = MODULES
wrong = []
for name in modules:
    importlib.import_module(name)
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        wrong.append(f"{name} started Ray")
    if threading.active_count() > 1:
        wrong.append(f"{name} started {[t.name for t in threading.enumerate()]}")
    if os.listdir("."):
        wrong.append(f"{name} wrote {os.listdir('.')}")
    if wrong:
        break
dist = sys.modules.get("torch.distributed")
print(json.dumps({"wrong": wrong, "group": bool(dist and dist.is_initialized()), "count": len(modules)}))
"""


def test_importing_any_module_starts_nothing(tmp_path):
    """Importing every module starts no Ray, no thread and no process group, writes no file, and reads no arguments."""
    names = [name for name in modules() if not name.endswith("__main__")]
    result = run_python(IMPORT_ALL.replace("MODULES", repr(names)), tmp_path, "--no-such-option")
    assert result == {"wrong": [], "group": False, "count": len(names)}


def test_the_predictor_stands_alone(tmp_path):
    """Loading the predictor brings in neither Ray nor a web framework nor the training loop."""
    code = "import json, sys, sceneray.predictor; print(json.dumps(sorted(sys.modules)))"
    loaded = set(run_python(code, tmp_path))
    assert "torch" in loaded
    banned = ("ray", "fastapi", "starlette", "sceneray.training", "sceneray.steps", "sceneray.ray_train", "jobs")
    assert [name for name in loaded if within(name, set(banned))] == []


def test_every_test_says_what_it_expects():
    """Each test function has a docstring, and each test file lies in a tier."""
    seen = 0
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                seen += 1
                assert ast.get_docstring(node), f"{path.name}::{node.name}"
    assert seen > 100


def test_files_stay_readable():
    """No source file is longer than a reader holds in mind."""
    sources = [path for path in tracked_files() if path.suffix == ".py"]
    assert len(sources) > 60
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources}
    assert {name: lines for name, lines in long.items() if lines > MOST_LINES} == {}


def test_no_data_and_no_weights_are_kept_here():
    """What is committed is small: no datasets, no weights."""
    for path in tracked_files():
        assert path.stat().st_size <= MOST_BYTES, path
        assert path.suffix not in (".pth", ".pt", ".ckpt", ".pkl"), path


def test_no_machine_and_no_registry_is_named():
    """Nothing here depends on one machine's folders or on where packages come from."""
    folders = ["/work" + "/", "/root" + "/", r"\.pyenv" + "/", "/tmp" + "/venv"]
    hosts = [r"pypi\." + "org", "python" + "hosted", r"npmjs\." + "org", r"deb\." + "debian", r"index" + "-url"]
    pattern = re.compile("|".join(folders + hosts).encode())
    for path in tracked_files():
        found = pattern.search(path.read_bytes())
        assert found is None, f"{path.relative_to(ROOT)} names {found.group() if found else ''}"
