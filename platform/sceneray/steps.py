"""Training's small named steps: make the state, take one step, evaluate, restore.

`sceneray.training.fit` calls them in a loop; a test calls them one by one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from sceneray import checkpoint as checkpoints
from sceneray import devices, losses, optim, parallel
from sceneray.checkpoint import Checkpoint
from sceneray.config import TrainSettings
from sceneray.data import order
from sceneray.data.cache import ShardCache
from sceneray.data.loader import Batch, sample_order
from sceneray.data.store import ClassInfo, Split, Store
from sceneray.ema import WeightAverage
from sceneray.errors import CheckpointError, TrainingError
from sceneray.evaluation import evaluate_indices, rank_indices
from sceneray.metrics import Scores, scores
from sceneray.models.pspnet import Logits, PSPNet, build_model
from sceneray.models.weights import transfer
from sceneray.profiling import Stages


def _ignore(_: dict[str, Any]) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Where a run runs, and whom it tells. With `world_size` > 1 torch.distributed is initialised already."""

    rank: int = 0
    world_size: int = 1
    workers_here: int = 1  # ranks on this machine, which share its cores
    device_index: int = 0
    node: str = "local default"  # "ID TYPE" of this rank's machine; the type has a price in cost.price_per_hour
    report: Callable[[dict[str, Any]], None] = _ignore  # after every evaluation, on every rank
    progress: Callable[[dict[str, Any]], None] = _ignore  # after every logged step, on rank 0
    should_stop: Callable[[], bool] = lambda: False  # asked at every step, on every rank: save and end
    should_leave: Callable[[], bool] = lambda: False  # the same: save and leave, the run goes on elsewhere
    save_wanted: Callable[[int], bool] = lambda _: False  # asked after step n, on rank 0: save and go on
    on_saved: Callable[[int], None] = lambda _: None  # rank 0 committed the checkpoint of that step
    on_hang: Callable[[str], None] | None = None  # no progress for resources.hang_timeout_s; None: nobody looks


@dataclasses.dataclass(frozen=True)
class Data:
    """The open store of a run and its two splits."""

    store: Store
    train: Split
    val: Split

    @classmethod
    def open(cls, settings: TrainSettings) -> Data:
        """Open the store and both splits. Raises DataError where one is missing or empty."""
        store = Store.open(settings.data.store)
        cache = ShardCache(settings.data.cache, settings.data.cache_gb, settings.save.tolerate_s)
        return cls(store, store.split(settings.data.train_split, cache), store.split(settings.data.val_split, cache))


@dataclasses.dataclass
class TrainState:
    """All that changes while training, and the fixed things around it."""

    settings: TrainSettings
    runtime: Runtime
    device: torch.device
    model: PSPNet
    ddp: DistributedDataParallel | None  # the model wrapped, where there are several ranks
    forward: Callable[..., Logits]  # what a step calls: the model or its wrapper, compiled if asked for
    ema: WeightAverage | None
    scaler: torch.amp.GradScaler  # does nothing but in fp16
    stages: Stages
    optimizer: torch.optim.Optimizer
    class_weights: Tensor | None
    ignore_index: int
    positions: int  # samples of the whole run
    steps: int  # optimizer steps of the whole run
    notes: list[str] = dataclasses.field(default_factory=list)  # what the run's log should say of its start
    step: int = 0  # steps done
    scored: bool = False  # the checkpoint that training goes on from was evaluated

    @property
    def scored_model(self) -> PSPNet:
        """The network that is evaluated and exported: the average of the weights where one is kept."""
        return self.model if self.ema is None else self.ema.model

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype of mixed precision; None for float32."""
        return devices.autocast_dtype(self.settings.precision, self.device)


def create_state(settings: TrainSettings, runtime: Runtime, data: Data, fresh: bool = True) -> TrainState:
    """A state at step 0: the network from its seed, `weights` or `init_from`; not `fresh`: a checkpoint will follow."""
    device = devices.pick_device(settings.resources.gpu, runtime.device_index)
    if device.type == "cpu":
        torch.set_num_threads(devices.cpu_threads(settings.threads, runtime.workers_here))
    devices.set_determinism(settings.deterministic, device)
    torch.manual_seed(settings.seed)
    notes: list[str] = []
    model = build_model(settings.model, len(data.store.classes), load_weights=fresh and settings.init_from is None)
    if fresh and settings.init_from is not None:
        notes.append(start_from(model, settings.init_from, data.store.classes))
    model.to(device).train()
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    if settings.model.norm == "local" and runtime.world_size > 1:
        notes.append(f"norm: local: batch statistics are those of one of {runtime.world_size} workers' samples")
    weights = losses.class_weights(settings.loss.class_weights, data.store.pixel_counts(settings.data.train_split))
    positions = order.total_positions(len(data.train), settings.epochs)
    groups = optim.param_groups(model, settings.optimizer)
    ddp = parallel.distributed(model, device, runtime.world_size)
    forward = model if ddp is None else ddp
    return TrainState(
        settings=settings,
        runtime=runtime,
        device=device,
        model=model,
        ddp=ddp,
        forward=torch.compile(forward) if settings.compile else forward,
        ema=None if settings.ema is None else WeightAverage(model, settings.ema),
        scaler=torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16"),
        stages=Stages(device),
        optimizer=optim.OPTIMIZERS[settings.optimizer.name](groups, settings.optimizer),
        class_weights=None if weights is None else weights.to(device),
        ignore_index=data.store.ignore_index,
        positions=positions,
        steps=order.total_steps(positions, settings.batch_size),
        notes=notes,
    )


def settle(state: TrainState) -> None:
    """Make the first step sum gradients as every later one does (`parallel.settle_buckets`); before `restore`."""
    if state.ddp is not None:
        images = torch.zeros(1, 3, *state.settings.augment.crop, dtype=torch.uint8, device=state.device)
        if state.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        seeds = torch.zeros(1, dtype=torch.int64, device=state.device)
        with devices.autocast(state.autocast_dtype, state.device):
            parallel.settle_buckets(state.ddp, (images, seeds))


def start_from(model: PSPNet, url: str, classes: Sequence[ClassInfo]) -> str:
    """Fine-tune: start `model` from the checkpoint at `url`; returns a line on what was loaded and what made anew."""
    saved = checkpoints.load(url)
    same = [info.name for info in saved.classes] == [info.name for info in classes]
    report = transfer(model, saved.model, same)
    anew = ", ".join(report.made_anew) or "nothing"
    return f"init_from {url}: loaded {len(report.loaded)} tensors, made anew: {anew}"


def train_step(state: TrainState, batches: Sequence[Batch], stop: bool = False, leave: bool = False) -> Tensor:
    """One optimizer step over this rank's part of a global batch, in one forward pass for each of `batches`.

    Returns float64 [4] on the device, summed over ranks: the main loss's sum, its weight, and how many ranks were asked
    to `stop` and to `leave`. The gradient is that of (main + aux_weight · aux) summed over all valid pixels of the
    global batch and divided by their number, however the batch is split over ranks and passes.
    """
    settings, world = state.settings, state.runtime.world_size
    schedule = optim.SCHEDULES[settings.schedule.name]
    optim.set_lr(state.optimizer, schedule(state.step, state.steps, settings.schedule))
    state.optimizer.zero_grad(set_to_none=True)
    totals = torch.zeros(4, dtype=torch.float64, device=state.device)
    for slot, asked in ((2, stop), (3, leave)):
        if asked:
            totals[slot] = 1.0
    # Sums over pixels grow large: a fixed factor keeps gradients near 1 until the exact division below.
    scale = 1.0 / (settings.batch_size * settings.augment.crop[0] * settings.augment.crop[1])
    for number, batch in enumerate(batches, start=1):
        with _reduce_gradients(state.ddp, number == len(batches)):
            # DDP averages over ranks; the sum is wanted.
            totals[:2] += _forward_backward(state, batch, scale * world)
    with state.stages("communication"):
        parallel.sum_over_ranks(totals, world)
    with state.stages("optimizer"):
        _apply_gradients(state, (1.0 / (scale * totals[1].clamp(min=1e-12))).float())
    state.step += 1
    if state.ema is not None:
        state.ema.update(state.model, state.step)
    return totals


def _forward_backward(state: TrainState, batch: Batch, factor: float) -> Tensor:
    """Add `factor` times the loss's gradient to the parameters; returns [the main loss's sum, its weight]."""
    settings = state.settings
    loss_function = losses.LOSSES[settings.loss.name]
    images, labels, seeds = (
        tensor.to(state.device, non_blocking=True) for tensor in (batch.images, batch.labels, batch.seeds)
    )
    if settings.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with state.stages("forward"):
        with devices.autocast(state.autocast_dtype, state.device):
            logits = state.forward(images, seeds)
        loss, weight = loss_function(logits.main.float(), labels, state.class_weights, state.ignore_index)
        objective = loss
        if logits.aux is not None:
            aux, _ = loss_function(logits.aux.float(), labels, state.class_weights, state.ignore_index)
            objective = loss + settings.loss.aux_weight * aux
    with state.stages("backward"):
        state.scaler.scale(objective * factor).backward()
    return torch.stack([loss.detach(), weight]).double()


def _apply_gradients(state: TrainState, factor: Tensor) -> None:
    state.scaler.unscale_(state.optimizer)
    torch._foreach_mul_([p.grad for p in state.model.parameters() if p.grad is not None], factor)
    state.scaler.step(state.optimizer)
    state.scaler.update()


def evaluate(state: TrainState, data: Data, on_images: Callable[[int], None] | None = None) -> Scores:
    """Score the current weights (or their average) on the val split; every rank takes its share and gets all scores.

    `on_images` is told after every batch how many images this rank scored.
    """
    parallel.share_buffers(state.scored_model, state.runtime.world_size)
    indices = rank_indices(len(data.val), state.runtime.rank, state.runtime.world_size)
    with devices.autocast(state.autocast_dtype, state.device):
        matrix = evaluate_indices(
            state.scored_model, data.val, indices, len(data.store.classes), state.ignore_index, state.device, on_images
        )
    return scores(parallel.sum_matrix(matrix, state.device, state.runtime.world_size))


def batch_names(state: TrainState, data: Data, step: int) -> list[str]:
    """Names of the samples of the global batch that step number `step` (from 0) used."""
    samples = sample_order(data.train.shard_rows, state.settings)
    batch = order.step_positions(step, state.settings.batch_size, state.positions)
    return [data.train.read(samples[position]).name for position in batch]


def check_finite(state: TrainState, data: Data, steps: range, totals: Tensor) -> None:
    """Raise TrainingError at the first of `steps` whose loss (totals: float64 [len(steps), 4]) is not finite."""
    bad = (~torch.isfinite(totals[:, 0])).nonzero().flatten().tolist()
    if bad:
        step = steps[bad[0]]
        names = batch_names(state, data, step)
        raise TrainingError(
            f"the loss is {float(totals[bad[0], 0])} at step {step + 1}, samples {', '.join(names)}. The last "
            "committed checkpoint is untouched. Lower optimizer.lr, add schedule.warmup_steps, or look at those "
            "samples."
        )


def check_weights(state: TrainState) -> None:
    """Raise TrainingError where a weight is not finite: such a network is never saved."""
    norms = torch._foreach_norm([p.detach() for p in state.model.parameters()])
    if not bool(torch.isfinite(torch.stack(norms)).all()):
        raise TrainingError(
            f"a weight is not finite after step {state.step}. The last committed checkpoint is untouched. Lower "
            "optimizer.lr or add schedule.warmup_steps."
        )


def optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    """The optimizer's state as "parameter name/state name" → tensor."""
    found = {}
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{name}/{key}"] = value
    return found


def restore(state: TrainState, saved: Checkpoint, store_digest: str) -> None:
    """Continue from `saved`: weights, optimizer and position.

    Raises CheckpointError where it was trained on other data: the same positions would mean other samples.
    """
    if saved.store_digest != store_digest:
        raise CheckpointError(
            f"{saved.url} was trained on a store with digest {saved.store_digest[:12]}…, and "
            f"{state.settings.data.store} now has {store_digest[:12]}…: its data changed. Give the old store, or a new "
            "run with init_from."
        )
    state.model.load_state_dict(saved.model, strict=True)
    for name, parameter in state.model.named_parameters():
        prefix = name + "/"
        slots = {key[len(prefix) :]: value for key, value in saved.optimizer.items() if key.startswith(prefix)}
        for key, value in slots.items():
            # A buffer of the parameter's shape takes its memory format; fused kernels want counters on the device too.
            same = value.shape == parameter.shape and value.dim() > 0
            state.optimizer.state[parameter][key] = (
                torch.empty_like(parameter).copy_(value) if same else value.to(parameter.device)
            )
    if state.ema is not None:
        state.ema.load(saved.ema or saved.model)
    if "scaler" in saved.state:
        state.scaler.load_state_dict(saved.state["scaler"])
    state.step, state.scored = saved.step, bool(saved.metrics)


def _reduce_gradients(ddp: DistributedDataParallel | None, last: bool) -> contextlib.AbstractContextManager[Any]:
    """DDP sums gradients over ranks in the last pass of a step only."""
    return contextlib.nullcontext() if last or ddp is None else ddp.no_sync()
