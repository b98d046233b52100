"""benchmarks/specialization/README.md: everything between its marks is the report of the committed runs."""

from functools import partial
from typing import Any

from tests.records import ROOT, Claim, Definition
from tests.records.studies import report, shown

FOLDER = ROOT / "benchmarks" / "specialization"
FILES = tuple(str(path.relative_to(ROOT)) for path in sorted(FOLDER.glob("runs/*.json")))


def _parts(*runs: Any) -> list[dict[str, str]]:
    return shown(part for part in report("specialization").parts_of(runs) if not part.startswith("#"))


def _whole(data: str, *runs: Any) -> dict[str, Any]:
    """What the table of a data set's classes says as a whole."""
    study = report("specialization")
    settings = study.settings_of(runs, data, "class")
    assert {len(setting.runs) for setting in settings} == {3}
    assert [{setting.answer(question) for setting in settings} for question in range(3)] == [
        {"yes"}, {"not shown"}, {"not shown"}
    ]  # fmt: skip
    for setting in settings:
        bits = study._mean(setting, lambda layer: layer["readings"][0]["bits"]["value"])
        assert bits < study._mean(setting, lambda layer: study._control(layer, "clusters"))
    by_name = {setting.name: study._mean(setting, study.guess) for setting in settings}
    assert all(by_name[name.replace("token", "image")] > guess for name, guess in by_name.items() if "token" in name)
    guesses = [100 * guess for guess in by_name.values()]
    swaps = [float(study._swap(setting)[0].replace("−", "-")) for setting in settings]
    return {
        "settings": len(settings),
        "arms": len({setting.arm for setting in settings}),
        "least": min(guesses),
        "most": max(guesses),
        "chance": 100 * settings[0].layers[0]["readings"][0]["chance"],
        "swap": max(swaps),
    }


def yes(*runs: Any) -> dict[str, Any]:
    """How many settings of each data set answer each question with yes."""
    study = report("specialization")
    settings = {data: study.settings_of(runs, data, "class") for data in ("pets", "cifar10", "cats_vs_dogs")}
    return {
        **{data: f"{sum(each.answer(0) == 'yes' for each in of)} of {len(of)}" for data, of in settings.items()},
        **{
            name: sum(each.answer(question) == "yes" for of in settings.values() for each in of)
            for question, name in ((1, "added"), (2, "different"))
        },
    }


CLAIMS = [
    Claim(FILES, "{text}", _parts),
    Claim(
        FILES,
        "in all {settings} settings (a setting is one layer of one of {arms} arms, with 3 seeds each): "
        "from the expert alone {least:.0f} to {most:.0f} % of the classes are guessed right, chance {chance:.1f} %",
        partial(_whole, "pets"),
    ),
    Claim(FILES, "change places costs at most {swap:.1f} points of accuracy.", partial(_whole, "pets")),
    Claim(
        FILES,
        "CIFAR-10 says the same in its {settings} settings: {least:.0f} to {most:.0f} % are guessed right, chance "
        "{chance:.1f} %, and a swap costs at most {swap:.1f} points.",
        partial(_whole, "cifar10"),
    ),
]
DEFINITIONS: list[Definition] = []
