"""The cache_teacher stage: the teacher asked once, for any number of students."""

from distill.stages.cache_teacher.spec import CacheTeacher

__all__ = ["CacheTeacher"]
