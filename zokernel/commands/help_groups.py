"""The flags that ``--help`` of each command shows, in groups; ``--help-all`` lists all of them.

To show a flag, add a line: its name, an example of its value, and what it does in a few words ("" takes the flag's own
help text).  A command without an entry shows all its flags.
"""

from __future__ import annotations

from zokernel.commands.help_text import Group

_MODEL = {
    "model_name_or_path": ("smollm2", "smollm2 (from a package registry), a folder or a hub id"),
    "dtype": ("bfloat16", "data type in which the weights are stored"),
    "lm_type": ("masked", "causal, masked or seq2seq"),
}
_DATA = {
    "train_file": ("reviews.csv", "your examples: .jsonl .json .csv .tsv .txt .parquet, also .gz"),
    "validation_file": ("dev.csv", "examples that choose the best step (default: held out from training)"),
    "test_file": ("test.csv", "examples scored before and after (default: validation examples)"),
    "dataset_name": ("movie-reviews", "a hub id, a data-set folder, or movie-reviews"),
    "task": ("rte", "a published task: template, words, columns and its own data"),
    "template": ("'{sentence} It was'", "the prompt, with columns of the table in braces"),
    "label_words": ("terrible great", "one word or phrase per class, in class order"),
    "label_column": ("stars", "column of the labels (default: label)"),
    "labels": ("neg pos", "what that column holds, in the order of the words (default: 0 1 ...)"),
    "max_length": ("512", "longest sequence in tokens (default: 2048 or the model's)"),
}
_FINETUNE = (
    Group(
        "model",
        {
            **_MODEL,
            "load_in_4bit": ("true", "quantize the base while it is loaded; with --lora true"),
            "quantization": ("torchao:int8", "quantize with torchao instead, int8 or int4; also with --train scales"),
            "offload": ("disk", "leave the weights in their files (disk) or in host memory (cpu)"),
            "adapter_name_or_path": ("runs/lora", "continue training this saved adapter"),
        },
        "--model_name_or_path Qwen/Qwen2.5-0.5B --dtype bfloat16",
    ),
    Group(
        "data",
        {
            **_DATA,
            "max_train_samples": (
                "-1",
                "training examples to draw, -1 for all; --max_eval_samples and --max_test_samples likewise",
            ),
        },
        "--train_file reviews.csv --template '{text} It was' --label_words bad good",
    ),
    Group(
        "what is trained",
        {
            "lora": ("true", "train a LoRA adapter instead of all weights"),
            "lora_r": ("16", "rank of the adapter (default: 8)"),
            "train": ("scales", "train only the scales of a model quantized by torchao"),
        },
        "--lora true --lora_r 16",
    ),
    Group(
        "method",
        {
            "method": ("auto", "auto (chooses the method and its settings), mezo, kerzoo, ..."),
            "learning_rate": ("1e-5", "step size (default: 1e-5 for all weights, 1e-3 for LoRA; auto chooses its own)"),
            "lr_scheduler_type": ("linear", "schedule of the rate (default: constant; auto chooses its own)"),
            "eps": ("1e-3", "radius of the perturbation (default: the method's own)"),
            "num_perturbations": ("8", "directions per step (default: the method's own)"),
            "method_args": ("kernel_order=3", "further options of the method, as key=value"),
            "perturb": (
                "in_forward",
                "how losses are taken: in_place, in_place:copy, in_place:grid, in_forward or stacked",
            ),
        },
        "--method mezo --learning_rate 1e-5 --eps 1e-3",
    ),
    Group(
        "rewards",
        {
            "objective": ("reward", "cross_entropy, accuracy, f1, or reward (a function judges the answers)"),
            "reward_function": ("judge.py:score", "a function as for trl's GRPO, json:key,key, regex:..., exact_match"),
            "num_generations": ("4", "answers to each prompt per loss, at a --temperature above 0"),
        },
        "--objective reward --reward_function judge.py:score --method es --lora true",
    ),
    Group(
        "run",
        {
            "max_steps": ("1000", "steps (default: 1000, or as many as --num_train_epochs needs)"),
            "num_train_epochs": ("3", "passes over the training examples, instead of --max_steps"),
            "per_device_train_batch_size": ("16", "examples per batch (default: 16; 4 with --method auto)"),
            "gradient_accumulation_steps": ("4", "batches per step; takes the memory of one"),
            "precision": ("bf16", "fp32, bf16 (autocast), or auto: whichever is faster on this hardware"),
            "seed": ("1", "seed of everything random"),
            "do_train": ("false", "only score the model"),
        },
        "--max_steps 2000 --per_device_train_batch_size 8",
    ),
    Group(
        "evaluation and saving",
        {
            "eval_steps": ("200", "steps between evaluations (default: a fifth of the run)"),
            "metric_for_best_model": ("accuracy", "validation measure that chooses the best step"),
            "early_stopping_patience": ("3", "stop after this many evaluations without improvement"),
            "save_strategy": (
                "journal",
                "which checkpoints: best (the default), steps or epoch; journal: none, and any step is rebuilt; no: "
                "nothing",
            ),
            "resume_from_checkpoint": ("last", "continue the run in output_dir with a longer --max_steps"),
        },
        "--eval_steps 200 --early_stopping_patience 3",
    ),
    Group(
        "output",
        {
            "output_dir": ("runs/mine", "folder of the results (required)"),
            "overwrite_output_dir": ("true", "start over in a folder that already holds a run"),
            "report_to": ("tensorboard", "trackers to log to: tensorboard, wandb, trackio, ..."),
        },
        "--output_dir runs/mine --report_to tensorboard",
    ),
)

HELP_GROUPS: dict[str, tuple[Group, ...]] = {
    "finetune": _FINETUNE,
    "demo": _FINETUNE,
    "plan": (
        Group("model", {**_MODEL, "lora": ("true", "a LoRA adapter instead of all weights")}),
        Group("data", _DATA),
        Group(
            "memory",
            {
                "memory": ("true", "only print the memory that each setup needs; load nothing"),
                "tokens": ("512", "tokens per row that --memory assumes"),
            },
        ),
        Group(
            "probes",
            {
                "max_steps": ("300", "steps of the run that the learning rate is for"),
                "num_probes": ("64", ""),
                "eps": ("1e-3", ""),
                "distribution": ("gaussian", ""),
                "update_examples": ("8", ""),
                "observe_examples": ("4", ""),
                "precision": ("fp32", ""),
                "seed": ("1", ""),
            },
        ),
        Group(
            "result",
            {
                "num_perturbations": ("1 10 100", "directions per step, P, to predict for"),
                "tolerances": ("0.1 0.3", ""),
                "verify": ("true", ""),
                "verify_draws": ("200", ""),
                "output_file": ("plan.json", ""),
            },
        ),
    ),
    "kernel": (
        Group("model", {"model_name_or_path": ("smollm2", ""), "model": ("nets.py:build", "")}),
        Group(
            "inputs",
            {
                "x_o": ("'a joy . It was'", "observed input: text, a digit (lenet) or an .npy file"),
                "x_u": ("'a bore . It was'", "updated input, likewise"),
                "label_words": ("terrible great", ""),
                "outputs": ("0 1 2", ""),
            },
        ),
        Group(
            "kernels",
            {
                "num_perturbations": ("1 5 25", ""),
                "distribution": ("gaussian", ""),
                "method": ("jvp", ""),
                "eps": ("1e-3", ""),
                "replicates": ("4", ""),
                "seed": ("1", ""),
            },
        ),
        Group("output", {"output_dir": ("runs/kernel", "")}),
    ),
    "evolve": (
        Group(
            "model and data",
            {
                "features": ("features.npz", ""),
                "target_column": ("price", ""),
                "model_name_or_path": ("smollm2", ""),
                "train_file": ("reviews.csv", ""),
                "text_column": ("text", ""),
                "label_column": ("stars", ""),
                "label_words": ("' bad' ' good'", ""),
                "template": ("'{} It was'", ""),
                "trainable_parameters": ("'lm_head'", ""),
                "max_examples": ("64", ""),
                "no_offset": ("", ""),
            },
        ),
        Group(
            "training to predict",
            {
                "learning_rate": ("1e-3", ""),
                "num_perturbations": ("10", ""),
                "distribution": ("rademacher", ""),
                "coupling": ("shared", ""),
                "steps": ("10 100 1000", ""),
                "target_loss": ("0.1", ""),
                "simulate": ("200", ""),
                "seed": ("1", ""),
            },
        ),
        Group("output", {"output_dir": ("runs/evolve", "")}),
    ),
    "reproduce": (
        Group("what", {"names": ("nzk/linear_d2", ""), "list": ("", ""), "scale": ("smoke", "")}),
        Group("how", {"options": ("seeds=5", ""), "seed": ("1", ""), "jobs": ("2", "")}),
        Group("output", {"output_dir": ("runs/reproduce", ""), "overwrite": ("", "")}),
    ),
    "claims": (
        Group(
            "which",
            {
                "ids": ("kerzoo-iterations", ""),
                "paper": ("KerZOO", "only this paper's claims: KerZOO, ZO-eNTK, NZK, ..."),
                "verdict": ("'does not hold'", "only claims with this verdict"),
            },
        ),
        Group("output", {"full": ("", ""), "json": ("", "")}),
        Group("ledger", {"check": ("docs/results", ""), "update": ("docs/results", "")}),
    ),
    "report": (
        Group("which", {"folder": ("runs/mine", "")}),
        Group("output", {"output": ("page.html", ""), "serve": ("", ""), "port": ("8321", "")}),
    ),
    "replay": (
        Group("which", {"base": ("smollm2", ""), "journal": ("runs/mine", ""), "step": ("500", "")}),
        Group("output", {"output_dir": ("rebuilt", ""), "allow_other_backend": ("", "")}),
    ),
    "predict": (
        Group("which", {"model": ("runs/mine", ""), "file": ("new.csv", ""), "column_names": ("id text", "")}),
        Group("output", {"output_file": ("answers.csv", ""), "batch_size": ("32", "")}),
    ),
    "merge": (
        Group("which", {"model": ("runs/lora", ""), "base": ("models/mine", "")}),
        Group("output", {"output_dir": ("merged", ""), "dtype": ("bfloat16", "")}),
    ),
    "journal": (
        Group("which", {"action": ("show", "show, verify or truncate"), "journal": ("runs/mine", "")}),
        Group("how", {"step": ("500", ""), "base": ("smollm2", ""), "damaged": ("", "")}),
    ),
    "fetch": (
        Group("which", {"names": ("smollm2", "")}),
        Group("how", {"force": ("", ""), "verify": ("", "")}),
    ),
}
