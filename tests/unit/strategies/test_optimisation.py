"""Which parameters decay."""

import torch
from torch import nn

from lightning_dataflow.strategies.optimisation import adamw


class Draft(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))  # the draft's own, in no submodule
        self.fc = nn.Linear(2, 2)
        self.hidden_norm = nn.LayerNorm(2)


def test_norms_and_biases_do_not_decay():
    named = dict(Draft().named_parameters())
    optimizer = adamw(named.items(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)
    names = {id(parameter): name for name, parameter in named.items()}
    decay = {names[id(one)]: group["weight_decay"] for group in optimizer.param_groups for one in group["params"]}
    assert decay == {"scale": 0.1, "fc.weight": 0.1, "fc.bias": 0.0, "hidden_norm.weight": 0.0, "hidden_norm.bias": 0.0}
