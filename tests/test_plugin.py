"""README's lines that register the objective in a user's own script."""

import re

from megatron_mdm.mcore.device import training_device
from tests import ROOT, ranks


def readme_script() -> None:
    """Runs README's script in the section on own scripts, word for word, on the CPU."""
    readme = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    with training_device("cpu"):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


def test_readme_script_trains_as_the_program_does(base, tmp_path):
    script = ranks.launch(tmp_path / "script", 1, *base, entry=readme_script)
    program = ranks.launch(tmp_path / "program", 1, *base)
    assert len(script.losses) == 5
    assert script.losses == program.losses
    assert script.grad_norms == program.grad_norms
