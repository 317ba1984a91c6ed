# SPDX-License-Identifier: Apache-2.0
"""The loop of an evaluation: every example is encoded once, then edited and scored at each point.

Work is cut into units of `rows` examples, fixed by their place in the order of the run, and a
device computes one unit at a time: so a score is the same bit for bit on any number of devices and
hosts, and after a restart.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int32, UInt8

from ip2p_jax.diffusion.grids import Grid
from ip2p_jax.evaluation.examples import Example, ExampleSet, Turn, picture
from ip2p_jax.evaluation.methods import Method, Rows, Start, Values
from ip2p_jax.evaluation.scorer import Compared, References, Scorer, Scores, Seen, applicable
from ip2p_jax.guided import decode_pixels
from ip2p_jax.networks import to_uint8
from ip2p_jax.storage import retried
from ip2p_jax.types import Params

NOT_FINITE = "the result is not finite"

Scales = Float[np.ndarray, "b 2"]
"""A point for each row of a batch."""


class Point(NamedTuple):
    """A point of a curve: s_T, and s_I or the strength, whichever the method has."""

    text_guidance: float
    other: float


class Shown(NamedTuple):
    """How the pictures of a set are seen: squares of `side` px, others as `fit` says."""

    side: int
    fit: str


class Batch(NamedTuple):
    """Units of examples on the host, one unit a device; of each turn the arrays."""

    units: list[int]
    indices: list[list[int]]  # of the examples of each unit
    examples: dict[int, Example]
    reasons: dict[int, str]  # why an example cannot be evaluated
    turns: list[tuple[Rows, Compared]]


class Edited(NamedTuple):
    """What became of a batch in a turn; on the devices, and maybe still computing."""

    pictures: UInt8[Any, "b h w 3"]
    finite: Bool[Any, " b"]  # whether all pixels were numbers
    scores: Scores


class Result(NamedTuple):
    """A batch under guidance scales: `rows` rows a unit, turn by turn."""

    batch: Batch
    scales: Scales
    turns: list[Edited]


def in_order(count: int, samples: int | None, seed: int) -> list[int]:
    """Indices of the examples of a run: all, or so many at random; more begin with the same."""
    order = np.random.default_rng(seed).permutation(count)
    return [int(i) for i in order[:samples]]


def cut(order: Sequence[int], rows: int) -> list[list[int]]:
    """The units: `rows` examples each, the last one maybe fewer."""
    return [list(order[i : i + rows]) for i in range(0, len(order), rows)]


class Sweep:
    """A method and a scorer, compiled for units of `rows` examples of a set."""

    def __init__(
        self, method: Method, scorer: Scorer, examples: ExampleSet, shown: Shown, rows: int
    ):
        self.method, self.scorer = method, scorer
        self.examples, self.shown, self.rows = examples, shown, rows
        self.model = method.model
        self.refer = jax.jit(self.scorer.refer, out_shardings=self.model.by_row)
        self.prepare = jax.jit(self.prepare_rows, out_shardings=self.model.by_row)
        self.step = jax.jit(self.edit_and_score, out_shardings=self.model.by_row)

    def prepare_rows(self, params: Params, scorers: Params, rows: Rows) -> tuple[Start, Seen]:
        """The program that encodes what is edited: in the first turn no point changes it."""
        with jax.default_matmul_precision(self.model.precision):
            start = self.method.encode(params, rows)
        return start, self.scorer.see(scorers, rows.images)

    def edit_and_score(
        self,
        params: Params,
        scorers: Params,
        start: Start,
        inputs: Seen,
        known: References,
        values: Values,
        grid: Grid,
    ) -> Edited:
        """The program of a point: sampler, VAE, scores."""
        with jax.default_matmul_precision(self.model.precision):
            z = self.method.sample(params, start, values, grid)
            scaling = self.model.config.vae.scaling_factor
            x = decode_pixels(self.model.networks, scaling, params, z)
        finite = jnp.isfinite(x).all(axis=(1, 2, 3))
        return Edited(to_uint8(x), finite, self.scorer.score(scorers, inputs, known, x))

    def load(self, units: Sequence[int], indices: Sequence[Sequence[int]]) -> Batch:
        """Reads units of examples; the devices' rows that are too many repeat the first unit's."""
        examples, reasons = {}, {}
        pictures: dict[int, list[UInt8[np.ndarray, "h w 3"]]] = {}
        for index in (i for unit in indices for i in unit):
            read = functools.partial(self.examples.__getitem__, index)
            examples[index] = example = retried(read, f"{self.examples.name}, example {index}")
            try:
                pictures[index] = list(self.pictures(example))
            except ValueError as error:
                reasons[index] = " ".join(str(error).split())
                blank = np.zeros((self.shown.side, self.shown.side, 3), np.uint8)
                pictures[index] = [blank] * (len(example.turns) + 1)
        filled = [[*unit, *[unit[-1]] * (self.rows - len(unit))] for unit in indices]
        filled += [filled[0]] * (self.model.devices - len(filled))
        flat = [i for unit in filled for i in unit]
        turns = range(max(len(examples[i].turns) for i in flat))
        arrays = [self.arrays([(i, examples[i], pictures[i]) for i in flat], t) for t in turns]
        return Batch(list(units), [list(x) for x in indices], examples, reasons, arrays)

    def pictures(self, example: Example) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """The input, then each turn's target (the input where there is none)."""
        given = picture(example.input, *self.shown, f"{example.name}: the input")
        yield given
        for turn in example.turns:
            if turn.target is None:
                yield given
            else:
                yield picture(turn.target, *self.shown, f"{example.name}: the target")

    def arrays(
        self, rows: Sequence[tuple[int, Example, list[UInt8[np.ndarray, "h w 3"]]]], number: int
    ) -> tuple[Rows, Compared]:
        """The arrays of turn `number`; examples that have fewer turns repeat their last."""
        turns = [example.turns[min(number, len(example.turns) - 1)] for _, example, _ in rows]
        inputs = np.stack([pictures[0] for *_, pictures in rows])
        targets = np.stack([pictures[min(number + 1, len(pictures) - 1)] for *_, pictures in rows])
        tokens = self.model.tokenize([self.method.text(turn) for turn in turns])
        index = np.array([i for i, *_ in rows], np.uint32)
        turn = np.full(len(rows), number, np.uint32)
        return Rows(inputs, tokens, index, turn), Compared(targets, self.captions(turns))

    def captions(self, turns: Sequence[Turn]) -> Int32[np.ndarray, "b 2 m"]:
        """CLIP's tokens of the captions before and after, "" where there is none."""
        if self.scorer.clip is None:
            return np.zeros((len(turns), 2, 1), np.int32)
        texts = [x or "" for turn in turns for x in (turn.input_caption, turn.output_caption)]
        return self.scorer.clip.tokenize(texts).reshape(len(turns), 2, -1)

    def results(self, batch: Batch, points: Iterable[Scales]) -> Iterator[Result]:
        """Starts computing a batch at each point, and yields it.

        In later turns the result of the turn before is what is edited. What the rows of a point
        have in common besides the scales, its grid, is that of the first row.
        """
        params, scorers, put = self.model.params, self.scorer.params, jax.device_put
        placed = put(batch.turns, self.model.by_row)
        known = [self.refer(scorers, compared) for _, compared in placed]
        first = self.prepare(params, scorers, placed[0][0])
        for scales in points:
            grid = put(self.method.grid(float(scales[0, 1])), self.model.replicated)
            values = Values(*put(tuple(scales.T.astype(np.float32)), self.model.by_row))
            turns = [self.step(params, scorers, *first, known[0], values, grid)]
            for (rows, _), of_turn in zip(placed[1:], known[1:], strict=True):
                edited = rows._replace(images=turns[-1].pictures)
                prepared = self.prepare(params, scorers, edited)
                turns.append(self.step(params, scorers, *prepared, of_turn, values, grid))
            yield Result(batch, scales, turns)

    def everywhere(self, point: Point) -> Scales:
        """The same point for all rows of a batch."""
        return np.tile(np.array(point, np.float64)[None], (self.rows * self.model.devices, 1))

    def lines(self, result: Result) -> Iterator[tuple[int, dict[str, Any]]]:
        """The unit, and the line of metrics.jsonl, of each example and turn of a result."""
        batch = result.batch
        for number, (_, finite, scores) in enumerate(result.turns):
            finite = np.asarray(finite)
            scores = {name: np.asarray(x) for name, x in scores.items()}
            for row, unit, index in self.places(batch):
                example = batch.examples[index]
                if number >= len(example.turns):
                    continue
                line = self.describe(Point(*map(float, result.scales[row])))
                line |= {"turn": number + 1, "index": index, "example": example.name}
                if index in batch.reasons:
                    yield unit, {"kind": "skipped", **line, "reason": batch.reasons[index]}
                elif not finite[row]:
                    yield unit, {"kind": "skipped", **line, "reason": NOT_FINITE}
                else:
                    of_row = {name: float(f"{x[row]:.9g}") for name, x in scores.items()}
                    yield (
                        unit,
                        {"kind": "example", **line, **applicable(of_row, example.turns[number])},
                    )

    def places(self, batch: Batch) -> Iterator[tuple[int, int, int]]:
        """Row, unit and index of each example of a batch; rows that fill it up are left out."""
        for i, (unit, indices) in enumerate(zip(batch.units, batch.indices, strict=True)):
            for row, index in enumerate(indices, i * self.rows):
                yield row, unit, index

    def words(self, point: Point) -> str:
        """A point as the title of a picture."""
        text, other = (f"{x:g}" for x in point)
        return f"text {text}, {self.method.axis.split('_')[0]} {other}"

    def describe(self, point: Point) -> dict[str, Any]:
        """How metrics.jsonl names a point."""
        scales = {"text_guidance": point.text_guidance, self.method.axis: point.other}
        return {"method": self.method.name} | scales
