"""Write a snapshot as a diffusers pipeline: a folder to publish, with its encoders and a model card.

    python tools/export_diffusers.py --snapshot runs/quickstart/snapshots/latest --out pipelines/quickstart
    python tools/export_diffusers.py --snapshot ... --out pipelines/NAME --license apache-2.0 --push OWNER/NAME

It is loaded by mdit.MicroDiTPipeline.from_pretrained(OUT) or, where mdit is installed, by
diffusers.DiffusionPipeline.from_pretrained(OUT, trust_remote_code=True); mdit/pipeline.py says what is in it. --push
uploads it to the Hugging Face Hub as the user who is logged in there (`hf auth login`).
"""

import argparse

from mdit import cli
from mdit.config import UserError


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--snapshot", type=cli.path, required=True, help="a run's snapshots/latest, or one step of it")
    add("--out", type=cli.path, required=True, help="the folder to write")
    add("--weights", choices=("ema", "raw"), default="ema")
    add("--license", default="other", help="of the model, as the Hub names licences; default: other")
    add("--push", metavar="OWNER/NAME", help="upload it to this repository of the Hub as well")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.out.exists():
        raise UserError(f"{args.out}: exists already")
    from mdit.checkpoint.snapshot import load_snapshot
    from mdit.files import replacing_directory
    from mdit.publish.export import export_pipeline

    snapshot = load_snapshot(args.snapshot)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing_directory(args.out) as partial:
        export_pipeline(snapshot, args.weights, partial, args.license)
    print(args.out)
    if args.push:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(args.push, exist_ok=True)
        print(api.upload_folder(repo_id=args.push, folder_path=args.out))


if __name__ == "__main__":
    cli.run(main)
