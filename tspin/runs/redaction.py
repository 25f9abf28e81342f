"""Tokens and passwords are no part of what a run writes or says; people and places no part of what others are shown."""

import getpass
import os
import re
import socket
import tempfile
from pathlib import Path

NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(^|_)KEY($|_)|APIKEY|^AWS_ACCESS", re.IGNORECASE)
LOGIN = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")  # user:password in a URL
KNOWN = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{30,})\b")
MINIMUM = 8  # characters: shorter values ("true", "0") are settings, and would blacken ordinary words
HIDDEN = "[redacted]"


def redacted(text: str) -> str:
    """`text` without the values of environment variables named like secrets, URLs' logins and well-known tokens."""
    values = {value for name, value in os.environ.items() if NAMES.search(name) and len(value) >= MINIMUM}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return KNOWN.sub(HIDDEN, LOGIN.sub(HIDDEN, text))


def anonymous(text: str) -> str:
    """`redacted`, and without this user's and this machine's names and the folders that runs are in."""
    places = {str(Path.cwd()): ".", str(Path.home()): "~", tempfile.gettempdir(): "[temporary]"}
    for place, shown in sorted(places.items(), key=lambda item: -len(item[0])):
        text = re.sub(rf"{re.escape(place)}(?![\w-])", shown, text) if len(place) > 1 else text
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = ""
    for name, shown in {user: "[user]", socket.gethostname(): "[host]"}.items():
        text = re.sub(rf"\b{re.escape(name)}\b", shown, text) if name else text
    return redacted(text)
