"""`tspin settings`: what can be set, by which name, without waiting for PyTorch."""

from typing import Annotated

import typer

from tspin.errors import UserError, unknown


def settings(
    name: Annotated[str | None, typer.Argument(help="of a setting, or a part of it; all when left out")] = None,
) -> None:
    """Name, type, default and meaning of every setting.

    It is a key of a preset or a --config file, a field of SelfPlayConfig, and a flag: batch_size is --batch-size.

    Example: tspin settings learning_rate
    """
    from tspin.names import ALIASES

    lines = _lines()
    wanted = ALIASES.get(name, name) if name else ""
    wanted = wanted.removeprefix("--").replace("-", "_")
    found = [line for key, line in lines.items() if wanted in key]
    if not found:
        raise UserError(unknown("setting", wanted, lines))
    for line in found:
        typer.echo(line)
    if name is None:
        typer.echo("Short: " + ", ".join(f"{alias} for {key}" for alias, key in ALIASES.items()))


def _lines() -> dict[str, str]:
    """Key → its line: ours, and what is in those that are sections; methods' coefficients; the preset's sections;
    Transformers' own.
    """
    from tspin.declared import Declared, declared, find_section
    from tspin.names import COEFFICIENTS, SECTIONS, find_declared, preset_fields

    kinds = {f"{part}.": declared(kind) for part, kind in SECTIONS.items() if kind}
    ours = declared("SelfPlayConfig")
    fields = {name: find_declared(name) for name in preset_fields()}
    rows: dict[str, Declared] = {}
    for name, field in fields.items():
        if name in ours:
            rows[name] = field
            if section := find_section(field.type):
                rows |= {f"{name}.{key}": inner for key, inner in declared(section).items()}
    for name, c in COEFFICIENTS.items():
        kind = "float" if isinstance(c.allowed, str) else " | ".join(c.allowed)
        rows[f"methods.<method>.{name}"] = Declared(name, kind, str(c.default), f"{c.meaning} ({c.source})")
    rows |= {prefix + name: field for prefix, section in kinds.items() for name, field in section.items()}
    rows |= {name: field for name, field in fields.items() if name not in ours}
    return {key: _line(key, row.type, row.default, row.meaning) for key, row in rows.items()}


def _line(key: str, kind: str, default: str, meaning: str) -> str:
    told = f"  # {' '.join(meaning.split())}" if meaning else ""
    return f"{key}: {kind} = {default}{told}"
