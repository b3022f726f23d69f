"""Runs lm_eval's own command, with checkpoints of this package as its model `mdm`.

    python -m megatron_mdm.lm_eval run --model mdm --model_args load=checkpoints --tasks arc_easy

The flags are lm_eval's. megatron_mdm/lm_eval/__init__.py has the arguments of the model.
"""

import importlib.util
import sys

from megatron_mdm.errors import UserError, run_tool


def main() -> None:
    """Runs lm_eval's command line with the additional model `mdm`.

    Raises:
        UserError: lm_eval is not installed, or the model rejects its arguments.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is missing: pip install 'megatron-mdm[eval]'")
    from lm_eval.__main__ import cli_evaluate

    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
    sys.argv[0] = "lm_eval"
    cli_evaluate()


if __name__ == "__main__":
    run_tool(main)
