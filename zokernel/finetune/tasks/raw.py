"""Rows as published (hub tables and the benchmarks' own files) turned into rows with a task's columns.

Each function takes one published row and returns the rows it stands for; a row that already has the columns passes.
"""

from __future__ import annotations

from zokernel.data.tables import Row


def wsc(row: Row) -> list[Row]:
    """Lift the spans out of the benchmark's nested ``target``."""
    return [{**row, **row["target"]}] if isinstance(row.get("target"), dict) else [row]


def copa(row: Row) -> list[Row]:
    """Add the conjunction that the kind of question calls for."""
    return [{**row, "conjunction": {"effect": "so", "cause": "because"}[row["question"]]}]


def multirc(row: Row) -> list[Row]:
    """Give every answer a row: the benchmark nests answers in questions in passages."""
    passage = row.get("passage")
    if not isinstance(passage, dict):
        return [row]
    return [
        {
            "paragraph": passage["text"],
            "question": question["question"],
            "answer": answer["text"],
            "label": answer.get("label", -1),
        }
        for question in passage["questions"]
        for answer in question["answers"]
    ]


def record(row: Row) -> list[Row]:
    """Make each query an example whose options are the query with one of the passage's entities in the gap."""
    passage = row["passage"]
    if isinstance(passage, dict):  # the benchmark's own files: spans in a text, several queries a passage
        text = passage["text"]
        entities = [text[span["start"] : span["end"] + 1] for span in passage["entities"]]
        queries = [(query["query"], [a["text"] for a in query.get("answers", [])]) for query in row["qas"]]
    else:
        text, entities, queries = passage, list(row["entities"]), [(row["query"], list(row["answers"]))]
    entities = [entity.strip() for entity in dict.fromkeys(entities)]
    text = text.replace("@highlight\n", "- ")
    return [
        {
            "passage": text,
            "choices": [query.replace("@placeholder", entity).strip() for entity in entities],
            "answers": [query.replace("@placeholder", answer.strip()).strip() for answer in answers] or None,
        }
        for query, answers in queries
    ]


def squad(row: Row) -> list[Row]:
    """Flatten the benchmark's articles of paragraphs of questions."""
    if "paragraphs" not in row:
        return [row]
    return [
        {
            "title": row["title"],
            "context": paragraph["context"],
            "question": question["question"],
            "answers": [answer["text"] for answer in question["answers"]],
        }
        for paragraph in row["paragraphs"]
        for question in paragraph["qas"]
    ]


def drop(row: Row) -> list[Row]:
    """Flatten the benchmark's passages of questions; an answer is spans, a number or a date."""
    if "qa_pairs" not in row:
        return [row]
    return [
        {"passage": row["passage"], "question": pair["question"], "answers": _drop_answer(pair["answer"])}
        for pair in row["qa_pairs"]
    ]


def _drop_answer(answer: Row) -> list[str]:
    if answer.get("spans"):
        return list(answer["spans"])
    if str(answer.get("number", "")).strip():
        return [str(answer["number"])]
    date = answer.get("date") or {}
    return [" ".join(str(date[part]) for part in ("day", "month", "year") if date.get(part))]
