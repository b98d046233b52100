"""What the explorer's sentences must name: which option or field, the value, and the way on.

A row is a mistake that a user makes, or a choice whose consequence the page tells, and short fragments of the sentence.
"""

import pytest

from moevision.demo import requests as read
from moevision.demo.facts import describe
from moevision.demo.gate import AUTH
from moevision.demo.view import Settings
from tests.demo import hostile
from tests.shared import says

COMMANDS = [
    (["--auth", "nobody"], "no terminal", "MOEVISION_AUTH=USER:PASSWORD"),
    (["--auth", ":x"], "--auth", "user", "password"),
    (["--auth", "x:"], "--auth", "user", "password"),
    (["--auth", ""], "--auth"),
    (["--port", "0"], "--port is 0"),
    (["--port", "99999"], "--port is 99999"),
    (["--root-path", "/moe/"], "--root-path", "without a slash"),
    (["--allow-host", "https://lab.example.org"], "--allow-host", "without a port"),
    (["--allow-host", "lab.example.org:80"], "--allow-host", "without a port"),
    (["--allow-embed", "lab.example.org"], "--allow-embed", "https://lab.example.org"),
    (["--allow-embed", "https://x; script-src *"], "--allow-embed", "website's origin"),
    (["--allow-embed", "https://lab.example.org/page"], "--allow-embed", "website's origin"),
    (["--host", "192.0.2.1", "--public"], "--host 192.0.2.1", "no address", "give another"),
    (["no/such/model"], "no/such/model"),
    (["--no-such-option"], "--no-such-option"),
]
OPEN_TO_OTHERS = ("--host 0.0.0.0", "--host ::", "--share", "--host 192.168.1.7", "--host myhost")


@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: " ".join(row[0]))
def test_a_command(cli, row):
    options, *fragments = row
    outcome = cli("demo", *options)
    assert outcome.code == 2
    assert says(outcome.err, *fragments)


@pytest.mark.parametrize("options", OPEN_TO_OTHERS)
def test_a_page_that_others_could_open(cli, options):
    outcome = cli("demo", *options.split())
    assert outcome.code == 2
    assert says(outcome.err, options, "--auth USER", "MOEVISION_AUTH=USER:PASSWORD", "--public")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("variable", ["class", ":x", "x:", ""])
def test_a_variable_without_a_password(variable, monkeypatch, cli):
    monkeypatch.setenv(AUTH, variable)
    outcome = cli("demo", "--host", "0.0.0.0")
    assert outcome.code == 2
    assert says(outcome.err, "MOEVISION_AUTH", "user", "password")


FIELDS = [
    ("top_k", 5, "'top_k'", "from 1 to 4"),
    ("top_k", True, "from 1 to 4"),
    ("capacity", float("nan"), "'capacity'", "0.05 to 16"),
    ("capacity", 10**400, "0.05 to 16"),  # more than a float can hold
    ("capacity", "1", "0.05 to 16"),
    ("model", "nope", "'model'", "pets, photos"),
    ("variant", "better", "'variant'", "trained, untrained"),
    ("picture", None, "JSON object"),
    ("picture", {"kind": "url"}, "'kind'", "example, upload"),
    ("picture", {"kind": "upload"}, "'data'"),
    ("picture", {"kind": "example", "id": "pets/test/2000"}, "pets/test/2000", "the examples"),
    ("pictures", 1, "no field 'pictures'", "picture, top_k"),
    ("noise", -1, "'noise'"),
    ("noise", True, "'noise'"),
    ("away", {"3": 1}, "'away'", "at most 8"),
    ("away", [[3, 1], [3]], "at most 8"),
    ("away", [[3, 1]] * 9, "at most 8"),
    ("away", [[2, 1]], "one of 1", "3."),
    ("away", [[3, 4]], "from 0 to 3"),
    ("intervention", {"kind": "shuffle"}, "ablate, force", "swap, random"),
    ("intervention", {"kind": "ablate", "expert": 1}, "'layer'", "1, 3"),
    ("intervention", {"kind": "ablate", "layer": 2, "expert": 1}, "'layer'", "1, 3"),
    ("intervention", {"kind": "force", "layer": 1, "expert": 4}, "'expert'", "0 to 3"),
    ("intervention", {"kind": "swap", "layer": 1, "expert": 1}, "'other'", "0 to 3"),
    ("intervention", {"kind": "ablate", "layer": 1, "expert": 1, "other": 2}, "must be null"),
    ("intervention", {"kind": "random", "layer": None, "seed": -1}, "'seed'"),
]
REQUESTS = [
    *(("route", {**hostile.ROUTE, name: value}, *names) for name, value, *names in FIELDS),
    ("what_if", hostile.ROUTE, "'intervention'", "what to change"),
    ("what_if", {**hostile.ROUTE, "intervention": hostile.CHANGE, "noise": 1}, "without noise"),
    ("compare", {"model": "pets", "a": "cat", "b": "cat"}, "two different"),
    ("compare", {"model": "photos", "a": "cat", "b": "dog"}, "The photos", "--data DIR"),
    ("examples", {"model": "pets", "start": 2001}, "'start'", "0 to 2000"),
    ("sharp", {"model": "photos", "picture": "data/none.png"}, "no image 'data/none.png'"),
    ("history", {"model": "pets", "picture": "pets/test/0"}, "The pets", "not recorded"),
    ("fewest", {**hostile.ROUTE, "away": [[1, 0]]}, "as it was trained"),
]


@pytest.mark.parametrize("row", REQUESTS)
def test_a_request(explorer, row):
    name, request, *fragments = row
    answer = explorer.answer(name, request)
    assert answer["code"] == "bad_request"
    assert says(answer["error"], *fragments)


MIXED = {"router": ["vmoe_top_k", "soft"], "num_experts": [4, 6], "top_k": [2, 1]}
LAYERS = [
    ({}, "top-2", "4 experts"),
    ({"router": "switch", "num_shared_experts": 1}, "top-1", "1 shared expert", "every patch"),
    ({"eval_capacity_factor": 0.5}, "top-2", "capacity factor 0.5"),
    ({"router": "position", "top_k": 1}, "by position", "not learned"),
    ({"router": "hash"}, "by a hash", "not learned"),
    ({"router": "colour", "num_shared_experts": 2}, "patch's colour", "2 shared experts"),
    ({"route_by": "image"}, "top-2", "whole image"),
    ({"router": "expert_choice"}, "choose patches", "2 per patch"),
    ({"router": "soft", "slots_per_expert": 1}, "1 slot each", "all patches"),
]


@pytest.mark.parametrize("row", LAYERS)
def test_a_layer(make, row):
    arguments, *fragments = row
    for router in describe(make(**arguments)).routers:
        assert says(router.summary, *fragments)


OFF = [
    ({"top_k": [2, 1]}, Settings(top_k=3), "k = 3", "top-2 in L1", "top-1 in L3"),
    ({"top_k": [2, 1]}, Settings(capacity=0.5), "no limit", "factor 0.5"),
    ({"router": "expert_choice"}, Settings(capacity=0.5), "0.5 times"),
    ({"router": "expert_choice"}, Settings(top_k=2), None),
    (MIXED, Settings(top_k=2), None),
]


@pytest.mark.parametrize("row", OFF)
def test_a_view_off_the_training_distribution(make, row):
    arguments, settings, *fragments = row
    reason = settings.off_reason(describe(make(**arguments)).routers)
    if fragments == [None]:
        assert reason is None
    else:
        assert says(reason, *fragments)


def test_a_setting_that_a_router_refuses(make):
    with pytest.raises(read.RequestError) as refused:
        read.settings({"top_k": 2}, describe(make(router="soft")))
    assert says(str(refused.value), "'top_k'", "must be null", "all slots")
