"""What a model costs: parameters, FLOPs, energy, and how fast the machine multiplies."""

from moevision.efficiency.cost import (
    FlopCount,
    ModelCost,
    count_flops,
    flop_counter,
    inference_flops,
    measure_cost,
    parameter_counts,
    training_flops,
)
from moevision.efficiency.energy import EnergyMeter, EnergyReading, joules_per_image
from moevision.efficiency.peak import MatmulPeak, copy_bandwidth, matmul_peak

__all__ = [
    "EnergyMeter",
    "EnergyReading",
    "FlopCount",
    "MatmulPeak",
    "ModelCost",
    "copy_bandwidth",
    "count_flops",
    "flop_counter",
    "inference_flops",
    "joules_per_image",
    "matmul_peak",
    "measure_cost",
    "parameter_counts",
    "training_flops",
]
