"""`longfit ask`, `compress`, `chat` and `info`: documents in, answers with citations out."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from longfit.commands.options import Attention, Budget, ChunkTokens, Dtype, Json, Model, Options, Total, setup_of

Method = Annotated[
    str | None, typer.Option("--compressor", "-c", help="A method; see `longfit list`. snapkv without --attention.")
]
Citations = Annotated[int, typer.Option("--citations", min=0, help="Passages to name at most; 0 for none.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="The longest answer.")]
FORMATS = "Text, Markdown, HTML, DOCX or PDF; or - for standard input."


def ask(
    given: Annotated[
        list[str], typer.Argument(metavar="DOCUMENT... QUESTION", help=f"{FORMATS} The last argument is the question.")
    ],
    model: Model = "smollm2-135m",
    compressor: Method = None,
    attention: Attention = None,
    budget: Budget = None,
    total: Total = None,
    max_new_tokens: MaxNewTokens = 64,
    citations: Citations = 3,
    agnostic: Annotated[
        bool, typer.Option("--agnostic", help="Compress the document before the question is known.")
    ] = False,
    chunk_tokens: ChunkTokens = None,
    dtype: Dtype = "auto",
    option: Options = None,
    as_json: Json = False,
) -> None:
    """Ask a question about documents, or about what `longfit compress` made of them."""
    from longfit import docqa
    from longfit.docqa.shown import citations_text, progress_bar
    from longfit.errors import InputError

    *places, question = given
    if not places:
        raise InputError("give a document and then the question: longfit ask report.pdf 'What was decided?'")
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "citations": citations}
    if _one_memory(places):
        refuse_setup({"--compressor": compressor, "--attention": attention, "--budget": budget, "--total": total})
        memory, loaded, tokenizer = remembered(places[0], not as_json)
        answer = docqa.ask_memory(loaded, tokenizer, memory, question, **how)
    else:
        setup = setup_of(model, dtype, compressor, attention, option, budget, total, chunk_tokens)
        documents = _read(places, setup)
        _, loaded, tokenizer = _prepared(setup, documents, question, not as_json)
        with progress_bar(loaded, not as_json):
            answer = docqa.ask(loaded, tokenizer, documents, question, aware=not agnostic, **how)
    if as_json:
        said: dict[str, Any] = {"answer": answer.text, "question": question}
        said |= {"document": places[0] if len(places) == 1 else places}
        said |= {"citations": [citation.to_dict() for citation in answer.citations], "report": answer.report.to_dict()}
        print(json.dumps(said))
        return
    print(answer.text, flush=True)
    if citations:
        print(f"\n{citations_text(answer.citations)}", flush=True)
    _tell(answer.report)


def compress(
    documents: Annotated[list[str], typer.Argument(metavar="DOCUMENT...", help=FORMATS)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The folder for the memory; that of --append if left out."),
    ] = None,
    append: Annotated[
        Path | None, typer.Option("--append", help="A memory to read the documents into, after what it holds.")
    ] = None,
    model: Model = "smollm2-135m",
    compressor: Method = None,
    attention: Attention = None,
    budget: Budget = None,
    total: Total = None,
    chunk_tokens: ChunkTokens = None,
    dtype: Dtype = "auto",
    option: Options = None,
    as_json: Json = False,
) -> None:
    """Read documents once and keep what the budget allows, to be asked with `longfit ask FOLDER`."""
    from longfit import docqa
    from longfit.docqa.shown import progress_bar
    from longfit.errors import InputError
    from longfit.memory_file import check_place

    folder = output or append
    if folder is None:
        raise InputError("say where to keep the memory: -o report.ctx, or --append report.ctx to add to one")
    check_place(folder)
    setup = setup_of(model, dtype, compressor, attention, option, budget, total, chunk_tokens)
    if append is not None:
        refuse_setup({"--compressor": compressor, "--attention": attention, "--budget": budget, "--total": total})
        setup = remembered_setup(append)
    read = _read(documents, setup)
    names = documents
    if append is None:
        setup, loaded, tokenizer = _prepared(setup, read, None, not as_json)
        with progress_bar(loaded, not as_json):
            memory = docqa.compress(loaded, tokenizer, read)
    else:
        before, loaded, tokenizer = remembered(str(append), not as_json)
        _tell(docqa.outline(loaded, tokenizer, read, first=False))
        with progress_bar(loaded, not as_json):
            memory = docqa.append(loaded, tokenizer, before, read)
        names = [*_documents_of(append), *documents]
    memory.save(folder, about={"document": names[0] if len(names) == 1 else names, "setup": setup.to_dict()})
    report = loaded.fit_report
    if as_json:
        print(json.dumps({"memory": str(folder), "document": documents, "report": report.to_dict()}))
        return
    _tell(report)
    print(folder)


def chat(
    given: Annotated[
        list[str], typer.Argument(metavar="MEMORY | DOCUMENT...", help=f"What `longfit compress` wrote; or: {FORMATS}")
    ],
    model: Model = "smollm2-135m",
    compressor: Method = None,
    attention: Attention = None,
    budget: Budget = None,
    total: Total = None,
    max_new_tokens: MaxNewTokens = 64,
    citations: Citations = 3,
    chunk_tokens: ChunkTokens = None,
    dtype: Dtype = "auto",
    option: Options = None,
) -> None:
    """Ask many questions, a line each; the documents are read once. /cite, /info, /help and /quit are understood."""
    from longfit import docqa
    from longfit.docqa.chat import HELP
    from longfit.docqa.chat import chat as answer
    from longfit.docqa.shown import progress_bar
    from longfit.errors import InputError

    if "-" in given:
        raise InputError("standard input is for the questions here; give the document as a file")
    if _one_memory(given):
        refuse_setup({"--compressor": compressor, "--attention": attention, "--budget": budget, "--total": total})
        memory, loaded, tokenizer = remembered(given[0], True)
    else:
        setup = setup_of(model, dtype, compressor, attention, option, budget, total, chunk_tokens)
        documents = _read(given, setup)
        _, loaded, tokenizer = _prepared(setup, documents, None, True)
        with progress_bar(loaded):
            memory = docqa.compress(loaded, tokenizer, documents)
        _tell(loaded.fit_report)
    _tell(HELP)
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "citations": citations}
    answer(loaded, tokenizer, memory, _lines(), lambda text: print(text, flush=True), **how)


def info(
    memory: Annotated[str, typer.Argument(help="A folder that `longfit compress` wrote.")], as_json: Json = False
) -> None:
    """What a saved memory holds, and what it was made by; no model is loaded."""
    from longfit.memory_file import described, information

    facts = described(information(Path(memory)), Path(memory))
    width = max(map(len, facts))
    print(json.dumps(facts) if as_json else "\n".join(f"{key:<{width}}  {value}" for key, value in facts.items()))


def remembered(folder: str, progress: bool) -> tuple[Any, Any, Any]:
    """A memory, and its model and tokenizer, loaded and wrapped as they were."""
    from longfit import Memory

    model, tokenizer = remembered_setup(Path(folder)).prepare(progress=progress)
    return Memory.load(folder, model), model, tokenizer


def remembered_setup(folder: Path) -> Any:
    """How the model of a memory was loaded and wrapped."""
    from longfit.docqa import Setup
    from longfit.memory_file import information

    return Setup.from_dict(information(folder)["about"].get("setup"))


def refuse_setup(given: dict[str, Any]) -> None:
    """A memory is read as it was made."""
    from longfit.errors import InputError

    if wrong := [name for name, value in given.items() if value]:
        raise InputError(f"{', '.join(wrong)}: a memory remembers how it was made; compress the document again")


def _one_memory(places: list[str]) -> bool:
    """Whether the one place given is a memory."""
    from longfit.errors import InputError
    from longfit.memory_file import is_memory

    memories = [place for place in places if is_memory(place)]
    if memories and len(places) > 1:
        raise InputError(
            f"{memories[0]} is a memory, and stands alone; to add a document to it: longfit compress DOCUMENT "
            f"--append {memories[0]}"
        )
    return bool(memories)


def _read(places: list[str], setup: Any) -> Any:
    """The documents; what can be refused is refused before any model is loaded."""
    from longfit import docqa

    setup.parts()
    return [docqa.read_document(place) for place in places]


def _prepared(setup: Any, documents: Any, question: str | None, progress: bool) -> tuple[Any, Any, Any]:
    """The setup, the model wrapped by it and its tokenizer, after saying what will be done.

    A text too short for the share that is kept where nobody names a budget is kept whole.
    """
    from longfit import docqa
    from longfit.errors import BudgetError

    loaded, tokenizer = setup.prepare(progress=progress)
    try:
        _tell(docqa.outline(loaded, tokenizer, documents, question))
    except BudgetError:
        if setup.names_budget:
            raise
        setup = setup.keeping_all()
        loaded = setup.rewrap(loaded, tokenizer)
        _tell(docqa.outline(loaded, tokenizer, documents, question))
    return setup, loaded, tokenizer


def _documents_of(folder: Path) -> list[str]:
    from longfit.memory_file import information

    known = information(folder)["about"].get("document")
    return [str(name) for name in (known if isinstance(known, list) else [known])]


def _lines() -> Any:
    """The lines of standard input; stderr shows where each was asked, so that a pipe reads like a conversation."""
    typed = sys.stdin.isatty()
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not typed:
            print(line.rstrip(), file=sys.stderr, flush=True)
        if not line:
            return
        yield line


def _tell(said: Any) -> None:
    print(said, file=sys.stderr, flush=True)
