"""Bytes to squares: the paper's crop, every kind of file, and DALI beside Pillow."""

import io
import logging
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin

from mdit.config import UserError
from mdit.precompute import decode
from mdit.precompute.dali import build_decoder
from mdit.precompute.decode import NOT_DECODABLE, TOO_SMALL

CPU = torch.device("cpu")
GPU = torch.device("cuda")
TOLERANCE = {"cpu": (0.25, 8), "cuda": (1, 16)}  # mean and largest difference of 255, on a device


def photo(width, height, seed=0):
    """As smooth as photographs are: noise whose spectrum falls with the frequency, the colours alike; some edges."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    noise = rng.normal(size=(4, *frequency.shape)) + 1j * rng.normal(size=(4, *frequency.shape))
    grey, *colours = (plane / plane.std() for plane in np.fft.irfft2(noise / frequency, s=(height, width)))
    pixels = np.stack([128 + 45 * (0.8 * grey + 0.45 * colour) for colour in colours], axis=-1)
    pixels[height // 3 : height // 2, width // 3 : width // 2] = (220, 40, 40)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pillow(*sizes, min_side=1):
    return build_decoder(sizes or (16,), min_side, CPU, engine="pillow")


def only(decoded):
    """The one picture of a batch of one and one size, as floats."""
    assert (decoded.kept, decoded.rejected) == ([0], {})
    (image_NHWC,) = decoded.images.values()
    return image_NHWC[0].float()


# --- the crop


@pytest.mark.parametrize(
    "width, height, size, resized, left, top",  # what torchvision 0.28 does
    [
        (640, 480, 256, (341, 256), 42, 0),
        (301, 517, 256, (256, 439), 0, 92),
        (1333, 800, 64, (106, 64), 21, 0),
        (300, 257, 512, (597, 512), 42, 0),
        (200, 200, 64, (64, 64), 0, 0),
        (64, 91, 64, (64, 91), 0, 14),
    ],
)
def test_the_shorter_side_is_resized_and_the_middle_cut_out(width, height, size, resized, left, top):
    image = photo(width, height)
    found = only(pillow(size)([encode(image)]))
    pixels_NCHW = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    whole = F.interpolate(pixels_NCHW, resized[::-1], mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    expected = whole.round().clamp(0, 255)[top : top + size, left : left + size]
    assert found.shape == (size, size, 3)
    assert (found - expected).abs().mean() < 0.25 and (found - expected).abs().max() < 8


def test_a_picture_of_the_right_size_is_left_as_it_is():
    image = photo(32, 32)
    found = only(pillow(32)([image]))
    assert torch.equal(found, torch.from_numpy(np.array(image)).float())
    assert torch.equal(found, only(pillow(32)([encode(image)])))


def test_several_sizes_are_those_of_decoders_of_one_size():
    pictures = [encode(photo(60, 40)), b"nothing", photo(50, 70, seed=1)]
    several = pillow(8, 32)(pictures)
    assert several.kept == [0, 2] and several.rejected == {1: NOT_DECODABLE}
    for size in (8, 32):
        image_NHWC = several.images[size]
        assert image_NHWC.shape == (2, size, size, 3) and image_NHWC.dtype == torch.uint8
        assert torch.equal(image_NHWC, pillow(size)(pictures).images[size])


def test_a_strip_does_not_fill_the_memory():
    strip = Image.new("RGB", (100_000, 1), (0, 0, 255))
    strip.paste((255, 0, 0), (49_990, 0, 50_010, 1))
    found = only(pillow(16)([strip]))  # resized as a whole it would be 1.6 million pixels wide
    assert found.shape == (16, 16, 3) and (found == torch.tensor([255.0, 0, 0])).all()


# --- every kind of file


def turned(image, number):
    exif = Image.Exif()
    exif[0x0112] = number
    upside = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    return encode(image.transpose(upside[number]), exif=exif)


@pytest.mark.parametrize("number", [3, 6, 8])
def test_pictures_are_turned_upright(number):
    image = photo(24, 36)
    assert torch.equal(only(pillow(16)([turned(image, number)])), only(pillow(16)([image])))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_does_not_cost_a_picture():
    image = photo(24, 36)
    data = encode(image, "JPEG", quality=95, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff")
    assert torch.equal(only(pillow(16)([data])), only(pillow(16)([encode(image, "JPEG", quality=95)])))


def sixteen_bit():
    return encode(Image.fromarray(np.full((16, 16), 200 * 256 + 77, np.uint16)))


def palette_with_a_hole():
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.paste(0, (0, 0, 8, 16))
    return encode(image, transparency=0)


def half_transparent(mode):
    colour = (200, 100, 50) if mode == "RGBA" else (200,)
    image = Image.new(mode, (16, 16), (*colour, 255))
    image.paste((*[0] * len(colour), 0), (0, 0, 8, 16))
    return encode(image)


@pytest.mark.parametrize(
    "data, left, right",
    [
        (sixteen_bit(), (200,) * 3, (200,) * 3),
        (encode(Image.new("L", (16, 16), 90)), (90,) * 3, (90,) * 3),
        (encode(Image.new("L", (16, 16), 90), "JPEG"), (90,) * 3, (90,) * 3),
        (encode(Image.new("1", (16, 16), 1)), (255,) * 3, (255,) * 3),
        (encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0), (255, 0, 0)),
        (encode(Image.new("RGB", (16, 16), (200, 100, 50)), "GIF"), (200, 100, 50), (200, 100, 50)),
        (encode(Image.new("RGB", (16, 16), (200, 100, 50)), "WEBP", lossless=True), (200, 100, 50), (200, 100, 50)),
        (palette_with_a_hole(), (255,) * 3, (200, 100, 50)),
        (half_transparent("RGBA"), (255,) * 3, (200, 100, 50)),
        (half_transparent("LA"), (255,) * 3, (200,) * 3),
    ],
    ids="16-bit grey grey-JPEG black-and-white CMYK GIF WebP palette RGBA LA".split(),
)
def test_every_mode_becomes_rgb_on_white(data, left, right):
    found = only(pillow(16)([data]))
    assert (found[:, :8] - torch.tensor(left)).abs().max() <= 3
    assert (found[:, 8:] - torch.tensor(right)).abs().max() <= 3


JPEG = encode(photo(80, 60), "JPEG", quality=90)
PNG = encode(photo(80, 60))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>404 Not Found</html>",
        JPEG[: len(JPEG) // 2],
        JPEG[:30],
        PNG[: len(PNG) // 2],
        PNG.replace(b"IHDR", b"IHDX"),
        encode(Image.fromarray(np.ones((20, 20), np.float32)), "TIFF"),
    ],
    ids="empty html half-JPEG begun-JPEG half-PNG broken-PNG floats".split(),
)
def test_what_is_no_picture_is_not_decodable(data):
    decoded = pillow(16)([PNG, data, JPEG])
    assert decoded.rejected == {1: NOT_DECODABLE} and decoded.kept == [0, 2]
    assert decoded.images[16].shape == (2, 16, 16, 3)


def test_a_decompression_bomb_is_not_decodable(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert pillow(16)([PNG]).rejected == {0: NOT_DECODABLE}
    text = PngImagePlugin.PngInfo()
    text.add_text("bomb", "x" * 2**21, zip=True)  # unpacks to more than Pillow's PngImagePlugin.MAX_TEXT_CHUNK
    assert pillow(16)([encode(photo(20, 20), pnginfo=text)]).rejected == {0: NOT_DECODABLE}


def test_the_shorter_side_decides_what_is_too_small():
    pictures = [photo(40, 31), encode(photo(31, 40)), encode(photo(32, 40)), photo(32, 32), turned(photo(31, 40), 6)]
    decoded = pillow(64, min_side=32)(pictures)
    assert decoded.kept == [2, 3] and decoded.rejected == dict.fromkeys([0, 1, 4], TOO_SMALL)
    assert decoded.images[64].shape == (2, 64, 64, 3)


def test_a_batch_in_which_nothing_is_kept():
    for pictures in ([], [b"", b""]):
        decoded = pillow(8, 16)(pictures)
        assert decoded.kept == [] and len(decoded.rejected) == len(pictures)
        assert [image.shape for image in decoded.images.values()] == [(0, 8, 8, 3), (0, 16, 16, 3)]


# --- DALI


def need_dali():
    for package in ("nvidia.dali", "nvidia.nvimgcodec"):
        pytest.importorskip(package, reason=f"needs {package}, see docs/data.md")


@pytest.fixture(scope="module")
def dali():
    """On a CPU; the same code as on a GPU but for the decoder's device."""
    need_dali()
    return build_decoder((24, 64), 20, CPU, engine="dali")


def photos():
    sides = [(80, 60), (60, 80), (301, 517), (700, 400), (64, 64), (65, 90), (200, 200), (30, 40)]
    ways = [{"quality": 95}, {"quality": 80, "progressive": True}, {"quality": 90, "subsampling": 0}]
    return [encode(photo(*side, seed=i), "JPEG", **ways[i % 3]) for i, side in enumerate(sides)]


def assert_alike(found, expected):
    assert (found.kept, found.rejected) == (expected.kept, expected.rejected)
    for size, image_NHWC in expected.images.items():
        assert found.images[size].dtype == torch.uint8 and found.images[size].shape == image_NHWC.shape
        if found.kept:
            mean, largest = TOLERANCE[found.images[size].device.type]
            difference = (found.images[size].cpu().float() - image_NHWC.float()).abs()
            assert difference.mean() < mean and difference.max() <= largest


def odd_files():
    """Files that DALI and Pillow could judge differently."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        encode(photo(80, 60), "JPEG", exif=exif),
        encode(Image.new("CMYK", (40, 40), (0, 255, 255, 0)), "JPEG"),
        encode(photo(80, 60).convert("L"), "JPEG"),
        encode(photo(80, 60), "JPEG", keep_rgb=True),
        JPEG + b"\0\0\0",
        palette_with_a_hole(),
        half_transparent("RGBA"),
        photo(40, 50),
        PNG,
        JPEG[: len(JPEG) // 2],
        b"\xff\xd8\xff\xd9",
        b"",
        encode(photo(19, 80), "JPEG"),
        encode(photo(19, 80)),
    ]


def test_dali_agrees_with_pillow(dali, monkeypatch):
    with monkeypatch.context() as no_pillow:
        no_pillow.setattr(dali, "decode", None)
        found = dali(photos())
    assert_alike(found, pillow(24, 64, min_side=20)(photos()))


def test_dali_keeps_and_rejects_what_pillow_does(dali):
    pictures = [picture for pair in zip(odd_files(), photos() * 2) for picture in pair]
    assert_alike(dali(pictures), pillow(24, 64, min_side=20)(pictures))


def test_dali_takes_batches_of_any_size(dali):
    data = photos()
    for count in (0, 1, 70, 2):
        pictures = [data[i % 4] for i in range(count)]
        assert_alike(dali(pictures), pillow(24, 64, min_side=20)(pictures))


def test_a_picture_that_dali_fails_on_costs_no_other(dali, monkeypatch, caplog):
    broken = JPEG[:200] + b"\xff\xc4\x00\x03" + JPEG[204:]
    garbled = JPEG[: len(JPEG) // 2] + b"\xff\xd9"  # Pillow makes do with it
    pictures = [*photos(), broken, garbled, *photos()]
    assert_alike(dali(pictures), pillow(24, 64, min_side=20)(pictures))
    run = dali.pipeline.run

    def fail(**inputs):
        dali.pipeline.run = run
        raise RuntimeError("Critical error in pipeline:\nencountered:\n\nno such Huffman table\nCurrent pipeline ...")

    monkeypatch.setattr(dali.pipeline, "run", fail)
    dali.failed_before = False
    with caplog.at_level(logging.WARNING, "mdit"):
        found = dali(photos())
    assert "no such Huffman table" in caplog.text
    expected = pillow(24, 64, min_side=20)(photos())
    assert all(torch.equal(found.images[size], expected.images[size]) for size in (24, 64))
    assert_alike(dali(photos()), expected)


@pytest.mark.gpu
def test_dali_on_a_gpu_agrees_with_pillow():
    need_dali()
    decoder = build_decoder((24, 64), 20, GPU, engine="dali")
    pictures = [picture for pair in zip(odd_files(), photos() * 2) for picture in pair]
    found = decoder(pictures)
    assert all(image_NHWC.device.type == "cuda" for image_NHWC in found.images.values())
    assert_alike(found, pillow(24, 64, min_side=20)(pictures))


# --- which one


def test_the_choice_of_decoder_is_logged_with_its_reason(monkeypatch, caplog):
    with caplog.at_level(logging.INFO, "mdit"):
        build_decoder((8,), 1, CPU)
        assert "decoded by Pillow (cpu is no GPU)" in caplog.text
        monkeypatch.setitem(sys.modules, "nvidia.dali", None)
        assert type(build_decoder((8,), 1, GPU)) is decode.PillowDecoder
        assert "decoded by Pillow (DALI is not installed" in caplog.text


def test_dali_asked_for_and_not_there_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match="decoder 'dali': DALI is not installed.*docs/data.md"):
        build_decoder((8,), 1, CPU, engine="dali")
