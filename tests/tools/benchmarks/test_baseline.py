import json

import pytest
import torch

from benchmarks.baseline import PlainLoop
from benchmarks.race import MASK
from tests import ranks
from tests.ranks import entries

pytest.importorskip("transformers")
SIZES = {"layers": 2, "hidden": 32, "heads": 2, "rows": 4, "length": 16}


def test_the_loop_trains_the_objective_with_attention_in_both_directions():
    torch.manual_seed(0)
    loop = PlainLoop(SIZES, 300, "cpu")
    tokens = torch.randint(MASK, (4, 16))
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % MASK
    with torch.no_grad():
        before, after = loop.model(tokens).logits, loop.model(changed).logits
        assert not torch.allclose(before[:, 0], after[:, 0], atol=1e-6)
        # A model that predicts nothing has the loss log V in expectation, whatever is masked.
        loop.model.lm_head.weight.zero_()
        losses = torch.stack([loop.loss(tokens) for _ in range(400)])
    assert losses.mean().item() == pytest.approx(
        torch.log(torch.tensor(300.0)).item(), abs=4 * losses.std().item() / 20
    )


def test_all_sides_are_measured_on_models_of_one_size(tmp_path):
    json_file = tmp_path / "baseline.json"
    sizes = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    flags = ["--vocabulary", "40000", "--rounds", "3", "--json", str(json_file)]
    tool = ["--", "tools/benchmark.py", "baseline", *sizes, *flags]
    ranks.launch(tmp_path, 1, *tool, entry=entries.tool)
    results = json.loads(json_file.read_text())
    assert set(results["sides"]) == {"hugging_face", "full_head", "masked_head"}
    # Times of three steps of so small a model say nothing: only that there are some.
    assert results["tokens_per_s_ratio_full_head"] > 0
    assert results["tokens_per_s_ratio_masked_head"] > 0
    assert results["parameters"] == 2 * 40_000 * 32 + 2 * (4 * 32**2 + 3 * 32 * 96) + 5 * 32
    assert len((tmp_path / "stdout0").read_text().splitlines()) == 5
