import contextlib
import hashlib
import io
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from chalicelib import content, media
from chalicelib.errors import PermanentError, TransientError
from tests.conftest import new_content
from tests.shapes import AVIF, FILES, GIF, HTML, JPEG, MP3, MP4, PNG, WEBM, WEBP, picture


def identify(data):
    with new_content() as file:
        file.write(data)
        found = media.identify(file)
    return found.kind.ending, found.kind.content_type, found.width, found.height


def animation(kind, **options):
    stream = io.BytesIO()
    frames = [Image.new("RGB", (48, 32), colour) for colour in ("red", "green", "blue")]
    frames[0].save(stream, kind, save_all=True, append_images=frames[1:], **options)
    return stream.getvalue()


def turned(kind):
    stream, image = io.BytesIO(), Image.new("RGB", (48, 32))
    exif = image.getexif()
    exif[274] = 6  # to be shown turned by a quarter
    image.save(stream, kind, exif=exif)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (PNG, ("png", "image/png", 48, 32)),
        (animation("PNG"), ("png", "image/png", 48, 32)),
        (JPEG, ("jpg", "image/jpeg", 48, 32)),
        (turned("JPEG"), ("jpg", "image/jpeg", 32, 48)),
        (WEBP, ("webp", "image/webp", 48, 32)),
        (animation("WEBP"), ("webp", "image/webp", 48, 32)),
        (GIF, ("gif", "image/gif", 48, 32)),
        (AVIF, ("avif", "image/avif", 48, 32)),
        (animation("AVIF"), ("avif", "image/avif", 48, 32)),
        (picture("BMP"), ("bmp", "image/bmp", 48, 32)),
        (picture("TIFF"), ("tiff", "image/tiff", 48, 32)),
        (picture("JPEG2000"), ("jp2", "image/jp2", 48, 32)),
        (MP4, ("mp4", "video/mp4", 48, 32)),
        ((FILES / "sound.mp4").read_bytes(), ("mp4", "video/mp4", 48, 32)),
        ((FILES / "turned.mp4").read_bytes(), ("mp4", "video/mp4", 32, 48)),
        (WEBM, ("webm", "video/webm", 48, 32)),
        ((FILES / "live.webm").read_bytes(), ("webm", "video/webm", 48, 32)),
        (MP3, ("mp3", "audio/mpeg", None, None)),
        (turned("AVIF"), ("avif", "image/avif", 32, 48)),
        (AVIF.replace(b"ftypavif", b"ftypheic").replace(b"avifmif1", b"heicmif1"), ("heic", "image/heic", 48, 32)),
        (AVIF.replace(b"ftypavif", b"ftypheix"), ("heic", "image/heic", 48, 32)),
        ((FILES / "red.mov").read_bytes(), ("mov", "video/quicktime", 48, 32)),
        ((FILES / "red.mkv").read_bytes(), ("mkv", "video/x-matroska", 48, 32)),
        (b"fLaC" + b"\0" * 99, ("flac", "audio/flac", None, None)),
        (b"RIFF\x24\0\0\0WAVEfmt " + b"\0" * 99, ("wav", "audio/wav", None, None)),
        (b"OggS" + b"\0" * 99, ("ogg", "audio/ogg", None, None)),
        (b"\0\0\0\x20ftypM4A " + b"\0" * 99, ("m4a", "audio/mp4", None, None)),
        (b"\xff\xf1" + b"\x50" * 200, ("aac", "audio/aac", None, None)),
        (b"FLV\x01" + b"\0" * 99, ("flv", "video/x-flv", None, None)),
        (b"\xff\xfb" + b"\x90" * 200, ("mp3", "audio/mpeg", None, None)),
        (b"\0\0\0\x18ftypdash\0\0\0\0iso5dash" + b"\0" * 99, ("mp4", "video/mp4", None, None)),
        (PNG[:20], ("png", "image/png", None, None)),
    ],
)
def test_the_first_bytes_tell_type_and_size(data, expected):
    assert identify(data) == expected


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", HTML, b"\n <html>", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7", b"PK\x03\x04zip",
     b"\x7fELF" + b"\0" * 600, b"MZ" + b"\0" * 600, b"BM is a word", b"\0\0\1\0icon", b"\xff\xfb", b"8BPS" + b"\0" * 99,
     b"\x89PNG<html>" + HTML, b"GIF<html>" + HTML, b"<!--ftyp--><html>" + HTML, b"The ftyp box is what comes first",
     b"BM" + HTML, b"\xff\xf1 short", b"\x1f\x8b\x08" + b"\0" * 600, b"SQLite format 3\0", b'{"error": "no"}',
     b"#!/bin/sh\n"],
)  # fmt: skip
def test_what_is_no_image_video_or_audio_is_refused(data):
    with pytest.raises(PermanentError) as caught:
        identify(data)

    assert caught.value.code == "unknown_type"


HEADS = [PNG, JPEG, WEBP, GIF, AVIF, MP4, WEBM, MP3, picture("BMP"), picture("TIFF"), picture("JPEG2000")]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(HEADS), st.integers(0, 400), st.binary(max_size=40), st.integers(0, 2_000))
def test_no_damaged_file_breaks_the_reader(data, at, noise, end):
    try:
        ending, _, width, height = identify((data[:at] + noise + data[at + len(noise) :])[:end])
    except PermanentError:
        return
    assert ending
    assert (width is None) == (height is None)


def element(name, content, *, size=None):
    return name + (size or bytes([0x80 | len(content)])) + content


def webm(*in_video):
    video = element(b"\xe0", b"".join(in_video))
    tracks = element(b"\x16\x54\xae\x6b", element(b"\xae", element(b"\x83", b"\x02")) + element(b"\xae", video))
    head = element(b"\x1a\x45\xdf\xa3", element(b"\x42\x82", b"webm"))
    return head + element(b"\x18\x53\x80\x67", tracks, size=b"\x01" + b"\xff" * 7) + b"\0" * 99


PIXELS = element(b"\xb0", b"\x00\x40"), element(b"\xba", b"\x30")


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (webm(*PIXELS), (64, 48)),
        (webm(*PIXELS, element(b"\x54\xb0", b"\x80"), element(b"\x54\xba", b"\x30")), (128, 48)),
        (webm(*PIXELS, element(b"\x54\xb0", b"\x10"), element(b"\x54\xba", b"\x09"), element(b"\x54\xb2", b"\x03")),
         (64, 48)),
        (webm(PIXELS[0]), (None, None)),
        (webm(element(b"\xb0", b"\xff" * 9), PIXELS[1]), (None, None)),
    ],
)  # fmt: skip
def test_the_size_of_a_webm_is_that_at_which_it_is_shown(data, size):
    assert identify(data)[2:] == size


def box(name, content, *, wide=False):
    head = struct.pack(">I4sQ", 1, name, len(content) + 16) if wide else struct.pack(">I4s", len(content) + 8, name)
    return head + content


def mp4(*tracks, wide=False):
    inside = b"".join(box(b"trak", box(b"tkhd", track, wide=wide), wide=wide) for track in tracks)
    return box(b"ftyp", b"isom\0\0\0\0isommp41") + box(b"mdat", b"\0" * 99) + box(b"moov", inside, wide=wide)


STRAIGHT = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
PICTURE, SOUND = (b"\0" * 40 + STRAIGHT + struct.pack(">II", width << 16, 48 << 16) for width in (64, 0))


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (mp4(PICTURE), (64, 48)),
        (mp4(PICTURE, wide=True), (64, 48)),
        (mp4(SOUND, PICTURE), (64, 48)),
        (mp4(b"", b"\0" * 79, PICTURE), (64, 48)),
        (mp4(SOUND), (None, None)),
        (mp4(PICTURE).replace(struct.pack(">I4s", 108, b"moov"), struct.pack(">I4s", 0, b"moov")), (64, 48)),
        (mp4(PICTURE)[:-1], (None, None)),
        (mp4(PICTURE) + box(b"free", b"")[:6], (64, 48)),
        (box(b"ftyp", b"isom\0\0\0\0") + box(b"moov", box(b"trak", box(b"tkhd", b""))), (None, None)),
    ],
)  # fmt: skip
def test_the_size_of_an_mp4_is_that_of_its_first_track_with_a_picture(data, size):
    assert identify(data)[2:] == size


def avif(*properties):
    inside = b"\0" * 4 + box(b"iprp", box(b"ipco", b"".join(properties)))
    return box(b"ftyp", b"avif\0\0\0\0avifmif1") + box(b"meta", inside) + box(b"mdat", b"\0" * 99)


@pytest.mark.parametrize(
    ("properties", "size"),
    [
        ([(64, 48)], (64, 48)),
        ([(64, 64), (512, 256), (64, 48)], (512, 256)),
        ([], (None, None)),
    ],
)
@pytest.mark.parametrize("quarters", range(4))
def test_the_size_of_an_avif_is_that_of_its_largest_picture_as_it_is_turned(properties, size, quarters):
    boxes = [box(b"ispe", struct.pack(">III", 0, width, height)) for width, height in properties]

    found = identify(avif(*boxes, box(b"irot", bytes([quarters]))))[2:]

    assert found == (size[::-1] if quarters % 2 else size)


def test_the_header_of_a_tiff_may_be_at_its_end():
    entries = struct.pack("<H", 2) + struct.pack("<HHII", 256, 4, 1, 64) + struct.pack("<HHII", 257, 4, 1, 48)
    data = b"II*\0" + struct.pack("<I", 1_500_000) + b"\0" * (1_500_000 - 8) + entries + b"\0" * 4

    assert identify(data) == ("tiff", "image/tiff", 64, 48)


HOSTILE = {
    "avif of many extents": box(b"ftyp", b"avif\0\0\0\0avifmif1")
    + box(b"meta", b"\0" * 4 + box(b"iloc", b"\x01" * 400_000) + box(b"iinf", b"\0\0\0\0\xff\xff" * 50_000)),
    "avif of many boxes": box(b"ftyp", b"avif\0\0\0\0avifmif1") + box(b"free", b"") * 3_000_000,
    "jpeg of zeros": b"\xff\xd8\xff\xe0\0\x02" + b"\0" * 20_000_000,
    "jp2 of boxes": picture("JPEG2000")[:12] + box(b"free", b"") * 600_000,
    "webm of elements": webm(*PIXELS)[:5] + b"\xec\x80" * 2_000_000,
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_file_made_to_take_long_does_not(data):
    start = time.process_time()
    with contextlib.suppress(PermanentError):
        identify(data)

    assert time.process_time() - start < 2.0


def test_boxes_that_never_end_are_not_walked_for_ever():
    boxes = b"".join(struct.pack(">I4s", 8, b"moov") for _ in range(200_000))

    assert identify(b"\0\0\0\x18ftypisom\0\0\0\0isommp41" + boxes)[2:] == (None, None)


def test_a_file_is_counted_and_hashed_as_it_is_written():
    with new_content() as file:
        for _ in range(100):
            file.write(b"0123456789")

        assert file.size == 1_000
        assert file.sha256 == hashlib.sha256(b"0123456789" * 100).digest()
        assert file.md5 == hashlib.md5(b"0123456789" * 100).digest()
        file.file.seek(0)
        assert file.file.read() == b"0123456789" * 100


def test_a_file_over_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(content, "MAX_BYTES", 1_000)
    with new_content() as file:
        file.write(b"x" * 1_000)
        with pytest.raises(PermanentError) as caught:
            file.write(b"x")

    assert caught.value.code == "result_too_large"


def test_large_files_wait_for_one_another(monkeypatch):
    monkeypatch.setattr(content, "SMALL_BYTES", 1_000)
    with new_content() as first, new_content() as second:
        first.write(b"x" * 1_001)
        second.write(b"x" * 1_000)
        with pytest.raises(TransientError) as caught:
            second.write(b"x")
        assert caught.value.code == "result_no_room"

    with new_content() as third:
        third.write(b"x" * 1_001)


def test_a_large_file_gives_its_turn_back_though_it_cannot_be_closed(monkeypatch):
    monkeypatch.setattr(content, "SMALL_BYTES", 10)
    with new_content() as file:
        file.write(b"x" * 11)
        close = file.file.close

        def full():
            close()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(file.file, "close", full)

    with new_content() as next_one:
        next_one.write(b"x" * 11)


def test_a_full_disk_is_no_fault_of_the_file(monkeypatch):
    with new_content() as file:

        def full(_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(file.file, "write", full)
        with pytest.raises(TransientError) as caught:
            file.write(b"x")

    assert caught.value.code == "result_no_room"
