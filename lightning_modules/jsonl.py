"""One reader of JSON lines, for all that come from outside."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"


def read_jsonl(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Read a UTF-8 file of one JSON value a line; yields each after its place, "file:line".

    Blank lines count, but hold nothing. Raises ValueError if a line is not JSON in UTF-8, or the file cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):  # only a newline ends one, not all that Unicode calls a separator
                if number == 1 and line.startswith(_GZIP):
                    raise ValueError(f"{path} is compressed; unpack it with gunzip")
                line = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
                if line.strip():
                    yield f"{path}:{number}", _parsed(line, f"{path}:{number}")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _parsed(line: bytes, place: str) -> Any:
    try:
        text = line.decode("utf-8")
        if "\0" in text:
            raise ValueError("it has NUL bytes, so it is not in UTF-8 or was not written to the end")
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # which refuses halves of characters
        return value
    except UnicodeDecodeError as error:
        cause = f"byte {error.start + 1} is not UTF-8 ({error.reason})"
    except UnicodeEncodeError as error:
        cause = f"{error.object[error.start]!a} is half a character, whose other half is missing"
    except json.JSONDecodeError as error:
        cause = f"{error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # or numbers of thousands of digits, brackets in brackets without end
        cause = str(error)
    raise ValueError(f"{place}: not valid JSON: {cause}")
