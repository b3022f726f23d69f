import argparse
import contextlib
import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks import baseline, overhead
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.device import training_device
from tests import ranks
from tests.ranks import entries


def test_steps_of_both_objectives_in_turns(tmp_path):
    json_file = tmp_path / "overhead.json"
    sizes = "--layers 2 --hidden 32 --heads 2 --rows 4 --length 64 --vocabulary 40000 --rounds 4"
    tool = ["--", "tools/benchmark.py", "overhead", "--json", str(json_file), *sizes.split()]
    ranks.launch(tmp_path, 1, *tool, entry=entries.tool)
    results = json.loads(json_file.read_text())
    assert set(results["sides"]) == {"gpt", "full_head", "masked_head", "causal"}
    # Times of so few steps of so small a model decide nothing: only that there are some.
    assert results["tokens_per_s_ratio_masked_head"] > 0
    assert results["tokens_per_s_ratio_full_head"] > 0
    ratios = results["tokens_per_s_ratios"]["masked_head"]
    assert ratios["quartiles"][0] <= ratios["median"] <= ratios["quartiles"][1]
    if results["peak_memory_ratio_masked_head"] is not None:
        assert results["peak_memory_ratio_masked_head"] < 0.9
        # Logits, which the cross entropy overwrites: 4 bytes for each of 4 x 64 positions.
        assert results["sides"]["full_head"]["peak_bytes"] >= 4 * 64 * 40_000 * 4
    # The table is all that goes to stdout.
    table = (tmp_path / "stdout0").read_text().splitlines()
    assert len(table) == 6 and "masked head" in table[4]


def benchmark_sides() -> None:
    """Holds the steps that tools/benchmark.py overhead compares against plain torch."""
    from benchmarks.causal import causal_datasets, causal_forward_step
    from benchmarks.overhead import model_flags
    from benchmarks.race import write_data
    from benchmarks.session import training_session
    from megatron_mdm.environment import prepare_environment
    from megatron_mdm.mcore.model.causal import causal_attention

    directory = Path(os.environ["TRACE_DIR"])
    write_data(directory)
    sizes = {"layers": 2, "hidden": 32, "heads": 2, "rows": 4, "length": 16}
    flags = [*model_flags(sizes, 300, "cpu"), "--data-path", str(directory / "text")]
    prepare_environment("cpu")
    with training_device("cpu"), training_session(flags) as session:
        session.args.check_for_nan_in_loss_and_grad = False  # outside of a step it cannot be
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
    ranks.launch(tmp_path, 1, entry=benchmark_sides)
    assert (tmp_path / "sides").read_text() == "seen"


@pytest.mark.parametrize("benchmark", [overhead, baseline])
def test_sizes_that_cannot_work_are_refused(benchmark, monkeypatch):
    monkeypatch.setattr(overhead, "use_device", lambda: "cpu")  # it would change this process
    for flags, message in (
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--rows", "0"], "--rows 0: must be at least 1"),
        (["--vocabulary", "10"], "--vocabulary 10: must be above 256, bytes and mask"),
        (["--hidden", "128", "--heads", "3"], "--hidden 128: must be a multiple of 2 x --heads 3"),
        (["--hidden", "30", "--heads", "2"], "--hidden 30: must be a multiple of 2 x --heads 2"),
    ):
        parser = argparse.ArgumentParser()
        benchmark.add_arguments(parser)
        with pytest.raises(UserError, match=message):
            benchmark.run(parser.parse_args(flags))
