"""Tasks: how a table of examples becomes prompts, options and labels."""

from zokernel.finetune.tasks.base import Source, Task
from zokernel.finetune.tasks.catalogue import TASKS
from zokernel.finetune.tasks.choice import ChoiceTask
from zokernel.finetune.tasks.encoding import Encoded, demonstrations, encode
from zokernel.finetune.tasks.generation import GenerationTask
from zokernel.finetune.tasks.prompt import PromptTask
from zokernel.finetune.tasks.registry import get_task, make_task, read_task

__all__ = [
    "TASKS",
    "ChoiceTask",
    "Encoded",
    "GenerationTask",
    "PromptTask",
    "Source",
    "Task",
    "demonstrations",
    "encode",
    "get_task",
    "make_task",
    "read_task",
]
