"""Who acts, for the records; and asking before something is lost."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kontext_batch.errors import SettingsError

if TYPE_CHECKING:
    from kontext_batch.ports import Act
    from kontext_batch.settings import Settings

TOKEN_VARIABLE = "KONTEXT_BATCH_TOKEN"
_SHA256 = re.compile(r"[0-9a-f]{64}")
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def act(settings: Settings, action: str, **details: Any) -> Act:
    """What the person at this command does, under the name of their token, else of their account on this machine.

    The token itself is kept nowhere. Raises `SettingsError` for a token that `tokens_file` does not know.
    """
    from kontext_batch.ports import Act

    token = os.environ.get(TOKEN_VARIABLE)
    if token:
        return Act(_named(settings.tokens_file, token), "cli+token", action, details)
    return Act(user(), "cli", action, details)


def user() -> str:
    """The account of this process: asked of the system, for variables can say anything."""
    try:
        import pwd
    except ImportError:  # Windows
        import getpass

        return getpass.getuser()
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"uid {os.geteuid()}"


def _named(file: Path | None, token: str) -> str:
    if file is None:
        raise SettingsError(f"{TOKEN_VARIABLE} is given, but the setting tokens_file names no file that knows it")
    name = read_tokens(file)[0].get(hashlib.sha256(token.encode()).hexdigest())
    if name is None:
        raise SettingsError(f"the token in {TOKEN_VARIABLE} is none of those that {file} names by their sha256")
    return name


def read_tokens(file: Path) -> tuple[dict[str, str], list[int]]:
    """Names by the sha256 of their tokens, and the numbers of lines that are no such thing. Raises `SettingsError`."""
    import yaml

    try:
        # Nodes, where every value is text: a hash such as 12e4... would else be a number.
        found = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise SettingsError(f"tokens_file {file}: not readable as YAML ({type(error).__name__})") from error
    if not isinstance(found, yaml.MappingNode | None):
        raise SettingsError(f"tokens_file {file}: lines `SHA256: NAME` are expected")
    names: dict[str, str] = {}
    faulty: list[int] = []
    for sha256, name in [] if found is None else found.value:
        if _SHA256.fullmatch(str(sha256.value)) and isinstance(name, yaml.ScalarNode) and name.value:
            names[sha256.value] = name.value
        else:
            faulty.append(sha256.start_mark.line + 1)
    return names, faulty


def confirm(question: str, *, yes: bool) -> None:
    """Ends the command unless the person says yes. Raises `BadParameter` where there is nobody to ask."""
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise typer.BadParameter(f"{question} There is no terminal to ask at: say --yes", param_hint="--yes")
    if not typer.confirm(question, err=True):
        raise typer.Exit(2)
