"""Benchmarks of how well pictures follow their prompts: their prompts drawn into the files that their scorers read.

    geneval     evaluation_metadata.jsonl   OUT/00000/samples/0000.png .. 0003.png, OUT/00000/metadata.jsonl
    geneval2    geneval2_data.jsonl         OUT/00000.png, OUT/images.json {prompt: path}
    dpg         a directory of NAME.txt     OUT/NAME.png, a square of four pictures
    parti       PartiPrompts.tsv            OUT/00000.png, OUT/metadata.jsonl (an "imagefolder" of datasets)

The prompts come with the benchmarks (github.com/djghosh13/geneval, facebookresearch/GenEval2, TencentQQGYLab/ELLA,
google-research/parti). Their scorers have towers and versions of their own and are run on these files elsewhere.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

from PIL import Image

from mdit.config import UserError
from mdit.dist import World
from mdit.documents import parse_foreign_json, read_text, to_json
from mdit.eval.samples import Painter, missing, save_png

PICTURES = 4  # of a prompt in GenEval and DPG-Bench


@dataclass(frozen=True)
class Sheet:
    """A file with a prompt's pictures of these numbers: one, or several in a square."""

    path: Path
    prompt: str
    numbers: range


@dataclass(frozen=True)
class Benchmark:
    """Files to draw, texts that go beside them, and what its scorer is started with."""

    sheets: Sequence[Sheet]
    command: str
    texts: dict[Path, str] = field(default_factory=dict)


def geneval(prompts: Path, out: Path) -> Benchmark:
    sheets, texts = [], {}
    for number, (line, values) in enumerate(_json_lines(prompts)):
        folder = out / f"{number:05d}"
        texts[folder / "metadata.jsonl"] = line + "\n"
        for i in range(PICTURES):
            first = PICTURES * number + i
            sheets.append(Sheet(folder / f"samples/{i:04d}.png", _prompt(values, prompts), range(first, first + 1)))
    command = (
        f'python evaluation/evaluate_images.py {out} --outfile results.jsonl --model-path "<OBJECT_DETECTOR_FOLDER>"'
    )
    return Benchmark(sheets, command, texts)


def geneval2(prompts: Path, out: Path) -> Benchmark:
    found = [_prompt(values, prompts) for _, values in _json_lines(prompts)]
    sheets = _one_each(found, out)
    paths = {sheet.prompt: str(sheet.path.absolute()) for sheet in sheets}
    index = out / "images.json"
    command = f"python evaluation.py --benchmark_data {prompts} --image_filepath_data {index} --method soft_tifa_gm"
    return Benchmark(sheets, command, {index: to_json(paths)})


def dpg(prompts: Path, out: Path) -> Benchmark:
    files = sorted(prompts.glob("*.txt"))
    if not files:
        raise UserError(f"{prompts}: has no *.txt; expected ELLA's dpg_bench/prompts")
    texts = [read_text(file).strip() for file in files]
    sheets = [
        Sheet(out / f"{file.stem}.png", text, range(PICTURES * n, PICTURES * (n + 1)))
        for n, (file, text) in enumerate(zip(files, texts, strict=True))
    ]
    command = f"accelerate launch dpg_bench/compute_dpg_bench.py --image-root-path {out} --pic-num {PICTURES}"
    return Benchmark(sheets, f"{command} --resolution <pixels of a picture>")


def parti(prompts: Path, out: Path) -> Benchmark:
    lines = io.StringIO(read_text(prompts), newline="")
    rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or not rows[0].get("Prompt"):
        raise UserError(f"{prompts}: expected a table with tabs and a column Prompt")
    sheets = _one_each([row["Prompt"] for row in rows], out)
    told = [{"file_name": sheet.path.name, **row} for sheet, row in zip(sheets, rows, strict=True)]
    lines = "".join(json.dumps(each) + "\n" for each in told)
    command = f'datasets.load_dataset("imagefolder", data_dir="{out}")  # it has no scorer of its own'
    return Benchmark(sheets, command, {out / "metadata.jsonl": lines})


BENCHMARKS: dict[str, Callable[[Path, Path], Benchmark]] = {f.__name__: f for f in (geneval, geneval2, dpg, parti)}


def draw(benchmark: Benchmark, painter: Painter, world: World, batch_size: int, **settings) -> Iterator[Path]:
    """Draw this rank's sheets as far as they are not there, and give the path of each. Picture i is that of
    `Painter.draw`; `settings` are that method's. Raises UserError for one that is of something else."""
    mine = benchmark.sheets[world.rank :: world.size]
    abouts = [painter.about(sheet.prompt, number=sheet.numbers[0], **settings) for sheet in mine]
    due = missing([sheet.path for sheet in mine], abouts)
    prompts = [mine[n].prompt for n in due for _ in mine[n].numbers]
    numbers = [number for n in due for number in mine[n].numbers]
    drawn = painter.draw(prompts, numbers=numbers, batch_size=batch_size, **settings)
    for n in due:
        sheet = mine[n]
        sheet.path.parent.mkdir(parents=True, exist_ok=True)
        save_png(_square([next(drawn) for _ in sheet.numbers]), sheet.path, abouts[n])
        yield sheet.path


def _square(pictures: Sequence[Image.Image]) -> Image.Image:
    columns, (width, height) = isqrt(len(pictures)), pictures[0].size
    sheet = Image.new("RGB", (columns * width, len(pictures) // columns * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def _one_each(prompts: Iterable[str], out: Path) -> list[Sheet]:
    return [Sheet(out / f"{n:05d}.png", prompt, range(n, n + 1)) for n, prompt in enumerate(prompts)]


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Lines, and the objects that they are. Raises UserError naming the line."""
    for number, line in enumerate(read_text(path).removesuffix("\n").split("\n"), 1):
        try:
            yield line, parse_foreign_json(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not valid JSON: {error}") from None


def _prompt(values: Any, path: Path) -> str:
    if not isinstance(values, dict) or not isinstance(prompt := values.get("prompt"), str) or not prompt.strip():
        raise UserError(f'{path}: expected objects with a "prompt", one a line')
    return prompt
