"""The settings that zeroth-order training adds to transformers' ``TrainingArguments``, whatever the trainer."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field
from typing import Any

from zokernel.errors import UsageError
from zokernel.optim import get_method, method_options
from zokernel.optim.options import own_options
from zokernel.optim.registry import is_plugin, methods
from zokernel.perturb.registry import NAMES

# Options that most methods share and that have a flag of their own; the others go through --method_args.
SHARED_OPTIONS = ("eps", "num_perturbations", "distribution", "momentum")
# Options of methods that are set by flags of other names, or that the trainer itself reads.
HAVE_FLAGS = {"lr": "learning_rate", "seed": "seed", "weight_decay": "weight_decay", "perturb": "perturb"}
AUTO = "auto"
PERTURB = (AUTO, *NAMES)


@dataclass
class ZOArguments:
    """Which zeroth-order method trains, and how it takes its losses.

    Beside these fields, a subclass has those of some ``TrainingArguments``.
    """

    method: str = field(
        default="mezo",
        metadata={
            "help": "Optimizer: a zeroth-order method; auto, which also chooses batch, directions and schedule; or "
            "sgd/adamw as the first-order baseline."
        },
    )
    eps: float | None = field(
        default=None, metadata={"help": "Radius of the perturbation (default: the method's own, usually 1e-3)."}
    )
    num_perturbations: int | None = field(
        default=None, metadata={"help": "Directions per step; each costs one or two forwards (default: the method's)."}
    )
    distribution: str | None = field(
        default=None, metadata={"help": "Distribution of the directions: rademacher, gaussian, uniform or sphere."}
    )
    momentum: float | None = field(default=None, metadata={"help": "Momentum, where the method has it."})
    perturb: str = field(
        default="auto",
        metadata={
            "help": "in_place, in_place:grid or in_place:copy (the weights are moved, and restored up to rounding or "
            "exactly); in_forward (layers read perturbed copies, made as they are needed); stacked (all losses of a "
            "step in one forward, for adapters and low-rank directions); per_example (the rows of each example see "
            "their own weights, as grzo needs); auto: stacked where it pays, in_forward on a "
            "CPU under bf16 autocast, else in_place."
        },
    )
    zo_parallel: str | None = field(
        default=None,
        metadata={
            "help": "What several processes (torchrun) share: data (each its own batch, the default), perturbation "
            "(the losses of one batch) or hybrid."
        },
    )
    zo_point_ranks: int | None = field(
        default=None, metadata={"help": "Processes that share one batch, for --zo_parallel hybrid."}
    )
    method_args: list[str] | None = field(
        default=None, metadata={"help": "Further options of the method, as key=value pairs: kernel_order=3 radius=0.5."}
    )
    freeze_layers: float = field(
        default=0.0, metadata={"help": "Share of the layers, from the first on, that are not trained."}
    )
    freeze_vectors: bool = field(default=False, metadata={"help": "Do not train scales of norms, and biases."})
    profile: bool = field(
        default=False,
        metadata={"help": "Write where the time of a step goes: profile.md, and profile.json for a trace viewer."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start over in an output_dir that already holds a run."}
    )

    def check_method(self, *, by_example: bool = True) -> None:
        """Check that the method exists, the way of perturbing, and that no flag of them would be ignored.

        Args:
            by_example: Whether methods that need the loss of every example are among those to choose from.

        Raises:
            UsageError: If something does not exist, or would be ignored.
        """
        kinds = methods()
        if self.method not in (AUTO, *kinds) and not is_plugin(self.method):
            names = [name for name, kind in kinds.items() if by_example or not getattr(kind, "by_example", False)]
            raise UsageError(f"There is no method {self.method!r}: choose one of {', '.join([AUTO, *names])}.")
        if self.perturb not in PERTURB:
            raise UsageError(f"perturb must be one of {', '.join(PERTURB)}, not {self.perturb!r}.")
        if is_first_order(self.method):
            # Gradients of several processes are averaged over their batches, as zo_parallel data has it.
            for name, allowed in (("perturb", (AUTO,)), ("zo_parallel", (None, "data")), ("zo_point_ranks", (None,))):
                if getattr(self, name) not in allowed:
                    raise UsageError(
                        f"{name} says how the losses of a zeroth-order step are taken, and {self.method} takes "
                        "gradients: leave it out."
                    )
        if self.zo_point_ranks is not None and self.zo_parallel != "hybrid":
            raise UsageError("zo_point_ranks is for zo_parallel hybrid: add it, or leave both out.")
        pairs = self.method_args
        if isinstance(pairs, str):
            raise UsageError(f'method_args is a list of key=value texts: write ["{pairs}"].')
        if pairs is not None and not (isinstance(pairs, Sequence) and all(isinstance(pair, str) for pair in pairs)):
            raise UsageError(f"method_args is a list of key=value texts, not {pairs!r}.")

    def method_options(self) -> dict[str, Any]:
        """Return the keyword arguments for the method: the flags that were set, and ``method_args``.

        Raises:
            UsageError: If the method has no such option, or a value is not of the option's type.
        """
        arguments: Any = self  # with the fields of TrainingArguments
        options: dict[str, Any] = {name: getattr(self, name) for name in SHARED_OPTIONS}
        options = {name: value for name, value in options.items() if value is not None}
        defaults, declared = method_options(self.method), own_options(get_method(self.method))
        for pair in self.method_args or []:
            name, equals, text = pair.partition("=")
            if not equals:
                raise UsageError(f"method_args takes key=value pairs, not {pair!r}.")
            if name in HAVE_FLAGS:
                raise UsageError(f"{name} is not an option for method_args: set {HAVE_FLAGS[name]}.")
            options[name] = _parse_value(name, text, declared.get(name))
        for name in options:
            if name not in defaults or name == "perturb":
                hidden = ("lr", "seed", "weight_decay", "total_steps", "perturb")
                allowed = ", ".join(option for option in defaults if option not in hidden)
                moved = getattr(get_method(self.method), "moved_options", {}).get(name)
                others = [other for other in methods() if other != self.method and name in method_options(other)]
                others = [moved] if moved else others
                hint = f" (--method {others[0]} has {name})" if others else ""
                raise UsageError(f"Method {self.method!r} has no option {name!r}: it has {allowed}{hint}.")
        if "weight_decay" in defaults:
            options["weight_decay"] = arguments.weight_decay
        if "seed" in defaults:
            options.setdefault("seed", arguments.seed)
        # Without a schedule the length of the run changes nothing, so that it may be extended.
        scheduled = any(name.endswith("_schedule") for name in options)
        if scheduled and "total_steps" in defaults and arguments.max_steps > 0:
            options.setdefault("total_steps", arguments.max_steps)
        return options


def is_first_order(method: str) -> bool:
    """Return whether a method takes gradients.

    Example:
        >>> is_first_order("adamw"), is_first_order("auto")
        (True, False)
    """
    return method != AUTO and getattr(get_method(method), "first_order", False)


def default_of(setting: Field[Any]) -> Any:
    """Return the default of a field of a dataclass."""
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


def read_pairs(pairs: Sequence[str], method: str) -> dict[str, Any]:
    """Return the values of ``--method_args`` by name, in the types that the method's options have.

    Args:
        pairs: ``key=value`` texts.
        method: The method's name.

    Example:
        >>> read_pairs(["eps=1e-2", "sign_of=projection"], "zo_sign")
        {'eps': 0.01, 'sign_of': 'projection'}
    """
    declared = own_options(get_method(method))
    parts = (pair.partition("=") for pair in pairs)
    return {name: _parse_value(name, text, declared.get(name)) for name, _, text in parts}


def _parse_value(name: str, text: str, option: inspect.Parameter | None) -> Any:
    """Read a value as its option is declared: numbers as numbers, the rest as text."""
    kind = _kind(option)
    if option is not None and text.lower() == "none" and (kind is not str or option.default is None):
        return None
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UsageError(f"Option {name} is true or false, not {text!r}.")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise UsageError(f"Option {name} is {what}, not {text!r}.") from error


def _kind(option: inspect.Parameter | None) -> type:
    """Return the type of an option's values: the first of its annotation, else that of its default."""
    if option is None:
        return str
    annotation = getattr(option.annotation, "__name__", str(option.annotation))
    names = re.findall(r"\b(?:bool|int|float|str)\b", annotation)
    kind = {"bool": bool, "int": int, "float": float}.get(names[0], str) if names else type(option.default)
    return kind if kind in (bool, int, float) else str
