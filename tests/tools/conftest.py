from tests.data.conftest import expected, model  # noqa: F401
