"""The output of a teacher on a text, stored on disk: codecs, the cache itself, its writer and its fidelity.

To add a codec, write one file and add one line below.
"""

from distill.core.spec import Family
from distill.data.teacher_cache.base import CodecSpec

# they are listed in this order
# isort: off
from distill.data.teacher_cache.top_k import TopK
from distill.data.teacher_cache.sampled import Sampled
from distill.data.teacher_cache.hidden import Hidden

CODECS = Family.among("codec", globals(), CodecSpec)
