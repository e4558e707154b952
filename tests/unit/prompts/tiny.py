"""Tokenizers of a few hundred tokens, chat templates of one line, and how records come out with them."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lightning_dataflow.prompts import PromptDataset, load_prompts
from lightning_dataflow.prompts.encoding import Encoder
from lightning_dataflow.prompts.records import normalise
from lightning_dataflow.prompts.template import ChatTemplate, Unusable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IM = ("<|im_start|>", "<|im_end|>")
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
NO_PROMPT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PLAIN = NO_PROMPT + ASK
TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}" + ASK
)
# The last turn is rendered otherwise than the same turn in the middle.
THINK = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content or loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}\n<call>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}</call>{% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    + ASK
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def fast(backend: Tokenizer, special: Sequence[Any], template: str | None, **options: Any) -> "PreTrainedTokenizerFast":
    """A tokenizer whose vocabulary holds the `special` tokens too."""
    from transformers import PreTrainedTokenizerFast

    added = [
        token if isinstance(token, AddedToken) else AddedToken(token, special=True, normalized=False) for token in special
    ]
    backend.add_special_tokens(added)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    tokenizer.chat_template = template
    return tokenizer


def byte_tokenizer(
    template: str | None = PLAIN,
    special: Sequence[Any] = IM,
    *,
    eos: str | None = None,
    trim: bool = False,
    strip: bool = False,
    merges: Iterable[tuple[str, str]] = (),
    **options: Any,
) -> "PreTrainedTokenizerFast":
    """A token for each byte, and for each of `merges`; the last of the `special` tokens ends the text by default."""
    merges = list(merges)
    vocab = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if strip:
        backend.normalizer = normalizers.Strip()
    if trim:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return fast(backend, special, template, eos_token=eos or str(special[-1]), **options)


def chat(*contents: str) -> dict[str, Any]:
    """A record whose messages are the user's and the assistant's in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[index % 2], "content": text} for index, text in enumerate(contents)]}


def show(
    tokenizer: Any, record: dict[str, Any], template: str | None = None, turns: str = "auto", **options: Any
) -> list[str]:
    """The samples of a record, supervised tokens between ⟦ and ⟧, and why turns are not supervised."""
    encoder = Encoder(ChatTemplate(tokenizer, template, **options), turns)
    try:
        samples, found = encoder.encode(normalise(record, "auto", "here"))
    except Unusable as reason:
        return [f"left out: {reason}"]
    shown = [mark(tokenizer, sample.input_ids, sample.loss_mask) for sample in samples]
    return [*shown, *(f"message {turn.index}: {turn.reason}" for turn in found if turn.reason)]


def mark(tokenizer: Any, input_ids: Any, loss_mask: Any) -> str:
    """The decoded text, supervised tokens between ⟦ and ⟧."""
    pieces = []
    for is_supervised, pairs in groupby(zip(loss_mask, input_ids, strict=True), itemgetter(0)):
        text = tokenizer.decode([int(token) for _, token in pairs])
        pieces.append(f"⟦{text}⟧" if is_supervised else text)
    return "".join(pieces)


def load(path: str, tokenizer: "PreTrainedTokenizerFast", **options: Any) -> tuple[PromptDataset, PromptDataset]:
    """`load_prompts` with room for what the tests write."""
    return load_prompts(path, tokenizer, **{"max_length": 200, **options})


ICE = chat("Is water wet?", "Yes, it is.", "And ice?", "Ice is solid.")
IDS = {"input_ids": [5, 6, 7, 8]}
