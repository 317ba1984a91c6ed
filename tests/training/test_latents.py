# SPDX-License-Identifier: Apache-2.0
"""Claims: from cached latents training minimises the same loss as from pictures, on the same
distribution of latents, for about half the work; a run takes either, and refuses latents of another
VAE or other settings."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.stats import ks_2samp

from ip2p_jax.config import Data, Objective
from ip2p_jax.data.buckets import Bucket
from ip2p_jax.data.latents import LatentSource
from ip2p_jax.data.loader import LATENTS, PAIRS, make_loader
from ip2p_jax.data.pairs import PairSource
from ip2p_jax.data.transforms import draw_views, see
from ip2p_jax.diffusion.objective import sample_posterior
from ip2p_jax.diffusion.schedule import STABLE_DIFFUSION
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.presets import SD15
from ip2p_jax.models.unet import UNet
from ip2p_jax.networks import networks
from ip2p_jax.training.state import row_keys
from ip2p_jax.training.tasks.diffusion import frozen_text, score_of
from ip2p_jax.training.tasks.edit import edit_loss, moments_of_latents, moments_of_pictures
from ip2p_jax.types import Batch, LatentBatch
from ip2p_jax.weights.load import PARTS, load_vae
from tests import latents
from tests.data.released import Words
from tests.toy_runs import logged, one_device_only, run, toy_options
from tests.training import tiny

VIEWS = 12
CFG = Data(batch_size=256, resolution=16, resize_max=20, threads=0)
SQUARE = Bucket(16, 16)


@pytest.fixture(scope="module")
def sources(packed, tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder with a small VAE, and the options of a toy run that uses it."""
    folder = tmp_path_factory.mktemp("sources")
    return folder, toy_options(packed, folder)


@pytest.fixture(scope="module")
def vae(sources):
    """Its dimensions and parameters."""
    cfg, params = load_vae(str(sources[0]))
    return cfg, jax.tree.map(jnp.asarray, params)


@pytest.fixture(scope="module")
def cached(packed, sources, tmp_path_factory) -> Path:
    """Many views of the 144 pairs of the training split."""
    folder = tmp_path_factory.mktemp("cached") / "latents"
    more = ("--split=train", "--resize-max=20", f"--views={VIEWS}", "--rows=64")
    assert latents.run(packed, sources[0], folder, *more) == 0
    return folder


def test_the_loss_is_that_from_pictures(packed, cached, vae):
    """Of the same views, with the same keys, to 1e-5: from the moments, and from 16 bits on disk.

    Controls: the mean as target, a condition that is scaled, and the input as target, miss."""
    pairs, views = PairSource(packed, "train"), LatentSource(cached, "train")
    cfg, params = vae
    shown, kept = [], []
    for record in range(8):
        view = draw_views(np.random.default_rng([0, 0, record]), CFG, SQUARE, VIEWS)[record]
        pair = pairs[record]
        shown.append([see(x, view) for x in (pair.input, pair.output)])
        kept.append(views[record * VIEWS + record][:3])
    tokens = tiny.batch(8).tokens
    batch = Batch(*np.stack(shown, 1), tokens)
    stored = LatentBatch(*(np.stack(x) for x in zip(*kept, strict=True)), tokens)

    keys = row_keys(tiny.KEY, np.arange(8))
    tasks = {kind: tiny.tiny_task(kind is LatentBatch) for kind in (Batch, LatentBatch)}
    losses = {kind: jax.jit(task.loss) for kind, task in tasks.items()}

    def loss(batch) -> float:
        task = tasks[type(batch)]
        frozen = task.frozen | {"vae": params}
        return float(losses[type(batch)](task.start.shapes, frozen, batch, keys)[0])

    moments = jax.jit(moments_of_pictures(networks(tasks[Batch].config, jnp.float32).vae))
    image, posterior = moments({"vae": params}, batch)
    exact = LatentBatch(image, *posterior, tokens)
    want = loss(batch)
    assert loss(exact) == pytest.approx(want, rel=1e-5)
    assert loss(stored) == pytest.approx(want, rel=1e-5)
    wrong = (
        exact._replace(log_var=jnp.full_like(exact.log_var, -30.0)),
        exact._replace(input=exact.input * cfg.scaling_factor),
        exact._replace(output=exact.input),
    )
    assert min(abs(loss(x) / want - 1) for x in wrong) > 1e-4


def drawn(kind, path: Path, moments, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples of target and condition, as the loss makes them of `count` rows; flat."""
    cfg = Data(**vars(CFG) | {"path": str(path)})
    batches = make_loader(cfg, Words(), kind, seed=seed)

    @jax.jit
    def sample(batch, keys):
        image, posterior = moments(batch)
        return sample_posterior(keys, *posterior) * 0.18215, image

    rows = []
    for i in range(count // cfg.batch_size):
        keys = row_keys(jax.random.fold_in(jax.random.key(seed), i), np.arange(cfg.batch_size))
        rows.append(sample(next(batches), keys))
    batches.close()
    z0, image = (np.concatenate(x).reshape(count, -1) for x in zip(*rows, strict=True))
    return z0, image


def differ(a: np.ndarray, b: np.ndarray, views: int) -> float:
    """By how many standard errors means and variances differ at most, over all places.

    b was drawn from no more than so many views."""
    errors = []
    for power in (1, 2):
        x, y = ((s - a.mean(0)) ** power for s in (a, b))
        error = x.std(0) * (1 / len(a) + 1 / len(b) + 1 / views) ** 0.5
        errors.append(np.abs(x.mean(0) - y.mean(0)) / error)
    return float(np.max(errors))


def test_latents_are_spread_as_those_of_pictures(packed, cached, vae):
    """Target and condition at each place: mean and variance within 5 standard errors of 1024 draws,
    distributions by Kolmogorov-Smirnov at 16 places.

    Controls: the mean as target, no scaling, another order of rows and columns."""
    count, all_views = 1024, 144 * VIEWS
    graph = networks(tiny.tiny_task().config, jnp.float32).vae
    frozen = {"vae": vae[1]}

    def from_pictures(batch):
        return moments_of_pictures(graph)(frozen, batch)

    def from_latents(batch):
        return moments_of_latents({}, batch)

    def means_only(batch):
        image, posterior = moments_of_latents({}, batch)
        return image, posterior._replace(log_var=jnp.full_like(posterior.log_var, -30.0))

    want = drawn(PAIRS, packed, from_pictures, count, 1)
    got = drawn(LATENTS, cached, from_latents, count, 2)
    for a, b in zip(want, got, strict=True):
        assert differ(a, b, all_views) < 5
        places = np.linspace(0, a.shape[1] - 1, 16).astype(int)
        assert min(ks_2samp(a[:, i], b[:, i]).pvalue for i in places) > 1e-4
    z0 = want[0]
    assert differ(z0, drawn(LATENTS, cached, means_only, count, 3)[0], all_views) > 10
    assert differ(z0, got[0] / 0.18215, all_views) > 10
    turned = got[0].reshape(count, 8, 8, 4).swapaxes(1, 2).reshape(count, -1)
    assert differ(z0, turned, all_views) > 10


@pytest.fixture
def options(sources, cached) -> list[str]:
    """Of a run on the latents."""
    chosen = [x for x in sources[1] if "data.path" not in x]
    return [*chosen, "--config.data.resize_max=20", f"--config.data.path={cached}"]


@pytest.mark.slow
def test_training_from_latents(packed, options, tmp_path, capsys):
    """Two steps of a run, and what it refuses."""

    def refused(line: str, *more: str) -> None:
        assert run(options, tmp_path / "run", *more) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and line in err

    with one_device_only():
        refused("config.data.resize_max is 19, the latents in", "--config.data.resize_max=19")
        refused(f"{packed} holds no latents, other folders do", f"--config.data.mix={packed}:1")
        latents.small_vae(seed=1).save_pretrained(tmp_path / "other" / "vae")
        refused("were made by the encoder", f"--config.model.vae={tmp_path / 'other'}")
        assert run(options, tmp_path / "run", "--config.steps=2") == 0
    assert logged(tmp_path / "run") == [1, 2]


@pytest.mark.slow
def test_text_to_image_from_latents(options, tmp_path):
    """A run on the latents of the outputs, with a grid: what they decode to, and what is made."""
    more = ("--config.objective.kind=generate", "--config.steps=2", "--config.log.samples_every=2")
    with one_device_only():
        assert run(options, tmp_path, *more) == 0
    assert logged(tmp_path) == [1, 2]
    with Image.open(tmp_path / "samples/00000002.png") as grid:
        assert grid.size == (2 * 16, 2 * 16)


@pytest.mark.slow
def test_grids_show_decoded_latents(options, tmp_path):
    """Input, edit and output: the first and the last are not the same."""
    more = ("--config.steps=1", "--config.log.samples_every=1")
    with one_device_only():
        assert run(options, tmp_path, *more) == 0
    with Image.open(tmp_path / "samples/00000001.png") as grid:
        assert grid.size == (3 * 16, 2 * 16)
        before, _, after = np.split(np.asarray(grid).astype(int), 3, axis=1)
    assert np.abs(before - after).mean() > 1


@pytest.mark.slow
@pytest.mark.heavy
def test_a_step_from_latents_is_half_the_work():
    """Compiled FLOPs of loss and gradient in SD 1.5's full size at 256 px: at most 0.52 of those
    from pictures. Nothing is allocated but the programs."""
    cfg, rows = SD15.widened(), 2
    nets = networks(cfg, jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((rows, 77), jnp.int32)
    picture = jax.ShapeDtypeStruct((rows, 256, 256, 3), jnp.uint8)
    latent = jax.ShapeDtypeStruct((rows, 32, 32, 4), jnp.float16)
    frozen = {
        part: abstract(PARTS[part].network, getattr(cfg, part))[1] for part in ("vae", "text")
    }
    frozen["null_text"] = jax.ShapeDtypeStruct((77, 768), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    params = {"unet": abstract(UNet, cfg.unet)[1]}

    def flops(batch, moments) -> float:
        score = score_of(STABLE_DIFFUSION, Objective(), "none")
        loss = edit_loss(nets, moments, frozen_text(nets.text), cfg.vae.scaling_factor, score)
        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        analysis = step.lower(params, frozen, batch, keys).compile().cost_analysis()
        assert analysis is not None
        return analysis["flops"] / rows

    pictures = flops(Batch(picture, picture, tokens), moments_of_pictures(nets.vae))
    cached = flops(LatentBatch(latent, latent, latent, tokens), moments_of_latents)
    assert pictures > 1e12  # the UNet's passes are counted
    assert cached <= 0.52 * pictures
