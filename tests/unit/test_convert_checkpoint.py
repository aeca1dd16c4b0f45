import importlib.util
import os
from pathlib import Path

import pytest
import torch

from mdit.config import UserError
from mdit.models import MicroDiT
from mdit.models.presets import tiny_2, xl_2
from mdit.snapshot import load_model, load_snapshot
from tests.released import released

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "tools" / "convert_checkpoint.py")
convert = importlib.util.module_from_spec(spec)
spec.loader.exec_module(convert)


def miniature(latent_size=32, **changes):
    sizes = dict(dim=32, depth=2, head_dim=16, multiple_of=16, mixer_depth=2, mixer_dim=16, caption_channels=24)
    return tiny_2(latent_size, **{**sizes, **changes})


@pytest.fixture(autouse=True)
def known_sizes(monkeypatch):
    monkeypatch.setitem(convert.PRESETS, "miniature", miniature)


def released_weights(**changes):
    torch.manual_seed(0)
    model = MicroDiT(miniature(**changes))
    return {name: t + 0.01 * torch.randn_like(t) for name, t in model.state_dict().items()}


def import_file(tmp_path, content):
    torch.save(content, tmp_path / "released.pt")
    convert.import_checkpoint(tmp_path / "released.pt", tmp_path / "snapshot")
    return load_snapshot(tmp_path / "snapshot")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in expected.items())


def test_round_trip_is_bit_exact(tmp_path):
    weights = released_weights()
    snapshot = import_file(tmp_path, weights)
    assert_same(load_model(snapshot).state_dict(), weights)
    convert.export_checkpoint(tmp_path / "snapshot", tmp_path / "back.pt", "ema")
    assert_same(torch.load(tmp_path / "back.pt", weights_only=True), weights)


@pytest.mark.parametrize("prefix", ["dit.", "state.model.dit."])
def test_other_networks_are_left_out_and_counted(tmp_path, capsys, prefix):
    weights = released_weights()
    others = {"vae.encoder.conv_in.weight": torch.zeros(3), "text_encoder.ln.bias": torch.zeros(2)}
    snapshot = import_file(tmp_path, {**{prefix + name: t for name, t in weights.items()}, **others})
    assert_same(snapshot.weights(), weights)
    assert "2 entries of other networks" in capsys.readouterr().out


def test_composer_checkpoint(tmp_path):
    weights = released_weights()
    model = {**{f"dit.{name}": t for name, t in weights.items()}, "vae.x": torch.zeros(1)}
    assert_same(import_file(tmp_path, {"state": {"model": model, "timestamp": {"batch": 7}}}).weights(), weights)


def test_channels_resolution_and_recipe_are_recognised(tmp_path):
    snapshot = import_file(tmp_path, released_weights(latent_size=64, latent_channels=16))
    assert snapshot.config.model == miniature(latent_size=64, latent_channels=16)
    assert snapshot.config.name == "res_512_finetune" and snapshot.config.ema is None
    assert snapshot.config.noise.P_std == 0.6
    assert snapshot.encoders["image"]["id"] == "ostris/vae-kl-f8-d16"
    assert snapshot.encoders["text"]["id"].startswith("openclip:") and snapshot.encoders["text"]["channels"] == 24


@pytest.mark.parametrize("size, preset", [("xl_2", xl_2), ("tiny_2", tiny_2)])
def test_published_shapes_are_recognised(size, preset):
    weights = {name: torch.empty(shape, device="meta") for name, shape in released(size).items()}
    assert convert.recognise(weights, "x.pt") == (size, preset(32))


def test_shapes_that_do_not_fit_are_named(tmp_path):
    weights = released_weights()
    weights["blocks.1.cross_attn.kv_linear.weight"] = torch.zeros(64, 31)
    with pytest.raises(UserError, match=r"\(miniature\): blocks.1.cross_attn.kv_linear.weight has shape \(64, 31\)"):
        import_file(tmp_path, weights)
    assert not (tmp_path / "snapshot").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ({"x_embedder.proj.weight": torch.zeros(5, 4, 2, 2)}, "has no y_embedder.y_proj.fc1.weight"),
        ({"model": torch.zeros(2)}, "x_embedder.proj.weight occurs 0 times"),
        ([torch.zeros(2)], "holds a list"),
        ({0: torch.zeros(2), "state": 1}, "x_embedder.proj.weight occurs 0 times"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        import_file(tmp_path, content)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_needs_unpickling_is_refused_and_not_run(tmp_path):
    with pytest.raises(UserError, match="released.pt: refused, since it is no plain .* it would run posix.mkdir"):
        import_file(tmp_path, {**released_weights(), "extra": Malicious(tmp_path / "attacked")})
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_damaged_files_are_refused(tmp_path, content):
    (tmp_path / "released.pt").write_bytes(content)
    with pytest.raises(UserError, match="released.pt: refused"):
        convert.import_checkpoint(tmp_path / "released.pt", tmp_path / "snapshot")


def test_nothing_is_overwritten(tmp_path):
    import_file(tmp_path, released_weights())
    with pytest.raises(UserError, match="snapshot: exists already"):
        convert.import_checkpoint(tmp_path / "released.pt", tmp_path / "snapshot")
