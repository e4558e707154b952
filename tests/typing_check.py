"""What type checkers see of the public names. Not run: mypy reads it, and refuses an ignore that is not needed."""

from typing import assert_type

import lightning_dataflow as ldf
from lightning_dataflow.strategies.eagle3.module import Eagle3Module
from lightning_dataflow.strategies.spec import StrategySpec

assert_type(ldf.Eagle3Module("target"), Eagle3Module)
assert_type(ldf.resolve_strategy("eagle3"), StrategySpec)
ldf.Nonsense  # type: ignore[attr-defined]  # noqa: B018
