"""The benchmarks' own arithmetic, and that what needs no cluster runs; what they measure is nobody's pass or fail."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from benchmarks import gpu_serve, gpu_train, train
from benchmarks.peers import figures, loops, setting
from benchmarks.peers.daemons import DaemonWatch, group_of
from benchmarks.peers.loops import ReferenceNet, ReferenceSamples
from sceneray import config
from sceneray.config import TrainSettings
from sceneray.models.pspnet import build_model
from sceneray.steps import Data
from tests.support import ROOT

BENCHMARKS = sorted(path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_script_that_make_bench_runs_is_a_benchmark(name):
    """The loop of `make bench` finds scripts with a command line and no helper module."""
    text = (ROOT / "benchmarks" / f"{name}.py").read_text()
    assert f"python -m benchmarks.{name}" in text
    assert 'if __name__ == "__main__":\n    main()' in text


def test_rates_leave_the_warm_up_out():
    """With 2 steps to warm up, the clock starts at the second step's end, whatever those two took."""
    ends = [100.0, 150.0, 150.5, 151.0, 152.0]
    assert figures.window_seconds(ends, 2) == 2.0
    assert figures.images_per_second(ends, 2, batch=8) == 12.0
    with pytest.raises(ValueError, match="2 steps were timed"):
        figures.window_seconds([1.0, 2.0], 2)


def test_ratios_are_taken_within_a_repetition():
    """A machine that becomes half as fast for both loops changes no ratio."""
    assert figures.paired_ratio([10.0, 5.0, 8.0], [10.0, 5.0, 10.0]) == {"median": 1.0, "least": 0.8, "most": 1.0}
    with pytest.raises(ValueError, match="zip"):
        figures.paired_ratio([1.0], [1.0, 2.0])


def test_a_share_is_known_only_where_every_row_has_the_field():
    """Rows of a version without the field give None and not zero."""
    rows = [{"data_wait_s": 0.5}, {"data_wait_s": 0.25}]
    assert figures.share_of(rows, "data_wait_s", 3.0) == 0.25
    assert figures.share_of([*rows, {}], "data_wait_s", 3.0) is None
    assert figures.share_of([], "data_wait_s", 3.0) is None
    assert figures.median_or_none([0.1, None]) is None
    assert figures.median_or_none([0.1, 0.3, 0.2]) == 0.2


def test_tables_are_markdown_with_equal_columns():
    """Numbers show the digits that count, and what is missing shows as a dash."""
    lines = figures.markdown(("loop", "images/s"), [("bare", 12.3456), ("ray 1", None), ("long name", 1234.5)]).split(
        "\n"
    )
    assert lines[0] == "| loop      | images/s |"
    assert lines[2] == "| bare      | 12.3     |"
    assert lines[3] == "| ray 1     | –        |"
    assert lines[4] == "| long name | 1234     |"
    assert {len(line) for line in lines} == {len(lines[0])}


def record(rate: float, wait: float | None = 0.1) -> dict[str, object]:
    return {"images_per_s": rate, "data_wait_share": wait, "ray_share": {"raylet": 0.01, "gcs_server": 0.02}}


def test_the_summary_has_the_ratios_of_what_ran():
    """Medians of each loop, ratios of the pairs that both ran, and a note where steps are too short to quote."""
    measured = {
        "bare": [record(5.0), record(10.0), record(15.0)],
        "ray 1": [record(4.5, None), record(9.5, None), record(15.0, None)],
        "torchvision": [record(40.0), record(40.0), record(40.0)],
    }
    found = train.summary(measured, setting.FULL, threads=1)
    assert list(found["ratios"]) == ["ray_over_bare"]
    assert found["ratios"]["ray_over_bare"] == {"median": 0.95, "least": 0.9, "most": 1.0}
    assert found["loops"]["bare"]["images_per_s"] == 10.0
    assert found["loops"]["bare"]["step_s"] == setting.FULL.batch / 10
    assert found["loops"]["bare"]["ray_cpu_share"] == 0.03
    assert found["loops"]["ray 1"]["data_wait_share"] is None
    assert any("torchvision" in note and "bare" not in note for note in found["notes"])
    assert any("data_wait_s" in note for note in found["notes"])
    shown = train.report({**found, "saving": None})
    assert "| ray over bare | 0.95" in shown


def test_the_stall_is_a_share_of_the_run():
    """The seconds held by saves over all seconds; rows without the field give the reason instead of a number."""
    rows = [{"checkpoint_stall_s": stall} for stall in (9.0, 0.0, 0.5, 0.0, 0.3)]
    found = train.saving_summary(
        {"ends": [0.0, 20.0, 40.0, 60.0, 80.0], "rows": rows, "blocking_s": [5.0, 3.0, 4.0]}, every_s=30
    )
    assert found["stall_share"] == 0.01
    assert found["rows_with_a_stall"] == 2
    assert found["longest_stall_s"] == 0.5
    assert found["blocking_save_s"] == 4.0
    missing = train.saving_summary({"ends": [0.0, 1.0], "rows": [{}, {}]}, every_s=30)
    assert missing["stall_share"] is None
    assert "checkpoint_stall_s" in missing["reason"]


@pytest.mark.parametrize(
    ("name", "command", "group"),
    [
        ("raylet", "/x/raylet --raylet_socket_name=a --python_worker_command=/x/dashboard/agent.py", "raylet"),
        ("ray-dashboard-JobHead-0", "ray-dashboard-JobHead-0 (python -c from multiprocessing)", "dashboard and agents"),
        ("python", "python -c from multiprocessing.forkserver; ['ray.dashboard.sub']", "dashboard and agents"),
        ("gcs_server", "/x/ray/core/src/ray/gcs/gcs_server --log_dir=a", "gcs_server"),
        ("ray::TrainContro", "ray::TrainController.run", "actor TrainController"),
        ("ray::IDLE", "ray::IDLE", "idle workers"),
        ("python", "python -u /x/ray/_private/workers/default_worker.py --a", "idle workers"),
        ("ray::RayTrainWor", "ray::RayTrainWorker.execute", None),
        ("ray::DashboardA", "ray::DashboardAgent", "dashboard and agents"),
        ("python", "python -u /x/ray/dashboard/agent.py --node-ip=a", "dashboard and agents"),
        ("python", "python -u /x/ray/_private/log_monitor.py --a", "dashboard and agents"),
        ("python", "python -m benchmarks.peers.child bare a b", None),
        ("python", "python -c from multiprocessing.spawn import spawn_main; spawn_main()", None),
        ("python", "python something", "other"),
    ],
)
def test_processes_are_counted_as_what_they_are(name, command, group):
    """Ray's own processes have a group; training processes of either side have none."""
    assert group_of(name, command) == group


def test_the_watch_counts_this_process():
    """Work of this process between two moments is seen as the driver's share of the machine."""
    with DaemonWatch() as watch:
        watch.look()
        began_at, start = time.process_time(), watch.times[-1]
        while time.process_time() - began_at < 0.3:
            torch.ones(200, 200).exp()
        watch.look()
        found = watch.share(start, watch.times[-1])
    assert 0 < found["driver"] <= 1.1


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A small store of drawn scenes in 4:3."""
    url = str(tmp_path_factory.mktemp("bench") / "store")
    return setting.town_store(url, 4, 2, (48, 64))


def small_settings(store, run, *overrides):
    """Settings of two steps of a small network."""
    small = (
        f"run={run}", f"data.store={store}", "augment.crop=[40, 40]", "epochs=1", "batch_size=2", "workers=1",
        "model={backbone: resnet18, output_stride: 16, head_width: 8, aux_width: 8, pool_width: 4}", "threads=1",
    )  # fmt: skip
    return config.load(TrainSettings, None, [*small, *overrides])


@pytest.mark.parametrize("loop", [loops.bare, loops.reference, partial(loops.reference, channels_last=True)])
def test_the_peers_train(loop, store, tmp_path, capsys):
    """Each peer's loop takes all the run's steps and tells when each ended and what it waited for."""
    began_at = time.time()
    times = loop(small_settings(store, tmp_path / "run"))
    assert len(times["ends"]) == len(times["waits"]) == 2
    assert began_at < times["ends"][0] < times["ends"][1] <= time.time()
    assert all(wait > 0 for wait in times["waits"])


def test_the_reference_has_our_network(store):
    """The adapter gives what our network gives for the same pixels, and has all its parameters once."""
    settings = small_settings(store, "unused", "model.dropout=0").model
    net = build_model(settings, 3).eval()
    adapted = ReferenceNet(net).eval()
    images = torch.randint(0, 256, (2, 3, 40, 48), dtype=torch.uint8)
    logits = adapted((images - net.mean) / net.std)
    assert torch.allclose(logits["out"], net(images).main, atol=1e-4)
    assert logits["aux"].shape == logits["out"].shape == (2, 3, 40, 48)
    assert sum(p.numel() for p in adapted.parameters()) == sum(p.numel() for p in net.parameters())


def test_the_reference_transforms_give_normalised_squares(store, tmp_path):
    """A sample is a float square of the crop's size with its label; padding is ignored and black before normalising."""
    data = Data.open(small_settings(store, tmp_path / "run"))
    samples = ReferenceSamples(data.train, 48)
    for index in range(len(samples)):
        image, label = samples[index]
        assert image.shape == (3, 48, 48)
        assert label.shape == (48, 48)
        assert image.dtype == torch.float32
        assert label.dtype == torch.int64
        assert set(label.unique().tolist()) <= {*range(8), 255}
        black = torch.tensor([-2.1179, -2.0357, -1.8044])
        assert torch.allclose(image[:, label == 255], black[:, None], atol=1e-3)


def test_a_variant_that_does_not_fit_has_a_row_and_no_ratio():
    """A variant that did not fit is a row of its own, and no ratio is made of it."""
    fits = {"images_per_s": 100.0, "step_ms": 160.0, "share_of_matmul_peak": 0.4, "peak_memory_gib": 30.0}
    variants = {
        "sceneray": fits,
        "reference, fp32": {"error": "out of memory"},
        "reference, AMP": {**fits, "images_per_s": 80.0},
    }
    assert gpu_train.ratios(variants) == {"sceneray / reference, AMP": 1.25}
    about = {"device": "a GPU", "torch": "2", "crop": 713, "batch": 16, "gflop_per_image": 1000.0}
    speeds = {"matmul_tflop_per_s": 700.0, "copy_gb_per_s": 3000.0}
    shown = gpu_train.report({**about, **speeds, "variants": variants, "ratios": {}})
    assert "| reference, fp32 | out of memory | –" in shown


def test_a_variant_without_memory_is_a_row():
    """PyTorch's error for a full device ends the variant and not the run."""

    def full():
        raise torch.OutOfMemoryError("full")

    found = gpu_train.run_variant(lambda: full, gpu_train.QUICK, torch.device("cpu"), 1.0, 1.0)
    assert found == {"error": "out of memory"}


WITHOUT_RAY = """
import runpy, sys
sys.modules["ray"] = None  # importing it fails, as where it is not installed
name = sys.argv[1]
sys.argv = [name, "--device", "cpu", "--quick", "--json"]
runpy.run_module(f"benchmarks.{name}", run_name="__main__")
"""


def run_without_ray(name):
    """What the GPU benchmark `name` prints on a CPU as its only line."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY, name], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def test_the_serving_cores_benchmark_runs_on_a_cpu_and_without_ray():
    """`gpu_serve --device cpu --quick` prints one JSON line: the peer and ours at each batch size, the limit of both
    and what was served of ours, in whole batches."""
    found = run_without_ray("gpu_serve")
    rows = {(row["batch"], row["variant"]): row for row in found["rows"]}
    assert set(rows) == {(batch, name) for batch in gpu_serve.QUICK.batches for name in (gpu_serve.PEER, "torch")}
    for (batch, name), row in rows.items():
        assert row["limit_images_per_s"]["least"] > 0
        assert row["share_of_matmul_peak"] > 0
        if name == "torch":
            assert row["images_a_pass"] == batch
            assert row["served_images_per_s"]["most"] >= row["served_images_per_s"]["median"] > 0
            assert row["p99_ms"] >= row["p50_ms"] > 0
    assert found["precision"] == {"torch": "fp32"}
    assert found["gflop_per_image"] > 0.1


def test_a_cell_without_memory_is_a_row_and_is_not_tried_again():
    """PyTorch's error, and a batch that the serving core halved, both end the cell; the peer's end takes only the
    ratios to it."""
    calls = []

    def full(cell):
        calls.append(cell)
        raise torch.OutOfMemoryError("full")

    def halved(cell):
        cell.telemetry.record("sceneray_out_of_memory", 1)

    peer, ours, fits = (gpu_serve.Cell(lambda: None) for _ in range(3))
    gpu_serve.unless_full(peer, full)
    gpu_serve.unless_full(peer, full)
    gpu_serve.unless_full(ours, halved)
    assert calls == [peer]
    assert gpu_serve.row_of(peer, peer) == gpu_serve.row_of(ours, peer) == {"error": "out of memory"}
    fits.limits.append(50.0)
    assert gpu_serve.row_of(fits, peer) == {"limit_images_per_s": {"median": 50.0, "least": 50.0, "most": 50.0}}
    rows = [{"batch": 16, "variant": "torch", "error": "out of memory"}]
    about = {"device": "a GPU", "torch": "2", "height": 512, "width": 1024, "gflop_per_image": 700.0}
    about |= {"matmul_tflop_per_s": 700.0, "concurrent_batches": 1, "precision": {"torch": "bf16"}, "rows": rows}
    assert "| 16    | torch, bf16 | out of memory   | –" in gpu_serve.report(about)


def test_the_gpu_benchmark_runs_on_a_cpu_and_without_ray():
    """`gpu_train --device cpu --quick` prints one JSON line with every variant that a CPU can run."""
    found = run_without_ray("gpu_train")
    assert set(found["variants"]) == {"sceneray", "reference, fp32", "sceneray, again"}
    assert all(variant["images_per_s"] > 0 for variant in found["variants"].values())
    assert found["gflop_per_image"] > 1
    assert found["matmul_tflop_per_s"] > 0
