"""``ckptmgr completion``: the script that makes a shell complete commands, options, directories and references."""

from __future__ import annotations

import logging
import os

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    ShellComplete,
    add_completion_class,
    get_completion_class,
    shell_complete,
    split_arg_string,
)

from ckptmgr.cli.arguments import json_option, quiet_option

__all__ = ["COMPLETE_VARIABLE", "answer", "command"]

COMPLETE_VARIABLE = "_CKPTMGR_COMPLETE"
"""In the environment of a process that a shell asks for completions."""

_PROGRAM = "ckptmgr"
_SHELLS = ("bash", "fish", "zsh")
_BREAKS = "@:="
_BASH = """\
%(complete_func)s() {
    local type value
    COMPREPLY=()
    while IFS=',' read -r type value; do
        case $type in
            dir) compopt -o dirnames 2> /dev/null ;;
            file) compopt -o default 2> /dev/null ;;
            plain) COMPREPLY+=("$value") ;;
        esac
    done < <(env COMP_LINE="${COMP_LINE:0:COMP_POINT}" COMP_WORDBREAKS="$COMP_WORDBREAKS" \\
        %(complete_var)s=bash_complete "$1" 2> /dev/null)
}

complete -o nosort -F %(complete_func)s %(prog_name)s 2> /dev/null || complete -F %(complete_func)s %(prog_name)s
"""


@click.command(name="completion")
@click.argument("shell", metavar="bash|fish|zsh", type=click.Choice(_SHELLS))
@quiet_option()
@json_option()
def command(shell: str, as_json: bool) -> None:
    """Print the script that makes a shell complete commands, options, and references after RUN_DIR@.

    \b
    bash:  eval "$(ckptmgr completion bash)"              in ~/.bashrc
    zsh:   eval "$(ckptmgr completion zsh)"               in ~/.zshrc, after compinit
    fish:  ckptmgr completion fish | source               in ~/.config/fish/config.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    # Not by the class's own method: for bash it starts one to ask for its version.
    script = ShellComplete.source(kind(command, {}, _PROGRAM, COMPLETE_VARIABLE))
    if as_json:
        from ckptmgr.cli.output import print_json

        print_json({"shell": shell, "script": script})
    else:
        print(script, end="")


def answer(cli: click.Command, instruction: str) -> int:
    """Answer a shell's question on stdout, and return the exit code. What goes wrong completes nothing."""
    # A warning in the middle of what is being typed helps nobody.
    logging.disable()
    try:
        return shell_complete(cli, {}, _PROGRAM, COMPLETE_VARIABLE, instruction)
    except Exception:
        return 1


class _Bash(BashComplete):
    """Takes the line as it was typed: bash has cut it into words at each ``@``, ``:`` and ``=``."""

    name = "bash"
    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_LINE"]
        _, *words = split_arg_string(line)
        if not words or line[-1:].isspace():
            return words, ""
        return words[:-1], words[-1]

    def format_completion(self, item: CompletionItem[str]) -> str:
        # What bash puts in replaces the last of its own words only.
        _, incomplete = self.get_completion_args()
        breaks = [mark for mark in _BREAKS if mark in os.environ.get("COMP_WORDBREAKS", _BREAKS)]
        begun = max((incomplete.rfind(mark) for mark in breaks), default=-1) + 1
        value = item.value
        if item.type == "plain" and value.startswith(incomplete[:begun]):
            value = value[begun:]
        return f"{item.type},{value}"


add_completion_class(_Bash)
