from __future__ import annotations

import re
from importlib import resources

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxmpq.recipes.fashion_mnist import embedded_subset
from fxmpq.recipes.models.resnet20 import BasicBlock, ResNet20, pretrained

CARD = (resources.files("fxmpq.recipes") / "assets" / "MODEL_CARD.md").read_text(encoding="utf-8")


def stated_accuracy(images: str) -> float:
    """The figure in percent that the model card gives for `images`."""
    (found,) = re.findall(rf"^\| {images} \| (\d+\.\d+) % \|$", CARD, flags=re.MULTILINE)
    return float(found)


@pytest.mark.parametrize(("channels", "classes", "side"), [(1, 10, 28), (3, 7, 32), (1, 2, 4)])
def test_it_maps_images_to_logits(channels: int, classes: int, side: int) -> None:
    model = ResNet20(num_classes=classes, in_channels=channels)
    assert model(torch.zeros(2, channels, side, side)).shape == (2, classes)


def test_it_has_twenty_weight_layers_and_two_projections() -> None:
    modules = list(ResNet20().modules())
    convolutions = [module for module in modules if isinstance(module, nn.Conv2d)]
    kernels = [module.kernel_size for module in convolutions]
    assert kernels.count((3, 3)) + sum(isinstance(module, nn.Linear) for module in modules) == 20
    assert kernels.count((1, 1)) == 2
    assert all(module.bias is None for module in convolutions)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in modules) == len(convolutions)


def test_stages_halve_the_resolution_and_double_the_channels() -> None:
    shapes: list[torch.Size] = []

    def note(_module: nn.Module, _args: object, output: Tensor) -> None:
        shapes.append(output.shape)

    model = ResNet20()
    for stage in (model.stage1, model.stage2, model.stage3):
        stage.register_forward_hook(note)
    model(torch.zeros(1, 1, 28, 28))
    assert shapes == [(1, 16, 28, 28), (1, 32, 14, 14), (1, 64, 7, 7)]


@pytest.mark.parametrize(("out_channels", "stride"), [(4, 1), (8, 2), (8, 1), (4, 2)])
def test_a_block_is_two_convolutions_around_its_shortcut(out_channels: int, stride: int) -> None:
    torch.manual_seed(0)
    block = BasicBlock(4, out_channels, stride)
    x = torch.randn(3, 4, 8, 8)
    # Batch norm of the current batch, whose weight is 1 and bias 0 at the start.
    norm = functional.instance_norm

    def batch_norm(y: Tensor) -> Tensor:
        columns = y.transpose(0, 1).reshape(1, y.shape[1], -1)
        return norm(columns).reshape(y.shape[1], y.shape[0], *y.shape[2:]).transpose(0, 1)

    hidden = batch_norm(functional.conv2d(x, block.conv1.weight, stride=stride, padding=1)).relu()
    expected = batch_norm(functional.conv2d(hidden, block.conv2.weight, padding=1))
    if isinstance(block.shortcut, nn.Sequential):
        weight = block.shortcut.get_parameter("0.weight")
        expected = expected + batch_norm(functional.conv2d(x, weight, stride=stride))
    else:
        assert (out_channels, stride) == (4, 1)
        expected = expected + x
    torch.testing.assert_close(block(x), expected.relu(), rtol=1e-4, atol=1e-5)


def test_the_pretrained_model_is_in_evaluation_mode_and_not_shared() -> None:
    first, second = pretrained(), pretrained()
    assert not any(module.training for module in first.modules())
    with torch.no_grad():
        first.classifier.weight.zero_()
    assert second.classifier.weight.any()


def test_the_pretrained_statistics_and_weights_come_from_training() -> None:
    for name, module in pretrained().named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None, name
            assert module.running_var is not None, name
            assert module.num_batches_tracked is not None, name
            assert module.running_mean.abs().min() > 0, name
            assert (module.running_var - 1).abs().min() > 0, name
            assert module.num_batches_tracked > 1000, name
            assert module.weight.std() > 0.01, name


@torch.inference_mode()
def test_the_pretrained_model_is_as_accurate_as_its_card_says() -> None:
    subset = embedded_subset()
    model = pretrained()
    logits = torch.cat([model(images) for images in subset.test_images.split(500)])
    percent = 100 * float((logits.argmax(1) == subset.test_labels).double().mean())
    # The card rounds to 0.01; two images more may flip between processors.
    assert abs(percent - stated_accuracy("embedded 4,000 test images")) <= 0.055


def test_the_card_reports_the_whole_test_set() -> None:
    assert stated_accuracy("all 10,000 test images") >= 92
