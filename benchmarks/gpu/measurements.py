"""The parts of a run, in the order of what matters most if time runs out."""

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Final

from benchmarks.bench_host_step import Load, host_steps_ms
from benchmarks.gpu import answers, models, parity, peers
from benchmarks.gpu.devices import Ceilings
from benchmarks.gpu.findings import Finding, Run, Target
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.serving import ServingMeasurements
from gemma_serve.errors import ConfigurationError
from gemma_serve.gemma.config import Device, Quantization
from gemma_serve.gemma.placement import Placement
from gemma_serve.gemma.quantization.kinds import KINDS, require_kind

PARTS: Final = ("parity", "host", "serving", "peers", "quantized")

_SMALL_PART_S: Final = 20.0
_PEERS_S: Final = 180.0
"""Those of one size may take; usual is a third."""
_HOST_TARGET_MS: Final = 1.0
_HOST_TARGET_STREAMS: Final = 64
_INT4_TARGET: Final = 2.0


class Measurements:
    """Everything that can be measured on one device."""

    def __init__(
        self, run: Run, scale: Scale, placement: Placement, sizes: Collection[str]
    ) -> None:
        self._run = run
        self._scale = scale
        self._placement = placement
        self._sizes = sizes
        self._device: Device = "cuda" if placement.devices[0].type == "cuda" else "cpu"
        self._ceilings: Ceilings | None = None
        self._bursts: dict[str, float] = {}
        self._single_streams: dict[str, float] = {}

    def measure(self, parts: Collection[str]) -> None:
        """``parts``: of ``PARTS``."""
        every: Mapping[str, Callable[[], None]] = {
            "parity": self._parity,
            "host": lambda: self._run.part("host work", _SMALL_PART_S, self._host),
            "serving": self._serving,
            "peers": self._peers,
            "quantized": self._quantized,
        }
        self._run.part("ceilings", _SMALL_PART_S, self._measure_ceilings)
        for part in PARTS:
            if part in parts:
                every[part]()

    def _measure_ceilings(self) -> Iterator[Finding]:
        self._ceilings = Ceilings(self._placement.devices[0], self._scale)
        yield from self._ceilings.findings()

    def _parity(self) -> None:
        device, dtype = self._placement.devices[0], self._placement.dtype
        for size in self._sizes:
            compare = partial(parity.compare, size, device, dtype)
            self._run.part(f"{size} attention", _SMALL_PART_S, compare)
        for size in [size for size in self._scale.peer_sizes if size in self._sizes][:1]:
            compare = partial(answers.compare, size, self._device, self._placement, self._scale)
            self._run.part(f"{size} answers", self._scale.model_s, compare)

    def _host(self) -> Iterator[Finding]:
        for num_streams in self._scale.host_streams:
            times_ms = host_steps_ms(Load(num_streams, 1500, self._scale.host_steps))
            goal = Target(limit=_HOST_TARGET_MS, direction="at most")
            yield Finding(
                what=f"host work of a step, {num_streams} streams",
                value=sum(times_ms) / len(times_ms),
                unit="ms",
                target=goal if num_streams == _HOST_TARGET_STREAMS else None,
            )

    def _serving(self) -> None:
        for size in self._sizes:
            self._of_model(size, partial(self._serve, size))

    def _serve(self, size: str) -> Iterator[Finding]:
        measured = self._start(size, "none")
        yield measured.weights()
        yield measured.capacity()
        part = partial(self._run.part, estimate_s=self._scale.model_s / 4)
        part(f"{size} decode", measure=lambda: self._noting_single(size, measured.decode()))
        part(f"{size} prefill", measure=lambda: [measured.prefill()])
        part(f"{size} arrivals", measure=measured.arrivals)
        part(f"{size} burst", measure=lambda: self._noting_burst(size, measured.burst()))

    def _noting_single(self, size: str, findings: Iterator[Finding]) -> Iterator[Finding]:
        for finding in findings:
            self._single_streams.setdefault(size, finding.value)  # the first is of one stream
            yield finding

    def _noting_burst(self, size: str, finding: Finding) -> list[Finding]:
        self._bursts[size] = finding.value
        return [finding]

    def _peers(self) -> None:
        for size in self._scale.peer_sizes:
            if size in self._sizes:
                limit_s = min(_PEERS_S, self._run.left_s)
                ours = self._bursts.get(size)
                compare = partial(peers.compare, size, self._device, ours, limit_s)
                self._of_model(f"{size} peers", compare)

    def _quantized(self) -> None:
        for size in self._scale.quantized_sizes:
            for kind in KINDS if size in self._sizes else ():
                try:
                    require_kind(kind, self._placement)
                except ConfigurationError as error:
                    self._run.skipped.append(f"{size} {kind}: {error}")
                    continue
                self._of_model(f"{size} {kind}", partial(self._serve_quantized, size, kind))

    def _serve_quantized(self, size: str, kind: Quantization) -> Iterator[Finding]:
        measured = self._start(size, kind)
        yield measured.weights()
        yield measured.capacity()
        decode = measured.decode()
        single = next(decode)
        yield single
        if whole := self._single_streams.get(size):
            is_goal = size == "27b" and kind == "torchao-int4"
            yield Finding(
                what=f"{measured.label} over bfloat16, one stream",
                value=single.value / whole,
                unit="times",
                target=Target(limit=_INT4_TARGET) if is_goal else None,
            )
        yield from decode
        yield measured.prefill()

    def _of_model(self, name: str, measure: Callable[[], Iterator[Finding]]) -> None:
        self._run.part(name, self._scale.model_s, measure)
        models.collect(self._placement.devices[0])

    def _start(self, size: str, kind: Quantization) -> ServingMeasurements:
        if self._ceilings is None:
            raise RuntimeError("without ceilings there is nothing to compare with")
        gemma = models.load(size, self._device, kind)
        label = size if kind == "none" else f"{size} {kind}"
        return ServingMeasurements(label, size, gemma, self._scale, self._ceilings)
