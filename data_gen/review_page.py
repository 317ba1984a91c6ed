# SPDX-License-Identifier: Apache-2.0
"""A page on 127.0.0.1 to look at triplets one by one: accept, correct, reject, write.

Every decision is on the disk before the page shows the next triplet. All of it can be done with
the keyboard; the keys stand on the page.
"""

import difflib
import html
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from data_gen.review import Decision, Review

KEYS = """() => document.addEventListener("keydown", event => {
  const writing = ["TEXTAREA", "INPUT"].includes(event.target.tagName);
  if (event.key === "Escape") return document.activeElement.blur();
  if (event.altKey || event.metaKey || (event.ctrlKey && event.key !== "Enter")) return;
  const keys = {a: "accept", r: "reject", j: "next", ArrowRight: "next", k: "previous",
                ArrowLeft: "previous", u: "undecided", n: "new"};
  const id = event.ctrlKey ? "accept" : writing ? null : keys[event.key];
  if (id) {
    event.preventDefault();
    document.activeElement.blur();
    document.getElementById(id).click();
  }
  if (!writing && event.key === "e") {
    event.preventDefault();
    document.querySelector("#instruction textarea").focus();
  }
})"""

STYLE = """
#difference { font-size: 1.15em; line-height: 1.5; min-height: 3em; }
#difference del { color: #b3261e; text-decoration-thickness: 1px; }
#difference del + ins { margin-left: .3em; }
#difference ins { color: #1b6e3c; text-decoration: none; border-bottom: 2px solid #1b6e3c; }
#note { min-height: 1.6em; } kbd { border: 1px solid #bbb; border-radius: 3px; padding: 0 .3em; }
"""

HELP = (
    "<kbd>a</kbd> accept &nbsp; <kbd>r</kbd> reject &nbsp; <kbd>e</kbd> edit &nbsp; "
    "<kbd>Esc</kbd> leave a text &nbsp; <kbd>Ctrl</kbd>+<kbd>Enter</kbd> accept from within &nbsp; "
    "<kbd>j</kbd> <kbd>k</kbd> or arrows: next, previous &nbsp; <kbd>u</kbd> next undecided &nbsp; "
    "<kbd>n</kbd> new"
)

NEW = -1
"""The place of a triplet that is being written and has none yet."""

View = tuple[Any, ...]
"""Place, heading, caption, instruction, edited caption, difference, note."""


def difference(before: str, after: str) -> str:
    """HTML that shows which words of a text went and which came; characters, if it has no words."""
    unit = r"\S+\s*" if " " in before else r"."
    words = [re.findall(unit, text) for text in (before, after)]
    parts = []
    for what, i, j, k, n in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        old, new = (html.escape("".join(some)) for some in (words[0][i:j], words[1][k:n]))
        if what == "equal":
            parts.append(old)
        else:
            parts.append(f"<del>{old}</del>" * bool(old) + f"<ins>{new}</ins>" * bool(new))
    return "".join(parts)


class Page:
    """What the buttons do; one decision at a time, whoever presses them."""

    def __init__(self, review: Review) -> None:
        self.review, self.lock = review, threading.Lock()

    def show(self, place: int | None, note: str = "") -> View:
        """The page at a place; an empty one where there is none."""
        review = self.review
        counts = ", ".join(f"{number} {what}" for what, number in review.counts().items())
        if place is None or not 0 <= place < len(review):
            heading = f"### New triplet\n{len(review):,} triplets: {counts}"
            return NEW, heading, "", "", "", "", note
        what, triplet = review.look(place)
        heading = f"### {place + 1:,} of {len(review):,} · {what or 'undecided'}\n{counts}"
        texts = triplet[:3]
        changed = difference(triplet.input, triplet.output) if triplet.output else ""
        return place, heading, *texts, changed, note

    def first(self) -> View:
        """What is shown when the page is opened."""
        return self.show(self.review.undecided(-1) if len(self.review) else None)

    def step(self, place: int, by: int) -> View:
        """The next or the previous place."""
        last = len(self.review) - 1
        return self.show(max(0, min(last, place + by)) if place != NEW else last)

    def undecided(self, place: int) -> View:
        found = self.review.undecided(place)
        return self.show(found) if found is not None else self.show(place, "nothing is undecided")

    def accept(self, place: int, caption: str, edit: str, output: str) -> View:
        """Saves the texts and goes on; what is wrong stays, with a word on why."""
        new = place == NEW
        try:
            with self.lock:
                decision = self.review.accept(None if new else place, caption, edit, output)
        except ValueError as error:
            _, heading, *_ = self.show(place)
            return place, heading, caption, edit, output, difference(caption, output), f"⚠ {error}"
        return self.go_on(place, decision)

    def reject(self, place: int) -> View:
        if place == NEW:
            return self.show(None)
        with self.lock:
            decision = self.review.reject(place)
        return self.go_on(place, decision)

    def go_on(self, place: int, decision: Decision) -> View:
        """After a decision: a new triplet after a new one, else the next that is undecided."""
        note = f"{decision.what}: {decision.triplet.edit or decision.triplet.input}"
        return self.show(None if place == NEW else self.review.undecided(place), note)


def build(review: Review) -> gr.Blocks:
    """The page of a review."""
    page = Page(review)
    with gr.Blocks(title="Triplets", analytics_enabled=False) as blocks:
        place = gr.State(NEW)
        heading = gr.Markdown(elem_id="heading")
        caption = gr.Textbox(label="Caption", elem_id="caption", lines=2)
        edit = gr.Textbox(label="Instruction", elem_id="instruction", lines=1)
        output = gr.Textbox(label="Edited caption", elem_id="edited", lines=2)
        changed = gr.HTML(elem_id="difference")
        with gr.Row():
            previous = gr.Button("Previous", elem_id="previous", min_width=90)
            rejected = gr.Button("Reject", elem_id="reject", variant="stop", min_width=90)
            accepted = gr.Button("Accept", elem_id="accept", variant="primary", min_width=90)
            following = gr.Button("Next", elem_id="next", min_width=90)
            undecided = gr.Button("Undecided", elem_id="undecided", min_width=90)
            new = gr.Button("New", elem_id="new", min_width=90)
        note = gr.Markdown(elem_id="note")
        gr.HTML(HELP)
        texts = [caption, edit, output]
        view = [place, heading, *texts, changed, note]
        for button, action, inputs in (
            (previous, lambda at: page.step(at, -1), [place]),
            (following, lambda at: page.step(at, 1), [place]),
            (undecided, page.undecided, [place]),
            (new, lambda: page.show(None), []),
            (accepted, page.accept, [place, *texts]),
            (rejected, page.reject, [place]),
        ):
            button.click(action, inputs, view, show_progress="hidden")
        blocks.load(page.first, [], view)
    return blocks


def serve(file: Path, captions: Sequence[Path], port: int) -> int:
    """Serves the page until Ctrl-C. ValueError names a wrong line, or a file in use."""
    review = Review(file, captions)
    blocks = build(review)
    try:
        blocks.launch(
            server_name="127.0.0.1",
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            css=STYLE,
            js=KEYS,
        )
        print(f"{len(review)} triplets: http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
        blocks.block_thread()
    finally:
        blocks.close(verbose=False)
        review.close()
    return 0
