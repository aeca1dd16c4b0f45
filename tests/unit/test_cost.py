"""tools/cost.py: what counts as measured, what follows from it, what it says where something is missing, its errors."""

import json

import pytest

from mdit import cli
from mdit.bench.recipe_cost import Stage, choose_rows, scaled
from mdit.bench.report import Report
from mdit.costs.layouts import Layout
from mdit.costs.machines import MACHINES
from mdit.costs.prediction import predict
from mdit.data.report import REPORT
from mdit.data.writer import ShardWriter
from mdit.stages import paper_stages
from tests import bench_rows
from tests.latent_sets import ENCODERS, made_up
from tests.recipes import tiny_config
from tools import cost

RECIPES = [stage.config for stage in paper_stages()]
RATES = {(32, 0.75): 1250.0, (32, 0.0): 500.0, (64, 0.75): 400.0, (64, 0.0): 125.0}
HOURS = [512e6 / 1250 / 3600, 61.44e6 / 500 / 3600, 102.4e6 / 400 / 3600, 10.24e6 / 125 / 3600]
H100, PAPER = bench_rows.H100.gpu, "$1,890"


def row(latent_size=32, mask_ratio=0.75, rate=None, setting=None, **changes):
    recipe = next(c.name for c in RECIPES if (c.model.latent_size, c.training.mask_ratio) == (latent_size, mask_ratio))
    setting = dict(micro_batch=64, compile=True, zero_stage=2) | (setting or {})
    return bench_rows.row(recipe, rate or RATES[latent_size, mask_ratio], setting=setting, **changes)


def report(*found, gpu=H100):
    environment = bench_rows.H100.model_copy(update={"gpu": gpu})
    return Report(environment=environment, command="bench", rows=list(found))


def write(path, *found, **changes):
    report(*found, **changes).save(path)
    return str(path)


FOUR = [row(*stage) for stage in RATES]


def printed(capsys, *arguments):
    cost.main([*arguments])
    return capsys.readouterr().out


def cells(text, first):
    """The cells of the line that begins so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{first} ")]
    return line.removeprefix(first).split()


def test_a_recipe_costs_what_its_images_take_at_the_measured_rates(capsys, tmp_path):
    written = tmp_path / "cost.json"
    text = printed(capsys, write(tmp_path / "a.json", *FOUR), "--json", str(written))
    assert cells(text, "res_256_pretrain") == ["512.0", "M", "1,250", f"{HOURS[0]:.1f}", "$427", "$228"]
    total = sum(HOURS)
    assert cells(text, "the recipe")[2:] == [f"{total:.1f}", f"${total * 3.75:,.0f}", f"${total * 2:,.0f}"]
    assert "res_512_finetune: 512 px, mask 0 (bf16, micro-batch 64, made up data, compiled; 2026-12-01, commit" in text
    found = json.loads(written.read_text())
    assert found["gpu_hours"] == pytest.approx(total) and found["device"] == H100
    assert [stage["gpu_hours"] for stage in found["stages"]] == pytest.approx(HOURS)
    (line,) = [line for line in text.splitlines() if PAPER in line]
    assert line.startswith("The paper's own code, as the paper has it")  # never among ours


def test_stages_of_a_file_with_its_changes(capsys, tmp_path):
    recipes = [str(stage.recipe) for stage in paper_stages()[:2]]
    (tmp_path / "half.toml").write_text(
        f'name = "half"\nstages = {json.dumps(recipes)}\nchanges.res_256_pretrain.training.num_steps = 125000\n'
    )
    text = printed(capsys, write(tmp_path / "a.json", *FOUR), "--stages", str(tmp_path / "half.toml"))
    assert cells(text, "res_256_pretrain")[:4] == ["256.0", "M", "1,250", f"{HOURS[0] / 2:.1f}"]
    assert (
        cells(text, "the recipe")[2] == f"{HOURS[0] / 2 + HOURS[1]:.1f}" and "res_512" not in text.split("Rows that")[0]
    )


def test_the_fastest_row_of_several_reports_counts_by_gpu(capsys, tmp_path):
    faster = row(rate=2800.0, setting={"gpus": 2})
    text = printed(capsys, write(tmp_path / "a.json", *FOUR), write(tmp_path / "b.json", faster, row(rate=1000.0)))
    assert cells(text, "res_256_pretrain")[2] == "1,400" and f"{tmp_path / 'b.json'})" in text


def test_without_a_row_for_every_stage_there_is_no_total(capsys, tmp_path):
    text = printed(capsys, write(tmp_path / "a.json", *FOUR[:2]), "--dollars_per_gpu_hour", "10")
    assert "not measured" in text and cells(text, "res_512_pretrain")[2:] == ["not", "measured"] * 3
    assert cells(text, "the recipe")[2:] == ["not", "measured"] * 2
    part = sum(HOURS[:2])
    assert cells(text, "the measured 2 of 4") == [f"{part:.1f}", f"${10 * part:,.0f}"]
    assert "predicted efficiency: not measured, as the recipe is" in text and "res_512_pretrain: not measured" in text


@pytest.mark.parametrize(
    "changes, gpu, why",
    [
        ({"parameters": 3_100_000}, H100, "a model of 3,100,000 parameters; the recipe's has 1,165,442,320"),
        ({}, "none", "measured on a CPU"),
        ({"problem": "out of memory at micro-batch 512"}, H100, "out of memory at micro-batch 512"),
        ({"setting": {"precision": "fp32"}}, H100, "in fp32, not bf16"),
        ({"setting": {"fp8": True}}, H100, "in fp8, not bf16"),
        ({"mask_ratio": 0.5}, H100, "no stage of the recipe"),
    ],
)
def test_rows_that_do_not_count_are_told(capsys, tmp_path, changes, gpu, why):
    found = row(setting=changes.get("setting"))
    found = found.with_(**{key: value for key, value in changes.items() if key != "setting"})
    text = printed(capsys, write(tmp_path / "a.json", found, row(kind="ladder"), gpu=gpu))
    assert text.startswith("No GPU: measured rows only") and "$4" not in text
    assert cells(text, "res_256_pretrain")[2:] == ["not", "measured"] * 4
    assert f"Rows that do not count:\n256 px, mask 0.75 ({tmp_path / 'a.json'}): {why}\n" in text


def test_rows_of_one_device_count(capsys, tmp_path):
    reports = [write(tmp_path / "a.json", *FOUR), write(tmp_path / "b.json", row(rate=9e3), gpu="NVIDIA H200")]
    assert f"rows of {H100} and NVIDIA H200: choose one of them with --gpu" in error(capsys, *reports)
    text = printed(capsys, *reports, "--gpu", "h100")
    assert text.startswith(H100) and f"256 px, mask 0.75 ({reports[1]}): measured on NVIDIA H200" in text


def test_nodes_multiply_the_measured_rate_with_a_predicted_efficiency(capsys, tmp_path):
    stages, _ = choose_rows([("a.json", report(*FOUR))], RECIPES)
    text = printed(capsys, write(tmp_path / "a.json", *FOUR))
    assert "measured rate x predicted efficiency" in text
    hours, share = scaled(stages, 16, MACHINES["h100"])
    figures = ["16", f"{share:.0%}", f"{hours:.1f}", f"{hours / 24:.2f}", f"{16 * hours:,.1f}"]
    assert cells(text, "2") == [*figures, f"${60 * hours:,.0f}", f"${32 * hours:,.0f}"]
    (alone,) = choose_rows([("a.json", report(FOUR[0]))], RECIPES[:1])[0]
    rate = {
        gpus: predict(RECIPES[0], Layout(gpus, 2, size, times, triton=True), MACHINES["h100"]).images_per_second / gpus
        for gpus, size, times in ((1, 64, 32), (16, 64, 2), (512, 4, 1))  # 512 GPUs have four images each
    }
    for gpus in (16, 512):
        found, share = scaled([alone], gpus, MACHINES["h100"])
        assert share == pytest.approx(rate[gpus] / rate[1]) and found == pytest.approx(HOURS[0] / share / gpus)
    assert scaled([Stage(tiny_config(), alone.measured)], 16, MACHINES["h100"]) is None  # a batch of 8
    elsewhere = printed(capsys, write(tmp_path / "b.json", *FOUR, gpu="NVIDIA B200"))
    assert "no data sheet of NVIDIA B200 to predict with" in elsewhere and cells(elsewhere, "the recipe")[2] != "not"


# --- precompute


def finished_set(folder, image_size, written, seconds):
    """Of one sample, with the report of many."""
    latent, embedding, caption = made_up(0)
    shapes = {"latent_shape": latent.shape, "embedding_shape": embedding.shape, "encoders": ENCODERS}
    with ShardWriter(folder, **shapes, fingerprint={"image_size": image_size}) as writer:
        writer.write("0", latent, embedding, caption)
    found = {"seen": written, "written": written, "rejected": {}}
    (folder / REPORT).write_text(json.dumps(found | ({} if seconds is None else {"seconds": seconds})))
    return ["--precompute", str(folder)]


def test_precompute_is_a_line_of_its_own_from_finished_sets(capsys, tmp_path):
    sets = finished_set(tmp_path / "a/256", 256, 3000, {H100: 20.0})
    sets += finished_set(tmp_path / "b/256", 256, 1000, {H100: 20.0})
    sets += finished_set(tmp_path / "a/512", 512, 500, {H100: 25.0})
    text = printed(capsys, write(tmp_path / "r.json", *FOUR), *sets, "--pictures", "1e6")
    hours = 1e6 * 40 / 4000 / 3600
    assert cells(text, "256 px") == ["1.0", "M", "100", f"{hours:.1f}", f"${hours * 3.75:.0f}", f"${hours * 2:.0f}"]
    assert cells(text, "512 px")[2:4] == ["20", f"{1e6 * 25 / 500 / 3600:.1f}"]
    assert "256 px: 4,000 pictures in 40 GPU-seconds" in text
    assert cells(text, "the recipe")[2] == f"{sum(HOURS):.1f}"  # without them


@pytest.mark.parametrize(
    "seconds, why",
    [(None, "made before times were recorded"), ({"cpu": 3.0, H100: 1.0, "A100": 1.0}, "made on cpu and A100")],
)
def test_sets_that_do_not_tell_are_not_measured(capsys, tmp_path, seconds, why):
    sets = finished_set(tmp_path / "256", 256, 10, seconds)
    text = printed(capsys, write(tmp_path / "r.json", *FOUR), *sets)
    assert cells(text, "256 px") == ["37.0", "M", *["not", "measured"] * 4] and f"{tmp_path / '256'}: {why}" in text
    assert "512 px: no set of this size was given" in text


# --- errors


def error(capsys, *arguments):
    with pytest.raises(SystemExit) as raised:
        cli.run(lambda: cost.main([*arguments]))
    text = capsys.readouterr().err
    assert raised.value.code == 2 and text.startswith("error: ") and len(text.splitlines()) == 1
    return text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.json"], "nowhere.json: cannot read the report"),
        ([], "required: REPORT.json"),
        (["r.json", "--dollars_per_gpu_hour", "0"], "--dollars_per_gpu_hour: 0: expected more than 0"),
        (["r.json", "--recipe", "nowhere.toml"], "nowhere.toml: cannot read the recipe"),
        (["r.json", "--json", "nowhere/cost.json"], "nowhere/cost.json"),
        (["still.json"], "rows.0.measured.images_per_second = 0.0: Input should be greater than 0"),
    ],
)
def test_errors_are_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "r.json", *FOUR)
    still = json.loads((tmp_path / "r.json").read_text())
    still["rows"][0]["measured"]["images_per_second"] = 0.0
    (tmp_path / "still.json").write_text(json.dumps(still))
    assert message in error(capsys, *arguments)


def test_a_set_of_another_size_is_named(capsys, tmp_path):
    sets = finished_set(tmp_path / "64", 64, 10, {H100: 1.0})
    assert "64: is of 64 px; the recipe has 256 and 512" in error(capsys, write(tmp_path / "r.json", *FOUR), *sets)


def test_a_schedule_of_masks_is_a_stage_for_each_ratio():
    mask = {"schedule": "linear", "start": 0.75, "final": 0.0, "share": 0.25, "levels": 1}
    config = RECIPES[0].model_copy(
        update={"training": RECIPES[0].training.model_validate(RECIPES[0].training.model_dump() | {"mask_ratio": mask})}
    )
    stages, _ = choose_rows([("a.json", report(*FOUR))], [config])
    assert [stage.name for stage in stages] == ["res_256_pretrain, mask 0.75", "res_256_pretrain, mask 0"]
    hours = [0.75 * 512e6 / 1250 / 3600, 0.25 * 512e6 / 500 / 3600]
    assert [stage.gpu_hours for stage in stages] == pytest.approx(hours)
