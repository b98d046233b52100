"""`moevision completion SHELL`: a script that completes verbs, and each verb's flags after a dash; else files.

The table of verbs and flags is written into the script, so that pressing Tab starts no Python.
"""

from __future__ import annotations

import re
from argparse import Namespace

from moevision.commands import VERBS
from moevision.commands.parsers import PARSERS, tasks_of
from moevision.commands.training import ALL, help_file

BASH = """\
_moevision() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} flags=
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{verbs} --help --version" -- "$word"))
    return
  fi
  case ${{COMP_WORDS[1]}} in
{table}
  esac
  [[ $word == -* ]] && COMPREPLY=($(compgen -W "$flags" -- "$word"))
}}
complete -o bashdefault -o default -F _moevision moevision
"""
ZSH = """\
#compdef moevision
_moevision() {{
  local -a verbs flags
  if (( CURRENT == 2 )); then
    verbs=(
{summaries}
    )
    _describe verb verbs
    return
  fi
  case $words[2] in
{table}
  esac
  if [[ $PREFIX == -* ]]; then compadd -- $flags; else _files; fi
}}
compdef _moevision moevision
"""


def run(chosen: Namespace) -> None:
    """Print the script for the chosen shell."""
    print({"bash": bash, "zsh": zsh, "fish": fish}[chosen.shell](), end="")


def flags_of(verb: str) -> list[str]:
    """The long flags of a verb, from its parser; those of the training verbs from their rendered help."""
    if verb in PARSERS:
        parser = PARSERS[verb]()
        actions = [action for each in (parser, *tasks_of(parser).values()) for action in each._actions]
        flags = [flag for action in actions for flag in action.option_strings if flag.startswith("--")]
        return list(dict.fromkeys(flags))
    text = help_file(verb, everything=True).read_text(encoding="utf-8")
    names = re.findall(r"^  (-.*?)(?: {2,}.*)?$", text, re.MULTILINE)  # `  -c CONFIG, --config CONFIG   what it is`
    return [ALL, *dict.fromkeys(flag for name in names for flag in re.findall(r"--[\w.-]+", name))]


def bash() -> str:
    """For bash 4 and newer."""
    table = "\n".join(f'    {verb}) flags="{" ".join(flags_of(verb))}" ;;' for verb in VERBS)
    return BASH.format(verbs=" ".join(VERBS), table=table)


def zsh() -> str:
    """For zsh, after compinit."""
    table = "\n".join(f"    {verb}) flags=({' '.join(flags_of(verb))}) ;;" for verb in VERBS)
    summaries = "\n".join(f"      '{name}:{verb.summary}'" for name, verb in VERBS.items())
    return ZSH.format(summaries=summaries, table=table)


def fish() -> str:
    """For fish 3 and newer."""
    lines = ["complete -c moevision -n __fish_use_subcommand -f"]
    for name, verb in VERBS.items():
        lines.append(f"complete -c moevision -n __fish_use_subcommand -a {name} -d '{verb.summary}'")
        dash = f"string match -q {name} (commandline -opc)[2]; and string match -q -- '-*' (commandline -ct)"
        lines.append(f"""complete -c moevision -n "{dash}" -f -a '{" ".join(flags_of(name))}'""")
    return "\n".join(lines) + "\n"
