"""mdit: training MicroDiT, the sparse text-to-image diffusion transformer, on a micro-budget.

from mdit import generate, load_snapshot
pictures = generate(load_snapshot("runs/quickstart/snapshots/latest"), ["a red apple on a blue background"])
pictures[0].save("apple.png")
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mdit.checkpoint.snapshot import load_snapshot
    from mdit.config import load_config
    from mdit.eval.samples import generate
    from mdit.models import MicroDiT
    from mdit.publish.pipeline import MicroDiTPipeline

__version__ = "0.1.0"
__all__ = ["MicroDiT", "MicroDiTPipeline", "generate", "load_config", "load_snapshot"]

_MODULES = {
    "MicroDiT": "mdit.models",
    "MicroDiTPipeline": "mdit.publish.pipeline",
    "generate": "mdit.eval.samples",
    "load_config": "mdit.config",
    "load_snapshot": "mdit.checkpoint.snapshot",
}


def __getattr__(name: str):
    """The public API, imported when it is first asked for: `import mdit` loads no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
