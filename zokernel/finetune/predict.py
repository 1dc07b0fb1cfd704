"""A finished run answers new rows: labels with scores, or texts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from zokernel.errors import UsageError
from zokernel.finetune.data.check_text import text_encoder
from zokernel.finetune.data.collate import Collator, EncodedDataset, to_device
from zokernel.finetune.models.load import load_model
from zokernel.finetune.models.quantization import (
    RECORDED_FLAGS,
    check_library,
    library_of,
    requested_quantization,
)
from zokernel.finetune.models.revision import with_revision
from zokernel.finetune.predictor_record import read_record
from zokernel.finetune.scoring.choose_collator import choose_collator
from zokernel.finetune.scoring.continuations import continuations
from zokernel.finetune.scoring.make_objective import make_objective
from zokernel.finetune.scoring.options import option_scores
from zokernel.finetune.scoring.padding_free import PaddingFree, choose_padding_free
from zokernel.finetune.settings.arguments import DataArguments, ModelArguments
from zokernel.finetune.settings.config import ZOConfig
from zokernel.finetune.tasks import encode
from zokernel.finetune.tasks.base import is_missing, place_of
from zokernel.finetune.tasks.columns import close_column
from zokernel.finetune.tasks.encode_text import TextEncoder
from zokernel.finetune.tasks.prompt import Label, alternatives
from zokernel.finetune.tasks.seq2seq import decoder_of
from zokernel.finetune.tasks.serialization import task_of_values
from zokernel.finetune.tasks.text import TextTask
from zokernel.readable import plural

logger = logging.getLogger(__name__)


class Predictor:
    """Answers rows as the run that it was loaded from scored its own.

    Args:
        model: The trained model, in evaluation mode.
        tokenizer: Its tokenizer.
        record: What :func:`~zokernel.finetune.predictor_record.write_predictor` wrote.

    Attributes:
        task: Template and options.
    """

    def __init__(self, model: Any, tokenizer: Any, record: Mapping[str, Any]):
        self.model, self.tokenizer, self.record = model, tokenizer, record
        self.task: Any = task_of_values(record["task"])
        kind = record["language_model"]
        self._decoder = decoder_of(model, tokenizer) if kind == "seq2seq" else None
        self._longest = 0
        self._last_layout: tuple[Collator, PaddingFree | None] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a row must have; none are named for chats, instructions and texts."""
        return tuple(name for name in self.task.required_columns() if name != self.task.label_column)

    @torch.no_grad()
    def __call__(self, rows: Sequence[Mapping[str, Any] | str], *, batch_size: int = 32) -> list[dict[str, Any]]:
        """Return an answer for each row, in order.

        Args:
            rows: Rows with the columns of the template; or texts, if it has one column.  After training on chats or
                instructions, a text is what the user says.
            batch_size: Rows per forward.

        Returns:
            For classification ``prediction`` (a label as the training data write it most often, in its type: a text,
            a number, true or false), ``word``, ``score`` (its share of the softmax over the options' scores) and
            ``scores`` by label as text; for multiple choice ``prediction`` (the text of the option), ``position``,
            ``score`` and ``scores`` by position; for what is written ``prediction``.  A row without text has ``None``
            in their place, and a warning counts such rows.

        Raises:
            UsageError: If a row lacks a column, or holds something else than text in it.
        """
        if isinstance(rows, (str, Mapping)):
            raise UsageError("A predictor takes a list of rows: put the one row in brackets.")
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, (str, Mapping)):
                raise UsageError(f"Row {number} is {row!r:.40}, neither a text nor a row with columns: leave it out.")
        precision = torch.bfloat16 if self.record["precision"] == "bf16" else torch.float32
        with torch.autocast(self._device.type, precision, enabled=precision == torch.bfloat16):
            if isinstance(self.task, TextTask):
                encoder = self._text_encoder()
                requests = [self._request(encoder, row, number) for number, row in enumerate(rows, start=1)]
                texts = self._continuations([ids for ids in requests if ids is not None])
                return self._merge(rows, requests, [{"prediction": text} for text in texts])
            prepared = [self._row(row, number) for number, row in enumerate(rows, start=1)]
            answers = self._answers([row for row in prepared if row is not None], batch_size)
            return self._merge(rows, prepared, answers)

    def _merge(
        self, rows: Sequence[Any], requests: Sequence[Any], answers: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Return an answer for every row: those in order, and empty ones where nothing was asked."""
        empty = [place_of(rows, number) for number, request in enumerate(requests) if request is None]
        if empty:
            verb = "has" if len(empty) == 1 else "have"
            logger.warning("%s without text %s no answer (the first: %s).", plural(len(empty), "row"), verb, empty[0])
        remaining = iter(answers)
        return [self._empty_answer() if request is None else next(remaining) for request in requests]

    def _empty_answer(self) -> dict[str, Any]:
        """Return what stands in the place of an answer to a row without text."""
        if self.task.kind == "classification":
            return {"prediction": None, "word": None, "score": None, "scores": dict.fromkeys(map(str, self._labels()))}
        if self.task.kind == "choice":
            return {"prediction": None, "position": None, "score": None, "scores": {}}
        return {"prediction": None}

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _text_encoder(self) -> TextEncoder:
        length, kind = self.record["max_length"], self.record["language_model"]
        return text_encoder(
            self.task, self.tokenizer, DataArguments(), max_length=length, kind=kind, decoder=self._decoder
        )

    def _request(self, encoder: TextEncoder, row: Mapping[str, Any] | str, number: int) -> list[int] | None:
        """Return the tokens of a chat, an instruction or a text, after which the model answers; None without text."""
        record, decoder = self.record, self._decoder
        try:
            if encoder.asks_nothing(row):
                return None
            ids = encoder.request(row)
        except UsageError as error:
            raise UsageError(f"Row {number}: {error}") from error
        room = record["max_length"] - (0 if decoder else record["max_new_tokens"])
        if len(ids) > room:
            raise UsageError(f"Row {number} has {len(ids)} tokens, and {room} leave room for an answer: shorten it.")
        return ids

    def _continuations(self, requests: Sequence[list[int]]) -> list[str]:
        """Return what the model writes after each request."""
        settings = {"max_new_tokens": self.record["max_new_tokens"], "ends": self.record["ends"]}
        decoder_prompt = self._decoder.prompt if self._decoder else ()
        return continuations(self.model, self.tokenizer, requests, decoder_prompt=decoder_prompt, **settings)

    def _answers(self, prepared: Sequence[dict[str, Any]], batch_size: int) -> list[dict[str, Any]]:
        """Return which option each row gets, or the answer that is written."""
        if not prepared:
            return []
        dataset = self._encode(prepared)
        collator, padding_free = self._layout(dataset)
        objective = self._objective(collator, padding_free)
        answers: list[dict[str, Any]] = []
        for begin in range(0, len(prepared), batch_size):
            part = prepared[begin : begin + batch_size]
            batch = to_device(collator([dataset[n] for n in range(begin, begin + len(part))]), self._device)
            if self.task.kind == "generation":
                answers += [{"prediction": text} for text in objective.generate(self.model, batch)]
            else:
                scores = objective.evaluate(self.model, batch)[1]["logits"].float().softmax(-1).tolist()
                answers += [self._answer(row, shares) for row, shares in zip(part, scores)]
        return answers

    def _encode(self, rows: Sequence[dict[str, Any]]) -> EncodedDataset:
        examples = encode(
            self.task,
            rows,
            self.tokenizer,
            max_length=self.record["max_length"],
            masked=self.record["language_model"] == "masked",
            decoder=self._decoder,
            context=self.record["context"],
        )
        return EncodedDataset(examples)

    def _objective(self, collator: Collator, padding_free: PaddingFree | None) -> Any:
        """Return what scores options, or writes answers, as the run did."""
        return make_objective(
            self.task,
            self.tokenizer,
            collator,
            objective="cross_entropy",
            masked=self.record["language_model"] == "masked",
            decoder=self._decoder,
            calibrate=self.record["calibrate"],
            context=self.record["context"],
            max_length=self.record["max_length"],
            max_new_tokens=self.record["max_new_tokens"],
            padding_free=padding_free,
        )

    def _layout(self, dataset: EncodedDataset) -> tuple[Collator, PaddingFree | None]:
        """Return how batches are laid out, which is tried anew when a prompt is longer than all before."""
        longest = max(len(example.prompt_ids) for example in dataset.examples)
        if self._last_layout is None or longest > self._longest:
            collator = choose_collator(self.model, self.tokenizer.pad_token_id, dataset)
            padding_free = choose_padding_free(self.model, collator, dataset, option_scores)
            self._longest, self._last_layout = longest, (collator, padding_free)
        return self._last_layout

    def _row(self, row: Mapping[str, Any] | str, number: int) -> dict[str, Any] | None:
        """Return a row as the task takes it, or None if it has no text."""
        if isinstance(row, str):
            if len(self.columns) != 1:
                raise UsageError(f"Row {number} is a text, but the template has the columns {', '.join(self.columns)}.")
            row = {self.columns[0]: row}
        row = self._with_columns(row, number)
        texts = self.task.text_columns()
        absent = [name for name in self.columns if name not in row or (is_missing(row[name]) and name not in texts)]
        if absent:
            close = close_column(absent[0], row)
            meant = f": did you mean {close!r}?" if close else ""
            lack = f"no {absent[0]!r} (it has {', '.join(map(str, row))})"
            lack = f"nothing in {absent[0]!r}" if absent[0] in row else lack + meant
            raise UsageError(f"Row {number} has {lack}; the template is {self.task.template!r}.")
        if not self.task.has_text(row, f"Row {number}"):
            return None
        # Tasks phrase an example with its label; any will do, since it is not read here.
        label = alternatives(self.task.names()[0])[0] if self.task.kind == "classification" else "0"
        return {**row, self.task.label_column: label}

    def _with_columns(self, row: Mapping[str, Any], number: int) -> Mapping[str, Any]:
        """Return a row as published with the template's columns, as the run read its own."""
        task = self.task
        if task.prepare is not None and not set(self.columns) <= row.keys():
            try:
                prepared = task.prepare({task.label_column: [], **row})
            except (KeyError, TypeError, AttributeError):
                return row  # what it lacks is named as for any other row
            if len(prepared) != 1:
                raise UsageError(
                    f"Row {number} stands for {len(prepared)} examples: give each its own row with the columns "
                    f"{', '.join(self.columns)}."
                )
            row = prepared[0]
        names = task.renamed_columns([(0, row)])
        return {names.get(name, name): value for name, value in row.items()}

    def _labels(self) -> list[Label]:
        """Return the label of each class as the training data write it."""
        return self.record.get("labels") or [alternatives(name)[0] for name in self.task.names()]

    def _answer(self, row: dict[str, Any], shares: list[float]) -> dict[str, Any]:
        best = max(range(len(shares)), key=shares.__getitem__)
        if self.task.kind == "choice":
            options = self.task.fillers(row)
            scores = {str(position): share for position, share in enumerate(shares[: len(options)])}
            return {"prediction": options[best], "position": best, "score": shares[best], "scores": scores}
        words: Any = self.task.fillers(row)
        labels = self._labels()
        scores = dict(zip(map(str, labels), shares))
        return {"prediction": labels[best], "word": words[best], "score": shares[best], "scores": scores}


def load_predictor(
    folder: str | Path,
    *,
    device: str | torch.device | None = None,
    model_revision: str | None = None,
    trust_remote_code: bool = False,
) -> Predictor:
    """Load a finished run of ``zokernel finetune`` to answer new rows.

    Args:
        folder: The output folder of the run, or one of its checkpoints.
        device: Where to run; the GPU if there is one.
        model_revision: Branch, tag or commit of an adapter's base on the hub; that of the run by default.
        trust_remote_code: Whether the Python code that comes with the model, or with the base of an adapter, may run.

    Returns:
        The predictor.

    Raises:
        UsageError: If the folder is of no finished run, or the model cannot be loaded.

    Example:
        ```python
        predictor = load_predictor("runs/mine")
        predictor(["A joy from start to end."])[0]["prediction"]  # 1
        ```
    """
    record = read_record(folder)
    flags = {name: record[name] for name in RECORDED_FLAGS if name in record}
    flags |= {"lm_type": record["language_model"], "trust_remote_code": trust_remote_code}
    arguments = with_revision(ModelArguments(model_name_or_path=str(folder), **flags), model_revision)
    if name := requested_quantization(arguments):
        check_library(library_of(name), f"{folder}, whose base is quantized ({name.removeprefix('torchao:')}),")
    config = ZOConfig(output_dir=str(folder), precision=record["precision"], report_to="none", do_train=False)
    model, tokenizer = load_model(arguments, config)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Predictor(model.to(device).eval(), tokenizer, record)
