"""JSON lines: what is a line, and what is refused with file and line."""

import json
from pathlib import Path

import pytest

from lightning_modules.jsonl import read_jsonl

ROW = b'{"a": "\xc3\xa9"}'


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    texts = ["a\u2028b\u2029c\u0085d", "e\x7ff\u00a0"]
    lines = [json.dumps(text, ensure_ascii=False).encode() for text in texts]
    path.write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\r\n\n \t\r\n" + lines[1])
    assert list(read_jsonl(path)) == [(f"{path}:1", texts[0]), (f"{path}:4", texts[1])]
    path.write_bytes(b"\n")
    assert list(read_jsonl(path)) == []


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (ROW + b"\n" + ROW[:-1], r":2: not valid JSON: Expecting ',' delimiter at column 10"),
        (ROW + b"\n" + ROW + b" {}", r":2: not valid JSON: Extra data at column 12"),
        (ROW + b'\n{"a": "\xe9"}', r":2: not valid JSON: byte 8 is not UTF-8 \(invalid continuation byte\)"),
        (ROW + b"\n" + bytes(64), r":2: not valid JSON: it has NUL bytes"),
        (ROW + b"\n\xef\xbb\xbf" + ROW, r":2: not valid JSON: Unexpected UTF-8 BOM"),
        (ROW + b'\n{"a": "b\x0cc"}', r":2: not valid JSON: Invalid control character at"),
        (ROW + b"\n" + b"[" * 100_000, r":2: not valid JSON: maximum recursion depth exceeded"),
        (ROW + b"\n" + b"1" * 5000, r":2: not valid JSON: Exceeds the limit \(4300 digits\)"),
        (ROW + b"\r" + ROW, r":1: not valid JSON: Extra data"),
        (b'"a \\ud83d star"', r":1: not valid JSON: '\\ud83d' is half a character, whose other half is missing"),
        (ROW.decode().encode("utf-16"), r":1: not valid JSON: byte 1 is not UTF-8"),
        (ROW.decode().encode("utf-16-le"), r":1: not valid JSON: .*"),
        (b'{"a": 1}\n'.decode().encode("utf-16-be"), r":1: not valid JSON: it has NUL bytes"),
        (b"\x1f\x8b\x08\x00", r" is compressed; unpack it with gunzip"),
    ],
)
def test_what_is_no_json_in_utf8_is_refused_with_its_line(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path}{sentence}") as refused:
        list(read_jsonl(path))
    assert "\n" not in str(refused.value)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{tmp_path} cannot be read: Is a directory$"):
        list(read_jsonl(tmp_path))
