"""Finds operations of a forward step that would make the host wait for a GPU, without a GPU.

A host that waits queues nothing, and the device runs out of work. Here the forward step runs on
torch's fake tensors. They have shapes and a device, `cuda`, but no numbers: asking for a number
fails, and copies between devices are recorded.
"""

import json
import os
from pathlib import Path

import torch
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args
from megatron.training.global_vars import get_tokenizer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mdm.mcore.data.row_dataset import row_columns
from megatron_mdm.mcore.device import replaced
from megatron_mdm.mcore.model.masked_head import MaskedPositions
from megatron_mdm.mcore.training import forward_step as step
from megatron_mdm.mcore.training.state import TrainingState

CUDA = torch.device("cuda", 0)
# Settings that change the run's flags within one process. The model does not depend on them.
ISAD = {"mdm_isad_token_ids": list(range(60)), "mdm_isad_delta": 0.1}
DOCUMENTS = {"mdm_isolate_documents": True, "mdm_rate_per": "document"}
FIT = {"mdm_rate_sampler": "ppots", "mdm_ppots_refit_interval": 2}
BELL = {"mdm_rate_sampler": "logit-normal", "mdm_logit_normal": [0.0, 0.5]}
FADE = {"mdm_bell_fade": [0.0, 0.9], "mdm_bell_fade_at": [0, 100, "iters"]}
SETTINGS = {
    "defaults": {},
    "rows": {"mdm_normalization": "rows"},
    "full head, shift": {"mdm_head": "full", "mdm_shift": True},
    "exact-count": {"mdm_mask": "exact-count"},
    "isad": ISAD,
    "isad, exact weights": {**ISAD, **DOCUMENTS, "mdm_isad_weight": "exact"},
    "documents": {**DOCUMENTS, "mdm_normalization": "rows", "mdm_mask": "exact-count"},
    "random lengths": {"mdm_random_length_fraction": 0.5},
    "padding and ends": {"mdm_pad_eligible": True, "mdm_eod_eligible": False},
    "hidden": {"mdm_pad_attended": False, "mdm_eod_attended": False},
    "annealing": {"mdm_anneal_attention_iters": 100},
    "clipped": {"mdm_rate_sampler": "clipped", "mdm_clip": [0.3, 0.8]},
    "flat": {"mdm_rate_sampler": "flat"},
    "bell that fades": {**BELL, **FADE},
    "bell, then ppots": {**BELL, **FADE, "mdm_ppots_refit_interval": 2},
    "bell as weight": {**BELL, **DOCUMENTS, "mdm_bell_role": "weight"},
    "bell as proposal": {**BELL, "mdm_bell_role": "proposal"},
    "ppots, loss": {**FIT, "mdm_ppots_target": "loss"},
    "ppots, gradient": {**FIT, "mdm_ppots_target": "gradient", **DOCUMENTS},
    "evaluation": None,
}


class Waits(TorchDispatchMode):
    """Records the operations that make the host wait. Asking for a number fails by itself."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        name = operation.overloadpacket.__name__
        devices = [x.device.type for x in (*args, result) if torch.is_tensor(x)]
        if name in ("_to_copy", "copy_") and len(set(devices)) > 1:
            # A non-blocking copy to the host goes into memory that torch pins, so the host does not
            # wait.
            if not kwargs.get("non_blocking", False):
                self.found.append(f"{name} {devices[0]} to {devices[-1]}")
        elif name == "isin" or name.startswith("_unique"):  # they count distinct numbers
            self.found.append(name)
        elif name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype is torch.bool for x in args[1]
        ):
            self.found.append(f"{name} by a mask")
        return result


class Config:
    grad_scale_func = None
    transformer_impl = "local"
    sequence_parallel = False
    num_moe_experts = None


class Stage:
    """A model without layers: hidden states, and our head on them."""

    vp_stage = None
    config = Config()

    def __init__(self, training):
        self.training = training

    def __call__(self, tokens, *_, labels, output_processor, output_processor_context, **__):
        hidden = torch.ones((*tokens.t().shape, 8), device=CUDA, requires_grad=True)
        # Nothing runs backward without a GPU, so the hook on the gradient gets one at once.
        hidden.register_hook = lambda look: look(torch.ones_like(hidden))
        return output_processor(
            hidden_states=hidden,
            output_layer=self._logits,
            output_weight=None,
            labels=labels,
            compute_language_model_loss=self._losses,
            scale_logits=lambda logits: logits,
            config=self.config,
            context=output_processor_context,
        )

    @staticmethod
    def _losses(labels, logits):
        logits = logits.transpose(0, 1)
        picked = logits.gather(-1, (labels % 8)[..., None])[..., 0]
        return logits.logsumexp(dim=-1) - picked

    class _Layer:
        sequence_parallel = False

        def __call__(self, hidden, weight):
            return hidden, None

    _logits = _Layer()


def forward_step(state, iterator, model):
    """Replaces the program's forward step: it tries all settings and saves the waits it finds."""
    assert get_attr_wrapped_model(model, "vp_stage") is None
    args = get_args()
    args.check_for_nan_in_loss_and_grad = False  # Megatron's own check waits
    before, found = dict(vars(args)), {}
    for name, changes in SETTINGS.items():
        vars(args).update(before | (changes or {}))
        state = TrainingState(args, get_tokenizer().eod)
        found[name] = _waits(state, training=changes is not None)
    Path(os.environ["TRACE_DIR"], "waits.json").write_text(json.dumps(found))
    raise SystemExit(0)


def _waits(state, training):
    columns = row_columns(state.mdm, training)
    b = state.micro_batch_size(training)
    batch = {
        name: torch.zeros(b, state.seq_length if vector else 1, dtype=torch.int64)
        for name, vector in columns.items()
    }
    # The CPU mode changes the device in torch's functions. Its replacements in torch.cuda stay.
    with (
        torch._C.DisableTorchFunction(),
        replaced(torch.cuda, "current_device", lambda: CUDA),
        replaced(torch.cuda, "is_available", lambda: False),
        FakeTensorMode(allow_non_fake_inputs=True),
        # The only number that the head needs: see MaskedPositions.
        replaced(MaskedPositions, "num_rows", 32),
        Waits() as waits,
    ):
        for _ in range(2):
            waits.found.clear()  # one-time copies stay on the device
            losses, loss_func = step.forward_step(state, iter([batch]), Stage(training))
            loss_func(losses)
    return waits.found
