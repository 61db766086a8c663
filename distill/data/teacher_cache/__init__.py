"""What a teacher said about a text, on disk: codecs, the cache itself, its writer and its fidelity."""

from distill.core.spec import Family
from distill.data.teacher_cache.hidden import Hidden
from distill.data.teacher_cache.sampled import Sampled
from distill.data.teacher_cache.top_k import TopK

CODECS = Family("codec", TopK, Sampled, Hidden)
