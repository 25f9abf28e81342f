"""Every setting is a flag: `--learning-rate 1e-5` is `--set learning_rate=1e-5`, wherever a command takes --set."""

import re
from collections.abc import Iterator
from typing import Any

from typer.core import TyperCommand

from tspin.errors import UserError, unknown

SET = "--set"
FLAG = re.compile(r"--([A-Za-z][\w.-]*)(?:=(.*))?", re.DOTALL)


class Flagged(TyperCommand):
    """A command whose options are its own and, where it takes --set, every setting. Unknown ones get one line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # a shell asks for completions: the line is not finished
            return super().parse_args(ctx, args)
        own = {name: option for option in self.get_params(ctx) for name in [*option.opts, *option.secondary_opts]}
        return super().parse_args(ctx, list(_with_settings(list(args), own)))


def _with_settings(args: list[str], own: dict[str, Any]) -> Iterator[str]:
    """The arguments, with flags that are settings as --set. own: the command's options."""
    while args:
        word = args.pop(0)
        found = FLAG.fullmatch(word)
        name = word.partition("=")[0]
        if word == "--":  # arguments alone from here on
            yield from [word, *args]
            return
        if found is None or name in own:
            yield word
            if name in own and "=" not in word and args and not getattr(own[name], "is_flag", False):
                yield args.pop(0)
            continue
        key = _setting(found[1]) if SET in own else None
        if key is None:
            known = [*own, *(_flags() if SET in own else ())]
            raise UserError(unknown("option", name, [option for option in known if option.startswith("--")]))
        yield from (SET, f"{key}={_value(name, key, found[2], args)}")


def _value(name: str, key: str, given: str | None, args: list[str]) -> str:
    """What a flag is set to: what is written with it, the next argument, or true where it is a switch alone."""
    if given is not None:
        return given
    if args and not FLAG.fullmatch(args[0]):
        return args.pop(0)
    if _is_switch(key):
        return "true"
    raise UserError(f"{name}: no value: write {name} VALUE")


def _is_switch(key: str) -> bool:
    """Whether a setting, a section's too (data.generated), is declared as one that is on or off."""
    from tspin import settings
    from tspin.declared import declared
    from tspin.names import SECTIONS, find_declared, preset_fields

    section, _, inner = key.rpartition(".")
    if not section:
        return key in preset_fields() and "bool" in find_declared(key).type
    kind = SECTIONS.get(section)
    if kind is None and section in preset_fields():  # engine, lora
        kind = find_declared(section).type.partition(" ")[0]
    fields = declared(kind) if kind is not None and hasattr(settings, kind) else {}
    return inner in fields and "bool" in fields[inner].type


def _setting(flag: str) -> str | None:
    """The key that a flag sets; None where there is no such setting."""
    from tspin.names import ALIASES, BY_COMMAND, COEFFICIENTS, SECTIONS, preset_fields

    key = flag.replace("-", "_")
    first, _, rest = key.partition(".")
    known = {*preset_fields(), *COEFFICIENTS, *BY_COMMAND, *ALIASES}
    return key if key in known or (rest and first in {*SECTIONS, *known, "sampling", "training"}) else None


def _flags() -> list[str]:
    """Every setting as it is written as a flag."""
    from tspin.declared import declared
    from tspin.names import ALIASES, COEFFICIENTS, SECTIONS, preset_fields

    inner = (f"{name}.{field}" for name, kind in SECTIONS.items() if kind for field in declared(kind))
    return [f"--{key.replace('_', '-')}" for key in (*preset_fields(), *COEFFICIENTS, *inner, *ALIASES)]
