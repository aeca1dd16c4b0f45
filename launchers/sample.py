"""Draw pictures for prompts from a snapshot.

    python launchers/sample.py --snapshot runs/quickstart/snapshots/latest --out grid.png \\
        --prompt "a red apple on a blue background" --prompt "a green apple on a pink background"
    python launchers/sample.py --snapshot runs/quickstart/snapshots/latest --out pictures --prompts_file prompts.txt

--out NAME.png is one grid of all; any other name is a directory with a file for each prompt, 00000.png and so on. The
same command again draws what the directory lacks. Files carry prompt, seed, settings and the weights' checksum.
"""

import argparse
import json
import time
from pathlib import Path

from mdit import cli
from mdit.config import UserError
from mdit.documents import read_text


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_sampling(parser)
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts_file", type=Path, help="one prompt a line, UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="the .png, or the directory, to write")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    prompts = read_prompts(args.prompt, args.prompts_file)
    if args.out.suffix and args.out.suffix.lower() != ".png" and not args.out.is_dir():
        raise UserError(f"--out {args.out}: must be the name of a .png file or of a directory")
    from tqdm import tqdm

    from mdit.checkpoint.snapshot import load_snapshot
    from mdit.eval.samples import Painter, grid, missing, save_png
    from mdit.files import try_to_write

    settings = {"guidance": args.guidance, "steps": args.num_steps, "seed": args.seed}
    snapshot, in_a_grid = load_snapshot(args.snapshot), args.out.suffix.lower() == ".png"
    if in_a_grid:
        try_to_write(args.out)
    else:
        args.out.mkdir(parents=True, exist_ok=True)
    painter = Painter(snapshot, args.weights)
    abouts = [painter.about(prompt, number=number, **settings) for number, prompt in enumerate(prompts)]
    files = [args.out / f"{number:05d}.png" for number in range(len(prompts))]
    due = list(range(len(prompts))) if in_a_grid else missing(files, abouts)
    began = time.perf_counter()
    drawn = painter.draw([prompts[n] for n in due], numbers=due, batch_size=args.batch_size, **settings)
    drawn = tqdm(drawn, total=len(due), unit="picture", dynamic_ncols=True, disable=None)  # off if no tty
    if in_a_grid:
        about = abouts[0] if len(abouts) == 1 else abouts[0] | {"prompt": json.dumps(prompts, ensure_ascii=False)}
        save_png(grid(list(drawn), prompts), args.out, about)
    else:
        for number, picture in zip(due, drawn, strict=True):
            save_png(picture, files[number], abouts[number])
    seconds, there = time.perf_counter() - began, len(prompts) - len(due)
    kept = f", {there} there already" if there else ""
    print(f"{len(due)} pictures, {len(due) / seconds:.3g} a second{kept}", args.out, sep="\n")


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """Prompts of the command line, then the lines of `file`. Raises UserError."""
    prompts = given + (read_text(file).removesuffix("\n").split("\n") if file else [])
    try:
        for i, prompt in enumerate(prompts, start=1):
            prompt.encode()
            if not prompt.strip():
                raise UserError(f"prompt {i} of {len(prompts)} is empty")
    except UnicodeEncodeError:
        raise UserError(f"prompt {i} of {len(prompts)} is not Unicode text: {ascii(prompt)}") from None
    if not prompts:
        raise UserError("no prompt: give --prompt or a --prompts_file with one prompt a line")
    return prompts


if __name__ == "__main__":
    cli.run(main)
