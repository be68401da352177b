"""ResNet-20 for small grey images, with the weights this project trained on Fashion-MNIST."""

from __future__ import annotations

from importlib import resources

from safetensors.torch import load
from torch import Tensor, nn

CHECKPOINT = "resnet20_fashion_mnist.safetensors"
_STAGE_CHANNELS = (16, 32, 64)
_BLOCKS_PER_STAGE = 3


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut: `relu(f(x) + s(x))`.

    The shortcut `s` is the identity where the shape stays, and otherwise a strided 1x1
    convolution with batch norm ("option B" of He et al., 2015, https://arxiv.org/abs/1512.03385).

    Args:
        in_channels: Channels of the input `[n, in_channels, h, w]`.
        out_channels: Channels of the output `[n, out_channels, h / stride, w / stride]`.
        stride: Stride of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[n, in_channels, h, w]` to `[n, out_channels, h / stride, w / stride]`."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        activation: Tensor = self.relu(out)
        return activation


class ResNet20(nn.Module):
    """The CIFAR-style residual network with 20 weight layers (He et al., 2015, section 4.2).

    A 3x3 stem, three stages of three basic blocks with 16, 32 and 64 channels, the mean over all
    positions and one linear layer. Height and width must be at least 4.

    Args:
        num_classes: Outputs of the linear layer.
        in_channels: Channels of the input images.

    Examples:
        >>> import torch
        >>> from fxmpq.recipes.models.resnet20 import ResNet20
        >>> ResNet20()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        channels = _STAGE_CHANNELS[0]
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.stage1 = _stage(channels, _STAGE_CHANNELS[0], stride=1)
        self.stage2 = _stage(_STAGE_CHANNELS[0], _STAGE_CHANNELS[1], stride=2)
        self.stage3 = _stage(_STAGE_CHANNELS[1], _STAGE_CHANNELS[2], stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(_STAGE_CHANNELS[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[n, in_channels, h, w]` to logits `[n, num_classes]`."""
        x = self.relu(self.bn(self.conv(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        logits: Tensor = self.classifier(self.pool(x).flatten(1))
        return logits


def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    rest = (BasicBlock(out_channels, out_channels, 1) for _ in range(_BLOCKS_PER_STAGE - 1))
    return nn.Sequential(first, *rest)


def pretrained() -> ResNet20:
    """Return the ResNet-20 that this project trained on Fashion-MNIST, in evaluation mode.

    The weights come from `recipes/assets`; `MODEL_CARD.md` beside them says how they were
    trained and what they reach. Inputs are normalised as
    `fxmpq.recipes.fashion_mnist.normalise` does it.

    Returns:
        The model in float32 on the CPU, batch norm not folded.

    Examples:
        >>> from fxmpq.recipes.models.resnet20 import pretrained
        >>> model = pretrained()
        >>> sum(parameter.numel() for parameter in model.parameters())
        272186
    """
    model = ResNet20()
    asset = resources.files("fxmpq.recipes") / "assets" / CHECKPOINT
    model.load_state_dict(load(asset.read_bytes()))
    return model.eval()
