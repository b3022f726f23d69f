"""The command python -m megatron_mdm.doctor: which features can run here, and why others cannot."""
