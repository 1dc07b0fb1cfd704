"""Fine-tune in an inference engine that has no gradients: ONNX Runtime, with the adapter's weights as inputs.

pip install 'zokernel[finetune,onnx]'
python examples/onnx_engine.py --model smollm2 --steps 20

The graph is exported once.  Training runs in the engine only; PyTorch adds directions to the adapter's few weights.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import zokernel as zk

Batch = dict[str, torch.Tensor]


class LossOf(nn.Module):
    """The loss as a function of a batch and of the adapter's tensors."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, input_ids, attention_mask, labels, adapter: list[torch.Tensor]):
        """Return the mean over the labels that are not -100; with an empty ``adapter``, at the model's own."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        logits = torch.func.functional_call(self.model, dict(zip(self.names, adapter)), (), inputs).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


class Engine:
    """ONNX Runtime with the graph of a loss.

    Args:
        loss: The loss, which is exported.
        batch: An example of its batches; others may have other numbers of rows and columns.
        adapter: Tensors by name: inputs of the graph.
        path: File for the graph.
    """

    def __init__(self, loss: LossOf, batch: Batch, adapter: Batch, path: Path):
        rows, columns = torch.export.Dim("rows", min=2), torch.export.Dim("columns", min=2)
        batch_names = ("input_ids", "attention_mask", "labels")
        self.inputs = [*batch_names, *(name.replace(".", "_") for name in adapter)]
        shapes = [{0: rows, 1: columns}] * 3
        with torch.no_grad():
            torch.onnx.export(
                loss,
                (*batch.values(), list(adapter.values())),
                path,
                input_names=self.inputs,
                output_names=["loss"],
                dynamic_shapes=(*shapes, [None] * len(adapter)),
                dynamo=True,
                external_data=True,
                verbose=False,
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __call__(self, batch: Batch, adapter: Batch) -> float:
        """Return the loss of a batch with these weights of the adapter."""
        values = [tensor.detach().numpy() for tensor in (*batch.values(), *adapter.values())]
        (loss,) = self.session.run(["loss"], dict(zip(self.inputs, values)))
        return float(np.asarray(loss))


def batches(tokenizer, rows: list[dict], size: int):
    """Yield batches without end: the loss is that of the label's word, the last token of a row."""
    tokenizer.padding_side = "left"
    draw = np.random.default_rng(0)
    while True:
        chosen = [rows[number] for number in draw.choice(len(rows), size, replace=False)]
        texts = [f"{row['sentence']} It was {('bad', 'good')[row['label']]}" for row in chosen]
        encoded = tokenizer(texts, return_tensors="pt", padding=True)
        labels = torch.full_like(encoded["input_ids"], -100)
        labels[:, -1] = encoded["input_ids"][:, -1]
        yield {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}


def main(
    model: str = "smollm2", data: str = "movie-reviews", steps: int = 20, rows: int = 8, output_dir: str = "runs/onnx"
) -> dict:
    path = zk.data.resolve_model_path(model)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(base, lora).eval()
    adapter = {name: tensor for name, tensor in adapted.named_parameters() if tensor.requires_grad}
    stream = batches(AutoTokenizer.from_pretrained(path), zk.data.load_rows(data, "train"), rows)
    batch = next(stream)
    in_torch = LossOf(adapted, list(adapter)).eval()
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(in_torch, batch, adapter, Path(folder) / "loss.onnx")

        optimizer = zk.optim.MeZO(adapter.items(), lr=1e-3, eps=1e-2, perturb="in_place:copy")
        seconds, gaps, losses = {"onnx": 0.0, "torch": 0.0}, [], []
        for _ in range(steps):
            batch = next(stream)
            losses_at = {}
            for point in optimizer.ask():
                weights = optimizer.weights_at(point)
                begin = time.perf_counter()
                losses_at[point] = engine(batch, weights)
                between = time.perf_counter()
                with torch.no_grad():  # only to compare
                    expected = in_torch(**batch, adapter=list(weights.values())).item()
                seconds["onnx"] += between - begin
                seconds["torch"] += time.perf_counter() - between
                gaps.append(abs(losses_at[point] - expected))
            losses.append(optimizer.tell(losses_at))
        adapted.save_pretrained(output_dir)
        last = engine(batch, adapter)

    fresh = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    loaded = PeftModel.from_pretrained(fresh, output_dir).eval()
    with torch.no_grad():
        saved = LossOf(loaded, [])(**batch, adapter=[]).item()
    each = {name: total / optimizer.num_forwards for name, total in seconds.items()}
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; at most {max(gaps):.1e} from torch's")
    print(f"seconds per forward: ONNX Runtime {each['onnx']:.3f}, torch {each['torch']:.3f}")
    print(f"the saved adapter in peft: loss {saved:.6f}, in the engine {last:.6f}")
    return {"losses": losses, "gap": max(gaps), "seconds": each, "saved": saved, "last": last}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    defaults = {"model": "smollm2", "data": "movie-reviews", "steps": 20, "rows": 8, "output_dir": "runs/onnx"}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default, type=type(default))
    main(**vars(parser.parse_args()))
