"""Stable Diffusion 3: a tiny pipeline, and a tiny transformer with what 3.5 adds."""
from families import *


def sd3_transformer(seed, **kw):
    tr = D.SD3Transformer2DModel(patch_size=2, in_channels=16, out_channels=16, attention_head_dim=8, num_attention_heads=3, caption_projection_dim=24, pooled_projection_dim=28, joint_attention_dim=40, **kw)
    return healthy_init(tr, seed, rules=[(".linear.weight", lambda n, p, z: 0.5 * z / p.shape[1] ** 0.5 if "norm" in n else z / p.shape[1] ** 0.5)])


def clip_with_act(root, n, *a):
    m = clip_text(*a, True); m.save_pretrained(f"{root}/{n}"); return m


@torch.no_grad()
def sd3(split):
    d = out_dir(split, "sd3"); root = root_of(split, "sd3"); s = 7000 + SEED[split]; P = PROMPT[split]
    v = tt.clip(f"{root}/tokenizer"); tt.clip(f"{root}/tokenizer_2", pad="!"); tok3 = tt.t5(f"{root}/tokenizer_3")
    te = clip_with_act(root, "text_encoder", len(v), 16, 2, 2, 32, 12, "quick_gelu", s + 1); te2 = clip_with_act(root, "text_encoder_2", len(v), 20, 4, 3, 40, 16, "gelu", s + 2)
    te3 = t5_enc((len(tok3) + 63) // 64 * 64, 40, 12, 3, 64, 2, s + 3); tr = sd3_transformer(s + 4, sample_size=16, num_layers=3, pos_embed_max_size=65)
    tr.pos_embed.pos_embed += 0.1 * torch.randn(tr.pos_embed.pos_embed.shape, generator=gen(s + 5))  # the file's table counts, not the formula
    vae = kl(16, [8, 16, 16, 16], 4, 1.5305, 0.0609, False, 1024); healthy_init(vae, s + 6); calibrate_vae(vae, 64, 64, s)
    sch = D.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    for n, m in (("text_encoder_3", te3), ("transformer", tr), ("vae", vae), ("scheduler", sch)): m.save_pretrained(f"{root}/{n}")
    published_clip(root, "text_encoder", "text_encoder_2"); index(root, "StableDiffusion3Pipeline", {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "text_encoder": ["transformers", "CLIPTextModelWithProjection"], "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "text_encoder_3": ["transformers", "T5EncoderModel"],
          "tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "CLIPTokenizer"], "tokenizer_3": ["transformers", "T5TokenizerFast"], "transformer": ["diffusers", "SD3Transformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]})
    pipe = D.StableDiffusion3Pipeline.from_pretrained(root, torch_dtype=torch.float32); t, j = {}, {"tokens": []}
    for a, b in ((pipe.text_encoder, te), (pipe.text_encoder_2, te2), (pipe.text_encoder_3, te3), (pipe.transformer, tr)): assert all(torch.equal(x, y) for x, y in zip(sorted_params(a), sorted_params(b)))
    for i, p in enumerate(P):
        rows = {k: tok(p, padding="max_length", max_length=n, truncation=True).input_ids for k, tok, n in (("clip", pipe.tokenizer, 77), ("clip2", pipe.tokenizer_2, 77), ("t5", pipe.tokenizer_3, 32))}
        j["tokens"].append({"prompt": p, **rows}); t[f"p{i}.text"], _, t[f"p{i}.pooled"], _ = pipe.encode_prompt(p, p, p, do_classifier_free_guidance=False, max_sequence_length=32)
    m = pipe.transformer
    for ci, (h, w, ts) in enumerate(((64, 64, 1000.0), (64, 96, 412.5))):
        k = f"case{ci}"; x = torch.randn((1, 16, h // 8, w // 8), generator=gen(s + 20 + ci)); mods = {"time_text_embed": m.time_text_embed, "pos_embed": m.pos_embed, "context_embedder": m.context_embedder, **{f"block{i}": b for i, b in enumerate(m.transformer_blocks)}, "norm_out": m.norm_out}
        hs = hooks_into(t, k, mods) if ci == 0 else []
        t[f"{k}.out"] = m(hidden_states=x, timestep=torch.tensor([ts]), pooled_projections=t["p0.pooled"], encoder_hidden_states=t["p0.text"], return_dict=False)[0]; [q.remove() for q in hs]; t[f"{k}.latents"], t[f"{k}.timestep"] = x, torch.tensor([ts])
    # The default length once; shorter rows otherwise.
    j["s4"] = run_pipe(t, d, "s4", pipe, prompt=P[0], height=64, width=64, num_inference_steps=4, guidance_scale=1.0, max_sequence_length=256, seed=s + 60)
    j["s4_cfg5_64x96"] = run_pipe(t, d, "s4_cfg5_64x96", pipe, prompt=P[0], negative_prompt=P[1], height=64, width=96, num_inference_steps=4, guidance_scale=5.0, max_sequence_length=32, seed=s + 61)
    j["s3_cfg3_noneg"] = run_pipe(t, d, "s3_cfg3_noneg", pipe, prompt=P[2], height=96, width=64, num_inference_steps=3, guidance_scale=3.0, max_sequence_length=32, seed=s + 62)
    pipe = D.StableDiffusion3Pipeline.from_pretrained(root, torch_dtype=torch.float32, text_encoder_3=None, tokenizer_3=None)
    j["s4_cfg3_no_t5"] = run_pipe(t, d, "s4_cfg3_no_t5", pipe, prompt=P[0], negative_prompt=P[1], height=64, width=64, num_inference_steps=4, guidance_scale=3.0, max_sequence_length=32, seed=s + 63)
    sd35(d, s + 100); save_tensors(f"{d}/goldens.safetensors", t); save_json(f"{d}/goldens.json", j); return root


@torch.enable_grad()
def sd35(d, s):
    """norms of queries and keys, and blocks whose pictures attend to themselves once more; two samples of different times"""
    m = sd3_transformer(s, sample_size=8, num_layers=3, pos_embed_max_size=7, qk_norm="rms_norm", dual_attention_layers=(0, 2)); shutil.rmtree(f"{d}/sd35", ignore_errors=True); m.save_pretrained(f"{d}/sd35/transformer")
    t = {"latents": torch.randn((2, 16, 8, 12), generator=gen(s + 1)), "text": torch.randn((2, 9, 40), generator=gen(s + 2)), "pooled": torch.randn((2, 28), generator=gen(s + 3)), "timestep": torch.tensor([871.0, 93.5])}; hs = hooks_into(t, "states", {f"block{i}": b for i, b in enumerate(m.transformer_blocks)})
    t["out"] = m(hidden_states=t["latents"], timestep=t["timestep"], pooled_projections=t["pooled"], encoder_hidden_states=t["text"], return_dict=False)[0]; [q.remove() for q in hs]
    t["out"].square().sum().backward(); g = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
    for n in ("transformer_blocks.0.attn2.to_k.weight", "transformer_blocks.0.attn2.norm_q.weight", "transformer_blocks.0.norm1.linear.weight", "transformer_blocks.1.attn.norm_added_k.weight", "transformer_blocks.2.attn2.to_out.0.bias", "transformer_blocks.2.norm1_context.linear.weight", "pos_embed.proj.weight", "context_embedder.weight"): t[f"grad.{n}"] = g[n]
    save_tensors(f"{d}/sd35/goldens.safetensors", t)


if __name__ == "__main__":
    r = sd3("open"); print("done", os.popen(f"du -sh {r}").read().strip())
