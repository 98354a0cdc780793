"""Questions about documents: reading text from files, asking, and memories that are asked again."""

from longfit.docqa.asking import Answer, ask, ask_memory, compress, split_prompt
from longfit.docqa.setup import Setup
from longfit.docqa.text import read_text

__all__ = ["Answer", "Setup", "ask", "ask_memory", "compress", "read_text", "split_prompt"]
