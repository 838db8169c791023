"""`sceneray VERB ...`: the command line."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import VERBS, main_of, say
from sceneray import __version__
from sceneray.errors import unknown_name


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"sceneray {__version__}")
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        say(f"sceneray: {unknown_name('verb', verb, VERBS)}")
        return 2
    return main_of(verb, rest)


def usage() -> str:
    """The verbs, each with one line and an example, without importing any of them (torch and ray are slow)."""
    lines = ["sceneray: scene parsing on Ray.", "", "usage: sceneray VERB ...   (sceneray VERB --help says more)", ""]
    for verb, module in VERBS.items():
        words = _constants(module)
        lines += [f"  {verb:<11} {words['HELP']}", f"  {'':<11}   {words['EXAMPLE']}"]
    return "\n".join(lines)


def _constants(module: str) -> dict[str, str]:
    """HELP and EXAMPLE read from a verb's source text."""
    package, _, name = module.rpartition(".")
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None, f"package {package} is not installed"
    tree = ast.parse(Path(spec.origin).with_name(f"{name}.py").read_text(encoding="utf-8"))
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            target = node.targets[0].id
            if target in ("HELP", "EXAMPLE"):
                found[target] = str(ast.literal_eval(node.value))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
