# SPDX-License-Identifier: Apache-2.0
"""Claims: what is cached are the moments that diffusers' VAE gives, of the views that training may
draw; stopped anywhere and started again the command ends with the same bytes, and so do several
hosts and devices; broken pairs are left out and named; wrong input is one line.
"""

import dataclasses
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_gen.pack import pack
from ip2p_jax import cache_latents, latent_shards
from ip2p_jax.config import Data
from ip2p_jax.data.buckets import Bucket, nearest
from ip2p_jax.data.latents import LatentSource, check_settings, made_with
from ip2p_jax.data.loader import LATENTS, make_loader
from ip2p_jax.data.pairs import PairSource
from ip2p_jax.data.transforms import draw_views, see
from tests import latents
from tests.data.released import Words, write_released
from tests.kills import KILLS, write_row

CFG = Data(resolution=16, resize_min=16, resize_max=20)
SQUARE = Bucket(16, 16)
VIEWS = ("--resize-max=20", "--views=3", "--shard-size=3")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """20 prompts of 2 pairs: 18 in train, one each in validation and test."""
    folder = tmp_path_factory.mktemp("data")
    pack([write_released(folder / "released", 20, pairs=2)], folder / "packed")
    return folder / "packed"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    latents.small_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(data, model, tmp_path_factory) -> Path:
    """Three views of every pair, on one device."""
    folder = tmp_path_factory.mktemp("made") / "latents"
    assert latents.run(data, model, folder, *VIEWS) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file."""
    files = [x for x in folder.rglob("*") if x.is_file()]
    return {str(x.relative_to(folder)): x.read_bytes() for x in files}


def test_moments_are_those_of_diffusers(data, made):
    """Up to what 16 bits lose, in the order of the pairs. Control: of the mirrored view."""
    vae, pairs, cached = latents.small_vae(), PairSource(data, "train"), LatentSource(made, "train")
    assert len(cached) == 3 * len(pairs) == 108
    mirrored = []
    for record in range(0, len(pairs), 7):
        pair = pairs[record]
        views = draw_views(np.random.default_rng([0, 0, record]), CFG, SQUARE, 3)
        for i, view in enumerate(views):
            found = cached[3 * record + i]
            texts = (pair.instruction, pair.input_caption, pair.output_caption)
            assert found[3:] == (*texts, pair.prompt, pair.seed)
            pixels = np.stack([see(x, view) for x in (pair.input, pair.output)])
            mean, log_var = latents.moments(vae, pixels)
            want = mean[0], mean[1], log_var[1]
            for x, y in zip(found[:3], want, strict=True):
                np.testing.assert_allclose(x.astype(np.float32), y, rtol=2**-10, atol=1e-4)
            mirror = latents.moments(vae, np.ascontiguousarray(pixels[:, :, ::-1]))[0][0]
            mirrored.append(np.abs(mirror - found.input).max())
    assert min(mirrored) > 0.01


def test_buckets(model, tmp_path, capsys):
    """Views have the sides of the bucket nearest to their pictures', and moments are those of
    diffusers; training gets batches of one bucket each, and refuses other buckets."""
    of = Bucket(24, 16), Bucket(16, 24), Bucket(20, 20)
    shapes = [(48, 30), (30, 48), (40, 42), (64, 40)]
    pack([write_released(tmp_path / "released", 20, 1, sizes=shapes)], tmp_path / "packed")
    named = ",".join(f"{w}x{h}" for w, h in of)
    options = ("--resize-max=20", "--views=2", f"--buckets={named}")
    assert latents.run(tmp_path / "packed", model, tmp_path / "made", *options) == 0
    assert cache_latents.main(["--verify", f"--output={tmp_path / 'made'}"]) == 0
    assert "40 views (train 36" in capsys.readouterr().out
    cfg = Data(
        path=str(tmp_path / "made"), batch_size=6, resolution=16, resize_max=20, buckets=named
    )
    vae, cached = latents.small_vae(), LatentSource(cfg.path, "train")
    pairs = PairSource(tmp_path / "packed", "train")
    assert len(cached) == 36
    for i in range(0, 36, 5):
        pair, bucket = pairs[i // 2], nearest(of, shapes[i // 2 % 4])
        assert cached[i].prompt == pair.prompt
        views = draw_views(np.random.default_rng([0, 0, i // 2]), cfg, bucket, 2)
        pixels = np.stack([see(pair.input, views[i % 2])])
        assert pixels.shape[1:3] == (bucket.height, bucket.width)
        want = latents.moments(vae, pixels)[0][0]
        np.testing.assert_allclose(cached[i].input, want, rtol=2**-10, atol=1e-3)
    loader = make_loader(cfg, Words(), LATENTS)
    batches = [next(loader) for _ in range(12)]
    loader.close()
    found = {batch.input.shape[1:3] for batch in batches}
    assert found == {(b.height // 2, b.width // 2) for b in of}
    wide = {int(x) % 4 for b in batches if b.input.shape[2] == 12 for x in b.tokens[:, 0]}
    assert wide == {0, 3}
    with pytest.raises(ValueError, match="config.data.buckets is 24x16, the latents in .* were"):
        check_settings({cfg.path: made_with(cfg.path)}, dataclasses.replace(cfg, buckets="24x16"))


def test_what_is_written(made, capsys):
    assert {x.name for x in made.iterdir()} == {
        *("manifest.json", "report.json", "settings.json", "shards"),
    }
    how = made_with(made)
    assert how is not None and (how.resolution, how.resize_max, how.views) == (16, 20, 3)
    report = json.loads((made / "report.json").read_text())
    assert report == {"pairs": 40, "views": 120, "refused": 0, "reasons": {}, "list": []}
    assert cache_latents.main(["--verify", f"--output={made}"]) == 0
    said = capsys.readouterr().out
    assert "120 views (train 108, validation 6, test 6), 0 not right" in said
    sizes = [len(prompt) for prompt in LatentSource(made, "train").prompts]
    assert sizes == [6] * 18


def test_a_flipped_byte_is_found(made, tmp_path, capsys):
    for name, data in contents(made).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    shard = tmp_path / "shards/train-000000003.array_record"
    whole = shard.read_bytes()
    for place, message in ((1000, "has another content"), (len(whole) // 2, "has 0 records")):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert cache_latents.main(["--verify", f"--output={tmp_path}"]) == 2
        assert f"train-000000003.array_record {message}" in capsys.readouterr().err


def test_stopped_and_started_again(data, model, made, tmp_path, monkeypatch, capsys):
    """In the middle of a shard, between shard and sidecar, and before the manifest."""
    writes = {"measure": 4, "gather": 0}  # after so many calls
    for name, calls in writes.items():
        module = latent_shards if name == "measure" else cache_latents
        original, left = getattr(module, name), [calls]

        def stop(*args, original=original, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return original(*args)

        monkeypatch.setattr(module, name, stop)
        with pytest.raises(KeyboardInterrupt):
            latents.run(data, model, tmp_path, *VIEWS)
        monkeypatch.setattr(module, name, original)
        assert not (tmp_path / "manifest.json").exists()
    assert latents.run(data, model, tmp_path, *VIEWS) == 0
    assert contents(tmp_path) == contents(made)
    times = {x: x.stat().st_mtime_ns for x in (tmp_path / "shards").iterdir()}
    assert latents.run(data, model, tmp_path, *VIEWS) == 0  # nothing is left to do
    assert times == {x: x.stat().st_mtime_ns for x in (tmp_path / "shards").iterdir()}


def test_two_hosts_and_eight_devices(data, model, made, tmp_path, capsys):
    """The one that is done last writes the manifest."""
    host = [*VIEWS, "--hosts=2"]
    assert latents.run(data, model, tmp_path, *host, "--host=1", devices=8) == 0
    assert "4 shards of other hosts are still to come" in capsys.readouterr().out
    assert not (tmp_path / "manifest.json").exists()
    assert latents.run(data, model, tmp_path, *host, "--host=0", devices=2) == 0
    assert contents(tmp_path) == contents(made)


@pytest.mark.slow
def test_killed_and_started_again(data, model, made, tmp_path):
    """SIGKILL at random moments, in processes of one device: the same bytes in the end.

    Control: another seed gives others."""

    def command(output: Path, *more: str) -> list[str]:
        options = [f"--data={data}", f"--model={model}", f"--output={output}", "--resolution=16"]
        return [sys.executable, "-m", "ip2p_jax.cache_latents", *options, *VIEWS, *more]

    apart, killed, moment = tmp_path / "apart", tmp_path / "killed", random.Random(KILLS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_NUM_CPU_DEVICES", "1")
        subprocess.run(command(apart), check=True, capture_output=True)
        started = kills = writing = 0
        while kills < KILLS:
            with subprocess.Popen(command(killed), stderr=subprocess.DEVNULL) as process:
                shards = killed / "shards"
                before = len(list(shards.glob("*.json")))
                while process.poll() is None and len(list(shards.glob("*.json"))) == before:
                    time.sleep(0.002)
                time.sleep(0.1 * moment.random())
                process.kill()
            assert process.returncode in (0, -9) and started < 20 * KILLS
            started, kills = started + 1, kills + (process.returncode == -9)
            writing += bool(list(shards.glob(".*.part")))
            if process.returncode == 0:  # begins anew
                assert contents(killed) == contents(apart)
                killed = tmp_path / str(started)
        subprocess.run(command(killed), check=True, capture_output=True)
        subprocess.run(command(tmp_path / "other", "--seed=1"), check=True, capture_output=True)
    assert contents(killed) == contents(apart)
    assert contents(tmp_path / "other").keys() == contents(apart).keys()
    assert contents(tmp_path / "other") != contents(apart)
    write_row("120 views of latents", started, kills, writing)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--views=2"], "was made with views 3, this command says 2"),
        (["--resize-max=22"], "was made with resize_max 20"),
        (["--seed=1"], "was made with seed 0"),
        (["--split=test"], "was made with split"),
    ],
)
def test_other_settings_are_refused(data, model, made, options, message, capsys):
    before = contents(made)
    assert latents.run(data, model, made, *VIEWS, *options) == 2
    assert message in capsys.readouterr().err
    assert contents(made) == before


def test_other_models_and_data_are_refused(data, packed, model, made, tmp_path, capsys):
    latents.small_vae(seed=1).save_pretrained(tmp_path)
    assert latents.run(data, tmp_path, made, *VIEWS) == 2
    assert "was made with vae " in capsys.readouterr().err
    assert latents.run(packed, model, made, *VIEWS) == 2
    assert "was made with data " in capsys.readouterr().err
    assert latents.run(made, model, tmp_path / "again", *VIEWS) == 2
    assert "holds latents, expected a folder of data_gen.pack" in capsys.readouterr().err


def break_pairs(monkeypatch, broken: set[str]) -> None:
    """Some pairs do not decode: those of which one picture's bytes are cut short."""
    read = PairSource.__getitem__

    def cut(self, record):
        pair = read(self, record)
        return pair._replace(output=pair.output[:-60]) if pair.seed in broken else pair

    monkeypatch.setattr(PairSource, "__getitem__", cut)


def test_broken_pairs_are_left_out_and_named(data, model, made, tmp_path, monkeypatch, capsys):
    """One pair, and all pairs of the only prompt in the test split."""
    break_pairs(monkeypatch, {"1011", "1190", "1191"})
    assert latents.run(data, model, tmp_path, *VIEWS) == 0
    assert "111 views of 37 pairs" in (said := capsys.readouterr().out) and "3 left out" in said
    report = json.loads((tmp_path / "report.json").read_text())
    assert {(x["prompt"], x["seed"]) for x in report["list"]} == {
        *(("0000001", "1011"), ("0000019", "1190"), ("0000019", "1191")),
    }
    assert sum(report["reasons"].values()) == report["refused"] == 3
    assert cache_latents.main(["--verify", f"--output={tmp_path}"]) == 0
    source = LatentSource(tmp_path, "train")
    assert [len(prompt) for prompt in source.prompts] == [6, 3] + [6] * 16
    whole = LatentSource(made, "train")
    for i, same in ((8, 8), (9, 12)):  # the others are what they were
        assert np.array_equal(source[i].output, whole[same].output)
    with pytest.raises(ValueError, match="no split 'test', only train, validation"):
        LatentSource(tmp_path, "test")


def test_too_many_broken_pairs(data, model, tmp_path, monkeypatch, capsys):
    break_pairs(monkeypatch, {"1001", "1010", "1011", "1020", "1021"})
    assert latents.run(data, model, tmp_path, *VIEWS) == 2
    err = capsys.readouterr().err
    assert "5 of 40 pairs cannot be used" in err and "--max-refused 0.1" in err
    assert not (tmp_path / "manifest.json").exists()
    assert json.loads((tmp_path / "report.json").read_text())["refused"] == 5
    assert latents.run(data, model, tmp_path, *VIEWS, "--max-refused=0.2") == 0


def test_latents_that_are_not_finite_are_left_out(data, tmp_path, capsys):
    """All of them, here: they do not fit into 16 bits."""
    vae = latents.small_vae()
    vae.encoder.conv_out.weight.data *= 1e9
    vae.save_pretrained(tmp_path / "vae")
    assert latents.run(data, tmp_path / "vae", tmp_path / "out", "--split=test") == 2
    assert "2 of 2 pairs cannot be used (its latents are not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--views=0"], "--views 0: expected at least 1"),
        (["--resolution=17"], "--resolution 17: expected a multiple of 2 px"),
        (["--resize-min=8"], "--resize-min 8: expected at least --resolution"),
        (["--resize-max=8"], "--resize-max 8: expected at least --resize-min"),
        (["--flip=2"], "--flip 2.0: expected 0 to 1"),
        (["--split=val"], "--split val: expected some of train,validation,test"),
        (["--rows=1"], "--rows 1: expected at least 2"),
        (["--max-refused=2"], "--max-refused 2.0: expected 0 to 1"),
        (["--verify"], "expected either --data and --model, or --verify"),
        (["--data=nowhere"], "nowhere"),
        (["--model=/nowhere"], "/nowhere"),
        (["--host=2"], "--host 2: expected 0 to 0"),
        (["--output=gs://b/x"], "--output gs://b/x: expected a local folder"),
        (["--data=gs://b/x"], "--data gs://b/x: expected a local folder"),
        (["--output=/dev/null", "--model=/nowhere"], "no file can be made in /dev/null"),
    ],
)
def test_wrong_options_are_one_line(data, model, tmp_path, options, message, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert latents.run(data, model, tmp_path / "out", *options) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not list(tmp_path.iterdir())
