"""A masked-diffusion model for the tasks of lm-evaluation-harness that compare likelihoods.

    with training_device("cuda"), loaded_model("checkpoints", "cuda") as loaded:
        encode = mcore.texts.encoder(loaded)
        model = HarnessModel(loaded.logits, encode, loaded.mask_token_id, max_length)
        print(lm_eval.simple_evaluate(model=model, tasks=["arc_easy"])["results"])

`lm_eval` is optional: without it the class stands alone, with the same methods.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from megatron_mdm.errors import UserError
from megatron_mdm.evaluation import cut_rows, log_likelihoods
from megatron_mdm.generation import Decoder, LogitsFunction

try:
    from lm_eval.api.model import LM
except ImportError:
    LM = object


class HarnessModel(LM):
    """Answers the requests of the harness with bounds on log-likelihoods, in nats.

    Args:
        logits: tokens int64 [B, L] -> logits float [B, L, V] of the clean tokens, unshifted.
        encode: a text to its token ids, without special tokens.
        mask_token_id: id put at masked positions.
        max_length: most tokens in a row; contexts are cut on the left to fit.
        draws: masks of each request, a multiple of 4.
        seed: of the masks.
        batch_size: masked rows in a call of `logits`.
        device: of the tokens that `logits` takes.
    """

    def __init__(
        self,
        logits: LogitsFunction,
        encode: Callable[[str], list[int]],
        mask_token_id: int,
        max_length: int,
        draws: int = 32,
        seed: int = 0,
        batch_size: int = 16,
        device: torch.device | str | int = "cpu",
    ) -> None:
        super().__init__()
        self._logits = logits
        self._encode = encode
        self._mask_token_id = mask_token_id
        self._max_length = max_length
        self._settings: dict[str, Any] = {
            "draws": draws,
            "seed": seed,
            "batch_size": batch_size,
            "device": device,
        }

    def loglikelihood(self, requests: Iterable[Any]) -> list[tuple[float, bool]]:
        """The bound on log p(continuation | context), and whether greedy decoding gives it.

        Greedy decoding fills the most confident position first, one in each call of the model.

        Args:
            requests: with `args` = (context, continuation), strings.

        Raises:
            UserError: a continuation longer than a row.
        """
        pairs = [self._pair(*request.args) for request in requests]
        bounds = log_likelihoods(self._logits, pairs, self._mask_token_id, **self._settings)
        return [
            (bound, self._is_greedy(*pair)) for (bound, _), pair in zip(bounds, pairs, strict=True)
        ]

    def loglikelihood_rolling(self, requests: Iterable[Any]) -> list[float]:
        """The bound on log p of whole texts, each the sum over rows of at most `max_length`.

        Args:
            requests: with `args` = (text,).
        """
        totals = []
        for request in requests:
            rows = cut_rows([self._encode(request.args[0])], self._max_length, packed=False)
            pairs: list[tuple[list[int], list[int]]] = [([], row.tolist()) for row in rows]
            bounds = log_likelihoods(self._logits, pairs, self._mask_token_id, **self._settings)
            totals.append(sum(bound for bound, _ in bounds))
        return totals

    def generate_until(self, requests: Iterable[Any]) -> list[str]:
        """Not offered.

        Raises:
            UserError: always.
        """
        raise UserError("HarnessModel scores likelihoods only: choose multiple-choice tasks")

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids as one text would have them; a space between belongs to the continuation."""
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        before = self._encode(stripped) if stripped else []
        after = self._encode(stripped + continuation)[len(before) :]
        room = self._max_length - len(after)
        if room < 0:
            raise UserError(
                f"a continuation has {len(after)} tokens and a row of the model "
                f"{self._max_length}: choose a task with shorter answers"
            )
        return before[max(0, len(before) - room) :], after

    def _is_greedy(self, context: list[int], continuation: list[int]) -> bool:
        blank = [self._mask_token_id] * len(continuation)
        tokens = torch.tensor([context + blank], device=self._settings["device"])
        filled = Decoder(self._mask_token_id)(self._logits, tokens)
        return bool(filled[0, len(context) :].tolist() == continuation)
