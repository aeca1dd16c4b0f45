"""A run that changes its layout at every stop goes on as one that was never stopped."""

import pytest

from tests.training import read_metrics, train, write_ds_json, write_recipe

# (processes, ZeRO stage, the "mdit" section, more of "zero_optimization"): every layout is left for another one, and
# entered from another one: every stage, of 1, 2 and 4 processes and of experts over none, 2 and all of them.
EP2, EP4, TP2 = {"expert_parallel": 2}, {"expert_parallel": 4}, {"tensor_parallel": 2}
CHAIN = [
    (1, 1, {}), (4, 2, EP4), (2, 3, {}), (4, 1, EP2), (1, 3, {}), (2, 2, EP2), (4, 3, {}), (2, 1, {}), (4, 2, EP2),
    (1, 2, {}), (4, 1, EP4), (2, 2, {}),
]  # fmt: skip
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
WITH_OPTIONS = [
    (2, 2, EP2, OFFLOADED), (2, 3, {}, {**OFFLOADED, "offload_param": {"device": "cpu"}}),
    (1, 2, {}, OFFLOADED), (2, 3, {}, {"sub_group_size": 3000}),
    (2, 2, {}, {"overlap_comm": True, "reduce_bucket_size": 1000}),
    (2, 1, {"expert_parallel": 2, "activation_checkpointing": "block"}),
]  # fmt: skip
WITH_TENSORS = [(2, 1, TP2), (4, 2, EP2), (4, 2, TP2), (2, 3, {})]
STEPS = 2  # of each
STEADY = {"schedule": "constant", "final_lr_ratio": 1.0, "eps": 1e-5}  # see test_same_curve.py


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = write_recipe(folder, model={"mixer_dim": 16}, training={"num_steps": STEPS * len(CHAIN)}, optim=STEADY)
    train(recipe, write_ds_json(folder / "ds.json"), folder / "run")
    return recipe, folder / "run"


@pytest.mark.parametrize("chain", [CHAIN, WITH_OPTIONS, WITH_TENSORS], ids=["experts", "options", "tensors"])
def test_every_layout_goes_on_from_every_other(undisturbed, tmp_path, chain):
    if chain is WITH_TENSORS:
        pytest.importorskip("megatron.core")
    recipe, expected = undisturbed
    for i, (processes, stage, settings, *options) in enumerate(chain):
        zero = {"stage": stage, **(options[0] if options else {})}
        ds_json = write_ds_json(tmp_path / "ds.json", zero_optimization=zero, mdit=settings)
        stop = f"training.num_steps={STEPS * (i + 1)}"
        output = train(recipe, ds_json, tmp_path / "run", "--set", stop, processes=processes)
        assert i == 0 or f"resuming at step {STEPS * i} " in output
        assert i == 0 or output.count("taken over tensor by tensor") == 1
    ours, theirs = (read_metrics(run, "loss") for run in (tmp_path / "run", expected))
    assert ours == pytest.approx({step: theirs[step] for step in ours}, rel=1e-6)
