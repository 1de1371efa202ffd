from collections.abc import Sequence

from mpo_kernels.backends.cuda.thin import Product

INTERFACE: int
SOURCES: str

def limits(device: int) -> tuple[int, int]:
    """Architecture (80 for 8.0) and multiprocessors.

    The architecture is that of the code which runs there: of older PTX where there is no other.

    Raises:
        RuntimeError: what CUDA says, as where the library has no code for the device.
    """

class Chain:
    """Thin products in a row, made without a device.

    Args:
        products: one to three, in the order of contraction.
        offsets: bytes into the workspace of what each makes; of the last, its shares.
        out_features: of y.
        element: of x, bias and y, "float16" or "bfloat16".
        stored: of the cores, `element`, "float8_e4m3fn" or "int8".
        programmatic: whether the code that runs there knows programmatic dependent launch (9.0).

    Raises:
        ValueError: an argument that does not fit, by name.
    """

    def __init__(
        self,
        products: Sequence[Product],
        offsets: Sequence[int],
        out_features: int,
        element: str,
        stored: str,
        programmatic: bool,
    ) -> None: ...
    def launch(
        self,
        x: int,
        x_row: int,
        cores: Sequence[int],
        scales: Sequence[int],
        bias: int,
        y: int,
        workspace: int,
        early: bool,
        device: int,
        stream: int,
    ) -> None:
        """Enqueue the products, or nothing where an argument is wrong; addresses, 0 for none.

        Args:
            x: [rows, in_features], with stride `x_row` in elements.
            cores: in the order of the products.
            scales: fp32 [D] for each bond between them, of quantised cores; empty for none.
            bias: [out_features], or 0.
            y: [rows, out_features], contiguous.
            workspace: of any contents.
            early: whether nothing that may still run writes a core.
            device, stream: where to, the latter a cudaStream_t.

        Raises:
            ValueError: more or fewer cores than products, or a null or misaligned address, by name.
            RuntimeError: what CUDA says of a launch.
        """
