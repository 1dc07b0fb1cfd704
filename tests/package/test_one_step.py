"""One MeZO step in place goes through ten files, the ones that docs/one-step.md explains."""

from __future__ import annotations

import re

from crossed_files import PACKAGE, files_of
from trainers import make_trainer

# The closure's own work (a forward without dropout, the loss, its micro-batches) and the record written afterwards.
SCORING = {"finetune/scoring/objective.py", "finetune/scoring/options.py", "finetune/scoring/wide_head.py"}
SCORING |= {"without_adapter.py"}  # where the loss finds the head
SCORING |= {"optim/without_gradients.py"}  # what the closure must not do
CLOSURE = {*SCORING, *(f"finetune/trainer/{name}.py" for name in ("zo_trainer", "micro_batches", "evaluation_mode"))}
RECORD = {"journal/replay.py", "journal/format.py", "journal/writer.py"}


def table() -> set[str]:
    page = (PACKAGE.parent / "docs" / "one-step.md").read_text(encoding="utf-8")
    rows = page.split("## The step that runs")[1].split("A test counts them")[0]
    return set(re.findall(r"^\| `([\w/]+\.py)` \|", rows, re.M))


def test_a_step_crosses_the_ten_files_that_are_explained(parts, tmp_path):
    trainer = make_trainer(parts, tmp_path, max_steps=5, save_strategy="journal", perturb="in_place")
    steps, step = [], trainer.training_step

    def watched(*args, **kwargs):
        results = []
        steps.append(files_of(lambda: results.append(step(*args, **kwargs))))
        return results[0]

    trainer.training_step = watched
    trainer.train()
    crossed = steps[-1] - CLOSURE - RECORD
    assert crossed == table()
    assert len(crossed) == 10
