"""Modeling code as released models carry it, for the architectures in models.py.

It also has the parts of the released code on which transformers 5 stumbles. LLaDA's class does not
call `post_init`, and reads `use_cache` from its settings. The classes of LLaDA-MoE, LLaDA2 and
Dream look up their rotary frequencies under `default`.
"""

import json
import os
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.conversion.models import published_logits, random_tensors

Path(os.environ["MODELING_CODE_RAN"]).touch()


class TinyConfig(PretrainedConfig):
    model_type = "llada"

    def __init__(self, rope_theta=1e4, **settings):
        self.rope_theta = rope_theta
        super().__init__(**settings)


class TinyModel(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.raw = json.loads(Path(config.name_or_path, "config.json").read_text())
        for name, tensor in random_tensors(self.raw).items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, torch.nn.Parameter(torch.empty_like(tensor)))
        if "hidden_size" in self.raw:
            frequencies, factor = ROPE_INIT_FUNCTIONS["default"](config, None)
            size = 2 * len(frequencies)
            expected = config.rope_theta ** (-torch.arange(0, size, 2) / size)
            of_a_head = self.raw.get("head_dim", config.hidden_size // config.num_attention_heads)
            assert size == of_a_head * self.raw.get("partial_rotary_factor", 1) and factor == 1
            torch.testing.assert_close(frequencies, expected)

    def forward(self, input_ids):
        assert not self.config.use_cache
        weights = dict(self.named_parameters())
        return CausalLMOutput(logits=published_logits(self.raw, weights, input_ids))
