"""Acceptance by an SGLang server that was started with speculative decoding.

Counts come from `meta_info` in the answers of SGLang 0.5.23: verifications, correct draft tokens, and a histogram of the
correct draft tokens per verification.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning_dataflow.contracts import PeerFailedError, PeerTimeoutError, UserError
from lightning_dataflow.contracts.foreign import MAX_JSON_BYTES, parse_json
from lightning_dataflow.evaluation.acceptance import AcceptanceReport, Decoded, Decoding

WARM_UP_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class SGLangDecoder:
    """Decodes on a running server.

    Args:
        url: `http://HOST:PORT`.
        api_key: the server's, if it has one.
        timeout_s: for the answer to one batch.
    """

    url: str
    api_key: str | None = None
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"evaluate.url={self.url} is no address of a server, expected http://HOST:PORT")

    @property
    def name(self) -> str:
        """For messages."""
        return f"the server at {self.url}"

    def evaluate(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        *,
        stop_token_ids: Sequence[int],
        plain: "SGLangDecoder | None" = None,
    ) -> AcceptanceReport:
        """Decode every prompt and add up what the server accepted by its own count.

        Args:
            stop_token_ids: the target's end tokens.
            decoding: with `batch_size` prompts per request. The server draws without the seed.
            plain: a server of the target alone, for the speed-up.

        Raises:
            UserError: no SGLang server, one that refuses, or one that does not speculate.
            PeerFailedError: the server does not answer.
            PeerTimeoutError: not within `timeout_s`.
        """
        num_draft_tokens = self.num_draft_tokens()
        if not num_draft_tokens:
            raise UserError(
                f"{self.name} does not speculate: start it with --speculative-algorithm and a draft "
                "(--speculative-draft-model-path)"
            )
        if plain is not None and plain.num_draft_tokens():
            raise UserError(f"{plain.name} speculates: evaluate.baseline_url is of one without a draft")
        sampling = sampling_params(decoding.max_new_tokens, decoding.temperature, stop_token_ids)
        drafted = self._decode(prompts, sampling, decoding.batch_size, num_draft_tokens)
        alone = None if plain is None else plain._decode(prompts, sampling, decoding.batch_size, 0)
        return drafted.report("sglang_server", alone, temperature=decoding.temperature)

    def num_draft_tokens(self) -> int:
        """How many tokens ahead a proposal reaches (the depth of a tree); 0 for a server without speculation."""
        info = self._ask("/server_info", None)
        if not isinstance(info, dict) or "speculative_algorithm" not in info:
            raise UserError(f"what answers at {self.url} is no SGLang server")
        if not info["speculative_algorithm"] or info.get("enable_return_aux_hidden_states"):
            return 0  # a capture server names an algorithm and loads no draft
        with _reading(self.name):
            if (info.get("speculative_eagle_topk") or 1) > 1:
                return int(info["speculative_num_steps"])
            return int(info["speculative_num_draft_tokens"]) - 1  # SGLang counts the verified token too

    def _decode(
        self, prompts: Sequence[Sequence[int]], sampling: dict[str, Any], batch_size: int, num_draft_tokens: int
    ) -> Decoded:
        few = min(WARM_UP_TOKENS, sampling["max_new_tokens"])
        self.generate(prompts[:1], sampling | {"max_new_tokens": few}, 1)  # warm-up; not timed
        answers, seconds = self.generate(prompts, sampling, batch_size)
        counts = [read_counts(answer, num_draft_tokens, self.name) for answer in answers] if num_draft_tokens else []
        with _reading(self.name):
            return Decoded(
                tokens=[list(answer["output_ids"]) for answer in answers],
                seconds=seconds,
                num_drafts=sum(num_drafts for num_drafts, _ in counts),
                accepted_per_position=[sum(column) for column in zip(*(accepted for _, accepted in counts), strict=True)],
            )

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: dict[str, Any], batch_size: int
    ) -> tuple[list[dict[str, Any]], float]:
        """The server's answers, and how many seconds all of them took."""
        answers: list[dict[str, Any]] = []
        seconds = 0.0
        for first in range(0, len(prompts), batch_size):
            batch = [list(prompt) for prompt in prompts[first : first + batch_size]]
            start = time.perf_counter()
            outputs = self._ask("/generate", {"input_ids": batch, "sampling_params": sampling})
            seconds += time.perf_counter() - start
            if not isinstance(outputs, list) or len(outputs) != len(batch):
                raise UserError(f"{self.name} did not answer {len(batch)} prompts with as many outputs")
            answers += outputs
        return answers, seconds

    def _ask(self, path: str, body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url.rstrip("/") + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                return parse_json(response.read(MAX_JSON_BYTES + 1), f"the answer of {self.url}")
        except urllib.error.HTTPError as error:
            reason = f"answered {error.code}: {' '.join(error.read().decode(errors='replace').split())[:300]}"
            if error.code in (401, 403):
                reason = f"refuses our key ({error.code}): set target.api_key_file"
            raise UserError(f"{self.name} {reason}") from None
        except TimeoutError as error:
            raise PeerTimeoutError(f"no answer from {self.url} within {self.timeout_s:g} s (evaluate.timeout_s)") from error
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", None) or error)
            raise PeerFailedError(f"{self.name} does not answer ({reason}): is it up, is the address right?") from None
        except ValueError as error:
            raise UserError(f"what answers at {self.url} is no SGLang server ({error})") from error


def sampling_params(max_new_tokens: int, temperature: float, stop_token_ids: Sequence[int]) -> dict[str, Any]:
    """Sampling parameters of a request.

    An output ends at one of the given tokens or of the server's own end tokens; if none are given, at `max_new_tokens`.
    SGLang cannot ignore its own and keep ours.
    """
    params: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    return params | ({"stop_token_ids": list(stop_token_ids)} if stop_token_ids else {"ignore_eos": True})


def read_counts(answer: dict[str, Any], num_draft_tokens: int, who: str) -> tuple[int, list[int]]:
    """(verifications, how often a proposal was accepted at least up to each position) of one answer.

    A request whose first token ended it has none. Raises UserError where the numbers are missing or do not agree.
    """
    with _reading(who):
        meta = answer["meta_info"]
        if "spec_verify_ct" not in meta:
            if meta["completion_tokens"] > 1:
                raise UserError(f"{who} generated without speculation, its answer has no spec_verify_ct")
            return 0, [0] * num_draft_tokens
        drafts, accepted = meta["spec_verify_ct"], meta["spec_num_correct_drafts"]
        histogram = meta.get("spec_correct_drafts_histogram") or []
        per_position = [sum(histogram[position + 1 :]) for position in range(num_draft_tokens)]
        if sum(histogram) != drafts or sum(per_position) != accepted:
            raise UserError(f"{who}: {drafts} verifications, {accepted} correct drafts, but a histogram of {histogram}")
        return drafts, per_position


@contextmanager
def _reading(who: str) -> Iterator[None]:
    """Raise UserError where the answer of a server lacks a number, or has something else in its place."""
    try:
        yield
    except (KeyError, TypeError) as error:
        raise UserError(
            f"cannot read what {who} answers ({error!r}): this backend reads the answers of SGLang 0.5.23, measure on a "
            "server of that version"
        ) from error
