from __future__ import annotations

import json
from pathlib import Path

from distill.pruning.origin import Origin


def test_a_cut_of_a_cut_is_told_in_the_first_models_numbers() -> None:
    first = Origin(layers=(0, 2, 3, 5), hidden_channels=(1, 4, 7))
    assert first.cut_again(Origin(layers=(0, 1, 3), hidden_channels=(0, 2))) == Origin((0, 2, 5), (1, 7))
    assert first.cut_again(Origin((0, 1, 2, 3), (0, 1, 2))) == first


def test_is_read_from_a_written_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"layers": [0, 3], "hidden_channels": [2, 5], "mlp_neurons": [[1]]}))
    assert Origin.read(tmp_path / "plan.json") == Origin((0, 3), (2, 5))
