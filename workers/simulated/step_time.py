"""How long one engine step takes: a linear model of prefill, decoding and context."""

from dataclasses import astuple, dataclass


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one step computes."""

    prefill_tokens: int = 0
    attention: float = 0.0
    """Query-key pairs of the prefill: sum of n * (s + n / 2) for n new tokens after s computed ones."""
    decoding: int = 0
    context_tokens: int = 0
    """Tokens that the decoding sequences attend to, all together."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Coefficients in seconds: step, prefill token, decoding sequence, context token, attention pair.

    `loading`: a token's KV on its way from host memory to the GPU, which goes on beside steps.
    """

    step: float
    prefill: float
    sequence: float
    context: float
    attention: float = 0.0
    loading: float = 0.0

    def __post_init__(self) -> None:
        if self.step <= 0 or min(astuple(self)) < 0:
            raise ValueError("step times must not be negative, and a step must take some time")

    def seconds(self, work: StepWork) -> float:
        """T = a + c * decoding + d * context + b * prefill + e * attention."""
        return (
            self.decode_seconds(work.decoding, work.context_tokens)
            + self.prefill * work.prefill_tokens
            + self.attention * work.attention
        )

    def decode_seconds(self, decoding: int, context_tokens: int) -> float:
        """The same for a step that only decodes."""
        return self.step + self.sequence * decoding + self.context * context_tokens

    def at_speed(self, speed: float) -> "StepTime":
        """Those of an engine whose clock runs so many times as fast."""
        return StepTime(*(seconds / speed for seconds in astuple(self)))


@dataclass(frozen=True, slots=True)
class Preset:
    """One model on one set of GPUs: its step times, the tokens its KV cache holds, and the bytes of one."""

    step_time: StepTime
    kv_tokens: int
    kv_bytes: int


# Of Llama 3.1: keys and values of 8 heads of 128 in 16 bits, in 32 and 80 layers.
KV_BYTES_8B, KV_BYTES_70B = 32 * 4096, 80 * 4096
# Bytes a second that a GPU copies from pinned host memory; PCIe 5.0 x16 has 63e9 by data sheet.
HOST_BANDWIDTH = 50e9

# Roofline estimates (data-sheet FLOPs and bandwidth times an assumed efficiency), not measurements of a GPU.
PRESETS = {
    "8b-h100": Preset(
        StepTime(6e-3, 33e-6, 45e-6, 5.6e-8, 1.3e-9, KV_BYTES_8B / HOST_BANDWIDTH), 400_000, KV_BYTES_8B
    ),
    "70b-4xh100": Preset(
        StepTime(16e-3, 79e-6, 100e-6, 3.5e-8, 1.64e-9, KV_BYTES_70B / (4 * HOST_BANDWIDTH)),
        450_000,
        KV_BYTES_70B,
    ),
}
