"""The cleaning of captions by DeepFloyd's rules, which LlamaGen's training texts have gone through.

They remove what texts of the web have beside a description. Their order matters: each reads what the ones before have
left.
"""

import html
import re
from html.entities import html5
from html.parser import HTMLParser
from urllib.parse import unquote_plus

import ftfy

# Elements whose content is no text of the page.
_NOT_TEXT = ("script", "style", "template", "rt", "rp")
_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DOMAIN = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_DASHES = (
    "\\-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_WORD_BREAKS = re.compile(r"[-_]")  # of names like this-is-a-long-name
_ADDRESSES = [(rf"\b(?:{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN})", "") for scheme in ("https?", "www")]
_BEFORE_REPAIR = [
    (r"@\w+\b", ""),  # names of users
    ("[\u31c0-\u9fff]+", ""),  # Chinese characters, and what surrounds them in Unicode
    (f"[{_DASHES}]+", "-"),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # addresses of machines
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),  # a backslash and an n
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILE_TYPES})", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
]
_AFTER_REPAIR = [
    # Names of products: letters and digits in one word.
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    # Advertisements.
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE_TYPES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),  # sizes like 100x200
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    # Of the very first and the very last character, which may be a space.
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
]


class _PageText(HTMLParser):
    """Collects the text of a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)  # which would take `&` without a `;` for a character too
        self.parts: list[str] = []
        self._open: list[str] = []  # elements that are not closed yet

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        while tag in self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not any(tag in _NOT_TEXT for tag in self._open):
            self.parts.append(data)

    def handle_charref(self, name: str) -> None:
        self.handle_data(html.unescape(f"&#{name};"))

    def handle_entityref(self, name: str) -> None:
        self.handle_data(html5.get(f"{name};", f"&{name}"))

    def unknown_decl(self, data: str) -> None:
        if data.startswith("cdata["):
            self.parts.append(data.removeprefix("cdata["))


def _without_tags(text: str) -> str:
    page = _PageText()
    page.feed(text)
    page.close()
    return "".join(page.parts)


def _apply(rules: list[tuple[str, str]], text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _clean_once(text: str) -> str:
    text = unquote_plus(text).strip().lower().replace("<person>", "person")
    text = _apply(_BEFORE_REPAIR, _without_tags(_apply(_ADDRESSES, text)))
    if len(_WORD_BREAKS.findall(text)) > 3:
        text = _WORD_BREAKS.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return _apply(_AFTER_REPAIR, text).strip()


def clean_caption(text: str) -> str:
    """Return a prompt as LlamaGen's text encoder reads it: cleaned twice, as its training texts were.

    It is in lower case. Brackets, `&`, addresses of the web, Chinese characters, long numbers, names of files and some
    words of advertisements are gone.
    """
    return _clean_once(_clean_once(text))
