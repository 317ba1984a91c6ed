# SPDX-License-Identifier: Apache-2.0
"""All scores of a batch of results, inside one compiled program.

What does not change along a curve is computed once: the embeddings of targets and captions,
`refer`, and those of inputs, `see`, which in a later turn are results. Then each result is scored
against them: `score`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt8

from ip2p_jax.devices import put, shardings
from ip2p_jax.evaluation.clip_scores import (
    Clip,
    clip_scores,
    dot,
    embed_images,
    embed_pixels,
    embed_texts,
)
from ip2p_jax.evaluation.examples import Turn
from ip2p_jax.evaluation.pixel_scores import pixel_scores
from ip2p_jax.models.clip import unit
from ip2p_jax.models.dino import DINO, embed_pictures
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.lpips import LPIPS, lpips
from ip2p_jax.networks import to_pixels, to_uint8
from ip2p_jax.types import Params
from ip2p_jax.weights.dino import load_dino
from ip2p_jax.weights.lpips import load_lpips

Scores = dict[str, Float[Any, " b"]]
"""By the names of metrics.jsonl; those that end in `_input` compare the result with the picture
that was edited, those without with the target."""

OF_TARGET = ("clip_target", "l1", "l2", "psnr", "ssim", "lpips", "dino")
OF_CAPTIONS = ("clip_direction",)
OF_OUTPUT_CAPTION = ("clip_text",)


class Compared(NamedTuple):
    """What results are compared with beside their inputs, one row an example; zeros where there is
    nothing."""

    targets: UInt8[Any, "b h w 3"]
    captions: Int32[Any, "b 2 m"]  # CLIP's tokens of the captions before and after


class Seen(NamedTuple):
    """Pictures, and what the networks at hand make of them."""

    pictures: UInt8[Any, "b h w 3"]
    embeddings: dict[str, Float[Array, "b e"]]


class References(NamedTuple):
    """`Compared`, embedded."""

    targets: Seen
    captions: Float[Array, "b 2 e"]


class Scorer:
    """The networks that score, put on devices, as far as they are given.

    dino, lpips: graph definition and parameters. legacy: CLIP sees pictures as the authors'
    evaluation fed them, in [-1, 1] and the result not cut.
    """

    def __init__(
        self,
        clip: Clip | None = None,
        dino: tuple[Any, Params] | None = None,
        lpips: tuple[Any, Params] | None = None,
        legacy: bool = False,
    ):
        self.clip, self.legacy = clip, legacy
        given = {"dino": dino, "lpips": lpips}
        if clip is not None:
            given["clip"] = (clip.graphdef, clip.params)
        self.graphdefs = {name: pair[0] for name, pair in given.items() if pair is not None}
        self.params: Params = {name: pair[1] for name, pair in given.items() if pair is not None}

    def embed(
        self, params: Params, pictures: UInt8[Array, "b h w 3"], x: Float[Array, "b h w 3"]
    ) -> dict[str, Float32[Array, "b e"]]:
        """Embeddings by the networks at hand of pictures, whose pixels in [-1, 1] are x."""
        embeddings = {}
        if "clip" in self.graphdefs and self.legacy:
            embeddings["clip"] = embed_pixels(self.graphdefs["clip"], params["clip"], x)
        elif "clip" in self.graphdefs:
            embeddings["clip"] = embed_images(self.graphdefs["clip"], params["clip"], pictures)
        if "dino" in self.graphdefs:
            embeddings["dino"] = embed_pictures(self.graphdefs["dino"], params["dino"], pictures)
        return embeddings

    def see(self, params: Params, pictures: UInt8[Array, "b h w 3"]) -> Seen:
        """Embeds pictures of files."""
        return Seen(pictures, self.embed(params, pictures, to_pixels(pictures)))

    def refer(self, params: Params, compared: Compared) -> References:
        """Embeds what results will be compared with beside their inputs."""
        captions = jnp.zeros((len(compared.targets), 2, 1))
        if "clip" in self.graphdefs:
            texts = compared.captions.reshape(-1, compared.captions.shape[-1])
            embedded = embed_texts(self.graphdefs["clip"], params["clip"], texts)
            captions = embedded.reshape(-1, 2, embedded.shape[-1])
        return References(self.see(params, compared.targets), captions)

    def score(
        self, params: Params, inputs: Seen, known: References, x: Float[Array, "b h w 3"]
    ) -> Scores:
        """Scores results of these inputs, given as pixels, about in [-1, 1]."""
        result = to_uint8(x)
        embedded = self.embed(params, result, x)
        scores: Scores = {}
        for suffix, (pictures, embeddings) in (("_input", inputs), ("", known.targets)):
            pixels = pixel_scores(result, pictures)
            scores |= {name + suffix: value for name, value in pixels._asdict().items()}
            if "lpips" in self.graphdefs:
                scores["lpips" + suffix] = lpips(
                    self.graphdefs["lpips"], params["lpips"], result, pictures
                )
            if "dino" in self.graphdefs:
                scores["dino" + suffix] = dot(unit(embedded["dino"]), unit(embeddings["dino"]))
        if "clip" in self.graphdefs:
            before, after = known.captions[:, 0], known.captions[:, 1]
            of_clip = clip_scores(inputs.embeddings["clip"], embedded["clip"], before, after)
            scores["clip_image"], scores["clip_text"] = of_clip.sim_image, of_clip.sim_1
            scores["clip_direction"] = of_clip.sim_dir
            target = known.targets.embeddings["clip"]
            scores["clip_target"] = dot(unit(embedded["clip"]), unit(target))
        return scores


def open_scorer(
    clip: str | None = None,
    dino: str | None = None,
    lpips: str | None = None,
    legacy: bool = False,
    devices: Sequence[Any] | None = None,
) -> Scorer:
    """Opens the networks that are named, in float32; one line that names the option otherwise."""
    _, replicated = shardings(devices)

    def opened(option: str, model: str | None, load: Callable[[str], Any]) -> Any:
        try:
            return None if model is None else load(model)
        except (ValueError, OSError) as error:
            raise ValueError(f"{option} {model}: {error}") from None

    def placed(network: type, pretrained: Any) -> tuple[Any, Params]:
        graphdef, _ = abstract(network, pretrained.config, dtype=jnp.float32)
        return graphdef, put(pretrained.params, jnp.float32, replicated)

    return Scorer(
        opened("--clip", clip, lambda model: Clip.from_pretrained(model, devices=devices)),
        opened("--dino", dino, lambda model: placed(DINO, load_dino(model))),
        opened("--lpips", lpips, lambda model: placed(LPIPS, load_lpips(model))),
        legacy,
    )


def applicable(scores: Mapping[str, float], turn: Turn) -> dict[str, float]:
    """Those scores of an example for which it has what they need."""
    without: set[str] = set()
    if turn.target is None:
        without.update(OF_TARGET)
    if turn.output_caption is None:
        without.update(OF_OUTPUT_CAPTION)
    if turn.output_caption is None or turn.input_caption is None:
        without.update(OF_CAPTIONS)
    return {name: float(value) for name, value in scores.items() if name not in without}
