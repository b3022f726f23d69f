r"""lm-evaluation-harness (`lm_eval`) on checkpoints.

    python -m megatron_mdm.lm_eval run --model mdm --model_args load=DIR --device cpu \
        --batch_size 16 --tasks gsm8k

is lm_eval's own command, which knows the model `mdm` (`checkpoint_model.CheckpointModel`); so does
`lm_eval.simple_evaluate(model="mdm", ...)` in a script that has imported this package.
tools/evaluate.py --tasks has the flags that are needed most.

Imports neither torch nor megatron, and `lm_eval` itself only where it is needed.
"""

from megatron_mdm.lm_eval.tasks import register

register()
