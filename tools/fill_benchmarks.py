"""The documents' tables from the figures of one GPU: README.md, docs/benchmarks/README.md and docs/kernels.md.

    python tools/fill_benchmarks.py DIR        DIR as tools/first_contact.py has left it, or docs/benchmarks/figures

Replaces what is between `<!-- measured: NAME -->` and `<!-- /measured -->`; whatever DIR has no figure for stays "not
measured". The figures and their pictures are kept in docs/benchmarks/figures, which the documents agree with (a test
says so). Figures of a CPU, of tiny shapes, of a rehearsal or of an unknown commit are refused.
"""

from pathlib import Path

from mdit import cli
from mdit.bench import figures
from mdit.config import UserError
from mdit.files import try_to_write, write_text

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/benchmarks/README.md", "docs/kernels.md")
KEPT = Path("docs/benchmarks/figures")


def main(arguments: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("directory", type=cli.path, metavar="DIR", help="the figures")
    parser.add_argument("--root", type=cli.path, default=ROOT, help="of the documents; default: this repository")
    args = parser.parse_args(arguments)
    found = figures.load(args.directory)
    if not found.reports:
        raise UserError(f"{args.directory}: has no figures; expected the DIR of tools/first_contact.py")
    documents = [args.root / name for name in DOCUMENTS]
    for path in documents:
        try_to_write(path)
    kept = args.root / KEPT
    if args.directory.resolve() != kept.resolve():
        figures.keep(found, args.directory, kept)
    for path in documents:
        before = path.read_text(encoding="utf-8")
        after = figures.fill(before, found, kept)
        write_text(path, after)
        print(f"{path}: {'filled' if after != before else 'as it was'}")


if __name__ == "__main__":
    cli.run(main)
