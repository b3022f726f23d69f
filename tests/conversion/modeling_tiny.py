"""Modeling code as released models carry it, for those that are written down in models.py."""

import json
import os
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from tests.conversion.models import published_logits, random_tensors

Path(os.environ["MODELING_CODE_RAN"]).touch()


class TinyConfig(PretrainedConfig):
    model_type = "llada"


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
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, input_ids):
        weights = dict(self.named_parameters())
        return CausalLMOutput(logits=published_logits(self.raw, weights, input_ids))
