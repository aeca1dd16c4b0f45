"""Draw pictures for prompts from a snapshot.

    python launchers/sample.py --snapshot runs/quickstart/snapshots/latest --out grid.png \\
        --prompt "a red apple on a blue background" --prompt "a green apple on a pink background"
"""

import argparse
from pathlib import Path

from mdit import cli
from mdit.config import UserError


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--snapshot", type=Path, required=True, help="a run's snapshots/latest, or one step of it")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts_file", type=Path, help="one prompt a line, UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="the .png to write")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance; default: the recipe's")
    parser.add_argument("--num_steps", type=int, help="steps of the Heun sampler; default: the recipe's")
    parser.add_argument("--seed", type=cli.whole(0), default=0)
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    prompts = read_prompts(args.prompt, args.prompts_file)
    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: must be the name of a .png file")
    from mdit.checkpoint.snapshot import load_snapshot
    from mdit.eval.samples import generate, grid, save_png
    from mdit.files import try_to_write

    try_to_write(args.out)
    pictures = generate(
        load_snapshot(args.snapshot),
        prompts,
        guidance=args.guidance,
        steps=args.num_steps,
        seed=args.seed,
        weights=args.weights,
    )
    save_png(grid(pictures, prompts), args.out)
    print(args.out)


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """Prompts of the command line, then the lines of `file`. Raises UserError."""
    try:
        prompts = given + (file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n") if file else [])
        for i, prompt in enumerate(prompts, start=1):
            prompt.encode()
            if not prompt.strip():
                raise UserError(f"prompt {i} of {len(prompts)} is empty")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts_file {file}: not UTF-8: {error}") from None
    except UnicodeEncodeError:
        raise UserError(f"prompt {i} of {len(prompts)} is not Unicode text: {ascii(prompt)}") from None
    if not prompts:
        raise UserError("no prompt: give --prompt or a --prompts_file with one prompt a line")
    return prompts


if __name__ == "__main__":
    cli.run(main)
