"""The command lines of the README: the first as typed, those after it in forked processes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mdit.eval.samples import grid
from tests.processes import run_forked
from tests.training import REPOSITORY, environment, launch

# The quickstart's own recipe, smaller in every number; its sets are not the checkout's, which `make train` takes.
SMALL = [
    'data.train=["data/train"]', 'data.validation="data/validation"',
    "data.precompute.source.objects=4", "data.precompute.source.scenes=48",
    "data.precompute.source.validation_scenes=8",
    "model.dim=32", "model.depth=2", "model.head_dim=8", "model.multiple_of=16", "model.mixer_dim=16",
    "model.mixer_depth=2", "training.num_steps=4", "training.global_batch_size=8", "report.log_every=2",
    "report.validate_every=4", "report.sample_every=4", "report.num_samples=4", "report.sampler_steps=2",
]  # fmt: skip


def run(*arguments: str, cwd: Path, timeout: int = 200) -> str:
    done = subprocess.run(arguments, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_script(script: str, *arguments: str, cwd: Path, env: dict | None = None) -> str:
    """A Python file of the repository, run in `cwd` -> what it printed."""
    ended = run_forked(_launch_in, cwd, str(REPOSITORY / script), list(map(str, arguments)), env=env)
    assert ended.returncode == 0, ended.output
    return ended.output


def _launch_in(folder: Path, script: str, arguments: list[str]) -> None:
    os.chdir(folder)
    sys.path.insert(0, str(Path(script).parent))
    launch(script, arguments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`deepspeed launchers/train.py --ds_config configs/zero2.json`, on emoji scenes that it makes itself."""
    folder = tmp_path_factory.mktemp("launch")
    for name in ("launchers", "configs"):
        (folder / name).symlink_to(REPOSITORY / name)
    sets = [part for item in SMALL for part in ("--set", item)]
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    output = run(deepspeed, "launchers/train.py", "--ds_config", "configs/zero2.json", *sets, cwd=folder)
    return folder, output


def test_run_directory_holds_everything(trained):
    folder, output = trained
    run_dir = folder / "runs" / "quickstart"
    recorded = json.loads((run_dir / "config.json").read_text())
    assert recorded["recipe"]["training"]["num_steps"] == 4
    assert recorded["deepspeed"]["zero_optimization"]["stage"] == 2
    assert {"torch", "deepspeed", "python", "mdit"} <= recorded["versions"].keys()
    assert (run_dir / "samples" / "step_00000004.png").stat().st_size > 1000
    assert (run_dir / "snapshots" / "latest" / "ema.safetensors").exists()
    assert "images/s" in output, "the progress bar"


def test_tensorboard_has_every_scalar_and_the_grid(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[0] / "runs" / "quickstart" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss", "train/learning_rate", "train/mask_ratio", "train/gradient_norm", "train/skipped_steps",
        "train/images_per_second", "train/step_seconds", "train/data_wait_share", "train/memory_gib",
        "train/slowest_rank",
        "validation/validation_loss", "validation/tokens_without_expert", "validation/expert_imbalance",
        "validation/router_weight",
    }  # fmt: skip
    assert [image.step for image in events.Images("samples")] == [4]


def test_sample_and_evaluate(trained):
    folder, _ = trained
    snapshot, prompts = "runs/quickstart/snapshots/latest", ["a red apple on a blue background", "a banana on white"]
    asked = [part for prompt in prompts for part in ("--prompt", prompt)]
    options = ["--guidance", "2.5", "--num_steps", "18", "--seed", "0"]
    run_script("launchers/sample.py", "--snapshot", snapshot, *asked, "--out", "grid.png", *options, cwd=folder)
    run_script("examples/generate.py", snapshot, *prompts, cwd=folder)
    pictures = [Image.open(folder / f"picture_{i}.png") for i in range(2)]
    with Image.open(folder / "grid.png") as drawn:
        assert drawn.tobytes() == grid(pictures, prompts).tobytes(), "the same from Python"
        assert json.loads(drawn.text["prompt"]) == prompts
    command = ["launchers/sample.py", "--snapshot", snapshot, *asked, "--out", "pictures", *options]
    assert "2 pictures" in run_script(*command, cwd=folder)
    (folder / "pictures" / "00000.png").unlink()
    assert "1 pictures" in (told := run_script(*command, cwd=folder)) and "1 there already" in told
    for number, picture in enumerate(pictures):
        drawn = Image.open(folder / "pictures" / f"{number:05d}.png")
        assert drawn.tobytes() == picture.tobytes() and drawn.text["prompt"] == prompts[number]
    assert json.loads(drawn.text["mdit"])["seed"] == 0
    options = ["--out", "evaluation", "--num_pictures", "4", "--num_steps", "2"]
    output = run_script("launchers/evaluate.py", "--snapshot", snapshot, *options, cwd=folder)
    assert "grid.png" in output and "background" in output
    assert json.loads((folder / "evaluation" / "scores.json").read_text())


def test_notebook(trained):
    """Its code as it stands, but for the run's settings."""
    folder, _ = trained
    cells = json.loads((REPOSITORY / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code), "outputs are stripped"
    program = "\n".join("".join(cell["source"]) for cell in code)
    small = "\n".join(('name="notebook"', *SMALL))
    program, count = re.subn('settings = """.*?"""', lambda _: f'settings = """{small}"""', program, flags=re.DOTALL)
    assert count == 1
    (folder / "notebook.py").write_text(
        f"import matplotlib\nmatplotlib.use('Agg')\n{program}\nassert len(pictures) == 2"
    )
    run_script(folder / "notebook.py", cwd=folder)


def test_run_config_is_itself_a_recipe(trained):
    folder, _ = trained
    output = run_script("launchers/train.py", "--recipe", "runs/quickstart/config.json", "--dry_run", cwd=folder)
    assert '"num_steps": 4' in output and "at step 4" in output


@pytest.mark.skipif("SLURM_JOB_ID" in os.environ, reason="inside a Slurm job already")
def test_start_under_srun_variables(trained):
    """What srun sets for the one task of a step is enough to start; a finished run needs no second one."""
    folder, _ = trained
    slurm = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}
    sets = [part for item in SMALL for part in ("--set", item)]
    assert "finished at step 4" in run_script("launchers/train.py", *sets, cwd=folder, env=slurm)
