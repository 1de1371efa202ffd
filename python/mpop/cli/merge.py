"""`mpop merge`: back to a plain checkpoint."""

from __future__ import annotations

from typing import Any

from mpop.cli.options.parser import command


def add(commands: Any) -> None:
    """Its options."""
    parser = command(
        commands, "merge", "Turn an MPO model back into a plain transformers checkpoint.", run
    )
    parser.add_new_output()


def run(model: str, output: str, overwrite: bool) -> tuple[dict[str, Any], str]:
    """What to print as JSON, and for a person."""
    import mpop
    from mpop.checkpoints.folder import replaced
    from mpop.checkpoints.opening import check_output, copy_companions, load_as_saved

    check_output(output, model, overwrite=overwrite)
    merged = mpop.merge(load_as_saved(model))
    with replaced(output, wholly=overwrite) as folder:
        merged.save_pretrained(folder)
        copy_companions(model, folder)
    total = mpop.count_parameters(merged).total
    result = {"model": model, "output": output, "total_parameters": total}
    return result, f"{output}: a dense {type(merged).__name__} with {total:,} parameters"
