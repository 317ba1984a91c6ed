# SPDX-License-Identifier: Apache-2.0
"""From a text-to-image model to the start of an editing one: four more input channels."""

from dataclasses import replace

import numpy as np

from ip2p_jax.weights.load import Pretrained


def widen(p: Pretrained) -> Pretrained:
    """Gives the UNet's first convolution input channels for the image latent (section 3.2).

    The new channels are zero, the old ones and the bias stay. A model that has them is returned as
    it is.

    Raises:
      ValueError: the UNet takes neither as many channels as the VAE makes, nor twice as many.
    """
    z, taken = p.config.vae.latent_channels, p.config.unet.in_channels
    if taken == 2 * z:
        return p
    conv = p.params["unet"]["conv_in"]
    if taken != z:
        h, w, i, o = conv["kernel"].shape
        raise ValueError(
            f"conv_in.weight {(o, i, h, w)} cannot be widened: expected {(o, z, h, w)}, as many "
            f"input channels as the VAE has latent ones, or {(o, 2 * z, h, w)}"
        )
    kernel = np.pad(conv["kernel"], ((0, 0), (0, 0), (0, z), (0, 0)))
    unet = {**p.params["unet"], "conv_in": {**conv, "kernel": kernel}}
    return replace(p, config=p.config.widened(), params={**p.params, "unet": unet})
