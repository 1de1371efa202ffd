"""`mpop merge`: back to a plain checkpoint."""

from __future__ import annotations

from typing import Any

from mpop.cli.options import command


def add(commands: Any) -> None:
    """Its options."""
    parser = command(
        commands, "merge", "Turn an MPO model back into a plain transformers checkpoint.", run
    )
    parser.add_output()


def run(model: str, output: str) -> tuple[dict[str, Any], str]:
    """What to print as JSON, and for a person."""
    import mpop
    from mpop.checkpoints.opening import check_output, copy_companions, load_as_saved

    check_output(output, model)
    merged = mpop.merge(load_as_saved(model))
    merged.save_pretrained(output)
    copy_companions(model, output)
    total = mpop.count_parameters(merged).total
    result = {"model": model, "output": output, "total_parameters": total}
    return result, f"{output}: a dense {type(merged).__name__} with {total:,} parameters"
