import os

import pytest

# The fork server below inherits this: one thread per rank, because the ranks share the cores.
os.environ["OMP_NUM_THREADS"] = "1"
from megatron.training.argument_utils import ArgumentGroupFactory

from tests import ranks, tiers
from tests.tiers import pytest_runtest_protocol  # noqa: F401

# Megatron's models write their choice of attention into these variables, also in fixtures, and
# refuse a value that they did not write. They are therefore removed after each test.
ATTENTION = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


def pytest_collection_modifyitems(items):
    tiers.mark(items)


@pytest.fixture(autouse=True)
def environment():
    """Restores the environment after each test, so that no test inherits what another one set."""
    before = {name: value for name, value in os.environ.items() if name not in ATTENTION}
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def docstrings_read_once():
    """Keeps the help texts that Megatron otherwise parses from its own files at each call."""
    read, known = ArgumentGroupFactory._get_field_docstrings, {}

    def read_once(factory, config):
        if config not in known:
            known[config] = read(factory, config)
        return known[config]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArgumentGroupFactory, "_get_field_docstrings", read_once)
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Prefix of an indexed dataset of about 20,000 tokens."""
    prefix = tmp_path_factory.mktemp("data") / "text"
    ranks.write_documents(prefix, ranks.random_documents(600))
    return prefix


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Prefix of an indexed dataset of 120 prompts and responses."""
    prefix = tmp_path_factory.mktemp("pairs") / "pairs"
    ranks.write_pairs(prefix, ranks.random_pairs(120))
    return prefix


@pytest.fixture(scope="session")
def base(tmp_path_factory, data):
    """A checkpoint for runs under all layouts, because initial weights depend on the PP layout."""
    directory = tmp_path_factory.mktemp("base")
    flags = ["--data-path", str(data), "--data-cache-path", str(data.parent / "cache")]
    ranks.launch(
        directory,
        1,
        *flags,
        *["--train-iters", "20", "--save", str(directory / "checkpoint"), "--save-interval", "20"],
    )
    return [*flags, "--load", str(directory / "checkpoint"), "--finetune"]
