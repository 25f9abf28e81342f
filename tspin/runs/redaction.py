"""Tokens and passwords are no part of what a run writes or says."""

import os
import re

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
