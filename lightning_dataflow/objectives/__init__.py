"""Loss sums of each algorithm: functions of tensors, without modules or trainers."""

from lightning_dataflow.objectives.block_labels import BlockLabels
from lightning_dataflow.objectives.dflash import DFlashObjective
from lightning_dataflow.objectives.domino import DominoObjective
from lightning_dataflow.objectives.eagle3 import Eagle3Objective, supervised_positions
from lightning_dataflow.objectives.sums import ObjectiveSums, Quotient

__all__ = [
    "BlockLabels",
    "DFlashObjective",
    "DominoObjective",
    "Eagle3Objective",
    "ObjectiveSums",
    "Quotient",
    "supervised_positions",
]
