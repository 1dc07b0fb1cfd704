"""Tasks: how a table of examples becomes prompts, options and labels."""

from zokernel.finetune.tasks.prompt import Encoded, PromptTask, encode
from zokernel.finetune.tasks.registry import TASKS, get_task

__all__ = ["TASKS", "Encoded", "PromptTask", "encode", "get_task"]
