"""The settings of a run as a frozen record: each with its value and with who decided it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.trainer_utils import SchedulerType

from zokernel._version import __version__
from zokernel.files import write_json
from zokernel.finetune.run_files import SETTINGS_FILE, read_run_file
from zokernel.secrets import hide_in_values

SOURCES = ("user", "recipe", "default", "auto", "hardware")
# Shown even where they are plain defaults.
IMPORTANT = (
    *("method", "method_args", "learning_rate", "eps", "num_perturbations", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "max_steps", "num_train_epochs", "precision", "perturb", "lr_scheduler_type"),
    "seed",
)
# What a continued run may change, beside where it is logged: how long it is, what is evaluated and saved, and how the
# batch of a step is dealt out (the journal checks its size).
_FREE = {
    *("max_steps", "num_train_epochs", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("early_stopping_patience", "per_device_eval_batch_size", "auto_find_batch_size", "ignore_data_skip"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "zo_parallel", "zo_point_ranks"),
    *("do_train", "do_eval", "do_predict", "use_cpu", "restore"),
}
_OPEN_ROW = ("perturb", "decided when the model is loaded", "auto")
_FREE_PREFIXES = ("eval_", "save_", "torch_empty_cache")


@dataclass(frozen=True)
class Setting:
    """One setting of a run.

    Attributes:
        name: Its field of ``ZOConfig``.
        value: Its value, as JSON has it.
        source: ``user`` (a flag or constructor argument), ``recipe`` (the file of ``--config``), ``default``, ``auto``
            (``--method auto``, or a rule about model and data) or ``hardware``.
    """

    name: str
    value: Any
    source: str


@dataclass(frozen=True)
class RunSettings:
    """Every setting of a run that matters to its result.

    A decision that is taken late makes a new record: see :meth:`with_`.

    Attributes:
        requested: What the user asked for.
        settings: The settings in the order of ``ZOConfig``'s fields.

    Example:
        >>> from zokernel.finetune import ZOConfig
        >>> settings = RunSettings(ZOConfig(output_dir="runs/mine"), (Setting("perturb", "auto", "default"),))
        >>> settings.with_("hardware", perturb="in_forward")["perturb"], settings["perturb"]
        ('in_forward', 'auto')
    """

    requested: Any  # a ZOConfig, or other TrainingArguments with the fields of ZOArguments
    settings: tuple[Setting, ...]

    def __iter__(self) -> Iterator[Setting]:
        return iter(self.settings)

    def __getitem__(self, name: str) -> Any:
        return self.setting(name).value

    def setting(self, name: str) -> Setting:
        """Return a setting by name."""
        return next(setting for setting in self.settings if setting.name == name)

    def with_(self, source: str, /, **values: Any) -> RunSettings:
        """Return a record in which ``source`` has decided some settings."""
        decided = {name: Setting(name, value, source) for name, value in values.items()}
        return replace(self, settings=tuple(decided.get(setting.name, setting) for setting in self.settings))

    def arguments(self) -> Any:
        """Return a copy of the request, with everything filled in."""
        filled = copy.copy(self.requested)
        requested = as_json(self.requested.to_dict())
        changed = {setting.name: setting.value for setting in self.settings if setting.value != requested[setting.name]}
        if "lr_scheduler_type" in changed:
            changed["lr_scheduler_type"] = SchedulerType(changed["lr_scheduler_type"])
        vars(filled).update(changed)
        return filled

    def values(self) -> dict[str, Any]:
        """Return the values by name."""
        return {setting.name: setting.value for setting in self.settings}

    def table(self) -> str:
        """Return the settings that matter most, and those that are no plain defaults, as an aligned table."""
        values = hide_in_values(self.values())
        rows = [
            (s.name, _text(values[s.name]), s.source) if s.name != "perturb" or s.value != "auto" else _OPEN_ROW
            for s in self.settings
            if s.value is not None
            and (s.name in IMPORTANT or s.source != "default")
            and s.name not in _hidden_names(self)
        ]
        rows.sort(key=lambda row: IMPORTANT.index(row[0]) if row[0] in IMPORTANT else len(IMPORTANT))
        rows.insert(0, ("setting", "value", "decided by"))
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {source}" for name, value, source in rows)

    def write(self, folder: Path) -> None:
        """Write ``settings.json``."""
        values = hide_in_values(self.values())
        rows = [{"name": s.name, "value": values[s.name], "source": s.source} for s in self.settings]
        write_json(folder / SETTINGS_FILE, {"zokernel": __version__, "settings": rows})


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON has them; what it cannot hold becomes text."""
    return json.loads(json.dumps(dict(values), default=str))


def read_settings(folder: Path) -> dict[str, Setting] | None:
    """Return the settings recorded in a run's folder by name; None if there are none.

    Raises:
        UsageError: If the file is damaged.
    """
    path = folder / SETTINGS_FILE
    if not path.exists():
        return None
    return {row["name"]: Setting(**row) for row in read_run_file(path)["settings"]}


def keep_recorded(new: RunSettings, folder: Path) -> RunSettings:
    """Return the settings with what a run in a folder began with, where it is not chosen now.

    That is an ``eps`` that nobody chose then, either, and that the run ends with its last weights, as one of streamed
    weights does.

    Args:
        new: The settings that were resolved.
        folder: The output folder, which may hold a run of a version with another default.
    """
    recorded = read_settings(folder) or {}
    eps, best = recorded.get("eps"), recorded.get("load_best_model_at_end")
    if eps is not None and eps.source == new.setting("eps").source == "default":
        new = new.with_("default", eps=eps.value)
    if best is not None and not best.value and new.setting("load_best_model_at_end").source == "default":
        new = new.with_(best.source, load_best_model_at_end=False)
    return new


def name_derived(settings: RunSettings) -> RunSettings:
    """Return the settings with ``auto`` as the source of those that follow from others that were given."""
    names: frozenset[str] = getattr(settings.requested, "derived", frozenset())
    derived = {s.name: s.value for s in settings if s.name in names and s.source == "default"}
    return settings.with_("auto", **derived)


def first_difference(old: Mapping[str, Setting], new: RunSettings) -> str | None:
    """Return the first setting that gives a continued run other numbers, with the old and the new value.

    Args:
        old: The recorded settings by name.
        new: The requested ones.

    Returns:
        ``NAME: OLD there, NEW asked for``, or None if the run may be continued.
    """
    for setting in new:
        recorded = old.get(setting.name)
        if recorded is None or recorded.value == setting.value or setting.name in _FREE:
            continue
        if setting.name.endswith("_token"):  # transformers writes no token down, not even one of a tokenizer
            continue
        # How a schedule ends follows from the run's length; the journal compares the rates.
        is_derived = recorded.source == setting.source == "auto" and setting.name == "lr_scheduler_kwargs"
        if not is_derived and not setting.name.startswith(_FREE_PREFIXES):
            return f"{setting.name}: {_text(recorded.value)} there, {_text(setting.value)} asked for"
    return None


def _hidden_names(settings: RunSettings) -> tuple[str, ...]:
    return ("num_train_epochs",) if (settings["max_steps"] or 0) > 0 else ("max_steps",)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)
