"""One run: heads, experts and dense models of a set of domains, all from the same tokens of the frozen trunk.

Axes: I images, B images of a batch, N tokens, D width, F features, C classes of the set, M domains.
"""

from __future__ import annotations

import copy
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from benchmarks.harness import HERE, about
from benchmarks.modular.domains import DOMAINS, FIRST, SETS, Images, Job, images_of, owners, summary, trunk_of
from benchmarks.subject import Subject, TrainingStep
from moevision.files import file_sha256

Record = Mapping[str, Any]
PROTOCOL = HERE / "modular" / "protocol.md"
BATCH, PASSES, EXPERT = 32, 3, {"lr": 1e-3}
HEAD_BATCH, HEAD_PASSES, MORE_PASSES, HEAD = 128, 10, 40, {"lr": 3e-3}
REPLAYED = 0.1  # of an earlier domain's rows, a quarter of every batch
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"  # a class each


# ---- what is trained


class Head(nn.Module):
    """A classifier of pooled features: [B, F] -> logits [B, C]."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return cast(Tensor, self.head(x))

    def no_weight_decay(self) -> set[str]:
        """Nothing but the bias."""
        return set()


class Tail(Head):
    """The trunk's blocks from `FIRST` on with MLPs of its own, its norm and a head: tokens [B, N, D] -> logits [B, C].

    The head starts as one that was trained on the frozen trunk. Attention and norms stay as they are.
    """

    def __init__(self, vit: nn.Module, start: nn.Linear) -> None:
        super().__init__(start.in_features, start.out_features)
        self.blocks, self.norm = copy.deepcopy(cast(Any, vit).blocks[FIRST:]), copy.deepcopy(cast(Any, vit).norm)
        self.blocks.requires_grad_(False)
        self.norm.requires_grad_(False)
        self.mlps = [block.mlp.requires_grad_(True) for block in self.blocks]
        self.head.load_state_dict(start.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        for block in self.blocks:
            x = block(x)
        return super().forward(summary(self.norm(x)))


def fit(net: Head, x: Tensor, labels: Tensor, order: Tensor, optim: dict[str, float], batch: int, seed: int) -> None:
    """Train in place on rows of x [I, ...] in this order, a batch after another."""
    torch.manual_seed(seed)
    steps = len(order) // batch
    step = TrainingStep(Subject("modular", {}, optim, batch_size=batch), net=net, total_steps=steps)
    for rows in order[: steps * batch].split(batch):
        step(x[rows].float(), labels[rows])
    net.eval()


def shuffled(rows: Tensor, passes: int, seed: int) -> Tensor:
    """So many passes over the rows [I], each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([rows[torch.randperm(len(rows), generator=generator)] for _ in range(passes)])


def with_replay(new: Tensor, old: Tensor, seed: int) -> Tensor:
    """All `new` rows, three quarters of every batch, and rows drawn from `old`; only new ones where none is old."""
    order = shuffled(new, PASSES, seed)
    if not len(old):
        return order
    parts = order[: len(order) // (each := BATCH * 3 // 4) * each].view(-1, each)
    drawn = torch.randint(len(old), (len(parts), BATCH - each), generator=torch.Generator().manual_seed(seed))
    return torch.cat([parts, old[drawn]], 1).flatten()


@torch.inference_mode()
def logits_of(net: Head, x: Tensor) -> Tensor:
    """[I, C] of tokens or features x [I, ...]."""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([net(part.float()).float() for part in x.split(64)])


# ---- the router of images, and a classifier without training


class Lda(NamedTuple):
    """Linear discriminants of groups with one covariance: features x [I, F] -> x W' + b [I, groups]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Log of each group's density, up to what all groups share."""
        return x.double() @ self.weight.T + self.bias


def fit_lda(x: Tensor, groups: Tensor, shrink: float) -> Lda:
    """Of features x [I, F] with groups [I]; the covariance is mixed with `shrink` of its mean variance."""
    x = x.double()
    means = torch.stack([x[groups == group].mean(0) for group in range(int(groups.max()) + 1)])
    rest = x - means[groups]
    covariance = rest.T @ rest / len(x)
    diagonal = torch.eye(len(covariance), dtype=x.dtype) * covariance.diagonal().mean()
    weight = torch.linalg.solve((1 - shrink) * covariance + shrink * diagonal, means.T).T
    return Lda(weight, -0.5 * (weight * means).sum(1))


class Candidate(NamedTuple):
    """A router: which features it reads, how it tells a domain, and its shrinkage."""

    reads: str
    tells: str
    shrink: float

    @property
    def name(self) -> str:
        """In tables."""
        return f"{self.tells}, {self.reads}, {self.shrink:g}"


SHRINKS = (0.03, 0.1, 0.3)
CANDIDATES = [
    Candidate(reads, tells, shrink)
    for reads in ("before the experts", "at the end")
    for tells in ("all classes", "nearest class", "domains")
    for shrink in SHRINKS
]
"""In the order in which the first of equals is taken. Nearest: by the Mahalanobis distance of class means."""


def read_by(candidate: Candidate, seen: Tensor) -> Tensor:
    """The half of seen [I, 4 D] that it reads."""
    half = seen.shape[1] // 2
    return seen[:, :half] if candidate.reads == "before the experts" else seen[:, half:]


def routed(candidate: Candidate, train: Images, owner: Tensor, seen: Tensor) -> Tensor:
    """The domain [I] of each of seen [I, 4 D]; the classes of `train` belong to domains `owner` [C]."""
    by_domain = candidate.tells == "domains"
    scores = fit_lda(
        read_by(candidate, train.seen), train.domains if by_domain else train.labels, candidate.shrink
    )(read_by(candidate, seen))  # fmt: skip
    if by_domain:
        return scores.argmax(1)
    if candidate.tells == "nearest class":
        return owner[scores.argmax(1)]
    return torch.stack([scores[:, owner == each].logsumexp(1) for each in owner.unique()], 1).argmax(1)


def by_domain(right: Tensor, domains: Tensor) -> Tensor:
    """[M] mean of right [I] over each domain's images."""
    return torch.stack([right[domains == each].double().mean() for each in domains.unique()])


def answers(logits: Tensor, owner: Tensor, domains: Tensor | None = None) -> Tensor:
    """The class [I] of logits [I, C]; of each image's domain [I] alone if given."""
    if domains is not None:
        logits = logits.masked_fill(owner != domains[:, None], -torch.inf)
    return logits.argmax(1)


# ---- a run


def run_job(job: Job, options: Namespace) -> dict[str, Any]:
    """Do one run; its record."""
    origin = {**about(), "command": "python -m benchmarks modular run", "protocol_sha256": file_sha256(PROTOCOL)}
    names, vit = SETS[job.set], cast(Any, trunk_of(options))
    owner, last = owners(names), len(names) - 1
    train, val, test = (images_of(names, split, options) for split in ("train", "val", "test"))
    cpu: dict[str, float] = {}

    with clocked(cpu, "router"):
        shares = [
            float(by_domain(routed(each, train, owner, val.seen) == val.domains, val.domains).mean())
            for each in CANDIDATES
        ]
        router = CANDIDATES[shares.index(max(shares))]
        to = routed(router, train, owner, test.seen)
    old = Images(*(part[train.domains < last] for part in train))
    earlier = routed(router, old, owner[owner < last], test.seen)  # before the last domain is there

    (_, ends), (_, val_ends), (_, test_ends) = (each.seen.chunk(2, 1) for each in (train, val, test))
    with clocked(cpu, "no training"):
        tried = {shrink: fit_lda(ends, train.labels, shrink) for shrink in SHRINKS}
        closed = max(tried.values(), key=lambda lda: float((lda(val_ends).argmax(1) == val.labels).double().mean()))

    def rows(domain: int) -> Tensor:
        return (train.domains == domain).nonzero().flatten()

    def head_of(order: Tensor, classes: Tensor, passes: int = HEAD_PASSES) -> Head:
        """A head for these classes of the set, on the frozen trunk."""
        torch.manual_seed(job.seed)
        head, order = Head(ends.shape[1], len(classes)), shuffled(order, passes, job.seed)
        fit(head, ends, train.labels - classes[0], order, HEAD, HEAD_BATCH, job.seed)
        return head

    classes_of = [(owner == domain).nonzero().flatten() for domain in range(len(names))]
    everything = torch.arange(len(train.labels))
    with clocked(cpu, "heads"):
        heads = [head_of(rows(domain), classes) for domain, classes in enumerate(classes_of)]
    with clocked(cpu, "one head"):
        one = head_of(everything, torch.arange(len(owner)))

    there, few, chosen = test.domains < last, owner < last, list[str]()
    if job.trains == "experts":
        head_logits = torch.cat([logits_of(head, test_ends) for head in heads], 1)
        joined_logits = torch.full_like(head_logits, -torch.inf)
        for domain, classes in enumerate(classes_of):
            with clocked(cpu, f"expert {domain}"):
                expert, order = Tail(vit, heads[domain].head), shuffled(rows(domain), PASSES, job.seed)
                fit(expert, train.tokens, train.labels - classes[0], order, EXPERT, BATCH, job.seed)
            asked = ((to == domain) | (test.domains == domain) | (earlier == domain)).nonzero().flatten()
            joined_logits[asked[:, None], classes] = logits_of(expert, test.tokens[asked])
        predicted = {
            "joined": answers(joined_logits, owner, to),
            "heads only": answers(head_logits, owner, to),
            "no training": closed(test_ends).argmax(1),
            "one head": answers(logits_of(one, test_ends), owner),
            "joined, domain given": answers(joined_logits, owner, test.domains),
            "heads only, domain given": answers(head_logits, owner, test.domains),
        }
        before = {
            "joined": answers(joined_logits[:, few], owner[few], earlier),
            "heads only": answers(head_logits[:, few], owner[few], earlier),
        }
    elif job.trains == "heads":
        best = []
        for domain, classes in enumerate(classes_of):
            own, inside = rows(domain), val.domains == domain
            with clocked(cpu, f"tuned head {domain}"):
                heads_tried: dict[str, Callable[[Tensor], Tensor]] = {
                    f"trained, {passes} passes": partial(logits_of, head_of(own, classes, passes))
                    for passes in (HEAD_PASSES, MORE_PASSES)
                }
                for shrink in SHRINKS:
                    heads_tried[f"closed form, {shrink:g}"] = fit_lda(ends[own], train.labels[own] - classes[0], shrink)
                right = {
                    name: int((head(val_ends[inside]).argmax(1) == val.labels[inside] - classes[0]).sum())
                    for name, head in heads_tried.items()
                }
            chosen.append(max(right, key=lambda name: right[name]))
            best.append(heads_tried[chosen[-1]](test_ends).double())
        tuned_logits = torch.cat(best, 1)
        more = head_of(everything, torch.arange(len(owner)), MORE_PASSES)
        predicted = {
            "heads only, tuned": answers(tuned_logits, owner, to),
            "one head, tuned": answers(logits_of(more, test_ends), owner),
            "heads only, tuned, domain given": answers(tuned_logits, owner, test.domains),
        }
        before = {"heads only, tuned": answers(tuned_logits[:, few], owner[few], earlier)}
    else:
        with clocked(cpu, "dense joint"):
            joint, order = Tail(vit, one.head), shuffled(everything, PASSES, job.seed)
            fit(joint, train.tokens, train.labels, order, EXPERT, BATCH, job.seed)
        joint_logits = logits_of(joint, test.tokens)
        # One domain after another: a domain's head comes with it, and classes to come can't be answered.
        dense, memory = Tail(vit, one.head), torch.empty(0, dtype=torch.int64)
        with torch.no_grad():
            dense.head.weight.zero_()
            dense.head.bias.fill_(-20.0)
        before = {}
        for domain, classes in enumerate(classes_of):
            if domain == last:
                before["dense with replay"] = logits_of(dense, test.tokens)[:, few].argmax(1)
            with torch.no_grad():
                dense.head.weight[classes] = heads[domain].head.weight
                dense.head.bias[classes] = heads[domain].head.bias
            with clocked(cpu, f"dense with replay {domain}"):
                order = with_replay(rows(domain), memory, job.seed)
                fit(dense, train.tokens, train.labels, order, EXPERT, BATCH, job.seed)
            memory = torch.cat([memory, rows(domain)[: round(REPLAYED * len(rows(domain)))]])
        replay_logits = logits_of(dense, test.tokens)
        predicted = {
            "dense joint": answers(joint_logits, owner),
            "dense joint, masked": answers(joint_logits, owner, to),
            "dense joint, domain given": answers(joint_logits, owner, test.domains),
            "dense with replay": answers(replay_logits, owner),
            "dense with replay, masked": answers(replay_logits, owner, to),
        }
    return {
        **vars(job), "domains": list(names), "classes": [len(DOMAINS[name][1]) for name in names],
        "training_images": by_count(train.domains), "test_images": by_count(test.domains),
        "labels": written(test.labels), "predicted": {arm: written(each) for arm, each in predicted.items()},
        "predicted_sha256": sha256("".join(map(written, predicted.values())).encode()).hexdigest(),
        "router": router.name, "heads": chosen, "routers_on_validation": {
            each.name: round(share, 4) for each, share in zip(CANDIDATES, shares, strict=True)
        },
        "sent": [by_count(to[test.domains == domain], len(names)) for domain in range(len(names))],
        "earlier": {arm: written(each[there]) for arm, each in before.items()},
        "parameters": {
            "trunk": sum(each.numel() for each in vit.parameters()), "features": ends.shape[1],
            "expert": sum(each.numel() for block in vit.blocks[FIRST:] for each in block.mlp.parameters()),
        },
        "cpu_s": {name: round(value, 1) for name, value in cpu.items()}, **origin,
    }  # fmt: skip


@contextmanager
def clocked(cpu: dict[str, float], name: str) -> Iterator[None]:
    """Note the CPU seconds that the block takes."""
    start = time.process_time()
    yield
    cpu[name] = time.process_time() - start


def by_count(domains: Tensor, most: int = 0) -> list[int]:
    """How many images [I] there are of each domain."""
    return torch.bincount(domains, minlength=most).tolist()


def written(classes: Tensor) -> str:
    """A digit for each image's class [I]."""
    return "".join(DIGITS[each] for each in classes.tolist())


def read(digits: str) -> Sequence[int]:
    """The classes again."""
    return [DIGITS.index(digit) for digit in digits]
