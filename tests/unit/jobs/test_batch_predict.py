"""A batch prediction without Ray: names, the plan and what is kept of it, when it is a batch, how many workers."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jobs.batch_options import is_batch, options_of
from jobs.batch_plan import (
    Plan,
    Task,
    about,
    begin,
    error_row,
    list_images,
    make_plan,
    part_name,
    result_names,
    write_part,
)
from jobs.batch_pool import to_start
from jobs.batch_predict import ERRORS_KEPT, predict_batch
from jobs.batch_worker import PredictWorker
from jobs.cli import arguments_of
from sceneray import storage
from sceneray.errors import ConfigError, DataError, StorageError
from sceneray.predictor import Predictor
from tests.bundles import half_bright, write_bundle
from tests.unit.serve.uploads import encoded

MODEL = {"name": "brightness", "version": "7", "digest": "d" * 64}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundle whose answers are known."""
    return write_bundle(str(tmp_path_factory.mktemp("bundle")))


def put(root: str, name: str, height: int = 48, width: int = 64) -> str:
    """A half-bright PNG at `root`/`name`; returns its URL."""
    url = storage.join(root, name)
    storage.write_bytes(url, encoded(Image.fromarray(half_bright(height, width)[0]), "PNG"))
    return url


def a_plan(root: str, count: int = 5, model: dict[str, str] = MODEL, **options: Any) -> Plan:
    """A plan of `count` photos in parts of two, its results in `root`/out."""
    for i in range(count):
        put(root, f"in/{i}.png")
    task = Task(storage.join(root, "out"), "no-bundle", model, **options)
    return make_plan(task, [storage.join(root, "in")], 2)


def finish(plan: Plan, index: int, failed: bool = False) -> None:
    """Write the file of a part, as a worker does."""
    part = plan.parts[index]
    good = [{**about(plan.task, photo), "mask": f"{photo.name}.mask.png"} for photo in part.photos]
    rows = [error_row(plan.task, photo, "because") for photo in part.photos]
    write_part(plan.task, part, rows if failed else good)


def worker_of(bundle: str, out: str, **options: Any) -> PredictWorker:
    """A worker whose network is loaded."""
    info = Predictor.load(bundle, "cpu").info
    worker = PredictWorker(Task(out, bundle, {key: info[key] for key in MODEL}, device="cpu", **options))
    worker.start()
    return worker


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a.jpg", "b/a.jpg", "b/c.d.png"], ["a", "b/a", "b/c.d"]),
        (["a.jpg", "a.png", "A.webp"], ["a.jpg", "a.png", "A.webp"]),
        (["a.jpg", "A.JPG", "a.jpg"], ["a.jpg", "A.JPG-2", "a.jpg-3"]),
        (["a.jpg", "a.png", "a.jpg.png"], ["a.jpg", "a.png", "a.jpg-2"]),
        (["../../x.jpg", "/y//z.jpg", "./w.jpg"], ["_/_/x", "_/y/_/z", "_/w"]),
    ],
)
def test_results_lie_at_the_path_of_their_image(paths: list[str], names: list[str]) -> None:
    """The path without its suffix; what differs in the suffix or in case alone is told apart, and none leaves OUT."""
    assert result_names(paths) == names


@given(st.lists(st.from_regex(r"[aA./]{0,4}[aA](\.jpg|\.png|\.PNG)", fullmatch=True), max_size=12))
def test_no_two_images_share_a_result(paths: list[str]) -> None:
    """Whatever the paths: names differ in more than case, and stay below the folder they are put in."""
    names = result_names(paths)
    assert len({name.lower() for name in names}) == len(paths)
    for name in names:
        path = PurePosixPath(name)
        assert not path.is_absolute()
        assert ".." not in path.parts
        assert str(path) == name


def test_a_folder_is_listed_to_its_bottom(any_root: str) -> None:
    """Images by suffix in any case, in all folders below, with their sizes, each once; results are no images."""
    for name in ("b.PNG", "deep/er/a.png", "deep/a.mask.png", "a.overlay.jpg", "notes.txt"):
        put(any_root, name)
    single = storage.join(any_root, "b.PNG")
    size = len(storage.read_bytes(single))
    root = storage.absolute(any_root)
    expected = [(f"{root}/b.PNG", "b.PNG", size), (f"{root}/deep/er/a.png", "deep/er/a.png", size)]
    assert list_images([any_root]) == expected
    assert list_images([single, any_root]) == [(single, "b.PNG", None), expected[1]]
    with pytest.raises(DataError, match=r"no image at .*nothing: give a file, or a folder with \.jpg"):
        list_images([storage.join(any_root, "nothing")])


def test_parts_depend_on_the_list_alone(tmp_path: Path) -> None:
    """Consecutive photos, eight to a part where they are few; another run cuts them alike."""
    for i in range(19):
        put(str(tmp_path), f"in/{i:02}.png")
    task = Task(str(tmp_path / "out"), "b", MODEL)
    plan = make_plan(task, [str(tmp_path / "in")])
    assert [len(part.photos) for part in plan.parts] == [8, 8, 3]
    assert [photo.name for part in plan.parts for photo in part.photos] == [f"{i:02}" for i in range(19)]
    assert make_plan(task, [str(tmp_path / "in")]) == plan


def test_finished_parts_are_kept(any_root: str) -> None:
    """A part with its file is done, the others are not; what an earlier run told of its end goes."""
    plan = a_plan(any_root)
    assert begin(plan) == {}
    finish(plan, 0)
    finish(plan, 2, failed=True)
    summary = storage.join(plan.task.out, "predictions.json")
    storage.write_json(summary, {})
    kept = begin(a_plan(any_root))
    assert {index: (done.photos, len(done.failed)) for index, done in kept.items()} == {0: (2, 0), 2: (1, 1)}
    assert not storage.exists(summary)
    assert list(begin(plan, retry_errors=True)) == [0]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"model": {**MODEL, "version": "8", "digest": "e" * 64}}, r"model: brightness 7 \(d{12}\) → brightness 8"),
        ({"count": 6}, r"photos: 5 → 6, not the same ones"),
        ({"overlay": True}, r"overlay: False → True"),
    ],
)
def test_another_batch_is_refused(tmp_path: Path, other: dict[str, Any], said: str) -> None:
    """OUT with results of another model or other photos: an error with what differs; --overwrite drops them."""
    plan = a_plan(str(tmp_path))
    begin(plan)
    finish(plan, 0)
    changed = a_plan(str(tmp_path), **other)
    with pytest.raises(DataError, match=rf"{said}.*Give another --out, or --overwrite"):
        begin(changed)
    assert list(begin(plan)) == [0], "the refusal changed something"
    assert begin(changed, overwrite=True) == {}
    assert begin(changed) == {}


def test_a_photo_that_changed_is_done_again(tmp_path: Path) -> None:
    """A photo of another size than when its part was finished is another photo: that part is not kept."""
    plan = a_plan(str(tmp_path))
    begin(plan)
    for index in range(3):
        finish(plan, index)
    put(str(tmp_path), "in/3.png", height=80)
    assert list(begin(make_plan(plan.task, [str(tmp_path / "in")], 2))) == [0, 2]


def test_a_part_of_somebody_else_is_done_again(tmp_path: Path) -> None:
    """A worker of an earlier batch wrote its part late: of another model it is not taken; damaged, it is an error."""
    plan = a_plan(str(tmp_path))
    begin(plan)
    late = Plan(Task(plan.task.out, "b", {**MODEL, "digest": "e" * 64}), plan.parts, plan.document)
    finish(late, 1)
    assert begin(plan) == {}
    (tmp_path / "out" / "predictions" / part_name(plan.parts[1])).write_text('{"image": ')
    with pytest.raises(StorageError, match=r"part-00001.jsonl is damaged.*its part is done again"):
        begin(plan)


def test_a_plan_of_another_version_is_refused(tmp_path: Path) -> None:
    """What is not understood is not overwritten."""
    plan = a_plan(str(tmp_path))
    storage.write_json(str(tmp_path / "out" / "predictions" / "plan.json"), {"format": "else"})
    with pytest.raises(DataError, match="not a plan that this version reads"):
        begin(plan)


@pytest.mark.parametrize(
    ("ready", "starting", "unfinished", "low", "high", "start"),
    [
        (0, 0, 100, 1, 8, 1),  # the fewest at once
        (0, 0, 100, 3, 8, 3),
        (0, 1, 100, 1, 8, 0),  # no more until the first is ready
        (1, 0, 100, 1, 8, 1),  # then as many again: 2, 4, 8
        (2, 0, 100, 1, 8, 2),
        (2, 2, 100, 1, 8, 0),  # those that found no room yet are waited for
        (4, 0, 100, 1, 6, 2),  # never more than the most
        (4, 0, 5, 1, 8, 1),  # or than there is work
        (0, 0, 2, 4, 8, 2),
        (8, 0, 100, 1, 4, 0),  # a cluster that shrank: nobody is sent away
    ],
)
def test_the_pool_grows_with_work_and_room(
    ready: int, starting: int, unfinished: int, low: int, high: int, start: int
) -> None:
    """How many workers are started, by how many there are and what is left."""
    assert to_start(ready, starting, unfinished, low, high) == start


@pytest.mark.parametrize(
    ("words", "batch"),
    [
        ("photo.jpg", False),
        ("folder", False),
        ("photo.jpg --workers 2", True),
        ("folder --workers 1-8 --overlay", True),
        ("photo.jpg --address ray://head:1", True),
        ("photo.jpg --workers 0", False),
    ],
)
def test_what_is_a_batch(words: str, batch: bool) -> None:
    """Local images are, where workers or a cluster are asked for."""
    args = arguments_of("predict", [*words.split(), "--bundle", "b", "--out", "o"])
    assert is_batch(args) is batch


def test_a_folder_in_a_bucket_is_a_batch(weed_server: Any) -> None:
    """A folder in a bucket is one by itself; a file there is not."""
    put(weed_server.url("batch"), "a.png")
    for url, batch in ((weed_server.url("batch"), True), (weed_server.url("batch", "a.png"), False)):
        assert is_batch(arguments_of("predict", [url, "--bundle", "b", "--out", "o"])) is batch


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("p.jpg --bundle b --overwrite", "--overwrite: for batches alone"),
        ("p.jpg --url http://x --workers 2 --overlay", "--workers, --overlay: for batches alone"),
        ("p.jpg --bundle b --workers 0 --part-size 4", "--part-size: for batches alone"),
    ],
)
def test_options_of_a_batch_are_refused_elsewhere(words: str, said: str) -> None:
    """An option that would do nothing is an error with the fix."""
    with pytest.raises(ConfigError, match=rf"{said}. Give --bundle and --workers N"):
        is_batch(arguments_of("predict", [*words.split(), "--out", "o"]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--workers two", "--workers must be a number from 1 on, or a range such as 1-8, got two"),
        ("--workers 3-2", "--workers must be"),
        ("--workers 2 --cpus 0", "--cpus must be above 0, got 0"),
        ("--workers 2 --part-size 0", "--part-size must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(words: str, said: str) -> None:
    """The rule and what came."""
    args = arguments_of("predict", ["p.jpg", "--bundle", "b", "--out", "o", *words.split()])
    with pytest.raises(ConfigError, match=said):
        options_of(args)


def test_a_finished_batch_needs_no_ray(bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where all is finished the summary is told again, with a bounded list of errors, and as an error."""
    photos = [tmp_path / "in" / f"{i:03}.jpg" for i in range(ERRORS_KEPT + 20)]
    for path in photos:
        path.parent.mkdir(exist_ok=True)
        path.write_text("no photograph")
    out = str(tmp_path / "out")
    worker = worker_of(bundle, out)
    plan = make_plan(worker._task, [str(tmp_path / "in")])
    begin(plan)
    for part in plan.parts:
        worker.part(part)
    args = arguments_of("predict", [str(tmp_path / "in"), "--bundle", bundle, "--out", out, "--workers", "2"])
    with pytest.raises(DataError, match=r"120 of 120 images failed; predictions.json in .*--retry-errors") as raised:
        predict_batch(args.images, args.bundle, args.out, options_of(args))
    assert str(raised.value).count(".jpg: ") == 3
    assert "private Ray" not in capsys.readouterr().err
    summary = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert (summary["photos"], summary["masks"], summary["failed"]) == (120, 0, 120)
    assert [row["image"] for row in summary["errors"]] == [str(path) for path in photos[:ERRORS_KEPT]]
    assert summary["errors_left_out"] == 20


def test_memory_is_refused(bundle: str) -> None:
    """Other processes see nothing of this one's memory."""
    args = arguments_of("predict", ["memory://in", "--bundle", bundle, "--out", "o", "--workers", "2"])
    with pytest.raises(ConfigError, match="cannot see memory://in"):
        predict_batch(args.images, args.bundle, args.out, options_of(args))
