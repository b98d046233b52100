"""What a model costs: parameters, FLOPs, the share of the machine that it uses, energy."""

from moevision.efficiency.cost import ModelCost, measure_cost, parameter_counts
from moevision.efficiency.counter import count_flops, flop_counter
from moevision.efficiency.energy import EnergyMeter, EnergyReading, energy_to_accuracy, joules_per_image
from moevision.efficiency.flops import FlopCount, inference_flops, training_flops
from moevision.efficiency.peak import MatmulPeak, copy_bandwidth, matmul_peak, model_flops_utilization

__all__ = [
    "EnergyMeter",
    "EnergyReading",
    "FlopCount",
    "MatmulPeak",
    "ModelCost",
    "copy_bandwidth",
    "count_flops",
    "energy_to_accuracy",
    "flop_counter",
    "inference_flops",
    "joules_per_image",
    "matmul_peak",
    "measure_cost",
    "model_flops_utilization",
    "parameter_counts",
    "training_flops",
]
