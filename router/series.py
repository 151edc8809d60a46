"""Counters and histograms for one event loop: no locks, since only the loop writes and reads them.

prometheus_client's own take a lock for every value; a request has seven, which was an eighth of its cost.
Here too it is prometheus_client that Prometheus talks to: families are collectors in its registry.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Counter:
    """A number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        """Adds to it."""
        self.value += amount


class Histogram:
    """How many observations were at most each of the bounds, and their sum."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last: over every bound
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Counts one observation."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bounds and cumulative counts, as Prometheus wants them."""
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(self.counts)), strict=True))


Child = TypeVar("Child", Counter, Histogram)


class _Family(Collector, Generic[Child]):
    """All series of one name: a child for every combination of label values that was asked for."""

    def __init__(self, registry: CollectorRegistry, name: str, help_: str, labels: Sequence[str]) -> None:
        self._name, self._help, self._labels = name, help_, labels
        self._children: dict[tuple[str, ...], Child] = {}
        registry.register(self)

    def labels(self, *values: str) -> Child:
        """The child with these label values, new on first use."""
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = self._born()
        return child

    def _born(self) -> Child:
        raise NotImplementedError


class Counters(_Family[Counter]):
    """Counters of one name."""

    def _born(self) -> Counter:
        return Counter()

    def collect(self) -> Iterator[Metric]:
        """Every counter as it is now."""
        family = CounterMetricFamily(self._name, self._help, labels=self._labels)
        for values, child in self._children.items():
            family.add_metric(values, child.value)
        yield family


class Histograms(_Family[Histogram]):
    """Histograms of one name, with the same bounds."""

    def __init__(
        self,
        registry: CollectorRegistry,
        name: str,
        help_: str,
        labels: Sequence[str],
        bounds: tuple[float, ...],
    ) -> None:
        self._bounds = bounds
        super().__init__(registry, name, help_, labels)

    def _born(self) -> Histogram:
        return Histogram(self._bounds)

    def collect(self) -> Iterator[Metric]:
        """Every histogram as it is now."""
        family = HistogramMetricFamily(self._name, self._help, labels=self._labels)
        for values, child in self._children.items():
            family.add_metric(values, child.buckets(), child.sum)
        yield family
