# SPDX-License-Identifier: Apache-2.0
"""Compiles for a TPU slice on a machine that has none: does it fit, and about how fast is it?

  python -m ip2p_jax.compile --config configs/tpu_v4.py --topology v4-32
  python -m ip2p_jax.compile --config configs/tpu_v4.py --topology v5e-16 --pictures \\
      --config.optim.accumulate=8 --config.remat=blocks --output table.json
  python -m ip2p_jax.compile --what edit --topology v4-8 --rows 8 --resolution 512
  python -m ip2p_jax.compile --what layers --topology v6e-1 --rows 64 --resolution 256

--what train: a training's step on cached latents, or on pictures; --config and its options as for
  ip2p_jax.train. Half an hour and 12 GB for SD 1.5 on two cores, less with --lower.
--what edit: editing --rows pictures a chip (default 8; 512 px), or one on all chips (--single).
--what layers: every distinct layer of the UNet, forward and backward, on one chip (default 64 rows;
  256 px), or those that --only names: a minute or three each.

Pairs of the data are compiled by data_gen.compile. Nothing is fetched: dimensions are those of the
configuration, or SD 1.5's. Needs libtpu (pip install "ip2p_jax[tpu]"). Times are sums of the cycles
that the compiler expects of each operation, and no measurements. Exit code 1: it does not fit.
"""

import argparse
import sys
from collections.abc import Iterable

from ip2p_jax import config
from ip2p_jax.cli import one_line_errors
from ip2p_jax.models.presets import SD15
from ip2p_jax.tpu import command, programs
from ip2p_jax.tpu.programs import Plan
from ip2p_jax.tpu.topologies import Topology, topology, use_cpu


def plans(args: argparse.Namespace, cfg: config.Config | None, on: Topology) -> Iterable[Plan]:
    """What to compile."""
    if args.what == "train":
        if cfg is None:
            raise ValueError("--config FILE is needed with --what train")
        command.check_only(
            args,
            "train",
            {
                "rows": None,
                "resolution": None,
                "steps": 100,
                "sampler": SAMPLER,
                "only": "",
                "single": False,
            },
        )
        plan = programs.train(cfg, on, pictures=args.pictures)
        if cfg.model.base:
            print(f"{cfg.model.base}: dimensions as they are known; nothing is fetched")
        return [plan]
    command.check_only(args, args.what, {"pictures": False})
    dims = SD15.widened() if cfg is None else programs.dims_of(cfg.model)
    if args.what == "edit":
        if args.single and args.rows:
            raise ValueError("--rows: expected without --single")
        command.check_only(args, "edit", {"only": ""})
        return [
            programs.edit(
                dims,
                on,
                rows=0 if args.single else args.rows or 8,
                resolution=args.resolution or 512,
                steps=args.steps,
                sampler=args.sampler,
            )
        ]
    unused = {"steps": 100, "sampler": SAMPLER, "executable": None, "single": False}
    command.check_only(args, "layers", unused)
    layers = programs.layers(dims, on, rows=args.rows or 64, resolution=args.resolution or 256)
    return (plan for plan in layers if args.only in plan.name)


SAMPLER = "euler_ancestral"
"""The default."""


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 it fits, 1 it does not, 2 wrong input."""
    p = command.parser("ip2p_jax.compile", __doc__)
    p.add_argument("--what", choices=("train", "edit", "layers"), default="train")
    p.add_argument("--config", metavar="FILE", help="and --config.a.b=c, as for ip2p_jax.train")
    p.add_argument("--pictures", action="store_true", help="train: the VAE is part of the step")
    p.add_argument("--single", action="store_true", help="edit: one picture on all chips")
    p.add_argument("--only", default="", metavar="TEXT", help="layers: whose names have this")
    args, rest = p.parse_known_args(argv)
    use_cpu()
    if rest and not args.config:
        raise ValueError(f"{rest[0]}: no such option, see --help")
    options = [f"--config={args.config}", "--workdir=none", *rest]
    parsed = config.parse(options) if args.config else None
    on = topology(args.topology)
    return command.run(args, plans(args, parsed and parsed.config, on), on)


if __name__ == "__main__":
    sys.exit(main())
