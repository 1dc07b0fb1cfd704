r"""Everything that would make a kernel wrong or fail late, found first and said with its remedy.

The quiet ones matter most: ``torch.no_grad()`` inside a forward pass makes reverse mode return zeros without a word,
while forward mode still sees the parameters.  An adjoint probe, :math:`\langle Jv, w\rangle = \langle v,
J^Tw\rangle` for one random pair, tells them apart at the cost of two passes.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from zokernel.errors import RunError, UsageError
from zokernel.kernels.model import Batch, FunctionalModel, slice_batch

logger = logging.getLogger(__name__)

REMEDY = (
    "run inside `with zokernel.kernels.forward_mode():`, or use method='finite_difference', which any kernel supports"
)
_CAUSES = {
    "scaled_dot_product": "fused attention has no forward-mode derivative (or load with attn_implementation='eager')",
    "native_multi_head_attention": "the fused nn.MultiheadAttention path has no forward-mode derivative",
    "transformer_encoder_layer": "the fused nn.TransformerEncoderLayer path has no forward-mode derivative",
    "mkldnn_rnn": "the MKL-DNN recurrent kernel has no forward-mode derivative",
}


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


def validate(model: FunctionalModel, batch: Batch, *, forward: bool = False, reverse: bool = False) -> None:
    """Check a model on the first example of ``batch`` before anything expensive starts.

    Args:
        model: The model.
        batch: Its input.
        forward: Forward-mode derivatives (jvp) will be taken.
        reverse: Reverse-mode derivatives (vjp) will be taken.

    Raises:
        UsageError: If the model is in train mode with dropout or batch norm, a fused kernel does not support forward
            mode, or reverse mode disagrees with the model itself.
        RunError: If the logits are not finite.
    """
    check_modes(model)
    example = slice_batch(batch, 0, 1)
    if not bool(torch.isfinite(model.logits(example)).all()):
        raise RunError(
            "The model's logits are NaN or infinite at the current weights: load it in float32 or retrain it."
        )
    if forward:
        check_forward_mode(model, example)
    if reverse:
        check_adjoint(model, example, forward=forward)


def check_modes(model: FunctionalModel) -> None:
    """Refuse modules whose output is random or depends on the batch, and note reduced precision inside the model."""
    if model.module is None:
        return
    for name, module in model.module.named_modules():
        if module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise UsageError(f"Dropout {name!r} is in train mode, so the model is random: call model.eval() first.")
        if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UsageError(
                f"BatchNorm {name!r} is in train mode, so every output depends on the whole batch and the running "
                "statistics would change: call model.eval() first."
            )
    double = any(tensor.dtype == torch.float64 for tensor in model.params.values())
    if double and model.is_hugging_face and any("RMSNorm" in type(m).__name__ for m in model.module.modules()):
        logger.warning(
            "This model's RMSNorm computes in float32 even when the weights are float64: identities hold to about "
            "1e-7, not 1e-15; use a GPT-2 or your own network for float64 references."
        )


def check_forward_mode(model: FunctionalModel, example: Batch) -> None:
    """Take one directional derivative on one example, and explain the failure if there is one."""
    tangent = {name: torch.zeros_like(tensor) for name, tensor in model.params.items()}
    try:
        with torch.no_grad():
            jvp(lambda params: model(params, example), (model.params,), (tangent,))
    except NotImplementedError as error:
        text = str(error)
        cause = next((said for key, said in _CAUSES.items() if key in text), text.split("\n")[0])
        raise UsageError(f"This model cannot be differentiated in forward mode: {cause}; {REMEDY}.") from error


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
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    tangent = {name: random_like(tensor) for name, tensor in model.params.items()}
    logits, pullback, *_ = vjp(lambda params: model(params, example), model.params)
    weights = random_like(logits)
    cotangent = pullback(weights)[0]
    reverse = sum(torch.sum(tangent[name].double() * cotangent[name].double()).item() for name in tangent)
    size = sum(tensor.double().square().sum().item() for tensor in cotangent.values()) ** 0.5
    if forward:
        with torch.no_grad():
            moved = jvp(lambda params: model(params, example), (model.params,), (tangent,))[1]
        tolerance = 0.02
    else:
        eps = 1e-5 if model.itemsize == 8 else 1e-3
        ends = [
            model.logits_at({name: p + sign * eps * tangent[name] for name, p in model.params.items()}, example)
            for sign in (1, -1)
        ]
        moved, tolerance = (ends[0] - ends[1]) / (2 * eps), 0.3
    direct = torch.sum(moved.double() * weights.double()).item()
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
