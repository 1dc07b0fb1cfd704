"""What the user asks of a run: transformers' ``TrainingArguments`` and what zeroth-order training adds to them.

What is left open stays open here; :func:`zokernel.finetune.settings.resolve.resolve` fills it in.
"""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from zokernel.errors import UsageError
from zokernel.finetune.settings.check import check_values
from zokernel.finetune.settings.elastic import rejoin
from zokernel.finetune.settings.saving import choose_strategies, default_eval_steps, fill_in_saving
from zokernel.finetune.settings.unsupported import refuse_unsupported
from zokernel.finetune.settings.zo_arguments import AUTO, ZOArguments
from zokernel.optim.options import REMOVAL_DATE

logger = logging.getLogger(__name__)

DEFAULT_STEPS = 1000


@dataclass
class ZOConfig(ZOArguments, TrainingArguments):
    """``TrainingArguments`` for zeroth-order (and baseline first-order) training.

    Every flag of ``TrainingArguments`` works as documented by transformers.  Some defaults differ, because a
    zeroth-order step is cheap and needs no warm-up: constant learning rate, batches grouped by length, evaluation
    during training.

    Nothing writes to an object after it was made.  A trainer works with a copy in which every open setting is filled
    in; ``trainer.settings`` says with what, and why.

    Attributes:
        given: Names of the settings that the constructor was called with; ``trainer.settings`` says ``user`` of them.
        derived: Names of the settings whose values follow from those; ``trainer.settings`` says ``auto`` of them.

    Raises:
        UsageError: If settings contradict each other, or a value does not exist.

    Example:
        >>> config = ZOConfig(output_dir="runs/mine", method="auto")
        >>> config.method, config.learning_rate, sorted(config.given)
        ('auto', None, ['method', 'output_dir'])
    """

    restore: str | None = field(
        default=None,
        metadata={"help": f"Deprecated, removed after {REMOVAL_DATE}: --perturb in_place:grid or in_place:copy."},
    )
    objective: str = field(
        default="cross_entropy",
        metadata={
            "help": "What is minimised: cross_entropy, or, without a gradient, 1 - accuracy, 1 - f1 or the negative "
            "reward of what the model writes (reward, see --reward_function)."
        },
    )
    precision: str = field(
        default="auto",
        metadata={"help": "fp32, bf16 (autocast over fp32 weights), or auto: bf16 where the hardware is faster in it."},
    )
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Learning rate (default: 1e-5 for full parameters and 1e-3 for LoRA; adamw 1e-5 and 1e-4)."},
    )
    lr_scheduler_type: str = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Learning-rate schedule of transformers (default: constant; auto chooses one)."},
    )
    per_device_train_batch_size: int = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Examples per batch and device (default: 16; 4 with --method auto)."}
    )
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Examples per evaluation batch and device."})
    max_steps: int = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Optimizer steps (default: 1000, or what --num_train_epochs comes to)."}
    )
    num_train_epochs: float = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Passes over the training examples, instead of --max_steps."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines."})
    eval_strategy: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "When to evaluate on the validation split (default: steps; epoch with --save_strategy epoch)."
        },
    )
    eval_steps: float | None = field(
        default=None, metadata={"help": "Steps between evaluations (default: a fifth of the run)."}
    )
    save_strategy: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "When to save a checkpoint: best, steps or epoch; journal: never, since a few bytes per step "
            "rebuild any weights; no: neither checkpoints nor journal (default: best; without evaluations journal, or "
            "steps for sgd and adamw)."
        },
    )
    save_steps: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Steps between checkpoints of --save_strategy steps (default: those between evaluations)."},
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints to keep; 2 keeps the best and the last, 1 cannot resume."}
    )
    load_best_model_at_end: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "End with the best step (default: true where steps are evaluated and saved at one time)."},
    )
    metric_for_best_model: str | None = field(default="loss", metadata={"help": "Validation metric that decides."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without improvement (default: never)."}
    )
    do_train: bool = field(default=True, metadata={"help": "false only evaluates (zero-shot or in context)."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length wastes no compute on padding; or random."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Kept off, because batches carry what scoring needs."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "last: continue the run in output_dir with a longer --max_steps, other evaluations or other "
            "logging; or a checkpoint folder.  A killed run continues by itself when its command is repeated."
        },
    )

    given: ClassVar[frozenset[str]]
    derived: ClassVar[frozenset[str]] = frozenset()

    def __new__(cls, *args: Any, **kwargs: Any) -> ZOConfig:
        """Note which settings are given."""
        self = super().__new__(cls)
        vars(self)["given"] = frozenset([f.name for f, _ in zip(fields(cls), args)] + list(kwargs))
        return self

    def __post_init__(self):
        if self.precision not in ("auto", "fp32", "bf16"):
            raise UsageError(f"precision must be auto, fp32 or bf16, not {self.precision!r}.")
        if self.restore is not None:
            self.perturb, self.restore = perturb_of_restore(self.restore, self.perturb), None
        self.check_method()
        has_both = self.max_steps is not None and self.num_train_epochs is not None
        if self.max_steps is None:
            self.max_steps = DEFAULT_STEPS if self.num_train_epochs is None else -1
        if self.num_train_epochs is None:
            self.num_train_epochs = 3.0  # as transformers
        choose_strategies(self)
        check_values(self)
        if has_both and self.max_steps > 0:
            logger.info(
                "max_steps %d sets the length of the run, and num_train_epochs %g is ignored, as in transformers.",
                self.max_steps,
                self.num_train_epochs,
            )
        refuse_unsupported(self)
        fill_in_saving(self)
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise UsageError("early_stopping_patience counts evaluations: set eval_strategy steps.")
        # transformers allows bf16 on a CPU only when the CPU was requested.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        self.bf16 = resolve_bf16(self.precision, requested=self.bf16, use_cpu=self.use_cpu)
        rejoin()
        # transformers checks everything at once, so what is open has a stand-in meanwhile.
        stand_ins = {name: value for name, value in self._stand_ins().items() if value is not None}
        open_values = {name: getattr(self, name) for name in stand_ins}
        vars(self).update(stand_ins)
        super().__post_init__()
        vars(self).update(open_values)
        if self.torch_compile and self.perturb in ("in_forward", "stacked"):
            raise UsageError(
                f"perturb {self.perturb} replaces weights operation by operation, which a compiled graph does not "
                "show: use perturb in_place, or leave out torch_compile."
            )
        check_reporting(self.report_to)

    def _stand_ins(self) -> dict[str, Any]:
        journal = self.save_strategy == "journal"
        return {
            "per_device_train_batch_size": 16 if self.per_device_train_batch_size is None else None,
            "lr_scheduler_type": "constant" if self.lr_scheduler_type is None else None,
            "eval_steps": default_eval_steps(self.max_steps) if self.eval_steps is None else None,
            # Of the strategies that transformers knows, the one with the same checks.
            "save_strategy": "best" if journal else None,
        }


def perturb_of_restore(restore: str, perturb: str) -> str:
    """Return what ``--perturb`` says in place of the deprecated ``--restore``, and warn.

    Raises:
        UsageError: If both are given.
    """
    if perturb != AUTO:
        raise UsageError(f"perturb {perturb} says how weights are restored: leave out restore {restore}.")
    replacement = "in_place" if restore == "fold" else f"in_place:{restore}"
    warnings.warn(
        f"restore {restore} is deprecated and will be removed after {REMOVAL_DATE}: use perturb {replacement}.",
        FutureWarning,
        stacklevel=5,
    )
    return replacement


def check_reporting(names: str | list[str] | None) -> None:
    """Check that what ``--report_to`` names exists and is installed, before anything is loaded.

    Raises:
        UsageError: If something does not, or is not.
    """
    from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
    from transformers.integrations.integration_utils import is_flytekit_available

    packages = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}
    available = get_available_reporting_integrations() + (["flyte"] if is_flytekit_available() else [])
    if names in ("all", ["all"]):
        logger.info("report_to all: %s.", ", ".join(available) or "none of the loggers is installed")
    for name in [names] if isinstance(names, str) else names or []:
        if name not in (*INTEGRATION_TO_CALLBACK, "all", "none"):
            choices = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise UsageError(f"report_to knows no {name!r}: name one of {choices}, or none.")
        if name not in (*available, "all", "none"):
            package = packages.get(name, name)
            raise UsageError(f"report_to {name} needs {package}, which is not installed: pip install {package}.")


def resolve_bf16(precision: str, *, requested: bool | None, use_cpu: bool) -> bool:
    """Decide whether forwards run under bf16 autocast.

    Args:
        precision: ``auto``, ``fp32`` or ``bf16``.
        requested: Whether ``--bf16`` was given.
        use_cpu: Whether the run is kept on the CPU.

    Returns:
        Whether to autocast.

    Raises:
        UsageError: If the flags contradict each other.
    """
    if precision == "fp32" and requested:
        raise UsageError("bf16 and precision fp32 contradict each other: give one of them.")
    if precision != "auto":
        return precision == "bf16"
    return bool(requested) or faster_in_bf16(use_cpu=use_cpu)[0]


def faster_in_bf16(*, use_cpu: bool) -> tuple[bool, str]:
    """Return whether forwards are faster in bf16 here, and why.

    Of CPUs, those with matrix units (AMX) are, and those of other makers than Intel with ``avx512_bf16``: forwards of
    SmolLM2 took 1.4 to 1.8 times as long as in fp32 on an Intel Xeon that had ``avx512_bf16`` without AMX.

    Args:
        use_cpu: Whether the run is kept on the CPU.
    """
    if torch.cuda.is_available() and not use_cpu:
        has_units, device = torch.cuda.is_bf16_supported(including_emulation=False), "this GPU"
    else:
        units = torch.cpu.get_capabilities()
        has_units, device = bool(units.get("amx_bf16") or units.get("avx512_bf16")), "this CPU"
        if has_units and not units.get("amx_bf16") and str(units.get("cpu_name")).startswith("Intel"):
            return False, "without AMX an Intel CPU is slower in bf16"
    return has_units, f"{device} {'has' if has_units else 'lacks'} bf16 units"
