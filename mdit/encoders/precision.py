"""The number formats a frozen tower computes in. What it gives out is float32 in either."""

import torch

from mdit.config import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def dtype_of(precision: str) -> torch.dtype:
    """Raises UserError for a precision that is not in DTYPES."""
    if precision not in DTYPES:
        raise UserError(f"precision {precision!r} of an encoder: expected {' or '.join(DTYPES)}")
    return DTYPES[precision]


def described(precision: str) -> dict[str, str]:
    """What a description says about it: float32 goes without saying, as in sets made before there was a choice."""
    return {} if precision == "float32" else {"precision": precision}
