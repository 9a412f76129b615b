import base64
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chalicelib import inline, outputs
from chalicelib.errors import PermanentError
from chalicelib.inline import Inline
from chalicelib.outputs import Link
from tests.shapes import A_PNG, HTML, PNG, PNG_2, ROWS, b64, data_url

READ_ERRORS = {"no_output", "worker_failed", "base64_invalid", "unknown_type", "local_path", "link_scheme"}
READ_ROWS = [row for row in ROWS if not row.is_told_by_a_link]


def contents(files):
    return [file.url if isinstance(file, Link) else b"".join(file.pieces()) for file in files]


def read(output):
    """What is found, or the error."""
    try:
        return outputs.read(output)
    except PermanentError as error:
        return error


@pytest.mark.parametrize("row", [row for row in READ_ROWS if row.files], ids=lambda row: row.name)
def test_the_files_of_an_answer_are_found_in_order(row):
    found = outputs.read(row.output)

    assert contents(found.files) == row.files
    assert [error.code for error in found.problems] == row.warnings


@pytest.mark.parametrize("row", [row for row in READ_ROWS if row.error], ids=lambda row: row.name)
def test_an_answer_without_a_file_is_an_error_that_says_why(row):
    with pytest.raises(PermanentError) as caught:
        outputs.read(row.output)

    assert caught.value.code == row.error
    assert len(caught.value.sentence) < 700


def test_the_workers_own_words_are_in_the_sentence():
    with pytest.raises(PermanentError, match="jobId is not a valid input option"):
        outputs.read({"errors": ["Unexpected input. jobId is not a valid input option."]})


def test_a_picture_under_a_result_name_hides_those_under_any_other():
    assert contents(outputs.read({"debug": b64(PNG_2), "images": [b64(PNG)]}).files) == [PNG]


def test_base64_is_decoded_in_pieces(monkeypatch):
    monkeypatch.setattr(inline, "PIECE_CHARS", 40)
    text = "\n".join(b64(PNG)[i : i + 7] for i in range(0, len(b64(PNG)), 7))

    pieces = list(Inline("data:image/png;base64," + text, start=22).pieces())

    assert b"".join(pieces) == PNG
    assert max(len(piece) for piece in pieces) <= 30


def test_base64_that_ends_in_the_middle_of_a_byte_is_an_error():
    with pytest.raises(PermanentError) as caught:
        list(Inline(b64(PNG).rstrip("=")[:41]).pieces())

    assert caught.value.code == "base64_invalid"


@pytest.mark.parametrize("text", ["half a character \ud800", "a NUL \0 in it"])
def test_the_workers_words_can_be_written_down(text):
    found = read({"error": text})

    assert found.sentence.encode().isascii()
    assert "\0" not in found.sentence
    assert "\0" not in outputs.excerpt({"note": text})
    outputs.excerpt({text: text}).encode()


def test_the_workers_words_come_first():
    found = outputs.read({"images": [b64(PNG), b64(PNG_2)[:80] + "*"], "errors": ["x" * 10_000]})

    assert [error.code for error in found.problems] == ["worker_failed", "base64_invalid"]
    assert len(found.problems[0].sentence) < 600
    assert len(read({"error": "x" * 10_000}).sentence) < 600
    assert len(outputs.excerpt({str(number) * 50: "y" * 190 for number in range(10)})) == 500


def test_a_depth_that_is_real_is_reached_and_no_more():
    def within(levels):
        output = b64(PNG)
        for _ in range(levels):
            output = [output]
        return output

    assert contents(outputs.read(within(outputs.MAX_DEPTH - 1)).files) == [PNG]
    assert read(within(outputs.MAX_DEPTH)).code == "no_output"


def test_more_files_than_a_job_may_have_are_left_out_and_said_so():
    found = outputs.read([f"https://results.example/{number}.png" for number in range(100)])

    assert [file.url for file in found.files] == [f"https://results.example/{number}.png" for number in range(64)]
    assert [error.code for error in found.problems] == ["too_many_files"]


def test_an_excerpt_is_short_and_without_files():
    text = outputs.excerpt({"images": [data_url(HTML)], "note": "x", "list": list(range(10_000))})

    assert len(text) <= 500
    assert json.dumps("x") in text
    assert b64(HTML)[:200] not in text


nested = "x"
for _ in range(10_000):
    nested = [nested]


@pytest.mark.parametrize(
    "output",
    [
        nested,
        {"image": " " * 10_000_000 + "!"},
        {"image": "A" * 10_000_000 + "!"},
        {"image": "=" * 10_000_000},
        ["data:" + "a" * 190] * 20_000,
        {"docs": ["https://results.example/" + "a" * 7_000] * 4_000},
        [[0] * 20_000] * 400,
        [{"errors": [{"errors": [["x"] * 50] * 50}] * 50}] * 1_000,
        {str(number): {"status": "error"} for number in range(100_000)},
        [data_url(PNG)[:-10] + str(number).zfill(10) for number in range(5_000)],
        [{f"{n}-{number}": number for number in range(5_000)} for n in range(200)],
        [{"status": "error", "message": f"{n}"} for n in range(50_000)],
        {"message": "https://a " * 800_000},
    ],
    ids=[
        "deep",
        "spaces",
        "letters",
        "padding",
        "data",
        "links",
        "lists",
        "errors",
        "wide",
        "alike",
        "distinct",
        "words",
        "sentences",
    ],
)
def test_an_answer_made_to_take_long_does_not(output):
    start = time.process_time()
    read(output)
    outputs.excerpt(output)

    assert time.process_time() - start < 4.0


names = (
    st.sampled_from(["images", "image", "data", "message", "url", "error", "errors", "status", "input", "x"])
    | st.text()
)
texts = st.text() | st.sampled_from(
    [b64(PNG), data_url(PNG), A_PNG, b64(PNG)[:50], "data:image/png;base64,", "FAILED", "/tmp/a.png", "file:///x", "//"]
) | st.binary().map(lambda content: base64.b64encode(content).decode())  # fmt: skip
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inside: st.lists(inside) | st.dictionaries(names, inside),
    max_leaves=30,
)


@settings(max_examples=400, deadline=None)
@given(values)
def test_no_answer_breaks_the_reader(output):
    outputs.excerpt(output).encode()
    found = read(output)

    if isinstance(found, PermanentError):
        assert found.code in READ_ERRORS
        assert 0 < len(found.sentence.encode()) < 2_000
    else:
        assert 0 < len(found.files) <= outputs.MAX_FILES
        assert all(decoded(file) for file in found.files)


def decoded(file):
    """The file, or the only error that decoding it may raise."""
    try:
        return contents([file])
    except PermanentError as error:
        return error.code == "base64_invalid"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see https://a.example/x.png?X-Amz-Signature=1&y=2 there", "see https://a.example/x.png?… there"),
        ('{"u":"http://a/b#secret"}', '{"u":"http://a/b?…"}'),
        ("what? no link", "what? no link"),
        ("https://a.example/x.png", "https://a.example/x.png"),
    ],
)
def test_a_link_is_shown_without_what_signs_it(text, shown):
    assert outputs.without_signatures(text) == shown
    assert shown.strip() in outputs.excerpt({"message": text}).replace('\\"', '"')
