"""The DeepSpeed JSON: filled from the recipe, never allowed to contradict it."""

import json

import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)
from hypothesis import given
from hypothesis import strategies as st

from mdit.config import UserError, load_config
from mdit.models import MicroDiT
from mdit.parallel.settings import (
    BF16,
    CommsLogger,
    Execution,
    FlopsProfiler,
    Offload,
    RunSettings,
    ZeRO,
    count_parameters,
    load_ds_json,
)
from mdit.train.engine import check_ds_config
from tests.recipes import tiny_config
from tests.training import REPOSITORY

CONFIG = tiny_config(training={"global_batch_size": 24})


def resolve(ds_json, world_size=2, config=CONFIG, bf16_works=False):
    zero = {"zero_optimization": {"stage": 2}}
    options = dict(processes=world_size, bf16_works=bf16_works, path="ds.json")
    return Execution.resolve({**zero, **ds_json}, config, **options).deepspeed


def error_of(ds_json, **keys):
    with pytest.raises(UserError) as caught:
        resolve(ds_json, **keys)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("ds.json: ")
    return str(caught.value)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_json_resolves(path):
    config = tiny_config(training={"global_batch_size": 64})
    resolved = Execution.resolve(load_ds_json(path), config, processes=2, bf16_works=True, path=path).deepspeed
    check_ds_config(resolved, path)
    assert "auto" not in json.dumps(resolved)
    assert resolved["zero_optimization"]["stage"] == int(path.stem.removeprefix("zero")[0])
    assert resolved["gradient_clipping"] == config.optim.max_grad_norm
    assert resolved["bf16"]["enabled"] is True and resolved["data_types"]["grad_accum_dtype"] == "fp32"
    assert "mdit" not in resolved


def test_auto_bf16_follows_the_machine():
    assert resolve({}, bf16_works=False)["bf16"]["enabled"] is False
    assert resolve({"bf16": {"enabled": True}}, bf16_works=False)["bf16"]["enabled"] is True


@given(st.integers(1, 8), st.integers(1, 12), st.sampled_from(["micro", "steps", "neither"]))
def test_batch_sizes_multiply_to_the_global_batch(world_size, divisor, stated):
    config = tiny_config(training={"global_batch_size": 12 * world_size})
    size = 12 // max(d for d in range(1, divisor + 1) if 12 % d == 0)
    keys = {
        "micro": {"train_micro_batch_size_per_gpu": size},
        "steps": {"gradient_accumulation_steps": size},
        "neither": {},
    }
    got = resolve(keys[stated], world_size=world_size, config=config)
    micro, steps = got["train_micro_batch_size_per_gpu"], got["gradient_accumulation_steps"]
    assert micro * steps * world_size == got["train_batch_size"] == 12 * world_size
    if stated != "neither":
        assert size == (micro if stated == "micro" else steps)


@pytest.mark.parametrize(
    "stage, micro", [("256_pretrain", 256), ("256_finetune", 64), ("512_pretrain", 64), ("512_finetune", 16)]
)
def test_auto_micro_batch_keeps_16384_tokens(stage, micro):
    config = load_config(REPOSITORY / "configs" / f"res_{stage}.toml")
    assert resolve({}, world_size=8, config=config)["train_micro_batch_size_per_gpu"] == micro


def test_auto_micro_batch_fits_the_steps_that_keep_the_most():
    mask = {"schedule": "linear", "start": 0.75, "final": 0.5, "share": 0.1, "levels": 1}
    model, batch = {"latent_size": 128}, 2048  # 4,096 patches
    configs = [
        tiny_config(model=model, training={"global_batch_size": batch, "mask_ratio": ratio}) for ratio in (mask, 0.5)
    ]
    micro, expected = (resolve({}, config=config)["train_micro_batch_size_per_gpu"] for config in configs)
    assert micro == expected == 8


def test_misspelled_key_names_the_near_one():
    assert "gradient_cliping" in (message := error_of({"gradient_cliping": 1.0})) and "gradient_clipping" in message


@pytest.mark.parametrize(
    "ds_json, parts",
    [
        ({"train_batch_size": 32}, ["train_batch_size = 32", "training.global_batch_size", "24"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping = 1.0", "optim.max_grad_norm", "0.25"]),
        ({"train_micro_batch_size_per_gpu": 5}, ["train_micro_batch_size_per_gpu = 5", "12"]),
        ({"train_micro_batch_size_per_gpu": 6, "gradient_accumulation_steps": 4}, ["6", "4", "24"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer", "[optim]"]),
        ({"fp16": {"enabled": True}}, ["fp16", "bf16"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["data_types", "float32"]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ["offload_param.device", "nvme"]),
        ({"bf16": {"enabled": "yes"}}, ["bf16.enabled", "'yes'"]),
        ({"bf16": {"check_grad_overflow": False}}, ["bf16.check_grad_overflow = False", "expected True", "NaN"]),
        ({"zero_optimization": {"stage": 0}}, ["zero_optimization.stage", "0"]),
        ({"zero_optimization": {}}, ["missing key zero_optimization.stage"]),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, ["round_robin_gradients = True", "False"]),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
            ["zero_quantized_gradients", "learned"],
        ),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, ["unknown key zero_optimization.mics_shard_size"]),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}},
            ["zero_hpz_partition_size = 8", "expected 1"],
        ),
    ],
)
def test_contradiction_is_one_line(ds_json, parts):
    message = error_of(ds_json)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "content, parts",
    [
        ('{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 3}}', ["zero_optimization", "2 times"]),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', ["'stage'", "2 and 3"]),
        ('{"zero_optimization": 2}', ["zero_optimization = 2"]),
        ('{"zero_optimization": {"stage": true}}', ["zero_optimization.stage = True"]),
        ('{"zero_optimization": {"stage": "2"}}', ["zero_optimization.stage = '2'"]),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}', ["offload_optimizer = 'cpu'"]),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}}', ["devise", "device?"]),
        ('{"zero_optimization": {"stage": 2, "overlap_com": true}}', ["overlap_com = True", "overlap_comm?"]),
        ('{"zero_optimization": {"stage": 2, "overlap_comm": "yes"}}', ["overlap_comm = 'yes'"]),
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": -5}}', ["reduce_bucket_size = -5"]),
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "5"}}', ["reduce_bucket_size = '5'"]),
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": NaN}}', ["NaN"]),
        ('{"zero_optimization": {"stage": 2, "allgather_bucket_size": 3}}', ["allgather_bucket_size = 3"]),
        ('{"zero_optimization": {"stage": 3, "sub_group_size": 0}}', ["sub_group_size = 0"]),
        ('{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}', ["stage = 2", "offload_param"]),
        ('{"bf16": true, "zero_optimization": {"stage": 2}}', ["bf16 = True"]),
        ('{"bf16": {"foo": 1}, "zero_optimization": {"stage": 2}}', ["bf16.foo = 1"]),
        ('{"bf16": {"bf16_master_weights_and_grads": true}, "zero_optimization": {"stage": 2}}', ["learned"]),
        (
            '{"comms_logger": {"enabeld": true}, "zero_optimization": {"stage": 2}}',
            ["comms_logger.enabeld", "enabled?"],
        ),
        ('{"flops_profiler": {"enabled": 1}, "zero_optimization": {"stage": 2}}', ["flops_profiler.enabled = 1"]),
        (
            '{"flops_profiler": {"output_file": "/x"}, "zero_optimization": {"stage": 2}}',
            ["flops_profiler.output_file"],
        ),
        ('{"flops_profiler": {"module_depth": 50}, "zero_optimization": {"stage": 2}}', ["module_depth = 50"]),
        ('{"steps_per_print": 0, "zero_optimization": {"stage": 2}}', ["steps_per_print = 0"]),
        ('{"zero_force_ds_cpu_optimizer": true, "zero_optimization": {"stage": 2}}', ["zero_force_ds_cpu_optimizer"]),
        ('{"mdit": [], "zero_optimization": {"stage": 2}}', ["mdit = []"]),
        ('{"mdit": {"expert_parallel": 0}, "zero_optimization": {"stage": 2}}', ["mdit.expert_parallel = 0"]),
        ('{"gradient_clipping": 1e999, "zero_optimization": {"stage": 2}}', ["1e999"]),
        ("[" * 10**5, ["nested more than 64 deep"]),
        ("[]", ["expected a JSON object"]),
        ("{}", ["missing key zero_optimization"]),
    ],
    ids=range(30),
)
def test_what_is_wrong_at_any_depth_is_one_line(tmp_path, content, parts):
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        Execution.resolve(load_ds_json(path), CONFIG, processes=1, bf16_works=False, path=path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable() and all(part in message for part in parts), message


def test_what_deepspeeds_own_examples_write_is_taken():
    zero = {"stage": 3, "stage3_prefetch_bucket_size": "auto", "stage3_max_live_parameters": 1e9, "overlap_comm": True}
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}, "offload_param": {"device": "none"}}
    resolved = resolve({"zero_optimization": zero | offload, "steps_per_print": "auto", "train_batch_size": "auto"})
    check_ds_config(resolved, "ds.json")
    kept = {key: value for key, value in (zero | offload).items() if value != "auto"}
    assert resolved["zero_optimization"] == kept | {"reduce_bucket_size": count_parameters(CONFIG.model)}


def test_a_comms_logger_that_is_off_is_off():
    """DeepSpeed takes the section itself for a yes."""
    assert "comms_logger" not in resolve({"comms_logger": {"enabled": False, "verbose": True}})
    assert resolve({"comms_logger": {"enabled": True}})["comms_logger"] == {"enabled": True}


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (ZeRO, DeepSpeedZeroConfig),
        (BF16, DeepSpeedBF16Config),
        (Offload, DeepSpeedZeroOffloadOptimizerConfig),
        (Offload, DeepSpeedZeroOffloadParamConfig),
        (CommsLogger, CommsLoggerConfig),
    ],
)
def test_keys_and_defaults_are_deepspeeds(ours, theirs):
    known = {field.alias or name: field for name, field in theirs.model_fields.items()}
    for name, field in ours.model_fields.items():
        assert name in known, f"DeepSpeed has no {name}"
        if not field.is_required() and (ours, name) != (BF16, "enabled"):  # which follows the machine
            default = known[name].get_default(call_default_factory=True)
            assert field.default == (tuple(default) if isinstance(default, list) else default), name


def test_keys_and_defaults_of_the_flops_profiler_are_deepspeeds():
    theirs = vars(DeepSpeedFlopsProfilerConfig({}))
    assert {name: field.default for name, field in FlopsProfiler.model_fields.items()} == theirs


def test_batch_that_processes_cannot_share():
    message = error_of({}, world_size=5)
    assert "24" in message and "5 processes" in message


def test_zero_section_is_judged_by_deepspeed():
    with pytest.raises(UserError, match="^ds.json: DeepSpeed refuses it: .*overlap_com"):
        check_ds_config({"zero_optimization": {"stage": 2, "overlap_com": True}}, "ds.json")


def test_own_section_is_strict():
    options = dict(processes=1, bf16_works=False, path="ds.json")
    ds_json = {"zero_optimization": {"stage": 1}, "mdit": {"compile": True}}
    assert Execution.resolve(ds_json, CONFIG, **options).settings.compile
    assert "unknown key mdit.compil = True (did you mean compile?)" in error_of({"mdit": {"compil": True}})


def test_unreadable_json(tmp_path):
    with pytest.raises(UserError, match="absent.json"):
        load_ds_json(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="bad.json: not valid JSON"):
        load_ds_json(tmp_path / "bad.json")


def test_options_that_cut_partitions_are_part_of_a_checkpoints_layout():
    plain, cut = (
        Execution(RunSettings(), resolve({"zero_optimization": {"stage": 3, **options}})).layout(1)
        for options in ({}, {"sub_group_size": 1000})
    )
    assert plain != cut and plain["zero_stage"] == cut["zero_stage"] == 3


def test_the_bucket_is_no_larger_than_the_model_unless_the_json_says_so():
    config = tiny_config()
    numbers = sum(p.numel() for p in MicroDiT(config.model).parameters())
    found = [
        resolve({"zero_optimization": {"stage": 2, **keys}}, config=config)["zero_optimization"]
        for keys in ({}, {"reduce_bucket_size": 7_000}, {"reduce_bucket_size": 2**62})
    ]
    assert [zero["reduce_bucket_size"] for zero in found] == [numbers, 7_000, numbers]
    large = load_config(REPOSITORY / "configs" / "res_256_pretrain.toml")
    assert resolve({}, world_size=8, config=large)["zero_optimization"]["reduce_bucket_size"] == 500_000_000
