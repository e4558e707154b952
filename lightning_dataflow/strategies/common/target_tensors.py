"""The two tensors that trainers need of the target: its token embedding and its head."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lightning_dataflow.contracts import NotFiniteError, UserError
from lightning_dataflow.data.finite import first_not_finite
from lightning_dataflow.targets.files import find_tensors
from lightning_dataflow.targets.info import TargetInfo, tensor_names
from lightning_dataflow.targets.logits import LogitsTransform

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
"""Their names in a draft."""

Files = Mapping[str, tuple[Path, tuple[int, ...]]]


class FrozenTarget:
    """Token embedding [V, H] and head [V, H] of a target, read from its safetensors without the rest.

    Deliberately not an `nn.Module`: its tensors are neither sharded, nor optimised, nor written into checkpoints. Tied
    embeddings share one tensor.

    Attributes:
        transform: what turns products of the head into logits; None where they are the logits.
    """

    def __init__(self, embedding: Tensor, head: Tensor, transform: LogitsTransform | None = None):
        self.embedding = embedding
        self.head = head
        self.transform = transform

    @classmethod
    def of(cls, info: TargetInfo, dtype: torch.dtype) -> "FrozenTarget":
        """The tensors of a target, under whatever names its architecture gives them.

        Raises:
            UserError: the tensors cannot be found.
            NotFiniteError: the head holds NaN or infinity.
        """
        files = find_tensors(Path(info.path))
        embedding_name, head_name, head_names = _places(info, files)
        embedding = _read(files, embedding_name, dtype)
        head = embedding if head_name is None else _read(files, head_name, dtype)
        if first_not_finite({"head": head}):
            raise NotFiniteError(f"the head of {info.path} holds NaN or infinity: check the target's files")
        bias_name = _bias_name(files, head_name, head_names)
        transform = replace(info.logits, bias=None if bias_name is None else _read(files, bias_name, torch.float32))
        return cls(embedding, head, None if transform.is_identity else transform)

    def to(self, device: torch.device) -> "FrozenTarget":
        """Move both tensors; tied ones stay tied."""
        tied = self.head is self.embedding
        self.embedding = self.embedding.to(device)
        self.head = self.embedding if tied else self.head.to(device)
        if self.transform is not None and self.transform.bias is not None:
            self.transform = replace(self.transform, bias=self.transform.bias.to(device))
        return self


def has_head_bias(info: TargetInfo) -> bool:
    """Whether the target adds a bias to its head's products."""
    files = find_tensors(Path(info.path))
    _, head_name, head_names = _places(info, files)
    return _bias_name(files, head_name, head_names) is not None


def _places(info: TargetInfo, files: Files) -> tuple[str, str | None, list[str]]:
    """Stored names of the embedding and the head (None if there is no head of its own), and the head's in the model."""
    embedding_names, head_names = tensor_names(info.path)
    shape = (info.vocab_size, info.hidden_size)
    embedding = _find(files, embedding_names, shape)
    if embedding is None:
        raise UserError(f"no token embedding in the safetensors of {info.path}, looked for {', '.join(embedding_names)}")
    head = _find(files, head_names, shape)
    others = [name for name, (_, size) in files.items() if size == shape and name != embedding]
    if head is None and len(others) == 1:
        head = others[0]
    if head is None and not info.tie_word_embeddings:
        raise UserError(f"no head in the safetensors of {info.path}, looked for {', '.join(head_names)}")
    return embedding, head, head_names


def _bias_name(files: Files, head_name: str | None, head_names: Sequence[str]) -> str | None:
    biases = [name.removesuffix("weight") + "bias" for name in (head_name, *head_names) if name is not None]
    return next((name for name in biases if name in files), None)


def _find(files: Files, names: Sequence[str], shape: tuple[int, int]) -> str | None:
    """The stored name of a tensor that is called one of `names` in the model.

    Files may name modules by other prefixes than the model does: then it is the only tensor of its shape whose last
    names are the same.
    """
    for name in names:
        if name in files:
            return name
    ends = {".".join(name.split(".")[-2:]) for name in names}
    alike = [name for name, (_, size) in files.items() if ".".join(name.split(".")[-2:]) in ends and size == shape]
    return alike[0] if len(alike) == 1 else None


def _read(files: Files, name: str, dtype: torch.dtype) -> Tensor:
    with safe_open(files[name][0], framework="pt") as file:
        return file.get_tensor(name).to(dtype, copy=True)


def same_tensor(stored: Tensor, ours: Tensor) -> bool:
    """Whether `stored` is `ours`, both rounded to the coarser of their dtypes."""
    coarser = min((stored.dtype, ours.dtype), key=lambda dtype: dtype.itemsize)
    return stored.shape == ours.shape and torch.equal(stored.to(ours.device, coarser), ours.to(coarser))
