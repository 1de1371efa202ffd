"""Perplexity of a real decoder cut to shares of its linears: `python -m bench.language.table`.

Calibration and every choice see WikiText-2's validation text; what is reported is its test text, in
windows of 512 and of 2048 tokens, and a text of another kind (the premises of RTE). Every run is a
line of `runs.jsonl`, and a stopped table goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import mpop
from bench import drawing, facts
from bench.glue.encoder import say
from bench.language.decoder import NAME, folder_of
from bench.language.ways import ROUNDINGS, WAYS, AllMoments, Way, cut
from bench.layer.report import table
from bench.results import text_of
from mpop.compression.calibration import second_moments
from mpop.compression.sequential import Batch
from mpop.data.glue import get_task, load_split
from mpop.models.light import count_bytes
from mpop.models.matrices import module_at
from mpop.models.selection import select

Row = dict[str, Any]
# Windows of the test text and of the other one.
_WINDOWS = {"test 512": 24, "test 2048": 6, "other 512": 24}
# Perplexities from here on are said above the figure.
_BEYOND = 1000
_HEALED = "-healed"
_OURS, *_OTHERS = drawing.COLOURS
_COLOURS = {
    **dict.fromkeys(("ours", "ours-int8"), _OURS),
    **dict(zip(("aware", "form", "both", "ranks"), _OTHERS, strict=False)),
    **dict.fromkeys(("chain-2", "chain-3", "chain-5"), _OTHERS[-1]),
}


class Texts:
    """Tokens of the texts that are measured."""

    def __init__(self, tokenizer: Any, options: argparse.Namespace) -> None:
        folder = Path(options.texts)
        test = (folder / "test.txt").read_text(encoding="utf-8")
        rte = load_split(get_task("rte"), "train", options.data_dir)
        other = "\n\n".join(dict.fromkeys(rte["text"]))
        self.tokens: dict[str, Tensor] = {}
        for name, count in _WINDOWS.items():
            seqlen = int(name.split()[1])
            text = test if name.startswith("test") else other
            ids = tokenizer(text, verbose=False)["input_ids"][: count * seqlen]
            self.tokens[name] = torch.tensor(ids, dtype=torch.int64, device="cpu")

    def perplexities(self, model: PreTrainedModel, precision: str) -> dict[str, float]:
        """By text and length of a window."""
        found = {}
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            for name, tokens in self.tokens.items():
                seqlen = int(name.split()[1])
                found[name] = mpop.perplexity(model, tokens, seqlen=seqlen).perplexity
        return found


class Bench:
    """The decoder, what it was, and the runs that are on file."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.file = options, Path(options.output) / "runs.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.rows: list[Row] = [json.loads(line) for line in lines]
        folder = folder_of(options.model, Path(options.scratch))
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if options.precision == "bf16":
            # Of the model alone: what is fitted stays in fp32.
            self.model.forward = torch.autocast("cpu", torch.bfloat16)(self.model.forward)
        self.texts = Texts(self.tokenizer, options)
        selected = select(self.model, mpop.CompressionConfig(embeddings=False))
        self.weights = {
            names: module_at(self.model, names[0]).weight.detach() for names in selected
        }
        self.kept = {names: weight.clone() for names, weight in self.weights.items()}
        self.whole = sum(weight.numel() for weight in self.kept.values())
        self.parameters = self.model.num_parameters()
        git = facts.commit()
        self.commit = f"{(git['commit'] or 'none')[:12]}{' with changes' * git['dirty']}"

    def has(self, key: Row) -> bool:
        """Whether there is a row of it."""
        return any(all(row[name] == value for name, value in key.items()) for row in self.rows)

    def run(self, key: Row, make: Callable[[], tuple[float, float]]) -> None:
        """A row, unless it is there: `make` puts the weights; returns parameters and bytes."""
        if self.has(key):
            return
        say(" ".join(map(str, key.values())))
        begun = time.perf_counter()
        parameters, num_bytes = make()
        self._note(key, self.model, parameters, num_bytes, time.perf_counter() - begun)
        with torch.no_grad():
            for names, weight in self.weights.items():
                weight.copy_(self.kept[names])

    def run_saved(self, way: str, folder: str) -> None:
        """A row of a model that was compressed, unless it is there."""
        model = mpop.load(folder).eval()
        others = self.parameters - self.whole
        held = mpop.count_parameters(model).total - others
        num_bytes = count_bytes(copy.deepcopy(model).bfloat16()).total - 2 * others
        key = {"way": way, "ratio": round(held / self.whole, 2), "seed": 0}
        if not self.has(key):
            say(" ".join(map(str, key.values())))
            self._note(key, model, held, num_bytes, 0.0)

    def _note(
        self, key: Row, model: Any, parameters: float, num_bytes: float, seconds: float
    ) -> None:
        precision = self.options.precision
        try:
            perplexity = self.texts.perplexities(model, precision)
            found: Row = {"perplexity": perplexity, "diverged": False}
        except FloatingPointError:
            found = {"perplexity": dict.fromkeys(_WINDOWS), "diverged": True}
        others = self.parameters - self.whole
        row = {
            **key,
            "of_matrices": parameters / self.whole,
            "of_model": (parameters + others) / self.parameters,
            "bytes": num_bytes + 2 * others,
            "seconds": seconds,
            "precision": precision,
            "cpu": facts.processor(),
            "commit": self.commit,
            **found,
        }
        self.rows.append(row)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    @torch.no_grad()
    def put(self, new: Any) -> tuple[float, float]:
        """Weights in the place of the model's; the parameters and the bytes of all."""
        parameters = num_bytes = 0.0
        for matrix in new:
            self.weights[matrix.names].copy_(matrix.weight)
            parameters += matrix.parameters
            num_bytes += matrix.bytes
        return parameters, num_bytes

    @torch.no_grad()
    def round(self, name: str) -> tuple[float, float]:
        """Weights rounded; their bytes."""
        num_bytes = 0.0
        for names, weight in self.weights.items():
            new, size = ROUNDINGS[name](self.kept[names])
            weight.copy_(new)
            num_bytes += size
        return self.whole, num_bytes

    def batches(self, seed: int) -> list[dict[str, Tensor]]:
        """Of the validation text."""
        options = self.options
        return mpop.text_batches(
            self.tokenizer,
            Path(options.texts) / "valid.txt",
            samples=options.samples,
            seqlen=options.seqlen,
            seed=seed,
            batch_size=4,
        )

    def put_cut(
        self, batches: Sequence[Batch], moments: AllMoments, way: Way, ratio: float
    ) -> tuple[float, float]:
        """All matrices as they are cut."""
        return self.put(list(cut(self.model, batches, self.kept, moments, way, ratio)))


def measure(options: argparse.Namespace) -> list[Row]:
    """All runs that are asked for."""
    bench = Bench(options)
    plain = {"ratio": 1.0, "seed": 0}
    bench.run({"way": "dense", **plain}, lambda: (bench.whole, 2 * bench.whole))
    for name in ROUNDINGS:
        bench.run({"way": name, **plain}, lambda name=name: bench.round(name))
    for saved in options.saved:
        bench.run_saved(*saved.split("=", 1))
    ends = time.monotonic() + 60 * options.budget_minutes
    for seed in options.seeds:
        found: AllMoments | None = None
        for ratio in options.ratios:
            for name in options.ways:
                key = {"way": name, "ratio": ratio, "seed": seed}
                if bench.has(key):
                    continue
                if time.monotonic() > ends:
                    return bench.rows
                if found is None:
                    say(f"moments, seed {seed}")
                    batches = bench.batches(seed)
                    found = second_moments(bench.model, batches, list(bench.weights))
                bench.run(key, partial(bench.put_cut, batches, found, WAYS[name], ratio))
    return bench.rows


def summary(rows: Sequence[Row]) -> list[Row]:
    """A row a way and ratio, over its seeds; of each ratio the best first."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["way"], row["ratio"]), []).append(row)
    found = [
        {
            "way": way,
            "ratio": ratio,
            "seeds": len(group),
            "of_matrices": group[0]["of_matrices"],
            "of_model": group[0]["of_model"],
            "bytes": group[0]["bytes"],
            "commits": sorted({row["commit"] for row in group}),
            "cpus": sorted({row["cpu"] for row in group}),
            "fp32_seeds": [row["seed"] for row in group if row["precision"] == "fp32"],
            "perplexity": {
                name: _spread([row["perplexity"][name] for row in group]) for name in _WINDOWS
            },
        }
        for (way, ratio), group in groups.items()
    ]

    def rank(row: Row) -> tuple[float, float]:
        mean, _ = next(iter(row["perplexity"].values())) or (math.inf, 0.0)
        return -row["ratio"], mean

    return sorted(found, key=rank)


def _spread(values: Sequence[float | None]) -> tuple[float, float] | None:
    finite = [value for value in values if value is not None]
    if not finite:
        return None
    return statistics.fmean(finite), statistics.pstdev(finite)


def markdown(rows: Sequence[Row], conditions: Row) -> str:
    """The table, and what it was measured on."""
    head = ("way", "autocast", "kept", "of the model", "MB", *_WINDOWS)
    lines = [
        (
            f"`{row['way']}`",
            _precision(row),
            f"{row['of_matrices']:.2f}",
            f"{row['of_model']:.2f}",
            f"{row['bytes'] / 1e6:.0f}",
            *(_cell(row["perplexity"][name]) for name in _WINDOWS),
        )
        for row in rows
    ]
    shown = {row["way"] for row in rows}
    meanings = [f"- `{name}`: {way.meaning}." for name, way in WAYS.items() if name in shown]
    meanings += [
        f"- `{name}`: `{name.removesuffix(_HEALED)}` after `mpop heal`, every core trained on what "
        "dense says."
        for name in sorted(shown)
        if name.endswith(_HEALED)
    ]
    versions = conditions["versions"]
    commits = sorted({commit for row in rows for commit in row["commits"]})
    cpus = sorted({cpu for row in rows for cpu in row["cpus"]})
    return "\n".join(
        [
            table(head, lines),
            "",
            *meanings,
            "- `int8`: rounded to the nearest, a scale a row; `int4`: a scale and an offset for "
            "each 64 inputs.",
            "",
            f"{NAME}, all linears but the head; kept: of their parameters. Perplexity (± standard "
            "deviation over calibration seeds) of WikiText-2's test text (tokenised version) in "
            "windows of 512 and 2048 tokens, and of RTE's premises; the first "
            f"{', '.join(map(str, _WINDOWS.values()))} windows. Calibrated on "
            f"{conditions['samples']} windows of {conditions['seqlen']} tokens of the validation "
            "text. MB: the linears as said, all else in 16 bits. The model's weights had been "
            "rounded to four bits before: compare with its own dense row, not with other figures.",
            "",
            f"{', '.join(cpus)}; torch {versions['torch']}, transformers "
            f"{versions['transformers']}; commit{'s' * (len(commits) > 1)} {', '.join(commits)}.",
            "",
            f"`{conditions['command']}`",
            "",
        ]
    )


def _precision(row: Row) -> str:
    draws = row["fp32_seeds"]
    if len(draws) == row["seeds"]:
        return "fp32"
    return f"bf16; draw {', '.join(map(str, draws))} in fp32" if draws else "bf16"


def _cell(found: tuple[float, float] | None) -> str:
    if found is None:
        return "not finite"
    mean, deviation = found
    digits = 1 if mean < 1000 else 0
    return f"{mean:,.{digits}f}" + (f" ± {deviation:,.{digits}f}" if deviation else "")


def figure(rows: Sequence[Row], path: Path) -> None:
    """Perplexity against bytes, a line a way; what is beyond the axis is said."""
    from matplotlib.ticker import LogLocator, NullLocator

    shown = next(iter(_WINDOWS))
    lines: dict[str, list[tuple[float, float, float]]] = {}
    beyond = []
    for row in sorted(rows, key=lambda each: each["bytes"]):
        megabytes, found = row["bytes"] / 1e6, row["perplexity"][shown]
        if found and found[0] < _BEYOND:
            lines.setdefault(row["way"], []).append((megabytes, *found))
        else:
            value = f"{found[0]:,.0f}" if found else "not finite"
            beyond.append(f"not shown: {row['way']} at {megabytes:.0f} MB, {value}")
    with drawing.figure(path, 8, 4.6) as drawn:
        axes = drawn.subplots()
        for way, points in lines.items():
            xs, ys, deviations = zip(*points, strict=True)
            colour = _COLOURS.get(way.removesuffix(_HEALED), drawing.TEXT)
            axes.errorbar(xs, ys, deviations, fmt="o-", color=colour, markersize=6)
        axes.set(
            xlabel="megabytes",
            ylabel=f"perplexity, {shown}",
            yscale="log",
            xmargin=0.16,  # for the names
        )
        axes.yaxis.set(
            major_locator=LogLocator(subs=(1, 2, 3, 5)),
            minor_locator=NullLocator(),
            major_formatter="{x:,.0f}",
        )
        axes.set_title("\n".join(beyond), loc="left", fontsize="medium")
        marks = [
            drawing.Mark(*points[0][:2], way, "left" if len(points) > 1 else "right")
            for way, points in lines.items()
        ]
        drawing.name(axes, marks)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.language.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, help="folder of table.json, table.md, table.svg")
    parser.add_argument("--texts", required=True, help="WikiText-2: a folder of valid and test.txt")
    parser.add_argument("--data-dir", help="a folder in GLUE's own layout; without it the hub")
    parser.add_argument("--model", help="a decoder's folder; by default that of the package")
    parser.add_argument("--scratch", default=".cache", help="where that one is written")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS)[:5])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.9, 0.8, 0.6, 0.4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=512, help="their tokens")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="autocast")
    parser.add_argument(
        "--saved",
        nargs="+",
        default=[],
        metavar="WAY=FOLDER",
        help="compressed models as well, such as ours-healed=FOLDER, one of 'mpop heal'",
    )
    parser.add_argument("--budget-minutes", type=float, default=1e6, help="stop after the run")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    rows = summary(measure(options))
    conditions = facts.conditions(
        *("bench.language.table", argv, torch.device("cpu"), "transformers"),
        samples=options.samples,
        seqlen=options.seqlen,
    )
    output = Path(options.output)
    (output / "table.json").write_text(text_of({"conditions": conditions, "rows": rows}))
    text = markdown(rows, conditions)
    (output / "table.md").write_text(text)
    figure(rows, output / "table.svg")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
