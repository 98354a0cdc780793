"""Questions about documents: reading text from files, asking, and memories that are asked again."""

from longfit.docqa.asking import Answer, append, ask, ask_memory, compress, source_of
from longfit.docqa.citations import Citation, cite
from longfit.docqa.document import Document, Page
from longfit.docqa.outline import Outline, outline
from longfit.docqa.prompt import context_of, question_ids, split_prompt
from longfit.docqa.reading import document_of, read_document
from longfit.docqa.setup import Setup
from longfit.docqa.source import Source

__all__ = [
    "Answer",
    "Citation",
    "Document",
    "Outline",
    "Page",
    "Setup",
    "Source",
    "append",
    "ask",
    "ask_memory",
    "cite",
    "compress",
    "context_of",
    "document_of",
    "outline",
    "question_ids",
    "read_document",
    "source_of",
    "split_prompt",
]
