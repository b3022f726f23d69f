import pytest

from megatron_mdm.data.load_tokenizer import load_sentencepiece
from tests.data.texts import plain_tokens, train_on_source


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return train_on_source(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(model):
    return load_sentencepiece(str(model))


@pytest.fixture
def expected(model):
    return plain_tokens(model)
