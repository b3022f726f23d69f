import pytest
import torch

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


@pytest.fixture
def megatron_logits(tmp_path):
    """(checkpoint, tokens, ranks) -> logits by attention, through Megatron's own loading."""

    def logits(checkpoint, tokens, count=1):
        directory = tmp_path / f"logits{count}"
        directory.mkdir()
        torch.save((str(checkpoint), tokens), directory / "request.pt")
        ranks.launch(directory, count, entry="checkpoint_logits")
        return torch.load(directory / "logits.pt")

    return logits
