"""From a file's bytes to its text: compression, byte order marks and encodings."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import re
import zlib
from pathlib import Path
from typing import Any

from zokernel.errors import UsageError

_COMPRESSED = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ\x00": lzma.decompress}
# UTF-32 comes first: its little-endian mark begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how a file that git-lfs has not fetched begins
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_bytes(path: Path) -> bytes:
    """Return a file's content, uncompressed if it is gzip, bzip2 or xz data, whatever its name says.

    Raises:
        UsageError: If the file is missing, a folder, unreadable, damaged, or a git-lfs pointer.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name one file in it.")
    if not path.is_file():
        raise UsageError(f"There is no file {path}: check the path (it is relative to {Path.cwd()}).")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error
    for magic, decompress in _COMPRESSED.items():
        if data.startswith(magic):
            try:
                data = decompress(data)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise UsageError(
                    f"{path} is compressed and damaged or cut off ({error}): copy or download it again."
                ) from error
            break
    if data.startswith(LFS_POINTER):
        raise UsageError(f"{path} is a git-lfs pointer, not the data: run 'git lfs pull' in its repository.")
    return data


def decode(data: bytes, path: Path) -> str:
    """Return the text of UTF-8 data, or of UTF-16 or UTF-32 data with a byte order mark.

    Raises:
        UsageError: If it is in another encoding; the message names the line, and how to convert it.
    """
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line, name = data.count(b"\n", 0, error.start) + 1, encoding.removesuffix("-sig").upper()
        raise UsageError(
            f"{path} is not {name} text (line {line}, byte 0x{data[error.start]:02x}): "
            f"save it as 'CSV UTF-8' in Excel, or convert it with 'iconv -f WINDOWS-1252 -t UTF-8 {path} > converted'."
        ) from error
    if "\0" in text[:1000]:
        raise UsageError(
            f"{path} has NUL characters, so it is no UTF-8 text: if it is UTF-16, convert it with "
            f"'iconv -f UTF-16LE -t UTF-8 {path} > converted'."
        )
    return text


def without_surrogates(value: Any) -> Any:
    r"""Return a JSON value with every half of a surrogate pair replaced by U+FFFD, the replacement character.

    Such halves are left where text was cut inside an emoji.  No encoding and no tokenizer takes them.

    Example:
        >>> without_surrogates({"text": ["half \ud83d", "whole \ud83d\ude00"]}) == {"text": ["half \ufffd", "whole 😀"]}
        True
    """
    if isinstance(value, str):
        if _SURROGATE.search(value) is None:
            return value
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {without_surrogates(key): without_surrogates(item) for key, item in value.items()}
    return value
