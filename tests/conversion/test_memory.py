"""Conversion takes one tensor at a time: peak memory does not grow with the number of layers."""

import json
import os
import resource
import sys
from pathlib import Path

from tests import ranks
from tests.conversion import models

WIDE = {"d_model": 256, "mlp_hidden_size": 1024}
LAYERS = 33


def conversion_memory() -> None:
    """Converts the models `one` and `many`, and saves this process' memory peaks in bytes.

    peaks.json has the peaks after each model, converted there and back and verified, and the peak
    with all tensors of `many` in memory.
    """
    from megatron_mdm.conversion import safetensors_model, to_hugging_face, to_megatron
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
    model = safetensors_model.HubModel(directory / "many")
    tensors = [model.read(name) for name in model.entries]
    note()
    assert tensors
    (directory / "peaks.json").write_text(json.dumps(peaks))


def test_the_peak_does_not_grow_with_the_layers(tmp_path):
    sizes = []
    for name, layers in (("one", 1), ("many", LAYERS)):
        source = models.make("llada", tmp_path / name, n_layers=layers, **WIDE)
        sizes.append((source / "model.safetensors").stat().st_size)
    added = sizes[1] - sizes[0]
    assert added > 120e6
    ranks.launch(tmp_path, 1, "--", entry=conversion_memory)
    one, many, whole = json.loads((tmp_path / "peaks.json").read_text())
    assert many - one < added / 4  # the allocator keeps less than a tenth
    assert whole - many > added / 2  # holding all tensors would be seen
