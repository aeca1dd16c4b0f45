"""Make latent shards, or check those that are there: of a recipe, or of a data set as it was downloaded.

    python launchers/precompute.py --recipe configs/quickstart.toml [--verify]
    deepspeed launchers/precompute.py --source cc12m --root downloads/cc12m --out data/cc12m \\
        --image_size 256 --image_size 512 --image_encoder ID_OR_PATH --text_encoder ID_OR_PATH

Also under torchrun, srun and plain python, on any number of machines at once. The same command again goes on where it
stopped. Training makes the shards of a recipe by itself. See docs/data.md.
"""

import argparse
from pathlib import Path

from mdit import cli
from mdit.config import UserError


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--recipe", type=cli.config, help="its [data] section is what counts; default: configs/quickstart.toml")
    add("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="change one recipe key")
    add("--source", metavar="NAME", help="instead of a recipe: cc12m, webdataset, folder, ...")
    add("--root", type=Path, metavar="DIR", help="where it was downloaded to")
    add("--out", type=Path, metavar="DIR", help="sets are written to DIR/256, DIR/512, ...")
    add("--image_size", type=int, action="append", help="in pixels; may be given several times")
    add("--image_encoder", metavar="ID_OR_PATH", help="pixels, or a diffusers AutoencoderKL")
    add("--text_encoder", metavar="ID_OR_PATH", help="minilm, openclip:ID, CLIP, T5, or a set to take it over from")
    add("--caption_length", type=int, help="tokens; default: the text encoder's")
    add("--split", help="default: train")
    add("--caption_key", help="the field with the captions, where there may be several")
    add("--limit", type=int, help="take the first so many pictures only")
    add("--min_side", type=int, help="leave out pictures with a shorter side; default: the smallest image size")
    add("--embeddings", choices=("f16", "i8b64"), help="how caption embeddings are stored; default: f16")
    add("--precision", choices=("float32", "bfloat16"), help="of the image encoder; default: float32")
    add("--batch_size", type=int, help="pictures in the encoder at a time; default: 32")
    add("--shard_bytes", type=int, help="size of a shard; default: 10^9")
    add("--decoder", choices=("auto", "pillow", "dali"), help="default: dali where it works on a GPU, else pillow")
    add("--max_rejected", type=float, metavar="SHARE", help="more left out than that is no set; default: 0.5")
    add("--extend", action="store_true", default=None, help="bring sets that are there up to the source")
    add("--remake", action="append", metavar="PART", help="make a part of a set that is there again: 00012.tar")
    add("--verify", action="store_true", help="read every shard again and compare its checksums")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher passes it
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    from mdit.dist import configure_logging, identify, shared, work_on

    world = identify()
    configure_logging(world)
    from mdit.prepare.command import describe, plan_sets

    try:
        work_on(world.device)
        make_sets = plan_sets(args, world)
    except (UserError, OSError) as error:
        raise shared(error) from None  # until now all processes see the same
    for directory in make_sets():
        print(describe(directory, args.verify), flush=True)


if __name__ == "__main__":
    cli.run(main)
