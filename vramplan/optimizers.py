"""Optimizers: what each keeps per parameter and what its step allocates. One row is one optimizer.

Source: torch 2.11 ``optim/adamw.py``, ``optim/_multi_tensor`` paths, ``optim/sgd.py``;
transformers 5.17 ``training_args.py`` (``OptimizerNames``), ``trainer_optimizer.py``,
``optimization.py`` (``Adafactor``); bitsandbytes 0.50.2 ``optim/optimizer.py``
(``get_state_buffer``: paged from 100,000 elements; ``min_8bit_size`` 4096; blocks of 256).
"""

from __future__ import annotations

from dataclasses import dataclass

from vramplan.errors import UnknownNameError
from vramplan.formats import Dtype
from vramplan.units import round_block

PAGED_MIN_NUMEL = 100_000
MIN_8BIT_NUMEL = 4096
BLOCKWISE = 256


@dataclass(frozen=True, slots=True)
class Optimizer:
    """One value of transformers' ``OptimizerNames``.

    Attributes:
        name: The value.
        num_states: Full-size state tensors per parameter.
        state_bits: Bits per element of each; 0 means "in the parameter's own dtype".
        library: "torch", "bitsandbytes" or "transformers".
        paged: Whether large states live in CUDA managed memory.
        step_on_device: Whether a one-element step counter per parameter sits on the device.
        foreach_temporaries: Full-size temporaries (parameter dtype) of a multi-tensor step, held
            for all parameters at once.
        factored: Adafactor: row and column statistics instead of full-size state.
        num_launches: Operations that a step launches for each parameter, where it goes parameter
            by parameter; multi-tensor steps launch a handful for all together.
    """

    name: str
    num_states: int
    state_bits: int = 0
    library: str = "torch"
    paged: bool = False
    step_on_device: bool = False
    foreach_temporaries: int = 0
    factored: bool = False
    num_launches: int = 0

    def state_parts(
        self, numel: int, rows: int, dtype: Dtype, *, embedding: bool = False, matrices: int = 1
    ) -> tuple[list[int], int]:
        """State of one parameter.

        Args:
            numel: Elements of the parameter.
            rows: Size of its first dimension (0 for a vector).
            dtype: dtype of the parameter.
            embedding: Whether it is an ``nn.Embedding``'s table, for which transformers keeps
                8-bit optimizers in 32 bits.
            matrices: How many matrices the parameter stacks; ``rows`` are those of all.

        Returns:
            Bytes of each allocation on the device (unrounded), and bytes in managed memory.
        """
        if self.factored:
            rms = 4  # of the parameter, a tensor of one element
            if rows:
                return [rows * 4, numel // rows * matrices * 4, rms], 0
            return [numel * 4, rms], 0
        if self.library != "bitsandbytes":
            size = dtype.size if self.state_bits == 0 else self.state_bits // 8
            return [numel * size] * self.num_states + [4] * self.step_on_device, 0
        eight_bit = self.state_bits == 8 and numel >= MIN_8BIT_NUMEL and not embedding
        state = numel * (1 if eight_bit else 4)
        scales = [-(-numel // BLOCKWISE) * 4] * self.num_states if eight_bit else []
        if self.paged and numel >= PAGED_MIN_NUMEL:
            return scales, state * self.num_states
        return [state] * self.num_states + scales, 0

    def shared_parts(self) -> tuple[int, ...]:
        """Bytes of device tensors shared by all parameters (8-bit quantisation maps)."""
        if self.library == "bitsandbytes" and self.state_bits == 8:
            return (256 * 4,) * 2
        return ()

    def step_temporaries(self, numel: int, dtype: Dtype) -> list[int]:
        """Bytes of the temporaries of one parameter's multi-tensor step, held until it ends."""
        return [round_block(numel * dtype.size)] * self.foreach_temporaries


def _bnb(name: str, states: int, bits: int, *, paged: bool = False) -> Optimizer:
    # Python's loop, the custom operation and, for paged state, the prefetch: as long as 5 launches
    return Optimizer(name, states, bits, "bitsandbytes", paged, num_launches=5)


OPTIMIZERS = {
    row.name: row
    for row in (
        Optimizer("adamw_torch", 2, foreach_temporaries=1),
        Optimizer("adamw_torch_fused", 2, step_on_device=True),
        Optimizer("sgd", 0),
        # std, and the gradients times -lr
        Optimizer("adagrad", 1, foreach_temporaries=2),
        Optimizer("rmsprop", 1, foreach_temporaries=1),
        # its step, parameter by parameter, is walked by the estimate
        Optimizer("adafactor", 0, library="transformers", factored=True, num_launches=28),
        _bnb("adamw_8bit", 2, 8),
        _bnb("adamw_bnb_8bit", 2, 8),
        _bnb("paged_adamw_8bit", 2, 8, paged=True),
        _bnb("paged_adamw_32bit", 2, 32, paged=True),
        _bnb("lion_32bit", 1, 32),
        _bnb("lion_8bit", 1, 8),
        _bnb("paged_lion_8bit", 1, 8, paged=True),
        _bnb("paged_lion_32bit", 1, 32, paged=True),
        _bnb("rmsprop_bnb", 1, 32),
        _bnb("rmsprop_bnb_8bit", 1, 8),
        _bnb("rmsprop_bnb_32bit", 1, 32),
        # AdEMAMix keeps two fast averages in one double state
        _bnb("ademamix", 3, 32),
        _bnb("ademamix_8bit", 3, 8),
        _bnb("paged_ademamix_32bit", 3, 32, paged=True),
        _bnb("paged_ademamix_8bit", 3, 8, paged=True),
    )
}


def find_optimizer(name: str) -> Optimizer:
    """The optimizer of that ``OptimizerNames`` value.

    Raises:
        UnknownNameError: If it is not modelled.
    """
    try:
        return OPTIMIZERS[name]
    except KeyError:
        raise UnknownNameError("optimizer", name, OPTIMIZERS) from None
