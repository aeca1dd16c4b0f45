"""Frozen towers that pictures are judged by: pictures to features, whose distances are metrics (`mdit.eval.metrics`).

    efficientnet  EfficientNet-Lite0's last features, whose weights are in a pip package
    inception     FID's Inception of 2015 as torch-fidelity has it: 2,048 features; its own download, or a .pth file
    dinov2        DINOv2 of transformers: the normalised class token, as in FD-DINOv2 (Stein et al. 2023, 2306.04675)
    clip          CLIP of transformers: the embedding, of unit length
    clip_score    CLIP of transformers: 100 max(0, cos) of picture and caption (Hessel et al. 2021, arXiv 2104.08718)

Pictures are shown as each metric's own code does: to Inception by its bilinear resize, to the others by Pillow's
antialiased bicubic one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mdit.config import UserError
from mdit.encoders.efficientnet import IMAGENET_MEAN, IMAGENET_STD, image_features, load_efficientnet
from mdit.encoders.loading import digest, import_transformers, load_family, local_folder, reason, refusing

DINOV2_SIZE = 224  # pixels
INCEPTION_FEATURES = "2048"
OWN_DOWNLOAD = "download"


@dataclass(frozen=True)
class Judge:
    """`features`: (N, H, W, 3) uint8 pictures on the CPU and their N captions -> (N, F) float32 there. `weights` is the
    xxh3 of the tower's."""

    weights: str
    features: Callable[[Tensor, Sequence[str]], Tensor]


def load_efficientnet_judge(place: str, key: str, device: torch.device) -> Judge:
    """`place` is no matter: the weights are a package's. Raises UserError."""
    model = load_efficientnet(device)
    return Judge(digest(model.parameters()), lambda images_NHWC, captions: image_features(model, images_NHWC))


def load_inception(place: str, key: str, device: torch.device) -> Judge:
    """torch-fidelity's, from `place`, a file of its format, or "download". Raises UserError, beginning with `key`."""
    try:
        fidelity = import_module("torch_fidelity.feature_extractor_inceptionv3")
    except Exception as error:  # a torchvision of another torch raises RuntimeError
        needs = "needs torch-fidelity, and the torchvision that belongs to this torch"
        raise UserError(f"{key}: {needs} ({reason(error)}): pip install torch-fidelity torchvision") from None
    path = None if place == OWN_DOWNLOAD else str(Path(place).expanduser())
    try:
        if path is not None:  # the package would run the code of a pickle
            torch.load(path, map_location="cpu", weights_only=True)
        model = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", [INCEPTION_FEATURES], path, verbose=False)
    except Exception as error:  # damage can raise whatever the loader stumbles over
        expected = f"expected {OWN_DOWNLOAD}, or the path of torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
        raise UserError(f"{key}: {expected}: {reason(error)}") from None
    model.to(device)

    def features(images_NHWC: Tensor, captions: Sequence[str]) -> Tensor:
        return model(images_NHWC.permute(0, 3, 1, 2).to(device))[0].cpu()

    return Judge(digest(model.parameters()), torch.no_grad()(features))


def load_dinov2(place: str, key: str, device: torch.device) -> Judge:
    """From a local path or hub id. Raises UserError, beginning with `key`."""
    families = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
    model = load_family(place, key, families, "expected the local path or hub id of a DINOv2 model").to(device)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def features(images_NHWC: Tensor, captions: Sequence[str]) -> Tensor:
        images_NHWC = resized(images_NHWC, DINOV2_SIZE).to(device)
        pixels_NCHW = (images_NHWC.permute(0, 3, 1, 2).float() / 255 - mean) / std
        return model(pixel_values=pixels_NCHW).last_hidden_state[:, 0].cpu()

    return Judge(digest(model.parameters()), torch.no_grad()(features))


def load_clip(place: str, key: str, device: torch.device, *, scores: bool = False) -> Judge:
    """From a local path or hub id, with its processors: embeddings, or `scores` of pictures and captions. Raises
    UserError, beginning with `key`."""
    expected = "expected the local path or hub id of a CLIP model"
    model: Any = load_family(place, key, {"clip": "CLIPModel"}, expected).to(device)
    transformers = import_transformers(key)
    # Pillow's resize on every machine: where torchvision is installed, the default would be its own.
    name = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
    processor = getattr(transformers, name)
    source = local_folder(place, key) or place
    with refusing(key):
        pixels_of = processor.from_pretrained(source)
        tokens_of = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False) if scores else None

    def embeddings(images_NHWC: Tensor, captions: Sequence[str]) -> Tensor:
        pixels = pixels_of(images=list(images_NHWC.numpy()), return_tensors="pt")
        hidden = model.vision_model(pixel_values=pixels["pixel_values"].to(device)).pooler_output
        return F.normalize(model.visual_projection(hidden), dim=1).cpu()

    def score(images_NHWC: Tensor, captions: Sequence[str]) -> Tensor:
        assert tokens_of is not None
        longest = model.config.text_config.max_position_embeddings
        tokens = tokens_of(list(captions), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        hidden = model.text_model(**tokens.to(device)).pooler_output
        texts_NF = F.normalize(model.text_projection(hidden), dim=1).cpu()
        return 100 * (embeddings(images_NHWC, captions) * texts_NF).sum(1, keepdim=True).clamp(min=0)

    return Judge(digest(model.parameters()), torch.no_grad()(score if scores else embeddings))


LOADERS: dict[str, Callable[[str, str, torch.device], Judge]] = {
    "efficientnet": load_efficientnet_judge,
    "inception": load_inception,
    "dinov2": load_dinov2,
    "clip": load_clip,
    "clip_score": partial(load_clip, scores=True),
}


def resized(images_NHWC: Tensor, size: int) -> Tensor:
    """Square pictures of `size` pixels, uint8, by Pillow's bicubic resize."""
    if images_NHWC.shape[1:3] == (size, size):
        return images_NHWC
    pictures = [Image.fromarray(image.numpy()).resize((size, size), Image.Resampling.BICUBIC) for image in images_NHWC]
    return torch.stack(
        [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).view(size, size, 3) for p in pictures]
    )
