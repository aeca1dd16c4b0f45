"""Benchmarks' folders, as their scorers read them."""

import json

import pytest
import torch
from PIL import Image

from mdit.config import UserError
from mdit.dist import World
from mdit.eval.benchmarks import BENCHMARKS, draw

ALONE = World(0, 1, 0, torch.device("cpu"))
GENEVAL = [
    '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}',
    '{"tag": "colors", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a brown cow"}',
]
PARTI = 'Prompt\tCategory\tChallenge\tNote\na cat\tAnimals\tBasic\t\na "big" dog\tAnimals\tBasic\tsome note\n'


class Painter:
    """Draws a colour of a prompt and a number, and says what it drew."""

    def __init__(self):
        self.count = 0

    def draw(self, prompts, *, numbers, batch_size, guidance, steps, seed):
        for prompt, number in zip(prompts, numbers, strict=True):
            self.count += 1
            yield Image.new("RGB", (4, 4), (number, len(prompt), seed))

    def about(self, prompt, *, number, guidance, steps, seed):
        return {"prompt": prompt, "mdit": json.dumps({"number": number, "seed": seed})}


def drawn(name, prompts, out, world=ALONE, seed=0):
    painter, benchmark = Painter(), BENCHMARKS[name](prompts, out)
    paths = [*draw(benchmark, painter, world, 2, guidance=None, steps=None, seed=seed)]
    return benchmark, painter.count, paths


def colour(path, at=(0, 0)):
    with Image.open(path) as picture:
        return picture.convert("RGB").getpixel(at)


def test_geneval(tmp_path):
    prompts, out = tmp_path / "evaluation_metadata.jsonl", tmp_path / "out"
    prompts.write_text("\n".join(GENEVAL) + "\n")
    benchmark, count, paths = drawn("geneval", prompts, out)
    assert count == len(paths) == 8
    assert benchmark.texts == {out / f"{n:05d}" / "metadata.jsonl": GENEVAL[n] + "\n" for n in range(2)}
    assert colour(out / "00001/samples/0002.png") == (6, len("a photo of a brown cow"), 0)
    paths[3].unlink()
    assert drawn("geneval", prompts, out)[1] == 1, "the same command draws what is missing"
    with pytest.raises(UserError, match=r"0000.png: its mdit is .*; choose another --out"):
        drawn("geneval", prompts, out, seed=1)


def test_geneval2(tmp_path):
    prompts, out = tmp_path / "geneval2_data.jsonl", tmp_path / "out"
    prompts.write_text('{"prompt": "two cows", "atom_count": 2}\n{"prompt": "a bench", "atom_count": 1}\n')
    for rank in range(2):
        benchmark, count, _ = drawn("geneval2", prompts, out, World(rank, 2, rank, torch.device("cpu")))
        assert count == 1
    ((path, text),) = benchmark.texts.items()
    assert path == out / "images.json"
    assert [colour(file)[0] for file in json.loads(text).values()] == [0, 1]
    assert [*json.loads(text)] == ["two cows", "a bench"]


def test_a_prompt_may_have_any_letter(tmp_path):
    """U+2028 parts lines for Python, not for JSON lines."""
    prompts = tmp_path / "geneval2_data.jsonl"
    prompts.write_text('{"prompt": "two\u2028cows"}\n', encoding="utf-8")
    (sheet,) = BENCHMARKS["geneval2"](prompts, tmp_path / "out").sheets
    assert sheet.prompt == "two\u2028cows"


def test_dpg(tmp_path):
    (tmp_path / "prompts").mkdir()
    for name in ("b1", "a2"):
        (tmp_path / f"prompts/{name}.txt").write_text(f"a long prompt {name}\n")
    benchmark, count, _ = drawn("dpg", tmp_path / "prompts", tmp_path / "out")
    assert count == 8 and not benchmark.texts
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a2.png", "b1.png"], "all of it is scored"
    corners = [colour(tmp_path / "out/b1.png", at)[0] for at in ((0, 0), (4, 0), (0, 4), (4, 4))]
    assert corners == [4, 5, 6, 7] and Image.open(tmp_path / "out/b1.png").size == (8, 8)


def test_parti(tmp_path):
    prompts, out = tmp_path / "PartiPrompts.tsv", tmp_path / "out"
    prompts.write_text(PARTI)
    benchmark, count, _ = drawn("parti", prompts, out)
    (text,) = benchmark.texts.values()
    rows = [json.loads(line) for line in text.splitlines()]
    assert count == 2 and [row["Prompt"] for row in rows] == ["a cat", 'a "big" dog']
    assert rows[1]["file_name"] == "00001.png" and rows[1]["Note"] == "some note"


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("geneval", "{\n", "line 1: not valid JSON"),
        ("geneval2", '{"text": "a cat"}\n', 'expected objects with a "prompt"'),
        ("parti", "a cat\n", "expected a table with tabs and a column Prompt"),
        ("dpg", None, "has no *.txt"),
    ],
)
def test_prompts_of_something_else_are_one_line(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / "prompts").write_text(text)
    with pytest.raises(UserError) as error:
        BENCHMARKS[name](tmp_path / "prompts", tmp_path / "out")
    assert message in str(error.value)
