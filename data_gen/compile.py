# SPDX-License-Identifier: Apache-2.0
"""Compiles the making of pairs for a TPU slice without having one, as ip2p_jax.compile does.

  python -m data_gen.compile --topology v4-8 --rows 4 --resolution 512 --steps 100

The models are SD 1.5 and CLIP ViT-L/14. --rows are candidates a chip, of two pictures with two
branches each (default 2). Exit code 1: it does not fit.
"""

import sys
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np

from data_gen.candidates import CandidateMaker, Recipe, Rows, Texts
from ip2p_jax.cli import one_line_errors
from ip2p_jax.devices import shapes, shardings
from ip2p_jax.diffusion.schedule import STABLE_DIFFUSION
from ip2p_jax.evaluation.clip_scores import Clip
from ip2p_jax.models.attention import Attend, attend
from ip2p_jax.models.clip import CLIP
from ip2p_jax.models.flash import attend_on
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.presets import CLIP_L14, SD15, CLIPConfig, ModelConfig
from ip2p_jax.networks import networks
from ip2p_jax.placed import Placed
from ip2p_jax.tpu import command
from ip2p_jax.tpu.programs import BF16, Plan, check_size, lay, params_of
from ip2p_jax.tpu.topologies import Topology, topology, use_cpu
from ip2p_jax.weights.clip import PretrainedClip
from ip2p_jax.weights.hub import ASSETS
from ip2p_jax.weights.load import open_tokenizer


def pairs(dims: ModelConfig, sizes: CLIPConfig, on: Topology, recipe: Recipe, rows: int) -> Plan:
    """Making and scoring `rows` candidates a chip; ValueError for a size that the model cannot
    have."""
    check_size(recipe.height, dims)
    tokenizer = open_tokenizer(ASSETS / "clip_tokenizer")
    tokenizer.model_max_length = dims.text.positions
    here, on_host = shardings(), shardings(jax.devices()[:1]).replicated
    by_row, everywhere = shardings(on.devices)

    def maker_of(attend: Attend) -> CandidateMaker:
        model = Placed(
            config=dims,
            networks=networks(dims, BF16, attend),
            shapes={},
            arriving=Future(),
            tokenizer=tokenizer,
            schedule=STABLE_DIFFUSION,
            scheduler=None,
            dtype=BF16,
            by_row=here.by_row,
            replicated=on_host,
        )
        return CandidateMaker(model, Clip(PretrainedClip(sizes, {}, tokenizer)), recipe, rows)

    maker, plain = maker_of(attend_on(by_row)), maker_of(attend)
    params = shapes(params_of(dims), BF16, everywhere)
    clip = shapes(abstract(CLIP, sizes)[1], jnp.float32, everywhere)
    points = jax.tree.map(np.asarray, maker.points)
    batch = rows_of(dims, sizes, rows * len(on.devices))
    return Plan(
        name=f"pairs, {rows} candidates a chip, {recipe.height} px, {recipe.steps} steps of "
        f"{recipe.sampler}",
        jitted=jax.jit(maker.make, out_shardings=by_row),
        args=(params, clip, lay(batch, by_row), lay(points, everywhere)),
        work=plain.make,
        work_args=(params, clip, rows_of(dims, sizes, rows), points),
        share=1.0,
        unit=f"{rows * len(on.devices)} pairs",
    )


def rows_of(dims: ModelConfig, sizes: CLIPConfig, rows: int) -> Rows:
    """Shapes of rows."""
    number = jax.ShapeDtypeStruct((rows,), jnp.uint32)
    texts = (
        jax.ShapeDtypeStruct((rows, 2, text.positions), jnp.int32)
        for text in (dims.text, sizes.text)
    )
    return Rows(number, number, Texts(*texts))


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 it fits, 1 it does not, 2 wrong input."""
    args = command.parser("data_gen.compile", __doc__).parse_args(argv)
    use_cpu()
    side = args.resolution or 512
    recipe = Recipe(steps=args.steps, sampler=args.sampler, height=side, width=side)
    on = topology(args.topology)
    return command.run(args, [pairs(SD15, CLIP_L14, on, recipe, args.rows or 2)], on)


if __name__ == "__main__":
    sys.exit(main())
