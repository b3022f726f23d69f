"""A masked-diffusion model with the interface that lm-evaluation-harness (`lm_eval`) requires.

The model consists of callables; `megatron_mdm.lm_eval` makes one from a checkpoint. `lm_eval` is
optional. Without it the class has no base class, and all methods but `generate_until` work.
"""

import dataclasses
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from megatron_mdm.errors import UserError
from megatron_mdm.evaluation.nelbo import DRAWS, cut_rows, log_likelihoods, num_masks
from megatron_mdm.generation.decoder import Decoder, LogitsFunction
from megatron_mdm.generation.prompts import Spelling, same_lengths, until_end

try:
    from lm_eval.api.model import LM
except ImportError:
    LM = object

Message = dict[str, str]


def _whole(value: Any) -> int:
    """Converts a value to a whole number.

    Raises:
        TypeError: the value is not a number.
        ValueError: the value is not a whole number.
    """
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{value} is no whole number")
    return int(value)


# lm_eval's names for the number of tokens to generate.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Generation settings of tasks that are settings of `Decoder`.
DECODER_SETTINGS: dict[str, Callable[[Any], Any]] = {
    "steps": _whole,
    "block_length": _whole,
    "remasking": str,
    "threshold": float,
    "edit_threshold": float,
    "edit_steps": _whole,
    "temperature": float,
    "top_k": _whole,
    "top_p": float,
}
# Values with which a setting has no effect. The decoder does not support the last two settings.
NEUTRAL = {"top_p": (1,), "top_k": (0, -1), "min_p": (0,), "repetition_penalty": (1,)}
SAMPLING = ("top_p", "top_k", "min_p")  # no effect on greedy decoding
logger = logging.getLogger(__name__)


class HarnessModel(LM):  # type: ignore[misc]  # lm_eval has no annotations
    """Answers the requests of the harness with bounds on log-likelihoods, in nats, and with texts.

    Args:
        logits: tokens int64 [B, L] -> logits float [B, L, V] of the clean tokens, unshifted. If the
            decoder has blocks of the model, it also gets `clean` and `documents`; see
            `LogitsInContext`.
        encode: text -> token ids, without special tokens in front.
        mask_token_id: token id that replaces masked tokens.
        max_length: most tokens in a row; longer contexts lose their beginning.
        draws: number of masks of each likelihood request, a multiple of 4; see `log_likelihoods`.
        seed: seed of masks and generated texts.
        batch_size: rows in a call of `logits`.
        device: device of the tokens that `logits` gets.
        shift: whether the model predicts each token at the position before it (--mdm-shift). Such a
            model cannot predict the first token of a row. Every row then begins with a token that
            is visible and not scored: the last token of the context or of the previous row.
        opening_token_id: with `shift`, the token in front of a text without context; None: such
            texts are rejected.
        decode: token ids -> text; None: the model cannot generate texts.
        decoder: generates the answers of `generate_until`; `generation_kwargs` of a task override
            its settings. Default: `Decoder(mask_token_id)`.
        decoded: number of tokens in a row -> the decoder's function for a batch of such rows.
            Default: `logits`.
        max_gen_toks: tokens of a generated text if the task does not set the number, as in lm_eval.
        render: (messages, whether the header of an answer follows) -> text; None: the tokenizer has
            no chat template.
        template: returns the chat template, for lm_eval's records.
        name: name of the tokenizer, for lm_eval's records.
        show_progress: whether to draw a progress bar.

    Raises:
        UserError: `max_length` leaves no room for a token to score.
    """

    def __init__(
        self,
        logits: LogitsFunction,
        encode: Callable[[str], list[int]],
        mask_token_id: int,
        max_length: int,
        draws: int = DRAWS,
        seed: int = 0,
        batch_size: int = 16,
        device: torch.device | str | int = "cpu",
        shift: bool = False,
        opening_token_id: int | None = None,
        decode: Callable[[list[int]], str] | None = None,
        decoder: Decoder | None = None,
        decoded: Callable[[int], LogitsFunction] | None = None,
        max_gen_toks: int = 256,
        render: Callable[[list[Message], bool], str] | None = None,
        template: Callable[[], str] = str,
        name: str = "",
        show_progress: bool = False,
    ) -> None:
        super().__init__()
        self._num_given = int(shift)  # tokens at the start of a row that cannot be scored
        if max_length <= self._num_given:
            raise UserError(f"max_length {max_length}: rows have no room for a token to score")
        self._logits = logits
        self._decoded = decoded or (lambda length: logits)
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
        self._decode = decode
        self._decoder = decoder or Decoder(mask_token_id)
        self._max_gen_toks = max_gen_toks
        self._render = render
        self._template = template
        self._name = name
        self._show_progress = show_progress
        self._expected: Callable[[], Iterable[Any]] = tuple

    def expect(self, requests: Callable[[], Iterable[Any]]) -> None:
        """Makes the model check all requests of an evaluation before it answers the first one.

        Without this call, a method checks only its own requests before it answers them. If this
        check fails, the answers of the methods called before are lost.

        Args:
            requests: returns the requests; called when the first request is to be answered. Each
                request has `request_type`, the name of the method that answers it, and `args`.
        """
        self._expected = requests

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer."""
        return self._name

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The chat template, for lm_eval's records; empty if none is applied."""
        return self._template() if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[Message], add_generation_prompt: bool = True
    ) -> str:
        """Renders a conversation as one text.

        Args:
            chat_history: messages with `role` and `content`.
            add_generation_prompt: whether to append the header of a new answer; if not, the last
                message is an answer to be continued.

        Raises:
            UserError: there is no chat template.
        """
        if self._render is None:
            raise UserError(
                "the model's tokenizer has no chat template: drop --apply-chat-template, or give "
                "the checkpoint a tokenizer that has one"
            )
        return self._render(chat_history, add_generation_prompt)

    def loglikelihood(self, requests: Iterable[Any]) -> list[tuple[float, bool]]:
        """The bound on log p(continuation | context), and whether greedy decoding gives it.

        Greedy decoding fills the most confident position first, one position per model call.

        Args:
            requests: requests with `args` = (context, continuation), strings.

        Raises:
            UserError: a continuation is empty, or longer than a row; a shifted model gets no
                context and has no opening token; or a text spells the mask token.
        """
        self._check_expected()
        pairs = self._fitted([self._pair(*request.args) for request in requests])
        bounds = self._bounds(pairs)
        return list(zip(bounds, self._are_greedy(pairs), strict=True))

    def loglikelihood_rolling(self, requests: Iterable[Any]) -> list[float]:
        """The bound on log p of whole texts: the sum over their rows of at most `max_length`.

        Args:
            requests: requests with `args` = (text,).

        Raises:
            UserError: a shifted model has no opening token, or a text spells the mask token.
        """
        self._check_expected()
        given = self._num_given
        texts = [self._opened(*request.args) for request in requests]
        rows = [cut_rows([text], self._max_length, packed=False, overlap=given) for text in texts]
        bounds = iter(
            self._bounds(
                [(row[:given].tolist(), row[given:].tolist()) for own in rows for row in own]
            )
        )
        return [sum(next(bounds) for _ in own) for own in rows]

    def generate_until(self, requests: Iterable[Any]) -> list[str]:
        """Generates texts that follow contexts, each up to an end token or an end string.

        The generation settings of a task are lm_eval's own (`max_gen_toks`, `until`, `do_sample`,
        `temperature`) and those of `Decoder` (`steps`, `block_length`, `remasking`, `threshold`,
        `edit_threshold`, `edit_steps`, `top_k`, `top_p`). With `do_sample` and no temperature, a
        greedy decoder gets the temperature 1. A setting with the value None is ignored. A setting
        that the decoder does not support is rejected, unless its value has no effect.

        Args:
            requests: requests with `args` = (context, settings).

        Raises:
            UserError: a setting is out of range or unknown, or a context spells the mask token.
        """
        if self._decode is None:
            raise UserError("this model has no `decode`, which turns what it generates into text")
        self._check_expected()
        pairs, decoders, ends = [], [], []
        for request in requests:
            pair, decoder, until = self._blank(*request.args)
            pairs.append(pair)
            decoders.append(decoder)
            ends.append(until)
        pairs = self._fitted(pairs)
        rows = [[*before, *blank] for before, blank in pairs]
        spelling = Spelling(self._encode, self._decode, self._mask_token_id)
        texts = [""] * len(rows)
        with self._bar(len(rows), "texts") as bar:
            for decoder in dict.fromkeys(decoders):
                own = [i for i, other in enumerate(decoders) if other == decoder]
                for batch in same_lengths([rows[i] for i in own], self._settings["batch_size"]):
                    chosen = [own[place] for place in batch]
                    for i, row in zip(chosen, self._written(decoder, rows, chosen), strict=True):
                        given = [token != self._mask_token_id for token in rows[i]]
                        ids = until_end(row, given, decoder.end_token_ids)[len(pairs[i][0]) :]
                        texts[i] = cut_at(spelling.inside(ids), ends[i])
                    bar.update(len(batch))
        return texts

    def _written(
        self, decoder: Decoder, rows: Sequence[list[int]], chosen: Sequence[int]
    ) -> list[list[int]]:
        """Decodes the chosen rows, which have equal lengths; the result has no mask tokens.

        Each row has its own generator, so that a text depends on the seed and the number of its
        request, but not on the other rows of its batch.
        """
        device = self._settings["device"]
        seeds = [
            np.random.SeedSequence([self._settings["seed"], i]).generate_state(1)[0] for i in chosen
        ]
        generators = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]
        tokens = torch.tensor([rows[i] for i in chosen], device=device)
        return decoder(self._decoded(tokens.shape[1]), tokens, generators).tolist()

    def _check_expected(self) -> None:
        """Checks all requests of the evaluation, once; see `expect`.

        Raises:
            UserError: a request cannot be answered.
        """
        expected, self._expected = self._expected, tuple
        for request in expected():
            if request.request_type == "loglikelihood":
                self._fit(*self._pair(*request.args))
            elif request.request_type == "loglikelihood_rolling":
                self._opened(*request.args)
            else:
                pair, _, _ = self._blank(*request.args)
                self._fit(*pair)

    def _blank(
        self, context: str, settings: dict[str, Any]
    ) -> tuple[tuple[list[int], list[int]], Decoder, list[str]]:
        """Prepares a request: token ids of (context, masks to fill), the decoder, the end strings.

        Raises:
            UserError: see `generate_until`.
        """
        decoder, length, until = self._generation(settings)
        return (self._ids(context), [self._mask_token_id] * length), decoder, until

    def _opened(self, text: str) -> list[int]:
        """Token ids of a whole text, after the opening token if the model needs one.

        Raises:
            UserError: see `loglikelihood_rolling`.
        """
        return [*self._opening(), *self._ids(text)]

    def _generation(self, settings: dict[str, Any]) -> tuple[Decoder, int, list[str]]:
        """The decoder, the number of tokens and the end strings for a task's settings.

        Raises:
            UserError: see `generate_until`.
        """
        from lm_eval.models.utils import normalize_gen_kwargs

        given = {name: value for name, value in settings.items() if value is not None}
        try:
            for name in LENGTHS:
                if name in given:
                    given[name] = _whole(given[name])  # lm_eval would cut off a fraction
            if not isinstance(given.get("do_sample", False), bool):
                raise ValueError(f"do_sample {given['do_sample']} is neither true nor false")
            if given.get("do_sample"):  # without a temperature, lm_eval would make it greedy
                given.setdefault("temperature", self._decoder.temperature or 1.0)
            given = dict(normalize_gen_kwargs(given, self._max_gen_toks))
            own = {
                name: kind(given.pop(name))
                for name, kind in DECODER_SETTINGS.items()
                if name in given
            }
        except (TypeError, ValueError) as error:
            raise UserError(f"the generation_kwargs {settings} cannot be read: {error}") from error
        length, until, _ = (given.pop(name) for name in ("max_gen_toks", "until", "do_sample"))
        greedy = own.get("temperature", self._decoder.temperature) == 0.0
        for name in ("top_k", "top_p"):
            if name in own and (greedy or own[name] in NEUTRAL[name]):
                del own[name]
        for name, value in given.items():
            if greedy and name in SAMPLING:
                continue
            if value not in NEUTRAL.get(name, ()):
                way = f", or add --gen-kwargs {name}={NEUTRAL[name][0]}" if name in NEUTRAL else ""
                raise UserError(
                    f"generation_kwargs has {name} {value}, which the decoder does not support: "
                    f"choose a task without it{way}"
                )
        most = self._max_length - 1
        if not 1 <= length <= most:
            raise UserError(
                f"max_gen_toks {length} must be 1 to {most}, so that a token of context fits into "
                f"the model's positions: add --gen-kwargs max_gen_toks={most}, or fewer"
            )
        try:
            decoder = dataclasses.replace(self._decoder, **own)
            decoder.check_calls(length)
        except UserError as error:  # its message names flags of a tool
            line = re.sub(r"--([a-z-]+)", lambda flag: flag[1].replace("-", "_"), str(error))
            raise UserError(f"the generation_kwargs {settings} are not valid: {line}") from error
        return decoder, length, [str(end) for end in until if end is not None]

    def _ids(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            UserError: the text spells the mask token.
        """
        ids = self._encode(text)
        if self._mask_token_id in ids:
            raise UserError(
                f"the text {text[-60:]!r} spells the mask token {self._mask_token_id}, which "
                "marks unknown tokens: choose another task, or add --no-special-tokens"
            )
        return ids

    def _bounds(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """The bounds on log p(continuation | context), nats."""
        masks = sum(num_masks(len(after), self._settings["draws"]) for _, after in pairs)
        with self._bar(masks, "masks") as bar:
            bounds = log_likelihoods(
                self._logits,
                pairs,
                self._mask_token_id,
                progress=bar.update,
                block_size=self._decoder.block_size,
                **self._settings,
            )
        return [bound for bound, _ in bounds]

    def _bar(self, total: int, unit: str) -> tqdm:
        return tqdm(total=total, unit=unit, disable=not self._show_progress)

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of context and continuation, from the tokenization of the joined text.

        The context is the longest common prefix of the tokens of the joined text and of the context
        alone, without its trailing spaces. The continuation is the rest. It therefore includes the
        space between both, and any token that spans the border.

        Raises:
            UserError: there is nothing to score, or a text spells the mask token.
        """
        stripped = context.rstrip()
        before = self._encode(stripped) if stripped else []
        whole = self._ids(context + continuation)
        common = len(os.path.commonprefix([before, whole]))  # noqa: RUF071  (no paths)
        before, after = whole[:common], whole[common:]
        if not continuation or not after:
            raise UserError(
                f"the continuation {continuation!r} of {context[-20:]!r} has no tokens of its own: "
                "choose a task whose answers are not empty"
            )
        return before, after

    def _fitted(
        self, pairs: Sequence[tuple[list[int], list[int]]]
    ) -> list[tuple[list[int], list[int]]]:
        """Applies `_fit` to pairs, and logs a warning if contexts were cut.

        Raises:
            UserError: see `_fit`.
        """
        fitted = [self._fit(*pair) for pair in pairs]
        cut = sum(len(new) < len(old) for (new, _), (old, _) in zip(fitted, pairs, strict=True))
        if cut:
            logger.warning(
                "%d of %d contexts were longer than the model's rows of %d tokens allow, and lost "
                "their beginning: use fewer examples (--num-fewshot)",
                cut,
                len(fitted),
                self._max_length,
            )
        return fitted

    def _fit(self, before: list[int], after: list[int]) -> tuple[list[int], list[int]]:
        """Cuts the beginning of a context, so that context and continuation fit into a row.

        If the model needs a token of context and there is none, the context is the opening token.

        Raises:
            UserError: the continuation is too long, or there is neither context nor opening token.
        """
        room = self._max_length - len(after)
        if room < self._num_given:
            raise UserError(
                f"a continuation has {len(after)} tokens and a row of the model has room for "
                f"{self._max_length - self._num_given}: choose a task with shorter answers"
            )
        return before[max(0, len(before) - room) :] or self._opening(), after

    def _opening(self) -> list[int]:
        """The tokens in front of a text without context.

        Raises:
            UserError: the model is shifted, and there is no opening token.
        """
        if not self._num_given:
            return []
        if self._opening_token_id is None:
            raise UserError(
                "a shifted model (--mdm-shift) cannot score the first token of a text without "
                "context: its tokenizer has no end-of-document token to put in front, or its "
                "training documents had none in front (--mdm-isolate-documents); choose tasks "
                "whose texts have a context"
            )
        return [self._opening_token_id]

    def _are_greedy(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
        """Whether greedy decoding, with the continuation's length, gives each continuation."""
        rows = [[*before, *[self._mask_token_id] * len(after)] for before, after in pairs]
        own = self._decoder
        decoder = Decoder(self._mask_token_id, block_size=own.block_size, vocab_size=own.vocab_size)
        greedy = [False] * len(rows)
        for batch in same_lengths(rows, self._settings["batch_size"]):
            tokens = torch.tensor([rows[i] for i in batch], device=self._settings["device"])
            written = decoder(self._decoded(tokens.shape[1]), tokens)
            for i, filled in zip(batch, written.tolist(), strict=True):
                before, after = pairs[i]
                greedy[i] = filled[len(before) :] == after
        return greedy


def cut_at(text: str, ends: Iterable[str]) -> str:
    """The text before the first occurrence of an end string; empty end strings are ignored."""
    found = [text.find(end) for end in ends if end]
    return text[: min((place for place in found if place >= 0), default=len(text))]
