"""Instructions as prompts: in the words of Alpaca, and as chats."""

from __future__ import annotations

from zokernel.data.tables import Row
from zokernel.finetune.tasks.text import Messages

# The wording of the Stanford Alpaca project (Taori et al., 2023).
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)


def alpaca_prompt(row: Row) -> str:
    r"""Return the prompt of an instruction in Alpaca's words, for a tokenizer without a chat template.

    Example:
        >>> row = {"instruction": "Add.", "input": "1 + 1", "output": "2", "system": "", "history": []}
        >>> alpaca_prompt(row).splitlines()[2:]
        ['### Instruction:', 'Add.', '', '### Input:', '1 + 1', '', '### Response:']
    """
    preamble = row["system"] or (ALPACA_WITH_INPUT if row["input"].strip() else ALPACA_WITHOUT_INPUT)
    earlier_turns = "".join(
        f"### Instruction:\n{question}\n\n### Response:\n{answer}\n\n" for question, answer in row["history"]
    )
    input_section = f"### Input:\n{row['input']}\n\n" if row["input"].strip() else ""
    return f"{preamble}\n\n{earlier_turns}### Instruction:\n{row['instruction']}\n\n{input_section}### Response:\n"


def alpaca_messages(row: Row) -> tuple[Messages, Messages]:
    """Return an instruction as a chat, as LLaMA-Factory reads it: the messages before the answer, and the answer."""
    before: Messages = [{"role": "system", "content": row["system"]}] if row["system"].strip() else []
    for question, answer in row["history"]:
        before += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    last_question = f"{row['instruction']}\n{row['input']}" if row["input"].strip() else row["instruction"]
    before.append({"role": "user", "content": last_question})
    return before, [{"role": "assistant", "content": row["output"]}]
