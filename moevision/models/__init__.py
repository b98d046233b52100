"""Vision transformers with MoE layers: conversion, registered names, saving and loading."""

from moevision.models.convert import (
    convert_to_moe,
    dense_twin,
    moe_layer_indices,
    read_layer_indices,
    routes_read,
)
from moevision.models.vit_moe import VisionTransformerMoE

__all__ = [
    "VisionTransformerMoE",
    "convert_to_moe",
    "dense_twin",
    "moe_layer_indices",
    "read_layer_indices",
    "routes_read",
]
