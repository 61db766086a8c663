"""Text in, batches of token ids out: sources, the split, the tokenizer, packed blocks and the resumable loader."""

from distill.core.spec import Family
from distill.data.hub import Hub
from distill.data.jsonl import Jsonl
from distill.data.python_docs import PythonDocs
from distill.data.text_files import TextFiles

SOURCES = Family("source", PythonDocs, TextFiles, Jsonl, Hub)
