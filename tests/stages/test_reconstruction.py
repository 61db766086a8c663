"""Output projections solved anew, in a whole run; what they are is in the tests of pruning."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import distill
from distill.core.errors import RecipeError

RECIPE = """\
name: tiny
teacher: builtin:quickstart-teacher
data:
  train: {{kind: jsonl, path: {text}}}
  sequence_length: 16
  validation_tokens: 100
  calibration_sequences: 8
stages:
  prune: {{keep: {{hidden_size: 96, intermediate_size: 168}}}}
  solved: {{kind: prune, keep: {keep}, reconstruct: {{num_sequences: 6}}, calibration_batch_size: 4}}
compute: {{accelerator: cpu}}
logging: {{wandb: disabled}}
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(60)))

    def start(keep):
        text = RECIPE.format(text=tmp_path / "text.jsonl", keep=keep)
        said = []
        distill.run(distill.Recipe.from_text(text), run_dir=tmp_path / "run", say=said.append)
        return tmp_path / "run", said

    return start


def test_only_output_projections_differ_from_the_plain_cut(run):
    folder, said = run("{hidden_size: 96, intermediate_size: 168}")
    cut, solved = (
        AutoModelForCausalLM.from_pretrained(folder / name / "model").state_dict() for name in ("prune", "solved")
    )
    changed = {name.split(".", 3)[-1] for name in cut if not torch.equal(cut[name], solved[name])}
    assert changed == {"self_attn.o_proj.weight", "mlp.down_proj.weight"}
    (line,) = [line for line in said if "error of the output projections" in line]
    before, after = (float(share.strip("% ")) for share in line.rpartition("projections ")[2].split("->"))
    assert after < before


@pytest.mark.parametrize(
    ("keep", "why"),
    [
        ("{vocabulary: used, hidden_size: 96}", "stage of its own"),
        ("{layers: [0, 2]}", "no effect on layers that go"),
        ("{}", "keep names no size"),
    ],
)
def test_what_cannot_be_solved_is_refused(run, keep, why):
    with pytest.raises(RecipeError, match=why):
        run(keep)
