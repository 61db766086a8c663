"""Text or conversations in, batches of token ids out: sources, the split, tokens, rows and the resumable loader.

To add a source, write one file and add one line below.
"""

from distill.core.spec import Family
from distill.data.base import SourceSpec

# they are listed in this order
# isort: off
from distill.data.python_docs import PythonDocs
from distill.data.text_files import TextFiles
from distill.data.jsonl import Jsonl
from distill.data.parquet import Parquet
from distill.data.csv import Csv
from distill.data.saved import Saved
from distill.data.hub import Hub
from distill.data.tokens import Tokens
from distill.data.chat import Chat
from distill.data.python_questions import PythonQuestions
from distill.data.made import Made

SOURCES = Family.among("source", globals(), SourceSpec)
