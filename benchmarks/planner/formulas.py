"""What a training costs on several GPUs under each layout: memory, traffic, time. Formulas only, no torch.

Nothing here is measured. Sizes come from a `ModelShape` (`footprint.shape_of` counts them in a real model), speeds from
a `Machine` (`benchmarks.planner.machine`); README.md has every formula with what it was checked against.

Letters: W GPUs, n the GPUs that share one set of experts (EP n), b images of a GPU and step, T = b·N tokens, R rows of
a MoE layer (T·K where tokens choose K experts), D width, H hidden width, E experts, L blocks, M MoE layers. Bytes and
FLOPs are of one GPU and one optimizer step unless their name says otherwise.

Layouts: DDP (every GPU holds everything), FSDP2 (every GPU holds 1/W of everything), EP n + DDP (experts shared by n
GPUs, the rest everywhere), EP n × FSDP2 (experts shared by n GPUs, and everything cut into W parts).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, gcd, log, sqrt
from typing import Literal

from benchmarks.planner.machine import Machine

Parallel = Literal["ddp", "fsdp"]

FP32_BYTES, _INT64_BYTES = 4, 8
BUCKET_BYTES = 25 * 2**20  # DDP's gradients travel in buckets of 25 MiB (torch's default)
CAST_BYTES = 6  # per parameter: fp32 read and 16 bits written, or the other way round for a gradient
OPTIMIZER_BYTES = 28  # per parameter: AdamW reads weight, gradient and two moments, and writes all but the gradient
PASSES = 4  # an activation is written and read in the forward pass, read and written (its gradient) in the backward
SIMPLER = 1.05  # of the layouts that are at most so much slower than the fastest, the simplest is recommended


# ---- what is planned


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters (not bytes).

    Attributes:
        parameters: all.
        learning: those with a gradient.
        moments: fp32 numbers that the optimizer keeps: 2 · learning for AdamW; Muon keeps 1 for each of a matrix.
    """

    parameters: int
    learning: int
    moments: int


@dataclass(frozen=True)
class MoEShape:
    """One MoE layer.

    Attributes:
        block: index of its block.
        num_experts: E.
        rows_per_image: R of one image: N·K, or the slots of Soft MoE.
        width: D.
        hidden: H.
    """

    block: int
    num_experts: int
    rows_per_image: float
    width: int
    hidden: int


@dataclass(frozen=True)
class ModelShape:
    """What a plan needs to know about a model.

    Attributes:
        name: as it was named.
        image_size: side of the square input in pixels.
        dense: everything but the experts.
        experts: the experts of all MoE layers.
        moe: the MoE layers.
        dense_flops: FLOPs of one image's forward pass without the experts, routers included.
        expert_flops: FLOPs of one image's forward pass through the chosen experts.
        activation_bytes: what autograd keeps of one image for the backward pass, without the experts' rows.
        block_bytes: [L] of these, what is kept in each block.
        block_inputs_bytes: of one image, of all blocks.
        compute_bytes: bytes of a number in which products are computed: 2 (bf16, fp16) or 4.
        recomputed: blocks that keep their input only and are computed again in the backward pass.
    """

    name: str
    image_size: int
    dense: Weights
    experts: Weights
    moe: tuple[MoEShape, ...]
    dense_flops: float
    expert_flops: float
    activation_bytes: float
    block_bytes: tuple[float, ...]
    block_inputs_bytes: float
    compute_bytes: int = 2
    recomputed: tuple[int, ...] = ()

    @property
    def depth(self) -> int:
        """L."""
        return len(self.block_bytes)

    @property
    def row_bytes(self) -> float:
        """What autograd keeps of one image's rows."""
        return sum(map(self.row_bytes_of, self.moe))

    def row_bytes_of(self, layer: MoEShape) -> float:
        """Of one layer.

        Input and output [R, D], hidden [R, H] before and after the activation; and for two biases each row's expert.
        """
        return layer.rows_per_image * (self.compute_bytes * 2 * (layer.width + layer.hidden) + 2 * _INT64_BYTES)

    def kept_bytes(self) -> tuple[float, float]:
        """What is kept of one image for the backward pass: activations, rows.

        Of the blocks that are computed again their input, and all of the largest one, one at a time.
        """
        rows = {layer.block: self.row_bytes_of(layer) for layer in self.moe}
        again = self.recomputed
        kept, its_rows = self.activation_bytes, self.row_bytes
        if again:
            largest = max(again, key=lambda block: self.block_bytes[block] + rows.get(block, 0))
            kept += self.block_inputs_bytes * len(again) / self.depth
            kept -= sum(self.block_bytes[block] for block in again if block != largest)
            its_rows -= sum(rows.get(block, 0) for block in again if block != largest)
        return kept, its_rows

    @property
    def recomputed_experts(self) -> float:
        """Share of the rows that are computed again."""
        again = sum(self.row_bytes_of(layer) for layer in self.moe if layer.block in self.recomputed)
        return again / self.row_bytes if self.moe else 0.0

    def sent_by(self, layer: MoEShape) -> float:
        """Bytes of one image's rows [R, D] that one all-to-all of a MoE layer moves."""
        return self.compute_bytes * layer.rows_per_image * layer.width


@dataclass(frozen=True)
class Layout:
    """How a training is spread over GPUs.

    Attributes:
        parallel: `ddp` or `fsdp`, as `fit --parallel` has it.
        expert: n, as `fit --parallel.expert` has it; 1: every GPU (or every shard) has all experts.
        offload: whether weights, gradients and moments are in main memory, as `fit --parallel.offload` has it. Only
            memory is known of it, not time.
    """

    parallel: Parallel = "ddp"
    expert: int = 1
    offload: bool = False

    @property
    def name(self) -> str:
        """As people write it."""
        if self.expert == 1:
            return "DDP" if self.parallel == "ddp" else "FSDP2"
        return f"EP {self.expert} + DDP" if self.parallel == "ddp" else f"EP {self.expert} x FSDP2"

    @property
    def complexity(self) -> tuple[bool, bool]:
        """Sorts layouts from simple to involved."""
        return self.expert > 1, self.parallel == "fsdp"


@dataclass(frozen=True)
class Job:
    """A training: how many GPUs, how many images, how unequal the experts' loads.

    Attributes:
        gpus: W.
        batch: images of one optimizer step on all GPUs together.
        accumulate: parts in which a GPU computes its share of the batch.
        cv: coefficient of variation of the experts' loads in a batch (standard deviation over mean).
        loads: [M][E] counts of an evaluation, in place of `cv`; empty if there are none.
        ema: whether a moving average of the weights is kept.
        snapshots: how many snapshots the guard keeps in main memory.
    """

    gpus: int
    batch: int
    accumulate: int = 1
    cv: float = 0.1
    loads: tuple[tuple[float, ...], ...] = ()
    ema: bool = False
    snapshots: int = 2

    @property
    def images_per_gpu(self) -> float:
        """Images of one GPU and step."""
        return self.batch / self.gpus

    def in_more_parts(self) -> Iterator[Job]:
        """The job with a GPU's images in more and more parts, each of as many images."""
        images = int(self.images_per_gpu)
        return (replace(self, accumulate=n) for n in range(self.accumulate + 1, images + 1) if images % n == 0)


def layouts(shape: ModelShape, gpus: int) -> list[Layout]:
    """All layouts of a model on W GPUs: n divides both W and every E."""
    if gpus == 1:
        return [Layout()]
    shared = gcd(gpus, *(layer.num_experts for layer in shape.moe)) if shape.moe else 1
    sizes = [n for n in range(2, shared + 1) if shared % n == 0]
    return [Layout("ddp"), Layout("fsdp"), *(Layout(kind, n) for kind in ("ddp", "fsdp") for n in sizes)]


# ---- waiting for the busiest GPU


def busiest_over_mean(shape: ModelShape, job: Job, expert: int) -> float:
    """λ: rows of the busiest of the n GPUs over their mean; 1 without expert parallelism.

    From loads: experts lie on GPUs in order, E/n each; the mean over the MoE layers of the largest sum over the mean
    sum. From a CV: independent loads of E/n experts each, of which the largest of n is about √(2 ln n) deviations above
    the mean: 1 + CV · √(n/E) · √(2 ln n).
    """
    if expert == 1 or not shape.moe:
        return 1.0
    if job.loads:
        return sum(rank_imbalance(load, expert) for load in job.loads) / len(job.loads)
    experts = max(layer.num_experts for layer in shape.moe)
    return 1 + job.cv * sqrt(expert / experts) * sqrt(2 * log(expert))


def rank_imbalance(load: Sequence[float], expert: int) -> float:
    """Largest over mean of the loads of n GPUs that hold E/n neighbouring experts each."""
    each = len(load) // expert
    sums = [sum(load[first : first + each]) for first in range(0, len(load), each)]
    return max(sums) / (sum(sums) / len(sums))


# ---- memory


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, and in the main memory of its process.

    Attributes:
        weights: fp32 weights that this GPU owns, and their moving average.
        gradients: fp32 gradients of them.
        optimizer: its moments.
        copies: 16-bit copies of the weights that autocast keeps for the backward pass, or FSDP's gathered blocks.
        buckets: DDP's buckets, a second copy of the gradients.
        activations: what autograd keeps, without rows.
        rows: what it keeps of the experts' rows, on the busiest GPU.
        snapshots: the guard's, in main memory: of weights, moments and average.
        offload: whether weights, gradients and moments are in main memory too.
    """

    weights: float
    gradients: float
    optimizer: float
    copies: float
    buckets: float
    activations: float
    rows: float
    snapshots: float
    offload: bool = False

    @property
    def states(self) -> float:
        """What is there in every layout and precision, however small the batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """On the GPU."""
        states = 0.0 if self.offload else self.states
        return states + self.copies + self.buckets + self.activations + self.rows


def memory(shape: ModelShape, layout: Layout, job: Job) -> Memory:
    """Peak memory of a training step; temporary buffers of kernels and collectives are not in it."""
    dense, experts = shape.dense, shape.experts
    low = shape.compute_bytes if shape.compute_bytes < FP32_BYTES else 0  # fp32 weights are used as they are
    if layout.parallel == "fsdp" or layout.expert > 1:
        # FSDP2's units, also where every GPU keeps the whole of them: two blocks gathered, this one and the next, and
        # the fp32 gradient of one before it is scattered; and what autocast keeps in 16 bits of what is gathered in 32.
        block = (2 * FP32_BYTES + FP32_BYTES) * dense.parameters / shape.depth
        if shape.moe:
            block += (2 * shape.compute_bytes + FP32_BYTES) * experts.parameters / len(shape.moe) / layout.expert
        copies, buckets = low * dense.parameters + block, 0.0
    else:
        copies = low * (dense.parameters + experts.parameters)
        buckets = FP32_BYTES * (dense.learning + experts.learning) if job.gpus > 1 else 0.0

    weights, gradients, optimizer = state_bytes(dense, experts, layout, job.gpus, ema=job.ema)
    images = job.images_per_gpu / job.accumulate
    activations, rows = shape.kept_bytes()
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        copies=copies,
        buckets=buckets,
        activations=images * activations,
        rows=images * rows * busiest_over_mean(shape, job, layout.expert),
        snapshots=job.snapshots * (weights + optimizer),
        offload=layout.offload,
    )


def state_bytes(
    dense: Weights, experts: Weights, layout: Layout, gpus: int, *, ema: bool = False
) -> tuple[float, float, float]:
    """Bytes of weights (with their moving average), gradients and moments that one GPU keeps, all in fp32."""
    weights, gradients, moments = (
        FP32_BYTES * _owned(getattr(dense, name), getattr(experts, name), layout, gpus)
        for name in ("parameters", "learning", "moments")
    )
    return weights * (2 if ema else 1), gradients, moments


def _owned(dense: int, experts: int, layout: Layout, gpus: int) -> float:
    """Of so many numbers, those that one GPU keeps."""
    return (dense + experts) / gpus if layout.parallel == "fsdp" else dense + experts / layout.expert


# ---- traffic


@dataclass(frozen=True)
class Collective:
    """One kind of collective in one step of one GPU.

    Attributes:
        kind: `all_reduce`, `all_gather`, `reduce_scatter` or `all_to_all`.
        what: `dense` weights, `expert` weights, or `rows`.
        bytes_per_step: sent by one GPU, as a ring does it: (g - 1)/g of the tensor, twice for an all-reduce.
        calls: collectives that are started.
        messages: sent by one GPU: g - 1 for each call, twice for an all-reduce.
        seconds: at the bandwidth of its slowest link, without latency.
    """

    kind: Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
    what: Literal["dense", "expert", "rows"]
    bytes_per_step: float
    calls: int
    messages: int
    seconds: float


def traffic(shape: ModelShape, layout: Layout, job: Job, machine: Machine) -> list[Collective]:
    """Every collective of a step; empty on one GPU."""
    n, gpus, moe = layout.expert, job.gpus, len(shape.moe)
    dense, experts = shape.dense.learning, shape.experts.learning / n
    found: list[Collective] = []
    if layout.parallel == "ddp" and n == 1:
        in_buckets = FP32_BYTES * (dense + experts)
        found.append(_all_reduce("dense", in_buckets, gpus, 1, ceil(in_buckets / BUCKET_BYTES), machine))
    elif layout.parallel == "ddp":  # FSDP2's units, of which every GPU keeps the whole, in each part of the batch
        times = job.accumulate
        found.append(_all_reduce("dense", times * FP32_BYTES * dense, gpus, 1, times * (shape.depth + 1), machine))
        found.append(_all_reduce("expert", times * FP32_BYTES * experts, gpus // n, n, times * moe, machine))
    else:
        # Everything outside of blocks is a unit of its own; frozen weights are gathered, and have no gradient.
        found += _sharded("dense", shape.dense, FP32_BYTES, 1, gpus, shape.depth + 1, job, machine)
        if moe:
            found += _sharded("expert", shape.experts, shape.compute_bytes, n, gpus, moe, job, machine)
    if n > 1:
        found.append(_all_to_all(shape, n, job, machine))
    return [collective for collective in found if collective.messages > 0]


def _all_reduce(
    what: Literal["dense", "expert"], size: float, group: int, stride: int, calls: int, machine: Machine
) -> Collective:
    seconds = 2 * ring_seconds(size, group, stride, machine)
    sent = 2 * size * (group - 1) / group
    return Collective("all_reduce", what, sent, calls, 2 * (group - 1) * calls, seconds)


def _sharded(
    what: Literal["dense", "expert"],
    weights: Weights,
    gathered_bytes: int,
    parts: int,
    gpus: int,
    tensors: int,
    job: Job,
    machine: Machine,
) -> list[Collective]:
    """FSDP: weights are gathered for the forward and for the backward pass, gradients scattered, for each micro-batch.

    A number is gathered in `gathered_bytes` and reduced in fp32. `parts`: every GPU has one part of the weights, which
    as many others share.
    """
    times, group, stride = job.accumulate, gpus // parts, parts
    gathered = 2 * times * gathered_bytes * weights.parameters / parts
    scattered = times * FP32_BYTES * weights.learning / parts
    share = (group - 1) / group
    return [
        Collective(
            "all_gather",
            what,
            gathered * share,
            2 * times * tensors,
            2 * times * tensors * (group - 1),
            ring_seconds(gathered, group, stride, machine),
        ),
        Collective(
            "reduce_scatter",
            what,
            scattered * share,
            times * tensors,
            times * tensors * (group - 1),
            ring_seconds(scattered, group, stride, machine),
        ),
    ]


def _all_to_all(shape: ModelShape, expert: int, job: Job, machine: Machine) -> Collective:
    """Rows to the experts and back, forward and backward: 4 · R · D · bytes a layer; and once the numbers of rows.

    (n - 1)/n of them leave the GPU, if the choices are spread evenly over the GPUs.
    """
    size = 4 * job.images_per_gpu * sum(map(shape.sent_by, shape.moe))  # of all rows, before some of them stay
    inside = min(expert, machine.gpus_per_node)
    near, far = (inside - 1) / expert, (expert - inside) / expert
    seconds = max(size * near / machine.link_bytes_per_s, size * far / machine.network_bytes_per_s)
    calls = 5 * len(shape.moe) * job.accumulate
    return Collective("all_to_all", "rows", size * (near + far), calls, calls * (expert - 1), seconds)


def ring_seconds(size: float, group: int, stride: int, machine: Machine) -> float:
    """Time to gather or scatter a tensor of `size` bytes over g GPUs, every `stride`-th, without latency.

    Inside a node over the link; between nodes each GPU sends its part over its own network card. The slower one counts.
    """
    inside = max(1, min(group, machine.gpus_per_node // stride))
    nodes = group / inside
    within = size * (inside - 1) / inside / machine.link_bytes_per_s
    between = size / inside * (nodes - 1) / nodes / machine.network_bytes_per_s
    return max(within, between)


# ---- time


@dataclass(frozen=True)
class Plan:
    """One layout of one job: what it needs and how long a step takes.

    Attributes:
        layout: which.
        job: the job, with the accumulation that was chosen.
        memory: of one GPU.
        collectives: of one GPU and step.
        compute_ms: products and memory traffic of forward and backward, as with equal loads.
        wait_ms: what the busiest GPU's experts, and its rows on the links, take longer.
        cast_ms: weights to 16 bits, gradients back.
        exposed_ms: collectives that nothing hides.
        all_to_all_ms: rows to the experts and back.
        optimizer_ms: the optimizer.
        images_per_s: of all GPUs.
        mfu: useful FLOPs over the peak; over what matrix products reach, where no peak is known.
        fits: whether the memory suffices.
        busiest_over_mean: λ.
    """

    layout: Layout
    job: Job
    memory: Memory
    collectives: list[Collective]
    compute_ms: float
    wait_ms: float
    cast_ms: float
    exposed_ms: float
    all_to_all_ms: float
    optimizer_ms: float
    images_per_s: float
    mfu: float
    fits: bool
    busiest_over_mean: float

    @property
    def name(self) -> str:
        """The layout as people write it."""
        return self.layout.name if self.job.gpus > 1 else "one GPU"

    @property
    def step_ms(self) -> float:
        """One optimizer step."""
        parts = (self.compute_ms, self.wait_ms, self.cast_ms, self.exposed_ms, self.all_to_all_ms, self.optimizer_ms)
        return sum(parts)

    def bytes_of(self, kind: str) -> float:
        """Bytes that one GPU sends in one step by one kind of collective."""
        return sum(each.bytes_per_step for each in self.collectives if each.kind == kind)


def plan(shape: ModelShape, layout: Layout, job: Job, machine: Machine) -> Plan:
    """The cost of one layout, in the fewest parts of the batch that fit into the memory; in one part if none do."""
    for tried in (job, *job.in_more_parts()):
        found = _plan(shape, layout, tried, machine)
        if found.fits:
            return found
    return _plan(shape, layout, job, machine)


def _plan(shape: ModelShape, layout: Layout, job: Job, machine: Machine) -> Plan:
    images, busiest = job.images_per_gpu, busiest_over_mean(shape, job, layout.expert)
    again = len(shape.recomputed) / shape.depth
    dense_s = images * _compute_s(shape.dense_flops, shape.activation_bytes, again, machine)
    expert_s = images * _compute_s(shape.expert_flops, shape.row_bytes, shape.recomputed_experts, machine)
    collectives = traffic(shape, layout, job, machine)
    to_experts = [each for each in collectives if each.kind == "all_to_all"]
    others = [each for each in collectives if each.kind != "all_to_all"]
    rows_s = sum(each.seconds for each in to_experts)
    moved_s = sum(each.seconds + each.calls * machine.latency_s for each in others)
    # DDP's gradients travel during the backward pass, two thirds of the compute.
    hidden_s = machine.overlap * (dense_s + expert_s) * (1 if layout.parallel == "fsdp" else 2 / 3)
    learning = _owned(shape.dense.learning, shape.experts.learning, layout, job.gpus)
    parts = {
        "compute_ms": dense_s + expert_s,
        "wait_ms": (busiest - 1) * (expert_s + rows_s),
        "cast_ms": job.accumulate * _copied_bytes(shape, layout, job) / machine.memory_bytes_per_s,
        "exposed_ms": max(0.0, moved_s - hidden_s),
        "all_to_all_ms": rows_s + sum(each.calls for each in to_experts) * machine.latency_s,
        "optimizer_ms": OPTIMIZER_BYTES * learning / machine.memory_bytes_per_s,
    }
    step_s = sum(parts.values())
    needed, useful = memory(shape, layout, job), 3 * images * (shape.dense_flops + shape.expert_flops)
    return Plan(
        layout=layout,
        job=job,
        memory=needed,
        collectives=collectives,
        **{name: 1e3 * seconds for name, seconds in parts.items()},
        images_per_s=job.batch / step_s,
        mfu=useful / step_s / (machine.peak_flops or machine.matmul_flops),
        fits=needed.total <= machine.usable * machine.memory_bytes,
        busiest_over_mean=busiest,
    )


def _compute_s(flops: float, kept_bytes: float, again: float, machine: Machine) -> float:
    """One image, forward and backward: products take 3 · FLOPs, all between them `PASSES` times the activations.

    `again`: share of the forward pass that checkpointing computes a second time.
    """
    forwards, passes = 3 + again, PASSES * (1 + again / 2)
    return forwards * flops / machine.matmul_flops + passes * kept_bytes / machine.memory_bytes_per_s


def _copied_bytes(shape: ModelShape, layout: Layout, job: Job) -> float:
    """Read and written to bring weights to 16 bits and gradients back; under FSDP also to lay out gathered blocks."""
    casts = shape.compute_bytes < FP32_BYTES
    dense, experts = shape.dense.parameters, shape.experts.parameters / layout.expert
    if layout.parallel == "ddp":
        return 2 * CAST_BYTES * (dense + experts) if casts else 0.0
    # Each gathered tensor is read and written once more, in both passes; the gradient on its way to be scattered.
    of_experts = 2 * 2 * shape.compute_bytes + shape.compute_bytes + FP32_BYTES
    gathered = (2 * 2 * FP32_BYTES + 2 * FP32_BYTES) * dense + of_experts * experts
    if not casts:
        return gathered
    # What is gathered in 32 bits is cast as under DDP; experts are cast before, the part that is owned.
    owned = _owned(0, shape.experts.parameters, layout, job.gpus)
    return gathered + 2 * CAST_BYTES * dense + CAST_BYTES * owned


# ---- what to do


def recommend(plans: Sequence[Plan]) -> Plan | None:
    """The simplest layout that fits and is at most 5 % slower than the fastest that fits; None if none fits."""
    fitting = [each for each in plans if each.fits]
    if not fitting:
        return None
    fastest = min(each.step_ms for each in fitting)
    near = [each for each in fitting if each.step_ms <= SIMPLER * fastest]
    return min(near, key=lambda each: (each.layout.complexity, each.step_ms))


def verdict_on_experts(plans: Sequence[Plan]) -> str | None:
    """Whether expert parallelism pays, in a sentence; None where there is no such layout."""

    def best(apart: bool) -> Plan | None:
        chosen = [each for each in plans if each.fits and (each.layout.expert > 1) is apart]
        return min(chosen, key=lambda each: each.step_ms, default=None)

    if not any(each.layout.expert > 1 for each in plans):
        return None
    with_it, without = best(True), best(False)
    if with_it is None:
        return "No layout with expert parallelism fits."
    if without is None:
        return f"Without expert parallelism nothing fits; {with_it.name} does."
    said = f"{with_it.name} takes {with_it.step_ms:.1f} ms a step, {without.name} {without.step_ms:.1f}."
    gain = without.step_ms / with_it.step_ms
    if gain >= SIMPLER:
        return f"Expert parallelism pays here ({gain:.2f} times as fast): {said}"
    return f"Expert parallelism does not pay here: {said}"
