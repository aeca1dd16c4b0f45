import errno
import functools
import math
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdit import cli
from mdit.checkpoint.released import CAPTION_LAYER, FIRST_LAYER, PRESETS, import_released, recognise
from mdit.checkpoint.snapshot import load_model, load_snapshot
from mdit.config import UserError
from mdit.models import MicroDiT
from mdit.models.presets import tiny_2, xl_2
from tests.released import released
from tools import convert_checkpoint as convert


def miniature(latent_size=32, **changes):
    sizes = dict(dim=32, depth=2, head_dim=16, multiple_of=16, mixer_depth=2, mixer_dim=16, caption_channels=24)
    return tiny_2(latent_size, **{**sizes, **changes})


@pytest.fixture(autouse=True)
def known_sizes(monkeypatch):
    monkeypatch.setitem(PRESETS, "miniature", miniature)


def released_weights(**changes):
    torch.manual_seed(0)
    model = MicroDiT(miniature(**changes))
    return {name: t + 0.01 * torch.randn_like(t) for name, t in model.state_dict().items()}


def import_file(tmp_path, content):
    if isinstance(content, bytes):
        (tmp_path / "released.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "released.pt")
    import_released(tmp_path / "released.pt", tmp_path / "snapshot")
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


@pytest.mark.parametrize(
    "prefix, wrap",
    [
        ("dit.", lambda model: model),
        ("state.model.dit.", lambda model: model),
        ("dit.", lambda model: {"state": {"model": model, "timestamp": {"batch": 7}}}),  # Composer's
    ],
)
def test_other_networks_are_left_out_and_counted(tmp_path, prefix, wrap):
    weights = released_weights()
    others = {"vae.encoder.conv_in.weight": torch.zeros(3), "text_encoder.ln.bias": torch.zeros(2)}
    torch.save(wrap({**{prefix + name: t for name, t in weights.items()}, **others}), tmp_path / "released.pt")
    assert "2 entries of other networks" in import_released(tmp_path / "released.pt", tmp_path / "snapshot")
    assert_same(load_snapshot(tmp_path / "snapshot").weights(), weights)


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
    assert recognise(weights, "x.pt") == (size, preset(32))


@pytest.mark.parametrize(
    "content, message",
    [
        ({"x_embedder.proj.weight": torch.zeros(5, 4, 2, 2)}, "has no y_embedder.y_proj.fc1.weight"),
        ({"model": torch.zeros(2)}, "x_embedder.proj.weight occurs 0 times"),
        ([torch.zeros(2)], "holds a list"),
        ({0: torch.zeros(2), "state": 1}, "x_embedder.proj.weight occurs 0 times"),
        (b"", "released.pt: refused"),
        (b"not a checkpoint", "released.pt: refused"),
        (b"\x80\x02]q\x00" + b"(" * 10_000 + b".", "released.pt: refused"),
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


def test_nothing_is_overwritten(tmp_path):
    import_file(tmp_path, released_weights())
    with pytest.raises(UserError, match="snapshot: exists already"):
        import_released(tmp_path / "released.pt", tmp_path / "snapshot")


POSITION, NORM, KV = "pos_embed", "blocks.1.norm2.weight", "blocks.1.cross_attn.kv_linear.weight"


@pytest.mark.parametrize(
    "name, change, message",
    [
        (NORM, lambda t: t * math.nan, f"{NORM} is not finite"),
        (NORM, lambda t: t + math.inf, f"{NORM} is not finite"),
        (NORM, lambda t: t.to(torch.complex64), f"{NORM} is of torch.complex64"),
        (NORM, lambda t: t.to(torch.int8), f"{NORM} is of torch.int8"),
        (NORM, lambda t: t.double(), f"{NORM} is of torch.float64"),
        (NORM, lambda t: t.to_sparse(), f"{NORM} is no plain tensor"),
        (NORM, lambda t: t.to("meta"), f"{NORM} is no plain tensor"),
        (NORM, lambda t: "text", f"has no {NORM}"),
        (KV, lambda t: t[:, :31], r"blocks.1.cross_attn.kv_linear.weight has shape \(64, 31\)"),
        (POSITION, lambda t: t[0], "pos_embed has shape .*, and 3 dimensions in a MicroDiT"),
        (POSITION, lambda t: t[:, :0], "pos_embed is of latents 0 wide"),
        (POSITION, lambda t: t[:, :1].expand(1, 10**12, -1), "pos_embed is of latents 2000000 wide"),
        (FIRST_LAYER, lambda t: torch.tensor(1.0), "x_embedder.proj.weight has shape"),
        (FIRST_LAYER, lambda t: t[:, :0], r"no miniature: .*latent_channels"),
        (CAPTION_LAYER, lambda t: t[:, :0], r"no miniature: .*caption_channels"),
    ],
)
def test_odd_tensors_are_one_line_and_nothing_is_written(tmp_path, name, change, message):
    weights = released_weights()
    weights[name] = change(weights[name])
    with pytest.raises(UserError, match=f"released.pt.*: {message}"):
        import_file(tmp_path, weights)
    assert not (tmp_path / "snapshot").exists()


def test_the_files_name_need_not_be_text(tmp_path):
    source = tmp_path / "re\udcfflea\nsed.pt"
    torch.save(released_weights(), source)
    import_released(source, tmp_path / "snapshot")
    load_snapshot(tmp_path / "snapshot")


def test_half_precision_is_taken_as_it_is(tmp_path):
    weights = {name: t.bfloat16() if t.ndim > 1 else t.half() for name, t in released_weights().items()}
    assert_same(import_file(tmp_path, weights).weights(), {name: t.float() for name, t in weights.items()})


@pytest.fixture(scope="module")
def files_of_weights(tmp_path_factory):
    """The same weights in PyTorch's two formats."""
    folder, weights = tmp_path_factory.mktemp("files"), released_weights()
    torch.save(weights, folder / "zip.pt")
    torch.save(weights, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    return weights, [(folder / f"{name}.pt").read_bytes() for name in ("zip", "legacy")]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_or_gives_the_same_weights(tmp_path, files_of_weights, data):
    """A byte changed anywhere, or the end cut off. (PyTorch's older format has no checksums of its numbers.)"""
    weights, (zipped, legacy) = files_of_weights
    content = data.draw(st.sampled_from([zipped, legacy]))
    place = data.draw(st.integers(0, len(content) - 1))
    cut, byte = data.draw(st.booleans()), data.draw(st.integers(0, 255))
    damaged = content[:place] if cut else content[:place] + bytes([byte]) + content[place + 1 :]
    (tmp_path / "damaged.pt").write_bytes(damaged)
    shutil.rmtree(tmp_path / "snapshot", ignore_errors=True)
    try:
        import_released(tmp_path / "damaged.pt", tmp_path / "snapshot")
    except UserError as error:
        assert "damaged.pt" in str(error)
        return
    if content is zipped:
        assert_same(load_snapshot(tmp_path / "snapshot").weights(), weights)


def test_export_replaces_a_file_only_when_told_to_and_then_all_of_it(tmp_path, monkeypatch):
    weights = released_weights()
    import_file(tmp_path, weights)
    out = tmp_path / "back.pt"
    out.write_bytes(b"precious")
    with pytest.raises(UserError, match="back.pt: exists already; --overwrite"):
        convert.export_checkpoint(tmp_path / "snapshot", out, "raw")

    def full_disk(content, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full_disk)
        with pytest.raises(OSError):
            convert.export_checkpoint(tmp_path / "snapshot", out, "raw", overwrite=True)
    assert out.read_bytes() == b"precious" and not list(tmp_path.glob(".*"))
    convert.export_checkpoint(tmp_path / "snapshot", out, "raw", overwrite=True)
    assert_same(torch.load(out, weights_only=True), weights)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_pytorchs_own_account_of_a_full_disk_is_an_os_error():
    with pytest.raises(OSError, match="No space left on device"), open("/dev/full", "wb") as file:
        convert.save_pickled(released_weights(), file)


def test_the_command_ends_in_one_line(tmp_path, capsys):
    import_file(tmp_path, released_weights())
    snapshot, out = str(tmp_path / "snapshot"), str(tmp_path / "nowhere" / "x.pt")
    capsys.readouterr()
    for arguments, line in (
        (["import", str(tmp_path / "absent.pt"), out], f"error: {tmp_path}/absent.pt: No such file or directory"),
        (
            ["import", str(tmp_path), out],
            f"error: {tmp_path}: is a directory and no pipeline: it has no model_index.json",
        ),
        (["export", snapshot, out], f"error: {out}: No such file or directory"),
        (["export", snapshot, snapshot], f"error: {snapshot}: Is a directory"),
        (["seal", str(tmp_path)], f"error: {tmp_path}: not a snapshot: it has no config.json"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.run(functools.partial(convert.main, arguments))
        assert (stop.value.code, capsys.readouterr().err) == (2, line + "\n")
    convert.main(["seal", snapshot])
    assert capsys.readouterr().out == snapshot + "\n"
