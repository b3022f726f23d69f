import os

# The fork server below inherits it: one thread a rank, since the ranks share the cores.
os.environ["OMP_NUM_THREADS"] = "1"
