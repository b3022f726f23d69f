import os
import sys
from pathlib import Path

import pytest
import torch

from megatron_mdm.mcore.device import training_device
from tests import ranks
from tests.conversion import models


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """kind -> (Hugging Face directory, Megatron directory, what was said), made once."""
    from megatron_mdm.conversion.to_megatron import to_megatron

    made = {}

    def convert(kind):
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            source, said = models.make(kind, root / "hf"), []
            to_megatron(str(source), str(root / "megatron"), verify=True, log=said.append)
            made[kind] = source, root / "megatron", said
        return made[kind]

    return convert


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


@pytest.fixture
def megatron_logits(tmp_path):
    """(checkpoint, tokens, ranks) -> logits by attention, through Megatron's own loading."""

    def logits(checkpoint, tokens, count=1):
        directory = tmp_path / f"logits{count}"
        directory.mkdir()
        torch.save((str(checkpoint), tokens), directory / "request.pt")
        ranks.launch(directory, count, entry=checkpoint_logits)
        return torch.load(directory / "logits.pt")

    return logits
