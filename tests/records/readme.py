"""README.md."""

from tests.records import Claim, Definition, accuracy, sparsity
from tests.records.performance import TRAIN, in_lightning, moe

CLAIMS = [
    Claim(
        tuple(accuracy.CIFAR),
        "is right on {mean:.1%} of the test images, the mean of three seeds",
        accuracy.mean,
    ),
    Claim(tuple(accuracy.CATS), "a ViT-S fine-tuned on cats and dogs on {mean:.1%}", accuracy.mean),
    Claim(
        sparsity.FILES,
        "the MoE was {mean:.1f} points above its twin at equal steps ({seeds:.0f} seeds)",
        sparsity.first,
    ),
    Claim(sparsity.FILES, "at equal time not told apart ({seeds:.0f})", sparsity.at_equal_time),
    Claim(sparsity.FILES, "a fixed router, by place in the image, {mean:.1f} above the learned one", sparsity.learned),
    Claim(TRAIN.format("cifar10"), "runs at {twin} times the speed of its dense twin", moe),
    Claim(TRAIN.format("cifar10"), "{ratio} times the images/s of that twin in plain timm and Lightning", in_lightning),
]

DEFINITIONS = [Definition("Apache-2.0", "the licence"), Definition("Python ≥ 3.11", "a version")]
