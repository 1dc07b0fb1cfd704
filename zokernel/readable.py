"""Numbers of bytes, of seconds and of things as people read them: one form in logs, errors, tables and reports."""

from __future__ import annotations


def plural(number: int, noun: str) -> str:
    """Return a number of things, in the plural unless it is one.

    Args:
        number: How many.
        noun: What one of them is called.

    Example:
        >>> plural(1, "step"), plural(2000, "step"), plural(0, "forward pass"), plural(2, "batch")
        ('1 step', '2,000 steps', '0 forward passes', '2 batches')
    """
    ending = "" if number == 1 else "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number:,} {noun}{ending}"


def readable_bytes(count: float) -> str:
    """Return a number of bytes in the largest binary unit of which it has one, with three digits.

    Example:
        >>> [readable_bytes(value) for value in (0, 99328, 755515392, 3 * 2**31)]
        ['0 B', '97 KiB', '721 MiB', '6 GiB']
    """
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999 * size else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"


def readable_seconds(seconds: float) -> str:
    """Return a duration in its largest unit and the one below that.

    Example:
        >>> [readable_seconds(value) for value in (0.0421, 7.31, 93.4, 7500, 200000)]
        ['0.042 s', '7.3 s', '1 min 33 s', '2 h 5 min', '2 d 7 h']
    """
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    for size, name, small, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {name}" + (f" {rest} {part}" if rest else "")
    raise AssertionError(seconds)
