"""Journals that zokernel 0.1 (commit 117243c) wrote replay to the same bits, or are refused with the reason.

They were written on an AMD EPYC.  Other processors may round roots and matrix products differently: an Intel Xeon does
for some runs of ZO-Adam, ZO-AdaMM and LOZO-M.  For these the weights that the Xeon ended with are kept, too.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zokernel.errors import RunError
from zokernel.journal import Journal, replay_, weights_sha256
from zokernel.journal.compat import upgraded

FOLDER = Path(__file__).parent / "written_by_0_1"
NAMES = sorted(path.stem for path in FOLDER.glob("*.zkj"))
AVERAGES = json.loads((FOLDER / "averages.json").read_text())
ROUNDED = ("zo_adam", "zo_adamm", "lozo_m")  # methods with a root or a matrix product in the update
ENDS = load_file(FOLDER / "ends.safetensors")
REFUSED = {
    "kerzoo_clip_grad": "clip='grad'",
    "kerzoo_clip_grad.in_forward": "clip='grad'",
    "kerzoo_md": "step_schedule='accelerated'",
}


def base(name):
    dtype = torch.bfloat16 if name.endswith(".bf16") else torch.float32
    return {key: value.to(dtype) for key, value in load_file(FOLDER / "base.safetensors").items()}


def test_the_folder_holds_every_method():
    methods = {name.split(".")[0] for name in NAMES}
    assert len(NAMES) == 60
    assert {"mezo", "hizoo", "lozo_m", "zo_adam", "fzoo", "kerzoo_journal", "forward_difference_auto"} <= methods


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_replays_to_the_same_bits(name):
    """Each journal ends with the hash of its run's weights, which the replay checks."""
    journal = Journal.read(FOLDER / f"{name}.zkj")
    (end,) = [event for event in journal.events if event["event"] == "end"]
    weights = base(name)
    optimizer = replay_(weights, journal, allow_other_backend=True)
    if weights_sha256(weights) != end["weights_sha256"]:
        assert name.split(".")[0] in ROUNDED
        for key, value in weights.items():  # a step of 1e-3 times a last bit, and the rounding of a weight
            torch.testing.assert_close(value, ENDS[f"{name}/{key}"], rtol=1e-6, atol=1e-7)
        return
    replay_(base(name), journal)
    assert optimizer.step_count == end["step"] == 6
    if name in AVERAGES:
        assert weights_sha256(optimizer.averaged_weights()) == AVERAGES[name]


@pytest.mark.parametrize("name", REFUSED)
def test_what_rounds_differently_now_is_refused_by_version(name):
    with pytest.raises(RunError, match=f"zokernel 0.1.0 with {REFUSED[name]}"):
        replay_(base(name), Journal.read(FOLDER / f"{name}.zkj"))


def test_different_final_weights_are_refused_or_allowed_by_the_flag(caplog):
    journal = Journal.read(FOLDER / "mezo.zkj")
    (end,) = [event for event in journal.events if event["event"] == "end"]
    right, end["weights_sha256"] = end["weights_sha256"], "0" * 64
    with pytest.raises(RunError, match=r"another kind of processor.*or allow another backend"):
        replay_(base("mezo"), journal)
    weights = base("mezo")
    replay_(weights, journal, allow_other_backend=True)
    assert weights_sha256(weights) == right
    assert "did not end with the weights that the run had at step 6" in caplog.text


@pytest.mark.parametrize("normalize", [False, True])
def test_a_bound_that_was_ignored_is_left_out(normalize):
    """Without ``normalize`` it had no effect, and is refused now; the steps are those without it."""
    options = {"eps": 1e-3, "normalize": normalize, "polyak_share": 0.35}
    header = {"method": "forward_difference", "options": options, "perturb": "in_place"}
    assert ("polyak_share" in upgraded(header)["options"]) == normalize
    assert options["polyak_share"] == 0.35
