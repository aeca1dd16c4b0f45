"""The table of an ablation: means and deviations, which differences count, where the baseline's loss was reached."""

import json

import pytest

from mdit.bench.ablation import Ablation
from mdit.bench.ablation_report import AblationReport, MeanPoint, crossing
from mdit.bench.ablation_result import RESULT, CurvePoint, VariantResult, training_seconds
from mdit.config import UserError, portable
from tests.bench_rows import CPU
from tests.unit.test_ablation import HEAD, write

VARIANTS = (
    "[variants.base]\n[variants.near]\noptim.lr = 2e-3\n[variants.far]\noptim.lr = 3e-3\n[variants.none]\nseeds=[4]"
)


def result(ablation, run, path, losses, object_, optimizer=0):
    recipes = {"baseline": ablation.base, **{stage.name: stage.config for stage in run.stages}}
    curve = [
        CurvePoint(
            step=10 * (i + 1),
            flops=10**12 * (i + 1),
            flops_with_optimizer=(10**12 + optimizer) * (i + 1),
            seconds=30.0 * (i + 1),
            losses=(x - 0.1, x + 0.1),
        )
        for i, x in enumerate(losses)
    ]
    return VariantResult(
        recipes={name: portable(config, path) for name, config in recipes.items()},
        pictures=ablation.file.pictures,
        parameters=1,
        curve=tuple(curve),
        frechet_distance=100.0,
        background=1.0,
        object=object_,
        environment=CPU,
    )


def write_results(ablation, out, results):
    for run in ablation.runs(None):
        if (run.variant, run.seed) in results:
            path = run.folder(out) / RESULT
            path.parent.mkdir(parents=True)
            result(ablation, run, path, *results[run.variant, run.seed]).save(path)


def cells(markdown):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]
    return {row[0]: dict(zip(rows[0], row)) for row in rows[2:]}


def test_differences_below_the_deviation_are_marked(tmp_path):
    ablation = Ablation(write(tmp_path, HEAD.replace("flops", "steps") + VARIANTS))
    results = {("base", 0): ([0.9, 0.5], 0.3), ("base", 1): ([0.9, 0.6], 0.4)}
    results |= {("near", 0): ([0.8, 0.52], 0.3), ("near", 1): ([0.8, 0.56], 0.3)}
    results |= {("far", 0): ([0.7, 0.4], 0.8)}
    write_results(ablation, tmp_path / "out", results)
    report = AblationReport.load(ablation, tmp_path / "out")
    found = cells(report.markdown("command"))
    assert found["base"]["validation loss"] == "0.5500 ± 0.0707" and found["base"]["object"] == "35.0% ± 7.1%"
    assert found["near"]["validation loss"] == "0.5400 ± 0.0283 ≈"  # 0.01 against 0.07
    assert found["far"]["validation loss"] == "0.4000" and found["far"]["seeds"] == "1 of 2"  # 0.15
    assert (found["near"]["object"], found["far"]["object"]) == ("30.0% ± 0.0% ≈", "80.0%")
    assert found["none"]["seeds"] == "0 of 1" and found["none"]["steps"] == "not measured"
    reached = "steps to the baseline's loss"
    assert found["base"][reached] == "20 (1.00x)" and found["far"][reached] == "15 (0.75x)"
    assert (found["far"]["TFLOP to it"], found["far"]["seconds to it"]) == ("1.5 (0.75x)", "45 (0.75x)")
    content = report.content("command")["variants"]
    ratios = content["far"]["of_what_the_baseline_took"]
    assert ratios == pytest.approx(dict.fromkeys(("steps", "flops", "flops_with_optimizer", "seconds"), 0.75))
    assert content["near"]["figures"]["loss"] == pytest.approx(
        {"mean": 0.54, "deviation": 0.02828, "0": 0.52, "1": 0.56}, rel=1e-3
    )


def test_flops_of_an_optimizer_stand_beside_the_models(tmp_path):
    ablation = Ablation(write(tmp_path, HEAD.replace("[0, 1]", "[0]") + VARIANTS))
    results = {("base", 0): ([0.9, 0.5], None), ("far", 0): ([0.9, 0.5, 0.4], None, 5 * 10**11)}
    write_results(ablation, tmp_path / "out", results)
    found = cells(AblationReport.load(ablation, tmp_path / "out").markdown("command"))
    assert (found["base"]["TFLOP"], found["far"]["TFLOP"]) == ("2", "3 + 1.5")
    assert found["far"]["TFLOP to it"] == "2 (1.00x; 1.50x with the optimizer's)"


def test_where_a_curve_comes_down_to_a_loss():
    curve = [MeanPoint(10 * n, 100 * n, 200 * n, n, loss) for n, loss in ((1, 0.5), (2, 0.3), (3, 0.35), (4, 0.1))]
    assert crossing(curve, 0.4) == pytest.approx((15, 150, 300, 1.5, 0.4))
    assert crossing(curve, 0.2) == pytest.approx((36, 360, 720, 3.6, 0.2))
    assert crossing(curve, 0.6) == curve[0] and crossing(curve, 0.05) is None and crossing([], 1.0) is None


def test_seconds_are_those_of_the_steps(tmp_path):
    lines = [{"step": 10, "loss": 1.0, "step_seconds": 0.5}, {"step": 12, "validation_loss": 1.0}]
    lines.append({"step": 20, "loss": 1.0, "step_seconds": 0.25})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = [training_seconds(tmp_path / "metrics.jsonl", until) for until in (4, 10, 12, 20, 30)]
    assert found == [2.0, 5.0, 5.5, 7.5, 7.5]


def test_one_seed_each_says_that_no_deviation_is_known(tmp_path):
    ablation = Ablation(write(tmp_path, HEAD.replace("[0, 1]", "[0]") + VARIANTS))
    write_results(ablation, tmp_path / "out", {("base", 0): ([0.5], None), ("far", 0): ([0.6], None)})
    markdown = AblationReport.load(ablation, tmp_path / "out").markdown("command")
    found = cells(markdown)["far"]
    assert found["validation loss"] == "0.6000 ?" and found["object"] == "" and "no deviation is known" in markdown
    assert found["steps to the baseline's loss"] == "not reached"


def test_nothing_measured_and_no_baseline(tmp_path):
    ablation = Ablation(write(tmp_path, HEAD + VARIANTS))
    assert "not measured" in AblationReport.load(ablation, tmp_path / "out").markdown("command")
    write_results(ablation, tmp_path / "out", {("far", 0): ([0.6], None)})
    found = cells(AblationReport.load(ablation, tmp_path / "out").markdown("command"))["far"]
    assert found["validation loss"] == "0.6000" and found["steps to the baseline's loss"] == "not measured"


def test_a_result_of_another_recipe_is_refused(tmp_path):
    write_results(Ablation(write(tmp_path, HEAD + VARIANTS)), tmp_path / "out", {("far", 0): ([0.6], None)})
    for old, new, message in (
        ("3e-3", "4e-3", "result.json: train: optim.lr was 0.003, now it is 0.004; --rerun"),
        ("pictures = 4", "pictures = 5", "result.json: pictures was 4, now it is 5"),
        (
            "[variants.base]",
            "[base]\nnoise.P_mean = 0.5\n[variants.base]",
            "result.json: baseline: noise.P_mean was -0.6",
        ),
        (
            "3e-3\n",
            "3e-3\nfinetune = {share = 0.5}\n",
            "result.json: has baseline, train, now it is baseline, train, finetune",
        ),
    ):
        ablation = Ablation(write(tmp_path, (HEAD + VARIANTS).replace(old, new)))
        with pytest.raises(UserError) as refused:
            AblationReport.load(ablation, tmp_path / "out")
        assert message in str(refused.value)
