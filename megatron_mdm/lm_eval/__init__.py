r"""lm-evaluation-harness (`lm_eval`) on checkpoints.

    python -m megatron_mdm.lm_eval run --model mdm --model_args load=DIR --device cpu \
        --batch_size 16 --tasks gsm8k

runs lm_eval's own command with the additional model `mdm` (`checkpoint_model.CheckpointModel`). A
script that has imported this package can also call `lm_eval.simple_evaluate(model="mdm", ...)`.
tools/evaluate.py --tasks offers the most common flags.

This module imports neither torch nor megatron, and imports `lm_eval` only when it is needed.
"""

from megatron_mdm.lm_eval.tasks import register

register()
