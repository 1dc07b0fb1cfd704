"""The task of data for which none was named: chosen by the columns, and said in the log."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import NoReturn

from zokernel.data.tables import Row, table_format
from zokernel.errors import UsageError
from zokernel.finetune.settings.arguments import DataArguments
from zokernel.finetune.tasks import TASKS, PromptTask, Task
from zokernel.finetune.tasks.base import HIDDEN, NO_LABEL, is_missing
from zokernel.finetune.tasks.columns import close_column
from zokernel.finetune.tasks.prompt import alternatives, as_label, is_on_scale, label_as_text
from zokernel.finetune.tasks.registry import customize
from zokernel.finetune.tasks.template import column_in_braces, parse
from zokernel.finetune.tasks.text import COLUMNS_OF_TEXT
from zokernel.readable import plural

logger = logging.getLogger(__name__)

MANY = 20  # values that a label column has at most if they are classes
TEXT_COLUMNS = ("text", "sentence")
ANSWER = "\nAnswer:"  # what follows the text if there is no template


def task_of_data_set(arguments: DataArguments) -> str | None:
    """Return the name of the one published task whose data ``--dataset_name`` and ``--dataset_config`` name."""
    requested = arguments.dataset_name, arguments.dataset_config
    names = [
        name for name, task in TASKS.items() if task.source and (task.source.dataset, task.source.config) == requested
    ]
    return names[0] if len(names) == 1 and arguments.dataset_name else None


def classification(rows: Sequence[Row], arguments: DataArguments) -> Task:
    """Return the task of rows with a label, in which the words of published tasks play no part.

    Without a template, the text column is the prompt: ``text`` or ``sentence``, or the only column of text beside the
    label.  Without label words, ``labels`` or the few values of the label column are the words.

    Args:
        rows: Rows to train on, as they were read.
        arguments: What the user said about them.

    Returns:
        A classification task.

    Raises:
        UsageError: If the data do not tell what the prompt or the answers are.
    """
    columns = list(dict.fromkeys(str(name) for row in rows for name in row))
    label = arguments.label_column or "label"
    requested = [label, *(parse(arguments.template.replace("\\n", "\n")) if arguments.template else ())]
    if label not in columns:
        _refuse_without_label(rows, columns, requested, has_header=not _may_lack_header(arguments))
    labels, words = arguments.labels, arguments.label_words
    if labels and not words:
        words = [alternatives(name)[0] for name in labels]
    if not words:
        words = label_values(rows, label)
        labels = [as_label(word) for word in words]
        logger.info("No --label_words were given: they are the values of column %r: %s.", label, ", ".join(words))
    template = arguments.template
    if not template:
        column = text_column(rows, label)
        template = column_in_braces(column) + ANSWER
        logger.info("No --template was given: the prompt is column %r, then %r.", column, ANSWER)
    task = PromptTask("{text}", tuple(words))
    return customize(task, template=template, labels=labels, label_column=arguments.label_column)


def _refuse_without_label(
    rows: Sequence[Row], columns: Sequence[str], requested: Sequence[str], *, has_header: bool
) -> NoReturn:
    """Raise the error of a table without the column of labels, the first of those requested: it may lack a header."""
    label, listed = requested[0], ", ".join(columns)
    if not has_header and not any(close_column(name, columns) for name in requested) and _is_row(rows, columns):
        names = ["text", "label", *(f"column{number}" for number in range(3, len(columns) + 1))][: len(columns)]
        raise UsageError(
            f"The first line of the training file ({listed[:80]}) reads like a row, not like names of "
            f"columns: name them with --column_names {' '.join(names)}, in their order."
        )
    if close := close_column(label, columns):
        raise UsageError(
            f"The train split has no column {label!r} (it has {listed}): did you mean {close!r} (in --label_column)?"
        )
    raise UsageError(
        f"The train split has no column {label!r} (it has {listed}): say which holds the labels "
        "with --label_column, or name the task with --task or --task_file. "
        f"Chats, instructions and texts are recognised by the columns {COLUMNS_OF_TEXT}."
    )


def _may_lack_header(arguments: DataArguments) -> bool:
    """Whether the names of the columns are the first line of the training file."""
    file = arguments.train_file
    return bool(file) and not arguments.column_names and table_format(str(file)) in (".csv", ".tsv")


def _is_row(rows: Sequence[Row], columns: Sequence[str]) -> bool:
    """Whether what should be names of columns seems to be a row.

    Beside numbers, and beside a few values that occur again and again, a name is one of them only if it is a row's.
    Where there are no such columns, numbers, long texts and texts that end as sentences are taken for a row's.
    """
    verdicts = []
    for name in columns:
        values = [text for row in rows if (text := str(row.get(name) or "").strip())]
        distinct = set(values)
        if values and all(map(_is_number, values)):
            verdicts.append(_is_number(name))
        elif 0 < len(distinct) <= min(MANY, len(values) // 2):
            verdicts.append(name in distinct)
    if verdicts:
        return any(verdicts)
    return any(_is_number(name) or len(name.split()) > 4 or name.rstrip().endswith((".", "!", "?")) for name in columns)


def label_values(rows: Sequence[Row], label: str) -> list[str]:
    """Return the values of the label column in order, if they are few enough to be classes.

    What stands for no label (``None``, ``nan``, or -1 beside 0, 1, ...) is left out, and a warning says so.  Values
    that differ in case or in the blanks around them are one class, called as it is written most often; the log says so.

    Raises:
        UsageError: If there are more than twenty, or nearly as many as rows; if they are lists or on a scale.

    Example:
        >>> label_values([{"label": value} for value in (1.0, 0, None, "1", 0)], "label")
        ['0', '1']
        >>> label_values([{"label": value} for value in ("Yes", "no ", "yes", "No", "no", "yes")], "label")
        ['no', 'yes']
    """
    values = [row.get(label) for row in rows]
    present = _without_missing_labels([str(value) for value in values if not is_missing(value)], label)
    words = _merge_spellings(present, label)
    structured = any(isinstance(value, (list, dict)) for value in values)
    if structured or not 2 <= len(words) <= min(MANY, max(2, len(present) // 2)) or any(map(is_on_scale, words)):
        examples = f"{', '.join(f'{word:.30}' for word in words[:4])}{', ...' if words[4:] else ''}"
        numbers = [word for word in words if word.isdigit()]
        if words and len(numbers) == len(words) and len(set(map(int, words))) == max(map(int, words)) + 1:
            flag = f"--label_words sport art ... (one word for each of 0 to {len(words) - 1}, in order)"
            raise UsageError(f"Column {label!r} holds {len(words)} classes by number: name them with {flag}.")
        raise UsageError(
            f"Column {label!r} holds {plural(len(words), 'different value')} ({examples}), not taken for classes: "
            "give --label_words, or describe the task in a --task_file (answers that are written out, for example)."
        )
    return sorted(words, key=lambda word: (0, int(word), word) if word.lstrip("+-").isdigit() else (1, 0, word))


def _merge_spellings(cells: Sequence[str], label: str) -> list[str]:
    """Return the classes of the cells of a column, each as it is written most often, and log what was merged."""
    spellings: dict[str, Counter[str]] = {}
    for cell in cells:
        text = label_as_text(cell)
        spellings.setdefault(text.casefold(), Counter())[text if _is_number(text) else cell] += 1
    words, merged = [], []
    for counts in spellings.values():
        texts = Counter[str]()
        for cell, count in counts.items():
            texts[cell.strip()] += count
        word = texts.most_common(1)[0][0]
        words.append(word)
        if others := [repr(cell) for cell in counts if cell != word]:
            merged.append(f"{' and '.join(others[:MANY])} as {word!r}")
    if merged:
        message = "Column %r: names that differ in case or blanks are one class (%s), unless --labels lists them."
        logger.info(message, label, "; ".join(merged))
    return words


def _without_missing_labels(cells: Sequence[str], label: str) -> list[str]:
    """Return the cells that hold labels; values that may have been meant as one are named."""
    values = list(map(label_as_text, cells))
    hidden = {value for value in values if value in NO_LABEL and value != HIDDEN}
    others = set(values) - hidden - {HIDDEN}
    if len(others) > 1 and others == set(map(str, range(len(others)))):
        hidden.add(HIDDEN)
    for value in sorted(hidden - {""}):
        if value in values:
            logger.warning(
                "Column %r: %r is treated as a missing label (%s): if it is a class, name all classes with --labels.",
                label,
                value,
                plural(values.count(value), "row"),
            )
    return [cell for cell, value in zip(cells, values) if value not in hidden]


def text_column(rows: Sequence[Row], label: str) -> str:
    """Return the column that holds the text.

    Raises:
        UsageError: If several might, or none.

    Example:
        >>> text_column([{"id": "17", "message": "Where is it?", "team": "billing"}], "team")
        'message'
    """
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name != label]
    for name in TEXT_COLUMNS:
        if name in columns:
            return name
    texts = [name for name in columns if _holds_text([row.get(name) for row in rows])]
    if len(texts) == 1:
        return texts[0]
    candidates = f"the columns {', '.join(texts)} might be it" if texts else "no column holds text"
    example = column_in_braces(texts[0]) if texts else "{column}"
    raise UsageError(f"Say what the prompt is ({candidates}): --template '{example} It was'.")


def _holds_text(values: Sequence[object]) -> bool:
    """Whether a column is text rather than numbers, empty cells apart."""
    present = [value for value in values if not is_missing(value) and value != ""]
    return bool(present) and all(isinstance(value, str) for value in present) and not all(map(_is_number, present))


def _is_number(value: object) -> bool:
    try:
        float(str(value))
    except ValueError:
        return False
    return True
