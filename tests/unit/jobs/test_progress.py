"""The live line of a run."""

from __future__ import annotations

import pytest

from jobs.progress import LiveLine, duration, step_line

STEP = {
    "kind": "train", "epoch": 3.21, "epochs": 12.0, "step": 160, "steps": 600, "images_per_second": 41.26,
    "loss": 0.81234, "lr": 0.00731, "seconds_left": 114.2,
}  # fmt: skip


def test_a_step_shows_all_that_one_waits_for() -> None:
    """Epoch, step, images a second, loss, learning rate and time left, in one line."""
    expected = "epoch 3.2/12  step 160/600  41.3 images/s  loss 0.8123  lr 0.00731  1:54 left"
    assert step_line(STEP) == expected


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (123.4, "2:03"), (3723, "1:02:03")])
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    """Minutes and seconds, with hours where there are some."""
    assert duration(seconds) == text


def test_a_log_gets_few_step_lines_and_every_result(capsys: pytest.CaptureFixture[str]) -> None:
    """Outside a terminal steps are shown now and then; validations and notes always, all on stderr."""
    with LiveLine() as line:
        for _ in range(3):
            line(STEP)
        line({"kind": "val", "epoch": 4.0, "miou": 0.5, "pixel_accuracy": 0.75})
        line({"kind": "note", "text": "going on from step 7"})
        line({"kind": "stopping"})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        step_line(STEP),
        "epoch 4: val mIoU 0.5000, pixel accuracy 0.7500",
        "going on from step 7",
        "stopping: saving a checkpoint (Ctrl-C again leaves at once)",
    ]
