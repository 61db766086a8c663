"""Imported where runs of seconds must tokenize in many shards: small ones, taken slowly, and written down by whom."""

from __future__ import annotations

import os
import time

from distill.data import packing, token_shards
from distill.data.token_shards import TokenShards

packing._BATCH_DOCUMENTS = 2
token_shards.CHARACTERS = 1000
_claim = TokenShards.claim


def _slow_claim(self: TokenShards, number: int) -> bool:
    is_ours = _claim(self, number)
    if is_ours:
        with (self.folder.parent / "claims.log").open("a", encoding="utf-8") as out:
            out.write(f"{os.environ.get('RANK', '0')} {self.whole.stem} {number}\n")
        time.sleep(0.25)
    return is_ours


TokenShards.claim = _slow_claim  # type: ignore[method-assign]
