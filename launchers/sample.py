"""Draw pictures for prompts from a snapshot.

    python launchers/sample.py --snapshot runs/quickstart/snapshots/latest --out grid.png \\
        --prompt "a red apple on a blue background" --prompt "a green apple on a pink background"
"""

import argparse
import os
import sys
from pathlib import Path

from mdit.config import UserError
from mdit.dist import identify
from mdit.encoders import build_text_encoder_from
from mdit.eval.samples import draw_pictures, grid, sampling_options
from mdit.snapshot import load_model, load_snapshot


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snapshot", type=Path, required=True, help="a run's snapshots/latest, or one step of it")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts_file", type=Path, help="one prompt a line")
    parser.add_argument("--out", type=Path, required=True, help="the .png to write")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance; default: the recipe's")
    parser.add_argument("--num_steps", type=int, help="steps of the Heun sampler; default: the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    try:
        draw(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def draw(args: argparse.Namespace) -> None:
    prompts = read_prompts(args.prompt, args.prompts_file)
    check_png_path(args.out)
    snapshot, device = load_snapshot(args.snapshot), identify().device
    options = sampling_options(snapshot.config, args.guidance, args.num_steps)
    captions_NLC = build_text_encoder_from(snapshot.encoders["text"], device).encode(prompts)
    model = load_model(snapshot, args.weights, device)
    grid(draw_pictures(snapshot, model, captions_NLC, args.seed, options), prompts).save(args.out)
    print(args.out)


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """Those of the command line, then the file's lines."""
    try:
        prompts = given + (file.read_text(encoding="utf-8").splitlines() if file else [])
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts_file {file}: cannot read: {error}") from None
    if not prompts:
        raise UserError("no prompt: give --prompt or a --prompts_file with one prompt a line")
    if empty := [i for i, prompt in enumerate(prompts, start=1) if not prompt.strip()]:
        raise UserError(f"prompt {empty[0]} of {len(prompts)} is empty")
    return prompts


def check_png_path(path: Path) -> None:
    if path.suffix.lower() != ".png" or path.is_dir():
        raise UserError(f"--out {path}: must be the name of a .png file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--out {path}: cannot be written there")


if __name__ == "__main__":
    main()
