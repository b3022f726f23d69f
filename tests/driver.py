"""What the ranks of the tests run: the program, with a record of the rows that each rank saw."""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import resource
import runpy
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.rerun_state_machine import RerunMode
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import unwrap_model
from megatron.training import get_args, initialize
from torch.nn import functional

from megatron_mdm.checkpoint import open_checkpoint
from megatron_mdm.config import MDMConfig
from megatron_mdm.errors import UserError
from megatron_mdm.mcore.checkpoint import workers as checkpoint_workers
from megatron_mdm.mcore.checkpoint.files import TRACKER
from megatron_mdm.mcore.device import replaced, training_device
from megatron_mdm.mcore.flags import arguments as arguments_module
from megatron_mdm.mcore.inference import measure as measure_module
from megatron_mdm.mcore.training import forward_step as step
from megatron_mdm.mcore.training import objective as program
from megatron_mdm.mcore.training import ppots
from megatron_mdm.mcore.training.state import TrainingState
from megatron_mdm.objective.ppots.exact_sums import from_limbs
from megatron_mdm.objective.ppots.moments import accumulate
from megatron_mdm.pretrain import main
from tests import ROOT


def train() -> None:
    """The program as a user starts it, recording (split, row) -> (t, masked tokens)."""
    trace: dict = {}
    load_batch, corrupter = step.load_batch, TrainingState.corrupter
    seen: dict = {}

    def recording_load_batch(*args):
        seen["rows"] = load_batch(*args)
        return seen["rows"]

    def recording_corrupter(state, training):
        def corrupt(*args):
            corruption = corrupter(state, training)(*args)
            keys = zip(seen["rows"].split.tolist(), seen["rows"].row.tolist(), strict=True)
            values = zip(corruption.t.tolist(), corruption.tokens.tolist(), strict=True)
            for key, value in zip(keys, values, strict=True):
                assert trace.setdefault(key, value) == value
            return corruption

        return corrupt

    try:
        with (
            replaced(step, "load_batch", recording_load_batch),
            replaced(TrainingState, "corrupter", recording_corrupter),
        ):
            main()
    finally:
        torch.save(trace, f"{os.environ['TRACE_DIR']}/trace{os.environ['RANK']}.pt")


def every_step_twice() -> None:
    """`train`, repeated by the rerun machine in the mode that no value of --rerun-mode chooses."""
    initialize.RerunMode = lambda mode: RerunMode.REPORT_DETERMINISM_STATS
    train()


def interrupted() -> None:
    """`train`, whose last rank and its group get two signals in the third iteration.

    As from a terminal and from torchrun. The group are its workers for data and checkpoints.
    """
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as in a process that was not forked

    def interrupt():
        assert len(multiprocessing.active_children()) == 3  # loader, writer, their queue
        for number in (signal.SIGINT, signal.SIGTERM):
            os.killpg(0, number)

    _at_forward(lambda: get_args().curr_iteration == 2, interrupt)
    train()


def loses_its_writer() -> None:
    """The program; the last rank's writer of checkpoints is killed in the midst of a later one.

    The process is stopped until the rank waits for it.
    """

    def lose():
        writer = checkpoint_workers.CheckpointWorker._persistent_process
        os.kill(writer.pid, signal.SIGSTOP)
        threading.Timer(2.0, writer.kill).start()

    _at_forward(lambda: Path(get_args().save, TRACKER).exists(), lose)
    main()


def _at_forward(condition, act) -> None:
    """Has the last rank act once, before the first forward pass in which the condition holds."""
    forward_step, done = program.forward_step, []

    def acting_forward_step(*args):
        is_last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
        if is_last and not done and condition():
            done.append(act())
        return forward_step(*args)

    program.forward_step = acting_forward_step


def measured_rows() -> None:
    """The program, saving t, value and importance weight of the rows that P-POTS measured.

    One tensor rank of the last stage saves those of its rows.
    """
    rows: list = []
    record = ppots.OnlineSampler.record

    def recording_record(self, t, value, rate_weight, present=None):
        rows.append(torch.stack([x.detach().double().flatten() for x in (t, value, rate_weight)]))
        record(self, t, value, rate_weight, present)

    ppots.OnlineSampler.record = recording_record
    main()
    if rows and mpu.get_tensor_model_parallel_rank() == 0:
        path = f"{os.environ['TRACE_DIR']}/measured{os.environ['RANK']}.pt"
        torch.save(torch.cat(rows, dim=1), path)


def libraries() -> None:
    """Whether Transformer Engine was hidden before Megatron could import it, and compiling off."""
    hidden = sys.modules.get("transformer_engine", "not hidden") is None
    found = {"hidden": hidden, "used": layers.HAVE_TE}
    found["compile disabled"] = os.environ.get("TORCH_COMPILE_DISABLE")
    Path(os.environ["TRACE_DIR"], "libraries.json").write_text(json.dumps(found))


def other_density() -> None:
    """The program on a machine whose last rank computes differently."""
    fit = ppots.fit

    def other_fit(*args, **settings):
        settings["uniform_share"] += 0.01 * int(os.environ["RANK"])
        return fit(*args, **settings)

    ppots.fit = other_fit
    main()


def file_of_a_node() -> None:
    """The program on nodes of their own disks: RANK in a flag stands for the rank."""
    sys.argv = [word.replace("RANK", os.environ["RANK"]) for word in sys.argv]
    main()


def other_start() -> None:
    """The program; the last rank would begin a new run where the others go on."""
    choose = arguments_module.choose_start

    def chosen(args):
        found = choose(args)
        arguments = {**found.arguments, "finetune": os.environ["RANK"] == "1"}
        return dataclasses.replace(found, arguments=arguments)

    arguments_module.choose_start = chosen
    main()


def nan_row() -> None:
    """The program with a first row whose cross entropies, and their gradients, are no numbers."""
    logits_to_tokens, calls = step.logits_to_tokens, []

    def with_nan(values, shift):
        values = logits_to_tokens(values, shift)
        calls.append(values)
        if len(calls) > 1:
            return values
        return values * torch.ones_like(values).index_fill(0, torch.tensor([0]), torch.nan)

    step.logits_to_tokens = with_nan
    main()


def nan_from_third_iteration() -> None:
    """The program with a row of the last rank that is no number, two micro-batches an iteration."""
    logits_to_tokens, calls = step.logits_to_tokens, []

    def with_nan(values, shift):
        values = logits_to_tokens(values, shift)
        calls.append(values)
        if len(calls) <= 4 or os.environ["RANK"] == "0":
            return values
        return values * torch.ones_like(values).index_fill(0, torch.tensor([1]), torch.nan)

    step.logits_to_tokens = with_nan
    main()


def nan_gradient_of_first_stage() -> None:
    """The program, whose first rank gets gradients that are no numbers from the next stage."""
    forward_step = program.forward_step

    def with_nan(*args):
        output, loss = forward_step(*args)
        if os.environ["RANK"] == "0":
            output.register_hook(lambda gradient: gradient * torch.nan)
        return output, loss

    program.forward_step = with_nan
    main()


def whole_batch() -> None:
    """The objective of one global batch in plain torch, without our loss and Megatron's sums.

    Saves the loss and every gradient; to be started on one rank with the whole batch as
    micro-batch.
    """

    def forward_step(state, iterator, model):
        args = get_args()
        routers = _router_inputs(model)
        batch = next(iterator)
        rows = [
            dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
        draws = [draw for row in rows for draw in _draws(row, model, args)]
        sums, counts = zip(*draws, strict=True)
        assert len(set(counts)) > 1, "rows should differ"
        if args.mdm_normalization == "tokens":
            loss = sum(sums) / sum(counts)
        else:
            loss = sum(x / n for x, n in draws if n) / sum(n > 0 for n in counts)
        inner = unwrap_model(model)
        names, parameters = zip(*inner.named_parameters(), strict=True)
        routed = sum(_router_losses(args, *router) for router in routers) / len(rows)
        if args.mdm_normalization == "tokens":
            routed = routed * batch["tokens"].numel() / sum(counts)
        elif args.mdm_rate_per == "document":
            routed = routed * len(rows) / sum(n > 0 for n in counts)
        MoEAuxLossAutoScaler.set_loss_scale(torch.zeros(1))  # Megatron's own stay out
        gradients = torch.autograd.grad(loss + routed, parameters)
        torch.save(
            (loss.item(), dict(zip(names, gradients, strict=True))),
            f"{os.environ['TRACE_DIR']}/whole_batch.pt",
        )
        raise SystemExit(0)

    program.forward_step = forward_step
    main()


def _router_inputs(model):
    """A list that a call of the model fills with (router, its input [s, b, h])."""
    seen = []
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(lambda router, args, _: seen.append((router, args[0])))
    return seen


def _router_losses(args, router, x):
    """Balance of a row (Switch Transformer's) and z-loss of its tokens: means, weighted.

    A row that ends early, x [s, 1, h] with s below --seq-length, counts for as much less.
    """
    logits = x.double() @ router.weight.double().t()
    num_experts = logits.shape[-1]
    p = logits.softmax(dim=-1)
    chosen = torch.zeros_like(p).scatter(-1, p.topk(args.moe_router_topk).indices, 1.0)
    rows = num_experts * (chosen.mean(dim=0) * p.mean(dim=0)).sum(dim=-1) / args.moe_router_topk
    z_loss = logits.logsumexp(dim=-1).square().mean()
    loss = args.moe_aux_loss_coeff * rows.mean() + args.moe_z_loss_coeff * z_loss
    return loss * x.shape[0] / args.seq_length


def tool() -> None:
    """A command-line tool: the arguments after `--` are its file and its flags.

    What it prints goes to `stdout<rank>` of its own, beside the log.
    """
    file, *sys.argv[1:] = sys.argv[sys.argv.index("--") + 1 :]
    path = Path(os.environ["TRACE_DIR"], f"stdout{os.environ['RANK']}")
    with open(path, "w", encoding="utf-8") as stdout, contextlib.redirect_stdout(stdout):
        runpy.run_path(str(ROOT / file), run_name="__main__")


def logits() -> None:
    """Logits of a checkpoint on random rows, of two lengths, saved by every rank."""
    load, stages = sys.argv[sys.argv.index("--") + 1 :]
    with open_checkpoint(load, "cpu", int(stages)) as loaded:
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(0, 127, shape, generator=generator) for shape in ((3, 32), (1, 7))]
        plain = [loaded.logits(tokens) for tokens in rows]
        loaded.args.mdm_shift = True
        shifted = [loaded.logits(tokens) for tokens in rows]
        torch.save((plain, shifted), f"{os.environ['TRACE_DIR']}/logits{os.environ['RANK']}.pt")


def _draws(row, model, args):
    """(weighted loss, eligible tokens) of each part of a row that has a rate of its own.

    The model sees one document at a time with --mdm-isolate-documents, and never what lies beyond
    the length of a row.
    """
    tokens = row["tokens"]
    n, length = int(row["num_tokens"]), int(row["length"])
    ends = [i + 1 for i in range(n) if tokens[i] == 119]
    if "document" in row:
        ends = [i + 1 for i in range(n - 1) if row["document"][i] != row["document"][i + 1]]
    ends = sorted({*ends, n, length})
    documents = [(low, high) for low, high in zip([0, *ends], ends, strict=False) if low < high]
    seen = documents if args.mdm_isolate_documents else [(0, length)]
    drawn = documents if args.mdm_rate_per == "document" else [(0, length)]

    eligible = torch.zeros(len(tokens), dtype=torch.bool)
    for i in range(length if args.mdm_pad_eligible else n):
        # In tests/ranks.py the tokens of a prompt, and no others, are below 50.
        eligible[i] = tokens[i] >= 50 if args.mdm_sft else tokens[i] != 119
    if args.mdm_shift:
        eligible[[low for low, _ in seen]] = False
    p = torch.ones(len(tokens), dtype=torch.float64)
    for quantile, (low, high) in zip(row["quantile"].view(-1).double(), drawn, strict=False):
        p[low:high] = (1 - args.mdm_eps) * (quantile + 0.5) * 2.0**-52 + args.mdm_eps
    for token in args.mdm_isad_token_ids or ():
        p[tokens == token] = (p[tokens == token] + args.mdm_isad_delta).clamp(max=1)
    mask = ((row["uniforms"].double() + 0.5) * 2.0**-52 < p) & eligible
    corrupted = torch.where(mask, args.mdm_mask_token_id, tokens)
    logits = torch.cat([model(corrupted[None, low:high], None, None)[0] for low, high in seen])
    if args.mdm_shift:
        logits = torch.cat([logits[:1], logits[:-1]])
    log_p = logits.log_softmax(dim=-1).gather(-1, tokens[:length, None])[:, 0]
    weighted = -(log_p * mask[:length] / p[:length])
    return [(weighted[low:high].sum(), int(eligible[low:high].sum())) for low, high in drawn]


def measured_documents() -> None:
    """What fits to a checkpoint are of, beside the same from documents that the model sees alone.

    Saves by target (bins of the draws of documents, sums of the moments, and those expected).
    """
    (load,) = sys.argv[sys.argv.index("--") + 1 :]
    found: dict = {}
    mask_for_bins = measure_module.mask_for_bins

    def recording_mask(tokens, eligible, *draws, **settings):
        result = mask_for_bins(tokens, eligible, *draws, **settings)
        columns = (tokens, eligible, draws[-1], result.tokens, result.mask, result.weight, result.t)
        drawn.extend(zip(*columns, strict=True))
        return result

    measure_module.mask_for_bins = recording_mask
    with open_checkpoint(load, "cpu") as loaded:
        loaded.args.mdm_isolate_documents, loaded.args.mdm_rate_per = True, "document"
        head = unwrap_model(loaded.model).output_layer.weight.detach().double()
        for target in ("loss", "gradient"):
            drawn: list = []
            *_, (_, _, measured) = measure_module.measure(
                loaded, target, num_bins=4, num_rows=6, masks_per_bin=2
            )
            bins, expected = [], np.zeros(17)
            for draw, (tokens, eligible, documents, seen, mask, weight, t) in enumerate(drawn):
                for number in documents.unique().tolist():
                    own = documents == number
                    able = int(eligible[own].sum())
                    if not able:
                        continue
                    logits = loaded.logits(seen[own][None])[0].double()
                    error = logits.softmax(-1) - functional.one_hot(tokens[own], logits.shape[-1])
                    loss = functional.cross_entropy(logits, tokens[own], reduction="none")
                    # Under `tokens`, which this checkpoint was trained with, by length.
                    share = (mask * weight)[own] / tokens.numel()
                    value = (share * loss).sum()
                    if target == "gradient":
                        value = (share[:, None] * error @ head).norm()
                    bins.append((draw // 8, number, int(t[number] * 4)))
                    expected += from_limbs(accumulate(t[number], value, torch.ones(1), 4))
            found[target] = bins, measured.total.vector(), expected
    torch.save(found, f"{os.environ['TRACE_DIR']}/measured.pt")


def asynchronous_save() -> None:
    """Names of a checkpoint's files when Megatron would move the tracker, in seen.json."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_mdm.mcore.checkpoint.saving import safe_checkpoints

    directory, seen = Path(os.environ["TRACE_DIR"]), []
    checkpoint = directory / "checkpoint"
    checkpoint.mkdir(exist_ok=True)  # by another rank
    with training_device("cpu"), safe_checkpoints(hashes=True):
        torch.distributed.init_process_group("gloo")
        mpu.initialize_model_parallel()
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        part = ShardedTensor.from_rank_offsets("part", torch.arange(4.0), (0, rank, size))
        request = dist_checkpointing.save(
            {"part": part}, str(checkpoint), async_sharded_save=True, async_strategy="mcore"
        )
        request.add_finalize_fn(lambda: seen.extend(os.listdir(checkpoint)))
        assert "integrity.json" not in os.listdir(checkpoint)
        request.execute_sync()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    (directory / f"seen{rank}.json").write_text(json.dumps(sorted(seen)))


def autoregressive() -> None:
    """The autoregressive program of the reproduction, as a user starts it."""
    path = ROOT / "examples/reproduce/autoregressive.py"
    runpy.run_path(str(path), run_name="__main__")


def noise_batches() -> None:
    """Batches on which the reproduction measures gradients, numbered as the run's own."""
    sys.path.insert(0, str(ROOT / "examples/reproduce"))
    from noise import training_batches

    load, settings, size = sys.argv[sys.argv.index("--") + 1 :]
    with open_checkpoint(load, "cpu") as loaded:
        loaded.args.seed -= 1
        methods = [json.loads(settings), {"mdm_rate_sampler": "ppots", "mdm_ppots_bins": 8}]
        methods[1]["mdm_ppots_refit_interval"] = 50
        drawn = [
            [batch.corruption for batch in training_batches(loaded, method, int(size), 4)]
            for method in methods
        ]
    same = [(list(c.t), c.tokens.tolist()) for c in drawn[0]]
    weights = torch.cat([c.rate_weight for c in drawn[1]])
    torch.save((same, weights), f"{os.environ['TRACE_DIR']}/noise.pt")


def causal() -> None:
    """What a checkpoint gives under a causal mask, for tests/mcore/model/test_causal.py."""
    (load,) = sys.argv[sys.argv.index("--") + 1 :]
    with open_checkpoint(load, "cpu") as loaded:
        from megatron_mdm.evaluation.nelbo import ScoredRow
        from megatron_mdm.mcore.inference.measure import ParallelSketch, causal_step
        from megatron_mdm.mcore.model.causal import causal_attention

        tokens = torch.randint(0, 119, (3, 32), generator=torch.Generator().manual_seed(0))
        other = tokens.clone()
        other[:, 20:] = 7
        with causal_attention(loaded.model):
            seen, unseen = loaded.logits(tokens), loaded.logits(other)
        parameters = list(loaded.model.parameters())
        step = causal_step(loaded, ParallelSketch(parameters, None))
        steps = [step(ScoredRow(row, torch.ones_like(row, dtype=torch.bool))) for row in tokens]
        loss, gradient = (sum(x) / 3 for x in zip(*steps, strict=True))
        # Each token from its own prefix, where there is nothing later to be seen.
        with causal_attention(loaded.model):
            terms = [
                torch.nn.functional.cross_entropy(
                    loaded.model(tokens[:, :i], torch.arange(i).expand(3, i), None)[:, -1],
                    tokens[:, i],
                )
                for i in range(1, 32)
            ]
        expected = torch.stack(terms).mean()
        found = torch.autograd.grad(expected, parameters)
        whole = torch.cat([g.flatten() for g in found])
        torch.save(
            {
                "causal": (seen, unseen),
                "full": (loaded.logits(tokens), loaded.logits(other)),
                "step": (loss, gradient),
                "expected": (float(expected), whole),
                "responses": _response_losses(loaded),
            },
            f"{os.environ['TRACE_DIR']}/causal.pt",
        )


def measured_texts() -> None:
    """What tools measure a checkpoint on, for tests/mcore/inference/test_eval_data.py."""
    load, text, pairs = sys.argv[sys.argv.index("--") + 1 :]
    with open_checkpoint(load, "cpu") as loaded:
        from megatron_mdm.mcore.inference.eval_data import (
            read_tokens,
            rows_from_documents,
            rows_from_pairs,
        )
        from megatron_mdm.mcore.inference.loaded_model import load_other_weights

        rows = rows_from_documents(
            loaded, read_tokens(loaded, text, "text", 8 * 32, seed=0), packed=True
        )[:8]
        found = {"evaluated": _evaluated(loaded, rows), "validated": _validated(loaded, rows)}
        one = [dataclasses.replace(row, documents=None) for row in rows]
        found["not divided"] = _evaluated(loaded, one)
        twin = load_other_weights(loaded, load)
        assert twin.model is not loaded.model and loaded.args.load == load
        found["logits"] = [x.logits(rows[0].tokens[None]) for x in (loaded, twin)]
        loaded.args.swiglu = False
        try:
            load_other_weights(loaded, load)
        except UserError as error:
            found["refused"] = str(error)
        for name in ("mdm_isolate_documents", "mdm_eod_attended"):
            setattr(loaded.args, name, name == "mdm_eod_attended")
        found["pairs"] = rows_from_pairs(loaded, pairs, 200)
        loaded.args.mdm_isolate_documents = True
        found["packed pairs"] = rows_from_pairs(loaded, pairs, 200)
        torch.save(found, f"{os.environ['TRACE_DIR']}/texts.pt")


def _evaluated(loaded, rows) -> torch.Tensor:
    """Nats of rows of 32 tokens, four draws each."""
    from megatron_mdm.evaluation.nelbo import draw

    drawn = draw(loaded.logits, rows, 127, 2, 2, 0, np.arange(len(rows)), batch_size=3)
    return torch.from_numpy(drawn.nats.reshape(-1))


def _validated(loaded, rows) -> torch.Tensor:
    """The same rows with the same masks, as the run's own validation scores them."""
    from megatron_mdm.evaluation.nelbo import lattice_quantiles
    from megatron_mdm.objective.randomness import Split, row_uniforms

    loaded.args.eval_micro_batch_size = 1
    loaded.args.check_for_nan_in_loss_and_grad = False  # outside of a step it cannot be
    loaded.args.mdm_sampler_state_in_checkpoint = loaded.args.mdm_log_state_in_checkpoint = False
    state = TrainingState(loaded.args, loaded.tokenizer.eod)
    sums = []
    for job, quantile in enumerate(lattice_quantiles(np.arange(len(rows)), 2, 2, 0).reshape(-1)):
        numbers = {"num_tokens": 32, "length": 32, "split": 1, "row": job, "quantile": quantile}
        row = {name: torch.tensor([int(value)]) for name, value in numbers.items()}
        row["text"] = row["row"] // 4
        row["tokens"] = rows[job // 4].tokens[None]
        row["uniforms"] = torch.from_numpy(row_uniforms(0, Split.TEST, job, 32))[None]
        with torch.no_grad():
            output, loss = step.forward_step(state, iter([row]), loaded.model)
            sums.append(loss(output)[0].double())
    return torch.stack(sums)


def _response_losses(loaded) -> float:
    """Mean over the last 12 of `ranks.random_pairs(120)` of the loss of the response's tokens."""
    from megatron_mdm.mcore.model.causal import causal_attention
    from tests import ranks

    losses = []
    for prompt, response in ranks.random_pairs(120)[108:]:
        tokens = torch.tensor([prompt + response])
        with causal_attention(loaded.model):
            log_p = loaded.logits(tokens)[0].log_softmax(dim=-1)
        first = max(len(prompt), 1)
        losses.append(
            -log_p[torch.arange(first - 1, tokens.shape[1] - 1), tokens[0, first:]].mean()
        )
    return float(torch.stack(losses).mean())


def readme_script() -> None:
    """The script of README's section on own scripts, word for word, on the CPU."""
    readme = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    with training_device("cpu"):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


def transformer_engine_spec() -> None:
    """Builds the model from both specs, compares their checkpoint keys, and asks for FP8."""
    import dataclasses

    import torch.distributed
    from megatron.core import dist_checkpointing as checkpoints
    from megatron.core.extensions.transformer_engine import (
        TELayerNormColumnParallelLinear,
        TELinear,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.training.models.gpt import GPTModelConfig

    from megatron_mdm.mcore.model.builder import accumulate_in_place
    from megatron_mdm.mcore.model.layer_specs import bidirectional_spec, drop_norm_extra_state

    with training_device("cpu"):
        torch.distributed.init_process_group("gloo")
        mpu.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        transformer = TransformerConfig(
            num_layers=2,
            hidden_size=64,
            num_attention_heads=4,
            num_query_groups=2,
            ffn_hidden_size=128,
            use_cpu_initialization=True,
            normalization="RMSNorm",
            add_bias_linear=False,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
        )

        def build(mdm, **changes):
            config = dataclasses.replace(transformer, **changes)
            spec = bidirectional_spec(GPTModelConfig(transformer=config, vocab_size=128), mdm, None)
            model = GPTModel(config, spec, 128, 64, position_embedding_type="rope")
            drop_norm_extra_state(model)
            return model

        def keys(model):
            state = model.sharded_state_dict()
            names = {getattr(v, "key", k) for k, v in state.items() if v is not None}
            return {name for name in names if not name.endswith("_extra_state")}  # FP8 scales

        everywhere, hidden = MDMConfig(), MDMConfig(pad_attended=False)
        local = build(everywhere, transformer_impl="local")
        te = build(everywhere, transformer_impl="transformer_engine")
        accumulate_in_place(te)
        linears = [
            m for m in te.modules() if isinstance(m, (TELinear, TELayerNormColumnParallelLinear))
        ]
        assert len(linears) == 8 and all(m.fuse_wgrad_accumulation for m in linears)
        assert keys(te) == keys(local), keys(te) ^ keys(local)
        directory = Path(os.environ["TRACE_DIR"])
        for name in ("local", "te0", "te1"):
            (directory / name).mkdir()
        checkpoints.save(local.sharded_state_dict(), directory / "local")
        fp8 = {"fp8": "hybrid"}
        for changes in ({}, fp8):  # from the CPU to the GPU and back
            there = build(everywhere, transformer_impl="transformer_engine", **changes)
            there.load_state_dict(checkpoints.load(there.sharded_state_dict(), directory / "local"))
            path = directory / f"te{len(changes)}"
            checkpoints.save(there.sharded_state_dict(), path)
            back = build(everywhere, transformer_impl="local")
            back.load_state_dict(checkpoints.load(back.sharded_state_dict(), path))
            for name, value in local.named_parameters():
                assert torch.equal(back.get_parameter(name), value), name
        fp8 = {"fp8": "hybrid", "bf16": True, "params_dtype": torch.bfloat16}
        for mdm, mask_type in ((everywhere, AttnMaskType.no_mask), (hidden, AttnMaskType.padding)):
            for changes in ({}, fp8):
                model = build(mdm, transformer_impl="transformer_engine", **changes)
                for layer in model.decoder.layers:
                    assert layer.self_attention.attn_mask_type == mask_type
                    assert "TE" in type(layer.self_attention.core_attention).__name__
        isolated = build(MDMConfig(isolate_documents=True), transformer_impl="transformer_engine")
        assert keys(isolated) == keys(te)
        _attention_in_documents(isolated.decoder.layers[0].self_attention.core_attention)
        Path(os.environ["TRACE_DIR"], "built").write_text("done")
        torch.distributed.destroy_process_group()


def fp8_flags() -> None:
    """Parses flags as the program does, and makes Transformer Engine's recipe of them."""
    from megatron.core.fp8_utils import get_fp8_recipe

    from megatron_mdm.mcore.flags.arguments import parse
    from megatron_mdm.mcore.model.builder import model_config

    with training_device("cpu"):
        args = parse()
        config = model_config(args, MDMConfig.from_args(args)).transformer
        recipe = get_fp8_recipe(config)
    names = ("fp8", "fp8_recipe", "fp8_amax_history_len", "fp8_amax_compute_algo")
    delayed = ("amax_history_len", "amax_compute_algo", "margin")
    seen = {
        "config": [getattr(config, name) for name in names],
        "recipe": type(recipe).__name__,
        "history": [getattr(recipe, name, None) for name in delayed],
        "accumulates in products": [x.gradient_accumulation_fusion for x in (get_args(), config)],
    }
    Path(os.environ["TRACE_DIR"], "flags.json").write_text(json.dumps(seen))


def delayed_scaling() -> None:
    """Scales of Transformer Engine's own state after steps with evaluations between them.

    Its layer, state, autocast and update are real; what the GPU's kernel does, to enter the largest
    entry of a tensor, is done here.
    """
    os.environ["NVTE_UNFUSED_FP8_UPDATE"] = "1"  # the update in torch
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    from megatron_mdm.mcore.model.fp8 import ignore_fp8_state_on_load, keep_scales_in_evaluation

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = te.Linear(16, 16, device="cpu")

        def forward(self, largest):
            recipe = DelayedScaling(amax_history_len=4, amax_compute_algo="max")
            with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
                self.layer.init_fp8_metadata()
                FP8GlobalStateManager.add_fp8_tensors_to_global_buffer(self.layer.fp8_meta)
                self.layer.fp8_meta["scaling_fwd"].amax_history[0].clamp_(min=largest)

    def scales(keeps, evaluates):
        FP8GlobalStateManager.reset()
        model, seen = Model(), []
        if keeps:
            keep_scales_in_evaluation(model)
        for number in range(4):
            if evaluates:
                with torch.no_grad():
                    model.eval()(100.0 + number)
            model.train()(1.0 + number)
            seen.append(model.layer.fp8_meta["scaling_fwd"].scale.tolist())
        return seen

    def loaded_without_fp8():
        trained = Model()
        trained(1.0)
        state = trained.state_dict()
        assert state["layer._extra_state"].numel()
        model = Model()
        ignore_fp8_state_on_load(model)
        model.load_state_dict(state)
        return torch.equal(model.layer.weight, trained.layer.weight)

    with training_device("cpu"):
        found = {
            "without evaluation": scales(True, False),
            "kept": scales(True, True),
            "not kept": scales(False, True),
            "loaded without FP8": loaded_without_fp8(),
        }
    Path(os.environ["TRACE_DIR"], "scales.json").write_text(json.dumps(found))


def _attention_in_documents(attention) -> None:
    """What Transformer Engine is asked for: full attention inside each document, in plain torch."""
    from transformer_engine.pytorch import DotProductAttention

    asked = []

    def forward(self, query, key, value, attention_mask=None, **flags):
        """[s, b, heads, d] or, with bounds, [t, heads, d]; `groups` heads of key and value."""
        asked.append(flags)
        assert attention_mask is None
        repeat = query.shape[-2] // key.shape[-2]
        q, k, v = query, *(x.repeat_interleave(repeat, dim=-2) for x in (key, value))
        if "qkv_format" not in flags:
            parts = [tuple(x.permute(1, 2, 0, 3) for x in (q, k, v))]
        else:
            bounds = flags["cu_seqlens_q"].tolist()
            pairs = list(itertools.pairwise(bounds))
            assert max(high - low for low, high in pairs) <= flags["max_seqlen_q"]
            parts = [[x[a:b].transpose(0, 1)[None] for x in (q, k, v)] for a, b in pairs]
        seen = [torch.nn.functional.scaled_dot_product_attention(*part) for part in parts]
        if "qkv_format" not in flags:
            return seen[0].permute(2, 0, 1, 3).flatten(2)
        return torch.cat([x[0].transpose(0, 1) for x in seen]).flatten(1)

    DotProductAttention.forward = forward
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(8, 2, 4, 16, generator=generator)
    k, v = torch.randn(2, 8, 2, 2, 16, generator=generator)
    bounds = torch.tensor([0, 3, 8, 16], dtype=torch.int32)
    inside = attention(q, k, v, bounds, packed_seq_params=None, attention_bias=None)
    assert asked[-1]["qkv_format"] == "thd" and asked[-1]["attn_mask_type"] == "padding"
    parts = [(0, 0, 3), (0, 3, 8), (1, 0, 8)]
    for row, low, high in parts:
        one = [x[low:high, row : row + 1] for x in (q, k, v)]
        alone = attention(*one, None, packed_seq_params=None, attention_bias=None)
        assert asked[-1]["attn_mask_type"] == "no_mask"
        torch.testing.assert_close(inside[low:high, row : row + 1], alone)


def checkpoint_logits() -> None:
    """Logits of a checkpoint: request.pt holds (checkpoint, tokens), logits.pt gets them.

    A dictionary by attention, "full" and "causal".
    """
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_mdm.environment import prepare_environment
    from megatron_mdm.mcore.inference.loaded_model import loaded_model

    directory = Path(os.environ["TRACE_DIR"])
    checkpoint, tokens = torch.load(directory / "request.pt")
    sys.argv = sys.argv[:1]
    prepare_environment("cpu")
    with training_device("cpu"), loaded_model(checkpoint, "cpu") as loaded:
        logits = {"full": loaded.logits(tokens)}
        for layer in loaded.model.decoder.layers:
            softmax = layer.self_attention.core_attention.scale_mask_softmax
            softmax.attn_mask_type = AttnMaskType.causal
        logits["causal"] = loaded.logits(tokens)
        if loaded.args.rank == 0:
            torch.save(logits, directory / "logits.pt")


def conversion_memory() -> None:
    """Peaks of this process in bytes, in peaks.json, as it converts the models `one` and `many`.

    After each of them, there, back and verified, and at last with all tensors of `many` in memory.
    """
    from megatron_mdm.conversion import hub, to_hugging_face, to_megatron
    from megatron_mdm.environment import prepare_environment

    directory, peaks = Path(os.environ["TRACE_DIR"]), []
    sys.argv = sys.argv[:1]
    prepare_environment("cpu")

    def note():
        peaks.append(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    for name in ("one", "many"):
        source, there, back = (str(directory / f"{name}{end}") for end in ("", "-mg", "-hf"))
        to_megatron.to_megatron(source, there, verify=True)
        to_hugging_face.to_hugging_face(there, back, verify=True)
        note()
    model = hub.HubModel(directory / "many")
    tensors = [model.read(name) for name in model.entries]
    note()
    assert tensors
    (directory / "peaks.json").write_text(json.dumps(peaks))


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


def context_parallel() -> None:
    """The program under context parallelism, see `_gather_for_attention`."""
    _gather_for_attention()
    train()


def context_parallel_traffic() -> None:
    """`traffic` under context parallelism."""
    _gather_for_attention()
    traffic()


def _gather_for_attention() -> None:
    """Lets attention gather all keys and values of a row.

    It stands in for Transformer Engine's, which needs a GPU.
    """
    from megatron_mdm.mcore.flags import arguments
    from megatron_mdm.mcore.model import builder as model

    class GatheringAttention(torch.nn.Module):
        """Full attention; q, k, v [s / ranks, b, heads or groups, h]."""

        def __init__(self, *_, **__):
            super().__init__()

        def forward(self, q, k, v, *_, **__):
            k, v = (
                _Gathered.apply(x).repeat_interleave(q.shape[2] // x.shape[2], dim=2)
                for x in (k, v)
            )
            scores = torch.einsum("qbnh,kbnh->bnqk", q, k) / q.shape[-1] ** 0.5
            return torch.einsum("bnqk,kbnh->qbnh", scores.softmax(dim=-1), v).flatten(2)

    def gathering(make_spec):
        def make(*args, **kwargs):
            spec = make_spec(*args, **kwargs)
            for layer in spec.layer_specs:
                layer.submodules.self_attention.submodules.core_attention = GatheringAttention
            return spec

        return make

    arguments._check_context_parallel = lambda *_: None
    model.bidirectional_spec = gathering(model.bidirectional_spec)


class _Gathered(torch.autograd.Function):
    """Parts of the context-parallel ranks, one after the other along the first dimension."""

    @staticmethod
    def forward(ctx, part):
        group = mpu.get_context_parallel_group()
        parts = [torch.empty_like(part) for _ in range(group.size())]
        torch.distributed.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        group = mpu.get_context_parallel_group()
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient, group=group)
        return gradient.chunk(group.size())[group.rank()]


def benchmark_costs() -> None:
    """What tools/benchmark.py costs measures, of a tiny model."""
    from benchmarks import costs
    from megatron_mdm.environment import prepare_environment

    directory = Path(os.environ["TRACE_DIR"])
    prepare_environment("cpu")
    sizes = {"layers": 2, "hidden": 32, "heads": 2, "rows": 8, "length": 16}
    results = costs.measure(directory, steps=100, checkpoints=1, sizes=sizes)
    (directory / "costs.json").write_text(json.dumps(results))


def only_these_flags_with_a_hub() -> None:
    """`only_these_flags`; the directory below which the logs go holds what the hub has."""
    directory = Path(os.environ["TRACE_DIR"]).parent
    os.environ |= {"HF_HUB_CACHE": str(directory / "hub"), "HF_HUB_OFFLINE": "1"}
    only_these_flags()


def only_these_flags() -> None:
    """The program with the flags after `--` alone."""
    sys.argv[1:] = sys.argv[sys.argv.index("--") + 1 :]
    main()


def old_logits() -> None:
    """Logits of a checkpoint of tests/old_checkpoints, as its make.py has asked for them."""
    os.chdir(os.environ["TRACE_DIR"])
    with open_checkpoint("checkpoint", "cpu") as loaded:
        tokens = torch.tensor([[1, 2, 3, 50, 5, 50, 7, 49]])
        row = loaded.logits(tokens)[0, 3].tolist()
    Path("logits.json").write_text(json.dumps(row))


def tool_in_its_directory() -> None:
    """`tool`, among whose flags paths are relative to the directory of this run's log."""
    root = os.getcwd()
    os.chdir(os.environ["TRACE_DIR"])
    place = sys.argv.index("--") + 1
    sys.argv[place] = os.path.join(root, sys.argv[place])
    tool()


def in_its_directory() -> None:
    """`only_these_flags`, among which paths are relative to the directory of this run's log."""
    os.chdir(os.environ["TRACE_DIR"])
    only_these_flags()


def recipe() -> None:
    """Sizes and expected memory of the flags after `--` on 8 ranks, of which this is the first."""
    from megatron_mdm.environment import prepare_environment
    from megatron_mdm.mcore.flags.arguments import parse
    from megatron_mdm.mcore.model.builder import model_config
    from megatron_mdm.sizing.flops import ModelShape
    from megatron_mdm.sizing.memory import expected_bytes

    sys.argv[1:] = sys.argv[sys.argv.index("--") + 1 :]
    os.environ["WORLD_SIZE"] = "8"
    prepare_environment("cpu")
    with training_device("cpu"):
        args = parse()
        model_config(args, MDMConfig.from_args(args))  # checks the layers against the layout
    found = {"shape": vars(ModelShape.from_args(args)), "bytes": expected_bytes(args)}
    found["rotary_base"] = args.rotary_base
    Path(os.environ["TRACE_DIR"], "recipe.json").write_text(json.dumps(found))


def traffic() -> None:
    """The program with the collective calls of our own code counted, as this rank makes them.

    Saves a list of (iteration, function, bytes of the tensor, ranks of the group) for each. What
    tensor ranks other than the first measured for P-POTS differs in the last bits, as losses that
    are reduced in another order may.
    """
    from torch import distributed

    from megatron_mdm.mcore.training.ppots import OnlineSampler

    calls = []
    reduce = OnlineSampler.reduce

    def reduce_otherwise(self):
        if self.measured is not None and mpu.get_tensor_model_parallel_rank() > 0:
            self.measured = self.measured.clone()
            self.measured[0] += 1 << 20  # of units of 2^-70
        reduce(self)

    OnlineSampler.reduce = reduce_otherwise

    def counted(name):
        function = getattr(distributed, name)

        def count(*args, **kwargs):
            if f"{os.sep}megatron_mdm{os.sep}" in sys._getframe(1).f_code.co_filename:
                size = sum(a.numel() * a.element_size() for a in args if torch.is_tensor(a))
                ranks = distributed.get_world_size(kwargs.get("group"))
                iteration = getattr(get_args(), "curr_iteration", -1)
                calls.append((iteration, name, size, ranks))
            return function(*args, **kwargs)

        return count

    for name in dir(distributed):
        sends = name.startswith(
            ("all_", "broadcast", "reduce", "gather", "scatter", "send", "recv")
        )
        if sends and callable(getattr(distributed, name)):
            setattr(distributed, name, counted(name))
    main()
    path = Path(os.environ["TRACE_DIR"], f"calls{os.environ['RANK']}.json")
    path.write_text(json.dumps(calls))


def host_waits() -> None:
    """What of a forward step would make the host wait for a GPU; see tests/waits.py."""
    from tests import waits

    program.forward_step = waits.forward_step
    main()
