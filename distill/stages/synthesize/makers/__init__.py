"""What the synthesize stage can make: one file each, and one line here."""

from distill.core.spec import Family
from distill.stages.synthesize.makers.answers import Answers
from distill.stages.synthesize.makers.base import MakerSpec
from distill.stages.synthesize.makers.qna import Qna
from distill.stages.synthesize.makers.rewrite import Rewrite

MAKERS = Family.among("maker", globals(), MakerSpec)
