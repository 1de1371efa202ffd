"""`python -m mpop.lm_eval …`: EleutherAI's harness, which then loads compressed checkpoints.

All arguments are its own: `run --model hf --model_args pretrained=FOLDER --tasks …`.
"""

import sys

import mpop  # noqa: F401 - transformers then knows the format


def main() -> None:
    """Run `lm_eval` on this process's arguments; exit with 2 where it is not installed."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        remedy = 'pip install "lm_eval[hf]"'
        print(
            f"mpop.lm_eval: error: {error.name} is not installed; install it with: {remedy}",
            file=sys.stderr,
        )
        sys.exit(2)
    cli_evaluate()


if __name__ == "__main__":
    main()
