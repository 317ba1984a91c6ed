# SPDX-License-Identifier: Apache-2.0
"""CLIP of the shapes world on 2 CPU cores: it filters pairs and scores edits there.

python -m data_gen.tokenizer --data data/shapes --output data/shapes_tokenizer
JAX_NUM_CPU_DEVICES=2 python -m ip2p_jax.train --config configs/shapes/clip.py \\
    --workdir runs/shapes_clip
"""

from ip2p_jax.config import Checkpoint, Config, Data, Log, Mesh, Model, Objective, Optim
from ip2p_jax.models.presets import CLIPConfig, TextConfig, VisionConfig


def get_config() -> Config:
    text = TextConfig(vocab_size=1024, width=128, layers=3, heads=4, mlp_width=512, positions=56)
    vision = VisionConfig(
        image_size=64,
        patch_size=8,
        width=128,
        layers=4,
        heads=4,
        mlp_width=512,
        projection_dim=128,
    )
    return Config(
        model=Model(base="", clip=CLIPConfig(text, vision), tokenizer="data/shapes_tokenizer"),
        data=Data(path="data/shapes", batch_size=256, resolution=64, flip=0.0, threads=1),
        objective=Objective(kind="clip"),
        optim=Optim(lr=1e-3, warmup=200, accumulate=1, ema_decay=0.99),
        mesh=Mesh(data=-1, fsdp=1),
        checkpoint=Checkpoint(every=200),
        log=Log(every=20, samples_every=200),
        steps=600,
    )
