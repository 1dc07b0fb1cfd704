"""Runs of the command line that die in a step, and whether two of them ended alike."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from zokernel.finetune.trainer import resumable


class Stop(Exception):
    """Stands in for a kill: everything in memory is lost."""


def stop_at(monkeypatch, step):
    """Make the run die as a step begins."""
    real = resumable.RunJournal.step

    def dying(self, optimizer, closure):
        if optimizer.step_count == step - 1:
            raise Stop
        return real(self, optimizer, closure)

    monkeypatch.setattr(resumable.RunJournal, "step", dying)


@contextmanager
def ctrl_c_in(monkeypatch, step):
    """A context in which a run gets Ctrl-C as a step begins: it finishes the step and ends."""
    real = resumable.RunJournal.step

    def interrupted(self, optimizer, closure):
        if optimizer.step_count == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, optimizer, closure)

    with monkeypatch.context() as patch:
        patch.setattr(resumable.RunJournal, "step", interrupted)
        yield


def interrupted_run(run, monkeypatch, *flags, step=10):
    """Let the run in the folder ``cut`` die."""
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Stop):
            run("cut", *flags)


def weights(folder):
    return load_file(next(folder.glob("*model.safetensors")))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
