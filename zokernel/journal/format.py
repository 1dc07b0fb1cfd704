r"""The bytes of a journal: a header, then one chained record per step.

======  =========================================================================================
bytes   header
======  =========================================================================================
8       ``ZKJRNL`` and the format version as two digits
4       length n of the JSON that follows, little-endian like every number here
n       JSON: method, options, parameters, hash of the base weights, ... (:func:`zokernel.journal.replay.make_header`)
8       checksum
======  =========================================================================================

======  =========================================================================================
bytes   step record
======  =========================================================================================
1       kind: 0xA8 if the losses take eight bytes each, 0xA4 if four hold them exactly
1       number g of learning rates that follow: one, or one per parameter group when they differ
2       number m of losses
4       step, from zero
8 g     learning rates
4|8 m   losses, in the order in which the estimator names its points
8       checksum
======  =========================================================================================

An event record is 0xAE, three zero bytes, four bytes of length, JSON and a checksum: an evaluation, the end of the run,
or, before a step, that other parameters are frozen or the weights perturbed otherwise than in the steps before.  Every
checksum is BLAKE2b, cut to eight bytes, of the previous checksum and the record before it, so that records can be
neither changed nor left out, repeated, reordered or moved to another journal without being noticed.

With one learning rate a two-point step with P directions takes 24 + 16 P bytes; 24 + 8 P when its losses are fp32.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from zokernel.errors import RunError, UsageError

VERSION = 1
MAGIC = f"ZKJRNL{VERSION:02d}".encode()
CHECKSUM_BYTES = 8
STEP_WIDE, STEP_NARROW, EVENT = 0xA8, 0xA4, 0xAE
_STEP_HEAD = struct.Struct("<BBHI")
_EVENT_HEAD = struct.Struct("<BxxxI")
_LENGTH = struct.Struct("<I")
LONGEST_HEADER = 1 << 30
CONDITIONS = "conditions"
"""Name of the event that tells what holds from the next step on."""


@dataclass(frozen=True)
class Conditions:
    """What may change between steps and decides what they do.

    Attributes:
        perturb: How the weights are perturbed and restored; nothing if unknown.
        frozen: Names of the parameters that are left alone.
        groups: Number of parameter groups; nothing if unknown.
    """

    perturb: str | None = None
    frozen: tuple[str, ...] = ()
    groups: int | None = None

    @classmethod
    def of_header(cls, header: Mapping[str, Any]) -> Conditions:
        """Return those with which a run begins."""
        groups = header.get("groups")
        return cls(header.get("perturb"), (), len(groups) if isinstance(groups, list) else None)

    def after(self, event: Mapping[str, Any]) -> Conditions:
        """Return what holds after an event."""
        if event.get("event") != CONDITIONS:
            return self
        return replace(self, perturb=event["perturb"], frozen=tuple(event["frozen"]))

    def same_steps(self, other: Conditions) -> bool:
        """Return whether steps come out alike: all ways of perturbing that leave the weights in place do."""
        ways = [
            name if name.startswith("in_place") else "" for name in (self.perturb, other.perturb) if name is not None
        ]
        return self.frozen == other.frozen and len(set(ways)) < 2


@dataclass(frozen=True)
class Step:
    """What one optimizer step needs to be repeated.

    Attributes:
        step: Which step, from zero.
        learning_rates: One for all parameter groups, or one each.
        losses: Every loss the estimator requested, in its order (forward gradients: losses, then derivatives).
        conditions: What held during the step, as far as it is known.
    """

    step: int
    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]
    conditions: Conditions | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Event:
    """Something that happened between steps: plain JSON with the key ``event``."""

    content: dict[str, Any]


Record = Step | Event


def checksum(previous: bytes, body: bytes) -> bytes:
    """Return the eight bytes that follow ``body`` in a journal where ``previous`` was the checksum before it."""
    return hashlib.blake2b(previous + body, digest_size=CHECKSUM_BYTES).digest()


def encode_header(header: dict[str, Any]) -> bytes:
    """Return the header's bytes, checksum included."""
    text = json.dumps(header, separators=(",", ":")).encode()
    body = MAGIC + _LENGTH.pack(len(text)) + text
    return body + checksum(b"", body)


def decode_header(data: bytes | memoryview) -> tuple[dict[str, Any], int]:
    """Read a header.

    Args:
        data: The file from its beginning.

    Returns:
        The header and its length in bytes.

    Raises:
        RunError: If this is no journal, one of another format version, or its header is damaged.
    """
    start = len(MAGIC) + _LENGTH.size
    magic = bytes(data[: len(MAGIC)])
    if magic[:6] != MAGIC[:6]:
        raise RunError("This is not a zokernel journal: it does not begin like one.")
    if magic != MAGIC:
        raise RunError(
            f"The journal has format version {magic[6:].decode(errors='replace')!r} and this zokernel reads version "
            f"{VERSION:02d}: use the zokernel that wrote it."
        )
    length = _LENGTH.unpack_from(data, len(MAGIC))[0] if len(data) >= start else LONGEST_HEADER
    end = start + length
    if len(data) < end + CHECKSUM_BYTES or bytes(data[end : end + CHECKSUM_BYTES]) != checksum(b"", bytes(data[:end])):
        raise RunError("The journal's header is damaged, so nothing in it can be trusted: restore it from a copy.")
    return json.loads(bytes(data[start:end])), end + CHECKSUM_BYTES


def encode(record: Record) -> bytes:
    """Return a record's bytes without its checksum.

    Raises:
        UsageError: If it holds more numbers than the format has room for.

    Example:
        >>> len(encode(Step(0, (1e-6,), (0.5, 0.25)))), len(encode(Step(0, (1e-6,), (0.1, 0.2))))
        (24, 32)
    """
    if isinstance(record, Event):
        text = json.dumps(record.content, separators=(",", ":")).encode()
        return _EVENT_HEAD.pack(EVENT, len(text)) + text
    rates, losses = record.learning_rates, record.losses
    if len(set(rates)) == 1:
        rates = rates[:1]
    if len(losses) > 0xFFFF or len(rates) > 0xFF:
        raise UsageError("A journal holds up to 65535 losses and 255 learning rates per step: use fewer perturbations.")
    is_narrow = all(_fits_float32(loss) for loss in losses)
    head = _STEP_HEAD.pack(STEP_NARROW if is_narrow else STEP_WIDE, len(rates), len(losses), record.step)
    return head + struct.pack(f"<{len(rates)}d{len(losses)}{'f' if is_narrow else 'd'}", *rates, *losses)


def record_length(data: bytes | memoryview, offset: int) -> int | None:
    """Return the length without checksum of the record that begins at ``offset``; None if none can begin there.

    A record that the data end in the middle of has a length, too: as far as its own first bytes tell.
    """
    if len(data) < offset + _STEP_HEAD.size:
        return None
    kind = data[offset]
    if kind == EVENT:
        return _EVENT_HEAD.size + _EVENT_HEAD.unpack_from(data, offset)[1]
    if kind in (STEP_WIDE, STEP_NARROW):
        _, rates, losses, _ = _STEP_HEAD.unpack_from(data, offset)
        return _STEP_HEAD.size + 8 * rates + (8 if kind == STEP_WIDE else 4) * losses
    return None


def record_end(data: bytes | memoryview, offset: int, previous: bytes) -> int | None:
    """Return where the record at ``offset`` ends, or None unless it is whole and its checksum follows ``previous``."""
    length = record_length(data, offset)
    if length is None or offset + length + CHECKSUM_BYTES > len(data):
        return None
    body, end = bytes(data[offset : offset + length]), offset + length + CHECKSUM_BYTES
    return end if bytes(data[offset + length : end]) == checksum(previous, body) else None


def decode(data: bytes | memoryview, offset: int) -> Record:
    """Read the record at ``offset``, whose checksum has been verified."""
    kind = data[offset]
    if kind == EVENT:
        start = offset + _EVENT_HEAD.size
        return Event(json.loads(bytes(data[start : start + _EVENT_HEAD.unpack_from(data, offset)[1]])))
    _, rates, losses, step = _STEP_HEAD.unpack_from(data, offset)
    layout = f"<{rates}d{losses}{'d' if kind == STEP_WIDE else 'f'}"
    values: Sequence[float] = struct.unpack_from(layout, data, offset + _STEP_HEAD.size)
    return Step(step, tuple(values[:rates]), tuple(values[rates:]))


def _fits_float32(value: float) -> bool:
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0] == value
    except OverflowError:
        return False
