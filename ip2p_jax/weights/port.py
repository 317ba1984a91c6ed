# SPDX-License-Identifier: Apache-2.0
"""One rule carries tensors between torch and our networks, both ways, whatever the network.

Attributes are named as diffusers and transformers name their tensors, so a parameter's path is the
tensor's name: kernel, scale and embedding are `weight`, others keep their name. Convolutions, whose
weights are called kernel, go OIHW <-> HWIO; all else is laid out alike. A 1x1 convolution and a
linear layer are the same map, and files have both: the shape is adapted to the network's.
Conversions are views where the type allows it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ip2p_jax.types import Params
from ip2p_jax.weights.names import Spell
from ip2p_jax.weights.tensor_file import FLOATS

WEIGHTS = ("kernel", "scale", "embedding")
NAMED = 20  # faults named in an error, of each kind


def leaves(params: Params, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Yields (path, leaf) of nested dicts, in order."""
    for key, value in params.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def torch_name(path: tuple) -> str:
    """The tensor's name: `("down_blocks", 0, "conv", "kernel")` -> `down_blocks.0.conv.weight`."""
    *head, leaf = path
    return ".".join(map(str, (*head, "weight" if leaf in WEIGHTS else leaf)))


def torch_shape(path: tuple, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of this parameter in torch's layout."""
    if path[-1] != "kernel":
        return tuple(shape)
    return (*shape[:-3:-1], *shape[:-2])


def from_torch(
    abstract: Params,
    tensors: Mapping[str, Any],
    source: str = "weights",
    spell: Spell = lambda name: name,
) -> Params:
    """Fills `abstract` (nested dict of things with a shape) with the tensors of a file.

    `spell` turns our names into those of `tensors`.

    Every name must be used on both sides, and shapes must agree. The arrays are float32; those that
    are float32 already stay views of `tensors`.

    Raises:
      ValueError: names `source` and every missing, extra, misshaped or integer tensor.
    """
    wanted = {spell(torch_name(p)): torch_shape(p, x.shape) for p, x in leaves(abstract)}
    check(wanted, tensors, source)

    def fill(node: Params, path: tuple = ()) -> Params:
        return {
            key: fill(value, (*path, key))
            if isinstance(value, dict)
            else to_jax((*path, key), tensors[spell(torch_name((*path, key)))], value.shape)
            for key, value in node.items()
        }

    return fill(abstract)


def check(wanted: dict[str, tuple[int, ...]], tensors: Mapping[str, Any], source: str) -> None:
    """Raises ValueError that names every tensor by which `tensors` differs from the names and
    shapes in `wanted`."""
    faults = {
        "missing": [f"{n} {shape}" for n, shape in wanted.items() if n not in tensors],
        "unexpected": [f"{n} {x.shape}" for n, x in tensors.items() if n not in wanted],
        "of another shape": [
            f"{n} {tensors[n].shape}, expected {shape}"
            for n, shape in wanted.items()
            if n in tensors and not same_map(tensors[n].shape, shape)
        ],
        "of another type": [
            f"{n} {x.dtype}" for n, x in tensors.items() if n in wanted and x.dtype not in FLOATS
        ],
    }
    if any(faults.values()):
        raise ValueError(f"{source}: " + "; ".join(fault(k, v) for k, v in faults.items() if v))


def to_torch(params: Params, spell: Spell = lambda name: name) -> dict[str, np.ndarray]:
    """Names and lays out parameters as torch does; the arrays are views, of the type they had."""
    tensors = {}
    for path, x in leaves(params):
        x = np.asarray(x)
        if path[-1] == "kernel":
            x = np.moveaxis(x, (-1, -2), (0, 1))
        tensors[spell(torch_name(path))] = x
    return tensors


def same_map(got: tuple[int, ...], want: tuple[int, ...]) -> bool:
    """Whether both are one shape, apart from the trailing ones of a 1x1 convolution."""
    return got == want or (
        got[:2] == want[:2] and len(want) > 1 and set(got[2:]) | set(want[2:]) == {1}
    )


def to_jax(path: tuple, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor in our layout, float32."""
    x = x.reshape(torch_shape(path, shape)).astype(np.float32, order="K", copy=False)
    return np.moveaxis(x, (0, 1), (-1, -2)) if path[-1] == "kernel" else x


def fault(kind: str, names: list[str]) -> str:
    """`3 tensors missing: a (1,), b (2,), c (3,)`."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    plural = "tensor" if len(names) == 1 else "tensors"
    return f"{len(names)} {plural} {kind}: {', '.join(names[:NAMED])}{more}"
