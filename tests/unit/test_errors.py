"""errors.py: one tree of errors, and messages for unknown names."""

from __future__ import annotations

import doctest
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sceneray import errors
from sceneray.errors import ScenerayError, unknown_name

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, ScenerayError)]


def test_the_doc_shows_every_class():
    """The tree at the top of the module names each class, and each class says when it is raised."""
    assert len(CLASSES) == 12
    for cls in CLASSES:
        assert cls.__name__ in errors.__doc__
        assert cls.__doc__


def test_every_error_ends_a_verb_with_a_failure():
    """No error of ours exits with 0, and one that asks to be run again has a code of its own."""
    assert all(cls.exit_code != 0 for cls in CLASSES)
    assert [cls for cls in CLASSES if cls.exit_code == errors.Interrupted.exit_code] == [errors.Interrupted]


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_crosses_process_borders(cls):
    """Errors reach a driver from its workers with class and message whole."""
    copy = pickle.loads(pickle.dumps(cls("what came, and the fix")))
    assert type(copy) is cls
    assert str(copy) == "what came, and the fix"


def test_the_examples_in_the_docstrings_are_true():
    """The doctests of the module pass."""
    result = doctest.testmod(errors)
    assert result.attempted >= 1
    assert result.failed == 0


def test_unknown_name_puts_the_nearest_first():
    """The nearest name is suggested and leads the list; a far name gets the list alone."""
    known = ["resnet18", "resnet50", "mobilenet_v2"]
    assert unknown_name("backbone", "mobilenet", known) == (
        "unknown backbone 'mobilenet': did you mean 'mobilenet_v2'? known: mobilenet_v2, resnet18, resnet50"
    )
    assert unknown_name("split", "zzz", ["train", "val"]) == "unknown split 'zzz': known: train, val"
    assert unknown_name("split", "train", []) == "unknown split 'train': known: none"


@given(st.text(max_size=20), st.lists(st.text("abc_", min_size=1, max_size=8), unique=True, max_size=8))
def test_unknown_name_lists_every_known_name_once(name, known):
    """Whatever was asked for, all known names stand in the message once."""
    listed = unknown_name("thing", name, known).rpartition("known: ")[2]
    assert sorted(listed.split(", ")) == sorted(known or ["none"])
