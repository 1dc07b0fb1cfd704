r"""Compare the zeroth-order kernel with the first-order one for a pair of inputs: heatmaps and curves.

zokernel kernel --model lenet --x_o 9 --x_u 4
zokernel kernel --model_name_or_path smollm2 --x_o "a joy . It was" --x_u "a bore . It was" \
    --label_words terrible great
zokernel kernel --model my_nets.py:build --x_o observed.npy --x_u updated.npy --outputs 0 1 2
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zokernel.commands.arrays import read_array
from zokernel.commands.label_tokens import label_tokens
from zokernel.commands.loading import add_loading_flags, load_language_model, refuse_loading_flags
from zokernel.commands.messages import each_line_once
from zokernel.errors import UsageError
from zokernel.files import check_output_dir, write_json
from zokernel.kernels.batches import Batch
from zokernel.kernels.checks import forward_mode
from zokernel.kernels.fidelity_table import Fidelity, fidelity
from zokernel.kernels.projected_kernel import zo_entk_factors
from zokernel.kernels.tangent_kernel import entk
from zokernel.theory import required_perturbations

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``zokernel kernel``."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="lenet (untrained), or FILE.py:FUNCTION returning an nn.Module")
    which.add_argument("--model_name_or_path", help="a language model: smollm2, a local folder or a hub id")
    add_loading_flags(parser)
    parser.add_argument("--x_o", required=True, help="observed input: text, a digit (lenet) or an .npy file")
    parser.add_argument("--x_u", required=True, help="updated input")
    parser.add_argument("--outputs", type=int, nargs="+", help="candidate outputs (classes or token ids)")
    parser.add_argument("--label_words", nargs="+", help="candidate outputs as words (language models)")
    parser.add_argument("--num_perturbations", type=int, nargs="+", default=[1, 5, 25, 125], help="values of P")
    parser.add_argument("--distribution", default="rademacher", help="distribution of the directions")
    parser.add_argument(
        "--method",
        default="finite_difference",
        choices=["jvp", "finite_difference", "jacobian", "auto"],
        help="how to project; finite_difference is what training measures",
    )
    parser.add_argument("--eps", type=float, default=1e-3, help="perturbation size")
    parser.add_argument(
        "--replicates", type=int, help="independent streams (default: 4; 1 for models of 1e7 parameters or more)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the directions")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/kernel"), help="folder of the results")


def main(args: argparse.Namespace) -> int:
    """Compute, draw and print."""
    # These say what they need for every number of perturbations.
    with each_line_once("zokernel.kernels.checks", "zokernel.kernels.tangent_kernel"):
        return _main(args)


def _main(args: argparse.Namespace) -> int:
    check_output_dir(args.output_dir)
    model, x_o, x_u, outputs, names = load(args)
    dim = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Exact kernels may need forward mode; training's own kernels (fused attention) are used for finite differences.
    with forward_mode():
        table = fidelity(
            model,
            x_o,
            x_u,
            num_perturbations=args.num_perturbations,
            distribution=args.distribution,
            seed=args.seed,
            method=args.method,
            eps=args.eps,
            outputs=outputs,
            replicates=args.replicates or (4 if dim < 10**7 else 1),
        )
        exact = entk(model, x_o, x_u, outputs=outputs, check=False)
        estimate = zo_entk_factors(
            model,
            x_o,
            x_u,
            num_perturbations=max(args.num_perturbations),
            distribution=args.distribution,
            seed=args.seed,
            method="jacobian" if args.method == "auto" else args.method,
            eps=args.eps,
            outputs=outputs,
            check=False,
        )
    kernels = {count: estimate.dense(count) for count in args.num_perturbations}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    draw(table, exact, kernels, names, args.output_dir)
    record = {"rows": table.rows, "rho": table.moments.rho, "outputs": names, "kernel": exact.tolist()}
    record["command"] = args.command_line
    write_json(args.output_dir / "kernel.json", record)
    rho = table.moments.rho
    print(f"rho = {rho:.4f}: {required_perturbations(rho, 0.1):,} directions for 10%, "
          f"{required_perturbations(rho, 0.3):,} for 30% relative error.")  # fmt: skip
    print(f"\n{table}\n\nSaved in {args.output_dir}: heatmaps.png, curve.png, kernel.json.")
    return 0


def load(args: argparse.Namespace) -> tuple[nn.Module, Batch, Batch, list[int] | None, list[str] | None]:
    """Return model, inputs, candidate outputs and their names.

    Raises:
        UsageError: If the model or an input cannot be read.
    """
    if args.model_name_or_path:
        return _language_model(args)
    if args.model is None:
        raise UsageError("Say which model: --model_name_or_path for a language model, --model for any other.")
    refuse_loading_flags(args, args.model)
    if args.label_words:
        raise UsageError("--label_words is for language models: use --outputs.")
    names = None if args.outputs is None else [str(k) for k in args.outputs]
    if args.model == "lenet":
        from zokernel.data import load_mnist
        from zokernel.experiments.entk.lenet import lenet

        images, labels, *_ = load_mnist()
        return lenet(args.seed), _digit(images, labels, args.x_o), _digit(images, labels, args.x_u), args.outputs, names
    return _from_file(args.model), _array(args.x_o), _array(args.x_u), args.outputs, names


def _language_model(args: argparse.Namespace):
    if bool(args.outputs) == bool(args.label_words):
        raise UsageError(
            "Name the candidate outputs of a language model with --label_words or --outputs (one of them)."
        )
    model, tokenizer = load_language_model(args)
    outputs, names = args.outputs, None if args.outputs is None else [str(k) for k in args.outputs]
    if args.label_words:
        outputs, names = label_tokens(tokenizer, args.label_words, ", or use --outputs"), list(args.label_words)
    batches = [dict(tokenizer(text, return_tensors="pt")) for text in (args.x_o, args.x_u)]
    keep = ("input_ids", "attention_mask")
    x_o, x_u = ({key: batch[key] for key in keep} for batch in batches)
    return model, x_o, x_u, outputs, names


def _digit(images: np.ndarray, labels: np.ndarray, digit: str) -> Tensor:
    if not (digit.isdigit() and int(digit) < 10):
        raise UsageError(f"{digit!r} is not a digit: --x_o and --x_u of lenet are classes 0 to 9.")
    image = images[np.flatnonzero(labels == int(digit))[0]]
    return torch.as_tensor(image).float().div(255)[None, None]


def _array(path: str) -> Tensor:
    if not Path(path).is_file():
        raise UsageError(f"There is no file {path}: --x_o and --x_u of a user's model are .npy arrays (N, ...).")
    tensor = torch.as_tensor(read_array(Path(path)))
    return tensor.float() if tensor.is_floating_point() else tensor


def _from_file(spec: str) -> nn.Module:
    """Load ``FILE.py:FUNCTION`` and call it."""
    path, _, name = spec.rpartition(":")
    if not path or not Path(path).is_file():
        raise UsageError(f"{spec!r} is not FILE.py:FUNCTION of an existing file (or the built-in 'lenet').")
    module_spec = importlib.util.spec_from_file_location("zokernel_user_model", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module: Any = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise UsageError(f"{path} has no function {name!r}.")
    model = getattr(module, name)()
    if not isinstance(model, nn.Module):
        raise UsageError(f"{spec} returned {type(model).__name__}: it must return an nn.Module.")
    return model.eval()


def draw(table: Fidelity, exact: Tensor, kernels: dict[int, Tensor], names: Sequence[str] | None, folder: Path) -> None:
    """Write ``heatmaps.png`` and ``curve.png``.

    Args:
        table: Measured and predicted errors.
        exact: First-order kernel.
        kernels: Zeroth-order kernels by P.
        names: Names of the outputs, for the axes.
        folder: Where to write.
    """
    from zokernel.figures import PALETTE, figures, save

    panels = [("first-order", exact), *((f"P = {count}", kernel) for count, kernel in kernels.items())]
    with figures() as Figure:
        figure = Figure(figsize=(2.1 * len(panels), 2.5), layout="constrained")
        for axis, (title, kernel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            matrix = kernel if kernel.ndim == 2 else kernel.flatten(2, 3).flatten(0, 1)
            limit = float(matrix.abs().max())
            axis.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
            axis.set_title(title)
            axis.grid(False)
            ticks = range(len(matrix)) if names and len(names) == len(matrix) else []
            axis.set_xticks(ticks, names if ticks else [], rotation=45)
            axis.set_yticks(ticks, names if ticks and title == "first-order" else [""] * len(ticks))
        save(figure, folder / "heatmaps.png", dpi=160)
        figure = Figure(layout="constrained")
        axis = figure.subplots()
        counts = table["P"]
        axis.fill_between(counts, table["low"], table["high"], alpha=0.25, color=PALETTE[0], linewidth=0)
        axis.plot(counts, table["measured"], "o-", color=PALETTE[0], label="measured (rms, 5-95% band)")
        axis.plot(counts, table["predicted"], "--", color=PALETTE[6], label="exact rms")
        axis.plot(counts, table["jl_bound"], ":", color=PALETTE[1], label="JL bound (exponent corrected)")
        axis.set(xscale="log", yscale="log", xlabel="perturbations P", ylabel="relative Frobenius error")
        axis.set_title(f"rho = {table.moments.rho:.3f}")
        axis.legend()
        save(figure, folder / "curve.png", dpi=160)
