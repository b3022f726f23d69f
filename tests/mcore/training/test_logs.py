"""The logs of a run: losses by rate, speed, recipe, and the loss with a control variate."""

import itertools
import re
import time

import pytest
from megatron.training import training
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_mdm import pretrain
from megatron_mdm.config import MDMConfig
from megatron_mdm.mcore.training.megatron_log import readable_log
from tests import ranks
from tests.mcore.flags.parsing import parsed


def test_logs_show_loss_per_rate_masked_fraction_and_speed(base, tmp_path):
    flags = ["--log-interval", "2", "--eval-iters", "2", "--mdm-rate-bins", "4"]
    run = ranks.launch(tmp_path, 2, *base, *flags, "--pipeline-model-parallel-size", "2")
    bins = [f"mdm/loss at t {i / 4:.2f}-{(i + 1) / 4:.2f}" for i in range(4)]
    for name in (*bins, "mdm/masked fraction", "mdm/rows per s"):
        assert len(run.scalars[name]) == 2, name  # iterations 2 and 4
    assert run.scalars["mdm/tokens per s"][0] == pytest.approx(
        32 * run.scalars["mdm/rows per s"][0], rel=1e-6
    )
    # 16 rates from the lattice: their mean, and so the masked fraction, is near 1/2.
    assert run.scalars["mdm/masked fraction"] == pytest.approx([0.5, 0.5], abs=0.1)
    line = next(x for x in run.output[1].splitlines() if "mdm iteration        2" in x)
    assert "masked fraction" in line
    assert "0.12: " in line and "0.88: " in line
    # Means over tokens and means over rows agree where all rows have equally many tokens.
    nelbo = run.scalars["mdm/validation NELBO"][-1]
    assert f"mdm loss value: {nelbo:.3E}"[:20] in "\n".join(run.output)
    assert run.scalars["mdm/validation NELBO stderr"][-1] > 0
    # Lines of Megatron are left out if they say nothing on a CPU, or the same at every evaluation.
    text = "\n".join(run.output)
    assert "RerunStateMachine initialized" in text and "Setting RerunStateMachine" not in text
    assert "in billions" not in text
    assert "memory (MB)" not in text and "memory footprint" not in text


def on_a_slow_disk() -> None:
    """Trains while TensorBoard's writer thread is slow for each scalar."""
    write = RecordWriter.write

    def slowly(writer, data):
        time.sleep(0.02)
        write(writer, data)

    RecordWriter.write = slowly
    pretrain.main()


def test_the_scalars_of_the_last_validation_are_written_before_the_end(base, tmp_path):
    flags = ["--train-iters", "1", "--eval-interval", "1", "--eval-iters", "1"]
    run = ranks.launch(tmp_path, 1, *base, *flags, entry=on_a_slow_disk)
    assert len(run.scalars["mdm/validation NELBO"]) == 2  # after the step and at the end


def test_expected_memory_on_a_gpu_has_no_billions_of_parameters(monkeypatch, capsys):
    args = parsed(monkeypatch)
    vars(args).update(  # values that Megatron fills in
        ffn_hidden_size=64,
        kv_channels=8,
        num_query_groups=2,
        data_parallel_size=1,
        padded_vocab_size=128,
        expert_tensor_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
    )
    before = training.report_theoretical_memory
    before(args, num_microbatches=1, verbose=True)
    assert "in billions: 0.00" in capsys.readouterr().out
    with readable_log("cuda"):
        training.report_theoretical_memory(args, num_microbatches=1, verbose=True)
    printed = capsys.readouterr().out
    assert "Theoretical memory footprints: weight" in printed and "billions" not in printed
    assert training.report_theoretical_memory is before


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Runs with the paper's recipe, with and without the control variate."""
    directory = tmp_path_factory.mktemp("recipes")
    flags = [*base, "--mdm-recipe", "paper", "--mdm-ppots-refit-interval", "2"]
    flags += "--log-interval 1 --save-interval 5 --mdm-rate-bins 4".split()
    words = {
        decay: [*flags, "--mdm-ema-decay", decay, "--save", str(directory / decay / "checkpoint")]
        for decay in ("1.0", "0.5")
    }
    return ranks.launch_all(directory, 2, words), directory


def test_the_control_variate_changes_the_report_and_nothing_else(runs):
    (plain, controlled), directory = runs[0].values(), runs[1]
    assert plain.scalars["mdm/controlled loss"] == plain.scalars["mdm/loss"]
    assert controlled.scalars["mdm/loss"] == plain.scalars["mdm/loss"]
    assert controlled.scalars["mdm/controlled loss"] != plain.scalars["mdm/loss"]
    # Equal bit for bit: the gradient norms of every step, and the final weights.
    assert controlled.grad_norms == plain.grad_norms
    weights = [ranks.weights(directory / decay / "checkpoint") for decay in ("1.0", "0.5")]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert value.equal(weights[1][name]), name


def test_the_log_shows_the_recipe_data_rows_and_largest_weight(runs):
    run, _ = runs[0].values()
    output = "\n".join(run.output)
    line = "--mdm-recipe paper: --mdm-rate-sampler ppots, --mdm-ppots-refit-interval 2 (by hand), "
    assert output.count(line) == 1
    assert run.scalars["mdm/data rows"] == [4, 8, 12, 16, 20]  # 8 rows per step, two views per text
    assert "data rows: 20 |" in run.output[1]
    masks = run.masks()
    eps = MDMConfig().eps
    for step in range(2):  # until the first fit the density is uniform
        rows = [masks[0, row] for row in range(8 * step, 8 * step + 8)]
        least = min(t for t, tokens in rows if ranks.MASK_ID in tokens)
        largest = run.scalars["mdm/largest weight"][step]
        assert largest == pytest.approx(1 / ((1 - eps) * least + eps))


def test_each_line_says_whether_the_loss_is_a_bound(base, tmp_path):
    """A bell fades within log intervals, under pipeline stages; other settings run beside it."""
    bell = "--mdm-rate-sampler logit-normal --mdm-logit-normal 0 0.5 --log-interval 2"
    words = {
        "fades": f"{bell} --mdm-bell-fade 0.25 0.5 --train-iters 8",
        "proposal": f"{bell} --mdm-bell-role proposal --train-iters 2",
        "clipped": "--mdm-recipe clipped --train-iters 2",
        "defaults": "--train-iters 2",
    }
    stages = ["--pipeline-model-parallel-size", "2"]
    runs = ranks.launch_all(
        tmp_path, 2, {name: [*base, *flags.split(), *stages] for name, flags in words.items()}
    )
    said = {}
    for name, run in runs.items():
        lines = [x for x in run.output[1].splitlines() if " mdm iteration " in x]
        said[name] = [re.search(r"\| bound: (.*?) \|", line)[1] for line in lines]
        assert [word == "yes" for word in said[name]] == run.scalars["mdm/is bound"]
        warned = "\n".join(run.output).count("the training loss is no bound")
        assert warned == (said[name][0] != "yes"), name
    assert said["defaults"] == ["yes", "yes"] and set(said["proposal"]) == {"yes"}
    assert said["clipped"] == ["no (clipped)"] * 2
    # Finished iterations decide an iteration's share: 0.1, 0.1, 0.1, 0.55, 1 and so on.
    assert said["fades"] == [
        "no (bell, uniform share 0.10)",
        "no (bell, uniform share 0.33)",
        "yes",
        "yes",
    ]
    assert runs["fades"].scalars["mdm/uniform share"] == pytest.approx([0.1, 0.325, 1, 1])
    assert "mdm/uniform share" not in runs["clipped"].scalars


def useful_operations(rows, experts, block=None):
    """Counts by hand the operations of a training step on these masked rows of documents.

    Documents end with EOD. The model is that of `ranks.MODEL` with 2 key and value heads of width 8
    and, if `experts`, with a router of 4 experts of width 16, 2 of which are active per token.
    `block` is the number of tokens in a block, for rows with clean copies.
    """
    found = 0
    for tokens in rows:
        ends = [i + 1 for i, token in enumerate(tokens) if token == ranks.EOD_ID]
        bounds = sorted({0, *ends, len(tokens)})
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        positions, pairs = len(tokens), sum(length**2 for length in lengths)
        if block is not None:
            positions *= 2
            ends = [
                (start, min(start + block, length))
                for length in lengths
                for start in range(0, length, block)
            ]
            # A noisy token sees its block and what is before it, and so does a clean one.
            pairs = 2 * sum((end - start) * end for start, end in ends)
        attention = positions * (32 * (32 + 16 + 16) + 32 * 32)
        scores = 2 * 32 * pairs  # queries by keys, weights by values
        feed_forward = positions * (32 * 4 + 2 * 3 * 32 * 16 if experts else 3 * 32 * 64)
        head = 32 * 128 * tokens.count(ranks.MASK_ID)
        found += 2 * (4 * (attention + scores + feed_forward) + head)
    return 3 * found  # the backward pass takes twice the forward pass


def test_throughput_counts_what_is_of_use(data, tmp_path):
    """Documents, grouped queries, masked positions: under each kind of parallelism, and experts."""
    flags = ["--data-path", str(data), "--data-cache-path", str(tmp_path / "cache")]
    flags += "--mdm-isolate-documents --no-mdm-eod-eligible --ffn-hidden-size 64".split()
    flags += "--group-query-attention --num-query-groups 2 --log-throughput".split()
    flags += "--train-iters 4 --log-interval 2".split()
    layouts = {
        "TP 2": "--tensor-model-parallel-size 2",
        "PP 2": "--pipeline-model-parallel-size 2",
        "TP 2, blocks": "--tensor-model-parallel-size 2 --mdm-block-size 4",
        "DP 2, experts": "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 16",
    }
    runs = ranks.launch_all(
        tmp_path, 2, {name: [*flags, *words.split()] for name, words in layouts.items()}
    )
    for name, run in runs.items():
        rows = [tokens for _, (_, tokens) in sorted(run.masks().items())]
        assert len(rows) == 32 and any(row.count(ranks.EOD_ID) > 1 for row in rows)
        rows_per_s = run.scalars["mdm/rows per s"]
        for interval in range(2):
            seconds = 16 / rows_per_s[interval]
            own = rows[16 * interval : 16 * interval + 16]
            flops = useful_operations(own, "experts" in name, 4 if "blocks" in name else None)
            tflops = run.scalars["mdm/useful TFLOP per s per GPU"][interval]
            assert tflops == pytest.approx(flops / seconds / 2 / 1e12, rel=1e-6), name
            tokens = run.scalars["mdm/tokens per s per GPU"][interval]
            assert tokens == pytest.approx(32 * rows_per_s[interval] / 2, rel=1e-6)
        output = "".join(run.output)
        assert "throughput per GPU" not in output  # Megatron's own, for causal attention
        line = next(line for line in output.splitlines() if "mdm iteration        2" in line)
        assert (
            f"| useful TFLOP/s per GPU: {run.scalars['mdm/useful TFLOP per s per GPU'][0]:.5g} |"
            in line
        )
