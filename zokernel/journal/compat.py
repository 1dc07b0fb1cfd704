"""Headers of journals that earlier versions wrote, in the words of this one.

zokernel 0.1 (without the key ``perturb``) kept two settings where there is one now: how weights are restored, and
whether the losses were taken at weights that had moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zokernel.errors import RunError

# Trained tensors are moved in place and restored up to rounding, or left in place while something else perturbs them.
_RESTORE = {"fold": "in_place", "grid": "in_place:grid", "copy": "in_place:copy", "still": "in_forward"}
OLD_KEYS = {"restore", "visits_points"}


def is_old(header: Mapping[str, Any]) -> bool:
    """Return whether a header was written by zokernel 0.1.

    Example:
        >>> is_old({"restore": "fold", "visits_points": True}), is_old({"perturb": "in_place"})
        (True, False)
    """
    return "perturb" not in header and header.keys() >= OLD_KEYS


def upgraded(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return a header of zokernel 0.1 as this version would have written it; any other without options of no effect.

    Raises:
        RunError: If the run used something that this version rounds differently.

    Example:
        >>> old = {"method": "mezo", "options": {"restore": "copy"}, "restore": "copy", "visits_points": True,
        ...        "zokernel": "0.1.0"}
        >>> new = upgraded(old)
        >>> new["perturb"], new["options"]
        ('in_place:copy', {'perturb': 'in_place:copy'})
    """
    header = _without_idle_bound(header)
    if not is_old(header):
        return header
    options = dict(header["options"])
    if options.get("clip") == "grad" or options.get("step_schedule") == "accelerated":
        option = "clip='grad'" if options.get("clip") == "grad" else "step_schedule='accelerated'"
        raise RunError(
            f"The journal was written by zokernel {header['zokernel']} with {option}, whose step is rounded "
            "differently since 0.2: replay it with the version that wrote it."
        )
    # With "fold" and unmoved weights every step is one rounded sum, as it is with in_forward.
    perturb = _RESTORE[header["restore"]] if header["visits_points"] else "in_forward"
    if header["method"] == "forward_gradient":
        perturb = "tangents"
    options.pop("restore", None)
    if perturb.startswith("in_place:"):
        options["perturb"] = perturb
    is_printed = options.keys() & {"paper_k5", "grad_at", "step_schedule"} or options.get("clip", "none") != "none"
    method = "kerzoo_printed" if header["method"] == "kerzoo" and is_printed else header["method"]
    new = {key: value for key, value in header.items() if key not in OLD_KEYS}
    changed = {"method": method, "options": options, "perturb": perturb, "update": ""}
    return new | changed | {"upgraded_from": header["zokernel"]}


def _without_idle_bound(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return a header without a bound on steps that are not normalised, which was ignored before it was refused."""
    options = dict(header.get("options", {}))
    if header.get("method") != "forward_difference" or options.get("normalize") or "polyak_share" not in options:
        return dict(header)
    del options["polyak_share"]
    return dict(header) | {"options": options}
