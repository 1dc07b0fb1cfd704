"""The journal: every method replayed bit for bit, its size, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorded_runs import ALL, NOT_ON_A_GRID, STEPS, network, record_run, same
from torch import nn

import zokernel.journal.writer as writer_module
from zokernel.cli import main
from zokernel.errors import RunError, UsageError
from zokernel.finetune import replay
from zokernel.journal import Journal, JournalWriter, Step, make_header, weights_sha256
from zokernel.journal.format import encode, encode_header
from zokernel.journal.replay import record_of, replay_steps
from zokernel.optim import MeZO


@pytest.mark.parametrize("perturb", ["in_place", "in_place:copy", "in_place:grid", "in_forward"])
@pytest.mark.parametrize("name", ALL)
def test_every_method_is_replayed_bit_for_bit(name, perturb, tmp_path):
    if perturb == "in_forward" and name.startswith(("forward_gradient", "grzo")):
        with pytest.raises(UsageError, match="leave out perturb"):
            record_run(tmp_path, name, perturb=perturb)
        return
    if perturb == "in_place:grid" and name in NOT_ON_A_GRID:
        with pytest.raises(UsageError, match="grid"):
            record_run(tmp_path, name, perturb=perturb)
        return
    weights, _, _ = record_run(tmp_path, name, perturb=perturb)
    assert same(replay(network(), tmp_path), weights[-1])
    assert same(replay(network(), tmp_path, step=4), weights[4])
    assert not torch.equal(weights[4]["0.weight"], weights[5]["0.weight"])


def test_bf16_weights_are_replayed_with_their_stochastic_rounding(tmp_path):
    weights, _, _ = record_run(tmp_path, "mezo", dtype=torch.bfloat16, perturb="in_place:copy")
    assert same(replay(network(torch.bfloat16), tmp_path), weights[-1])


def test_replay_rebuilds_the_optimizers_state_too(tmp_path):
    from zokernel.journal import replay_

    for name in ("mezo_momentum", "zo_adamm", "hizoo", "kerzoo_md_int8", "kerzoo"):
        _, _, optimizer = record_run(tmp_path / name, name)
        net = network()
        rebuilt = replay_(dict(net.named_parameters()), Journal.read(tmp_path / name))
        old, new = optimizer.state_dict(), rebuilt.state_dict()
        assert old["zeroth_order"] == new["zeroth_order"], name
        for key, state in old["state"].items():
            assert state.keys() == new["state"][key].keys()
            for part, value in state.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(new["state"][key][part])), part


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", ALL)
def test_a_record_takes_at_most_16_bytes_per_perturbation_and_32_per_step(name, dtype, tmp_path):
    _, sizes, optimizer = record_run(tmp_path, name, dtype=dtype, steps=3)
    perturbations = optimizer.estimator.num_perturbations
    # Richardson perturbs along each direction twice, at eps and at eps/2: four losses are two perturbations.
    perturbations = max(perturbations, optimizer.forwards_per_step // 2)
    assert max(sizes) <= 16 * perturbations + 32
    if dtype == torch.float32 and name in ("mezo", "subzero", "zo_adam"):
        assert max(sizes) == 8 * perturbations + 24


def test_another_base_or_setting_is_refused_with_the_reason(tmp_path):
    record_run(tmp_path, "mezo")
    with pytest.raises(RunError, match="other values than the run started from"):
        replay(network(seed=1), tmp_path)
    with pytest.raises(RunError, match=r"'0\.weight'.*float64 \[6, 5\] and float32 \[6, 5\] in the journal"):
        replay(network(torch.float64), tmp_path)
    with pytest.raises(RunError, match=r"has no parameter '0\.weight'.*another model"):
        replay(nn.LayerNorm(3), tmp_path)
    with pytest.raises(UsageError, match="holds 9 steps"):
        replay(network(), tmp_path, step=10)
    with pytest.raises(UsageError, match="no journal"):
        replay(network(), tmp_path / "missing")
    journal = Journal.read(tmp_path)
    path = tmp_path / "other.zkj"
    for changes, words in (
        ({"backend": "triton on cuda"}, "triton on cuda.*would be by numba on cpu"),
        ({"options": {"lr": 0.1, "num_perturbations": 3}}, "The options in the journal make estimator"),
    ):
        path.write_bytes(encode_header(journal.header | changes))
        with pytest.raises(RunError, match=words):
            replay(network(), path)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A journal's bytes and the weights after each of its steps."""
    folder = tmp_path_factory.mktemp("recorded")
    weights, _, _ = record_run(folder, "mezo_momentum")
    return (folder / "journal.zkj").read_bytes(), weights


def read_damaged(folder, data):
    """Replay damaged bytes: the number of steps and the weights, or None if they were refused."""
    path = folder / "damaged.zkj"
    path.write_bytes(data)
    try:
        journal = Journal.read(path)
        return journal.num_steps, replay(network(), journal)
    except RunError:
        return None


def test_a_torn_tail_is_dropped_and_all_before_it_kept(recorded, tmp_path):
    data, weights = recorded
    journal = read(tmp_path, data)
    for cut in range(journal.ends[-3], len(data)):
        steps, rebuilt = read_damaged(tmp_path, data[:cut])
        assert steps == sum(end <= cut for end in journal.ends[:STEPS])
        assert same(rebuilt, weights[steps])


def read(folder, data):
    path = folder / "whole.zkj"
    path.write_bytes(data)
    return Journal.read(path)


def test_damage_in_the_middle_is_refused_and_can_be_cut_off(recorded, tmp_path, capsys):
    data, weights = recorded
    end_of_four = read(tmp_path, data).ends[3]
    damaged = bytearray(data)
    damaged[end_of_four + 20] ^= 1
    assert read_damaged(tmp_path, damaged) is None
    path = tmp_path / "damaged.zkj"
    assert main(["journal", "verify", str(path)]) == 1
    message = capsys.readouterr().err
    assert "record of step 4" in message
    assert f"truncate {path} --step 4 --damaged" in message
    assert main(["journal", "truncate", str(path), "--step", "4", "--damaged"]) == 0
    assert same(replay(network(), path), weights[4])
    assert (tmp_path / "damaged.zkj.bak").read_bytes() == bytes(damaged)
    shorter = []
    for steps in (3, 2):  # what was kept before stays
        shorter.append(path.read_bytes())
        assert main(["journal", "truncate", str(path), "--step", str(steps)]) == 0
    backups = [(tmp_path / f"damaged.zkj.bak{more}").read_bytes() for more in ("", ".2", ".3")]
    assert backups == [bytes(damaged), *shorter]
    assert f"the file as it was is {path}.bak.3." in capsys.readouterr().out


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzzed_journals_never_crash_and_never_give_wrong_weights(recorded, tmp_path, data):
    whole, weights = recorded
    start, length = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(1, 200))
    piece = whole[start : start + length]
    kind = data.draw(st.sampled_from(["flip", "cut", "remove", "repeat", "zero", "insert", "swap"]))
    if kind == "flip":
        bits = data.draw(st.lists(st.integers(0, 8 * len(whole) - 1), min_size=1, max_size=4, unique=True))
        damaged = bytearray(whole)
        for bit in bits:
            damaged[bit // 8] ^= 1 << bit % 8
    elif kind == "cut":
        damaged = whole[:start]
    elif kind == "remove":
        damaged = whole[:start] + whole[start + length :]
    elif kind == "repeat":
        damaged = whole[: start + length] + piece * data.draw(st.integers(1, 3)) + whole[start + length :]
    elif kind == "zero":
        damaged = whole[:start] + bytes(len(piece)) + whole[start + length :]
    elif kind == "insert":
        damaged = whole[:start] + data.draw(st.binary(min_size=1, max_size=80)) + whole[start:]
    else:
        other = data.draw(st.integers(0, len(whole) - 1))
        damaged = bytearray(whole)
        damaged[start], damaged[other] = damaged[other], damaged[start]
    result = read_damaged(tmp_path, bytes(damaged))
    if result is not None:
        steps, rebuilt = result
        assert same(rebuilt, weights[steps])


def test_records_of_another_run_cannot_be_put_in(tmp_path):
    record_run(tmp_path / "a", "mezo")
    record_run(tmp_path / "b", "mezo", seed=1)
    a, b = ((tmp_path / name / "journal.zkj").read_bytes() for name in "ab")
    journals = [Journal.read(tmp_path / name) for name in "ab"]
    mixed = a[: journals[0].ends[3]] + b[journals[1].ends[3] :]
    assert read_damaged(tmp_path, mixed) is None


def test_a_full_disk_leaves_the_journal_whole(tmp_path, monkeypatch):
    weights, _, _ = record_run(tmp_path, "mezo")
    journal = Journal.read(tmp_path)
    writer = JournalWriter.append_to(journal)
    real_write = os.write
    writes = []

    def fills_up(descriptor, data):
        if writes:
            raise OSError(28, "No space left on device")
        writes.append(real_write(descriptor, bytes(data)[:5]))
        return 5

    monkeypatch.setattr(writer_module.os, "write", fills_up)
    with pytest.raises(RunError, match=r"cannot be written \(No space left on device\).*repeat the command"):
        writer.append(Step(STEPS, (0.1,), (1.0, 2.0)))
    monkeypatch.undo()
    assert Journal.read(tmp_path).torn_bytes == 0
    assert same(replay(network(), tmp_path), weights[-1])
    writer.append(Step(STEPS, (0.1,), (1.0, 2.0)))
    writer.close()
    assert Journal.read(tmp_path).num_steps == STEPS + 1
    if os.path.exists("/dev/full"):
        full = JournalWriter.append_to(Journal.read(tmp_path))
        os.dup2(os.open("/dev/full", os.O_WRONLY), full._file)
        monkeypatch.setattr(writer_module.os, "ftruncate", lambda *args: None)
        with pytest.raises(RunError, match="cannot be written"):
            full.append(Step(STEPS + 1, (0.1,), (1.0, 2.0)))


def test_steps_of_other_parameter_groups_are_not_replayed():
    weights = [torch.ones(2) for _ in range(3)]
    run = MeZO([{"params": [tensor], "lr": rate} for tensor, rate in zip(weights, (0.1, 0.2, 0.3), strict=True)])
    run.step(lambda: sum(tensor.square().sum() for tensor in weights))
    other = MeZO([{"params": [torch.ones(2)]} for _ in range(2)], lr=0.1)
    with pytest.raises(
        RunError, match=r"^The record has 3 learning rates and the optimizer 2 parameter groups: make it"
    ):
        replay_steps(other, [record_of(run)])


def test_a_run_killed_as_it_began_a_step_continues_under_other_conditions(tmp_path):
    """The journal says that a tensor is frozen from the next step on, and the step that was taken then is not there."""
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))

    def begun():
        net = network()
        return net, MeZO(net, lr=0.1)

    def step(net, optimizer, writer):
        optimizer.step(lambda: net(x).square().mean())
        writer.append(record_of(optimizer))

    net, optimizer = begun()
    header = make_header(optimizer, "mezo", {"lr": 0.1}, base_sha256=weights_sha256(dict(net.named_parameters())))
    writer = JournalWriter.create(tmp_path / "journal.zkj", header)
    step(net, optimizer, writer)
    net[0].weight.requires_grad_(False)
    step(net, optimizer, writer)
    writer.close()
    journal = Journal.read(tmp_path)
    os.truncate(journal.path, journal.ends[-2])
    journal = Journal.read(tmp_path)
    assert (journal.num_steps, journal.events[-1]["frozen"]) == (1, ["0.weight"])
    net, optimizer = begun()
    replay_steps(optimizer, journal.steps)
    writer = JournalWriter.append_to(journal)
    for _ in range(2):
        step(net, optimizer, writer)
    writer.close()
    assert [record.conditions.frozen for record in Journal.read(tmp_path).steps] == [(), (), ()]
    assert same(replay(network(), tmp_path), dict(net.named_parameters()))


def test_numbers_survive_as_they_are(tmp_path):
    for values in ((0.1, 1e-300, 5e-324), (0.5, 3.4e38, -0.0), (1e39, 2.0)):
        record = Step(7, (1e-7, 3e-5), values)
        writer = JournalWriter.create(tmp_path / "one.zkj", {})
        for step in range(7):
            writer.append(Step(step, (1.0,), ()))
        writer.append(record)
        writer.close()
        assert Journal.read(tmp_path / "one.zkj").steps[7] == record
    with pytest.raises(RunError, match="header lacks backend, base_sha256"):
        replay(network(), tmp_path / "one.zkj")
    assert main(["journal", "show", str(tmp_path / "one.zkj")]) == 0
    with pytest.raises(UsageError, match="65535 losses"):
        encode(Step(0, (0.1,), (0.0,) * 70_000))


def test_show_verify_truncate(tmp_path, capsys):
    weights, _, _ = record_run(tmp_path, "kerzoo")
    assert main(["journal", "show", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "9 steps" in output
    assert "kerzoo" in output
    assert "Dense('rademacher'), seed 0, by numba on cpu" in output
    assert main(["journal", "show", str(tmp_path), "--step", "2"]) == 0
    assert capsys.readouterr().out.startswith("step 2: learning rate 0.004\n")
    assert main(["journal", "verify", str(tmp_path)]) == 0
    assert "every checksum right" in capsys.readouterr().out
    assert main(["journal", "truncate", str(tmp_path), "--step", "10"]) == 2
    assert main(["journal", "truncate", str(tmp_path)]) == 2
    assert main(["journal", "truncate", str(tmp_path), "--step", "5"]) == 0
    assert same(replay(network(), tmp_path), weights[5])
    assert main(["journal", "truncate", str(tmp_path), "--step", "0"]) == 0
    assert same(replay(network(), tmp_path), weights[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("verify RUN --damaged", "--damaged is for journal truncate: leave it out of journal verify."),
        ("show RUN --damaged false", "--damaged is for journal truncate: leave it out of journal show."),
        ("show RUN --base nothing", "--base is for journal verify: leave it out of journal show."),
        ("verify RUN --step=2", "--step is for journal show and truncate: leave it out of journal verify."),
        ("truncate RUN --step 2 --model-revision main", "--model_revision is for journal verify: leave it out of"),
        (
            "verify RUN --trust_remote_code true",
            "--trust_remote_code is for the model of --base: add it, or leave both",
        ),
    ],
)
def test_flags_of_another_action_are_refused(words, message, tmp_path, capsys):
    record_run(tmp_path, "mezo")
    assert main(["journal", *words.replace("RUN", str(tmp_path)).split()]) == 2
    assert message in capsys.readouterr().err


def test_a_journal_of_another_format_or_file_is_refused(tmp_path):
    record_run(tmp_path, "mezo")
    data = (tmp_path / "journal.zkj").read_bytes()
    path = tmp_path / "x.zkj"
    for content, words in (
        (b"ZKJRNL02" + data[8:], "format version '02'"),
        (b"PK\x03\x04" + data, "not a zokernel journal"),
        (data[:40], "header is damaged"),
        (b"", "not a zokernel journal"),
    ):
        path.write_bytes(content)
        with pytest.raises(RunError, match=words):
            Journal.read(path)
    shutil.copy(tmp_path / "journal.zkj", path)
    assert json.dumps(Journal.read(path).header)
