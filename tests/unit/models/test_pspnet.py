"""The network: shapes, sizes, parameters, and what each part contributes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sceneray.config import ModelSettings
from sceneray.errors import ConfigError, DataError, ScenerayError
from sceneray.models.backbones import BACKBONES
from sceneray.models.pspnet import PSPNet, build_model

CLASSES = 4


def tiny(**settings: object) -> PSPNet:
    torch.manual_seed(0)
    values = {"backbone": "mobilenet_v2", "head_width": 16, "aux_width": 8, "pool_width": 8} | settings
    return build_model(ModelSettings(**values), CLASSES)


def photo(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_makes_a_network(name: str) -> None:
    """Each backbone gives main and auxiliary logits of the input's size in training, and class ids in evaluation."""
    model = tiny(backbone=name)
    logits = model(photo(2, 3, 64, 64))
    assert logits.main.shape == logits.aux.shape == (2, CLASSES, 64, 64)
    ids = model.eval().predict(photo(1, 3, 64, 64))
    assert (ids.shape, ids.dtype) == ((1, 64, 64), torch.uint8)


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("size", [(8, 8), (16, 33), (57, 41)])
@torch.inference_mode()
def test_any_size_from_the_output_stride_on_works(output_stride: int, size: tuple[int, int]) -> None:
    """Heights and widths need no divisor; below the output stride the rule and the size are named."""
    model = tiny(output_stride=output_stride).eval()
    if min(size) < output_stride:
        with pytest.raises(DataError, match=rf"at least 16 pixels on each side .*, got {size[0]}×{size[1]}"):
            model(photo(1, 3, *size))
    else:
        assert model(photo(1, 3, *size)).main.shape[-2:] == size


def test_other_shapes_are_refused() -> None:
    """A picture without a batch axis, or with channels last, is refused with its shape."""
    for shape in ((3, 32, 32), (1, 32, 32, 3)):
        with pytest.raises(DataError, match="got shape"):
            tiny()(photo(*shape))


@torch.inference_mode()
def test_evaluation_gives_no_auxiliary_logits_and_predict_is_their_argmax() -> None:
    """In evaluation `aux` is None, and predict is the argmax of `main`; in training predict refuses."""
    model = tiny().eval()
    images = photo(2, 3, 40, 48)
    logits = model(images)
    assert logits.aux is None
    assert torch.equal(model.predict(images), logits.main.argmax(1).to(torch.uint8))
    with pytest.raises(ScenerayError, match=r"call eval\(\)"):
        model.train().predict(images)


@torch.inference_mode()
def test_bytes_and_floats_in_any_memory_format_mean_the_same() -> None:
    """uint8 and float 0..255, contiguous and channels_last, give the same logits."""
    model = tiny().eval()
    images = photo(2, 3, 40, 48)
    expected = model(images).main
    torch.testing.assert_close(model(images.float()).main, expected)
    nhwc = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    out = model.to(memory_format=torch.channels_last)(nhwc).main
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_images_are_normalised_with_imagenets_mean_and_deviation() -> None:
    """Inside, a picture is (RGB / 255 - mean) / deviation; neither constant is in the state dict."""
    model = tiny()
    assert not {"mean", "std"} & model.state_dict().keys()
    images = photo(1, 3, 8, 8)
    seen = []
    model.backbone.register_forward_hook(lambda module, args, out: seen.append(args[0]))  # noqa: ARG005
    model.eval()(images)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (images / 255 - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    torch.testing.assert_close(seen[0], expected)


def test_dropout_follows_the_samples_seeds() -> None:
    """With seeds a training pass repeats whatever torch's generator did, and other seeds or heads draw otherwise."""
    model = tiny(dropout=0.5, norm="frozen")
    images, seeds = photo(2, 3, 32, 32), torch.tensor([3, 4])
    first = model(images, seeds)
    torch.manual_seed(99)
    again, other = model(images, seeds), model(images, seeds + 7)
    assert torch.equal(first.main, again.main)
    assert torch.equal(first.aux, again.aux)
    assert not torch.equal(first.main, other.main)
    assert (model.head.dropout.layer, model.aux_head.dropout.layer) == (0, 1)


def test_the_two_groups_partition_the_trainable_parameters() -> None:
    """Backbone and new parameters share none and are all that train; a frozen one is in neither."""
    model = tiny()
    model.backbone.features[0][0].weight.requires_grad_(False)
    backbone, new = ({id(p) for p in group} for group in (model.backbone_parameters(), model.new_parameters()))
    assert not backbone & new
    assert backbone | new == {id(p) for p in model.parameters() if p.requires_grad}
    assert id(model.backbone.features[0][0].weight) not in backbone
    assert {id(p) for p in model.pyramid.parameters()} < new


@pytest.mark.parametrize("settings", [{}, {"norm": "frozen"}, {"bins": (1,)}])
def test_every_parameter_gets_a_gradient(settings: dict[str, object]) -> None:
    """One image trains, also with bin 1 alone: each parameter's gradient is finite, and DDP finds none unused."""
    model = tiny(**settings)
    logits = model(photo(1, 3, 32, 32), torch.tensor([1]))
    (logits.main.square().mean() + 0.4 * logits.aux.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_logits_start_small() -> None:
    """With the default widths a fresh network's logits are of order 1: the first loss is near log C."""
    torch.manual_seed(0)
    model = build_model(ModelSettings(backbone="resnet18"), 11)
    labels = torch.randint(0, 11, (2, 64, 64))
    loss = nn.functional.cross_entropy(model(photo(2, 3, 64, 64)).main, labels)
    assert 2.0 < loss < 4.5


def convolution(inputs: int, outputs: int, kernel: int) -> int:
    """Parameters of a convolution without bias and the norm after it."""
    return inputs * outputs * kernel**2 + 2 * outputs


def test_resnet50_has_the_papers_number_of_parameters() -> None:
    """PSPNet50 with 19 classes has the parameters that its layers add up to, counted here by formula."""
    features = convolution(3, 64, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        outputs = 4 * width
        features += convolution(inputs, outputs, 1)  # the projection beside the first block
        for _ in range(blocks):
            features += convolution(inputs, width, 1) + convolution(width, width, 3) + convolution(width, outputs, 1)
            inputs = outputs
    pyramid = 4 * convolution(2048, 512, 1)
    head = convolution(2048 + 4 * 512, 512, 3) + 512 * 19 + 19
    aux = convolution(1024, 256, 3) + 256 * 19 + 19

    with torch.device("meta"):
        model = build_model(ModelSettings(backbone="resnet50"), 19)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts == {"backbone": features, "pyramid": pyramid, "head": head, "aux_head": aux}
    # hszhao/semseg's network, whose stem of three 3×3 convolutions ends in 128 channels, has 46.715 M without aux and
    # 49.080 M with it; its pyramid and heads are these.
    deep_stem = convolution(3, 64, 3) + convolution(64, 64, 3) + convolution(64, 128, 3)
    wider_layer1 = 64 * (64 + 256)  # 64 more channels into the first block's 1×1 convolution and projection
    theirs = features - convolution(3, 64, 7) + deep_stem + wider_layer1 + pyramid + head
    assert round(theirs / 1e6, 3) == 46.715
    assert round((theirs + aux) / 1e6, 3) == 49.080


def test_pool_width_defaults_to_the_backbones_share() -> None:
    """Without pool_width the bins together have as many channels as the features, as in the paper."""
    model = tiny(pool_width=None, bins=(1, 2))
    assert model.pyramid.out_channels == 2 * 320


@pytest.mark.parametrize("classes", [0, 256])
def test_a_number_of_classes_that_no_mask_holds_is_refused(classes: int) -> None:
    """Masks are 8-bit with 255 ignored: 1 to 255 classes, and the error says so."""
    with pytest.raises(ConfigError, match=f"1 to 255 classes .* got {classes}"):
        build_model(ModelSettings(backbone="resnet18"), classes)
