import os
import sys
from pathlib import Path

import pytest
import torch

from megatron_mdm.mcore.device import training_device
from tests import ranks
from tests.conversion import models

# A step at rate 0 changes nothing, so the saved weights are the loaded ones.
STILL = "--lr 0 --min-lr 0 --optimizer sgd --weight-decay 0 --train-iters 2".split()


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """A function from a kind to (Hugging Face directory, Megatron directory, log lines), cached.

    Its second argument is the class of Megatron's model, `gpt` or `hybrid`.
    """
    from megatron_mdm.conversion.to_megatron import to_megatron

    made = {}

    def convert(kind, model="gpt"):
        if (kind, model) not in made:
            root = tmp_path_factory.mktemp(kind)
            source, said = models.make(kind, root / "hf"), []
            target = str(root / "megatron")
            to_megatron(str(source), target, verify=True, model_class=model, log=said.append)
            made[kind, model] = source, root / "megatron", said
        return made[kind, model]

    return convert


@pytest.fixture(scope="module")
def flags(request, model, data):
    """Flags of a run that loads the test file's fixture `model`, described by its `MODEL` flags."""
    return [
        *["--data-path", str(data), "--data-cache-path", str(data.parent / "cache")],
        *[*request.module.MODEL, "--load", str(model / "megatron"), "--finetune", *STILL],
    ]


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory, flags):
    """Such a run, with the checkpoint that it saves, under each of the test file's `LAYOUTS`."""
    directory = tmp_path_factory.mktemp("runs")

    def words(name, layout):
        save = ["--save", str(directory / name / "checkpoint"), "--save-interval", "2"]
        return [*flags, *save, *layout.split()]

    layouts = request.module.LAYOUTS
    found = ranks.launch_layouts(
        directory, {name: (count, words(name, layout)) for name, (count, layout) in layouts.items()}
    )
    for name, run in found.items():
        run.checkpoint = directory / name / "checkpoint"
    return found


def checkpoint_logits() -> None:
    """Computes logits of a checkpoint. request.pt holds (checkpoint, tokens).

    It saves a dictionary by attention, "full" and "causal", in logits.pt.
    """
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_mdm.environment import prepare_environment
    from megatron_mdm.mcore.inference.loaded_model import loaded_model

    directory = Path(os.environ["TRACE_DIR"])
    checkpoint, tokens = torch.load(directory / "request.pt")
    sys.argv = sys.argv[:1]
    prepare_environment("cpu")
    with training_device("cpu"), loaded_model(checkpoint, "cpu", block_size="row") as loaded:
        logits = {"full": loaded.logits(tokens)}
        for module in loaded.model.modules():
            if hasattr(module, "scale_mask_softmax"):
                module.scale_mask_softmax.attn_mask_type = AttnMaskType.causal
        logits["causal"] = loaded.logits(tokens)
        if loaded.args.rank == 0:
            torch.save(logits, directory / "logits.pt")


@pytest.fixture
def megatron_logits(tmp_path):
    """A function from (checkpoint, tokens, ranks) to logits by attention, loaded by Megatron."""

    def logits(checkpoint, tokens, count=1):
        directory = tmp_path / f"logits{count}"
        directory.mkdir()
        torch.save((str(checkpoint), tokens), directory / "request.pt")
        ranks.launch(directory, count, entry=checkpoint_logits)
        return torch.load(directory / "logits.pt")

    return logits
