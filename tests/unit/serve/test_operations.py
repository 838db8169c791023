"""Dashboard, alerts and docs/operations.md tell of what there is: no metric, alert or error is made up or missing."""

from __future__ import annotations

import ast
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from serve.routes.errors import KINDS
from serve.settings import ServeArgs
from serve.telemetry import METRICS, RAYS, exported
from tests.support import ROOT

SERVE = ROOT / "serve"
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
DASHBOARD: dict[str, Any] = json.loads((SERVE / "grafana" / "sceneray.json").read_text())
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((SERVE / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
NAME = re.compile(r"\bray_\w+|\bsceneray:\w+(?::\w+)*")
KNOWN = {name for metric in METRICS for name in exported(metric)} | RAYS.keys()
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
# Labels that Ray adds to each of our metrics, and Prometheus to histograms.
GIVEN = {"application", "deployment", "replica", "le"}


def expressions() -> list[tuple[str, str]]:
    """Every PromQL expression of the alerts and the dashboard, with whose it is."""
    found = [(rule.get("alert") or rule["record"], rule["expr"]) for rule in RULES]
    return found + [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]


def rows(heading: str) -> dict[str, list[str]]:
    """The rows of the first table below a heading of the page, by the word in backticks in the first cell."""
    section = re.split(r"^#{2,3} ", PAGE.split(f"# {heading}\n")[1], flags=re.M)[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:3] == "| `"
    ]
    names = [row[0].strip("`") for row in cells]
    assert len(set(names)) == len(names), "a row stands there twice"
    return dict(zip(names, (row[1:] for row in cells), strict=True))


@pytest.mark.parametrize(("name", "expression"), expressions())
def test_every_expression_draws_on_metrics_that_there_are(name: str, expression: str) -> None:
    """Names are those that Prometheus sees, and a label is one that some metric of the expression has."""
    used = set(NAME.findall(expression))
    assert used, name
    assert used <= KNOWN | RECORDED
    labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression))
    labels |= {
        label.strip() for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression) for label in group.split(",")
    }
    ours = {label for metric, about in METRICS.items() if used & set(exported(metric)) for label in about.labels}
    if not used & RECORDED:
        assert labels <= ours | GIVEN


@pytest.mark.parametrize(("name", "expression"), expressions())
def test_every_expression_is_balanced(name: str, expression: str) -> None:
    """Brackets and quotes close: the cheap half of what `promtool check rules` tells."""
    expected: list[str] = []
    for char in re.sub(r'"[^"]*"', "", expression):
        if char in "([{":
            expected.append({"(": ")", "[": "]", "{": "}"}[char])
        elif char in ")]}":
            assert expected.pop() == char, name
    assert expected == []
    assert expression.count('"') % 2 == 0


def test_every_metric_of_ours_is_used() -> None:
    """What is counted is looked at: each metric stands on the dashboard, and in the page's table with its labels."""
    shown = {name for _, expression in expressions() for name in NAME.findall(expression)}
    table = rows("Metrics")
    for metric, about in METRICS.items():
        assert shown & set(exported(metric)), metric
        (name,) = {re.sub(r"_(bucket|count)$", "", name) for name in exported(metric)}
        assert re.findall(r"`(\w+)`", table.pop(name)[0]) == list(about.labels), name
    assert table == {}


def test_every_alert_says_how_urgent_it_is_and_has_a_section() -> None:
    """Each alert has a severity, a summary, and a section that says the same severity, where to look and what to do."""
    sections = dict(re.findall(r"^### (Sceneray\w+)\n\n(.*?)(?=^#)", PAGE, re.M | re.S))
    assert sections.keys() == ALERTS.keys()
    for name, rule in ALERTS.items():
        assert rule["annotations"]["summary"]
        severity = rule["labels"]["severity"]
        assert severity in ("page", "ticket")
        assert sections[name].startswith(severity.capitalize() + ". "), name
        assert "Look at" in sections[name] or "Look in" in sections[name], name
        assert "\nDo: " in sections[name], name


def test_panels_have_places_and_names_of_their_own() -> None:
    """No two panels share an id or a title, none overlaps another, and the page names none that is not there."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    titles = [panel["title"] for panel in panels]
    assert len(set(titles)) == len(titles)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells
    for quoted in re.findall(r'"([A-Z][^"]*)"', PAGE.split("## Alerts")[1].split("## Errors")[0]):
        assert quoted in titles


def error_types() -> dict[str, set[str]]:
    """Every error_type that the code under serve/ can answer, with the statuses that it has; None: told at run time."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for path in sorted(SERVE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            for status, kind in _errors(node):
                found[kind].add(status)
            if isinstance(node, ast.Assign) and "error_type" in ast.unparse(node.targets[0]):
                for word in ast.walk(node.value):
                    if isinstance(word, ast.Constant) and isinstance(word.value, str):
                        found[word.value].add("499")
    # errors.py: what Starlette raises by itself.
    assert found.pop("kind") == {"error.status_code"}
    for status, kind in KINDS.items():
        found[kind].add(str(status))
    found["bad_request"].add("400")
    return dict(found)


def _errors(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(status, error_type) of each error that a call makes, as source text where it is no constant."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return
    if node.func.id == "Refused":
        status, kind = node.args[:2]
    elif node.func.id == "Unanswerable":
        status, kind = ast.Constant(422), node.args[0]
    else:
        return
    yield _text(status), _text(kind)


def _text(node: ast.expr) -> str:
    return str(node.value) if isinstance(node, ast.Constant) else ast.unparse(node)


def test_every_error_has_a_row() -> None:
    """The page's table has each error_type that the endpoint answers, with its statuses, and no other."""
    told = {kind: set(cells[0].split(", ")) for kind, cells in rows("Errors").items()}
    del told["error_type"]  # the head
    assert told == error_types()
    assert list(told) == sorted(told)


def test_every_option_of_autoscaling_has_its_default() -> None:
    """The table's options are ServeArgs' own, with the defaults that they have."""
    table = rows("Autoscaling")
    described = {name for name, field in ServeArgs.model_fields.items() if "autoscaling" in str(field.description)}
    assert table.keys() == described | {"idle_s"}
    assert table.pop("target_pixels")[0] == "`2 * max_batch_pixels`"
    for name, cells in table.items():
        assert cells[0] == f"`{ServeArgs.model_fields[name].default}`", name
