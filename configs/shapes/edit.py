# SPDX-License-Identifier: Apache-2.0
"""InstructPix2Pix in the shapes world on 2 CPU cores, from the text-to-image model of sd.py.

Its pairs are made by that model with Prompt-to-Prompt, and filtered by clip.py's CLIP.

python -m data_gen.shapes --output data/shapes_triplets.jsonl --triplets 5000 --seed 3
python -m data_gen.pairs --triplets data/shapes_triplets.jsonl --output data/made_pairs \\
    --model runs/shapes_sd --clip runs/shapes_clip --steps 20 --candidates 8 --rows 8
python -m data_gen.pack --input data/made_pairs --output data/made
python -m ip2p_jax.cache_latents --data data/made --output data/made_latents \\
    --model runs/shapes_vae --resolution 64 --flip 0 --views 1 --rows 64

python -m ip2p_jax.train --config configs/shapes/edit.py \\
    --workdir runs/shapes_edit
"""

from ip2p_jax.config import Checkpoint, Config, Data, Log, Mesh, Model, Optim


def get_config() -> Config:
    return Config(
        model=Model(base="runs/shapes_sd", train_text=True),
        data=Data(path="data/made_latents", batch_size=32, resolution=64, flip=0.0, threads=1),
        optim=Optim(lr=5e-4, warmup=100, cosine_steps=4000, accumulate=1, ema_decay=0.999),
        mesh=Mesh(data=-1, fsdp=1),
        checkpoint=Checkpoint(every=500),
        log=Log(every=50, samples_every=500),
        steps=4000,
    )
