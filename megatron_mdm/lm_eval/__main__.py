"""Runs lm_eval's own command, with checkpoints of this package as its model `mdm`.

    python -m megatron_mdm.lm_eval run --model mdm --model_args load=checkpoints --tasks arc_easy

The flags are lm_eval's. megatron_mdm/lm_eval/__init__.py has the arguments of the model.
"""

import sys

from megatron_mdm.errors import UserError, run_tool
from megatron_mdm.libraries import LM_EVAL


def main() -> None:
    """Runs lm_eval's command line with the additional model `mdm`.

    Raises:
        UserError: lm_eval is not installed, or the model rejects its arguments.
    """
    if not LM_EVAL.is_installed():
        raise UserError(f"{LM_EVAL.name} is missing: {LM_EVAL.install}")
    from lm_eval.__main__ import cli_evaluate

    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
    sys.argv[0] = "lm_eval"
    cli_evaluate()


if __name__ == "__main__":
    run_tool(main)
