"""The launcher that makes sets: killed at random moments, several at once, on real sources; and what it refuses."""

import errno
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from launchers import precompute
from mdit import cli
from mdit.data.shards import open_dataset, read_samples
from mdit.sources import storage
from tests.picture_sets import contents, png
from tests.processes import fork_server
from tests.towers import save_autoencoder
from tests.training import REPOSITORY, environment
from tests.unit.test_sources import write_folder, write_tar
from tests.unit.test_sources_mds import LATENTS, latents, write_mds

LAUNCHER = REPOSITORY / "launchers" / "precompute.py"
TARS, PER_TAR = 20, 12
ENCODERS = ["--image_encoder", "pixels", "--text_encoder", "minilm", "--caption_length", "12"]


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """Tars of pictures; in each, one is too small for 16 pixels, one is torn and one has no caption."""
    root = tmp_path_factory.mktemp("downloads") / "tars"
    for tar in range(TARS):
        files = {}
        for i in range(PER_TAR):
            number = PER_TAR * tar + i
            data = png(number, (17, 12) if i == 5 else (20 + i, 18))
            files[f"{number:06d}.png"] = data[:60] if i == 7 else data
            if i != 9:
                files[f"{number:06d}.txt"] = f"picture {number} of {'many ' * (i % 4)}things".encode()
        write_tar(root / f"{tar:05d}.tar", files)
    return root


def flags(downloads, out, *sizes, extra=()):
    sizes = [part for size in sizes or (16,) for part in ("--image_size", str(size))]
    return ["--source", "webdataset", "--root", str(downloads), "--out", str(out), *sizes, *ENCODERS, *extra]


def launch(arguments, **env):
    return subprocess.Popen(
        [sys.executable, str(LAUNCHER), *arguments],
        env={**environment(), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(arguments):
    process = launch(arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, err


@pytest.fixture(scope="module")
def undisturbed(downloads, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    printed, log = run(flags(downloads, out, 16, 24, extra=["--min_side", "14"]))
    written = TARS * (PER_TAR - 3)
    assert f"{out}/16: {written} samples in {TARS} shards" in printed and f"{out}/24: {written} samples" in printed
    assert f"{out}/16: {written} of {TARS * PER_TAR} pictures; rejected: {TARS} no caption (00000.tar/000009" in printed
    assert "images/s" in log
    return out


def test_report_and_set_are_what_the_tars_hold(undisturbed):
    report = json.loads((undisturbed / "16" / "report.json").read_text())
    assert {reason: found["count"] for reason, found in report["rejected"].items()} == {
        "no caption": TARS,
        "not decodable": TARS,
        "too small": TARS,
    }
    assert report["rejected"]["too small"]["first"][1] == f"00001.tar/{PER_TAR + 5:06d}"
    for size in (16, 24):
        dataset = open_dataset(undisturbed / str(size))
        dataset.verify()
        assert dataset.latent_shape == (3, size, size)
        assert dataset.fingerprint["image_size"] == size and dataset.fingerprint["root"] == "tars"


@pytest.fixture(scope="module")
def start():
    """Starts the launcher in a child of a process that has imported everything, so that it is soon at work."""

    def start(arguments):
        child = fork_server().Process(target=in_child, args=(arguments,))
        child.start()
        return child

    return start


def in_child(arguments):
    gc.freeze()  # what the server imported is no garbage
    os.environ.update(environment())
    sys.stdout = sys.stderr = open(os.devnull, "w")
    precompute.main(arguments)


def parts_written(out):
    return sum(len(list(out.glob(f".{size}.partial/part_*.json"))) for size in (16, 24))


def test_killed_ten_times_at_random_moments_it_ends_up_the_same(downloads, undisturbed, start, tmp_path):
    arguments = flags(downloads, tmp_path, 16, 24, extra=["--min_side", "14"])
    moments, written = random.Random(0), [0]
    for more in (0, 1, 2, 1, 2, 1, 3, 2, 1, 1):  # parts that are seen to become complete
        child, deadline = start(arguments), time.monotonic() + 60
        while not (tmp_path / ".16.lock").exists() or parts_written(tmp_path) < written[-1] + more:
            assert child.is_alive() and time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        written.append(parts_written(tmp_path))
    assert written == sorted(written) and 14 <= written[-1] < 2 * TARS, written
    assert sorted(path.name for path in tmp_path.iterdir()) == [".16.lock", ".16.partial", ".24.lock", ".24.partial"]
    run(arguments)
    assert contents(tmp_path) == contents(undisturbed)


def test_two_processes_of_a_launcher_make_what_one_makes(downloads, undisturbed, tmp_path):
    """As deepspeed starts them. Whichever ends last tells what there is."""
    arguments = flags(downloads, tmp_path, 16, 24, extra=["--min_side", "14", "--local_rank=0"])
    both = [launch(arguments, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)) for rank in range(2)]
    output = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], output
    assert contents(tmp_path) == contents(undisturbed)
    told = "".join(out for out, _ in output)
    assert f"{tmp_path}/16: " in told and f"{tmp_path}/24: " in told


# --- other sources


def test_a_folder_of_ones_own_embedded_as_a_set_that_is_there(undisturbed, tmp_path, capsys):
    folder = write_folder(tmp_path / "pictures", count=30)
    out, towers = tmp_path / "out", ["--image_encoder", "pixels", "--text_encoder", str(undisturbed / "16")]
    arguments = ["--source", "folder", "--root", str(folder), "--out", str(out), "--image_size", "8", *towers]
    precompute.main([*arguments, "--embeddings", "i8b64", "--limit", "20"])
    assert f"{out}/8: 20 samples" in capsys.readouterr().out
    dataset, there = open_dataset(out / "8"), open_dataset(undisturbed / "16")
    assert dataset.encoders == there.encoders and dataset.layout.embeddings == "i8b64"
    assert "--caption_length 5: the captions of" in refused([*arguments, "--caption_length", "5"], capsys)


def test_a_storage_that_fails_costs_no_picture(tmp_path, monkeypatch, capsys):
    folder, out = write_folder(tmp_path / "pictures", count=30), tmp_path / "out"
    arguments = ["--source", "folder", "--root", str(folder), "--out", str(out), "--image_size", "8", *ENCODERS]
    files = []

    def fail(file, buffer, readinto=storage._File.readinto):
        if not any(file is each for each in files):
            files.append(file)
        if len(files) > 45:  # the first 30 are looked at for the text tower
            with file._remembering():
                raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        return readinto(file, buffer)

    with monkeypatch.context() as failing:
        failing.setattr(storage._File, "readinto", fail)
        error = refused(arguments, capsys)
    assert "part 00000 of the source cannot be read: " in error and error.endswith(os.strerror(errno.ENOTCONN))
    assert not (out / "8").exists()
    precompute.main(arguments)
    assert f"{out}/8: 30 samples" in capsys.readouterr().out


def test_latents_of_the_papers_code_are_taken_as_they_are(tmp_path, capsys):
    samples = [[latents(i, f"caption {i}") for i in range(3)], [latents(3), latents(4, " ")]]
    root, out = write_mds(tmp_path / "mds", LATENTS, samples), tmp_path / "out"
    arguments = ["--source", "mds", "--root", str(root), "--out", str(out), "--image_size", "256"]
    precompute.main([*arguments, "--image_size", "512"])
    for size in (256, 512):
        dataset = open_dataset(out / str(size))
        found, embeddings, texts = read_samples(dataset, range(4))
        assert texts == ["caption 0", "caption 1", "caption 2", "a caption"]
        for i, sample in enumerate(latents(i) for i in range(4)):
            assert found[i].numpy().tobytes() == sample[f"latents_{size}"]
            assert embeddings[i].numpy().tobytes() == sample["caption_latents"]
        assert dataset.encoders["image"] == {
            "id": "stabilityai/stable-diffusion-xl-base-1.0",
            "scale": 0.13025,
            "shift": 0.0,
        }
        text = {"id": "openclip:hf-hub:apple/DFN5B-CLIP-ViT-H-14-378", "max_tokens": 77, "channels": 1024}
        assert dataset.encoders["text"] == text
        report = json.loads((out / str(size) / "report.json").read_text())
        assert report["rejected"] == {"no caption": {"count": 1, "first": ["shard.00001.mds/1"]}}
    capsys.readouterr()
    precompute.main([*arguments, "--verify"])
    assert "4 samples in 2 shards" in capsys.readouterr().out
    assert "--min_side 64: changes nothing" in refused([*arguments, "--min_side", "64"], capsys)
    assert "text_encoder = 'openclip:" in refused([*arguments, "--text_encoder", "other"], capsys)


# --- the same command again, and others


def test_what_is_there_is_not_made_again(downloads, undisturbed, capsys, caplog):
    before = contents(undisturbed)
    (undisturbed / ".16.lock").write_text("")  # as a kill between the last two steps leaves it
    precompute.main(flags(downloads, undisturbed, 16, 24, extra=["--min_side", "14", "--verify", "--batch_size", "5"]))
    out = capsys.readouterr().out
    assert out.count("checksums right") == 2 and f"{undisturbed}/24: " in out
    assert contents(undisturbed) == before


def test_a_source_that_grew_or_changed_is_noticed_and_the_set_follows(downloads, start, tmp_path, capsys):
    root, out = tmp_path / "tars", tmp_path / "out"
    root.mkdir()
    for number in range(3):
        shutil.copy(downloads / f"{number:05d}.tar", root)
    arguments = flags(root, out, extra=["--min_side", "14"])
    precompute.main(arguments)
    shutil.copy(downloads / "00003.tar", root)
    precompute.main(arguments)
    assert f"{out}/16: 27 samples in 3 shards" in capsys.readouterr().out  # as it was
    precompute.main(flags(root, out, 24, extra=["--min_side", "14"]))  # with text statistics of its own
    extend = flags(root, out, 16, 24, extra=["--min_side", "14", "--extend"])
    both = [start(extend) for _ in range(2)]
    for child in both:
        child.join(timeout=120)
    assert [child.exitcode for child in both] == [0, 0]
    assert {path.name for path in out.iterdir()} == {"16", "24"}
    precompute.main(arguments)
    assert f"{out}/16: 36 samples in 4 shards" in capsys.readouterr().out
    assert open_dataset(out / "16").manifest.index.file == "index_0001.npy"

    files = {f"{number:06d}.png": png(number, (20, 18)) for number in range(12, 24)}
    files |= {name.replace("png", "txt"): b"rewritten" for name in files}
    write_tar(root / "00001.tar", dict(sorted(files.items())))
    before = contents(out)
    error = refused(arguments, capsys)
    assert "16: was made when the source held something else in 1 part (00001.tar); --extend makes" in error
    assert "00009.tar: " in refused([*arguments, "--remake", "00009.tar"], capsys) and contents(out) == before
    precompute.main([*arguments, "--remake", "00001.tar", "--verify"])
    assert f"{out}/16: 39 samples in 4 shards" in capsys.readouterr().out
    dataset = open_dataset(out / "16")
    assert read_samples(dataset, range(39))[2].count("rewritten") == 12

    shutil.rmtree(root)
    precompute.main(arguments)  # the source is not needed any more
    assert f"{out}/16: 39 samples" in capsys.readouterr().out


def refused(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: precompute.main([str(argument) for argument in arguments]))
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


@pytest.mark.parametrize(
    "change, message",
    [
        (["--limit", "5"], "16/manifest.json: was made with limit = None, but this command's is 5; remove"),
        (["--caption_length", "9"], "made with caption_length = 12, but this command's is 9"),
        (["--embeddings", "i8b64"], "made with embeddings = 'f16', but this command's is 'i8b64'"),
        (["--captions", "txt=1"], "made with captions.txt = None, but this command's is 1.0"),
    ],
)
def test_a_set_is_not_made_again_in_another_way(downloads, undisturbed, capsys, change, message):
    before = contents(undisturbed)
    error = refused(flags(downloads, undisturbed, 16, 24, extra=["--min_side", "14", *change]), capsys)
    assert message in error and contents(undisturbed) == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--source": "cc21m"}, "cc21m: is not known (did you mean cc12m?)"),
        ({"--root": "/nowhere"}, "/nowhere: there is no such directory"),
        ({"--root": None}, "--source webdataset needs --root"),
        ({"--out": None}, "--out: is missing; --source webdataset needs it"),
        ({"--image_size": None}, "--image_size: is missing"),
        ({"--image_size": "0"}, "argument --image_size: 0 is not between 1 and"),
        ({"--limit": "-3"}, "argument --limit: -3 is not between 1 and"),
        ({"--image_encoder": None}, "--image_encoder: is missing"),
        ({"--image_encoder": "./nowhere"}, "./nowhere': there is no such directory"),
        ({"--text_encoder": "./nowhere"}, "./nowhere': there is no such directory"),
        ({"--caption_length": "1000"}, "takes at most 512 tokens, not 1000"),
        ({"--split": "test"}, "--split test: webdataset has no such split"),
        ({"--min_side": "100"}, "no picture can be used: 0 of 240 pictures; rejected: "),
        ({"--captions": "txt=0,json=0"}, "argument --captions: the weights of txt, json sum to 0"),
        ({"--captions": "txt=-1"}, "argument --captions: the weight of txt is -1.0; expected a number of at least 0"),
        ({"--captions": "text=1"}, "has the key text; the keys there are txt; name those by --captions"),
        ({"--captions": "txt=1", "--caption_key": "txt"}, "--caption_key txt: goes without --captions"),
        ({"--max_rejected": "1.5"}, "argument --max_rejected: 1.5 is not between 0 and 1"),
        ({"--remake": "00000.tar"}, "set/16 is not there yet"),
        ({"--remake": "00000.tar", "--limit": "5"}, "--remake: goes without --limit 5"),
        ({"--recipe": "a.toml"}, "--recipe: goes without --source webdataset"),
        ({"--source": None}, "--root: needs --source"),
    ],
)
def test_what_is_refused_is_one_line_and_nothing_is_written(downloads, tmp_path, capsys, change, message):
    given = {"--source": "webdataset", "--root": downloads, "--out": tmp_path / "out" / "set", "--image_size": "16"}
    given |= dict(zip(ENCODERS[::2], ENCODERS[1::2], strict=True)) | change
    error = refused([part for pair in given.items() if pair[1] is not None for part in pair], capsys)
    assert message in error
    assert not list(tmp_path.rglob("*")) or message.startswith("no picture")


def test_a_size_that_the_autoencoder_cannot_take_is_refused_before_the_source_is_read(tmp_path, capsys):
    towers = ["--image_encoder", save_autoencoder(tmp_path / "vae"), "--text_encoder", "minilm"]
    where = ["--source", "webdataset", "--root", "/nowhere", "--out", tmp_path / "out"]
    error = refused([*where, "--image_size", "16", "--image_size", "17", *towers], capsys)
    assert "image_size 17: image encoder" in error and "takes multiples of 2 pixels" in error
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written(downloads, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "file/out/16: cannot write the set: " in refused(flags(downloads, tmp_path / "file" / "out"), capsys)
    (tmp_path / "16").mkdir()
    (tmp_path / "16" / "thesis.txt").write_text("mine")
    assert "16: holds files but no manifest.json" in refused(flags(downloads, tmp_path), capsys)
