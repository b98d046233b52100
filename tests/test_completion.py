"""Shell completion: verbs, then each verb's flags, as its help names them."""

import re
import shlex
import shutil
import subprocess

import pytest

from moevision.commands import VERBS
from moevision.commands.completion import flags_of

LAST_WORD = re.compile(r"--[\w.-]+")


def in_bash(script, *words):
    """What Tab offers at the end of these words."""
    quoted = " ".join(map(shlex.quote, ("moevision", *words)))
    program = (
        f"{script}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _moevision; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "--norc", "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_verbs_and_flags(cli):
    script = cli("completion", "bash").out
    assert in_bash(script, "") == [*VERBS, "--help", "--version"]
    assert in_bash(script, "pr") == ["predict"]
    assert in_bash(script, "predict", "runs/pets", "--form") == ["--format"]
    assert in_bash(script, "fit", "--model.arch.top") == ["--model.arch.top_k"]
    assert in_bash(script, "predict", "ru") == []  # a file: bash's own completion
    for verb in VERBS:
        assert in_bash(script, verb, "--") == flags_of(verb)


@pytest.mark.parametrize("verb", VERBS)
def test_flags_are_those_of_the_help(cli, verb):
    trains = verb in ("fit", "validate", "test")
    text = cli(verb, "--help-all" if trains else "--help").out
    named = set(LAST_WORD.findall("\n".join(line for line in text.splitlines() if re.match(r"  -", line))))
    assert "--help" in named
    assert named <= set(flags_of(verb))
    if trains:
        assert "--help-all" in flags_of(verb)


@pytest.mark.parametrize(("shell", "check"), [("bash", "-n"), ("zsh", "-n"), ("fish", "--no-execute")])
def test_each_script_names_every_verb_and_is_read_by_its_shell(cli, tmp_path, shell, check):
    script = cli("completion", shell).out
    for name, verb in VERBS.items():
        assert name in script
        assert shell == "bash" or verb.summary in script
    assert "--model.arch.top_k" in script
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here: its script was looked at as text only")
    (tmp_path / "script").write_text(script)
    done = subprocess.run([shell, check, tmp_path / "script"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
