"""Block diffusion under every layout: equal rows, masks, losses and weights, across phases.

It takes about two minutes: rows have twice as many positions in some steps and not in others, which
pipeline stages, views and evaluations have to follow. test_normalization.py compares loss and
gradients with the definition.
"""

import contextlib
import json
import math
import os
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from torch.nn import functional

from megatron_mdm.mcore import pretrain as program
from megatron_mdm.mcore.data.validation_sets import part_of_set
from megatron_mdm.mcore.device import replaced
from megatron_mdm.mcore.flags.resume import BLOCK_SIZES, changes_of_blocks
from megatron_mdm.mcore.model.repeated_positions import repeated_positions
from megatron_mdm.mcore.training import objective
from megatron_mdm.pretrain import main
from tests import ranks
from tests.one_rank import on_one_cpu_rank

SGD = ["--optimizer", "sgd", "--sgd-momentum", "0", "--lr", "0.1", "--weight-decay", "0"]
# An evaluation after the second step has blocks, and one after the fourth has whole rows.
PHASES = ["--mdm-block-size-schedule", "0:4 2:row 4:8"]
EVALUATION = "--eval-interval 2 --eval-iters 1 --eval-global-batch-size 4".split()
METHODS = {
    "plain": "--mdm-embedding-noise 0.3 4 --mdm-confidence-loss 0.5",
    "documents": "--mdm-isolate-documents --mdm-normalization rows --mdm-quantiles strata "
    "--mdm-mask exact-count --mdm-rate-sampler ppots --mdm-ppots-refit-interval 2",
    "MIRROR, shift": "--mdm-views 2 --mdm-shift --mdm-mask exact-count --mdm-rate-sampler ppots "
    "--mdm-ppots-refit-interval 2 --mdm-ppots-target gradient --mdm-confidence-loss 1",
}
LAYOUTS = {
    "DP 2, recomputation": (
        2,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "TP 2 + SP": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP 2": (2, "--pipeline-model-parallel-size 2"),
    "PP 2 x VP 2": (
        2,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "HybridModel, PP 2": (2, "--mdm-model hybrid --pipeline-model-parallel-size 2"),
}
SIZES = {"block 4": 4, "block 16": 16, "whole rows": None}
EVALUATIONS = "--eval-iters 2 --eval-global-batch-size 4".split()
EVALUATED_SIZES = "--mdm-eval-block-sizes 4 16 row".split()
EVALUATED = 8  # rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base):
    directory = tmp_path_factory.mktemp("blocks")

    def words(name, flags):
        save = ["--save", str(directory / name / "checkpoint"), "--save-interval", "1"]
        return [*base, *SGD, *PHASES, *EVALUATION, *save, *flags.split()]

    runs = {}
    for method, flags in METHODS.items():
        for layout, (count, divided) in ({"1 rank": (1, "")} | LAYOUTS).items():
            name = f"{method}, {layout}"
            runs[name] = (count, words(name, f"{flags} {divided}"))
    found = ranks.launch_layouts(directory, runs)
    for name, run in found.items():
        run.checkpoint = directory / name / "checkpoint"
        run.weights = ranks.weights(run.checkpoint)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_layouts_are_equal(runs, method, layout):
    run, reference = runs[f"{method}, {layout}"], runs[f"{method}, 1 rank"]
    if "ppots" in METHODS[method]:
        ranks.assert_masks_equal_after_refits(run.masks(), reference.masks())
    else:
        assert run.masks() == reference.masks()
    assert len(run.losses) == 5
    confident = ["confidence loss"] if "confidence" in METHODS[method] else []
    for name in ("mdm loss", "grad-norm", "mdm/validation NELBO", *confident):
        assert run.scalars[name] == pytest.approx(reference.scalars[name], rel=1e-5), name
    assert {*run.weights} == {*reference.weights}
    for name in {*run.weights} - {"mdm_sampler_state"}:
        value = run.weights[name]
        torch.testing.assert_close(value, reference.weights[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def resumed(runs, base, tmp_path_factory):
    """The runs on one rank, resumed on both sides of the phase of whole rows on two stages."""
    directory = tmp_path_factory.mktemp("resumed")
    flags, words = base[: base.index("--load")], {}
    for method in METHODS:
        for iteration in (1, 3):
            run = runs[f"{method}, 1 rank"]
            # Plain SGD has no state, and Megatron cannot load that of an optimizer without one.
            load = ["--load", str(run.checkpoint), "--ckpt-step", str(iteration), "--no-load-optim"]
            own = METHODS[method].split()
            stages = LAYOUTS["PP 2"][1].split()
            words[f"{method}, {iteration}"] = [*flags, *SGD, *PHASES, *own, *load, *stages]
    words["plain, 3"] += [*EVALUATIONS, *EVALUATED_SIZES]
    return ranks.launch_all(directory, 2, words)


@pytest.mark.parametrize("iteration", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_resumes_in_the_middle_of_the_schedule(runs, resumed, method, iteration):
    run, whole = resumed[f"{method}, {iteration}"], runs[f"{method}, 1 rank"]
    assert len(run.losses) == 5 - iteration
    for name in ("mdm loss", "grad-norm"):
        assert run.scalars[name] == pytest.approx(whole.scalars[name][iteration:], rel=1e-5), name


def test_only_sizes_that_have_acted_must_agree():
    def changed(now, saved, finished, samples=(None, None)):
        now, saved = (
            dict(zip(BLOCK_SIZES, sizes, strict=True), train_samples=length)
            for sizes, length in zip((now, saved), samples, strict=True)
        )
        saved |= dict(zip(("iteration", "consumed_train_samples"), finished, strict=True))
        saved |= {"global_batch_size": 8, "step_batch_size_schedule": None}
        return changes_of_blocks(Namespace(**now), saved)

    schedule, longer = (None, "0:4 100:8"), (None, "0:4 50:16")
    assert not changed(schedule, longer, (50, 400))
    assert changed(schedule, longer, (51, 408)) == [
        "--mdm-block-size-schedule 0:4 100:8 (checkpoint: 0:4 50:16)"
    ]
    assert not changed(schedule, (4, None), (100, 800))
    in_samples = (1000, 1000)
    assert not changed(schedule, longer, (6, 48), in_samples)
    assert not changed(schedule, longer, (7, 56), in_samples)  # the last step began at 48
    assert changed(schedule, longer, (8, 64), in_samples)
    assert not changed((None, "0:row 9:4"), (None, None), (9, 72))
    assert len(changed((4, None), (None, None), (9, 72))) == 1
    # From samples to iterations: the same schedule would have another phase now.
    assert changed(schedule, schedule, (14, 112), (None, 1000)) == [
        "--mdm-block-size-schedule 0:4 100:8 in iterations (checkpoint: in samples)"
    ]
    assert not changed((None, "0:4 13:8"), schedule, (14, 112), (None, 1000))
    assert not changed(schedule, schedule, (12, 96), (None, 1000))


def test_tools_that_read_whole_rows_refuse_a_checkpoint_of_blocks(runs, tmp_path):
    directory = runs["plain, 1 rank"].checkpoint
    words = ["--load", str(directory), "--device", "cpu", "--output", str(tmp_path / "x.json")]
    run = ranks.run_forked("tools/fit_ppots.py", *words)
    assert run.returncode != 0
    assert f"{directory} was trained in blocks of 8 tokens" in run.stderr


def test_an_evaluation_after_a_resume_begins_with_its_first_rows(resumed, evaluated):
    """The checkpoint of the resumed run follows an evaluation of 4 rows at one size."""
    parts = {part_of_set(i) for i in range(len(SIZES))}
    found = {key: x for key, x in resumed["plain, 3"].masks().items() if key[0] in parts}
    assert len(found) == len(parts) * EVALUATED
    assert found == evaluated["1 rank"].masks()


@pytest.fixture(scope="module")
def evaluated(runs, base, tmp_path_factory):
    """A checkpoint of blocks of 8, evaluated at three sizes in several layouts."""
    load = ["--load", str(runs["plain, 1 rank"].checkpoint), "--skip-train"]
    method = METHODS["plain"].split()
    flags = [*base[: base.index("--load")], *SGD, *PHASES, *method, *load, "--no-load-optim"]
    flags += [*EVALUATIONS, *EVALUATED_SIZES]
    layouts = {"1 rank": (1, "")} | LAYOUTS
    del layouts["HybridModel, PP 2"]
    return ranks.launch_layouts(
        tmp_path_factory.mktemp("evaluated"),
        {name: (count, [*flags, *divided.split()]) for name, (count, divided) in layouts.items()},
    )


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "Hybrid" not in name])
def test_evaluations_at_several_sizes_are_equal_between_layouts(evaluated, layout):
    found, expected = evaluated[layout].scalars, evaluated["1 rank"].scalars
    names = [f"mdm/validation {size} NELBO" for size in SIZES]
    assert all(found[name] == pytest.approx(expected[name], rel=1e-5) for name in names)
    assert len({expected[name][0] for name in names}) == 3


def evaluate_by_definition():
    """Computes the NELBO of the validation rows at one size, by one pass for each block."""
    nats = []

    def forward_step(state, iterator, model):
        (size,) = state.mdm.evaluated_sizes
        batch = next(iterator)
        for clean, uniforms, quantile in zip(
            batch["tokens"], batch["uniforms"], batch["quantile"], strict=True
        ):
            length, total = len(clean), 0.0
            for block, start in enumerate(range(0, length, size or length)):
                end = min(length, start + (size or length))
                count = math.ceil((int(quantile[block]) + 0.5) * 2.0**-52 * (end - start))
                at = torch.zeros(end - start, dtype=torch.bool)
                at[uniforms[start:end].argsort()[:count]] = True
                noisy = torch.where(at, ranks.MASK_ID, clean[start:end])
                places = torch.arange(end) // (size or length)
                hidden = (places[None] > places[:, None])[None, None]
                logits = model(torch.cat([clean[:start], noisy])[None], None, hidden)[0, start:]
                loss = functional.cross_entropy(logits[at], clean[start:end][at], reduction="sum")
                total += float(loss) * (end - start) / count / length
            nats.append(total)
        if len(nats) < EVALUATED:
            return torch.zeros(1), lambda _: (torch.tensor(0.0), torch.tensor(1).int(), {})
        Path(os.environ["TRACE_DIR"], "nats.json").write_text(json.dumps(nats))
        raise SystemExit(0)

    with replaced(objective, "forward_step", forward_step):
        main()


def test_evaluations_have_the_nelbo_of_the_definition(runs, base, evaluated, tmp_path):
    """Every token is eligible, and each block has a rate and an exact count of its own."""
    load = ["--load", str(runs["plain, 1 rank"].checkpoint), "--skip-train", "--no-load-optim"]
    flags = [*base[: base.index("--load")], *SGD, *PHASES, *METHODS["plain"].split()]
    flags += [*load, *EVALUATIONS]
    words = {
        name: [*flags, "--micro-batch-size", "4", "--mdm-eval-block-sizes", str(size or "row")]
        for name, size in SIZES.items()
    }
    ranks.launch_all(tmp_path, 1, words, entry=evaluate_by_definition)
    for name in SIZES:
        nats = json.loads((tmp_path / name / "nats.json").read_text())
        assert len(nats) == EVALUATED
        logged = evaluated["1 rank"].scalars[f"mdm/validation {name} NELBO"][0]
        assert logged == pytest.approx(sum(nats) / EVALUATED, rel=1e-5)


def test_evaluate_py_reads_blocks(runs, data, tmp_path):
    directory = runs["plain, 1 rank"].checkpoint
    results = {}
    for size in ("trained", "8", "2", "row"):
        path = tmp_path / f"{size}.json"
        words = ["--load", str(directory), "--device", "cpu", "--data", str(data), "--rows", "6"]
        run = ranks.run_forked(
            "tools/evaluate.py", *words, "--block-size", size, "--draws", "2", "--json", str(path)
        )
        assert run.returncode == 0, run.stderr[-2000:]
        results[size] = json.loads(path.read_text())
    assert results["trained"] == results["8"] and results["8"]["block_size"] == 8
    assert results["row"]["block_size"] is None
    assert len({result["nelbo"]["value"] for result in results.values()}) == 3


def without_context():
    """Trains as a script that calls Megatron's `pretrain` without `schedules_positions`."""
    with replaced(program, "schedules_positions", lambda _: contextlib.nullcontext()):
        main()


def test_a_script_without_the_context_is_refused(base, tmp_path):
    """Its stages would wait for tensors of another shape for ever."""
    flags = [*base, "--mdm-block-size", "4", "--pipeline-model-parallel-size", "2"]
    run = ranks.launch(tmp_path, 2, *flags, entry=without_context, check=False)
    assert "schedules_positions(objective.state)" in ranks.the_error_line(run.output)


@pytest.mark.parametrize("kind", ["plain", "Llama scaling", "partial", "Yarn"])
def test_copies_of_a_token_share_its_rotary_embedding(kind):
    """A row of as many ordinary positions has another table, before and after."""
    with on_one_cpu_rank():
        if kind == "Yarn":
            table = YarnRotaryEmbedding(8, use_cpu_initialization=True, scaling_factor=4.0)
        else:
            options = {"Llama scaling": {"rope_scaling": True}}.get(kind, {})
            share = 0.5 if kind == "partial" else 1.0
            table = RotaryEmbedding(8, share, use_cpu_initialization=True, **options)
        model = torch.nn.Module()
        model.rotary_pos_emb = table

        def angles(positions):
            found = table(positions)
            return found[0] if kind == "Yarn" else found

        ordinary = angles(24)
        with repeated_positions(model, 3):
            copies = angles(24)
        assert torch.equal(copies, angles(8).repeat_interleave(3, dim=0))
        assert not torch.equal(copies, ordinary) and torch.equal(angles(24), ordinary)
