"""The decode policy, row by row of DECODE.md."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms
from source_images import encode, gradient, outcome, pixels_of, psnr, reason_of, row

from pipeline.source.config import ImageConfig
from pipeline.source.pixels import render as render_module
from pipeline.source.pixels.decode import is_risky, sniff
from pipeline.source.pixels.prepare import Reject, policy_fingerprint, prepare

PICTURE = gradient()
WHOLE = {"resolution": 40, "buckets": {"kind": "table", "sizes": [[40, 64]]}}


def exact(height: int, width: int) -> dict[str, object]:
    """A configuration whose only bucket is the image itself, so that nothing is resampled."""
    return ImageConfig.model_validate_json(
        f'{{"buckets": {{"kind": "table", "sizes": [[{height}, {width}]]}}, "multiple_of": 1}}'
    ).model_dump(include={"buckets", "multiple_of"})


@pytest.mark.parametrize(
    ("kind", "name", "options", "tolerance"),
    [
        ("JPEG", "jpeg", {"quality": 98, "subsampling": 0}, 5),
        ("JPEG", "jpeg", {"quality": 98, "subsampling": 0, "progressive": True}, 5),
        ("PNG", "png", {}, 0),
        ("WEBP", "webp", {"lossless": True}, 0),
        ("BMP", "bmp", {}, 0),
        ("TIFF", "tiff", {"compression": "tiff_lzw"}, 0),
        ("AVIF", "avif", {"quality": 100, "subsampling": "4:4:4"}, 8),
        ("JPEG2000", "jpeg2000", {}, 0),
        ("JPEG2000", "jpeg2000", {"no_jp2": True}, 0),
        ("PPM", "ppm", {}, 0),
    ],
)
def test_every_allowed_format_gives_its_pixels_whatever_its_name(kind, name, options, tolerance):
    data = encode(PICTURE, kind, **options)
    assert sniff(data) == name
    assert np.abs(pixels_of(data, **exact(40, 60)) - PICTURE).max() <= tolerance


def test_a_format_outside_the_allow_list_is_unsupported():
    assert reason_of(encode(PICTURE, "ICO")) == "unsupported_format"
    assert reason_of(encode(PICTURE, "PNG"), formats=("jpeg",)) == "unsupported_format"
    assert reason_of(b"%PDF-1.7 not an image") == "unsupported_format"
    assert reason_of(b"\0\0\0\x18ftypmif1\0\0\0\0mif1miaf") == "unsupported_format"
    assert reason_of(b"P1nk") == "unsupported_format"


def test_empty_and_missing_images_have_their_own_reasons():
    assert reason_of(b"") == "empty"
    missing = prepare(row(None), ImageConfig())
    assert isinstance(missing, Reject)
    assert missing.reason == "no_image"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation_is_applied_once(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turns = render_module._TURNS
    upright = Image.fromarray(PICTURE)
    # The stored picture is the upright one turned the other way round.
    undo = {6: 8, 8: 6}
    stored = upright.transpose(turns[undo.get(orientation, orientation)]) if orientation > 1 else upright
    options = {"quality": 98, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = encode(stored, kind, exif=exif, **options)
    result = outcome(data, **exact(40, 60))
    assert result[0].original == (40, 60)
    assert np.abs(result[0].pixels.astype(int) - PICTURE).max() <= (5 if kind == "JPEG" else 0)


def test_orientation_of_avif_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(PICTURE).transpose(Image.Transpose.ROTATE_90)
    assert psnr(pixels_of(encode(stored, "AVIF", exif=exif, quality=95), **exact(40, 60)), PICTURE) > 30


def test_the_orientation_hint_serves_only_where_the_file_has_no_tag_of_its_own():
    config = ImageConfig(resolution=16, max_upscale=100.0)
    plain = prepare(row(encode(PICTURE, "PNG"), exif_orientation=6), config)
    assert plain[0].original == (60, 40)
    exif = Image.Exif()
    exif[0x0112] = 1
    tagged = prepare(row(encode(PICTURE, "PNG", exif=exif), exif_orientation=6), config)
    assert tagged[0].original == (40, 60)
    nonsense = prepare(row(encode(PICTURE, "PNG"), exif_orientation=99), config)
    assert nonsense[0].original == (40, 60)


def test_crop_and_turn_agree_with_turning_first():
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(PICTURE).transpose(Image.Transpose.ROTATE_90)
    turned = pixels_of(encode(stored, "PNG", exif=exif), resolution=16)
    upright = pixels_of(encode(PICTURE, "PNG"), resolution=16)
    assert np.abs(turned - upright).max() <= 1


def test_transparency_shows_the_matte():
    clear = np.dstack([PICTURE, np.zeros((40, 60), np.uint8)])
    assert (pixels_of(encode(clear, "PNG"), matte=(10, 20, 30)) == (10, 20, 30)).all()
    assert (pixels_of(encode(clear, "PNG")) == 255).all()
    half = np.dstack([np.zeros((40, 60, 3), np.uint8), np.full((40, 60), 128, np.uint8)])
    assert np.abs(pixels_of(encode(half, "WEBP", lossless=True, exact=True)) - 127).max() <= 1


def test_colour_under_transparent_pixels_does_not_bleed():
    pixels = np.zeros((40, 40, 4), np.uint8)
    pixels[:, :20] = (255, 0, 0, 255)
    pixels[:, 20:] = (0, 255, 0, 0)  # green nobody should see
    out = pixels_of(encode(pixels, "PNG"), matte=(0, 0, 0), resolution=8)
    assert out[..., 1].max() <= 2


def test_palettes_with_and_without_transparency():
    paletted = Image.fromarray(PICTURE).quantize(64)
    expected = np.asarray(paletted.convert("RGB")).astype(int)
    assert np.array_equal(pixels_of(encode(paletted, "PNG"), **exact(40, 60)), expected)
    solid = Image.new("P", (16, 16), 0)
    solid.putpalette([255, 0, 0] + [0] * 765)
    assert (pixels_of(encode(solid, "PNG", transparency=0), matte=(1, 2, 3)) == (1, 2, 3)).all()
    grey = Image.new("L", (16, 16), 7)
    assert (pixels_of(encode(grey, "PNG", transparency=7), matte=(1, 2, 3)) == (1, 2, 3)).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_palette_image_without_a_palette_is_corrupt(bits):
    header = struct.pack(">IIBBBBB", 512, 512, bits, 3, 0, 0, 0)
    lines = zlib.compress((b"\0" + bytes(64 * bits)) * 512)
    chunks = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", lines), (b"IEND", b""))
    )
    assert reason_of(b"\x89PNG\r\n\x1a\n" + chunks) == "corrupt"


def test_sixteen_bits_keep_their_upper_eight():
    values = np.linspace(0, 65535, 16 * 16).astype(np.uint16).reshape(16, 16)
    expected = np.repeat((values >> 8)[..., None], 3, axis=2)
    assert np.array_equal(pixels_of(encode(Image.fromarray(values), "PNG")), expected)
    assert np.array_equal(pixels_of(encode(Image.fromarray(values), "TIFF")), expected)
    ppm = b"P5 16 16 65535 " + values.astype(">u2").tobytes()
    assert np.array_equal(pixels_of(ppm), expected)


def test_floats_are_taken_in_two_ranges_and_refused_beyond():
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    assert np.abs(pixels_of(encode(Image.fromarray(values), "TIFF"))[..., 0] - values * 255).max() <= 0.5
    assert np.abs(pixels_of(encode(Image.fromarray(values * 200), "TIFF"))[..., 0] - values * 200).max() <= 0.5
    assert reason_of(encode(Image.fromarray(values * 300), "TIFF")) == "value_range"
    assert reason_of(encode(Image.fromarray(values - 1), "TIFF")) == "value_range"
    assert reason_of(encode(Image.fromarray(values * np.float32("nan")), "TIFF")) == "value_range"


def test_cmyk_lab_grey_and_bilevel_become_rgb():
    for mode, kind in [
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("L", "PNG"),
        ("1", "PNG"),
        ("LA", "PNG"),
        ("LAB", "TIFF"),
    ]:
        if mode == "LAB":
            source, target = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
            image = ImageCms.profileToProfile(Image.fromarray(PICTURE), source, target, outputMode="LAB")
        else:
            image = Image.fromarray(PICTURE).convert(mode)
        out = pixels_of(encode(image, kind), **exact(40, 60))
        if mode in ("CMYK", "LAB"):
            assert psnr(out, PICTURE) > 25, (mode, kind)
        else:
            assert np.array_equal(out, np.asarray(image.convert("RGB" if mode != "LA" else "L").convert("RGB")))


def test_profiles_are_applied_srgb_is_left_alone_and_broken_ones_are_ignored():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(pixels_of(encode(PICTURE, "PNG", icc_profile=srgb), **exact(40, 60)), PICTURE)
    assert np.array_equal(pixels_of(encode(PICTURE, "PNG", icc_profile=b"rubbish"), **exact(40, 60)), PICTURE)
    other = _swapped_primaries(srgb)
    out = pixels_of(encode(PICTURE, "PNG", icc_profile=other), **exact(40, 60))
    assert np.abs(out - PICTURE[..., ::-1]).max() <= 6  # a profile that swaps red and blue


def _swapped_primaries(srgb: bytes) -> bytes:
    """sRGB with the tags of red and blue exchanged: the profile of a device that stores BGR."""
    return srgb.replace(b"rXYZ", b"tmp0").replace(b"bXYZ", b"rXYZ").replace(b"tmp0", b"bXYZ")


def test_a_profile_of_another_colour_space_is_ignored():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey = Image.fromarray(PICTURE).convert("L")
    out = pixels_of(encode(grey, "PNG", icc_profile=_swapped_primaries(srgb)), **exact(40, 60))
    assert np.array_equal(out[..., 0], np.asarray(grey))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
def test_of_an_animation_the_first_frame_counts(kind):
    frames = [Image.new("RGB", (32, 32), c) for c in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "AVIF" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    assert np.abs(pixels_of(data) - (255, 0, 0)).max() <= 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files_are_rejected(kind, share):
    noise = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(noise, kind)
    assert reason_of(data[: int(len(data) * share)]) in ("truncated", "corrupt")


def test_a_bomb_is_rejected_by_its_header_without_decoding():
    raw = zlib.compress(b"\0" * 1000)
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", raw) + chunk(b"IEND", b"")
    assert reason_of(bomb) == "too_many_pixels"
    assert reason_of(encode(PICTURE, "PNG"), max_pixels=40 * 60 - 1) == "too_many_pixels"
    assert reason_of(encode(PICTURE, "PNG")[:200], max_pixels=10) == "too_many_pixels", "the header alone decides"
    assert isinstance(outcome(encode(PICTURE, "PNG"), max_pixels=40 * 60), list)


def test_webp_canvas_bombs_are_refused_before_the_canvas_is_allocated():
    frames = [Image.new("RGB", (16, 16), c) for c in ("red", "blue")]
    data = bytearray(encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    assert data[12:16] == b"VP8X"
    data[24:27] = (60_000).to_bytes(3, "little")
    data[27:30] = (60_000).to_bytes(3, "little")
    assert reason_of(bytes(data)) == "too_many_pixels"


def test_extreme_shapes_and_small_images():
    thin = encode(np.zeros((2, 100, 3), np.uint8), "PNG")
    assert reason_of(thin, max_aspect=10.0) == "extreme_aspect"
    assert reason_of(encode(PICTURE, "PNG"), min_side=41) == "too_small"
    result = outcome(encode(PICTURE, "PNG"), resolution=128, max_upscale=2.0)
    assert isinstance(result, Reject)
    assert (result.status, result.reason) == ("filtered", "upscale_limit")


def test_a_coding_that_the_decoder_lacks_is_named():
    bitmap = bytearray(encode(PICTURE, "BMP"))
    bitmap[28:30] = (2).to_bytes(2, "little")
    assert reason_of(bytes(bitmap)) == "unsupported_coding"


def test_damaged_metadata_do_not_cost_the_image():
    data = encode(PICTURE, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffrubbish")
    assert pixels_of(data).shape == (16, 16, 3)


@pytest.mark.integration
def test_warnings_of_the_decoder_are_silent_even_where_warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        large = encode(np.zeros((10_000, 10_000), np.uint8), "PNG")  # Pillow warns from 89 megapixels up
        assert pixels_of(large, max_pixels=100_000_000).shape == (16, 16, 3)


def test_slow_and_fragile_decoders_are_told_apart():
    assert not is_risky(encode(PICTURE, "JPEG", progressive=True), "jpeg")
    assert not is_risky(encode(PICTURE, "PNG"), "png")
    for kind, name in [("TIFF", "tiff"), ("AVIF", "avif"), ("JPEG2000", "jpeg2000"), ("PPM", "ppm")]:
        assert is_risky(encode(PICTURE, kind), name)
    assert is_risky(b"\xff\xd8\xff" + b"\xff\xda" * 41, "jpeg")
    runs = bytearray(encode(PICTURE, "BMP"))
    assert not is_risky(bytes(runs), "bmp")
    runs[30:34] = b"\1\0\0\0"
    assert is_risky(bytes(runs), "bmp")


# -- draft ---------------------------------------------------------------------------------------------------

DRAFT_BOUND_DB = 45.0


def _busy_photograph(shared_data, tiles: int, seed: int) -> bytes:
    """A large JPEG with real texture at every scale: photographs side by side (their edges make it harder)."""
    names = sorted((shared_data / "photos").glob("*.jpg"))
    chosen = np.random.default_rng(seed).choice(len(names), tiles * tiles)
    canvas = Image.new("RGB", (tiles * 400, tiles * 300))
    for at, index in enumerate(chosen):
        with Image.open(names[index]) as photo:
            canvas.paste(photo.convert("RGB").resize((400, 300)), (at % tiles * 400, at // tiles * 300))
    return encode(canvas, "JPEG", quality=92)


@pytest.mark.parametrize(("tiles", "resolution"), [(4, 128), (4, 256), (6, 256)])
def test_draft_stays_within_the_stated_bound_of_full_decode_and_lanczos(shared_data, tiles, resolution):
    data = _busy_photograph(shared_data, tiles, seed=tiles)
    config = {"resolution": resolution}
    with Image.open(io.BytesIO(data)) as full:
        side = min(full.size)
        left, top = (full.width - side) // 2, (full.height - side) // 2
        box = (left, top, left + side, top + side)
        reference = np.asarray(full.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box))
    drafted, plain = pixels_of(data, **config), pixels_of(data, draft=False, **config)
    assert not np.array_equal(drafted, plain), "draft was not used, so this proves nothing"
    assert psnr(drafted, reference) >= DRAFT_BOUND_DB
    assert psnr(plain, reference) >= DRAFT_BOUND_DB


def test_draft_keeps_two_decoded_pixels_per_output_pixel(monkeypatch):
    data = encode(gradient(400, 400), "JPEG")
    scales = []
    real = render_module.load_image
    monkeypatch.setattr(
        render_module, "load_image", lambda *a, scale=1: (scales.append(scale), real(*a, scale=scale))[1]
    )
    for resolution in (24, 48, 96, 104, 200):
        outcome(data, resolution=resolution)
    assert scales == [8, 4, 2, 1, 1]


# -- variants ------------------------------------------------------------------------------------------------


def test_several_resolutions_and_flips_come_from_one_decode(monkeypatch):
    loads = []
    real = render_module.load_image
    monkeypatch.setattr(render_module, "load_image", lambda *a, **k: (loads.append(1), real(*a, **k))[1])
    result = outcome(encode(PICTURE, "PNG"), resolution=(16, 32), flip=True)
    assert len(loads) == 1
    by_variant = {p.variant: p for p in result}
    assert sorted(by_variant) == [0, 1, 2, 3]
    assert by_variant[0].bucket == by_variant[1].bucket == (16, 16)
    assert by_variant[2].bucket == (32, 32)
    for plain, flipped in ((0, 1), (2, 3)):
        assert np.array_equal(by_variant[flipped].pixels, by_variant[plain].pixels[:, ::-1])
        assert by_variant[flipped].flipped
        assert by_variant[flipped].crop == by_variant[plain].crop
    assert len({p.sample_id for p in result}) == 4
    assert len({p.content_sha256 for p in result}) == 1


def test_a_filtered_resolution_leaves_the_other_variant_numbers_alone():
    result = outcome(encode(PICTURE, "PNG"), resolution=(128, 32), max_upscale=1.0)
    assert [p.variant for p in result] == [1]


def test_sample_ids_are_pinned():
    prepared = prepare(row(encode(PICTURE, "PNG"), key="d/a.png", source="s"), ImageConfig(resolution=16, flip=True))
    assert [p.sample_id.hex() for p in prepared] == [
        "29cdf8edf8c9c76eaf8f032548b61739",
        "263ea59e83e87acea6ca39783c8ae33c",
    ]


def test_random_crops_belong_to_the_key_and_not_to_the_call():
    data, config = encode(PICTURE, "PNG"), ImageConfig(resolution=16, crop="random")
    lefts = {key: prepare(row(data, key=key), config)[0].crop[1] for key in map(str, range(40))}
    assert lefts == {key: prepare(row(data, key=key), config)[0].crop[1] for key in lefts}
    assert len(set(lefts.values())) > 8
    assert all(0 <= left <= 20 for left in lefts.values())


def test_pixels_are_those_of_the_stated_crop():
    result = outcome(encode(PICTURE, "PNG"), resolution=40, crop="random")[0]
    top, left, height, width = result.crop
    assert (height, width) == (40, 40)
    assert np.array_equal(result.pixels, PICTURE[top : top + height, left : left + width])


def test_perceptual_hash_survives_scaling_and_tells_pictures_apart(shared_data):
    names = sorted((shared_data / "photos").glob("*.jpg"))[:6]
    hashes = []
    for name in names:
        full = outcome(name.read_bytes(), phash=True)[0].phash
        with Image.open(name) as photo:
            half = encode(photo.convert("RGB").resize((photo.width // 2, photo.height // 2)), "PNG")
        assert (full ^ outcome(half, phash=True)[0].phash).bit_count() <= 8
        hashes.append(full)
    assert all((a ^ b).bit_count() > 12 for i, a in enumerate(hashes) for b in hashes[:i])
    assert outcome(encode(PICTURE, "PNG"))[0].phash is None


def test_rejects_of_the_reader_pass_through():
    result = prepare(row(None, status="rejected", reason="missing", message="gone"), ImageConfig())
    assert result == Reject("rejected", "missing", "gone")


def test_threads_give_the_same_pixels(shared_data):
    data = [p.read_bytes() for p in sorted((shared_data / "photos").glob("*.jpg"))[:24]]
    alone = [pixels_of(d) for d in data]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(pixels_of, data))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_fingerprint_follows_pixels_and_not_limits():
    base = policy_fingerprint(ImageConfig())
    for changed in (
        {"resolution": 256},
        {"crop": "random"},
        {"flip": True},
        {"matte": (0, 0, 0)},
        {"draft": False},
        {"resolution": (512, 256)},
    ):
        assert policy_fingerprint(ImageConfig(**changed)) != base, changed
    for same in (
        {"max_pixels": 10},
        {"max_upscale": 1.0},
        {"isolate": "all"},
        {"decode_cpu_s": 1.0},
        {"min_side": 9},
    ):
        assert policy_fingerprint(ImageConfig(**same)) == base, same
