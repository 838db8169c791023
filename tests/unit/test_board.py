"""The board: word left for others, and requests that somebody answers or nobody can."""

from __future__ import annotations

import pytest

from sceneray import board
from sceneray.board import Board


def test_a_request_to_save_is_heard_until_it_is_answered() -> None:
    """Workers hear a request; once it is answered the next workers are not asked for it again."""
    here = Board()
    here.wishes()
    number = here.request_save()
    assert here.wishes().save == number
    assert here.answer(number) == "waiting"
    here.saved(number)
    assert here.answer(number) == "saved"
    assert here.wishes().save == 0


def test_nobody_is_waited_for_where_nobody_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first workers, and after they went, a request is given up at once and forgotten."""
    here = Board()
    assert here.answer(here.request_save()) == "gone"
    here.wishes()
    monkeypatch.setattr(board, "GONE_AFTER_S", -1.0)
    assert here.answer(here.request_save()) == "gone"
    assert here.wishes().save == 0


def test_only_another_commands_attempt_ends_this_one() -> None:
    """An attempt overtaken by a later group of the same command is no failure; by another command it is."""
    here = Board()
    here.add({"kind": "attempt", "attempt": 1})
    here.add({"kind": "attempt", "attempt": 2})
    here.superseded(1, "a zombie")
    assert not here.failed()
    here.superseded(2, "another command")
    assert here.take()[1] == ("SupersededError", "another command")
