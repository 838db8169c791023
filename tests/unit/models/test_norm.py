"""Batch norm over one worker, over several real processes, and frozen."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sceneray.config import ModelSettings
from sceneray.errors import ConfigError
from sceneray.models.norm import MODES, BatchNorm2d
from sceneray.models.pspnet import build_model

WORLD = 2
CHANNELS = 5
Results = list[dict[str, Tensor]]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uneven(rank: int) -> Tensor:
    """Batches of other sizes and other pictures' sizes on each rank, with means apart."""
    shape = ((3, CHANNELS, 5, 7), (1, CHANNELS, 4, 6))[rank]
    return draw(rank, *shape) * (1 + rank) + 3 * rank


def new_norm(mode: str) -> BatchNorm2d:
    norm = BatchNorm2d(CHANNELS, mode).double()
    norm.weight.data.copy_(draw(10, CHANNELS))
    norm.bias.data.copy_(draw(11, CHANNELS))
    return norm


def train_step(norm: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """One forward and backward of Σ weights · norm(x)²; all that came out."""
    x = x.clone().requires_grad_()
    out = norm(x)
    (weights * out**2).sum().backward()
    state = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    return {"out": out.detach(), "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad, **state}


def tiny_network(norm: str) -> nn.Module:
    torch.manual_seed(0)
    settings = ModelSettings(backbone="mobilenet_v2", bins=(1,), head_width=8, aux_width=8, dropout=0.5, norm=norm)
    return build_model(settings, num_classes=3)


def network_gradients(model: nn.Module, images: Tensor, seeds: Tensor, scale: float) -> dict[str, Tensor]:
    logits = model(images, seeds)
    # Weights per position, or the sum over a normalised map would have no gradient to compare.
    weights = draw(5, *logits.main.shape[1:])
    ((logits.main + 0.4 * logits.aux) * weights).sum().mul(scale).backward()
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}


def images_and_seeds() -> tuple[Tensor, Tensor]:
    return draw(4, WORLD, 3, 32, 40) * 50 + 120, torch.arange(WORLD)


def sync_cases(rank: int) -> dict[str, Tensor]:
    results = {}
    x = uneven(rank)
    results |= {f"uneven/{k}": v for k, v in train_step(new_norm("sync"), x, draw(20 + rank, *x.shape)).items()}

    far = BatchNorm2d(CHANNELS, "sync")
    out = far((draw(30 + rank, 8, CHANNELS, 16, 16) + 1e4).float())
    results |= {"far/out": out.detach(), "far/running_var": far.running_var}

    one = draw(40 + rank, 1, CHANNELS, 1, 1)
    results |= {f"one/{k}": v for k, v in train_step(new_norm("sync"), one, torch.ones_like(one)).items()}

    lone = draw(50, 1 - rank, CHANNELS, 1, 1)
    results |= {f"lone/{k}": v for k, v in train_step(new_norm("sync"), lone, torch.ones_like(lone)).items()}
    return results


def network_cases(rank: int) -> dict[str, Tensor]:
    images, seeds = images_and_seeds()
    own, seed = images[rank : rank + 1], seeds[rank : rank + 1]

    local = DistributedDataParallel(tiny_network("local"))
    loss = sum(logits.square().mean() for logits in local(own.float(), seed))
    loss.backward()
    torch.optim.SGD(local.parameters(), lr=0.01).step()
    flat = torch.cat([p.detach().flatten() for p in local.parameters()])
    gradients = torch.cat([p.grad.flatten() for p in local.parameters()])
    results = {"local/parameters": flat, "local/gradients": gradients}
    results["local/bin_mean"] = local.module.pyramid.branches[0][1].running_mean

    sync = DistributedDataParallel(tiny_network("sync").double())
    # DDP takes the mean over the ranks, so the sum needs the number of ranks as a factor.
    gradients = network_gradients(sync, own, seed, scale=WORLD)
    results |= {f"sync/{name}": value for name, value in gradients.items()}
    return results | {f"sync/buffer/{name}": value for name, value in sync.module.state_dict().items()}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=WORLD, timeout=timedelta(seconds=120)
    )
    torch.save(sync_cases(rank) | network_cases(rank), f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each of two processes in a gloo group got."""
    folder: Path = tmp_path_factory.mktemp("group")
    torch.multiprocessing.spawn(worker, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


def as_values(x: Tensor) -> Tensor:
    """[B, C, H, W] → [B·H·W, C, 1, 1]: batch norm sees the same channels' values."""
    return x.movedim(1, -1).reshape(-1, x.shape[1], 1, 1)


def test_sync_equals_one_process_over_the_concatenated_batch(ranks: Results) -> None:
    """Outputs, gradients and statistics of uneven batches on two workers are those of PyTorch's norm over both."""
    reference = nn.BatchNorm2d(CHANNELS).double()
    reference.load_state_dict(new_norm("sync").state_dict())
    inputs = [uneven(rank) for rank in range(WORLD)]
    weights = [draw(20 + rank, *x.shape) for rank, x in enumerate(inputs)]
    expected = train_step(
        reference, torch.cat([as_values(x) for x in inputs]), torch.cat([as_values(w) for w in weights])
    )
    for key in ("out", "x"):
        torch.testing.assert_close(torch.cat([as_values(r[f"uneven/{key}"]) for r in ranks]), expected[key])
    for key in ("weight", "bias"):
        torch.testing.assert_close(sum(r[f"uneven/{key}"] for r in ranks), expected[key])
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(ranks[0][f"uneven/{key}"], expected[key])
        assert torch.equal(ranks[0][f"uneven/{key}"], ranks[1][f"uneven/{key}"])


def test_sync_keeps_its_digits_far_from_zero(ranks: Results) -> None:
    """Values around 10 000 with deviation 1 are normalised to 1 % in float32, where E[x²] - E[x]² has no digit left."""
    x = torch.cat([(draw(30 + rank, 8, CHANNELS, 16, 16) + 1e4).float() for rank in range(WORLD)]).double()
    variance = x.var(dim=(0, 2, 3), correction=1)
    for result in ranks:
        torch.testing.assert_close(result["far/running_var"], (0.9 + 0.1 * variance).float(), rtol=1e-4, atol=0)
    expected = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(torch.cat([r["far/out"] for r in ranks]).double(), expected, rtol=0.01, atol=0.01)


def test_sync_counts_values_over_all_workers(ranks: Results) -> None:
    """One value per channel on each of two workers is two values: they are normalised with their own statistics."""
    x = torch.cat([draw(40 + rank, 1, CHANNELS, 1, 1) for rank in range(WORLD)])
    expected = new_norm("local").train()(x)
    torch.testing.assert_close(torch.cat([r["one/out"] for r in ranks]), expected.detach())


def test_sync_falls_back_where_one_value_is_all_there_is(ranks: Results) -> None:
    """One value on one worker and none on the other: running statistics, unchanged, with their plain gradient."""
    norm = new_norm("sync")
    lone = draw(50, 1, CHANNELS, 1, 1)
    expected = train_step(norm.eval(), lone, torch.ones_like(lone))
    for key in ("out", "x"):
        torch.testing.assert_close(ranks[0][f"lone/{key}"], expected[key])
    assert torch.equal(ranks[1]["lone/running_mean"], torch.zeros(CHANNELS, dtype=torch.float64))
    assert torch.equal(ranks[1]["lone/running_var"], torch.ones(CHANNELS, dtype=torch.float64))
    assert torch.equal(ranks[1]["lone/weight"], torch.zeros(CHANNELS, dtype=torch.float64))


def test_one_image_per_rank_trains_under_ddp(ranks: Results) -> None:
    """A PSPNet with a 1×1 bin in local mode makes a finite step with one image on each rank, the same on both."""
    for result in ranks:
        assert result["local/gradients"].isfinite().all()
        assert result["local/gradients"].abs().max() > 0
        assert torch.equal(result["local/parameters"], ranks[0]["local/parameters"])
        # The bin's norm met one value per channel: it kept its statistics.
        assert not result["local/bin_mean"].any()


def test_a_network_in_sync_mode_trains_as_if_on_one_worker(ranks: Results) -> None:
    """Gradients and running statistics of a whole PSPNet on two workers equal one process with both images."""
    model = tiny_network("sync").double()
    expected = network_gradients(model, *images_and_seeds(), scale=1)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for result in ranks:
        for name, gradient in expected.items():
            torch.testing.assert_close(result[f"sync/{name}"], gradient, rtol=1e-6, atol=1e-12 * largest)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(result[f"sync/buffer/{name}"], value)


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_uses_running_statistics_in_every_mode(mode: str) -> None:
    """In evaluation each mode equals nn.BatchNorm2d with the same state dict, bit for bit."""
    norm = BatchNorm2d(CHANNELS, mode)
    reference = nn.BatchNorm2d(CHANNELS)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    reference.load_state_dict(norm.state_dict())
    x = torch.randn(2, CHANNELS, 3, 3)
    assert torch.equal(norm.eval()(x), reference.eval()(x))


@pytest.mark.parametrize("mode", ["local", "sync"])
def test_one_worker_trains_as_pytorchs_norm(mode: str) -> None:
    """Alone, local and sync give nn.BatchNorm2d's outputs, gradients and running statistics."""
    x = uneven(0)
    reference = nn.BatchNorm2d(CHANNELS).double()
    reference.load_state_dict(new_norm(mode).state_dict())
    ours, theirs = (train_step(norm, x, torch.ones_like(x)) for norm in (new_norm(mode), reference))
    for key, value in theirs.items():
        assert torch.equal(ours[key], value)


def test_frozen_statistics_never_change() -> None:
    """In frozen mode training normalises with the running statistics, leaves every buffer, and trains the scale."""
    norm = new_norm("frozen").train()
    norm.running_mean.fill_(2.0)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    x = uneven(1)
    results = train_step(norm, x, torch.ones_like(x))
    for name, buffer in before.items():
        assert torch.equal(results[name], buffer)
    torch.testing.assert_close(results["out"], norm.eval()(x).detach())
    assert results["weight"].abs().min() > 0


def test_one_value_per_channel_uses_running_statistics() -> None:
    """Where PyTorch raises, training goes on with the running statistics, which stay as they are."""
    norm = new_norm("local").train()
    x = draw(60, 1, CHANNELS, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm2d(CHANNELS).double()(x)
    results = train_step(norm, x, torch.ones_like(x))
    torch.testing.assert_close(results["out"], norm.eval()(x).detach())
    assert not results["running_mean"].any()
    assert results["x"].isfinite().all()


def test_an_unknown_mode_is_refused_with_the_known_ones() -> None:
    """A misspelt mode is answered with the nearest one."""
    with pytest.raises(ConfigError, match="did you mean 'sync'"):
        BatchNorm2d(3, "synch")
