"""Fixtures for tests of prompts: a tokenizer with ChatML's special tokens, and files of records."""

import json

import pytest

from tests.unit.prompts.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def im():
    return byte_tokenizer()


@pytest.fixture
def write(tmp_path):
    """write(records or lines…, name=…) → the path of a JSONL file."""

    def records(*lines, name: str = "prompts.jsonl") -> str:
        file = tmp_path / name
        file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return str(file)

    return records
