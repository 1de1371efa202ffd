"""What to compress and how (`CompressionConfig`), and what a checkpoint holds (`MPOConfig`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from mpo_kernels import MPOShape
from mpo_kernels.cores.family import Objective
from mpo_kernels.cores.quantize import LARGEST
from mpo_kernels.layers.cost import LayerCost

FORMAT_VERSION = 1
LINEARS = ("linear", "conv1d")
KINDS = (*LINEARS, "embedding", "experts")
INTERPOLATIVE = "interpolative"
FACTORS = ("balanced", "auto", INTERPOLATIVE)
# What cores can be stored in beside the dtype of the model.
STORES = {str(dtype).removeprefix("torch."): dtype for dtype in LARGEST}
# What says how much of a matrix is kept, or trained.
_BUDGETS = ("ranks", "rel_error", "compression", "share")


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether the glob fits one of `names` as a whole: `*.query` fits `layer.0.query`."""
    return any(fnmatchcase(name, pattern) for name in names)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_ints(name: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected a sequence of integers, got {values!r}")
    values = tuple(values)
    if not values or not all(_is_int(value) and value >= 1 for value in values):
        raise ValueError(f"{name}: expected integers of at least 1, got {values}")
    return values


@dataclass
class MatrixConfig:
    """How one matrix is factored and truncated; see `CompressionConfig` for the fields.

    Raises:
        TypeError, ValueError: a value of the wrong type or range, more than one of `ranks`,
            `rel_error`, `compression` and `share`, a share of explicit factors, or only one of
            `in_factors` and `out_factors`.
    """

    num_cores: int = 5
    ranks: int | tuple[int, ...] | None = None
    rel_error: float | None = None
    compression: float | None = None
    share: float | None = None
    in_factors: tuple[int, ...] | None = None
    out_factors: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not _is_int(self.num_cores):
            raise TypeError(f"num_cores: expected an integer, got {self.num_cores!r}")
        if self.num_cores < 2:
            raise ValueError(f"num_cores: expected at least 2, got {self.num_cores}")
        if _is_int(self.ranks):
            _check_ints("ranks", (self.ranks,))
        elif self.ranks is not None:
            self.ranks = _check_ints("ranks", self.ranks)
        for name in ("rel_error", "compression", "share"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, float) and not _is_int(value):
                raise TypeError(f"{name}: expected a number, got {value!r}")
        if self.rel_error is not None and not 0 <= self.rel_error < 1:
            raise ValueError(f"rel_error: expected 0 <= rel_error < 1, got {self.rel_error}")
        if self.compression is not None and not 0 < self.compression <= 1:
            raise ValueError(f"compression: expected 0 < compression <= 1, got {self.compression}")
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"share: expected 0 < share < 1, got {self.share}")
        given = [name for name in _BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"expected at most one of {', '.join(_BUDGETS)}, got {given}")
        if (self.in_factors is None) != (self.out_factors is None):
            raise ValueError(
                "expected both in_factors and out_factors or neither, "
                f"got {self.in_factors} and {self.out_factors}"
            )
        if self.in_factors is not None:
            if self.share is not None:
                raise ValueError("expected a share, which chooses factors, or explicit ones")
            self.in_factors = _check_ints("in_factors", self.in_factors)
            self.out_factors = _check_ints("out_factors", self.out_factors)

    def shape(
        self, in_features: int, out_features: int, tensor_parallel: int = 1, is_table: bool = False
    ) -> MPOShape:
        """The MPO of a matrix of this size; explicit factors and a share go before `num_cores`.

        Args:
            is_table: whether it is an embedding's, whose rows a share leaves whole.

        Raises:
            ValueError: factors or ranks that do not fit the size, or that `tensor_parallel` does
                not divide.
        """
        if self.share is not None:
            return MPOShape.light(
                in_features,
                out_features,
                self.share,
                is_table=is_table,
                tensor_parallel=tensor_parallel,
            )
        if self.in_factors is None or self.out_factors is None:
            return MPOShape.balanced(
                in_features, out_features, self.num_cores, self.ranks, tensor_parallel
            )
        shape = MPOShape(
            self.in_factors,
            self.out_factors,
            self.ranks,
            in_features=in_features,
            out_features=out_features,
        )
        if not shape.splits(tensor_parallel):
            raise ValueError(
                f"expected factors whose first ones tensor_parallel = {tensor_parallel} divides, "
                f"without padding, got {self.in_factors} and {self.out_factors}"
            )
        return shape


@dataclass
class CompressionConfig:
    """Which matrices of a model to decompose, into how many cores, and how far to truncate.

    A pattern is a glob (`fnmatch.fnmatchcase`) that must fit the whole dotted module name, as in
    `*.attention.self.query`. A matrix that several modules share answers to each of their names.

    Args:
        num_cores: cores of each matrix, at least 2, where neither `factors` nor `share` choose
            them; the paper's is 5.
        ranks: cap on every bond (int), or exactly these bonds (num_cores − 1 ints).
        rel_error: bound on each matrix's relative Frobenius error, in [0, 1).
        compression: parameters to keep of each matrix, as a fraction of the dense ones, at most 1.
        share: trained parameters of each matrix in light fine-tuning, as a fraction of the dense
            ones, above 0 and below 1: two cores at full rank, whose auxiliary one holds about so
            many; see `mpo_kernels.MPOShape.light`.
            At most one of the four; a share, or none of them, keeps the full rank, which is exact.
        include: patterns of the matrices to compress. None: every Linear and Conv1D of the base
            model, and the word embeddings; heads outside it only where a pattern names them.
        exclude: patterns of the matrices to leave dense.
        embeddings: whether word embeddings, and an output head tied to them, are compressed.
        overrides: `{pattern: {...}}` with other `num_cores`, `ranks`, `rel_error`, `compression`,
            `share`, or explicit `in_factors` and `out_factors`. A later pattern goes before an
            earlier one; naming any of ranks, rel_error, compression and share replaces all four,
            and explicit factors replace a share.
        factors: `"balanced"`: `num_cores` even factors for each matrix, as in the paper. `"auto"`:
            for each the member of the family that loses least, or none where dense is worth it,
            under one budget: `compression` is of all the matrices together. `"interpolative"`:
            under one budget too, linears as r of their rows and what makes the others of them (see
            `mpo_kernels.InterpolativeLinear`), r² numbers fewer than two cores; embeddings and
            experts, where they are cut, as two cores.
        objective: what the budget of `"auto"` counts: `"parameters"`, `"memory"` (bytes of
            weights and states) or `"latency"` (predicted by the planner).
        rows: rows of x that memory and latency are meant for.
        tensor_parallel: the number of devices, or a multiple of it, that the model is to be
            served on: the first factors above 1 of every matrix but the embeddings are multiples
            of it.
        shared_core: experts, which under one budget are cut to two cores, have one of them in
            common, that whose sharing loses less; see `mpo_kernels.MPOExperts`.

    Raises:
        TypeError, ValueError: a value of the wrong type or range, saying what was expected.
    """

    num_cores: int = 5
    ranks: int | tuple[int, ...] | None = None
    rel_error: float | None = None
    compression: float | None = None
    share: float | None = None
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    embeddings: bool = True
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    factors: Literal["balanced", "auto", "interpolative"] = "balanced"
    objective: Objective = "parameters"
    rows: int = 1
    tensor_parallel: int = 1
    shared_core: bool = False

    def __post_init__(self) -> None:
        if self.factors not in FACTORS:
            expected = " or ".join(map(repr, FACTORS))
            raise ValueError(f"factors: expected {expected}, got {self.factors!r}")
        LayerCost(self.objective, self.rows)
        _check_ints("tensor_parallel", (self.tensor_parallel,))
        if self.shares_budget and (self.compression is None or self.overrides):
            values = {name: getattr(self, name) for name in (*_BUDGETS, "overrides")}
            given = {name: value for name, value in values.items() if value}
            raise ValueError(
                f"factors {self.factors!r} share one budget: expected a compression (--compression "
                "0.5), no other bound and no overrides, got "
                f"{given or 'none'}"
            )
        chosen = self.shares_budget or (self.share is not None and not self.overrides)
        if chosen and self.num_cores != MatrixConfig.num_cores:
            by = "a share" if self.share is not None else f"factors {self.factors!r}"
            raise ValueError(f"num_cores: chosen by {by}, expected none, got {self.num_cores}")
        if self.factors != "auto" and (self.objective, self.rows) != ("parameters", 1):
            raise ValueError(
                f"objective {self.objective!r} at {self.rows} rows: expected factors 'auto', got "
                f"{self.factors!r}"
            )
        if not isinstance(self.shared_core, bool):
            raise TypeError(f"shared_core: expected True or False, got {self.shared_core!r}")
        if self.shared_core and not (self.shares_budget and self.objective == "parameters"):
            raise ValueError(
                "shared_core: expected factors 'auto' or 'interpolative' and the objective "
                f"'parameters', got {self.factors!r} and {self.objective!r}"
            )
        budgets = {name: getattr(self, name) for name in _BUDGETS}
        self.ranks = MatrixConfig(self.num_cores, **budgets).ranks
        if self.include is not None:
            self.include = self._patterns("include", self.include)
        self.exclude = self._patterns("exclude", self.exclude)
        if not isinstance(self.embeddings, bool):
            raise TypeError(f"embeddings: expected True or False, got {self.embeddings!r}")
        if not isinstance(self.overrides, Mapping):
            raise TypeError(f"overrides: expected {{pattern: settings}}, got {self.overrides!r}")
        known = {known.name for known in fields(MatrixConfig)}
        for pattern, settings in self.overrides.items():
            if not isinstance(pattern, str) or not isinstance(settings, Mapping):
                raise TypeError(
                    f"overrides: expected {{pattern: settings}}, got {pattern!r}: {settings!r}"
                )
            if unknown := settings.keys() - known:
                raise ValueError(
                    f"overrides[{pattern!r}]: expected {sorted(known)}, got {sorted(unknown)}"
                )
            try:
                MatrixConfig(**settings)
            except (TypeError, ValueError) as error:
                raise type(error)(f"overrides[{pattern!r}]: {error}") from None

    @property
    def shares_budget(self) -> bool:
        """Whether `compression` is of all the matrices together."""
        return self.factors != "balanced"

    @staticmethod
    def _patterns(name: str, values: Any) -> tuple[str, ...]:
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise TypeError(f"{name}: expected a sequence of patterns, got {values!r}")
        values = tuple(values)
        if not all(isinstance(value, str) for value in values):
            raise TypeError(f"{name}: expected patterns as strings, got {values!r}")
        return values

    def for_matrix(self, names: Iterable[str]) -> MatrixConfig:
        """The settings of the matrix that the modules `names` hold."""
        names = tuple(names)
        settings = {name: getattr(self, name) for name in ("num_cores", *_BUDGETS)}
        for pattern, override in self.overrides.items():
            if matches(pattern, names):
                if not override.keys().isdisjoint(_BUDGETS):
                    settings.update(dict.fromkeys(_BUDGETS))
                if "in_factors" in override:
                    settings["share"] = None
                settings.update(override)
        return MatrixConfig(**settings)


def has_rows(shape: MPOShape) -> bool:
    """Whether it is low rank as `MPOShape.low_rank` makes it, which has an interpolative form."""
    rank = max(shape.ranks, default=1)
    return shape == MPOShape.low_rank(shape.in_features, shape.out_features, rank)


class ModuleSpec(NamedTuple):
    """One compressed matrix of a checkpoint."""

    kind: str  # the dense module that it stands for, one of KINDS
    shape: MPOShape
    frozen: bool  # whether all its cores but the central one are trained
    store: str | None = None  # one of STORES where the cores are quantised
    experts: int | None = None  # whose cores are stacked
    form: str | None = None  # INTERPOLATIVE where rows of the matrix make the others
    shared: int | None = None  # the core that experts have in common

    def weight(self, name: str) -> str:
        """What a dense model holds in the place of a module of this name."""
        return name if self.kind == "experts" else f"{name}.weight"

    def core(self, k: int) -> str:
        """The name of core k in the module's state."""
        return f"cores.{k}" if self.store is None else f"{self.store}_core_{k}"

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what holds the matrix, by their names in the module's state."""
        shapes: dict[str, tuple[int, ...]]
        if self.form is not None:
            features, (rank,) = self.shape.out_features, self.shape.ranks
            pivots = (rank, self.shape.in_features)
            shapes = {self.core(0): (features - rank, rank), self.core(1): pivots}
            if self.store is not None:
                shapes |= {"scale_0": (features - rank,), "scale_1": (rank,), "scale_2": (rank,)}
            return shapes | {"order": (features,)}
        stack = () if self.experts is None else (self.experts,)
        shapes = {
            self.core(k): size if k == self.shared else (*stack, *size)
            for k, size in enumerate(self.shape.core_shapes)
        }
        if self.store is not None:
            shapes |= {f"scale_{k}": (rank,) for k, rank in enumerate(self.shape.ranks)}
        return shapes


@register_quantization_config("mpo")
class MPOConfig(QuantizationConfigMixin):
    """The `quantization_config` of a saved model, or of a dense one to compress while it loads.

    Args:
        modules: of a saved model, `{module name: {"kind", "frozen", and MPOShape.to_dict()}}`,
            with a `"store"` where the cores are quantised: `"int8"` or `"float8_e4m3fn"`, the
            number of `"experts"` whose cores are stacked, the index of the one that they have in
            common as `"shared"`, and a `"form"` where they are those of an
            `mpo_kernels.InterpolativeLinear`: `"interpolative"`. A head tied to an embedding has no
            entry: it follows from the tie.
        version: of this format.
        compress: what `from_pretrained` is to make of a dense checkpoint, a `CompressionConfig` or
            its fields; one matrix at a time is decomposed and freed.

    Raises:
        ValueError: a version newer than `FORMAT_VERSION`, unknown fields, a bad entry, both of
            `modules` and `compress`, or factors that share a budget, which need the whole model.
    """

    def __init__(
        self,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        version: int = FORMAT_VERSION,
        quant_method: str = "mpo",
        compress: CompressionConfig | Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        if not _is_int(version) or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"this MPO checkpoint is of format version {version!r}, and this version of mpop "
                f"reads 1 to {FORMAT_VERSION}: upgrade mpop"
            )
        if unknown:
            raise ValueError(f"unknown fields in the MPO configuration: {sorted(unknown)}")
        if not isinstance(modules or {}, Mapping):
            raise ValueError(f"modules: expected {{name: shape}}, got {modules!r}")
        self.quant_method = quant_method  # type: ignore[assignment]
        self.version = version
        self.modules = dict(modules or {})
        self.specs()
        if isinstance(compress, Mapping):
            compress = CompressionConfig(**compress)
        if compress is not None and self.modules:
            raise ValueError("expected modules, of a saved model, or compress, got both")
        if compress is not None and compress.shares_budget:
            raise ValueError(
                f"factors {compress.factors!r} look at the whole model: load it, then call "
                "mpop.compress"
            )
        self.compress = compress

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable dictionary; `compress` only where it is given."""
        entries = {name: getattr(self, name) for name in ("quant_method", "version", "modules")}
        return entries if self.compress is None else {**entries, "compress": asdict(self.compress)}

    @classmethod
    def from_specs(cls, specs: Mapping[str, ModuleSpec]) -> MPOConfig:
        """The configuration of a model whose modules are `specs`; see `specs()`."""
        entries: dict[str, dict[str, Any]] = {}
        for name, spec in specs.items():
            entries[name] = {"kind": spec.kind, "frozen": spec.frozen, **spec.shape.to_dict()}
            more = {key: getattr(spec, key) for key in ("store", "experts", "form", "shared")}
            entries[name] |= {key: value for key, value in more.items() if value is not None}
        return cls(entries)

    def specs(self) -> dict[str, ModuleSpec]:
        """The entries of `modules`, checked.

        Raises:
            ValueError: an entry with an unknown kind, store or form, or a shape that contradicts
                itself.
        """
        specs = {}
        for name, entry in self.modules.items():
            try:
                shape = dict(entry)
                kind, frozen = shape.pop("kind"), shape.pop("frozen")
                store, experts = shape.pop("store", None), shape.pop("experts", None)
                form, shared = shape.pop("form", None), shape.pop("shared", None)
                if kind not in KINDS or not isinstance(frozen, bool):
                    raise ValueError(f"expected a kind of {KINDS} and frozen as a bool")
                is_count = _is_int(experts) and experts >= 1
                if not (is_count if kind == "experts" else experts is None):
                    raise ValueError(
                        f"experts: expected a number of them, got {experts!r} of {kind}"
                    )
                if store is not None and (store not in STORES or kind not in LINEARS or frozen):
                    raise ValueError(
                        f"store: expected one of {list(STORES)}, of a linear or conv1d that is not "
                        f"frozen, got {store!r} of a {kind}, frozen: {frozen}"
                    )
                made = MPOShape.from_dict(shape)
                is_plain = kind in LINEARS and has_rows(made)
                if form is not None and (form != INTERPOLATIVE or not is_plain):
                    raise ValueError(
                        f"form: expected {INTERPOLATIVE!r}, of a linear or conv1d of low rank, got "
                        f"{form!r} of a {kind}, {made}"
                    )
                if shared is not None and not (
                    experts and _is_int(shared) and 0 <= shared < made.num_cores
                ):
                    raise ValueError(
                        f"shared: expected one of {made.num_cores} cores of experts, got "
                        f"{shared!r} of {kind}"
                    )
                specs[name] = ModuleSpec(kind, made, frozen, store, experts, form, shared)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"bad MPO configuration of {name!r}: {error}") from error
        return specs
