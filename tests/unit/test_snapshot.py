import json
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mdit.checkpoint.snapshot import initial_weights, load_model, load_snapshot, save_snapshot, seal_snapshot
from mdit.config import CONFIGS, UserError, load_config
from mdit.files import checksum
from mdit.models import MicroDiT

PAPER_32 = CONFIGS / "paper_32.toml"
ENCODERS = {"image": {"id": "pixels"}, "text": {"id": "minilm", "max_tokens": 4, "channels": 12}}
SMALL = [
    "model.latent_size=8",
    "model.dim=32",
    "model.depth=2",
    "model.head_dim=16",
    "model.multiple_of=16",
    "model.caption_length=4",
    "model.caption_channels=12",
    "model.mixer_dim=16",
    "model.patch_size=2",
]


def small_config(*overrides):
    return load_config(PAPER_32, [*SMALL, *overrides])


def weights_of(config, seed):
    torch.manual_seed(seed)
    model = MicroDiT(config.model)
    return {name: t + 0.01 * torch.randn_like(t) for name, t in model.state_dict().items()}


def save(directory, config, step=1000, **changes):
    values = dict(raw=weights_of(config, 0), ema=weights_of(config, 1), encoders=ENCODERS)
    recipe = config.model_dump(mode="json", exclude_none=True)
    path = directory / f"step_{step:08d}"
    save_snapshot(path, step=step, config_json={"recipe": recipe}, latest=directory / "latest", **{**values, **changes})
    return path


def record(path, *names):
    """Write into checksums.json what files are now."""
    checksums = json.loads((path / "checksums.json").read_text(encoding="utf-8"))
    for name in names:
        checksums[name] = {"bytes": (path / name).stat().st_size, "xxh3": checksum(path / name)}
    (path / "checksums.json").write_text(json.dumps(checksums), encoding="utf-8")


def load_all(path):
    snapshot = load_snapshot(path)
    return snapshot, snapshot.weights("raw"), snapshot.weights("ema")


def test_what_was_saved_is_loaded_bit_for_bit(tmp_path):
    config = small_config()
    assert save(tmp_path / "snapshots", config) == tmp_path / "snapshots" / "step_00001000"
    snapshot = load_snapshot(tmp_path / "snapshots" / "latest")
    assert (snapshot.step, snapshot.config, snapshot.encoders) == (1000, config, ENCODERS)
    assert snapshot.path == tmp_path / "snapshots" / "step_00001000"
    for kind, seed in (("raw", 0), ("ema", 1)):
        model = load_model(snapshot, kind)
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        expected, found = weights_of(config, seed), model.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_config_of_a_snapshot_is_a_recipe(tmp_path):
    config = small_config()
    assert load_config(save(tmp_path, config) / "config.json") == config


def test_ema_falls_back_to_raw_only_when_the_recipe_has_none(tmp_path):
    with_ema = small_config()
    without = with_ema.model_copy(update={"ema": None})
    raw = load_snapshot(save(tmp_path / "a", without, ema=None)).weights("ema")
    assert torch.equal(raw["blocks.0.attn.qkv.weight"], weights_of(without, 0)["blocks.0.attn.qkv.weight"])
    with pytest.raises(UserError, match="ema.safetensors"):
        load_snapshot(save(tmp_path / "b", with_ema, ema=None)).weights("ema")


def test_not_a_snapshot(tmp_path):
    save(tmp_path / "snapshots", small_config())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a snapshot: it has no encoders.json; did you mean .*snapshots/latest\?"):
        load_snapshot(tmp_path)


def test_damaged_files_are_named(tmp_path):
    path = save(tmp_path, small_config())
    (path / "raw.safetensors").write_bytes((path / "raw.safetensors").read_bytes()[:-1])
    with pytest.raises(UserError, match="raw.safetensors: damaged or changed"):
        load_snapshot(path)  # a size is seen without reading
    record(path, "raw.safetensors")
    with pytest.raises(UserError, match="raw.safetensors: cannot read"):
        load_snapshot(path).weights("raw")
    (path / "encoders.json").write_text('{"image": ')
    with pytest.raises(UserError, match="encoders.json: damaged or changed"):
        load_snapshot(path)
    record(path, "encoders.json")
    with pytest.raises(UserError, match="encoders.json: not valid JSON"):
        load_snapshot(path)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return save(tmp_path_factory.mktemp("snapshots"), small_config())


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_an_error_that_names_its_file(written, data):
    file = written / data.draw(st.sampled_from(sorted(path.name for path in written.iterdir())))
    content = file.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    file.write_bytes(damaged)
    try:
        with pytest.raises(UserError, match=rf"{file.name}|checksums.json"):
            load_all(written)
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize("content", ["[]", "3", '{"config.json": 1}', "{}", '{"raw.safetensors": {"bytes": 1}}'])
def test_odd_checksums_are_one_line(tmp_path, content):
    path = save(tmp_path, small_config())
    (path / "checksums.json").write_text(content)
    with pytest.raises(UserError, match="checksums.json: does not give bytes and xxh3 of config.json"):
        load_snapshot(path)


def test_documents_edited_on_purpose_are_sealed_and_weights_are_not(tmp_path):
    path = save(tmp_path, small_config())
    edited = ENCODERS | {"image": {"id": "/elsewhere/autoencoder", "scale": 0.5, "shift": 0.0}}
    (path / "encoders.json").write_text(json.dumps(edited))
    with pytest.raises(UserError, match="encoders.json: damaged or changed: .*tools/convert_checkpoint.py seal"):
        load_snapshot(path)
    seal_snapshot(tmp_path / "latest")
    assert load_snapshot(path).encoders == edited
    (path / "encoders.json").write_text('{"image": {"id": "pixels"}, "text": {"id": 5}}')
    with pytest.raises(UserError, match="encoders.json: .*text.id"):
        seal_snapshot(path)
    (path / "encoders.json").write_text(json.dumps(edited))
    seal_snapshot(path)
    raw = path / "raw.safetensors"
    raw.write_bytes(raw.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="raw.safetensors: damaged or changed"):
        seal_snapshot(path)


@pytest.mark.parametrize("kind", ["raw", "ema"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_written(tmp_path, kind, number):
    config = small_config()
    save(tmp_path, config, step=1)
    weights = weights_of(config, 0)
    weights["blocks.1.norm2.weight"][7] = number
    message = f"step_00000002: not written: {kind} weights: blocks.1.norm2.weight is not finite"
    with pytest.raises(UserError, match=message):
        save(tmp_path, config, step=2, **{kind: weights})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda w: w["x_embedder.proj.weight"].view(-1)[3:4].fill_(math.nan), "x_embedder.proj.weight is not finite"),
        (lambda w: w["pos_embed"].view(-1)[-1:].fill_(-math.inf), "pos_embed is not finite"),
        (lambda w: w.update(mask_token=w["mask_token"].half()), "mask_token is of torch.float16, not of torch.float32"),
        (lambda w: w.pop("blocks.1.norm2.weight"), r"has no blocks.1.norm2.weight.*\(32,\)"),
        (lambda w: w.update(extra=torch.zeros(3)), r"extra \(3,\) belongs to no part"),
        (
            lambda w: w.update({"blocks.1.norm2.weight": torch.zeros(16)}),
            r"blocks.1.norm2.weight has shape \(16,\), the recipe's model needs \(32,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_their_recipe(tmp_path, damage, message):
    config = small_config()
    path, weights = save(tmp_path, config), weights_of(config, 0)
    damage(weights)
    save_file(weights, path / "raw.safetensors")
    record(path, "raw.safetensors")
    with pytest.raises(UserError, match=rf"raw.safetensors: {message}"):
        load_snapshot(path).weights("raw")


def test_initial_weights_are_the_ema(tmp_path):
    config = small_config()
    weights = initial_weights(load_snapshot(save(tmp_path, config)), config.model)
    assert weights.keys() == MicroDiT(config.model).state_dict().keys()
    assert torch.equal(weights["pos_embed"], weights_of(config, 1)["pos_embed"])


@pytest.mark.parametrize("change", ["model.latent_size=16", "model.pos_interp_scale=2.0"])
def test_position_embedding_is_left_out_at_another_resolution(tmp_path, change):
    new = small_config(change).model
    weights = initial_weights(load_snapshot(save(tmp_path, small_config())), new)
    missing, unexpected = MicroDiT(new).load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["pos_embed"], [])


def test_another_model_is_refused_by_key_and_values(tmp_path):
    snapshot = load_snapshot(save(tmp_path, small_config()))
    other = small_config("model.depth=3", "model.head_dim=8").model
    with pytest.raises(UserError, match=r"model.depth is 2, the new recipe's is 3; model.head_dim is 16.* is 8"):
        initial_weights(snapshot, other)
    initial_weights(snapshot, small_config("model.capacity_factor=1.0").model)  # changes no weight


def test_the_recipe_is_checked(tmp_path):
    path = save(tmp_path, small_config())
    content = json.loads((path / "config.json").read_text())
    content["recipe"]["model"]["dpth"] = 3
    (path / "config.json").write_text(json.dumps(content))
    record(path, "config.json")
    with pytest.raises(UserError, match="config.json: unknown key model.dpth"):
        load_snapshot(path)


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o027, 0o640)])
def test_others_may_read_weights_as_far_as_the_umask_lets_them(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        path = save(tmp_path, small_config())
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {mode}
