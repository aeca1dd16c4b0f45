"""Damaged recipes and DeepSpeed JSONs: what --dry_run does with them ends in a plan or in one line, never otherwise;
and what it plans, a run can build.

MDIT_DAMAGED_INPUTS says how many of each are tried; 1,500 of each with 37 built of each have passed.
"""

import copy
import json
import os
import tomllib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic_core import to_jsonable_python

from mdit.config import CONFIGS, TrainConfig
from mdit.costs.trace import mean_training_flops
from mdit.diffusion.edm import edm_loss, sample_noise
from mdit.dist import World
from mdit.documents import UserError
from mdit.models import MicroDiT
from mdit.parallel.apply import parallelize
from mdit.parallel.plan import ParallelPlan
from mdit.parallel.settings import BF16, CommsLogger, DeepSpeedJson, FlopsProfiler, RunSettings, ZeRO
from mdit.train.engine import Engine
from mdit.train.optim import learning_rate
from mdit.train.run import dry_run, resolve_run
from tests.recipes import TINY
from tests.training import run_in_processes

TINY_RECIPE = json.dumps({"recipe": {**TINY, "ema": {"decay": 0.9, "start_step": 1}}}, indent=1)
RECIPES = [path.read_text(encoding="utf-8") for path in sorted(CONFIGS.glob("*.toml"))]
JSONS = [path.read_text(encoding="utf-8") for path in sorted(CONFIGS.glob("*.json"))]
ONE = World(0, 1, 0, torch.device("cpu"))
SECTIONS = {"comms_logger": CommsLogger, "flops_profiler": FlopsProfiler, "mdit": RunSettings}
EXAMPLES = int(os.environ.get("MDIT_DAMAGED_INPUTS", 200))
BUILT = EXAMPLES // 50
DAMAGING = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

# Values of every form, right for some key: as numbers, as sizes that nothing can hold, as names, as sections.
VALUES = [None, True, False, 0, -1, 1, 2, 3, 4, 8, 16, 0.5, 0.999, 2.5, -0.0, 5e8, 1e-320, 1e308, float("nan"), 10**6]
VALUES += [10**15, 2**31, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400, "", "x" * 10**5, "a\0b", "\ud800", [], {}]
VALUES += ". .. a/b auto cpu none nvme block constant emoji folder validation é\u2028\x1b[31m".split(" ")
VALUES += [[1], ["a"], [0.5, 2.0], [[[]]], {"a": 1}, {"enabled": True}, {"stage": 3}, {"device": "cpu"}, [None] * 1000]
# Keys that mean something somewhere.
KEYS = """enabled stage device name seed mdit model precompute source weights bf16 __proto__ a.b overlap_comm
    reduce_bucket_size offload_optimizer offload_param comms_logger flops_profiler steps_per_print zenflow optimizer
    fp16 contiguous_gradients train_batch_size zero_allow_untested_optimizer expert_parallel compile kernels
    sub_group_size""".split()
KEYS += ["", " ", "é\n", "x" * 10**4]
SPLICES = [b"\xef\xbb\xbf", b"\xff", b"\0", b"\r\n", b"\n", b"[" * 10**4, b'{"a":' * 10**4, b"9" * 5000, b"a." * 100]
SPLICES += [b"0x" + b"f" * 10**4, *rb'NaN 1e999 - " { } [[ ] , = # \ud800 2024-01-01'.split()]


def tables(values) -> list:
    """All tables and lists inside, the outermost first."""
    found = [values]
    for table in found:
        inside = table.values() if isinstance(table, dict) else table
        found += [value for value in inside if isinstance(value, dict | list) and value]
    return found


def numbers(values) -> list:
    """(table or list, key) of all numbers and truth values inside that are finite and no more than 64 bits."""
    pairs = [
        (table, key) for table in tables(values) for key in (table if isinstance(table, dict) else range(len(table)))
    ]
    return [(table, key) for table, key in pairs if isinstance(table[key], int | float) and abs(table[key]) < 2**64]


@st.composite
def damaged_values(draw, values):
    """A few values other than they were, keys gone, renamed, moved elsewhere, or deeper."""
    values = copy.deepcopy(values)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        table = draw(st.sampled_from(tables(values)))
        keys = list(table) if isinstance(table, dict) else list(range(len(table)))
        key = draw(st.sampled_from(keys)) if keys else None
        match draw(
            st.sampled_from(["near"] * 9 + ["value"] * 3 + ["add"] * 2 + ["gone", "renamed", "moved", "deeper", "many"])
        ):
            case "near" if there := numbers(values):
                table, key = draw(st.sampled_from(there))
                if isinstance(table[key], bool):
                    table[key] = not table[key]
                else:
                    number = table[key] * draw(st.sampled_from([0, 0.5, 0.9, 1.5, 2, 2, 3, 100, -1]))
                    table[key] = int(number) if number == int(number) else number
            case "add" if isinstance(table, dict):
                table[draw(st.sampled_from(KEYS))] = copy.deepcopy(draw(st.sampled_from(VALUES)))
            case "many" if isinstance(table, dict):
                table.update({f"{number}": number for number in range(10**4)})
            case "gone" if keys:
                del table[key]
            case "value" if keys:
                table[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
            case "renamed" if keys and isinstance(table, dict):
                table[draw(st.sampled_from([key[:-1], key + key[-1:], key.upper(), key.replace("_", "")]))] = table.pop(
                    key
                )
            case "moved" if keys and isinstance(table, dict):
                value = table.pop(key)
                draw(st.sampled_from([each for each in tables(values) if isinstance(each, dict)] or [values]))[key] = (
                    value
                )
            case "deeper" if keys:
                for _ in range(draw(st.sampled_from([1, 2, 63, 500]))):
                    table[key] = [table[key]] if draw(st.booleans()) else {str(key): table[key]}
    return values


@st.composite
def furnished(draw, values):
    """With keys of DeepSpeed that a JSON may have, of values near those that it takes."""
    values = copy.deepcopy(values)
    sections = [values["zero_optimization"]] * 4 + [
        values,
        *(values.setdefault(key, {}) for key in ("bf16", *SECTIONS)),
    ]
    schemas = [ZeRO] * 4 + [DeepSpeedJson, BF16, *SECTIONS.values()]
    for section, schema in draw(st.lists(st.sampled_from(list(zip(sections, schemas))), max_size=4)):
        key, field = draw(st.sampled_from(list(schema.model_fields.items())))
        likely = [
            field.default,
            True,
            False,
            1,
            2,
            1000,
            2**40,
            {"device": "cpu"},
            {"device": "none", "pin_memory": False},
        ]
        section[key] = to_jsonable_python(draw(st.sampled_from(likely)), fallback=lambda value: "auto")
    return values


@st.composite
def damaged_text(draw, text: str):
    """A line twice or gone, a few bytes put in, the end cut off."""
    content = text.encode()
    for _ in range(draw(st.integers(1, 2))):
        lines, at = content.splitlines(keepends=True), draw(st.integers(0, len(content)))
        line = draw(st.integers(0, max(0, len(lines) - 1)))
        match draw(st.sampled_from(["twice", "gone", "put", "put", "cut", "swapped"])):
            case "twice":
                content = b"".join(lines[: line + 1] + lines[line:])
            case "gone":
                content = b"".join(lines[:line] + lines[line + 1 :])
            case "put":
                content = content[:at] + draw(st.sampled_from(SPLICES)) + content[at:]
            case "cut":
                content = content[:at]
            case "swapped":
                content = content[:at] + content[at + 1 : at + 2] + content[at : at + 1] + content[at + 2 :]
    return content


def as_json(values) -> bytes:
    return json.dumps(values).encode()


PARSED = [json.loads(TINY_RECIPE)] * 20 + [{"recipe": tomllib.loads(text)} for text in RECIPES]
damaged_recipes = st.one_of(
    st.sampled_from(PARSED).flatmap(damaged_values).map(lambda values: (".json", as_json(values))),
    st.sampled_from(PARSED).flatmap(damaged_values).map(lambda values: (".json", as_json(values))),
    damaged_text(TINY_RECIPE).map(lambda content: (".json", content)),
    st.sampled_from(RECIPES).flatmap(damaged_text).map(lambda content: (".toml", content)),
)
damaged_jsons = st.one_of(
    st.sampled_from(JSONS).map(json.loads).flatmap(furnished).flatmap(damaged_values).map(as_json),
    st.sampled_from(JSONS).map(json.loads).flatmap(furnished).map(as_json),
    st.sampled_from(JSONS).flatmap(damaged_text),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a recipe and a JSON that are whole."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "recipe.json").write_text(TINY_RECIPE, encoding="utf-8")
    (folder / "ds.json").write_text(JSONS[0], encoding="utf-8")
    return folder


def resolved(folder, recipe="recipe.json", ds_json="ds.json", overrides=()):
    """A run, or None for what is told in one line."""
    options = {"overrides": overrides, "run_dir": folder / "run", "init_from": None, "restart": False, "world": ONE}
    try:
        run = resolve_run(folder / recipe, folder / ds_json, **options)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 3000
        return None
    return run


def test_what_is_whole_is_planned(folder):
    assert "data: " in dry_run(resolved(folder))


def test_a_damaged_recipe_is_one_line_or_a_plan_that_can_be_run(folder):
    planned = {}

    @DAMAGING
    @given(damaged=damaged_recipes)
    def plan(damaged):
        suffix, content = damaged
        (folder / f"damaged{suffix}").write_bytes(content)
        run = resolved(folder, recipe=f"damaged{suffix}")
        if run is not None and step_flops(run.config) < 1e9:
            planned[run.config] = run

    plan()
    assert planned
    run_in_processes(step, 1, list(planned.values())[-BUILT:])


def test_a_damaged_json_is_one_line_or_a_plan_that_learns_the_same(folder):
    planned = {}

    @DAMAGING
    @given(content=damaged_jsons)
    def plan(content):
        (folder / "damaged.json").write_bytes(content)
        run = resolved(folder, ds_json="damaged.json")
        if run is not None and not (
            run.execution.settings.compile or run.execution.settings.fp8 or run.execution.dtype == torch.bfloat16
        ):
            planned[json.dumps(run.execution.deepspeed)] = run

    plan()
    assert planned
    (weights,) = run_in_processes(step, 1, list(planned.values())[-BUILT:])
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-6)


def step_flops(config: TrainConfig) -> float:
    return mean_training_flops(config) * config.training.global_batch_size


def step(world: World, runs) -> list[torch.Tensor]:
    """Each run's first step on made-up samples -> all weights after it."""
    return [weights_after_a_step(run) for run in runs]


def weights_after_a_step(run) -> torch.Tensor:
    config, batch = run.config, run.config.training.global_batch_size
    torch.manual_seed(config.seed)
    model = MicroDiT(config.model)
    plan = ParallelPlan.build(run.execution.settings, run.world)
    parallelize(model, run.execution.settings, plan)
    engine = Engine(model, config, run.execution, plan)
    sizes, captions = config.model, (config.model.caption_length, config.model.caption_channels)
    noise = sample_noise(config, 0, slice(0, batch), run.world.device)
    latents = torch.linspace(-1, 1, sizes.latent_channels * sizes.latent_size**2)
    latents = latents.view(sizes.latent_channels, sizes.latent_size, sizes.latent_size)
    engine.set_learning_rate(learning_rate(0, config.training.num_steps, config.optim))
    for rows in engine.micro_batches(batch):
        count = len(range(*rows.indices(batch)))
        inputs = latents.expand(count, *latents.shape), torch.ones(count, *captions)
        engine.backward(edm_loss(engine, *inputs, noise[rows], config.noise))
    engine.step()
    return torch.cat([weight.flatten().cpu() for _, weight in engine.full_weights()])
