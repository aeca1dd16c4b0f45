"""Frozen towers from a path or hub id: number format, files, digest of the weights. Their outputs are float32."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from mdit.config import UserError

# Of a tower's config: what its numbers may be, lest a few bytes of JSON make a model that no machine holds.
LARGEST_SIZE, MOST_LAYERS = 2**20, 128
LAYERS = re.compile("layers|depth|per_block")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def dtype_of(precision: str) -> torch.dtype:
    """Raises UserError for a precision that is not in DTYPES."""
    if precision not in DTYPES:
        raise UserError(f"precision {precision!r} of an encoder: expected {' or '.join(DTYPES)}")
    return DTYPES[precision]


def described(encoder: Any) -> dict[str, str]:
    """Entries of a description: float32 goes without saying, as in sets made before there was a choice."""
    precision = {} if encoder.precision == "float32" else {"precision": encoder.precision}
    return {"weights": encoder.weights} | precision


def local_folder(name: str, key: str) -> Path | None:
    """The directory of this name; None for what can only be a hub id. Raises UserError, beginning with `key`, for a
    path that is not there."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")):
        raise UserError(f"{key}: there is no such directory")
    return None


def import_transformers(key: str):
    """The library, without its progress bars. Raises UserError, beginning with `key`, where it is not installed."""
    try:
        import transformers
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise UserError(f"{key}: needs transformers ({error}): pip install transformers") from None
    disable_progress_bar()  # weights load in a moment
    return transformers


def require_complete(key: str, found: dict[str, Any]) -> None:
    """Raise UserError where from_pretrained's loading info names parameters that the files lack."""
    if found["missing_keys"]:
        raise UserError(f"{key}: its weights lack {min(found['missing_keys'])}, and maybe more")


@contextmanager
def refusing(key: str) -> Iterator[None]:
    """Around loading what strangers made: whatever a library stumbles over is a UserError that begins with `key`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{key}: {reason(error)}") from None


def check_config(config: Any, key: str, name: str = "") -> None:
    """Raise UserError, beginning with `key`, for numbers beyond LARGEST_SIZE or MOST_LAYERS in a tower's config, and
    for an attention that would be code of the hub."""
    most = MOST_LAYERS if LAYERS.search(name) else LARGEST_SIZE
    if isinstance(config, int) and config > most:
        raise UserError(f"{key}: {name} is {config} in its config, more than {most}")
    if isinstance(config, list) and len(config) > MOST_LAYERS and not isinstance(config[0], str):
        raise UserError(f"{key}: {name} has {len(config)} values in its config, more than {MOST_LAYERS}")
    if "attn_implementation" in name and isinstance(config, str) and "/" in config:
        raise UserError(f"{key}: {name} is {config} in its config, which is code of the hub and is not run")
    for inside, value in config.items() if isinstance(config, dict) else ((name, each) for each in _listed(config)):
        check_config(value, key, str(inside))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def load_family(name: str, key: str, families: dict[str, str], expected: str) -> torch.nn.Module:
    """A model of one of the `families` (model_type -> class of transformers) by local path or hub id, in float32, read
    from safetensors. Raises UserError, beginning with `key`, that says what was `expected`."""
    local, transformers = local_folder(name, key), import_transformers(key)
    options = {"use_safetensors": True, "output_loading_info": True, "trust_remote_code": False}
    with refusing(f"{key}: {expected}"):
        check_config(transformers.PreTrainedConfig.get_config_dict(local or name)[0], key)
        kind = transformers.AutoConfig.from_pretrained(local or name, trust_remote_code=False).model_type
        if kind not in families:
            raise UserError(f"{key}: is a {kind} model; {expected}")
        model, found = getattr(transformers, families[kind]).from_pretrained(local or name, **options)
    require_complete(key, found)
    return model.float().eval().requires_grad_(False)


def reason(error: Exception) -> str:
    """The first line of a library's error."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def digest(weights: Iterable[Tensor]) -> str:
    """xxh3 (64 bits), in hexadecimal, of a tower's weights in the format it computes in. It knows neither names nor
    files, so a tower has the same one under any path, hub id, file format and version of a library."""
    each = sorted(xxhash.xxh3_64_digest(_bytes(weight), seed=weight.numel()) for weight in weights)
    return xxhash.xxh3_64_hexdigest(b"".join(each))


def require_weights(key: str, encoder: Any, description: dict[str, Any]) -> None:
    """Raise UserError unless an encoder has the weights of a description, as far as that says which."""
    wanted = description.get("weights")
    if wanted and wanted != (found := encoder.weights):
        raise UserError(f"{key}: its weights have xxh3 {found}, but those that made the latents have {wanted}")


def _bytes(weight: Tensor) -> memoryview:
    return weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
