# SPDX-License-Identifier: Apache-2.0
"""The programs that can be compiled without a TPU, given as shapes: no data, no weights."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from ip2p_jax import config, guided
from ip2p_jax.devices import shapes, shardings
from ip2p_jax.diffusion.grids import grid
from ip2p_jax.diffusion.samplers import SAMPLERS
from ip2p_jax.diffusion.schedule import STABLE_DIFFUSION
from ip2p_jax.models.attention import Attend, attend
from ip2p_jax.models.clip import CLIPText
from ip2p_jax.models.flash import attend_on
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.presets import SD15, SD21, ModelConfig
from ip2p_jax.models.unet import UNet
from ip2p_jax.models.vae import VAE
from ip2p_jax.networks import networks
from ip2p_jax.tpu.topologies import Topology
from ip2p_jax.training import mesh, optim, state
from ip2p_jax.training.tasks.diffusion import frozen_text, score_of, trained_text
from ip2p_jax.training.tasks.edit import edit_loss, moments_of_latents, moments_of_pictures
from ip2p_jax.types import Batch, LatentBatch, Params

KNOWN = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD15,
    "runwayml/stable-diffusion-v1-5": SD15,
    "CompVis/stable-diffusion-v1-4": SD15,
    "timbrooks/instruct-pix2pix": SD15,
    "stabilityai/stable-diffusion-2-1": SD21,
}
"""Dimensions of models on the hub, by their ids, so that nothing has to be fetched."""

BF16 = jnp.dtype(jnp.bfloat16)


class Plan(NamedTuple):
    """A program for a slice, and the work that it does."""

    name: str
    jitted: Any  # a jitted function
    args: tuple[Any, ...]  # shapes, with their shardings
    work: Callable  # a function with the program's products and convolutions, nothing twice,
    work_args: tuple[Any, ...]
    share: float  # and how much of it a chip does in one run
    unit: str  # what one run is
    runs: int = 1  # of the program in the network: of layers that are alike


def dims_of(model: config.Model) -> ModelConfig:
    """The dimensions of the editor that a configuration trains; ValueError where they would have
    to be read from a model."""
    dims = KNOWN.get(model.base) if model.base else model.dims
    if dims is None:
        raise ValueError(
            f"config.model.base is {model.base!r}, expected one of {', '.join(KNOWN)}, or '' with "
            "config.model.dims: nothing is fetched to compile"
        )
    return dims.widened()


def params_of(dims: ModelConfig) -> Params:
    """Shapes of all parameters."""
    networks_of = {"unet": (UNet, dims.unet), "vae": (VAE, dims.vae), "text": (CLIPText, dims.text)}
    return {name: abstract(*parts)[1] for name, parts in networks_of.items()}


def lay(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays, or shapes, as shapes that lie as `sharding` says."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def train(cfg: config.Config, topology: Topology, *, pictures: bool) -> Plan:
    """The step of a training on cached latents, or on `pictures`.

    Raises ValueError for what cannot be laid out on the slice, in the words of a training.
    """
    if cfg.objective.kind != "edit" or cfg.lora.rank:
        raise ValueError("--what train compiles config.objective.kind=edit, without config.lora")
    dims, devices = dims_of(cfg.model), mesh.make_mesh(cfg.mesh, topology.devices)
    rows = mesh.rows_in_place(devices, cfg.data.batch_size, cfg.optim.accumulate)
    check_size(cfg.data.resolution, dims)
    tx, everywhere = optim.make_optimizer(cfg.optim), mesh.replicated(devices)
    dtype = BF16 if cfg.dtype == "auto" else jnp.dtype(cfg.dtype)
    loss = loss_of(cfg, dims, dtype, cfg.remat, pictures, attend_on(everywhere))
    trained, frozen = parts_of(cfg, dims, dtype, pictures)
    step = state.make_step(loss, tx, cfg.optim, rows, devices)
    start = state.abstract_state(state.Start(trained, lambda shardings: {}), tx)
    laid = mesh.state_shardings(devices, start)
    start = jax.tree.map(lay, start, laid)
    by_row = NamedSharding(devices, jax.sharding.PartitionSpec(("data", "fsdp")))
    size = cfg.data.batch_size
    key = jax.eval_shape(lambda: jax.random.key(0))
    args = (
        start,
        lay(frozen, everywhere),
        lay(batch_of(cfg, dims, size, pictures), by_row),
        lay(key, everywhere),
    )
    micro = size // cfg.optim.accumulate
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), micro))
    plain = jax.grad(loss_of(cfg, dims, dtype, "none", pictures, attend), has_aux=True)
    return Plan(
        name=f"train step, {size} rows, {cfg.data.resolution} px, from "
        + ("pictures" if pictures else "cached latents"),
        jitted=state.jit_step(step, laid, everywhere, cfg.remat),
        args=args,
        work=plain,
        work_args=(trained, frozen, batch_of(cfg, dims, micro, pictures), keys),
        share=cfg.optim.accumulate / devices.size,
        unit=f"step of {size} rows",
    )


def loss_of(
    cfg: config.Config, dims: ModelConfig, dtype: Any, remat: str, pictures: bool, attend: Attend
) -> Any:
    """The loss of a training, as `ip2p_jax.train` has it."""
    nets = networks(dims, dtype, attend)
    moments = moments_of_pictures(nets.vae) if pictures else moments_of_latents
    encode = (trained_text if cfg.model.train_text else frozen_text)(nets.text)
    score = score_of(STABLE_DIFFUSION, cfg.objective, remat, attend)
    return edit_loss(nets, moments, encode, dims.vae.scaling_factor, score)


def parts_of(
    cfg: config.Config, dims: ModelConfig, dtype: Any, pictures: bool
) -> tuple[Params, Params]:
    """Shapes of the parameters that are trained, and of what is frozen beside them."""
    params = params_of(dims)
    trained = {"unet": params["unet"]}
    frozen: Params = {"vae": params["vae"]} if pictures else {}
    text = dims.text
    if cfg.model.train_text:
        trained["text"] = params["text"]
        rest = {"null_tokens": jax.ShapeDtypeStruct((text.positions,), jnp.int32)}
    else:
        frozen["text"] = params["text"]
        rest = {"null_text": jax.ShapeDtypeStruct((text.positions, text.width), dtype)}
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), frozen)
    return trained, frozen | rest


def batch_of(cfg: config.Config, dims: ModelConfig, rows: int, pictures: bool) -> Any:
    """Shapes of a batch."""
    side = cfg.data.resolution
    tokens = jax.ShapeDtypeStruct((rows, dims.text.positions), jnp.int32)
    if pictures:
        picture = jax.ShapeDtypeStruct((rows, side, side, 3), jnp.uint8)
        return Batch(picture, picture, tokens)
    side //= dims.vae.factor
    z = jax.ShapeDtypeStruct((rows, side, side, dims.vae.latent_channels), jnp.float16)
    return LatentBatch(z, z, z, tokens)


def check_size(resolution: int, dims: ModelConfig) -> None:
    """Raises ValueError for pictures that the networks cannot take."""
    if resolution < 1 or resolution % dims.multiple:
        raise ValueError(f"resolution {resolution}, expected a multiple of {dims.multiple}")


def edit(
    dims: ModelConfig, topology: Topology, *, rows: int, resolution: int, steps: int, sampler: str
) -> Plan:
    """Editing `rows` pictures a chip, three branches each, as `Editor` does; or, if that is 0, a
    single one on all chips, each of which has a branch."""
    check_size(resolution, dims)
    by_row, everywhere = shardings(topology.devices)
    chips = len(topology.devices)
    total, laid = (rows * chips, by_row) if rows else (1, everywhere)
    run, plain = (
        functools.partial(
            guided.edit,
            SAMPLERS[sampler],
            STABLE_DIFFUSION,
            networks(dims, BF16, *how),
            dims.vae.scaling_factor,
        )
        for how in ((attend_on(by_row), by_row), (attend, None))
    )
    params = shapes(params_of(dims), BF16, everywhere)
    points = jax.tree.map(np.asarray, grid(sampler, steps, STABLE_DIFFUSION))
    pictures = f"{rows} pictures a chip" if rows else f"one picture on {chips} chips"
    return Plan(
        name=f"edit, {pictures}, {resolution} px, {steps} steps of {sampler}",
        jitted=jax.jit(run, out_shardings=laid),
        args=(params, lay(edit_batch(dims, total, resolution), laid), lay(points, everywhere)),
        work=plain,
        work_args=(params, edit_batch(dims, rows or 1, resolution), points),
        share=1.0 if rows else 1 / chips,
        unit=f"{total} edits" if rows else "edit",
    )


def edit_batch(dims: ModelConfig, rows: int, side: int) -> guided.EditBatch:
    """Shapes of pictures to edit."""
    small = side // dims.vae.factor
    tokens = jax.ShapeDtypeStruct((rows, dims.text.positions), jnp.int32)
    scale = jax.ShapeDtypeStruct((rows,), jnp.float32)
    noise = jax.ShapeDtypeStruct((rows, small, small, dims.vae.latent_channels), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    text = guided.TextBatch(tokens, tokens, scale, noise, keys, scale)
    pictures = jax.ShapeDtypeStruct((rows, side, side, 3), jnp.uint8)
    return guided.EditBatch(text, pictures, scale)


def layers(dims: ModelConfig, topology: Topology, *, rows: int, resolution: int) -> Iterator[Plan]:
    """Each distinct residual block and transformer of the UNet, forward and backward, on one chip.

    `rows` are those of the chip; pictures have sides of `resolution` px.
    """
    check_size(resolution, dims)
    _, everywhere = shardings(topology.devices[:1])
    graphdef, params = abstract(UNet, dims.unet, dtype=BF16)
    found: dict[Any, list[Any]] = {}
    for kind, layer, side in places(nnx.merge(graphdef, params), resolution // dims.vae.factor):
        _, parts = nnx.split(layer)
        parts = nnx.to_pure_dict(parts)
        c_in, c_out = channels(kind, parts)
        found.setdefault((kind, c_in, c_out, side), []).append(layer)
    for (kind, c_in, c_out, side), alike in found.items():
        yield layer_plan(dims, alike, (kind, c_in, c_out, side), rows, everywhere)


def layer_plan(
    dims: ModelConfig, alike: list[Any], key: Any, rows: int, everywhere: NamedSharding
) -> Plan:
    """Layers that are alike: value and gradient by parameters and input of one of them."""
    kind, c_in, c_out, side = key
    graphdef, params = nnx.split(alike[0])
    x = jax.ShapeDtypeStruct((rows, side, side, c_in), BF16)
    if kind == "transformer":
        beside = (rows, dims.text.positions, dims.unet.context_dim)
    else:
        beside = (rows, 4 * dims.unet.channels[0])
    beside = jax.ShapeDtypeStruct(beside, BF16)

    def gradient(how: Attend, params: Params, x: Any, beside: Any, upstream: Any) -> Any:
        more = (how,) if kind == "transformer" else ()

        def layer(params: Params, *args: Any) -> Any:
            return nnx.merge(graphdef, params)(*args, *more)

        y, back = jax.vjp(layer, params, x, beside)
        return y, back(upstream)

    upstream = jax.ShapeDtypeStruct((rows, side, side, c_out), BF16)
    args = nnx.to_pure_dict(params), x, beside, upstream
    return Plan(
        name=f"{kind} {c_in}-{c_out} at {side}x{side}",
        jitted=jax.jit(functools.partial(gradient, attend_on(everywhere))),
        args=lay(args, everywhere),
        work=functools.partial(gradient, attend),
        work_args=args,
        share=1.0,
        unit=f"forward and backward of {rows} rows",
        runs=len(alike),
    )


def places(unet: UNet, side: int) -> Iterator[tuple[str, Any, int]]:
    """Residual blocks and transformers, with the side of what they see."""
    levels = len(unet.down_blocks)
    for i, block in enumerate([*unet.down_blocks, unet.mid_block, *unet.up_blocks]):
        level = min(i, levels - 1, 2 * levels - i)
        for layer in block.resnets:
            yield "residual block", layer, side // 2**level
        for layer in block.attentions or ():
            yield "transformer", layer, side // 2**level


def channels(kind: str, params: Params) -> tuple[int, int]:
    """Of a layer's input and output."""
    if kind == "transformer":
        (width,) = params["norm"]["scale"].shape
        return width, width
    *_, c_in, _ = params["conv1"]["kernel"].shape
    *_, c_out = params["conv2"]["kernel"].shape
    return c_in, c_out
