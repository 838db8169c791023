"""Typed settings: one pydantic tree per verb; defaults < YAML file < `key=value` on the command line.

An unknown key is an error that names the nearest known key. Names that live in a registry (`backbone`, `loss`, ...)
are checked against that registry's dict, so a new entry there is allowed here without a change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, field_validator, model_validator

from sceneray import storage
from sceneray.config_base import Fraction, Positive, Settings, known_in
from sceneray.config_errors import explain
from sceneray.config_run import CostSettings, LogSettings, ResourceSettings, SaveSettings, worker_range
from sceneray.errors import ConfigError


class DataSettings(Settings):
    """Which samples, and in which order."""

    store: str = Field(description="URL of a dataset store written by `sceneray prepare`")
    train_split: str = "train"
    val_split: str = "val"
    order: Literal["global", "block"] = Field(
        "global", description="global: shuffle all samples; block: shuffle shards, then within a window"
    )
    window: Positive = Field(4096, description="samples shuffled together when order is 'block'")
    loader_workers: int = Field(0, ge=0, description="decoding processes per training worker; 0 decodes in the loop")
    cache: str | None = Field(None, description="folder for shard copies; default ~/.cache/sceneray")
    cache_gb: float = Field(50.0, gt=0, description="the most the shard cache may hold")


class AugmentSettings(Settings):
    """Random changes of a training sample, drawn from (seed, position); image and label together."""

    crop: tuple[Positive, Positive] = Field((473, 473), description="height, width in pixels")
    scale: tuple[float, float] = Field((0.5, 2.0), description="range of the random resize")
    flip: Fraction = Field(0.5, description="probability of a left-right flip")
    brightness: float = Field(0.2, ge=0, le=1, description="factor drawn from 1 ± this")
    contrast: float = Field(0.2, ge=0, le=1, description="factor drawn from 1 ± this")
    saturation: float = Field(0.2, ge=0, le=1, description="factor drawn from 1 ± this")
    transforms: tuple[Annotated[str, AfterValidator(known_in("sceneray.data.transforms:TRANSFORMS"))], ...] = Field(
        ("scale_crop", "flip", "colour_jitter"), description="applied in this order; the result has the crop's size"
    )

    @field_validator("scale")
    @classmethod
    def _ordered(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale must be [low, high] with 0 < low <= high, got {list(scale)}")
        return scale


class ModelSettings(Settings):
    """PSPNet (Zhao et al., CVPR 2017) over a dilated torchvision backbone."""

    backbone: Annotated[str, AfterValidator(known_in("sceneray.models.backbones:BACKBONES"))] = "resnet50"
    output_stride: Literal[8, 16] = 8
    full_dilation: bool = Field(
        False, description="first block of a dilated stage takes the full dilation, as hszhao/semseg has it"
    )
    bins: tuple[Positive, ...] = Field((1, 2, 3, 6), min_length=1, description="sides of the pyramid's pooling grids")
    pool_width: int | None = Field(None, ge=1, description="channels per bin; default: backbone channels / bins")
    head_width: Positive = Field(512, description="channels of the 3×3 convolution after the pyramid")
    aux_width: Positive = Field(256, description="channels of the auxiliary head")
    dropout: float = Field(0.1, ge=0, lt=1)
    norm: Literal["local", "sync", "frozen"] = Field(
        "local", description="batch statistics of one worker, of all workers, or the stored ones"
    )
    weights: str | None = Field(None, description="backbone start: nothing, 'imagenet' or a URL to a state dict")


class OptimizerSettings(Settings):
    """The published recipe: SGD with momentum, ten times the rate on the layers that start from nothing."""

    name: Annotated[str, AfterValidator(known_in("sceneray.optim:OPTIMIZERS"))] = "sgd"
    lr: float = Field(0.01, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    head_lr_factor: float = Field(10.0, gt=0, description="rate of the new layers over the backbone's")


class ScheduleSettings(Settings):
    """Learning rate over steps."""

    name: Annotated[str, AfterValidator(known_in("sceneray.optim:SCHEDULES"))] = "poly"
    power: float = Field(0.9, gt=0)
    warmup_steps: int = Field(0, ge=0)


class LossSettings(Settings):
    """What is minimised: the main head's loss plus `aux_weight` times the auxiliary head's."""

    name: Annotated[str, AfterValidator(known_in("sceneray.losses:LOSSES"))] = "cross_entropy"
    aux_weight: float = Field(0.4, ge=0)
    class_weights: Literal["none", "median_frequency", "sqrt_frequency"] = Field(
        "none", description="from the pixel counts in the store's manifest"
    )


class TrainSettings(Settings):
    """Everything `sceneray train` needs. The resolved tree is written to RUN/config.yaml."""

    run: str = Field(description="URL of the run folder: config, metrics, checkpoints, pictures")
    data: DataSettings
    augment: AugmentSettings = AugmentSettings()
    model: ModelSettings = ModelSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    loss: LossSettings = LossSettings()
    epochs: float = Field(50, gt=0, description="passes over the training split; a fraction is allowed")
    batch_size: Positive = Field(16, description="the global batch: samples of one optimizer step over all workers")
    accumulate: Positive = Field(1, description="forward passes per step; splits the batch to save memory")
    eval_every: Positive = Field(1, description="epochs between evaluations on the val split")
    seed: int = Field(0, ge=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on GPUs that compute in it, else fp32; fp16 scales the loss"
    )
    channels_last: bool = True
    compile: bool = Field(False, description="torch.compile the network: gains on GPUs, after minutes of compiling")
    deterministic: bool = Field(False, description="GPU: only algorithms that repeat bit for bit; slower")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of an average of the weights, which is then evaluated and exported"
    )
    profile: bool = Field(False, description="time the stages of some steps, and write a trace to RUN/profile")
    threads: int | None = Field(None, ge=1, description="CPU threads per worker; default: its share of the machine")
    init_from: str | None = Field(None, description="fine-tune: a checkpoint whose network starts this one")
    workers: Annotated[int | str, AfterValidator(worker_range)] = Field(
        2, description="training processes (DDP ranks); '1-8': as many of those as the cluster has room for"
    )
    resources: ResourceSettings = ResourceSettings()
    cost: CostSettings = CostSettings()
    save: SaveSettings = SaveSettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="after")
    def _batch_reaches_every_worker(self) -> TrainSettings:
        parts = self.max_workers * self.accumulate
        if self.batch_size < parts:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be at least workers × accumulate ({self.max_workers} × "
                f"{self.accumulate} = {parts}); raise batch_size or lower workers"
            )
        return self

    @property
    def min_workers(self) -> int:
        """The fewest workers the run may have."""
        return int(str(self.workers).partition("-")[0])

    @property
    def max_workers(self) -> int:
        """The most workers the run may have."""
        return int(str(self.workers).rpartition("-")[2])

    @property
    def elastic(self) -> bool:
        """True where the number of workers may change while the run goes on."""
        return self.min_workers != self.max_workers


# Settings that do not change what is learned: a run may be resumed with other values of these.
RESUMABLE_WITH_OTHER = (
    "workers",
    "resources",
    "save",
    "log",
    "cost",
    "profile",
    "threads",
    "data.loader_workers",
    "data.cache",
    "data.cache_gb",
)

S = TypeVar("S", bound=BaseModel)
T = TypeVar("T", bound=TrainSettings)


def load(cls: type[S], url: str | None = None, overrides: Sequence[str] = ()) -> S:
    """Settings of type `cls` from a YAML file at `url` and `a.b=value` overrides (values are YAML).

    Raises ConfigError naming each wrong key with the nearest known one.
    """
    tree: dict[str, Any] = {}
    if url is not None:
        tree = read_yaml(url)
    for text in overrides:
        _override(tree, text)
    return validate(cls, tree, url or "the command line")


def read_yaml(url: str) -> dict[str, Any]:
    """The mapping in the YAML file at `url`."""
    try:
        tree = yaml.safe_load(storage.read_bytes(url))
    except FileNotFoundError as error:
        raise ConfigError(f"no settings file at {url}: check the path.") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{url} is a folder: name a YAML file in it.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{url} is not YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{url} must hold a mapping of settings, got a {type(tree).__name__}.")
    return tree


def validate(cls: type[S], tree: Mapping[str, Any], source: str) -> S:
    """`tree` as settings of type `cls`; `source` is named in the ConfigError."""
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        problems = [explain(cls, problem) for problem in error.errors()]
        raise ConfigError(f"settings from {source}: " + "; ".join(problems)) from error


def dump(settings: BaseModel) -> str:
    """Settings as YAML that `load` reads back."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(old: BaseModel, new: BaseModel, ignore: Sequence[str] = ()) -> list[str]:
    """`key: old → new` for every setting that differs, but for those at or below a key in `ignore`."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    changed = []
    for key in sorted(before.keys() | after.keys()):
        ignored = any(key == name or key.startswith(name + ".") for name in ignore)
        if not ignored and before.get(key) != after.get(key):
            changed.append(f"{key}: {before.get(key)} → {after.get(key)}")
    return changed


def map_files(settings: T, change: Callable[[str, str], str]) -> T:
    """`settings` with each file or folder they name replaced by change(key, url)."""

    def changed(key: str, url: str | None) -> str | None:
        # An empty run is a trial's, which its sweep places; 'imagenet' is no file.
        return change(key, url) if url and (key, url) != ("model.weights", "imagenet") else url

    data = {key: changed(f"data.{key}", getattr(settings.data, key)) for key in ("store", "cache")}
    model = {"weights": changed("model.weights", settings.model.weights)}
    update = {
        "run": changed("run", settings.run),
        "data": settings.data.model_copy(update=data),
        "model": settings.model.model_copy(update=model),
        "init_from": changed("init_from", settings.init_from),
    }
    return settings.model_copy(update=update)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"'{text}' is not a setting: write key=value, for example optimizer.lr=0.02")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of '{key}' is not YAML: {raw}") from error
    *parents, last = key.split(".")
    node = tree
    for name in parents:
        if node.get(name) is None:  # absent, or a group left empty in the file
            node[name] = {}
        child = node[name]
        if not isinstance(child, dict):
            raise ConfigError(f"'{key}' cannot be set: '{name}' is a value, not a group of settings.")
        node = child
    node[last] = value
