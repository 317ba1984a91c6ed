# SPDX-License-Identifier: Apache-2.0
"""Training of a LoRA: the UNet is frozen, and additions of low rank to its layers are trained.

The additions are merged within the loss, so networks know nothing of them: a product of rank `rank`
a layer. Only A and B have gradients, an EMA and an optimizer state, and only they are in
checkpoints.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from ip2p_jax import config
from ip2p_jax.training.tasks.task import Task, given
from ip2p_jax.types import Params
from ip2p_jax.weights.lora import matrices, merge, shapes

GROUPS = {
    "attn": ("to_q", "to_k", "to_v", "to_out.0"),
    "ff": ("ff.net.0.proj", "ff.net.2"),
}
"""Kinds of layers, by what diffusers' names of them end in."""


def low_rank(task: Task, cfg: config.Lora, key: Key[Array, ""]) -> Task:
    """`task` with what it trains replaced by additions to the UNet, which `task.frozen` holds.

    Raises ValueError if `cfg.targets` names no layer, or leaves out one that has to be trained.
    """
    unet, scale = task.frozen["unet"], cfg.alpha / cfg.rank
    of = chosen(unet, cfg.targets)
    check_conv_in(task, of)

    def whole(params: Params, frozen: Params) -> Params:
        return {"unet": merge(frozen["unet"], params["lora"], scale)}

    return task._replace(
        start=given({"lora": first_pairs(of, cfg.rank, key)}),
        loss=lambda params, frozen, *rest: task.loss(whole(params, frozen), frozen, *rest),
        sample=lambda ema, frozen, batch: task.sample(whole(ema, frozen), frozen, batch),
    )


def chosen(unet: Params, targets: str) -> dict[str, Any]:
    """The matrices of the layers that `targets` names, by layer, as PEFT matches names."""
    every, found = matrices(unet), set()
    for word in targets.split("+"):
        ends = GROUPS.get(word, (word,))
        of_word = {layer for layer in every if any(f".{layer}".endswith(f".{e}") for e in ends)}
        if not of_word or not word:
            raise ValueError(
                f"config.lora.targets is {targets!r}: no layer's name ends in {word!r}, expected "
                f"attn, ff or ends of names such as conv_in, joined by +"
            )
        found |= of_word
    return {layer: x for layer, x in every.items() if layer in found}


def check_conv_in(task: Task, of: dict[str, Any]) -> None:
    """Refuses to train an editor that could never see the picture."""
    kernel = task.frozen["unet"]["conv_in"]["kernel"]
    new = kernel[:, :, task.config.vae.latent_channels :]
    if new.size and not np.any(new) and "conv_in" not in of:
        raise ValueError(
            "config.lora.targets: expected conv_in among them, whose channels for the image are "
            "zero in a text-to-image model and would stay so"
        )


def first_pairs(of: dict[str, Any], rank: int, key: Key[Array, ""]) -> Params:
    """A uniform within 1 / sqrt(inputs), as PEFT draws it, and B zero: nothing is changed yet."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def first(path: tuple, x: jax.ShapeDtypeStruct) -> np.ndarray:
        inputs = x.shape[1:] if path[-1].key == "weight" else x.shape[:-1]
        bound = float(np.prod(inputs)) ** -0.5 if path[-2].key == "lora_A" else 0.0
        return rng.uniform(-bound, bound, x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(first, shapes(of, dict.fromkeys(of, rank)))
