"""`python -m megatron_mdm.lm_eval`: lm_eval's own command, with the additional model `mdm`."""

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

    sys.argv[0] = "lm_eval"
    cli_evaluate()


if __name__ == "__main__":
    run_tool(main)
