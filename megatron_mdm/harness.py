"""A masked-diffusion model for the tasks of lm-evaluation-harness that compare likelihoods.

    with training_device("cuda"), loaded_model("checkpoints", "cuda") as loaded:
        encode = mcore.texts.encoder(loaded)
        model = HarnessModel(loaded.logits, encode, loaded.mask_token_id, max_length,
                             shift=loaded.args.mdm_shift, opening_token_id=loaded.opening_token_id)
        print(lm_eval.simple_evaluate(model=model, tasks=["arc_easy"])["results"])

`lm_eval` is optional: without it the class stands alone, with the same methods.
"""

import os
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
        shift: whether the model predicts each token at the position before it (--mdm-shift). It
            then cannot predict the first token of a row: every row begins with a token that is
            seen and not scored. That is the last one of the context or of the row before.
        opening_token_id: with `shift`, the token that stands in front of a text without context;
            None: such texts are refused.

    Raises:
        UserError: a row has no room for a token beside that one.
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
        shift: bool = False,
        opening_token_id: int | None = None,
    ) -> None:
        super().__init__()
        self._num_given = int(shift)  # tokens at the start of a row that cannot be scored
        if max_length <= self._num_given:
            raise UserError(f"max_length {max_length}: rows have no room for a token to score")
        self._logits = logits
        self._encode = encode
        self._mask_token_id = mask_token_id
        self._max_length = max_length
        self._opening_token_id = opening_token_id
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
            UserError: a continuation that is empty, longer than a row, or, for a shifted model,
                without a context.
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

        Raises:
            UserError: nothing can stand before the first token, which a shifted model needs.
        """
        totals, given = [], self._num_given
        for request in requests:
            text = [*self._opening(), *self._encode(request.args[0])]
            rows = cut_rows([text], self._max_length, packed=False, overlap=given)
            pairs = [(row[:given].tolist(), row[given:].tolist()) for row in rows]
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
        """Token ids as one text would have them; a space between belongs to the continuation.

        So does a token of both, as tokenizers make them that merge letters over the border: the
        context is what the whole has in common with the context alone.

        Raises:
            UserError: nothing to score, or more than a row holds.
        """
        stripped = context.rstrip()
        before = self._encode(stripped) if stripped else []
        whole = self._encode(context + continuation)
        common = len(os.path.commonprefix([before, whole]))
        before, after = whole[:common], whole[common:]
        if not continuation or not after:
            raise UserError(
                f"the continuation {continuation!r} of {context[-20:]!r} has no tokens of its own: "
                "choose a task whose answers are not empty"
            )
        room = self._max_length - len(after)
        if room < self._num_given:
            raise UserError(
                f"a continuation has {len(after)} tokens and a row of the model has room for "
                f"{self._max_length - self._num_given}: choose a task with shorter answers"
            )
        return before[max(0, len(before) - room) :] or self._opening(), after

    def _opening(self) -> list[int]:
        """What stands in front of a text without context.

        Raises:
            UserError: nothing can, and the model is shifted.
        """
        if not self._num_given:
            return []
        if self._opening_token_id is None:
            raise UserError(
                "a shifted model (--mdm-shift) cannot score the first token of a text without "
                "context: its tokenizer has no end of document to put in front, or its documents "
                "never saw one (--mdm-isolate-documents); choose tasks whose texts have a context"
            )
        return [self._opening_token_id]

    def _is_greedy(self, context: list[int], continuation: list[int]) -> bool:
        blank = [self._mask_token_id] * len(continuation)
        tokens = torch.tensor([context + blank], device=self._settings["device"])
        filled = Decoder(self._mask_token_id)(self._logits, tokens)
        return bool(filled[0, len(context) :].tolist() == continuation)
