"""tools/compare_baseline.py with a baseline that somebody brings: here our own model in the paper's form."""

import json
from functools import partial

import pytest
import torch

from mdit import cli
from mdit.bench.baseline import OURS, Baseline, BaselineComparison, Contender, Pace, Turn, ratios, take_turns
from mdit.bench.report import Report
from mdit.diffusion.edm import edm_loss, sample_noise
from mdit.dist import World
from mdit.masking import Mask
from mdit.models import MicroDiT
from tests import bench_rows
from tests.recipes import tiny_config
from tools import compare_baseline

CPU = torch.device("cpu")
TOY = """
import torch
from mdit.masking import sample_mask
from mdit.models import MicroDiT

class Toy(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.net, self.num_patches = MicroDiT(config), config.num_patches

    def forward(self, latents, sigma, captions, mask_ratio):
        mask = sample_mask(torch.rand(len(latents), self.num_patches), mask_ratio)
        output = self.net(latents, sigma.log() / 4, captions, mask=mask)
        if mask is None:
            return output
        return output, torch.ones(len(latents), self.num_patches).scatter(1, mask.keep_NK, 0.0)

def toy(config):
    return Toy(config)

class Wrong(torch.nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer, self.weight = answer, torch.nn.Parameter(torch.ones(()))

    def forward(self, latents, sigma, captions, mask_ratio):
        return self.answer(latents * self.weight)

def flat(): return Wrong(lambda x: x.flatten(1))
def mask_of_pixels(): return Wrong(lambda x: (x, torch.zeros(len(x), 64)))
def frozen(): return Wrong(lambda x: x.detach())
def broken(): return Wrong(lambda x: 1 / 0)
def raising(): raise KeyError("no weights")
def nothing(): return 3
def greedy(one, two): return None
"""


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(TOY)
    return path


@pytest.fixture
def recipe(tmp_path):
    config = tiny_config()
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"recipe": config.model_dump(mode="json", exclude_none=True)}))
    return path


def test_both_are_measured_and_their_ratio_is_printed(toy, recipe, tmp_path, capsys):
    asked = ["--baseline", f"{toy}:toy", "--recipe", str(recipe), "--out", str(tmp_path / "out"), "--modes", "eager"]
    compare_baseline.main([*asked, "--micro_batch", "2", "--max_micro_batch", "4", "--rounds", "1"])
    printed = capsys.readouterr().out
    rows = Report.load(tmp_path / "out" / "baseline.json").rows
    assert {row.setting.micro_batch for row in rows} == {2, 4}
    assert [row.contender for row in rows[:2]] == ["ours", "baseline"]
    for row in rows:
        assert row.kind == "baseline" and row.problem is None and row.mfu is None
        assert row.setting.precision == "fp32" and row.setting.weights == "float32"
        ms = row.figures.milliseconds
        assert ms.data + ms.forward + ms.backward + ms.optimizer == pytest.approx(ms.step)
        assert row.figures.images_per_second == pytest.approx(1e3 * row.setting.micro_batch / ms.step)
        assert 0 < row.figures.fastest_ms <= ms.step * (1 + 1e-9)
    assert all(line in printed for line in ratios(rows)) and "same, eager: " in printed
    ours, theirs = rows[:2]
    assert ours.parameters == theirs.parameters
    assert 0.5 < ours.figures.losses[0] < 2
    assert ours.figures.losses[0] == pytest.approx(theirs.figures.losses[0], rel=0.5)


@pytest.mark.parametrize(
    "factory, complaint",
    [
        ("flat", "its output is (2, 256), expected (2, 4, 8, 8)"),
        ("mask_of_pixels", "its mask is (2, 64), expected (2, 16)"),
        ("frozen", "its output has no gradient"),
        ("broken", "raised ZeroDivisionError: division by zero"),
        ("raising", "raising raised KeyError: 'no weights'"),
        ("nothing", "nothing gave int, expected a torch.nn.Module"),
        ("greedy", "greedy raised TypeError"),
        ("missing", "has no function missing"),
    ],
)
def test_a_baseline_that_does_not_fit_is_told_in_one_line(toy, recipe, capsys, factory, complaint):
    with pytest.raises(SystemExit) as exit:
        arguments = ["--baseline", f"{toy}:{factory}", "--recipe", str(recipe), "--micro_batch", "2"]
        cli.run(lambda: compare_baseline.main(arguments))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("error: --baseline ") and error.count("\n") == 1
    assert complaint in error and f"toy.py:{factory}" in error


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "expected --baseline FILE.py:FACTORY, or --expert_layer TOKENS"),
        (["--baseline", "nowhere.py:toy"], "no such file: nowhere.py"),
        (["--baseline", "toy"], "expected FILE.py:FACTORY"),
        (["--baseline", "a.py:b", "--micro_batch", "0"], "--micro_batch: 0 is not between 1"),
        (["--baseline", "a.py:b", "--mask_ratio", "2"], "training.mask_ratio"),
        (["--baseline", "a.py:b", "--modes", "fast"], "--modes"),
        (["--expert_layer", "1000"], "--expert_layer 1000: expected the tokens of a square image"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(capsys, arguments, complaint):
    with pytest.raises(SystemExit) as exit:
        cli.run(lambda: compare_baseline.main(arguments))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and complaint in error


def test_a_broken_file_and_a_recipe_that_is_not_there(tmp_path, capsys):
    (tmp_path / "bad.py").write_text("import package_that_nobody_has\n")
    for arguments, complaint in (
        (["--baseline", f"{tmp_path / 'bad.py'}:f"], "raised ModuleNotFoundError: No module named"),
        (["--baseline", "a.py:b", "--recipe", str(tmp_path / "no.toml")], "cannot read the recipe"),
    ):
        with pytest.raises(SystemExit) as exit:
            cli.run(partial(compare_baseline.main, arguments))
        assert exit.value.code == 2 and complaint in capsys.readouterr().err


def test_expert_layers_against_the_one_hot_form(recipe, capsys):
    compare_baseline.main(["--expert_layer", "64", "--recipe", str(recipe)])
    header, _, *lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    assert [cells[0].split(",")[0].strip() for cells in lines] == ["patch_mixer", "blocks"]
    for cells in lines:
        ours, theirs, ratio, *_ = map(float, cells[1:])
        assert len(cells) == len(header) and ratio == pytest.approx(theirs / ours, rel=0.02, abs=0.01)


def row(who, mode, pairing, micro_batch, rate, fastest_ms=None, problem=None):
    found = bench_rows.row(rate=rate, kind="baseline", setting={"micro_batch": micro_batch}, problem=problem)
    measured = rate and found.figures.model_copy(update={"fastest_ms": fastest_ms})
    return found.with_(name=f"{who}, {mode}", contender=who, pairing=pairing, measured=measured)


def test_ratios_of_rows():
    found = [
        row("ours", "eager", "same, eager", 256, 1200.0, 200.0),
        row("baseline", "eager", "same, eager", 256, 500.0, 500.0),
        row("baseline", "eager", "search", 512, 9999.0, 1.0),
        row("ours", "compiled", "same, compiled", 256, 1300.0, 190.0),
        row("baseline", "compiled", "same, compiled", 256, None, problem="out of memory at micro-batch 256"),
        row("ours", "compiled", "best", 512, 1500.0, 400.0),
        row("baseline", "compiled", "best", 128, 600.0, 200.0),
    ]
    same, compiled, best = ratios(found)
    assert same.startswith("same, eager: 2.40 times the images/s of the baseline, 2.50 by fastest steps")
    assert compiled.startswith("same, compiled: no ratio")
    assert best.startswith("best: 2.50 times the images/s of the baseline, 2.00 by fastest")  # 4 x 200 / 400
    assert "(ours, compiled, 512 images against baseline, compiled, 128 images)" in best


@pytest.mark.parametrize(
    "limit, rate, largest, asked",
    [
        (64, lambda size: min(size, 32), 256, [8, 16, 32, 64]),  # 64 bring nothing more
        (64, lambda size: size, 256, [8, 16, 32, 64, 128]),
        (64, lambda size: size, 16, [8, 16]),
        (3, lambda size: size, 256, [8, 4, 2]),  # the first that fits
        (0, lambda size: size, 256, [8, 4, 2, 1]),
    ],
)
def test_the_search_for_a_micro_batch(limit, rate, largest, asked):
    found = []

    class Machine(BaselineComparison):
        def measure(self, pairing, turns, pace):
            ((size, mode),) = turns.values()
            found.append(size)
            problem = f"out of memory at micro-batch {size}" if size > limit else None
            return [row(OURS, mode, pairing, size, None if problem else float(rate(size)), problem=problem)]

    options = dict(kernels=[], rounds=1, modes=["eager"], budget_s=60.0)
    Machine({}, World(0, 1, 0, CPU), micro_batch=8, max_micro_batch=largest, **options).search(OURS, "eager")
    assert found == asked


class Fixed(torch.nn.Module):
    """Our model behind the baseline's signature, with a mask that is not noise."""

    def __init__(self, net, mask):
        super().__init__()
        self.net, self.mask = net, mask

    def forward(self, latents, sigma, captions, mask_ratio):
        dropped = torch.ones(len(latents), self.mask.num_patches).scatter(1, self.mask.keep_NK, 0.0)
        return self.net(latents, sigma.log() / 4, captions, mask=self.mask), dropped


def perturbed(config):
    torch.manual_seed(3)
    model = MicroDiT(config)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    return model


def test_the_baseline_is_given_the_loss_of_our_model():
    config = tiny_config(training={"global_batch_size": 3, "mask_ratio": 0.5})
    model, noise = perturbed(config.model), sample_noise(config, 7, slice(0, 3))
    mask = Mask(noise.mask.keep_NK, 16)
    latents, captions = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 12)
    baseline = Baseline("fixed", Fixed(model, mask), config, CPU, "fp32")
    expected = edm_loss(model, latents, captions, noise, config.noise)
    torch.testing.assert_close(baseline.loss(latents, captions, noise), expected)
    ours, theirs = Contender("ours", model, config, CPU, "fp32").data(4), baseline.data(4)
    assert torch.equal(next(ours[1]).latents_NCHW, next(theirs[1]).latents_NCHW)  # the same data, and for 3 images
    assert theirs[0].training.mask_ratio == 0 and torch.equal(  # the same noise
        sample_noise(ours[0], 1, slice(0, 4)).noise_NCHW, sample_noise(theirs[0], 1, slice(0, 4)).noise_NCHW
    )


@pytest.mark.parametrize(
    "precision, weights", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("amp", torch.float32)]
)
def test_a_plain_step_in_every_precision(precision, weights):
    """The weights after two steps are those of a float32 AdamW, to rounding; in bf16, its float32 masters."""
    config = tiny_config(training={"mask_ratio": 0.0}, optim={"lr": 1e-2})
    mask = Mask(torch.arange(16).expand(4, 16), 16)
    found, expected = (
        Baseline("x", Fixed(perturbed(config.model), mask), config, CPU, precision),
        perturbed(config.model),
    )
    before = [p.detach().clone() for p in expected.parameters()]
    optim = config.optim
    options = dict(lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
    optimizer = torch.optim.AdamW(expected.parameters(), **options)
    figures = take_turns([Turn(found, 4, False)], Pace(rounds=1, warm_up=0, steps=1))[0]
    config, batches = found.data(4)  # both batches that are held were taken: they come again
    for number in range(2):
        batch, noise = next(batches), sample_noise(config, number, slice(0, 4))
        optimizer.zero_grad()
        edm_loss(expected, batch.latents_NCHW, batch.captions_NLC, noise, config.noise).backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), optim.max_grad_norm)
        optimizer.step()
    assert figures.steps == 1 and len(found.losses) == 2 and {p.dtype for p in found.model.parameters()} == {weights}
    ours, theirs = (torch.cat([p.detach().flatten() for p in part]) for part in (found.masters, expected.parameters()))
    moved = (theirs - torch.cat([p.flatten() for p in before])).norm()
    assert (ours - theirs).norm() < (1e-3 if precision == "fp32" else 0.5) * moved
    for master, weight in zip(found.masters, found.weights):
        assert torch.equal(master.to(weight.dtype), weight)


class Stub:
    """A contender that only counts, and has memory for three images."""

    device, losses = CPU, ()

    def __init__(self, name, turns):
        self.name, self.turns = name, turns

    def to_host(self):
        self.turns.append(f"{self.name} leaves")

    def measure(self, micro_batch, warm_up, steps):
        if micro_batch > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        self.turns += [self.name] * (warm_up + steps)
        return [{"data": 0.0, "forward": 1.0, "backward": 2.0, "optimizer": 1.0}] * steps, 0.5


def test_they_take_turns_and_go_on_without_one_that_fails():
    turns: list[str] = []
    ours, theirs = Stub("a", turns), Stub("b", turns)
    found = take_turns([Turn(ours, 1, False), Turn(theirs, 2, False)], Pace(rounds=3, warm_up=0, steps=1))
    assert turns == ["a", "a", "b", "b", "b", "a", "a", "b"]  # the first of each is not measured
    assert [figures.steps for figures in found] == [3, 3]
    turns.clear()
    first, second = take_turns([Turn(ours, 4, False), Turn(theirs, 2, False)], Pace(rounds=2, warm_up=0, steps=1))
    assert first == "out of memory at micro-batch 4" and second.images_per_second == 500
    assert turns == ["a leaves", "b", "b", "b"]
