"""What the tasks are made of: essays, SQuAD, HotpotQA, word lists, a sentence splitter; local files or public ones."""

import functools
import importlib.metadata
import importlib.resources
import json
from collections.abc import Callable
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from longfit.errors import DataError
from longfit.eval.ruler.downloads import downloaded, source_of
from longfit.eval.ruler.niah import essay_words
from longfit.eval.ruler.qa import Documents, hotpotqa, squad
from longfit.eval.ruler.words import Pairs, WordLists

WONDERWORDS = "3.0.1"
SHAPES = {
    "PaulGrahamEssays.json": 'a JSON object {"text": ...}',
    "squad.json": "SQuAD 2.0's dev-v2.0.json",
    "hotpotqa.json": "HotpotQA's hotpot_dev_distractor_v1.json",
    "english_words.json": 'a JSON object {"0": word, ...}, from scripts/data/synthetic/json of NVIDIA/RULER',
}


def essay(data: str | Path | None) -> tuple[str, ...]:
    """The words of the essays, in their order."""
    return _parsed("PaulGrahamEssays.json", data, lambda content: tuple(essay_words(content["text"])))


def squad_documents(data: str | Path | None) -> Documents:
    """qa_1's questions and paragraphs."""
    return _parsed("squad.json", data, squad)


def hotpotqa_documents(data: str | Path | None) -> Documents:
    """qa_2's questions and paragraphs."""
    return _parsed("hotpotqa.json", data, hotpotqa)


def english_words(data: str | Path | None) -> list[str]:
    """cwe's second source of words, for lengths that wonderwords cannot fill."""
    return list(_parsed("english_words.json", data, lambda content: list(content.values())))


def _parsed(name: str, data: str | Path | None, parse: Callable[[Any], Any]) -> Any:
    """Raises DataError where the file is missing or not what it should be."""
    file = _file(name, data)
    try:
        return parse(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is broken ({type(error).__name__}: {error}); expected {SHAPES[name]}: fetch it anew from "
            f"{source_of(name)}"
        ) from error


def _file(name: str, data: str | Path | None) -> Path:
    if data is None:
        return downloaded(name, SHAPES[name])
    for root in _roots(data):
        if (file := root / name).is_file():
            return file
    raise DataError(
        f"data folder {str(data)!r} has neither ruler/{name} nor {name} ({SHAPES[name]}): put it there from "
        f"{source_of(name)}, or give no data folder to download it"
    )


def _roots(data: str | Path) -> tuple[Path, Path]:
    folder = Path(data)
    if not folder.is_dir():
        raise DataError(
            f"data folder {str(data)!r} does not exist; give one with {', '.join(SHAPES)}, or none to download them"
        )
    return folder / "ruler", folder


def word_lists(data: str | Path | None) -> WordLists:
    """wonderwords' lists: the data folder's (``wonderwords/3.0.1/nounlist.txt`` ...), else the package's.

    Raises:
        DataError: neither is there, or the package is of another version, whose lists give other samples.
    """
    roots = () if data is None else _roots(data)
    for folder in (root / "wonderwords" / WONDERWORDS for root in roots):
        if folder.is_dir():
            return _word_lists(folder, str(folder))
    try:
        version = importlib.metadata.version("wonderwords")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    if version != WONDERWORDS:
        raise DataError(
            f"RULER's keys come from wonderwords {WONDERWORDS}, which is {version} here: run `pip install "
            f"wonderwords=={WONDERWORDS}`, or put its lists into wonderwords/{WONDERWORDS} of a data folder"
        )
    assets = importlib.resources.files("wonderwords") / "assets"
    return _word_lists(assets, "the package wonderwords")


def _word_lists(folder: Traversable, where: str) -> WordLists:
    lists = []
    for name in ("nounlist.txt", "adjectivelist.txt", "verblist.txt"):
        try:
            lists.append(tuple(line.rstrip() for line in (folder / name).read_text(encoding="utf-8").splitlines()))
        except OSError as error:
            raise DataError(f"{where} has no {name} (one word a line): {error}") from error
    return WordLists(*lists)


@functools.lru_cache(maxsize=2)
def pairs(words: WordLists) -> Pairs:
    """niah's adjective-noun pairs."""
    return Pairs(words.adjectives, words.nouns)


def sentence_splitter(data: str | Path | None) -> Callable[[str], list[str]]:
    """nltk's English punkt, as ``sent_tokenize`` uses it; its data from ``nltk_data`` of the data folder if there.

    Raises:
        DataError: nltk or its punkt_tab data are not there and cannot be downloaded.
    """
    try:
        import nltk
    except ImportError as error:
        raise DataError("RULER splits essays with nltk: run `pip install nltk`") from error
    own = [] if data is None else [str((root / "nltk_data").resolve()) for root in _roots(data)]
    for folders in (own, list(nltk.data.path)):
        if (splitter := _splitter(folders)) is not None:
            return splitter
    if nltk.download("punkt_tab", quiet=True) and (splitter := _splitter(list(nltk.data.path))) is not None:
        return splitter
    raise DataError(
        "nltk's punkt_tab is not here and cannot be downloaded: unpack punkt_tab.zip of nltk_data into "
        "nltk_data/tokenizers of the data folder or of your home folder"
    )


def _splitter(folders: list[str]) -> Callable[[str], list[str]] | None:
    """English punkt from the first of ``folders`` that has it, or None."""
    import nltk
    from nltk.tokenize.punkt import PunktSentenceTokenizer, load_punkt_params

    searched = list(nltk.data.path)
    try:
        # nltk opens files of its search path only; the user's data folder joins it for as long as it is read.
        nltk.data.path[:] = [*folders, *(folder for folder in searched if folder not in folders)]
        place = nltk.data.find("tokenizers/punkt_tab/english/", paths=folders) if folders else None
        if place is None:
            return None
        tokenizer = PunktSentenceTokenizer()
        tokenizer._params = load_punkt_params(place)
    except LookupError:
        return None
    finally:
        nltk.data.path[:] = searched
    return tokenizer.tokenize
