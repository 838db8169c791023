"""The peers' loops, each over our store and our network. A loop returns the moment each of its steps ended.

`bare` is the least that trains: forward, backward, optimizer, with our loader, network and kernels (channels_last,
float32). Under torchrun the same loop runs with DistributedDataParallel. `reference` does what torchvision's
segmentation script does.
"""

from __future__ import annotations

import os
import random
import time
from collections import defaultdict, deque
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import InterpolationMode, RandomCrop
from torchvision.transforms import functional as TF

from sceneray import optim
from sceneray.config import TrainSettings
from sceneray.data import order
from sceneray.data.images import decode_image, decode_label
from sceneray.data.loader import training_loader
from sceneray.data.store import Split
from sceneray.models.pspnet import MEAN, STD, PSPNet, build_model
from sceneray.steps import Data

Times = dict[str, list[float]]  # "ends": wall clock at each step's end; "waits": seconds for each step's batch
REFERENCE = "pytorch/vision references/segmentation/train.py at commit 15866918a3be"
PRINT_EVERY = 10


def bare(settings: TrainSettings) -> Times:
    """Train `settings.epochs` with nothing around the step; as one rank where torchrun started this process."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    data = Data.open(settings)
    torch.manual_seed(settings.seed)
    net = build_model(settings.model, len(data.store.classes)).to(memory_format=torch.channels_last).train()
    optimizer = optim.OPTIMIZERS[settings.optimizer.name](
        optim.param_groups(net, settings.optimizer), settings.optimizer
    )
    forward: nn.Module = net
    if world > 1:
        dist.init_process_group("gloo")
        forward = DistributedDataParallel(net, gradient_as_bucket_view=True)
    steps = order.total_steps(order.total_positions(len(data.train), settings.epochs), settings.batch_size)
    batches = training_loader(data.train, settings, data.store.ignore_index, 0, steps, rank, world)
    times: Times = {"ends": [], "waits": []}
    for step in range(steps):
        asked_at = time.perf_counter()
        batch = next(batches)
        times["waits"].append(time.perf_counter() - asked_at)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - step / steps) ** 0.9
        logits = forward(batch.images.contiguous(memory_format=torch.channels_last), batch.seeds)
        labels = batch.labels.long()
        loss = F.cross_entropy(logits.main, labels, ignore_index=255)
        loss = loss + settings.loss.aux_weight * F.cross_entropy(logits.aux, labels, ignore_index=255)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        times["ends"].append(time.time())
    if world > 1:
        dist.destroy_process_group()
    return times


class ReferenceNet(nn.Module):
    """Our PSPNet as torchvision's loop knows networks: normalised images in, {"out", "aux"} of logits out."""

    def __init__(self, net: PSPNet) -> None:
        super().__init__()
        self.backbone = net.backbone
        self.classifier = nn.Sequential(net.pyramid, net.head)
        self.aux_classifier = net.aux_head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """float [B, 3, H, W], normalised → logits float [B, C, H, W] of both heads."""
        size = images.shape[-2:]
        aux_features, features = self.backbone(images)
        out, aux = self.classifier(features), self.aux_classifier(aux_features)
        return {
            "out": F.interpolate(out, size=size, mode="bilinear", align_corners=False),
            "aux": F.interpolate(aux, size=size, mode="bilinear", align_corners=False),
        }


class ReferenceSamples(Dataset[tuple[Tensor, Tensor]]):
    """The store's samples through the reference's training transforms, which all run on the loader's processes.

    Resize the shorter side to between half and twice `side`, flip, pad, cut a square, then bytes → float → normalise.
    """

    def __init__(self, split: Split, side: int) -> None:
        self.split = split
        self.side = side

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        sample = self.split.read(index)
        image, label = Image.fromarray(decode_image(sample.image)), Image.fromarray(decode_label(sample.label))
        shorter = random.randint(self.side // 2, self.side * 2)
        image = TF.resize(image, [shorter])
        label = TF.resize(label, [shorter], interpolation=InterpolationMode.NEAREST)
        if random.random() < 0.5:
            image, label = TF.hflip(image), TF.hflip(label)
        right, below = max(0, self.side - image.width), max(0, self.side - image.height)
        image, label = TF.pad(image, [0, 0, right, below]), TF.pad(label, [0, 0, right, below], fill=255)
        window = RandomCrop.get_params(image, (self.side, self.side))
        pixels = TF.convert_image_dtype(TF.pil_to_tensor(TF.crop(image, *window)), torch.float)
        pixels = TF.normalize(pixels, [value / 255 for value in MEAN], [value / 255 for value in STD])
        return pixels, TF.pil_to_tensor(TF.crop(label, *window))[0].long()


class StepLog:
    """A line every PRINT_EVERY steps with medians of the last 20 values, as the reference's logger keeps them."""

    def __init__(self) -> None:
        self.recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=20))
        self.steps = 0

    def update(self, **values: float) -> None:
        """Add one step's values; prints where it is time."""
        for name, value in values.items():
            self.recent[name].append(value)
        if self.steps % PRINT_EVERY == 0:
            medians = {name: float(torch.tensor(list(found)).median()) for name, found in self.recent.items()}
            print("  ".join(f"{name}: {value:.4f}" for name, value in medians.items()), flush=True)
        self.steps += 1


def reference(settings: TrainSettings, channels_last: bool = False) -> Times:
    """What torchvision's script does a step (REFERENCE), by our hand: a float batch in NCHW, the loss read every step.

    Loss, optimizer, schedule, logging and transforms are its own, as shipped; the number of loader processes is ours.
    `channels_last` switches that format on in it, which it does not offer.
    """
    data = Data.open(settings)
    torch.manual_seed(settings.seed)
    model = ReferenceNet(build_model(settings.model, len(data.store.classes))).train()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    recipe = settings.optimizer
    groups: list[dict[str, Any]] = [
        {"params": list(model.backbone.parameters())},
        {"params": list(model.classifier.parameters())},
        {"params": list(model.aux_classifier.parameters()), "lr": recipe.lr * 10},
    ]
    optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    steps = order.total_steps(order.total_positions(len(data.train), settings.epochs), settings.batch_size)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=0.9)
    samples = ReferenceSamples(data.train, settings.augment.crop[0])
    loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
        samples,
        settings.batch_size,
        # One pass long enough for the whole run: a new pass would start new loader processes in the timed window.
        sampler=RandomSampler(samples, replacement=True, num_samples=steps * settings.batch_size),
        num_workers=settings.data.loader_workers,
        drop_last=True,
    )
    log, times = StepLog(), Times(ends=[], waits=[])
    asked_at = time.perf_counter()
    for images, labels in loader:
        waited = time.perf_counter() - asked_at
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        loss = reference_loss(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        log.update(loss=loss.item(), lr=optimizer.param_groups[0]["lr"], data=waited)
        times["waits"].append(waited)
        times["ends"].append(time.time())
        asked_at = time.perf_counter()
    return times


def reference_loss(logits: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Mean cross entropy of the main head plus half of the auxiliary head's; labels: int64 [B, H, W]."""
    main, aux = (F.cross_entropy(logits[name], labels, ignore_index=255) for name in ("out", "aux"))
    return main + 0.5 * aux
