from collections.abc import Sequence

INTERFACE: int
SOURCES: str
MAX_ROWS: int
MAX_PARTS: int

def limits(device: int) -> tuple[int, int, int]:
    """Architecture (80 for 8.0), multiprocessors, bytes of shared memory a block may have.

    The architecture is that of the code which runs there: of older PTX where there is no other.

    Raises:
        RuntimeError: what CUDA says, as where the library has no code for the device.
    """

def make_zeros(device: int, count: int) -> int:
    """The address of so many zeros of 4 bytes on a device; they are never freed.

    Raises:
        RuntimeError: what CUDA says.
    """

def is_capturing(stream: int) -> bool:
    """Whether what is enqueued on a stream now goes into a graph.

    Raises:
        RuntimeError: what CUDA says.
    """

class Chain:
    """The decode chain for one problem: its schedule, made without a device.

    Args:
        cores: of each core its sizes and its strides in elements, both [D_in, i, j, D_out], and
            whether its address is divisible by 16.
        rows: 1 to MAX_ROWS.
        in_features, out_features: of x and y; the factors' products may be larger.
        from_left: whether the first core is contracted first, else the last.
        element: of x, bias and y, "float16" or "bfloat16".
        stored: of the cores, `element`, "float8_e4m3fn" or "int8".
        limits: see :func:`limits`.

    Raises:
        ValueError: an argument that does not fit, by name.
        RuntimeError: an architecture that is not served, or nothing fits its shared memory.
    """

    def __init__(
        self,
        cores: Sequence[tuple[Sequence[int], Sequence[int], bool]],
        rows: int,
        in_features: int,
        out_features: int,
        from_left: bool,
        element: str,
        stored: str,
        limits: tuple[int, int, int],
    ) -> None: ...
    def launch(
        self,
        x: int,
        x_row: int,
        x_column: int,
        cores: Sequence[int],
        scales: Sequence[int],
        bias: int,
        y: int,
        partials: int,
        counters: int,
        device: int,
        stream: int,
    ) -> None:
        """Enqueue the kernel; addresses, 0 for none. Nothing is written where it raises.

        Args:
            x: [rows, in_features], with strides `x_row` and `x_column` in elements.
            cores: in the layer's order.
            scales: fp32 [D] for each bond, of quantised cores; empty for none.
            bias: [out_features], or 0.
            y: [rows, out_features], contiguous.
            partials: `partials` fp32 values, of any contents.
            counters: `counters` int32 zeros, zeros again when the kernel is done.
            device, stream: where to, the latter a cudaStream_t.

        Raises:
            ValueError: a null or misaligned address, by name.
            RuntimeError: what CUDA says of the launch.
        """

    @property
    def seconds(self) -> float:
        """Predicted time, the launch aside."""

    @property
    def tiles(self) -> int:
        """Blocks of y."""

    @property
    def splits(self) -> int:
        """Blocks of the sum, for each of y's."""

    @property
    def partials(self) -> int: ...
    @property
    def counters(self) -> int: ...
    @property
    def shared_memory(self) -> int:
        """Bytes a block."""
