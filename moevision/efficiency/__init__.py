"""What a model costs: parameters, FLOPs, the share of the machine that it uses, energy."""

from moevision.efficiency.cost import ModelCost, measure_cost, parameter_counts
from moevision.efficiency.counter import count_flops, flop_counter
from moevision.efficiency.flops import FlopCount, inference_flops, training_flops

__all__ = [
    "FlopCount",
    "ModelCost",
    "count_flops",
    "flop_counter",
    "inference_flops",
    "measure_cost",
    "parameter_counts",
    "training_flops",
]
