r"""Everything that would make a kernel wrong or fail late, found first and reported with its remedy.

Faults without an error message matter most.  ``torch.no_grad()`` inside a forward pass makes reverse mode return zeros,
while forward mode still sees the parameters: an adjoint probe, :math:`\langle Jv, w\rangle = \langle v, J^Tw\rangle`
for one random pair, tells them apart.  A random model, or one that couples the examples of a batch, has no kernel of
examples at all: whether a forward pass draws random numbers, and one example evaluated alone and in company, tell.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.func import jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from zokernel.errors import RunError, UsageError
from zokernel.kernels.batches import Batch, concatenate, num_examples, slice_batch
from zokernel.kernels.model import FunctionalModel, Params
from zokernel.optim.layers import BATCH_NORMS, DROPOUTS
from zokernel.optim.random_state import random_state, same_random_state

logger = logging.getLogger(__name__)

_UNFUSED = "run inside `with zokernel.kernels.forward_mode():`"
_CAUSES = {  # part of torch's message: cause, and what makes forward mode work
    "scaled_dot_product": (
        "fused attention has no forward-mode derivative (or load with attn_implementation='eager')",
        _UNFUSED,
    ),
    "native_multi_head_attention": ("the fused nn.MultiheadAttention path has no forward-mode derivative", _UNFUSED),
    "transformer_encoder_layer": ("the fused nn.TransformerEncoderLayer path has no forward-mode derivative", _UNFUSED),
    "mkldnn_rnn": ("the MKL-DNN recurrent kernel has no forward-mode derivative", _UNFUSED),
    "embedding_bag": (
        "nn.EmbeddingBag has no forward-mode derivative",
        "replace it with nn.Embedding and a mean or sum over its rows",
    ),
}
_COUPLED = (
    "examples have no kernel of their own: use BatchNorm with running statistics in eval mode, or a normalisation of "
    "each example alone (LayerNorm, GroupNorm)"
)
_WITHOUT_FORWARD_MODE = (
    "use a method without forward mode: entk(method='contraction'), "
    "zo_entk(method='finite_difference') or zo_entk(method='jacobian')"
)


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """Run with the unfused attention and recurrent kernels, which forward-mode differentiation supports.

    Example:
        >>> with forward_mode():
        ...     torch.backends.mha.get_fastpath_enabled()
        False
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            # torch warns about its own TF32 switch when these flags are saved
            warnings.filterwarnings("ignore", message="TF32 acceleration")
            with torch.backends.mkldnn.flags(enabled=False):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def validate(model: FunctionalModel, *batches: Batch, forward: bool = False, reverse: bool = False) -> None:
    """Check a model on the first example of the first batch before anything expensive starts.

    Args:
        model: The model.
        batches: Its inputs.
        forward: Forward-mode derivatives (jvp) will be taken.
        reverse: Reverse-mode derivatives (vjp) will be taken.

    Raises:
        UsageError: If a batch is empty, or if the model is in train mode with dropout or batch norm, is random, lets
            examples of a batch change each other's output, or uses a fused kernel without forward mode, or if reverse
            mode disagrees with the model.
        RunError: If the logits are not finite.
    """
    check_modes(model)
    for batch in batches:
        check_not_empty(batch)
    logits = check_examples(model, batches)
    if not bool(torch.isfinite(logits).all()):
        raise RunError(
            "The model's logits are NaN or infinite at the current weights: load it in float32 or retrain it."
        )
    check_derivatives(model, batches[0], forward=forward, reverse=reverse)


def check_derivatives(model: FunctionalModel, batch: Batch, *, forward: bool, reverse: bool) -> None:
    """Check the derivatives that will be taken on the first example of ``batch`` (see :func:`validate`)."""
    example = slice_batch(batch, 0, 1)
    if reverse:
        check_adjoint(model, example, forward=forward)
    elif forward:
        directional(model, example, {name: torch.zeros_like(tensor) for name, tensor in model.params.items()})


def check_modes(model: FunctionalModel) -> None:
    """Refuse modules whose output is random or depends on the batch, and warn of reduced precision inside the model."""
    if model.module is None:
        return
    for name, module in model.module.named_modules():
        if module.training and isinstance(module, DROPOUTS) and module.p > 0:
            raise UsageError(f"Dropout {name!r} is in train mode, so the model is random: call model.eval() first.")
        if isinstance(module, BATCH_NORMS):
            if module.training:
                raise UsageError(
                    f"BatchNorm {name!r} is in train mode, so every output depends on the whole batch and the running "
                    "statistics would change: call model.eval() first."
                )
            if module.running_mean is None:
                raise UsageError(f"BatchNorm {name!r} has no running statistics, so {_COUPLED}.")
    double = any(tensor.dtype == torch.float64 for tensor in model.params.values())
    if double and model.is_hugging_face and any("RMSNorm" in type(m).__name__ for m in model.module.modules()):
        logger.warning(
            "This model's RMSNorm computes in float32 even when the weights are float64: identities hold to about "
            "1e-7, not 1e-15; use a GPT-2 or your own network for float64 references."
        )


def check_not_empty(batch: Batch) -> None:
    """Refuse a batch without examples.

    Raises:
        UsageError: If there is none.
    """
    if num_examples(batch) == 0:
        raise UsageError("A batch has no examples, so there is no kernel: pass at least one.")


def check_examples(model: FunctionalModel, batches: Sequence[Batch]) -> Tensor:
    """Evaluate one example alone and in company.

    Args:
        model: The model.
        batches: Its inputs; the example is the first of the first.

    Returns:
        The logits of the example.

    Raises:
        UsageError: If the model is random, couples the examples of a batch, or cannot take an example alone.
    """
    company, example = _company(batches), slice_batch(batches[0], 0, 1)
    before = random_state()
    together = model.logits(company)
    # Dropout that happens to drop nothing in these few examples has drawn its numbers all the same.
    random = not same_random_state(before, random_state())
    try:
        logits = model.logits(example)
    except (ValueError, RuntimeError) as error:
        if num_examples(company) < 2:
            raise
        raise UsageError(f"The model takes no example alone ({str(error).splitlines()[0]}): {_COUPLED}.") from error
    eps = torch.finfo(logits.dtype).eps
    differs = _differ(together[: len(logits)], logits, max(1e-3, 4 * eps))
    if random or (differs and _differ(model.logits(example), logits, 100 * eps)):
        raise UsageError(
            "The model is random (it draws random numbers, or two forward passes of the same example differ), so it "
            "has no kernel: switch off its dropout or sampling, for example with F.dropout(x, training=self.training) "
            "and model.eval()."
        )
    if differs:
        raise UsageError(f"The output of one example changes with its neighbours in the batch: {_COUPLED}.")
    return logits


def _company(batches: Sequence[Batch]) -> Batch:
    """Return up to two examples of each batch as one, the first example first."""
    different = [batch for n, batch in enumerate(batches) if all(batch is not other for other in batches[:n])]
    singles = [slice_batch(b, n, n + 1) for b in different for n in range(min(2, num_examples(b)))]
    concatenated = concatenate(singles)
    return slice_batch(batches[0], 0, 2) if concatenated is None else concatenated


def _differ(logits: Tensor, reference: Tensor, tolerance: float) -> bool:
    if logits.shape != reference.shape:
        return True
    return bool((logits - reference).abs().max() > tolerance * reference.abs().max())


def directional(model: FunctionalModel, example: Batch, tangent: Params) -> Tensor:
    """Return one directional derivative of an example's logits, or explain why forward mode cannot.

    Args:
        model: The model.
        example: One example.
        tangent: The direction.

    Returns:
        The derivative, shaped as the logits.

    Raises:
        UsageError: If some operation of the model has no forward-mode derivative.
    """
    try:
        with torch.no_grad():
            return jvp(lambda params: model(params, example), (model.params,), (tangent,))[1]
    except NotImplementedError as error:
        text = str(error)
        default = text.split("\n")[0].rstrip("."), None
        cause, remedy = next((entry for key, entry in _CAUSES.items() if key in text), default)
        remedies = _WITHOUT_FORWARD_MODE if remedy is None else f"{remedy}, or {_WITHOUT_FORWARD_MODE}"
        raise UsageError(f"This model cannot be differentiated in forward mode: {cause}; {remedies}.") from error


def check_adjoint(model: FunctionalModel, example: Batch, *, forward: bool) -> None:
    r"""Compare :math:`\langle Jv, w\rangle` with :math:`\langle v, J^Tw\rangle` for one random pair.

    Args:
        model: The model.
        example: One example.
        forward: Take :math:`Jv` in forward mode; otherwise by central differences (which any kernel supports).

    Raises:
        UsageError: If they disagree, which means that part of the forward pass is hidden from autograd.
    """
    generator = torch.Generator().manual_seed(0)

    def random_like(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)

    tangent = {name: random_like(tensor) for name, tensor in model.params.items()}
    logits, pullback, *_ = vjp(lambda params: model(params, example), model.params)
    weights = random_like(logits)
    cotangent = pullback(weights)[0]
    reverse = sum(torch.sum(tangent[name].double() * cotangent[name].double()).item() for name in tangent)
    size = sum(tensor.double().square().sum().item() for tensor in cotangent.values()) ** 0.5
    if forward:
        derivative, tolerance = directional(model, example, tangent), 0.02
    else:
        eps = 1e-5 if model.itemsize == 8 else 1e-3
        ends = [
            model.logits_at({name: p + sign * eps * tangent[name] for name, p in model.params.items()}, example)
            for sign in (1, -1)
        ]
        derivative, tolerance = (ends[0] - ends[1]) / (2 * eps), 0.3
    direct = torch.sum(derivative.double() * weights.double()).item()
    if abs(direct - reverse) > tolerance * max(size, abs(direct), 1e-30):
        raise UsageError(
            f"Reverse mode disagrees with the model (<Jv,w> = {direct:.3g}, <v,J'w> = {reverse:.3g}): part of the "
            "forward pass is hidden from autograd, by torch.no_grad(), .detach() or .data inside forward; remove it, "
            "or use zo_entk(method='finite_difference'), which sees what the loss sees."
        )


def human_bytes(count: float) -> str:
    """Return a byte count for people.

    Example:
        >>> human_bytes(2.5e9)
        '2.50 GB'
    """
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def available_bytes() -> int:
    """Return the memory this process can still take without swapping."""
    try:
        with open("/proc/meminfo") as meminfo:
            for line in meminfo:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        logger.debug("/proc/meminfo cannot be read here; assuming 8 GB are free.")
    return 8 * 10**9


def announce(what: str, needed: float, remedy: str) -> None:
    """Log what is about to be allocated, and refuse it when it does not fit.

    Args:
        what: What takes the memory, with its shape.
        needed: Bytes.
        remedy: What to do instead.

    Raises:
        RunError: If more than the available memory is needed.
    """
    free = available_bytes()
    logger.info("%s: %s (available: %s)", what, human_bytes(needed), human_bytes(free))
    if needed > free:
        raise RunError(f"{what} needs {human_bytes(needed)} but only {human_bytes(free)} are available: {remedy}.")
