"""The file of an ablation: what its variants become, how long each trains, and what is refused in one line."""

from pathlib import Path

import pytest

from mdit.bench.ablation import Ablation
from mdit.config import UserError, load_config
from mdit.costs.flops import image_flops, optimizer_flops, run_flops
from mdit.costs.trace import training_flops
from mdit.differences import toml
from mdit.documents import parse_toml
from mdit.masking import mask_ratio
from mdit.models import meta_model
from mdit.parallel.muon import takes_muon
from tests.recipes import tiny_config, tiny_model
from tests.training import write_toml

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs" / "ablations").glob("*.toml"))
RECIPE = tiny_config(training={"num_steps": 40, "mask_ratio": 0.5}, report={"validate_every": 10})
HEAD = """name = "tiny"
recipe = "recipe.toml"
budget = "flops"
seeds = [0, 1]
baseline = "base"
pictures = 4
"""


def write(folder, text):
    write_toml(folder / "recipe.toml", RECIPE)
    (folder / "ablation.toml").write_text(text)
    return folder / "ablation.toml"


def test_the_sum_of_the_levers_is_the_quickstart():
    ablation = Ablation(ROOT / "configs" / "ablations" / "sum.toml")
    (last,) = ablation.stages[[*ablation.stages][-1]]
    quickstart = load_config(ROOT / "configs" / "quickstart.toml")
    summed = ablation.resolve("last", last, quickstart.training.num_steps, quickstart.seed, 1).config
    assert summed.model_copy(update={"name": quickstart.name, "report": quickstart.report}) == quickstart


def lengths(ablation, step_seconds=None):
    runs = ablation.runs(step_seconds)
    assert all(stage.config.seed == run.seed for run in runs for stage in run.stages)
    return {(run.variant, run.seed): [stage.config.training.num_steps for stage in run.stages] for run in runs}


VARIANTS = """
[variants.base]
[variants.wide]
seeds = [5]
training.mask_ratio = 0.0
[variants.tail.finetune]
share = 0.25
training.mask_ratio = 0.0
[variants.small]
training.global_batch_size = 4
"""


def test_all_get_the_flops_of_the_baseline(tmp_path):
    ablation = Ablation(write(tmp_path, HEAD + VARIANTS))
    found = lengths(ablation)
    assert found["base", 0] == found["base", 1] == [40] and found["small", 1] == [80]
    assert [*found] == [("base", 0), ("wide", 5), ("tail", 0), ("small", 0), ("base", 1), ("tail", 1), ("small", 1)]
    for run in ablation.runs(None):
        one_step = run_flops(run.stages[0].config, 1)
        assert abs(run.flops - run_flops(ablation.base)) <= one_step, run.name
        every = [stage.config.report.snapshot_every for stage in run.stages]
        assert every == [max(1, round(run.steps / 4))] * len(every)
    tail = next(run for run in ablation.runs(None) if run.variant == "tail")
    assert [stage.config.training.mask_ratio for stage in tail.stages] == [0.5, 0.0]
    assert [stage.name for stage in tail.stages] == ["train", "finetune"]


def test_a_schedule_of_masks_is_counted_step_by_step():
    masks = {"schedule": "linear", "start": 0.75, "final": 0.0, "share": 0.5, "levels": 1}
    config = tiny_config(training={"num_steps": 8, "mask_ratio": masks, "global_batch_size": 3})
    few, all_ = (3 * image_flops(config.model, ratio) for ratio in (0.75, 0.0))
    ratios = [mask_ratio(config, step) for step in range(8)]
    assert run_flops(config, 4) == 4 * few and run_flops(config) == ratios.count(0.75) * few + ratios.count(0.0) * all_
    assert 0.0 in ratios


def test_muons_products_are_flops_of_the_optimizer(tmp_path):
    """Five iterations of 2 (2 m m n + m^3) for each matrix, m its shorter side; a budget may count them or not."""
    muon = {"name": "muon", "muon": {"lr": 0.02, "weight_decay": 0.0}}
    config = tiny_config(optim=muon)
    sides = [
        (*sorted(p.shape[-2:]), p.shape[0] if p.ndim == 3 else 1)
        for name, p in meta_model(config.model).named_parameters()
        if takes_muon(name, p.shape)
    ]
    one_step = sum(5 * 2 * count * (2 * m * m * n + m**3) for m, n, count in sides)
    assert optimizer_flops(config, 3) == 3 * one_step > 0 == optimizer_flops(tiny_config())
    text = HEAD + "[variants.base]\n[variants.muon]\noptim = {name = 'muon', muon = {lr = 0.02, weight_decay = 0.0}}\n"
    steps = [
        lengths(Ablation(write(tmp_path, text.replace("flops", budget))))["muon", 0][0]
        for budget in ("flops", "flops_with_optimizer")
    ]
    assert steps[0] == 40 and steps[1] == round(40 * run_flops(RECIPE, 1) / (run_flops(RECIPE, 1) + one_step))


def test_steps_and_seconds(tmp_path):
    file = write(tmp_path, HEAD.replace("flops", "steps") + VARIANTS + "training.num_steps = 60\n")
    found = lengths(Ablation(file))
    assert (found["base", 0], found["wide", 5], found["tail", 1], found["small", 0]) == ([40], [40], [30, 10], [60])
    times = {("base", "train"): 1.0, ("wide", "train"): 2.0, ("tail", "train"): 1.0, ("tail", "finetune"): 2.0}
    ablation = Ablation(write(tmp_path, HEAD.replace("flops", "seconds") + VARIANTS))
    found = lengths(ablation, lambda variant, stage: times.get((variant, stage), 0.5))
    assert (found["base", 0], found["wide", 5], found["tail", 1], found["small", 0]) == ([40], [20], [30, 5], [80])


def test_flops_are_counted_forward_and_backward():
    """Against three times the forward pass: attention's backward has 5 products for 2, and what an input needs no
    gradient for has one less."""
    for changes in ({}, {"use_patch_mixer": False}):
        model = tiny_model(**changes)
        assert image_flops(model, 0.75) == pytest.approx(training_flops(model, 0.75), rel=0.1)
    assert image_flops(tiny_model(), 0.0) > image_flops(tiny_model(), 0.5) > image_flops(tiny_model(), 0.75)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_variant_of_every_file_is_a_recipe(path):
    """Its FLOPs are counted with a model of one block, so that the test takes no minute."""
    ablation = Ablation(path)
    assert f'name = "{path.stem}"' in path.read_text() and ablation.recipe.exists()
    models = set()
    for variant, stages in ablation.stages.items():
        for stage in stages:
            config = ablation.resolve(variant, stage, 2, 0, 1).config
            model = config.model.model_copy(update={"depth": 2})
            models |= {(model, ratio) for ratio in config.training.mask_ratios}
    assert models and all(image_flops(*model) > 0 for model in models)


@pytest.mark.parametrize(
    "text, message",
    [
        (HEAD.replace("pictures", "picture") + VARIANTS, "unknown key picture = 4 (did you mean pictures?)"),
        (HEAD + VARIANTS + "training.mask_ration = 0.5", "variants.small: {recipe}: unknown key training.mask_ration"),
        (
            HEAD + VARIANTS + "model.head_dim = 5",
            "variants.small: {recipe}: model: dim 32 is not a multiple of head_dim",
        ),
        (HEAD + "[variants.x]", "baseline = 'base' is none of the variants: x"),
        (HEAD + "[variants.base]\noptim.lr = 1.0", "variants.base is the baseline: what it changes belongs in base"),
        (HEAD.replace("[0, 1]", "[1, 1]") + VARIANTS, "seeds has 1 twice"),
        (HEAD + VARIANTS.replace("[5]", "[5, 6, 5]"), "variants.wide.seeds has 5 twice"),
        (HEAD + VARIANTS.replace("0.25", "1.0"), "variants.tail.finetune: share = 1.0"),
        (HEAD + VARIANTS + "training.num_steps = 9", "variants.small: training.num_steps is the same for all variants"),
        (HEAD + VARIANTS + "seed = 9", "variants.small: seed is the same for all variants"),
        (HEAD + "[base]\nreport.validate_every = 0\n" + VARIANTS, "base: report.validate_every is 0"),
        (HEAD.replace("recipe.toml", "none.toml") + VARIANTS, "none.toml: cannot read the recipe"),
        (HEAD + '[variants."a/b"]', "variants.a/b"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as refused:
        Ablation(path)
    assert message.replace("{recipe}", str(tmp_path / "recipe.toml")) in str(refused.value)
    assert str(refused.value).startswith(str(tmp_path)) and "\n" not in str(refused.value)


def test_tables_are_merged_or_replaced(tmp_path):
    text = (
        HEAD
        + "[variants.base]\n[variants.x]\nreplace = ['noise']\nnoise = {P_mean = 0.0, P_std = 1.0, sigma_data = 1.0}"
    )
    stage = Ablation(write(tmp_path, text)).stages["x"][0]
    assert stage.values == {"noise": {"P_mean": 0.0, "P_std": 1.0, "sigma_data": 1.0}}
    merged = Ablation(write(tmp_path, text.replace("['noise']", "[]"))).stages["x"][0]
    assert merged.values == {"noise.P_mean": 0.0, "noise.P_std": 1.0, "noise.sigma_data": 1.0}
    base = (
        "[base]\nnoise.P_mean = 0.2\n"
        + text.split(HEAD)[1]
        + "\n[variants.x.finetune]\nshare = 0.5\nnoise.P_mean = 0.3"
    )
    ablation = Ablation(write(tmp_path, HEAD + base))
    means = [ablation.resolve("x", stage, 2, 0, 1).config.noise.P_mean for stage in ablation.stages["x"]]
    assert (ablation.base.noise.P_mean, *means) == (0.2, 0.0, 0.3)


@pytest.mark.parametrize("value", [1, 1.5, 1e-9, True, 'a "b" \\ ü', [1, [2.5, "x"]], {"a": {"b c": [False]}}])
def test_values_as_toml(value):
    assert parse_toml(f"value = {toml(value)}", "")["value"] == value
