import argparse
import contextlib
import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks import throughput
from benchmarks.python_text import MASK, write_data
from benchmarks.sides import model_flags
from megatron_mdm.environment import prepare_environment
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.device import training_device
from tests import ranks
from tests.ranks import entries

SIZES = {"layers": 2, "hidden": 32, "heads": 2, "rows": 4, "length": 16}


def measured(directory, *flags):
    """Runs the tool in its own process: (its results, the lines of its table)."""
    json_file = directory / "throughput.json"
    tool = ["--", "tools/benchmark.py", "throughput", "--json", str(json_file), *flags]
    ranks.launch(directory, 1, *tool, entry=entries.tool)
    return json.loads(json_file.read_text()), (directory / "stdout0").read_text().splitlines()


def test_steps_of_both_objectives_in_turns(tmp_path):
    sizes = "--layers 2 --hidden 32 --heads 2 --rows 4 --length 64 --vocabulary 40000 --rounds 4"
    results, table = measured(tmp_path, *sizes.split())
    assert list(results["sides"]) == ["gpt", "full_head", "masked_head", "causal"]
    # Times of so few steps of so small a model say nothing; the test checks that they exist.
    for side in ("full_head", "masked_head", "causal"):
        ratios = results["tokens_per_s_ratios"][side]
        assert 0 < ratios["quartiles"][0] <= ratios["median"] <= ratios["quartiles"][1]
    if results["peak_ratios"]["masked_head"] is not None:
        assert results["peak_ratios"]["masked_head"] < 0.9
        # Logits, which the cross entropy overwrites, take 4 bytes for each of 4 x 64 positions.
        assert results["sides"]["full_head"]["peak_bytes"] >= 4 * 64 * 40_000 * 4
        assert results["peak_ratios"]["masked_head"] < results["memory_ratios"]["masked_head"] < 1
    # Only the table goes to stdout.
    assert len(table) == 6 and "masked head" in table[4]


def test_steps_in_blocks_take_turns_with_those_of_whole_rows(tmp_path):
    sizes = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    sides = "--sides masked_head blocks gpt_2x --block-size 4 --vocabulary 300 --rounds 3".split()
    results, table = measured(tmp_path, *sizes, *sides)
    assert list(results["sides"]) == ["masked_head", "blocks", "gpt_2x"]
    assert results["block_size"] == 4
    # Times of three steps of so small a model say nothing; the test checks that they exist.
    assert all(results["tokens_per_s_ratios"][side]["median"] > 0 for side in ("blocks", "gpt_2x"))
    assert len(table) == 5


def test_a_plain_loop_trains_a_model_of_the_same_size(tmp_path):
    pytest.importorskip("transformers")
    sizes = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    sides = "--sides hugging_face full_head masked_head --vocabulary 40000 --rounds 3".split()
    results, table = measured(tmp_path, *sizes, *sides)
    assert list(results["sides"]) == ["hugging_face", "full_head", "masked_head"]
    # Times of three steps of so small a model say nothing; the test checks that they exist.
    assert results["tokens_per_s_ratios"]["full_head"]["median"] > 0
    assert results["tokens_per_s_ratios"]["masked_head"]["median"] > 0
    parameters = 2 * 40_000 * 32 + 2 * (4 * 32**2 + 3 * 32 * 96) + 5 * 32
    assert results["parameters"] == parameters
    resting = [values["resting_bytes"] for values in results["sides"].values()]
    assert resting == [12 * parameters, 16 * parameters, 16 * parameters]
    assert len(table) == 5


def test_the_loop_trains_the_objective_with_attention_in_both_directions():
    pytest.importorskip("transformers")
    from benchmarks.hugging_face import PlainLoop

    torch.manual_seed(0)
    loop = PlainLoop(SIZES, 300, "cpu")
    tokens = torch.randint(MASK, (4, 16))
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % MASK
    with torch.no_grad():
        before, after = loop.model(tokens).logits, loop.model(changed).logits
        assert not torch.allclose(before[:, 0], after[:, 0], atol=1e-6)
        # A model that predicts nothing has an expected loss of log V, whatever is masked.
        loop.model.lm_head.weight.zero_()
        losses = torch.stack([loop.loss(tokens) for _ in range(400)])
    assert losses.mean().item() == pytest.approx(
        torch.log(torch.tensor(300.0)).item(), abs=4 * losses.std().item() / 20
    )


def sides() -> None:
    """Compares the steps of the tool's other objective with plain torch."""
    from benchmarks.causal import causal_datasets, causal_forward_step
    from benchmarks.session import training_session
    from megatron_mdm.mcore.model.causal import causal_attention

    directory = Path(os.environ["TRACE_DIR"])
    write_data(directory)
    flags = [*model_flags(SIZES, 300, "cpu"), "--data-path", str(directory / "text")]
    prepare_environment("cpu")
    with training_device("cpu"), training_session(flags) as session:
        session.args.check_for_nan_in_loss_and_grad = False  # it works only inside a step
        model, rows = session.model[0], session.rows(causal_datasets)
        batch = next(rows)
        tokens, labels = batch["tokens"], batch["labels"]
        assert torch.equal(tokens[:, 1:], labels[:, :-1])
        changed = tokens.clone()
        changed[:, -1] = 299 - changed[:, -1]
        for sees, is_causal in ((causal_attention(model), True), (contextlib.nullcontext(), False)):
            with sees:
                before, after = model(tokens, None, None), model(changed, None, None)
                losses, loss_func = causal_forward_step(iter([batch]), model)
            assert torch.equal(before[:, :-1], after[:, :-1]) == is_causal
            loss, count, _ = loss_func(losses)
            plain = torch.nn.functional.cross_entropy(before.flatten(0, 1), labels.flatten())
            assert batch["loss_mask"].all() and count == labels.numel()
            torch.testing.assert_close(loss / count, plain)
        (directory / "sides").write_text("seen")


def test_sides_compute_what_they_are_named_for(tmp_path):
    ranks.launch(tmp_path, 1, entry=sides)
    assert (tmp_path / "sides").read_text() == "seen"


@pytest.mark.parametrize("sides", [[], ["--sides", "hugging_face", "full_head"]])
def test_sizes_that_cannot_work_are_refused(sides, monkeypatch):
    monkeypatch.setattr(throughput, "use_device", lambda: "cpu")  # it would change this process
    for flags, message in (
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--rows", "0"], "--rows 0: must be at least 1"),
        (["--vocabulary", "10"], "--vocabulary 10: must be above 256, for bytes and mask"),
        (["--hidden", "128", "--heads", "3"], "--hidden 128: must be a multiple of 2 x --heads 3"),
        (["--hidden", "30", "--heads", "2"], "--hidden 30: must be a multiple of 2 x --heads 2"),
    ):
        parser = argparse.ArgumentParser()
        throughput.add_arguments(parser)
        with pytest.raises(UserError, match=message):
            throughput.run(parser.parse_args([*sides, *flags]))
