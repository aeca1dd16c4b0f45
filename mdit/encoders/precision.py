"""A frozen tower's number format and the digest of its weights. What it gives out is float32 in either format."""

from collections.abc import Iterable

import torch
import xxhash
from torch import Tensor

from mdit.config import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def dtype_of(precision: str) -> torch.dtype:
    """Raises UserError for a precision that is not in DTYPES."""
    if precision not in DTYPES:
        raise UserError(f"precision {precision!r} of an encoder: expected {' or '.join(DTYPES)}")
    return DTYPES[precision]


def described(precision: str) -> dict[str, str]:
    """Entry of a description: float32 goes without saying, as in sets made before there was a choice."""
    return {} if precision == "float32" else {"precision": precision}


def digest(weights: Iterable[Tensor]) -> str:
    """xxh3 (64 bits), in hexadecimal, of a tower's weights in the format it computes in. It knows neither names nor
    files, so a tower has the same one under any path, hub id, file format and version of a library."""
    each = sorted(xxhash.xxh3_64_digest(_bytes(weight), seed=weight.numel()) for weight in weights)
    return xxhash.xxh3_64_hexdigest(b"".join(each))


def require_weights(encoder: str, found: str, description: dict) -> None:
    """Raise UserError unless a tower has the weights of a description, as far as that says which."""
    if (wanted := description.get("weights")) not in (None, found):
        raise UserError(f"{encoder}: its weights have xxh3 {found}, but those that made the latents have {wanted}")


def _bytes(weight: Tensor) -> memoryview:
    return weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
