"""Laws of export and import: codes and reconstructions are the same on both sides."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tubelet.cli.main import main
from tubelet.errors import TubeletError
from tubelet_trainer.sae.config import (
    AbsTopKConfig,
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    ReLUConfig,
    TopKConfig,
)
from tubelet_trainer.sae.interop.exchange import ExportConfig, ImportConfig, export_sae, import_sae
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.normalization import Normalization
from tubelet_trainer.sae.sae_files import load_record, load_sae, save_sae

D, F, N, K = 12, 48, 64, 6
RECIPES = {
    "relu": ReLUConfig(latents=F),
    "gated": GatedConfig(latents=F),
    "jumprelu": JumpReLUConfig(latents=F, initial_threshold=0.4),
    "topk": TopKConfig(latents=F, k=K),
    "batchtopk": BatchTopKConfig(latents=F, k=K),
    "abstopk": AbsTopKConfig(latents=F, k=K),
}
ARCHITECTURES = {"relu": "standard", "batchtopk": "jumprelu"}

# A Python that has sae_lens, in an environment of its own: it needs other versions than we do.
SAELENS_PYTHON = os.environ.get("TUBELET_SAELENS_PYTHON")


def tokens(seed=0):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed)) * 3 + 2


def trained(folder, config, whitened=False):
    """An SAE in general position that has seen a batch, in a run's folder."""
    generator = torch.Generator().manual_seed(1)
    normalization = Normalization(torch.randn(D, generator=generator), torch.tensor(2.5))
    if whitened:
        matrix = torch.eye(D) + 0.1 * torch.randn(D, D, generator=generator)
        normalization = Normalization(normalization.mean, torch.tensor(1.0), matrix, matrix.inverse())
        config = config.model_copy(
            update={"normalization": config.normalization.model_copy(update={"whitening": "zca"})}
        )
    sae = SAE(config, normalization)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        sae.train()(tokens())
    save_sae(folder, sae.eval(), {"hook": "blocks.6"})
    return load_sae(folder)


def as_saelens_says(folder, x):
    """Codes and reconstruction as the classes of sae_lens 6.54 compute them from the files."""
    cfg, t = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    assert cfg["normalize_activations"] == "none"
    assert cfg["apply_b_dec_to_input"]
    linear = (x - t["b_dec"]) @ t["W_enc"]
    match cfg["architecture"]:
        case "standard":
            codes = (linear + t["b_enc"]).relu()
        case "gated":
            gate = linear + t["b_gate"] > 0
            codes = gate * ((x - t["b_dec"]) @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]).relu()
        case "jumprelu":
            pre = linear + t["b_enc"]
            codes = pre.relu() * (pre > t["threshold"])
        case "topk":
            top = (linear + t["b_enc"]).topk(cfg["k"])
            codes = torch.zeros_like(linear).scatter(1, top.indices, top.values.relu())
        case "abstopk":
            pre = linear + t["b_enc"]
            codes = torch.zeros_like(pre).scatter(1, (i := pre.abs().topk(cfg["k"]).indices), pre.gather(1, i))
    return codes, codes @ t["W_dec"] + t["b_dec"]


def test_an_exported_sae_keeps_its_provenance_when_imported(tmp_path):
    trained(tmp_path / "run", RECIPES["topk"], False)
    out = export_sae(ExportConfig(run=tmp_path / "run", out=tmp_path / "out"))
    known = {"hook": "blocks.6", "plan_digest": "sha256:a", "backbone": {"id": "b"}}
    cfg = json.loads((out / "cfg.json").read_text())
    cfg["metadata"]["tubelet"]["provenance"] = known
    (out / "cfg.json").write_text(json.dumps(cfg))
    back = load_record(import_sae(ImportConfig(path=out, out=tmp_path / "back")))
    assert known.items() <= back.provenance.items()
    # Of another library's there is nothing to know, whatever stands there.
    for strange in ({}, "text", [1], None):
        cfg["metadata"]["tubelet"] = strange
        (out / "cfg.json").write_text(json.dumps(cfg))
        found = load_record(import_sae(ImportConfig(path=out, out=tmp_path / f"foreign-{strange!s}")))
        assert found.provenance.keys() == {"imported"}


@pytest.mark.parametrize("whitened", [False, True], ids=["scaled", "whitened"])
@pytest.mark.parametrize("kind", RECIPES)
def test_saelens_would_compute_the_same_from_raw_tokens(kind, whitened, tmp_path):
    sae = trained(tmp_path / "run", RECIPES[kind], whitened)
    out = export_sae(ExportConfig(run=tmp_path / "run", out=tmp_path / "out"))
    assert json.loads((out / "cfg.json").read_text())["architecture"] == ARCHITECTURES.get(kind, kind)
    codes, recon = as_saelens_says(out, tokens(3))
    torch.testing.assert_close(codes, sae.encode(tokens(3)), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(recon, sae(tokens(3)), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", RECIPES)
def test_what_goes_out_to_saelens_comes_back_the_same(kind, tmp_path):
    sae = trained(tmp_path / "run", RECIPES[kind])
    export_sae(ExportConfig(run=tmp_path / "run", out=tmp_path / "out"))
    back = load_sae(import_sae(ImportConfig(path=tmp_path / "out", out=tmp_path / "back", hook="blocks.6")))
    torch.testing.assert_close(back.encode(tokens(3)), sae.encode(tokens(3)), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(back(tokens(3)), sae(tokens(3)), atol=2e-4, rtol=1e-4)
    assert load_record(tmp_path / "back").provenance["hook"] == "blocks.6"


@pytest.mark.skipif(SAELENS_PYTHON is None, reason="set TUBELET_SAELENS_PYTHON to a Python that has sae_lens")
def test_saelens_itself_reads_every_kind(tmp_path):
    for kind, recipe in RECIPES.items():
        sae = trained(tmp_path / kind, recipe)
        out = export_sae(ExportConfig(run=tmp_path / kind, out=tmp_path / f"{kind}-out"))
        expected = {"x": tokens(3), "codes": sae.encode(tokens(3)), "recon": sae(tokens(3))}
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in expected.items()}, out / "expected.safetensors"
        )
    code = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from sae_lens import SAE
for folder in Path(sys.argv[1]).glob("*-out"):
    sae, want = SAE.load_from_disk(str(folder)), load_file(folder / "expected.safetensors")
    with torch.no_grad():
        codes = sae.encode(want["x"])
        torch.testing.assert_close(codes, want["codes"], atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(sae.decode(codes), want["recon"], atol=2e-4, rtol=1e-4)
    sae.save_model(folder / "again")
    print("read", folder.name, type(sae).__name__)
"""
    done = subprocess.run([SAELENS_PYTHON, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("read") == len(RECIPES)
    # And what it wrote itself comes back here.
    for kind in RECIPES:
        path = tmp_path / f"{kind}-out"
        back = load_sae(import_sae(ImportConfig(path=path / "again", out=tmp_path / f"{kind}-back")))
        want = load_file(path / "expected.safetensors")
        torch.testing.assert_close(back.encode(want["x"]), want["codes"], atol=2e-4, rtol=1e-4)


def test_saelens_files_with_other_conventions_are_read(tmp_path):
    """Without input bias, with unnormalized decoder rows that rescale the codes, in the layout before version 6."""
    generator = torch.Generator().manual_seed(0)
    t = {
        name: torch.randn(*shape, generator=generator)
        for name, shape in {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}.items()
    }
    save_file(t, tmp_path / "sae_weights.safetensors")
    cfg = {"architecture": "topk", "d_in": D, "d_sae": F, "k": K, "apply_b_dec_to_input": False}
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "rescale_acts_by_decoder_norm": True}))
    back = load_sae(import_sae(ImportConfig(path=tmp_path, out=tmp_path / "a")))
    pre = (tokens() @ t["W_enc"] + t["b_enc"]) * t["W_dec"].norm(dim=1)
    top = pre.topk(K)
    codes = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    torch.testing.assert_close(back.encode(tokens()), codes, atol=1e-3, rtol=1e-4)
    recon = codes / t["W_dec"].norm(dim=1) @ t["W_dec"] + t["b_dec"]
    torch.testing.assert_close(back(tokens()), recon, atol=1e-3, rtol=1e-4)

    old = {"d_in": D, "d_sae": F, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    assert load_sae(import_sae(ImportConfig(path=tmp_path, out=tmp_path / "b"))).config.k == 3


def unfolded(folder, kind, seed=0):
    """What SAELens leaves of a training under way: weights for scaled or whitened tokens. And what it computes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    t = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    folder.mkdir()
    save_file(t, folder / "sae_weights.safetensors")
    cfg = {"architecture": "topk", "d_in": D, "d_sae": F, "k": K, "normalize_activations": kind}
    (folder / "cfg.json").write_text(json.dumps({**cfg, "apply_b_dec_to_input": seed == 0}))
    mean, matrix = torch.zeros(D), torch.eye(D) * 0.37
    if kind == "covariance_whitening":
        mean, matrix = torch.randn(D, generator=generator), torch.eye(D) + 0.2 * torch.randn(D, D, generator=generator)
        inverse = matrix.double().inverse().contiguous()
        whitening = {"mean": mean.double(), "matrix": matrix.double(), "inverse_matrix": inverse}
        save_file(whitening, folder / "activation_whitening.safetensors")
    scaler = {"scaling_factor": None if kind == "covariance_whitening" else 0.37}
    (folder / "activation_scaler.json").write_text(json.dumps({**scaler, "has_whitening": kind[0] == "c"}))

    def run(x):
        inner = (x - mean) @ matrix
        pre = (inner - t["b_dec"] if seed == 0 else inner) @ t["W_enc"] + t["b_enc"]
        top = pre.topk(K)
        codes = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        return codes, (codes @ t["W_dec"] + t["b_dec"]) @ matrix.inverse() + mean

    return run


@pytest.mark.parametrize("seed", [0, 1], ids=["input bias", "no input bias"])
@pytest.mark.parametrize("kind", ["expected_average_only_in", "covariance_whitening"])
def test_what_saelens_has_not_folded_is_folded_here(kind, seed, tmp_path):
    run = unfolded(tmp_path / "in", kind, seed)
    back = load_sae(import_sae(ImportConfig(path=tmp_path / "in", out=tmp_path / "back")))
    codes, recon = run(tokens())
    torch.testing.assert_close(back.encode(tokens()), codes, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(back(tokens()), recon, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("kind", ["expected_average_only_in", "covariance_whitening"])
def test_what_saelens_has_not_folded_is_refused_without_its_numbers(kind, tmp_path):
    unfolded(tmp_path / "in", kind)
    scaler, config = (
        tmp_path / "in" / "activation_scaler.json",
        ImportConfig(path=tmp_path / "in", out=tmp_path / "back"),
    )
    for path in (tmp_path / "in").glob("activation_*"):
        path.unlink()
    with pytest.raises(TubeletError, match=f"'{kind}', which SAELens has not folded.*activation_.* is missing"):
        import_sae(config)
    if kind == "expected_average_only_in":
        for text, words in (
            ('{"scaling_factor": null}', "None"),
            ('{"scaling_factor": 0}', "0"),
            ("{}", "cannot be read"),
        ):
            scaler.write_text(text)
            with pytest.raises(TubeletError, match=words):
                import_sae(config)
    assert not (tmp_path / "back").exists()


@pytest.mark.skipif(SAELENS_PYTHON is None, reason="set TUBELET_SAELENS_PYTHON to a Python that has sae_lens")
def test_our_folding_is_that_of_saelens(tmp_path):
    code = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening
torch.manual_seed(0)
for kind in ("expected_average_only_in", "covariance_whitening"):
    folder = Path(sys.argv[1]) / kind
    sae = TopKSAE(TopKSAEConfig(d_in=12, d_sae=48, k=6, normalize_activations=kind))
    with torch.no_grad():
        sae.b_enc.normal_()
        sae.b_dec.normal_()
    sae.save_model(folder)
    x = torch.randn(64, 12) * 3 + 2
    scaler = ActivationScaler(scaling_factor=0.37 if kind[0] == "e" else None)
    if kind[0] == "c":
        matrix = torch.randn(12, 12, dtype=torch.float64)
        scaler.whitening = ActivationWhitening(torch.randn(12, dtype=torch.float64), matrix, matrix.inverse())
    scaler.save(str(folder / "activation_scaler.json"))
    with torch.no_grad():
        codes = sae.encode(scaler.scale(x))
        recon = scaler.unscale(sae.decode(codes))
    save_file({"x": x, "codes": codes.contiguous(), "recon": recon.contiguous()}, folder / "expected.safetensors")
"""
    done = subprocess.run([SAELENS_PYTHON, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in ("expected_average_only_in", "covariance_whitening"):
        back = load_sae(import_sae(ImportConfig(path=tmp_path / kind, out=tmp_path / f"{kind}-back")))
        want = load_file(tmp_path / kind / "expected.safetensors")
        torch.testing.assert_close(back.encode(want["x"]), want["codes"], atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(back(want["x"]), want["recon"], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "temporal"}, "architecture 'temporal'"),
        ({"normalize_activations": "layer_norm"}, "depends on each token"),
        ({"reshape_activations": "hook_z"}, "reshaped"),
        ({"d_sae": None}, "lacks d_sae"),
        ({"d_sae": F + 1}, "does not fit cfg.json"),
        ({"architecture": "gated"}, "b_gate"),
    ],
)
def test_what_has_no_counterpart_is_refused(change, words, tmp_path):
    trained(tmp_path / "run", RECIPES["topk"])
    out = export_sae(ExportConfig(run=tmp_path / "run", out=tmp_path / "out"))
    cfg = json.loads((out / "cfg.json").read_text())
    (out / "cfg.json").write_text(json.dumps({**cfg, **change}))
    with pytest.raises(TubeletError, match=words):
        import_sae(ImportConfig(path=out, out=tmp_path / "back"))
    assert not (tmp_path / "back").exists()


def saev_file(path, header, tensors):
    with path.open("wb") as file:
        file.write((json.dumps(header) + "\n").encode())
        torch.save(tensors, file)
    return path


def saev_weights():
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("version", ["first", "relu", "topk", "batchtopk", "batchtopk without threshold"])
def test_saev_checkpoints_of_every_age_are_read(version, tmp_path):
    t = saev_weights()
    linear = tokens() @ t["W_enc"] + t["b_enc"]
    cls = {"relu": "Relu", "topk": "TopK"}.get(version, "BatchTopK")
    header = {"schema": 4, "cfg": {"d_model": D, "d_sae": F, "activation": {"cls": cls, "params": {"top_k": K}}}}
    extra = {}
    match version:
        case "first":
            header = {"d_vit": D, "exp_factor": F // D, "sparsity_coeff": 4e-4}
            codes = ((tokens() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
        case "relu":
            codes = linear.relu()
        case "batchtopk":
            extra = {"activation.threshold": torch.tensor(2.0)}
            codes = torch.where(linear > 2.0, linear, 0)
        case _:
            top = linear.topk(K)
            codes = torch.zeros_like(linear).scatter(1, top.indices, top.values.relu())
    path = saev_file(tmp_path / "sae.pt", header, {**t, **extra})
    back = load_sae(import_sae(ImportConfig(path=path, out=tmp_path / "back", format="saev")))
    torch.testing.assert_close(back.encode(tokens()), codes, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(back(tokens()), codes @ t["W_dec"] + t["b_dec"], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("version", ["subtracted", "kept"])
@pytest.mark.parametrize("file", ["mean.npy", "mean.pt"])
def test_what_saev_did_to_its_tokens_is_folded_in(version, file, tmp_path):
    t, mean = saev_weights(), torch.linspace(-3, 5, D)
    inner = (tokens() - mean) / 1.7
    codes = ((inner - t["b_dec"] if version == "subtracted" else inner) @ t["W_enc"] + t["b_enc"]).relu()
    path = saev_file(tmp_path / "sae.pt", {"d_vit": D}, t)
    np.save(tmp_path / file, mean.numpy()) if file == "mean.npy" else torch.save(mean[None], tmp_path / file)
    config = ImportConfig(
        path=path, out=tmp_path / "back", format="saev", input_bias=version, mean=tmp_path / file, scale=1.7
    )
    back = load_sae(import_sae(config))
    torch.testing.assert_close(back.encode(tokens()), codes, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(back(tokens()), (codes @ t["W_dec"] + t["b_dec"]) * 1.7 + mean, atol=1e-3, rtol=1e-4)
    assert load_record(tmp_path / "back").provenance["imported"]["scale"] == 1.7


def test_a_mean_that_does_not_fit_is_refused(tmp_path, capsys):
    path = saev_file(tmp_path / "sae.pt", {"d_vit": D}, saev_weights())
    np.save(tmp_path / "short.npy", np.zeros(D - 1))
    np.save(tmp_path / "nan.npy", np.full(D, np.nan))
    (tmp_path / "text.npy").write_text("0")
    torch.save({"mean": Bomb()}, tmp_path / "bomb.pt")
    for name, words in [
        ("short.npy", r"shape \[11\], not 12"), ("nan.npy", "not 12 finite"), ("text.npy", "cannot be read"),
        ("bomb.pt", "cannot be read"), ("none.npy", "No file"),
    ]:  # fmt: skip
        with pytest.raises(TubeletError, match=words):
            import_sae(ImportConfig(path=path, out=tmp_path / "back", format="saev", mean=tmp_path / name))
    assert main(["import", str(tmp_path), "--out", str(tmp_path / "x"), "--scale", "2"]) == 2
    assert "Field 'scale'" in capsys.readouterr().err


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_a_saev_file_with_code_in_it_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saev_file(tmp_path / "sae.pt", {"d_vit": D}, {**saev_weights(), "b_dec": Bomb()})
    plain = tmp_path / "plain.pt"
    plain.write_bytes(b"{}\n" + pickle.dumps(Bomb()))
    for file in (path, plain):
        with pytest.raises(TubeletError, match="not unpickled"):
            import_sae(ImportConfig(path=file, out=tmp_path / "back", format="saev"))
    assert not (tmp_path / "exploded").exists()


def test_other_files_are_not_taken_for_saevs(tmp_path):
    junk = tmp_path / "junk.pt"
    torch.save(saev_weights(), junk)
    unknown = saev_file(tmp_path / "u.pt", {"cfg": {"activation": {"cls": "AbsBatchTopK"}}}, saev_weights())
    for path, words in ((junk, "line of JSON"), (unknown, "AbsBatchTopK"), (tmp_path / "none", "No file")):
        with pytest.raises(TubeletError, match=words):
            import_sae(ImportConfig(path=path, out=tmp_path / "back", format="saev"))


def test_the_verbs_run_and_refuse_a_taken_folder(tmp_path, capsys):
    sae = trained(tmp_path / "run", RECIPES["batchtopk"])
    assert main(["export", str(tmp_path / "run"), "--format", "safetensors", "--out", str(tmp_path / "plain")]) == 0
    plain = load_sae(tmp_path / "plain")
    assert plain.normalization.scale == 1
    torch.testing.assert_close(plain.encode(tokens(3)), sae.encode(tokens(3)), atol=2e-4, rtol=1e-4)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "plain")]) == 2
    assert "already holds an SAE" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nothing"), "--out", str(tmp_path / "x")]) == 2
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "lens")]) == 0
    assert main(["import", str(tmp_path / "lens"), "--out", str(tmp_path / "back")]) == 0
    assert load_record(tmp_path / "back").provenance["imported"]["format"] == "saelens"
