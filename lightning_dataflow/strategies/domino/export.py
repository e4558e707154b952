"""Domino's folders: DFlash's, with a projector. SGLang serves them; vLLM does not."""

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning_dataflow.contracts import UserError
from lightning_dataflow.strategies.dflash.export import DFlashExport
from lightning_dataflow.strategies.published.contract import Config, DraftDescription
from lightning_dataflow.strategies.published.engines import Engine
from lightning_dataflow.strategies.published.fields import Allowed, Fields

SERVED_PREFIX_LEN = 1
"""SGLang leaves the first drafted token uncorrected, whatever a folder says."""


class DominoExport(DFlashExport):
    """See DFlashExport."""

    served_as: ClassVar[Mapping[str, str]] = {"sglang": "DFLASH"}
    marks: ClassVar[Mapping[str, Any]] = {"projector_type": "domino"}
    supported: ClassVar[Allowed] = {**DFlashExport.supported, "projector_type": ("domino",)}

    def check(self, draft: DraftDescription, engine: Engine) -> None:
        super().check(draft, engine)
        prefix_len = draft.network.pure_draft_prefix_len
        if prefix_len != SERVED_PREFIX_LEN:
            raise UserError(
                f"SGLang serves Domino drafts with pure_draft_prefix_len={SERVED_PREFIX_LEN} only, this one has "
                f"{prefix_len}: train with strategy.pure_draft_prefix_len={SERVED_PREFIX_LEN}"
            )

    def head_fields(self, network: Any) -> Config:
        names = ("shift_label", "pure_draft_prefix_len", "gru_hidden_dim", "emb_dim")
        return {**self.marks, **{name: getattr(network, name) for name in names}}

    def read(self, fields: Fields, engine: Engine) -> tuple[dict[str, Any], tuple[int, ...] | None]:
        sizes, ids = super().read(fields, engine)
        sizes |= {name: fields.count(name) for name in ("gru_hidden_dim", "emb_dim")}
        sizes["pure_draft_prefix_len"] = fields.count("pure_draft_prefix_len", least=0)
        sizes["shift_label"] = bool(fields.get("shift_label"))
        return sizes, ids

    def card_rows(self, network: Any) -> dict[str, object]:
        sizes = f"{network.gru_hidden_dim}, {network.emb_dim}"
        return super().card_rows(network) | {"GRU size, rank": sizes, "shifted labels": network.shift_label}
