"""Released MicroDiT weights to a snapshot and back; a snapshot whose documents were edited on purpose sealed again.

    python tools/convert_checkpoint.py import dit_4_channel_37M_real_and_synthetic_data.pt snapshots/released
    python tools/convert_checkpoint.py import pipelines/quickstart snapshots/quickstart
    python tools/convert_checkpoint.py export runs/res_512_finetune/snapshots/latest dit.pt --weights ema
    python tools/convert_checkpoint.py seal runs/res_512_finetune/snapshots/latest

`import` takes a pipeline that tools/export_diffusers.py wrote, or the state dict of the network alone (the published
files), of the whole latent-diffusion model, or a Composer checkpoint of it. Size, channels and resolution are
recognised from the shapes. Only tensors are ever read: a file that would have to be unpickled is refused. Weights are
stored as float32, and those come back bit for bit.

`seal` is for a config.json or encoders.json changed by hand, as when a tower has another path on this machine: it
checks the snapshot and writes what the two files are now into checksums.json. Weights must be those that were written.
"""

from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from mdit import cli
from mdit.checkpoint.released import import_released
from mdit.checkpoint.snapshot import load_snapshot, seal_snapshot
from mdit.config import UserError
from mdit.files import replacing, try_to_write
from mdit.publish.export import import_pipeline


def export_checkpoint(snapshot: Path, out: Path, kind: str, overwrite: bool = False) -> None:
    """Write a plain state dict, as the released code's network loads it."""
    if out.is_file() and not overwrite:
        raise UserError(f"{out}: exists already; --overwrite replaces it")
    try_to_write(out)
    weights = load_snapshot(snapshot).weights(kind)
    with replacing(out) as partial, open(partial, "wb") as file:
        save_pickled(weights, file)
    print(out)


def save_pickled(weights: dict[str, Tensor], file: IO[bytes]) -> None:
    """torch.save. Raises OSError where the disk is full, in place of PyTorch's own account of it."""
    try:
        torch.save(weights, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def main(arguments: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    importing = commands.add_parser("import", help="a released .pt, or a pipeline, to a snapshot")
    importing.add_argument("source", type=Path)
    importing.add_argument("out", type=Path, help="the snapshot directory to write")
    exporting = commands.add_parser("export", help="a snapshot to a .pt that the released code loads")
    exporting.add_argument("snapshot", type=Path)
    exporting.add_argument("out", type=Path)
    exporting.add_argument("--weights", choices=("ema", "raw"), default="ema")
    exporting.add_argument("--overwrite", action="store_true", help="replace a file of that name")
    sealing = commands.add_parser("seal", help="accept the documents of a snapshot as they are now")
    sealing.add_argument("snapshot", type=Path)
    args = parser.parse_args(arguments)
    if args.command == "import":
        take = import_pipeline if args.source.is_dir() else import_released
        print(f"{args.out}: {take(args.source, args.out)}")
    elif args.command == "export":
        export_checkpoint(args.snapshot, args.out, args.weights, args.overwrite)
    else:
        print(seal_snapshot(args.snapshot).path)


if __name__ == "__main__":
    cli.run(main)
