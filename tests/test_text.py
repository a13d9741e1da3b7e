"""Documents, their split and texts by name."""

import subprocess
import sys
import types

import pytest

from trapetum import text
from trapetum.stdlib import Document


@pytest.fixture(scope="module")
def documents():
    return text.stdlib_documents()


@pytest.fixture(scope="module")
def corpora(documents):
    return text.training_corpus(*text.split(documents))


def test_documents_are_the_interpreters(documents):
    names = {d.name: d for d in documents if d.kind == "module"}
    assert "def dumps(" in names["json"].text and "class JSONDecoder" in names["json.decoder"].text
    assert {d.kind for d in documents} >= {"module", "compiled", "topic"}
    assert not any(
        "site-packages" in d.name or d.name.startswith(("encodings", "pydoc_data")) for d in documents
    )


def test_documents_have_unique_names_within_a_kind(documents):
    keys = [(d.kind, d.name) for d in documents]
    assert len(keys) == len(set(keys))


def test_compiled_modules_are_documented(documents):
    math = next(d.text for d in documents if d.kind == "compiled" and d.name == "math")
    assert "sqrt(x, /)\n    Return the square root of x." in math
    builtins = next(d.text for d in documents if d.kind == "compiled" and d.name == "builtins")
    assert "\nstr.split(self, /, sep=None, maxsplit=-1)\n    Return a list of the" in builtins


def test_a_folder_without_python_is_refused(tmp_path):
    with pytest.raises(text.TextError, match="no Python source"):
        text.stdlib_documents(tmp_path)


def test_docstrings_read_like_documentation():
    source = '''"""Top."""
def plain(a, b=1): "No quotes kept."
class Box(dict):
    """A box.

        Indented.
    """
    async def open(self, *, wide: bool = True):
        """Open it."""
    def silent(self): pass
'''
    assert text.docstrings(source) == (
        "Top.\n\nplain(a, b=1)\n    No quotes kept.\n\n"
        "Box(dict)\n    A box.\n\n    Indented.\n\n"
        "Box.open(self, *, wide: bool=True)\n    Open it."
    )
    assert text.docstrings("print 'python 2'") == ""


@pytest.mark.parametrize(
    ("name", "kind", "group"),
    [
        ("json.decoder", "module", "json"),
        ("test.test_json.test_dump", "test", "json"),
        ("unittest.test.test_case", "test", "unittest"),
        ("_pyio", "module", "io"),
        ("_io", "compiled", "io"),
        ("__future__", "module", "__future__"),
        ("_pydecimal", "module", "decimal"),
        ("lists", "topic", "topic:lists"),
        ("test", "test", "test"),
    ],
)
def test_groups(name, kind, group):
    assert Document(name, kind, "").group == group


def test_split_keeps_groups_together_and_loses_nothing(documents):
    train, heldout = text.split(documents)
    assert len(train) + len(heldout) == len(documents)
    assert not {d.group for d in train} & {d.group for d in heldout}


def test_split_is_the_same_everywhere(documents):
    """Names decide alone: not the text, not the other documents, not the order."""
    names = {d.group for d in text.split(documents)[1]}
    assert {"logging", "argparse", "copy", "zlib", "topic:comparisons", "topic:exceptions"} <= names
    assert not names & {"json", "io", "topic:lists"}
    alone = [Document("logging.handlers", "module", "other"), Document("json", "module", "other")]
    assert text.split(alone) == (alone[1:], alone[:1])


def test_split_holds_out_a_few_percent_of_each_kind(documents, corpora):
    train, heldout = corpora
    for kind in text.KINDS:
        sizes = [sum(map(len, side[kind])) for side in (train, heldout)]
        assert 0.02 < sizes[1] / sum(sizes) < 0.12, kind


def test_no_line_of_the_heldout_text_is_trained_on(corpora):
    train, heldout = corpora
    unseen = set()
    for texts in heldout.values():
        unseen |= {" ".join(line.split()) for t in texts for line in t.split("\n")}
    unseen = {line for line in unseen if len(line) >= 50}
    assert len(unseen) > 1000
    for kind, texts in train.items():
        shared = {" ".join(line.split()) for t in texts for line in t.split("\n")} & unseen
        assert not shared, (kind, sorted(shared)[:3])


def test_taking_out_shared_lines_keeps_the_rest(documents, corpora):
    before = text.corpus(text.split(documents)[0])
    for kind, texts in corpora[0].items():
        kept = sum(map(len, texts)) / max(1, sum(map(len, before[kind])))
        assert 0.9 < kept <= 1, (kind, kept)


def test_shared_paragraphs_go_whole():
    shared = "this line is held out, and it is longer than fifty characters"
    texts = [f"kept one\n\nlost\n  {shared}\nlost too\n\nkept two", "untouched\n\n\n\ntext"]
    assert text.without_shared(texts, [f"x\n{shared}\ny"]) == ["kept one\n\nkept two", texts[1]]


def test_heldout_text_is_shared_out_between_kinds(documents):
    cut, whole = text.heldout_text(30_000, documents), text.heldout_text(None, documents)
    assert 29_000 < len(cut) <= 30_000 < len(whole)
    parts = text.corpus(text.split(documents)[1])
    for kind in text.KINDS:
        assert "\n\n".join(parts[kind])[:5000] in cut
    assert text.heldout_text(30_000, documents) == cut
    assert len(text.text_sha256(cut)) == 64 and text.text_sha256(cut) != text.text_sha256(whole)


def test_heldout_text_does_not_depend_on_the_hash_seed():
    code = "from trapetum import text; print(text.text_sha256(text.heldout_text(20000)))"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout) == 65, runs[0].stderr


def test_load_text_reads_a_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("grüße, world", encoding="utf-8")
    assert text.load_text(str(path)) == "grüße, world"
    assert text.load_text(str(path), max_chars=5) == "grüße"


@pytest.mark.parametrize("spec", ["nothing-here", "no/such/file.txt", "folder/notes.txt"])
def test_load_text_names_what_it_cannot_find(spec):
    with pytest.raises(text.TextError, match=f"no text file '{spec}'.*wikitext-2"):
        text.load_text(spec)


def _no_hub(*_, **__):
    raise ConnectionError("name or service not known")


def test_an_unreachable_hub_gives_one_sentence_with_the_id(monkeypatch, tmp_path):
    import datasets
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(HfApi, "dataset_info", _no_hub)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    before = constants.HF_HUB_OFFLINE
    with pytest.raises(text.TextError) as caught:
        text.load_text("wikitext-2")
    message = str(caught.value)
    assert "'Salesforce/wikitext'" in message and "cannot be reached" in message and "\n" not in message
    assert constants.HF_HUB_OFFLINE == before


def test_a_refused_dataset_is_named(monkeypatch):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    def refuse(*_, **__):
        response = types.SimpleNamespace(headers={}, request=None, status_code=401)
        raise RepositoryNotFoundError("401 Client Error.\nmore", response=response)

    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    with pytest.raises(text.TextError, match="refused dataset 'some/data': 401 Client Error") as caught:
        text.load_text("some/data")
    assert "\n" not in str(caught.value)


def test_a_dataset_is_joined_and_its_column_checked(monkeypatch):
    import datasets
    from huggingface_hub import HfApi

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": ["one", "two"]})

    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert text.load_text("wikitext-2") == "one\n\ntwo"
    assert asked[-1] == (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})
    assert text.load_text("some/data:cfg:train") == "one\n\ntwo"
    assert asked[-1] == (("some/data", "cfg"), {"split": "train"})
    with pytest.raises(text.TextError, match="no column 'body'; it has text"):
        text.load_text("some/data:cfg:train:body")
