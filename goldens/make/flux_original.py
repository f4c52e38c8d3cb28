"""The small FLUX.1 folder's transformer and autoencoder in their authors' layout, as diffusers' converters read it.

    python flux_original.py ../flux

writes original/flux1.safetensors and original/ae.safetensors there. Each is converted back by diffusers and compared.
"""
import inspect, os, re, sys
import torch
from safetensors.torch import load_file, save_file
from diffusers import AutoencoderKL
from diffusers.loaders import single_file_utils as S

folder = sys.argv[1]
load = lambda part: load_file(f"{folder}/model/{part}/diffusion_pytorch_model.safetensors")


def transformer(w):
    out = {}
    def put(theirs, *ours):
        for leaf in ("weight", "bias"):
            if f"{ours[0]}.{leaf}" in w:
                out[f"{theirs}.{leaf}"] = torch.cat([w[f"{name}.{leaf}"] for name in ours])
    embed = "time_text_embed"
    for theirs, ours in (("time_in", "timestep_embedder"), ("guidance_in", "guidance_embedder"), ("vector_in", "text_embedder")):
        put(f"{theirs}.in_layer", f"{embed}.{ours}.linear_1"); put(f"{theirs}.out_layer", f"{embed}.{ours}.linear_2")
    put("img_in", "x_embedder"); put("txt_in", "context_embedder"); put("final_layer.linear", "proj_out")
    for leaf in ("weight", "bias"):
        scale, shift = w[f"norm_out.linear.{leaf}"].chunk(2); out[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat([shift, scale])
    for i in sorted({int(k.split(".")[1]) for k in w if k.startswith("transformer_blocks.")}):
        b, o = f"transformer_blocks.{i}", f"double_blocks.{i}"
        put(f"{o}.img_attn.qkv", *[f"{b}.attn.to_{x}" for x in "qkv"]); put(f"{o}.txt_attn.qkv", *[f"{b}.attn.add_{x}_proj" for x in "qkv"])
        put(f"{o}.img_attn.proj", f"{b}.attn.to_out.0"); put(f"{o}.txt_attn.proj", f"{b}.attn.to_add_out")
        put(f"{o}.img_mod.lin", f"{b}.norm1.linear"); put(f"{o}.txt_mod.lin", f"{b}.norm1_context.linear")
        for theirs, ours in (("img_mlp", "ff"), ("txt_mlp", "ff_context")):
            put(f"{o}.{theirs}.0", f"{b}.{ours}.net.0.proj"); put(f"{o}.{theirs}.2", f"{b}.{ours}.net.2")
        for theirs, ours in (("img", ""), ("txt", "added_")):
            out[f"{o}.{theirs}_attn.norm.query_norm.scale"] = w[f"{b}.attn.norm_{ours}q.weight"]; out[f"{o}.{theirs}_attn.norm.key_norm.scale"] = w[f"{b}.attn.norm_{ours}k.weight"]
    for i in sorted({int(k.split(".")[1]) for k in w if k.startswith("single_transformer_blocks.")}):
        b, o = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        put(f"{o}.linear1", *[f"{b}.attn.to_{x}" for x in "qkv"], f"{b}.proj_mlp"); put(f"{o}.linear2", f"{b}.proj_out"); put(f"{o}.modulation.lin", f"{b}.norm.linear")
        out[f"{o}.norm.query_norm.scale"] = w[f"{b}.attn.norm_q.weight"]; out[f"{o}.norm.key_norm.scale"] = w[f"{b}.attn.norm_k.weight"]
    return out


def autoencoder(w):
    stages = 1 + max(int(m.group(1)) for m in (re.match(r"decoder\.up_blocks\.(\d+)", k) for k in w) if m)
    out = {}
    for key, value in w.items():
        k = re.sub(r"decoder\.up_blocks\.(\d+)", lambda m: f"decoder.up.{stages - 1 - int(m.group(1))}", key).replace("encoder.down_blocks.", "encoder.down.")
        k = k.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample").replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        k = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m.group(1)) + 1}", k).replace(".resnets.", ".block.")
        if "mid_block.attentions.0" in k:
            k = k.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm").replace("to_out.0", "proj_out").replace("to_", "")
            value = value[:, :, None, None] if value.ndim == 2 else value
        out[k] = value
    return out


def same(found, expected):
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    assert all(torch.equal(found[k].reshape(v.shape), v) for k, v in expected.items())


ours = load("transformer"); theirs = transformer(ours)
# The converter knows the published width alone.
source = inspect.getsource(S.convert_flux_transformer_checkpoint_to_diffusers).replace("3072", str(ours["x_embedder.weight"].shape[0]))
space = dict(vars(S)); exec(source, space); same(space["convert_flux_transformer_checkpoint_to_diffusers"](dict(theirs)), ours)
vae = load("vae"); ae = autoencoder(vae)
same(S.convert_ldm_vae_checkpoint(dict(ae), AutoencoderKL.load_config(f"{folder}/model/vae")), vae)
os.makedirs(f"{folder}/original", exist_ok=True)
for name, tensors in (("flux1", theirs), ("ae", ae)):
    save_file({k: v.contiguous() for k, v in tensors.items()}, f"{folder}/original/{name}.safetensors", metadata={"format": "pt"})
print("converted back by diffusers, equal")
