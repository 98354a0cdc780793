"""Questions about documents: reading text from files, and asking."""

from longfit.docqa.asking import Answer, ask, split_prompt
from longfit.docqa.text import read_text

__all__ = ["Answer", "ask", "read_text", "split_prompt"]
