# SPDX-License-Identifier: Apache-2.0
"""What came of a run of triplet generation: report.md with counts, examples and three pictures."""

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from data_gen.instruction_words import verb_and_object
from data_gen.standing import ACCEPTED, Taken
from data_gen.triplet_file import Triplet
from ip2p_jax.evaluation.figures import COLOURS, STYLE, render

EXAMPLES = 5
"""Rejected answers that are shown for each reason: the first ones."""

TOP = 30
"""Verbs and objects that are shown."""

BARS = 50
"""Of a histogram, at most."""

SHOWN = 160
"""Characters of a text that are shown."""

REASONS = {
    ACCEPTED: "accepted",
    "cut": "cut off at the limit of tokens",
    "filtered": "refused by the model",
    "refused": "request refused by the server",
    "not_json": "not JSON",
    "not_schema": "JSON of another form",
    "edit_length": "instruction too short or too long",
    "output_length": "edited caption too short or too long",
    "unchanged": "the caption did not change",
    "flagged": "flagged by moderation",
    "caption_flagged": "caption flagged by moderation, not asked",
    "near_duplicate": "accepted, but nearly the same as an earlier triplet",
}


@dataclass
class Tally:
    """Counts answers by what became of them, and triplets by their words and lengths.

    of: (reason, text that explains it) of rejected answers, some of each reason.
    """

    reasons: Counter[str] = field(default_factory=Counter)
    examples: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    verbs: Counter[str] = field(default_factory=Counter)
    objects: Counter[str] = field(default_factory=Counter)
    lengths: tuple[Counter[int], Counter[int], Counter[int]] = field(
        default_factory=lambda: (Counter(), Counter(), Counter())
    )

    def take(self, taken: Taken) -> None:
        """Counts an answer, or a caption that is not asked about."""
        _, event, judgement = taken
        self.reasons[judgement.reason] += 1
        for kind, tokens in enumerate(event.get("tokens", ())):
            self.tokens[kind] += tokens or 0  # null, where a server does not count
        if judgement.reason != ACCEPTED:
            said = event.get("answer", event.get("refused", ""))
            categories = ", ".join(event.get("flagged", ()))
            self.example(
                judgement.reason, " → ".join(filter(None, (event["caption"], said, categories)))
            )

    def example(self, reason: str, text: str) -> None:
        """Keeps what was rejected, if there are not enough examples yet."""
        if len(self.examples[reason]) < EXAMPLES:
            self.examples[reason].append(text)

    def take_triplet(self, triplet: Triplet) -> None:
        """Counts a triplet of the final set."""
        verb, object = verb_and_object(triplet.edit)
        self.verbs[verb] += bool(verb)
        self.objects[object] += bool(object)
        for lengths, text in zip(self.lengths, triplet[:3], strict=True):
            lengths[len(text)] += 1

    def take_near_duplicate(self, triplet: Triplet) -> None:
        """Counts an accepted answer that is left out of the final set."""
        self.reasons["near_duplicate"] += 1
        self.example("near_duplicate", " → ".join(triplet[:3]))


def cell(text: str) -> str:
    """A text as it may stand in a Markdown table."""
    line = " ".join(text.split())
    line = line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"
    for character, written in (("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), ("|", "\\|")):
        line = line.replace(character, written)
    for character in "`*_[]$":
        line = line.replace(character, "\\" + character)
    return line


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; numbers are aligned to the right."""
    numbers = [all(isinstance(row[i], int) for row in rows) for i in range(len(head))]
    lines = [head, ["---:" if number else "---" for number in numbers]]
    lines += [[f"{x:,}" if isinstance(x, int) else x for x in row] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown(tally: Tally, counts: Mapping[str, int], settings: Mapping[str, Any]) -> str:
    """The text of report.md, which shows the pictures of `pictures`."""
    accepted, near = tally.reasons[ACCEPTED], tally.reasons["near_duplicate"]
    answers = sum(tally.reasons.values()) - near - tally.reasons["caption_flagged"]
    share = near / accepted if accepted else 0.0
    reasons = [(r, tally.reasons[r]) for r in REASONS if tally.reasons[r]]
    tops = tally.verbs.most_common(TOP), tally.objects.most_common(TOP)
    parts = [
        "# Triplets\n",
        f"{accepted - near:,} triplets of {counts['captions']:,} captions, by "
        f"{cell(settings['model'])}, which read {tally.tokens[0]:,} tokens and wrote "
        f"{tally.tokens[1]:,}.\n",
        table(["captions", "count"], list(counts.items())),
        f"## Answers\n\nOf {answers:,} answers {accepted:,} were accepted. Of these {near:,}"
        f" ({share:.2%}) are left out because they are nearly the same as an earlier one.\n",
        table(["answers", "count"], [(REASONS[r], n) for r, n in reasons]),
        "![Answers by what became of them](answers.png)\n",
        "## Instructions\n\nThe first word, and the last one of the first phrase after it: a rule "
        "of thumb that finds verbs and objects in English.\n",
        "![The most frequent verbs and objects](instructions.png)\n",
        table(
            ["verb", "count", "object", "count"],
            [(cell(v), n, cell(o), m) for (v, n), (o, m) in zip_longest(*tops, fillvalue=("", 0))],
        ),
        "## Lengths\n\n![Lengths in characters](lengths.png)\n",
        "## Rejected\n",
    ]
    for reason in tally.examples:
        name = REASONS[reason]
        parts.append(f"{name[0].upper()}{name[1:]} ({tally.reasons[reason]:,}):\n")
        parts.append("".join(f"- {cell(text)}\n" for text in tally.examples[reason]))
    return "\n".join(parts)


def pictures(tally: Tally) -> dict[str, bytes]:
    """PNGs by name."""
    return {
        "answers.png": drawn(lambda axes: draw_reasons(axes[0], tally.reasons), 1, (8.0, 3.6)),
        "instructions.png": drawn(lambda axes: draw_words(axes, tally), 2, (10.0, 7.0)),
        "lengths.png": drawn(lambda axes: draw_lengths(axes, tally), 3, (10.0, 3.2)),
    }


def drawn(draw: Callable[[Sequence[Axes]], None], panels: int, size: tuple[float, float]) -> bytes:
    """A PNG of `panels` beside each other, `size` in inches."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(1, panels, squeeze=False)[0])
        draw(axes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # boxes instead
        return render(figure, "png")


def draw_bars(ax: Axes, names: Sequence[str], values: Sequence[int], colour: str) -> None:
    """Horizontal bars, the first on top, each with its number."""
    bars = ax.barh(range(len(names)), values, color=colour, height=0.7)
    ax.bar_label(bars, [f" {value:,}" for value in values], fontsize=8, color="#555555")
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.grid(visible=False)
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)


def draw_reasons(ax: Axes, reasons: Mapping[str, int]) -> None:
    """Answers by what became of them."""
    named = [(text, reasons[r]) for r, text in REASONS.items() if reasons.get(r)]
    draw_bars(ax, [text for text, _ in named], [n for _, n in named], COLOURS[0])


def draw_words(axes: Sequence[Axes], tally: Tally) -> None:
    """The most frequent verbs and objects."""
    for ax, name, words, colour in zip(
        axes, ("verbs", "objects"), (tally.verbs, tally.objects), COLOURS, strict=False
    ):
        top = words.most_common(TOP)
        draw_bars(ax, [word for word, _ in top], [n for _, n in top], colour)
        ax.set_title(f"{name} of instructions", loc="left", fontsize=11)


def draw_lengths(axes: Sequence[Axes], tally: Tally) -> None:
    """Histograms of the lengths of the three texts."""
    names = ("caption", "instruction", "edited caption")
    for ax, name, lengths, colour in zip(axes, names, tally.lengths, COLOURS, strict=False):
        if lengths:
            step = 1 + max(lengths) // BARS  # whole characters
            bins = range(0, max(lengths) + step + 1, step)
            ax.hist(list(lengths), bins, weights=list(lengths.values()), color=colour)
        ax.set_xlabel(f"{name}, characters")
    axes[0].set_ylabel("triplets")
