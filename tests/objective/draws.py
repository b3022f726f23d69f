"""Numbers on the unit interval, and the error probability that tests of such draws share."""

import numpy as np
import torch

from megatron_mdm.objective.randomness import to_unit

# Tests of rows' uniforms and quantiles that can fail by chance share this error probability.
ALPHA = 0.01
NUM_TESTS = 12


def unit(grid):
    return to_unit(torch.as_tensor(np.asarray(grid))).numpy()
