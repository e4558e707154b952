"""Published chat templates: short texts that behave as they do, a tokenizer for each, and conversations to render."""

import re
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lightning_dataflow.prompts.records import Conversation, normalise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "templates"
TODAY = date(2025, 3, 4)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a tokenizer says of its tokens.

    Attributes:
        special: tokens besides those that the template's text shows.
        ends: tokens at which engines stop; the first is the tokenizer's end of sequence.
        inline: thoughts are part of the content.
        next_header: the token that begins the next message ends a turn, by the role of that message.
    """

    ends: tuple[str, ...]
    bos: str | None = None
    special: tuple[str, ...] = ()
    inline: bool = False
    next_header: dict[str, str] = field(default_factory=dict)


IM = Family(ends=("<|im_end|>", "<|endoftext|>"))
DEEPSEEK = Family(ends=("<｜end▁of▁sentence｜>",), bos="<｜begin▁of▁sentence｜>", inline=True)
GEMMA = Family(ends=("<eos>", "<end_of_turn>"), bos="<bos>")
FAMILIES = {
    "llama_3": Family(ends=("<|eot_id|>", "<|end_of_text|>"), bos="<|begin_of_text|>"),
    "llama_3_2": Family(ends=("<|eot_id|>", "<|end_of_text|>"), bos="<|begin_of_text|>"),
    "qwen2_5": IM,
    "qwen3": IM,
    "qwen3_5": IM,
    "gpt_oss": Family(ends=("<|return|>", "<|call|>", "<|endoftext|>")),
    "deepseek_v3": replace(DEEPSEEK, inline=False),
    "deepseek_r1": DEEPSEEK,
    "gemma_2": GEMMA,
    "gemma_3": GEMMA,
    "phi_3": Family(ends=("<|endoftext|>", "<|end|>"), bos="<s>", special=("<|system|>", "<|user|>")),
    "phi_4": Family(ends=("<|im_end|>",), bos="<|endoftext|>"),
    "mistral": Family(ends=("</s>",), bos="<s>", special=("[INST]",)),
    "glm_4": Family(
        ends=("<|endoftext|>", "<|user|>", "<|observation|>"),
        special=("[gMASK]", "<sop>", "<|system|>"),
        next_header={"user": "<|user|>", "tool": "<|observation|>"},
    ),
    "kimi_k2": Family(ends=("<|im_end|>", "[EOS]"), bos="[BOS]", special=("<|im_user|>",)),
    "granite": Family(ends=("<|end_of_text|>",)),
    "smollm3": Family(ends=("<|im_end|>",), inline=True),
    "cohere": Family(ends=("<|END_OF_TURN_TOKEN|>",), bos="<BOS_TOKEN>"),
}
TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
CALL = {"id": "functions.add:0", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}


NAMES = {
    "Llama 3": "llama_3",
    "Llama 3.2": "llama_3_2",
    "Qwen2.5": "qwen2_5",
    "Qwen3": "qwen3",
    "Qwen3.5": "qwen3_5",
    "gpt-oss": "gpt_oss",
    "DeepSeek V3": "deepseek_v3",
    "DeepSeek R1": "deepseek_r1",
    "Gemma 2": "gemma_2",
    "Gemma 3": "gemma_3",
    "Phi 3": "phi_3",
    "Phi 4": "phi_4",
    "Mistral 7B v0.3": "mistral",
    "GLM-4.6": "glm_4",
    "Kimi K2": "kimi_k2",
    "Granite 3.3": "granite",
    "SmolLM3": "smollm3",
    "Command R7B": "cohere",
}
"""As the documentation calls them."""
LEFT_OUT = {
    "llama_3": ("thinking", "tools"),
    "llama_3_2": ("thinking",),
    "qwen2_5": ("thinking",),
    "deepseek_v3": ("thinking", "tools"),
    "deepseek_r1": ("thinking", "tools"),
    "gemma_2": ("thinking", "tools", "system"),
    "gemma_3": ("thinking", "tools"),
    "phi_3": ("thinking", "tools"),
    "phi_4": ("thinking", "tools"),
    "mistral": ("thinking", "system"),
    "kimi_k2": ("thinking",),
    "granite": ("thinking", "tools"),
    "smollm3": ("tools",),
    "cohere": ("thinking",),
}
"""What the templates do not support; the documentation's table has the reasons."""


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


SINGLE = [user("2+2?"), assistant("4")]
MULTI = [*SINGLE, user("3+3?"), assistant("6")]
THINKING = [
    SINGLE[0],
    assistant("4") | {"reasoning_content": "Add."},
    MULTI[2],
    assistant("6") | {"reasoning_content": "So."},
]
INLINE = [SINGLE[0], assistant("<think>\nAdd.\n</think>\n\n4"), MULTI[2], assistant("<think>\nSo.\n</think>\n\n6")]
TOOLS = [
    SINGLE[0],
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "tool_call_id": CALL["id"]},
    assistant("It is 4"),
]
KINDS: dict[str, dict[str, Any]] = {
    "single": {"messages": SINGLE},
    "multi-turn": {"messages": MULTI},
    "thinking": {"messages": THINKING},
    "tools": {"messages": TOOLS, "tools": [TOOL]},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, *SINGLE]},
}
SECOND_CALL = CALL | {"id": "functions.add:1", "function": {"name": "add", "arguments": '{"a": 3}'}}
SECOND_RESULT = {"role": "tool", "content": "5", "tool_call_id": SECOND_CALL["id"]}
CALLS_AT_ONCE = [SINGLE[0], TOOLS[1] | {"tool_calls": [CALL, SECOND_CALL]}, TOOLS[2], SECOND_RESULT, TOOLS[3]]
STEPS = [*TOOLS[:3], TOOLS[1] | {"tool_calls": [SECOND_CALL]}, SECOND_RESULT, TOOLS[3]]
CALL_WITH_THOUGHT = [SINGLE[0], TOOLS[1] | {"reasoning_content": "Call it."}, *TOOLS[2:]]
LONGER: dict[str, dict[str, Any]] = {
    "calls at once": {"messages": CALLS_AT_ONCE, "tools": [TOOL]},
    "steps": {"messages": STEPS, "tools": [TOOL]},
    "call with thought": {"messages": CALL_WITH_THOUGHT, "tools": [TOOL]},
    "question after tools": {"messages": [*CALL_WITH_THOUGHT, *THINKING[2:]], "tools": [TOOL]},
    "ends with a call": {"messages": [*SINGLE, MULTI[2], TOOLS[1]], "tools": [TOOL]},
}
"""Conversations that only some templates support."""


def conversation(family: str, kind: str) -> Conversation:
    record = {"messages": INLINE} if kind == "thinking" and FAMILIES[family].inline else (KINDS | LONGER)[kind]
    sample = normalise(record, "messages", "here")
    assert isinstance(sample, Conversation)
    return sample


@cache
def tokenizer(family: str) -> "PreTrainedTokenizerFast":
    """One token a byte, besides the special ones."""
    from transformers import PreTrainedTokenizerFast

    about, text = FAMILIES[family], (TEMPLATES / f"{family}.jinja").read_text()
    shown = re.findall(r"<[|｜][A-Za-z_▁]+[|｜]>|</?\w+_of_turn>|\[/?[A-Z_]+\]", text)
    special = dict.fromkeys([*about.ends, *about.special, *([about.bos] if about.bos else []), *shown])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=about.ends[0], bos_token=about.bos)
    made.chat_template = text
    return made
