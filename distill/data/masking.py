"""Which tokens of a row are masked for a masked language model, and what it sees in their place.

    chosen = the round(share * n) tokens with the largest log(w_i) + g_i,   w_i = count(token i)**-a,  g_i Gumbel noise

This is a draw without replacement with probabilities in proportion to ``w_i``. With a = 0 all tokens are equally
likely; with a = 0.7 rare tokens are chosen more often, as in DistilBERT. All random numbers follow from the seed, the
position in the endless list of training rows and the row, so that a run that is resumed, or that is split among other
numbers of processes, masks the same tokens.

Source: Devlin et al. 2018, arXiv 1810.04805 (80/10/10); Sanh et al. 2019, arXiv 1910.01108 (rare words); Kool et al.
2019, arXiv 1903.06059 (the draw without replacement).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distill.core.artifact import hash_of
from distill.core.tasks import MaskSpec


@dataclass(frozen=True)
class Masking:
    """How tokens are masked.

    Attributes:
        spec: the recipe's mask settings.
        seed: the recipe's seed.
        mask_id: id of the mask token.
        ordinary: ids from which a random token is drawn: all except special ones. int64 [ids]
        log_weights: log of the weight with which each id is chosen. float64 [vocabulary]
    """

    spec: MaskSpec
    seed: int
    mask_id: int
    ordinary: np.ndarray
    log_weights: np.ndarray

    @classmethod
    def of(cls, spec: MaskSpec, seed: int, mask_id: int, special: list[int], counts: np.ndarray) -> Masking:
        """Make it from the counts of the ids in the training text.

        Args:
            spec: the recipe's mask settings.
            seed: the recipe's seed.
            mask_id: id of the mask token.
            special: ids of special tokens.
            counts: number of occurrences of each id. int64 [vocabulary]
        """
        ordinary = np.setdiff1d(np.arange(len(counts)), special)
        return cls(spec, seed, mask_id, ordinary, -spec.rare_words * np.log(np.maximum(counts, 1)))

    def hide(self, ids: np.ndarray, can: np.ndarray, position: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Mask tokens of one row.

        Args:
            ids: int64 [tokens].
            can: which tokens may be masked, bool [tokens].
            position: position of the row in the endless list of training rows; negative for validation, in which a row
                always masks the same tokens.
            row: number of the row.

        Returns:
            What the model sees, int64 [tokens], and which tokens it has to predict, bool [tokens].
        """
        random = np.random.Generator(np.random.Philox(key=int(hash_of("mask", self.seed, position, row)[:16], 16)))
        places = np.flatnonzero(can)
        hidden = np.zeros(len(ids), bool)
        if not len(places):
            return ids, hidden
        number = max(1, round(self.spec.share * len(places)))
        keys = self.log_weights[ids[places]] + random.gumbel(size=len(places))
        chosen = places[np.argsort(-keys, kind="stable")[:number]]
        hidden[chosen] = True
        kind = random.random(number)
        seen = ids.copy()
        seen[chosen[kind < self.spec.replace]] = self.mask_id
        at_random = chosen[(kind >= self.spec.replace) & (kind < self.spec.replace + self.spec.random)]
        seen[at_random] = random.choice(self.ordinary, size=len(at_random))
        return seen, hidden
