import os

# The fork server below inherits these: as `megatron_mdm.pretrain` sets them for the CPU, and one
# thread a rank, since the ranks share the cores.
os.environ["TORCH_COMPILE_DISABLE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
