"""All captions of a picture, by kind: from each source that has several, to the sets that are made of them."""

import json
import tarfile

import pytest

from mdit.captions import Caption, parse_weights
from mdit.config import EmojiSource, FolderSource, UserError
from mdit.data.shards import open_dataset
from mdit.precompute.build import build_sets
from mdit.sources import Picture, Source, captioned, open_named_source, open_source
from mdit.sources.emoji import PHRASINGS
from tests.picture_sets import WordCounts, job_of, png, towers
from tests.unit.test_sources import encoded, read, write_files, write_tar
from tests.unit.test_sources_mds import write_mds


def captions_of(source, kinds=None) -> dict[str, list[tuple[str, str]]]:
    """Origin -> captions of all pictures; nothing may be rejected."""
    pictures, rejected = read(source)
    assert not rejected
    return {origin: [tuple(caption) for caption in picture.captions] for origin, picture in pictures.items()}


def test_a_picture_has_all_its_captions_and_none_that_is_blank():
    found = [Caption("alt", " a cat "), Caption("recaption", " "), Caption("recaption", "a grey cat")]
    picture = captioned("o", b"", found)
    assert picture == Picture("o", b"", "a cat", (Caption("alt", "a cat"), Caption("recaption", "a grey cat")))
    assert picture.texts == ["a cat", "a grey cat"] and captioned("o", b"", "a cat").texts == ["a cat"]
    assert captioned("o", b"", []).reason == captioned("o", b"", [Caption("alt", " ")]).reason == "no caption"
    assert captioned("o", b"", [Caption("a", "x"), Caption("b", "\ud83d")]).reason == "unreadable caption"


# --- MONET and Fine-T2I

MONET = {
    "caption_original": "alt text",
    "caption_florence-2-large": "a short one",
    "caption_internvl-3-8b": "a longer one",
    "caption_sharegpt4v-7b": None,
    "caption_gemini-2.5-flash-lite": "nan",
    "source": "coyo",
}


@pytest.fixture
def monet(tmp_path):
    """As its public readers find it, embeddings of other towers beside the pictures."""
    for source, keys in (("coyo/00", "ab"), ("synthetic", "c")):
        files = {}
        for key in keys:
            files[f"{key}.embedding_vae-dc-1.1-512x512.pth"] = b"\0" * 4096
            files[f"{key}.jpg"] = encoded(ord(key))
            files[f"{key}.json"] = json.dumps({**MONET, "caption_original": f"alt text of {key}"}).encode()
        folder = tmp_path / "monet" / "v1.1.0" / source
        folder.mkdir(parents=True)
        write_tar(folder / "00000.tar", files)
    return tmp_path / "monet"


def test_monet(monet):
    source = open_named_source("monet", monet)
    assert [part.name for part in source.parts] == ["v1.1.0/coyo/00/00000.tar", "v1.1.0/synthetic/00000.tar"]
    pictures, rejected = read(source)
    assert [picture.caption for picture in pictures.values()] == [f"alt text of {key}" for key in "abc"]
    assert not rejected and not any(picture.captions for picture in pictures.values())
    kinds = ["original", "internvl-3-8b", "sharegpt4v-7b", "gemini-2.5-flash-lite"]
    found = captions_of(open_named_source("monet", monet / "v1.1.0" / "coyo", kinds=kinds))
    assert found == {
        f"00/00000.tar/{key}": [("original", f"alt text of {key}"), ("internvl-3-8b", "a longer one")] for key in "ab"
    }
    _, rejected = read(open_named_source("monet", monet, kinds=["gemini-2.5-flash-lite"]))
    assert {*rejected.values()} == {"no caption"} and len(rejected) == 3
    with pytest.raises(
        UserError, match="monet.*v1.1.0.*: KEY.json.* has the key caption_internvl; the keys there are cap"
    ):
        open_named_source("monet", monet, kinds=["original", "internvl"])
    write_tar(monet / "v1.0.0.tar", {})
    (monet / "v2.0").mkdir()
    write_tar(monet / "v2.0" / "0.tar", {})
    with pytest.raises(UserError, match="holds v1.1.0 and v2.0 of one set; give --root .*v2.0"):
        open_named_source("monet", monet)
    with pytest.raises(
        UserError, match="there is no such directory; get tars of https://huggingface.co/datasets/jasper"
    ):
        open_named_source("monet", monet / "nowhere")


def test_members_of_a_tar_that_are_not_wanted_are_not_read(monet, monkeypatch):
    asked = []
    extractfile = tarfile.TarFile.extractfile
    monkeypatch.setattr(
        tarfile.TarFile, "extractfile", lambda tar, entry: asked.append(entry.name) or extractfile(tar, entry)
    )
    read(open_named_source("monet", monet))
    assert asked and all(name.endswith((".jpg", ".json")) for name in asked)


def test_fine_t2i(tmp_path):
    about = {"id": "0", "prompt": "a cat", "enhanced_prompt": "a grey cat on a mat", "image_resolution": [512, 512]}
    for subset, text in (("synthetic_enhanced_prompt_square_resolution", b"a grey cat on a mat"), ("curated", None)):
        files = {"0.jpg": encoded(0), "0.json": json.dumps(about).encode(), **({"0.txt": text} if text else {})}
        (tmp_path / subset).mkdir()
        write_tar(tmp_path / subset / "train-000000.tar", files)
    pictures, _ = read(open_named_source("fine_t2i", tmp_path))
    assert [picture.caption for picture in pictures.values()] == ["a cat", "a grey cat on a mat"]
    both = [("original", "a cat"), ("enhanced", "a grey cat on a mat")]
    assert [*captions_of(open_named_source("fine_t2i", tmp_path, kinds=["original", "enhanced"])).values()] == [
        both
    ] * 2
    with pytest.raises(
        UserError, match=r"captions.enhancd: fine_t2i has no captions .*\(did you mean enhanced\?\); there"
    ):
        open_named_source("fine_t2i", tmp_path, kinds=["enhancd"])


# --- the others


def test_tars_and_folders_of_samples(tmp_path):
    files = {}
    for key in "abc":
        files |= {f"{key}.jpg": encoded(0), f"{key}.txt": f"text of {key}".encode()}
        if key != "c":
            files[f"{key}.json"] = json.dumps({"llava": [f"long {key}", "another"], "txt": "of the json"}).encode()
    write_tar(tmp_path / "0.tar", files)
    write_files(tmp_path / "folder" / "0.tar", files)
    expected = {f"0.tar/{k}": [("llava", f"long {k}"), ("llava", "another"), ("txt", f"text of {k}")] for k in "ab"}
    expected["0.tar/c"] = [("txt", "text of c")]
    for name, root in (("webdataset", tmp_path), ("cc12m", tmp_path), ("folder", tmp_path / "folder")):
        assert captions_of(open_named_source(name, root, kinds=["llava", "txt"])) == expected
        assert [p.caption for p in read(open_named_source(name, root))[0].values()] == [f"text of {k}" for k in "abc"]
        with pytest.raises(
            UserError, match=r"none of the first 5 objects has the key lava; the keys there are .*captions"
        ):
            open_named_source(name, root, kinds=["txt", "lava"])
    with pytest.raises(UserError, match="--caption_key x: goes without --captions"):
        open_named_source("webdataset", tmp_path, caption_key="x", kinds=["txt"])


def write_captions(folder, lines):
    write_files(folder, {f"{i}.png": png(i) for i in range(len(lines))})
    text = "\n".join(json.dumps({"file": f"{i}.png", **line}) for i, line in enumerate(lines))
    (folder / "captions.jsonl").write_text(text)
    return folder


LINES = [{"alt": "one", "recaption": ["a", "b"]}, {"alt": "two"}, {"recaption": "three", "caption": 5}] * 4
OF_LINES = [[("alt", "one"), ("recaption", "a"), ("recaption", "b")], [("alt", "two")], [("recaption", "three")]] * 4


def test_a_folder_with_captions_jsonl(tmp_path):
    folder = write_captions(tmp_path / "folder", LINES)
    assert [*captions_of(open_named_source("folder", folder, kinds=["alt", "recaption"])).values()] == OF_LINES
    config = FolderSource(name="folder", path=str(folder), validation_share=0.4)
    source = open_source(config, 8, ["alt", "recaption"])
    found = sorted(source.training.captions + source.validation.captions)
    assert found == sorted(text for line in OF_LINES for _, text in line)
    assert len(source.training) + len(source.validation) == 12 and source.training[0].captions
    with pytest.raises(UserError, match="captions.jsonl:2: recaption is None; expected a text"):
        open_source(config, 8, ["recaption"])
    with pytest.raises(
        UserError, match=r"captions.altt: .*captions.jsonl has no .* \(did you mean alt\?\); there are alt"
    ):
        open_source(config, 8, ["alt", "recaption", "altt"])


def test_emoji_scenes_in_all_phrasings():
    config = dict(objects=4, styles=("twemoji",), scenes=6, validation_scenes=2, held_out=0.1, seed=0)
    source, alone = (open_source(EmojiSource(name="emoji", **config), 8, kinds) for kinds in (["phrasing"], None))
    for i, (one, several) in enumerate(zip(alone.training, source.training)):
        assert one.caption == several.caption == several.captions[0].text and not one.captions
        assert len({*several.texts}) == len(PHRASINGS) == len(several.texts)
        assert source.training.captions[5 * i : 5 * i + 5] == several.texts
    with pytest.raises(UserError, match="captions.alt: emoji has no captions of this kind; there are phrasing"):
        open_source(EmojiSource(name="emoji", **config), 8, ["alt"])


def test_json_of_coco_textcaps_and_journeydb(tmp_path):
    annotations = [{"image_id": 7, "caption": "first"}, {"image_id": 7, "caption": "second"}]
    coco = {"images": [{"id": 7, "file_name": "7.jpg"}], "annotations": annotations}
    write_files(tmp_path / "coco", {"val2014/7.jpg": encoded(7)})
    write_files(tmp_path / "coco", {"annotations/captions_val2014.json": json.dumps(coco).encode()})
    source = open_named_source("coco", tmp_path / "coco", split="validation", kinds=["caption"])
    assert captions_of(source) == {"7.jpg": [("caption", "first"), ("caption", "second")]}
    entry = {"image_name": "a", "reference_strs": ["first", "second"]}
    files = {"train_images/a.jpg": encoded(0), "TextCaps_0.1_train.json": json.dumps({"data": [entry] * 2}).encode()}
    source = open_named_source("textcaps", write_files(tmp_path / "textcaps", files), kinds=["caption"])
    assert captions_of(source) == {"a.jpg": [("caption", "first"), ("caption", "second")]}
    lines = [{"img_path": f"./000/{i}.jpg", "prompt": f"prompt {i} --v 4"} for i in range(2)]
    lines[0]["Task2"] = {"Caption": "what it shows"}
    text = "\n".join(map(json.dumps, lines)).encode()
    files = {f"data/train/imgs/000/{i}.jpg": encoded(i) for i in range(2)}
    root = write_files(tmp_path / "jdb", {**files, "data/train/train_anno_realease_repath.jsonl": text})
    found = captions_of(open_named_source("journeydb", root, kinds=["caption", "prompt"]))
    assert [*found.values()] == [
        [("caption", "what it shows"), ("prompt", "prompt 0 --v 4")],
        [("prompt", "prompt 1 --v 4")],
    ]
    with pytest.raises(
        UserError, match=r"--captions: diffusiondb has one caption a picture and takes no kinds \(alt\)"
    ):
        open_named_source("diffusiondb", root, kinds=["alt"])


def test_columns_of_parquet_files_and_of_mds_shards(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": encoded(0), "path": None}], "alt": ["one"], "recaption": [["a", "b"]]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet" / "0.parquet")
    for name in ("saved", "parquet"):
        source = open_named_source("huggingface", tmp_path / name, kinds=["recaption", "alt"])
        assert [*captions_of(source).values()] == [[("recaption", "a"), ("recaption", "b"), ("alt", "one")]]
        with pytest.raises(UserError, match="has no column x for captions; its columns are image, alt, recaption$"):
            open_named_source("huggingface", tmp_path / name, kinds=["alt", "x"])
    columns = {"jpg": "jpeg", "caption": "str", "llava": "json"}
    write_mds(tmp_path / "mds", columns, [[{"jpg": encoded(0), "caption": b"one", "llava": b'["a", "b"]'}]])
    source = open_named_source("mds", tmp_path / "mds", kinds=["caption", "llava"])
    assert [*captions_of(source).values()] == [[("caption", "one"), ("llava", "a"), ("llava", "b")]]
    with pytest.raises(UserError, match="has no column x .str or json."):
        open_named_source("mds", tmp_path / "mds", kinds=["x"])


# --- sets


def items(count=12):
    kinds = [["alt"], ["recaption"], ["alt", "recaption", "recaption"]]
    captions = [[Caption(kind, "word " * (i + n)) for n, kind in enumerate(kinds[i % 3], 1)] for i in range(count)]
    return [captioned(f"picture {i}", png(i), found) for i, found in enumerate(captions)]


def test_a_set_of_several_captions_in_parts(tmp_path):
    weights = {"alt": 1.0, "recaption": 3.0}
    job, text = job_of(items(), tmp_path, weights=weights), WordCounts(needs_fit=True)
    report = build_sets(job, towers(text)).finished[tmp_path / "8"]
    assert text.fitted_on == [[caption.text for item in items() for caption in item.captions]]
    assert report.captions == {"alt": 8, "recaption": 12} and report.written == 12
    assert report.summary() == "12 of 12 pictures with 8 alt, 12 recaption captions"
    dataset = open_dataset(tmp_path / "8")
    dataset.verify()
    assert dataset.weights == weights and dataset.captions() == 20 and len(dataset.shard_sizes) == 2
    for location, item in zip(dataset.locate(range(12)), items()):
        found = dataset.read_captions(location)
        assert [caption for caption, _ in found] == [*item.captions]
        for caption, embedding in found:
            words = len(caption.text.split())
            assert words <= embedding.float().mean() < words + 1

    (tmp_path / "8" / "manifest.json").rename(tmp_path / "away")
    more = job_of(items(), tmp_path / "again", weights=weights, embeddings="i8b64", shard_bytes=1)
    build_sets(more, towers())
    assert open_dataset(tmp_path / "again" / "8").captions() == 20


def test_a_set_of_several_captions_grows(tmp_path):
    weights = {"alt": 1.0}
    first, parts = job_of(items(6), tmp_path, weights=weights), job_of(items(), tmp_path).source.parts
    first = type(first)(**{**vars(first), "source": Source(parts[:1], 6)})
    build_sets(first, towers())
    grown = type(first)(**{**vars(first), "source": Source(parts, 12), "extend": True})
    build_sets(grown, towers())
    dataset = open_dataset(tmp_path / "8")
    dataset.verify()
    assert dataset.samples == 12 and dataset.captions() == 20


def test_weights_on_a_command_line():
    assert parse_weights("gemini-2.5-flash-lite=3, original=1") == {"gemini-2.5-flash-lite": 3.0, "original": 1.0}
    for text in ("alt", "=1", "alt=x", "alt=1,alt=2", "alt=-1,b=2", "alt=nan", "alt=0", ""):
        with pytest.raises(ValueError):
            parse_weights(text)
