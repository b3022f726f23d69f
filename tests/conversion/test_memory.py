"""One tensor at a time: the peak of memory does not grow with the number of layers."""

import json

from tests import ranks
from tests.conversion import models

WIDE = {"d_model": 256, "mlp_hidden_size": 1024}
LAYERS = 33


def test_the_peak_does_not_grow_with_the_layers(tmp_path):
    sizes = []
    for name, layers in (("one", 1), ("many", LAYERS)):
        source = models.make("llada", tmp_path / name, n_layers=layers, **WIDE)
        sizes.append((source / "model.safetensors").stat().st_size)
    added = sizes[1] - sizes[0]
    assert added > 120e6
    ranks.launch(tmp_path, 1, "--", entry="conversion_memory")
    one, many, whole = json.loads((tmp_path / "peaks.json").read_text())
    assert many - one < added / 4  # what the allocator keeps is less than a tenth
    assert whole - many > added / 2  # it would be seen
