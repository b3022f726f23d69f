"""What the ranks of the tests run: the program, with a record of the rows that each rank saw."""

import contextlib
import json
import os
import re
import runpy
import sys
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from megatron.training import get_args

from megatron_mdm.checkpoint import open_checkpoint
from megatron_mdm.mcore import forward_step as step
from megatron_mdm.mcore import pretrain as program
from megatron_mdm.mcore.device import training_device
from megatron_mdm.pretrain import main


def train() -> None:
    """The program as a user starts it, recording (split, row) -> (t, masked tokens)."""
    trace: dict = {}
    load_rows, corrupter = step.load_rows, step.corrupter
    seen: dict = {}

    def recording_load_rows(*args):
        seen["rows"] = load_rows(*args)
        return seen["rows"]

    def recording_corrupter(training):
        def corrupt(*args):
            corruption = corrupter(training)(*args)
            keys = zip(seen["rows"].split.tolist(), seen["rows"].row.tolist(), strict=True)
            values = zip(corruption.t.tolist(), corruption.tokens.tolist(), strict=True)
            for key, value in zip(keys, values, strict=True):
                assert trace.setdefault(key, value) == value
            return corruption

        return corrupt

    step.load_rows, step.corrupter = recording_load_rows, recording_corrupter
    try:
        main()
    finally:
        torch.save(trace, f"{os.environ['TRACE_DIR']}/trace{os.environ['RANK']}.pt")


def whole_batch() -> None:
    """The objective of one global batch in plain torch, without our loss and Megatron's sums.

    Saves the loss and every gradient; to be started on one rank with the whole batch as
    micro-batch.
    """

    def forward_step(iterator, model):
        args = get_args()
        rows = {name: value.double() for name, value in next(iterator).items()}
        tokens = rows["tokens"].long()
        # In tests/ranks.py the tokens of a prompt, and no others, are below 50.
        eligible = tokens >= 50 if args.mdm_sft else tokens != 119
        eligible[:, 0] &= not args.mdm_shift
        eligible_counts = eligible.sum(dim=1)
        assert len(set(eligible_counts.tolist())) > 1, "rows should differ"
        p = (1 - args.mdm_eps) * (rows["quantile"] + 0.5) * 2.0**-52 + args.mdm_eps
        mask = ((rows["uniforms"] + 0.5) * 2.0**-52 < p[:, None]) & eligible
        corrupted = torch.where(mask, args.mdm_mask_token_id, tokens)
        if args.mdm_isolate_documents:
            logits = torch.cat(
                [_each_document(model, *row) for row in zip(tokens, corrupted, strict=True)]
            )
        else:
            logits = model(corrupted, None, None)
        if args.mdm_shift:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        log_p = logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
        weighted = -(log_p * mask / p[:, None]).sum(dim=1)
        if args.mdm_normalization == "tokens":
            loss = weighted.sum() / eligible_counts.sum()
        else:
            loss = (weighted / eligible_counts).mean()
        inner = unwrap_model(model)
        names, parameters = zip(*inner.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters)
        torch.save(
            (loss.item(), dict(zip(names, gradients, strict=True))),
            f"{os.environ['TRACE_DIR']}/whole_batch.pt",
        )
        raise SystemExit(0)

    program.forward_step = forward_step
    main()


def tool() -> None:
    """A command-line tool: the arguments after `--` are its file and its flags.

    What it prints goes to `stdout<rank>` of its own, beside the log.
    """
    file, *sys.argv[1:] = sys.argv[sys.argv.index("--") + 1 :]
    path = Path(os.environ["TRACE_DIR"], f"stdout{os.environ['RANK']}")
    with open(path, "w", encoding="utf-8") as stdout, contextlib.redirect_stdout(stdout):
        runpy.run_path(str(Path(__file__).parent.parent / file), run_name="__main__")


def logits() -> None:
    """Logits of a checkpoint on random rows, of two lengths, saved by every rank."""
    load, stages = sys.argv[sys.argv.index("--") + 1 :]
    with open_checkpoint(load, "cpu", int(stages)) as loaded:
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(0, 128, shape, generator=generator) for shape in ((3, 32), (1, 7))]
        plain = [loaded.logits(tokens) for tokens in rows]
        loaded.args.mdm_shift = True
        shifted = [loaded.logits(tokens) for tokens in rows]
        torch.save((plain, shifted), f"{os.environ['TRACE_DIR']}/logits{os.environ['RANK']}.pt")


def _each_document(model, tokens, corrupted):
    """Logits of one row [1, s, V] whose documents the model sees one at a time."""
    ends = [i + 1 for i, token in enumerate(tokens.tolist()) if token == 119]
    starts = [0, *ends]
    bounds = zip(starts, [*ends, len(tokens)], strict=True)
    parts = [corrupted[None, low:high] for low, high in bounds if low < high]
    return torch.cat([model(part, None, None) for part in parts], dim=1)


def readme_script() -> None:
    """The script of README's section on own scripts, word for word, on the CPU."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    with training_device("cpu"):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


def transformer_engine_spec() -> None:
    """Builds the model from both specs, compares their checkpoint keys, and asks for FP8."""
    import dataclasses

    import torch.distributed
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.training.models.gpt import GPTModelConfig

    from megatron_mdm.config import MDMConfig
    from megatron_mdm.mcore.attention import bidirectional_spec

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
            return GPTModel(config, spec, 128, 64, position_embedding_type="rope")

        def keys(model):
            state = model.sharded_state_dict()
            names = {getattr(v, "key", k) for k, v in state.items() if v is not None}
            return {name for name in names if not name.endswith("_extra_state")}  # FP8 scales

        everywhere, hidden = MDMConfig(), MDMConfig(mdm_pad_attended=False)
        local = build(everywhere, transformer_impl="local")
        te = build(everywhere, transformer_impl="transformer_engine")
        assert keys(te) == keys(local), keys(te) ^ keys(local)
        fp8 = {"fp8": "hybrid", "bf16": True, "params_dtype": torch.bfloat16}
        for mdm, mask_type in ((everywhere, AttnMaskType.no_mask), (hidden, AttnMaskType.padding)):
            for changes in ({}, fp8):
                model = build(mdm, transformer_impl="transformer_engine", **changes)
                for layer in model.decoder.layers:
                    assert layer.self_attention.attn_mask_type == mask_type
                    assert "TE" in type(layer.self_attention.core_attention).__name__
        Path(os.environ["TRACE_DIR"], "built").write_text("done")
        torch.distributed.destroy_process_group()


def checkpoint_logits() -> None:
    """Logits of a checkpoint: request.pt holds (checkpoint, tokens), logits.pt gets them.

    A dictionary by attention, "full" and "causal".
    """
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_mdm.mcore.inference import loaded_model
    from megatron_mdm.pretrain import prepare_environment

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


def benchmark_sides() -> None:
    """Holds the steps that tools/benchmark.py overhead compares against plain torch."""
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_mdm.benchmarks.causal import causal_datasets, causal_forward_step
    from megatron_mdm.benchmarks.overhead import model_flags
    from megatron_mdm.benchmarks.race import write_data
    from megatron_mdm.benchmarks.training import training_session
    from megatron_mdm.pretrain import prepare_environment

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
        for mask_type, is_causal in ((AttnMaskType.causal, True), (AttnMaskType.no_mask, False)):
            session.attend(mask_type)
            before, after = model(tokens, None, None), model(changed, None, None)
            assert torch.equal(before[:, :-1], after[:, :-1]) == is_causal
            losses, loss_func = causal_forward_step(iter([batch]), model)
            loss, count, _ = loss_func(losses)
            plain = torch.nn.functional.cross_entropy(before.flatten(0, 1), labels.flatten())
            assert batch["loss_mask"].all() and count == labels.numel()
            torch.testing.assert_close(loss / count, plain)
        (directory / "sides").write_text("seen")


def benchmark_costs() -> None:
    """What tools/benchmark.py costs measures, of a tiny model."""
    from megatron_mdm.benchmarks import costs
    from megatron_mdm.pretrain import prepare_environment

    directory = Path(os.environ["TRACE_DIR"])
    prepare_environment("cpu")
    sizes = {"layers": 2, "hidden": 32, "heads": 2, "rows": 8, "length": 16}
    results = costs.measure(directory, steps=100, checkpoints=1, sizes=sizes)
    (directory / "costs.json").write_text(json.dumps(results))


def only_these_flags() -> None:
    """The program with the flags after `--` alone."""
    sys.argv[1:] = sys.argv[sys.argv.index("--") + 1 :]
    main()


def recipe() -> None:
    """Sizes and expected memory of the flags after `--` on 8 ranks, of which this is the first."""
    from megatron_mdm.benchmarks.flops import ModelShape
    from megatron_mdm.benchmarks.memory import expected_bytes
    from megatron_mdm.mcore.arguments import parse
    from megatron_mdm.pretrain import prepare_environment

    sys.argv[1:] = sys.argv[sys.argv.index("--") + 1 :]
    os.environ["WORLD_SIZE"] = "8"
    prepare_environment("cpu")
    with training_device("cpu"):
        args = parse()
    found = {"shape": vars(ModelShape.from_args(args)), "bytes": expected_bytes(args)}
    Path(os.environ["TRACE_DIR"], "recipe.json").write_text(json.dumps(found))


def traffic() -> None:
    """The program with the collective calls of our own code counted, as this rank makes them.

    Saves a list of (iteration, function, bytes of the tensor, ranks of the group) for each.
    """
    from torch import distributed

    calls = []

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
        if name.startswith(("all_", "broadcast", "reduce", "gather", "scatter", "send", "recv")):
            if callable(getattr(distributed, name)):
                setattr(distributed, name, counted(name))
    main()
    path = Path(os.environ["TRACE_DIR"], f"calls{os.environ['RANK']}.json")
    path.write_text(json.dumps(calls))
