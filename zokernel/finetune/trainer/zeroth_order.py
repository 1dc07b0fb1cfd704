"""``zeroth_order(Trainer)``: any trainer of transformers, with steps that only run forwards."""

from __future__ import annotations

from functools import wraps
from typing import Any

from transformers import Trainer, TrainingArguments

from zokernel.finetune.settings.combine import add_zeroth_order
from zokernel.finetune.trainer.unsuitable import refuse_other_arguments, refuse_unsuitable
from zokernel.finetune.trainer.zeroth_order_trainer import ZerothOrderTrainer


def zeroth_order(trainer: type[Trainer], **settings: Any) -> Any:
    r"""Return a trainer class that trains with forward passes only.

    One step evaluates ``compute_loss`` of the same batch at a few perturbed weights :math:`\theta + \epsilon z_p`, and
    moves the weights along the directions :math:`z_p`.  Data, collator, loss, metrics, callbacks and checkpoints stay
    the trainer's own.  All layers are in evaluation mode during a step: dropout would make its losses incomparable, and
    batch normalisation uses its running statistics.

    Args:
        trainer: ``transformers.Trainer`` or a subclass of it, such as ``Seq2SeqTrainer`` or trl's ``SFTTrainer``.
        **settings: Fields of :class:`~zokernel.finetune.settings.zo_arguments.ZOArguments`: ``method``, ``eps``,
            ``num_perturbations``, ``perturb``, ...; ``learning_rate`` and ``save_strategy`` (which may be ``journal``)
            take precedence over the trainer's arguments.

    Returns:
        The class; its objects are made and used as those of ``trainer``.

    Raises:
        UsageError: If its loss cannot be compared at several weights, or there is no such setting.

    Example:
        >>> from transformers import Trainer
        >>> zeroth_order(Trainer, method="kerzoo", num_perturbations=3).__name__
        'ZerothOrderTrainer'

    References:
        Malladi et al. (2023), arXiv:2305.17333, algorithm 1.
    """
    refuse_unsuitable(trainer)
    settings = {**getattr(trainer, "zo_settings", {}), **settings}
    add_zeroth_order(TrainingArguments("unused", max_grad_norm=0.0), {"learning_rate": 0.0} | settings)
    bases = (trainer,) if issubclass(trainer, ZerothOrderTrainer) else (trainer, ZerothOrderTrainer)
    bases = (ZerothOrderTrainer,) if trainer is Trainer else bases
    name = trainer.__name__ if hasattr(trainer, "zo_settings") else f"ZerothOrder{trainer.__name__}"

    @wraps(trainer.__init__)
    def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        refuse_other_arguments(trainer, kwargs.get("args", args[1] if len(args) > 1 else None))
        super(subclass, self).__init__(*args, **kwargs)

    namespace = {"zo_settings": settings, "__doc__": trainer.__doc__, "__module__": trainer.__module__}
    subclass: Any = type(name, bases, {**namespace, "__init__": checked_init})
    return subclass
